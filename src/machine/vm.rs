//! A VM: capabilities, guest_memfds, memory regions, memory attributes, vCPUs.

use super::{Errno, GuestMemfd, TdxVm, Vcpu};
use std::sync::Arc;

/// What [`super::Machine::create_vm`] sets up besides the VM itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VmConfig {
    /// KVM_CREATE_VM and nothing else: no slot, no vCPU.
    Bare,
    /// A VM whose vCPUs can execute guest operations: the payload's memory is in place, in slot ids that tests do not
    /// use (see [`Vm::first_reserved_slot`]) and just below 4 GiB of guest-physical address space.
    Payload {
        /// How many vCPUs may be created, with ids from 0.
        vcpus: u32,
    },
    /// The same, but KVM_TDX_FINALIZE_VM is left to the test, which can add memory before, and the TD has SEPT_VE_DISABLE:
    /// a guest that touches a page which it has not accepted ends, where it would accept it otherwise. A VM that is no TD
    /// is as with [`VmConfig::Payload`].
    PayloadUnfinalized {
        /// How many vCPUs may be created, with ids from 0.
        vcpus: u32,
    },
}

impl VmConfig {
    /// How many vCPUs the payload serves; `None` without it.
    pub fn payload_vcpus(self) -> Option<u32> {
        match self {
            VmConfig::Bare => None,
            VmConfig::Payload { vcpus } | VmConfig::PayloadUnfinalized { vcpus } => Some(vcpus),
        }
    }
}

/// The file that a memory region names in its `guest_memfd` field.
#[derive(Clone, Copy)]
pub enum RegionFile<'a> {
    /// A guest_memfd of this or another VM.
    Gmem(&'a dyn GuestMemfd),
    /// A descriptor of /dev/kvm.
    KvmDevice,
    /// The VM's own descriptor.
    Vm,
    /// An ordinary memfd (memfd_create).
    Memfd,
    /// A number that no descriptor has.
    NotOpen,
}

/// The guest_memfd part of a memory region.
#[derive(Clone, Copy)]
pub struct GmemBinding<'a> {
    /// The file to bind to.
    pub file: RegionFile<'a>,
    /// Byte offset into it, `guest_memfd_offset`.
    pub offset: u64,
}

/// The argument of KVM_SET_USER_MEMORY_REGION2.
#[derive(Clone, Copy)]
pub struct MemoryRegion<'a> {
    /// Bits 15:0 the slot id, bits 31:16 the address space.
    pub slot: u32,
    /// KVM_MEM_* flags. KVM_MEM_GUEST_MEMFD is not implied by `gmem`: tests set it, or leave it out on purpose.
    pub flags: u32,
    /// Guest-physical address, bytes.
    pub gpa: u64,
    /// Size in bytes; 0 deletes the slot.
    pub size: u64,
    /// Address of the shared side in the calling process; 0 is legal.
    pub userspace_addr: u64,
    /// The private side.
    pub gmem: Option<GmemBinding<'a>>,
}

impl<'a> MemoryRegion<'a> {
    /// A slot of `size` bytes at `gpa` with no flags, no guest_memfd and `userspace_addr` 0.
    pub const fn new(slot: u32, gpa: u64, size: u64) -> MemoryRegion<'a> {
        MemoryRegion { slot, flags: 0, gpa, size, userspace_addr: 0, gmem: None }
    }

    /// The call that deletes a slot: every field but the id is 0.
    pub const fn deletion(slot: u32) -> MemoryRegion<'a> {
        MemoryRegion::new(slot, 0, 0)
    }

    /// The same region with its shared side at `userspace_addr`.
    pub const fn at(self, userspace_addr: u64) -> MemoryRegion<'a> {
        MemoryRegion { userspace_addr, ..self }
    }

    /// The same region with these flags set as well.
    pub const fn with_flags(self, flags: u32) -> MemoryRegion<'a> {
        MemoryRegion { flags: self.flags | flags, ..self }
    }

    /// The same region with KVM_MEM_GUEST_MEMFD, bound to `gmem` from byte `offset`.
    pub const fn bound_to(self, gmem: &'a dyn GuestMemfd, offset: u64) -> MemoryRegion<'a> {
        self.naming(RegionFile::Gmem(gmem), offset)
    }

    /// The same region with KVM_MEM_GUEST_MEMFD and any file in the `guest_memfd` field.
    pub const fn naming(self, file: RegionFile<'a>, offset: u64) -> MemoryRegion<'a> {
        MemoryRegion { gmem: Some(GmemBinding { file, offset }), ..self.with_flags(kvm_bindings::KVM_MEM_GUEST_MEMFD) }
    }
}

/// The argument of KVM_SET_MEMORY_ATTRIBUTES.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryAttributes {
    /// Guest-physical address, bytes.
    pub address: u64,
    /// Size in bytes.
    pub size: u64,
    /// KVM_MEMORY_ATTRIBUTE_* bits.
    pub attributes: u64,
    /// Must be 0.
    pub flags: u64,
}

/// A virtual machine.
pub trait Vm: Send + Sync {
    /// KVM_CHECK_EXTENSION at VM scope.
    fn capability(&self, capability: u32) -> Result<i32, Errno>;

    /// KVM_ENABLE_CAP on the VM.
    fn enable_capability(&self, capability: u32, args: [u64; 4]) -> Result<(), Errno>;

    /// KVM_CREATE_GUEST_MEMFD.
    fn create_guest_memfd(&self, size: u64, flags: u64) -> Result<Arc<dyn GuestMemfd>, Errno> {
        self.create_guest_memfd_with(size, flags, [0; 6])
    }

    /// KVM_CREATE_GUEST_MEMFD with the `reserved` words given.
    fn create_guest_memfd_with(&self, size: u64, flags: u64, reserved: [u64; 6]) -> Result<Arc<dyn GuestMemfd>, Errno>;

    /// KVM_SET_USER_MEMORY_REGION2.
    fn set_memory_region(&self, region: &MemoryRegion<'_>) -> Result<(), Errno>;

    /// KVM_SET_USER_MEMORY_REGION, the first version: `gmem` is ignored, `flags` are passed as they are.
    fn set_memory_region_v1(&self, region: &MemoryRegion<'_>) -> Result<(), Errno>;

    /// KVM_SET_MEMORY_ATTRIBUTES.
    fn set_memory_attributes(&self, attributes: &MemoryAttributes) -> Result<(), Errno>;

    /// KVM_GET_DIRTY_LOG of one slot: the bitmap, one bit a page, for a slot of `pages` pages.
    fn dirty_log(&self, slot: u32, pages: u64) -> Result<Vec<u64>, Errno>;

    /// KVM_CREATE_VCPU. In a VM with the payload the vCPU is ready to execute guest operations.
    fn create_vcpu(&self, id: u32) -> Result<Box<dyn Vcpu>, Errno>;

    /// One VM statistic of KVM_GET_STATS_FD by name, `pages_4k` for example. ENOENT when the kernel has no such statistic.
    fn statistic(&self, name: &str) -> Result<u64, Errno>;

    /// The lowest slot id that the payload occupies; every id below is free for the test.
    fn first_reserved_slot(&self) -> u32;

    /// The bit that makes a guest-physical address of a TD a shared one; 0 where the attribute alone decides.
    fn shared_bit(&self) -> u64 {
        0
    }

    /// The TDX sub-commands of KVM_MEMORY_ENCRYPT_OP, on machines that know them.
    fn tdx(&self) -> Option<&dyn TdxVm> {
        None
    }

    /// The raw descriptor, on machines where a VM is one.
    fn raw_fd(&self) -> Option<std::os::fd::RawFd>;
}
