//! The guest_memfd as a file: what fstat(2) says of it, which system calls it has, its times and its names.

use std::fs;
use std::process::ExitCode;
use std::thread::sleep;
use std::time::Duration;

use gmemtest::harness::{Context, Side, Stop, TestResult};
use gmemtest::machine::{Errno, Exit, FileOp, GuestMemfd, GuestOp, MemoryRegion, PAGE_SIZE, Protection, Vm, VmConfig};
use gmemtest::uapi::kvm::{GUEST_MEMFD_FLAG_INIT_SHARED, GUEST_MEMFD_FLAG_MMAP, KVM_CAP_GUEST_MEMFD_FLAGS};
use gmemtest::{claim_eq, claim_ne, claim_ok};
use nix::time::ClockId;

gmemtest::suite! {
    /// A guest_memfd has four file operations: mmap, open, release and fallocate. Everything else the VFS refuses, or
    /// does without the file noticing. Its size is fixed for life, and its setattr always fails.
    pub static SUITE: gmem_file needs [Vm, GuestMemfd] {
        /// A system call that the file does not have gives exactly this result, on files of every combination of flags,
        /// and leaves size and pages as they were (guest_memfd notes 2.2; kvm_gmem_fops, kvm_gmem_iops). A failure
        /// means that contents can be reached, or that the size can be changed, behind KVM's back.
        call_has_its_result_and_no_effect[CALLS];

        /// fstatfs names the file system: that of anonymous inodes up to 6.18, GUEST_MEMFD_MAGIC since 6.19 gave
        /// guest_memfd inodes of its own. A failure means that a tool takes the file for one of another kind.
        statfs_names_the_file_system;

        /// /proc/self/fd/N of a guest_memfd cannot be opened again: the inode has no open (no_open(), ENXIO).
        /// A failure means that the restrictions of the first descriptor can be shed.
        reopening_through_proc_is_enxio needs [RealFiles];

        /// st_mode is a regular file, readable and writable by its owner only. A failure means that another user may
        /// open the file where it has a name.
        mode_is_a_regular_file_of_its_owner;

        /// st_size is what was asked for, and st_blksize is the page size (guest_memfd_test). A failure means that a
        /// receiver of the descriptor cannot learn the size.
        size_and_block_size_are_as_created;

        /// st_blocks stays 0 whatever is allocated: i_blocks is never updated. A failure means that the file began to
        /// count its blocks, and a better way to see its pages exists.
        blocks_stay_zero_when_pages_are_allocated;

        /// st_nlink is 1 although the file has no name in any directory. A failure means that a tool takes the file for
        /// a deleted one.
        link_count_is_one;

        /// st_uid and st_gid are the file system ids of the thread that created the file. A failure means that memory
        /// is accounted to somebody else.
        owner_is_the_creator needs [RealFiles];

        /// mtime advances with every fallocate that succeeds and with a host write fault, and with nothing else
        /// (file_modified() in kvm_gmem_fallocate(), file_update_time() for a shared write fault). A failure means that
        /// a change of the file cannot be seen, or is seen where there was none.
        allocation_moves_mtime[TIMES];

        /// mtime and the faults of the host: a write fault advances it, a read fault and a store that takes no fault do
        /// not. A failure means that the fault path differs from that of any other file.
        host_access_moves_mtime_only_by_write_fault[FAULTS] needs [GmemInitShared];

        /// Accesses of the guest, first ones too, do not touch mtime: KVM allocates and maps without the file's faults.
        /// A failure means that guest accesses leave traces in the host, and cost an inode update.
        guest_access_does_not_move_mtime needs [GmemInitShared, Guest];

        /// The name of the descriptor in /proc/self/fd. A failure means that tools that look for guest memory in /proc
        /// do not find it.
        descriptor_has_its_name_in_proc needs [RealFiles];

        /// The name of a mapping in /proc/self/maps, where it is marked shared. A failure means that a mapping of guest
        /// memory cannot be told from others.
        mapping_has_its_name_in_proc needs [GmemMmap, RealFiles];

        /// fdinfo gives the inode that fstat gives, and position 0. A failure means that two descriptors of one file
        /// cannot be matched in /proc.
        fdinfo_shows_the_inode needs [RealFiles];
    }
}

