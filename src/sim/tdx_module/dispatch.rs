//! The host's door: RAX in, completion status out (TDX module spec 3.1), holding and releasing, faults on plan.

use super::call::{AnyLeaf, Call, LpError, Outcome, Stop};
use super::fault::{CallOperands, Effect};
use super::guest::GuestOutcome;
use super::leaf::{Leaf, legal_before_ready};
use super::leaves;
use super::lp::{Activity, LpId};
use super::module::Module;
use super::operand::Operand;
use super::regs::Regs;
use super::state::SysState;
use super::status::{Code, Status, invalid};

/// How a leaf that was held half-way ended once it was let go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Released {
    /// A leaf of the host, with its registers, status in RAX.
    Host(Outcome, Regs),
    /// A leaf of the guest.
    Guest(GuestOutcome),
}

/// The ways a leaf's work ends when it is not held or stopped.
pub(crate) enum Success {
    /// With a status of class success, mostly zero.
    Done(Status),
    /// In the guest.
    Entered,
}

/// What a leaf function returns.
pub(crate) type LeafResult = Result<Success, Stop>;

/// Success without details.
pub(crate) const DONE: LeafResult = Ok(Success::Done(Status::SUCCESS));

impl Module {
    /// Executes SEAMCALL on `lp`: leaf and version from RAX, operands from the other registers, which are replaced by the leaf's
    /// outputs; RAX by the completion status once the leaf is over.
    ///
    /// # Errors
    /// When the processor cannot execute anything: it does not exist, runs a guest, or has a leaf held.
    pub fn seamcall(&mut self, lp: LpId, regs: &mut Regs) -> Result<Outcome, LpError> {
        let state = self.lps.get_mut(lp.0 as usize).ok_or(LpError::NoSuchLp(lp))?;
        match state.activity {
            Activity::Host => {}
            Activity::Guest { .. } => return Err(LpError::InGuest(lp)),
            Activity::Held(_) => return Err(LpError::HoldsLeaf(lp)),
        }
        let input = *regs;
        let (leaf, version) = match self.dispatch(input.rax) {
            Ok(found) => found,
            Err(status) => {
                regs.rax = status.0;
                let leaf = Leaf::from_number(input.rax as u16).map(AnyLeaf::Seamcall);
                self.trace.record(lp, leaf, &input, regs, Outcome::Done(status));
                return Ok(Outcome::Done(status));
            }
        };
        let state = &mut self.lps[lp.0 as usize];
        let (locks, hold) = (std::mem::take(&mut state.spare), state.hold.take());
        let call = Call::new(lp, AnyLeaf::Seamcall(leaf), version, input, locks, hold);
        Ok(self.run_leaf(call, leaf, regs))
    }

    /// Lets the leaf held on `lp` run on to its end.
    ///
    /// # Errors
    /// [`LpError::HoldsNothing`], [`LpError::NoSuchLp`].
    pub fn release(&mut self, lp: LpId) -> Result<Released, LpError> {
        let state = self.lp_mut(lp)?;
        if !matches!(state.activity, Activity::Held(_)) {
            return Err(LpError::HoldsNothing(lp));
        }
        let Activity::Held(mut call) = std::mem::replace(&mut state.activity, Activity::Host) else {
            return Err(LpError::HoldsNothing(lp));
        };
        call.replaying = true;
        call.regs = call.input;
        for lock in &mut call.locks {
            lock.claimed = false;
        }
        match call.leaf {
            AnyLeaf::Seamcall(leaf) => {
                let mut regs = call.input;
                let outcome = self.run_leaf(*call, leaf, &mut regs);
                Ok(Released::Host(outcome, regs))
            }
            AnyLeaf::Tdcall(_) => Ok(Released::Guest(self.release_tdcall(*call))),
        }
    }

