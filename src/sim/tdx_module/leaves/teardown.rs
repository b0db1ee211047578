//! MNG.VPFLUSHDONE and KEY.FREEID (TDX module spec 5.26, 8.5).

use super::super::call::Call;
use super::super::dispatch::{DONE, LeafResult};
use super::super::lock::{LockId, Mode};
use super::super::lp::HoldPoint;
use super::super::module::Module;
use super::super::operand::Operand;
use super::super::state::{HkidState, Lifecycle};
use super::super::status::{Code, busy};

impl Module {
    pub(super) fn mng_vpflushdone(&mut self, call: &mut Call) -> LeafResult {
        let tdr = self.explicit_tdr(call, call.input.rcx, Operand::RCX, Mode::Exclusive)?;
        self.lock(call, LockId::Kot, Mode::Exclusive).map_err(|_| busy(Operand::KOT))?;
        let packages = self.platform.all_packages();
        let td = self.td_ref(tdr)?;
        if !matches!(td.lifecycle, Lifecycle::HkidAssigned | Lifecycle::KeysConfigured) {
            return Err(Code::LifecycleStateIncorrect.into());
        }
        if td.num_assoc_vcpus != 0 {
            return Err(Code::FlushvpNotDone.into());
        }
        call.point(HoldPoint::Commit)?;
        let td = self.td_mut(tdr)?;
        td.lifecycle = Lifecycle::Blocked;
        let hkid = td.hkid;
        if let Some(entry) = self.kot.entry_mut(hkid) {
            entry.state = HkidState::Flushed;
            entry.wbinvd_bitmap = packages;
        }
        DONE
    }

    pub(super) fn mng_key_freeid(&mut self, call: &mut Call) -> LeafResult {
        let tdr = self.explicit_tdr(call, call.input.rcx, Operand::RCX, Mode::Exclusive)?;
        let td = self.td_ref(tdr)?;
        if td.lifecycle != Lifecycle::Blocked {
            return Err(Code::LifecycleStateIncorrect.into());
        }
        let hkid = td.hkid;
        self.lock(call, LockId::Kot, Mode::Exclusive).map_err(|_| busy(Operand::KOT))?;
        if self.kot.entry(hkid).is_some_and(|entry| entry.wbinvd_bitmap != 0) {
            return Err(Code::WbcacheNotComplete.into());
        }
        call.point(HoldPoint::Commit)?;
        if let Some(entry) = self.kot.entry_mut(hkid) {
            entry.state = HkidState::Free;
        }
        self.td_mut(tdr)?.lifecycle = Lifecycle::Teardown;
        DONE
    }
}
