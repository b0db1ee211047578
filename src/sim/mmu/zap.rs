//! Taking mappings away from guests, and what the host's unmapping means for them.

use super::super::World;
use super::super::host::Holder;
use super::super::host::mm::PoisonEntries;
use super::super::mutant::Mutant;
use super::VmId;
use super::tdx::UnmapError;
use super::tdx::unmap::ZapContext;
use crate::machine::PAGE_SIZE;

/// Which mappings an invalidation is about (KVM_FILTER_*). Only a VM with an S-EPT has page tables to choose from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ZapFilter {
    /// KVM_FILTER_PRIVATE: the mirror root.
    Private,
    /// KVM_FILTER_SHARED: the direct root.
    Shared,
    /// Both.
    Both,
}

impl ZapFilter {
    /// Whether private mappings go.
    pub fn private(self) -> bool {
        self != ZapFilter::Shared
    }

    /// Whether shared mappings go.
    pub fn shared(self) -> bool {
        self != ZapFilter::Private
    }
}

impl World {
    /// Unmaps `first..last` from a guest: one invalidation, which makes racing faults retry.
    ///
    /// # Errors
    /// The first private page that stays mapped, under a policy that reports it. Shared mappings always go.
    pub fn zap_gfns(
        &mut self,
        vm: VmId,
        first: u64,
        last: u64,
        filter: ZapFilter,
        context: ZapContext,
    ) -> Result<(), UnmapError> {
        let Some(state) = self.vms.get_mut(&vm) else { return Ok(()) };
        state.invalidate_seq += 1;
        let has_mirror = state.has_mirror();
        if filter.shared() || !has_mirror {
            state.direct.zap(first, last);
        }
        if filter.private() && has_mirror { self.tdx_zap_private(vm, first, last, context) } else { Ok(()) }
    }

    /// kvm_mmu_invalidate_begin: faults on `first..last` are tried again until [`World::invalidate_end`].
    pub fn invalidate_begin(&mut self, vm: VmId, first: u64, last: u64) {
        if let Some(state) = self.vms.get_mut(&vm) {
            state.invalidations.push((first, last));
        }
    }

    /// kvm_mmu_invalidate_end: faults that began before are tried again.
    pub fn invalidate_end(&mut self, vm: VmId, first: u64, last: u64) {
        let Some(state) = self.vms.get_mut(&vm) else { return };
        if let Some(at) = state.invalidations.iter().position(|range| *range == (first, last)) {
            state.invalidations.remove(at);
        }
        state.invalidate_seq += 1;
    }

    /// [`World::zap_gfns`] where nobody can take an error: no policy returns one then.
    pub fn zap_gfns_void(&mut self, vm: VmId, first: u64, last: u64, filter: ZapFilter) {
        let done = self.zap_gfns(vm, first, last, filter, ZapContext::Void);
        debug_assert!(done.is_ok(), "{done:?}");
    }

    /// Unmaps `start..end` from the host process's page tables, and, through the MMU notifier, from every guest whose
    /// slots have their shared side there.
    pub fn unmap_host_range(&mut self, start: u64, end: u64, poison: PoisonEntries) {
        self.notify_guests(start, end);
        if self.mutant(Mutant::HostUnmapLeaksReference)
            && let Some(pte) = self.host.mm.pte(start).filter(|pte| !pte.poisoned)
        {
            self.host.frames.get(pte.pfn, Holder::Leak, 1);
        }
        self.host.zap_ptes(start, end, poison);
    }

    /// The MMU notifier: a range of the host process's address space is about to change.
    pub fn notify_guests(&mut self, start: u64, end: u64) {
        let mut zaps = Vec::new();
        for (vm, state) in &self.vms {
            for (_, slot) in state.slots.iter() {
                let slot_end = slot.userspace_addr.saturating_add(slot.pages * PAGE_SIZE);
                let (from, to) = (start.max(slot.userspace_addr), end.min(slot_end));
                if from < to {
                    let first = slot.base_gfn + (from - slot.userspace_addr) / PAGE_SIZE;
                    zaps.push((*vm, first, first + (to - from).div_ceil(PAGE_SIZE)));
                }
            }
        }
        for (vm, first, last) in zaps {
            self.zap_gfns_void(vm, first, last, ZapFilter::Shared);
        }
    }
}
