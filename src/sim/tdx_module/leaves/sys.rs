//! SYS leaves but CONFIG and RD (TDX module spec 5.1).

use super::super::call::{Call, Stop};
use super::super::dispatch::{DONE, LeafResult};
use super::super::lock::{LockId, Mode};
use super::super::lp::HoldPoint;
use super::super::module::Module;
use super::super::operand::Operand;
use super::super::state::SysState;
use super::super::status::{Code, busy, invalid};

/// Bytes of memory whose PAMT one TDMR.INIT initialises.
const TDMR_INIT_STEP: u64 = 4 << 20;

impl Module {
    pub(super) fn sys_lock(&mut self, call: &mut Call, mode: Mode) -> Result<(), Stop> {
        self.lock(call, LockId::Sys, mode).map_err(|_| Stop::from(Code::SysBusy))
    }

    pub(super) fn sys_init(&mut self, call: &mut Call) -> LeafResult {
        self.sys_lock(call, Mode::Exclusive)?;
        if self.sys.state != SysState::InitPending {
            return Err(Code::SysInitNotPending.into());
        }
        if call.input.rcx != 0 {
            return Err(invalid(Operand::RCX).into());
        }
        call.point(HoldPoint::Commit)?;
        self.sys.state = SysState::InitDone;
        DONE
    }

    pub(super) fn sys_lp_init(&mut self, call: &mut Call) -> LeafResult {
        self.sys_lock(call, Mode::Shared)?;
        if self.sys.state != SysState::InitDone {
            return Err(Code::SysLpInitNotPending.into());
        }
        if self.lps[call.lp.0 as usize].init_done {
            return Err(Code::SysLpInitDone.into());
        }
        if !self.entropy() {
            return Err(Code::RndNoEntropy.into());
        }
        call.point(HoldPoint::Commit)?;
        self.lps[call.lp.0 as usize].init_done = true;
        DONE
    }

    pub(super) fn sys_key_config(&mut self, call: &mut Call) -> LeafResult {
        self.sys_lock(call, Mode::Exclusive)?;
        if self.sys.state != SysState::ConfigDone {
            return Err(Code::SysKeyConfigNotPending.into());
        }
        let package = 1 << self.lps[call.lp.0 as usize].package;
        if self.sys.key_config_bitmap & package != 0 {
            return Err(Code::KeyConfigured.into());
        }
        if !self.entropy() {
            return Err(Code::KeyGenerationFailed.into());
        }
        call.point(HoldPoint::Commit)?;
        self.sys.key_config_bitmap |= package;
        if self.sys.key_config_bitmap == self.platform.all_packages() {
            self.sys.state = SysState::Ready;
        }
        DONE
    }

    pub(super) fn sys_tdmr_init(&mut self, call: &mut Call) -> LeafResult {
        let base = call.input.rcx;
        let index = self.pamt.tdmrs.iter().position(|tdmr| tdmr.base == base);
        let Some(index) = index else { return Err(invalid(Operand::RCX).into()) };
        self.lock(call, LockId::Tdmr(index as u8), Mode::Exclusive).map_err(|_| busy(Operand::RCX))?;
        let tdmr = &self.pamt.tdmrs[index];
        if tdmr.initialized_to == tdmr.end() {
            return Err(Code::TdmrAlreadyInitialized.into());
        }
        call.point(HoldPoint::Commit)?;
        let tdmr = &mut self.pamt.tdmrs[index];
        let from = tdmr.initialized_to;
        tdmr.initialize(from, from + TDMR_INIT_STEP);
        call.regs.rdx = tdmr.initialized_to & !((1 << 30) - 1);
        DONE
    }

    pub(super) fn sys_shutdown(&mut self, call: &mut Call) -> LeafResult {
        self.sys_lock(call, Mode::Exclusive)?;
        call.point(HoldPoint::Commit)?;
        self.sys.state = SysState::Shutdown;
        DONE
    }

    /// Shuts the module down for good: the first processor that calls it ends it for all.
    pub(super) fn sys_lp_shutdown(&mut self, call: &mut Call) -> LeafResult {
        self.sys_lock(call, Mode::Exclusive)?;
        call.point(HoldPoint::Commit)?;
        self.sys.state = SysState::Shutdown;
        self.lps[call.lp.0 as usize].init_done = false;
        DONE
    }
}
