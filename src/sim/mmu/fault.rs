//! Guest page faults: from a gfn to a mapping, or to an exit.

use super::super::World;
use super::super::gmem::fault::Access;
use super::super::host::{Cpu, Flags, Order};
use super::super::mutant::Mutant;
use super::super::schedule::{Lock, RaceDefect, SchedulePoint};
use super::{Slot, Spte, VmId};
use crate::machine::{Errno, Exit, PAGE_SIZE, VmType};
use crate::uapi::kvm::{KVM_MEM_READONLY, KVM_MEMORY_ATTRIBUTE_PRIVATE};

/// Why a fault did not end in a mapping.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// No slot, or a store to a read-only one: the access is emulated.
    Mmio,
    /// KVM_EXIT_MEMORY_FAULT with this errno.
    Memory {
        /// What KVM_RUN returns.
        errno: Errno,
        /// KVM_MEMORY_EXIT_FLAG_PRIVATE.
        private: bool,
    },
    /// KVM_RUN fails with this errno and no exit.
    Failed(Errno),
    /// Nothing happened: the access is to be tried again.
    Retry,
    /// Another exit.
    Exit(Box<Exit>),
}

impl Fault {
    /// Another exit.
    pub fn exit(exit: Exit) -> Fault {
        Fault::Exit(Box::new(exit))
    }
}

/// Whether a fault is an access of the guest or KVM_PRE_FAULT_MEMORY.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// The guest.
    Guest,
    /// KVM_PRE_FAULT_MEMORY.
    PreFault,
}

/// A guest access to one page, as KVM sees it.
#[derive(Clone, Copy, Debug)]
pub struct Request {
    /// The page, without a TD's shared bit.
    pub gfn: u64,
    /// Whether it goes to private memory.
    pub private: bool,
    /// What the access does.
    pub access: Access,
    /// Who asks.
    pub origin: Origin,
}

impl World {
    /// Whether a gfn is private: by the VM's attribute, or by its guest_memfd where that keeps it.
    pub fn gfn_is_private(&self, vm: VmId, gfn: u64) -> bool {
        let Some(state) = self.vms.get(&vm) else { return false };
        if !self.profile.kernel.converts_in_place() {
            return state.attributes.get(gfn) & KVM_MEMORY_ATTRIBUTE_PRIVATE != 0;
        }
        let Some((_, slot)) = state.slots.at(gfn).filter(|_| state.vm_type.has_private_memory()) else { return false };
        let node = slot.file.and_then(|file| self.gmem.inode_of(file));
        node.is_some_and(|node| node.is_private(slot.pgoff + (gfn - slot.base_gfn)))
    }

    /// Handles a fault: installs a mapping and returns it with its first gfn.
    ///
    /// # Errors
    /// [`Fault`].
    pub fn handle_fault(&mut self, vm: VmId, request: Request) -> Result<(u64, Spte), Fault> {
        let Request { gfn, private, access, .. } = request;
        let memory_fault = |errno| Fault::Memory { errno, private };
        let state = self.vms.get(&vm).ok_or(Fault::Failed(Errno::EIO))?;
        // KVM's own fault does not come through such an entry, and finds the slot.
        if !private && request.origin != Origin::PreFault && state.mmio.contains(&gfn) {
            return Err(Fault::Mmio);
        }
        if state.vm_type.has_private_memory()
            && private != self.gfn_is_private(vm, gfn)
            && !self.mutant(Mutant::GuestIgnoresSide)
        {
            return Err(memory_fault(Errno::EFAULT));
        }
        let Some((_, slot)) = state.slots.at(gfn) else {
            if private {
                return Err(memory_fault(Errno::EFAULT));
            }
            if let Some(state) = self.vms.get_mut(&vm).filter(|state| state.has_mirror()) {
                state.mmio.insert(gfn);
            }
            return Err(Fault::Mmio);
        };
        // A private mapping that is there is not made again: a spurious fault.
        if private && state.mirror.get(gfn).is_some() {
            return Err(Fault::Retry);
        }
        let slot = slot.clone();
        let seq = state.invalidate_seq;
        let uses_gmem = (private && !self.mutant(Mutant::PrivateUsesSharedSide)) || slot.gmem_only;
        let (first, spte) = if uses_gmem {
            if !slot.has_gmem() {
                return Err(memory_fault(Errno::EFAULT));
            }
            let index = slot.pgoff + (gfn - slot.base_gfn);
            let pfn = self.gmem_get_pfn(slot.file, index).map_err(memory_fault)?;
            let order = self.max_gmem_order(vm, &slot, gfn, pfn);
            let first = order.align_down(gfn);
            (first, Spte { pfn: pfn - (gfn - first), order, writable: true })
        } else {
            self.shared_side(vm, &slot, gfn, access)?
        };
        if self.scheduler.is_active() && self.interrupted_lookup(vm, gfn, seq) {
            return Err(Fault::Retry);
        }
        if spte.writable && self.host.frames.folio(spte.pfn).is_some() {
            self.host.frames.set_flags(spte.pfn, Flags::DIRTY);
        }
        if self.mutant(Mutant::SpteTakesReference) {
            self.host.frames.get(spte.pfn, super::super::host::Holder::Leak, 1);
        }
        if private && self.vms.get(&vm).is_some_and(|vm| vm.has_mirror()) {
            self.tdx_map_private(vm, first, spte.pfn, spte.order)?;
            return Ok((first, spte));
        }
        let state = self.vms.get_mut(&vm).expect("the VM was just found");
        state.direct.zap(first, first + spte.order.pages());
        state.direct.set(first, spte);
        // In the place of an MMIO entry, where there was one.
        state.mmio.remove(&gfn);
        Ok((first, spte))
    }

