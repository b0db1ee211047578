//! TDG.MEM.PAGE.ATTR.RD and ATTR.WR, as far as a TD without L2 partitions sees them (TDX module spec 3.8).

use super::super::call::Call;
use super::super::lp::HoldPoint;
use super::super::module::Module;
use super::super::operand::Operand;
use super::super::sept::walk;
use super::super::sept::{SeptOp, SeptState};
use super::super::status::{Code, Status, invalid};
use super::exit::{Extended, Report, WalkEnd};
use super::tdcall::{TdcallEnd, TdcallResult};

const PENDING: u64 = 1 << 62;

impl Module {
    pub(crate) fn tdg_attr_rd(&mut self, call: &mut Call, tdvpr: u64) -> TdcallResult {
        let gpa = call.input.rcx;
        let Some(td) = self.vcpu(tdvpr).and_then(|vcpu| self.td(vcpu.tdr_pa)) else {
            return Ok(invalid(Operand::RCX).into());
        };
        if !gpa.is_multiple_of(4096) || !td.gpaw.is_private(gpa) {
            return Ok(invalid(Operand::RCX).into());
        }
        let at = match walk::walk(&*self.memory, td.root_pa, td.root_level, gpa, 0) {
            Ok(at) | Err(at) => at,
        };
        if let Err(end) = self.guest_entry_lock(call, at) {
            return Ok(end);
        }
        call.point(HoldPoint::Entry)?;
        let allowed = at.entry.state().filter(|state| state.allows(SeptOp::AttrRd));
        let Some(state) = allowed else {
            return Ok(TdcallEnd::Fault(Report::violation(gpa, 0, Extended::None)));
        };
        call.regs.rcx = gpa | at.level as u64 | if state.any_pending() { PENDING } else { 0 };
        call.regs.rdx = 0;
        Ok(Status::SUCCESS.into())
    }

    pub(crate) fn tdg_attr_wr(&mut self, call: &mut Call, tdvpr: u64) -> TdcallResult {
        let guest = match self.guest_walk(call, tdvpr, 2) {
            Ok(guest) => guest,
            Err(end) => return Ok(end),
        };
        // Without L2 partitions no VM has attributes to set, and L1's must be 0 anyway.
        if call.input.rdx != 0 {
            return Ok(invalid(Operand::RDX).into());
        }
        let exit = |at| {
            let end = WalkEnd { requested: guest.level, at };
            Ok(TdcallEnd::Fault(Report::tdcall_violation(guest.gpa, end, Extended::AttrWr)))
        };
        let at = match guest.found {
            Ok(at) => at,
            Err(stop) => return exit(stop),
        };
        if let Err(end) = self.guest_entry_lock(call, at) {
            return Ok(end);
        }
        call.point(HoldPoint::Entry)?;
        match at.entry.state() {
            Some(state) if !state.is_leaf() && state != SeptState::Free => {
                Ok(Status::new(Code::PageSizeMismatch, at.level as u32).into())
            }
            Some(state) if state.allows(SeptOp::AttrWr) => {
                call.regs.rcx = guest.gpa | at.level as u64 | if state.any_pending() { PENDING } else { 0 };
                call.regs.rdx = 0;
                Ok(Status::SUCCESS.into())
            }
            _ => exit(at),
        }
    }
}
