//! What KVM asks of the TDX module for each operation.

use gmemtest::harness::{Context, GmemVm, Td, TdMemory, TestResult, init_mem_region, set_cpuid};
use gmemtest::inject::seamcall::{
    AUG as PAGE_AUG, BLOCK as RANGE_BLOCK, MNG_CREATE, RECLAIM, REMOVE as PAGE_REMOVE, SEPT_ADD, TRACK, WBINVD,
};
use gmemtest::machine::{
    Exit, FaultWhen, GuestOp, MemoryAttributes, MemoryRegion, ModuleCall, ModuleFault, PAGE_SIZE, Reply, TdxAnswer,
    TdxCommand, TdxData, TdxModule, Vcpu,
};
use gmemtest::uapi::kvm::{KVM_CAP_EXIT_HYPERCALL, KVM_MEMORY_ATTRIBUTE_PRIVATE};
use gmemtest::uapi::kvm_para::{KVM_HC_MAP_GPA_RANGE, KVM_MAP_GPA_RANGE_DECRYPTED, KVM_MAP_GPA_RANGE_ENCRYPTED};
use gmemtest::uapi::kvm_x86::{KVM_TDX_INIT_VCPU, KVM_TDX_MEASURE_MEMORY_REGION};
use gmemtest::{claim, claim_eq, claim_ok, skip};
use std::sync::Arc;

gmemtest::suite! {
    /// The SEAMCALLs that KVM makes (arch/x86/kvm/vmx/tdx.c, 6.16), operation by operation, entries of the guest and reads of
    /// metadata left out. They are the same on every kernel that maps 4 KiB pages, and in the model.
    pub static SUITE: tdx_calls needs [Vm, Tdx, GuestMemfd, ModuleInjection] {
        /// KVM_TDX_INIT_VM: MNG.CREATE, MNG.KEY.CONFIG, MNG.ADDCX for every control page, MNG.INIT (__tdx_td_init()). A
        /// failure is a TD that the module does not know as KVM does.
        initialization_of_a_td runs Alone;

        /// KVM_TDX_INIT_VCPU: VP.CREATE, VP.ADDCX for every control page, VP.INIT with the initial RCX and the vCPU's id as
        /// its x2APIC id (tdx_td_vcpu_init()). A failure is a vCPU that other vCPUs cannot address.
        initialization_of_a_vcpu runs Alone;

        /// KVM_TDX_FINALIZE_VM: MR.FINALIZE. A failure is a TD that never runs, or is measured twice.
        finalization runs Alone;

        /// The first page of a region is a MEM.SEPT.ADD for each table from the top down, then MEM.PAGE.AUG; the page beside
        /// it MEM.PAGE.AUG alone (tdx_sept_set_private_spte()). A failure maps at another level, or adds tables twice.
        mapping_a_page needs [PreFault] runs Alone;

        /// A busy MEM.PAGE.AUG or MEM.SEPT.ADD is made again until it is not. A failure ends a TD for a matter of timing.
        mapping_a_page_while_busy[MAPPING] needs [PreFault] runs Alone;

        /// Taking a page away is MEM.RANGE.BLOCK, MEM.TRACK, MEM.PAGE.REMOVE and PHYMEM.PAGE.WBINVD, page by page, whatever
        /// takes it (tdx_sept_remove_leaf_spte()). A failure gives a page back that a vCPU can still reach, or whose lines
        /// are in a cache.
        taking_pages_away[LOSSES] needs [PreFault] runs Alone;

        /// Before KVM_TDX_FINALIZE_VM no vCPU has run: MEM.TRACK is left out. A failure makes a call that the module
        /// refuses.
        taking_a_page_away_before_finalization runs Alone;

        /// MEM.RANGE.BLOCK, MEM.TRACK or MEM.PAGE.REMOVE that is busy is made once more, with every vCPU out of the guest
        /// (tdh_do_no_vcpus()). A failure ends a TD for a matter of timing, or tries for ever.
        taking_a_page_away_while_busy[REMOVING] needs [PreFault] runs Alone;

        /// After KEY.FREEID every page that is not private memory is reclaimed once: control pages of vCPUs, tables, control
        /// pages of the TD, and the TDR, which is the last and is written back. A failure leaks a page.
        taking_a_td_down runs Alone;

        /// A slot that is made asks nothing of the module; nor does its deletion while nothing is mapped. A failure maps what
        /// the guest has not touched.
        slot_alone_is_no_matter_of_the_module runs Alone;

        /// What the guest does: acceptance of a page that is not there is MEM.SEPT.ADD for tables, then MEM.PAGE.AUG before
        /// the acceptance that succeeds; its MapGPA to shared is, once user space converts, the calls that take a page away,
        /// and its accesses to the shared page are none; MapGPA back to private is none until the next acceptance. A failure
        /// is a guest whose conversions cost, or miss, calls.
        conversions_that_the_guest_asks_for needs [Guest, LazyAccept, MemoryAttributes, ExitHypercall] runs Alone;
    }
}

