//! Try-locks: a conflict never waits, it is a BUSY status (TDX module spec 11).
//!
//! A lock word counts its holders; who they are stands in the lock sets of the logical processors: the leaf in flight there, the guest
//! running there, and the locks taken by hand for a test ([`super::Module::lock_by_hand`]).

use super::module::Module;
use super::sept::SeptEntry;

/// Shared or exclusive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Any number of holders.
    Shared,
    /// One holder.
    Exclusive,
}

/// Who asks: the host's leaves may raise host priority, the guest's yield to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// A SEAMCALL leaf.
    Host,
    /// A TDCALL leaf.
    Guest,
}

/// Why a lock was not had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Conflict {
    /// Someone holds it in a mode that excludes the one asked for.
    Busy,
    /// A host asked for it before and has priority over the guest.
    HostPriority,
}

/// A lock of the module.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum LockId {
    /// The global lock of the SYS leaves.
    Sys,
    /// Key ownership table.
    Kot,
    /// Key encryption table.
    Ket,
    /// CACHE.WB mutex of a package.
    Wbcache(u8),
    /// TDMR.INIT mutex of a TDMR, by index.
    Tdmr(u8),
    /// The op-state lock of the TD whose TDR lies at this address.
    OpState(u64),
    /// The Secure EPT tree lock of the TD whose TDR lies at this address.
    SeptTree(u64),
    /// The TLB epoch lock of the TD whose TDR lies at this address.
    Epoch(u64),
    /// The lock bit of the Secure EPT entry stored at this physical address.
    SeptEntry(u64),
    /// The PAMT entry of a level (0, 1 or 2) that covers this address. A TDR's or TDVPR's lock is the level-0 entry of its page.
    Pamt(u8, u64),
}

/// A lock someone holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeldLock {
    /// Which.
    pub id: LockId,
    /// How.
    pub mode: Mode,
    /// Found again by the leaf that runs on after it was held half-way.
    pub(crate) claimed: bool,
}

impl HeldLock {
    pub(crate) fn new(id: LockId, mode: Mode) -> HeldLock {
        HeldLock { id, mode, claimed: true }
    }
}

/// A shared/exclusive lock with host priority in 16 bits, as the module stores it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Hash)]
pub struct LockWord(u16);

impl LockWord {
    const EXCLUSIVE: u16 = 1;
    const PRIORITY: u16 = 2;
    const READER: u16 = 4;

    pub(crate) fn from_raw(raw: u16) -> LockWord {
        LockWord(raw)
    }

    pub(crate) fn raw(self) -> u16 {
        self.0
    }

    /// Number of shared holders.
    pub fn readers(self) -> u16 {
        self.0 / Self::READER
    }

    /// Whether it is held exclusively.
    pub fn is_exclusive(self) -> bool {
        self.0 & Self::EXCLUSIVE != 0
    }

    /// Whether nobody holds it; a pending host priority does not count.
    pub fn is_free(self) -> bool {
        self.0 & !Self::PRIORITY == 0
    }

    /// Whether a host failed to get it and has not succeeded since.
    pub fn host_priority(self) -> bool {
        self.0 & Self::PRIORITY != 0
    }

    fn refuse(&mut self, side: Side) -> Result<(), Conflict> {
        if side == Side::Host {
            self.0 |= Self::PRIORITY;
        }
        Err(Conflict::Busy)
    }

    #[inline]
    pub(crate) fn acquire(&mut self, mode: Mode, side: Side) -> Result<(), Conflict> {
        if side == Side::Guest && self.host_priority() {
            return Err(Conflict::HostPriority);
        }
        match mode {
            Mode::Shared if !self.is_exclusive() => self.0 = (self.0 & !Self::PRIORITY) + Self::READER,
            Mode::Exclusive if self.is_free() => self.0 = Self::EXCLUSIVE,
            _ => return self.refuse(side),
        }
        Ok(())
    }

    /// From shared to exclusive, for the single reader only.
    #[inline]
    pub(crate) fn promote(&mut self) -> Result<(), Conflict> {
        if self.0 & !Self::PRIORITY == Self::READER {
            self.0 = Self::EXCLUSIVE;
            Ok(())
        } else {
            self.refuse(Side::Host)
        }
    }

