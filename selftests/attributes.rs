//! KVM_SET_MEMORY_ATTRIBUTES: what it refuses, what it touches, and which side of the memory the guest then uses.

use std::sync::Arc;

use gmemtest::harness::{ChildEnd, Context, GmemVm, TestResult, in_child};
use gmemtest::machine::{
    Errno, Exit, Facility, GuestOp, HostMemory, MemoryAttributes, MemoryRegion, PAGE_SIZE, Vcpu, Vm, VmConfig, VmType,
};
use gmemtest::uapi::kvm::{KVM_MEMORY_ATTRIBUTE_PRIVATE, KVM_MEMORY_EXIT_FLAG_PRIVATE};
use gmemtest::{claim_eq, claim_err, claim_matches, claim_ok};

gmemtest::suite! {
    /// KVM_SET_MEMORY_ATTRIBUTES (6.8) on VMs with private memory: validation, independence from slots and files, and the
    /// two copies of every page.
    pub static SUITE: attributes needs [Vm, MemoryAttributes] {
        /// Each check refuses its input with its errno (kvm_vm_ioctl_set_mem_attributes()). A failure means that an
        /// attribute can be set on what is not a range of pages, or that an unknown attribute is taken for a known one.
        wrong_argument_is_refused[WRONG];

        /// Each of the 64 attribute bits is accepted exactly when KVM_CAP_MEMORY_ATTRIBUTES at VM scope has it. A failure
        /// means that the capability and the ioctl disagree.
        attribute_is_accepted_exactly_when_the_capability_has_it[BITS];

        /// Attributes belong to guest frames, not to slots: no slot, an ordinary slot, and frames beyond every slot and
        /// beyond the physical address width are accepted. A failure means that a VMM has to make slots first.
        slots_are_not_needed[ANYWHERE];

        /// Setting what is set already is success, and so is clearing what was never set. A failure makes a VMM track the
        /// attributes itself.
        setting_again_is_success[AGAIN];

        /// A refused call changes nothing: the guest goes on using the side that it used. A failure means that an error
        /// converts memory.
        refused_call_changes_nothing needs [Guest, GuestMemfd];

        /// A shared frame uses the memory at userspace_addr, a private one the guest_memfd. A failure means that the
        /// attribute does not decide where the data lives.
        attribute_decides_which_side_is_used needs [Guest, GuestMemfd, Cachestat];

        /// The range is exact: the pages before and after it keep their side. A failure converts memory that nobody named.
        pages_beside_the_range_keep_their_side[EDGES] needs [Guest, GuestMemfd];

        /// A conversion copies nothing and clears nothing: both sides keep their own contents through round trips
        /// (kvm_vm_set_mem_attributes() only unmaps). A failure leaks private data to the shared side, or loses it.
        both_sides_keep_their_contents_through_round_trips needs [Guest, GuestMemfd];

        /// A conversion allocates and frees nothing in the file, in either direction. A failure means that a conversion
        /// costs or loses memory behind the VMM's back.
        conversion_leaves_the_file_alone needs [Guest, GuestMemfd, Cachestat];

        /// After a punch hole the private side of a round trip is zero, and the shared side is as it was. A failure means
        /// that a VMM cannot destroy private data.
        punched_private_page_is_zero_after_a_round_trip needs [Guest, GuestMemfd];

        /// Attributes outlive the slot: a new slot on the same frames is private where the old one was. A failure means
        /// that re-creating a slot converts memory.
        attributes_outlive_the_slot needs [Guest, GuestMemfd];

        /// Attributes outlive the file: frames stay private when the guest_memfd is closed and a new one is bound. A
        /// failure means that private accesses fall back to shared memory.
        attributes_outlive_the_file needs [Guest, GuestMemfd];

        /// A VM's attributes are its own. A failure means that one VM converts another's memory.
        attributes_belong_to_one_vm needs [Guest, GuestMemfd];

        /// Frames that become private are no longer reached through a mapping that was made while they were shared, and
        /// the reverse (kvm_arch_pre_set_memory_attributes() unmaps both). A failure means that the guest goes on using the
        /// wrong side.
        mapped_page_changes_sides_at_once needs [Guest, GuestMemfd];

        /// Every second page of a range may differ, and a whole range may be made one again. A failure means that mixed
        /// ranges are tracked wrongly.
        mixed_range_is_exact needs [Guest, GuestMemfd];

        /// A process that forked from the VMM cannot set attributes: EIO. A failure lets a child convert the parent's
        /// memory.
        forked_child_is_refused needs [RealFiles];
    }
}

