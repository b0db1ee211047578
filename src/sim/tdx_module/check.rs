//! The checks the leaves share, each in the order of TDX module spec 3.5 and 3.6, and the locks they take on the way.

use super::call::{AnyLeaf, Call, Stop};
use super::leaf::Leaf;
use super::lock::{Conflict, HeldLock, LockId, Mode, Side};
use super::lp::{Disorder, HoldPoint};
use super::module::Module;
use super::operand::Operand;
use super::pamt::PageType;
use super::platform::MAX_PA;
use super::sept::walk::{self, At};
use super::sept::{SeptState, span};
use super::state::{Lifecycle, OpState};
use super::status::{Code, Status, busy, invalid};
use super::td::{TDCS_PAGES, Td};

const IA32_TSC_ADJUST: u32 = 0x3B;
const IA32_MISC_ENABLE: u32 = 0x1A0;
const GPA_FIELD: u64 = 0x000F_FFFF_FFFF_F000;

/// How a leaf reaches its entry of the Secure EPT.
pub(crate) struct SeptAccess {
    /// Levels the leaf takes; the upper bound is the root level if smaller.
    pub min_level: u8,
    pub max_level: u8,
    /// Lock of the tree, or none for leaves that hold the TDR exclusively.
    pub tree: Option<Mode>,
}

/// An entry a leaf has reached and, unless the leaf needs none, locked.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SeptRef {
    pub tdr: u64,
    pub gpa: u64,
    pub at: At,
    pub state: SeptState,
}

impl Module {
    /// Takes a lock for a leaf, or finds it among those the leaf had when it was held half-way.
    #[inline]
    pub(crate) fn lock(&mut self, call: &mut Call, id: LockId, mode: Mode) -> Result<(), Conflict> {
        if call.replaying
            && let Some(lock) = call.locks.iter_mut().find(|lock| lock.id == id && !lock.claimed)
        {
            lock.claimed = true;
            return Ok(());
        }
        let side = match call.leaf {
            AnyLeaf::Seamcall(_) => Side::Host,
            AnyLeaf::Tdcall(_) => Side::Guest,
        };
        self.raw_lock(id, mode, side)?;
        call.locks.push(HeldLock::new(id, mode));
        Ok(())
    }

    /// Makes a shared lock just taken exclusive.
    #[inline]
    fn promote_lock(&mut self, call: &mut Call, level: u8, pa: u64) -> Result<(), Conflict> {
        let id = LockId::Pamt(level, pa);
        let Some(lock) = call.locks.iter_mut().rev().find(|lock| lock.id == id) else { return Err(Conflict::Busy) };
        if lock.mode == Mode::Exclusive {
            return Ok(());
        }
        let Some(entry) = self.pamt.entry_mut(level, pa) else { return Err(Conflict::Busy) };
        let mut word = entry.lock();
        let answer = word.promote();
        entry.set_lock(word);
        answer?;
        lock.mode = Mode::Exclusive;
        Ok(())
    }

    /// Gives every lock of a leaf back, last taken first.
    #[inline]
    pub(crate) fn release_locks(&mut self, locks: &mut Vec<HeldLock>) {
        while let Some(lock) = locks.pop() {
            self.raw_unlock(lock);
        }
    }

    /// Gives one lock of a leaf back before its end.
    pub(crate) fn release_lock(&mut self, call: &mut Call, id: LockId) {
        if let Some(at) = call.locks.iter().rposition(|lock| lock.id == id) {
            let lock = call.locks.remove(at);
            self.raw_unlock(lock);
        }
    }

    /// Steps 1 and 2 of the explicit page check: format of the address, then whether it lies in usable TDMR memory.
    #[inline]
    pub(crate) fn check_private_hpa(&self, pa: u64, op: Operand, level: u8) -> Result<(), Stop> {
        if !pa.is_multiple_of(span(level)) || pa & !self.platform.address_mask() != 0 {
            return Err(invalid(op).into());
        }
        if !self.pamt.covers(pa) {
            return Err(Status::on(Code::OperandAddrRangeError, op).into());
        }
        Ok(())
    }

