//! KVM's side: VMs with their memslots, attributes and page tables.
//!
//! [`vm`] is the VM and its life, [`slots`] KVM_SET_USER_MEMORY_REGION2, [`attributes`] KVM_SET_MEMORY_ATTRIBUTES,
//! [`roots`] the page tables, [`zap`] what takes mappings away, [`fault`] what installs them, [`prefault`]
//! KVM_PRE_FAULT_MEMORY, [`capabilities`] KVM_CHECK_EXTENSION and KVM_ENABLE_CAP, [`tdx`] the S-EPT behind the mirror root.

pub mod attributes;
pub mod capabilities;
pub mod fault;
pub mod prefault;
pub mod roots;
pub mod slots;
pub mod tdx;
#[cfg(test)]
mod tests;
pub mod vm;
pub mod zap;

pub use fault::Fault;
pub use roots::{Root, Spte};
pub use slots::{Region, RegionTarget, Slot, SlotKey, Slots};
pub use vm::{Vm, VmId};
pub use zap::ZapFilter;

/// Physical address bits of the model's CPU; a guest-physical address has as many.
pub const PHYS_BITS: u32 = 48;
/// kvm_mmu_max_gfn() with TDP.
pub const MAX_GFN: u64 = (1 << (PHYS_BITS - 12)) - 1;
