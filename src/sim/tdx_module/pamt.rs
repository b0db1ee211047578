//! The PAMT: for every page at every size, what it is and whose (TDX module spec 7).
//!
//! The module keeps it in memory handed over at configuration; here it lies in this process, the 4K entries of a 2M range only once one
//! of them is in use. An entry is 16 bytes: lock, type and owner in one word, BEPOCH in the other.

use std::collections::BTreeSet;

use super::lock::LockWord;

/// Type of a physical page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum PageType {
    /// Not directly assigned: free, or in use at another size.
    Nda = 0,
    /// Reserved area of a TDMR.
    Rsvd = 1,
    /// A TD's memory.
    Reg = 3,
    /// TD root.
    Tdr = 4,
    /// TD or vCPU control page.
    Tdcx = 5,
    /// vCPU root.
    Tdvpr = 6,
    /// Page of a Secure EPT.
    Ept = 8,
    /// 2M entry with a page pair holding its 4K entries (dynamic PAMT).
    Pamt = 15,
}

impl PageType {
    /// The type with this number.
    pub fn from_number(number: u8) -> Option<PageType> {
        use PageType::*;
        [Nda, Rsvd, Reg, Tdr, Tdcx, Tdvpr, Ept, Pamt].into_iter().find(|ty| *ty as u8 == number)
    }

    /// `PT_NDA`, `PT_REG`, ...
    pub fn name(self) -> &'static str {
        match self {
            PageType::Nda => "PT_NDA",
            PageType::Rsvd => "PT_RSVD",
            PageType::Reg => "PT_REG",
            PageType::Tdr => "PT_TDR",
            PageType::Tdcx => "PT_TDCX",
            PageType::Tdvpr => "PT_TDVPR",
            PageType::Ept => "PT_EPT",
            PageType::Pamt => "PT_PAMT",
        }
    }
}

/// One entry.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub struct PamtEntry {
    word: u64,
    /// TD_EPOCH at the last BLOCK; meaningful for PT_REG and PT_EPT.
    pub bepoch: u64,
}

impl PamtEntry {
    /// An entry of `ty` owned by the TD whose TDR lies at `owner` (0: nobody).
    pub fn new(ty: PageType, owner: u64) -> PamtEntry {
        PamtEntry { word: (ty as u64) << 16 | (owner >> 12) << 24, bepoch: 0 }
    }

    /// Page type.
    #[inline]
    pub fn ty(&self) -> PageType {
        match (self.word >> 16) as u8 {
            0 => PageType::Nda,
            number => PageType::from_number(number).unwrap_or(PageType::Nda),
        }
    }

    /// Physical address of the owner's TDR; 0 for a TDR itself. Stale in a free entry.
    #[inline]
    pub fn owner(&self) -> u64 {
        (self.word >> 24) << 12
    }

    /// Lock word.
    #[inline]
    pub fn lock(&self) -> LockWord {
        LockWord::from_raw(self.word as u16)
    }

    #[inline]
    pub(crate) fn set_lock(&mut self, lock: LockWord) {
        self.word = self.word & !0xFFFF | lock.raw() as u64;
    }

    #[inline]
    fn set(&mut self, ty: PageType, owner: u64, bepoch: u64) {
        self.word = self.word & 0xFFFF | (ty as u64) << 16 | (owner >> 12) << 24;
        self.bepoch = bepoch;
    }

    #[inline]
    fn free(&mut self) {
        self.word &= !(0xFF << 16);
    }
}

/// What a lookup of a page found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageInfo {
    /// Type.
    pub ty: PageType,
    /// Physical address of the owner's TDR.
    pub owner: u64,
    /// Size: 0 4K, 1 2M, 2 1G.
    pub size: u8,
    /// TD_EPOCH at the last BLOCK.
    pub bepoch: u64,
}

/// The PAMT of one 2M range.
pub(crate) struct Pamt2m {
    pub entry: PamtEntry,
    children: Option<Box<[PamtEntry; 512]>>,
    /// 4K entries in use (neither NDA nor RSVD).
    pub used: u16,
    rsvd: u16,
    /// Page pair of the dynamic PAMT, valid while the entry is PT_PAMT.
    pub pair: (u64, u64),
}

