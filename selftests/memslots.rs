//! Memslots as such: flags, limits, overlap, address spaces, the dirty log.

use std::sync::Arc;

use gmemtest::harness::{Context, Side, TestResult};
use gmemtest::machine::Exit;
use gmemtest::machine::{Errno, Facility, GuestOp, HostMemory, MemoryRegion, PAGE_SIZE, Vm, VmConfig};
use gmemtest::{claim_eq, claim_err, claim_matches, claim_ok};
use kvm_bindings::{
    KVM_CAP_NR_MEMSLOTS, KVM_CAP_READONLY_MEM, KVM_MEM_GUEST_MEMFD, KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY,
};

gmemtest::suite! {
    /// KVM_SET_USER_MEMORY_REGION and its second version on slots of ordinary memory, and what guest_memfd slots do not
    /// support (set_memory_region_test).
    pub static SUITE: memslots needs [Vm, UserMemory2] {
        /// KVM_SET_USER_MEMORY_REGION takes KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY where KVM_CAP_READONLY_MEM offers it to
        /// the VM, and refuses every other flag (kvm_vm_ioctl(): KVM_SET_USER_MEMORY_REGION_V1_FLAGS). A failure means that an old VMM can set a flag whose
        /// fields its struct does not have.
        first_version_takes_two_flags[BITS];

        /// KVM_SET_USER_MEMORY_REGION2 takes KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY where KVM_CAP_READONLY_MEM offers it
        /// to the VM, and KVM_MEM_GUEST_MEMFD, and refuses every other flag, KVM's internal ones too (check_memory_region_flags()). A failure means that user space can
        /// set a slot's internal state.
        second_version_takes_three_flags[BITS] needs [GuestMemfd];

        /// KVM_MEM_GUEST_MEMFD together with dirty logging or read-only is refused (check_memory_region_flags()). A failure
        /// means that private memory claims to support what it does not.
        gmem_excludes_other_flags[EXCLUDED] needs [GuestMemfd];

        /// Slot ids from the whole range below KVM_CAP_NR_MEMSLOTS can be used at the same time, the first and the last
        /// among them, and the id after the last is refused with EINVAL. Every sixteenth id is enough: KVM checks the id, not
        /// the number of slots, and finds an id in a hash of 128 buckets, so that all 32,764 cost time in square (measured:
        /// 3.0 s for all, 0.05 s for these). A failure means that the capability promises more than there is.
        slot_ids_of_the_whole_range_can_be_used_at_once;

        /// Two slots of one address space cannot share a guest frame: EEXIST (kvm_check_memslot_overlap()). A failure makes
        /// a guest-physical address ambiguous.
        overlapping_slots_are_refused[OVERLAPS];

        /// Slots may touch. A failure leaves holes in every memory map.
        adjacent_slots_are_accepted;

        /// A slot cannot reach beyond the host's physical address width (kvm_arch_prepare_memory_region():
        /// kvm_mmu_max_gfn()). A failure lets the MMU see frames that it cannot map.
        slot_beyond_the_address_width_is_refused[BEYOND];

        /// A slot of ordinary memory may be moved; moved onto another slot or beyond the address width it is refused and
        /// stays where it was. A failure means that a refused call has an effect.
        refused_move_leaves_the_slot_in_place[MOVES] needs [Guest];

        /// The guest finds a moved slot's memory at the new address and KVM_EXIT_MMIO at the old one. A failure means that
        /// mappings of the old address survive.
        moved_slot_is_at_its_new_address needs [Guest];

        /// A slot's size and userspace_addr are fixed, and READONLY too (kvm_set_memory_region()). A failure changes the
        /// pages under mapped memory.
        fixed_fields_cannot_be_changed[FIXED];

        /// A store to a read-only slot is KVM_EXIT_MMIO with its data and changes nothing; a load is served. A failure lets
        /// a guest write its ROM.
        read_only_slot_sends_stores_to_user_space needs [Guest];

        /// KVM_GET_DIRTY_LOG on a slot without a bitmap is ENOENT, a guest_memfd slot among them
        /// (kvm_get_dirty_log_protect()). A failure makes live migration believe that nothing was written.
        dirty_log_of_a_slot_without_one_is_enoent[LOGLESS] needs [GuestMemfd];

        /// The dirty log of a slot with KVM_MEM_LOG_DIRTY_PAGES has the pages that the guest wrote and no others. A failure
        /// loses memory in live migration.
        dirty_log_has_the_pages_written needs [Guest];

        /// Dirty logging may be turned on for a slot that is there. A failure makes live migration impossible.
        dirty_log_can_be_turned_on_later needs [Guest];

        /// Address space 1 is there exactly when KVM_CAP_MULTI_ADDRESS_SPACE says so for the VM: not for VMs with private
        /// memory, not for a KVM without SMM. A failure means that the capability and the ioctl disagree.
        second_address_space_is_there_when_the_capability_says_so;

        /// The same guest frame may be in a slot of each address space, and a guest_memfd page still in one slot only. A
        /// failure breaks SMM, or lets a page into two slots.
        address_spaces_are_independent needs [SecondAddressSpace, GuestMemfd];
    }
}

