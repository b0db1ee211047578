//! Binding a guest_memfd to a memslot: what KVM_SET_USER_MEMORY_REGION2 refuses, with which errno, and which check wins.
//!
//! The order of the checks is part of what user space sees: a VMM that passes a stale file descriptor for a range that
//! is already taken has to know which of the two it is told about.

use std::sync::Arc;

use gmemtest::harness::{Context, TestResult};
use gmemtest::machine::{Errno, GmemBinding, GuestMemfd, MemoryRegion, PAGE_SIZE, RegionFile, Vm, VmConfig};
use gmemtest::{claim, claim_err, claim_ok};
use kvm_bindings::{KVM_CAP_NR_MEMSLOTS, KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY};

gmemtest::suite! {
    /// Binding a guest_memfd to a memslot (KVM_SET_USER_MEMORY_REGION2 with KVM_MEM_GUEST_MEMFD): every check, and which
    /// check wins when two inputs are wrong.
    pub static SUITE: binding needs [Vm, GuestMemfd, UserMemory2] {
        /// A region that is right in every field is bound (kvm_gmem_bind(); kvm_gmem_prepare_memory_region() from 7.x).
        /// A failure means that every refusal below may be for another reason than the one named.
        a_correct_region_is_bound;

        /// Each check of kvm_set_memory_region() and of the guest_memfd binding refuses its input with its errno. A
        /// failure means that the check is gone or answers differently, so that a VMM's error handling misreads it.
        one_wrong_input_is_refused[ALONE];

        /// A range that intersects one that is already bound is refused: EEXIST since 7.2 ("KVM guest_memfd changes for
        /// 7.2"), EINVAL before. A failure means that one page of a guest_memfd can be reached through two slots.
        overlapping_binding_is_refused[OVERLAPS];

        /// An offset whose sum with the size is beyond INT64_MAX is refused with EINVAL. Kernels before 7.2 treat the sum
        /// as a negative number and accept it: the guest then uses pages beyond the end of the file that no fallocate can
        /// reach (fixed by "KVM guest_memfd changes for 7.2", binding offsets and sizes are unsigned). A failure means
        /// that i_size does not bound what a slot can use.
        offset_plus_size_beyond_int64_max_is_refused[SIGN_OVERFLOWS];

        /// Of two wrong inputs the earlier check of kvm_set_memory_region() answers: geometry and flags (EINVAL), overlap
        /// in guest-physical space (EEXIST), the file descriptor (EBADF, EINVAL), overlap in the file. A failure means
        /// that the order changed under user space.
        first_check_wins[PAIRS];

        /// Of an address beyond the physical address width and a range of the file that is taken, the address is told since
        /// 7.3, which looks for overlap in the file last (kvm_gmem_prepare_memory_region()); 7.2 bound the file first, and so
        /// do older kernels, where both are EINVAL. A failure means that the order changed under user space.
        address_width_is_checked_before_overlap_in_the_file;

        /// The slot's memory may overlap another slot's in user space, be absent, or not be mapped: the address is only
        /// checked for being a user address (KVM_SET_USER_MEMORY_REGION2). A failure breaks VMMs that have no shared side.
        any_user_address_is_accepted[ADDRESSES];

        /// A refused region leaves nothing behind: the range, the slot id and the guest-physical range are free for the
        /// next call (error paths of kvm_set_memory_region()). A failure means that an error leaks a binding.
        refused_region_leaves_its_range_free[REFUSALS];
    }
}

const PAGES: u64 = 8;
const BASE: u64 = 1 << 32;
const ORDINARY_SLOT: u32 = 1;
const BOUND_SLOT: u32 = 2;
const FREE_SLOT: u32 = 3;

/// Pages 4 and 5 of the file are bound.
const BOUND_OFFSET: u64 = 4 * PAGE_SIZE;
const FREE_GPA: u64 = BASE + 64 * PAGE_SIZE;

/// A VM with an ordinary slot of two pages, a guest_memfd of eight pages with two of them bound, and another VM with a
/// guest_memfd of its own.
struct Scene {
    vm: Arc<dyn Vm>,
    gmem: Arc<dyn GuestMemfd>,
    foreign: Arc<dyn GuestMemfd>,
    _other_vm: Arc<dyn Vm>,
    slots: u32,
}

