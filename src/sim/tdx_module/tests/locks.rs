//! Leaves against leaves: everything of the concurrency table that one processor holding and another calling can show.

use super::super::dispatch::Released;
use super::super::fixture::Fixture;
use super::super::guest::GuestOutcome;
use super::super::leaf::TdcallLeaf;
use super::super::regs::Regs;
use super::super::{HoldPoint, Leaf, LpId, Outcome};
use super::{check, enter, expect, expect_on, mapped_page, status};

/// Starts a leaf on `lp1` and holds it at `point`.
#[track_caller]
fn hold(f: &mut Fixture, point: HoldPoint, leaf: Leaf, registers: &[(&str, u64)]) {
    f.module.hold_next(LpId(1), point).unwrap();
    assert_eq!(f.call_on(LpId(1), leaf, registers).0, Outcome::Held, "{} at {}", leaf.name(), point.name());
    check(f);
}

/// Lets the leaf on `lp1` go on; it must succeed.
#[track_caller]
fn release(f: &mut Fixture) -> Regs {
    let Released::Host(outcome, regs) = f.module.release(LpId(1)).unwrap() else { panic!("a TDCALL was held") };
    assert_eq!(outcome, Outcome::Done(status("TDX_SUCCESS")));
    check(f);
    regs
}

#[test]
fn block_and_aug_exclude_each_other_on_the_tree() {
    let mut f = Fixture::s2();
    let (_, tdr) = (mapped_page(&mut f, 0), f.tdr);
    let page = f.page();
    let (aug, block) = ([("rcx", 0x1000), ("rdx", tdr), ("r8", page)], [("rcx", 0), ("rdx", tdr)]);
    for point in [HoldPoint::Tree, HoldPoint::Entry, HoldPoint::Commit] {
        hold(&mut f, point, Leaf::MemPageAug, &aug);
        expect(&mut f, Leaf::MemRangeBlock, &block, "TDX_OPERAND_BUSY|SEPT_TREE");
        expect(&mut f, Leaf::MemTrack, &[("rcx", tdr)], "TDX_SUCCESS");
        release(&mut f);
        let remove = [("rcx", 0x1000), ("rdx", tdr)];
        f.must(Leaf::MemRangeBlock, &remove);
        f.must(Leaf::MemTrack, &[("rcx", tdr)]);
        f.must(Leaf::MemPageRemove, &remove);
    }
    hold(&mut f, HoldPoint::Commit, Leaf::MemRangeBlock, &block);
    expect(&mut f, Leaf::MemPageAug, &aug, "TDX_OPERAND_BUSY|SEPT_TREE");
    expect(&mut f, Leaf::MemRangeUnblock, &block, "TDX_OPERAND_BUSY|SEPT_TREE");
    release(&mut f);
}

#[test]
fn the_same_entry_is_busy_with_information_and_a_neighbour_is_not() {
    let mut f = Fixture::s2();
    let (tdr, page, other) = (f.tdr, f.page(), f.page());
    hold(&mut f, HoldPoint::Entry, Leaf::MemPageAug, &[("rcx", 0), ("rdx", tdr), ("r8", page)]);
    let regs = expect(&mut f, Leaf::MemPageAug, &[("rcx", 0), ("rdx", tdr), ("r8", other)], "TDX_OPERAND_BUSY|RCX");
    assert_eq!((regs.rcx, regs.rdx), (1 << 63, 0));
    expect(&mut f, Leaf::MemPageAug, &[("rcx", 0x1000), ("rdx", tdr), ("r8", other)], "TDX_SUCCESS");
    release(&mut f);
}

#[test]
fn a_page_being_given_is_busy_for_every_other_taker() {
    let mut f = Fixture::s2();
    let (tdr, page) = (f.tdr, f.page());
    hold(&mut f, HoldPoint::Commit, Leaf::MemPageAug, &[("rcx", 0), ("rdx", tdr), ("r8", page)]);
    expect(&mut f, Leaf::MemPageAug, &[("rcx", 0x1000), ("rdx", tdr), ("r8", page)], "TDX_OPERAND_BUSY|R8");
    expect(&mut f, Leaf::PhymemPageWbinvd, &[("rcx", page)], "TDX_OPERAND_BUSY|RCX");
    expect(&mut f, Leaf::PhymemPageReclaim, &[("rcx", page)], "TDX_OPERAND_BUSY|RCX");
    release(&mut f);
    expect(&mut f, Leaf::PhymemPageWbinvd, &[("rcx", page)], "TDX_PAGE_METADATA_INCORRECT|RCX");
}

