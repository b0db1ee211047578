//! Where folios are kept: by blocks of 2M, each in the smallest form that tells its folios apart.
//!
//! Nearly every frame of a guest is held by the page cache alone. Such a base page costs 16 bytes in [`Pages`], and nothing
//! at all in a block that was one folio and was split ([`Chunk::Split`]), where all pages are alike. Only a folio that
//! somebody else holds, or that differs from the others of its block, is spelt out.

use super::folio::{Flags, Folio, FolioRef, Holder};
use super::{Order, Pfn};
use std::collections::BTreeMap;

/// Frames of a block.
const BLOCK: u64 = Order::Pmd.pages();
/// A split block with more pages spelt out than this is kept page by page.
const MAX_ODD: usize = 96;
/// How the holders of a quiet page read.
const PAGE_CACHE_ONLY: &[(Holder, u32)] = &[(Holder::PageCache, 1)];

/// A base page that the page cache alone holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Quiet {
    flags: Flags,
    mapping: Option<(u64, u64)>,
}

impl Quiet {
    /// What is left of a folio that only the page cache holds, if it is one.
    fn of(folio: &Folio) -> Option<Quiet> {
        let quiet = folio.order == Order::Base
            && folio.refs == 1
            && folio.mapcount == 0
            && folio.holders.as_slice() == PAGE_CACHE_ONLY;
        quiet.then_some(Quiet { flags: folio.flags, mapping: folio.mapping })
    }

    fn folio(self) -> Folio {
        let Quiet { flags, mapping } = self;
        Folio { flags, mapping, ..Folio::held(Order::Base, Holder::PageCache, 1) }
    }

    fn view(self) -> FolioRef<'static> {
        let Quiet { flags, mapping } = self;
        FolioRef { order: Order::Base, refs: 1, mapcount: 0, flags, mapping, holders: PAGE_CACHE_ONLY }
    }
}

/// A [`Quiet`] page, or none, in 16 bytes.
#[derive(Clone, Copy, Debug)]
struct Packed {
    index: u64,
    inode: u32,
    flags: u32,
}

impl Packed {
    const PRESENT: u32 = 1 << 31;
    const CACHED: u32 = 1 << 30;
    const NONE: Packed = Packed { index: 0, inode: 0, flags: 0 };

    /// `None` for a page whose inode number or flags do not fit.
    fn new(quiet: Quiet) -> Option<Packed> {
        let (inode, index) = quiet.mapping.unwrap_or_default();
        let flags =
            u32::try_from(quiet.flags.0).ok().filter(|flags| flags & (Packed::PRESENT | Packed::CACHED) == 0)?;
        let cached = if quiet.mapping.is_some() { Packed::CACHED } else { 0 };
        Some(Packed { index, inode: u32::try_from(inode).ok()?, flags: flags | Packed::PRESENT | cached })
    }

    fn get(self) -> Option<Quiet> {
        let mapping = (self.flags & Packed::CACHED != 0).then_some((u64::from(self.inode), self.index));
        let flags = Flags(u64::from(self.flags & !(Packed::PRESENT | Packed::CACHED)));
        (self.flags & Packed::PRESENT != 0).then_some(Quiet { flags, mapping })
    }
}

/// Base pages, one by one.
#[derive(Debug)]
struct Pages {
    quiet: [Packed; BLOCK as usize],
    odd: BTreeMap<u16, Folio>,
    live: u16,
}

/// A folio of 2M that was split.
#[derive(Debug)]
struct Split {
    /// The first page, if it is one of the others; the mappings of the others follow from it.
    first: Quiet,
    odd: BTreeMap<u16, Folio>,
}

impl Split {
    fn quiet(&self, page: u16) -> Quiet {
        let mapping = self.first.mapping.map(|(inode, index)| (inode, index + u64::from(page)));
        Quiet { mapping, ..self.first }
    }
}

#[derive(Debug, Default)]
enum Chunk {
    #[default]
    Empty,
    Huge(Box<Folio>),
    Split(Box<Split>),
    Pages(Box<Pages>),
}

#[derive(Debug)]
struct Gib {
    huge: Option<Folio>,
    chunks: Box<[Chunk]>,
}

impl Default for Gib {
    fn default() -> Gib {
        Gib { huge: None, chunks: std::iter::repeat_with(Chunk::default).take(BLOCK as usize).collect() }
    }
}

/// Folios by frame.
#[derive(Debug, Default)]
pub(super) struct FrameTable {
    gibs: BTreeMap<u64, Gib>,
    pages: u64,
}

const fn place(pfn: Pfn) -> (u64, usize, u16) {
    (pfn >> 18, (pfn >> 9) as usize & 511, pfn as u16 & 511)
}