impl Scene {
    fn new(cx: &Context) -> TestResult<Scene> {
        let vm = claim_ok!(cx.machine().create_vm(VmConfig::Bare));
        let other_vm = claim_ok!(cx.machine().create_vm(VmConfig::Bare));
        let gmem = claim_ok!(vm.create_guest_memfd(PAGES * PAGE_SIZE, 0));
        let foreign = claim_ok!(other_vm.create_guest_memfd(PAGES * PAGE_SIZE, 0));
        claim_ok!(vm.set_memory_region(&MemoryRegion::new(ORDINARY_SLOT, BASE, 2 * PAGE_SIZE)));
        let bound = MemoryRegion::new(BOUND_SLOT, BASE + 16 * PAGE_SIZE, 2 * PAGE_SIZE);
        claim_ok!(vm.set_memory_region(&bound.bound_to(&*gmem, BOUND_OFFSET)));
        let slots = claim_ok!(vm.capability(KVM_CAP_NR_MEMSLOTS)) as u32;
        Ok(Scene { vm, gmem, foreign, _other_vm: other_vm, slots })
    }

    /// Two free pages of the file at a free guest-physical address, in a free slot.
    fn correct(&self) -> MemoryRegion<'_> {
        MemoryRegion::new(FREE_SLOT, FREE_GPA, 2 * PAGE_SIZE).bound_to(&*self.gmem, 0)
    }
}

/// One thing that is wrong with a region.
#[derive(Clone, Copy, Debug)]
enum Wrong {
    SlotId,
    ReadOnly,
    DirtyLog,
    UnknownFlag(u32),
    UnalignedSize,
    UnalignedGpa,
    UnalignedAddress,
    KernelAddress,
    UnalignedOffset(u64),
    WrappingOffset,
    AddressSpace,
    WrappingGpa,
    TooManyPages,
    BoundSlot,
    OrdinarySlot,
    TakenGpa,
    NotOpen,
    KvmDevice,
    VmFile,
    Memfd,
    ForeignGmem,
    OffsetAtEnd,
    OffsetFarBeyondEnd,
    LengthBeyondEnd,
    GpaBeyondLimit,
    TakenOffset,
}

impl Wrong {
    fn put_into<'s>(self, scene: &'s Scene, region: MemoryRegion<'s>) -> MemoryRegion<'s> {
        let file = |file| MemoryRegion { gmem: region.gmem.map(|binding| GmemBinding { file, ..binding }), ..region };
        let offset =
            |offset| MemoryRegion { gmem: region.gmem.map(|binding| GmemBinding { offset, ..binding }), ..region };
        match self {
            Wrong::SlotId => MemoryRegion { slot: scene.slots, ..region },
            Wrong::ReadOnly => region.with_flags(KVM_MEM_READONLY),
            Wrong::DirtyLog => region.with_flags(KVM_MEM_LOG_DIRTY_PAGES),
            Wrong::UnknownFlag(bit) => region.with_flags(1 << bit),
            Wrong::UnalignedSize => MemoryRegion { size: region.size - 1, ..region },
            Wrong::UnalignedGpa => MemoryRegion { gpa: region.gpa | 0x800, ..region },
            Wrong::UnalignedAddress => region.at(region.userspace_addr | 1),
            Wrong::KernelAddress => region.at(0xFFFF_8000_0000_0000),
            Wrong::UnalignedOffset(by) => offset(region.gmem.map_or(0, |binding| binding.offset) + by),
            Wrong::WrappingOffset => offset(0_u64.wrapping_sub(PAGE_SIZE)),
            Wrong::AddressSpace => MemoryRegion { slot: region.slot | 2 << 16, ..region },
            Wrong::WrappingGpa => MemoryRegion { gpa: 0_u64.wrapping_sub(PAGE_SIZE), ..region },
            Wrong::TooManyPages => MemoryRegion { size: (1 << 31) * PAGE_SIZE, ..region },
            Wrong::BoundSlot => MemoryRegion { slot: BOUND_SLOT, ..region },
            Wrong::OrdinarySlot => MemoryRegion { slot: ORDINARY_SLOT, ..region },
            Wrong::TakenGpa => MemoryRegion { gpa: BASE + PAGE_SIZE, ..region },
            Wrong::NotOpen => file(RegionFile::NotOpen),
            Wrong::KvmDevice => file(RegionFile::KvmDevice),
            Wrong::VmFile => file(RegionFile::Vm),
            Wrong::Memfd => file(RegionFile::Memfd),
            Wrong::ForeignGmem => file(RegionFile::Gmem(&*scene.foreign)),
            Wrong::OffsetAtEnd => offset(PAGES * PAGE_SIZE),
            Wrong::OffsetFarBeyondEnd => offset(1 << 63),
            Wrong::LengthBeyondEnd => offset((PAGES - 1) * PAGE_SIZE),
            Wrong::GpaBeyondLimit => MemoryRegion { gpa: 1 << 52, ..region },
            Wrong::TakenOffset => offset(BOUND_OFFSET + PAGE_SIZE),
        }
    }
}

