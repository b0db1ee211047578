//! MEM.RD and MEM.WR of a debug TD (TDX module spec 5.21).

use super::super::call::{Call, Stop};
use super::super::check::{SeptRef, sept_fail};
use super::super::dispatch::{DONE, LeafResult};
use super::super::leaf::Leaf;
use super::super::lock::{LockId, Mode};
use super::super::lp::HoldPoint;
use super::super::module::Module;
use super::super::operand::Operand;
use super::super::sept::{SeptOp, span, walk};
use super::super::status::{Code, busy, invalid};
use super::super::td::ATTR_DEBUG;

impl Module {
    pub(super) fn mem_rd(&mut self, call: &mut Call) -> LeafResult {
        let (hpa, hkid) = self.debug_open(call, Leaf::MemRd, SeptOp::MemRd)?;
        call.regs.r8 = self.debug_read(call.input.rdx, hpa, hkid)?;
        DONE
    }

    pub(super) fn mem_wr(&mut self, call: &mut Call) -> LeafResult {
        let (hpa, hkid) = self.debug_open(call, Leaf::MemWr, SeptOp::MemWr)?;
        call.regs.r8 = self.debug_read(call.input.rdx, hpa, hkid)?;
        self.write_private(hpa, hkid, call.input.r8).map_err(|_| Stop::from(Code::TdFatal))?;
        DONE
    }

    fn debug_read(&mut self, tdr: u64, hpa: u64, hkid: u16) -> Result<u64, Stop> {
        let Ok(value) = self.read_as(hpa, hkid) else {
            self.td_mut(tdr)?.fatal = true;
            return Err(Code::TdFatal.into());
        };
        Ok(value)
    }

    /// The checks both share; returns where the 8 bytes lie and under which key.
    fn debug_open(&mut self, call: &mut Call, leaf: Leaf, op: SeptOp) -> Result<(u64, u16), Stop> {
        let (gpa, tdr) = (call.input.rcx, call.input.rdx);
        self.explicit_tdr(call, tdr, Operand::RDX, Mode::Shared)?;
        self.td_state(call, tdr, leaf, Some(Mode::Shared))?;
        if self.td_ref(tdr)?.attributes & ATTR_DEBUG == 0 {
            return Err(Code::TdNonDebug.into());
        }
        if !gpa.is_multiple_of(8) {
            return Err(invalid(Operand::RCX).into());
        }
        self.lock(call, LockId::SeptTree(tdr), Mode::Shared).map_err(|_| busy(Operand::SEPT_TREE))?;
        call.point(HoldPoint::Tree)?;
        let td = self.td_ref(tdr)?;
        if !td.gpaw.is_private(gpa) {
            return Err(invalid(Operand::RCX).into());
        }
        let hkid = td.hkid;
        let at = walk::walk_to_leaf(&*self.memory, td.root_pa, td.root_level, gpa)
            .map_err(|stop| sept_fail(call, Code::EptEntryNotPresent, stop))?;
        self.lock(call, LockId::SeptEntry(at.entry_pa), Mode::Exclusive)
            .map_err(|_| sept_fail(call, Code::OperandBusy, at))?;
        call.point(HoldPoint::Entry)?;
        let sept: SeptRef = self.sept_ref(tdr, gpa, at)?;
        if !sept.state.allows(op) {
            return Err(sept_fail(call, Code::EptEntryStateIncorrect, at));
        }
        call.point(HoldPoint::Commit)?;
        Ok((at.entry.hpa(at.level) + gpa % span(at.level), hkid))
    }
}
