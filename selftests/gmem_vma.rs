//! What else a process may do with its mappings of a guest_memfd: lock them, ask what is resident, fork with them,
//! watch them with userfaultfd.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::process::ExitCode;
use std::sync::Arc;

use gmemtest::harness::{Context, Stop, TestResult, in_child};
use gmemtest::machine::{Errno, GuestMemfd, HostFault, Mapping, PAGE_SIZE, Protection, Vm, VmConfig};
use gmemtest::uapi::kvm::{GUEST_MEMFD_FLAG_INIT_SHARED, GUEST_MEMFD_FLAG_MMAP};
use gmemtest::{claim_eq, claim_err, claim_ok};

gmemtest::suite! {
    /// A mapping of a guest_memfd behaves as one of a shared file that has no swap, no page cache readahead, no
    /// copy-on-write and no userfaultfd operations.
    pub static SUITE: gmem_vma needs [Vm, GuestMemfd, GmemMmap] {
        /// mlock(2) of shared memory faults every page in and succeeds. A failure means that locked memory is still
        /// faulted in one by one.
        mlock_allocates_the_pages needs [GmemInitShared, Cachestat];

        /// mlock of private memory is ENOMEM (the EFAULT of the fault, translated), and allocates nothing. A failure
        /// means that the host's fault path reaches private memory.
        mlock_of_private_memory_is_enomem needs [Cachestat];

        /// mlock across the end of the file is ENOMEM, with the pages before the end faulted in. A failure means that
        /// pages come beyond the end, or that those before it are not there.
        mlock_across_the_end_is_enomem needs [GmemInitShared, Cachestat];

        /// The mapping is locked although mlock failed: MADV_DONTNEED is refused until munlock(2). A failure means that
        /// the state of a mapping after a failed mlock differs from that of other files.
        failed_mlock_leaves_the_mapping_locked;

        /// MAP_LOCKED and MAP_POPULATE ignore that private memory cannot be faulted in: the mapping is made. A failure
        /// means that a VMM that maps with these flags cannot map private memory any more.
        mapping_flags_that_populate_ignore_private_memory[POPULATING] needs [Cachestat];

        /// MAP_LOCKED and MAP_POPULATE fault shared memory in. A failure means that memory that was to be ready is not.
        mapping_flags_that_populate_allocate_shared_memory[POPULATING] needs [GmemInitShared, Cachestat];

        /// A punch goes through locked mappings: mlock is no promise against the owner of the file. A failure means
        /// that whoever maps the file can keep its owner from freeing memory.
        punch_frees_locked_pages needs [GmemInitShared, Cachestat];

        /// mincore(2) reports a page once it was touched, not when it was allocated: it asks for PG_uptodate. A failure
        /// means that fallocate zeroes pages, or that mincore counts garbage.
        mincore_reports_touched_pages_only needs [GmemInitShared];

        /// mincore answers for mappings that may not be touched, without a fault: private memory is not resident. A
        /// failure tells the host which private pages the guest has used.
        mincore_of_private_memory_is_not_resident;

        /// mincore answers for pages beyond the end: not resident. A failure means that the end of the file is not
        /// looked at.
        mincore_beyond_the_end_is_not_resident needs [GmemInitShared];

        /// Residence is a matter of the file, not of the mapping: a second mapping that was never touched reports it. A
        /// failure means that residence is looked up in the page table instead of the file.
        mincore_sees_pages_touched_through_another_mapping needs [GmemInitShared];

        /// A forked child shares the mapping: each sees the stores of the other, also to pages that came after the
        /// fork. A failure means that guest memory was copied on write.
        child_and_parent_see_each_others_stores needs [GmemInitShared, RealFiles];

        /// A page first touched by the child is in the file for the parent. A failure means that parent and child have
        /// different guest memory.
        page_touched_by_a_child_is_in_the_file needs [GmemInitShared, RealFiles, Cachestat];

        /// Private memory is as far from a child as from its parent. A failure means that a fork makes private memory
        /// readable.
        private_memory_is_sigbus_in_a_child needs [RealFiles];

        /// A mapping marked MADV_DONTFORK is not there in the child: SIGSEGV. A failure means that a child keeps guest
        /// memory that it was not to have.
        mapping_marked_dontfork_is_not_inherited needs [GmemInitShared, RealFiles];

        /// What a child unmaps or protects is its own affair. A failure means that a helper process takes memory from
        /// its VMM.
        child_unmaps_for_itself_only needs [GmemInitShared, RealFiles];

        /// userfaultfd refuses to watch for missing pages, minor faults and writes: EINVAL, since the mapping has no
        /// uffd operations. A failure means that user space can hold up, or answer, faults of guest memory, which
        /// guest_memfd is not prepared for before it says so.
        userfaultfd_refuses_mode[UFFD_MODES] needs [GmemInitShared, Userfaultfd, RealFiles];

        /// Asynchronous write protection is for any memory (6.7, vma_can_userfault()): it is accepted and stops no
        /// access. A failure means that registration is refused where it was accepted, or stops accesses that nobody
        /// will let go on.
        userfaultfd_accepts_asynchronous_write_protection needs [GmemInitShared, Userfaultfd, RealFiles];
    }
}

