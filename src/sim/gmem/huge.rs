//! Huge folios of a guest_memfd: one folio while every page of a block is private, base pages once a part is shared.
//!
//! A block is as many pages as the file's page size has. Splitting and merging take the folio's count away for a moment
//! (folio_ref_freeze): with an unexpected reference they wait for it to go. The model waits a bounded number of looks, counts
//! them in [`World::freeze_spins`], and gives up with EAGAIN.

use super::super::World;
use super::super::host::{Flags, Order, Pfn, Pool};
use super::super::mutant::Mutant;
use super::super::profile::{GMEM_FLAG_HUGETLB, GMEM_HUGE_SHIFT, Kernel};
use super::{FolioGroup, InodeId};
use crate::machine::{Errno, PAGE_SIZE};

/// How often a count is looked at before it is believed.
const FREEZE_LOOKS: u32 = 64;
/// Mask of the page size in the creation flags, before the shift.
const HUGE_MASK: u64 = 0x3f;

/// The size of the folios that creation flags ask for, and the flags without it.
///
/// # Errors
/// EINVAL for a size that is neither 2 MiB nor 1 GiB, or does not divide the file's.
pub fn folio_order(kernel: Kernel, flags: u64, size: u64) -> Result<(Order, u64), Errno> {
    if kernel != Kernel::Huge || flags & GMEM_FLAG_HUGETLB == 0 {
        return Ok((Order::Base, flags));
    }
    let order = match flags >> GMEM_HUGE_SHIFT & HUGE_MASK {
        21 => Order::Pmd,
        30 => Order::Pud,
        _ => return Err(Errno::EINVAL),
    };
    if !size.is_multiple_of(order.pages() * PAGE_SIZE) {
        return Err(Errno::EINVAL);
    }
    Ok((order, flags & !(GMEM_FLAG_HUGETLB | HUGE_MASK << GMEM_HUGE_SHIFT)))
}

impl World {
    fn order_of(&self, inode: InodeId) -> Order {
        self.gmem.inodes.get(&inode).map_or(Order::Base, |node| node.order)
    }

    /// The pool of huge pages of an order. Every file has its whole size reserved from creation to close, as hugetlb does
    /// it; the reservation is a number only, an allocation beyond it is not refused.
    pub fn gmem_pool(&self, order: Order) -> Pool {
        let missing = |node: &super::Inode| (node.size_pages() - node.pages.len()) / order.pages();
        let files = self.gmem.inodes.values().filter(|node| node.order == order);
        Pool { reserved: files.map(missing).sum(), ..self.host.allocator.pool(order) }
    }

    fn is_block_private(&self, inode: InodeId, block: u64, order: Order) -> bool {
        self.gmem.inodes.get(&inode).is_some_and(|node| node.all_private(block, block + order.pages(), true))
    }

    /// First page indices of the blocks that have a page in `first..last`.
    fn blocks(&self, inode: InodeId, first: u64, last: u64) -> Vec<u64> {
        let order = self.order_of(inode);
        let groups = self.gmem_groups(inode, first, last);
        let mut blocks: Vec<u64> = groups.iter().map(|group| order.align_down(group.index)).collect();
        blocks.dedup();
        blocks
    }

    /// A huge folio for the block of a page, split at once when a part of the block is shared.
    ///
    /// # Errors
    /// ENOMEM when the pool is empty.
    pub fn gmem_alloc_huge(&mut self, inode: InodeId, index: u64, pfn: Pfn) -> Pfn {
        let order = self.order_of(inode);
        let block = order.align_down(index);
        self.host.frames.set_mapping(pfn, Some((inode, block)));
        if let Some(node) = self.gmem.inodes.get_mut(&inode) {
            node.pages.insert(block, order.pages(), pfn, ());
        }
        if !self.is_block_private(inode, block, order) && !self.mutant(Mutant::SharedFolioStaysWhole) {
            self.split_folio(pfn, order);
        }
        pfn + (index - block)
    }

    fn split_folio(&mut self, pfn: Pfn, order: Order) {
        self.host.frames.split(pfn);
        self.host.allocator.note_split(pfn, order);
        let lost = match () {
            () if self.mutant(Mutant::SplitLosesDirty) => Flags::DIRTY,
            () if self.mutant(Mutant::SplitLosesUptodate) => Flags::UPTODATE,
            () => Flags::default(),
        };
        if lost != Flags::default() {
            (1..order.pages()).for_each(|i| self.host.frames.clear_flags(pfn + i, lost));
        }
    }

