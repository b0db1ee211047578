//! The host's writes against a TD's lines, poison, caches; dynamic PAMT.

use super::super::fixture::{Fixture, TdSpec};
use super::super::guest::GuestOutcome;
use super::super::memory::lines::MachineCheck;
use super::super::{Leaf, LpId, Switches};
use super::{enter, expect, mapped_page, status};

#[test]
fn a_host_line_write_over_a_private_page_kills_the_td_at_its_next_read() {
    let mut f = Fixture::s2();
    let page = mapped_page(&mut f, 0);
    let (tdr, vcpu) = (f.tdr, f.vcpu);
    assert_eq!((f.module.host_read(page), f.module.leak_attempts()), (Ok(0), 1));
    f.module.host_write_line(page, &[1; 8]);
    enter(&mut f, LpId(1));
    assert_eq!(f.module.guest_read(LpId(1), 0x40).unwrap(), GuestOutcome::Value(0));
    let GuestOutcome::Exit(exit) = f.module.guest_read(LpId(1), 0).unwrap() else { panic!("no exit") };
    assert_eq!(exit.status, status("TDX_NON_RECOVERABLE_TD_NON_ACCESSIBLE"));
    expect(&mut f, Leaf::MemTrack, &[("rcx", tdr)], "TDX_TD_FATAL");
    super::expect_on(&mut f, LpId(1), Leaf::VpFlush, &[("rcx", vcpu)], "TDX_SUCCESS");
    expect(&mut f, Leaf::MngVpflushdone, &[("rcx", tdr)], "TDX_SUCCESS");
    expect(&mut f, Leaf::PhymemCacheWb, &[("rcx", 0)], "TDX_SUCCESS");
    expect(&mut f, Leaf::MngKeyFreeid, &[("rcx", tdr)], "TDX_SUCCESS");
    expect(&mut f, Leaf::PhymemPageReclaim, &[("rcx", page)], "TDX_SUCCESS");
}

#[test]
fn a_partial_host_write_poisons_where_the_erratum_is() {
    let erratum = Switches { partial_write_erratum: true, ..Switches::default() };
    let mut f = Fixture::s2_with(erratum, TdSpec::default());
    let page = mapped_page(&mut f, 0);
    f.module.host_write(page + 8, 1);
    assert_eq!(f.module.host_read(page), Err(MachineCheck { pa: page }));
    assert_eq!(f.module.host_read(page + 64), Ok(0));
    f.module.host_reset(page, 4096);
    assert_eq!(f.module.host_read(page), Ok(0));
}

#[test]
fn a_forgotten_wbinvd_comes_back_over_the_hosts_data() {
    for flushed in [true, false] {
        let aliasing = Switches { cache_aliasing: true, ..Switches::default() };
        let mut f = Fixture::s2_with(aliasing, TdSpec::default());
        let (page, tdr) = (mapped_page(&mut f, 0), f.tdr);
        let hkid = f.module.td(tdr).unwrap().hkid;
        enter(&mut f, LpId(1));
        f.module.guest_write(LpId(1), 0x18, 0xBAD).unwrap();
        f.module.kick(LpId(1)).unwrap();
        expect(&mut f, Leaf::MemRangeBlock, &[("rcx", 0), ("rdx", tdr)], "TDX_SUCCESS");
        expect(&mut f, Leaf::MemTrack, &[("rcx", tdr)], "TDX_SUCCESS");
        expect(&mut f, Leaf::MemPageRemove, &[("rcx", 0), ("rdx", tdr)], "TDX_SUCCESS");
        assert_eq!(f.module.dirty_line_count(hkid), 1);
        if flushed {
            expect(&mut f, Leaf::PhymemPageWbinvd, &[("rcx", page | (hkid as u64) << 46)], "TDX_SUCCESS");
        }
        f.module.host_reset(page, 4096);
        f.module.host_write(page + 0x18, 5);
        f.module.host_flush(page, 4096);
        while f.module.evict_line(0) {}
        let survived = f.module.host_read(page + 0x18) == Ok(5);
        assert_eq!(survived, flushed);
    }
}

#[test]
fn dynamic_pamt_needs_a_pair_for_every_2m_range_in_4k_use() {
    let dpamt = Switches { dpamt: true, ..Switches::default() };
    let mut f = Fixture::s2_with(dpamt, TdSpec::default());
    let (tdr, range) = (f.tdr, f.range());
    let aug = |page| [("rcx", 0), ("rdx", tdr), ("r8", page)];
    expect(&mut f, Leaf::MemPageAug, &aug(range), "TDX_MISSING_PAMT_PAGE_PAIR|R8");
    let (a, b) = (f.page(), f.page());
    let used = f.vcpu;
    let add = |a, b| [("rcx", range | 1), ("rdx", a), ("r8", b)];
    expect(&mut f, Leaf::PhymemPamtAdd, &add(used, b), "TDX_PAGE_NOT_FREE|RDX");
    expect(&mut f, Leaf::PhymemPamtAdd, &add(a, a), "TDX_PAGE_NOT_FREE|R8");
    expect(&mut f, Leaf::PhymemPamtRemove, &[("rcx", range | 1)], "TDX_NO_PAMT_PAGE_PAIR|RCX");
    expect(&mut f, Leaf::PhymemPamtAdd, &add(a, b), "TDX_SUCCESS");
    expect(&mut f, Leaf::PhymemPamtAdd, &add(a, b), "TDX_HPA_RANGE_NOT_FREE|RCX");
    expect(&mut f, Leaf::MemPageAug, &aug(a), "TDX_PAGE_METADATA_INCORRECT|R8");
    expect(&mut f, Leaf::MemPageAug, &aug(range + 0x1F_F000), "TDX_SUCCESS");
    expect(&mut f, Leaf::PhymemPamtRemove, &[("rcx", range | 1)], "TDX_PAMT_PAGE_NOT_EMPTY|1");
    expect(&mut f, Leaf::MemRangeBlock, &[("rcx", 0), ("rdx", tdr)], "TDX_SUCCESS");
    expect(&mut f, Leaf::MemTrack, &[("rcx", tdr)], "TDX_SUCCESS");
    let regs = expect(&mut f, Leaf::MemPageRemove, &[("rcx", 0), ("rdx", tdr)], "TDX_SUCCESS");
    assert_eq!(regs.rcx, (range + 0x1F_F000) | 1 << 62);
    let regs = expect(&mut f, Leaf::PhymemPamtRemove, &[("rcx", range | 1)], "TDX_SUCCESS");
    assert_eq!((regs.rdx, regs.r8), (a, b));
}
