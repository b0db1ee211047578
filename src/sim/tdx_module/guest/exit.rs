//! TD exits: what the module does with the vCPU and what the host finds in its registers (TDX module spec 9.1, 9.2, 9.6, 9.8).

use super::super::call::LpError;
use super::super::lp::{Activity, LpId};
use super::super::module::Module;
use super::super::regs::Regs;
use super::super::state::VcpuState;
use super::super::status::{Code, Status};
use super::super::vcpu::{EPF_LIST_SIZE, EPF_THRESHOLD, LastExit};
use super::{Access, GuestOutcome, TdExit, exit_reason};

/// Type of an extended exit qualification.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Extended {
    None = 0,
    Accept = 1,
    AttrWr = 5,
    PendingViolation = 6,
}

/// Where a TDCALL's walk ended, for the extended exit qualification.
#[derive(Clone, Copy, Debug)]
pub(crate) struct WalkEnd {
    pub requested: u8,
    pub at: super::super::sept::walk::At,
}

/// What an asynchronous exit reports.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Report {
    pub reason: u32,
    pub qualification: u64,
    pub extended: u64,
    pub gpa: u64,
    pub interruption: u64,
}

impl Report {
    /// An EPT violation by a memory access.
    pub fn violation(gpa: u64, qualification: u64, extended: Extended) -> Report {
        let extended = extended as u64;
        Report { reason: exit_reason::EPT_VIOLATION, qualification, extended, gpa: gpa & !0xFFF, interruption: 0 }
    }

    /// The synthetic EPT violation of a TDCALL whose walk did not find what it needs.
    pub fn tdcall_violation(gpa: u64, end: WalkEnd, extended: Extended) -> Report {
        let entry = end.at.entry;
        let state = entry.state().map_or(0, |state| state.public()) as u64;
        let leaf = u64::from(entry.is_leaf());
        let info = end.requested as u64 | (end.at.level as u64) << 3 | state << 6 | leaf << 14;
        let mut report = Report::violation(gpa, Access::Write as u64 | entry.rwx() << 3, extended);
        report.extended |= info << 32;
        report
    }

    fn regs(&self, status: Status) -> Regs {
        Regs {
            rax: status.0,
            rcx: self.qualification & 0xFFFF_FFFF,
            rdx: self.extended,
            r8: self.gpa,
            r9: self.interruption,
            ..Regs::default()
        }
    }
}

impl Module {
    /// Takes the vCPU out of the guest: locks, reference count, state. The instruction is over (trap) or will be repeated (fault).
    pub(crate) fn leave_guest(&mut self, lp: LpId, tdvpr: u64, last: LastExit, state: VcpuState) {
        let clock = self.clock_ns;
        let Some(vcpu) = self.vcpu_mut(tdvpr) else { return };
        let (tdr, epoch) = (vcpu.tdr_pa, vcpu.epoch);
        vcpu.state = state;
        vcpu.last_exit = last;
        vcpu.last_exit_tsc = clock;
        if vcpu.rip != vcpu.entry_rip {
            vcpu.epf_count = 0;
            vcpu.epf_list.clear();
        }
        if let Some(td) = self.td_by_tdr_mut(tdr) {
            td.refcount[(epoch & 1) as usize] -= 1;
        }
        self.back_to_host(lp);
    }

    fn back_to_host(&mut self, lp: LpId) {
        if let Ok(state) = self.lp_mut(lp) {
            state.activity = Activity::Host;
            let mut locks = std::mem::take(&mut state.run_locks);
            self.release_locks(&mut locks);
        }
    }

    /// An asynchronous exit. If another vCPU's machine check has made the TD fatal, that is what the host learns.
    pub(crate) fn async_exit(
        &mut self,
        lp: LpId,
        tdvpr: u64,
        status: Status,
        report: Report,
        last: LastExit,
    ) -> GuestOutcome {
        let fatal = self.vcpu(tdvpr).and_then(|vcpu| self.td(vcpu.tdr_pa)).is_some_and(|td| td.fatal);
        if fatal {
            return self.fatal_exit(lp, report.reason);
        }
        self.leave_guest(lp, tdvpr, last, VcpuState::Ready);
        let status = Status(status.0 | report.reason as u64);
        GuestOutcome::Exit(TdExit { status, regs: report.regs(status) })
    }

    /// A fault-like exit with status success.
    pub(crate) fn fault_exit(&mut self, lp: LpId, tdvpr: u64, report: Report) -> GuestOutcome {
        self.async_exit(lp, tdvpr, Status::SUCCESS, report, LastExit::AsyncFault)
    }

