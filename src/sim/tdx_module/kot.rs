//! Key ownership: which key id belongs to whom, and which packages still have it in their caches (TDX module spec 1.6, 5.25, 5.26).

use super::lock::LockWord;
use super::state::HkidState;

/// One key id.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KotEntry {
    /// State.
    pub state: HkidState,
    /// One bit a package that has not written its caches back since VPFLUSHDONE.
    pub wbinvd_bitmap: u64,
}

/// The key ownership table, indexed by key id.
pub struct Kot {
    entries: Vec<KotEntry>,
    pub(crate) lock: LockWord,
    pub(crate) ket_lock: LockWord,
}

impl Kot {
    pub(crate) fn new(keys: usize) -> Kot {
        let free = KotEntry { state: HkidState::Free, wbinvd_bitmap: 0 };
        Kot { entries: vec![free; keys], lock: LockWord::default(), ket_lock: LockWord::default() }
    }

    /// The entry of a key id.
    pub fn entry(&self, hkid: u16) -> Option<&KotEntry> {
        self.entries.get(hkid as usize)
    }

    pub(crate) fn entry_mut(&mut self, hkid: u16) -> Option<&mut KotEntry> {
        self.entries.get_mut(hkid as usize)
    }

    /// Key ids in `state`.
    pub fn in_state(&self, state: HkidState) -> Vec<u16> {
        (0..self.entries.len() as u16).filter(|hkid| self.entries[*hkid as usize].state == state).collect()
    }

    /// Every entry, by key id.
    pub fn entries(&self) -> &[KotEntry] {
        &self.entries
    }
}

/// CACHE.WB of one package.
#[derive(Default)]
pub(crate) struct WbCache {
    pub lock: LockWord,
    /// Key ids of an interrupted session and the pieces done.
    pub session: Option<(Vec<u16>, u64)>,
}