impl Chunk {
    /// The block page by page.
    fn pages(&mut self) -> &mut Pages {
        if let Chunk::Split(split) = self {
            let mut pages = Box::new(Pages { quiet: [Packed::NONE; BLOCK as usize], odd: BTreeMap::new(), live: 512 });
            for page in 0..BLOCK as u16 {
                match split.odd.remove(&page) {
                    Some(folio) => pages.put(page, folio),
                    None => pages.put(page, split.quiet(page).folio()),
                }
            }
            *self = Chunk::Pages(pages);
        }
        if matches!(self, Chunk::Empty) {
            *self =
                Chunk::Pages(Box::new(Pages { quiet: [Packed::NONE; BLOCK as usize], odd: BTreeMap::new(), live: 0 }));
        }
        match self {
            Chunk::Pages(pages) => pages,
            _ => panic!("model: a base page lies in a huge folio"),
        }
    }

    fn get(&self, page: u16) -> Option<FolioRef<'_>> {
        match self {
            Chunk::Empty => None,
            Chunk::Huge(folio) => Some((&**folio).into()),
            Chunk::Split(split) => Some(split.odd.get(&page).map_or_else(|| split.quiet(page).view(), FolioRef::from)),
            Chunk::Pages(pages) => match pages.quiet[usize::from(page)].get() {
                Some(quiet) => Some(quiet.view()),
                None => pages.odd.get(&page).map(FolioRef::from),
            },
        }
    }

    fn edit<R>(&mut self, page: u16, change: impl FnOnce(&mut Folio) -> R) -> Option<R> {
        match self {
            Chunk::Empty => None,
            Chunk::Huge(folio) => Some(change(folio)),
            Chunk::Split(split) => {
                let mut folio = split.odd.remove(&page).unwrap_or_else(|| split.quiet(page).folio());
                let result = change(&mut folio);
                if Quiet::of(&folio) != Some(split.quiet(page)) {
                    split.odd.insert(page, folio);
                }
                if split.odd.len() > MAX_ODD {
                    self.pages();
                }
                Some(result)
            }
            Chunk::Pages(pages) => {
                let quiet = pages.quiet[usize::from(page)].get();
                if quiet.is_none()
                    && let Some(folio) = pages.odd.get_mut(&page)
                {
                    let result = change(folio);
                    if Quiet::of(folio).is_some() {
                        let folio = pages.odd.remove(&page)?;
                        pages.put(page, folio);
                    }
                    return Some(result);
                }
                let mut folio = quiet?.folio();
                let result = change(&mut folio);
                pages.put(page, folio);
                Some(result)
            }
        }
    }
}

impl Pages {
    fn put(&mut self, page: u16, folio: Folio) {
        match Quiet::of(&folio).and_then(Packed::new) {
            Some(packed) => self.quiet[usize::from(page)] = packed,
            None => {
                self.quiet[usize::from(page)] = Packed::NONE;
                self.odd.insert(page, folio);
            }
        }
    }
}

impl FrameTable {
    fn chunk(&self, pfn: Pfn) -> Option<&Chunk> {
        let (gib, chunk, _) = place(pfn);
        self.gibs.get(&gib).map(|gib| &gib.chunks[chunk])
    }

    fn chunk_mut(&mut self, pfn: Pfn) -> &mut Chunk {
        let (gib, chunk, _) = place(pfn);
        &mut self.gibs.entry(gib).or_default().chunks[chunk]
    }

    /// Puts a folio in.
    pub fn insert(&mut self, pfn: Pfn, folio: Folio) {
        self.pages += folio.order.pages();
        match folio.order {
            Order::Pud => self.gibs.entry(pfn >> 18).or_default().huge = Some(folio),
            Order::Pmd => *self.chunk_mut(pfn) = Chunk::Huge(Box::new(folio)),
            Order::Base => {
                let pages = self.chunk_mut(pfn).pages();
                pages.live += 1;
                pages.put(place(pfn).2, folio);
            }
        }
    }

    /// Size of the folio that a frame belongs to; base for a frame of none.
    pub fn order_at(&self, pfn: Pfn) -> Order {
        let (gib, chunk, _) = place(pfn);
        match self.gibs.get(&gib) {
            Some(Gib { huge: Some(_), .. }) => Order::Pud,
            Some(gib) if matches!(gib.chunks[chunk], Chunk::Huge(_)) => Order::Pmd,
            _ => Order::Base,
        }
    }

