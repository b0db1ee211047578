//! A TD from KVM_CREATE_VM to its last descriptor.

use gmemtest::harness::{Context, Td, TdMemory, TestResult, init_mem_region};
use gmemtest::machine::{
    Errno, Exit, GuestOp, HostMemory, MemoryRegion, ModuleCall, PAGE_SIZE, PageOwner, TdxAnswer, TdxModule, Vcpu, Vm,
    VmConfig,
};
use gmemtest::uapi::kvm::KVM_CAP_SPLIT_IRQCHIP;
use gmemtest::uapi::kvm_x86::KVM_TDX_MEASURE_MEMORY_REGION;
use gmemtest::{claim, claim_eq, claim_err, claim_ok, skip};
use std::sync::Arc;

gmemtest::suite! {
    /// The life of a TD (6.16): its steps in their order, and its end in any order.
    pub static SUITE: tdx_lifecycle needs [Vm, Tdx, GuestMemfd] {
        /// From KVM_CREATE_VM through initialisation, measured memory and finalisation to a guest that reads, accepts,
        /// writes and ends: every call succeeds. A failure means that nothing of TDX works here.
        td_lives_through_every_step needs [Guest] timeout 60;

        /// Slots may be made before KVM_TDX_INIT_VM; the memory in them is the TD's later. A failure forces VMMs to
        /// another order than that of other VMs.
        slots_may_come_first;

        /// A TD ends cleanly at whatever step it is: nothing is left to the kernel log. A failure leaks a key or pages.
        td_may_end_at_any_step[STEPS];

        /// Descriptors may be closed in any order; the last of them ends the TD. A failure is a use after free, or a TD that
        /// never ends.
        descriptors_may_be_closed_in_any_order[ORDERS];

        /// Pages that were the TD's are the host's again once its last descriptor is closed: initial memory, memory that
        /// was added later, tables and control pages, whatever the order of closing. A failure leaks what no other TD can
        /// use any more.
        every_page_is_given_back[ORDERS] needs [ModuleInjection] runs Alone;

        /// The end of a TD is its vCPUs' TDH.VP.FLUSH, TDH.MNG.VPFLUSHDONE, TDH.PHYMEM.CACHE.WB and TDH.MNG.KEY.FREEID in
        /// that order; private pages are removed before, control pages reclaimed after, the TDR last (tdx_mmu_release_hkid(),
        /// tdx_reclaim_td_control_pages()). A failure gives memory back that the module still writes to.
        end_has_its_order needs [ModuleInjection] runs Alone;

        /// Private key ids run out: ENOSPC (or EBUSY, of the misc cgroup), and one that a TD gives back can be used at
        /// once. A failure leaks key ids, or uses one twice.
        keys_run_out_and_come_back timeout 120 runs Alone;

        /// KVM_TDX_FINALIZE_VM of a TD without a vCPU is what the module says: TDX_NO_VCPUS in hw_error, EIO, and the VM is
        /// dead. A failure hides the module's answer.
        finalization_without_a_vcpu_ends_the_vm needs [ModuleInjection] allows ["SEAMCALL", "WARNING", "tdx"] runs Alone;

        /// KVM_CAP_SPLIT_IRQCHIP is EEXIST once it is enabled. A failure makes a second local APIC.
        split_irqchip_is_enabled_once;
    }
}

const PAGES: u64 = 4;

/// How far a TD comes before it ends.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd)]
enum Step {
    Created,
    Initialized,
    VcpuCreated,
    VcpuReady,
    MemoryAdded,
    Finalized,
    Prefaulted,
}

const STEPS: &[(&str, Step)] = &[
    ("created", Step::Created),
    ("initialized", Step::Initialized),
    ("vcpu_created", Step::VcpuCreated),
    ("vcpu_initialized", Step::VcpuReady),
    ("memory_added", Step::MemoryAdded),
    ("finalized", Step::Finalized),
    ("prefaulted", Step::Prefaulted),
];

/// A descriptor.
#[derive(Clone, Copy)]
enum Fd {
    Vm,
    Vcpu,
    Gmem,
}