    /// Lets others run between the lookup of a fault and its install; the answer is whether the fault is stale
    /// (is_page_fault_stale), or cannot have the MMU lock.
    fn interrupted_lookup(&mut self, vm: VmId, gfn: u64, seq: u64) -> bool {
        self.schedule_point(SchedulePoint::FaultLookedUp, &[]);
        if self.unrest_at_lookup()
            && let Some(state) = self.vms.get_mut(&vm)
        {
            state.invalidate_seq += 1;
        }
        if self.scheduler.holds(Lock::Mmu(vm)) {
            return true;
        }
        let stale = self.vms.get(&vm).is_none_or(|state| {
            let inside = |(first, last): &(u64, u64)| (*first..*last).contains(&gfn);
            state.invalidate_seq != seq || state.invalidations.iter().any(inside)
        });
        stale && self.scheduler.defect != Some(RaceDefect::FaultIgnoresInvalidation)
    }

    /// Resolves a gfn through `userspace_addr`: GUP in the host process.
    fn shared_side(&mut self, vm: VmId, slot: &Slot, gfn: u64, access: Access) -> Result<(u64, Spte), Fault> {
        let read_only = slot.flags & KVM_MEM_READONLY != 0;
        if read_only && access == Access::Write {
            return Err(Fault::Mmio);
        }
        let hva = slot.hva(gfn);
        let pte = self.host_fault(hva, access, Cpu::Guest).map_err(|_| {
            if self.mutant(Mutant::SharedEfaultIsMemoryFault) {
                Fault::Memory { errno: Errno::EFAULT, private: false }
            } else {
                Fault::Failed(Errno::EFAULT)
            }
        })?;
        let vma = self.host.mm.vma_at(hva).copied();
        let writable = !read_only && vma.is_some_and(|vma| vma.prot & libc::PROT_WRITE != 0);
        let block = Order::Pmd.align_down(gfn);
        let pages = Order::Pmd.pages();
        let aligned_alike = (slot.userspace_addr / PAGE_SIZE) % pages == slot.base_gfn % pages;
        let inside = block >= slot.base_gfn && block + pages <= slot.end_gfn();
        let huge = pte.order == Order::Pmd && aligned_alike && inside && slot.dirty.is_none();
        if huge && !self.is_mixed(vm, block, block + pages) {
            return Ok((block, Spte { pfn: pte.pfn, order: Order::Pmd, writable }));
        }
        let page = hva / PAGE_SIZE % pte.order.pages();
        Ok((gfn, Spte { pfn: pte.pfn + page, order: Order::Base, writable }))
    }

    /// The largest size at which a page of a guest_memfd can be mapped: its folio's, as far as the slot, the attributes and,
    /// in a TD, what is mapped already allow.
    fn max_gmem_order(&self, vm: VmId, slot: &Slot, gfn: u64, pfn: u64) -> Order {
        let (_, pages) = self.host.frames.extent(pfn);
        let pages = match () {
            () if self.mutant(Mutant::HugeMappingIgnoresFolio) => pages.max(Order::Pmd.pages()),
            () if self.mutant(Mutant::HugeMapsSmall) => 1,
            () => pages,
        };
        let state = &self.vms[&vm];
        let is_td = state.has_mirror();
        let fits = |order: &Order| {
            let (block, size) = (order.align_down(gfn), order.pages());
            let inside = block >= slot.base_gfn && block + size <= slot.end_gfn();
            let alike = slot.pgoff % size == slot.base_gfn % size;
            let free = !is_td
                || (!state.mirror.maps_any(block, block + size)
                    && !state.huge_inhibited.contains(&block)
                    // A table stays in the S-EPT once it is there: KVM neither removes it nor promotes what it maps.
                    && !state.td.as_ref().is_some_and(|td| td.tables.contains_key(&(1, block))));
            size <= pages && inside && alike && free && !self.is_mixed(vm, block, block + size)
        };
        let largest: &[Order] = if is_td { &[Order::Pmd] } else { &[Order::Pud, Order::Pmd] };
        largest.iter().copied().find(fits).unwrap_or(Order::Base)
    }

    /// KVM_LPAGE_MIXED_FLAG of a block: its gfns do not all have the same attributes.
    fn is_mixed(&self, vm: VmId, first: u64, last: u64) -> bool {
        let state = &self.vms[&vm];
        state.vm_type != VmType::Default && state.attributes.pieces(first, last).len() > 1
    }
}