const P: u64 = PAGE_SIZE;
const SHARED: u64 = GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED;
const PRIVATE: u64 = GUEST_MEMFD_FLAG_MMAP;

type File = (Arc<dyn Vm>, Arc<dyn GuestMemfd>);

fn file(cx: &Context, flags: u64) -> TestResult<File> {
    let vm = cx.machine().create_vm(VmConfig::Bare)?;
    let gmem = vm.create_guest_memfd(4 * P, flags)?;
    Ok((vm, gmem))
}

/// A file of four pages, and a mapping of eight from its start.
fn mapped(cx: &Context, flags: u64) -> TestResult<(File, Box<dyn Mapping>)> {
    let file = file(cx, flags)?;
    let mapping = file.1.map(8 * P, 0, Protection::SHARED_RW)?;
    Ok((file, mapping))
}

fn mlock_allocates_the_pages(cx: &Context) -> TestResult {
    let ((_vm, gmem), mapping) = mapped(cx, SHARED)?;
    claim_ok!(mapping.lock(P, 2 * P), "mlock of two pages of four");
    claim_eq!(gmem.cache_stat(0, 0)?.cached, 2, "pages");
    claim_ok!(mapping.unlock(P, 2 * P), "munlock");
    claim_eq!(gmem.cache_stat(0, 0)?.cached, 2, "pages after munlock");
    Ok(())
}

fn mlock_of_private_memory_is_enomem(cx: &Context) -> TestResult {
    let ((_vm, gmem), mapping) = mapped(cx, PRIVATE)?;
    claim_err!(mapping.lock(0, P), Errno::ENOMEM, "mlock of a hole");
    claim_eq!(gmem.cache_stat(0, 0)?.cached, 0, "pages");
    gmem.allocate(P, P)?;
    claim_err!(mapping.lock(P, P), Errno::ENOMEM, "mlock of a page that is there");
    Ok(())
}

fn mlock_across_the_end_is_enomem(cx: &Context) -> TestResult {
    let ((_vm, gmem), mapping) = mapped(cx, SHARED)?;
    claim_err!(mapping.lock(0, 8 * P), Errno::ENOMEM, "mlock of four pages and four beyond the end");
    claim_eq!(gmem.cache_stat(0, 0)?.cached, 4, "pages");
    Ok(())
}

