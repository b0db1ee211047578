//! KVM_CREATE_GUEST_MEMFD: which sizes and flags make a file, and which error wins when two inputs are wrong at once.

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::process::ExitCode;

use gmemtest::harness::{Context, Stop, TestResult, in_child};
use gmemtest::machine::{Errno, Facility, PAGE_SIZE, Vm, VmConfig};
use gmemtest::uapi::kvm::{GUEST_MEMFD_FLAG_INIT_SHARED, KVM_CAP_GUEST_MEMFD_FLAGS, KVM_CREATE_GUEST_MEMFD};
use gmemtest::{claim, claim_eq, claim_err, claim_ne, claim_ok};

gmemtest::suite! {
    /// KVM_CREATE_GUEST_MEMFD makes a file of a fixed size. Its checks, in order: the caller's address space is the
    /// VM's, the argument is readable, the flags are known, the size is positive and page aligned, a descriptor is free.
    pub static SUITE: gmem_create needs [Vm, GuestMemfd] {
        /// Each of the 64 flag bits alone is accepted exactly when KVM_CAP_GUEST_MEMFD_FLAGS at VM scope has it, and
        /// refused with EINVAL otherwise (kvm_gmem_create(); guest_memfd_test). A failure means that the capability
        /// and the ioctl disagree, so that user space cannot tell what it may ask for.
        flag_is_accepted_exactly_when_the_capability_has_it[FLAG_BITS];

        /// A bit outside the mask is refused with EINVAL when every bit of the mask is set too. A failure means that
        /// known flags hide unknown ones.
        unknown_flag_is_refused_beside_all_known_ones;

        /// All bits of the mask together make a file. A failure means that the capability lists flags that exclude
        /// each other.
        all_flags_of_the_capability_are_accepted_together;

        /// The mask at VM scope has no bit that the mask at system scope lacks. A failure means that a VM offers what
        /// its KVM does not know.
        flags_of_a_vm_are_among_those_of_the_system;

        /// INIT_SHARED is offered to VM types without private memory only (kvm_gmem_supported_flags()). A failure
        /// means that memory of a confidential VM starts out readable by the host.
        initially_shared_files_are_offered_without_private_memory_only needs [GmemMmap];

        /// INIT_SHARED without MMAP makes a file: the flags are tested bit by bit, not as a combination. A failure
        /// means that the flags depend on each other in a way that no document has.
        initially_shared_file_need_not_be_mappable needs [GmemInitShared];

        /// A size that is zero, negative as a signed number, or no multiple of the page size is refused with EINVAL
        /// (kvm_gmem_create()). A failure means that a file without pages, or with a part of one, can be bound.
        size_is_refused[BAD_SIZES];

        /// Every size from 1 to 4095 bytes is refused with EINVAL (guest_memfd_test). A failure makes a file of no
        /// pages.
        every_size_below_a_page_is_refused;

        /// A positive multiple of the page size makes a file of exactly that size, however large: nothing is allocated
        /// at creation. A failure on a huge size means that a limit or a reservation was introduced.
        size_is_accepted[GOOD_SIZES];

        /// The reserved words are not looked at. A failure means that programs that leave garbage there break.
        reserved_words_are_ignored[RESERVED];

        /// The first error in the order of the checks is the one returned, whatever else is wrong. A failure means that
        /// a VMM is told the wrong one of its mistakes.
        first_error_wins[TWO_WRONG] needs [RealFiles];

        /// An argument that cannot be read is EFAULT (copy_from_user() in kvm_vm_ioctl()). A failure means that the
        /// kernel acts on an argument that it did not read.
        unreadable_argument_is_efault[UNREADABLE] needs [RealFiles];

        /// Two files of one VM have sizes and inodes of their own, and the second does not change the first
        /// (guest_memfd_test). A failure means that two files share their state.
        two_files_have_sizes_and_inodes_of_their_own;

        /// Pages of one file are not pages of another of the same VM. A failure means that two files share a page
        /// cache, as all anonymous inodes once did.
        two_files_do_not_share_pages needs [Cachestat];

        /// Two VMs can each have files; their inodes differ. A failure means that the memory of two VMs is one file.
        files_of_two_vms_have_inodes_of_their_own;

        /// A new file has no page: creation allocates nothing, whatever the size. A failure means that memory is
        /// charged before it is used.
        new_file_has_no_pages[NEW_SIZES] needs [Cachestat];

        /// With no descriptor free the call fails with EMFILE, and works again once one is free
        /// (get_unused_fd_flags()). A failure of the second half means that the failed call leaked.
        full_descriptor_table_is_emfile needs [RealFiles];

        /// A forked child gets EIO: a VM belongs to the address space that made it (kvm_vm_ioctl()). A failure means
        /// that a process can add memory to the VM of another.
        forked_child_gets_eio needs [RealFiles];
    }
}

