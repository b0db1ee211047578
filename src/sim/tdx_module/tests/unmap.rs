//! BLOCK, TRACK, REMOVE and their kin: the tracking rules, stale translations, sizes.

use super::super::fixture::{Fixture, TdSpec};
use super::super::guest::{GuestOutcome, exit_reason};
use super::super::lp::Interrupt;
use super::super::pamt::PageType;
use super::super::sept::SeptState;
use super::super::{Leaf, LpId, Outcome};
use super::{check, enter, expect, mapped_page, status};

#[test]
fn remove_needs_block_track_and_an_exit_of_every_vcpu_that_was_inside() {
    let mut f = Fixture::s2();
    let (page, tdr) = (mapped_page(&mut f, 0), f.tdr);
    let at = [("rcx", 0), ("rdx", tdr)];
    let regs = expect(&mut f, Leaf::MemPageRemove, &at, "TDX_GPA_RANGE_NOT_BLOCKED|RCX");
    assert_eq!((regs.rcx, regs.rdx), (0x8000_0000_0000_00F7 | page, 0x400));
    enter(&mut f, LpId(1));
    expect(&mut f, Leaf::MemRangeBlock, &at, "TDX_SUCCESS");
    let regs = expect(&mut f, Leaf::MemRangeBlock, &at, "TDX_GPA_RANGE_ALREADY_BLOCKED|RCX");
    assert_eq!(regs.rdx, 0x100);
    assert_eq!(expect(&mut f, Leaf::PhymemPageRdmd, &[("rcx", page)], "TDX_SUCCESS").r9, 1);
    expect(&mut f, Leaf::MemTrack, &[("rcx", tdr)], "TDX_SUCCESS");
    let regs = expect(&mut f, Leaf::MemPageRemove, &at, "TDX_TLB_TRACKING_NOT_DONE|RCX");
    assert_eq!((regs.rcx, regs.rdx), (0, 0));
    expect(&mut f, Leaf::MemTrack, &[("rcx", tdr)], "TDX_PREVIOUS_TLB_EPOCH_BUSY");
    f.module.kick(LpId(1)).unwrap();
    enter(&mut f, LpId(1));
    assert_eq!(expect(&mut f, Leaf::MemPageRemove, &at, "TDX_SUCCESS").rcx, page);
    expect(&mut f, Leaf::PhymemPageWbinvd, &[("rcx", page)], "TDX_SUCCESS");
    assert_eq!(f.module.page(page).unwrap().ty, PageType::Nda);
}

#[test]
fn a_cached_translation_outlives_block_until_the_next_entry() {
    let mut f = Fixture::s2();
    mapped_page(&mut f, 0);
    let tdr = f.tdr;
    enter(&mut f, LpId(1));
    assert_eq!(f.module.guest_write(LpId(1), 0x10, 7).unwrap(), GuestOutcome::Done);
    expect(&mut f, Leaf::MemRangeBlock, &[("rcx", 0), ("rdx", tdr)], "TDX_SUCCESS");
    expect(&mut f, Leaf::MemTrack, &[("rcx", tdr)], "TDX_SUCCESS");
    assert_eq!(f.module.guest_read(LpId(1), 0x10).unwrap(), GuestOutcome::Value(7));
    f.module.kick(LpId(1)).unwrap();
    enter(&mut f, LpId(1));
    let GuestOutcome::Exit(exit) = f.module.guest_read(LpId(1), 0x10).unwrap() else { panic!("no exit") };
    assert_eq!((exit.reason(), exit.extended_type(), exit.regs.r8), (exit_reason::EPT_VIOLATION, 0, 0));
    expect(&mut f, Leaf::MemRangeUnblock, &[("rcx", 0), ("rdx", tdr)], "TDX_SUCCESS");
    enter(&mut f, LpId(1));
    assert_eq!(f.module.guest_read(LpId(1), 0x10).unwrap(), GuestOutcome::Value(7));
}

#[test]
fn unblock_without_tracking_names_the_tree() {
    let mut f = Fixture::s2();
    let (_, tdr) = (mapped_page(&mut f, 0), f.tdr);
    expect(&mut f, Leaf::MemRangeBlock, &[("rcx", 0), ("rdx", tdr)], "TDX_SUCCESS");
    expect(&mut f, Leaf::MemRangeUnblock, &[("rcx", 0), ("rdx", tdr)], "TDX_TLB_TRACKING_NOT_DONE|SEPT_TREE");
}

/// S2 with a 2M page mapped at GPA 0 where the level-1 table was. Returns the fixture and the page.
fn s2_with_2m() -> (Fixture, u64) {
    let mut f = Fixture::s1_with(Default::default(), TdSpec::default());
    let (tdr, range) = (f.tdr, f.range());
    f.add_tables(tdr, 0, 2);
    f.vcpu = f.build_vcpu(tdr);
    f.must(Leaf::MrFinalize, &[("rcx", tdr)]);
    expect(&mut f, Leaf::MemPageAug, &[("rcx", 1), ("rdx", tdr), ("r8", range)], "TDX_SUCCESS");
    (f, range)
}

