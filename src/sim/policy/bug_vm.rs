//! `bug-vm`: the VM is bugged, and nothing else (Linux 6.19 and later, commit ce7b5695397b).
//!
//! The page is truncated, freed and handed out again although the module still owns it: a known and accepted window.

use super::{Stuck, UnmapPolicy};
use crate::sim::World;
use crate::sim::mmu::tdx::UnmapError;

/// The policy.
#[derive(Debug)]
pub struct BugVm;

impl UnmapPolicy for BugVm {
    fn failed(&self, world: &mut World, stuck: &Stuck) -> Result<(), UnmapError> {
        world.tdx_bug_on(stuck.vm, stuck.error.leaf, stuck.error.status);
        Ok(())
    }
}
