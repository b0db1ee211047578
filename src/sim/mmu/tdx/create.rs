//! KVM_TDX_INIT_VM, KVM_TDX_INIT_VCPU and KVM_TDX_FINALIZE_VM.

use super::boot::{HOST_LP, PARAMS};
use super::{Td, TdState, TdVcpu};
use crate::machine::{Errno, PAGE_SIZE};
use crate::sim::World;
use crate::sim::host::{Holder, Order, Pfn};
use crate::sim::mmu::VmId;
use crate::sim::profile::PendingAccess;
use crate::sim::tdx_module::td::{ATTR_SEPT_VE_DISABLE, TDCS_PAGES};
use crate::sim::tdx_module::vcpu::TDVPS_PAGES;
use crate::sim::tdx_module::{Code, Leaf, Reg, Status};
use std::collections::BTreeMap;

impl World {
    /// KVM_TDX_INIT_VM: a key id, the control structure, the keys.
    ///
    /// # Errors
    /// EINVAL for a second call, ENOSPC without a free key id, ENOMEM, EAGAIN without entropy, EIO after any other
    /// SEAMCALL failure, with the VM bugged.
    pub fn tdx_init_vm(&mut self, vm: VmId) -> Result<(), Errno> {
        if self.live_vm(vm)?.td.is_some() {
            return Err(Errno::EINVAL);
        }
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
            vcpus: BTreeMap::new(),
        };
        if let Some(state) = self.vms.get_mut(&vm) {
            state.td = Some(td);
        }
        let built = self.build_tdcs(vm, tdr_pa);
        if built.is_err() {
            self.tdx_destroy(vm);
        }
        built
    }

    fn build_tdcs(&mut self, vm: VmId, tdr_pa: u64) -> Result<(), Errno> {
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
        self.write_td_params();
        self.create_step(vm, Leaf::MngInit, &[(Reg::Rcx, tdr_pa), (Reg::Rdx, PARAMS)])
    }

    /// A TD with 48-bit addresses.
    fn write_td_params(&mut self) {
        let attributes = if self.profile.pending == PendingAccess::Exit { ATTR_SEPT_VE_DISABLE } else { 0 };
        let module = &mut self.tdx_host().module;
        module.host_reset(PARAMS, PAGE_SIZE);
        let words = [(0, attributes), (8, 3), (16, 64), (24, 6 | 3 << 3), (32, 0), (40, 100)];
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

    /// KVM_CREATE_VCPU and KVM_TDX_INIT_VCPU.
    ///
    /// # Errors
    /// EIO when the TD is not exactly INITIALIZED, EINVAL without a split irqchip, ENOSPC without a processor, ENOMEM, EIO
    /// after a SEAMCALL failure, with the VM bugged.
    pub fn tdx_init_vcpu(&mut self, vm: VmId, id: u32) -> Result<(), Errno> {
        let state = self.live_vm(vm)?;
        let split_irqchip = state.split_irqchip;
        let tdr_pa = state.td.as_ref().filter(|td| td.state == TdState::Initialized).ok_or(Errno::EIO)?.tdr_pa();
        if !split_irqchip {
            return Err(Errno::EINVAL);
        }
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
        self.create_step(vm, Leaf::VpInit, &[(Reg::Rcx, tdvpr_pa)])?;
        self.tdx_host().seamcall(HOST_LP, Leaf::VpFlush, &[(Reg::Rcx, tdvpr_pa)]);
        if let Some(td) = self.vms.get_mut(&vm).and_then(|state| state.td.as_mut()) {
            td.vcpus.insert(id, TdVcpu { tdvpr, tdcx, lp });
        }
        Ok(())
    }

    /// KVM_TDX_FINALIZE_VM.
    ///
    /// # Errors
    /// EINVAL when the TD is not INITIALIZED, EBUSY, EIO with the VM bugged.
    pub fn tdx_finalize(&mut self, vm: VmId) -> Result<(), Errno> {
        let td = self.live_vm(vm)?.td.as_ref();
        let tdr_pa = td.filter(|td| td.state == TdState::Initialized).ok_or(Errno::EINVAL)?.tdr_pa();
        self.create_step(vm, Leaf::MrFinalize, &[(Reg::Rcx, tdr_pa)])?;
        if let Some(td) = self.vms.get_mut(&vm).and_then(|state| state.td.as_mut()) {
            td.state = TdState::Runnable;
        }
        Ok(())
    }

    /// Everything between KVM_CREATE_VM and the first KVM_RUN of a TD with `vcpus` vCPUs.
    ///
    /// # Errors
    /// Those of the steps.
    pub fn tdx_build(&mut self, vm: VmId, vcpus: u32) -> Result<(), Errno> {
        self.live_vm(vm)?.split_irqchip = true;
        self.tdx_init_vm(vm)?;
        for id in 0..vcpus {
            self.tdx_init_vcpu(vm, id)?;
        }
        self.tdx_finalize(vm)
    }
}
