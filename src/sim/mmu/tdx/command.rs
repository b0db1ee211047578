//! KVM_MEMORY_ENCRYPT_OP on a TD: every check in the order of arch/x86/kvm/vmx/tdx.c (KVM spec 5.4 and 5.5).

use super::create::TdConfig;
use super::{TdState, capabilities};
use crate::machine::{CpuidEntry, Errno, TdxAnswer, TdxCommand, TdxCpuid, TdxData, TdxInitVm, VmType};
use crate::sim::World;
use crate::sim::mmu::VmId;
use crate::uapi::kvm_x86::{
    KVM_TDX_CAPABILITIES, KVM_TDX_FINALIZE_VM, KVM_TDX_GET_CPUID, KVM_TDX_INIT_MEM_REGION, KVM_TDX_INIT_VCPU,
    KVM_TDX_INIT_VM,
};
use crate::uapi::tdx_status::TdxStatus;

/// KVM_MAX_CPUID_ENTRIES.
const MAX_ENTRIES: u32 = 256;
/// x2APIC in ECX of CPUID leaf 1.
const X2APIC: u32 = 1 << 21;

impl World {
    /// A sub-command on the VM's descriptor.
    pub fn tdx_vm_command(&mut self, vm: VmId, command: TdxCommand<'_>) -> TdxAnswer {
        let TdxCommand { id, flags, data, hw_error } = command;
        let echoed = TdxStatus(hw_error);
        let plain = |result| TdxAnswer { result, hw_error: echoed };
        match self.live_vm(vm).map(|state| state.vm_type) {
            Err(errno) => return plain(Err(errno)),
            Ok(VmType::Tdx) => {}
            Ok(_) => return plain(Err(Errno::ENOTTY)),
        }
        if hw_error != 0 {
            return plain(Err(Errno::EINVAL));
        }
        match id {
            KVM_TDX_CAPABILITIES => plain(self.tdx_capabilities(flags, data)),
            KVM_TDX_INIT_VM => self.tdx_init_vm_command(vm, flags, &data),
            KVM_TDX_FINALIZE_VM => self.tdx_finalize(vm),
            _ => plain(Err(Errno::EINVAL)),
        }
    }

    fn tdx_capabilities(&mut self, flags: u32, data: TdxData<'_>) -> Result<(), Errno> {
        if flags != 0 {
            return Err(Errno::EINVAL);
        }
        let TdxData::Capabilities(answer) = data else { return Err(Errno::EFAULT) };
        let entries = capabilities::configurable(self.tdx_host().module.platform());
        if (answer.fixed.cpuid.nent as usize) < entries.len() {
            return Err(Errno::E2BIG);
        }
        capabilities::fill(&mut answer.fixed, entries.len() as u32);
        answer.entries = entries;
        Ok(())
    }

    fn tdx_init_vm_command(&mut self, vm: VmId, flags: u32, data: &TdxData<'_>) -> TdxAnswer {
        let initialized = self.vms.get(&vm).is_some_and(|state| state.td.is_some());
        if initialized || flags != 0 {
            return TdxAnswer::failed(Errno::EINVAL);
        }
        let TdxData::InitVm(init) = data else { return TdxAnswer::failed(Errno::EFAULT) };
        match self.td_config(vm, init) {
            Ok(config) => self.tdx_init_vm(vm, &config),
            Err(errno) => TdxAnswer::failed(errno),
        }
    }

    /// setup_tdparams(): what user space asks for, checked as far as KVM does.
    fn td_config(&mut self, vm: VmId, init: &TdxInitVm) -> Result<TdConfig, Errno> {
        let fixed = &init.fixed;
        if fixed.cpuid.nent > MAX_ENTRIES {
            return Err(Errno::E2BIG);
        }
        if fixed.reserved != [0; 12] || fixed.cpuid.padding != 0 {
            return Err(Errno::EINVAL);
        }
        if !self.live_vm(vm)?.vcpu_ids.is_empty() {
            return Err(Errno::EBUSY);
        }
        if fixed.attributes & !capabilities::ATTRIBUTES != 0 || fixed.xfam & !capabilities::XFAM != 0 {
            return Err(Errno::EINVAL);
        }
        let cpuid = capabilities::values(self.tdx_host().module.platform(), fixed.cpuid.nent, &init.entries)?;
        let measurements = [fixed.mrconfigid, fixed.mrowner, fixed.mrownerconfig];
        Ok(TdConfig { attributes: fixed.attributes, xfam: fixed.xfam | 3, cpuid, measurements })
    }