/// One row a flag bit.
#[rustfmt::skip]
const FLAG_BITS: &[(&str, u32)] = &[
    ("bit_0", 0), ("bit_1", 1), ("bit_2", 2), ("bit_3", 3), ("bit_4", 4), ("bit_5", 5), ("bit_6", 6), ("bit_7", 7),
    ("bit_8", 8), ("bit_9", 9), ("bit_10", 10), ("bit_11", 11), ("bit_12", 12), ("bit_13", 13), ("bit_14", 14),
    ("bit_15", 15), ("bit_16", 16), ("bit_17", 17), ("bit_18", 18), ("bit_19", 19), ("bit_20", 20), ("bit_21", 21),
    ("bit_22", 22), ("bit_23", 23), ("bit_24", 24), ("bit_25", 25), ("bit_26", 26), ("bit_27", 27), ("bit_28", 28),
    ("bit_29", 29), ("bit_30", 30), ("bit_31", 31), ("bit_32", 32), ("bit_33", 33), ("bit_34", 34), ("bit_35", 35),
    ("bit_36", 36), ("bit_37", 37), ("bit_38", 38), ("bit_39", 39), ("bit_40", 40), ("bit_41", 41), ("bit_42", 42),
    ("bit_43", 43), ("bit_44", 44), ("bit_45", 45), ("bit_46", 46), ("bit_47", 47), ("bit_48", 48), ("bit_49", 49),
    ("bit_50", 50), ("bit_51", 51), ("bit_52", 52), ("bit_53", 53), ("bit_54", 54), ("bit_55", 55), ("bit_56", 56),
    ("bit_57", 57), ("bit_58", 58), ("bit_59", 59), ("bit_60", 60), ("bit_61", 61), ("bit_62", 62), ("bit_63", 63),
];

/// Sizes in bytes that make no file.
const BAD_SIZES: &[(&str, u64)] = &[
    ("zero", 0),
    ("one_byte", 1),
    ("page_less_a_byte", PAGE_SIZE - 1),
    ("page_and_a_byte", PAGE_SIZE + 1),
    ("page_and_a_sector", PAGE_SIZE + 512),
    ("signed_maximum", i64::MAX as u64),
    ("signed_minimum", i64::MIN as u64),
    ("minus_a_page", PAGE_SIZE.wrapping_neg()),
    ("minus_one", u64::MAX),
];

/// Sizes in bytes that make a file.
const GOOD_SIZES: &[(&str, u64)] = &[
    ("one_page", PAGE_SIZE),
    ("three_pages", 3 * PAGE_SIZE),
    ("two_mib", 2 << 20),
    ("two_mib_and_a_page", (2 << 20) + PAGE_SIZE),
    ("four_gib", 4 << 30),
    ("one_pib", 1 << 50),
    ("largest_aligned", i64::MAX as u64 & !(PAGE_SIZE - 1)),
];

/// Sizes in bytes of files that are looked at before anything is done to them.
const NEW_SIZES: &[(&str, u64)] = &[("one_page", PAGE_SIZE), ("one_gib", 1 << 30)];

/// The reserved words.
const RESERVED: &[(&str, [u64; 6])] = &[
    ("first", [u64::MAX, 0, 0, 0, 0, 0]),
    ("second", [0, 1, 0, 0, 0, 0]),
    ("third", [0, 0, u64::MAX, 0, 0, 0]),
    ("fourth", [0, 0, 0, 1, 0, 0]),
    ("fifth", [0, 0, 0, 0, 1 << 63, 0]),
    ("last", [0, 0, 0, 0, 0, 1]),
    ("all", [u64::MAX; 6]),
];

/// Where the caller stands when it makes the call.
#[derive(Clone, Copy)]
enum Caller {
    /// In the process that made the VM, with descriptors to spare.
    Owner,
    /// In that process, with no descriptor free.
    FullTable,
    /// In a forked child.
    Child,
}

/// Two things wrong at once, and the error that must win.
struct TwoWrong {
    caller: Caller,
    size: u64,
    flags: u64,
    error: Errno,
}

/// A flag that no kernel knows.
const UNKNOWN_FLAG: u64 = 1 << 63;

