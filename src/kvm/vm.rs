//! A VM of the running kernel.

use super::gmem::KvmGuestMemfd;
use super::mapping::errno_of;
use super::payload::Payload;
use super::vcpu::KvmVcpu;
use super::{ioctl, stats};
use crate::machine::{
    Errno, GmemBinding, GuestMemfd, MemoryAttributes, MemoryRegion, RegionFile, Vcpu, Vm, VmConfig, VmType,
};
use crate::uapi::bindings::{
    kvm_dirty_log, kvm_dirty_log__bindgen_ty_1, kvm_enable_cap, kvm_memory_attributes, kvm_userspace_memory_region,
    kvm_userspace_memory_region2,
};
use crate::uapi::kvm::{
    KVM_CAP_NR_MEMSLOTS, KVM_CHECK_EXTENSION, KVM_SET_MEMORY_ATTRIBUTES, KVM_SET_USER_MEMORY_REGION,
    KVM_SET_USER_MEMORY_REGION2,
};
use kvm_ioctls::{Kvm, VmFd};
use libc::Ioctl;
use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use std::sync::Arc;

/// `KVM_GET_DIRTY_LOG`.
const KVM_GET_DIRTY_LOG: Ioctl = libc::_IOW::<kvm_dirty_log>(0xae, 0x42);
/// `KVM_ENABLE_CAP`.
const KVM_ENABLE_CAP: Ioctl = libc::_IOW::<kvm_enable_cap>(0xae, 0xa3);

/// A number that no process has a descriptor of: the highest that a descriptor can have, above any RLIMIT_NOFILE.
const NOT_OPEN: RawFd = i32::MAX;

/// A VM.
pub(super) struct KvmVm {
    fd: VmFd,
    kvm: Arc<Kvm>,
    first_reserved_slot: u32,
    payload: Option<Arc<Payload>>,
}

/// KVM_CREATE_VM.
pub(super) fn create_vm_fd(kvm: &Kvm, vm_type: u64) -> Result<VmFd, Errno> {
    kvm.create_vm_with_type(vm_type).map_err(|error| Errno::from_raw(error.errno()))
}

impl KvmVm {
    /// KVM_CREATE_VM, then what the configuration asks for.
    pub(super) fn create(kvm: &Arc<Kvm>, vm_type: VmType, config: VmConfig) -> Result<KvmVm, Errno> {
        let fd = create_vm_fd(kvm, vm_type.number())?;
        let nr_memslots = ioctl::with_value(&fd, KVM_CHECK_EXTENSION, u64::from(KVM_CAP_NR_MEMSLOTS))? as u32;
        let (first_reserved_slot, payload) = match config {
            VmConfig::Bare => (nr_memslots, None),
            VmConfig::Payload { vcpus } => {
                let slot = nr_memslots - 1;
                (slot, Some(Arc::new(Payload::install(kvm, &fd, slot, vcpus)?)))
            }
        };
        Ok(KvmVm { fd, kvm: Arc::clone(kvm), first_reserved_slot, payload })
    }

    /// Issues a memory region ioctl with the file that the region names.
    fn with_file<T>(&self, file: RegionFile<'_>, issue: impl FnOnce(RawFd) -> Result<T, Errno>) -> Result<T, Errno> {
        match file {
            RegionFile::Gmem(gmem) => issue(gmem.raw_fd().unwrap_or(NOT_OPEN)),
            RegionFile::KvmDevice => issue(self.kvm.as_raw_fd()),
            RegionFile::Vm => issue(self.fd.as_raw_fd()),
            RegionFile::NotOpen => issue(NOT_OPEN),
            RegionFile::Memfd => {
                // SAFETY: the name is a C string.
                let fd =
                    Errno::result(unsafe { libc::memfd_create(c"not a guest_memfd".as_ptr(), libc::MFD_CLOEXEC) })?;
                // SAFETY: a new descriptor that nobody else owns.
                let memfd = unsafe { File::from_raw_fd(fd) };
                memfd.set_len(1 << 30).map_err(errno_of)?;
                issue(memfd.as_raw_fd())
            }
        }
    }
}

