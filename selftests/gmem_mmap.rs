//! mmap(2) of a guest_memfd, and what the host finds there: mappings, faults, contents.

use std::process::ExitCode;
use std::sync::Arc;

use gmemtest::harness::{Context, TestResult};
use gmemtest::machine::{Errno, GuestMemfd, HostFault, Mapping, PAGE_SIZE, Protection, Vm, VmConfig};
use gmemtest::uapi::kvm::{GUEST_MEMFD_FLAG_INIT_SHARED, GUEST_MEMFD_FLAG_MMAP};
use gmemtest::{claim_eq, claim_err, claim_ok};

gmemtest::suite! {
    /// A guest_memfd made with GUEST_MEMFD_FLAG_MMAP can be mapped, shared and not executable. mmap looks neither at the
    /// file's size nor at whether its memory is shared: both show only when a page is touched.
    pub static SUITE: gmem_mmap needs [Vm, GuestMemfd] {
        /// Each set of arguments, on a mappable file of four pages, gives the result of the first check that it fails
        /// (guest_memfd notes 2.3; do_mmap(), kvm_gmem_mmap()). A failure means that a mapping is made which guest_memfd
        /// cannot keep consistent: private copies, or executable host memory.
        arguments_give_the_result_of_their_first_failed_check[ARGUMENTS] needs [GmemMmap];

        /// A file made without MMAP cannot be mapped, shared or private (guest_memfd_test): ENODEV, after the checks of
        /// the VFS. A failure means that guest memory can be mapped against the wish of who made it.
        file_without_mmap_flag_cannot_be_mapped[UNMAPPABLE];

        /// INIT_SHARED alone does not make a file mappable. A failure means that a file is mapped whose creator did not
        /// ask for it.
        initially_shared_file_without_mmap_flag_cannot_be_mapped needs [GmemInitShared];

        /// mprotect(2) may take rights away and give back read and write, but never PROT_EXEC: EACCES, since the file
        /// system is noexec and the mapping lacks VM_MAYEXEC. A failure means that guest memory can be made executable
        /// in the host, or that rights cannot be dropped for a while.
        mprotect_gives_its_result[MPROTECT] needs [GmemMmap];

        /// A store to a mapping that was made, or turned, read-only is SIGSEGV, SEGV_ACCERR, and a load still works. A
        /// failure means that guest memory changes through a mapping that promised not to.
        store_to_a_read_only_mapping_is_sigsegv[READ_ONLY] needs [GmemInitShared];

        /// A mapping without rights is SIGSEGV for loads too, and shows the data again when they are given back. A
        /// failure means that a guard on a mapping loses data, or guards nothing.
        mapping_without_rights_keeps_the_data needs [GmemInitShared];

        /// Any access to a file that is private to the guest is SIGBUS, BUS_ADRERR, and allocates nothing
        /// (guest_memfd_test). A failure means that the host reaches private memory.
        access_to_private_memory_is_sigbus[ACCESSES] needs [GmemMmap];

        /// Private memory stays out of reach when its pages are there. A failure means that the host reads private
        /// memory once it is allocated.
        access_to_allocated_private_memory_is_sigbus[ACCESSES] needs [GmemMmap];

        /// Refused accesses leave no page behind. A failure means that a stray host access costs memory that is charged
        /// to the guest.
        refused_access_allocates_nothing needs [GmemMmap, Cachestat];

        /// A mapping may be longer than the file; its pages beyond the end are SIGBUS, BUS_ADRERR, at exactly the first
        /// byte beyond, with everything before done (guest_memfd_test). A failure means that the file grows by a stray
        /// access, or that a page before the end cannot be used.
        access_beyond_the_end_is_sigbus[ACCESSES] needs [GmemInitShared];

        /// A mapping that starts beyond the end is made, and SIGBUS at its first byte. A failure means that the size is
        /// checked in another place, or not at all.
        mapping_that_starts_beyond_the_end_is_sigbus[BEYOND] needs [GmemInitShared];

        /// System calls that read from where the host would get SIGBUS fail with EFAULT, and read the data elsewhere. A
        /// failure means that a system call dies, or hands out data, where the process would get a signal.
        kernel_access_is_efault_where_the_host_would_fault needs [GmemInitShared];

        /// The same for private memory. A failure means that the host reads private memory by way of the kernel.
        kernel_access_to_private_memory_is_efault needs [GmemMmap];

        /// What the host writes it reads back, through the same mapping (guest_memfd_test). A failure means that guest
        /// memory does not hold data.
        host_reads_back_what_it_wrote needs [GmemInitShared];

        /// A page reads zero at its first touch, whether a load or a store comes first. A failure leaks data of the
        /// frame's former owner.
        first_touch_finds_zeroes needs [GmemInitShared];

        /// Two mappings of one page show each other's stores at once. A failure means that two processes have different
        /// guest memory.
        two_mappings_show_one_page needs [GmemInitShared];

        /// Two mappings see a punch, both of them. A failure means that a mapping keeps a page that was freed.
        two_mappings_see_a_punch needs [GmemInitShared];

        /// A mapping at an offset shows the pages from that offset on. A failure means that offsets are computed
        /// wrongly, so that a VMM shows the guest other memory than its own.
        mapping_at_an_offset_shows_the_pages_there[OFFSETS] needs [GmemInitShared];

        /// Contents outlive a mapping: unmapped, and mapped again, they are there. A failure means that the file is not
        /// what holds the data.
        contents_outlive_the_mapping needs [GmemInitShared];

        /// Unmapping a part leaves the rest; the part is SIGSEGV, SEGV_MAPERR, and its data is kept in the file. A
        /// failure means that unmapping a part takes the rest, or frees the file's pages.
        unmapped_part_is_sigsegv_and_the_rest_stays needs [GmemInitShared];

        /// A punch leaves the mapping in place: the next access finds a new page of zeroes at the same address. A
        /// failure means that a VMM has to map anew after each page that it frees.
        mapping_survives_a_punch needs [GmemInitShared];

        /// Accesses that cross a page boundary touch both pages. A failure means that neighbouring pages of the file
        /// are not neighbours in the mapping.
        access_across_a_page_boundary_touches_both_pages needs [GmemInitShared];

        /// The mapping keeps the file: with every descriptor closed, and the VM too, host accesses go on. A failure
        /// means that a live mapping shows freed pages.
        mapping_outlives_the_descriptor_and_the_vm needs [GmemInitShared];
    }
}

