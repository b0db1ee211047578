//! TDG.MEM.PAGE.ACCEPT and TDG.MEM.PAGE.RELEASE (TDX module spec 9.4, 3.8).

use super::super::call::Call;
use super::super::check::page_info;
use super::super::lock::{Conflict, LockId, Mode};
use super::super::lp::{HoldPoint, Interrupt};
use super::super::memory::PAGE_SIZE;
use super::super::module::Module;
use super::super::operand::Operand;
use super::super::sept::walk::{self, At};
use super::super::sept::{SeptEntry, SeptOp, SeptState, span};
use super::super::status::{Code, Status, invalid};
use super::exit::{Extended, Report, WalkEnd};
use super::tdcall::{TdcallEnd, TdcallResult};

/// An entry a TDCALL has walked to.
pub(crate) struct GuestEntry {
    pub tdr: u64,
    pub hkid: u16,
    pub gpa: u64,
    pub level: u8,
    /// The entry of `level`, or where the walk ended above it.
    pub found: Result<At, At>,
}

impl Module {
    /// The page-info operand of a TDCALL and the walk to its entry.
    pub(crate) fn guest_walk(&self, call: &Call, tdvpr: u64, max_level: u8) -> Result<GuestEntry, TdcallEnd> {
        let refused = |_| TdcallEnd::from(invalid(Operand::RCX));
        let (gpa, level) = page_info(call.input.rcx, 0, max_level).map_err(refused)?;
        let td = self
            .vcpu(tdvpr)
            .and_then(|vcpu| self.td(vcpu.tdr_pa))
            .ok_or_else(|| TdcallEnd::from(invalid(Operand::RCX)))?;
        if !td.gpaw.is_private(gpa) {
            return Err(invalid(Operand::RCX).into());
        }
        let found = walk::walk(&*self.memory, td.root_pa, td.root_level, gpa, level);
        Ok(GuestEntry { tdr: td.tdr_pa, hkid: td.hkid, gpa, level, found })
    }

    /// The guest-side entry lock.
    pub(crate) fn guest_entry_lock(&mut self, call: &mut Call, at: At) -> Result<(), TdcallEnd> {
        match self.lock(call, LockId::SeptEntry(at.entry_pa), Mode::Exclusive) {
            Ok(()) => Ok(()),
            Err(Conflict::Busy) => Err(Status::on(Code::OperandBusy, Operand::RCX).into()),
            Err(Conflict::HostPriority) => Err(TdcallEnd::HostPriority(Operand::RCX)),
        }
    }

    pub(crate) fn tdg_accept(&mut self, call: &mut Call, tdvpr: u64) -> TdcallResult {
        let guest = match self.guest_walk(call, tdvpr, 1) {
            Ok(guest) => guest,
            Err(end) => return Ok(end),
        };
        let exit = |at: At| {
            let end = WalkEnd { requested: guest.level, at };
            Ok(TdcallEnd::Fault(Report::tdcall_violation(guest.gpa, end, Extended::Accept)))
        };
        let at = match guest.found {
            Ok(at) => at,
            Err(stop) if stop.entry.state().is_some_and(SeptState::guest_accessible) => {
                return Ok(Status::new(Code::PageAlreadyAccepted, stop.level as u32).into());
            }
            Err(stop) => return exit(stop),
        };
        if let Err(end) = self.guest_entry_lock(call, at) {
            return Ok(end);
        }
        call.point(HoldPoint::Entry)?;
        let entry = at.entry.unlocked();
        let Some(state) = entry.state() else { return exit(at) };
        if !state.is_leaf() && state != SeptState::Free {
            return Ok(Status::new(Code::PageSizeMismatch, at.level as u32).into());
        }
        if state.guest_accessible() {
            return Ok(Status::new(Code::PageAlreadyAccepted, at.level as u32).into());
        }
        if !state.allows(SeptOp::Accept) {
            return exit(at);
        }
        if let Some(done) = self.accept_pieces(call, entry, &guest) {
            let suspended = entry.with_accept_counter(done);
            self.memory.write_u64(at.entry_pa, suspended.0 | SeptEntry::TDEL);
            return Ok(TdcallEnd::Interrupted);
        }
        let accepted = if state == SeptState::Pending { SeptState::Mapped } else { SeptState::ExportedDirty };
        let mapped = SeptEntry(accepted.raw() | entry.hpa(guest.level));
        // The accept path writes from its own copy: a host's request made meanwhile is lost, and the host tries again.
        self.memory.write_u64(at.entry_pa, mapped.0 | SeptEntry::TDEL);
        Ok(Status::SUCCESS.into())
    }

    /// Zero-fills 4K at a time from the accept counter on; `Some` with the new counter when an interrupt comes between two pieces.
    fn accept_pieces(&mut self, call: &Call, entry: SeptEntry, guest: &GuestEntry) -> Option<u64> {
        let hpa = entry.hpa(guest.level);
        let pieces = span(guest.level) / PAGE_SIZE;
        let mut next = if guest.level > 0 { entry.accept_counter() } else { 0 };
        if self.lps[call.lp.0 as usize].interrupt == Interrupt::None {
            self.fill_direct(hpa + next * PAGE_SIZE, (pieces - next) * PAGE_SIZE, guest.hkid, 0);
            return None;
        }
        while next < pieces {
            self.fill_direct(hpa + next * PAGE_SIZE, PAGE_SIZE, guest.hkid, 0);
            next += 1;
            if next < pieces && self.interrupt_seen(call.lp) {
                return Some(next);
            }
        }
        None
    }

    /// The guest gives a mapped page up: it is pending again at the same level.
    pub(crate) fn tdg_release(&mut self, call: &mut Call, tdvpr: u64) -> TdcallResult {
        let guest = match self.guest_walk(call, tdvpr, 2) {
            Ok(guest) => guest,
            Err(end) => return Ok(end),
        };
        let exit = |at: At| {
            let end = WalkEnd { requested: guest.level, at };
            Ok(TdcallEnd::Fault(Report::tdcall_violation(guest.gpa, end, Extended::Accept)))
        };
        let at = match guest.found {
            Ok(at) => at,
            Err(stop) if stop.entry.is_leaf() => {
                return Ok(Status::new(Code::PageSizeMismatch, stop.level as u32).into());
            }
            Err(stop) => return exit(stop),
        };
        if let Err(end) = self.guest_entry_lock(call, at) {
            return Ok(end);
        }
        call.point(HoldPoint::Entry)?;
        match at.entry.state() {
            Some(SeptState::NlMapped | SeptState::NlBlocked) => {
                return Ok(Status::new(Code::PageSizeMismatch, at.level as u32).into());
            }
            Some(SeptState::Mapped) => {}
            _ => return exit(at),
        }
        let pending = at.entry.in_state(SeptState::Pending);
        self.memory.write_u64(at.entry_pa, pending.0 | SeptEntry::TDEL);
        if let Some(tlb) = self.lps[call.lp.0 as usize].tlbs.get_mut(&guest.tdr) {
            tlb.remove(guest.gpa, guest.level);
        }
        Ok(Status::SUCCESS.into())
    }
}
