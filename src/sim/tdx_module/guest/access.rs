//! Memory accesses of the guest: cached translations, the walk, violations (TDX module spec 6.4, 9.5, 15.4).

use super::super::call::LpError;
use super::super::lp::{Interrupt, LpId, Translation};
use super::super::module::Module;
use super::super::platform::MAX_PA;
use super::super::sept::{span, walk};
use super::super::td::Gpaw;
use super::super::vcpu::VeInfo;
use super::exit::{Extended, Report};
use super::{Access, GuestException, GuestOutcome, exit_reason};

/// What a write replaces: those bits of a word that `mask` covers.
#[derive(Clone, Copy, Debug)]
pub(super) struct Store {
    pub value: u64,
    pub mask: u64,
}

impl Store {
    const NONE: Store = Store { value: 0, mask: 0 };
}

impl Module {
    /// The guest on `lp` reads the 8 bytes at `gpa`.
    ///
    /// # Errors
    /// The processor runs no guest, or has a TDCALL held.
    pub fn guest_read(&mut self, lp: LpId, gpa: u64) -> Result<GuestOutcome, LpError> {
        self.guest_access(lp, gpa, Access::Read, Store::NONE)
    }

    /// The guest on `lp` writes 8 bytes at `gpa`.
    ///
    /// # Errors
    /// The processor runs no guest, or has a TDCALL held.
    pub fn guest_write(&mut self, lp: LpId, gpa: u64, value: u64) -> Result<GuestOutcome, LpError> {
        self.guest_access(lp, gpa, Access::Write, Store { value, mask: u64::MAX })
    }

    /// The guest on `lp` writes those of the 8 bytes at `gpa`, 8-aligned, that `mask` covers.
    ///
    /// # Errors
    /// The processor runs no guest, or has a TDCALL held.
    pub fn guest_write_masked(&mut self, lp: LpId, gpa: u64, value: u64, mask: u64) -> Result<GuestOutcome, LpError> {
        self.guest_access(lp, gpa, Access::Write, Store { value, mask })
    }

    /// The guest on `lp` fetches an instruction at `gpa`.
    ///
    /// # Errors
    /// The processor runs no guest, or has a TDCALL held.
    pub fn guest_fetch(&mut self, lp: LpId, gpa: u64) -> Result<GuestOutcome, LpError> {
        self.guest_access(lp, gpa, Access::Fetch, Store::NONE)
    }

    fn guest_access(&mut self, lp: LpId, gpa: u64, access: Access, store: Store) -> Result<GuestOutcome, LpError> {
        let tdvpr = self.guest_on(lp)?;
        if self.lp_mut(lp)?.interrupt == Interrupt::Pending {
            return Ok(self.interrupt_exit(lp, tdvpr));
        }
        let Some(tdr) = self.vcpu(tdvpr).map(|vcpu| vcpu.tdr_pa) else { return Err(LpError::NotInGuest(lp)) };
        let Some(td) = self.td(tdr) else { return Err(LpError::NotInGuest(lp)) };
        let (gpaw, hkid) = (td.gpaw, td.hkid);
        if gpa >= MAX_PA || gpaw == Gpaw::Bits48 && gpa >> 48 != 0 {
            return Ok(GuestOutcome::Exception(GuestException::ReservedPageFault));
        }
        if !gpaw.is_private(gpa) {
            return Ok(self.shared_access(lp, tdvpr, gpa, access, store));
        }
        let Some(translation) = self.translate(lp, tdr, gpa, access) else {
            return Ok(self.private_violation(lp, tdvpr, gpa, access));
        };
        let hpa = (translation.hpa + gpa % span(translation.level)) & !7;
        let result = match access {
            Access::Write if store.mask != u64::MAX => self.read_as(hpa, hkid).and_then(|old| {
                let merged = old & !store.mask | store.value & store.mask;
                self.write_private(hpa, hkid, merged).map(|()| GuestOutcome::Done)
            }),
            Access::Write => self.write_private(hpa, hkid, store.value).map(|()| GuestOutcome::Done),
            Access::Read => self.read_as(hpa, hkid).map(GuestOutcome::Value),
            Access::Fetch => self.read_as(hpa, hkid).map(|_| GuestOutcome::Done),
        };
        Ok(match result {
            Ok(outcome) => {
                self.step(tdvpr);
                outcome
            }
            Err(_) => self.machine_check_exit(lp, tdvpr),
        })
    }

    /// The instruction is over.
    pub(crate) fn step(&mut self, tdvpr: u64) {
        if let Some(vcpu) = self.vcpu_mut(tdvpr) {
            vcpu.rip = vcpu.rip.wrapping_add(1);
        }
    }

    /// A cached translation, however stale, or a walk that fills the cache.
    fn translate(&mut self, lp: LpId, tdr: u64, gpa: u64, access: Access) -> Option<Translation> {
        let tlbs = &mut self.lps[lp.0 as usize].tlbs;
        let cached = tlbs.entry(tdr).or_default().find(gpa);
        if let Some(translation) = cached.filter(|translation| translation.rwx & access as u64 != 0) {
            return Some(translation);
        }
        let td = self.td(tdr)?;
        let at = walk::walk_to_leaf(&*self.memory, td.root_pa, td.root_level, gpa).ok()?;
        let translation = Translation { level: at.level, hpa: at.entry.hpa(at.level), rwx: at.entry.rwx() };
        if translation.rwx & access as u64 == 0 {
            return None;
        }
        self.lps[lp.0 as usize].tlbs.entry(tdr).or_default().insert(gpa, translation);
        Some(translation)
    }

    fn private_violation(&mut self, lp: LpId, tdvpr: u64, gpa: u64, access: Access) -> GuestOutcome {
        let end = self.vcpu(tdvpr).and_then(|vcpu| self.td(vcpu.tdr_pa)).map(|td| {
            let at = match walk::walk(&*self.memory, td.root_pa, td.root_level, gpa, 0) {
                Ok(at) | Err(at) => at,
            };
            (at.entry, td.pending_ve_disabled())
        });
        let Some((entry, ve_disabled)) = end else { return GuestOutcome::Done };
        let qualification = access as u64 | entry.rwx() << 3;
        let pending = entry.state().is_some_and(|state| state.acceptable());
        if pending && !ve_disabled {
            return self.raise_ve(tdvpr, gpa, qualification);
        }
        self.count_zero_step(tdvpr, gpa);
        let extended = if pending { Extended::PendingViolation } else { Extended::None };
        self.fault_exit(lp, tdvpr, Report::violation(gpa, qualification, extended))
    }

    /// #VE for an EPT violation, or #DF while the last one is unread.
    pub(super) fn raise_ve(&mut self, tdvpr: u64, gpa: u64, qualification: u64) -> GuestOutcome {
        let info =
            VeInfo { valid: true, exit_reason: exit_reason::EPT_VIOLATION, qualification, gpa, ..VeInfo::default() };
        let Some(vcpu) = self.vcpu_mut(tdvpr) else { return GuestOutcome::Done };
        if vcpu.ve_info.valid {
            return GuestOutcome::Exception(GuestException::DoubleFault);
        }
        vcpu.ve_info = info;
        GuestOutcome::Exception(GuestException::Ve(info))
    }
}