const TWO_WRONG: &[(&str, TwoWrong)] = &[
    (
        "flags_and_size",
        TwoWrong { caller: Caller::Owner, size: PAGE_SIZE + 1, flags: UNKNOWN_FLAG, error: Errno::EINVAL },
    ),
    (
        "address_space_and_flags",
        TwoWrong { caller: Caller::Child, size: PAGE_SIZE, flags: UNKNOWN_FLAG, error: Errno::EIO },
    ),
    ("address_space_and_size", TwoWrong { caller: Caller::Child, size: 1, flags: 0, error: Errno::EIO }),
    (
        "flags_and_descriptors",
        TwoWrong { caller: Caller::FullTable, size: PAGE_SIZE, flags: UNKNOWN_FLAG, error: Errno::EINVAL },
    ),
    ("size_and_descriptors", TwoWrong { caller: Caller::FullTable, size: 1, flags: 0, error: Errno::EINVAL }),
    ("size_of_zero_and_descriptors", TwoWrong { caller: Caller::FullTable, size: 0, flags: 0, error: Errno::EINVAL }),
];

/// How the argument of the ioctl cannot be read.
#[derive(Clone, Copy)]
enum Unreadable {
    /// A null pointer.
    Null,
    /// The last word of the structure is in a page that is not mapped.
    CutOff,
    /// A null pointer given by a forked child, which fails for its address space first.
    NullInChild,
}

const UNREADABLE: &[(&str, Unreadable)] = &[
    ("null", Unreadable::Null),
    ("cut_off_by_the_end_of_a_mapping", Unreadable::CutOff),
    ("null_in_a_child_is_eio", Unreadable::NullInChild),
];

/// The flags that the VM accepts; 0 before 6.18, where the capability is unknown.
fn supported_flags(vm: &dyn Vm) -> TestResult<u64> {
    Ok(claim_ok!(vm.capability(KVM_CAP_GUEST_MEMFD_FLAGS), "KVM_CAP_GUEST_MEMFD_FLAGS at VM scope") as u64)
}

fn flag_is_accepted_exactly_when_the_capability_has_it(cx: &Context, &bit: &u32) -> TestResult {
    let vm = cx.machine().create_vm(VmConfig::Bare)?;
    let (flag, supported) = (1u64 << bit, supported_flags(&*vm)?);
    let created = vm.create_guest_memfd(PAGE_SIZE, flag);
    if supported & flag != 0 {
        let gmem = claim_ok!(created, "flag {flag:#x} is in the mask {supported:#x}");
        claim_eq!(gmem.stat()?.size, PAGE_SIZE as i64, "size of a file made with flag {flag:#x}");
    } else {
        claim_err!(created, Errno::EINVAL, "flag {flag:#x} is not in the mask {supported:#x}");
    }
    Ok(())
}

fn unknown_flag_is_refused_beside_all_known_ones(cx: &Context) -> TestResult {
    let vm = cx.machine().create_vm(VmConfig::Bare)?;
    let supported = supported_flags(&*vm)?;
    let unknown = 1 << supported.trailing_ones();
    let created = vm.create_guest_memfd(PAGE_SIZE, supported | unknown);
    claim_err!(created, Errno::EINVAL, "flags {:#x}, mask {supported:#x}", supported | unknown);
    Ok(())
}

fn all_flags_of_the_capability_are_accepted_together(cx: &Context) -> TestResult {
    let vm = cx.machine().create_vm(VmConfig::Bare)?;
    let supported = supported_flags(&*vm)?;
    claim_ok!(vm.create_guest_memfd(PAGE_SIZE, supported), "flags {supported:#x}");
    Ok(())
}

fn flags_of_a_vm_are_among_those_of_the_system(cx: &Context) -> TestResult {
    let vm = cx.machine().create_vm(VmConfig::Bare)?;
    let of_vm = supported_flags(&*vm)?;
    let of_system = cx.machine().capability(KVM_CAP_GUEST_MEMFD_FLAGS)? as u64;
    claim_eq!(of_vm & !of_system, 0, "flags of the VM ({of_vm:#x}) outside those of the system ({of_system:#x})");
    Ok(())
}

fn initially_shared_files_are_offered_without_private_memory_only(cx: &Context) -> TestResult {
    let vm = cx.machine().create_vm(VmConfig::Bare)?;
    let offered = supported_flags(&*vm)? & GUEST_MEMFD_FLAG_INIT_SHARED != 0;
    let private_memory = cx.machine().spec().vm_type.has_private_memory();
    // The in-place conversion series offers it to every VM type: a shared page can become private later.
    let expected = !private_memory || cx.has(Facility::InPlaceConversion);
    claim_eq!(offered, expected, "INIT_SHARED is offered; private memory: {private_memory}");
    Ok(())
}

