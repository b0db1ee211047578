//! The VM handle.

use super::super::host::Order;
use super::super::mmu::slots::USER_SLOTS;
use super::super::mmu::tdx::SHARED_BIT;
use super::super::mmu::{Region, RegionTarget, VmId};
use super::super::profile::PendingAccess;
use super::Shared;
use super::gmem::SimGmem;
use super::vcpu::SimVcpu;
use crate::machine::{
    Errno, GuestMemfd, MemoryAttributes, MemoryRegion, RegionFile, TdxAnswer, TdxCommand, TdxVm, Vcpu, Vm, VmConfig,
    VmType,
};
use std::os::fd::RawFd;
use std::sync::Arc;

/// Slot ids at the end of the range that a VM with the payload keeps for it; the model's payload needs no memory, but a
/// test that runs here must also run where it does.
const PAYLOAD_SLOTS: u32 = 8;

/// A VM file descriptor.
#[derive(Debug)]
pub(super) struct SimVm {
    shared: Arc<Shared>,
    id: VmId,
}

impl SimVm {
    pub(super) fn create(shared: &Arc<Shared>, vm_type: VmType, config: VmConfig) -> Result<Arc<dyn Vm>, Errno> {
        let id = shared.with(|world| {
            let id = world.create_vm(vm_type)?;
            if let (Some(vcpus), Some(vm)) = (config.payload_vcpus(), world.vms.get_mut(&id)) {
                vm.payload_vcpus = Some(vcpus);
                if vm_type == VmType::Tdx {
                    let finalized = matches!(config, VmConfig::Payload { .. });
                    let pending = if finalized { world.profile.pending } else { PendingAccess::Exit };
                    let mut built = world.tdx_build(id, vcpus, pending);
                    if finalized {
                        built = built.and_then(|()| world.tdx_finalize(id).result);
                    }
                    if let Err(errno) = built {
                        world.close_vm(id);
                        return Err(errno);
                    }
                }
            }
            Ok::<VmId, Errno>(id)
        })?;
        Ok(Arc::new(SimVm { shared: shared.clone(), id }))
    }

    fn region(region: &MemoryRegion<'_>) -> Region {
        let (target, offset) = match region.gmem {
            None => (RegionTarget::NotOpen, 0),
            Some(binding) => {
                let target = match binding.file {
                    RegionFile::Gmem(gmem) => RegionTarget::Gmem(gmem.handle()),
                    RegionFile::KvmDevice | RegionFile::Vm | RegionFile::Memfd => RegionTarget::OtherFile,
                    RegionFile::NotOpen => RegionTarget::NotOpen,
                };
                (target, binding.offset)
            }
        };
        let MemoryRegion { slot, flags, gpa, size, userspace_addr, .. } = *region;
        Region { slot, flags, gpa, size, userspace_addr, target, offset }
    }
}

impl Drop for SimVm {
    fn drop(&mut self) {
        self.shared.with(|world| world.close_vm(self.id));
    }
}

impl Vm for SimVm {
    fn capability(&self, capability: u32) -> Result<i32, Errno> {
        self.shared.with(|world| world.vm_capability(self.id, capability))
    }

    fn enable_capability(&self, capability: u32, args: [u64; 4]) -> Result<(), Errno> {
        self.shared.with(|world| world.enable_capability(self.id, capability, args))
    }

    fn create_guest_memfd_with(&self, size: u64, flags: u64, reserved: [u64; 6]) -> Result<Arc<dyn GuestMemfd>, Errno> {
        let file = self.shared.with(|world| world.create_guest_memfd(self.id, size, flags, reserved))?;
        Ok(SimGmem::open(&self.shared, file))
    }

    fn set_memory_region(&self, region: &MemoryRegion<'_>) -> Result<(), Errno> {
        self.shared.with(|world| world.set_region(self.id, &SimVm::region(region)))
    }

    fn set_memory_region_v1(&self, region: &MemoryRegion<'_>) -> Result<(), Errno> {
        let region = SimVm::region(&MemoryRegion { gmem: None, ..*region });
        self.shared.with(|world| world.set_region_v1(self.id, &region))
    }

    fn set_memory_attributes(&self, attributes: &MemoryAttributes) -> Result<(), Errno> {
        self.shared.with(|world| world.set_attributes(self.id, attributes))
    }

    fn dirty_log(&self, slot: u32, pages: u64) -> Result<Vec<u64>, Errno> {
        let mut bits = self.shared.with(|world| world.dirty_log(self.id, slot))?;
        bits.resize(pages.div_ceil(64) as usize, 0);
        Ok(bits)
    }

    fn create_vcpu(&self, id: u32) -> Result<Box<dyn Vcpu>, Errno> {
        self.shared.with(|world| world.create_vcpu(self.id, id))?;
        Ok(Box::new(SimVcpu::new(&self.shared, self.id, id)))
    }

    fn statistic(&self, name: &str) -> Result<u64, Errno> {
        self.shared.with(|world| {
            let vm = world.live_vm(self.id)?;
            match name {
                "pages_4k" => Ok(vm.mapped_leaves(Order::Base)),
                "pages_2m" => Ok(vm.mapped_leaves(Order::Pmd)),
                "pages_1g" => Ok(vm.mapped_leaves(Order::Pud)),
                _ => Err(Errno::ENOENT),
            }
        })
    }

    fn first_reserved_slot(&self) -> u32 {
        let payload = self.shared.with(|world| world.vm(self.id).is_some_and(|vm| vm.payload_vcpus.is_some()));
        u32::from(USER_SLOTS) - if payload { PAYLOAD_SLOTS } else { 0 }
    }

    fn shared_bit(&self) -> u64 {
        let is_td = self.shared.with(|world| world.vm(self.id).is_some_and(|vm| vm.has_mirror()));
        if is_td { SHARED_BIT } else { 0 }
    }

    fn tdx(&self) -> Option<&dyn TdxVm> {
        Some(self)
    }

    fn raw_fd(&self) -> Option<RawFd> {
        None
    }
}

impl TdxVm for SimVm {
    fn command(&self, command: TdxCommand<'_>) -> TdxAnswer {
        self.shared.with(|world| world.tdx_vm_command(self.id, command))
    }

    fn unreadable_command(&self) -> Result<(), Errno> {
        self.shared.with(|world| match world.live_vm(self.id)?.vm_type {
            VmType::Tdx => Err(Errno::EFAULT),
            _ => Err(Errno::ENOTTY),
        })
    }
}
