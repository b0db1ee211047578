//! The payload in a KVM VM: its memory, its slot, and the start of its vCPUs.

use super::ioctl;
use crate::guest::boot::{LongModeState, Segment};
use crate::guest::{BootParameter, InitialState, Mailbox, image, layout};
use crate::machine::Errno;
use crate::observe::emulated_by_tcg;
use crate::uapi::bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, Msrs, kvm_dtable, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs,
    kvm_userspace_memory_region,
};
use crate::uapi::kvm::KVM_SET_USER_MEMORY_REGION;
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use std::arch::x86_64::__cpuid;
use std::sync::atomic::Ordering;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

/// `IA32_FMASK`.
const MSR_FMASK: u32 = 0xc000_0084;

/// The payload's memory, in a slot of one VM.
pub(super) struct Payload {
    memory: GuestMemoryMmap,
    vcpus: u32,
    parameter: BootParameter,
    cpuid: CpuId,
}

impl Payload {
    /// The payload's memory with its code in it, for vCPUs with ids below `vcpus`, in no VM yet.
    ///
    /// # Errors
    /// EINVAL for more vCPUs than the payload has areas for, ENOMEM.
    pub(super) fn new(vcpus: u32, parameter: BootParameter) -> Result<Payload, Errno> {
        if vcpus == 0 || vcpus > layout::MAX_VCPUS {
            return Err(Errno::EINVAL);
        }
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(layout::BASE), layout::SIZE as usize)])
            .map_err(|_| Errno::ENOMEM)?;
        memory.write_slice(image::bytes(), GuestAddress(layout::CODE)).map_err(|_| Errno::EFAULT)?;
        let cpuid = CpuId::new(0).map_err(|_| Errno::ENOMEM)?;
        Ok(Payload { memory, vcpus, parameter, cpuid })
    }

    /// Puts the payload into a VM that is no TD, in slot `slot`, for vCPUs with ids below `vcpus`.
    ///
    /// # Errors
    /// EINVAL for more vCPUs than the payload has areas for, or the errno of the call that failed.
    pub(super) fn install(kvm: &Kvm, vm: &VmFd, slot: u32, vcpus: u32) -> Result<Payload, Errno> {
        let mut payload = Payload::new(vcpus, boot_parameter())?;
        let mut region = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: layout::BASE,
            memory_size: layout::SIZE,
            userspace_addr: payload.host_address(layout::BASE)?,
        };
        // SAFETY: the structure is the ioctl's. The memory belongs to this value, which every vCPU of the VM holds.
        unsafe { ioctl::with_struct(vm, KVM_SET_USER_MEMORY_REGION, &mut region) }?;
        payload.cpuid =
            kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(|error| Errno::from_raw(error.errno()))?;
        Ok(payload)
    }

    /// Where a guest-physical address of the payload is in this process.
    pub(super) fn host_address(&self, gpa: u64) -> Result<u64, Errno> {
        self.memory.get_host_address(GuestAddress(gpa)).map(|address| address as u64).map_err(|_| Errno::EFAULT)
    }

    /// Whether it is a TD's: nothing of its vCPUs' state can be set.
    pub(super) fn is_in_td(&self) -> bool {
        self.parameter == BootParameter::Td
    }

    /// The mailbox of a vCPU.
    pub(super) fn mailbox(&self, vcpu: u32) -> Mailbox<'_> {
        Mailbox::new(&self.memory, vcpu)
    }

    /// How many vCPUs were asked for.
    pub(super) fn vcpus(&self) -> u32 {
        self.vcpus
    }

    /// Gives a new vCPU the CPUID that the host supports; long mode depends on it.
    pub(super) fn prepare(&self, vcpu: &VcpuFd) -> Result<(), Errno> {
        vcpu.set_cpuid2(&self.cpuid).map_err(|error| Errno::from_raw(error.errno()))
    }

    /// Puts a vCPU into its initial state, from which it boots the payload and waits for a command.
    pub(super) fn start(&self, vcpu: &VcpuFd, id: u32) -> Result<(), Errno> {
        let leaf_1 = self.cpuid.as_slice().iter().find(|entry| entry.function == 1);
        let state = InitialState::new(id, self.parameter, 48, leaf_1.map_or(0, |entry| entry.eax));
        let set = || {
            let mut sregs = vcpu.get_sregs()?;
            fill_sregs(&mut sregs, &state);
            // TCG's nested paging is off while the guest's paging is: there the guest starts with it on.
            let long_mode = emulated_by_tcg().then(|| LongModeState::after(&state));
            if let Some(long_mode) = &long_mode {
                self.enter_long_mode(&mut sregs, long_mode)?;
            }
            vcpu.set_sregs(&sregs)?;
            let fmask = kvm_msr_entry { index: MSR_FMASK, data: state.fmask, ..Default::default() };
            vcpu.set_msrs(&Msrs::from_entries(&[fmask]).map_err(|_| kvm_ioctls::Error::new(libc::E2BIG))?)?;
            vcpu.set_regs(&kvm_regs {
                rip: long_mode.map_or(state.rip, |long_mode| long_mode.rip),
                rbp: long_mode.map_or(0, |long_mode| long_mode.rbp),
                rflags: state.rflags,
                rbx: state.rbx,
                rcx: state.rcx,
                r8: state.rcx,
                rdx: state.rdx,
                rsi: state.rsi,
                ..Default::default()
            })
        };
        set().map_err(|error: kvm_ioctls::Error| Errno::from_raw(error.errno()))
    }

    /// Does what the payload's protected-mode code does.
    fn enter_long_mode(&self, sregs: &mut kvm_sregs, state: &LongModeState) -> Result<(), kvm_ioctls::Error> {
        for (gpa, value) in state.stores {
            let stored = self.memory.store(value, GuestAddress(gpa), Ordering::SeqCst);
            stored.map_err(|_| kvm_ioctls::Error::new(libc::EFAULT))?;
        }
        sregs.cs = segment(state.cs);
        sregs.gdt = kvm_dtable { base: state.gdt_base, limit: layout::GDT_LIMIT, padding: [0; 3] };
        sregs.cr0 = state.cr0;
        sregs.cr3 = state.cr3;
        sregs.cr4 = state.cr4;
        sregs.efer = state.efer;
        Ok(())
    }
}

