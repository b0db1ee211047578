//! Large pages beyond 2M, five levels, and large pages with a dynamic PAMT.

use super::super::fixture::{Fixture, TdSpec};
use super::super::guest::GuestOutcome;
use super::super::lock::{LockId, Mode, Side};
use super::super::pamt::PageType;
use super::super::td::Gpaw;
use super::super::{Leaf, LpId, Switches};
use super::{enter, expect, status};

const GIB: u64 = 1 << 30;
const LARGE: u64 = 2 << 20;

/// S2 with the 1 GiB of physical memory at `base` mapped at GPA 1 GiB, blocked table and all, by 512 pages of 2M. Returns the fixture,
/// the physical base and the table.
fn s2_with_512_large_pages() -> (Fixture, u64, u64) {
    let mut f = Fixture::s2();
    let (tdr, table) = (f.tdr, f.page());
    let base = f.range() & !(GIB - 1);
    expect(&mut f, Leaf::MemSeptAdd, &[("rcx", GIB | 2), ("rdx", tdr), ("r8", table)], "TDX_SUCCESS");
    for at in (0..GIB).step_by(LARGE as usize) {
        f.must(Leaf::MemPageAug, &[("rcx", (GIB + at) | 1), ("rdx", tdr), ("r8", base + at)]);
    }
    (f, base, table)
}

fn block_and_track(f: &mut Fixture, rcx: u64) {
    let tdr = f.tdr;
    expect(f, Leaf::MemRangeBlock, &[("rcx", rcx), ("rdx", tdr)], "TDX_SUCCESS");
    expect(f, Leaf::MemTrack, &[("rcx", tdr)], "TDX_SUCCESS");
}

#[test]
fn a_1g_page_comes_from_promote_and_goes_by_demote() {
    let (mut f, base, table) = s2_with_512_large_pages();
    let (tdr, at) = (f.tdr, [("rcx", GIB | 2), ("rdx", f.tdr)]);
    block_and_track(&mut f, GIB | 2);
    let chldcnt = f.module.td(tdr).unwrap().chldcnt;
    assert_eq!(expect(&mut f, Leaf::MemPagePromote, &at, "TDX_SUCCESS").rcx, table);
    assert_eq!(f.module.td(tdr).unwrap().chldcnt, chldcnt - 1);
    assert_eq!(f.module.sept_entry(tdr, GIB, 2).unwrap().unwrap().0, 0x8100_0000_0000_00F0 | base);
    assert_eq!(f.module.page(base + 5 * LARGE).unwrap().size, 2);
    let regs = expect(&mut f, Leaf::MemPageRemove, &[("rcx", GIB), ("rdx", tdr)], "TDX_EPT_WALK_FAILED|RCX");
    assert_eq!(regs.rdx, 0x202);
    let inside = [("rcx", 0), ("rdx", tdr), ("r8", base + 0x5000)];
    expect(&mut f, Leaf::MemPageAug, &inside, "TDX_PAGE_METADATA_INCORRECT|R8");
    block_and_track(&mut f, GIB | 2);
    expect(&mut f, Leaf::MemPageDemote, &[("rcx", GIB | 2), ("rdx", tdr), ("r8", table)], "TDX_SUCCESS");
    assert_eq!(f.module.sept_entry(tdr, GIB + 3 * LARGE, 1).unwrap().unwrap().hpa(1), base + 3 * LARGE);
    enter(&mut f, LpId(1));
    let accepted = f.module.guest_accept(LpId(1), GIB + LARGE, 1).unwrap();
    assert_eq!(accepted, GuestOutcome::Tdcall(status("TDX_SUCCESS")));
}

