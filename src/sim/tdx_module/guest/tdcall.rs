//! The guest's door: TDCALL, and the leaves that touch no memory mapping (TDX module spec 3.7, 3.8, 9.7).

use sha2::{Digest, Sha384};

use super::super::call::{AnyLeaf, Call, LpError, Outcome, Stop};
use super::super::fault::Effect;
use super::super::leaf::TdcallLeaf;
use super::super::lp::{Activity, LpId};
use super::super::module::Module;
use super::super::operand::Operand;
use super::super::regs::{Reg, Regs};
use super::super::sept::{span, walk};
use super::super::status::{Code, Status, invalid};
use super::super::td::{CONFIG_NO_RBP_MOD, CONFIG_PAGE_RELEASE};
use super::super::vcpu::{LastExit, VeInfo};
use super::exit::{Extended, Report};
use super::{Access, GuestOutcome, TdExit, exit_reason};

/// How a TDCALL leaf ends.
pub(crate) enum TdcallEnd {
    /// Back in the guest with this status.
    Status(Status),
    /// Turned away by a host's priority on the operand; the guest sees it as busy.
    HostPriority(Operand),
    /// A fault-like exit: the guest repeats the TDCALL.
    Fault(Report),
    /// An external interrupt between two pieces of work: the guest repeats the TDCALL, which goes on where it was.
    Interrupted,
    /// TDG.VP.VMCALL.
    Vmcall,
}

impl From<Status> for TdcallEnd {
    fn from(status: Status) -> TdcallEnd {
        TdcallEnd::Status(status)
    }
}

/// What a TDCALL leaf function returns; `Err` only for a leaf that is held.
pub(crate) type TdcallResult = Result<TdcallEnd, Stop>;

impl Module {
    /// The guest on `lp` executes TDCALL with these registers: leaf and version in RAX. They are replaced by the leaf's outputs when the
    /// TDCALL comes back; after an exit they are in the vCPU ([`super::super::vcpu::Vcpu::gpr`]) until the next VP.ENTER.
    ///
    /// # Errors
    /// The processor runs no guest, or has a TDCALL held.
    pub fn tdcall(&mut self, lp: LpId, regs: &mut Regs) -> Result<GuestOutcome, LpError> {
        let tdvpr = self.guest_on(lp)?;
        let input = *regs;
        if let Some(vcpu) = self.vcpu_mut(tdvpr) {
            vcpu.gpr = input;
        }
        let number = input.rax as u16;
        let leaf = if input.rax >> 16 == 0 { TdcallLeaf::from_number(number) } else { None };
        let Some(leaf) = leaf.filter(|leaf| self.has_tdcall(tdvpr, *leaf)) else {
            let status = invalid(Operand::RAX);
            self.finish_tdcall(tdvpr, input, status);
            regs.rax = status.0;
            self.trace.record(
                lp,
                TdcallLeaf::from_number(number).map(AnyLeaf::Tdcall),
                &input,
                regs,
                Outcome::Done(status),
            );
            return Ok(GuestOutcome::Tdcall(status));
        };
        let state = self.lp_mut(lp)?;
        let (locks, hold) = (std::mem::take(&mut state.spare), state.hold.take());
        let mut call = Call::new(lp, AnyLeaf::Tdcall(leaf), 0, input, locks, hold);
        call.tdvpr = Some(tdvpr);
        let outcome = self.run_tdcall(call, leaf, tdvpr);
        if let (GuestOutcome::Tdcall(_), Some(vcpu)) = (&outcome, self.vcpu(tdvpr)) {
            *regs = vcpu.gpr;
        }
        Ok(outcome)
    }

    /// The guest on `lp` accepts a page: TDG.MEM.PAGE.ACCEPT of `gpa` at `level`.
    ///
    /// # Errors
    /// The processor runs no guest, or has a TDCALL held.
    pub fn guest_accept(&mut self, lp: LpId, gpa: u64, level: u8) -> Result<GuestOutcome, LpError> {
        let rax = TdcallLeaf::MemPageAccept.number() as u64;
        self.tdcall(lp, &mut Regs { rax, rcx: gpa | level as u64, ..Regs::default() })
    }

    fn has_tdcall(&self, tdvpr: u64, leaf: TdcallLeaf) -> bool {
        let flags = self.vcpu(tdvpr).and_then(|vcpu| self.td(vcpu.tdr_pa)).map_or(0, |td| td.config_flags);
        leaf != TdcallLeaf::MemPageRelease || self.switches.page_release && flags & CONFIG_PAGE_RELEASE != 0
    }

    /// Runs a TDCALL that was held half-way to its end.
    pub(crate) fn release_tdcall(&mut self, call: Call) -> GuestOutcome {
        let (AnyLeaf::Tdcall(leaf), Some(tdvpr)) = (call.leaf, call.tdvpr) else { return GuestOutcome::Done };
        if let Ok(state) = self.lp_mut(call.lp) {
            state.activity = Activity::Guest { tdvpr };
        }
        self.run_tdcall(call, leaf, tdvpr)
    }