const P: u64 = PAGE_SIZE;
const READ: i32 = libc::PROT_READ;
const WRITE: i32 = libc::PROT_WRITE;
const EXEC: i32 = libc::PROT_EXEC;
const RW: i32 = READ | WRITE;
const SHARED: i32 = libc::MAP_SHARED;
const PRIVATE: i32 = libc::MAP_PRIVATE;
const VALIDATE: i32 = libc::MAP_SHARED_VALIDATE;
const SYNC: i32 = libc::MAP_SYNC;

/// The largest page-aligned file offset.
const LAST_PAGE: u64 = i64::MAX as u64 & !(P - 1);

/// length, prot, flags, offset, and the result.
struct Arguments(u64, i32, i32, u64, Result<(), Errno>);

const ARGUMENTS: &[(&str, Arguments)] = &[
    ("shared", Arguments(4 * P, RW, SHARED, 0, Ok(()))),
    ("shared_validate", Arguments(4 * P, RW, VALIDATE, 0, Ok(()))),
    ("shared_read_only", Arguments(4 * P, READ, SHARED, 0, Ok(()))),
    ("shared_without_rights", Arguments(4 * P, 0, SHARED, 0, Ok(()))),
    ("one_page_in_the_middle", Arguments(P, RW, SHARED, 2 * P, Ok(()))),
    ("one_byte", Arguments(1, RW, SHARED, 0, Ok(()))),
    ("longer_than_the_file", Arguments(16 * P, RW, SHARED, 0, Ok(()))),
    ("beyond_the_end", Arguments(P, RW, SHARED, 64 * P, Ok(()))),
    ("far_beyond_the_end", Arguments(P, RW, SHARED, 1 << 50, Ok(()))),
    ("populate", Arguments(4 * P, RW, SHARED | libc::MAP_POPULATE, 0, Ok(()))),
    ("populate_beyond_the_end", Arguments(8 * P, RW, SHARED | libc::MAP_POPULATE, 0, Ok(()))),
    ("zero_length", Arguments(0, RW, SHARED, 0, Err(Errno::EINVAL))),
    ("unaligned_offset", Arguments(P, RW, SHARED, 1, Err(Errno::EINVAL))),
    ("offset_and_length_overflow", Arguments(2 * P, RW, SHARED, LAST_PAGE, Err(Errno::EOVERFLOW))),
    ("negative_offset", Arguments(P, RW, SHARED, P.wrapping_neg(), Err(Errno::EOVERFLOW))),
    ("length_beyond_the_address_space", Arguments(1 << 62, RW, SHARED, 0, Err(Errno::ENOMEM))),
    ("neither_shared_nor_private", Arguments(P, RW, 0, 0, Err(Errno::EINVAL))),
    ("huge_pages", Arguments(P, RW, SHARED | libc::MAP_HUGETLB, 0, Err(Errno::EINVAL))),
    ("synchronous", Arguments(P, RW, VALIDATE | SYNC, 0, Err(Errno::EOPNOTSUPP))),
    ("private", Arguments(P, RW, PRIVATE, 0, Err(Errno::EINVAL))),
    ("private_read_only", Arguments(P, READ, PRIVATE, 0, Err(Errno::EINVAL))),
    ("executable", Arguments(P, READ | EXEC, SHARED, 0, Err(Errno::EPERM))),
    ("executable_and_writable", Arguments(P, RW | EXEC, SHARED, 0, Err(Errno::EPERM))),
    ("executable_only", Arguments(P, EXEC, SHARED, 0, Err(Errno::EPERM))),
    ("synchronous_and_unaligned_offset", Arguments(P, RW, VALIDATE | SYNC, 1, Err(Errno::EINVAL))),
    ("synchronous_and_zero_length", Arguments(0, RW, VALIDATE | SYNC, 0, Err(Errno::EINVAL))),
    ("synchronous_and_executable", Arguments(P, RW | EXEC, VALIDATE | SYNC, 0, Err(Errno::EOPNOTSUPP))),
    ("executable_and_private", Arguments(P, RW | EXEC, PRIVATE, 0, Err(Errno::EPERM))),
    ("executable_and_unaligned_offset", Arguments(P, RW | EXEC, SHARED, 1, Err(Errno::EINVAL))),
    ("private_and_unaligned_offset", Arguments(P, RW, PRIVATE, P + 1, Err(Errno::EINVAL))),
    ("private_and_overflow", Arguments(2 * P, RW, PRIVATE, LAST_PAGE, Err(Errno::EOVERFLOW))),
];