fn failed_mlock_leaves_the_mapping_locked(cx: &Context) -> TestResult {
    let (_file, mapping) = mapped(cx, PRIVATE)?;
    claim_ok!(mapping.advise(0, P, libc::MADV_DONTNEED), "MADV_DONTNEED before mlock");
    claim_err!(mapping.lock(0, P), Errno::ENOMEM, "mlock");
    claim_err!(mapping.advise(0, P, libc::MADV_DONTNEED), Errno::EINVAL, "MADV_DONTNEED after mlock");
    claim_ok!(mapping.unlock(0, P), "munlock");
    claim_ok!(mapping.advise(0, P, libc::MADV_DONTNEED), "MADV_DONTNEED after munlock");
    Ok(())
}

const POPULATING: &[(&str, i32)] = &[("locked", libc::MAP_LOCKED), ("populate", libc::MAP_POPULATE)];

fn populating(flag: i32) -> Protection {
    Protection { flags: Protection::SHARED_RW.flags | flag, ..Protection::SHARED_RW }
}

fn mapping_flags_that_populate_ignore_private_memory(cx: &Context, &flag: &i32) -> TestResult {
    let (_vm, gmem) = file(cx, PRIVATE)?;
    let _mapping = claim_ok!(gmem.map(4 * P, 0, populating(flag)), "mmap with flag {flag:#x}");
    claim_eq!(gmem.cache_stat(0, 0)?.cached, 0, "pages");
    Ok(())
}

fn mapping_flags_that_populate_allocate_shared_memory(cx: &Context, &flag: &i32) -> TestResult {
    let (_vm, gmem) = file(cx, SHARED)?;
    let _mapping = claim_ok!(gmem.map(8 * P, 0, populating(flag)), "mmap with flag {flag:#x}");
    claim_eq!(gmem.cache_stat(0, 0)?.cached, 4, "pages");
    Ok(())
}

fn punch_frees_locked_pages(cx: &Context) -> TestResult {
    let ((_vm, gmem), mapping) = mapped(cx, SHARED)?;
    mapping.lock(0, 4 * P)?;
    mapping.fill(0, 4 * P, 0x71)?;
    claim_ok!(gmem.punch_hole(0, 2 * P), "punch of two locked pages");
    claim_eq!(gmem.cache_stat(0, 0)?.cached, 2, "pages");
    claim_eq!(mapping.find_mismatch(0, 2 * P, 0)?, None, "what was punched");
    claim_eq!(mapping.find_mismatch(2 * P, 2 * P, 0x71)?, None, "what was not");
    Ok(())
}

fn mincore_reports_touched_pages_only(cx: &Context) -> TestResult {
    let ((_vm, gmem), mapping) = mapped(cx, SHARED)?;
    gmem.allocate(0, 3 * P)?;
    claim_eq!(mapping.resident(0, 4 * P)?, [false; 4], "three pages allocated, none touched");
    mapping.read_u64(P)?;
    mapping.write_u64(3 * P, 1)?;
    claim_eq!(mapping.resident(0, 4 * P)?, [false, true, false, true], "one read, one written");
    mapping.advise(0, 4 * P, libc::MADV_DONTNEED)?;
    claim_eq!(mapping.resident(0, 4 * P)?, [false, true, false, true], "without page table entries");
    gmem.punch_hole(P, P)?;
    claim_eq!(mapping.resident(0, 4 * P)?, [false, false, false, true], "one punched");
    Ok(())
}

fn mincore_of_private_memory_is_not_resident(cx: &Context) -> TestResult {
    let ((_vm, gmem), mapping) = mapped(cx, PRIVATE)?;
    gmem.allocate(0, 2 * P)?;
    claim_eq!(mapping.resident(0, 4 * P)?, [false; 4], "two pages allocated");
    Ok(())
}

fn mincore_beyond_the_end_is_not_resident(cx: &Context) -> TestResult {
    let (_file, mapping) = mapped(cx, SHARED)?;
    mapping.fill(0, 4 * P, 1)?;
    claim_eq!(mapping.resident(3 * P, 3 * P)?, [true, false, false], "the last page and two beyond");
    Ok(())
}

