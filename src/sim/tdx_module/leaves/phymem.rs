//! PHYMEM.PAGE.RDMD, RECLAIM, WBINVD and CACHE.WB (TDX module spec 5.22 to 5.25).

use super::super::call::{AnyLeaf, Call, Stop};
use super::super::dispatch::{DONE, LeafResult};
use super::super::leaf::Leaf;
use super::super::lock::{LockId, Mode};
use super::super::lp::{Activity, HoldPoint, LpId};
use super::super::memory::PAGE_SIZE;
use super::super::module::Module;
use super::super::operand::Operand;
use super::super::pamt::PageType;
use super::super::sept::span;
use super::super::state::{HkidState, Lifecycle, SysState};
use super::super::status::{Code, Status, busy, invalid};
use super::page::units;

/// Pieces CACHE.WB writes back between two looks for an interrupt.
const CACHE_WB_PIECES: u64 = 4;

impl Module {
    pub(super) fn phymem_page_rdmd(&mut self, call: &mut Call) -> LeafResult {
        let rcx = call.input.rcx;
        let wanted = if self.switches.newer() { (rcx & 7) as u8 } else { 0 };
        let pa = if self.switches.newer() { rcx & !7 } else { rcx };
        if wanted > 2 {
            return Err(invalid(Operand::RCX).into());
        }
        self.check_private_hpa(pa, Operand::RCX, wanted)?;
        let level = self.lock_page(call, pa, Operand::RCX, wanted, Mode::Shared)?;
        call.point(HoldPoint::Commit)?;
        let Some(entry) = self.pamt.entry(level, pa) else { return Err(invalid(Operand::RCX).into()) };
        let ty = entry.ty();
        call.regs.rcx = ty as u64;
        call.regs.rdx = if ty == PageType::Nda || ty == PageType::Rsvd { 0 } else { entry.owner() };
        call.regs.r8 = level as u64;
        call.regs.r9 = if matches!(ty, PageType::Reg | PageType::Ept) { entry.bepoch } else { 0 };
        (call.regs.r10, call.regs.r11) = (0, 0);
        if ty == PageType::Pamt
            && let Some(region) = self.pamt.region(pa)
        {
            (call.regs.r10, call.regs.r11) = region.pair;
        }
        DONE
    }

    pub(super) fn phymem_page_reclaim(&mut self, call: &mut Call) -> LeafResult {
        let pa = call.input.rcx;
        self.check_private_hpa(pa, Operand::RCX, 0)?;
        let level = self.lock_page(call, pa, Operand::RCX, 0, Mode::Exclusive)?;
        let Some(entry) = self.pamt.entry(level, pa) else { return Err(invalid(Operand::RCX).into()) };
        let (ty, owner) = (entry.ty(), entry.owner());
        (call.regs.rcx, call.regs.rdx, call.regs.r8) = (0, 0, 0);
        (call.regs.r9, call.regs.r10, call.regs.r11) = (0, 0, 0);
        if matches!(ty, PageType::Nda | PageType::Rsvd) {
            return Err(Status::on(Code::PageMetadataIncorrect, Operand::RCX).into());
        }
        (call.regs.rcx, call.regs.rdx, call.regs.r8) = (ty as u64, owner, level as u64);
        if !pa.is_multiple_of(span(level)) {
            return Err(invalid(Operand::RCX).into());
        }
        if ty == PageType::Tdr {
            self.reclaim_tdr(call, pa)?;
        } else {
            self.lock(call, LockId::Pamt(0, owner), Mode::Shared).map_err(|_| busy(Operand::TDR))?;
            if self.td_ref(owner)?.lifecycle != Lifecycle::Teardown {
                return Err(Code::LifecycleStateIncorrect.into());
            }
            call.point(HoldPoint::Commit)?;
            self.td_mut(owner)?.chldcnt -= units(level);
            if ty == PageType::Tdvpr {
                self.vcpus.remove(pa);
            }
        }
        self.pamt.free(level, pa);
        if level == 0 && self.pair_hint(pa) != 0 {
            call.regs.r9 = 1;
        }
        DONE
    }

