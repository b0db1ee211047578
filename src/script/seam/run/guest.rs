//! Guest operations. A vCPU that is inside stays inside; one that is not enters for the one operation and leaves again.

use super::super::ast::{AccessKind, Guest, GuestOperation};
use super::super::expect::Exception;
use super::call::{default_lp, exit_outcome};
use super::outcome::{Kind, Outcome};
use super::{Ran, Runner, Stop};
use crate::sim::tdx_module::guest::{GuestException, GuestOutcome};
use crate::sim::tdx_module::leaf::tdcall_info;
use crate::sim::tdx_module::{Leaf, LpId, Outcome as LeafOutcome, Regs, TdcallLeaf};

/// What an operation is called in a mismatch.
pub(super) fn operation_name(operation: &GuestOperation) -> String {
    match operation {
        GuestOperation::Access { kind: AccessKind::Touch, .. } => "guest access".to_string(),
        GuestOperation::Access { kind: AccessKind::Read, .. } => "guest read".to_string(),
        GuestOperation::Access { kind: AccessKind::Write, .. } => "guest write".to_string(),
        GuestOperation::Access { kind: AccessKind::Fetch, .. } => "guest fetch".to_string(),
        GuestOperation::Tdcall { leaf, .. } => match tdcall_info(*leaf) {
            Some(info) => info.name.to_string(),
            None => format!("TDCALL leaf {leaf}"),
        },
        GuestOperation::Step => "guest step".to_string(),
    }
}

/// Where the vCPU is, once it is inside.
enum Inside {
    /// It was inside before.
    Already(LpId),
    /// It entered for this operation.
    Momentarily(LpId),
    /// It could not enter.
    Refused(Box<Outcome>),
}

impl Runner<'_> {
    pub(super) fn guest(&mut self, guest: &Guest) -> Ran {
        match self.inside(guest)? {
            Inside::Already(lp) => self.operate(lp, &guest.operation),
            Inside::Momentarily(lp) => {
                let outcome = self.operate(lp, &guest.operation)?;
                self.leave(lp)?;
                Ok(outcome)
            }
            Inside::Refused(outcome) => Ok(*outcome),
        }
    }

    pub(super) fn hold_guest(&mut self, guest: &Guest, point: Option<&str>) -> Ran {
        let (lp, momentary) = match self.inside(guest)? {
            Inside::Already(lp) => (lp, false),
            Inside::Momentarily(lp) => (lp, true),
            Inside::Refused(outcome) => return Ok(*outcome),
        };
        self.hold_next(lp, point)?;
        let outcome = self.operate(lp, &guest.operation)?;
        if momentary {
            match outcome.kind {
                Kind::Held => drop(self.momentary.insert(lp)),
                _ => self.leave(lp)?,
            }
        }
        Ok(outcome)
    }

    fn inside(&mut self, guest: &Guest) -> Result<Inside, Stop> {
        let tdvpr = self.value(&guest.vcpu)?;
        let module = &mut self.machine()?.module;
        if let Some(lp) = module.runs_on(tdvpr) {
            return Ok(Inside::Already(lp));
        }
        let lp = default_lp(module, Some(tdvpr))?;
        let mut regs = Regs { rax: u64::from(Leaf::VpEnter.number()), rcx: tdvpr, ..Regs::default() };
        Ok(match module.seamcall(lp, &mut regs)? {
            LeafOutcome::Entered => Inside::Momentarily(lp),
            LeafOutcome::Done(status) => Inside::Refused(Box::new(Outcome::with_regs(Kind::Exit(status.0), regs))),
            LeafOutcome::Held => Inside::Refused(Box::new(Outcome::with_regs(Kind::Held, regs))),
        })
    }

    fn operate(&mut self, lp: LpId, operation: &GuestOperation) -> Ran {
        match operation {
            GuestOperation::Access { kind, gpa, value } => {
                let gpa = self.value(gpa)?;
                let value = value.as_ref().map(|value| self.value(value)).transpose()?.unwrap_or(0);
                let module = &mut self.machine()?.module;
                let outcome = match kind {
                    AccessKind::Touch | AccessKind::Read => module.guest_read(lp, gpa)?,
                    AccessKind::Write => module.guest_write(lp, gpa, value)?,
                    AccessKind::Fetch => module.guest_fetch(lp, gpa)?,
                };
                let mut outcome = self.guest_outcome(lp, outcome)?;
                if let (AccessKind::Touch, Kind::Value(_)) = (kind, &outcome.kind) {
                    outcome.kind = Kind::Done;
                }
                Ok(outcome)
            }
            GuestOperation::Tdcall { leaf, rax, regs } => {
                let mut input = Regs::default();
                for (reg, value) in regs {
                    input[*reg] = self.value(value)?;
                }
                input.rax = match rax {
                    Some(rax) => self.value(rax)?,
                    None => u64::from(*leaf),
                };
                let outcome = self.machine()?.module.tdcall(lp, &mut input)?;
                let mut outcome = self.guest_outcome(lp, outcome)?;
                if outcome.regs.is_none() {
                    outcome.regs = Some(input);
                }
                Ok(outcome)
            }
            GuestOperation::Step => {
                // TDG.VP.INFO touches no memory, and RIP moves on.
                let mut input = Regs { rax: u64::from(TdcallLeaf::VpInfo.number()), ..Regs::default() };
                match self.machine()?.module.tdcall(lp, &mut input)? {
                    GuestOutcome::Tdcall(_) => Ok(Outcome::new(Kind::Done)),
                    other => self.guest_outcome(lp, other),
                }
            }
        }
    }

    /// The module's answer as a script compares it; the registers of a TDCALL that came back are the vCPU's.
    pub(super) fn guest_outcome(&mut self, lp: LpId, outcome: GuestOutcome) -> Ran {
        let module = &self.machine()?.module;
        let gpr = module.running(lp).and_then(|tdvpr| module.vcpu(tdvpr)).map(|vcpu| vcpu.gpr);
        Ok(match outcome {
            GuestOutcome::Value(value) => Outcome::new(Kind::Value(value)).number("value", value),
            GuestOutcome::Done => Outcome::new(Kind::Done),
            GuestOutcome::Tdcall(status) => Outcome { regs: gpr, ..Outcome::new(Kind::Status(status.0)) },
            GuestOutcome::Held => Outcome::new(Kind::Held),
            GuestOutcome::Exit(exit) => exit_outcome(Kind::Exit, exit),
            GuestOutcome::Exception(exception) => match exception {
                GuestException::Ve(info) => Outcome::new(Kind::Exception(Exception::Virtualization))
                    .number("reason", info.exit_reason)
                    .number("qualification", info.qualification)
                    .number("gpa", info.gpa),
                GuestException::DoubleFault => Outcome::new(Kind::Exception(Exception::DoubleFault)),
                GuestException::ReservedPageFault => Outcome::new(Kind::Exception(Exception::PageFault)),
            },
        })
    }
}
