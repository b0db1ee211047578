//! From bring-up to teardown, and the wrong orders.

use super::super::fixture::{Fixture, TdSpec};
use super::super::guest::GuestOutcome;
use super::super::leaf::{SEAMCALL_LEAVES, Standing};
use super::super::memory::SparseMemory;
use super::super::pamt::PageType;
use super::super::platform::Platform;
use super::super::regs::Regs;
use super::super::{Disorder, HkidState, Leaf, LpId, Module, OpState, Outcome, Switches};
use super::{check, expect, expect_on, mapped_page, status};

#[test]
fn a_td_is_built_used_and_torn_down_to_nothing() {
    let mut f = Fixture::s2();
    let (tdr, vcpu) = (f.tdr, f.vcpu);
    let page = mapped_page(&mut f, 0);
    expect(&mut f, Leaf::MngVpflushdone, &[("rcx", tdr)], "TDX_FLUSHVP_NOT_DONE");
    expect_on(&mut f, LpId(1), Leaf::VpFlush, &[("rcx", vcpu)], "TDX_SUCCESS");
    expect(&mut f, Leaf::PhymemCacheWb, &[("rcx", 0)], "TDX_NO_HKID_READY_TO_WBCACHE");
    expect(&mut f, Leaf::PhymemCacheWb, &[("rcx", 1)], "TDX_WBCACHE_RESUME_ERROR");
    expect(&mut f, Leaf::MngKeyFreeid, &[("rcx", tdr)], "TDX_LIFECYCLE_STATE_INCORRECT");
    expect(&mut f, Leaf::MngVpflushdone, &[("rcx", tdr)], "TDX_SUCCESS");
    expect(&mut f, Leaf::MngVpflushdone, &[("rcx", tdr)], "TDX_LIFECYCLE_STATE_INCORRECT");
    expect(&mut f, Leaf::MemTrack, &[("rcx", tdr)], "TDX_TD_KEYS_NOT_CONFIGURED");
    expect(&mut f, Leaf::MngKeyFreeid, &[("rcx", tdr)], "TDX_WBCACHE_NOT_COMPLETE");
    let regs = expect(&mut f, Leaf::PhymemPageReclaim, &[("rcx", page)], "TDX_LIFECYCLE_STATE_INCORRECT");
    assert_eq!((regs.rcx, regs.rdx, regs.r8), (3, tdr, 0));
    expect(&mut f, Leaf::PhymemCacheWb, &[("rcx", 0)], "TDX_SUCCESS");
    expect(&mut f, Leaf::MngKeyFreeid, &[("rcx", tdr)], "TDX_SUCCESS");
    let hkid = f.module.td(tdr).unwrap().hkid;
    assert_eq!(f.module.kot().entry(hkid).unwrap().state, HkidState::Free);
    expect(&mut f, Leaf::PhymemPageReclaim, &[("rcx", tdr)], "TDX_TD_ASSOCIATED_PAGES_EXIST");
    let mut pages = Vec::new();
    f.module.pamt().visit(|_, pa, entry| {
        if entry.ty() != PageType::Nda && pa != tdr {
            pages.push(pa);
        }
    });
    assert_eq!(pages.len() as u64, f.module.td(tdr).unwrap().chldcnt);
    for page in pages {
        expect(&mut f, Leaf::PhymemPageReclaim, &[("rcx", page)], "TDX_SUCCESS");
    }
    let regs = expect(&mut f, Leaf::PhymemPageReclaim, &[("rcx", tdr)], "TDX_SUCCESS");
    assert_eq!((regs.rcx, regs.rdx), (PageType::Tdr as u64, 0));
    expect(&mut f, Leaf::PhymemPageReclaim, &[("rcx", tdr)], "TDX_PAGE_METADATA_INCORRECT|RCX");
    f.module.pamt().visit(|_, pa, entry| assert_eq!(entry.ty(), PageType::Nda, "{pa:#x}"));
    assert_eq!((f.module.tds().count(), f.module.vcpus().count()), (0, 0));
}