const SLOT: u32 = 3;
const BASE: u64 = 1 << 32;
const LEN: u64 = 4 * PAGE_SIZE;

macro_rules! bits {
    ($($bit:literal)*) => { &[$((concat!("bit_", $bit), $bit)),*] };
}

const BITS: &[(&str, u32)] = bits! {
    0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31
};

fn bare(cx: &Context) -> TestResult<Arc<dyn Vm>> {
    Ok(claim_ok!(cx.machine().create_vm(VmConfig::Bare)))
}

/// The flags that an ordinary slot of the VM may have: READONLY only where KVM_CAP_READONLY_MEM offers it, which it does not
/// to a VM with protected state (check_memory_region_flags()).
fn flags_of_ordinary_slots(vm: &dyn Vm) -> TestResult<u32> {
    let read_only = claim_ok!(vm.capability(KVM_CAP_READONLY_MEM)) != 0;
    Ok(KVM_MEM_LOG_DIRTY_PAGES | if read_only { KVM_MEM_READONLY } else { 0 })
}

fn first_version_takes_two_flags(cx: &Context, &bit: &u32) -> TestResult {
    let vm = bare(cx)?;
    let flag = 1 << bit;
    let region = MemoryRegion::new(SLOT, BASE, LEN).with_flags(flag);
    let expected = if flags_of_ordinary_slots(&*vm)? & flag != 0 { Ok(()) } else { Err(Errno::EINVAL) };
    claim_eq!(vm.set_memory_region_v1(&region), expected, "KVM_SET_USER_MEMORY_REGION with flags {flag:#x}");
    Ok(())
}

fn second_version_takes_three_flags(cx: &Context, &bit: &u32) -> TestResult {
    let vm = bare(cx)?;
    let gmem = claim_ok!(vm.create_guest_memfd(LEN, 0));
    let flag = 1 << bit;
    let region = MemoryRegion::new(SLOT, BASE, LEN);
    let (region, expected) = match flag {
        KVM_MEM_GUEST_MEMFD => (region.bound_to(&*gmem, 0), Ok(())),
        _ if flags_of_ordinary_slots(&*vm)? & flag != 0 => (region.with_flags(flag), Ok(())),
        _ => (region.with_flags(flag), Err(Errno::EINVAL)),
    };
    claim_eq!(vm.set_memory_region(&region), expected, "KVM_SET_USER_MEMORY_REGION2 with flags {flag:#x}");
    Ok(())
}

const EXCLUDED: &[(&str, u32)] = &[
    ("dirty_log", KVM_MEM_LOG_DIRTY_PAGES),
    ("read_only", KVM_MEM_READONLY),
    ("both", KVM_MEM_LOG_DIRTY_PAGES | KVM_MEM_READONLY),
];

fn gmem_excludes_other_flags(cx: &Context, &flags: &u32) -> TestResult {
    let vm = bare(cx)?;
    let gmem = claim_ok!(vm.create_guest_memfd(LEN, 0));
    let region = MemoryRegion::new(SLOT, BASE, LEN).bound_to(&*gmem, 0).with_flags(flags);
    claim_err!(vm.set_memory_region(&region), Errno::EINVAL, "flags {:#x}", region.flags);
    Ok(())
}

