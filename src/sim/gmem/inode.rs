//! The inode: size, flags, and the page cache.

use super::super::host::{Cpu, Flags, Holder, Order, Pfn};
use super::super::mutant::Mutant;
use super::super::profile::FrameModel;
use super::super::{ExtentMap, RangeMap, World};
use crate::machine::{Errno, PAGE_SIZE};
use crate::uapi::kvm::GUEST_MEMFD_FLAG_INIT_SHARED;

/// Identifies an inode in the model.
pub type InodeId = u64;

/// Folios of the page cache that lie side by side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FolioGroup {
    /// First page index.
    pub index: u64,
    /// First frame.
    pub pfn: Pfn,
    /// Base pages.
    pub pages: u64,
    /// Whether these are folios of one base page each that only the page cache holds, rather than one folio.
    pub quiet: bool,
}

/// A guest_memfd inode.
#[derive(Debug)]
pub struct Inode {
    /// `st_ino`.
    pub number: u64,
    /// Bytes, fixed at creation.
    pub size: u64,
    /// GUEST_MEMFD_FLAG_*.
    pub flags: u64,
    /// Size of the folios it is made of.
    pub order: Order,
    /// Page index to frame of every page in the page cache.
    pub pages: ExtentMap<()>,
    /// Pages whose shareability is not the one that the file was created with.
    pub converted: RangeMap<bool>,
    /// How often each page is mapped into a S-EPT, as the policy `gfn-count` has it.
    pub mapped_counts: RangeMap<u32>,
    /// mtime, nanoseconds since the epoch.
    pub modified_ns: i128,
}

impl Inode {
    /// Whether the whole file is shared: GUEST_MEMFD_FLAG_INIT_SHARED.
    pub fn is_init_shared(&self) -> bool {
        self.flags & GUEST_MEMFD_FLAG_INIT_SHARED != 0
    }

    /// Whether a page is private: by the creation flag, and by what was converted since.
    pub fn is_private(&self, index: u64) -> bool {
        self.is_init_shared() == self.converted.get(index)
    }

    /// Whether every page of `first..last` is private, or every page is shared.
    pub fn all_private(&self, first: u64, last: u64, private: bool) -> bool {
        self.converted.all(first, last, private == self.is_init_shared())
    }

    /// Makes the pages of `first..last` private or shared.
    pub fn set_private(&mut self, first: u64, last: u64, private: bool) {
        let converted = private == self.is_init_shared();
        self.converted.set(first, last, converted);
    }

    /// Size in pages.
    pub fn size_pages(&self) -> u64 {
        self.size / PAGE_SIZE
    }
}

impl World {
    /// The frame of a page of the file, if it is in the page cache.
    pub fn gmem_lookup(&self, inode: InodeId, index: u64) -> Option<Pfn> {
        self.gmem.inodes.get(&inode)?.pages.get(index).map(|(pfn, ())| pfn)
    }

    /// Pages from `index` to the end of its block, which are allocated together.
    pub fn gmem_block_rest(&self, inode: InodeId, index: u64) -> u64 {
        let order = self.gmem.inodes.get(&inode).map_or(Order::Base, |node| node.order);
        order.pages() - (index - order.align_down(index))
    }

    /// The frame of a page of the file, allocated when it is not there (kvm_gmem_get_folio).
    ///
    /// # Errors
    /// ENOMEM, or what was scripted for the allocator.
    pub fn gmem_get_folio(&mut self, inode: InodeId, index: u64, cpu: Cpu) -> Result<Pfn, Errno> {
        if let Some(pfn) = self.gmem_lookup(inode, index) {
            return Ok(pfn);
        }
        let order = self.gmem.inodes.get(&inode).map_or(Order::Base, |node| node.order);
        let pfn = self.alloc_folio(order, Holder::PageCache)?;
        if order != Order::Base {
            return Ok(self.gmem_alloc_huge(inode, index, pfn));
        }
        self.host.frames.set_mapping(pfn, Some((inode, index)));
        self.host.frames.set_flags(pfn, Flags::UNEVICTABLE);
        self.gmem.inodes.get_mut(&inode).expect("the file is open").pages.insert(index, 1, pfn, ());
        if self.profile.frames == FrameModel::StructPage {
            self.host.lru_add(cpu, pfn);
        }
        Ok(pfn)
    }