const ORDERS: &[(&str, [Fd; 3])] = &[
    ("vm_vcpu_gmem", [Fd::Vm, Fd::Vcpu, Fd::Gmem]),
    ("vm_gmem_vcpu", [Fd::Vm, Fd::Gmem, Fd::Vcpu]),
    ("vcpu_vm_gmem", [Fd::Vcpu, Fd::Vm, Fd::Gmem]),
    ("vcpu_gmem_vm", [Fd::Vcpu, Fd::Gmem, Fd::Vm]),
    ("gmem_vm_vcpu", [Fd::Gmem, Fd::Vm, Fd::Vcpu]),
    ("gmem_vcpu_vm", [Fd::Gmem, Fd::Vcpu, Fd::Vm]),
];

/// A finalised TD with two pages of initial memory and two that were pre-faulted.
struct Whole {
    td: Td,
    vcpu: Box<dyn Vcpu>,
    memory: TdMemory,
}

impl Whole {
    fn new(cx: &Context) -> TestResult<Whole> {
        let td = Td::initialized(cx)?;
        let mut vcpu = td.ready_vcpu(0)?;
        let memory = td.memory(cx, PAGES)?;
        let flags = KVM_TDX_MEASURE_MEMORY_REGION;
        claim_eq!(init_mem_region(&mut *vcpu, &mut memory.region(0, 2), flags)?, Ok(()), "two pages of initial memory");
        claim_eq!(td.finalize()?, TdxAnswer::OK, "KVM_TDX_FINALIZE_VM");
        let rest = vcpu.pre_fault(memory.gpa(2), 2 * PAGE_SIZE, 0);
        claim_eq!((rest.result, rest.size), (Ok(()), 0), "pre-faulting the other two");
        Ok(Whole { td, vcpu, memory })
    }

    /// Closes the descriptors; the host's memory is unmapped at last.
    fn close(self, order: [Fd; 3]) {
        let Whole { td, vcpu, memory } = self;
        let TdMemory { gmem, shared, source, .. } = memory;
        let (mut td, mut vcpu, mut gmem) = (Some(td), Some(vcpu), Some(gmem));
        for fd in order {
            match fd {
                Fd::Vm => drop(td.take()),
                Fd::Vcpu => drop(vcpu.take()),
                Fd::Gmem => drop(gmem.take()),
            }
        }
        drop((shared, source));
    }
}

fn td_lives_through_every_step(cx: &Context) -> TestResult {
    let td = Td::with_payload(cx, 2)?;
    let mut vcpu = td.vcpu(0)?;
    let mut second = td.vcpu(1)?;
    let memory = td.memory(cx, PAGES)?;
    claim_ok!(memory.source.fill(0, PAGE_SIZE, 0x42));
    let flags = KVM_TDX_MEASURE_MEMORY_REGION;
    claim_eq!(init_mem_region(&mut *vcpu, &mut memory.region(0, 1), flags)?, Ok(()), "a page of initial memory");
    claim_eq!(td.finalize()?, TdxAnswer::OK, "KVM_TDX_FINALIZE_VM");
    let check = |byte| GuestOp::Check { gpa: memory.gpa(0), len: PAGE_SIZE, byte };
    claim_eq!(vcpu.execute(check(0x42)), Exit::Done(0), "the initial memory");
    let accept = GuestOp::Accept { gpa: memory.gpa(1), len: 3 * PAGE_SIZE, level: 0 };
    claim_eq!(vcpu.execute(accept), Exit::Done(0), "the status of accepting the other pages");
    claim_eq!(vcpu.execute(GuestOp::write_u64(memory.gpa(3), 7)), Exit::Done(0), "a store to one of them");
    claim_eq!(second.execute(GuestOp::read_u64(memory.gpa(3))), Exit::Done(7), "what the second vCPU finds there");
    let shared = memory.gpa(1) | td.vm.shared_bit();
    let fault = vcpu.execute(GuestOp::write_u64(shared, 9));
    claim!(matches!(fault, Exit::MemoryFault { flags: 0, .. }), "a shared access to a private page: {fault:?}");
    drop((vcpu, second, memory, td));
    claim_ok!(cx.machine().create_vm(VmConfig::Payload { vcpus: 1 }), "the next TD");
    Ok(())
}

fn slots_may_come_first(cx: &Context) -> TestResult {
    let td = Td::bare(cx)?;
    let memory = td.memory(cx, PAGES)?;
    td.split_irqchip()?;
    let init = td.configuration()?;
    claim_eq!(td.init_vm(&init)?, TdxAnswer::OK, "KVM_TDX_INIT_VM after the slot");
    let mut vcpu = td.ready_vcpu(0)?;
    claim_eq!(init_mem_region(&mut *vcpu, &mut memory.region(0, PAGES), 0)?, Ok(()), "memory of the slot");
    claim_eq!(td.finalize()?, TdxAnswer::OK, "KVM_TDX_FINALIZE_VM");
    Ok(())
}

