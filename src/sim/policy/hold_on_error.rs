//! `hold-on-error`: as many references as pages, taken when the unmap fails (the prototype of June 2025).
//!
//! The folio never reaches the allocator. Its references cannot be told from anybody else's, so that a conversion which looks
//! for them afterwards may also stumble over a speculative one.

use super::{Stuck, UnmapPolicy};
use crate::sim::World;
use crate::sim::gmem::InodeId;
use crate::sim::host::{Holder, Order, Pfn};
use crate::sim::mmu::tdx::UnmapError;

/// The policy.
#[derive(Debug)]
pub struct HoldOnError;

/// Adds a reference for every page of a mapping that the module would not give up.
pub fn tdx_hold_page_on_error(world: &mut World, pfn: Pfn, order: Order) {
    world.host.frames.get(pfn, Holder::StuckInModule, order.pages() as u32);
    world.costs.reference_updates += 1;
}

impl UnmapPolicy for HoldOnError {
    fn failed(&self, world: &mut World, stuck: &Stuck) -> Result<(), UnmapError> {
        world.tdx_bug_on(stuck.vm, stuck.error.leaf, stuck.error.status);
        tdx_hold_page_on_error(world, stuck.pfn, stuck.order);
        Ok(())
    }

    fn still_in_use(&self, world: &mut World, inode: InodeId, first: u64, last: u64) -> Option<u64> {
        world.host.drain_all_lru();
        world.costs.lru_drains += 1;
        for (index, pfn) in world.gmem_folios(inode, first, last) {
            // A page that was shared already is allowed to have users.
            if !world.gmem.inodes.get(&inode).is_some_and(|node| node.is_private(index.max(first))) {
                continue;
            }
            let pages = world.host.frames.extent(pfn).1 as u32;
            world.costs.reference_checks += 1;
            if world.look_at_refs(pfn) > pages {
                return Some(index.max(first));
            }
        }
        None
    }
}