    /// An explicit private page of `level` that must have type `want` (TDX module spec 3.5, 7.2).
    pub(crate) fn explicit_page(
        &mut self,
        call: &mut Call,
        pa: u64,
        op: Operand,
        want: PageType,
        level: u8,
        mode: Mode,
    ) -> Result<(), Stop> {
        self.check_private_hpa(pa, op, level)?;
        let found = self.lock_page(call, pa, op, level, mode)?;
        let metadata = Status::on(Code::PageMetadataIncorrect, op);
        let ty = self.pamt.entry(found, pa).map_or(PageType::Rsvd, |entry| entry.ty());
        if self.pamt.dynamic && want == PageType::Nda {
            let in_bitmap = self.pamt.bitmap.range(pa..pa + span(level)).next().is_some();
            let no_pair = self.pamt.entry(1, pa).is_some_and(|entry| entry.ty() == PageType::Nda);
            if in_bitmap {
                return Err(metadata.into());
            }
            if level == 0 && found == 0 && no_pair {
                return Err(Status::on(Code::MissingPamtPagePair, op).into());
            }
        }
        if found != level || ty != want {
            return Err(metadata.into());
        }
        if want == PageType::Nda && level == 1 && !self.pamt.dynamic && !self.pamt.all_4k_free(pa) {
            return Err(metadata.into());
        }
        Ok(())
    }

    /// The PAMT walk of an explicit page: parents shared, the leaf in the wanted mode. Returns the level of the leaf found.
    #[inline]
    pub(crate) fn lock_page(
        &mut self,
        call: &mut Call,
        pa: u64,
        op: Operand,
        level: u8,
        mode: Mode,
    ) -> Result<u8, Stop> {
        let busy = |_| Stop::Fail(busy(op));
        for upper in [2, 1] {
            let base = pa & !(span(upper) - 1);
            self.lock(call, LockId::Pamt(upper, base), Mode::Shared).map_err(busy)?;
            let is_leaf = self.pamt.entry(upper, pa).is_some_and(|entry| entry.ty() == PageType::Reg);
            if is_leaf || level == upper {
                if mode == Mode::Exclusive {
                    self.promote_lock(call, upper, base).map_err(busy)?;
                }
                return Ok(upper);
            }
        }
        self.lock(call, LockId::Pamt(0, pa & !0xFFF), mode).map_err(busy)?;
        Ok(0)
    }

    /// An operand that is the TDR of a TD.
    pub(crate) fn explicit_tdr(&mut self, call: &mut Call, pa: u64, op: Operand, mode: Mode) -> Result<u64, Stop> {
        self.explicit_page(call, pa, op, PageType::Tdr, 0, mode)?;
        call.point(HoldPoint::Tdr)?;
        Ok(pa)
    }

    /// An operand that is a TDVPR, with the lock of its owner's TDR. Returns both addresses, TDVPR first.
    pub(crate) fn explicit_tdvpr(
        &mut self,
        call: &mut Call,
        pa: u64,
        op: Operand,
        mode: Mode,
        tdr_mode: Mode,
    ) -> Result<(u64, u64), Stop> {
        self.explicit_page(call, pa, op, PageType::Tdvpr, 0, mode)?;
        let tdr = self.pamt.entry(0, pa).map_or(0, |entry| entry.owner());
        self.lock(call, LockId::Pamt(0, tdr), tdr_mode).map_err(|_| busy(Operand::TDR))?;
        call.point(HoldPoint::Tdr)?;
        Ok((pa, tdr))
    }

    /// A page the host gives: 4K, free, exclusively locked.
    pub(crate) fn free_page(&mut self, call: &mut Call, pa: u64, op: Operand) -> Result<(), Stop> {
        self.explicit_page(call, pa, op, PageType::Nda, 0, Mode::Exclusive)
    }

    /// A shared address the host passes: `align`ed, not private, outside of the module's own range.
    pub(crate) fn shared_hpa(&self, pa: u64, align: u64, op: Operand) -> Result<(), Stop> {
        let in_seamrr = pa.wrapping_sub(self.platform.seamrr.0) < self.platform.seamrr.1;
        let private = self.platform.hkid_of(pa) >= self.platform.first_private_hkid;
        if !pa.is_multiple_of(align) || pa >> self.platform.address_bits != 0 || in_seamrr || private {
            return Err(invalid(op).into());
        }
        Ok(())
    }

    /// The state check of every leaf that needs a TDCS, with the op-state lock for those that take it.
    pub(crate) fn td_state(
        &mut self,
        call: &mut Call,
        tdr: u64,
        leaf: Leaf,
        op_lock: Option<Mode>,
    ) -> Result<(), Stop> {
        let td = self.td_ref(tdr)?;
        if td.fatal {
            return Err(Code::TdFatal.into());
        }
        if td.lifecycle != Lifecycle::KeysConfigured {
            return Err(Code::TdKeysNotConfigured.into());
        }
        if td.tdcx_pa.len() < TDCS_PAGES {
            return Err(Code::TdcsNotAllocated.into());
        }
        if let Some(mode) = op_lock {
            self.lock(call, LockId::OpState(tdr), mode).map_err(|_| busy(Operand::OP_STATE))?;
        }
        let op_state = self.td_ref(tdr)?.op_state;
        if !op_state_allows(leaf, op_state) {
            return Err(self.op_state_incorrect(op_state).into());
        }
        call.point(HoldPoint::OpState)
    }