    fn run_tdcall(&mut self, mut call: Call, leaf: TdcallLeaf, tdvpr: u64) -> GuestOutcome {
        let (lp, input) = (call.lp, call.input);
        let planned = if self.faults.is_empty() || call.replaying { None } else { self.planned_fault(&call) };
        let end = match planned {
            Some((Effect::InsteadOf, status)) => Ok(TdcallEnd::Status(status)),
            _ => self.tdcall_leaf(&mut call, leaf, tdvpr),
        };
        let end = match end {
            Ok(TdcallEnd::Status(status)) => match planned {
                Some((Effect::After, planned)) if status.is_zero() => TdcallEnd::Status(planned),
                _ => TdcallEnd::Status(status),
            },
            Ok(end) => end,
            Err(Stop::Fail(status)) => TdcallEnd::Status(status),
            Err(Stop::Held) => {
                self.trace.record(lp, Some(call.leaf), &input, &call.regs, Outcome::Held);
                self.lps[lp.0 as usize].activity = Activity::Held(Box::new(call));
                return GuestOutcome::Held;
            }
        };
        self.release_locks(&mut call.locks);
        self.lps[lp.0 as usize].spare = std::mem::take(&mut call.locks);
        let outcome = self.end_tdcall(lp, tdvpr, call.regs, end);
        let status = match &outcome {
            GuestOutcome::Tdcall(status) => *status,
            GuestOutcome::Exit(exit) => exit.status,
            _ => Status::SUCCESS,
        };
        self.trace.record(lp, Some(call.leaf), &input, &Regs { rax: status.0, ..call.regs }, Outcome::Done(status));
        outcome
    }

    fn end_tdcall(&mut self, lp: LpId, tdvpr: u64, regs: Regs, end: TdcallEnd) -> GuestOutcome {
        if !matches!(end, TdcallEnd::HostPriority(_))
            && let Some(vcpu) = self.vcpu_mut(tdvpr)
        {
            vcpu.hp_busy_since = None;
        }
        match end {
            TdcallEnd::Status(status) => {
                self.finish_tdcall(tdvpr, regs, status);
                GuestOutcome::Tdcall(status)
            }
            TdcallEnd::HostPriority(operand) => self.host_priority_busy(lp, tdvpr, regs, operand),
            TdcallEnd::Fault(report) => self.fault_exit(lp, tdvpr, report),
            TdcallEnd::Interrupted => self.interrupt_exit(lp, tdvpr),
            TdcallEnd::Vmcall => self.vmcall_exit(lp, tdvpr, regs),
        }
    }

    fn finish_tdcall(&mut self, tdvpr: u64, regs: Regs, status: Status) {
        if let Some(vcpu) = self.vcpu_mut(tdvpr) {
            vcpu.gpr = Regs { rax: status.0, ..regs };
        }
        self.step(tdvpr);
    }

    /// A guest turned away by host priority sees BUSY, and after the timeout the host learns of it.
    fn host_priority_busy(&mut self, lp: LpId, tdvpr: u64, regs: Regs, operand: Operand) -> GuestOutcome {
        let status = Status::on(Code::OperandBusy, operand);
        let now = self.clock_ns;
        let timeout =
            self.vcpu(tdvpr).and_then(|vcpu| self.td(vcpu.tdr_pa)).map_or(u64::MAX, |td| td.hp_lock_timeout_ns);
        self.finish_tdcall(tdvpr, regs, status);
        let Some(vcpu) = self.vcpu_mut(tdvpr) else { return GuestOutcome::Done };
        let since = *vcpu.hp_busy_since.get_or_insert(now);
        if now - since < timeout {
            return GuestOutcome::Tdcall(status);
        }
        vcpu.hp_busy_since = None;
        let code = Status::from(Code::HostPriorityBusyTimeout);
        self.async_exit(lp, tdvpr, code, Report::default(), LastExit::AsyncTrap)
    }

    fn tdcall_leaf(&mut self, call: &mut Call, leaf: TdcallLeaf, tdvpr: u64) -> TdcallResult {
        match leaf {
            TdcallLeaf::VpVmcall => Ok(self.tdg_vmcall(call, tdvpr)),
            TdcallLeaf::VpInfo => Ok(self.tdg_vp_info(call, tdvpr)),
            TdcallLeaf::MrRtmrExtend => Ok(self.tdg_rtmr_extend(call, tdvpr)),
            TdcallLeaf::VpVeinfoGet => Ok(self.tdg_veinfo_get(call, tdvpr)),
            TdcallLeaf::MemPageAccept => self.tdg_accept(call, tdvpr),
            TdcallLeaf::MemPageAttrRd => self.tdg_attr_rd(call, tdvpr),
            TdcallLeaf::MemPageAttrWr => self.tdg_attr_wr(call, tdvpr),
            TdcallLeaf::MemPageRelease => self.tdg_release(call, tdvpr),
        }
    }

