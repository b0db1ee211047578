//! Dynamic PAMT: PHYMEM.PAMT.ADD and REMOVE, and the page pairs of DEMOTE and PROMOTE (TDX module spec 7.5).

use super::super::call::{Call, Stop};
use super::super::check::page_info;
use super::super::dispatch::{DONE, LeafResult};
use super::super::lock::Mode;
use super::super::lp::HoldPoint;
use super::super::memory::PAGE_SIZE;
use super::super::module::Module;
use super::super::operand::Operand;
use super::super::pamt::PageType;
use super::super::sept::span;
use super::super::status::{Code, Status, invalid};

/// RCX bit 62 of a leaf that frees a 4K page: its range's page pair has nothing left to describe.
const PAIR_HINT: u64 = 1 << 62;

impl Module {
    /// The hint for a 4K page just freed.
    pub(super) fn pair_hint(&self, pa: u64) -> u64 {
        let empty = |region: &super::super::pamt::Pamt2m| region.used == 0 && region.entry.ty() == PageType::Pamt;
        if self.pamt.dynamic && self.pamt.region(pa).is_some_and(empty) { PAIR_HINT } else { 0 }
    }

    pub(super) fn phymem_pamt_add(&mut self, call: &mut Call) -> LeafResult {
        if !self.pamt.dynamic {
            return Err(invalid(Operand::RAX).into());
        }
        let (range, _) = page_info(call.input.rcx, 1, 1)?;
        if range & !self.platform.address_mask() != 0 {
            return Err(invalid(Operand::RCX).into());
        }
        let pair = [(Operand::RDX, call.input.rdx), (Operand::R8, call.input.r8)];
        self.check_pair_format(&pair)?;
        if !self.pamt.covers(range) {
            return Err(Status::on(Code::OperandAddrRangeError, Operand::RCX).into());
        }
        let level = self.lock_page(call, range, Operand::RCX, 1, Mode::Exclusive)?;
        if level != 1 || self.pamt.entry(1, range).is_none_or(|entry| entry.ty() != PageType::Nda) {
            return Err(Status::on(Code::HpaRangeNotFree, Operand::RCX).into());
        }
        self.check_pair_free(call, &pair, Some(range))?;
        call.point(HoldPoint::Commit)?;
        self.pamt.assign(1, range, PageType::Pamt, 0, 0);
        self.install_pair(range, (pair[0].1, pair[1].1));
        DONE
    }

    pub(super) fn phymem_pamt_remove(&mut self, call: &mut Call) -> LeafResult {
        if !self.pamt.dynamic {
            return Err(invalid(Operand::RAX).into());
        }
        let (range, _) = page_info(call.input.rcx, 1, 1)?;
        self.check_private_hpa(range, Operand::RCX, 1)?;
        let level = self.lock_page(call, range, Operand::RCX, 1, Mode::Exclusive)?;
        if level != 1 || self.pamt.entry(1, range).is_none_or(|entry| entry.ty() != PageType::Pamt) {
            return Err(Status::on(Code::NoPamtPagePair, Operand::RCX).into());
        }
        for i in 0..512 {
            let child = self.pamt.entry(0, range + i * PAGE_SIZE).map(|entry| entry.ty());
            if !matches!(child, Some(PageType::Nda | PageType::Rsvd)) {
                return Err(Status::new(Code::PamtPageNotEmpty, u32::from(i >= 256)).into());
            }
        }
        call.point(HoldPoint::Commit)?;
        self.pamt.free(1, range);
        (call.regs.rdx, call.regs.r8) = self.return_pair(range);
        DONE
    }

    /// Format, then TDMR membership, of one page of a pair after the other.
    fn check_pair_format(&self, pair: &[(Operand, u64); 2]) -> Result<(), Stop> {
        for (operand, page) in pair {
            if !page.is_multiple_of(PAGE_SIZE) || page & !self.platform.address_mask() != 0 {
                return Err(invalid(*operand).into());
            }
            if !self.pamt.covers(*page) {
                return Err(Status::on(Code::OperandAddrRangeError, *operand).into());
            }
        }
        Ok(())
    }

    /// Both pages free, not yet holding PAMT entries, and not the same. `own` is the range they are for: pages inside it need no
    /// entries of their own.
    fn check_pair_free(&mut self, call: &mut Call, pair: &[(Operand, u64); 2], own: Option<u64>) -> Result<(), Stop> {
        for (n, (operand, page)) in pair.iter().enumerate() {
            let not_free = Status::on(Code::PageNotFree, *operand);
            let twin = n == 1 && pair[0].1 == *page;
            if twin || self.pamt.bitmap.contains(page) {
                return Err(not_free.into());
            }
            if own == Some(page & !(span(1) - 1)) {
                if self.pamt.entry(0, *page).is_some_and(|entry| entry.ty() == PageType::Rsvd) {
                    return Err(not_free.into());
                }
                continue;
            }
            let level = self.lock_page(call, *page, *operand, 0, Mode::Exclusive)?;
            let free = level == 0 && self.pamt.entry(0, *page).is_some_and(|entry| entry.ty() == PageType::Nda);
            let large = self.pamt.entry(1, *page).is_some_and(|entry| entry.ty() == PageType::Reg);
            if !free || large {
                return Err(not_free.into());
            }
        }
        Ok(())
    }

    /// The pair DEMOTE of a 2M page takes in R12 and R13.
    pub(super) fn check_demote_pair(&mut self, call: &mut Call) -> Result<(u64, u64), Stop> {
        let pair = [(Operand::R12, call.input.r12), (Operand::R13, call.input.r13)];
        self.check_pair_format(&pair)?;
        self.check_pair_free(call, &pair, None)?;
        Ok((pair[0].1, pair[1].1))
    }

    /// Puts the 4K entries of a range into a page pair.
    pub(super) fn install_pair(&mut self, range: u64, pair: (u64, u64)) {
        let global = self.sys.global_hkid;
        for page in [pair.0, pair.1] {
            self.fill_direct(page, PAGE_SIZE, global, 0);
            self.pamt.bitmap.insert(page);
        }
        if self.pamt.entry(1, range).is_some_and(|entry| entry.ty() != PageType::Pamt) {
            self.pamt.assign(1, range, PageType::Pamt, 0, 0);
        }
        if let Some(region) = self.pamt.region_mut(range) {
            region.pair = pair;
        }
    }

    /// Gives the pair of a range back.
    pub(super) fn return_pair(&mut self, range: u64) -> (u64, u64) {
        let Some(region) = self.pamt.region_mut(range) else { return (0, 0) };
        let pair = std::mem::take(&mut region.pair);
        self.pamt.bitmap.remove(&pair.0);
        self.pamt.bitmap.remove(&pair.1);
        pair
    }
}
