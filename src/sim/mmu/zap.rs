//! Taking mappings away from guests, and what the host's unmapping means for them.

use super::super::World;
use super::super::host::mm::PoisonEntries;
use super::VmId;
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
    pub fn zap_gfns(&mut self, vm: VmId, first: u64, last: u64, filter: ZapFilter) {
        let Some(state) = self.vms.get_mut(&vm) else { return };
        state.invalidate_seq += 1;
        if filter.shared() || !state.has_mirror() {
            state.direct.zap(first, last);
        }
    }

    /// Unmaps `start..end` from the host process's page tables, and, through the MMU notifier, from every guest whose
    /// slots have their shared side there.
    pub fn unmap_host_range(&mut self, start: u64, end: u64, poison: PoisonEntries) {
        self.notify_guests(start, end);
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
            self.zap_gfns(vm, first, last, ZapFilter::Shared);
        }
    }
}