    fn tdg_vp_info(&mut self, call: &mut Call, tdvpr: u64) -> TdcallEnd {
        let Some(vcpu) = self.vcpu(tdvpr) else { return invalid(Operand::RAX).into() };
        let Some(td) = self.td(vcpu.tdr_pa) else { return invalid(Operand::RAX).into() };
        call.regs.rcx = td.gpaw.bits();
        call.regs.rdx = td.attributes;
        call.regs.r8 = td.num_vcpus as u64 | (td.max_vcpus as u64) << 32;
        call.regs.r9 = vcpu.index as u64;
        call.regs.r10 = 0;
        call.regs.r11 = 0;
        Status::SUCCESS.into()
    }

    fn tdg_veinfo_get(&mut self, call: &mut Call, tdvpr: u64) -> TdcallEnd {
        let Some(vcpu) = self.vcpu_mut(tdvpr) else { return invalid(Operand::RAX).into() };
        let info = std::mem::take(&mut vcpu.ve_info);
        let shown = if info.valid { info } else { VeInfo::default() };
        call.regs.rcx = shown.exit_reason as u64;
        call.regs.rdx = shown.qualification;
        call.regs.r8 = shown.gla;
        call.regs.r9 = shown.gpa;
        call.regs.r10 = shown.instruction_length as u64 | (shown.instruction_info as u64) << 32;
        if info.valid { Status::SUCCESS.into() } else { Status::from(Code::NoValidVeInfo).into() }
    }

    fn tdg_vmcall(&mut self, call: &mut Call, tdvpr: u64) -> TdcallEnd {
        let flags = self.vcpu(tdvpr).and_then(|vcpu| self.td(vcpu.tdr_pa)).map_or(0, |td| td.config_flags);
        let mask = call.input.rcx;
        let rbp = if flags & CONFIG_NO_RBP_MOD != 0 { 1 << Reg::Rbp as u64 } else { 0 };
        let forbidden = 1 << Reg::Rax as u64 | 1 << Reg::Rcx as u64 | 1 << Reg::Rsp as u64 | rbp;
        if mask >> 32 != 0 || mask & forbidden != 0 {
            return invalid(Operand::RCX).into();
        }
        TdcallEnd::Vmcall
    }

    fn vmcall_exit(&mut self, lp: LpId, tdvpr: u64, regs: Regs) -> GuestOutcome {
        let fatal = self.vcpu(tdvpr).and_then(|vcpu| self.td(vcpu.tdr_pa)).is_some_and(|td| td.fatal);
        if fatal {
            return self.fatal_exit(lp, exit_reason::TDCALL);
        }
        if let Some(vcpu) = self.vcpu_mut(tdvpr) {
            vcpu.vmcall_mask = regs.rcx;
        }
        self.step(tdvpr);
        self.leave_guest(lp, tdvpr, LastExit::Tdvmcall, super::super::state::VcpuState::Ready);
        let status = Status::new(Code::Success, exit_reason::TDCALL);
        let mut out = Regs { rax: status.0, rcx: regs.rcx, ..Regs::default() };
        out.take_selected(&regs, regs.rcx);
        GuestOutcome::Exit(TdExit { status, regs: out })
    }

    /// RTMR[RDX] = SHA-384(RTMR[RDX] and the 48 bytes at GPA RCX).
    fn tdg_rtmr_extend(&mut self, call: &mut Call, tdvpr: u64) -> TdcallEnd {
        let Some(td) = self.vcpu(tdvpr).and_then(|vcpu| self.td(vcpu.tdr_pa)) else {
            return invalid(Operand::RAX).into();
        };
        let (gpa, index) = (call.input.rcx, call.input.rdx);
        if !gpa.is_multiple_of(64) || !td.gpaw.is_private(gpa) {
            return invalid(Operand::RCX).into();
        }
        if index > 3 {
            return invalid(Operand::RDX).into();
        }
        let (tdr, hkid) = (td.tdr_pa, td.hkid);
        let Ok(at) = walk::walk_to_leaf(&*self.memory, td.root_pa, td.root_level, gpa) else {
            return TdcallEnd::Fault(Report::violation(gpa, Access::Read as u64, Extended::None));
        };
        let hpa = at.entry.hpa(at.level) + gpa % span(at.level);
        let mut digest = Sha384::new();
        digest.update(td.rtmr[index as usize]);
        for word in 0..6 {
            match self.read_as(hpa + 8 * word, hkid) {
                Ok(word) => digest.update(word.to_le_bytes()),
                Err(_) => return invalid(Operand::RCX).into(),
            }
        }
        if let Some(td) = self.td_by_tdr_mut(tdr) {
            td.rtmr[index as usize] = digest.finalize().into();
        }
        Status::SUCCESS.into()
    }
}