fn slot_ids_of_the_whole_range_can_be_used_at_once(cx: &Context) -> TestResult {
    let vm = bare(cx)?;
    let slots = claim_ok!(vm.capability(KVM_CAP_NR_MEMSLOTS)) as u32;
    let at = |slot| MemoryRegion::new(slot, BASE + u64::from(slot) * PAGE_SIZE, PAGE_SIZE);
    for slot in (0..slots - 1).step_by(16).chain([slots - 1]) {
        claim_ok!(vm.set_memory_region(&at(slot)), "slot {slot} of {slots}");
    }
    claim_err!(vm.set_memory_region(&at(slots)), Errno::EINVAL, "slot {slots} of {slots}");
    cx.note(format_args!("slots 0 to {}", slots - 1));
    Ok(())
}

/// First page and number of pages of the second slot; the first has pages 4 to 7.
const OVERLAPS: &[(&str, (u64, u64))] = &[
    ("front", (3, 2)),
    ("back", (7, 2)),
    ("same", (4, 4)),
    ("inside", (5, 2)),
    ("around", (3, 6)),
    ("first_page", (4, 1)),
    ("last_page", (7, 1)),
];

fn overlapping_slots_are_refused(cx: &Context, &(first, pages): &(u64, u64)) -> TestResult {
    let vm = bare(cx)?;
    claim_ok!(vm.set_memory_region(&MemoryRegion::new(SLOT, BASE + LEN, LEN)));
    let second = MemoryRegion::new(SLOT + 1, BASE + first * PAGE_SIZE, pages * PAGE_SIZE);
    claim_err!(vm.set_memory_region(&second), Errno::EEXIST, "pages {first} and {pages} on");
    claim_err!(vm.set_memory_region_v1(&second), Errno::EEXIST, "the same by KVM_SET_USER_MEMORY_REGION");
    Ok(())
}

fn adjacent_slots_are_accepted(cx: &Context) -> TestResult {
    let vm = bare(cx)?;
    for (slot, gpa) in [(SLOT, BASE + LEN), (SLOT + 1, BASE), (SLOT + 2, BASE + 2 * LEN)] {
        claim_ok!(vm.set_memory_region(&MemoryRegion::new(slot, gpa, LEN)), "slot {slot} at {gpa:#x}");
    }
    Ok(())
}

/// Address and size. No host has more than 52 bits.
const BEYOND: &[(&str, (u64, u64))] = &[
    ("first_frame_beyond", (1 << 52, PAGE_SIZE)),
    ("last_frame_beyond", ((1 << 52) - PAGE_SIZE, 2 * PAGE_SIZE)),
    ("top_of_the_address_space", (0_u64.wrapping_sub(2 * PAGE_SIZE), PAGE_SIZE)),
];

fn slot_beyond_the_address_width_is_refused(cx: &Context, &(gpa, size): &(u64, u64)) -> TestResult {
    claim_err!(bare(cx)?.set_memory_region(&MemoryRegion::new(SLOT, gpa, size)), Errno::EINVAL, "{size} at {gpa:#x}");
    Ok(())
}

/// Where the slot is moved to, and why it cannot.
const MOVES: &[(&str, (u64, Errno))] = &[
    ("onto_another_slot", (BASE + 2 * LEN, Errno::EEXIST)),
    ("beyond_the_address_width", (1 << 52, Errno::EINVAL)),
    ("to_an_unaligned_address", (BASE + (1 << 30) + 1, Errno::EINVAL)),
];

fn refused_move_leaves_the_slot_in_place(cx: &Context, &(to, errno): &(u64, Errno)) -> TestResult {
    let vm = claim_ok!(cx.machine().create_vm(VmConfig::Payload { vcpus: 1 }));
    let memory = claim_ok!(cx.machine().host_memory(HostMemory::Anonymous, LEN));
    let region = MemoryRegion::new(SLOT, BASE, LEN).at(memory.addr());
    claim_ok!(vm.set_memory_region(&region));
    claim_ok!(vm.set_memory_region(&MemoryRegion::new(SLOT + 1, BASE + 2 * LEN, LEN)));
    memory.write_u64(0, 0x5741)?;
    claim_err!(vm.set_memory_region(&MemoryRegion { gpa: to, ..region }), errno, "the move to {to:#x}");
    let mut vcpu = claim_ok!(vm.create_vcpu(0));
    let load = GuestOp::read_u64(Side::Shared.address(&*vm, BASE));
    claim_eq!(vcpu.execute(load), Exit::Done(0x5741), "the guest at the old address");
    Ok(())
}