    /// The exit of a fatal TD: its pages are not touched, the vCPU stays ACTIVE and counted.
    pub(crate) fn fatal_exit(&mut self, lp: LpId, reason: u32) -> GuestOutcome {
        self.back_to_host(lp);
        let status = Status::new(Code::NonRecoverableTdNonAccessible, reason);
        GuestOutcome::Exit(TdExit { status, regs: Regs { rax: status.0, ..Regs::default() } })
    }

    /// A machine check in the guest: the TD is lost.
    pub(crate) fn machine_check_exit(&mut self, lp: LpId, tdvpr: u64) -> GuestOutcome {
        let tdr = self.vcpu(tdvpr).map(|vcpu| vcpu.tdr_pa);
        if let Some(td) = tdr.and_then(|tdr| self.td_by_tdr_mut(tdr)) {
            td.fatal = true;
        }
        self.fatal_exit(lp, exit_reason::EXCEPTION)
    }

    /// Counts an EPT violation of a real access for the zero-step filter.
    pub(crate) fn count_zero_step(&mut self, tdvpr: u64, gpa: u64) {
        if self.switches.no_zero_step {
            return;
        }
        let Some(vcpu) = self.vcpu_mut(tdvpr).filter(|vcpu| vcpu.rip == vcpu.entry_rip) else { return };
        if vcpu.epf_count < EPF_THRESHOLD {
            vcpu.epf_count += 1;
            return;
        }
        let page = gpa & !0xFFF;
        if vcpu.epf_list.len() < EPF_LIST_SIZE && !vcpu.epf_list.contains(&page) {
            vcpu.epf_list.push(page);
        }
    }

    /// Takes the processor out of the guest by an external interrupt, as an IPI from the host does.
    ///
    /// # Errors
    /// The processor runs no guest, or has a TDCALL held.
    pub fn kick(&mut self, lp: LpId) -> Result<TdExit, LpError> {
        let tdvpr = self.guest_on(lp)?;
        Ok(as_exit(self.interrupt_exit(lp, tdvpr)))
    }

    /// Takes the processor out of the guest as an SMI does: the host goes on as if nothing had been, and takes what is pending for it. For
    /// a host whose interrupt is known to be pending, but not its vector.
    ///
    /// # Errors
    /// The processor runs no guest, or has a TDCALL held.
    pub fn kick_by_smi(&mut self, lp: LpId) -> Result<TdExit, LpError> {
        let tdvpr = self.guest_on(lp)?;
        Ok(as_exit(self.fault_exit(lp, tdvpr, Report { reason: exit_reason::OTHER_SMI, ..Report::default() })))
    }

    /// The exit of a pending external interrupt.
    pub(crate) fn interrupt_exit(&mut self, lp: LpId, tdvpr: u64) -> GuestOutcome {
        self.fault_exit(lp, tdvpr, Report { reason: exit_reason::EXTERNAL_INTERRUPT, ..Report::default() })
    }

    /// The guest triple-faults: the vCPU is disabled, the TD lives on.
    ///
    /// # Errors
    /// The processor runs no guest, or has a TDCALL held.
    pub fn guest_triple_fault(&mut self, lp: LpId) -> Result<TdExit, LpError> {
        let tdvpr = self.guest_on(lp)?;
        let fatal = self.vcpu(tdvpr).and_then(|vcpu| self.td(vcpu.tdr_pa)).is_some_and(|td| td.fatal);
        if fatal {
            return Ok(as_exit(self.fatal_exit(lp, exit_reason::TRIPLE_FAULT)));
        }
        self.leave_guest(lp, tdvpr, LastExit::AsyncFault, VcpuState::Disabled);
        let status = Status::new(Code::NonRecoverableVcpu, exit_reason::TRIPLE_FAULT);
        Ok(TdExit { status, regs: Regs { rax: status.0, ..Regs::default() } })
    }

    /// A machine check hits the processor in the guest: the TD is lost.
    ///
    /// # Errors
    /// The processor runs no guest, or has a TDCALL held.
    pub fn guest_machine_check(&mut self, lp: LpId) -> Result<TdExit, LpError> {
        let tdvpr = self.guest_on(lp)?;
        Ok(as_exit(self.machine_check_exit(lp, tdvpr)))
    }
}

fn as_exit(outcome: GuestOutcome) -> TdExit {
    match outcome {
        GuestOutcome::Exit(exit) => exit,
        _ => TdExit { status: Status::SUCCESS, regs: Regs::default() },
    }
}
