//! A TD with the payload, from KVM_TDX_INIT_VM to what comes before KVM_TDX_FINALIZE_VM.

use super::super::gmem::KvmGuestMemfd;
use super::super::ioctl;
use super::super::payload::Payload;
use super::command;
use crate::guest::{BootParameter, layout};
use crate::machine::{
    CpuidEntry, Errno, GuestMemfd, PAGE_SIZE, TdxCapabilities, TdxCommand, TdxCpuid, TdxData, TdxInitVm, tdx_cpuid,
};
use crate::uapi::bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, kvm_enable_cap, kvm_memory_attributes, kvm_userspace_memory_region2,
};
use crate::uapi::kvm::{
    KVM_CAP_MEMORY_ATTRIBUTES, KVM_CAP_SPLIT_IRQCHIP, KVM_CHECK_EXTENSION, KVM_MEM_GUEST_MEMFD,
    KVM_MEMORY_ATTRIBUTE_PRIVATE, KVM_SET_MEMORY_ATTRIBUTES, KVM_SET_USER_MEMORY_REGION2,
};
use crate::uapi::kvm_x86::{
    KVM_TDX_CAPABILITIES, KVM_TDX_GET_CPUID, KVM_TDX_INIT_MEM_REGION, KVM_TDX_INIT_VCPU, KVM_TDX_INIT_VM,
    KVM_TDX_MEASURE_MEMORY_REGION, KvmTdxInitMemRegion,
};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use libc::Ioctl;
use std::collections::BTreeMap;
use std::os::fd::AsRawFd;
use std::sync::Arc;

/// `KVM_ENABLE_CAP`.
const KVM_ENABLE_CAP: Ioctl = libc::_IOW::<kvm_enable_cap>(0xae, 0xa3);

/// What an access of the guest to a page that it has not accepted comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::kvm) enum Pending {
    /// #VE, and the payload accepts the page.
    Accept,
    /// A TD exit, after which KVM lets the VM die: ATTRIBUTES.SEPT_VE_DISABLE.
    Exit,
}

/// ATTRIBUTES.SEPT_VE_DISABLE.
const SEPT_VE_DISABLE: u64 = 1 << 28;
/// XFAM: x87 and SSE, which every TD has.
const XFAM: u64 = 3;
/// Pins of the I/O APIC that user space would have.
const IOAPIC_PINS: u64 = 24;

/// What a TD with the payload consists of besides the VM.
pub(in crate::kvm) struct TdGuest {
    /// The payload, as the host sees it.
    pub(in crate::kvm) payload: Arc<Payload>,
    /// The private side of its slot. It goes after every other file of the VM, and with the last of
    /// the VM's, the vCPUs' and the files' handles.
    pub(in crate::kvm) memory: Arc<dyn GuestMemfd>,
    /// vCPUs that no test has asked for yet, by id.
    pub(in crate::kvm) vcpus: BTreeMap<u32, VcpuFd>,
}

/// Makes a TD of a new VM: the payload in slot `slot`, vCPUs with ids below `vcpus`; it is not finalised yet.
///
/// # Errors
/// EINVAL for more vCPUs than the payload has areas for, or the errno of the call that failed.
pub(in crate::kvm) fn build(kvm: &Kvm, vm: &VmFd, slot: u32, vcpus: u32, pending: Pending) -> Result<TdGuest, Errno> {
    let supported = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(|error| Errno::from_raw(error.errno()))?;
    let supported = supported.as_slice();
    let payload = Arc::new(Payload::new(vcpus, BootParameter::Td)?);
    split_irqchip(vm)?;
    init_vm(vm, supported, pending)?;
    let mut fds = BTreeMap::new();
    for id in 0..vcpus {
        let vcpu = vm.create_vcpu(u64::from(id)).map_err(|error| Errno::from_raw(error.errno()))?;
        init_vcpu(&vcpu, supported)?;
        fds.insert(id, vcpu);
    }
    let memory = KvmGuestMemfd::create(vm, layout::SIZE, 0, [0; 6])?;
    create_slot(vm, slot, payload.host_address(layout::BASE)?, &memory)?;
    if let Some(first) = fds.get(&0) {
        add_memory(vm, first, &payload, vcpus, &memory)?;
    }
    Ok(TdGuest { payload, memory: Arc::new(memory), vcpus: fds })
}

fn command(fd: &impl AsRawFd, command: TdxCommand<'_>) -> Result<(), Errno> {
    command::issue(fd, command).result
}

/// TDX wants a local APIC in the kernel and no I/O APIC there.
fn split_irqchip(vm: &VmFd) -> Result<(), Errno> {
    let args = [IOAPIC_PINS, 0, 0, 0];
    let mut argument = kvm_enable_cap { cap: KVM_CAP_SPLIT_IRQCHIP, args, ..Default::default() };
    // SAFETY: the structure is the ioctl's; the argument of this capability is a number.
    unsafe { ioctl::with_struct(vm, KVM_ENABLE_CAP, &mut argument) }.map(drop)
}