fn initially_shared_file_need_not_be_mappable(cx: &Context) -> TestResult {
    let vm = cx.machine().create_vm(VmConfig::Bare)?;
    claim_ok!(vm.create_guest_memfd(PAGE_SIZE, GUEST_MEMFD_FLAG_INIT_SHARED), "INIT_SHARED without MMAP");
    Ok(())
}

fn size_is_refused(cx: &Context, &size: &u64) -> TestResult {
    let vm = cx.machine().create_vm(VmConfig::Bare)?;
    claim_err!(vm.create_guest_memfd(size, 0), Errno::EINVAL, "size {size:#x}");
    Ok(())
}

fn every_size_below_a_page_is_refused(cx: &Context) -> TestResult {
    let vm = cx.machine().create_vm(VmConfig::Bare)?;
    for size in 1..PAGE_SIZE {
        claim_err!(vm.create_guest_memfd(size, 0), Errno::EINVAL, "size {size}");
    }
    Ok(())
}

fn size_is_accepted(cx: &Context, &size: &u64) -> TestResult {
    let vm = cx.machine().create_vm(VmConfig::Bare)?;
    let gmem = claim_ok!(vm.create_guest_memfd(size, 0), "size {size:#x}");
    claim_eq!(gmem.stat()?.size, size as i64, "st_size");
    Ok(())
}

fn reserved_words_are_ignored(cx: &Context, &reserved: &[u64; 6]) -> TestResult {
    let vm = cx.machine().create_vm(VmConfig::Bare)?;
    let gmem = claim_ok!(vm.create_guest_memfd_with(PAGE_SIZE, 0, reserved), "reserved {reserved:#x?}");
    claim_eq!(gmem.stat()?.size, PAGE_SIZE as i64, "st_size");
    Ok(())
}

/// Takes every free descriptor until dropped; the limit is lowered first, so that there are few.
struct FullTable {
    limit: libc::rlimit,
    template: File,
    taken: Vec<OwnedFd>,
}

impl FullTable {
    fn take() -> TestResult<FullTable> {
        let template = File::open("/dev/null")?;
        let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        // SAFETY: `limit` has room for what the call writes.
        Errno::result(unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) })?;
        let few = libc::rlimit { rlim_cur: limit.rlim_cur.min(256), ..limit };
        // SAFETY: the call reads `few` and changes nothing but the limit.
        Errno::result(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &few) })?;
        let mut table = FullTable { limit, template, taken: Vec::with_capacity(256) };
        loop {
            // SAFETY: dup touches no memory.
            match Errno::result(unsafe { libc::dup(table.template.as_raw_fd()) }) {
                // SAFETY: the descriptor is new and nothing else owns it.
                Ok(fd) => table.taken.push(unsafe { OwnedFd::from_raw_fd(fd) }),
                Err(Errno::EMFILE) => return Ok(table),
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

impl Drop for FullTable {
    fn drop(&mut self) {
        // SAFETY: the call reads the limit as it was before.
        unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &self.limit) };
    }
}

fn first_error_wins(cx: &Context, row: &TwoWrong) -> TestResult {
    let vm = cx.machine().create_vm(VmConfig::Bare)?;
    let create = || vm.create_guest_memfd(row.size, row.flags).map(|_| 0);
    let result = match row.caller {
        Caller::Owner => create(),
        Caller::FullTable => {
            let full = FullTable::take()?;
            let result = create();
            drop(full);
            result
        }
        Caller::Child => in_child(create)?.returned()?,
    };
    claim_err!(result, row.error, "size {:#x}, flags {:#x}", row.size, row.flags);
    Ok(())
}

/// The ioctl itself, with any pointer.
fn create_from(vm: RawFd, argument: *const u8) -> Result<i32, Errno> {
    // SAFETY: the kernel only reads from the argument, and answers EFAULT where it cannot.
    Errno::result(unsafe { libc::ioctl(vm, KVM_CREATE_GUEST_MEMFD, argument) })
}