/// A call and its result.
struct Call {
    op: FileOp,
    result: Result<i64, Errno>,
}

const fn call(op: FileOp, result: Result<i64, Errno>) -> Call {
    Call { op, result }
}

const PAGE: usize = PAGE_SIZE as usize;
const EINVAL: Result<i64, Errno> = Err(Errno::EINVAL);
const ESPIPE: Result<i64, Errno> = Err(Errno::ESPIPE);

const CALLS: &[(&str, Call)] = &[
    ("read", call(FileOp::Read(PAGE), EINVAL)),
    ("read_of_nothing", call(FileOp::Read(0), EINVAL)),
    ("readv", call(FileOp::Readv(PAGE), EINVAL)),
    ("write", call(FileOp::Write(PAGE), EINVAL)),
    ("write_of_nothing", call(FileOp::Write(0), EINVAL)),
    ("writev", call(FileOp::Writev(PAGE), EINVAL)),
    ("pread", call(FileOp::Pread(PAGE, 0), ESPIPE)),
    ("pread_beyond_the_end", call(FileOp::Pread(PAGE, 1 << 40), ESPIPE)),
    ("pread_at_a_negative_offset", call(FileOp::Pread(PAGE, -1), EINVAL)),
    ("pwrite", call(FileOp::Pwrite(PAGE, 0), ESPIPE)),
    ("pwrite_at_a_negative_offset", call(FileOp::Pwrite(PAGE, -1), EINVAL)),
    ("preadv", call(FileOp::Preadv(PAGE, 0), ESPIPE)),
    ("preadv_at_a_negative_offset", call(FileOp::Preadv(PAGE, -1), EINVAL)),
    ("pwritev", call(FileOp::Pwritev(PAGE, 0), ESPIPE)),
    ("pwritev_at_a_negative_offset", call(FileOp::Pwritev(PAGE, -1), EINVAL)),
    ("lseek_set", call(FileOp::Seek(0, libc::SEEK_SET), ESPIPE)),
    ("lseek_set_negative", call(FileOp::Seek(-1, libc::SEEK_SET), ESPIPE)),
    ("lseek_current", call(FileOp::Seek(0, libc::SEEK_CUR), ESPIPE)),
    ("lseek_end", call(FileOp::Seek(0, libc::SEEK_END), ESPIPE)),
    ("lseek_data", call(FileOp::Seek(0, libc::SEEK_DATA), ESPIPE)),
    ("lseek_hole", call(FileOp::Seek(0, libc::SEEK_HOLE), ESPIPE)),
    ("lseek_of_no_whence", call(FileOp::Seek(0, libc::SEEK_HOLE + 1), EINVAL)),
    ("ftruncate_to_zero", call(FileOp::Truncate(0), EINVAL)),
    ("ftruncate_to_a_page", call(FileOp::Truncate(PAGE_SIZE as i64), EINVAL)),
    ("ftruncate_to_the_same_size", call(FileOp::Truncate(4 * PAGE_SIZE as i64), EINVAL)),
    ("ftruncate_to_more", call(FileOp::Truncate(5 * PAGE_SIZE as i64), EINVAL)),
    ("ftruncate_to_a_negative_size", call(FileOp::Truncate(-1), EINVAL)),
    ("fchmod_to_the_same_mode", call(FileOp::Chmod(0o600), EINVAL)),
    ("fchmod_to_all", call(FileOp::Chmod(0o777), EINVAL)),
    ("fchown_to_the_same_owner", call(FileOp::Chown, EINVAL)),
    ("futimens", call(FileOp::Utimens, EINVAL)),
    ("fsync", call(FileOp::Fsync, EINVAL)),
    ("fdatasync", call(FileOp::Fdatasync, EINVAL)),
    ("fadvise_normal", call(FileOp::Fadvise(libc::POSIX_FADV_NORMAL), Ok(0))),
    ("fadvise_willneed", call(FileOp::Fadvise(libc::POSIX_FADV_WILLNEED), Ok(0))),
    ("fadvise_dontneed", call(FileOp::Fadvise(libc::POSIX_FADV_DONTNEED), Ok(0))),
    ("add_seals", call(FileOp::AddSeals(libc::F_SEAL_GROW), EINVAL)),
    ("get_seals", call(FileOp::GetSeals, EINVAL)),
    ("sendfile", call(FileOp::Sendfile(PAGE), EINVAL)),
    ("splice", call(FileOp::Splice(PAGE), EINVAL)),
    ("execveat", call(FileOp::Execve, Err(Errno::EACCES))),
    ("fionread", call(FileOp::Fionread, Err(Errno::ENOTTY))),
    ("fsetxattr", call(FileOp::Setxattr, Err(Errno::EOPNOTSUPP))),
    ("getfl_is_rdwr_largefile", call(FileOp::GetFlags, Ok(0o100_002))),
];