/// The errno of a range that is already bound. EEXIST came with "KVM guest_memfd changes for 7.2".
const TAKEN_OFFSET: [((u32, u32), Errno); 2] = [((6, 8), Errno::EINVAL), ((7, 2), Errno::EEXIST)];

fn a_correct_region_is_bound(cx: &Context) -> TestResult {
    let scene = Scene::new(cx)?;
    claim_ok!(scene.vm.set_memory_region(&scene.correct()), "two free pages of a guest_memfd in a free slot");
    Ok(())
}

/// In the order of the checks. What is named unaligned is so by less than a page.
const ALONE: &[(&str, (Wrong, Errno))] = &[
    ("slot_id_is_the_number_of_slots", (Wrong::SlotId, Errno::EINVAL)),
    ("with_read_only", (Wrong::ReadOnly, Errno::EINVAL)),
    ("with_dirty_log", (Wrong::DirtyLog, Errno::EINVAL)),
    ("with_flag_bit_3", (Wrong::UnknownFlag(3), Errno::EINVAL)),
    ("with_internal_flag_memslot_invalid", (Wrong::UnknownFlag(16), Errno::EINVAL)),
    ("with_internal_flag_gmem_only", (Wrong::UnknownFlag(17), Errno::EINVAL)),
    ("with_flag_bit_31", (Wrong::UnknownFlag(31), Errno::EINVAL)),
    ("size_unaligned", (Wrong::UnalignedSize, Errno::EINVAL)),
    ("gpa_unaligned", (Wrong::UnalignedGpa, Errno::EINVAL)),
    ("userspace_addr_unaligned", (Wrong::UnalignedAddress, Errno::EINVAL)),
    ("userspace_addr_in_the_kernel", (Wrong::KernelAddress, Errno::EINVAL)),
    ("offset_unaligned_by_1", (Wrong::UnalignedOffset(1), Errno::EINVAL)),
    ("offset_unaligned_by_512", (Wrong::UnalignedOffset(512), Errno::EINVAL)),
    ("offset_unaligned_by_4095", (Wrong::UnalignedOffset(4095), Errno::EINVAL)),
    ("offset_plus_size_wraps", (Wrong::WrappingOffset, Errno::EINVAL)),
    ("third_address_space", (Wrong::AddressSpace, Errno::EINVAL)),
    ("gpa_plus_size_wraps", (Wrong::WrappingGpa, Errno::EINVAL)),
    ("two_to_the_31_pages", (Wrong::TooManyPages, Errno::EINVAL)),
    ("slot_is_bound_already", (Wrong::BoundSlot, Errno::EINVAL)),
    ("slot_is_ordinary_memory", (Wrong::OrdinarySlot, Errno::EINVAL)),
    ("gpa_overlaps_another_slot", (Wrong::TakenGpa, Errno::EEXIST)),
    ("descriptor_not_open", (Wrong::NotOpen, Errno::EBADF)),
    ("descriptor_of_dev_kvm", (Wrong::KvmDevice, Errno::EINVAL)),
    ("descriptor_of_the_vm", (Wrong::VmFile, Errno::EINVAL)),
    ("descriptor_of_a_memfd", (Wrong::Memfd, Errno::EINVAL)),
    ("gmem_of_another_vm", (Wrong::ForeignGmem, Errno::EINVAL)),
    ("offset_at_the_end_of_the_file", (Wrong::OffsetAtEnd, Errno::EINVAL)),
    ("offset_of_two_to_the_63", (Wrong::OffsetFarBeyondEnd, Errno::EINVAL)),
    ("range_straddles_the_end_of_the_file", (Wrong::LengthBeyondEnd, Errno::EINVAL)),
    ("gpa_beyond_the_physical_address_width", (Wrong::GpaBeyondLimit, Errno::EINVAL)),
];