fn unreadable_argument_is_efault(cx: &Context, &how: &Unreadable) -> TestResult {
    let vm = cx.machine().create_vm(VmConfig::Bare)?;
    let fd = vm.raw_fd().ok_or_else(|| Stop::fail("a machine with real files has no VM descriptor"))?;
    match how {
        Unreadable::Null => claim_err!(create_from(fd, std::ptr::null()), Errno::EFAULT, "a null pointer"),
        Unreadable::CutOff => {
            let memory = cx.machine().host_memory(gmemtest::machine::HostMemory::Anonymous, 2 * PAGE_SIZE)?;
            let at = PAGE_SIZE - 56;
            memory.write_u64(at, PAGE_SIZE)?;
            memory.unmap_part(PAGE_SIZE, PAGE_SIZE)?;
            let argument = (memory.addr() + at) as *const u8;
            claim_err!(create_from(fd, argument), Errno::EFAULT, "the last word is not mapped");
        }
        Unreadable::NullInChild => {
            let result = in_child(|| create_from(fd, std::ptr::null()).map(|_| 0))?.returned()?;
            claim_err!(result, Errno::EIO, "a null pointer in a child");
        }
    }
    Ok(())
}

fn two_files_have_sizes_and_inodes_of_their_own(cx: &Context) -> TestResult {
    let vm = cx.machine().create_vm(VmConfig::Bare)?;
    let one = vm.create_guest_memfd(PAGE_SIZE, 0)?;
    let before = one.stat()?;
    claim_eq!(before.size, PAGE_SIZE as i64, "size of the first");
    let two = vm.create_guest_memfd(2 * PAGE_SIZE, 0)?;
    claim_eq!(two.stat()?.size, 2 * PAGE_SIZE as i64, "size of the second");
    claim_eq!(one.stat()?, before, "the first after the second was made");
    claim_ne!(two.stat()?.inode, before.inode, "inodes");
    Ok(())
}

fn two_files_do_not_share_pages(cx: &Context) -> TestResult {
    let vm = cx.machine().create_vm(VmConfig::Bare)?;
    let (one, two) = (vm.create_guest_memfd(4 * PAGE_SIZE, 0)?, vm.create_guest_memfd(4 * PAGE_SIZE, 0)?);
    one.allocate(0, 3 * PAGE_SIZE)?;
    two.allocate(0, PAGE_SIZE)?;
    claim_eq!((one.cache_stat(0, 0)?.cached, two.cache_stat(0, 0)?.cached), (3, 1), "pages of the two files");
    one.punch_hole(0, 4 * PAGE_SIZE)?;
    claim_eq!((one.cache_stat(0, 0)?.cached, two.cache_stat(0, 0)?.cached), (0, 1), "after the first was punched");
    Ok(())
}

fn files_of_two_vms_have_inodes_of_their_own(cx: &Context) -> TestResult {
    let (one, two) = (cx.machine().create_vm(VmConfig::Bare)?, cx.machine().create_vm(VmConfig::Bare)?);
    let (one, two) = (one.create_guest_memfd(PAGE_SIZE, 0)?, two.create_guest_memfd(PAGE_SIZE, 0)?);
    claim_ne!(one.stat()?.inode, two.stat()?.inode, "inodes");
    Ok(())
}

fn new_file_has_no_pages(cx: &Context, &size: &u64) -> TestResult {
    let vm = cx.machine().create_vm(VmConfig::Bare)?;
    let gmem = vm.create_guest_memfd(size, 0)?;
    claim_eq!(gmem.cache_stat(0, 0)?.cached, 0, "pages of a new file of {size:#x} bytes");
    Ok(())
}

fn full_descriptor_table_is_emfile(cx: &Context) -> TestResult {
    let vm = cx.machine().create_vm(VmConfig::Bare)?;
    let mut full = FullTable::take()?;
    let refused = vm.create_guest_memfd(PAGE_SIZE, 0).map(|_| ());
    full.taken.pop();
    let accepted = vm.create_guest_memfd(PAGE_SIZE, 0).map(|gmem| gmem.stat().map(|stat| stat.size));
    drop(full);
    claim_err!(refused, Errno::EMFILE, "with no descriptor free");
    claim_eq!(accepted, Ok(Ok(PAGE_SIZE as i64)), "with one descriptor free");
    Ok(())
}

fn forked_child_gets_eio(cx: &Context) -> TestResult {
    let vm = cx.machine().create_vm(VmConfig::Bare)?;
    let result = in_child(|| vm.create_guest_memfd(PAGE_SIZE, 0).map(|_| 0))?.returned()?;
    claim_err!(result, Errno::EIO, "KVM_CREATE_GUEST_MEMFD in a forked child");
    claim!(vm.create_guest_memfd(PAGE_SIZE, 0).is_ok(), "and the parent may still create");
    Ok(())
}

/// The stand-alone binary.
pub fn main() -> ExitCode {
    gmemtest::cli::selftest_main(&[&SUITE])
}
