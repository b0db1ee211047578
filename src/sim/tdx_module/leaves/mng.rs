//! MNG.CREATE, KEY.CONFIG and ADDCX: from a free page to a TD with keys and a TDCS (TDX module spec 5.2 to 5.4).

use super::super::call::Call;
use super::super::dispatch::{DONE, LeafResult};
use super::super::lock::{LockId, Mode};
use super::super::lp::HoldPoint;
use super::super::memory::PAGE_SIZE;
use super::super::module::Module;
use super::super::operand::Operand;
use super::super::pamt::PageType;
use super::super::sept::SeptEntry;
use super::super::state::{HkidState, Lifecycle, OpState};
use super::super::status::{Code, busy, invalid};
use super::super::td::{MAX_TDCS_PAGES, SEPT_ROOT_PAGE, TDCS_PAGES, Td};

const MSR_BITMAP_PAGE: usize = 2;

impl Module {
    pub(super) fn mng_create(&mut self, call: &mut Call) -> LeafResult {
        let (page, hkid) = (call.input.rcx, call.input.rdx);
        if !self.platform.is_private_hkid(hkid) {
            return Err(invalid(Operand::RDX).into());
        }
        self.free_page(call, page, Operand::RCX)?;
        self.lock(call, LockId::Kot, Mode::Exclusive).map_err(|_| busy(Operand::KOT))?;
        if self.kot.entry(hkid as u16).is_none_or(|entry| entry.state != HkidState::Free) {
            return Err(Code::HkidNotFree.into());
        }
        if !self.entropy() {
            return Err(Code::RndNoEntropy.into());
        }
        call.point(HoldPoint::Commit)?;
        let global = self.sys.global_hkid;
        self.fill_direct(page, PAGE_SIZE, global, 0);
        self.pamt.assign(0, page, PageType::Tdr, 0, 0);
        if let Some(entry) = self.kot.entry_mut(hkid as u16) {
            entry.state = HkidState::Assigned;
        }
        self.tds.insert(page, Td::new(page, hkid as u16));
        DONE
    }

    pub(super) fn mng_key_config(&mut self, call: &mut Call) -> LeafResult {
        let tdr = self.explicit_tdr(call, call.input.rcx, Operand::RCX, Mode::Exclusive)?;
        let package = 1 << self.lps[call.lp.0 as usize].package;
        let all = self.platform.all_packages();
        let td = self.td_ref(tdr)?;
        if td.fatal {
            return Err(Code::TdFatal.into());
        }
        if td.lifecycle != Lifecycle::HkidAssigned {
            return Err(Code::LifecycleStateIncorrect.into());
        }
        if td.pkg_config_bitmap & package != 0 {
            return Err(Code::KeyConfigured.into());
        }
        self.lock(call, LockId::Ket, Mode::Exclusive).map_err(|_| busy(Operand::KET))?;
        if !self.entropy() {
            return Err(Code::KeyGenerationFailed.into());
        }
        call.point(HoldPoint::Commit)?;
        let td = self.td_mut(tdr)?;
        td.pkg_config_bitmap |= package;
        if td.pkg_config_bitmap == all {
            td.lifecycle = Lifecycle::KeysConfigured;
        }
        DONE
    }

    pub(super) fn mng_addcx(&mut self, call: &mut Call) -> LeafResult {
        let (page, tdr) = (call.input.rcx, call.input.rdx);
        self.explicit_tdr(call, tdr, Operand::RDX, Mode::Exclusive)?;
        let td = self.td_ref(tdr)?;
        if td.fatal {
            return Err(Code::TdFatal.into());
        }
        if td.lifecycle != Lifecycle::KeysConfigured {
            return Err(Code::TdKeysNotConfigured.into());
        }
        let (index, hkid, op_state) = (td.tdcx_pa.len(), td.hkid, td.op_state);
        if index >= MAX_TDCS_PAGES {
            return Err(Code::TdcxNumIncorrect.into());
        }
        self.free_page(call, page, Operand::RCX)?;
        call.point(HoldPoint::Commit)?;
        let pattern = match index {
            MSR_BITMAP_PAGE => u64::MAX,
            SEPT_ROOT_PAGE => SeptEntry::FREE.0,
            _ => 0,
        };
        // The page is written before the last checks: on their failure its content is lost though it stays free.
        self.fill_direct(page, PAGE_SIZE, hkid, pattern);
        if index == TDCS_PAGES - 1 && !self.entropy() {
            return Err(Code::RndNoEntropy.into());
        }
        if index >= TDCS_PAGES && op_state != OpState::Uninitialized {
            return Err(self.op_state_incorrect(op_state).into());
        }
        self.pamt.assign(0, page, PageType::Tdcx, tdr, 0);
        let td = self.td_mut(tdr)?;
        td.tdcx_pa.push(page);
        td.chldcnt += 1;
        if index == SEPT_ROOT_PAGE {
            td.root_pa = page;
        }
        DONE
    }
}
