//! VP.ENTER: into the guest (TDX module spec 5.27, 9.8).

use super::super::call::{Call, Stop};
use super::super::dispatch::{LeafResult, Success};
use super::super::guest::exit_reason;
use super::super::leaf::Leaf;
use super::super::lock::{LockId, Mode};
use super::super::lp::{Activity, Disorder, HoldPoint};
use super::super::module::Module;
use super::super::operand::Operand;
use super::super::regs::Regs;
use super::super::sept::{SeptEntry, walk};
use super::super::state::VcpuState;
use super::super::status::{Code, Status, busy, invalid};
use super::super::vcpu::{LastExit, TDVPS_PAGES};

const HOST_RECOVERABILITY_HINT: u64 = 1 << 52;
const RESUME_L1: u64 = 1 << 53;
const ADDRESS: u64 = 0x000F_FFFF_FFFF_F000;
/// The hint's bit in the status the guest sees.
const STATUS_HINT: u64 = 1 << 60;

impl Module {
    pub(super) fn vp_enter(&mut self, call: &mut Call) -> LeafResult {
        let result = self.try_enter(call);
        let over = !matches!(result, Ok(Success::Entered) | Err(Stop::Held));
        if over && call.epoch_counted {
            self.uncount(call.input.rcx & ADDRESS)?;
        }
        match result {
            Err(Stop::Fail(status)) if status.is(Code::Success) => Ok(Success::Done(status)),
            result => result,
        }
    }

    fn try_enter(&mut self, call: &mut Call) -> LeafResult {
        let rcx = call.input.rcx;
        self.check_order(call, Disorder::CpuidMaxvalLimited)?;
        if rcx & !(ADDRESS | HOST_RECOVERABILITY_HINT | RESUME_L1) != 0 {
            return Err(invalid(Operand::RCX).into());
        }
        let (tdvpr, tdr) = self.explicit_tdvpr(call, rcx & ADDRESS, Operand::RCX, Mode::Shared, Mode::Shared)?;
        self.td_state(call, tdr, Leaf::VpEnter, Some(Mode::Shared))?;
        self.check_enterable(call, tdvpr, tdr)?;
        self.check_enter_flags(rcx, tdvpr)?;
        self.check_order(call, Disorder::TscAdjustChanged)?;
        if self.clock_ns < self.vcpu_ref(tdvpr)?.last_exit_tsc {
            return Err(Code::TscRollback.into());
        }
        self.check_order(call, Disorder::MonitorOff)?;
        self.count_in_epoch(call, tdvpr, tdr)?;
        self.filter_zero_step(call, tdvpr, tdr)?;
        call.point(HoldPoint::Commit)?;
        self.enter(call, tdvpr, tdr)
    }

    /// State and association of the vCPU. The association made here stays, whatever fails later.
    fn check_enterable(&mut self, call: &mut Call, tdvpr: u64, tdr: u64) -> Result<(), Stop> {
        let vcpu = self.vcpu_ref(tdvpr)?;
        if vcpu.pages() < TDVPS_PAGES {
            return Err(Code::TdcxNumIncorrect.into());
        }
        if vcpu.state != VcpuState::Ready {
            return Err(Code::VcpuStateIncorrect.into());
        }
        match vcpu.assoc {
            Some(lp) if lp != call.lp => Err(Code::VcpuAssociated.into()),
            Some(_) => Ok(()),
            None => {
                call.new_association = true;
                let lp = call.lp;
                self.vcpu_ref_mut(tdvpr)?.assoc = Some(lp);
                self.td_mut(tdr)?.num_assoc_vcpus += 1;
                Ok(())
            }
        }
    }

    /// The hint goes with a trap-like exit only; there is no L1 to resume in a TD without L2 partitions.
    fn check_enter_flags(&self, rcx: u64, tdvpr: u64) -> Result<(), Stop> {
        let hint = rcx & HOST_RECOVERABILITY_HINT != 0;
        let misplaced = hint && self.vcpu_ref(tdvpr)?.last_exit != LastExit::AsyncTrap;
        if rcx & RESUME_L1 != 0 || misplaced {
            return Err(invalid(Operand::RCX).into());
        }
        Ok(())
    }