/// Which hypercall instruction the CPU has: KVM does not patch VMCALL into VMMCALL where it may not write to the code.
fn boot_parameter() -> BootParameter {
    let vendor = __cpuid(0);
    // "Auth" and "Hygo" in EBX.
    if matches!(&vendor.ebx.to_le_bytes(), b"Auth" | b"Hygo") { BootParameter::Vmmcall } else { BootParameter::Vmcall }
}

fn fill_sregs(sregs: &mut kvm_sregs, state: &InitialState) {
    sregs.cs = segment(state.cs);
    for register in [&mut sregs.ds, &mut sregs.es, &mut sregs.fs, &mut sregs.gs, &mut sregs.ss] {
        *register = segment(state.data);
    }
    sregs.ldt = segment(state.ldtr);
    sregs.tr = segment(state.tr);
    sregs.gdt = kvm_dtable { base: 0, limit: state.gdt_limit, padding: [0; 3] };
    sregs.idt = kvm_dtable { base: 0, limit: state.idt_limit, padding: [0; 3] };
    sregs.cr0 = state.cr0;
    sregs.cr2 = 0;
    sregs.cr3 = 0;
    sregs.cr4 = state.cr4;
    sregs.efer = state.efer;
    sregs.interrupt_bitmap = [0; 4];
}

fn segment(segment: Segment) -> kvm_segment {
    let rights = segment.access_rights;
    let bit = |n: u32| (rights >> n & 1) as u8;
    kvm_segment {
        base: segment.base,
        limit: segment.limit,
        selector: segment.selector,
        type_: (rights & 15) as u8,
        s: bit(4),
        dpl: (rights >> 5 & 3) as u8,
        present: bit(7),
        avl: bit(12),
        l: bit(13),
        db: bit(14),
        g: bit(15),
        unusable: bit(16),
        padding: 0,
    }
}