const PRIVATE: u64 = KVM_MEMORY_ATTRIBUTE_PRIVATE;
const BASE: u64 = GmemVm::GPA;

fn bare(cx: &Context) -> TestResult<Arc<dyn Vm>> {
    Ok(claim_ok!(cx.machine().create_vm(VmConfig::Bare)))
}

/// A VM whose guest memory starts shared, for VM types where the attribute alone says which side an access uses.
fn convertible(cx: &Context, pages: u64) -> TestResult<GmemVm> {
    if cx.machine().spec().vm_type == VmType::Tdx {
        gmemtest::skip!(Declined, "a TD says by the address whether an access is private");
    }
    GmemVm::convertible(cx, pages)
}

const PAGE: MemoryAttributes = MemoryAttributes { address: BASE, size: PAGE_SIZE, attributes: PRIVATE, flags: 0 };

/// Two inputs may be wrong: all of these are EINVAL, so that their order cannot be told.
const WRONG: &[(&str, MemoryAttributes)] = &[
    ("flag_bit_0", MemoryAttributes { flags: 1, ..PAGE }),
    ("flag_bit_63", MemoryAttributes { flags: 1 << 63, ..PAGE }),
    ("size_zero", MemoryAttributes { size: 0, ..PAGE }),
    ("size_unaligned", MemoryAttributes { size: PAGE_SIZE + 1, ..PAGE }),
    ("size_below_a_page", MemoryAttributes { size: 512, ..PAGE }),
    ("address_unaligned", MemoryAttributes { address: BASE + 1, ..PAGE }),
    ("wraps", MemoryAttributes { address: 0_u64.wrapping_sub(PAGE_SIZE), size: 2 * PAGE_SIZE, ..PAGE }),
    ("ends_at_two_to_the_64", MemoryAttributes { address: 0_u64.wrapping_sub(PAGE_SIZE), ..PAGE }),
    ("wraps_while_clearing", MemoryAttributes { address: 0_u64.wrapping_sub(PAGE_SIZE), attributes: 0, ..PAGE }),
    ("private_and_unknown_attribute", MemoryAttributes { attributes: PRIVATE | 1, ..PAGE }),
    ("size_zero_while_clearing", MemoryAttributes { size: 0, attributes: 0, ..PAGE }),
    ("flag_while_clearing", MemoryAttributes { flags: 1, attributes: 0, ..PAGE }),
];

fn wrong_argument_is_refused(cx: &Context, range: &MemoryAttributes) -> TestResult {
    claim_err!(bare(cx)?.set_memory_attributes(range), Errno::EINVAL, "{range:x?}");
    Ok(())
}

macro_rules! bits {
    ($($bit:literal)*) => { &[$((concat!("bit_", $bit), $bit)),*] };
}

const BITS: &[(&str, u32)] = bits! {
    0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31
    32 33 34 35 36 37 38 39 40 41 42 43 44 45 46 47 48 49 50 51 52 53 54 55 56 57 58 59 60 61 62 63
};

fn attribute_is_accepted_exactly_when_the_capability_has_it(cx: &Context, &bit: &u32) -> TestResult {
    let vm = bare(cx)?;
    let supported = claim_ok!(vm.capability(kvm_bindings::KVM_CAP_MEMORY_ATTRIBUTES)) as u32;
    let attributes = 1_u64 << bit;
    let expected = if u64::from(supported) & attributes != 0 { Ok(()) } else { Err(Errno::EINVAL) };
    let result = vm.set_memory_attributes(&MemoryAttributes { attributes, ..PAGE });
    claim_eq!(result, expected, "attribute {attributes:#x}, supported {supported:#x}");
    Ok(())
}

