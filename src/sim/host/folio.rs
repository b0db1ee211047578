//! Folios: reference counts, flags, and the holders that explain every reference.

use super::frame_table::FrameTable;
use super::{Order, Pfn};
use std::collections::HashMap;

/// Who holds references to a folio. A reference without a holder does not exist in the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Holder {
    /// The page cache of a guest_memfd or of shmem: one reference a base page.
    PageCache,
    /// Page-table entries of the host process.
    HostPte,
    /// A per-CPU LRU batch.
    LruBatch,
    /// A plain GUP reference (FOLL_GET): the hold it belongs to.
    Gup(u64),
    /// A long-term pin (FOLL_PIN): the hold it belongs to; 1024 references on a base page.
    Pin(u64),
    /// A speculative reference that goes away by itself after some looks.
    Speculative(u64),
    /// An IOMMU mapping: a long-term pin by VFIO or iommufd.
    Iommu(u64),
    /// memory_failure(), which never lets go.
    MemoryFailure,
    /// The policy `pin-mapped`: one a page while the page is in the S-EPT.
    SeptPin,
    /// A policy that keeps a page which the TDX module still owns.
    StuckInModule,
    /// KVM, for control and S-EPT pages that it gave to the TDX module.
    Control,
    /// A lookup in progress, gone before the operation returns.
    Lookup,
    /// A defect that was switched on.
    Leak,
}

impl Holder {
    /// The name in results.
    pub fn name(self) -> &'static str {
        match self {
            Holder::PageCache => "page-cache",
            Holder::HostPte => "pte",
            Holder::LruBatch => "lru-batch",
            Holder::Gup(_) => "get",
            Holder::Pin(_) => "pin",
            Holder::Speculative(_) => "speculative",
            Holder::Iommu(_) => "iommu",
            Holder::MemoryFailure => "memory-failure",
            Holder::SeptPin => "sept-pin",
            Holder::StuckInModule => "stuck-in-module",
            Holder::Control => "control",
            Holder::Lookup => "lookup",
            Holder::Leak => "leak",
        }
    }
}

/// References that one FOLL_PIN adds to a folio of a single page (GUP_PIN_COUNTING_BIAS).
pub const PIN_BIAS: u32 = 1024;

/// Page flags, at the bit numbers of /proc/kpageflags.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flags(pub u64);

impl Flags {
    /// KPF_LOCKED.
    pub const LOCKED: Flags = Flags(1 << 0);
    /// KPF_UPTODATE.
    pub const UPTODATE: Flags = Flags(1 << 3);
    /// KPF_DIRTY.
    pub const DIRTY: Flags = Flags(1 << 4);
    /// KPF_LRU.
    pub const LRU: Flags = Flags(1 << 5);
    /// KPF_UNEVICTABLE.
    pub const UNEVICTABLE: Flags = Flags(1 << 18);
    /// KPF_HWPOISON.
    pub const HWPOISON: Flags = Flags(1 << 19);

    /// Whether every flag of `other` is set.
    pub fn contains(self, other: Flags) -> bool {
        self.0 & other.0 == other.0
    }
}

impl std::ops::BitOr for Flags {
    type Output = Flags;

    fn bitor(self, other: Flags) -> Flags {
        Flags(self.0 | other.0)
    }
}

/// A folio.
#[derive(Clone, Debug)]
pub struct Folio {
    /// Its size.
    pub order: Order,
    /// `_refcount`.
    pub refs: u32,
    /// How many host page-table entries map it.
    pub mapcount: u32,
    /// Page flags.
    pub flags: Flags,
    /// Inode number and page index, while the page cache has it.
    pub mapping: Option<(u64, u64)>,
    pub(super) holders: Vec<(Holder, u32)>,
}

impl Folio {
    /// A folio that `holder` holds `refs` times.
    pub(super) fn held(order: Order, holder: Holder, refs: u32) -> Folio {
        Folio { order, refs, mapcount: 0, flags: Flags::default(), mapping: None, holders: vec![(holder, refs)] }
    }

    /// Who holds it, and with how many references each.
    pub fn holders(&self) -> &[(Holder, u32)] {
        &self.holders
    }

    fn get(&mut self, holder: Holder, n: u32) {
        self.refs += n;
        match self.holders.iter_mut().find(|(who, _)| *who == holder) {
            Some((_, count)) => *count += n,
            None => self.holders.push((holder, n)),
        }
    }

    fn put(&mut self, head: Pfn, holder: Holder, n: u32) {
        let left = self.refs.checked_sub(n);
        self.refs = left.unwrap_or_else(|| panic!("model: {head:#x} loses {n} references it has not"));
        if let Some(at) = self.holders.iter().position(|(who, _)| *who == holder) {
            self.holders[at].1 = self.holders[at].1.saturating_sub(n);
            if self.holders[at].1 == 0 {
                self.holders.swap_remove(at);
            }
        }
    }
}