const MNG_ADDCX: u16 = 1;
const PAGE_ADD: u16 = 2;
const VP_ADDCX: u16 = 4;
const KEY_CONFIG: u16 = 8;
const VP_CREATE: u16 = 10;
const MR_EXTEND: u16 = 16;
const MR_FINALIZE: u16 = 17;
const KEY_FREEID: u16 = 20;
const MNG_INIT: u16 = 21;
const VP_INIT: u16 = 22;

/// VP.ENTER, VP.FLUSH, and reads and writes of metadata: MNG.RD, PHYMEM.PAGE.RDMD, VP.RD, VP.WR.
const LEFT_OUT: [u16; 6] = [0, 18, 11, 24, 26, 43];

/// TDX_OPERAND_BUSY of the S-EPT.
const BUSY: u64 = 0x8000_0200_0000_0092;
const PAGES: u64 = 4;

/// The module, and what it was asked since the last look.
struct Record {
    module: Arc<dyn TdxModule>,
    from: u64,
}

impl Record {
    fn start(cx: &Context) -> TestResult<Record> {
        let Some(module) = cx.machine().tdx_module() else {
            skip!(NoHardwareInjection, "the module does not show its calls");
        };
        claim_ok!(module.clear_faults());
        let from = claim_ok!(module.position());
        Ok(Record { module, from })
    }

    /// The calls since the last look.
    fn calls(&mut self) -> TestResult<Vec<ModuleCall>> {
        let mut calls = claim_ok!(self.module.calls_since(self.from));
        self.from = claim_ok!(self.module.position());
        calls.retain(|call| !call.guest && !LEFT_OUT.contains(&call.leaf));
        Ok(calls)
    }

    fn leaves(&mut self) -> TestResult<Vec<u16>> {
        Ok(self.calls()?.iter().map(|call| call.leaf).collect())
    }

    /// What is asked before is of no interest.
    fn forget(&mut self) -> TestResult {
        self.calls().map(drop)
    }
}

/// Runs of one leaf count once.
fn runs(calls: &[ModuleCall]) -> Vec<u16> {
    let mut leaves: Vec<u16> = calls.iter().map(|call| call.leaf).collect();
    leaves.dedup();
    leaves
}

fn initialization_of_a_td(cx: &Context) -> TestResult {
    let td = Td::bare(cx)?;
    td.split_irqchip()?;
    let init = td.configuration()?;
    let mut record = Record::start(cx)?;
    claim_eq!(td.init_vm(&init)?, TdxAnswer::OK, "KVM_TDX_INIT_VM");
    let calls = record.calls()?;
    claim_eq!(runs(&calls), [MNG_CREATE, KEY_CONFIG, MNG_ADDCX, MNG_INIT], "the calls: {calls:x?}");
    let tdr = calls[0].operands[0];
    let of_the_td = |call: &ModuleCall| call.operands[usize::from(call.leaf == MNG_ADDCX)] == tdr;
    claim!(calls.iter().all(of_the_td), "every call is about the TDR {tdr:#x}: {calls:x?}");
    claim!(calls.iter().all(|call| call.status == 0), "every call succeeds: {calls:x?}");
    Ok(())
}

