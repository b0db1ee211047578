//! Random sequences of leaves, legal and illegal: invariants hold after each, a leaf that fails changes nothing, nothing panics.

use std::cell::RefCell;
use std::collections::BTreeMap;

use gmemtest::sim::tdx_module::fixture::{Fixture, HOST_MEMORY, TdSpec};
use gmemtest::sim::tdx_module::guest::GuestOutcome;
use gmemtest::sim::tdx_module::{HoldPoint, Interrupt, Leaf, LpId, Outcome, Reg, Regs, Released, Switches, TdcallLeaf};
use proptest::prelude::*;
use proptest::test_runner::{RngAlgorithm, TestRng, TestRunner};

const LPS: u32 = 4;

/// One step of a sequence; the numbers choose from small pools, so that steps meet each other.
#[derive(Clone, Debug)]
enum Step {
    /// A leaf of the host with these choices of operands.
    Call { leaf: Leaf, lp: u32, td: usize, gpa: usize, level: u64, page: usize, spare: u64 },
    /// An external interrupt takes a guest out.
    Kick { lp: u32 },
    /// A guest touches memory.
    Access { lp: u32, gpa: usize, write: bool },
    /// A guest executes TDCALL.
    Tdcall { lp: u32, leaf: TdcallLeaf, gpa: usize, level: u64 },
    /// The interrupt line of a processor.
    Interrupt { lp: u32, state: u8 },
    /// The next leaf of a processor stops half-way.
    Hold { lp: u32, point: usize },
    /// A held leaf goes on.
    Release { lp: u32 },
}

