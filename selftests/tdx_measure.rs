//! What of a TD's initial memory is measured, and how: MRTD.

use gmemtest::harness::{Context, Td, TdMemory, TestResult, init_mem_region};
use gmemtest::machine::{
    Errno, FaultEffect, FaultWhen, ModuleCall, ModuleFault, PAGE_SIZE, TdxAnswer, TdxModule, Vcpu,
};
use gmemtest::uapi::kvm_x86::KVM_TDX_MEASURE_MEMORY_REGION;
use gmemtest::{claim, claim_eq, claim_ok, skip};
use sha2::{Digest, Sha384};
use std::sync::Arc;

gmemtest::suite! {
    /// KVM_TDX_INIT_MEM_REGION and KVM_TDX_FINALIZE_VM (6.16) as the TDX module sees them.
    pub static SUITE: tdx_measure needs [Vm, Tdx, GuestMemfd, ModuleInjection] {
        /// A measured page is one TDH.MEM.PAGE.ADD and sixteen TDH.MR.EXTEND of 256 bytes, in the order of its addresses;
        /// pages in the order of the calls (tdx_gmem_post_populate()). A failure gives the TD another MRTD than whoever
        /// checks it computes.
        page_is_added_then_extended_in_order runs Alone;

        /// An unmeasured page is one TDH.MEM.PAGE.ADD and no TDH.MR.EXTEND: its address is measured, its contents are not.
        /// A failure measures what may differ from start to start.
        unmeasured_page_is_added_only runs Alone;

        /// MRTD is the SHA-384 over the records of the calls: for an added page `MEM.PAGE.ADD` and the address, for each
        /// chunk `MR.EXTEND`, the address and its 256 bytes (TDX module specification). A failure means that the TD is
        /// not the one that was measured.
        mrtd_is_the_hash_of_the_records runs Alone;

        /// TDH.MEM.PAGE.ADD that finds an operand busy is tried again until it is not (kvm_tdp_mmu_map_private_pfn(), 6.19). A
        /// failure makes the start of a TD a matter of luck.
        busy_add_is_tried_again runs Alone;

        /// TDH.MEM.PAGE.ADD that fails otherwise is EIO, and the VM is dead. A failure goes on with a TD that lacks a page.
        failed_add_ends_the_vm allows ["SEAMCALL", "WARNING", "tdx"] runs Alone;

        /// TDH.MR.EXTEND that fails is EIO, and the VM is dead; the page stays added. A failure finalises a TD whose
        /// measurement lacks a part.
        failed_extend_ends_the_vm allows ["SEAMCALL", "WARNING", "tdx"] runs Alone;

        /// TDH.MR.FINALIZE that finds an operand busy is EBUSY with the status in hw_error, and can be made again
        /// (tdx_td_finalize()). A failure loses a TD that only had to wait.
        busy_finalization_can_be_repeated runs Alone;

        /// TDH.MR.FINALIZE that fails otherwise is EIO with the status in hw_error, and the VM is dead. A failure runs a TD
        /// that the module does not hold for complete.
        failed_finalization_ends_the_vm allows ["SEAMCALL", "WARNING", "tdx"] runs Alone;

        /// The module finds no contradiction in its own state after all of that. A failure is a defect of the module or
        /// of this test's machine.
        module_is_consistent runs Alone;
    }
}

const PAGE_ADD: u16 = 2;
const MR_EXTEND: u16 = 16;
const MR_FINALIZE: u16 = 17;
/// TDX_OPERAND_BUSY of the TDR.
const BUSY: u64 = 0x8000_0200_0000_0080;
/// TDX_OPERAND_INVALID of RCX.
const INVALID: u64 = 0xc000_0100_0000_0001;
const CHUNK: u64 = 256;
const PAGES: u64 = 4;

/// A TD that can be given memory, and the module under it.
struct Scene {
    vcpu: Box<dyn Vcpu>,
    memory: TdMemory,
    td: Td,
    module: Arc<dyn TdxModule>,
    /// Position of the module before the first page.
    start: u64,
}

impl Scene {
    fn new(cx: &Context) -> TestResult<Scene> {
        let Some(module) = cx.machine().tdx_module() else {
            skip!(NoHardwareInjection, "the module does not show its calls");
        };
        claim_ok!(module.clear_faults());
        let td = Td::initialized(cx)?;
        let vcpu = td.ready_vcpu(0)?;
        let memory = td.memory(cx, PAGES)?;
        let mut rng = cx.rng();
        for at in (0..PAGES * PAGE_SIZE).step_by(8) {
            claim_ok!(memory.source.write_u64(at, rng.next_u64()));
        }
        let start = claim_ok!(module.position());
        Ok(Scene { vcpu, memory, td, module, start })
    }

    fn add(&mut self, page: u64, pages: u64, flags: u32) -> TestResult<Result<(), Errno>> {
        init_mem_region(&mut *self.vcpu, &mut self.memory.region(page, pages), flags)
    }