/// The same, on a file made without MMAP.
const UNMAPPABLE: &[(&str, Arguments)] = &[
    ("one_page_shared", Arguments(P, RW, SHARED, 0, Err(Errno::ENODEV))),
    ("all_shared", Arguments(4 * P, RW, SHARED, 0, Err(Errno::ENODEV))),
    ("read_only", Arguments(P, READ, SHARED, 0, Err(Errno::ENODEV))),
    ("without_rights", Arguments(P, 0, SHARED, 0, Err(Errno::ENODEV))),
    ("private", Arguments(P, RW, PRIVATE, 0, Err(Errno::ENODEV))),
    ("beyond_the_end", Arguments(P, RW, SHARED, 64 * P, Err(Errno::ENODEV))),
    ("executable", Arguments(P, RW | EXEC, SHARED, 0, Err(Errno::EPERM))),
    ("unaligned_offset_is_einval", Arguments(P, RW, SHARED, 1, Err(Errno::EINVAL))),
    ("zero_length_is_einval", Arguments(0, RW, SHARED, 0, Err(Errno::EINVAL))),
    ("synchronous_is_eopnotsupp", Arguments(P, RW, VALIDATE | SYNC, 0, Err(Errno::EOPNOTSUPP))),
];

type File = (Arc<dyn Vm>, Arc<dyn GuestMemfd>);