fn mincore_sees_pages_touched_through_another_mapping(cx: &Context) -> TestResult {
    let ((_vm, gmem), mapping) = mapped(cx, SHARED)?;
    let other = gmem.map(4 * P, 0, Protection::SHARED_RW)?;
    mapping.read_u64(2 * P)?;
    claim_eq!(other.resident(0, 4 * P)?, [false, false, true, false], "through the other mapping");
    Ok(())
}

/// The value that a child passes on when an access of it failed: the signal's number and code.
fn fault_value(fault: HostFault) -> u64 {
    1 << 63 | (fault.signal as u64) << 32 | fault.code as u32 as u64
}

fn child_and_parent_see_each_others_stores(cx: &Context) -> TestResult {
    let (_file, mapping) = mapped(cx, SHARED)?;
    mapping.write_u64(0, 11)?;
    let seen = in_child(|| {
        let seen = mapping.read_u64(0).unwrap_or_else(fault_value);
        mapping.write_u64(0, 22).and_then(|()| mapping.write_u64(P, 33)).map_err(|_| Errno::EFAULT)?;
        Ok(seen)
    })?
    .returned()?;
    claim_eq!(seen, Ok(11), "the parent's store, seen by the child");
    claim_eq!((mapping.read_u64(0)?, mapping.read_u64(P)?), (22, 33), "the child's stores, seen by the parent");
    Ok(())
}

fn page_touched_by_a_child_is_in_the_file(cx: &Context) -> TestResult {
    let ((_vm, gmem), mapping) = mapped(cx, SHARED)?;
    let seen = in_child(|| Ok(mapping.read_u64(2 * P).unwrap_or_else(fault_value)))?.returned()?;
    claim_eq!(seen, Ok(0), "what the child read from a hole");
    claim_eq!(gmem.cache_stat(2 * P, P)?.cached, 1, "the page, counted by the parent");
    claim_eq!(mapping.resident(2 * P, P)?, [true], "and resident for it");
    Ok(())
}

fn private_memory_is_sigbus_in_a_child(cx: &Context) -> TestResult {
    let (_file, mapping) = mapped(cx, PRIVATE)?;
    let expected = HostFault { signal: libc::SIGBUS, code: libc::BUS_ADRERR, offset: 0 };
    let seen = in_child(|| Ok(mapping.read_u64(0).unwrap_or_else(fault_value)))?.returned()?;
    claim_eq!(seen, Ok(fault_value(expected)), "a load of the child");
    Ok(())
}

fn mapping_marked_dontfork_is_not_inherited(cx: &Context) -> TestResult {
    const SEGV_MAPERR: i32 = 1;
    let (_file, mapping) = mapped(cx, SHARED)?;
    mapping.write_u64(0, 5)?;
    mapping.advise(0, 8 * P, libc::MADV_DONTFORK)?;
    let expected = HostFault { signal: libc::SIGSEGV, code: SEGV_MAPERR, offset: 0 };
    let seen = in_child(|| Ok(mapping.read_u64(0).unwrap_or_else(fault_value)))?.returned()?;
    claim_eq!(seen, Ok(fault_value(expected)), "a load of the child");
    claim_eq!(mapping.read_u64(0)?, 5, "a load of the parent");
    Ok(())
}

fn child_unmaps_for_itself_only(cx: &Context) -> TestResult {
    let (_file, mapping) = mapped(cx, SHARED)?;
    mapping.fill(0, 4 * P, 0x17)?;
    let done = in_child(|| {
        mapping.protect(0, P, libc::PROT_NONE)?;
        mapping.unmap_part(P, 7 * P)?;
        Ok(0)
    })?
    .returned()?;
    claim_eq!(done, Ok(0), "mprotect and munmap in the child");
    claim_eq!(mapping.find_mismatch(0, 4 * P, 0x17), Ok(None), "contents for the parent");
    Ok(())
}

