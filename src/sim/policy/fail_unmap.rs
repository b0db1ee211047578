//! `fail-unmap`: the error goes up to the caller, who says at which offset it got stuck.
//!
//! Only punch hole and conversion can take an error; pages of the range that were removed before stay removed. Where the
//! unmap must go on (close, slot deletion, memory failure) the VM is bugged and the page is held, because somebody has to.

use super::hold_on_error::tdx_hold_page_on_error;
use super::{Stuck, UnmapPolicy};
use crate::sim::World;
use crate::sim::mmu::tdx::UnmapError;
use crate::sim::mmu::tdx::unmap::ZapContext;

/// The policy.
#[derive(Debug)]
pub struct FailUnmap;

impl UnmapPolicy for FailUnmap {
    fn failed(&self, world: &mut World, stuck: &Stuck) -> Result<(), UnmapError> {
        if stuck.context == ZapContext::Fallible {
            return Err(stuck.error);
        }
        world.tdx_bug_on(stuck.vm, stuck.error.leaf, stuck.error.status);
        tdx_hold_page_on_error(world, stuck.pfn, stuck.order);
        Ok(())
    }

    fn tries_again(&self) -> bool {
        true
    }
}