/// A trust domain memory region.
pub struct Tdmr {
    /// First address.
    pub base: u64,
    /// Bytes.
    pub size: u64,
    /// Reserved areas, offset and bytes.
    pub reserved: Vec<(u64, u64)>,
    /// The 1G, 2M and 4K PAMT areas the host gave, address and bytes.
    pub areas: [(u64, u64); 3],
    /// Everything below this address is initialised.
    pub initialized_to: u64,
    pub(crate) lock: LockWord,
    e1g: Vec<PamtEntry>,
    e2m: Vec<Pamt2m>,
}

impl Tdmr {
    pub(crate) fn new(base: u64, size: u64, reserved: Vec<(u64, u64)>, areas: [(u64, u64); 3]) -> Tdmr {
        let e1g = vec![PamtEntry::default(); (size >> 30) as usize];
        let empty = || Pamt2m { entry: PamtEntry::default(), children: None, used: 0, rsvd: 0, pair: (0, 0) };
        let e2m = std::iter::repeat_with(empty).take((size >> 21) as usize).collect();
        Tdmr { base, size, reserved, areas, initialized_to: base, lock: LockWord::default(), e1g, e2m }
    }

    /// The first address past the region.
    pub fn end(&self) -> u64 {
        self.base + self.size
    }

    /// Marks the reserved 4K pages of the range that TDMR.INIT has reached.
    pub(crate) fn initialize(&mut self, from: u64, to: u64) {
        self.initialized_to = to;
        for (offset, size) in self.reserved.clone() {
            let start = (self.base + offset).max(from);
            let end = (self.base + offset + size).min(to);
            for pa in (start..end).step_by(4096) {
                let region = &mut self.e2m[((pa - self.base) >> 21) as usize];
                region.rsvd += 1;
                let children = region.children.get_or_insert_with(|| Box::new([PamtEntry::default(); 512]));
                children[(pa >> 12) as usize & 511] = PamtEntry::new(PageType::Rsvd, 0);
            }
        }
    }
}

/// All TDMRs with their PAMT.
#[derive(Default)]
pub struct Pamt {
    /// Sorted by base.
    pub(crate) tdmrs: Vec<Tdmr>,
    /// Dynamic PAMT is in use.
    pub(crate) dynamic: bool,
    /// Bitmap of the dynamic PAMT: pages that hold PAMT entries.
    pub(crate) bitmap: BTreeSet<u64>,
}

impl Pamt {
    /// The configured TDMRs.
    pub fn tdmrs(&self) -> &[Tdmr] {
        &self.tdmrs
    }

    #[inline]
    fn tdmr(&self, pa: u64) -> Option<&Tdmr> {
        self.tdmrs.iter().find(|tdmr| pa.wrapping_sub(tdmr.base) < tdmr.size)
    }

    #[inline]
    fn tdmr_mut(&mut self, pa: u64) -> Option<&mut Tdmr> {
        self.tdmrs.iter_mut().find(|tdmr| pa.wrapping_sub(tdmr.base) < tdmr.size)
    }

    /// Whether `pa` lies in a 1 GiB block of a TDMR that is fully initialised.
    #[inline]
    pub fn covers(&self, pa: u64) -> bool {
        self.tdmr(pa).is_some_and(|tdmr| pa < tdmr.initialized_to & !((1 << 30) - 1))
    }

    pub(crate) fn region(&self, pa: u64) -> Option<&Pamt2m> {
        let tdmr = self.tdmr(pa)?;
        tdmr.e2m.get(((pa - tdmr.base) >> 21) as usize)
    }

    pub(crate) fn region_mut(&mut self, pa: u64) -> Option<&mut Pamt2m> {
        let tdmr = self.tdmr_mut(pa)?;
        tdmr.e2m.get_mut(((pa - tdmr.base) >> 21) as usize)
    }