/// A look at a folio.
#[derive(Clone, Copy, Debug)]
pub struct FolioRef<'a> {
    /// Its size.
    pub order: Order,
    /// `_refcount`.
    pub refs: u32,
    /// How many host page-table entries map it.
    pub mapcount: u32,
    /// Page flags.
    pub flags: Flags,
    /// Inode number and page index, while the page cache has it.
    pub mapping: Option<(u64, u64)>,
    /// Who holds it, and with how many references each.
    pub holders: &'a [(Holder, u32)],
}

impl<'a> From<&'a Folio> for FolioRef<'a> {
    fn from(folio: &'a Folio) -> FolioRef<'a> {
        let Folio { order, refs, mapcount, flags, mapping, ref holders } = *folio;
        FolioRef { order, refs, mapcount, flags, mapping, holders }
    }
}

/// Every folio that somebody holds.
#[derive(Debug, Default)]
pub struct Frames {
    table: FrameTable,
    touched: Vec<Pfn>,
    speculative: HashMap<u64, (Pfn, u32)>,
}

impl Frames {
    fn touch(&mut self, head: Pfn) {
        if self.touched.last() != Some(&head) {
            self.touched.push(head);
        }
    }

    /// A new folio with one reference a base page for the page cache, one in all for anybody else.
    pub fn insert(&mut self, pfn: Pfn, order: Order, holder: Holder) {
        let refs = if holder == Holder::PageCache { order.pages() as u32 } else { 1 };
        self.table.insert(pfn, Folio::held(order, holder, refs));
        self.touch(pfn);
    }

    /// First frame of the folio that a frame belongs to. Frames of no folio are their own head.
    pub fn head_of(&self, pfn: Pfn) -> Pfn {
        self.table.order_at(pfn).align_down(pfn)
    }