/// KVM_TDX_CAPABILITIES with as many entries as it takes: the kernel does not say how many.
fn capabilities(vm: &VmFd) -> Result<TdxCapabilities, Errno> {
    let mut room = 8;
    loop {
        let mut capabilities = TdxCapabilities::with_room(room);
        match command(vm, TdxCommand::new(KVM_TDX_CAPABILITIES, TdxData::Capabilities(&mut capabilities))) {
            Err(Errno::E2BIG) if room < KVM_MAX_CPUID_ENTRIES as u32 => room *= 2,
            result => return result.map(|()| capabilities),
        }
    }
}

fn init_vm(vm: &VmFd, supported: &[CpuidEntry], pending: Pending) -> Result<(), Errno> {
    let capabilities = capabilities(vm)?;
    let attributes = if pending == Pending::Exit { SEPT_VE_DISABLE } else { 0 };
    let init = TdxInitVm::new(attributes, XFAM, tdx_cpuid::configured(&capabilities.entries, supported));
    command(vm, TdxCommand::new(KVM_TDX_INIT_VM, TdxData::InitVm(&init)))
}

fn init_vcpu(vcpu: &VcpuFd, supported: &[CpuidEntry]) -> Result<(), Errno> {
    let mut seen = TdxCpuid::with_room(KVM_MAX_CPUID_ENTRIES as u32);
    command(vcpu, TdxCommand::new(KVM_TDX_GET_CPUID, TdxData::Cpuid(&mut seen)))?;
    let entries = tdx_cpuid::of_vcpu(&seen.entries, supported);
    let cpuid = CpuId::from_entries(&entries).map_err(|_| Errno::E2BIG)?;
    vcpu.set_cpuid2(&cpuid).map_err(|error| Errno::from_raw(error.errno()))?;
    command(vcpu, TdxCommand::new(KVM_TDX_INIT_VCPU, TdxData::Value(BootParameter::Td as u64)))
}

fn create_slot(vm: &VmFd, slot: u32, shared: u64, memory: &KvmGuestMemfd) -> Result<(), Errno> {
    let mut region = kvm_userspace_memory_region2 {
        slot,
        flags: KVM_MEM_GUEST_MEMFD,
        guest_phys_addr: layout::BASE,
        memory_size: layout::SIZE,
        userspace_addr: shared,
        guest_memfd: memory.as_raw_fd() as u32,
        ..Default::default()
    };
    // SAFETY: the structure is the ioctl's. The shared side belongs to the payload, which every vCPU of the VM holds.
    unsafe { ioctl::with_struct(vm, KVM_SET_USER_MEMORY_REGION2, &mut region) }.map(drop)
}

/// The payload's private memory: the areas of the vCPUs without their mailboxes, then tables and code, which are measured.
fn add_memory(vm: &VmFd, vcpu: &VcpuFd, payload: &Payload, vcpus: u32, file: &KvmGuestMemfd) -> Result<(), Errno> {
    for id in 0..vcpus {
        let area = layout::area(id);
        add(vm, vcpu, payload, file, area + PAGE_SIZE..area + layout::AREA_SIZE, 0)?;
    }
    add(vm, vcpu, payload, file, layout::CODE..layout::BASE + layout::SIZE, KVM_TDX_MEASURE_MEMORY_REGION)
}

fn add(
    vm: &VmFd,
    vcpu: &VcpuFd,
    payload: &Payload,
    file: &KvmGuestMemfd,
    gpas: std::ops::Range<u64>,
    flags: u32,
) -> Result<(), Errno> {
    let size = gpas.end - gpas.start;
    make_private(vm, file, gpas.start, size)?;
    let mut region = KvmTdxInitMemRegion {
        source_addr: payload.host_address(gpas.start)?,
        gpa: gpas.start,
        nr_pages: size / PAGE_SIZE,
    };
    // A signal is no failure: the structure says what is left.
    loop {
        match command(vcpu, TdxCommand::new(KVM_TDX_INIT_MEM_REGION, TdxData::Region(&mut region)).with_flags(flags)) {
            Err(Errno::EINTR) => {}
            result => return result,
        }
    }
}

/// PRIVATE, by the VM where it keeps the attributes, by the file where that does.
fn make_private(vm: &VmFd, file: &KvmGuestMemfd, gpa: u64, size: u64) -> Result<(), Errno> {
    let kept_by_vm = ioctl::with_value(vm, KVM_CHECK_EXTENSION, u64::from(KVM_CAP_MEMORY_ATTRIBUTES))? as u64;
    if kept_by_vm & KVM_MEMORY_ATTRIBUTE_PRIVATE == 0 {
        let converted = file.convert(gpa - layout::BASE, size, KVM_MEMORY_ATTRIBUTE_PRIVATE);
        return converted.map_err(|error| error.errno);
    }
    let mut argument =
        kvm_memory_attributes { address: gpa, size, attributes: KVM_MEMORY_ATTRIBUTE_PRIVATE, ..Default::default() };
    // SAFETY: the structure is the ioctl's and holds no pointers.
    unsafe { ioctl::with_struct(vm, KVM_SET_MEMORY_ATTRIBUTES, &mut argument) }.map(drop)
}