    /// The checks before any leaf, in their order.
    fn dispatch(&self, rax: u64) -> Result<(Leaf, u8), Status> {
        let unknown = invalid(Operand::RAX);
        let (number, version) = (rax as u16, (rax >> 16) as u8);
        if rax >> 24 != 0 {
            return Err(unknown);
        }
        let leaf = Leaf::from_number(number).filter(|leaf| self.offers(*leaf));
        if version > 0 && leaf.is_none_or(|leaf| self.max_version(leaf) == 0) {
            return Err(unknown);
        }
        let before_ready = legal_before_ready(number);
        match self.sys.state {
            SysState::Shutdown if leaf != Some(Leaf::SysLpShutdown) => return Err(Code::SysShutdown.into()),
            SysState::InitPending | SysState::InitDone | SysState::ConfigDone if !before_ready => {
                return Err(Code::SysNotReady.into());
            }
            _ => {}
        }
        leaf.map(|leaf| (leaf, version)).ok_or(unknown)
    }

    /// Whether the module as switched has the leaf at all.
    fn offers(&self, leaf: Leaf) -> bool {
        !matches!(leaf, Leaf::PhymemPamtAdd | Leaf::PhymemPamtRemove) || self.switches.dpamt
    }

    /// The highest version of a leaf that the module as switched knows.
    fn max_version(&self, leaf: Leaf) -> u8 {
        match leaf {
            Leaf::VpInit if self.switches.topology_enum => 1,
            _ => leaf.max_version(self.switches.generation),
        }
    }

    /// Runs a leaf to its end or to its hold point.
    fn run_leaf(&mut self, mut call: Call, leaf: Leaf, regs: &mut Regs) -> Outcome {
        let planned = if self.faults.is_empty() || call.replaying { None } else { self.planned_fault(&call) };
        let result = match planned {
            Some((Effect::InsteadOf, status)) => {
                if leaves::zeroes_error_info(leaf) && !status.is(Code::InterruptedRestartable) {
                    (call.regs.rcx, call.regs.rdx) = (0, 0);
                }
                Err(Stop::Fail(status))
            }
            _ if call.version > self.max_version(leaf) => Err(Stop::Fail(invalid(Operand::RAX))),
            _ => leaves::run(self, &mut call, leaf),
        };
        let outcome = match (result, planned) {
            (Err(Stop::Held), _) => Outcome::Held,
            (Ok(Success::Done(_)), Some((Effect::After, status))) => Outcome::Done(status),
            (Ok(Success::Done(status)) | Err(Stop::Fail(status)), _) => Outcome::Done(status),
            (Ok(Success::Entered), _) => Outcome::Entered,
        };
        if let Outcome::Done(status) = outcome {
            call.regs.rax = status.0;
            *regs = call.regs;
        }
        self.trace.record(call.lp, Some(call.leaf), &call.input, regs, outcome);
        let lp = call.lp.0 as usize;
        match outcome {
            Outcome::Held => self.lps[lp].activity = Activity::Held(Box::new(call)),
            Outcome::Done(_) | Outcome::Entered => {
                self.release_locks(&mut call.locks);
                self.lps[lp].spare = call.locks;
            }
        }
        outcome
    }

    pub(crate) fn planned_fault(&mut self, call: &Call) -> Option<(Effect, Status)> {
        let mut operands = CallOperands::of(call.leaf, &call.input);
        if let (AnyLeaf::Tdcall(_), Some(tdvpr)) = (call.leaf, self.running(call.lp)) {
            operands.tdr = self.vcpu(tdvpr).map(|vcpu| vcpu.tdr_pa);
        }
        if let (Some(tdr), Some(gpa), Some(level)) = (operands.tdr, operands.gpa, operands.level)
            && operands.pages[0].is_none()
            && let Some(Ok(entry)) = self.sept_entry(tdr, gpa, level)
            && entry.state() != Some(super::sept::SeptState::Free)
        {
            operands.pages[0] = Some(entry.hpa(level));
        }
        self.faults.strike(call.leaf, &operands)
    }
}
