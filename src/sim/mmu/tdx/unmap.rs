//! Taking a private page out of the S-EPT: BLOCK, TRACK, kick, REMOVE, WBINVD, with one retry after a kick when busy.

use super::boot::HOST_LP;
use super::map::level_of;
use super::seamcall::Answer;
use super::{Td, TdIds, TdState};
use crate::machine::{Errno, PAGE_SIZE};
use crate::sim::World;
use crate::sim::host::{Order, Pfn};
use crate::sim::mmu::VmId;
use crate::sim::mutant::Mutant;
use crate::sim::policy::Stuck;
use crate::sim::schedule::{Lock, SchedulePoint};
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
    /// What a call that can take an error returns: EFAULT when a page stays mapped, EIO when a huge mapping cannot be
    /// split, ENOMEM when there is no page for the table below it.
    pub errno: Errno,
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
        if context == ZapContext::Fallible && !self.mutant(Mutant::SplitFailureIgnored) {
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
            if self.mutant(Mutant::UnmapStopsAtFailure) {
                break;
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
        let fail = |leaf: Leaf, status: Status| UnmapError { gfn, leaf, status, errno: Errno::EFAULT };
        if !self.mutant(Mutant::UnmapSkipsBlock) {
            let blocked = self.no_vcpus_call(vm, Leaf::MemRangeBlock, &entry);
            let again = self.policy_retries();
            if again && blocked.status.is(Code::EptEntryStateIncorrect) {
                // Removed by an earlier try, and only not written back.
                return self.tdx_write_back(gfn, pfn, order, td.hkid);
            }
            let blocked_before = again && blocked.status.is(Code::GpaRangeAlreadyBlocked);
            if !blocked.status.is_zero() && !blocked_before {
                return Err(fail(Leaf::MemRangeBlock, blocked.status));
            }
        }
        self.schedule_point(SchedulePoint::ZapBlocked, &[Lock::Mmu(vm)]);
        if td.state == TdState::Runnable
            && let Err(status) = self.tdx_track(vm, td)
        {
            if self.policy_retries() {
                return Err(fail(Leaf::MemTrack, status));
            }
            self.tdx_bug_on(vm, Leaf::MemTrack, status);
        }
        self.schedule_point(SchedulePoint::ZapTracked, &[Lock::Mmu(vm)]);
        if self.mutant(Mutant::UnmapSkipsRemove) {
            return self.tdx_write_back(gfn, pfn, order, td.hkid);
        }
        let removed = self.no_vcpus_call(vm, Leaf::MemPageRemove, &entry);
        if !removed.status.is_zero() {
            return Err(fail(Leaf::MemPageRemove, removed.status));
        }
        self.tdx_write_back(gfn, pfn, order, td.hkid)
    }

    /// tdx_clear_page after the removal: TDH.PHYMEM.PAGE.WBINVD, and the quirk's reset of the page.
    fn tdx_write_back(&mut self, gfn: u64, pfn: Pfn, order: Order, hkid: u16) -> Result<(), UnmapError> {
        let keyid_shift = 52 - self.tdx_host().module.platform().keyid_bits;
        let keyed = |page: Pfn| (page * PAGE_SIZE) | (u64::from(hkid) << keyid_shift);
        let skips = self.mutant(Mutant::UnmapSkipsWriteback);
        if !skips && order == Order::Pmd && self.tdx_host().module.write_back_large_page(HOST_LP, keyed(pfn)) {
            self.tdx_reset_after_removal(pfn, order);
            return Ok(());
        }
        let pages = if skips { 0 } else { order.pages() };
        for page in pfn..pfn + pages {
            let written_back = self.tdh(Leaf::PhymemPageWbinvd, &[(Reg::Rcx, keyed(page))]);
            if !written_back.status.is_zero() {
                let (leaf, status) = (Leaf::PhymemPageWbinvd, written_back.status);
                return Err(UnmapError { gfn, leaf, status, errno: Errno::EFAULT });
            }
        }
        self.tdx_reset_after_removal(pfn, order);
        Ok(())
    }

    /// tdx_quirk_reset_paddr: only parts with the partial-write erratum need it.
    fn tdx_reset_after_removal(&mut self, pfn: Pfn, order: Order) {
        if self.tdx_host().module.switches().partial_write_erratum {
            self.tdx_host().module.host_reset(pfn * PAGE_SIZE, order.pages() * PAGE_SIZE);
        }
    }

    /// tdx_track: a new TLB epoch, and every vCPU out of the old one.
    ///
    /// # Errors
    /// What TDH.MEM.TRACK answered. KVM bugs the VM then and goes on with the removal.
    pub(super) fn tdx_track(&mut self, vm: VmId, td: TdIds) -> Result<(), Status> {
        let mut result = Ok(());
        if !self.mutant(Mutant::UnmapSkipsTrack) {
            let tracked = self.no_vcpus_call(vm, Leaf::MemTrack, &[(Reg::Rcx, td.tdr)]);
            if !tracked.status.is_zero() {
                result = Err(tracked.status);
            }
        }
        if !self.mutant(Mutant::UnmapSkipsKick) {
            self.kick_vcpus(vm);
        }
        result
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