/// Every combination of flags that the VM accepts, 0 first.
fn flag_sets(vm: &dyn Vm) -> TestResult<Vec<u64>> {
    let supported = vm.capability(KVM_CAP_GUEST_MEMFD_FLAGS)? as u64;
    Ok((0..=supported).filter(|flags| flags & !supported == 0).collect())
}

fn call_has_its_result_and_no_effect(cx: &Context, row: &Call) -> TestResult {
    let vm = cx.machine().create_vm(VmConfig::Bare)?;
    for flags in flag_sets(&*vm)? {
        let gmem = vm.create_guest_memfd(4 * PAGE_SIZE, flags)?;
        gmem.allocate(PAGE_SIZE, PAGE_SIZE)?;
        let before = gmem.stat()?;
        let result = gmem.file_op(row.op);
        claim_eq!(result, row.result, "{:?} on a file of flags {flags:#x}", row.op);
        claim_eq!(gmem.stat()?, before, "fstat after {:?} on a file of flags {flags:#x}", row.op);
        if cx.has(gmemtest::machine::Facility::Cachestat) {
            claim_eq!(gmem.cache_stat(0, 0)?.cached, 1, "pages after {:?} on a file of flags {flags:#x}", row.op);
        }
    }
    Ok(())
}

fn statfs_names_the_file_system(cx: &Context) -> TestResult {
    const ANON_INODE_FS_MAGIC: i64 = 0x0904_1934;
    const GUEST_MEMFD_MAGIC: i64 = 0x474d_454d;
    let magic = cx.by_release(&[((6, 8), ANON_INODE_FS_MAGIC), ((6, 19), GUEST_MEMFD_MAGIC)])?;
    let vm = cx.machine().create_vm(VmConfig::Bare)?;
    let gmem = vm.create_guest_memfd(PAGE_SIZE, 0)?;
    claim_eq!(gmem.file_op(FileOp::StatfsType), Ok(magic), "f_type");
    Ok(())
}

fn reopening_through_proc_is_enxio(cx: &Context) -> TestResult {
    let vm = cx.machine().create_vm(VmConfig::Bare)?;
    let gmem = vm.create_guest_memfd(PAGE_SIZE, 0)?;
    claim_eq!(gmem.file_op(FileOp::Reopen), Err(Errno::ENXIO), "open(2) of the descriptor's link");
    Ok(())
}