fn file(cx: &Context, flags: u64) -> TestResult<File> {
    let vm = cx.machine().create_vm(VmConfig::Bare)?;
    let gmem = vm.create_guest_memfd(4 * P, flags)?;
    Ok((vm, gmem))
}

/// A file of four pages that the host may touch, and a mapping of all of it.
fn shared(cx: &Context) -> TestResult<(File, Box<dyn Mapping>)> {
    let file = file(cx, GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED)?;
    let mapping = file.1.map(4 * P, 0, Protection::SHARED_RW)?;
    Ok((file, mapping))
}

/// A file of four pages that is private to the guest, and a mapping of all of it.
fn private(cx: &Context) -> TestResult<(File, Box<dyn Mapping>)> {
    let file = file(cx, GUEST_MEMFD_FLAG_MMAP)?;
    let mapping = file.1.map(4 * P, 0, Protection::SHARED_RW)?;
    Ok((file, mapping))
}

fn sigbus(offset: u64) -> HostFault {
    HostFault { signal: libc::SIGBUS, code: libc::BUS_ADRERR, offset }
}

fn sigsegv(code: i32, offset: u64) -> HostFault {
    HostFault { signal: libc::SIGSEGV, code, offset }
}

const SEGV_MAPERR: i32 = 1;
const SEGV_ACCERR: i32 = 2;

fn map_result(gmem: &dyn GuestMemfd, &Arguments(len, prot, flags, offset, _): &Arguments) -> Result<(), Errno> {
    gmem.map(len, offset, Protection { prot, flags }).map(|_| ())
}

fn arguments_give_the_result_of_their_first_failed_check(cx: &Context, row: &Arguments) -> TestResult {
    let (_vm, gmem) = file(cx, GUEST_MEMFD_FLAG_MMAP)?;
    claim_eq!(map_result(&*gmem, row), row.4, "mmap({:#x}, {:#x}, {:#x}, {:#x})", row.0, row.1, row.2, row.3);
    Ok(())
}

fn file_without_mmap_flag_cannot_be_mapped(cx: &Context, row: &Arguments) -> TestResult {
    let (_vm, gmem) = file(cx, 0)?;
    // The file system of anonymous inodes, guest_memfd's then among them, forbids execution since 6.16.
    let executable = cx.by_release(&[((6, 8), Errno::ENODEV), ((6, 16), Errno::EPERM)])?;
    let expected = if row.4 == Err(Errno::EPERM) { Err(executable) } else { row.4 };
    claim_eq!(map_result(&*gmem, row), expected, "mmap({:#x}, {:#x}, {:#x}, {:#x})", row.0, row.1, row.2, row.3);
    Ok(())
}

fn initially_shared_file_without_mmap_flag_cannot_be_mapped(cx: &Context) -> TestResult {
    let (_vm, gmem) = file(cx, GUEST_MEMFD_FLAG_INIT_SHARED)?;
    claim_err!(gmem.map(P, 0, Protection::SHARED_RW), Errno::ENODEV, "mmap of a file made with INIT_SHARED only");
    Ok(())
}

/// The rights asked for, and the result.
struct Rights(i32, Result<(), Errno>);

const MPROTECT: &[(&str, Rights)] = &[
    ("none", Rights(0, Ok(()))),
    ("read", Rights(READ, Ok(()))),
    ("read_write", Rights(RW, Ok(()))),
    ("read_exec", Rights(READ | EXEC, Err(Errno::EACCES))),
    ("read_write_exec", Rights(RW | EXEC, Err(Errno::EACCES))),
    ("exec", Rights(EXEC, Err(Errno::EACCES))),
];

fn mprotect_gives_its_result(cx: &Context, &Rights(prot, result): &Rights) -> TestResult {
    let (_file, mapping) = private(cx)?;
    claim_eq!(mapping.protect(0, 4 * P, prot), result, "mprotect to {prot:#x}");
    Ok(())
}

/// How a mapping comes to be read-only.
#[derive(Clone, Copy)]
enum ReadOnly {
    Mapped,
    Protected,
}

const READ_ONLY: &[(&str, ReadOnly)] = &[("mapped", ReadOnly::Mapped), ("protected", ReadOnly::Protected)];