/// Where, and of what size.
const ANYWHERE: &[(&str, MemoryAttributes)] = &[
    ("no_slot", PAGE),
    ("frame_zero", MemoryAttributes { address: 0, ..PAGE }),
    ("across_4_gib", MemoryAttributes { address: BASE - PAGE_SIZE, size: 2 * PAGE_SIZE, ..PAGE }),
    ("beyond_the_address_width", MemoryAttributes { address: 1 << 52, ..PAGE }),
    ("last_frame_but_one", MemoryAttributes { address: 0_u64.wrapping_sub(2 * PAGE_SIZE), ..PAGE }),
];

fn slots_are_not_needed(cx: &Context, range: &MemoryAttributes) -> TestResult {
    let vm = bare(cx)?;
    claim_ok!(vm.set_memory_attributes(range), "private {range:x?}");
    claim_ok!(vm.set_memory_attributes(&MemoryAttributes { attributes: 0, ..*range }), "shared {range:x?}");
    Ok(())
}

const AGAIN: &[(&str, u64)] = &[("private", PRIVATE), ("shared", 0)];

fn setting_again_is_success(cx: &Context, &attributes: &u64) -> TestResult {
    let vm = bare(cx)?;
    for round in 0..3 {
        let range = MemoryAttributes { attributes, size: 16 * PAGE_SIZE, ..PAGE };
        claim_ok!(vm.set_memory_attributes(&range), "round {round}");
    }
    Ok(())
}

fn read(vcpu: &mut dyn Vcpu, gpa: u64) -> TestResult<u64> {
    match vcpu.execute(GuestOp::read_u64(gpa)) {
        Exit::Done(value) => Ok(value),
        other => gmemtest::fail!("the guest's load from {gpa:#x} ended in {other:x?}"),
    }
}

fn write(vcpu: &mut dyn Vcpu, gpa: u64, value: u64) -> TestResult {
    claim_matches!(vcpu.execute(GuestOp::write_u64(gpa, value)), Exit::Done(_), "a store to {gpa:#x}");
    Ok(())
}

fn refused_call_changes_nothing(cx: &Context) -> TestResult {
    let vm = convertible(cx, 2)?;
    let mut vcpu = vm.vcpu(0)?;
    vm.shared.write_u64(0, 0x5A)?;
    claim_eq!(read(&mut *vcpu, vm.gpa(0))?, 0x5A, "before");
    for (name, range) in WRONG.iter().filter(|(_, range)| range.address == BASE) {
        claim_err!(vm.vm.set_memory_attributes(range), Errno::EINVAL, "{name}");
        claim_eq!(read(&mut *vcpu, vm.gpa(0))?, 0x5A, "after {name}");
    }
    Ok(())
}

fn attribute_decides_which_side_is_used(cx: &Context) -> TestResult {
    let vm = convertible(cx, 1)?;
    let mut vcpu = vm.vcpu(0)?;
    write(&mut *vcpu, vm.gpa(0), 0x5A4E)?;
    claim_eq!(vm.shared.read_u64(0)?, 0x5A4E, "the shared side after a store to the shared page");
    claim_eq!(claim_ok!(vm.gmem.cache_stat(0, 0)).cached, 0, "pages in the file while all is shared");
    vm.set_attributes(0, PAGE_SIZE, PRIVATE)?;
    write(&mut *vcpu, vm.gpa(0), 0x9417)?;
    claim_eq!(vm.shared.read_u64(0)?, 0x5A4E, "the shared side after a store to the private page");
    claim_eq!(claim_ok!(vm.gmem.cache_stat(0, 0)).cached, 1, "pages in the file after a private store");
    Ok(())
}

/// First page and number of pages made private, of eight.
const EDGES: &[(&str, (u64, u64))] = &[
    ("first_page", (0, 1)),
    ("last_page", (7, 1)),
    ("middle", (3, 2)),
    ("all_but_the_edges", (1, 6)),
    ("all", (0, 8)),
];