fn initialization_of_a_vcpu(cx: &Context) -> TestResult {
    const RCX: u64 = 0x1234_5678_9abc_def0;
    let td = Td::initialized(cx)?;
    let _first = td.ready_vcpu(0)?;
    let mut vcpu = td.vcpu(1)?;
    let cpuid = td.vcpu_cpuid(&mut *vcpu)?;
    set_cpuid(&mut *vcpu, &cpuid)?;
    let mut record = Record::start(cx)?;
    let command = TdxCommand::new(KVM_TDX_INIT_VCPU, TdxData::Value(RCX));
    claim_eq!(gmemtest::harness::command_on(&mut *vcpu, command)?, TdxAnswer::OK, "KVM_TDX_INIT_VCPU");
    let calls = record.calls()?;
    claim_eq!(runs(&calls), [VP_CREATE, VP_ADDCX, VP_INIT], "the calls: {calls:x?}");
    let Some(init) = calls.last() else { gmemtest::fail!("there is no call") };
    claim_eq!(init.operands[0], calls[0].operands[0], "the TDVPR of TDH.VP.INIT");
    claim_eq!(init.operands[1], RCX, "the initial RCX");
    claim_eq!(init.operands[2] as u32, 1, "the x2APIC id");
    Ok(())
}

fn finalization(cx: &Context) -> TestResult {
    let td = Td::initialized(cx)?;
    let _vcpu = td.ready_vcpu(0)?;
    let mut record = Record::start(cx)?;
    claim_eq!(td.finalize()?, TdxAnswer::OK, "KVM_TDX_FINALIZE_VM");
    claim_eq!(record.leaves()?, [MR_FINALIZE], "the calls");
    Ok(())
}

/// A finalised TD with a slot of which nothing is mapped.
struct Scene {
    record: Record,
    vcpu: Box<dyn Vcpu>,
    memory: TdMemory,
    td: Td,
}

impl Scene {
    fn new(cx: &Context) -> TestResult<Scene> {
        let td = Td::initialized(cx)?;
        let vcpu = td.ready_vcpu(0)?;
        let memory = td.memory(cx, PAGES)?;
        claim_eq!(td.finalize()?, TdxAnswer::OK, "KVM_TDX_FINALIZE_VM");
        Ok(Scene { record: Record::start(cx)?, vcpu, memory, td })
    }

    fn prefault(&mut self, page: u64, pages: u64) -> TestResult {
        let done = self.vcpu.pre_fault(self.memory.gpa(page), pages * PAGE_SIZE, 0);
        claim_eq!((done.result, done.size), (Ok(()), 0), "KVM_PRE_FAULT_MEMORY of {pages} pages from {page}");
        Ok(())
    }

    fn punch(&self, page: u64, pages: u64) -> TestResult {
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        claim_ok!(self.memory.gmem.fallocate(mode, (page * PAGE_SIZE) as i64, (pages * PAGE_SIZE) as i64));
        Ok(())
    }

    fn busy(&self, leaf: u16, when: FaultWhen) -> TestResult {
        claim_ok!(self.record.module.add_fault(&ModuleFault::always(leaf, BUSY).when(when)));
        Ok(())
    }
}

/// Leaf and level of each call on the S-EPT.
fn levels(calls: &[ModuleCall]) -> Vec<(u16, u64)> {
    calls.iter().map(|call| (call.leaf, call.operands[0] & 7)).collect()
}