    /// The folio that a frame belongs to.
    pub fn folio(&self, pfn: Pfn) -> Option<FolioRef<'_>> {
        self.table.folio(pfn)
    }

    fn edit<R>(&mut self, pfn: Pfn, change: impl FnOnce(&mut Folio) -> R) -> R {
        self.touch(self.head_of(pfn));
        self.table.edit(pfn, change).unwrap_or_else(|| panic!("model: frame {pfn:#x} is used but nobody holds it"))
    }

    /// First frame and number of pages of the folio that a frame belongs to.
    pub fn extent(&self, pfn: Pfn) -> (Pfn, u64) {
        let order = self.table.order_at(pfn);
        (order.align_down(pfn), order.pages())
    }

    /// How many frames from `pfn` on, up to `limit`, are base pages that the page cache and nobody else holds, and
    /// that are not poisoned; they are of one 2M block at most.
    pub fn quiet_run(&self, pfn: Pfn, limit: u64) -> u64 {
        self.table.quiet_run(pfn, limit)
    }

    /// Takes out base pages of which [`Frames::quiet_run`] has said that only the page cache holds them.
    pub fn drop_quiet_run(&mut self, pfn: Pfn, pages: u64) {
        self.table.drop_quiet_run(pfn, pages);
    }

    /// `_refcount`; 0 for a free frame.
    pub fn refs(&self, pfn: Pfn) -> u32 {
        self.folio(pfn).map_or(0, |folio| folio.refs)
    }

    /// Page flags; none for a free frame.
    pub fn flags(&self, pfn: Pfn) -> Flags {
        self.folio(pfn).map_or(Flags::default(), |folio| folio.flags)
    }

    /// How many host page-table entries map the folio.
    pub fn mapcount(&self, pfn: Pfn) -> u32 {
        self.folio(pfn).map_or(0, |folio| folio.mapcount)
    }

    /// Who holds the folio, and with how many references each.
    pub fn holders(&self, pfn: Pfn) -> &[(Holder, u32)] {
        self.folio(pfn).map_or(&[], |folio| folio.holders)
    }

    /// References of one holder.
    pub fn held_by(&self, pfn: Pfn, holder: Holder) -> u32 {
        self.holders(pfn).iter().find(|(who, _)| *who == holder).map_or(0, |(_, n)| *n)
    }

    /// Takes `n` references.
    pub fn get(&mut self, pfn: Pfn, holder: Holder, n: u32) {
        self.edit(pfn, |folio| folio.get(holder, n));
    }

    /// Drops `n` references; with the last one the folio is taken out and returned with its first frame.
    pub fn put(&mut self, pfn: Pfn, holder: Holder, n: u32) -> Option<(Pfn, Folio)> {
        let head = self.head_of(pfn);
        let left = self.edit(pfn, |folio| {
            folio.put(head, holder, n);
            folio.refs
        });
        if left > 0 {
            return None;
        }
        self.table.remove(head).map(|folio| (head, folio))
    }

    /// Changes the count without a holder: what a defect does.
    pub fn corrupt(&mut self, pfn: Pfn, delta: i32) {
        self.edit(pfn, |folio| folio.refs = folio.refs.saturating_add_signed(delta));
    }

    /// Sets flags.
    pub fn set_flags(&mut self, pfn: Pfn, flags: Flags) {
        if !self.flags(pfn).contains(flags) {
            self.edit(pfn, |folio| folio.flags.0 |= flags.0);
        }
    }

    /// Clears flags.
    pub fn clear_flags(&mut self, pfn: Pfn, flags: Flags) {
        self.edit(pfn, |folio| folio.flags.0 &= !flags.0);
    }

    /// Adds to the number of host page-table entries.
    pub fn add_mapcount(&mut self, pfn: Pfn, delta: i32) {
        self.edit(pfn, |folio| folio.mapcount = folio.mapcount.saturating_add_signed(delta));
    }

    /// Says which file and index the folio is cached at.
    pub fn set_mapping(&mut self, pfn: Pfn, mapping: Option<(u64, u64)>) {
        self.edit(pfn, |folio| folio.mapping = mapping);
    }

    /// Takes a reference that [`Frames::look`] drops by itself after `looks` looks.
    pub fn get_speculative(&mut self, pfn: Pfn, id: u64, looks: u32) {
        self.get(pfn, Holder::Speculative(id), 1);
        self.speculative.insert(id, (self.head_of(pfn), looks));
    }

    /// Looks at the reference count the way a conversion does: speculative references come closer to their end. The
    /// answer is the count, and the speculative references whose end has come, for the caller to drop.
    pub fn look(&mut self, pfn: Pfn) -> (u32, Vec<Holder>) {
        let head = self.head_of(pfn);
        let mut over = Vec::new();
        if !self.speculative.is_empty() {
            self.speculative.retain(|id, (at, looks)| {
                if *at == head {
                    *looks = looks.saturating_sub(1);
                    if *looks == 0 {
                        over.push(Holder::Speculative(*id));
                    }
                }
                *looks > 0
            });
            over.sort_unstable();
        }
        (self.refs(head), over)
    }

    /// Replaces one folio by folios of base pages: references of the page cache are one a page already; every other
    /// holder's go to the first page, which is what makes a reference on a huge folio impossible to attribute.
    pub fn split(&mut self, head: Pfn) {
        self.table.split(head);
        self.touch(head);
    }

    /// Replaces base pages by one folio; only the page cache may hold them. Every flag that all of them have stays, and
    /// dirty if one of them is.
    pub fn merge(&mut self, head: Pfn, order: Order) {
        self.table.merge(head, order);
        self.touch(head);
    }

    /// Pages that somebody holds.
    pub fn pages(&self) -> u64 {
        self.table.pages()
    }

    /// Bytes of this process that the books on the frames take, without the allocator's own.
    pub fn resident_bytes(&self) -> u64 {
        self.table.resident_bytes()
    }

    /// Checks the folios touched since the last check: the count is the sum of the holders'.
    ///
    /// # Errors
    /// The first folio whose count nobody can explain, in words.
    pub fn check_touched(&mut self) -> Result<(), String> {
        for pfn in std::mem::take(&mut self.touched) {
            if let Some(folio) = self.folio(pfn) {
                let sum: u32 = folio.holders.iter().map(|(_, n)| n).sum();
                if sum != folio.refs || folio.refs == 0 {
                    return Err(format!("frame {pfn:#x}: {} references, holders {:?}", folio.refs, folio.holders));
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_count_is_the_sum_of_the_holders() {
        let mut frames = Frames::default();
        frames.insert(7, Order::Base, Holder::PageCache);
        frames.get(7, Holder::Pin(1), PIN_BIAS);
        frames.get(7, Holder::HostPte, 2);
        assert_eq!(frames.refs(7), 1 + 1024 + 2);
        assert_eq!(frames.check_touched(), Ok(()));
        frames.corrupt(7, 1);
        assert!(frames.check_touched().unwrap_err().contains("1028 references"));
    }

    #[test]
    fn a_speculative_reference_goes_away_after_its_looks() {
        let mut frames = Frames::default();
        frames.insert(7, Order::Base, Holder::PageCache);
        frames.get_speculative(7, 1, 2);
        assert_eq!(frames.look(7), (2, vec![]));
        assert_eq!(frames.look(7), (2, vec![Holder::Speculative(1)]));
    }

    #[test]
    fn frames_of_a_huge_folio_find_their_head_and_split_and_merge_keep_flags() {
        let mut frames = Frames::default();
        frames.insert(512, Order::Pmd, Holder::PageCache);
        assert_eq!((frames.head_of(700), frames.refs(700)), (512, 512));
        frames.set_flags(600, Flags::DIRTY);
        frames.get(600, Holder::Gup(1), 1);
        frames.split(512);
        assert_eq!(
            (frames.refs(512), frames.refs(600)),
            (2, 1),
            "nobody can tell which page the GUP reference was for"
        );
        assert!(frames.flags(1000).contains(Flags::DIRTY));
        frames.put(512, Holder::Gup(1), 1);
        frames.merge(512, Order::Pmd);
        assert_eq!((frames.refs(700), frames.flags(700)), (512, Flags::DIRTY));
        assert_eq!(frames.pages(), 512);
    }
}
