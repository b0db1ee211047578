//! Installing private mappings: S-EPT tables from the top down, then TDH.MEM.PAGE.AUG, or PAGE.ADD before the TD runs.

use super::Td;
use crate::machine::{Errno, PAGE_SIZE};
use crate::sim::World;
use crate::sim::host::{Holder, Order, Pfn};
use crate::sim::mmu::fault::Fault;
use crate::sim::mmu::{Spte, VmId};
use crate::sim::tdx_module::{Leaf, Reg};

/// Level of a S-EPT entry that maps a folio: 0 for 4K.
pub const fn level_of(order: Order) -> u8 {
    match order {
        Order::Base => 0,
        Order::Pmd => 1,
        Order::Pud => 2,
    }
}

/// Level of the root's entries with four levels.
const ROOT_LEVEL: u8 = 3;

/// Pages that an entry of a level spans.
pub const fn level_pages(level: u8) -> u64 {
    1 << (9 * level)
}

/// How a page comes into a TD.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NewLeaf {
    /// TDH.MEM.PAGE.ADD: with the contents of a page of the host.
    Add {
        /// Its physical address.
        source: u64,
    },
    /// TDH.MEM.PAGE.AUG: PENDING until the guest accepts it.
    Aug,
}

impl World {
    /// The TD of a VM that has been initialised.
    pub(super) fn td_of(&self, vm: VmId) -> Option<&Td> {
        self.vms.get(&vm)?.td.as_ref()
    }

    /// Maps a frame at a private gfn: the mirror entry and the module's. The page is PENDING until the guest accepts it.
    ///
    /// # Errors
    /// [`Fault::Retry`] when the module was busy; EIO with the VM bugged for any other failure; ENOMEM.
    pub fn tdx_map_private(&mut self, vm: VmId, gfn: u64, pfn: Pfn, order: Order) -> Result<(), Fault> {
        self.tdx_map_leaf(vm, gfn, pfn, order, NewLeaf::Aug)
    }

    /// The same, by the given leaf.
    ///
    /// # Errors
    /// As for [`World::tdx_map_private`].
    pub(super) fn tdx_map_leaf(
        &mut self,
        vm: VmId,
        gfn: u64,
        pfn: Pfn,
        order: Order,
        new: NewLeaf,
    ) -> Result<(), Fault> {
        let leaf_level = level_of(order);
        for level in (leaf_level + 1..=ROOT_LEVEL).rev() {
            self.ensure_table(vm, gfn, level)?;
        }
        let tdr = self.td_of(vm).ok_or(Fault::Failed(Errno::EIO))?.tdr_pa();
        let bytes = order.pages() * PAGE_SIZE;
        self.tdx_host().module.host_flush(pfn * PAGE_SIZE, bytes);
        let mut operands =
            vec![(Reg::Rcx, (gfn * PAGE_SIZE) | u64::from(leaf_level)), (Reg::Rdx, tdr), (Reg::R8, pfn * PAGE_SIZE)];
        let leaf = match new {
            NewLeaf::Aug => Leaf::MemPageAug,
            NewLeaf::Add { source } => {
                operands.push((Reg::R9, source));
                Leaf::MemPageAdd
            }
        };
        let answer = self.tdh(leaf, &operands);
        if matches!(new, NewLeaf::Add { .. }) && self.profile.kernel.has_first_tdx_code() && !answer.status.is_zero() {
            return Err(Fault::Failed(if answer.is_busy() { Errno::EBUSY } else { Errno::EIO }));
        }
        if answer.is_busy() {
            return Err(Fault::Retry);
        }
        if !answer.status.is_zero() {
            self.tdx_bug_on(vm, leaf, answer.status);
            return Err(Fault::Failed(Errno::EIO));
        }
        if let Some(state) = self.vms.get_mut(&vm) {
            state.mirror.set(gfn, Spte { pfn, order, writable: true });
        }
        self.policy_mapped(vm, gfn, pfn, order);
        Ok(())
    }

    /// Gives the module a page for the table below an entry of `level`, when there is none.
    fn ensure_table(&mut self, vm: VmId, gfn: u64, level: u8) -> Result<(), Fault> {
        let first = gfn & !(level_pages(level) - 1);
        let td = self.td_of(vm).ok_or(Fault::Failed(Errno::EIO))?;
        if td.tables.contains_key(&(level, first)) {
            return Ok(());
        }
        let tdr = td.tdr_pa();
        let page = self.control_page().map_err(Fault::Failed)?;
        let operands =
            [(Reg::Rcx, (first * PAGE_SIZE) | u64::from(level)), (Reg::Rdx, tdr), (Reg::R8, page * PAGE_SIZE)];
        let answer = self.tdh(Leaf::MemSeptAdd, &operands);
        if answer.status.is_zero() {
            if let Some(td) = self.vms.get_mut(&vm).and_then(|state| state.td.as_mut()) {
                td.tables.insert((level, first), page);
            }
            return Ok(());
        }
        self.host.put(page, Holder::Control, 1);
        if answer.is_busy() {
            return Err(Fault::Retry);
        }
        self.tdx_bug_on(vm, Leaf::MemSeptAdd, answer.status);
        Err(Fault::Failed(Errno::EIO))
    }
}
