//! KVM_TDX_INIT_VM, KVM_TDX_INIT_VCPU and KVM_TDX_FINALIZE_VM.

use super::boot::{HOST_LP, PARAMS};
use super::{Td, TdState, TdVcpu};
use crate::guest::BootParameter;
use crate::machine::{Errno, PAGE_SIZE, TdxAnswer};
use crate::sim::World;
use crate::sim::host::{Holder, Order, Pfn};
use crate::sim::mmu::VmId;
use crate::sim::profile::PendingAccess;
use crate::sim::tdx_module::td::{ATTR_SEPT_VE_DISABLE, TDCS_PAGES};
use crate::sim::tdx_module::vcpu::TDVPS_PAGES;
use crate::sim::tdx_module::{Code, Leaf, Reg, Status};
use crate::uapi::tdx_status::TdxStatus;
use std::collections::{BTreeMap, BTreeSet};

/// What KVM_TDX_INIT_VM asks for, checked.
#[derive(Clone, Debug)]
pub struct TdConfig {
    /// TD attributes.
    pub attributes: u64,
    /// XFAM.
    pub xfam: u64,
    /// Values of the configurable CPUID leaves.
    pub cpuid: Vec<[u32; 4]>,
    /// MRCONFIGID, MROWNER and MROWNERCONFIG.
    pub measurements: [[u64; 6]; 3],
}

impl World {
    /// KVM_TDX_INIT_VM of a VM that is no TD yet: a key id, the control structure, the keys.
    ///
    /// Fails with ENOSPC without a free key id, ENOMEM, EAGAIN without entropy, EINVAL and the module's status where that
    /// finds an operand invalid, EIO after any other SEAMCALL failure, with the VM bugged.
    pub fn tdx_init_vm(&mut self, vm: VmId, config: &TdConfig) -> TdxAnswer {
        let mut hw_error = 0;
        let result = self.td_init(vm, config, &mut hw_error);
        TdxAnswer { result, hw_error: TdxStatus(hw_error) }
    }

    fn td_init(&mut self, vm: VmId, config: &TdConfig, hw_error: &mut u64) -> Result<(), Errno> {
        let hkid = self.tdx_host().free_hkids.pop().ok_or(Errno::ENOSPC)?;
        let tdr = match self.control_page() {
            Ok(tdr) => tdr,
            Err(errno) => {
                self.tdx_host().free_hkids.push(hkid);
                return Err(errno);
            }
        };
        let tdr_pa = tdr * PAGE_SIZE;
        let create = [(Reg::Rcx, tdr_pa), (Reg::Rdx, u64::from(hkid))];
        let created = self.tdh(Leaf::MngCreate, &create).status;
        if !created.is_zero() {
            self.tdx_host().free_hkids.push(hkid);
            self.host.put(tdr, Holder::Control, 1);
            return Err(self.creation_error(vm, Leaf::MngCreate, created));
        }
        let td = Td {
            hkid,
            key_assigned: true,
            tdr,
            tdcs: Vec::new(),
            state: TdState::Initialized,
            tables: BTreeMap::new(),
            x2apic: BTreeSet::new(),
            prepared: BTreeSet::new(),
            vcpus: BTreeMap::new(),
        };
        if let Some(state) = self.vms.get_mut(&vm) {
            state.td = Some(td);
        }
        let built = self.build_tdcs(vm, tdr_pa, config, hw_error);
        if built.is_err() {
            self.tdx_destroy(vm);
        }
        built
    }

    fn build_tdcs(&mut self, vm: VmId, tdr_pa: u64, config: &TdConfig, hw_error: &mut u64) -> Result<(), Errno> {
        self.create_step(vm, Leaf::MngKeyConfig, &[(Reg::Rcx, tdr_pa)])?;
        for _ in 0..TDCS_PAGES {
            let page = self.control_page()?;
            let added = self.create_step(vm, Leaf::MngAddcx, &[(Reg::Rcx, page * PAGE_SIZE), (Reg::Rdx, tdr_pa)]);
            if let Err(errno) = added {
                self.host.put(page, Holder::Control, 1);
                return Err(errno);
            }
            if let Some(td) = self.vms.get_mut(&vm).and_then(|state| state.td.as_mut()) {
                td.tdcs.push(page);
            }
        }
        self.write_td_params(config);
        let status = self.tdh(Leaf::MngInit, &[(Reg::Rcx, tdr_pa), (Reg::Rdx, PARAMS)]).status;
        if status.is_zero() {
            return Ok(());
        }
        if status.is(Code::OperandInvalid) {
            *hw_error = status.0;
        }
        Err(self.creation_error(vm, Leaf::MngInit, status))
    }

    /// TD_PARAMS of a TD with 48-bit addresses.
    fn write_td_params(&mut self, config: &TdConfig) {
        let mut words = vec![(0, config.attributes), (8, config.xfam), (16, 64), (24, 6 | 3 << 3), (32, 0), (40, 100)];
        for (n, word) in config.measurements.iter().flatten().enumerate() {
            words.push((80 + 8 * n as u64, *word));
        }
        for (n, [eax, ebx, ecx, edx]) in config.cpuid.iter().enumerate() {
            let offset = 256 + 16 * n as u64;
            words.push((offset, u64::from(*eax) | u64::from(*ebx) << 32));
            words.push((offset + 8, u64::from(*ecx) | u64::from(*edx) << 32));
        }
        let module = &mut self.tdx_host().module;
        module.host_reset(PARAMS, PAGE_SIZE);
        for (offset, word) in words {
            module.host_write(PARAMS + offset, word);
        }
        module.host_flush(PARAMS, PAGE_SIZE);
    }

