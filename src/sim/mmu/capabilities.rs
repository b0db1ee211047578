//! KVM_CHECK_EXTENSION and KVM_ENABLE_CAP.

use super::super::World;
use super::super::profile::Kernel;
use super::VmId;
use super::slots::USER_SLOTS;
use crate::machine::{Errno, VmType};
use crate::uapi::kvm::{
    KVM_CAP_BINARY_STATS_FD, KVM_CAP_DISABLE_QUIRKS2, KVM_CAP_EXIT_HYPERCALL, KVM_CAP_GUEST_MEMFD,
    KVM_CAP_GUEST_MEMFD_FLAGS, KVM_CAP_GUEST_MEMFD_MEMORY_ATTRIBUTES_RFC_V5, KVM_CAP_MAX_VCPUS,
    KVM_CAP_MEMORY_ATTRIBUTES, KVM_CAP_MEMORY_FAULT_INFO, KVM_CAP_MULTI_ADDRESS_SPACE, KVM_CAP_NR_MEMSLOTS,
    KVM_CAP_PRE_FAULT_MEMORY, KVM_CAP_READONLY_MEM, KVM_CAP_SPLIT_IRQCHIP, KVM_CAP_USER_MEMORY2, KVM_CAP_VM_TYPES,
};
use kvm_bindings::{KVM_CAP_NR_VCPUS, KVM_CAP_USER_MEMORY};

/// Bit of KVM_HC_MAP_GPA_RANGE in KVM_CAP_EXIT_HYPERCALL.
pub const EXIT_MAP_GPA_RANGE: u64 = 1 << 12;

/// The value of a capability: of a VM of a type, or at system scope.
pub fn capability(kernel: Kernel, vm_type: Option<VmType>, number: u32) -> i32 {
    let private = vm_type.is_some_and(VmType::has_private_memory);
    match number {
        KVM_CAP_USER_MEMORY | KVM_CAP_USER_MEMORY2 | KVM_CAP_MEMORY_FAULT_INFO | KVM_CAP_PRE_FAULT_MEMORY => 1,
        KVM_CAP_SPLIT_IRQCHIP | KVM_CAP_BINARY_STATS_FD => 1,
        KVM_CAP_NR_MEMSLOTS => i32::from(USER_SLOTS),
        KVM_CAP_NR_VCPUS | KVM_CAP_MAX_VCPUS => 1024,
        KVM_CAP_READONLY_MEM => i32::from(vm_type != Some(VmType::Tdx)),
        KVM_CAP_MULTI_ADDRESS_SPACE => {
            if private {
                1
            } else {
                2
            }
        }
        KVM_CAP_EXIT_HYPERCALL => EXIT_MAP_GPA_RANGE as i32,
        KVM_CAP_DISABLE_QUIRKS2 => quirks(kernel) as i32,
        KVM_CAP_VM_TYPES => kernel.vm_types() as i32,
        KVM_CAP_MEMORY_ATTRIBUTES if vm_type.is_none() || private => kernel.vm_attributes() as i32,
        KVM_CAP_GUEST_MEMFD => i32::from(kernel >= Kernel::V6_18 || vm_type.is_none() || private),
        KVM_CAP_GUEST_MEMFD_FLAGS if kernel.has_gmem_flags_capability() => kernel.gmem_flags(vm_type) as i32,
        KVM_CAP_GUEST_MEMFD_MEMORY_ATTRIBUTES_RFC_V5
            if kernel.converts_in_place() && (vm_type.is_none() || private) =>
        {
            8
        }
        _ => 0,
    }
}

/// Quirks that can be disabled: SLOT_ZAP_ALL is bit 7, 6.12.
fn quirks(kernel: Kernel) -> u64 {
    if kernel == Kernel::V6_12 { 0xff } else { 0x1ff }
}

impl World {
    /// KVM_CHECK_EXTENSION on a VM.
    ///
    /// # Errors
    /// EIO on a dead VM.
    pub fn vm_capability(&mut self, vm: VmId, number: u32) -> Result<i32, Errno> {
        let vm_type = self.live_vm(vm)?.vm_type;
        Ok(capability(self.profile.kernel, Some(vm_type), number))
    }

    /// KVM_ENABLE_CAP on a VM.
    ///
    /// # Errors
    /// EIO, EINVAL for an unknown capability or argument, EEXIST for a split irqchip after the vCPUs.
    pub fn enable_capability(&mut self, vm: VmId, number: u32, args: [u64; 4]) -> Result<(), Errno> {
        let quirks = quirks(self.profile.kernel);
        let state = self.live_vm(vm)?;
        match number {
            KVM_CAP_EXIT_HYPERCALL if args[0] & !EXIT_MAP_GPA_RANGE == 0 => state.exit_hypercalls = args[0],
            KVM_CAP_DISABLE_QUIRKS2 if args[0] & !quirks == 0 => state.disabled_quirks |= args[0],
            KVM_CAP_SPLIT_IRQCHIP if args[0] <= 120 => {
                if state.split_irqchip || !state.vcpu_ids.is_empty() {
                    return Err(Errno::EEXIST);
                }
                state.split_irqchip = true;
            }
            _ => return Err(Errno::EINVAL),
        }
        Ok(())
    }
}