fn mapping_a_page(cx: &Context) -> TestResult {
    let mut scene = Scene::new(cx)?;
    scene.prefault(1, 1)?;
    let first = scene.record.calls()?;
    let expected = [(SEPT_ADD, 3), (SEPT_ADD, 2), (SEPT_ADD, 1), (PAGE_AUG, 0)];
    claim_eq!(levels(&first), expected, "the calls for the first page: {first:x?}");
    claim_eq!(first[3].operands[0], scene.memory.gpa(1), "the address of TDH.MEM.PAGE.AUG");
    scene.prefault(2, 1)?;
    claim_eq!(scene.record.leaves()?, [PAGE_AUG], "the calls for the page beside it");
    scene.prefault(1, 2)?;
    claim_eq!(scene.record.leaves()?, [0; 0], "the calls for pages that are mapped");
    Ok(())
}

const MAPPING: &[(&str, u16)] = &[("page_aug", PAGE_AUG), ("sept_add", SEPT_ADD)];

fn mapping_a_page_while_busy(cx: &Context, &leaf: &u16) -> TestResult {
    let mut scene = Scene::new(cx)?;
    scene.busy(leaf, FaultWhen::First(2))?;
    scene.prefault(0, 1)?;
    let expected = match leaf {
        PAGE_AUG => vec![SEPT_ADD, SEPT_ADD, SEPT_ADD, PAGE_AUG, PAGE_AUG, PAGE_AUG],
        _ => vec![SEPT_ADD, SEPT_ADD, SEPT_ADD, SEPT_ADD, SEPT_ADD, PAGE_AUG],
    };
    claim_eq!(scene.record.leaves()?, expected, "the calls, with leaf {leaf} busy twice");
    Ok(())
}

/// How the guest loses its pages.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Loss {
    Convert,
    PunchHole,
    DeleteSlot,
    Close,
}

const LOSSES: &[(&str, Loss)] = &[
    ("conversion", Loss::Convert),
    ("punch_hole", Loss::PunchHole),
    ("slot_deletion", Loss::DeleteSlot),
    ("close", Loss::Close),
];

/// The calls that take one page away.
const REMOVAL: [u16; 4] = [RANGE_BLOCK, TRACK, PAGE_REMOVE, WBINVD];

fn taking_pages_away(cx: &Context, &loss: &Loss) -> TestResult {
    let mut scene = Scene::new(cx)?;
    scene.prefault(0, 3)?;
    scene.record.forget()?;
    let mut gone = 3;
    match loss {
        Loss::Convert if cx.has(gmemtest::machine::Facility::InPlaceConversion) => {
            claim_ok!(scene.memory.gmem.convert(0, 2 * PAGE_SIZE, 0));
            gone = 2;
        }
        Loss::Convert => {
            let range = MemoryAttributes { address: scene.memory.gpa(0), size: 2 * PAGE_SIZE, attributes: 0, flags: 0 };
            claim_ok!(scene.td.vm.set_memory_attributes(&range));
            gone = 2;
        }
        Loss::PunchHole => {
            scene.punch(1, 3)?;
            gone = 2;
        }
        Loss::DeleteSlot => claim_ok!(scene.td.vm.set_memory_region(&MemoryRegion::deletion(Td::SLOT))),
        Loss::Close => {
            let Scene { mut record, vcpu, memory, td } = scene;
            drop(memory.gmem);
            let leaves = record.leaves()?;
            drop((vcpu, td));
            claim_eq!(leaves, REMOVAL.repeat(gone), "the calls for {gone} pages");
            return Ok(());
        }
    }
    claim_eq!(scene.record.leaves()?, REMOVAL.repeat(gone), "the calls for {gone} pages");
    Ok(())
}

fn taking_a_page_away_before_finalization(cx: &Context) -> TestResult {
    let td = Td::initialized(cx)?;
    let mut vcpu = td.ready_vcpu(0)?;
    let memory = td.memory(cx, PAGES)?;
    claim_eq!(init_mem_region(&mut *vcpu, &mut memory.region(0, 1), 0)?, Ok(()), "initial memory");
    let mut record = Record::start(cx)?;
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    claim_ok!(memory.gmem.fallocate(mode, 0, PAGE_SIZE as i64));
    claim_eq!(record.leaves()?, [RANGE_BLOCK, PAGE_REMOVE, WBINVD], "the calls");
    Ok(())
}