#[test]
fn leaves_that_hold_the_tdr_exclusively_shut_the_others_out() {
    let mut f = Fixture::s1();
    let (tdr, page) = (f.tdr, f.page());
    f.add_tables(tdr, 0, 1);
    let add = [("rcx", 0), ("rdx", tdr), ("r8", page), ("r9", 0)];
    hold(&mut f, HoldPoint::Commit, Leaf::MemPageAdd, &add);
    let table = f.page();
    expect(&mut f, Leaf::MemSeptAdd, &[("rcx", 1), ("rdx", tdr), ("r8", table)], "TDX_OPERAND_BUSY|RDX");
    expect(&mut f, Leaf::MemTrack, &[("rcx", tdr)], "TDX_OPERAND_BUSY|RCX");
    release(&mut f);
}

#[test]
fn track_and_a_vcpu_sampling_the_epoch_collide() {
    let mut f = Fixture::s2();
    let (tdr, vcpu) = (f.tdr, f.vcpu);
    f.module.hold_next(LpId(1), HoldPoint::Epoch).unwrap();
    assert_eq!(f.call_on(LpId(1), Leaf::VpEnter, &[("rcx", vcpu)]).0, Outcome::Held);
    expect(&mut f, Leaf::MemTrack, &[("rcx", tdr)], "TDX_OPERAND_BUSY|TD_EPOCH");
    assert!(matches!(f.module.release(LpId(1)), Ok(Released::Host(Outcome::Entered, _))));
    check(&f);
    f.module.kick(LpId(1)).unwrap();
    hold(&mut f, HoldPoint::Commit, Leaf::MemTrack, &[("rcx", tdr)]);
    expect(&mut f, Leaf::VpEnter, &[("rcx", vcpu)], "TDX_VCPU_ASSOCIATED");
    release(&mut f);
}

#[test]
fn a_vcpu_held_before_its_entry_counts_in_the_epoch() {
    let mut f = Fixture::s2();
    let (tdr, vcpu) = (f.tdr, f.vcpu);
    f.module.hold_next(LpId(1), HoldPoint::Commit).unwrap();
    assert_eq!(f.call_on(LpId(1), Leaf::VpEnter, &[("rcx", vcpu)]).0, Outcome::Held);
    check(&f);
    expect(&mut f, Leaf::MemTrack, &[("rcx", tdr)], "TDX_SUCCESS");
    expect(&mut f, Leaf::MemTrack, &[("rcx", tdr)], "TDX_PREVIOUS_TLB_EPOCH_BUSY");
    assert!(matches!(f.module.release(LpId(1)), Ok(Released::Host(Outcome::Entered, _))));
    check(&f);
    f.module.kick(LpId(1)).unwrap();
    expect(&mut f, Leaf::MemTrack, &[("rcx", tdr)], "TDX_SUCCESS");
}

#[test]
fn a_running_vcpu_keeps_its_pages_shared() {
    let mut f = Fixture::s2();
    let (tdr, vcpu) = (f.tdr, f.vcpu);
    enter(&mut f, LpId(1));
    expect(&mut f, Leaf::VpFlush, &[("rcx", vcpu)], "TDX_OPERAND_BUSY|RCX");
    expect(&mut f, Leaf::VpEnter, &[("rcx", vcpu)], "TDX_VCPU_STATE_INCORRECT");
    expect(&mut f, Leaf::MngVpflushdone, &[("rcx", tdr)], "TDX_OPERAND_BUSY|RCX");
    f.module.kick(LpId(1)).unwrap();
    expect(&mut f, Leaf::VpFlush, &[("rcx", vcpu)], "TDX_VCPU_NOT_ASSOCIATED");
    expect_on(&mut f, LpId(1), Leaf::VpFlush, &[("rcx", vcpu)], "TDX_SUCCESS");
}

/// Starts a TDCALL on `lp1`, which runs the vCPU, and holds it with its entry locked.
fn hold_tdcall(f: &mut Fixture, leaf: TdcallLeaf, gpa: u64) {
    f.module.hold_next(LpId(1), HoldPoint::Entry).unwrap();
    let mut regs = Regs { rax: leaf.number() as u64, rcx: gpa, ..Regs::default() };
    assert_eq!(f.module.tdcall(LpId(1), &mut regs).unwrap(), GuestOutcome::Held);
    check(f);
}