fn moved_slot_is_at_its_new_address(cx: &Context) -> TestResult {
    let vm = claim_ok!(cx.machine().create_vm(VmConfig::Payload { vcpus: 1 }));
    let memory = claim_ok!(cx.machine().host_memory(HostMemory::Anonymous, LEN));
    let region = MemoryRegion::new(SLOT, BASE, LEN).at(memory.addr());
    claim_ok!(vm.set_memory_region(&region));
    memory.write_u64(0, 0x3083)?;
    let mut vcpu = claim_ok!(vm.create_vcpu(0));
    let load = |gpa| GuestOp::read_u64(Side::Shared.address(&*vm, gpa));
    claim_eq!(vcpu.execute(load(BASE)), Exit::Done(0x3083), "before the move");
    claim_ok!(vm.set_memory_region(&MemoryRegion { gpa: BASE + LEN, ..region }), "the move");
    claim_eq!(vcpu.execute(load(BASE + LEN)), Exit::Done(0x3083), "at the new address");
    claim_matches!(vcpu.execute(load(BASE)), Exit::Mmio { gpa: BASE, .. }, "at the old address");
    Ok(())
}

/// What of an existing slot of four pages at user address 1 MiB changes.
type Change = fn(MemoryRegion<'static>) -> MemoryRegion<'static>;

const FIXED: &[(&str, Change)] = &[
    ("larger", |region| MemoryRegion { size: LEN + PAGE_SIZE, ..region }),
    ("smaller", |region| MemoryRegion { size: LEN - PAGE_SIZE, ..region }),
    ("userspace_addr", |region| region.at(region.userspace_addr + LEN)),
    ("read_only", |region| region.with_flags(KVM_MEM_READONLY)),
];

fn fixed_fields_cannot_be_changed(cx: &Context, change: &Change) -> TestResult {
    let vm = bare(cx)?;
    let region = MemoryRegion::new(SLOT, BASE, LEN).at(1 << 20);
    claim_ok!(vm.set_memory_region(&region));
    claim_err!(vm.set_memory_region(&change(region)), Errno::EINVAL, "the changed slot");
    claim_ok!(vm.set_memory_region(&region), "the slot as it is");
    Ok(())
}

fn read_only_slot_sends_stores_to_user_space(cx: &Context) -> TestResult {
    let vm = claim_ok!(cx.machine().create_vm(VmConfig::Payload { vcpus: 1 }));
    if flags_of_ordinary_slots(&*vm)? & KVM_MEM_READONLY == 0 {
        gmemtest::skip!(Declined, "KVM_CAP_READONLY_MEM is 0: a VM with protected state has no read-only slots");
    }
    let memory = claim_ok!(cx.machine().host_memory(HostMemory::Anonymous, LEN));
    memory.write_u64(0, 0x4073)?;
    let region = MemoryRegion::new(SLOT, BASE, LEN).at(memory.addr()).with_flags(KVM_MEM_READONLY);
    claim_ok!(vm.set_memory_region(&region));
    let mut vcpu = claim_ok!(vm.create_vcpu(0));
    claim_eq!(vcpu.execute(GuestOp::read_u64(BASE)), Exit::Done(0x4073), "the load");
    let exit = vcpu.execute(GuestOp::write_u64(BASE, 0x1234));
    claim_eq!(exit, Exit::Mmio { gpa: BASE, len: 8, write: Some(0x1234) }, "the store");
    claim_eq!(memory.read_u64(0)?, 0x4073, "the memory after the store");
    Ok(())
}

/// Which slot is asked for.
#[derive(Clone, Copy, Debug)]
enum Logless {
    Gmem,
    Ordinary,
    Absent,
}

const LOGLESS: &[(&str, Logless)] =
    &[("gmem_slot", Logless::Gmem), ("ordinary_slot", Logless::Ordinary), ("absent_slot", Logless::Absent)];

fn dirty_log_of_a_slot_without_one_is_enoent(cx: &Context, which: &Logless) -> TestResult {
    let vm = bare(cx)?;
    let gmem = claim_ok!(vm.create_guest_memfd(LEN, 0));
    let region = MemoryRegion::new(SLOT, BASE, LEN);
    match which {
        Logless::Gmem => claim_ok!(vm.set_memory_region(&region.bound_to(&*gmem, 0))),
        Logless::Ordinary => claim_ok!(vm.set_memory_region(&region)),
        Logless::Absent => {}
    }
    claim_err!(vm.dirty_log(SLOT, LEN / PAGE_SIZE), Errno::ENOENT, "the dirty log of {which:?}");
    Ok(())
}

fn dirty_log_has_the_pages_written(cx: &Context) -> TestResult {
    logged(cx, |vm, region| {
        claim_ok!(vm.set_memory_region(&region.with_flags(KVM_MEM_LOG_DIRTY_PAGES)));
        Ok(())
    })
}

fn dirty_log_can_be_turned_on_later(cx: &Context) -> TestResult {
    logged(cx, |vm, region| {
        claim_ok!(vm.set_memory_region(region));
        claim_ok!(vm.set_memory_region(&region.with_flags(KVM_MEM_LOG_DIRTY_PAGES)), "the flag on the slot");
        Ok(())
    })
}

fn logged(cx: &Context, set_up: fn(&dyn Vm, &MemoryRegion) -> TestResult) -> TestResult {
    if cx.has(Facility::PrivateMemory) {
        gmemtest::skip!(Declined, "about ordinary memory of a VM type without private memory");
    }
    let vm = claim_ok!(cx.machine().create_vm(VmConfig::Payload { vcpus: 1 }));
    let memory = claim_ok!(cx.machine().host_memory(HostMemory::Anonymous, LEN));
    set_up(&*vm, &MemoryRegion::new(SLOT, BASE, LEN).at(memory.addr()))?;
    let mut vcpu = claim_ok!(vm.create_vcpu(0));
    claim_matches!(vcpu.execute(GuestOp::read_u64(BASE)), Exit::Done(0));
    for page in [1, 3] {
        claim_matches!(vcpu.execute(GuestOp::write_u64(BASE + page * PAGE_SIZE, 1)), Exit::Done(_));
    }
    claim_eq!(claim_ok!(vm.dirty_log(SLOT, 4)), [0b1010], "pages 1 and 3 were written, page 0 was read");
    claim_eq!(claim_ok!(vm.dirty_log(SLOT, 4)), [0], "the second look: nothing was written since the first");
    claim_matches!(vcpu.execute(GuestOp::write_u64(BASE + PAGE_SIZE, 2)), Exit::Done(_));
    claim_eq!(claim_ok!(vm.dirty_log(SLOT, 4)), [0b0010], "page 1 was written again");
    Ok(())
}

fn second_address_space_is_there_when_the_capability_says_so(cx: &Context) -> TestResult {
    let expected = if cx.has(Facility::SecondAddressSpace) { Ok(()) } else { Err(Errno::EINVAL) };
    let region = MemoryRegion::new(1 << 16 | SLOT, BASE, LEN);
    claim_eq!(bare(cx)?.set_memory_region(&region), expected, "a slot in address space 1");
    Ok(())
}

fn address_spaces_are_independent(cx: &Context) -> TestResult {
    let vm = bare(cx)?;
    let gmem = claim_ok!(vm.create_guest_memfd(2 * LEN, 0));
    let first = MemoryRegion::new(SLOT, BASE, LEN).bound_to(&*gmem, 0);
    claim_ok!(vm.set_memory_region(&first));
    let second = MemoryRegion { slot: 1 << 16 | SLOT, ..first };
    // EEXIST came with "KVM guest_memfd changes for 7.2".
    let taken = cx.by_release(&[((6, 8), Errno::EINVAL), ((7, 2), Errno::EEXIST)])?;
    claim_err!(vm.set_memory_region(&second), taken, "the same pages in address space 1");
    claim_ok!(
        vm.set_memory_region(&second.bound_to(&*gmem, LEN)),
        "other pages at the same address in address space 1"
    );
    Ok(())
}

/// The stand-alone binary.
pub fn main() -> std::process::ExitCode {
    gmemtest::cli::selftest_main(&[&SUITE])
}
