//! The inode: size, flags, and the page cache.

use super::super::host::{Cpu, Flags, Holder, Order, Pfn};
use super::super::mutant::Mutant;
use super::super::profile::FrameModel;
use super::super::{RangeMap, World};
use crate::machine::{Errno, PAGE_SIZE};
use crate::uapi::kvm::GUEST_MEMFD_FLAG_INIT_SHARED;
use std::collections::BTreeMap;

/// Identifies an inode in the model.
pub type InodeId = u64;

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
    /// First page index to first frame of each folio in the page cache.
    pub pages: BTreeMap<u64, Pfn>,
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
        let (first, head) = self.gmem.inodes.get(&inode)?.pages.range(..=index).next_back()?;
        let (_, pages) = self.host.frames.extent(*head);
        (index < first + pages).then(|| head + (index - first))
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
        self.gmem.inodes.get_mut(&inode).expect("the file is open").pages.insert(index, pfn);
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
        let Some(node) = self.gmem.inodes.get_mut(&inode) else { return };
        let whole = |index: u64, pfn: Pfn| index.saturating_add(self.host.frames.extent(pfn).1) <= last;
        let indices: Vec<u64> = node
            .pages
            .range(first..last)
            .filter(|(index, pfn)| whole(**index, **pfn))
            .map(|(index, _)| *index)
            .collect();
        let folios: Vec<(u64, Pfn)> =
            indices.into_iter().filter_map(|index| Some((index, node.pages.remove(&index)?))).collect();
        if !folios.is_empty() {
            self.drain_local_lru();
        }
        for (index, pfn) in folios {
            self.policy_before_release(inode, index, pfn);
            let (_, pages) = self.host.frames.extent(pfn);
            self.host.frames.set_mapping(pfn, None);
            if self.mutant(Mutant::PunchFreesPinned) && self.host.frames.refs(pfn) > 1 {
                self.host.frames.corrupt(pfn, -1);
            }
            if !self.mutant(Mutant::PunchLeaksReference) {
                self.host.put(pfn, Holder::PageCache, pages as u32);
            } else {
                self.host.frames.get(pfn, Holder::Leak, 1);
                self.host.put(pfn, Holder::PageCache, pages as u32);
            }
        }
    }

    /// First page index and first frame of the folios that have a page in `first..last`.
    pub fn gmem_folios(&self, inode: InodeId, first: u64, last: u64) -> Vec<(u64, Pfn)> {
        let Some(node) = self.gmem.inodes.get(&inode) else { return Vec::new() };
        let before = node.pages.range(..first).next_back();
        before
            .filter(|(index, head)| *index + self.host.frames.extent(**head).1 > first)
            .into_iter()
            .chain(node.pages.range(first..last))
            .map(|(index, head)| (*index, *head))
            .collect()
    }

    /// Pages in the page cache in `first..last`.
    pub fn gmem_cached_pages(&self, inode: InodeId, first: u64, last: u64) -> u64 {
        let Some(node) = self.gmem.inodes.get(&inode) else { return 0 };
        let before = node.pages.range(..first).next_back();
        before
            .into_iter()
            .chain(node.pages.range(first..last))
            .map(|(index, head)| {
                let end = index + self.host.frames.extent(*head).1;
                end.min(last).saturating_sub((*index).max(first))
            })
            .sum()
    }
}