    /// Refuses while the calling processor has a disorder.
    pub(crate) fn check_order(&self, call: &Call, disorder: Disorder) -> Result<(), Stop> {
        let status = match disorder {
            Disorder::CpuidMaxvalLimited => Status::from(Code::LimitCpuidMaxvalSet),
            Disorder::TscAdjustChanged => Status::new(Code::InconsistentMsr, IA32_TSC_ADJUST),
            Disorder::MonitorOff => Status::new(Code::IncorrectMsrValue, IA32_MISC_ENABLE),
        };
        if self.lps[call.lp.0 as usize].disorders.contains(&disorder) { Err(status.into()) } else { Ok(()) }
    }

    /// `OP_STATE_INCORRECT` with the details of the module's generation.
    pub(crate) fn op_state_incorrect(&self, op_state: OpState) -> Status {
        Status::new(Code::OpStateIncorrect, if self.switches.newer() { op_state as u32 } else { 0 })
    }

    /// The TD of a TDR a leaf has locked.
    #[inline]
    pub(crate) fn td_ref(&self, tdr: u64) -> Result<&Td, Stop> {
        self.td_by_tdr(tdr).ok_or(Stop::Fail(Status::on(Code::PageMetadataIncorrect, Operand::TDR)))
    }

    /// As [`Module::td_ref`], to change it.
    #[inline]
    pub(crate) fn td_mut(&mut self, tdr: u64) -> Result<&mut Td, Stop> {
        self.td_by_tdr_mut(tdr).ok_or(Stop::Fail(Status::on(Code::PageMetadataIncorrect, Operand::TDR)))
    }

    /// Page-info operand, private-address check, tree lock, walk and entry lock, in the order all Secure EPT leaves have them.
    pub(crate) fn sept_open(&mut self, call: &mut Call, tdr: u64, access: &SeptAccess) -> Result<SeptRef, Stop> {
        let td = self.td_ref(tdr)?;
        let (root, root_level, gpaw) = (td.root_pa, td.root_level, td.gpaw);
        let (gpa, level) = page_info(call.input.rcx, access.min_level, access.max_level.min(root_level))?;
        if !gpaw.is_private(gpa) {
            return Err(invalid(Operand::RCX).into());
        }
        if let Some(mode) = access.tree {
            self.lock(call, LockId::SeptTree(tdr), mode).map_err(|_| busy(Operand::SEPT_TREE))?;
            call.point(HoldPoint::Tree)?;
        }
        let at = walk::walk(&*self.memory, root, root_level, gpa, level)
            .map_err(|stop| sept_fail(call, Code::EptWalkFailed, stop))?;
        if access.tree.is_some() {
            self.lock(call, LockId::SeptEntry(at.entry_pa), Mode::Exclusive)
                .map_err(|_| sept_fail(call, Code::OperandBusy, at))?;
            call.point(HoldPoint::Entry)?;
        }
        self.sept_ref(tdr, gpa, at)
    }

    /// An entry with its state; an entry whose bits no state has means the Secure EPT is corrupt, and with it the TD.
    pub(crate) fn sept_ref(&mut self, tdr: u64, gpa: u64, at: At) -> Result<SeptRef, Stop> {
        match at.entry.state() {
            Some(state) => Ok(SeptRef { tdr, gpa, at, state }),
            None => {
                self.td_mut(tdr)?.fatal = true;
                Err(Code::TdFatal.into())
            }
        }
    }

    /// The tracking rule: the entry is blocked and its translations are gone, where the op state asks for it.
    pub(crate) fn check_tracked(&self, call: &mut Call, sept: &SeptRef, bepoch: u64) -> Result<(), Stop> {
        let td = self.td_ref(sept.tdr)?;
        if td.op_state.needs_tracking() && sept.state.tracking_required() {
            if !sept.state.any_blocked() {
                return Err(sept_fail(call, Code::GpaRangeNotBlocked, sept.at));
            }
            if !td.tracked(bepoch) {
                return Err(Status::on(Code::TlbTrackingNotDone, Operand::RCX).into());
            }
        }
        Ok(())
    }

    /// Replaces an entry that the leaf has locked; the lock bit and a host's pending request stay.
    #[inline]
    pub(crate) fn write_entry(&mut self, entry_pa: u64, raw: u64) {
        use super::sept::SeptEntry;
        let lock_bits = self.memory.read_u64(entry_pa) & (SeptEntry::TDEL | SeptEntry::TDHP);
        self.memory.write_u64(entry_pa, raw | lock_bits);
    }
}