fn one_wrong_input_is_refused(cx: &Context, &(wrong, errno): &(Wrong, Errno)) -> TestResult {
    let scene = Scene::new(cx)?;
    let region = wrong.put_into(&scene, scene.correct());
    claim_err!(scene.vm.set_memory_region(&region), errno, "a region with {wrong:?}");
    Ok(())
}

/// First page of the range and how many pages; pages 4 and 5 are bound.
const OVERLAPS: &[(&str, (u64, u64))] = &[
    ("front", (3, 2)),
    ("back", (5, 2)),
    ("same_range", (4, 2)),
    ("first_page", (4, 1)),
    ("last_page", (5, 1)),
    ("enclosing", (3, 4)),
    ("whole_file", (0, PAGES)),
];

fn overlapping_binding_is_refused(cx: &Context, &(first, pages): &(u64, u64)) -> TestResult {
    let scene = Scene::new(cx)?;
    let region = MemoryRegion::new(FREE_SLOT, FREE_GPA, pages * PAGE_SIZE).bound_to(&*scene.gmem, first * PAGE_SIZE);
    claim_err!(scene.vm.set_memory_region(&region), cx.by_release(&TAKEN_OFFSET)?, "pages {first}, {pages} of them");
    claim_ok!(scene.vm.set_memory_region(&MemoryRegion::deletion(BOUND_SLOT)));
    claim_ok!(scene.vm.set_memory_region(&region), "the same call with nothing bound");
    Ok(())
}

/// Offset and size in bytes.
const SIGN_OVERFLOWS: &[(&str, (u64, u64))] = &[
    ("last_page_below_int64_max", (i64::MAX as u64 & !(PAGE_SIZE - 1), PAGE_SIZE)),
    ("two_pages_across_int64_max", (i64::MAX as u64 & !(PAGE_SIZE - 1), 2 * PAGE_SIZE)),
    ("four_gib_across_int64_max", ((1 << 63) - (2 << 30), 4 << 30)),
];

fn offset_plus_size_beyond_int64_max_is_refused(cx: &Context, &(offset, size): &(u64, u64)) -> TestResult {
    let scene = Scene::new(cx)?;
    let region = MemoryRegion::new(FREE_SLOT, FREE_GPA, size).bound_to(&*scene.gmem, offset);
    claim_err!(scene.vm.set_memory_region(&region), Errno::EINVAL, "{size:#x} bytes from {offset:#x}");
    Ok(())
}

/// What a pair of wrong inputs is answered with.
#[derive(Clone, Copy, Debug)]
struct Pair(Wrong, Wrong, Errno);