fn store_to_a_read_only_mapping_is_sigsegv(cx: &Context, &how: &ReadOnly) -> TestResult {
    let ((_vm, gmem), writable) = shared(cx)?;
    writable.fill(0, 4 * P, 0x31)?;
    let mapping = match how {
        ReadOnly::Mapped => gmem.map(4 * P, 0, Protection::SHARED_READ)?,
        ReadOnly::Protected => {
            writable.protect(0, 4 * P, READ)?;
            writable
        }
    };
    claim_err!(mapping.write(8, &[1]), sigsegv(SEGV_ACCERR, 8), "a store");
    claim_eq!(mapping.find_mismatch(0, 4 * P, 0x31), Ok(None), "a load");
    Ok(())
}

fn mapping_without_rights_keeps_the_data(cx: &Context) -> TestResult {
    let (_file, mapping) = shared(cx)?;
    mapping.fill(0, 4 * P, 0x32)?;
    mapping.protect(P, P, 0)?;
    claim_err!(mapping.read(P, &mut [0]), sigsegv(SEGV_ACCERR, P), "a load without rights");
    claim_eq!(mapping.find_mismatch(2 * P, P, 0x32), Ok(None), "the page after");
    mapping.protect(P, P, RW)?;
    claim_eq!(mapping.find_mismatch(0, 4 * P, 0x32), Ok(None), "with its rights again");
    Ok(())
}

/// A host access of one byte.
#[derive(Clone, Copy)]
enum Access {
    Load,
    Store,
}

const ACCESSES: &[(&str, Access)] = &[("load", Access::Load), ("store", Access::Store)];

fn access(mapping: &dyn Mapping, access: Access, at: u64) -> Result<(), HostFault> {
    match access {
        Access::Load => mapping.read(at, &mut [0]),
        Access::Store => mapping.write(at, &[1]),
    }
}

fn access_to_private_memory_is_sigbus(cx: &Context, &how: &Access) -> TestResult {
    let (_file, mapping) = private(cx)?;
    for at in [0, 1, P - 1, P, 4 * P - 1] {
        claim_err!(access(&*mapping, how, at), sigbus(at), "access at {at:#x}");
    }
    Ok(())
}

fn access_to_allocated_private_memory_is_sigbus(cx: &Context, &how: &Access) -> TestResult {
    let ((_vm, gmem), mapping) = private(cx)?;
    gmem.allocate(0, 4 * P)?;
    for at in [0, P, 4 * P - 1] {
        claim_err!(access(&*mapping, how, at), sigbus(at), "access at {at:#x}");
    }
    Ok(())
}

fn refused_access_allocates_nothing(cx: &Context) -> TestResult {
    let ((_vm, gmem), mapping) = private(cx)?;
    for at in [0, P, 3 * P] {
        claim_err!(access(&*mapping, Access::Load, at), sigbus(at), "load at {at:#x}");
        claim_err!(access(&*mapping, Access::Store, at), sigbus(at), "store at {at:#x}");
    }
    claim_eq!(gmem.cache_stat(0, 0)?.cached, 0, "pages after six refused accesses");
    Ok(())
}

fn access_beyond_the_end_is_sigbus(cx: &Context, &how: &Access) -> TestResult {
    let ((_vm, gmem), whole) = shared(cx)?;
    let mapping = gmem.map(16 * P, 0, Protection::SHARED_RW)?;
    claim_ok!(access(&*mapping, how, 4 * P - 1), "the last byte of the file");
    for at in [4 * P, 5 * P + 7, 16 * P - 1] {
        claim_err!(access(&*mapping, how, at), sigbus(at), "access at {at:#x}");
    }
    let across = match how {
        Access::Load => mapping.find_mismatch(0, 16 * P, 0).map(|_| ()),
        Access::Store => mapping.fill(0, 16 * P, 0xbb),
    };
    match how {
        Access::Load => claim_err!(across, sigbus(4 * P), "a range across the end"),
        Access::Store => {
            claim_err!(across, sigbus(4 * P), "a range across the end");
            claim_eq!(whole.find_mismatch(0, 4 * P, 0xbb)?, None, "what lies before the end was written");
        }
    }
    Ok(())
}

