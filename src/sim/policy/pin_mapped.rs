//! `pin-mapped`: a reference for every page while it is mapped into the S-EPT (Linux 6.16 to 6.18).
//!
//! A page that cannot be removed keeps its reference, and so is leaked when its file lets go of it. The price is a reference
//! on every page that is in use, which a conversion cannot tell from somebody else's.

use super::{PrivatePage, Stuck, UnmapPolicy};
use crate::sim::World;
use crate::sim::host::Holder;
use crate::sim::mmu::tdx::UnmapError;

/// The policy.
#[derive(Debug)]
pub struct PinMapped;

impl UnmapPolicy for PinMapped {
    fn mapped(&self, world: &mut World, page: &PrivatePage) {
        world.host.frames.get(page.pfn, Holder::SeptPin, page.order.pages() as u32);
        world.costs.reference_updates += 1;
    }

    fn unmapped(&self, world: &mut World, page: &PrivatePage) {
        world.host.put(page.pfn, Holder::SeptPin, page.order.pages() as u32);
        world.costs.reference_updates += 1;
    }

    fn failed(&self, world: &mut World, stuck: &Stuck) -> Result<(), UnmapError> {
        world.tdx_bug_on(stuck.vm, stuck.error.leaf, stuck.error.status);
        Ok(())
    }
}
