//! PAGE.PROMOTE: a table of 512 equal, contiguous pages becomes one large page (TDX module spec 5.19).

use super::super::call::{Call, Stop};
use super::super::check::{SeptAccess, SeptRef, sept_fail};
use super::super::dispatch::{DONE, LeafResult};
use super::super::leaf::Leaf;
use super::super::lock::{LockId, Mode};
use super::super::lp::HoldPoint;
use super::super::module::Module;
use super::super::operand::Operand;
use super::super::sept::{ENTRIES, SeptEntry, SeptOp, SeptState, span};
use super::super::status::{Code, busy};
use super::NULL_PA;

impl Module {
    pub(super) fn mem_page_promote(&mut self, call: &mut Call) -> LeafResult {
        let tdr = self.explicit_tdr(call, call.input.rdx, Operand::RDX, Mode::Shared)?;
        self.td_state(call, tdr, Leaf::MemPagePromote, Some(Mode::Shared))?;
        let tree = if self.switches.newer() { Mode::Exclusive } else { Mode::Shared };
        let access = SeptAccess { min_level: 1, max_level: 2, tree: Some(tree) };
        let sept = self.sept_open(call, tdr, &access)?;
        if !sept.state.allows(SeptOp::PagePromote) {
            return Err(sept_fail(call, Code::EptEntryStateIncorrect, sept.at));
        }
        let table = sept.at.entry.hpa(sept.at.level);
        let bepoch = self.lock_implicit(call, 0, table)?;
        self.check_tracked(call, &sept, bepoch)?;
        let first = self.scan_children(call, &sept, table)?;
        if self.interrupts_leaf(call) {
            (call.regs.rcx, call.regs.rdx) = (call.input.rcx, call.input.rdx);
            return Err(Code::InterruptedRestartable.into());
        }
        let (level, hpa) = (sept.at.level, first.hpa(sept.at.level - 1));
        self.lock(call, LockId::Pamt(level, hpa), Mode::Exclusive).map_err(|_| busy(Operand::RCX))?;
        call.point(HoldPoint::Commit)?;
        self.release_children(call, table);
        self.pamt.promote(level, hpa);
        if self.pamt.dynamic && level == 1 {
            (call.regs.r12, call.regs.r13) = self.return_pair(hpa);
        }
        self.pamt.free(0, table);
        self.td_mut(tdr)?.chldcnt -= 1;
        let state = first.state().unwrap_or(SeptState::Mapped);
        self.write_entry(sept.at.entry_pa, state.raw() | hpa);
        call.regs.rcx = table | self.pair_hint(table);
        if call.version > 0 {
            (call.regs.r9, call.regs.r10, call.regs.r11) = (NULL_PA, NULL_PA, NULL_PA);
        }
        DONE
    }

    /// Locks the 512 children (1.5.01) and checks that they are one page in pieces. Returns the first.
    fn scan_children(&mut self, call: &mut Call, sept: &SeptRef, table: u64) -> Result<SeptEntry, Stop> {
        let level = sept.at.level;
        let refuse = |call: &mut Call| sept_fail(call, Code::EptInvalidPromoteConditions, sept.at);
        let mut first = SeptEntry::default();
        for i in 0..ENTRIES {
            let child_pa = table + 8 * i;
            if !self.switches.newer() {
                self.lock(call, LockId::SeptEntry(child_pa), Mode::Exclusive)
                    .map_err(|_| sept_fail(call, Code::OperandBusy, sept.at))?;
            }
            let raw = SeptEntry(self.memory.read_u64(child_pa)).unlocked();
            let child = if level == 2 && raw.is_leaf() { raw.with_accept_counter(0) } else { raw };
            if i == 0 {
                let whole = matches!(child.state(), Some(SeptState::Mapped | SeptState::Pending));
                if !whole || !child.hpa(level - 1).is_multiple_of(span(level)) {
                    return Err(refuse(call));
                }
                first = child;
            } else if child.0 != first.0 + i * span(level - 1) {
                return Err(refuse(call));
            }
        }
        Ok(first)
    }

    fn release_children(&mut self, call: &mut Call, table: u64) {
        let is_child = |id: LockId| matches!(id, LockId::SeptEntry(pa) if pa.wrapping_sub(table) < 4096);
        let children: Vec<_> = call.locks.extract_if(.., |lock| is_child(lock.id)).collect();
        for lock in children {
            self.raw_unlock(lock);
        }
    }
}