/// Offset of a mapping of one page on a file of four.
const BEYOND: &[(&str, u64)] = &[
    ("at_the_end", 4 * P),
    ("after_the_end", 5 * P),
    ("at_one_pib", 1 << 50),
    ("at_the_largest_offset", LAST_PAGE - P),
];

fn mapping_that_starts_beyond_the_end_is_sigbus(cx: &Context, &offset: &u64) -> TestResult {
    let ((_vm, gmem), _whole) = shared(cx)?;
    let mapping = claim_ok!(gmem.map(P, offset, Protection::SHARED_RW), "mmap at {offset:#x}");
    claim_err!(access(&*mapping, Access::Load, 0), sigbus(0), "load");
    claim_err!(access(&*mapping, Access::Store, 0), sigbus(0), "store");
    Ok(())
}

fn kernel_access_is_efault_where_the_host_would_fault(cx: &Context) -> TestResult {
    let ((_vm, gmem), whole) = shared(cx)?;
    whole.fill(0, 4 * P, 0x42)?;
    let mapping = gmem.map(8 * P, 0, Protection::SHARED_RW)?;
    claim_eq!(mapping.kernel_read(0), Ok(0x42), "the first byte");
    claim_eq!(mapping.kernel_read(4 * P - 1), Ok(0x42), "the last byte of the file");
    claim_err!(mapping.kernel_read(4 * P), Errno::EFAULT, "the first byte beyond");
    Ok(())
}

fn kernel_access_to_private_memory_is_efault(cx: &Context) -> TestResult {
    let ((_vm, gmem), mapping) = private(cx)?;
    claim_err!(mapping.kernel_read(0), Errno::EFAULT, "a hole");
    gmem.allocate(0, P)?;
    claim_err!(mapping.kernel_read(0), Errno::EFAULT, "a page");
    Ok(())
}

fn host_reads_back_what_it_wrote(cx: &Context) -> TestResult {
    let (_file, mapping) = shared(cx)?;
    let mut rng = cx.rng();
    let data: Vec<u8> = (0..4 * P).map(|_| rng.next_u64() as u8).collect();
    mapping.write(0, &data)?;
    let mut seen = vec![0; data.len()];
    mapping.read(0, &mut seen)?;
    let differs = data.iter().zip(&seen).position(|(wrote, read)| wrote != read);
    claim_eq!(differs, None, "first byte that differs");
    Ok(())
}

fn first_touch_finds_zeroes(cx: &Context) -> TestResult {
    let (_file, mapping) = shared(cx)?;
    claim_eq!(mapping.find_mismatch(0, P, 0)?, None, "a page first read");
    mapping.write(P + 100, &[1])?;
    claim_eq!(mapping.find_mismatch(P, 100, 0)?, None, "before the byte that was stored first");
    claim_eq!(mapping.find_mismatch(P + 101, P - 101, 0)?, None, "after it");
    Ok(())
}

fn two_mappings_show_one_page(cx: &Context) -> TestResult {
    let ((_vm, gmem), one) = shared(cx)?;
    let two = gmem.map(2 * P, P, Protection::SHARED_RW)?;
    one.write_u64(P + 8, 0x1111)?;
    claim_eq!(two.read_u64(8)?, 0x1111, "the store of the first, seen by the second");
    two.write_u64(8, 0x2222)?;
    claim_eq!(one.read_u64(P + 8)?, 0x2222, "the store of the second, seen by the first");
    Ok(())
}

fn two_mappings_see_a_punch(cx: &Context) -> TestResult {
    let ((_vm, gmem), one) = shared(cx)?;
    let two = gmem.map(4 * P, 0, Protection::SHARED_RW)?;
    one.fill(0, 4 * P, 0x99)?;
    claim_eq!(two.find_mismatch(0, 4 * P, 0x99)?, None, "the second before the punch");
    gmem.punch_hole(P, P)?;
    claim_eq!((one.read_u64(P)?, two.read_u64(P)?), (0, 0), "both after the punch");
    one.write_u64(P, 7)?;
    claim_eq!(two.read_u64(P)?, 7, "and they share the new page");
    Ok(())
}