/// Splits a page-info operand, or refuses it.
#[inline]
pub(crate) fn page_info(operand: u64, min_level: u8, max_level: u8) -> Result<(u64, u8), Stop> {
    let (gpa, level) = (operand & GPA_FIELD, (operand & 7) as u8);
    let reserved = operand & !(GPA_FIELD | 7) != 0;
    if reserved || !(min_level..=max_level).contains(&level) || !gpa.is_multiple_of(span(level)) {
        return Err(invalid(Operand::RCX).into());
    }
    Ok((gpa, level))
}

/// A failure with error information: the entry in RCX, level and state in RDX, the operand named RCX.
pub(crate) fn sept_fail(call: &mut Call, code: Code, at: At) -> Stop {
    call.regs.rcx = at.entry.architectural();
    call.regs.rdx = at.entry.info(at.level);
    Stop::Fail(Status::on(code, Operand::RCX))
}

/// Operand with flags in its low bits: TDR address and flags, reserved bits refused.
pub(crate) fn td_handle(operand: u64, op: Operand) -> Result<(u64, bool), Stop> {
    if operand & 0xFFE != 0 || operand >= MAX_PA {
        return Err(invalid(op).into());
    }
    Ok((operand & !1, operand & 1 != 0))
}

/// The op-state table (TDX module spec 8.3).
pub(crate) fn op_state_allows(leaf: Leaf, op_state: OpState) -> bool {
    use Leaf::*;
    let columns: u16 = match leaf {
        VpEnter => 0b010_0000_1100,
        MngAddcx | MngInit => 0b000_0000_0001,
        MemPageAdd | MrExtend | MrFinalize | VpInit => 0b000_0000_0010,
        VpCreate | VpAddcx => 0b000_1000_0010,
        MemSeptAdd => 0b011_1100_1110,
        MemPageAug => 0b010_0000_1110,
        MemPageRelocate | MemRangeBlock | MemRangeUnblock | MemPageDemote | MemPagePromote => 0b011_0011_1110,
        MemPageRemove => 0b111_0011_1110,
        MemSeptRemove | MemSeptRd | MemRd | MngRd | VpRd => 0b111_1111_1110,
        MemTrack => 0b011_1111_1110,
        MemWr | VpWr => 0b111_1100_1110,
        _ => 0b111_1111_1111,
    };
    columns >> op_state as u16 & 1 == 1
}

#[cfg(test)]
mod tests {
    use super::*;

    /// TDX module spec 8.3, row by row, columns 0 to 10 left to right.
    #[test]
    fn op_state_table_is_that_of_the_specification() {
        let rows: &[(&[Leaf], &str)] = &[
            (&[Leaf::VpEnter], "0 0 1 1 0 0 0 0 0 1 0"),
            (&[Leaf::MngAddcx, Leaf::MngInit], "1 0 0 0 0 0 0 0 0 0 0"),
            (&[Leaf::MemPageAdd, Leaf::MrExtend, Leaf::MrFinalize, Leaf::VpInit], "0 1 0 0 0 0 0 0 0 0 0"),
            (&[Leaf::VpCreate, Leaf::VpAddcx], "0 1 0 0 0 0 0 1 0 0 0"),
            (&[Leaf::MemSeptAdd], "0 1 1 1 0 0 1 1 1 1 0"),
            (&[Leaf::MemPageAug], "0 1 1 1 0 0 0 0 0 1 0"),
            (
                &[
                    Leaf::MemPageRelocate,
                    Leaf::MemRangeBlock,
                    Leaf::MemRangeUnblock,
                    Leaf::MemPageDemote,
                    Leaf::MemPagePromote,
                ],
                "0 1 1 1 1 1 0 0 1 1 0",
            ),
            (&[Leaf::MemPageRemove], "0 1 1 1 1 1 0 0 1 1 1"),
            (&[Leaf::MemSeptRemove, Leaf::MemSeptRd, Leaf::MemRd, Leaf::MngRd, Leaf::VpRd], "0 1 1 1 1 1 1 1 1 1 1"),
            (&[Leaf::MemTrack], "0 1 1 1 1 1 1 1 1 1 0"),
            (&[Leaf::MemWr, Leaf::VpWr], "0 1 1 1 0 0 1 1 1 1 1"),
        ];
        for (leaves, row) in rows {
            for (number, wanted) in row.split(' ').enumerate() {
                let state = OpState::from_number(number as u32).unwrap();
                for leaf in *leaves {
                    assert_eq!(op_state_allows(*leaf, state), wanted == "1", "{} in {}", leaf.name(), state.name());
                }
            }
        }
    }
}