/// `struct uffdio_api` of linux/userfaultfd.h.
#[repr(C)]
struct UffdioApi {
    api: u64,
    features: u64,
    ioctls: u64,
}

/// `struct uffdio_register` of linux/userfaultfd.h.
#[repr(C)]
struct UffdioRegister {
    start: u64,
    len: u64,
    mode: u64,
    ioctls: u64,
}

const UFFD_API: u64 = 0xaa;
const UFFDIO_API: libc::Ioctl = libc::_IOWR::<UffdioApi>(0xaa, 0x3f);
const UFFDIO_REGISTER: libc::Ioctl = libc::_IOWR::<UffdioRegister>(0xaa, 0x00);
const UFFD_USER_MODE_ONLY: i32 = 1;
const UFFD_FEATURE_WP_ASYNC: u64 = 1 << 15;
const MODE_MISSING: u64 = 1;
const MODE_WP: u64 = 2;
const MODE_MINOR: u64 = 4;

/// A userfaultfd with the features given.
fn userfaultfd(features: u64) -> TestResult<OwnedFd> {
    // SAFETY: the call touches no memory.
    let fd =
        Errno::result(unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | UFFD_USER_MODE_ONLY) })? as i32;
    // SAFETY: the descriptor is new and nothing else owns it.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    let mut api = UffdioApi { api: UFFD_API, features, ioctls: 0 };
    // SAFETY: `api` has the layout that the ioctl reads and writes.
    match Errno::result(unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_API, &mut api) }) {
        Ok(_) => Ok(fd),
        Err(Errno::EINVAL) if features != 0 => Err(Stop::skip(
            gmemtest::machine::SkipKind::UnsupportedKernel,
            format!("userfaultfd features {features:#x} are not known to this kernel"),
        )),
        Err(errno) => Err(errno.into()),
    }
}

fn register(uffd: &OwnedFd, mapping: &dyn Mapping, mode: u64) -> Result<(), Errno> {
    let mut range = UffdioRegister { start: mapping.addr(), len: mapping.len(), mode, ioctls: 0 };
    // SAFETY: `range` has the layout that the ioctl reads and writes; what is registered is a mapping that is never
    // touched while a userfaultfd could hold up the access.
    Errno::result(unsafe { libc::ioctl(uffd.as_raw_fd(), UFFDIO_REGISTER, &mut range) }).map(drop)
}

const UFFD_MODES: &[(&str, u64)] = &[
    ("missing", MODE_MISSING),
    ("write_protect", MODE_WP),
    ("minor", MODE_MINOR),
    ("missing_and_write_protect", MODE_MISSING | MODE_WP),
    ("all", MODE_MISSING | MODE_WP | MODE_MINOR),
];

fn userfaultfd_refuses_mode(cx: &Context, &mode: &u64) -> TestResult {
    let (_file, mapping) = mapped(cx, SHARED)?;
    let uffd = userfaultfd(0)?;
    claim_err!(register(&uffd, &*mapping, mode), Errno::EINVAL, "UFFDIO_REGISTER of mode {mode:#x}");
    mapping.write_u64(0, 1)?;
    claim_eq!(mapping.read_u64(0)?, 1, "and the mapping works as before");
    Ok(())
}

fn userfaultfd_accepts_asynchronous_write_protection(cx: &Context) -> TestResult {
    let (_file, mapping) = mapped(cx, SHARED)?;
    let uffd = userfaultfd(UFFD_FEATURE_WP_ASYNC)?;
    claim_ok!(register(&uffd, &*mapping, MODE_WP), "UFFDIO_REGISTER for asynchronous write protection");
    mapping.write_u64(0, 1)?;
    claim_eq!(mapping.read_u64(0)?, 1, "a store and a load");
    drop(uffd);
    Ok(())
}

/// The stand-alone binary.
pub fn main() -> ExitCode {
    gmemtest::cli::selftest_main(&[&SUITE])
}