const REMOVING: &[(&str, u16)] = &[("range_block", RANGE_BLOCK), ("track", TRACK), ("page_remove", PAGE_REMOVE)];

fn taking_a_page_away_while_busy(cx: &Context, &leaf: &u16) -> TestResult {
    let mut scene = Scene::new(cx)?;
    scene.prefault(0, 2)?;
    scene.record.forget()?;
    scene.busy(leaf, FaultWhen::First(1))?;
    scene.punch(0, 2)?;
    let again = |&call: &u16| if call == leaf { vec![call, call] } else { vec![call] };
    let mut expected: Vec<u16> = REMOVAL.iter().flat_map(again).collect();
    expected.extend(REMOVAL);
    claim_eq!(scene.record.leaves()?, expected, "the calls for two pages, with leaf {leaf} busy once");
    claim_ok!(scene.td.vm.capability(0), "the VM lives");
    Ok(())
}

fn taking_a_td_down(cx: &Context) -> TestResult {
    let mut record = Record::start(cx)?;
    let td = Td::initialized(cx)?;
    let mut vcpu = td.ready_vcpu(0)?;
    let memory = td.memory(cx, PAGES)?;
    let flags = KVM_TDX_MEASURE_MEMORY_REGION;
    claim_eq!(init_mem_region(&mut *vcpu, &mut memory.region(0, 1), flags)?, Ok(()), "initial memory");
    claim_eq!(td.finalize()?, TdxAnswer::OK, "KVM_TDX_FINALIZE_VM");
    let built = record.calls()?;
    let control = |call: &&ModuleCall| matches!(call.leaf, MNG_CREATE | MNG_ADDCX | VP_CREATE | VP_ADDCX | SEPT_ADD);
    let page = |call: &ModuleCall| call.operands[if call.leaf == SEPT_ADD { 2 } else { 0 }];
    let mut given: Vec<u64> = built.iter().filter(control).map(page).collect();
    let Some(&tdr) = given.first() else { gmemtest::fail!("the TD has no pages: {built:x?}") };
    claim!(
        built.iter().any(|call| call.leaf == PAGE_ADD) && built.iter().any(|call| call.leaf == MR_EXTEND),
        "{built:x?}"
    );
    drop((vcpu, memory, td));
    let calls = record.calls()?;
    let Some(freed) = calls.iter().position(|call| call.leaf == KEY_FREEID) else {
        gmemtest::fail!("the key is not given back: {calls:x?}");
    };
    let after = &calls[freed + 1..];
    claim_eq!(runs(after), [RECLAIM, WBINVD], "the calls after TDH.MNG.KEY.FREEID: {after:x?}");
    let mut reclaimed: Vec<u64> =
        after.iter().filter(|call| call.leaf == RECLAIM).map(|call| call.operands[0]).collect();
    claim_eq!(reclaimed.last(), Some(&tdr), "the page that is reclaimed last");
    reclaimed.sort_unstable();
    given.sort_unstable();
    claim_eq!(reclaimed, given, "the pages that are reclaimed, against those that were given");
    Ok(())
}

fn slot_alone_is_no_matter_of_the_module(cx: &Context) -> TestResult {
    let td = Td::initialized(cx)?;
    let _vcpu = td.ready_vcpu(0)?;
    claim_eq!(td.finalize()?, TdxAnswer::OK, "KVM_TDX_FINALIZE_VM");
    let mut record = Record::start(cx)?;
    let memory = td.memory(cx, PAGES)?;
    claim_ok!(memory.gmem.allocate(0, PAGES * PAGE_SIZE));
    claim_eq!(record.leaves()?, [0; 0], "the calls for a slot of allocated, private memory");
    claim_ok!(td.vm.set_memory_region(&MemoryRegion::deletion(Td::SLOT)));
    claim_eq!(record.leaves()?, [0; 0], "the calls for the slot's deletion");
    Ok(())
}

