//! PAGE.ADD, PAGE.AUG and PAGE.REMOVE (TDX module spec 5.11 to 5.13).

use super::super::call::Call;
use super::super::check::{SeptAccess, sept_fail};
use super::super::dispatch::{DONE, LeafResult};
use super::super::leaf::Leaf;
use super::super::lock::Mode;
use super::super::lp::HoldPoint;
use super::super::memory::PAGE_SIZE;
use super::super::module::Module;
use super::super::operand::Operand;
use super::super::pamt::PageType;
use super::super::sept::{SeptOp, SeptState};
use super::super::status::Code;
use super::mr::measure_block;

/// 4K units of a page.
pub(super) fn units(level: u8) -> u64 {
    1 << (9 * level)
}

impl Module {
    pub(super) fn mem_page_add(&mut self, call: &mut Call) -> LeafResult {
        let (page, source) = (call.input.r8, call.input.r9);
        let tdr = self.explicit_tdr(call, call.input.rdx, Operand::RDX, Mode::Exclusive)?;
        self.td_state(call, tdr, Leaf::MemPageAdd, None)?;
        let sept = self.sept_open(call, tdr, &SeptAccess { min_level: 0, max_level: 0, tree: None })?;
        if !sept.state.allows(SeptOp::PageAdd) {
            return Err(sept_fail(call, Code::EptEntryStateIncorrect, sept.at));
        }
        self.shared_hpa(source, PAGE_SIZE, Operand::R9)?;
        self.free_page(call, page, Operand::R8)?;
        call.point(HoldPoint::Commit)?;
        let source = source & self.platform.address_mask();
        self.host_flush(source, PAGE_SIZE);
        let td = self.td_mut(tdr)?;
        measure_block(td, "MEM.PAGE.ADD", sept.gpa);
        td.chldcnt += 1;
        let hkid = td.hkid;
        self.copy_direct(source, page, hkid);
        self.pamt.assign(0, page, PageType::Reg, tdr, 0);
        self.write_entry(sept.at.entry_pa, SeptState::Mapped.raw() | page);
        DONE
    }

    pub(super) fn mem_page_aug(&mut self, call: &mut Call) -> LeafResult {
        let page = call.input.r8;
        let tdr = self.explicit_tdr(call, call.input.rdx, Operand::RDX, Mode::Shared)?;
        self.td_state(call, tdr, Leaf::MemPageAug, Some(Mode::Shared))?;
        let access = SeptAccess { min_level: 0, max_level: 1, tree: Some(Mode::Shared) };
        let sept = self.sept_open(call, tdr, &access)?;
        if !sept.state.allows(SeptOp::PageAug) {
            return Err(sept_fail(call, Code::EptEntryStateIncorrect, sept.at));
        }
        let level = sept.at.level;
        self.explicit_page(call, page, Operand::R8, PageType::Nda, level, Mode::Exclusive)?;
        call.point(HoldPoint::Commit)?;
        self.td_mut(tdr)?.chldcnt += units(level);
        self.pamt.assign(level, page, PageType::Reg, tdr, 0);
        self.write_entry(sept.at.entry_pa, SeptState::Pending.raw() | page);
        DONE
    }

    pub(super) fn mem_page_remove(&mut self, call: &mut Call) -> LeafResult {
        let tdr = self.explicit_tdr(call, call.input.rdx, Operand::RDX, Mode::Shared)?;
        self.td_state(call, tdr, Leaf::MemPageRemove, Some(Mode::Shared))?;
        let access = SeptAccess { min_level: 0, max_level: 2, tree: Some(Mode::Shared) };
        let sept = self.sept_open(call, tdr, &access)?;
        if !sept.state.allows(SeptOp::PageRemove) {
            return Err(sept_fail(call, Code::EptEntryStateIncorrect, sept.at));
        }
        let level = sept.at.level;
        let page = sept.at.entry.hpa(level);
        let bepoch = self.lock_implicit(call, level, page)?;
        self.check_tracked(call, &sept, bepoch)?;
        call.point(HoldPoint::Commit)?;
        let td = self.td_mut(tdr)?;
        td.chldcnt -= units(level);
        let gone = if td.op_state.importing() { SeptState::Removed } else { SeptState::Free };
        self.write_entry(sept.at.entry_pa, gone.raw());
        self.pamt.free(level, page);
        call.regs.rcx = page | if level == 0 { self.pair_hint(page) } else { 0 };
        DONE
    }
}
