//! PAGE.RELOCATE (TDX module spec 5.17).

use super::super::call::Call;
use super::super::check::{SeptAccess, sept_fail};
use super::super::dispatch::{DONE, LeafResult};
use super::super::leaf::Leaf;
use super::super::lock::Mode;
use super::super::lp::HoldPoint;
use super::super::module::Module;
use super::super::operand::Operand;
use super::super::pamt::PageType;
use super::super::sept::SeptOp;
use super::super::status::{Code, invalid};

impl Module {
    pub(super) fn mem_page_relocate(&mut self, call: &mut Call) -> LeafResult {
        let new = call.input.r8;
        let tdr = self.explicit_tdr(call, call.input.rdx, Operand::RDX, Mode::Shared)?;
        self.td_state(call, tdr, Leaf::MemPageRelocate, Some(Mode::Shared))?;
        let access = SeptAccess { min_level: 0, max_level: 0, tree: Some(Mode::Shared) };
        let sept = self.sept_open(call, tdr, &access)?;
        if !sept.state.allows(SeptOp::PageRelocate) {
            return Err(sept_fail(call, Code::EptEntryStateIncorrect, sept.at));
        }
        let old = sept.at.entry.hpa(0);
        if new == old {
            return Err(invalid(Operand::R8).into());
        }
        let bepoch = self.lock_implicit(call, 0, old)?;
        self.check_tracked(call, &sept, bepoch)?;
        self.free_page(call, new, Operand::R8)?;
        call.point(HoldPoint::Commit)?;
        let hkid = self.td_ref(tdr)?.hkid;
        if !sept.state.any_pending() {
            self.flush_page(old, hkid);
            self.copy_direct(old, new, hkid);
        }
        self.pamt.free(0, old);
        self.pamt.assign(0, new, PageType::Reg, tdr, 0);
        self.write_entry(sept.at.entry_pa, sept.state.unblocked().raw() | new);
        call.regs.rcx = old;
        DONE
    }
}