#[test]
fn building_in_the_wrong_order_is_refused() {
    let two = Platform::with_packages(vec![0, 1], 64 << 30);
    let mut f = Fixture::bring_up(two, 1, Switches::default());
    let (tdr, hkid, page) = (f.page(), f.hkid(), f.page());
    expect(&mut f, Leaf::MngCreate, &[("rcx", tdr), ("rdx", hkid)], "TDX_SUCCESS");
    expect(&mut f, Leaf::MngCreate, &[("rcx", page), ("rdx", hkid)], "TDX_HKID_NOT_FREE");
    expect(&mut f, Leaf::MngAddcx, &[("rcx", page), ("rdx", tdr)], "TDX_TD_KEYS_NOT_CONFIGURED");
    expect(&mut f, Leaf::MngKeyConfig, &[("rcx", tdr)], "TDX_SUCCESS");
    expect(&mut f, Leaf::MngKeyConfig, &[("rcx", tdr)], "TDX_KEY_CONFIGURED");
    expect_on(&mut f, LpId(1), Leaf::MngKeyConfig, &[("rcx", tdr)], "TDX_SUCCESS");
    expect(&mut f, Leaf::MngKeyConfig, &[("rcx", tdr)], "TDX_LIFECYCLE_STATE_INCORRECT");
    for _ in 0..5 {
        let page = f.page();
        f.must(Leaf::MngAddcx, &[("rcx", page), ("rdx", tdr)]);
    }
    let params = f.td_params(&TdSpec::default());
    expect(&mut f, Leaf::MngInit, &[("rcx", tdr), ("rdx", params)], "TDX_TDCS_NOT_ALLOCATED");
    f.module.fail_entropy(1);
    expect(&mut f, Leaf::MngAddcx, &[("rcx", page), ("rdx", tdr)], "TDX_RND_NO_ENTROPY");
    expect(&mut f, Leaf::MngAddcx, &[("rcx", page), ("rdx", tdr)], "TDX_SUCCESS");
    expect(&mut f, Leaf::MngInit, &[("rcx", tdr), ("rdx", params)], "TDX_SUCCESS");
    let spare = f.page();
    expect(&mut f, Leaf::MngAddcx, &[("rcx", spare), ("rdx", tdr)], "TDX_OP_STATE_INCORRECT");
    expect(&mut f, Leaf::MngInit, &[("rcx", tdr), ("rdx", params)], "TDX_OP_STATE_INCORRECT");
    expect(&mut f, Leaf::MrFinalize, &[("rcx", tdr)], "TDX_NO_VCPUS");
    let mut newer = f.module.switches();
    newer.set("newer", true);
    f.module.set_switches(newer);
    let text = format!("TDX_OP_STATE_INCORRECT|{}", OpState::Initialized as u32);
    expect(&mut f, Leaf::MngInit, &[("rcx", tdr), ("rdx", params)], &text);
}

#[test]
fn td_params_are_refused_by_the_field_at_fault() {
    let cases: [(u64, u64, &str); 8] = [
        (0, 1 << 4, "TDX_OPERAND_INVALID|ATTRIBUTES"),
        (8, 1, "TDX_OPERAND_INVALID|XFAM"),
        (16, 0, "TDX_OPERAND_INVALID|MAX_VCPUS"),
        (16, 0x0004_0001, "TDX_OPERAND_INVALID|NUM_L2_VMS"),
        (16, 0x0001_0001, "TDX_TDCS_NOT_ALLOCATED"),
        (24, 6 | 2 << 3, "TDX_OPERAND_INVALID|EPTP_CONTROLS"),
        (32, 1 << 3, "TDX_OPERAND_INVALID|CONFIG_FLAGS"),
        (40, 3, "TDX_OPERAND_INVALID|TSC_FREQUENCY"),
    ];
    for (offset, word, text) in cases {
        let mut f = Fixture::bring_up(Platform::new(1, 64 << 30), 1, Switches::default());
        let tdr = f.build_td_keys();
        for _ in 0..6 {
            let page = f.page();
            f.must(Leaf::MngAddcx, &[("rcx", page), ("rdx", tdr)]);
        }
        let params = f.td_params(&TdSpec::default());
        f.module.host_write(params + offset, word);
        expect(&mut f, Leaf::MngInit, &[("rcx", tdr), ("rdx", params)], text);
    }
}

