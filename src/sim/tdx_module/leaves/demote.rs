//! PAGE.DEMOTE: one large page becomes a table of 512 smaller ones (TDX module spec 5.18).

use super::super::call::{Call, Stop};
use super::super::check::{SeptAccess, SeptRef, sept_fail, td_handle};
use super::super::dispatch::{DONE, LeafResult};
use super::super::leaf::Leaf;
use super::super::lock::{LockId, Mode};
use super::super::lp::HoldPoint;
use super::super::memory::PAGE_SIZE;
use super::super::module::Module;
use super::super::operand::Operand;
use super::super::pamt::PageType;
use super::super::sept::{ENTRIES, SeptOp, SeptState, span};
use super::super::status::{Code, Status, busy};
use super::NULL_PA;

const UNUSED: u64 = 1 << 63;

impl Module {
    pub(super) fn mem_page_demote(&mut self, call: &mut Call) -> LeafResult {
        let table = call.input.r8;
        let (tdr, _sparse) = td_handle(call.input.rdx, Operand::RDX)?;
        self.explicit_tdr(call, tdr, Operand::RDX, Mode::Shared)?;
        self.td_state(call, tdr, Leaf::MemPageDemote, Some(Mode::Shared))?;
        let access = SeptAccess { min_level: 1, max_level: 2, tree: Some(Mode::Shared) };
        let sept = self.sept_open(call, tdr, &access)?;
        if !sept.state.allows(SeptOp::PageDemote) {
            return Err(sept_fail(call, Code::EptEntryStateIncorrect, sept.at));
        }
        let (level, hpa) = (sept.at.level, sept.at.entry.hpa(sept.at.level));
        let bepoch = self.pamt.entry(level, hpa).map_or(0, |entry| entry.bepoch);
        self.check_tracked(call, &sept, bepoch)?;
        self.free_page(call, table, Operand::R8)?;
        let pair = if self.pamt.dynamic && level == 1 { Some(self.check_demote_pair(call)?) } else { None };
        self.fill_children(&sept, table)?;
        self.check_demote_interrupted(call, tdr)?;
        self.lock(call, LockId::Pamt(level, hpa), Mode::Exclusive).map_err(|_| busy(Operand::RCX))?;
        call.point(HoldPoint::Commit)?;
        return_l2_pages(call);
        self.pamt.demote(level, hpa);
        if let Some(pair) = pair {
            self.install_pair(hpa, pair);
        }
        self.pamt.assign(0, table, PageType::Ept, tdr, 0);
        self.td_mut(tdr)?.chldcnt += 1;
        self.write_entry(sept.at.entry_pa, SeptState::NlMapped.raw() | table);
        DONE
    }

    /// Fills the new table with 512 copies of the parent leaf: unblocked, unlocked, consecutive addresses, no accept counter.
    fn fill_children(&mut self, sept: &SeptRef, table: u64) -> Result<(), Stop> {
        let hkid = self.td_ref(sept.tdr)?.hkid;
        let level = sept.at.level;
        let child = sept.state.unblocked().raw() | sept.at.entry.hpa(level);
        self.fill_direct(table, PAGE_SIZE, hkid, child);
        for i in 1..ENTRIES {
            self.memory.write_u64(table + 8 * i, child + i * span(level - 1));
        }
        Ok(())
    }

    fn check_demote_interrupted(&mut self, call: &mut Call, tdr: u64) -> Result<(), Stop> {
        if self.switches.enhanced_demote || call.held_at == Some(HoldPoint::Commit) {
            return Ok(());
        }
        let stop = if self.interrupts_leaf(call) {
            Status::from(Code::InterruptedRestartable)
        } else if self.switches.newer() && self.td_ref(tdr)?.tree_lock.host_priority() {
            Status::on(Code::InterruptedBusy, Operand::SEPT_TREE)
        } else {
            return Ok(());
        };
        (call.regs.rcx, call.regs.rdx) = (call.input.rcx, call.input.rdx);
        Err(stop.into())
    }
}

/// A TD without L2 partitions needs no L2 pages: those given come back marked unused.
fn return_l2_pages(call: &mut Call) {
    let unused = |page: u64| if page == NULL_PA || page == 0 { page } else { page | UNUSED };
    call.regs.r9 = unused(call.input.r9);
    call.regs.r10 = unused(call.input.r10);
    call.regs.r11 = unused(call.input.r11);
}
