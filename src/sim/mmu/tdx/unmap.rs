//! Taking a private page out of the S-EPT: BLOCK, TRACK, kick, REMOVE, WBINVD, with one retry after a kick when busy.

use super::map::level_of;
use super::seamcall::Answer;
use super::{Td, TdIds, TdState};
use crate::machine::{Errno, PAGE_SIZE};
use crate::sim::World;
use crate::sim::host::{Order, Pfn};
use crate::sim::mmu::VmId;
use crate::sim::mutant::Mutant;
use crate::sim::policy::Stuck;
use crate::sim::tdx_module::{Code, Leaf, Reg, Status};

/// A private page that could not be unmapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnmapError {
    /// First gfn of the mapping.
    pub gfn: u64,
    /// The leaf that failed.
    pub leaf: Leaf,
    /// Its status.
    pub status: Status,
}

impl UnmapError {
    /// What a call that can take an error returns.
    pub fn errno(&self) -> Errno {
        if self.leaf == Leaf::MemPageDemote { Errno::EIO } else { Errno::EFAULT }
    }
}

/// Whether the caller can take an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ZapContext {
    /// Punch hole and conversion: the caller returns it to user space.
    Fallible,
    /// Close, slot deletion, memory failure, the MMU notifier: the unmap must go on whatever happens.
    Void,
}

impl World {
    /// Unmaps the private pages of `first..last` from a TD.
    ///
    /// # Errors
    /// The first page that stays mapped, under a policy that reports it; every other policy deals with it and goes on.
    pub fn tdx_zap_private(&mut self, vm: VmId, first: u64, last: u64, context: ZapContext) -> Result<(), UnmapError> {
        let split = self.tdx_split_edges(vm, first, last);
        if context == ZapContext::Fallible {
            split?;
        }
        let Some(state) = self.vms.get(&vm) else { return Ok(()) };
        for gfn in state.mirror.in_range(first, last) {
            let Some((gfn, spte)) = self.vms[&vm].mirror.get(gfn) else { continue };
            if self.forgets_removal(first, last, gfn) {
                if let Some(state) = self.vms.get_mut(&vm) {
                    state.mirror.remove(gfn);
                }
                continue;
            }
            let removed = self.tdx_remove_leaf(vm, gfn, spte.pfn, spte.order);
            let Err(error) = removed else {
                if let Some(state) = self.vms.get_mut(&vm) {
                    state.mirror.remove(gfn);
                }
                self.policy_unmapped(vm, gfn, spte.pfn, spte.order);
                continue;
            };
            let stuck = Stuck { vm, gfn, pfn: spte.pfn, order: spte.order, error, context };
            if !self.mutant(Mutant::FailedUnmapIsForgotten) {
                self.policy_failed(&stuck)?;
            }
            if self.mutant(Mutant::StuckPageIsUnpinned) {
                self.policy_unmapped(vm, gfn, spte.pfn, spte.order);
            }
            if let Some(state) = self.vms.get_mut(&vm) {
                state.mirror.remove(gfn);
            }
        }
        Ok(())
    }

    /// kvm-bug=forget-remove: a table of the mirror that lies in the range as a whole is dropped without a word to TDX.
    fn forgets_removal(&self, first: u64, last: u64, gfn: u64) -> bool {
        let table = Order::Pmd.align_down(gfn);
        self.profile.kvm_bug.is_some() && table >= first && table + Order::Pmd.pages() <= last
    }

    /// tdx_sept_remove_leaf_spte: a leaf goes from the S-EPT, its frame becomes the host's again.
    fn tdx_remove_leaf(&mut self, vm: VmId, gfn: u64, pfn: Pfn, order: Order) -> Result<(), UnmapError> {
        let Some(td) = self.td_of(vm).map(Td::ids) else { return Ok(()) };
        let level = u64::from(level_of(order));
        let entry = [(Reg::Rcx, (gfn * PAGE_SIZE) | level), (Reg::Rdx, td.tdr)];
        let fail = |leaf: Leaf, answer: Answer| UnmapError { gfn, leaf, status: answer.status };
        if !self.mutant(Mutant::UnmapSkipsBlock) {
            let blocked = self.no_vcpus_call(vm, Leaf::MemRangeBlock, &entry);
            let again = blocked.status.is(Code::GpaRangeAlreadyBlocked) && self.policy_retries();
            if !blocked.status.is_zero() && !again {
                return Err(fail(Leaf::MemRangeBlock, blocked));
            }
        }
        if td.state == TdState::Runnable {
            self.tdx_track(vm, td);
        }
        let removed = self.no_vcpus_call(vm, Leaf::MemPageRemove, &entry);
        if !removed.status.is_zero() {
            return Err(fail(Leaf::MemPageRemove, removed));
        }
        let keyid_shift = 52 - self.tdx_host().module.platform().keyid_bits;
        let pages = if self.mutant(Mutant::UnmapSkipsWriteback) { 0 } else { order.pages() };
        for page in pfn..pfn + pages {
            let address = (page * PAGE_SIZE) | (u64::from(td.hkid) << keyid_shift);
            let written_back = self.tdh(Leaf::PhymemPageWbinvd, &[(Reg::Rcx, address)]);
            if !written_back.status.is_zero() {
                return Err(fail(Leaf::PhymemPageWbinvd, written_back));
            }
        }
        if self.tdx_host().module.switches().partial_write_erratum {
            self.tdx_host().module.host_reset(pfn * PAGE_SIZE, order.pages() * PAGE_SIZE);
        }
        Ok(())
    }

    /// tdx_track: a new TLB epoch, and every vCPU out of the old one. A failure bugs the VM, and the removal goes on.
    pub(super) fn tdx_track(&mut self, vm: VmId, td: TdIds) {
        if !self.mutant(Mutant::UnmapSkipsTrack) {
            let tracked = self.no_vcpus_call(vm, Leaf::MemTrack, &[(Reg::Rcx, td.tdr)]);
            if !tracked.status.is_zero() {
                self.tdx_bug_on(vm, Leaf::MemTrack, tracked.status);
            }
        }
        if !self.mutant(Mutant::UnmapSkipsKick) {
            self.kick_vcpus(vm);
        }
    }

    /// tdh_do_no_vcpus: when busy, every vCPU is kicked out and the call made once more.
    pub(super) fn no_vcpus_call(&mut self, vm: VmId, leaf: Leaf, operands: &[(Reg, u64)]) -> Answer {
        let answer = self.tdh(leaf, operands);
        let hard = !answer.is_busy() && !answer.status.is_zero() && self.mutant(Mutant::UnmapRetriesHardErrors);
        if (!answer.is_busy() && !hard) || self.mutant(Mutant::UnmapNeverRetries) {
            return answer;
        }
        self.kick_vcpus(vm);
        self.tdh(leaf, operands)
    }
}
