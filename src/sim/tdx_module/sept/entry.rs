//! One entry of the Secure EPT: bits, lock, and the public form the leaves return (TDX module spec 4.1, 4.2, 4.5).

use std::fmt;

use super::SeptState;

/// A raw 64-bit entry as it lies in memory.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct SeptEntry(pub u64);

impl SeptEntry {
    /// R, W, X.
    pub const RWX: u64 = 7;
    /// Ignore PAT; set in leaves.
    pub const IPAT: u64 = 1 << 6;
    /// Leaf, also at 4K.
    pub const PS: u64 = 1 << 7;
    /// Export-dirty.
    pub const D: u64 = 1 << 9;
    /// Entry lock.
    pub const TDEL: u64 = 1 << 11;
    /// Frame address; bits 20:12 count accepted pieces in a 2M PENDING entry.
    pub const HPA: u64 = 0x000F_FFFF_FFFF_F000;
    /// A host's request for the entry lock.
    pub const TDHP: u64 = 1 << 52;
    /// Exported.
    pub const TDEX: u64 = 1 << 53;
    /// Write-blocked.
    pub const TDBW: u64 = 1 << 54;
    /// Blocked.
    pub const TDB: u64 = 1 << 55;
    /// Pending.
    pub const TDP: u64 = 1 << 56;
    /// Suppress #VE.
    pub const SVE: u64 = 1 << 63;
    /// Write-back memory type.
    pub const MT_WB: u64 = 6 << 3;
    /// FREE, as all 512 entries of a new page.
    pub const FREE: SeptEntry = SeptEntry(Self::SVE | Self::TDB | Self::TDBW | Self::TDEX);

    const MT: u64 = 7 << 3;
    const COUNTER: u64 = 0x1F_F000;

    /// The state of the entry's bits, or `None` for bits no state has.
    #[inline]
    pub fn state(self) -> Option<SeptState> {
        SeptState::from_code(self.state_code())
    }

    /// The 7-bit state code.
    #[inline]
    pub fn state_code(self) -> u8 {
        let raw = self.0;
        ((raw >> 9) & 1 | ((raw >> 53) & 0xF) << 1 | ((raw >> 6) & 3) << 5) as u8
    }

    /// Whether the entry maps or is about to map a page rather than point to a table.
    #[inline]
    pub fn is_leaf(self) -> bool {
        self.0 & Self::PS != 0
    }

    /// Bits R, W, X.
    #[inline]
    pub fn rwx(self) -> u64 {
        self.0 & Self::RWX
    }

    /// Physical address of the page or table, without the accept counter of a 2M entry.
    #[inline]
    pub fn hpa(self, level: u8) -> u64 {
        let hpa = self.0 & Self::HPA;
        if level > 0 && self.is_leaf() { hpa & !(super::span(level) - 1) } else { hpa }
    }

    /// How many 4K pieces of a 2M PENDING page are accepted.
    pub fn accept_counter(self) -> u64 {
        (self.0 & Self::COUNTER) >> 12
    }

    /// The entry with another accept counter.
    pub(crate) fn with_accept_counter(self, count: u64) -> SeptEntry {
        SeptEntry(self.0 & !Self::COUNTER | count << 12)
    }

    /// Whether someone holds the entry lock.
    pub fn is_locked(self) -> bool {
        self.0 & Self::TDEL != 0
    }

    /// Whether a host's request for the lock is pending.
    pub fn host_priority(self) -> bool {
        self.0 & Self::TDHP != 0
    }

    /// The entry without its lock bits.
    #[inline]
    pub fn unlocked(self) -> SeptEntry {
        SeptEntry(self.0 & !(Self::TDEL | Self::TDHP))
    }

    /// The entry in another state, same page, permissions and type bits as that state has them.
    pub(crate) fn in_state(self, state: SeptState) -> SeptEntry {
        SeptEntry(state.raw() | self.0 & Self::HPA)
    }

    /// What RCX of an error return or of SEPT.RD holds: lock, state and alias bits never leave the module.
    pub fn architectural(self) -> u64 {
        if self.is_leaf() {
            self.0 & (Self::RWX | Self::MT | Self::HPA | Self::IPAT | Self::PS | Self::SVE)
        } else if self.state() == Some(SeptState::Free) {
            Self::SVE
        } else {
            self.0 & (Self::RWX | Self::PS)
        }
    }

    /// What RDX of an error return or of SEPT.RD holds: level and public state, VM 0.
    pub fn info(self, level: u8) -> u64 {
        level as u64 | (self.state().map_or(0, SeptState::public) as u64) << 8
    }
}

impl fmt::Debug for SeptEntry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.state() {
            Some(state) => write!(f, "{:#018x} ({})", self.0, state.name()),
            None => write!(f, "{:#018x}", self.0),
        }
    }
}