fn td_may_end_at_any_step(cx: &Context, &last: &Step) -> TestResult {
    let end = |td: Td, rest: (Option<Box<dyn Vcpu>>, Option<TdMemory>)| -> TestResult {
        drop(td);
        drop(rest);
        Whole::new(cx).map(drop)
    };
    let td = if last == Step::Created { Td::bare(cx)? } else { Td::initialized(cx)? };
    if last <= Step::Initialized {
        return end(td, (None, None));
    }
    if last == Step::VcpuCreated {
        let vcpu = td.vcpu(0)?;
        return end(td, (Some(vcpu), None));
    }
    let mut vcpu = td.ready_vcpu(0)?;
    if last == Step::VcpuReady {
        return end(td, (Some(vcpu), None));
    }
    let memory = td.memory(cx, PAGES)?;
    claim_eq!(init_mem_region(&mut *vcpu, &mut memory.region(0, 2), 0)?, Ok(()), "initial memory");
    if last >= Step::Finalized {
        claim_eq!(td.finalize()?, TdxAnswer::OK, "KVM_TDX_FINALIZE_VM");
    }
    if last == Step::Prefaulted {
        claim_eq!(vcpu.pre_fault(memory.gpa(0), PAGES * PAGE_SIZE, 0).result, Ok(()), "pre-faulting");
    }
    end(td, (Some(vcpu), Some(memory)))
}

fn descriptors_may_be_closed_in_any_order(cx: &Context, &order: &[Fd; 3]) -> TestResult {
    for _ in 0..3 {
        Whole::new(cx)?.close(order);
    }
    Ok(())
}

/// The module, and its position.
fn module(cx: &Context) -> TestResult<(Arc<dyn TdxModule>, u64)> {
    let Some(module) = cx.machine().tdx_module() else {
        skip!(NoHardwareInjection, "the module does not show its calls");
    };
    claim_ok!(module.clear_faults());
    let start = claim_ok!(module.position());
    Ok((module, start))
}

const SEPT_ADD: u16 = 3;
const MNG_CREATE: u16 = 9;
const VP_FLUSH: u16 = 18;
const VPFLUSHDONE: u16 = 19;
const KEY_FREEID: u16 = 20;
const RECLAIM: u16 = 28;
const PAGE_REMOVE: u16 = 29;
const CACHE_WB: u16 = 40;

/// The physical page that a call gives to the module: by R8 where the page is mapped at an address, by RCX otherwise.
fn given_page(call: &ModuleCall) -> Option<u64> {
    /// TDH.MEM.PAGE.ADD and TDH.MEM.PAGE.AUG.
    const MAPPING: [u16; 3] = [2, SEPT_ADD, 6];
    /// TDH.MNG.ADDCX, TDH.VP.ADDCX, TDH.MNG.CREATE and TDH.VP.CREATE.
    const CONTROL: [u16; 4] = [1, 4, MNG_CREATE, 10];
    if call.guest || call.status != 0 {
        return None;
    }
    match call.leaf {
        leaf if MAPPING.contains(&leaf) => Some(call.operands[2]),
        leaf if CONTROL.contains(&leaf) => Some(call.operands[0]),
        _ => None,
    }
}

fn every_page_is_given_back(cx: &Context, &order: &[Fd; 3]) -> TestResult {
    let (module, start) = module(cx)?;
    let whole = Whole::new(cx)?;
    let calls = claim_ok!(module.calls_since(start));
    let frames: Vec<u64> = calls.iter().filter_map(given_page).map(|address| address / PAGE_SIZE).collect();
    claim!(frames.len() as u64 > PAGES + 3, "the TD has {} pages", frames.len());
    for &frame in &frames {
        let owner = claim_ok!(module.page_owner(frame));
        claim!(!owner.is_free(), "frame {frame:#x} of the TD is the module's: {owner:?}");
    }
    whole.close(order);
    let kept = |&frame: &u64| -> Option<(u64, PageOwner)> {
        let owner = module.page_owner(frame).ok()?;
        (!owner.is_free()).then_some((frame, owner))
    };
    let kept: Vec<_> = frames.iter().filter_map(kept).collect();
    claim!(kept.is_empty(), "frames that the module keeps: {kept:x?}");
    let violations = claim_ok!(module.violations());
    claim!(violations.is_empty(), "the module's invariants: {violations:?}");
    Ok(())
}

