//! Splitting a huge S-EPT mapping: BLOCK, TRACK, kick, TDH.MEM.PAGE.DEMOTE, before a part of it can go.

use super::Td;
use super::map::level_of;
use super::unmap::UnmapError;
use crate::machine::{Errno, PAGE_SIZE};
use crate::sim::World;
use crate::sim::host::{Holder, Order};
use crate::sim::mmu::{Spte, VmId};
use crate::sim::mutant::Mutant;
use crate::sim::tdx_module::{Code, Leaf, Reg, Status};

/// How often an interrupted DEMOTE is started again.
const RESTARTS: u32 = 1000;

impl World {
    /// Splits the huge mappings that reach across an end of `first..last`: the head and the tail of the range.
    ///
    /// # Errors
    /// The mapping that could not be split; the VM is bugged.
    pub fn tdx_split_edges(&mut self, vm: VmId, first: u64, last: u64) -> Result<(), UnmapError> {
        let edges = match () {
            () if self.mutant(Mutant::SplitTailOnly) => vec![last],
            () if self.mutant(Mutant::SplitHeadOnly) => vec![first],
            () if self.mutant(Mutant::SplitAllMappings) => (first..=last).collect(),
            () => vec![first, last],
        };
        let inside = self.mutant(Mutant::SplitAllMappings);
        for edge in edges {
            let Some(state) = self.vms.get(&vm) else { return Ok(()) };
            let Some((gfn, spte)) = state.mirror.get(edge) else { continue };
            if (gfn < edge || inside) && spte.order != Order::Base {
                self.tdx_split_leaf(vm, gfn, spte)?;
            }
        }
        Ok(())
    }

    /// Splits one huge mapping into base pages.
    ///
    /// # Errors
    /// What failed; the VM is bugged.
    pub fn tdx_split_leaf(&mut self, vm: VmId, gfn: u64, spte: Spte) -> Result<(), UnmapError> {
        let Some(td) = self.td_of(vm).map(Td::ids) else { return Ok(()) };
        let level = level_of(spte.order);
        let rcx = (gfn * PAGE_SIZE) | u64::from(level);
        let entry = [(Reg::Rcx, rcx), (Reg::Rdx, td.tdr)];
        if !self.mutant(Mutant::SplitSkipsBlock) {
            let blocked = self.no_vcpus_call(vm, Leaf::MemRangeBlock, &entry).status;
            self.split_step(vm, gfn, Leaf::MemRangeBlock, blocked)?;
        }
        if let Err(status) = self.tdx_track(vm, td) {
            self.tdx_bug_on(vm, Leaf::MemTrack, status);
        }
        let (leaf, status) = (Leaf::MemPageDemote, Status::SUCCESS);
        let out_of_memory = UnmapError { gfn, leaf, status, errno: Errno::ENOMEM };
        let table = self.control_page().map_err(|_| out_of_memory)?;
        let operands = [(Reg::Rcx, rcx), (Reg::Rdx, td.tdr), (Reg::R8, table * PAGE_SIZE)];
        let mut status = self.no_vcpus_call(vm, Leaf::MemPageDemote, &operands).status;
        for _ in 0..RESTARTS {
            if !status.is(Code::InterruptedRestartable) || self.mutant(Mutant::SplitNeverRestarts) {
                break;
            }
            status = self.no_vcpus_call(vm, Leaf::MemPageDemote, &operands).status;
        }
        if !status.is_zero() {
            self.host.put(table, Holder::Control, 1);
        }
        self.split_step(vm, gfn, Leaf::MemPageDemote, status)?;
        let loses_dirty = self.mutant(Mutant::SplitMapsOnePage);
        let Some(state) = self.vms.get_mut(&vm) else { return Ok(()) };
        if let Some(td) = state.td.as_mut() {
            td.tables.insert((level, gfn), table);
        }
        state.mirror.remove(gfn);
        let pages = if loses_dirty { 1 } else { spte.order.pages() };
        state.mirror.set_run(gfn, Spte { pfn: spte.pfn, order: Order::Base, writable: true }, pages);
        self.splits += 1;
        Ok(())
    }

    fn split_step(&mut self, vm: VmId, gfn: u64, leaf: Leaf, status: Status) -> Result<(), UnmapError> {
        if status.is_zero() {
            return Ok(());
        }
        self.tdx_bug_on(vm, leaf, status);
        Err(UnmapError { gfn, leaf, status, errno: Errno::EIO })
    }

    /// The guest accepts below the level that is mapped, or wants to: the mapping is split, and the block stays split.
    ///
    /// # Errors
    /// As [`World::tdx_split_leaf`].
    pub fn tdx_split_for_accept(&mut self, vm: VmId, gfn: u64) -> Result<(), UnmapError> {
        let Some(state) = self.vms.get_mut(&vm) else { return Ok(()) };
        state.huge_inhibited.insert(Order::Pmd.align_down(gfn));
        match state.mirror.get(gfn) {
            Some((first, spte)) if spte.order != Order::Base => self.tdx_split_leaf(vm, first, spte),
            _ => Ok(()),
        }
    }
}
