//! `poison`: a page that the module would not give up is marked as if its memory had failed.
//!
//! A conversion succeeds in name only: nobody can fault the page again, and it never reaches the allocator.

use super::{Stuck, UnmapPolicy};
use crate::sim::World;
use crate::sim::host::Flags;
use crate::sim::mmu::tdx::UnmapError;

/// The policy.
#[derive(Debug)]
pub struct Poison;

impl UnmapPolicy for Poison {
    fn failed(&self, world: &mut World, stuck: &Stuck) -> Result<(), UnmapError> {
        world.tdx_bug_on(stuck.vm, stuck.error.leaf, stuck.error.status);
        world.host.frames.set_flags(stuck.pfn, Flags::HWPOISON);
        Ok(())
    }
}