    fn create_step(&mut self, vm: VmId, leaf: Leaf, operands: &[(Reg, u64)]) -> Result<(), Errno> {
        let status = self.tdh(leaf, operands).status;
        if status.is_zero() { Ok(()) } else { Err(self.creation_error(vm, leaf, status)) }
    }

    fn creation_error(&mut self, vm: VmId, leaf: Leaf, status: Status) -> Errno {
        match leaf {
            _ if status.is(Code::RndNoEntropy) => Errno::EAGAIN,
            Leaf::MngInit if status.is(Code::OperandInvalid) => Errno::EINVAL,
            Leaf::MrFinalize if status.is(Code::OperandBusy) => Errno::EBUSY,
            _ => {
                self.tdx_bug_on(vm, leaf, status);
                Errno::EIO
            }
        }
    }

    /// A page for the module's control structures, flushed from the caches.
    pub(super) fn control_page(&mut self) -> Result<Pfn, Errno> {
        let page = self.alloc_folio(Order::Base, Holder::Control)?;
        self.tdx_host().module.host_flush(page * PAGE_SIZE, PAGE_SIZE);
        Ok(page)
    }

    /// KVM_TDX_INIT_VCPU, with what the guest gets in RCX.
    ///
    /// # Errors
    /// ENOSPC without a processor, ENOMEM, EIO after a SEAMCALL failure, with the VM bugged.
    pub fn tdx_init_vcpu(&mut self, vm: VmId, id: u32, rcx: u64) -> Result<(), Errno> {
        let tdr_pa = self.td_of(vm).ok_or(Errno::EIO)?.tdr_pa();
        let lp = self.tdx_host().free_lps.pop().ok_or(Errno::ENOSPC)?;
        let tdvpr = self.control_page()?;
        let tdvpr_pa = tdvpr * PAGE_SIZE;
        self.create_step(vm, Leaf::VpCreate, &[(Reg::Rcx, tdvpr_pa), (Reg::Rdx, tdr_pa)])?;
        let mut tdcx = Vec::new();
        for _ in 1..TDVPS_PAGES {
            let page = self.control_page()?;
            self.create_step(vm, Leaf::VpAddcx, &[(Reg::Rcx, page * PAGE_SIZE), (Reg::Rdx, tdvpr_pa)])?;
            tdcx.push(page);
        }
        self.create_step(vm, Leaf::VpInit, &[(Reg::Rcx, tdvpr_pa), (Reg::Rdx, rcx), (Reg::R8, u64::from(id))])?;
        self.tdx_host().seamcall(HOST_LP, Leaf::VpFlush, &[(Reg::Rcx, tdvpr_pa)]);
        if let Some(td) = self.vms.get_mut(&vm).and_then(|state| state.td.as_mut()) {
            td.vcpus.insert(id, TdVcpu { tdvpr, tdcx, lp });
        }
        Ok(())
    }

    /// KVM_TDX_FINALIZE_VM.
    ///
    /// Fails with EINVAL when the TD is not INITIALIZED; EBUSY, or EIO with the VM bugged, with the module's status.
    pub fn tdx_finalize(&mut self, vm: VmId) -> TdxAnswer {
        let td = self.td_of(vm).filter(|td| td.key_assigned && td.state == TdState::Initialized);
        let Some(tdr_pa) = td.map(Td::tdr_pa) else { return TdxAnswer::failed(Errno::EINVAL) };
        let status = self.tdh(Leaf::MrFinalize, &[(Reg::Rcx, tdr_pa)]).status;
        let result = if status.is_zero() { Ok(()) } else { Err(self.creation_error(vm, Leaf::MrFinalize, status)) };
        if result.is_ok()
            && let Some(td) = self.vms.get_mut(&vm).and_then(|state| state.td.as_mut())
        {
            td.state = TdState::Runnable;
        }
        TdxAnswer { result, hw_error: TdxStatus(status.0) }
    }

    /// Everything between KVM_CREATE_VM and KVM_TDX_FINALIZE_VM of a TD with `vcpus` vCPUs.
    ///
    /// # Errors
    /// Those of the steps.
    pub fn tdx_build(&mut self, vm: VmId, vcpus: u32, pending: PendingAccess) -> Result<(), Errno> {
        self.live_vm(vm)?.split_irqchip = true;
        let attributes = if pending == PendingAccess::Exit { ATTR_SEPT_VE_DISABLE } else { 0 };
        let cpuid = vec![[0; 4]; self.tdx_host().module.platform().cpuid_configs.len()];
        let config = TdConfig { attributes, xfam: 3, cpuid, measurements: [[0; 6]; 3] };
        self.tdx_init_vm(vm, &config).result?;
        for id in 0..vcpus {
            self.tdx_init_vcpu(vm, id, BootParameter::Td as u64)?;
        }
        Ok(())
    }
}