#[test]
fn a_processor_out_of_order_may_not_enter() {
    let mut f = Fixture::s2();
    let at = [("rcx", f.vcpu)];
    let order = |f: &mut Fixture, disorders: &[Disorder]| f.module.set_disorders(LpId(0), disorders).unwrap();
    order(&mut f, &[Disorder::MonitorOff, Disorder::TscAdjustChanged, Disorder::CpuidMaxvalLimited]);
    expect(&mut f, Leaf::VpEnter, &at, "TDX_LIMIT_CPUID_MAXVAL_SET");
    order(&mut f, &[Disorder::MonitorOff, Disorder::TscAdjustChanged]);
    expect(&mut f, Leaf::VpEnter, &at, "TDX_INCONSISTENT_MSR|0x3B");
    order(&mut f, &[Disorder::MonitorOff]);
    expect(&mut f, Leaf::VpEnter, &at, "TDX_INCORRECT_MSR_VALUE|0x1A0");
    order(&mut f, &[]);
    f.module.set_clock_ns(500);
    assert_eq!(f.call(Leaf::VpEnter, &at).0, Outcome::Entered);
    f.module.kick(LpId(0)).unwrap();
    f.module.set_clock_ns(499);
    expect(&mut f, Leaf::VpEnter, &at, "TDX_TSC_ROLLBACK");
}

#[test]
fn a_tdvmcall_shares_the_registers_of_its_mask_and_no_others() {
    let mut f = Fixture::s2();
    let vcpu = f.vcpu;
    super::enter(&mut f, LpId(1));
    let mask = 1 << 10 | 1 << 12 | 1 << 17;
    let mut guest = Regs { rcx: mask, r10: 5, r11: 6, r12: 7, ..Regs::default() };
    (guest.xmm[1], guest.xmm[2]) = (8, 9);
    let GuestOutcome::Exit(exit) = f.module.tdcall(LpId(1), &mut guest).unwrap() else { panic!("no exit") };
    assert_eq!((exit.reason(), exit.regs.rcx, exit.regs.r10, exit.regs.r11, exit.regs.r12), (77, mask, 5, 0, 7));
    assert_eq!((exit.regs.xmm[1], exit.regs.xmm[2]), (8, 0));
    let mut host = Regs { rcx: vcpu, r10: 50, r11: 60, ..Regs::default() };
    host.xmm[1] = 80;
    assert_eq!(f.module.seamcall(LpId(1), &mut host).unwrap(), Outcome::Entered);
    let gpr = f.module.vcpu(vcpu).unwrap().gpr;
    assert_eq!((gpr.rax, gpr.rcx, gpr.r10, gpr.r11, gpr.r12), (0, mask, 50, 6, 0));
    assert_eq!((gpr.xmm[1], gpr.xmm[2]), (80, 9));
    for refused in [1 << 32, 1, 2, 1 << 4] {
        let outcome = f.module.tdcall(LpId(1), &mut Regs { rcx: refused, ..Regs::default() }).unwrap();
        assert_eq!(outcome, GuestOutcome::Tdcall(status("TDX_OPERAND_INVALID|RCX")));
    }
}

#[test]
fn a_new_vcpu_starts_as_the_specification_says() {
    let mut f = Fixture::s1();
    let (tdr, tdvpr) = (f.tdr, f.page());
    f.must(Leaf::VpCreate, &[("rcx", tdvpr), ("rdx", tdr)]);
    expect(&mut f, Leaf::VpInit, &[("rcx", tdvpr)], "TDX_TDCX_NUM_INCORRECT");
    for _ in 0..5 {
        let page = f.page();
        f.must(Leaf::VpAddcx, &[("rcx", page), ("rdx", tdvpr)]);
    }
    expect(&mut f, Leaf::VpInit, &[("rcx", tdvpr), ("rdx", 0x1234)], "TDX_SUCCESS");
    let vcpu = f.module.vcpu(tdvpr).unwrap();
    assert_eq!((vcpu.rip, vcpu.gpr.rbx, vcpu.gpr.rcx, vcpu.gpr.r8, vcpu.gpr.rsi), (0xFFFF_FFF0, 48, 0x1234, 0x1234, 0));
    assert_eq!((vcpu.arch.cr0, vcpu.arch.cr4, vcpu.arch.efer, vcpu.arch.cs.access), (0x21, 0x2040, 0x901, 0xC09B));
    expect(&mut f, Leaf::VpInit, &[("rcx", tdvpr)], "TDX_VCPU_STATE_INCORRECT");
    expect_on(&mut f, LpId(1), Leaf::VpFlush, &[("rcx", tdvpr)], "TDX_VCPU_NOT_ASSOCIATED");
}