fn mode_is_a_regular_file_of_its_owner(cx: &Context) -> TestResult {
    let vm = cx.machine().create_vm(VmConfig::Bare)?;
    let mode = vm.create_guest_memfd(PAGE_SIZE, 0)?.stat()?.mode;
    claim_eq!(mode, libc::S_IFREG | 0o600, "st_mode {mode:#o}");
    Ok(())
}

fn size_and_block_size_are_as_created(cx: &Context) -> TestResult {
    let vm = cx.machine().create_vm(VmConfig::Bare)?;
    for flags in flag_sets(&*vm)? {
        let stat = vm.create_guest_memfd(4 * PAGE_SIZE, flags)?.stat()?;
        claim_eq!((stat.size, stat.block_size), (4 * PAGE_SIZE as i64, PAGE_SIZE as i64), "flags {flags:#x}");
    }
    Ok(())
}

fn blocks_stay_zero_when_pages_are_allocated(cx: &Context) -> TestResult {
    let vm = cx.machine().create_vm(VmConfig::Bare)?;
    let gmem = vm.create_guest_memfd(4 * PAGE_SIZE, 0)?;
    claim_eq!(gmem.stat()?.blocks, 0, "st_blocks of a new file");
    gmem.allocate(0, 4 * PAGE_SIZE)?;
    claim_eq!(gmem.stat()?.blocks, 0, "st_blocks with every page allocated");
    Ok(())
}

fn link_count_is_one(cx: &Context) -> TestResult {
    let vm = cx.machine().create_vm(VmConfig::Bare)?;
    claim_eq!(vm.create_guest_memfd(PAGE_SIZE, 0)?.stat()?.links, 1, "st_nlink");
    Ok(())
}

/// The calling thread with another file system uid and gid, until dropped.
struct FsIds {
    uid: i32,
    gid: i32,
}

impl FsIds {
    fn set(uid: u32, gid: u32) -> FsIds {
        // SAFETY: both calls change nothing but ids of the calling thread; they give the old ones.
        unsafe { FsIds { gid: libc::setfsgid(gid), uid: libc::setfsuid(uid) } }
    }
}

impl Drop for FsIds {
    fn drop(&mut self) {
        // SAFETY: both calls change nothing but ids of the calling thread.
        unsafe {
            libc::setfsuid(self.uid as u32);
            libc::setfsgid(self.gid as u32);
        }
    }
}

fn owner_is_the_creator(cx: &Context) -> TestResult {
    let vm = cx.machine().create_vm(VmConfig::Bare)?;
    // SAFETY: geteuid and getegid cannot fail and touch no memory.
    let own = unsafe { (libc::geteuid(), libc::getegid()) };
    let stat = vm.create_guest_memfd(PAGE_SIZE, 0)?.stat()?;
    claim_eq!((stat.uid, stat.gid), own, "owner of a file made as oneself");
    if own.0 != 0 {
        gmemtest::skip!(NoPrivilege, "root: another file system uid needs CAP_SETUID (run as root)");
    }
    let other = FsIds::set(1234, 5678);
    let created = vm.create_guest_memfd(PAGE_SIZE, 0);
    drop(other);
    let stat = claim_ok!(created, "a file made with other file system ids").stat()?;
    claim_eq!((stat.uid, stat.gid), (1234, 5678), "owner of a file made with other file system ids");
    Ok(())
}

/// Waits until the clock that stamps files (CLOCK_REALTIME_COARSE, the time of the last tick) is past the file's mtime,
/// and gives that mtime.
fn wait_past_mtime(gmem: &dyn GuestMemfd) -> TestResult<i128> {
    let mtime = gmem.stat()?.modified_ns;
    loop {
        let now = nix::time::clock_gettime(ClockId::CLOCK_REALTIME_COARSE)?;
        if i128::from(now.tv_sec()) * 1_000_000_000 + i128::from(now.tv_nsec()) > mtime {
            return Ok(mtime);
        }
        sleep(Duration::from_millis(1));
    }
}