    /// Waits for unexpected references to go; the answer is whether only `expected` are left.
    fn freeze(&mut self, pfn: Pfn, expected: u32) -> bool {
        for _ in 0..FREEZE_LOOKS {
            if self.look_at_refs(pfn) == expected {
                return true;
            }
            self.freeze_spins += 1;
        }
        false
    }

    /// Splits the huge folios that have a page in a range.
    ///
    /// # Errors
    /// First page index of a folio that somebody holds.
    pub fn gmem_split(&mut self, inode: InodeId, first: u64, last: u64) -> Result<(), u64> {
        let order = self.order_of(inode);
        if order == Order::Base {
            return Ok(());
        }
        for FolioGroup { index, pfn, pages, quiet } in self.gmem_groups(inode, first, last) {
            if quiet || pages == 1 {
                continue;
            }
            if !self.freeze(pfn, order.pages() as u32) {
                return Err(index.max(first));
            }
            self.split_folio(pfn, order);
        }
        Ok(())
    }

    /// Merges the split blocks of a range that are private as a whole.
    ///
    /// # Errors
    /// Page index of the first page that somebody holds; nothing is merged then.
    pub fn gmem_merge(&mut self, inode: InodeId, first: u64, last: u64) -> Result<(), u64> {
        let order = self.order_of(inode);
        if order == Order::Base || self.mutant(Mutant::ConvertSkipsMerge) {
            return Ok(());
        }
        let private = |world: &World, block: &u64| world.is_block_private(inode, *block, order);
        let blocks: Vec<u64> =
            self.blocks(inode, first, last).into_iter().filter(|block| private(self, block)).collect();
        self.merge_blocks(inode, &blocks, order)
    }

    fn merge_blocks(&mut self, inode: InodeId, blocks: &[u64], order: Order) -> Result<(), u64> {
        let pages = order.pages();
        let split: Vec<u64> = blocks.iter().copied().filter(|block| self.is_split(inode, *block, order)).collect();
        for block in &split {
            for FolioGroup { index, pfn, quiet, .. } in self.gmem_groups(inode, *block, block + pages) {
                if !quiet && !self.freeze(pfn, 1) && !self.mutant(Mutant::MergeDespiteReferences) {
                    return Err(index);
                }
            }
        }
        for block in split {
            let Some(pfn) = self.gmem_lookup(inode, block) else { continue };
            self.host.frames.merge(pfn, order);
            self.host.frames.set_mapping(pfn, Some((inode, block)));
            self.host.allocator.note_merge(pfn);
            if self.mutant(Mutant::MergeLosesDirty) {
                self.host.frames.clear_flags(pfn, Flags::DIRTY);
            }
        }
        Ok(())
    }

    /// Whether a block of the file is there as base pages.
    fn is_split(&self, inode: InodeId, block: u64, order: Order) -> bool {
        let pfn = self.gmem_lookup(inode, block);
        pfn.is_some_and(|pfn| self.host.frames.extent(pfn).1 < order.pages())
    }

    /// Makes a range ready to be punched: blocks that go as a whole are merged, parts of blocks are zeroed and stay. The
    /// answer is the range of whole blocks.
    ///
    /// # Errors
    /// EAGAIN when somebody holds a page of a split block that is to go.
    pub fn gmem_punch_huge(&mut self, inode: InodeId, first: u64, last: u64) -> Result<(u64, u64), Errno> {
        let order = self.order_of(inode);
        if order == Order::Base {
            return Ok((first, last));
        }
        let pages = order.pages();
        let (from, to) = (first.next_multiple_of(pages), order.align_down(last));
        if from < to {
            self.gmem_unmap_host(inode, from, to);
            let blocks = self.blocks(inode, from, to);
            self.merge_blocks(inode, &blocks, order).map_err(|_| Errno::EAGAIN)?;
        }
        let edges = if from < to { [(first, from), (to, last)] } else { [(first, last), (last, last)] };
        for (start, end) in edges {
            self.gmem_unmap_host(inode, start, end);
            for index in start..end {
                match self.gmem_lookup(inode, index) {
                    Some(pfn) if self.mutant(Mutant::PunchPartFrees) => self.zero_folio(pfn),
                    Some(pfn) if !self.mutant(Mutant::PunchPartKeepsData) => self.zero_page(pfn),
                    _ => {}
                }
            }
        }
        Ok((from, to.max(from)))
    }
}