    fn reclaim_tdr(&mut self, call: &mut Call, tdr: u64) -> Result<(), Stop> {
        let td = self.td_ref(tdr)?;
        if td.lifecycle != Lifecycle::Teardown {
            return Err(Code::LifecycleStateIncorrect.into());
        }
        if td.chldcnt != 0 {
            return Err(Code::TdAssociatedPagesExist.into());
        }
        call.point(HoldPoint::Commit)?;
        self.tds.remove(tdr);
        for lp in &mut self.lps {
            lp.tlbs.remove(&tdr);
        }
        // The module has just used the TDR through the cache: its line lies there under the global key id.
        let global = self.sys.global_hkid;
        self.touch_private(tdr, global);
        Ok(())
    }

    pub(super) fn phymem_page_wbinvd(&mut self, call: &mut Call) -> LeafResult {
        let rcx = call.input.rcx;
        if rcx >> self.platform.address_bits != 0 {
            return Err(invalid(Operand::RCX).into());
        }
        let (pa, hkid) = (rcx & self.platform.address_mask(), self.platform.hkid_of(rcx));
        self.explicit_page(call, pa, Operand::RCX, PageType::Nda, 0, Mode::Shared)?;
        call.point(HoldPoint::Commit)?;
        self.flush_page(pa & !(PAGE_SIZE - 1), hkid);
        DONE
    }

    /// PHYMEM.PAGE.WBINVD of every 4K page of the 2M page at `rcx`, in one step, where nothing can tell that from as many calls:
    /// every one would succeed, and neither a fault on plan nor the record of calls sees them one by one. `false`, with
    /// nothing done, where something can.
    pub fn write_back_large_page(&mut self, lp: LpId, rcx: u64) -> bool {
        let leaf = Leaf::PhymemPageWbinvd;
        let (pa, hkid) = (rcx & self.platform.address_mask(), self.platform.hkid_of(rcx));
        let idle =
            self.lps.get(lp.0 as usize).is_some_and(|lp| matches!(lp.activity, Activity::Host) && lp.hold.is_none());
        let planned = self.faults.rules().iter().any(|rule| rule.leaf == AnyLeaf::Seamcall(leaf));
        let plain = idle
            && !planned
            && !self.trace.keeps_calls()
            && !self.pamt.dynamic
            && self.sys.state == SysState::Ready
            && rcx >> self.platform.address_bits == 0
            && pa.is_multiple_of(span(1))
            && self.check_private_hpa(pa, Operand::RCX, 1).is_ok()
            && self.pamt.is_open_and_free(pa);
        if plain {
            for line in self.dirty_lines(pa, span(1), Some(hkid)) {
                self.write_back(line);
            }
            self.trace.count_successes(leaf, 512);
        }
        plain
    }

    pub(super) fn phymem_cache_wb(&mut self, call: &mut Call) -> LeafResult {
        let resume = call.input.rcx;
        if resume > 1 {
            return Err(invalid(Operand::RCX).into());
        }
        let package = self.lps[call.lp.0 as usize].package;
        self.lock(call, LockId::Wbcache(package), Mode::Exclusive).map_err(|_| busy(Operand::WBCACHE))?;
        self.lock(call, LockId::Kot, Mode::Shared).map_err(|_| busy(Operand::KOT))?;
        let session = self.wbcache[package as usize].session.clone();
        let (hkids, mut done) = match session {
            _ if resume == 0 => (self.kot.in_state(HkidState::Flushed), 0),
            Some(session) => session,
            None => return Err(Code::WbcacheResumeError.into()),
        };
        if hkids.is_empty() {
            return Err(Code::NoHkidReadyToWbcache.into());
        }
        call.point(HoldPoint::Commit)?;
        loop {
            done += 1;
            if done == CACHE_WB_PIECES {
                break;
            }
            if self.interrupt_seen(call.lp) {
                self.wbcache[package as usize].session = Some((hkids, done));
                return Err(Code::InterruptedResumable.into());
            }
        }
        self.wbcache[package as usize].session = None;
        for hkid in hkids {
            self.flush_hkid(hkid);
            if let Some(entry) = self.kot.entry_mut(hkid) {
                entry.wbinvd_bitmap &= !(1 << package);
            }
        }
        DONE
    }
}
