//! Conversions of every size and place, by the call that the kernel has, with the guest's data on both sides of them.

use std::process::ExitCode;

use gmemtest::harness::sides::{Return, TwoSided};
use gmemtest::harness::{Context, Side, TestResult, in_child};
use gmemtest::machine::{Errno, Exit, Facility, GuestOp, HoldKind, MemoryRegion, PAGE_SIZE, Reply, VmType};
use gmemtest::uapi::kvm_para::{KVM_HC_MAP_GPA_RANGE, KVM_MAP_GPA_RANGE_DECRYPTED, KVM_MAP_GPA_RANGE_ENCRYPTED};
use gmemtest::{claim, claim_eq, claim_matches, claim_ok};
use kvm_bindings::KVM_CAP_EXIT_HYPERCALL;

gmemtest::suite! {
    /// A conversion changes the side of its range and of nothing else, whoever holds what (private_mem_conversions_test,
    /// tdx_upm_test, verify_conversions).
    pub static SUITE: conversion_matrix needs [Vm, Guest, GuestMemfd, PrivateMemory, LazyAccept] {
        /// Exactly the range changes sides: the pages around it keep theirs and their contents, there and back. A failure
        /// loses or exposes the memory beside a conversion.
        range_changes_sides_exactly[RANGES];

        /// The same with nothing allocated, and with a hole in the range.
        range_with_holes_changes_sides[HOLES];

        /// A page goes back and forth any number of times.
        page_goes_back_and_forth[BEGINS];

        /// Two VMs convert the same addresses without hearing of each other.
        vms_convert_by_themselves;

        /// What the host holds of the shared side survives the conversion in the hands of its holder, where the sides have
        /// memory of their own: KVM_SET_MEMORY_ATTRIBUTES looks at no reference.
        held_shared_memory_does_not_stop_the_vm[HOLDS] needs [MemoryAttributes];

        /// A child that was forked before a conversion sees the shared memory of now, not of then.
        child_shares_the_shared_memory needs [RealFiles];

        /// A focus of 40 KiB in 2 MiB is converted by MapGPA: the rest keeps its pattern, the focus is shared with the
        /// host, and fresh or as it was when it is private again (tdx_upm_test, explicit).
        focus_area_is_converted_explicitly needs [ExitHypercall];

        /// The same by the memory fault of the access that comes first (tdx_upm_test, implicit).
        focus_area_is_converted_by_its_fault needs [MemoryFaultInfo];

        /// A page goes through MapGPA to shared and back, is accepted, and holds what each side wrote in its time
        /// (verify_conversions).
        page_makes_the_round_trip_with_accept needs [ExitHypercall];

        /// The host never sees what a TD wrote to private memory, neither before the conversion nor after it.
        host_sees_no_plaintext_of_a_td;
    }
}

const P: u64 = PAGE_SIZE;
const PAGES: u64 = 528;
const HUGE: u64 = 512;

/// First page and number of pages, of 528.
const RANGES: &[(&str, (u64, u64))] = &[
    ("first_page", (0, 1)),
    ("second_page", (1, 1)),
    ("first_two", (0, 2)),
    ("half_a_block", (0, 256)),
    ("block_less_a_page", (0, 511)),
    ("block_without_its_first", (1, 511)),
    ("block", (0, HUGE)),
    ("block_and_a_page", (0, 513)),
    ("block_from_the_second_page", (1, HUGE)),
    ("last_of_the_block", (511, 1)),
    ("across_the_boundary", (511, 2)),
    ("first_of_the_next_block", (HUGE, 1)),
    ("rest_of_the_slot", (HUGE, 16)),
    ("last_page", (527, 1)),
    ("everything", (0, PAGES)),
];

/// Claims a pattern of pages outside of a range.
fn claim_around(scene: &mut TwoSided, at: u64, len: u64, byte: u8) -> TestResult {
    let end = scene.size();
    scene.claim_guest(0, at, Side::Private, byte)?;
    scene.claim_guest(at + len, end - at - len, Side::Private, byte)
}

/// What the guest finds once a range is private again that held `former`, and `shared` while it was shared.
fn returned(scene: &TwoSided, former: u8, shared: u8) -> u8 {
    match scene.returns() {
        Return::Fresh => 0,
        Return::Former => former,
        Return::Same => shared,
    }
}