const PAIRS: &[(&str, Pair)] = &[
    ("slot_id_before_gpa_overlap", Pair(Wrong::SlotId, Wrong::TakenGpa, Errno::EINVAL)),
    ("read_only_before_gpa_overlap", Pair(Wrong::ReadOnly, Wrong::TakenGpa, Errno::EINVAL)),
    ("dirty_log_before_gpa_overlap", Pair(Wrong::DirtyLog, Wrong::TakenGpa, Errno::EINVAL)),
    ("unknown_flag_before_gpa_overlap", Pair(Wrong::UnknownFlag(3), Wrong::TakenGpa, Errno::EINVAL)),
    ("size_before_gpa_overlap", Pair(Wrong::UnalignedSize, Wrong::TakenGpa, Errno::EINVAL)),
    ("gpa_alignment_before_gpa_overlap", Pair(Wrong::TakenGpa, Wrong::UnalignedGpa, Errno::EINVAL)),
    ("address_alignment_before_gpa_overlap", Pair(Wrong::UnalignedAddress, Wrong::TakenGpa, Errno::EINVAL)),
    ("kernel_address_before_gpa_overlap", Pair(Wrong::KernelAddress, Wrong::TakenGpa, Errno::EINVAL)),
    ("offset_alignment_before_gpa_overlap", Pair(Wrong::UnalignedOffset(1), Wrong::TakenGpa, Errno::EINVAL)),
    ("offset_wrap_before_gpa_overlap", Pair(Wrong::WrappingOffset, Wrong::TakenGpa, Errno::EINVAL)),
    ("address_space_before_gpa_overlap", Pair(Wrong::AddressSpace, Wrong::TakenGpa, Errno::EINVAL)),
    ("page_count_before_gpa_overlap", Pair(Wrong::TooManyPages, Wrong::TakenGpa, Errno::EINVAL)),
    ("bound_slot_before_gpa_overlap", Pair(Wrong::BoundSlot, Wrong::TakenGpa, Errno::EINVAL)),
    ("ordinary_slot_before_gpa_overlap", Pair(Wrong::OrdinarySlot, Wrong::TakenGpa, Errno::EINVAL)),
    ("slot_id_before_descriptor", Pair(Wrong::SlotId, Wrong::NotOpen, Errno::EINVAL)),
    ("read_only_before_descriptor", Pair(Wrong::ReadOnly, Wrong::NotOpen, Errno::EINVAL)),
    ("dirty_log_before_descriptor", Pair(Wrong::DirtyLog, Wrong::NotOpen, Errno::EINVAL)),
    ("unknown_flag_before_descriptor", Pair(Wrong::UnknownFlag(3), Wrong::NotOpen, Errno::EINVAL)),
    ("size_before_descriptor", Pair(Wrong::UnalignedSize, Wrong::NotOpen, Errno::EINVAL)),
    ("gpa_alignment_before_descriptor", Pair(Wrong::UnalignedGpa, Wrong::NotOpen, Errno::EINVAL)),
    ("address_alignment_before_descriptor", Pair(Wrong::UnalignedAddress, Wrong::NotOpen, Errno::EINVAL)),
    ("kernel_address_before_descriptor", Pair(Wrong::KernelAddress, Wrong::NotOpen, Errno::EINVAL)),
    ("offset_alignment_before_descriptor", Pair(Wrong::UnalignedOffset(1), Wrong::NotOpen, Errno::EINVAL)),
    ("offset_wrap_before_descriptor", Pair(Wrong::WrappingOffset, Wrong::NotOpen, Errno::EINVAL)),
    ("address_space_before_descriptor", Pair(Wrong::AddressSpace, Wrong::NotOpen, Errno::EINVAL)),
    ("gpa_wrap_before_descriptor", Pair(Wrong::WrappingGpa, Wrong::NotOpen, Errno::EINVAL)),
    ("page_count_before_descriptor", Pair(Wrong::TooManyPages, Wrong::NotOpen, Errno::EINVAL)),
    ("bound_slot_before_descriptor", Pair(Wrong::BoundSlot, Wrong::NotOpen, Errno::EINVAL)),
    ("ordinary_slot_before_descriptor", Pair(Wrong::OrdinarySlot, Wrong::NotOpen, Errno::EINVAL)),
    ("read_only_before_file_overlap", Pair(Wrong::ReadOnly, Wrong::TakenOffset, Errno::EINVAL)),
    ("size_before_file_overlap", Pair(Wrong::UnalignedSize, Wrong::TakenOffset, Errno::EINVAL)),
    ("offset_alignment_before_file_overlap", Pair(Wrong::TakenOffset, Wrong::UnalignedOffset(1), Errno::EINVAL)),
    ("bound_slot_before_file_overlap", Pair(Wrong::BoundSlot, Wrong::TakenOffset, Errno::EINVAL)),
    ("gpa_overlap_before_closed_descriptor", Pair(Wrong::TakenGpa, Wrong::NotOpen, Errno::EEXIST)),
    ("gpa_overlap_before_other_file", Pair(Wrong::TakenGpa, Wrong::KvmDevice, Errno::EEXIST)),
    ("gpa_overlap_before_foreign_gmem", Pair(Wrong::TakenGpa, Wrong::ForeignGmem, Errno::EEXIST)),
    ("gpa_overlap_before_end_of_file", Pair(Wrong::TakenGpa, Wrong::OffsetAtEnd, Errno::EEXIST)),
    ("gpa_overlap_before_file_overlap", Pair(Wrong::TakenGpa, Wrong::TakenOffset, Errno::EEXIST)),
    ("closed_descriptor_before_end_of_file", Pair(Wrong::NotOpen, Wrong::OffsetAtEnd, Errno::EBADF)),
    ("closed_descriptor_before_gpa_limit", Pair(Wrong::NotOpen, Wrong::GpaBeyondLimit, Errno::EBADF)),
    ("closed_descriptor_before_file_overlap", Pair(Wrong::NotOpen, Wrong::TakenOffset, Errno::EBADF)),
    ("foreign_gmem_before_file_overlap", Pair(Wrong::ForeignGmem, Wrong::TakenOffset, Errno::EINVAL)),
];