    /// Samples the epoch under its lock and counts the vCPU in it; drops the TD's translations here when the epoch has moved.
    fn count_in_epoch(&mut self, call: &mut Call, tdvpr: u64, tdr: u64) -> Result<(), Stop> {
        if call.epoch_counted {
            return Ok(());
        }
        self.lock(call, LockId::Epoch(tdr), Mode::Shared).map_err(|_| busy(Operand::TD_EPOCH))?;
        call.point(HoldPoint::Epoch)?;
        let td = self.td_mut(tdr)?;
        let epoch = td.epoch;
        td.refcount[(epoch & 1) as usize] += 1;
        call.epoch_counted = true;
        let vcpu = self.vcpu_ref_mut(tdvpr)?;
        let moved = vcpu.epoch != epoch;
        vcpu.epoch = epoch;
        if moved && !call.new_association {
            self.flush_translations(call.lp, tdr);
        }
        self.release_lock(call, LockId::Epoch(tdr));
        Ok(())
    }

    fn uncount(&mut self, tdvpr: u64) -> Result<(), Stop> {
        let (epoch, tdr) = (self.vcpu_ref(tdvpr)?.epoch, self.vcpu_ref(tdvpr)?.tdr_pa);
        self.td_mut(tdr)?.refcount[(epoch & 1) as usize] -= 1;
        Ok(())
    }

    /// With suspected GPAs, takes the tree lock and looks whether they are mapped by now; if not, returns an EPT violation that the
    /// guest has not had.
    ///
    /// A page that waits for its acceptance counts as mapped: the host has done what it can, and a guest that is not let in can never
    /// accept it. Inferred; spec 9.8 says only that the translation must not fail.
    fn filter_zero_step(&mut self, call: &mut Call, tdvpr: u64, tdr: u64) -> Result<(), Stop> {
        let suspects = self.vcpu_ref(tdvpr)?.epf_list.clone();
        if suspects.is_empty() {
            return Ok(());
        }
        self.lock(call, LockId::SeptTree(tdr), Mode::Exclusive).map_err(|_| busy(Operand::SEPT_TREE))?;
        call.point(HoldPoint::Tree)?;
        let td = self.td_ref(tdr)?;
        let unmapped = suspects.into_iter().find(|gpa| {
            let found = walk::walk_to_leaf(&*self.memory, td.root_pa, td.root_level, *gpa);
            let (Ok(at) | Err(at)) = found;
            let pending = at.entry.state().is_some_and(|state| state.acceptable());
            !pending && (found.is_err() || at.entry.rwx() != SeptEntry::RWX)
        });
        let Some(gpa) = unmapped else { return Ok(()) };
        let status = Status::new(Code::Success, exit_reason::EPT_VIOLATION);
        call.regs = Regs { rcx: 2, r8: gpa, ..Regs::default() };
        Err(Stop::Fail(status))
    }

    fn enter(&mut self, call: &mut Call, tdvpr: u64, tdr: u64) -> LeafResult {
        self.release_lock(call, LockId::OpState(tdr));
        self.release_lock(call, LockId::SeptTree(tdr));
        let lp = call.lp;
        if self.lps[lp.0 as usize].last_tdvpr != Some(tdvpr) {
            self.flush_translations(lp, tdr);
            self.lps[lp.0 as usize].last_tdvpr = Some(tdvpr);
        }
        let input = call.input;
        let vcpu = self.vcpu_ref_mut(tdvpr)?;
        match vcpu.last_exit {
            LastExit::Tdvmcall => {
                let mask = vcpu.vmcall_mask;
                vcpu.gpr.take_selected(&input, mask);
                (vcpu.gpr.rax, vcpu.gpr.rcx) = (0, vcpu.vmcall_mask);
            }
            LastExit::AsyncTrap if input.rcx & HOST_RECOVERABILITY_HINT != 0 => vcpu.gpr.rax |= STATUS_HINT,
            _ => {}
        }
        vcpu.state = VcpuState::Active;
        vcpu.entry_rip = vcpu.rip;
        let state = &mut self.lps[lp.0 as usize];
        state.activity = Activity::Guest { tdvpr };
        state.run_locks = std::mem::take(&mut call.locks);
        Ok(Success::Entered)
    }
}