fn end_has_its_order(cx: &Context) -> TestResult {
    let (module, _) = module(cx)?;
    let whole = Whole::new(cx)?;
    let start = claim_ok!(module.position());
    whole.close([Fd::Vm, Fd::Vcpu, Fd::Gmem]);
    let calls = claim_ok!(module.calls_since(start));
    let made = |leaf: u16| -> Vec<u64> {
        calls.iter().filter(|call| !call.guest && call.leaf == leaf).map(|call| call.seq).collect()
    };
    claim_eq!(made(PAGE_REMOVE).len() as u64, PAGES, "TDH.MEM.PAGE.REMOVE calls");
    let stages = [PAGE_REMOVE, VPFLUSHDONE, CACHE_WB, KEY_FREEID, RECLAIM].map(made);
    for pair in stages.windows(2) {
        let (Some(last), Some(first)) = (pair[0].last(), pair[1].first()) else {
            gmemtest::fail!("a stage of the end is missing: {stages:?}");
        };
        claim!(last < first, "each stage of the end is over before the next begins: {stages:?}");
    }
    claim!(made(VP_FLUSH).iter().all(|seq| *seq < stages[1][0]), "vCPUs are flushed before TDH.MNG.VPFLUSHDONE");
    let failed: Vec<_> = calls.iter().filter(|call| call.status >> 63 == 1 && call.leaf != VP_FLUSH).collect();
    claim!(failed.is_empty(), "calls that failed: {failed:x?}");
    Ok(())
}

fn keys_run_out_and_come_back(cx: &Context) -> TestResult {
    const MANY: usize = 256;
    let mut tds: Vec<Td> = Vec::new();
    let refusal = loop {
        let td = Td::bare(cx)?;
        let init = td.configuration()?;
        let answer = td.init_vm(&init)?;
        match answer.result {
            Ok(()) if tds.len() >= MANY => skip!(NoHardware, "there are more than {MANY} private key ids"),
            Ok(()) => tds.push(td),
            Err(errno) => break (errno, td),
        }
    };
    let (errno, waiting) = refusal;
    claim!(matches!(errno, Errno::ENOSPC | Errno::EBUSY), "KVM_TDX_INIT_VM of TD {}: {errno}", tds.len());
    cx.note(format!("{} TDs had a key id at once", tds.len()));
    claim!(!tds.is_empty(), "one TD at least can be made");
    let init = waiting.configuration()?;
    claim_eq!(waiting.init_vm(&init)?, TdxAnswer::failed(errno), "the same again");
    tds.pop();
    claim_eq!(waiting.init_vm(&init)?, TdxAnswer::OK, "with a key id that was given back");
    Ok(())
}

fn finalization_without_a_vcpu_ends_the_vm(cx: &Context) -> TestResult {
    const NO_VCPUS: u64 = 0xc000_0609_0000_0000;
    module(cx)?;
    let td = Td::initialized(cx)?;
    let answer = td.finalize()?;
    claim_eq!((answer.result, answer.hw_error.0), (Err(Errno::EIO), NO_VCPUS), "KVM_TDX_FINALIZE_VM without a vCPU");
    claim_err!(td.vm.capability(0), Errno::EIO, "KVM_CHECK_EXTENSION afterwards");
    let memory = claim_ok!(cx.machine().host_memory(HostMemory::Anonymous, PAGE_SIZE));
    let slot = MemoryRegion::new(1, Td::GPA, PAGE_SIZE).at(memory.addr());
    claim_err!(td.vm.set_memory_region(&slot), Errno::EIO, "KVM_SET_USER_MEMORY_REGION2 afterwards");
    Ok(())
}

fn split_irqchip_is_enabled_once(cx: &Context) -> TestResult {
    let td = Td::initialized(cx)?;
    let again = td.vm.enable_capability(KVM_CAP_SPLIT_IRQCHIP, [24, 0, 0, 0]);
    claim_err!(again, Errno::EEXIST, "KVM_CAP_SPLIT_IRQCHIP again");
    let vm: &dyn Vm = &*td.vm;
    claim!(vm.shared_bit().is_power_of_two(), "the TD's SHARED bit is {:#x}", vm.shared_bit());
    Ok(())
}

/// The stand-alone binary.
pub fn main() -> std::process::ExitCode {
    gmemtest::cli::selftest_main(&[&SUITE])
}