    #[inline]
    pub(crate) fn release(&mut self, mode: Mode) {
        match mode {
            Mode::Shared => self.0 -= Self::READER,
            Mode::Exclusive => self.0 &= !Self::EXCLUSIVE,
        }
    }
}

impl Module {
    fn lock_word(&mut self, id: LockId) -> Option<&mut LockWord> {
        match id {
            LockId::Sys => Some(&mut self.sys.lock),
            LockId::Kot => Some(&mut self.kot.lock),
            LockId::Ket => Some(&mut self.kot.ket_lock),
            LockId::Wbcache(package) => self.wbcache.get_mut(package as usize).map(|wb| &mut wb.lock),
            LockId::Tdmr(index) => self.pamt.tdmrs.get_mut(index as usize).map(|tdmr| &mut tdmr.lock),
            LockId::OpState(tdr) => self.td_by_tdr_mut(tdr).map(|td| &mut td.op_state_lock),
            LockId::SeptTree(tdr) => self.td_by_tdr_mut(tdr).map(|td| &mut td.tree_lock),
            LockId::Epoch(tdr) => self.td_by_tdr_mut(tdr).map(|td| &mut td.epoch_lock),
            LockId::SeptEntry(_) | LockId::Pamt(..) => None,
        }
    }

    /// Takes a lock without recording who did.
    #[inline]
    pub(crate) fn raw_lock(&mut self, id: LockId, mode: Mode, side: Side) -> Result<(), Conflict> {
        match id {
            LockId::SeptEntry(pa) => {
                let entry = self.memory.read_u64(pa);
                let (new, answer) = if side == Side::Guest && entry & SeptEntry::TDHP != 0 {
                    (entry, Err(Conflict::HostPriority))
                } else if entry & SeptEntry::TDEL == 0 {
                    (entry & !SeptEntry::TDHP | SeptEntry::TDEL, Ok(()))
                } else if side == Side::Host {
                    (entry | SeptEntry::TDHP, Err(Conflict::Busy))
                } else {
                    (entry, Err(Conflict::Busy))
                };
                if new != entry {
                    self.memory.write_u64(pa, new);
                }
                answer
            }
            LockId::Pamt(level, pa) => match self.pamt.entry_mut(level, pa) {
                Some(entry) => {
                    let mut word = entry.lock();
                    let answer = word.acquire(mode, side);
                    entry.set_lock(word);
                    answer
                }
                None => Err(Conflict::Busy),
            },
            _ => self.lock_word(id).map_or(Err(Conflict::Busy), |word| word.acquire(mode, side)),
        }
    }

    /// Gives a lock back.
    #[inline]
    pub(crate) fn raw_unlock(&mut self, lock: HeldLock) {
        match lock.id {
            LockId::SeptEntry(pa) => {
                let entry = self.memory.read_u64(pa);
                self.memory.write_u64(pa, entry & !SeptEntry::TDEL);
            }
            LockId::Pamt(level, pa) => {
                if let Some(entry) = self.pamt.entry_mut(level, pa) {
                    let mut word = entry.lock();
                    word.release(lock.mode);
                    entry.set_lock(word);
                }
            }
            id => {
                if let Some(word) = self.lock_word(id) {
                    word.release(lock.mode);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_priority_stays_until_a_host_succeeds_and_guests_yield_to_it() {
        let mut word = LockWord::default();
        assert_eq!(word.acquire(Mode::Exclusive, Side::Guest), Ok(()));
        assert_eq!(word.acquire(Mode::Exclusive, Side::Host), Err(Conflict::Busy));
        word.release(Mode::Exclusive);
        assert!(word.is_free() && word.host_priority());
        assert_eq!(word.acquire(Mode::Shared, Side::Guest), Err(Conflict::HostPriority));
        assert_eq!(word.acquire(Mode::Shared, Side::Host), Ok(()));
        assert!(!word.host_priority());
        assert_eq!(word.acquire(Mode::Shared, Side::Guest), Ok(()));
        assert_eq!(word.promote(), Err(Conflict::Busy));
        word.release(Mode::Shared);
        assert_eq!(word.promote(), Ok(()));
        assert!(word.is_exclusive() && word.readers() == 0);
    }
}