#[test]
fn block_meets_an_accept_of_the_same_entry_and_succeeds_afterwards() {
    let mut f = Fixture::s2();
    let (tdr, page) = (f.tdr, f.page());
    expect(&mut f, Leaf::MemPageAug, &[("rcx", 0), ("rdx", tdr), ("r8", page)], "TDX_SUCCESS");
    enter(&mut f, LpId(1));
    hold_tdcall(&mut f, TdcallLeaf::MemPageAccept, 0);
    let regs = expect(&mut f, Leaf::MemRangeBlock, &[("rcx", 0), ("rdx", tdr)], "TDX_OPERAND_BUSY|RCX");
    assert_eq!((regs.rcx, regs.rdx), (0x8000_0000_0000_00F0 | page, 0x200));
    let released = f.module.release(LpId(1)).unwrap();
    assert_eq!(released, Released::Guest(GuestOutcome::Tdcall(status("TDX_SUCCESS"))));
    check(&f);
    let entry = f.module.sept_entry(tdr, 0, 0).unwrap().unwrap();
    assert!(!entry.host_priority(), "ACCEPT overwrites the host's request");
    expect(&mut f, Leaf::MemRangeBlock, &[("rcx", 0), ("rdx", tdr)], "TDX_SUCCESS");
}

#[test]
fn host_priority_sticks_until_a_host_leaf_succeeds_or_the_guest_times_out() {
    let mut f = Fixture::s2();
    let tdr = f.tdr;
    mapped_page(&mut f, 0);
    enter(&mut f, LpId(1));
    hold_tdcall(&mut f, TdcallLeaf::MemPageAttrRd, 0);
    expect(&mut f, Leaf::MemSeptRd, &[("rcx", 0), ("rdx", tdr)], "TDX_OPERAND_BUSY|RCX");
    let released = f.module.release(LpId(1)).unwrap();
    assert_eq!(released, Released::Guest(GuestOutcome::Tdcall(status("TDX_SUCCESS"))));
    let busy = GuestOutcome::Tdcall(status("TDX_OPERAND_BUSY|RCX"));
    assert_eq!(f.module.guest_accept(LpId(1), 0, 0).unwrap(), busy);
    f.must(Leaf::MemSeptRd, &[("rcx", 0), ("rdx", tdr)]);
    let accepted = GuestOutcome::Tdcall(status("TDX_PAGE_ALREADY_ACCEPTED|0"));
    assert_eq!(f.module.guest_accept(LpId(1), 0, 0).unwrap(), accepted);

    hold_tdcall(&mut f, TdcallLeaf::MemPageAttrRd, 0);
    expect(&mut f, Leaf::MemSeptRd, &[("rcx", 0), ("rdx", tdr)], "TDX_OPERAND_BUSY|RCX");
    f.module.release(LpId(1)).unwrap();
    assert_eq!(f.module.guest_accept(LpId(1), 0, 0).unwrap(), busy);
    f.module.advance_clock(999_999_999);
    assert_eq!(f.module.guest_accept(LpId(1), 0, 0).unwrap(), busy);
    f.module.advance_clock(1);
    let GuestOutcome::Exit(exit) = f.module.guest_accept(LpId(1), 0, 0).unwrap() else { panic!("no exit") };
    assert_eq!(exit.status, status("TDX_HOST_PRIORITY_BUSY_TIMEOUT"));
    assert_eq!(f.module.vcpu(f.vcpu).unwrap().gpr.rax, status("TDX_OPERAND_BUSY|RCX").0);
    check(&f);
}

#[test]
fn kot_users_of_two_tds_exclude_each_other() {
    let mut f = Fixture::s2();
    let (page, hkid) = (f.page(), f.hkid());
    hold(&mut f, HoldPoint::Commit, Leaf::MngCreate, &[("rcx", page), ("rdx", hkid)]);
    let (other, tdr) = (f.page(), f.tdr);
    expect(&mut f, Leaf::MngCreate, &[("rcx", other), ("rdx", hkid + 1)], "TDX_OPERAND_BUSY|KOT");
    expect(&mut f, Leaf::PhymemCacheWb, &[("rcx", 0)], "TDX_OPERAND_BUSY|KOT");
    expect(&mut f, Leaf::MngVpflushdone, &[("rcx", tdr)], "TDX_OPERAND_BUSY|KOT");
    release(&mut f);
}
