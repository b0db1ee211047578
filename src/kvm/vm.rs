//! A VM of the running kernel.

use super::gmem::KvmGuestMemfd;
use super::mapping::errno_of;
use super::payload::Payload;
use super::vcpu::KvmVcpu;
use super::{ioctl, stats, tdx};
use crate::machine::tdx_cpuid::GPAW_48;
use crate::machine::{
    Errno, GmemBinding, GuestMemfd, MemoryAttributes, MemoryRegion, RegionFile, TdxAnswer, TdxCommand, TdxData,
    TdxInitVm, TdxVm, Vcpu, Vm, VmConfig, VmType,
};
use crate::uapi::bindings::{
    kvm_dirty_log, kvm_dirty_log__bindgen_ty_1, kvm_enable_cap, kvm_memory_attributes, kvm_userspace_memory_region,
    kvm_userspace_memory_region2,
};
use crate::uapi::kvm::{
    KVM_CAP_NR_MEMSLOTS, KVM_CHECK_EXTENSION, KVM_SET_MEMORY_ATTRIBUTES, KVM_SET_USER_MEMORY_REGION,
    KVM_SET_USER_MEMORY_REGION2,
};
use crate::uapi::kvm_x86::{KVM_TDX_FINALIZE_VM, KVM_TDX_INIT_VM};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use libc::Ioctl;
use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

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
    td: Td,
}

/// What only a TD has.
#[derive(Default)]
struct Td {
    /// The private memory of the payload.
    memory: Option<Arc<dyn GuestMemfd>>,
    /// vCPUs that were created before the TD was finalised and that no test has asked for yet.
    vcpus: Mutex<BTreeMap<u32, VcpuFd>>,
    /// The bit that makes an address a shared one; 0 on other VMs.
    shared_bit: AtomicU64,
}

/// The SHARED bit of a TD with four levels of S-EPT.
const SHARED_BIT: u64 = 1 << (GPAW_48 - 1);
/// The SHARED bit of a TD with five.
const SHARED_BIT_WIDE: u64 = 1 << 51;

/// KVM_CREATE_VM.
pub(super) fn create_vm_fd(kvm: &Kvm, vm_type: u64) -> Result<VmFd, Errno> {
    kvm.create_vm_with_type(vm_type).map_err(|error| Errno::from_raw(error.errno()))
}

impl KvmVm {
    /// KVM_CREATE_VM, then what the configuration asks for.
    pub(super) fn create(kvm: &Arc<Kvm>, vm_type: VmType, config: VmConfig) -> Result<KvmVm, Errno> {
        let fd = create_vm_fd(kvm, vm_type.number())?;
        let nr_memslots = ioctl::with_value(&fd, KVM_CHECK_EXTENSION, u64::from(KVM_CAP_NR_MEMSLOTS))? as u32;
        let mut td = Td::default();
        if vm_type == VmType::Tdx {
            *td.shared_bit.get_mut() = SHARED_BIT;
        }
        let slot = nr_memslots - 1;
        let (first_reserved_slot, payload) = match config.payload_vcpus() {
            None => (nr_memslots, None),
            Some(vcpus) if vm_type == VmType::Tdx => {
                let finalized = matches!(config, VmConfig::Payload { .. });
                let pending = if finalized { tdx::Pending::Accept } else { tdx::Pending::Exit };
                let guest = tdx::build(kvm, &fd, slot, vcpus, pending)?;
                if finalized {
                    tdx::issue(&fd, TdxCommand::new(KVM_TDX_FINALIZE_VM, TdxData::Value(0))).result?;
                }
                td.memory = Some(guest.memory);
                td.vcpus = Mutex::new(guest.vcpus);
                (slot, Some(guest.payload))
            }
            Some(vcpus) => (slot, Some(Arc::new(Payload::install(kvm, &fd, slot, vcpus)?))),
        };
        Ok(KvmVm { fd, kvm: Arc::clone(kvm), first_reserved_slot, payload, td })
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
        let file = KvmGuestMemfd::create(&self.fd, size, flags, reserved)?;
        Ok(Arc::new(file.with_payload(self.td.memory.clone())))
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
        let waiting = self.td.vcpus.lock().expect("no holder of this lock panics").remove(&id);
        Ok(Box::new(match waiting {
            Some(fd) => KvmVcpu::of_td(fd, id, self.payload.clone(), self.td.memory.clone()),
            None => KvmVcpu::create(&self.fd, id, self.payload.clone())?,
        }))
    }

    fn statistic(&self, name: &str) -> Result<u64, Errno> {
        stats::read(&self.fd, name)
    }

    fn first_reserved_slot(&self) -> u32 {
        self.first_reserved_slot
    }

    fn shared_bit(&self) -> u64 {
        self.td.shared_bit.load(Ordering::SeqCst)
    }

    fn tdx(&self) -> Option<&dyn TdxVm> {
        Some(self)
    }

    fn raw_fd(&self) -> Option<RawFd> {
        Some(self.fd.as_raw_fd())
    }
}

impl TdxVm for KvmVm {
    fn command(&self, command: TdxCommand<'_>) -> TdxAnswer {
        let wide = matches!(&command.data, TdxData::InitVm(init) if command.id == KVM_TDX_INIT_VM && is_wide(init));
        let answer = tdx::issue(&self.fd, command);
        if wide && answer.result.is_ok() {
            self.td.shared_bit.store(SHARED_BIT_WIDE, Ordering::SeqCst);
        }
        answer
    }

    fn unreadable_command(&self) -> Result<(), Errno> {
        tdx::issue_unreadable(&self.fd)
    }
}

/// Whether a TD is asked for with 52 bits of guest-physical addresses: CPUID 0x80000008, EAX\[23:16\].
fn is_wide(init: &TdxInitVm) -> bool {
    init.entries.iter().any(|entry| entry.function == 0x8000_0008 && entry.eax >> 16 & 0xff == 52)
}