/// An fallocate of a file of four pages whose second page is allocated: mode, offset and length, and whether it moves
/// mtime.
struct Time {
    mode: i32,
    offset: u64,
    len: u64,
    moves: bool,
}

const KEEP: i32 = libc::FALLOC_FL_KEEP_SIZE;
const PUNCH: i32 = libc::FALLOC_FL_KEEP_SIZE | libc::FALLOC_FL_PUNCH_HOLE;

const TIMES: &[(&str, Time)] = &[
    ("allocate_advances", Time { mode: KEEP, offset: 0, len: PAGE_SIZE, moves: true }),
    ("allocate_of_what_is_there_advances", Time { mode: KEEP, offset: PAGE_SIZE, len: PAGE_SIZE, moves: true }),
    ("punch_advances", Time { mode: PUNCH, offset: PAGE_SIZE, len: PAGE_SIZE, moves: true }),
    ("punch_of_a_hole_advances", Time { mode: PUNCH, offset: 0, len: PAGE_SIZE, moves: true }),
    ("punch_beyond_the_end_advances", Time { mode: PUNCH, offset: 1 << 30, len: PAGE_SIZE, moves: true }),
    ("allocate_beyond_the_end_does_not", Time { mode: KEEP, offset: 1 << 30, len: PAGE_SIZE, moves: false }),
    ("unaligned_punch_does_not", Time { mode: PUNCH, offset: 1, len: PAGE_SIZE, moves: false }),
];

fn allocation_moves_mtime(cx: &Context, row: &Time) -> TestResult {
    let vm = cx.machine().create_vm(VmConfig::Bare)?;
    let gmem = vm.create_guest_memfd(4 * PAGE_SIZE, 0)?;
    gmem.allocate(PAGE_SIZE, PAGE_SIZE)?;
    let before = wait_past_mtime(&*gmem)?;
    let result = gmem.fallocate(row.mode, row.offset as i64, row.len as i64);
    claim_eq!(result.is_ok(), row.moves, "fallocate gave {result:?}; success");
    claim_eq!(gmem.stat()?.modified_ns > before, row.moves, "mtime advanced");
    Ok(())
}

/// What the host does to a file of two pages, the first of which it has read before.
#[derive(Clone, Copy)]
enum HostAccess {
    /// Reads the second page for the first time.
    FirstRead,
    /// Writes the second page for the first time.
    FirstWrite,
    /// Writes the first page, whose mapping is writable since it was read.
    WriteAfterRead,
}

const FAULTS: &[(&str, HostAccess)] = &[
    ("read_fault_does_not", HostAccess::FirstRead),
    ("write_fault_advances", HostAccess::FirstWrite),
    ("store_without_a_fault_does_not", HostAccess::WriteAfterRead),
];

fn host_access_moves_mtime_only_by_write_fault(cx: &Context, &access: &HostAccess) -> TestResult {
    let vm = cx.machine().create_vm(VmConfig::Bare)?;
    let gmem = vm.create_guest_memfd(2 * PAGE_SIZE, GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED)?;
    let mapping = gmem.map(2 * PAGE_SIZE, 0, Protection::SHARED_RW)?;
    mapping.read_u64(0)?;
    let before = wait_past_mtime(&*gmem)?;
    let moves = match access {
        HostAccess::FirstRead => {
            mapping.read_u64(PAGE_SIZE)?;
            false
        }
        HostAccess::FirstWrite => {
            mapping.write_u64(PAGE_SIZE, 1)?;
            true
        }
        HostAccess::WriteAfterRead => {
            mapping.write_u64(0, 1)?;
            false
        }
    };
    claim_eq!(gmem.stat()?.modified_ns > before, moves, "mtime advanced");
    Ok(())
}