#[test]
fn accepting_4k_of_a_pending_2m_page_exits_with_the_documented_qualification() {
    let (mut f, _) = s2_with_2m();
    enter(&mut f, LpId(1));
    let GuestOutcome::Exit(exit) = f.module.guest_accept(LpId(1), 0, 0).unwrap() else { panic!("no exit") };
    assert_eq!((exit.reason(), exit.regs.rdx, exit.qualification()), (48, 0x0000_4088_0000_0001, 2));
}

#[test]
fn an_interrupted_2m_accept_goes_on_where_it_was() {
    let (mut f, range) = s2_with_2m();
    let tdr = f.tdr;
    enter(&mut f, LpId(1));
    f.module.set_interrupt(LpId(1), Interrupt::After(4)).unwrap();
    let GuestOutcome::Exit(exit) = f.module.guest_accept(LpId(1), 0, 1).unwrap() else { panic!("no exit") };
    assert_eq!(exit.reason(), exit_reason::EXTERNAL_INTERRUPT);
    let entry = f.module.sept_entry(tdr, 0, 1).unwrap().unwrap();
    assert_eq!((entry.state(), entry.accept_counter(), entry.hpa(1)), (Some(SeptState::Pending), 5, range));
    check(&f);
    enter(&mut f, LpId(1));
    assert_eq!(f.module.guest_accept(LpId(1), 0, 1).unwrap(), GuestOutcome::Tdcall(status("TDX_SUCCESS")));
    assert_eq!(f.module.sept_entry(tdr, 0, 1).unwrap().unwrap().0, 0x8000_0000_0000_00F7 | range);
    let again = f.module.guest_accept(LpId(1), 0x3000, 0).unwrap();
    assert_eq!(again, GuestOutcome::Tdcall(status("TDX_PAGE_ALREADY_ACCEPTED|1")));
}

#[test]
fn promote_after_demote_is_the_identity() {
    let (mut f, range) = s2_with_2m();
    let tdr = f.tdr;
    enter(&mut f, LpId(1));
    f.module.guest_accept(LpId(1), 0, 1).unwrap();
    f.module.kick(LpId(1)).unwrap();
    let before = (f.module.sept_entry(tdr, 0, 1), f.module.td(tdr).unwrap().chldcnt);
    let at = [("rcx", 1), ("rdx", tdr)];
    expect(&mut f, Leaf::MemPageDemote, &at, "TDX_GPA_RANGE_NOT_BLOCKED|RCX");
    expect(&mut f, Leaf::MemRangeBlock, &at, "TDX_SUCCESS");
    expect(&mut f, Leaf::MemTrack, &[("rcx", tdr)], "TDX_SUCCESS");
    let table = f.page();
    let demote = [("rcx", 1), ("rdx", tdr), ("r8", table)];
    let inside = [("rcx", 1), ("rdx", tdr), ("r8", range)];
    expect(&mut f, Leaf::MemPageDemote, &inside, "TDX_PAGE_METADATA_INCORRECT|R8");
    f.module.set_interrupt(LpId(0), Interrupt::Pending).unwrap();
    let regs = expect(&mut f, Leaf::MemPageDemote, &demote, "TDX_INTERRUPTED_RESTARTABLE");
    assert_eq!((regs.rcx, regs.rdx), (1, tdr));
    f.module.set_interrupt(LpId(0), Interrupt::None).unwrap();
    expect(&mut f, Leaf::MemPageDemote, &demote, "TDX_SUCCESS");
    assert_eq!(f.module.td(tdr).unwrap().chldcnt, before.1 + 1);
    assert_eq!(f.module.page(range + 0x5000).unwrap().size, 0);
    let child = f.module.sept_entry(tdr, 0x5000, 0).unwrap().unwrap();
    assert_eq!(child.0, 0x8000_0000_0000_00F7 | (range + 0x5000));
    expect(&mut f, Leaf::MemPagePromote, &at, "TDX_GPA_RANGE_NOT_BLOCKED|RCX");
    expect(&mut f, Leaf::MemRangeBlock, &at, "TDX_SUCCESS");
    expect(&mut f, Leaf::MemTrack, &[("rcx", tdr)], "TDX_SUCCESS");
    assert_eq!(expect(&mut f, Leaf::MemPagePromote, &at, "TDX_SUCCESS").rcx, table);
    assert_eq!((f.module.sept_entry(tdr, 0, 1), f.module.td(tdr).unwrap().chldcnt), before);
    assert_eq!(f.module.page(range + 0x5000).unwrap().size, 1);
    assert_eq!(f.module.page(table).unwrap().ty, PageType::Nda);
}

