//! SYS.CONFIG: TDMRs, their PAMT areas and reserved areas (TDX module spec 5.1).

use super::super::call::{Call, Stop};
use super::super::dispatch::{DONE, LeafResult};
use super::super::lock::Mode;
use super::super::lp::HoldPoint;
use super::super::module::Module;
use super::super::operand::Operand;
use super::super::pamt::Tdmr;
use super::super::platform::MAX_PA;
use super::super::state::{HkidState, SysState};
use super::super::status::{Code, Status, invalid};

const GIB: u64 = 1 << 30;
const PAGE: u64 = 4096;
/// TDMRs SYS.CONFIG takes.
pub(super) const MAX_TDMRS: u64 = 64;
/// Reserved areas of one TDMR.
pub(super) const MAX_RESERVED: u64 = 16;
/// Bytes of a PAMT entry at every size.
pub(super) const PAMT_ENTRY: u64 = 16;
const ENABLE_DYNAMIC_PAMT: u64 = 1 << 16;

fn overlap(a: (u64, u64), b: (u64, u64)) -> bool {
    a.1 > 0 && b.1 > 0 && a.0 < b.0 + b.1 && b.0 < a.0 + a.1
}

/// The parts of a TDMR that are not reserved.
fn usable_parts(tdmr: &Tdmr) -> Vec<(u64, u64)> {
    let mut parts = Vec::new();
    let mut at = tdmr.base;
    for (offset, size) in &tdmr.reserved {
        let start = tdmr.base + offset;
        parts.push((at, start - at));
        at = start + size;
    }
    parts.push((at, tdmr.end() - at));
    parts.retain(|part| part.1 > 0);
    parts
}

impl Module {
    pub(super) fn sys_config(&mut self, call: &mut Call) -> LeafResult {
        self.sys_lock(call, Mode::Exclusive)?;
        if self.sys.state != SysState::InitDone || self.lps.iter().any(|lp| !lp.init_done) {
            return Err(Code::SysConfigNotPending.into());
        }
        let (list, count, r8) = (call.input.rcx, call.input.rdx, call.input.r8);
        self.shared_hpa(list, 512, Operand::RCX)?;
        if !(1..=MAX_TDMRS).contains(&count) {
            return Err(invalid(Operand::RDX).into());
        }
        let dynamic = r8 & ENABLE_DYNAMIC_PAMT != 0;
        let hkid = r8 & 0xFFFF;
        let reserved = r8 & !(ENABLE_DYNAMIC_PAMT | 0xFFFF) != 0 || dynamic && !self.switches.dpamt;
        if reserved || !self.platform.is_private_hkid(hkid) {
            return Err(invalid(Operand::R8).into());
        }
        let mut tdmrs: Vec<Tdmr> = Vec::new();
        for index in 0..count {
            let info = self.read_as(list + 8 * index, 0).unwrap_or(u64::MAX);
            self.shared_hpa(info, 512, Operand::TDMR_INFO_PA)?;
            let tdmr = self.read_tdmr(info, index as u32, dynamic, &tdmrs)?;
            tdmrs.push(tdmr);
        }
        call.point(HoldPoint::Commit)?;
        self.pamt.tdmrs = tdmrs;
        self.pamt.dynamic = dynamic;
        self.sys.global_hkid = hkid as u16;
        if let Some(entry) = self.kot.entry_mut(hkid as u16) {
            entry.state = HkidState::Reserved;
        }
        self.sys.state = SysState::ConfigDone;
        DONE
    }

    /// Reads one TDMR_INFO and checks it against the hardware and the TDMRs before it.
    fn read_tdmr(&mut self, info: u64, index: u32, dynamic: bool, before: &[Tdmr]) -> Result<Tdmr, Stop> {
        let fail = |code| Stop::Fail(Status::new(code, index));
        let word = |module: &mut Module, n: u64| module.read_as(info + 8 * n, 0).unwrap_or(u64::MAX);
        let (base, size) = (word(self, 0), word(self, 1));
        let in_reach = base < MAX_PA && size < MAX_PA && (base + size) <= self.platform.address_mask() + 1;
        if !base.is_multiple_of(GIB) || !size.is_multiple_of(GIB) || size == 0 || !in_reach {
            return Err(fail(Code::InvalidTdmr));
        }
        if before.last().is_some_and(|last| base < last.end()) {
            return Err(fail(Code::NonOrderedTdmr));
        }
        let reserved = self.read_reserved(info, size, index)?;
        let areas = [0, 1, 2].map(|n| (word(self, 2 + 2 * n), word(self, 3 + 2 * n)));
        let pages = size / PAGE;
        let least_4k = if dynamic { pages.div_ceil(8) } else { pages * PAMT_ENTRY };
        let least = [size / GIB * PAMT_ENTRY, (size >> 21) * PAMT_ENTRY, least_4k];
        for (area, least) in areas.iter().zip(least) {
            let aligned = area.0.is_multiple_of(PAGE) && area.1.is_multiple_of(PAGE);
            if !aligned || area.1 < least || area.0 >= MAX_PA || area.1 >= MAX_PA {
                return Err(fail(Code::InvalidPamt));
            }
        }
        if areas.iter().any(|area| !self.platform.in_cmrs(area.0, area.1)) {
            return Err(fail(Code::PamtOutsideCmrs));
        }
        let tdmr = Tdmr::new(base, size, reserved, areas);
        check_pamt_overlap(&tdmr, before).map_err(|()| fail(Code::PamtOverlap))?;
        if usable_parts(&tdmr).iter().any(|part| !self.platform.in_cmrs(part.0, part.1)) {
            return Err(fail(Code::TdmrOutsideCmrs));
        }
        Ok(tdmr)
    }

    fn read_reserved(&mut self, info: u64, tdmr_size: u64, index: u32) -> Result<Vec<(u64, u64)>, Stop> {
        let mut reserved: Vec<(u64, u64)> = Vec::new();
        for n in 0..MAX_RESERVED {
            let offset = self.read_as(info + 64 + 16 * n, 0).unwrap_or(u64::MAX);
            let size = self.read_as(info + 72 + 16 * n, 0).unwrap_or(u64::MAX);
            if size == 0 {
                break;
            }
            let inside = offset < tdmr_size && size <= tdmr_size - offset;
            if !offset.is_multiple_of(PAGE) || !size.is_multiple_of(PAGE) || !inside {
                return Err(Status::new(Code::InvalidReservedInTdmr, index).into());
            }
            if reserved.last().is_some_and(|last| offset < last.0 + last.1) {
                return Err(Status::new(Code::NonOrderedReservedInTdmr, index).into());
            }
            reserved.push((offset, size));
        }
        Ok(reserved)
    }
}

/// No PAMT area may lie in usable memory of a TDMR or in another PAMT area.
fn check_pamt_overlap(tdmr: &Tdmr, before: &[Tdmr]) -> Result<(), ()> {
    let mut taken = usable_parts(tdmr);
    for other in before {
        taken.extend(usable_parts(other));
        taken.extend(other.areas);
        if other.areas.iter().any(|area| usable_parts(tdmr).iter().any(|part| overlap(*part, *area))) {
            return Err(());
        }
    }
    for area in tdmr.areas {
        if taken.iter().any(|other| overlap(area, *other)) {
            return Err(());
        }
        taken.push(area);
    }
    Ok(())
}