    /// The entry of `level` that covers `pa`, whether or not the page is a leaf there.
    #[inline]
    pub fn entry(&self, level: u8, pa: u64) -> Option<PamtEntry> {
        let tdmr = self.tdmr(pa)?;
        let offset = pa - tdmr.base;
        match level {
            2 => Some(tdmr.e1g[(offset >> 30) as usize]),
            1 => Some(tdmr.e2m[(offset >> 21) as usize].entry),
            _ => {
                let region = &tdmr.e2m[(offset >> 21) as usize];
                Some(
                    region
                        .children
                        .as_ref()
                        .map_or(PamtEntry::default(), |children| children[(pa >> 12) as usize & 511]),
                )
            }
        }
    }

    #[inline]
    pub(crate) fn entry_mut(&mut self, level: u8, pa: u64) -> Option<&mut PamtEntry> {
        let tdmr = self.tdmr_mut(pa)?;
        let offset = pa - tdmr.base;
        match level {
            2 => Some(&mut tdmr.e1g[(offset >> 30) as usize]),
            1 => Some(&mut tdmr.e2m[(offset >> 21) as usize].entry),
            _ => {
                let region = &mut tdmr.e2m[(offset >> 21) as usize];
                let children = region.children.get_or_insert_with(|| Box::new([PamtEntry::default(); 512]));
                Some(&mut children[(pa >> 12) as usize & 511])
            }
        }
    }

    /// Gives a free page of `level` a type, an owner and a BEPOCH.
    #[inline]
    pub(crate) fn assign(&mut self, level: u8, pa: u64, ty: PageType, owner: u64, bepoch: u64) {
        if let Some(entry) = self.entry_mut(level, pa) {
            entry.set(ty, owner, bepoch);
        }
        if level == 0
            && let Some(region) = self.region_mut(pa)
        {
            region.used += 1;
        }
    }

    /// Frees a page; owner and BEPOCH stay behind, meaningless.
    #[inline]
    pub(crate) fn free(&mut self, level: u8, pa: u64) {
        if let Some(entry) = self.entry_mut(level, pa) {
            entry.free();
        }
        if level == 0
            && let Some(region) = self.region_mut(pa)
        {
            region.used -= 1;
        }
    }

    /// Whether no 4K page of the 2M range is in use or reserved.
    pub(crate) fn all_4k_free(&self, pa: u64) -> bool {
        self.region(pa).is_some_and(|region| region.used == 0 && region.rsvd == 0)
    }

    /// Whether every page of `pa..pa+len` is free, at every size; addresses outside of every TDMR are.
    pub fn all_free(&self, pa: u64, len: u64) -> bool {
        let mut at = pa & !0xFFF;
        while at < pa + len {
            let small = |pa: u64| self.entry(0, pa).is_none_or(|entry| entry.ty() == PageType::Nda);
            let large =
                [2, 1].into_iter().any(|level| self.entry(level, at).is_some_and(|entry| entry.ty() == PageType::Reg));
            if large {
                return false;
            }
            let whole = at & 0x1F_FFFF == 0 && pa + len - at >= 0x20_0000;
            let step = match self.region(at) {
                Some(region) if region.used == 0 && region.rsvd == 0 => 0x20_0000 - (at & 0x1F_FFFF),
                Some(_) if whole => return false,
                _ if !small(at) => return false,
                _ => 0x1000,
            };
            at += step;
        }
        true
    }

    /// Whether no page of the 2M range at `pa` can hold a structure of the module: none of its 4K pages is in use.
    pub(crate) fn holds_no_small_page(&self, pa: u64) -> bool {
        self.region(pa).is_none_or(|region| region.used == 0)
    }

    /// Whether every 4K page of the 2M range at `pa` is free with its lock and those above it open to a reader, nobody waiting.
    pub(crate) fn is_open_and_free(&self, pa: u64) -> bool {
        let open = |lock: LockWord| !lock.is_exclusive() && !lock.host_priority();
        let upper =
            |level: u8| self.entry(level, pa).is_some_and(|entry| entry.ty() == PageType::Nda && open(entry.lock()));
        let small = self.region(pa).is_some_and(|region| {
            let children = region.children.iter().flat_map(|children| children.iter());
            region.used == 0 && region.rsvd == 0 && children.into_iter().all(|entry| open(entry.lock()))
        });
        upper(2) && upper(1) && small
    }

