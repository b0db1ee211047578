//! `gfn-count`: guest_memfd counts the mappings of every GFN, at 4K granularity, and raises real references from the count
//! before it lets a page go.
//!
//! KVM only reports; guest_memfd keeps the books, so that an unmap which KVM forgot to pass on to TDX is noticed too. It
//! needs no struct page while a page is in use. The price is a count for every page that is mapped.

use super::{PrivatePage, Stuck, UnmapPolicy};
use crate::sim::World;
use crate::sim::gmem::InodeId;
use crate::sim::host::{Holder, Pfn};
use crate::sim::mmu::VmId;
use crate::sim::mmu::tdx::UnmapError;

/// The policy.
#[derive(Debug)]
pub struct GfnCount;

impl World {
    /// `nr` pages from `gfn` on were mapped into a guest's S-EPT.
    pub fn guest_memfd_add_page_ref_count(&mut self, vm: VmId, gfn: u64, nr: u64) {
        self.change_page_ref_count(vm, gfn, nr, 1);
    }

    /// `nr` pages from `gfn` on were taken out of a guest's S-EPT.
    pub fn guest_memfd_dec_page_ref_count(&mut self, vm: VmId, gfn: u64, nr: u64) {
        self.change_page_ref_count(vm, gfn, nr, -1);
    }

    fn change_page_ref_count(&mut self, vm: VmId, gfn: u64, nr: u64, delta: i32) {
        let slot = self.vms.get(&vm).and_then(|state| state.slots.at(gfn));
        let Some((file, index)) = slot.and_then(|(_, slot)| Some((slot.bound?, slot.pgoff + (gfn - slot.base_gfn))))
        else {
            return;
        };
        let inode = self.gmem.files.get(&file).map(|open| open.inode);
        if let Some(node) = inode.and_then(|inode| self.gmem.inodes.get_mut(&inode)) {
            for (first, last, count) in node.mapped_counts.pieces(index, index + nr) {
                node.mapped_counts.set(first, last, count.saturating_add_signed(delta));
            }
        }
        self.costs.counter_updates += nr;
    }
}

impl UnmapPolicy for GfnCount {
    fn mapped(&self, world: &mut World, page: &PrivatePage) {
        world.guest_memfd_add_page_ref_count(page.vm, page.gfn, page.order.pages());
    }

    fn unmapped(&self, world: &mut World, page: &PrivatePage) {
        world.guest_memfd_dec_page_ref_count(page.vm, page.gfn, page.order.pages());
    }

    fn failed(&self, world: &mut World, stuck: &Stuck) -> Result<(), UnmapError> {
        world.tdx_bug_on(stuck.vm, stuck.error.leaf, stuck.error.status);
        Ok(())
    }

    fn before_release(&self, world: &mut World, inode: InodeId, index: u64, pfn: Pfn) {
        let pages = world.host.frames.extent(pfn).1;
        let Some(node) = world.gmem.inodes.get_mut(&inode) else { return };
        let counted: u64 = node
            .mapped_counts
            .pieces(index, index + pages)
            .iter()
            .map(|(a, b, count)| (b - a) * u64::from(*count))
            .sum();
        node.mapped_counts.set(index, index + pages, 0);
        if counted > 0 {
            world.host.frames.get(pfn, Holder::StuckInModule, counted as u32);
            world.costs.reference_updates += 1;
        }
    }

    fn ignores_release(&self, world: &World, inode: InodeId, index: u64, pages: u64) -> bool {
        world.gmem.inodes.get(&inode).is_none_or(|node| node.mapped_counts.all(index, index + pages, 0))
    }

    fn still_in_use(&self, world: &mut World, inode: InodeId, first: u64, last: u64) -> Option<u64> {
        world.costs.counter_checks += world.gmem_cached_pages(inode, first, last);
        let node = world.gmem.inodes.get(&inode)?;
        node.mapped_counts.pieces(first, last).into_iter().find(|(.., count)| *count > 0).map(|(index, ..)| index)
    }
}