fn range_changes_sides_exactly(cx: &Context, &(first, pages): &(u64, u64)) -> TestResult {
    let (at, len) = (first * P, pages * P);
    let mut scene = TwoSided::new(cx, PAGES)?;
    scene.fill(0, PAGES * P, Side::Private, 0x11)?;
    scene.convert(at, len, Side::Shared)?;
    claim_around(&mut scene, at, len, 0x11)?;
    scene.fill(at, len, Side::Shared, 0x22)?;
    scene.claim_host(at, len, 0x22)?;
    scene.host().fill(at, len, 0x33)?;
    scene.claim_guest(at, len, Side::Shared, 0x33)?;
    scene.convert(at, len, Side::Private)?;
    claim_around(&mut scene, at, len, 0x11)?;
    let byte = returned(&scene, 0x11, 0x33);
    scene.claim_guest(at, len, Side::Private, byte)?;
    scene.fill(at, len, Side::Private, 0x44)?;
    scene.claim_guest(at, len, Side::Private, 0x44)?;
    claim_around(&mut scene, at, len, 0x11)
}

/// First page and number of pages of the hole, in a range of pages 4 to 11.
const HOLES: &[(&str, (u64, u64))] =
    &[("nothing_allocated", (0, 16)), ("front", (4, 2)), ("middle", (7, 3)), ("back", (10, 2)), ("all_of_it", (4, 8))];

fn range_with_holes_changes_sides(cx: &Context, &(first, pages): &(u64, u64)) -> TestResult {
    let mut scene = TwoSided::new(cx, 16)?;
    scene.fill(0, 16 * P, Side::Private, 0x11)?;
    claim_ok!(scene.gmem().punch_hole(first * P, pages * P));
    let cached = claim_ok!(scene.gmem().cache_stat(0, 0)).cached;
    scene.convert(4 * P, 8 * P, Side::Shared)?;
    scene.convert(4 * P, 8 * P, Side::Private)?;
    claim_eq!(claim_ok!(scene.gmem().cache_stat(0, 0)).cached, cached, "pages of the file");
    for page in 0..16 {
        let converted = (4..12).contains(&page);
        let punched = (first..first + pages).contains(&page);
        let byte = if punched || (converted && scene.returns() == Return::Fresh) { 0 } else { 0x11 };
        scene.claim_guest(page * P, P, Side::Private, byte)?;
    }
    Ok(())
}

const BEGINS: &[(&str, u64)] = &[("first_page", 0), ("middle_page", 5), ("last_page", 15)];

fn page_goes_back_and_forth(cx: &Context, &page: &u64) -> TestResult {
    let mut scene = TwoSided::new(cx, 16)?;
    let at = page * P;
    scene.fill(0, 16 * P, Side::Private, 0x11)?;
    for round in 0..10 {
        scene.convert(at, P, Side::Shared)?;
        scene.fill(at, P, Side::Shared, 0x40 + round)?;
        scene.claim_host(at, P, 0x40 + round)?;
        scene.convert(at, P, Side::Private)?;
        scene.fill(at, P, Side::Private, 0x11)?;
        scene.claim_guest(0, 16 * P, Side::Private, 0x11)?;
    }
    Ok(())
}

fn vms_convert_by_themselves(cx: &Context) -> TestResult {
    let (mut one, mut two) = (TwoSided::new(cx, 4)?, TwoSided::new(cx, 4)?);
    one.fill(0, 4 * P, Side::Private, 0x11)?;
    two.fill(0, 4 * P, Side::Private, 0x22)?;
    one.convert(P, 2 * P, Side::Shared)?;
    two.claim_guest(0, 4 * P, Side::Private, 0x22)?;
    one.fill(P, 2 * P, Side::Shared, 0x33)?;
    two.convert(2 * P, 2 * P, Side::Shared)?;
    two.fill(2 * P, 2 * P, Side::Shared, 0x44)?;
    one.claim_host(P, 2 * P, 0x33)?;
    two.claim_host(2 * P, 2 * P, 0x44)?;
    one.claim_guest(0, P, Side::Private, 0x11)?;
    one.claim_guest(3 * P, P, Side::Private, 0x11)?;
    two.claim_guest(0, 2 * P, Side::Private, 0x22)
}