    /// A sub-command on a vCPU's descriptor.
    pub fn tdx_vcpu_command(&mut self, vm: VmId, vcpu: u32, command: TdxCommand<'_>) -> TdxAnswer {
        let TdxCommand { id, flags, data, hw_error } = command;
        // The structure is never copied back.
        let result = self.tdx_vcpu_result(vm, vcpu, id, flags, data, hw_error);
        TdxAnswer { result, hw_error: TdxStatus(hw_error) }
    }

    /// Whether KVM reads the structure of a command on a vCPU of a TD: until 6.18 it looks at the TD's state first.
    ///
    /// # Errors
    /// EIO on a dead VM.
    pub fn takes_vcpu_commands(&mut self, vm: VmId) -> Result<bool, Errno> {
        let first_code = self.profile.kernel.has_first_tdx_code();
        let state = self.live_vm(vm)?;
        let open = state.td.as_ref().is_some_and(|td| td.key_assigned && td.state == TdState::Initialized);
        Ok(open || !first_code)
    }

    fn tdx_vcpu_result(
        &mut self,
        vm: VmId,
        vcpu: u32,
        id: u32,
        flags: u32,
        data: TdxData<'_>,
        hw_error: u64,
    ) -> Result<(), Errno> {
        let state = self.live_vm(vm)?;
        let of_td = state.vm_type == VmType::Tdx;
        let open = state.td.as_ref().is_some_and(|td| td.key_assigned && td.state == TdState::Initialized);
        if !of_td || hw_error != 0 || !open {
            return Err(Errno::EINVAL);
        }
        match id {
            KVM_TDX_INIT_VCPU => {
                let td = self.live_vm(vm)?.td.as_ref().ok_or(Errno::EINVAL)?;
                if flags != 0 || td.vcpus.contains_key(&vcpu) || !td.x2apic.contains(&vcpu) {
                    return Err(Errno::EINVAL);
                }
                let rcx = if let TdxData::Value(value) = data { value } else { 0 };
                self.tdx_init_vcpu(vm, vcpu, rcx)
            }
            KVM_TDX_INIT_MEM_REGION => self.tdx_init_mem_region(vm, vcpu, flags, data),
            KVM_TDX_GET_CPUID => {
                let TdxData::Cpuid(answer) = data else { return Err(Errno::EFAULT) };
                capabilities::seen_by_guest(answer)
            }
            _ => Err(Errno::EINVAL),
        }
    }

    /// KVM_SET_CPUID2.
    ///
    /// # Errors
    /// EIO on a dead VM.
    pub fn set_cpuid(&mut self, vm: VmId, vcpu: u32, entries: &[CpuidEntry]) -> Result<(), Errno> {
        let Some(td) = self.live_vm(vm)?.td.as_mut() else { return Ok(()) };
        if entries.iter().any(|entry| entry.function == 1 && entry.ecx & X2APIC != 0) {
            td.x2apic.insert(vcpu);
        } else {
            td.x2apic.remove(&vcpu);
        }
        Ok(())
    }
}

impl TdxCpuid {
    /// Answers with these entries, or with how many there are.
    pub(super) fn answer(&mut self, entries: Vec<CpuidEntry>) -> Result<(), Errno> {
        let room = self.head.nent as usize;
        self.head.nent = entries.len() as u32;
        if room < entries.len() {
            return Err(Errno::E2BIG);
        }
        self.entries = entries;
        Ok(())
    }
}