#[test]
fn a_blocked_child_keeps_promote_away_and_blocked_tables_hide_their_children() {
    let (mut f, _) = s2_with_2m();
    let tdr = f.tdr;
    let (at, table) = ([("rcx", 1), ("rdx", tdr)], f.page());
    expect(&mut f, Leaf::MemRangeBlock, &at, "TDX_SUCCESS");
    expect(&mut f, Leaf::MemTrack, &[("rcx", tdr)], "TDX_SUCCESS");
    expect(&mut f, Leaf::MemPageDemote, &[("rcx", 1), ("rdx", tdr), ("r8", table)], "TDX_SUCCESS");
    expect(&mut f, Leaf::MemRangeBlock, &[("rcx", 0x7000), ("rdx", tdr)], "TDX_SUCCESS");
    expect(&mut f, Leaf::MemRangeBlock, &at, "TDX_SUCCESS");
    expect(&mut f, Leaf::MemTrack, &[("rcx", tdr)], "TDX_SUCCESS");
    let regs = expect(&mut f, Leaf::MemPagePromote, &at, "TDX_EPT_INVALID_PROMOTE_CONDITIONS|RCX");
    assert_eq!((regs.rcx, regs.rdx), (0, 0x8101));
    let spare = f.page();
    let regs = expect(&mut f, Leaf::MemPageAug, &[("rcx", 0), ("rdx", tdr), ("r8", spare)], "TDX_EPT_WALK_FAILED|RCX");
    assert_eq!((regs.rcx, regs.rdx), (0, 0x8101));
    expect(&mut f, Leaf::MemSeptRemove, &at, "TDX_EPT_PAGE_NOT_FREE|RCX");
    expect(&mut f, Leaf::MemRangeUnblock, &at, "TDX_SUCCESS");
    expect(&mut f, Leaf::MemRangeUnblock, &[("rcx", 0x7000), ("rdx", tdr)], "TDX_SUCCESS");
    assert_eq!(f.call(Leaf::MemSeptRd, &[("rcx", 0x7000), ("rdx", tdr)]).1.rdx, 0x200);
}

#[test]
fn relocate_moves_content_and_unblocks() {
    let mut f = Fixture::s2();
    let (old, tdr, new) = (mapped_page(&mut f, 0), f.tdr, f.page());
    enter(&mut f, LpId(1));
    f.module.guest_write(LpId(1), 0x20, 99).unwrap();
    f.module.kick(LpId(1)).unwrap();
    let to = |page| [("rcx", 0), ("rdx", tdr), ("r8", page)];
    expect(&mut f, Leaf::MemPageRelocate, &to(new), "TDX_GPA_RANGE_NOT_BLOCKED|RCX");
    expect(&mut f, Leaf::MemPageRelocate, &to(old), "TDX_OPERAND_INVALID|R8");
    expect(&mut f, Leaf::MemRangeBlock, &[("rcx", 0), ("rdx", tdr)], "TDX_SUCCESS");
    expect(&mut f, Leaf::MemTrack, &[("rcx", tdr)], "TDX_SUCCESS");
    assert_eq!(expect(&mut f, Leaf::MemPageRelocate, &to(new), "TDX_SUCCESS").rcx, old);
    assert_eq!(f.module.page(old).unwrap().ty, PageType::Nda);
    enter(&mut f, LpId(1));
    assert_eq!(f.module.guest_read(LpId(1), 0x20).unwrap(), GuestOutcome::Value(99));
}

#[test]
fn six_faults_at_one_rip_arm_the_zero_step_filter() {
    let mut f = Fixture::s2();
    for _ in 0..6 {
        enter(&mut f, LpId(1));
        assert!(matches!(f.module.guest_read(LpId(1), 0x5000).unwrap(), GuestOutcome::Exit(_)));
    }
    enter(&mut f, LpId(1));
    assert!(matches!(f.module.guest_read(LpId(1), 0x5000).unwrap(), GuestOutcome::Exit(_)));
    let vcpu = f.vcpu;
    let (outcome, regs) = f.call_on(LpId(1), Leaf::VpEnter, &[("rcx", vcpu)]);
    assert_eq!(outcome, Outcome::Done(super::super::Status(48)));
    assert_eq!((regs.rcx, regs.rdx, regs.r8, regs.r9), (2, 0, 0x5000, 0));
    check(&f);
    let tree = super::super::lock::LockId::SeptTree(f.tdr);
    let shared = super::super::lock::Mode::Shared;
    f.module.lock_by_hand(LpId(0), tree, shared, super::super::lock::Side::Host).unwrap().unwrap();
    super::expect_on(&mut f, LpId(1), Leaf::VpEnter, &[("rcx", vcpu)], "TDX_OPERAND_BUSY|SEPT_TREE");
}

/// A guest that is not let in can never accept the page.
#[test]
fn a_suspected_page_that_waits_for_its_acceptance_lets_the_guest_in() {
    let mut f = Fixture::s2();
    for _ in 0..7 {
        enter(&mut f, LpId(1));
        assert!(matches!(f.module.guest_read(LpId(1), 0x5000).unwrap(), GuestOutcome::Exit(_)));
    }
    let (tdr, page) = (f.tdr, f.page());
    f.must(Leaf::MemPageAug, &[("rcx", 0x5000), ("rdx", tdr), ("r8", page)]);
    enter(&mut f, LpId(1));
    let accepted = f.module.guest_accept(LpId(1), 0x5000, 0).unwrap();
    assert_eq!(accepted, GuestOutcome::Tdcall(status("TDX_SUCCESS")));
    check(&f);
}