/// Shared memory holds 0x5A00 + page, private memory 0x9400 + page.
fn claim_sides(vm: &GmemVm, vcpu: &mut dyn Vcpu, private: impl Fn(u64) -> bool) -> TestResult {
    for page in 0..vm.len / PAGE_SIZE {
        let expected = if private(page) { 0x9400 } else { 0x5A00 } + page;
        claim_eq!(read(vcpu, vm.gpa(page * PAGE_SIZE))?, expected, "page {page}, private: {}", private(page));
    }
    Ok(())
}

/// Eight pages whose two sides hold what [`claim_sides`] expects, all shared.
fn two_sides(cx: &Context) -> TestResult<(GmemVm, Box<dyn Vcpu>)> {
    let vm = convertible(cx, 8)?;
    let mut vcpu = vm.vcpu(0)?;
    vm.set_attributes(0, vm.len, PRIVATE)?;
    for page in 0..8 {
        write(&mut *vcpu, vm.gpa(page * PAGE_SIZE), 0x9400 + page)?;
        vm.shared.write_u64(page * PAGE_SIZE, 0x5A00 + page)?;
    }
    vm.set_attributes(0, vm.len, 0)?;
    Ok((vm, vcpu))
}

fn pages_beside_the_range_keep_their_side(cx: &Context, &(first, pages): &(u64, u64)) -> TestResult {
    let (vm, mut vcpu) = two_sides(cx)?;
    let within = |page| (first..first + pages).contains(&page);
    vm.set_attributes(first * PAGE_SIZE, pages * PAGE_SIZE, PRIVATE)?;
    claim_sides(&vm, &mut *vcpu, within)?;
    vm.set_attributes(0, vm.len, PRIVATE)?;
    vm.set_attributes(first * PAGE_SIZE, pages * PAGE_SIZE, 0)?;
    claim_sides(&vm, &mut *vcpu, |page| !within(page))
}

fn both_sides_keep_their_contents_through_round_trips(cx: &Context) -> TestResult {
    let (vm, mut vcpu) = two_sides(cx)?;
    for _ in 0..3 {
        claim_sides(&vm, &mut *vcpu, |_| false)?;
        vm.set_attributes(0, vm.len, PRIVATE)?;
        claim_sides(&vm, &mut *vcpu, |_| true)?;
        vm.set_attributes(0, vm.len, 0)?;
    }
    Ok(())
}

fn conversion_leaves_the_file_alone(cx: &Context) -> TestResult {
    let (vm, _) = two_sides(cx)?;
    claim_ok!(vm.gmem.punch_hole(0, 4 * PAGE_SIZE));
    for attributes in [PRIVATE, 0, PRIVATE] {
        vm.set_attributes(0, vm.len, attributes)?;
        claim_eq!(claim_ok!(vm.gmem.cache_stat(0, 0)).cached, 4, "pages in the file with attributes {attributes}");
    }
    Ok(())
}

fn punched_private_page_is_zero_after_a_round_trip(cx: &Context) -> TestResult {
    let (vm, mut vcpu) = two_sides(cx)?;
    claim_ok!(vm.gmem.punch_hole(2 * PAGE_SIZE, PAGE_SIZE));
    claim_sides(&vm, &mut *vcpu, |_| false)?;
    vm.set_attributes(0, vm.len, PRIVATE)?;
    claim_eq!(read(&mut *vcpu, vm.gpa(2 * PAGE_SIZE))?, 0, "the private page that was punched while shared");
    claim_eq!(read(&mut *vcpu, vm.gpa(3 * PAGE_SIZE))?, 0x9403, "the private page beside it");
    vm.set_attributes(0, vm.len, 0)?;
    claim_sides(&vm, &mut *vcpu, |_| false)
}