#[test]
fn a_1g_operation_is_busy_while_anything_in_the_gibibyte_is() {
    let (mut f, base, _) = s2_with_512_large_pages();
    let tdr = f.tdr;
    block_and_track(&mut f, GIB | 2);
    f.module.lock_by_hand(LpId(1), LockId::Pamt(2, base), Mode::Shared, Side::Host).unwrap().unwrap();
    let regs = expect(&mut f, Leaf::MemPagePromote, &[("rcx", GIB | 2), ("rdx", tdr)], "TDX_OPERAND_BUSY|RCX");
    assert_eq!((regs.rcx, regs.rdx), (0, 0));
    assert!(f.module.unlock_by_hand(LpId(1), LockId::Pamt(2, base)).unwrap());
    expect(&mut f, Leaf::MemPagePromote, &[("rcx", GIB | 2), ("rdx", tdr)], "TDX_SUCCESS");
}

#[test]
fn a_five_level_td_has_its_shared_bit_at_51() {
    let spec = TdSpec { config_flags: 1, ..TdSpec::default() };
    let mut f = Fixture::s2_with(Switches::default(), spec);
    let (tdr, page) = (f.tdr, f.page());
    assert_eq!((f.module.td(tdr).unwrap().gpaw, f.module.td(tdr).unwrap().root_level), (Gpaw::Bits52, 4));
    expect(&mut f, Leaf::MemPageAug, &[("rcx", 1 << 51), ("rdx", tdr), ("r8", page)], "TDX_OPERAND_INVALID|RCX");
    let regs =
        expect(&mut f, Leaf::MemPageAug, &[("rcx", 1 << 50), ("rdx", tdr), ("r8", page)], "TDX_EPT_WALK_FAILED|RCX");
    assert_eq!(regs.rdx, 4);
    f.add_tables(tdr, 1 << 50, 1);
    expect(&mut f, Leaf::MemPageAug, &[("rcx", 1 << 50), ("rdx", tdr), ("r8", page)], "TDX_SUCCESS");
    enter(&mut f, LpId(1));
    let accepted = f.module.guest_accept(LpId(1), 1 << 50, 0).unwrap();
    assert_eq!(accepted, GuestOutcome::Tdcall(status("TDX_SUCCESS")));
    assert_eq!(f.module.guest_read(LpId(1), (1 << 50) + 8).unwrap(), GuestOutcome::Value(0));
}

#[test]
fn with_a_dynamic_pamt_demote_takes_a_pair_and_promote_gives_it_back() {
    let dpamt = Switches { dpamt: true, ..Switches::default() };
    let mut f = Fixture::s1_with(dpamt, TdSpec::default());
    let (tdr, range) = (f.tdr, f.range());
    f.add_tables(tdr, 0, 2);
    f.vcpu = f.build_vcpu(tdr);
    f.must(Leaf::MrFinalize, &[("rcx", tdr)]);
    expect(&mut f, Leaf::MemPageAug, &[("rcx", 1), ("rdx", tdr), ("r8", range)], "TDX_SUCCESS");
    let (table, a, b, vcpu) = (f.page(), f.page(), f.page(), f.vcpu);
    let demote = |a, b| [("rcx", 1), ("rdx", tdr), ("r8", table), ("r12", a), ("r13", b)];
    block_and_track(&mut f, 1);
    expect(&mut f, Leaf::MemPageDemote, &demote(vcpu, b), "TDX_PAGE_NOT_FREE|R12");
    expect(&mut f, Leaf::MemPageDemote, &demote(a, range), "TDX_PAGE_NOT_FREE|R13");
    expect(&mut f, Leaf::MemPageDemote, &demote(a, b), "TDX_SUCCESS");
    assert_eq!(f.module.pamt().entry(1, range).unwrap().ty(), PageType::Pamt);
    let taken = [("rcx", 0x1000), ("rdx", tdr), ("r8", a)];
    expect(&mut f, Leaf::MemPageAug, &taken, "TDX_EPT_ENTRY_STATE_INCORRECT|RCX");
    block_and_track(&mut f, 1);
    let regs = expect(&mut f, Leaf::MemPagePromote, &[("rcx", 1), ("rdx", tdr)], "TDX_SUCCESS");
    assert_eq!((regs.rcx, regs.r12, regs.r13), (table, a, b));
    assert_eq!(f.module.pamt().entry(1, range).unwrap().ty(), PageType::Reg);
}
