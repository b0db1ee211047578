//! Building a vCPU and flushing it (TDX module spec 5.6, 5.26, 10.1).

use super::super::call::{Call, Stop};
use super::super::dispatch::{DONE, LeafResult};
use super::super::leaf::Leaf;
use super::super::lock::Mode;
use super::super::lp::{Disorder, HoldPoint};
use super::super::memory::PAGE_SIZE;
use super::super::module::Module;
use super::super::operand::Operand;
use super::super::pamt::PageType;
use super::super::regs::Regs;
use super::super::state::{Lifecycle, VcpuState};
use super::super::status::{Code, invalid};
use super::super::vcpu::{ArchState, MAX_TDVPS_PAGES, RESET_RIP, TDVPS_PAGES, Vcpu};

impl Module {
    /// The vCPU of a TDVPR a leaf has locked.
    pub(crate) fn vcpu_ref(&self, tdvpr: u64) -> Result<&Vcpu, Stop> {
        self.vcpu(tdvpr).ok_or(Stop::from(Code::VcpuStateIncorrect))
    }

    /// As [`Module::vcpu_ref`], to change it.
    pub(crate) fn vcpu_ref_mut(&mut self, tdvpr: u64) -> Result<&mut Vcpu, Stop> {
        self.vcpu_mut(tdvpr).ok_or(Stop::from(Code::VcpuStateIncorrect))
    }

    pub(super) fn vp_create(&mut self, call: &mut Call) -> LeafResult {
        let (page, tdr) = (call.input.rcx, call.input.rdx);
        self.explicit_tdr(call, tdr, Operand::RDX, Mode::Shared)?;
        self.td_state(call, tdr, Leaf::VpCreate, Some(Mode::Shared))?;
        self.free_page(call, page, Operand::RCX)?;
        call.point(HoldPoint::Commit)?;
        let td = self.td_mut(tdr)?;
        td.chldcnt += 1;
        td.vcpus.push(page);
        let hkid = td.hkid;
        self.fill_direct(page, PAGE_SIZE, hkid, 0);
        self.pamt.assign(0, page, PageType::Tdvpr, tdr, 0);
        self.vcpus.insert(page, Vcpu::new(page, tdr));
        DONE
    }

    pub(super) fn vp_addcx(&mut self, call: &mut Call) -> LeafResult {
        let (page, rdx) = (call.input.rcx, call.input.rdx);
        let (tdvpr, tdr) = self.explicit_tdvpr(call, rdx, Operand::RDX, Mode::Exclusive, Mode::Shared)?;
        self.td_state(call, tdr, Leaf::VpAddcx, Some(Mode::Shared))?;
        let vcpu = self.vcpu_ref(tdvpr)?;
        if vcpu.state != VcpuState::Uninitialized {
            return Err(Code::VcpuStateIncorrect.into());
        }
        if vcpu.pages() >= MAX_TDVPS_PAGES {
            return Err(Code::TdcxNumIncorrect.into());
        }
        self.free_page(call, page, Operand::RCX)?;
        call.point(HoldPoint::Commit)?;
        let td = self.td_mut(tdr)?;
        td.chldcnt += 1;
        let hkid = td.hkid;
        self.fill_direct(page, PAGE_SIZE, hkid, 0);
        self.pamt.assign(0, page, PageType::Tdcx, tdr, 0);
        self.vcpu_ref_mut(tdvpr)?.tdcx_pa.push(page);
        DONE
    }

    pub(super) fn vp_init(&mut self, call: &mut Call) -> LeafResult {
        let tdr_mode = if call.version == 0 { Mode::Shared } else { Mode::Exclusive };
        let (tdvpr, tdr) = self.explicit_tdvpr(call, call.input.rcx, Operand::RCX, Mode::Exclusive, tdr_mode)?;
        self.td_state(call, tdr, Leaf::VpInit, Some(Mode::Shared))?;
        let vcpu = self.vcpu_ref(tdvpr)?;
        let td = self.td_ref(tdr)?;
        if vcpu.pages() < TDVPS_PAGES {
            return Err(Code::TdcxNumIncorrect.into());
        }
        if vcpu.state != VcpuState::Uninitialized {
            return Err(Code::VcpuStateIncorrect.into());
        }
        let (index, gpaw) = (td.num_vcpus, td.gpaw.bits());
        if index >= td.max_vcpus {
            return Err(Code::MaxVcpusExceeded.into());
        }
        self.check_order(call, Disorder::TscAdjustChanged)?;
        let x2apic_id = (call.version > 0).then_some(call.input.r8 as u32);
        if x2apic_id.is_some() && call.input.r8 >> 32 != 0 {
            return Err(invalid(Operand::R8).into());
        }
        let taken = |other: &u64| self.vcpu(*other).is_some_and(|vcpu| vcpu.x2apic_id == x2apic_id);
        if x2apic_id.is_some() && td.vcpus.iter().any(taken) {
            return Err(Code::X2apicIdNotUnique.into());
        }
        call.point(HoldPoint::Commit)?;
        let rdx = self.platform.cpuid_1_eax as u64;
        let td = self.td_mut(tdr)?;
        td.num_vcpus += 1;
        td.num_assoc_vcpus += 1;
        let initial = call.input.rdx;
        let gpr = Regs { rbx: gpaw, rcx: initial, r8: initial, rdx, rsi: index as u64, ..Regs::default() };
        let lp = call.lp;
        let vcpu = self.vcpu_ref_mut(tdvpr)?;
        vcpu.index = index;
        vcpu.x2apic_id = x2apic_id;
        vcpu.gpr = gpr;
        vcpu.rip = RESET_RIP;
        vcpu.entry_rip = RESET_RIP;
        vcpu.arch = ArchState::INITIAL;
        vcpu.state = VcpuState::Ready;
        vcpu.assoc = Some(lp);
        DONE
    }

    pub(super) fn vp_flush(&mut self, call: &mut Call) -> LeafResult {
        let (tdvpr, tdr) = self.explicit_tdvpr(call, call.input.rcx, Operand::RCX, Mode::Exclusive, Mode::Shared)?;
        if self.td_ref(tdr)?.lifecycle != Lifecycle::KeysConfigured {
            return Err(Code::TdKeysNotConfigured.into());
        }
        let vcpu = self.vcpu_ref(tdvpr)?;
        if vcpu.pages() < TDVPS_PAGES {
            return Err(Code::TdcxNumIncorrect.into());
        }
        if vcpu.assoc != Some(call.lp) {
            return Err(Code::VcpuNotAssociated.into());
        }
        call.point(HoldPoint::Commit)?;
        self.flush_translations(call.lp, tdr);
        self.vcpu_ref_mut(tdvpr)?.assoc = None;
        self.td_mut(tdr)?.num_assoc_vcpus -= 1;
        DONE
    }
}