fn first_check_wins(cx: &Context, &Pair(first, second, errno): &Pair) -> TestResult {
    let scene = Scene::new(cx)?;
    let region = second.put_into(&scene, first.put_into(&scene, scene.correct()));
    claim_err!(scene.vm.set_memory_region(&region), errno, "a region with {first:?} and {second:?}");
    Ok(())
}

fn address_width_is_checked_before_overlap_in_the_file(cx: &Context) -> TestResult {
    let scene = Scene::new(cx)?;
    let region = Wrong::TakenOffset.put_into(&scene, Wrong::GpaBeyondLimit.put_into(&scene, scene.correct()));
    // Measured on 6.18.15, 7.2.12 and 7.3.4.
    let errno = cx.by_release(&[((6, 8), Errno::EINVAL), ((7, 2), Errno::EEXIST), ((7, 3), Errno::EINVAL)])?;
    claim_err!(scene.vm.set_memory_region(&region), errno, "a taken range at an address that is too high");
    Ok(())
}

/// The userspace_addr of two slots.
const ADDRESSES: &[(&str, (u64, u64))] = &[
    ("null", (0, 0)),
    ("not_mapped", (0x1000, 0x7FFF_0000_0000)),
    ("same_in_two_slots", (0x10_0000, 0x10_0000)),
    ("overlapping", (0x10_0000, 0x10_1000)),
];

fn any_user_address_is_accepted(cx: &Context, &(first, second): &(u64, u64)) -> TestResult {
    let scene = Scene::new(cx)?;
    let region = scene.correct().at(first);
    claim_ok!(scene.vm.set_memory_region(&region), "userspace_addr {first:#x}");
    let next = MemoryRegion::new(FREE_SLOT + 1, FREE_GPA + region.size, region.size).at(second);
    claim_ok!(scene.vm.set_memory_region(&next.bound_to(&*scene.gmem, region.size)), "userspace_addr {second:#x}");
    Ok(())
}

const REFUSALS: &[(&str, Wrong)] = &[
    ("gpa_overlap", Wrong::TakenGpa),
    ("closed_descriptor", Wrong::NotOpen),
    ("foreign_gmem", Wrong::ForeignGmem),
    ("end_of_file", Wrong::LengthBeyondEnd),
    ("gpa_beyond_limit", Wrong::GpaBeyondLimit),
    ("file_overlap", Wrong::TakenOffset),
];

fn refused_region_leaves_its_range_free(cx: &Context, &wrong: &Wrong) -> TestResult {
    let scene = Scene::new(cx)?;
    let correct = scene.correct();
    let region = wrong.put_into(&scene, correct);
    claim!(scene.vm.set_memory_region(&region).is_err(), "a region with {wrong:?} is refused");
    claim_err!(
        scene.vm.set_memory_region(&MemoryRegion::deletion(FREE_SLOT)),
        Errno::EINVAL,
        "no slot came to be by the refused call"
    );
    claim_ok!(scene.vm.set_memory_region(&correct), "the correct region after {wrong:?}");
    let rest = MemoryRegion::new(FREE_SLOT + 1, FREE_GPA + 16 * PAGE_SIZE, 2 * PAGE_SIZE);
    claim_ok!(
        scene.vm.set_memory_region(&rest.bound_to(&*scene.gmem, 6 * PAGE_SIZE)),
        "the last two pages of the file"
    );
    Ok(())
}

/// The stand-alone binary.
pub fn main() -> std::process::ExitCode {
    gmemtest::cli::selftest_main(&[&SUITE])
}