    /// The folio that a frame belongs to.
    pub fn folio(&self, pfn: Pfn) -> Option<FolioRef<'_>> {
        let (gib, chunk, page) = place(pfn);
        let gib = self.gibs.get(&gib)?;
        gib.huge.as_ref().map(FolioRef::from).or_else(|| gib.chunks[chunk].get(page))
    }

    /// Changes the folio that a frame belongs to; `None` for a frame of none.
    pub fn edit<R>(&mut self, pfn: Pfn, change: impl FnOnce(&mut Folio) -> R) -> Option<R> {
        let (gib, chunk, page) = place(pfn);
        let gib = self.gibs.get_mut(&gib)?;
        match &mut gib.huge {
            Some(folio) => Some(change(folio)),
            None => gib.chunks[chunk].edit(page, change),
        }
    }

    /// Takes out the folio that begins at a frame.
    pub fn remove(&mut self, head: Pfn) -> Option<Folio> {
        let (number, chunk, page) = place(head);
        let gib = self.gibs.get_mut(&number)?;
        let folio = if let Some(folio) = gib.huge.take() {
            folio
        } else if let Chunk::Huge(folio) = &mut gib.chunks[chunk] {
            let folio = std::mem::replace(&mut **folio, Folio::held(Order::Base, Holder::Lookup, 0));
            gib.chunks[chunk] = Chunk::Empty;
            folio
        } else {
            gib.chunks[chunk].get(page)?;
            let pages = gib.chunks[chunk].pages();
            let quiet = std::mem::replace(&mut pages.quiet[usize::from(page)], Packed::NONE).get();
            let folio = quiet.map(Quiet::folio).or_else(|| pages.odd.remove(&page))?;
            pages.live -= 1;
            if pages.live == 0 {
                gib.chunks[chunk] = Chunk::Empty;
            }
            folio
        };
        self.pages -= folio.order.pages();
        Some(folio)
    }

    /// How many frames from `pfn` on are quiet base pages and not poisoned, up to `limit` and the end of the block.
    pub fn quiet_run(&self, pfn: Pfn, limit: u64) -> u64 {
        let limit = limit.min(BLOCK - pfn % BLOCK) as u16;
        let page = place(pfn).2;
        if self.order_at(pfn) != Order::Base {
            return 0;
        }
        let run = match self.chunk(pfn) {
            Some(Chunk::Split(split)) if split.first.flags.contains(Flags::HWPOISON) => 0,
            Some(Chunk::Split(split)) => split.odd.range(page..).next().map_or(limit, |(odd, _)| odd - page),
            Some(Chunk::Pages(pages)) => {
                let quiet = |page: &u16| {
                    let quiet = pages.quiet[usize::from(*page)].get();
                    quiet.is_some_and(|quiet| !quiet.flags.contains(Flags::HWPOISON))
                };
                (page..page + limit).take_while(quiet).count() as u16
            }
            _ => 0,
        };
        u64::from(run.min(limit))
    }

    /// Takes out quiet base pages of one block.
    pub fn drop_quiet_run(&mut self, pfn: Pfn, count: u64) {
        let page = usize::from(place(pfn).2);
        let chunk = self.chunk_mut(pfn);
        if count == BLOCK {
            *chunk = Chunk::Empty;
        } else {
            let pages = chunk.pages();
            pages.quiet[page..page + count as usize].fill(Packed::NONE);
            pages.live -= count as u16;
            if pages.live == 0 {
                *chunk = Chunk::Empty;
            }
        }
        self.pages -= count;
    }

    /// Makes a huge folio base pages.
    pub fn split(&mut self, head: Pfn) {
        if self.order_at(head) == Order::Base {
            return;
        }
        let Some(folio) = self.remove(head) else { return };
        self.pages += folio.order.pages();
        for block in (0..folio.order.pages()).step_by(BLOCK as usize) {
            let mapping = folio.mapping.map(|(inode, index)| (inode, index + block));
            let first = Quiet { flags: folio.flags, mapping };
            let mut odd = BTreeMap::new();
            if block == 0 {
                let mut small = Folio { mapcount: folio.mapcount, ..first.folio() };
                small.holders.extend(folio.holders.iter().filter(|(who, _)| *who != Holder::PageCache));
                small.refs = small.holders.iter().map(|(_, n)| n).sum();
                if Quiet::of(&small).is_none() {
                    odd.insert(0, small);
                }
            }
            *self.chunk_mut(head + block) = Chunk::Split(Box::new(Split { first, odd }));
        }
    }

    /// Makes base pages a huge folio that the page cache alone holds.
    pub fn merge(&mut self, head: Pfn, order: Order) {
        let mapping = self.folio(head).and_then(|folio| folio.mapping);
        let mut common = Flags(!0);
        let mut dirty = 0;
        for block in (0..order.pages()).step_by(BLOCK as usize) {
            let chunk = self.chunk_mut(head + block);
            let mut take = |flags: Flags| {
                common.0 &= flags.0;
                dirty |= flags.0 & Flags::DIRTY.0;
            };
            match std::mem::take(chunk) {
                Chunk::Split(split) => {
                    if split.odd.len() < BLOCK as usize {
                        take(split.first.flags);
                    }
                    split.odd.values().for_each(|folio| take(folio.flags));
                }
                Chunk::Pages(pages) => {
                    pages.quiet.iter().filter_map(|packed| packed.get()).for_each(|quiet| take(quiet.flags));
                    pages.odd.values().for_each(|folio| take(folio.flags));
                }
                Chunk::Empty | Chunk::Huge(_) => {}
            }
        }
        self.pages -= order.pages();
        let refs = order.pages() as u32;
        let folio = Folio { flags: Flags(common.0 | dirty), mapping, ..Folio::held(order, Holder::PageCache, refs) };
        self.insert(head, folio);
    }

    /// Pages of all folios.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Bytes of this process that the table takes.
    pub fn resident_bytes(&self) -> u64 {
        let odd = |folios: &BTreeMap<u16, Folio>| folios.len() * (size_of::<Folio>() + 4 * size_of::<(Holder, u32)>());
        let chunk = |chunk: &Chunk| match chunk {
            Chunk::Empty => 0,
            Chunk::Huge(_) => size_of::<Folio>() + size_of::<(Holder, u32)>(),
            Chunk::Split(split) => size_of::<Split>() + odd(&split.odd),
            Chunk::Pages(pages) => size_of::<Pages>() + odd(&pages.odd),
        };
        let gib = |gib: &Gib| gib.chunks.len() * size_of::<Chunk>() + gib.chunks.iter().map(chunk).sum::<usize>();
        self.gibs.values().map(gib).sum::<usize>() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> FrameTable {
        let mut table = FrameTable::default();
        table.insert(512, Folio { mapping: Some((7, 0)), ..Folio::held(Order::Pmd, Holder::PageCache, 512) });
        table.split(512);
        table
    }

    #[test]
    fn a_split_block_costs_no_more_than_its_odd_pages() {
        let mut table = table();
        let quiet = table.resident_bytes();
        assert!(quiet < 10_000, "{quiet} bytes, most of them the empty blocks of the GiB");
        assert_eq!(table.quiet_run(512, 4096), 512);
        table.edit(600, |folio| folio.mapcount = 1);
        assert_eq!((table.quiet_run(512, 4096), table.quiet_run(600, 9), table.quiet_run(601, 9)), (88, 0, 9));
        assert!(table.resident_bytes() < quiet + 400);
        table.edit(600, |folio| folio.mapcount = 0);
        assert_eq!((table.resident_bytes(), table.quiet_run(512, 600)), (quiet, 512));
        assert_eq!(table.folio(700).unwrap().mapping, Some((7, 188)));
    }

    #[test]
    fn every_form_of_a_block_says_the_same() {
        let (mut split, mut pages) = (table(), table());
        pages.chunk_mut(512).pages();
        for pfn in 512..1024 {
            for table in [&mut split, &mut pages] {
                if pfn % 3 == 0 {
                    table.edit(pfn, |folio| folio.flags = Flags::DIRTY);
                }
            }
        }
        assert!(matches!(split.chunk(512), Some(Chunk::Pages(_))), "too many odd ones");
        for pfn in 512..1024 {
            let (a, b) = (split.folio(pfn).unwrap(), pages.folio(pfn).unwrap());
            assert_eq!((a.refs, a.flags, a.mapping), (b.refs, b.flags, b.mapping));
            assert_eq!(a.mapping, Some((7, pfn - 512)));
        }
        assert_eq!((split.pages(), pages.pages()), (512, 512));
        split.merge(512, Order::Pmd);
        assert_eq!(split.folio(1000).map(|folio| (folio.refs, folio.flags)), Some((512, Flags::DIRTY)));
        pages.drop_quiet_run(512, 100);
        assert_eq!((pages.pages(), pages.folio(611).is_none(), pages.folio(612).is_some()), (412, true, true));
        assert!(pages.remove(700).is_some() && pages.remove(700).is_none());
    }

    #[test]
    fn a_split_folio_of_1g_is_as_many_split_blocks() {
        let mut table = FrameTable::default();
        let pages = Order::Pud.pages();
        table.insert(pages, Folio { mapping: Some((7, 0)), ..Folio::held(Order::Pud, Holder::PageCache, 1 << 18) });
        table.edit(pages + 5, |folio| {
            folio.holders.push((Holder::Gup(1), 1));
            folio.refs += 1;
        });
        table.split(pages);
        assert_eq!((table.order_at(pages + 9), table.pages()), (Order::Base, pages));
        assert_eq!((table.folio(pages).unwrap().refs, table.folio(pages + 5).unwrap().refs), (2, 1));
        assert_eq!(table.folio(pages + 70_000).unwrap().mapping, Some((7, 70_000)));
        table.merge(pages, Order::Pud);
        assert_eq!((table.order_at(pages + 9), table.folio(pages).unwrap().refs), (Order::Pud, 1 << 18));
    }
}