/// Leaves by how often they are tried: the mapping leaves most, the end of a TD rarely.
fn leaf() -> impl Strategy<Value = Leaf> {
    use Leaf::*;
    prop_oneof![
        30 => prop::sample::select(vec![MemPageAug, MemPageAug, MemRangeBlock, MemTrack, MemPageRemove, VpEnter]),
        14 => prop::sample::select(vec![MemSeptAdd, MemRangeUnblock, MemPageDemote, MemPagePromote, MemPageRelocate]),
        8 => prop::sample::select(vec![MemSeptRemove, MemSeptRd, MemPageAdd, MrExtend, MemRd, MemWr]),
        5 => prop::sample::select(vec![PhymemPageRdmd, PhymemPageWbinvd, PhymemPageReclaim, VpFlush, MrFinalize]),
        2 => prop::sample::select(vec![MngCreate, MngAddcx, MngKeyConfig, MngInit, VpCreate, VpAddcx, VpInit, MngRd, VpRd]),
        1 => prop::sample::select(vec![MngVpflushdone, PhymemCacheWb, MngKeyFreeid, SysTdmrInit, PhymemPamtAdd]),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    let call = (leaf(), 0..LPS, 0..8usize, 0..GPAS.len(), 0..10u64, 0..PAGES, any::<u64>()).prop_map(
        |(leaf, lp, td, gpa, level, page, spare)| {
            let level = [0, 0, 0, 0, 0, 1, 1, 1, 2, 3][level as usize];
            Step::Call { leaf, lp, td, gpa, level, page, spare }
        },
    );
    let tdcalls = vec![
        TdcallLeaf::MemPageAccept,
        TdcallLeaf::MemPageAccept,
        TdcallLeaf::MemPageAttrRd,
        TdcallLeaf::MemPageAttrWr,
        TdcallLeaf::VpVeinfoGet,
        TdcallLeaf::VpVmcall,
    ];
    prop_oneof![
        60 => call,
        8 => (0..LPS).prop_map(|lp| Step::Kick { lp }),
        14 => (0..LPS, 0..GPAS.len(), any::<bool>()).prop_map(|(lp, gpa, write)| Step::Access { lp, gpa, write }),
        14 => (0..LPS, prop::sample::select(tdcalls), 0..GPAS.len(), 0..2u64)
            .prop_map(|(lp, leaf, gpa, level)| Step::Tdcall { lp, leaf, gpa, level }),
        2 => (0..LPS, 0..4u8).prop_map(|(lp, state)| Step::Interrupt { lp, state }),
        3 => (0..LPS, 0..HoldPoint::ALL.len()).prop_map(|(lp, point)| Step::Hold { lp, point }),
        4 => (0..LPS).prop_map(|lp| Step::Release { lp }),
    ]
}

/// Guest addresses: neighbours under one table, a 2M range of its own, one without tables, a shared one.
const GPAS: [u64; 8] = [0, 0x1000, 0, 0x20_0000, 0x20_0000, 0x20_3000, 0x4000_0000, 1 << 47];

/// Physical pages a step can name.
const PAGES: usize = 16;

struct World {
    f: Fixture,
    tdrs: [u64; 2],
    vcpus: [u64; 3],
    pages: [u64; PAGES],
    /// The leaf held on each processor.
    held: BTreeMap<u32, Leaf>,
}

impl World {
    /// Two TDs, one that runs with two vCPUs and one that is still being built.
    fn new() -> World {
        let mut f = Fixture::s1_with(Switches::default(), TdSpec::default());
        let first = f.tdr;
        f.add_tables(first, 0, 1);
        let vcpus = [f.build_vcpu(first), f.build_vcpu(first)];
        f.must(Leaf::MrFinalize, &[("rcx", first)]);
        let second = f.build_td(&TdSpec { attributes: 1, ..TdSpec::default() });
        f.add_tables(second, 0, 1);
        let third = f.build_vcpu(second);
        let small = f.range();
        let (large, larger) = (f.range(), f.range());
        let table = f.module.sept_entry(first, 0, 1).and_then(Result::ok).expect("the fixture has tables").hpa(1);
        let root = f.module.td(first).expect("it exists").root_pa;
        let pages = [
            small,
            small + 0x1000,
            small + 0x2000,
            small + 0x3000,
            small + 0x4000,
            small + 0x5000,
            large,
            large,
            larger,
            large + 0x3000,
            small | 0x800,
            1 << 40,
            first,
            vcpus[0],
            table,
            root,
        ];
        World { tdrs: [first, second], vcpus: [vcpus[0], vcpus[1], third], pages, held: BTreeMap::new(), f }
    }

    /// The registers of a leaf, built from the choices of a step.
    fn regs(&self, leaf: Leaf, td: usize, gpa: usize, level: u64, page: usize, spare: u64) -> Regs {
        use Leaf::*;
        let tdr = match td {
            0..=4 => self.tdrs[0],
            5 | 6 => self.tdrs[1],
            _ => self.pages[0],
        };
        let vcpu = self.vcpus[td % 3];
        let page = self.pages[page];
        let none = u64::MAX;
        let mut regs = Regs { rax: leaf.number().into(), ..Regs::default() };
        match leaf {
            MemPageAug | MemPageRelocate | MemSeptAdd | MemPageDemote | MemPageAdd | MemRangeBlock
            | MemRangeUnblock | MemPageRemove | MemPagePromote | MemSeptRemove | MemSeptRd => {
                let misaligned = spare.is_multiple_of(16);
                let mask = if misaligned { u64::MAX } else { !((4096 << (9 * level)) - 1) };
                regs.rcx = GPAS[gpa] & mask | level;
                regs.rdx = tdr;
                regs.r8 = page;
                regs.r9 = if leaf == MemPageAdd { HOST_MEMORY } else { none };
                (regs.r10, regs.r11) = (none, none);
            }
            MrExtend | MemRd | MemWr => (regs.rcx, regs.rdx, regs.r8) = (GPAS[gpa], tdr, spare),
            MngCreate => (regs.rcx, regs.rdx) = (page, 32 + spare % 8),
            MngAddcx | VpCreate => (regs.rcx, regs.rdx) = (page, tdr),
            VpAddcx => (regs.rcx, regs.rdx) = (page, vcpu),
            VpEnter | VpFlush | VpInit | VpRd => regs.rcx = vcpu,
            PhymemPageRdmd | PhymemPageWbinvd | PhymemPageReclaim => regs.rcx = page,
            PhymemCacheWb => regs.rcx = spare % 3,
            SysTdmrInit => regs.rcx = 16 << 30,
            _ => regs.rcx = tdr,
        }
        regs
    }

    fn fingerprint(&self) -> u64 {
        self.f.module.fingerprint()
    }
}

/// How often each leaf succeeded and failed, to know that the sequences reach something.
type Counts = RefCell<BTreeMap<&'static str, (u64, u64)>>;

/// Leaves that may keep a trace of a failed call: VP.ENTER its association and epoch (5.27), CACHE.WB and TDMR.INIT their progress.
fn may_keep_a_trace(leaf: Leaf) -> bool {
    matches!(leaf, Leaf::VpEnter | Leaf::PhymemCacheWb | Leaf::SysTdmrInit)
}

fn unchanged(world: &World, before: u64, leaf: Leaf, outcome: Outcome) -> Result<(), TestCaseError> {
    let failed = match outcome {
        Outcome::Done(status) => !status.is_zero(),
        Outcome::Held => true,
        Outcome::Entered => false,
    };
    if failed && !may_keep_a_trace(leaf) {
        prop_assert_eq!(before, world.fingerprint(), "{} changed the state and came to {:?}", leaf.name(), outcome);
    }
    Ok(())
}

fn take(world: &mut World, step: &Step, counts: &Counts) -> Result<(), TestCaseError> {
    let before = world.fingerprint();
    match *step {
        Step::Call { leaf, lp, td, gpa, level, page, spare } => {
            let mut regs = world.regs(leaf, td, gpa, level, page, spare);
            // A processor that runs a guest or holds a leaf cannot call; the model says so and nothing happens.
            let Ok(outcome) = world.f.module.seamcall(LpId(lp), &mut regs) else {
                prop_assert_eq!(before, world.fingerprint());
                return Ok(());
            };
            let mut counts = counts.borrow_mut();
            let count = counts.entry(leaf.name()).or_default();
            match outcome {
                Outcome::Done(status) if !status.is_zero() => count.1 += 1,
                _ => count.0 += 1,
            }
            if outcome == Outcome::Held {
                world.held.insert(lp, leaf);
            }
            if let Outcome::Done(status) = outcome {
                prop_assert_eq!(regs.rax, status.0);
                prop_assert!(status.code().is_some(), "{} came to {:?}", leaf.name(), status);
                prop_assert!(regs[Reg::Rbx] == 0 && regs[Reg::Rsp] == 0, "{} wrote registers it has not", leaf.name());
            }
            unchanged(world, before, leaf, outcome)?;
        }
        Step::Kick { lp } => drop(world.f.module.kick(LpId(lp))),
        Step::Access { lp, gpa, write } => {
            let (lp, gpa) = (LpId(lp), GPAS[gpa]);
            let outcome =
                if write { world.f.module.guest_write(lp, gpa, gpa | 1) } else { world.f.module.guest_read(lp, gpa) };
            if let Ok(GuestOutcome::Exit(exit)) = outcome {
                prop_assert_eq!(world.f.module.running(lp), None);
                prop_assert_eq!(exit.regs.rax, exit.status.0);
            }
        }
        Step::Tdcall { lp, leaf, gpa, level } => {
            let rcx = match leaf {
                TdcallLeaf::MemPageAttrRd => GPAS[gpa],
                _ => GPAS[gpa] | level,
            };
            let mut regs = Regs { rax: leaf.number().into(), rcx, ..Regs::default() };
            drop(world.f.module.tdcall(LpId(lp), &mut regs));
        }
        Step::Interrupt { lp, state } => {
            let line = match state {
                0 => Interrupt::Pending,
                1 => Interrupt::After(3),
                _ => Interrupt::None,
            };
            world.f.module.set_interrupt(LpId(lp), line).expect("the processor exists");
        }
        Step::Hold { lp, point } => drop(world.f.module.hold_next(LpId(lp), HoldPoint::ALL[point])),
        Step::Release { lp } => {
            if let Ok(Released::Host(outcome, _)) = world.f.module.release(LpId(lp))
                && let Some(leaf) = world.held.remove(&lp)
            {
                unchanged(world, before, leaf, outcome)?;
            }
        }
    }
    let broken = world.f.module.check();
    prop_assert!(broken.is_empty(), "after {:?}: {:?}", step, broken);
    Ok(())
}

#[test]
fn any_sequence_of_leaves_keeps_every_invariant_and_failures_change_nothing() {
    let config =
        ProptestConfig { cases: 40, failure_persistence: None, max_shrink_iters: 400, ..ProptestConfig::default() };
    // The same sequences every time, so that what they reach can be asserted.
    let mut runner = TestRunner::new_with_rng(config, TestRng::deterministic_rng(RngAlgorithm::ChaCha));
    let counts = Counts::default();
    let result = runner.run(&prop::collection::vec(step(), 40..160), |steps| {
        let mut world = World::new();
        steps.iter().try_for_each(|step| take(&mut world, step, &counts))
    });
    if let Err(error) = result {
        panic!("{error}");
    }
    let counts = counts.into_inner();
    for leaf in [
        Leaf::MemPageAug,
        Leaf::MemRangeBlock,
        Leaf::MemRangeUnblock,
        Leaf::MemTrack,
        Leaf::MemPageRemove,
        Leaf::MemPageRelocate,
        Leaf::MemPageDemote,
        Leaf::MemSeptAdd,
        Leaf::MemSeptRemove,
        Leaf::VpEnter,
        Leaf::VpFlush,
        Leaf::MngVpflushdone,
    ] {
        let (succeeded, failed) = counts.get(leaf.name()).copied().unwrap_or_default();
        assert!(succeeded > 0 && failed > 0, "{}: {succeeded} succeeded, {failed} failed: {counts:?}", leaf.name());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, failure_persistence: None, ..ProptestConfig::default() })]

    /// DEMOTE after PROMOTE is the identity: mappings, PAMT, counts and content are as before. Before finalisation, where neither
    /// needs a block, the whole state is; after it only the epochs have moved on.
    #[test]
    fn demote_after_promote_is_the_identity(accepted in any::<bool>(), finalised in any::<bool>(), slot in 1..8u64, marks in prop::collection::vec((0..512u64, any::<u64>()), 0..4)) {
        let mut f = if finalised || accepted { Fixture::s2() } else { Fixture::s1() };
        let tdr = f.tdr;
        let gpa = slot << 21;
        if f.vcpu == 0 {
            f.add_tables(tdr, 0, 1);
        }
        f.add_tables(tdr, gpa, 1);
        let range = f.range();
        for i in 0..512 {
            f.must(Leaf::MemPageAug, &[("rcx", gpa + i * 4096), ("rdx", tdr), ("r8", range + i * 4096)]);
        }
        if accepted {
            let vcpu = f.vcpu;
            let (outcome, _) = f.call(Leaf::VpEnter, &[("rcx", vcpu)]);
            prop_assert_eq!(outcome, Outcome::Entered);
            for i in 0..512 {
                let outcome = f.module.guest_accept(LpId(0), gpa + i * 4096, 0).expect("the guest runs");
                prop_assert!(matches!(outcome, GuestOutcome::Tdcall(status) if status.is_zero()));
            }
            for (page, value) in &marks {
                f.module.guest_write(LpId(0), gpa + page * 4096, *value).expect("the guest runs");
            }
            f.module.kick(LpId(0)).expect("the guest runs");
        }
        let entries = |f: &Fixture| -> Vec<u64> {
            (0..512).map(|i| f.module.sept_entry(tdr, gpa + i * 4096, 0).and_then(Result::ok).map_or(0, |entry| entry.0)).collect()
        };
        let pages = |f: &Fixture| -> Vec<_> {
            (0..512).map(|i| f.module.page(range + i * 4096).map(|page| (page.ty, page.owner, page.size))).collect()
        };
        let table = f.module.sept_entry(tdr, gpa, 1).and_then(Result::ok).expect("the table is there").hpa(1);
        let before = (entries(&f), pages(&f), f.module.td(tdr).map(|td| td.chldcnt));
        let whole = f.module.fingerprint();
        let block = |f: &mut Fixture| {
            if f.vcpu != 0 {
                f.must(Leaf::MemRangeBlock, &[("rcx", gpa | 1), ("rdx", tdr)]);
                f.must(Leaf::MemTrack, &[("rcx", tdr)]);
            }
        };
        block(&mut f);
        let promoted = f.must(Leaf::MemPagePromote, &[("rcx", gpa | 1), ("rdx", tdr)]);
        prop_assert_eq!(promoted.rcx, table);
        prop_assert_eq!(f.module.page(range).map(|page| page.size), Some(1));
        block(&mut f);
        let none = u64::MAX;
        f.must(Leaf::MemPageDemote, &[("rcx", gpa | 1), ("rdx", tdr), ("r8", table), ("r9", none), ("r10", none), ("r11", none)]);
        prop_assert_eq!(before, (entries(&f), pages(&f), f.module.td(tdr).map(|td| td.chldcnt)));
        if f.vcpu == 0 {
            prop_assert_eq!(whole, f.module.fingerprint());
        }
        for (page, value) in marks.iter().filter(|_| accepted) {
            let last = marks.iter().rev().find(|(other, _)| other == page).map_or(*value, |(_, value)| *value);
            prop_assert_eq!(f.module.memory().read_u64(range + page * 4096), last);
        }
        prop_assert!(f.module.check().is_empty());
    }
}
