//! The machine in this process.
//!
//! A model of KVM, guest_memfd and the host's memory management, precise enough that one selftest gives the same
//! answer here and on a real kernel. [`World`] is the state behind one lock: [`host`] has frames, folios and the host
//! process's page tables, [`gmem`] the guest_memfd files, [`mmu`] the VMs with their slots, attributes and page tables,
//! [`policy`] the answers to a failed unmap, [`tdx_module`] the TDX module. [`machine`] puts the seam's traits on it.
//! [`schedule`] makes races reproducible, [`profile`] says which kernel it behaves like, [`mutant`] which defect is switched on.

pub mod combinations;
mod extent_map;
pub mod gmem;
pub mod host;
pub mod machine;
pub mod mmu;
pub mod mutant;
pub mod policy;
pub mod profile;
mod range_map;
pub mod schedule;
pub mod tdx_module;
mod world;

pub use extent_map::{Extent, ExtentMap};
pub use machine::SimMachine;
pub use mutant::Mutant;
pub use profile::{FrameModel, Kernel, KvmBug, Profile};
pub use range_map::RangeMap;
pub use world::World;