    /// Turns a page of `level` into 512 pages of the level below, same type and owner, BEPOCH 0.
    pub(crate) fn demote(&mut self, level: u8, pa: u64) {
        let Some(large) = self.entry(level, pa) else { return };
        for i in 0..512 {
            self.assign(level - 1, pa + i * super::sept::span(level - 1), large.ty(), large.owner(), 0);
        }
        self.free(level, pa);
    }

    /// Turns 512 pages into one of `level`, with the owner of the first. The large entry's BEPOCH is left as it was.
    pub(crate) fn promote(&mut self, level: u8, pa: u64) {
        let (Some(first), Some(large)) = (self.entry(level - 1, pa), self.entry(level, pa)) else { return };
        for i in 0..512 {
            self.free(level - 1, pa + i * super::sept::span(level - 1));
        }
        self.assign(level, pa, first.ty(), first.owner(), large.bepoch);
    }

    /// The leaf that covers `pa`: the largest PT_REG entry, or the 4K entry.
    pub fn lookup(&self, pa: u64) -> Option<PageInfo> {
        for level in [2, 1] {
            let entry = self.entry(level, pa)?;
            if entry.ty() == PageType::Reg {
                return Some(PageInfo { ty: PageType::Reg, owner: entry.owner(), size: level, bepoch: entry.bepoch });
            }
        }
        let entry = self.entry(0, pa)?;
        Some(PageInfo { ty: entry.ty(), owner: entry.owner(), size: 0, bepoch: entry.bepoch })
    }

    /// Calls `visit` with level, address and entry of every entry that has been touched, large ones first within a region.
    pub fn visit(&self, mut visit: impl FnMut(u8, u64, &PamtEntry)) {
        for tdmr in &self.tdmrs {
            for (i, entry) in tdmr.e1g.iter().enumerate() {
                visit(2, tdmr.base + ((i as u64) << 30), entry);
            }
            for (i, region) in tdmr.e2m.iter().enumerate() {
                let base = tdmr.base + ((i as u64) << 21);
                visit(1, base, &region.entry);
                for (j, entry) in region.children.iter().flat_map(|children| children.iter()).enumerate() {
                    visit(0, base + ((j as u64) << 12), entry);
                }
            }
        }
    }

    /// Bytes of this process the PAMT holds at present.
    pub fn resident_bytes(&self) -> u64 {
        let mut bytes = 0;
        for tdmr in &self.tdmrs {
            bytes += tdmr.e1g.len() * size_of::<PamtEntry>() + tdmr.e2m.len() * size_of::<Pamt2m>();
            bytes += tdmr.e2m.iter().filter(|region| region.children.is_some()).count() * size_of::<[PamtEntry; 512]>();
        }
        bytes as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_sixteen_bytes_and_promote_undoes_demote() {
        assert_eq!(size_of::<PamtEntry>(), 16);
        let mut pamt = Pamt::default();
        let mut tdmr = Tdmr::new(1 << 30, 1 << 30, vec![(0x20_0000, 0x1000)], [(0, 0); 3]);
        tdmr.initialize(1 << 30, 2 << 30);
        pamt.tdmrs.push(tdmr);
        assert!(pamt.covers(1 << 30) && !pamt.covers(2 << 30));
        assert_eq!(pamt.lookup((1 << 30) + 0x20_0000).unwrap().ty, PageType::Rsvd);
        assert!(!pamt.all_4k_free((1 << 30) + 0x20_0000) && pamt.all_4k_free(1 << 30));
        pamt.assign(1, 1 << 30, PageType::Reg, 0x7000, 5);
        pamt.demote(1, 1 << 30);
        let info = pamt.lookup((1 << 30) + 0x5000).unwrap();
        assert_eq!(info, PageInfo { ty: PageType::Reg, owner: 0x7000, size: 0, bepoch: 0 });
        assert_eq!(pamt.region(1 << 30).unwrap().used, 512);
        pamt.promote(1, 1 << 30);
        assert_eq!(
            pamt.lookup((1 << 30) + 0x5000).unwrap(),
            PageInfo { ty: PageType::Reg, owner: 0x7000, size: 1, bepoch: 5 }
        );
        assert!(pamt.all_4k_free(1 << 30));
    }
}