    /// Takes the folios of `first..last` out of the page cache and out of the host's page tables, and drops the page
    /// cache's references. Whoever else holds a folio keeps it, detached from the file.
    pub fn gmem_truncate(&mut self, inode: InodeId, first: u64, last: u64) {
        if !self.mutant(Mutant::PunchSkipsHostUnmap) {
            self.gmem_unmap_host(inode, first, last);
        }
        let mut groups = self.gmem_groups(inode, first, last);
        groups.retain(|group| group.index >= first && group.index + group.pages <= last);
        let Some(node) = self.gmem.inodes.get_mut(&inode).filter(|_| !groups.is_empty()) else { return };
        for group in &groups {
            node.pages.remove(group.index, group.index + group.pages);
        }
        self.drain_local_lru();
        for group in groups {
            if group.quiet && self.can_drop_at_once(inode, &group) {
                self.host.drop_quiet_run(group.pfn, group.pages);
                continue;
            }
            let step = if group.quiet { 1 } else { group.pages };
            for i in (0..group.pages).step_by(step as usize) {
                self.release_folio(inode, group.index + i, group.pfn + i);
            }
        }
    }

    /// Whether dropping the page cache's references to base pages, all in one, is what dropping them one by one would be.
    fn can_drop_at_once(&self, inode: InodeId, group: &FolioGroup) -> bool {
        self.profile.mutant.is_none() && self.policy_ignores_release(inode, group.index, group.pages)
    }

    /// Drops the page cache's references to a folio that has just been taken out of it.
    fn release_folio(&mut self, inode: InodeId, index: u64, pfn: Pfn) {
        self.policy_before_release(inode, index, pfn);
        let (_, pages) = self.host.frames.extent(pfn);
        self.host.frames.set_mapping(pfn, None);
        if self.mutant(Mutant::PunchFreesPinned) && self.host.frames.refs(pfn) > 1 {
            self.host.frames.corrupt(pfn, -1);
        }
        if self.mutant(Mutant::PunchLeaksReference) {
            self.host.frames.get(pfn, Holder::Leak, 1);
        }
        self.host.put(pfn, Holder::PageCache, pages as u32);
    }

    /// The folios that have a page in `first..last`, those of base pages that only the page cache holds in runs.
    pub fn gmem_groups(&self, inode: InodeId, first: u64, last: u64) -> Vec<FolioGroup> {
        let mut groups = Vec::new();
        let Some(node) = self.gmem.inodes.get(&inode) else { return groups };
        for piece in node.pages.pieces(first, last) {
            let mut done = 0;
            while done < piece.len {
                let (index, pfn) = (piece.first + done, piece.base + done);
                let run = self.host.frames.quiet_run(pfn, piece.len - done);
                if run > 0 {
                    groups.push(FolioGroup { index, pfn, pages: run, quiet: true });
                    done += run;
                    continue;
                }
                let (head, pages) = self.host.frames.extent(pfn);
                groups.push(FolioGroup { index: index - (pfn - head), pfn: head, pages, quiet: false });
                done += pages - (pfn - head);
            }
        }
        groups
    }

    /// First page index and first frame of the folios that have a page in `first..last`.
    pub fn gmem_folios(&self, inode: InodeId, first: u64, last: u64) -> Vec<(u64, Pfn)> {
        let groups = self.gmem_groups(inode, first, last);
        let folios = groups.into_iter().flat_map(|group| {
            let step = if group.quiet { 1 } else { group.pages };
            (0..group.pages).step_by(step as usize).map(move |i| (group.index + i, group.pfn + i))
        });
        folios.collect()
    }

    /// Pages in the page cache in `first..last`.
    pub fn gmem_cached_pages(&self, inode: InodeId, first: u64, last: u64) -> u64 {
        let Some(node) = self.gmem.inodes.get(&inode) else { return 0 };
        node.pages.pieces(first, last).map(|piece| piece.len).sum()
    }
}
