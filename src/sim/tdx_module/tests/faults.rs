//! Faults on plan: which calls they strike and what is left behind.

use super::super::fault::{Effect, FaultRule, Filter, Preset, When};
use super::super::fixture::Fixture;
use super::super::guest::GuestOutcome;
use super::super::{AnyLeaf, Leaf, LpId, Module, TdcallLeaf};
use super::{enter, expect, mapped_page, status};

const REMOVE: AnyLeaf = AnyLeaf::Seamcall(Leaf::MemPageRemove);

/// S2 with pages at GPA 0 and 0x1000, both blocked and tracked. Returns the pages.
fn two_removable_pages() -> (Fixture, [u64; 2]) {
    let mut f = Fixture::s2();
    let tdr = f.tdr;
    let pages = [0, 0x1000].map(|gpa| mapped_page(&mut f, gpa));
    for gpa in [0, 0x1000] {
        f.must(Leaf::MemRangeBlock, &[("rcx", gpa), ("rdx", tdr)]);
    }
    f.must(Leaf::MemTrack, &[("rcx", tdr)]);
    (f, pages)
}

#[test]
fn stuck_strikes_every_remove_of_one_page_and_no_other() {
    let (mut f, pages) = two_removable_pages();
    let tdr = f.tdr;
    let filter = Filter { page: Some(pages[0]), ..Filter::default() };
    f.module.faults_mut().add(Preset::Stuck.rule(REMOVE).filter(filter));
    let before = f.module.fingerprint();
    for _ in 0..3 {
        expect(&mut f, Leaf::MemPageRemove, &[("rcx", 0), ("rdx", tdr)], "TDX_OPERAND_BUSY|RCX");
    }
    assert_eq!(f.module.fingerprint(), before);
    expect(&mut f, Leaf::MemPageRemove, &[("rcx", 0x1000), ("rdx", tdr)], "TDX_SUCCESS");
    assert_eq!(f.module.faults_mut().rules()[0].hits(), 3);
    f.module.faults_mut().clear();
    expect(&mut f, Leaf::MemPageRemove, &[("rcx", 0), ("rdx", tdr)], "TDX_SUCCESS");
}

#[test]
fn busy_twice_defeats_a_single_retry() {
    let (mut f, _) = two_removable_pages();
    let tdr = f.tdr;
    f.module.faults_mut().add(Preset::BusyTwice.rule(REMOVE));
    let at = [("rcx", 0), ("rdx", tdr)];
    expect(&mut f, Leaf::MemPageRemove, &at, "TDX_OPERAND_BUSY|SEPT_TREE");
    expect(&mut f, Leaf::MemPageRemove, &at, "TDX_OPERAND_BUSY|SEPT_TREE");
    expect(&mut f, Leaf::MemPageRemove, &at, "TDX_SUCCESS");
}

#[test]
fn a_fault_after_the_effect_leaves_the_effect() {
    let (mut f, pages) = two_removable_pages();
    let tdr = f.tdr;
    let rule = FaultRule::new(REMOVE, status("TDX_EPT_WALK_FAILED|RCX")).effect(Effect::After).when(When::Nth(2));
    f.module.faults_mut().add(rule);
    expect(&mut f, Leaf::MemPageRemove, &[("rcx", 0), ("rdx", tdr)], "TDX_SUCCESS");
    expect(&mut f, Leaf::MemPageRemove, &[("rcx", 0x1000), ("rdx", tdr)], "TDX_EPT_WALK_FAILED|RCX");
    assert_eq!(f.module.page(pages[1]).unwrap().ty, super::super::pamt::PageType::Nda);
}

#[test]
fn the_chance_of_a_fault_is_drawn_from_its_seed() {
    let strikes = |seed| {
        let mut f = Fixture::s2();
        let tdr = f.tdr;
        let track = AnyLeaf::Seamcall(Leaf::MemTrack);
        let half = When::Probability { chance: 1 << 31, seed };
        f.module.faults_mut().add(FaultRule::new(track, status("TDX_OPERAND_BUSY|TD_EPOCH")).when(half));
        (0..64).map(|_| !f.status(Leaf::MemTrack, &[("rcx", tdr)]).is_zero()).collect::<Vec<bool>>()
    };
    let first = strikes(1);
    assert_eq!(first, strikes(1));
    assert_ne!(first, strikes(2));
    assert!((16..48).contains(&first.iter().filter(|strike| **strike).count()));
}

#[test]
fn the_guests_leaves_can_fail_too() {
    let mut f = Fixture::s2();
    let (tdr, page) = (f.tdr, f.page());
    f.must(Leaf::MemPageAug, &[("rcx", 0), ("rdx", tdr), ("r8", page)]);
    let accept = AnyLeaf::Tdcall(TdcallLeaf::MemPageAccept);
    let filter = Filter { gpa: Some(0), tdr: Some(tdr), ..Filter::default() };
    f.module.faults_mut().add(Preset::BusyOnce.rule(accept).filter(filter));
    enter(&mut f, LpId(1));
    let busy = GuestOutcome::Tdcall(status("TDX_OPERAND_BUSY|RCX"));
    assert_eq!(f.module.guest_accept(LpId(1), 0, 0).unwrap(), busy);
    assert_eq!(f.module.guest_accept(LpId(1), 0, 0).unwrap(), GuestOutcome::Tdcall(status("TDX_SUCCESS")));
    assert_eq!(f.module.trace().count(accept).calls, 2);
}

#[test]
fn a_module_moves_between_threads() {
    fn is_send<T: Send>() {}
    is_send::<Module>();
}