const OFFSETS: &[(&str, u64)] = &[("one_page", P), ("two_pages", 2 * P), ("three_pages", 3 * P)];

fn mapping_at_an_offset_shows_the_pages_there(cx: &Context, &offset: &u64) -> TestResult {
    let ((_vm, gmem), whole) = shared(cx)?;
    for page in 0..4 {
        whole.fill(page * P, P, 0x10 + page as u8)?;
    }
    let part = gmem.map(4 * P - offset, offset, Protection::SHARED_RW)?;
    for page in offset / P..4 {
        claim_eq!(part.find_mismatch(page * P - offset, P, 0x10 + page as u8)?, None, "page {page}");
    }
    Ok(())
}

fn contents_outlive_the_mapping(cx: &Context) -> TestResult {
    let ((_vm, gmem), mapping) = shared(cx)?;
    mapping.fill(0, 4 * P, 0x21)?;
    drop(mapping);
    let again = gmem.map(4 * P, 0, Protection::SHARED_READ)?;
    claim_eq!(again.find_mismatch(0, 4 * P, 0x21)?, None, "mapped again");
    Ok(())
}

fn unmapped_part_is_sigsegv_and_the_rest_stays(cx: &Context) -> TestResult {
    let ((_vm, gmem), mapping) = shared(cx)?;
    mapping.fill(0, 4 * P, 0x66)?;
    mapping.unmap_part(P, 2 * P)?;
    claim_err!(mapping.read(P, &mut [0]), sigsegv(SEGV_MAPERR, P), "the first byte of the part");
    claim_err!(mapping.write(3 * P - 1, &[0]), sigsegv(SEGV_MAPERR, 3 * P - 1), "the last byte of the part");
    claim_eq!(mapping.find_mismatch(0, P, 0x66)?, None, "before the part");
    claim_eq!(mapping.find_mismatch(3 * P, P, 0x66)?, None, "after the part");
    let again = gmem.map(4 * P, 0, Protection::SHARED_READ)?;
    claim_eq!(again.find_mismatch(0, 4 * P, 0x66)?, None, "the file");
    Ok(())
}

fn mapping_survives_a_punch(cx: &Context) -> TestResult {
    let ((_vm, gmem), mapping) = shared(cx)?;
    for round in 1..4u8 {
        mapping.fill(0, 4 * P, round)?;
        gmem.punch_hole(0, 4 * P)?;
        claim_eq!(mapping.find_mismatch(0, 4 * P, 0)?, None, "after punch {round}");
    }
    Ok(())
}

fn access_across_a_page_boundary_touches_both_pages(cx: &Context) -> TestResult {
    let (_file, mapping) = shared(cx)?;
    mapping.write_u64(P - 4, 0x8877_6655_4433_2211)?;
    claim_eq!(mapping.read_u64(P - 4)?, 0x8877_6655_4433_2211, "across the boundary");
    let (mut low, mut high) = ([0; 4], [0; 4]);
    mapping.read(P - 4, &mut low)?;
    mapping.read(P, &mut high)?;
    claim_eq!((low, high), ([0x11, 0x22, 0x33, 0x44], [0x55, 0x66, 0x77, 0x88]), "on either side");
    Ok(())
}

fn mapping_outlives_the_descriptor_and_the_vm(cx: &Context) -> TestResult {
    let ((vm, gmem), mapping) = shared(cx)?;
    mapping.fill(0, P, 0x13)?;
    drop(gmem);
    claim_eq!(mapping.find_mismatch(0, P, 0x13)?, None, "with the file's descriptor closed");
    drop(vm);
    claim_eq!(mapping.find_mismatch(0, P, 0x13)?, None, "with the VM's closed too");
    mapping.fill(P, P, 0x14)?;
    claim_eq!(mapping.find_mismatch(P, P, 0x14)?, None, "a page first touched then");
    Ok(())
}

/// The stand-alone binary.
pub fn main() -> ExitCode {
    gmemtest::cli::selftest_main(&[&SUITE])
}
