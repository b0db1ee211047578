//! RANGE.BLOCK, RANGE.UNBLOCK and MEM.TRACK (TDX module spec 5.14 to 5.16, 6).

use super::super::call::Call;
use super::super::check::{SeptAccess, SeptRef, sept_fail};
use super::super::dispatch::{DONE, LeafResult};
use super::super::leaf::Leaf;
use super::super::lock::{LockId, Mode};
use super::super::lp::HoldPoint;
use super::super::module::Module;
use super::super::operand::Operand;
use super::super::sept::{SeptEntry, SeptOp};
use super::super::status::{Code, Status, busy};

/// The PAMT entry that carries the BEPOCH of an entry: that of the leaf page at its size, or of the table's page.
fn bepoch_at(sept: &SeptRef) -> (u8, u64) {
    let level = if sept.state.is_leaf() { sept.at.level } else { 0 };
    (level, sept.at.entry.hpa(sept.at.level))
}

impl Module {
    pub(super) fn mem_range_block(&mut self, call: &mut Call) -> LeafResult {
        let tdr = self.explicit_tdr(call, call.input.rdx, Operand::RDX, Mode::Shared)?;
        self.td_state(call, tdr, Leaf::MemRangeBlock, Some(Mode::Shared))?;
        let access = SeptAccess { min_level: 0, max_level: 4, tree: Some(Mode::Exclusive) };
        let sept = self.sept_open(call, tdr, &access)?;
        if sept.state.any_blocked() {
            return Err(sept_fail(call, Code::GpaRangeAlreadyBlocked, sept.at));
        }
        let blocked = sept.state.blocked().filter(|_| sept.state.allows(SeptOp::RangeBlock));
        let Some(blocked) = blocked else { return Err(sept_fail(call, Code::EptEntryStateIncorrect, sept.at)) };
        call.point(HoldPoint::Commit)?;
        let epoch = self.td_ref(tdr)?.epoch;
        let (level, page) = bepoch_at(&sept);
        if let Some(entry) = self.pamt.entry_mut(level, page) {
            entry.bepoch = epoch;
        }
        // A half-accepted 2M page starts over: its accept counter goes.
        let entry = SeptEntry(blocked.raw() | sept.at.entry.hpa(sept.at.level));
        self.write_entry(sept.at.entry_pa, entry.0);
        DONE
    }

    pub(super) fn mem_range_unblock(&mut self, call: &mut Call) -> LeafResult {
        let tdr = self.explicit_tdr(call, call.input.rdx, Operand::RDX, Mode::Shared)?;
        self.td_state(call, tdr, Leaf::MemRangeUnblock, Some(Mode::Shared))?;
        let access = SeptAccess { min_level: 0, max_level: 4, tree: Some(Mode::Exclusive) };
        let sept = self.sept_open(call, tdr, &access)?;
        if !sept.state.allows(SeptOp::RangeUnblock) {
            return Err(sept_fail(call, Code::EptEntryStateIncorrect, sept.at));
        }
        let (level, page) = bepoch_at(&sept);
        let bepoch = self.pamt.entry(level, page).map_or(0, |entry| entry.bepoch);
        let td = self.td_ref(tdr)?;
        if td.op_state.needs_tracking() && !td.tracked(bepoch) {
            return Err(Status::on(Code::TlbTrackingNotDone, Operand::SEPT_TREE).into());
        }
        call.point(HoldPoint::Commit)?;
        let entry = SeptEntry(sept.state.unblocked().raw() | sept.at.entry.hpa(sept.at.level));
        self.write_entry(sept.at.entry_pa, entry.0);
        DONE
    }

    pub(super) fn mem_track(&mut self, call: &mut Call) -> LeafResult {
        let tdr = self.explicit_tdr(call, call.input.rcx, Operand::RCX, Mode::Shared)?;
        self.td_state(call, tdr, Leaf::MemTrack, Some(Mode::Shared))?;
        self.lock(call, LockId::Epoch(tdr), Mode::Exclusive).map_err(|_| busy(Operand::TD_EPOCH))?;
        call.point(HoldPoint::Epoch)?;
        let td = self.td_ref(tdr)?;
        if td.refcount[1 - (td.epoch & 1) as usize] != 0 {
            return Err(Code::PreviousTlbEpochBusy.into());
        }
        call.point(HoldPoint::Commit)?;
        self.td_mut(tdr)?.epoch += 1;
        DONE
    }
}