impl Vm for KvmVm {
    fn capability(&self, capability: u32) -> Result<i32, Errno> {
        ioctl::with_value(&self.fd, KVM_CHECK_EXTENSION, u64::from(capability))
    }

    fn enable_capability(&self, capability: u32, args: [u64; 4]) -> Result<(), Errno> {
        let mut argument = kvm_enable_cap { cap: capability, args, ..Default::default() };
        // SAFETY: the structure is the ioctl's; its arguments are numbers to every capability that tests enable.
        unsafe { ioctl::with_struct(&self.fd, KVM_ENABLE_CAP, &mut argument) }.map(drop)
    }

    fn create_guest_memfd_with(&self, size: u64, flags: u64, reserved: [u64; 6]) -> Result<Arc<dyn GuestMemfd>, Errno> {
        Ok(Arc::new(KvmGuestMemfd::create(&self.fd, size, flags, reserved)?))
    }

    fn set_memory_region(&self, region: &MemoryRegion<'_>) -> Result<(), Errno> {
        let mut argument = kvm_userspace_memory_region2 {
            slot: region.slot,
            flags: region.flags,
            guest_phys_addr: region.gpa,
            memory_size: region.size,
            userspace_addr: region.userspace_addr,
            ..Default::default()
        };
        let issue = |argument: &mut kvm_userspace_memory_region2| {
            // SAFETY: the structure is the ioctl's. What the guest does to the memory at `userspace_addr` is what the
            // caller, who made that mapping to be guest memory, asks for; mappings hold no Rust objects.
            unsafe { ioctl::with_struct(&self.fd, KVM_SET_USER_MEMORY_REGION2, argument) }.map(drop)
        };
        match region.gmem {
            None => issue(&mut argument),
            Some(GmemBinding { file, offset }) => self.with_file(file, |fd| {
                argument.guest_memfd = fd as u32;
                argument.guest_memfd_offset = offset;
                issue(&mut argument)
            }),
        }
    }

    fn set_memory_region_v1(&self, region: &MemoryRegion<'_>) -> Result<(), Errno> {
        let mut argument = kvm_userspace_memory_region {
            slot: region.slot,
            flags: region.flags,
            guest_phys_addr: region.gpa,
            memory_size: region.size,
            userspace_addr: region.userspace_addr,
        };
        // SAFETY: as in `set_memory_region`.
        unsafe { ioctl::with_struct(&self.fd, KVM_SET_USER_MEMORY_REGION, &mut argument) }.map(drop)
    }

    fn set_memory_attributes(&self, attributes: &MemoryAttributes) -> Result<(), Errno> {
        let mut argument = kvm_memory_attributes {
            address: attributes.address,
            size: attributes.size,
            attributes: attributes.attributes,
            flags: attributes.flags,
        };
        // SAFETY: the structure is the ioctl's and holds no pointers.
        unsafe { ioctl::with_struct(&self.fd, KVM_SET_MEMORY_ATTRIBUTES, &mut argument) }.map(drop)
    }

    fn dirty_log(&self, slot: u32, pages: u64) -> Result<Vec<u64>, Errno> {
        let mut bitmap = vec![0u64; pages.div_ceil(64) as usize];
        let mut argument = kvm_dirty_log {
            slot,
            padding1: 0,
            __bindgen_anon_1: kvm_dirty_log__bindgen_ty_1 { dirty_bitmap: bitmap.as_mut_ptr().cast() },
        };
        // SAFETY: the kernel writes a bit for each page of the slot, rounded up to 64, and the caller gives that number.
        unsafe { ioctl::with_struct(&self.fd, KVM_GET_DIRTY_LOG, &mut argument) }?;
        Ok(bitmap)
    }

    fn create_vcpu(&self, id: u32) -> Result<Box<dyn Vcpu>, Errno> {
        Ok(Box::new(KvmVcpu::create(&self.fd, id, self.payload.clone())?))
    }

    fn statistic(&self, name: &str) -> Result<u64, Errno> {
        stats::read(&self.fd, name)
    }

    fn first_reserved_slot(&self) -> u32 {
        self.first_reserved_slot
    }

    fn raw_fd(&self) -> Option<RawFd> {
        Some(self.fd.as_raw_fd())
    }
}