fn guest_access_does_not_move_mtime(cx: &Context) -> TestResult {
    const GPA: u64 = 1 << 32;
    let vm = cx.machine().create_vm(VmConfig::Payload { vcpus: 1 })?;
    let gmem = vm.create_guest_memfd(2 * PAGE_SIZE, GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED)?;
    vm.set_memory_region(&MemoryRegion::new(1, GPA, 2 * PAGE_SIZE).bound_to(&*gmem, 0))?;
    let mut vcpu = vm.create_vcpu(0)?;
    let before = wait_past_mtime(&*gmem)?;
    let gpa = Side::Shared.address(&*vm, GPA);
    claim_eq!(vcpu.execute(GuestOp::Read { gpa, size: 8 }), Exit::Done(0), "a guest read of a hole");
    let write = GuestOp::Write { gpa: gpa + PAGE_SIZE, size: 8, value: 1 };
    claim_eq!(vcpu.execute(write), Exit::Done(0), "a guest write to a hole");
    claim_eq!(gmem.stat()?.modified_ns, before, "mtime afterwards");
    Ok(())
}

/// The descriptor of a file on a machine with real files.
fn fd_of(gmem: &dyn GuestMemfd) -> TestResult<i32> {
    gmem.raw_fd().ok_or_else(|| Stop::fail("a machine with real files has no descriptor"))
}

/// What /proc calls the file: since 6.19 its inode belongs to a file system of its own.
fn name_in_proc(cx: &Context) -> TestResult<&'static str> {
    cx.by_release(&[((6, 8), "anon_inode:[kvm-gmem]"), ((6, 19), "/[kvm-gmem] (deleted)")])
}

fn descriptor_has_its_name_in_proc(cx: &Context) -> TestResult {
    let name = name_in_proc(cx)?;
    let vm = cx.machine().create_vm(VmConfig::Bare)?;
    let gmem = vm.create_guest_memfd(PAGE_SIZE, 0)?;
    let link = fs::read_link(format!("/proc/self/fd/{}", fd_of(&*gmem)?))?;
    claim_eq!(link.to_string_lossy(), name, "the descriptor's link");
    Ok(())
}

fn mapping_has_its_name_in_proc(cx: &Context) -> TestResult {
    let name = name_in_proc(cx)?;
    let vm = cx.machine().create_vm(VmConfig::Bare)?;
    let gmem = vm.create_guest_memfd(2 * PAGE_SIZE, GUEST_MEMFD_FLAG_MMAP)?;
    let mapping = gmem.map(PAGE_SIZE, PAGE_SIZE, Protection::SHARED_RW)?;
    let start = format!("{:x}-", mapping.addr());
    let maps = fs::read_to_string("/proc/self/maps")?;
    let line = maps.lines().find(|line| line.starts_with(&start)).unwrap_or_default();
    let fields: Vec<&str> = line.splitn(6, ' ').collect();
    claim_eq!(fields.len(), 6, "fields of the line '{line}'");
    claim_eq!((fields[1], fields[2]), ("rw-s", "00001000"), "permissions and offset of '{line}'");
    claim_eq!(fields[4], gmem.stat()?.inode.to_string(), "inode of '{line}'");
    claim_eq!(fields[5].trim_start(), name, "name of '{line}'");
    Ok(())
}

fn fdinfo_shows_the_inode(cx: &Context) -> TestResult {
    let vm = cx.machine().create_vm(VmConfig::Bare)?;
    let gmem = vm.create_guest_memfd(PAGE_SIZE, 0)?;
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", fd_of(&*gmem)?))?;
    let field = |name: &str| info.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).map(str::trim);
    claim_eq!(field("ino"), Some(gmem.stat()?.inode.to_string().as_str()), "ino in fdinfo");
    claim_eq!(field("pos"), Some("0"), "pos in fdinfo");
    claim_ne!(field("flags"), None, "flags in fdinfo");
    Ok(())
}

/// The stand-alone binary.
pub fn main() -> ExitCode {
    gmemtest::cli::selftest_main(&[&SUITE])
}