#[test]
fn cpuid_bits_outside_the_configurable_ones_name_their_leaf() {
    let mut f = Fixture::bring_up(Platform::new(1, 64 << 30), 1, Switches::default());
    let tdr = f.build_td_keys();
    for _ in 0..6 {
        let page = f.page();
        f.must(Leaf::MngAddcx, &[("rcx", page), ("rdx", tdr)]);
    }
    let params = f.td_params(&TdSpec::default());
    f.module.host_write(params + 256 + 16, 1 << 20);
    let regs = expect(&mut f, Leaf::MngInit, &[("rcx", tdr), ("rdx", params)], "TDX_OPERAND_INVALID|CPUID_CONFIG");
    assert_eq!(regs.rcx, 0xD | 1 << 32);
}

#[test]
fn the_dispatcher_refuses_before_any_leaf_looks() {
    let mut module = Module::new(Platform::new(1, 64 << 30), Box::new(SparseMemory::new(1 << 30)));
    let mut call = |rax: u64| {
        let mut regs = Regs { rax, rcx: 0x5555, ..Regs::default() };
        let outcome = module.seamcall(LpId(0), &mut regs).unwrap();
        assert_eq!(regs.rcx, 0x5555);
        outcome
    };
    let unknown = Outcome::Done(status("TDX_OPERAND_INVALID|RAX"));
    assert_eq!(call(38), Outcome::Done(status("TDX_SYS_NOT_READY")));
    assert_eq!(call(38 | 1 << 24), unknown);
    assert_eq!(call(38 | 1 << 16), unknown);
    let mut f = Fixture::s1();
    for number in 0..=200u16 {
        let modelled = SEAMCALL_LEAVES.iter().any(|info| info.number == number && info.standing == Standing::Modelled);
        let is_dpamt = number == 58 || number == 59;
        let ends = number == 44 || number == 52;
        if !modelled || is_dpamt {
            let mut regs = Regs { rax: number as u64, ..Regs::default() };
            assert_eq!(f.module.seamcall(LpId(0), &mut regs).unwrap(), unknown, "leaf {number}");
        } else if !ends {
            let mut regs = Regs { rax: number as u64, rcx: 3, rdx: 3, ..Regs::default() };
            f.module.seamcall(LpId(0), &mut regs).unwrap();
            check(&f);
        }
    }
    expect(&mut f, Leaf::SysShutdown, &[], "TDX_SUCCESS");
    let tdr = f.tdr;
    expect(&mut f, Leaf::MemTrack, &[("rcx", tdr)], "TDX_SYS_SHUTDOWN");
}

#[test]
fn the_fields_linux_reads_have_values() {
    let mut f = Fixture::s1();
    let read = |f: &mut Fixture, field: u64| f.must(Leaf::SysRd, &[("rdx", field)]).r8;
    for (field, value) in [
        (0x9100000100000008, 64),
        (0x9100000100000009, 16),
        (0x9100000100000010, 16),
        (0x9100000100000011, 16),
        (0x9100000100000012, 16),
        (0x9800000100000000, 4096),
        (0x9800000100000100, 6 * 4096),
        (0x9800000100000200, 6 * 4096),
        (0x1900000300000001, 0),
        (0x1900000300000003, 3),
        (0x9900000100000008, 0xFFFF),
    ] {
        assert_eq!(read(&mut f, field), value, "{field:#x}");
    }
    let features = read(&mut f, 0x0A00000300000008);
    assert_eq!(
        features & (1 << 18 | 1 << 20),
        1 << 18 | 1 << 20,
        "Linux refuses a module without NO_RBP_MOD and TOPOLOGY_ENUM"
    );
    let configs = read(&mut f, 0x9900000100000004);
    for n in 0..configs {
        let leaf = read(&mut f, 0x9900000300000400 + n);
        assert_eq!(leaf & 0xFFFF_FFFF, f.module.platform().cpuid_configs[n as usize].0 as u64);
        assert_ne!(read(&mut f, 0x9900000300000500 + 2 * n) | read(&mut f, 0x9900000300000501 + 2 * n), 0);
    }
    expect(&mut f, Leaf::SysRd, &[("rdx", 0x1234)], "TDX_METADATA_FIELD_ID_INCORRECT|RDX");
}