fn attributes_outlive_the_slot(cx: &Context) -> TestResult {
    let (vm, mut vcpu) = two_sides(cx)?;
    vm.set_attributes(0, 4 * PAGE_SIZE, PRIVATE)?;
    vm.delete_slot()?;
    vm.create_slot()?;
    claim_sides(&vm, &mut *vcpu, |page| page < 4)?;
    // While there is no slot, attributes can be changed all the same.
    vm.delete_slot()?;
    vm.set_attributes(PAGE_SIZE, PAGE_SIZE, 0)?;
    vm.create_slot()?;
    claim_sides(&vm, &mut *vcpu, |page| page < 4 && page != 1)
}

fn attributes_outlive_the_file(cx: &Context) -> TestResult {
    let (mut vm, mut vcpu) = two_sides(cx)?;
    vm.set_attributes(0, PAGE_SIZE, PRIVATE)?;
    vm.gmem = claim_ok!(vm.vm.create_guest_memfd(vm.len, 0));
    if cx.has(Facility::MemoryFaultInfo) {
        let fault = Exit::MemoryFault {
            errno: Errno::EFAULT,
            flags: KVM_MEMORY_EXIT_FLAG_PRIVATE,
            gpa: vm.gpa(0),
            size: PAGE_SIZE,
        };
        claim_eq!(vcpu.execute(GuestOp::read_u64(vm.gpa(0))), fault, "the private page without a file");
    }
    claim_eq!(read(&mut *vcpu, vm.gpa(PAGE_SIZE))?, 0x5A01, "the shared page of the same slot");
    vm.delete_slot()?;
    vm.create_slot()?;
    claim_eq!(read(&mut *vcpu, vm.gpa(0))?, 0, "the private page in the new file");
    claim_eq!(read(&mut *vcpu, vm.gpa(PAGE_SIZE))?, 0x5A01, "the shared page");
    Ok(())
}

fn attributes_belong_to_one_vm(cx: &Context) -> TestResult {
    let (first, mut vcpu) = two_sides(cx)?;
    let (second, mut other) = two_sides(cx)?;
    second.set_attributes(0, second.len, PRIVATE)?;
    claim_sides(&first, &mut *vcpu, |_| false)?;
    claim_sides(&second, &mut *other, |_| true)
}

fn mapped_page_changes_sides_at_once(cx: &Context) -> TestResult {
    let (vm, mut vcpu) = two_sides(cx)?;
    for round in 0..8 {
        let attributes = if round % 2 == 0 { 0 } else { PRIVATE };
        vm.set_attributes(0, PAGE_SIZE, attributes)?;
        let expected = if attributes == PRIVATE { 0x9400 } else { 0x5A00 };
        claim_eq!(read(&mut *vcpu, vm.gpa(0))?, expected, "the mapped page, round {round}");
    }
    Ok(())
}

fn mixed_range_is_exact(cx: &Context) -> TestResult {
    let (vm, mut vcpu) = two_sides(cx)?;
    for page in (0..8).step_by(2) {
        vm.set_attributes(page * PAGE_SIZE, PAGE_SIZE, PRIVATE)?;
    }
    claim_sides(&vm, &mut *vcpu, |page| page % 2 == 0)?;
    vm.set_attributes(0, vm.len, PRIVATE)?;
    claim_sides(&vm, &mut *vcpu, |_| true)?;
    for page in (0..8).step_by(3) {
        vm.set_attributes(page * PAGE_SIZE, PAGE_SIZE, 0)?;
    }
    claim_sides(&vm, &mut *vcpu, |page| page % 3 != 0)
}

fn forked_child_is_refused(cx: &Context) -> TestResult {
    let vm = bare(cx)?;
    let memory = claim_ok!(cx.machine().host_memory(HostMemory::Anonymous, PAGE_SIZE));
    claim_ok!(vm.set_memory_region(&MemoryRegion::new(1, BASE, PAGE_SIZE).at(memory.addr())));
    let end = in_child(|| vm.set_memory_attributes(&PAGE).map(|()| 0))?;
    claim_eq!(end, ChildEnd::Returned(Err(Errno::EIO)), "the call in the child");
    Ok(())
}

/// The stand-alone binary.
pub fn main() -> std::process::ExitCode {
    gmemtest::cli::selftest_main(&[&SUITE])
}