    /// The calls that built the measurement so far: leaf and address.
    fn records(&self) -> TestResult<Vec<(u16, u64)>> {
        let measured = |call: &ModuleCall| !call.guest && matches!(call.leaf, PAGE_ADD | MR_EXTEND) && call.status == 0;
        let calls = claim_ok!(self.module.calls_since(self.start));
        Ok(calls.iter().filter(|call| measured(call)).map(|call| (call.leaf, call.operands[0])).collect())
    }

    /// The records of pages that are added, by this test's own reckoning.
    fn expected(&self, pages: impl IntoIterator<Item = u64>, flags: u32) -> Vec<(u16, u64)> {
        let mut records = Vec::new();
        for page in pages {
            let gpa = self.memory.gpa(page);
            records.push((PAGE_ADD, gpa));
            if flags & KVM_TDX_MEASURE_MEMORY_REGION != 0 {
                records.extend((0..PAGE_SIZE / CHUNK).map(|n| (MR_EXTEND, gpa + n * CHUNK)));
            }
        }
        records
    }

    fn fail(&self, leaf: u16, status: u64, when: FaultWhen) -> TestResult<u64> {
        let fault = ModuleFault { effect: FaultEffect::InsteadOf, ..ModuleFault::always(leaf, status).when(when) };
        Ok(claim_ok!(self.module.add_fault(&fault)))
    }

    /// Claims that every call on the VM is EIO. Until 6.18 it goes on: what failed was user space's request.
    fn is_ended(&self, cx: &Context) -> TestResult {
        if cx.by_release(&[((6, 16), true), ((6, 19), false)])? {
            claim_ok!(self.module.clear_faults());
            claim_ok!(self.td.vm.capability(0), "KVM_CHECK_EXTENSION of the VM");
            return Ok(());
        }
        self.is_dead()
    }

    /// Claims that every call on the VM is EIO.
    fn is_dead(&self) -> TestResult {
        claim_ok!(self.module.clear_faults());
        claim_eq!(self.td.vm.capability(0), Err(Errno::EIO), "KVM_CHECK_EXTENSION of the VM");
        claim_eq!(self.td.finalize()?, TdxAnswer::failed(Errno::EIO), "KVM_TDX_FINALIZE_VM");
        Ok(())
    }
}

fn page_is_added_then_extended_in_order(cx: &Context) -> TestResult {
    let mut scene = Scene::new(cx)?;
    claim_eq!(scene.add(2, 2, KVM_TDX_MEASURE_MEMORY_REGION)?, Ok(()), "adding the last two pages");
    claim_eq!(scene.add(0, 1, KVM_TDX_MEASURE_MEMORY_REGION)?, Ok(()), "adding the first page");
    let expected = scene.expected([2, 3, 0], KVM_TDX_MEASURE_MEMORY_REGION);
    claim_eq!(scene.records()?, expected, "the calls that are measured");
    Ok(())
}

fn unmeasured_page_is_added_only(cx: &Context) -> TestResult {
    let mut scene = Scene::new(cx)?;
    claim_eq!(scene.add(0, PAGES, 0)?, Ok(()), "adding every page");
    claim_eq!(scene.records()?, scene.expected(0..PAGES, 0), "the calls that are measured");
    Ok(())
}

fn mrtd_is_the_hash_of_the_records(cx: &Context) -> TestResult {
    let mut scene = Scene::new(cx)?;
    claim_eq!(scene.add(1, 2, KVM_TDX_MEASURE_MEMORY_REGION)?, Ok(()), "adding measured pages");
    claim_eq!(scene.add(0, 1, 0)?, Ok(()), "adding an unmeasured page");
    let mut expected = scene.expected([1, 2], KVM_TDX_MEASURE_MEMORY_REGION);
    expected.extend(scene.expected([0], 0));
    let mut hash = Sha384::new();
    for (leaf, gpa) in expected {
        let name = if leaf == PAGE_ADD { "MEM.PAGE.ADD" } else { "MR.EXTEND" };
        let mut record = [0u8; 128];
        record[..name.len()].copy_from_slice(name.as_bytes());
        record[16..24].copy_from_slice(&gpa.to_le_bytes());
        hash.update(record);
        if leaf == MR_EXTEND {
            let mut chunk = [0; CHUNK as usize];
            claim_ok!(scene.memory.source.read(gpa - Td::GPA, &mut chunk));
            hash.update(chunk);
        }
    }
    claim_eq!(scene.td.finalize()?, TdxAnswer::OK, "KVM_TDX_FINALIZE_VM");
    let calls = claim_ok!(scene.module.calls_since(scene.start));
    let Some(finalize) = calls.iter().find(|call| call.leaf == MR_FINALIZE && !call.guest) else {
        gmemtest::fail!("KVM_TDX_FINALIZE_VM has made no TDH.MR.FINALIZE");
    };
    let mrtd = match scene.module.measurement(finalize.operands[0]) {
        Err(Errno::ENOSYS) => skip!(NoHardwareInjection, "the module under this machine does not show MRTD"),
        mrtd => claim_ok!(mrtd),
    };
    let expected: [u8; 48] = hash.finalize().into();
    claim_eq!(mrtd.map(hex).concat(), expected.map(hex).concat(), "MRTD");
    Ok(())
}

