//! SEPT.ADD, SEPT.REMOVE and SEPT.RD (TDX module spec 5.9, 5.10, 5.20).

use super::super::call::{Call, Stop};
use super::super::check::{SeptAccess, sept_fail, td_handle};
use super::super::dispatch::{DONE, LeafResult};
use super::super::leaf::Leaf;
use super::super::lock::{LockId, Mode};
use super::super::lp::HoldPoint;
use super::super::memory::PAGE_SIZE;
use super::super::module::Module;
use super::super::operand::Operand;
use super::super::pamt::PageType;
use super::super::sept::{ENTRIES, SeptEntry, SeptOp, SeptState};
use super::super::status::{Code, busy, invalid};
use super::super::td::ATTR_DEBUG;
use super::NULL_PA;

const UNUSED: u64 = 1 << 63;

/// Strips bit 63 of a page operand unless it is NULL_PA.
fn page_operand(operand: u64) -> Option<u64> {
    (operand != NULL_PA).then_some(operand & !UNUSED)
}

impl Module {
    pub(super) fn mem_sept_add(&mut self, call: &mut Call) -> LeafResult {
        let (tdr, allow_existing) = td_handle(call.input.rdx, Operand::RDX)?;
        self.explicit_tdr(call, tdr, Operand::RDX, Mode::Shared)?;
        self.td_state(call, tdr, Leaf::MemSeptAdd, Some(Mode::Shared))?;
        let access = SeptAccess { min_level: 1, max_level: 4, tree: Some(Mode::Shared) };
        let sept = self.sept_open(call, tdr, &access)?;
        if !sept.state.allows(SeptOp::SeptAdd) {
            return Err(sept_fail(call, Code::EptEntryStateIncorrect, sept.at));
        }
        let existing = sept.state == SeptState::NlMapped;
        let page = page_operand(call.input.r8);
        match page {
            None if call.version == 0 => return Err(invalid(Operand::R8).into()),
            None if !existing => return Err(sept_fail(call, Code::EptEntryStateIncorrect, sept.at)),
            Some(page) if !existing => self.free_page(call, page, Operand::R8)?,
            Some(_) if !allow_existing => return Err(sept_fail(call, Code::EptEntryStateIncorrect, sept.at)),
            _ => {}
        }
        if call.version > 0 {
            for (operand, register) in
                [(Operand::R9, call.input.r9), (Operand::R10, call.input.r10), (Operand::R11, call.input.r11)]
            {
                if register != NULL_PA {
                    return Err(invalid(operand).into());
                }
            }
        }
        call.point(HoldPoint::Commit)?;
        if let (Some(page), false) = (page, existing) {
            self.install_table(tdr, page)?;
            self.write_entry(sept.at.entry_pa, SeptState::NlMapped.raw() | page);
        }
        if call.version > 0 {
            call.regs.r8 = match page {
                Some(page) if existing => page | UNUSED,
                _ => NULL_PA,
            };
        }
        DONE
    }

    /// Turns a free page into an empty page of a TD's Secure EPT.
    pub(super) fn install_table(&mut self, tdr: u64, page: u64) -> Result<(), Stop> {
        let td = self.td_mut(tdr)?;
        td.chldcnt += 1;
        let hkid = td.hkid;
        self.fill_direct(page, PAGE_SIZE, hkid, SeptEntry::FREE.0);
        self.pamt.assign(0, page, PageType::Ept, tdr, 0);
        Ok(())
    }

    pub(super) fn mem_sept_remove(&mut self, call: &mut Call) -> LeafResult {
        let tdr = self.explicit_tdr(call, call.input.rdx, Operand::RDX, Mode::Shared)?;
        self.td_state(call, tdr, Leaf::MemSeptRemove, Some(Mode::Shared))?;
        let access = SeptAccess { min_level: 1, max_level: 4, tree: Some(Mode::Exclusive) };
        let sept = self.sept_open(call, tdr, &access)?;
        if !sept.state.allows(SeptOp::SeptRemove) {
            return Err(sept_fail(call, Code::EptEntryStateIncorrect, sept.at));
        }
        let table = sept.at.entry.hpa(sept.at.level);
        let bepoch = self.lock_implicit(call, 0, table)?;
        self.check_tracked(call, &sept, bepoch)?;
        let free = SeptEntry::FREE.0;
        if (0..ENTRIES).any(|i| SeptEntry(self.memory.read_u64(table + 8 * i)).unlocked().0 != free) {
            return Err(sept_fail(call, Code::EptPageNotFree, sept.at));
        }
        call.point(HoldPoint::Commit)?;
        self.write_entry(sept.at.entry_pa, free);
        self.pamt.free(0, table);
        self.td_mut(tdr)?.chldcnt -= 1;
        call.regs.rcx = table | self.pair_hint(table);
        if call.version > 0 {
            (call.regs.r9, call.regs.r10, call.regs.r11) = (NULL_PA, NULL_PA, NULL_PA);
        }
        DONE
    }

    /// Exclusive lock of the PAMT entry of a page reached through the Secure EPT: that entry only. Returns its BEPOCH.
    pub(super) fn lock_implicit(&mut self, call: &mut Call, level: u8, page: u64) -> Result<u64, Stop> {
        self.lock(call, LockId::Pamt(level, page), Mode::Exclusive).map_err(|_| busy(Operand::RCX))?;
        Ok(self.pamt.entry(level, page).map_or(0, |entry| entry.bepoch))
    }

    pub(super) fn mem_sept_rd(&mut self, call: &mut Call) -> LeafResult {
        let (tdr, l2_attributes) = td_handle(call.input.rdx, Operand::RDX)?;
        self.explicit_tdr(call, tdr, Operand::RDX, Mode::Shared)?;
        self.td_state(call, tdr, Leaf::MemSeptRd, Some(Mode::Shared))?;
        if l2_attributes && self.td_ref(tdr)?.attributes & ATTR_DEBUG == 0 {
            return Err(invalid(Operand::RDX).into());
        }
        let access = SeptAccess { min_level: 0, max_level: 4, tree: Some(Mode::Shared) };
        let sept = self.sept_open(call, tdr, &access)?;
        call.regs.rcx = sept.at.entry.architectural();
        call.regs.rdx = sept.at.entry.info(sept.at.level);
        if l2_attributes {
            call.regs.r8 = 0;
        }
        DONE
    }
}