const HOLDS: &[(&str, HoldKind)] = &[("vmsplice", HoldKind::Get), ("io_uring", HoldKind::Pin)];

fn held_shared_memory_does_not_stop_the_vm(cx: &Context, &kind: &HoldKind) -> TestResult {
    cx.require(if kind == HoldKind::Get { Facility::HoldGet } else { Facility::HoldPin })?;
    let mut scene = TwoSided::new(cx, 4)?;
    scene.convert(0, 4 * P, Side::Shared)?;
    scene.fill(0, 4 * P, Side::Shared, 0x55)?;
    let hold = claim_ok!(scene.host().hold(P, P, kind));
    scene.convert(0, 4 * P, Side::Private)?;
    scene.fill(0, 4 * P, Side::Private, 0x66)?;
    scene.claim_host(0, 4 * P, 0x55)?;
    scene.convert(0, 4 * P, Side::Shared)?;
    scene.claim_guest(0, 4 * P, Side::Shared, 0x55)?;
    drop(hold);
    Ok(())
}

fn child_shares_the_shared_memory(cx: &Context) -> TestResult {
    let mut scene = TwoSided::new(cx, 4)?;
    scene.convert(0, 2 * P, Side::Shared)?;
    scene.fill(0, 2 * P, Side::Shared, 0x77)?;
    let host = scene.host();
    let stored = in_child(|| {
        let seen = host.read_u64(P).map_err(|_| Errno::EFAULT)?;
        host.write_u64(0, 0x5EED).map_err(|_| Errno::EFAULT)?;
        Ok(seen)
    })?;
    claim_eq!(stored.returned()?, Ok(0x7777_7777_7777_7777), "what the child reads");
    let gpa = scene.gpa(0, Side::Shared);
    claim_eq!(scene.vcpu().execute(GuestOp::read_u64(gpa)), Exit::Done(0x5EED), "what the child wrote");
    Ok(())
}

/// The area, and the focus in it.
const FOCUS: (u64, u64) = (256 * P, 10 * P);

/// The guest asks for a conversion, user space does it, the guest goes on.
fn map_gpa(scene: &mut TwoSided, at: u64, len: u64, side: Side) -> TestResult {
    let attributes = if side == Side::Private { KVM_MAP_GPA_RANGE_ENCRYPTED } else { KVM_MAP_GPA_RANGE_DECRYPTED };
    let op = GuestOp::MapGpa { gpa: TwoSided::GPA + at, pages: len / P, attributes };
    let exit = scene.vcpu().execute(op);
    let Exit::Hypercall { nr: KVM_HC_MAP_GPA_RANGE, args, .. } = exit else {
        gmemtest::fail!("MapGPA ended in {exit:x?}")
    };
    claim_eq!([args[0], args[1], args[2]], [TwoSided::GPA + at, len / P, attributes], "the arguments of the hypercall");
    scene.convert(at, len, side)?;
    claim_eq!(scene.vcpu().resume(Reply::Hypercall(0)), Exit::Done(0), "the guest goes on");
    Ok(())
}

fn with_hypercalls(cx: &Context, pages: u64) -> TestResult<TwoSided> {
    let scene = TwoSided::new(cx, pages)?;
    claim_ok!(scene.vm().enable_capability(KVM_CAP_EXIT_HYPERCALL, [1 << KVM_HC_MAP_GPA_RANGE, 0, 0, 0]));
    Ok(scene)
}

fn focus_area_is_converted_explicitly(cx: &Context) -> TestResult {
    let mut scene = with_hypercalls(cx, HUGE)?;
    let (at, len) = FOCUS;
    scene.fill(0, HUGE * P, Side::Private, 0x11)?;
    scene.fill(at, len, Side::Private, 0x22)?;
    map_gpa(&mut scene, at, len, Side::Shared)?;
    scene.fill(at, len, Side::Shared, 0x33)?;
    scene.claim_host(at, len, 0x33)?;
    scene.host().fill(at, len, 0x44)?;
    scene.claim_guest(at, len, Side::Shared, 0x44)?;
    claim_around(&mut scene, at, len, 0x11)?;
    map_gpa(&mut scene, at, len, Side::Private)?;
    let byte = returned(&scene, 0x22, 0x44);
    scene.claim_guest(at, len, Side::Private, byte)?;
    claim_around(&mut scene, at, len, 0x11)
}