fn hex(byte: u8) -> String {
    format!("{byte:02x}")
}

fn busy_add_is_tried_again(cx: &Context) -> TestResult {
    let mut scene = Scene::new(cx)?;
    let fault = scene.fail(PAGE_ADD, BUSY, FaultWhen::First(3))?;
    // Until 6.18 KVM leaves it to user space, which can do nothing about it: the folio counts as prepared.
    if cx.by_release(&[((6, 16), true), ((6, 19), false)])? {
        claim_eq!(scene.add(0, 2, 0)?, Err(Errno::EBUSY), "adding two pages, busy");
        claim_eq!(scene.add(0, 2, 0)?, Err(Errno::EEXIST), "adding them again");
        claim_eq!(claim_ok!(scene.module.fault_hits(fault)), 1, "calls that found the operand busy");
        return Ok(());
    }
    claim_eq!(scene.add(0, 2, 0)?, Ok(()), "adding two pages, busy three times");
    claim_eq!(claim_ok!(scene.module.fault_hits(fault)), 3, "calls that found the operand busy");
    claim_eq!(scene.records()?, scene.expected(0..2, 0), "the calls that are measured");
    Ok(())
}

fn failed_add_ends_the_vm(cx: &Context) -> TestResult {
    let mut scene = Scene::new(cx)?;
    scene.fail(PAGE_ADD, INVALID, FaultWhen::Nth(2))?;
    let mut region = scene.memory.region(0, 3);
    claim_eq!(init_mem_region(&mut *scene.vcpu, &mut region, 0)?, Err(Errno::EIO), "adding three pages");
    claim_eq!(region, scene.memory.region(1, 2), "what is left");
    scene.is_ended(cx)
}

fn failed_extend_ends_the_vm(cx: &Context) -> TestResult {
    let mut scene = Scene::new(cx)?;
    let fault = scene.fail(MR_EXTEND, INVALID, FaultWhen::Nth(5))?;
    claim_eq!(scene.add(0, 2, KVM_TDX_MEASURE_MEMORY_REGION)?, Err(Errno::EIO), "adding two measured pages");
    claim_eq!(claim_ok!(scene.module.fault_hits(fault)), 1, "calls that failed");
    let expected = scene.expected([0], KVM_TDX_MEASURE_MEMORY_REGION);
    claim_eq!(scene.records()?, expected[..5].to_vec(), "the calls that are measured");
    scene.is_ended(cx)
}

fn busy_finalization_can_be_repeated(cx: &Context) -> TestResult {
    let scene = Scene::new(cx)?;
    scene.fail(MR_FINALIZE, BUSY, FaultWhen::First(1))?;
    let answer = scene.td.finalize()?;
    claim_eq!((answer.result, answer.hw_error.0), (Err(Errno::EBUSY), BUSY), "KVM_TDX_FINALIZE_VM, busy");
    claim_eq!(scene.td.finalize()?, TdxAnswer::OK, "KVM_TDX_FINALIZE_VM again");
    Ok(())
}

fn failed_finalization_ends_the_vm(cx: &Context) -> TestResult {
    let scene = Scene::new(cx)?;
    scene.fail(MR_FINALIZE, INVALID, FaultWhen::First(1))?;
    let answer = scene.td.finalize()?;
    claim_eq!((answer.result, answer.hw_error.0), (Err(Errno::EIO), INVALID), "KVM_TDX_FINALIZE_VM, failing");
    scene.is_dead()
}

fn module_is_consistent(cx: &Context) -> TestResult {
    let mut scene = Scene::new(cx)?;
    claim_eq!(scene.add(0, PAGES, KVM_TDX_MEASURE_MEMORY_REGION)?, Ok(()), "adding every page");
    claim_eq!(scene.td.finalize()?, TdxAnswer::OK, "KVM_TDX_FINALIZE_VM");
    let violations = claim_ok!(scene.module.violations());
    claim!(violations.is_empty(), "with the TD: {violations:?}");
    let Scene { vcpu, memory, td, module, .. } = scene;
    drop((vcpu, memory, td));
    let violations = claim_ok!(module.violations());
    claim!(violations.is_empty(), "without it: {violations:?}");
    Ok(())
}

/// The stand-alone binary.
pub fn main() -> std::process::ExitCode {
    gmemtest::cli::selftest_main(&[&SUITE])
}
