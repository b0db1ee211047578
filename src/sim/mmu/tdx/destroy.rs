//! Taking a TD down: its key id, then every page that the module has of it. What cannot be reclaimed is leaked.

use crate::machine::PAGE_SIZE;
use crate::sim::World;
use crate::sim::host::{Holder, Pfn};
use crate::sim::mmu::VmId;
use crate::sim::mutant::Mutant;
use crate::sim::tdx_module::{Code, Leaf, Reg, Released};

/// How often CACHE.WB is resumed at most.
const CACHE_WB_TRIES: u32 = 10_000;

impl World {
    /// vt_vm_pre_destroy and vt_vm_destroy.
    pub fn tdx_destroy(&mut self, vm: VmId) {
        self.tdx_release_hkid(vm);
        let Some(td) = self.vms.get_mut(&vm).and_then(|state| state.td.take()) else { return };
        for vcpu in td.vcpus.values() {
            self.tdx_host().free_lps.push(vcpu.lp);
            for page in vcpu.tdcx.iter().chain([&vcpu.tdvpr]) {
                self.reclaim(*page);
            }
        }
        let skipped = if self.mutant(Mutant::TeardownKeepsTables) { td.tables.len() } else { 0 };
        for page in td.tables.values().skip(skipped).chain(&td.tdcs) {
            self.reclaim(*page);
        }
        if td.key_assigned || !self.tdh(Leaf::PhymemPageReclaim, &[(Reg::Rcx, td.tdr_pa())]).status.is_zero() {
            self.log.push(format!("TDR {:#x} leaked", td.tdr_pa()));
            return;
        }
        self.tdh(Leaf::PhymemPageWbinvd, &[(Reg::Rcx, td.tdr_pa())]);
        self.free_control(td.tdr);
    }

    /// tdx_mmu_release_hkid: the vCPUs leave their processors, the caches are written back, the key id is free again.
    fn tdx_release_hkid(&mut self, vm: VmId) {
        let Some(td) = self.vms.get(&vm).and_then(|state| state.td.clone()).filter(|td| td.key_assigned) else {
            return;
        };
        self.kick_vcpus(vm);
        for vcpu in td.vcpus.values() {
            let flushed = self.tdx_host().seamcall(vcpu.lp, Leaf::VpFlush, &[(Reg::Rcx, vcpu.tdvpr * PAGE_SIZE)]);
            if !flushed.status.is_zero() && !flushed.status.is(Code::VcpuNotAssociated) {
                self.tdx_bug_on(vm, Leaf::VpFlush, flushed.status);
            }
        }
        let tdr = [(Reg::Rcx, td.tdr_pa())];
        let done = self.tdh(Leaf::MngVpflushdone, &tdr).status;
        if done.is(Code::FlushvpNotDone) {
            return;
        }
        if !done.is_zero() {
            self.tdx_bug_on(vm, Leaf::MngVpflushdone, done);
            return;
        }
        for tries in 0..CACHE_WB_TRIES {
            let resume = u64::from(tries > 0);
            if !self.tdh(Leaf::PhymemCacheWb, &[(Reg::Rcx, resume)]).status.is(Code::InterruptedResumable) {
                break;
            }
        }
        let freed = self.tdh(Leaf::MngKeyFreeid, &tdr).status;
        if !freed.is_zero() {
            self.tdx_bug_on(vm, Leaf::MngKeyFreeid, freed);
            return;
        }
        self.tdx_host().free_hkids.push(td.hkid);
        if let Some(td) = self.vms.get_mut(&vm).and_then(|state| state.td.as_mut()) {
            td.key_assigned = false;
        }
    }

    /// tdx_reclaim_page: the module gives a page back, or it is leaked.
    fn reclaim(&mut self, page: Pfn) {
        let status = self.tdh(Leaf::PhymemPageReclaim, &[(Reg::Rcx, page * PAGE_SIZE)]).status;
        if status.is_zero() {
            self.free_control(page);
        } else {
            self.log.push(format!("page {:#x} leaked: {status}", page * PAGE_SIZE));
        }
    }

    fn free_control(&mut self, page: Pfn) {
        self.tdx_host().module.host_reset(page * PAGE_SIZE, PAGE_SIZE);
        self.host.put(page, Holder::Control, 1);
    }

    /// Takes every vCPU of a TD out of the guest (KVM_REQ_OUTSIDE_GUEST_MODE).
    pub(super) fn kick_vcpus(&mut self, vm: VmId) {
        let Some(td) = self.vms.get(&vm).and_then(|state| state.td.as_ref()) else { return };
        let running: Vec<_> = td.vcpus.values().map(|vcpu| (vcpu.lp, vcpu.tdvpr * PAGE_SIZE)).collect();
        for (lp, tdvpr) in running {
            if self.kick_waits_for_tdcall(lp)
                && let Ok(Released::Guest(outcome)) = self.tdx_host().module.release(lp)
            {
                self.tdcall_is_over(lp, outcome);
            }
            let module = &mut self.tdx_host().module;
            if module.running(lp) == Some(tdvpr) {
                // A processor whose guest has a TDCALL held half-way cannot be taken out of it.
                let _ = module.kick(lp);
            }
        }
    }
}