/// Calls of the host, runs of one leaf once, and the guest's acceptances that succeeded.
fn host_and_acceptances(record: &mut Record) -> TestResult<Vec<&'static str>> {
    let calls = claim_ok!(record.module.calls_since(record.from));
    record.from = claim_ok!(record.module.position());
    let name = |call: &ModuleCall| match (call.guest, call.leaf) {
        (true, ACCEPT) if call.status == 0 => Some("accept"),
        (true, _) => None,
        (false, SEPT_ADD) => Some("SEPT.ADD"),
        (false, PAGE_AUG) => Some("PAGE.AUG"),
        (false, RANGE_BLOCK) => Some("RANGE.BLOCK"),
        (false, TRACK) => Some("TRACK"),
        (false, PAGE_REMOVE) => Some("PAGE.REMOVE"),
        (false, WBINVD) => Some("PAGE.WBINVD"),
        (false, leaf) if LEFT_OUT.contains(&leaf) => None,
        (false, _) => Some("another leaf"),
    };
    let mut names: Vec<&str> = calls.iter().filter_map(name).collect();
    names.dedup();
    Ok(names)
}

/// TDG.MEM.PAGE.ACCEPT.
const ACCEPT: u16 = 6;

fn conversions_that_the_guest_asks_for(cx: &Context) -> TestResult {
    const REMOVED: [&str; 4] = ["RANGE.BLOCK", "TRACK", "PAGE.REMOVE", "PAGE.WBINVD"];
    const NONE: [&str; 0] = [];
    let vm = GmemVm::private(cx, 1)?;
    claim_ok!(vm.vm.enable_capability(KVM_CAP_EXIT_HYPERCALL, [1 << KVM_HC_MAP_GPA_RANGE, 0, 0, 0]));
    let mut vcpu = vm.vcpu(0)?;
    let accept = GuestOp::Accept { gpa: vm.gpa(0), len: PAGE_SIZE, level: 0 };
    let mut record = Record::start(cx)?;
    claim_eq!(vcpu.execute(accept), Exit::Done(0), "the first acceptance");
    claim_eq!(host_and_acceptances(&mut record)?, ["SEPT.ADD", "PAGE.AUG", "accept"], "the calls for it");
    for (attributes, given, expected) in [
        (0, KVM_MAP_GPA_RANGE_DECRYPTED, &REMOVED[..]),
        (KVM_MEMORY_ATTRIBUTE_PRIVATE, KVM_MAP_GPA_RANGE_ENCRYPTED, &NONE[..]),
    ] {
        let exit = vcpu.execute(GuestOp::MapGpa { gpa: vm.gpa(0), pages: 1, attributes: given });
        claim!(matches!(exit, Exit::Hypercall { .. }), "MapGPA asks user space: {exit:x?}");
        claim_eq!(host_and_acceptances(&mut record)?, NONE, "the calls for MapGPA, attributes {given:#x}");
        vm.set_attributes(0, PAGE_SIZE, attributes)?;
        claim_eq!(host_and_acceptances(&mut record)?, expected, "the calls for the conversion to {attributes:#x}");
        claim_eq!(vcpu.resume(Reply::Hypercall(0)), Exit::Done(0), "the guest's status");
        if attributes == 0 {
            let shared = vm.gpa(0) | vm.vm.shared_bit();
            claim_eq!(vcpu.execute(GuestOp::write_u64(shared, 1)), Exit::Done(0), "a store to the shared page");
        }
        claim_eq!(host_and_acceptances(&mut record)?, NONE, "the calls for the rest of it");
    }
    claim_eq!(vcpu.execute(accept), Exit::Done(0), "the second acceptance");
    claim_eq!(host_and_acceptances(&mut record)?, ["PAGE.AUG", "accept"], "the calls for it, with tables there");
    Ok(())
}

/// The stand-alone binary.
pub fn main() -> std::process::ExitCode {
    gmemtest::cli::selftest_main(&[&SUITE])
}