fn focus_area_is_converted_by_its_fault(cx: &Context) -> TestResult {
    if cx.machine().spec().vm_type != VmType::Tdx {
        gmemtest::skip!(Declined, "only the guest-physical addresses of a TD say which side they mean");
    }
    let mut scene = TwoSided::new(cx, HUGE)?;
    let (at, len) = FOCUS;
    scene.fill(0, HUGE * P, Side::Private, 0x11)?;
    for (side, byte) in [(Side::Shared, 0x33), (Side::Private, 0x44)] {
        let mut exit = {
            let fill = GuestOp::Fill { gpa: scene.gpa(at, side), len, byte };
            scene.vcpu().execute(fill)
        };
        let mut faults = 0;
        while let Exit::MemoryFault { errno: Errno::EFAULT, flags, gpa, size: P } = exit {
            claim_eq!(flags, if side == Side::Private { 8 } else { 0 }, "the side that was tried");
            claim_eq!(gpa, TwoSided::GPA + at + faults * P, "the page");
            scene.convert(at + faults * P, P, side)?;
            faults += 1;
            claim!(faults <= len / P, "one fault a page");
            exit = scene.vcpu().resume(Reply::None);
        }
        claim_matches!(exit, Exit::Done(_), "the guest's stores over the focus");
        claim_eq!(faults, len / P, "pages that were converted");
        scene.claim_guest(at, len, side, byte)?;
        claim_around(&mut scene, at, len, 0x11)?;
    }
    Ok(())
}

fn page_makes_the_round_trip_with_accept(cx: &Context) -> TestResult {
    if cx.machine().spec().vm_type != VmType::Tdx {
        gmemtest::skip!(Declined, "only a TD accepts its pages");
    }
    let mut scene = with_hypercalls(cx, 4)?;
    scene.fill(P, P, Side::Private, b'A')?;
    map_gpa(&mut scene, P, P, Side::Shared)?;
    scene.fill(P, P, Side::Shared, b'B')?;
    scene.claim_host(P, P, b'B')?;
    scene.host().fill(P, P, b'C')?;
    scene.claim_guest(P, P, Side::Shared, b'C')?;
    map_gpa(&mut scene, P, P, Side::Private)?;
    let accept = GuestOp::Accept { gpa: scene.gpa(P, Side::Private), len: P, level: 0 };
    claim_eq!(scene.vcpu().execute(accept), Exit::Done(0), "TDG.MEM.PAGE.ACCEPT of the page that is private again");
    scene.claim_guest(P, P, Side::Private, 0)?;
    scene.fill(P, P, Side::Private, b'A')?;
    scene.claim_guest(P, P, Side::Private, b'A')
}

fn host_sees_no_plaintext_of_a_td(cx: &Context) -> TestResult {
    if cx.machine().spec().vm_type != VmType::Tdx {
        gmemtest::skip!(Declined, "the memory of this VM type is not encrypted");
    }
    let mut scene = TwoSided::new(cx, 4)?;
    scene.fill(0, 4 * P, Side::Private, 0x5A)?;
    let plaintext = |scene: &TwoSided| scene.host().find_mismatch(0, P, 0x5A).is_ok_and(|other| other.is_none());
    claim!(!plaintext(&scene), "the host reads what the TD wrote");
    scene.convert(0, 4 * P, Side::Shared)?;
    claim!(!plaintext(&scene), "the host reads what the TD wrote, once it is shared");
    let region = MemoryRegion::deletion(gmemtest::harness::GmemVm::SLOT);
    claim_ok!(scene.vm().set_memory_region(&region));
    claim!(!plaintext(&scene), "the host reads what the TD wrote, without a slot");
    Ok(())
}

/// The stand-alone binary.
pub fn main() -> ExitCode {
    gmemtest::cli::selftest_main(&[&SUITE])
}
