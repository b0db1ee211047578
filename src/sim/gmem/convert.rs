//! KVM_SET_MEMORY_ATTRIBUTES2 on the file: conversion in place, as posted ("guest_memfd: in-place conversion", v8).

use super::super::World;
use super::super::mmu::ZapFilter;
use super::super::mmu::tdx::unmap::ZapContext;
use super::super::mutant::Mutant;
use super::super::profile::FrameModel;
use super::super::schedule::{Lock, SchedulePoint};
use super::{FileId, FolioGroup, InodeId};
use crate::machine::{ConvertError, Errno, PAGE_SIZE};
use crate::uapi::kvm::KVM_MEMORY_ATTRIBUTE_PRIVATE;

impl From<Errno> for ConvertError {
    /// An error without an offset.
    fn from(errno: Errno) -> ConvertError {
        ConvertError { errno, offset: None }
    }
}

/// An error at a page.
fn at(errno: Errno, index: u64) -> ConvertError {
    ConvertError { errno, offset: Some(index * PAGE_SIZE) }
}

impl World {
    /// Converts a range of a file to private or to shared.
    ///
    /// # Errors
    /// In the order of the checks: ENOTTY, EINVAL (VM type, attributes, size, alignment, end of file), EAGAIN with the
    /// offset of the first page that somebody holds; and what the policy makes of a failed unmap.
    pub fn gmem_convert(&mut self, file: FileId, offset: u64, len: u64, attributes: u64) -> Result<(), ConvertError> {
        if !self.profile.kernel.converts_in_place() {
            return Err(Errno::ENOTTY.into());
        }
        let open = self.gmem.files.get(&file).ok_or(Errno::EBADF)?;
        let (vm, inode) = (open.vm, open.inode);
        let has_private_memory = self.vms.get(&vm).is_some_and(|vm| vm.vm_type.has_private_memory());
        let end = offset.checked_add(len);
        let aligned = offset.is_multiple_of(PAGE_SIZE) && len.is_multiple_of(PAGE_SIZE);
        let size = self.gmem.inodes[&inode].size;
        let inside = end.is_some_and(|end| end <= size) || self.mutant(Mutant::ConvertIgnoresSize);
        if !has_private_memory || attributes & !KVM_MEMORY_ATTRIBUTE_PRIVATE != 0 || len == 0 || !aligned || !inside {
            return Err(Errno::EINVAL.into());
        }
        let (first, last) = (offset / PAGE_SIZE, (offset + len) / PAGE_SIZE);
        let to_private = attributes & KVM_MEMORY_ATTRIBUTE_PRIVATE != 0;
        if self.gmem.inodes[&inode].all_private(first, last, to_private) {
            return Ok(());
        }
        let invalidated = self.gmem_invalidate_begin(inode, first, last);
        let converted = if to_private {
            self.convert_to_private(inode, first, last)
        } else {
            self.convert_to_shared(inode, first, last)
        };
        self.gmem_invalidate_end(invalidated);
        converted
    }

    fn convert_to_private(&mut self, inode: InodeId, first: u64, last: u64) -> Result<(), ConvertError> {
        if self.mutant(Mutant::ConvertStoresFirst) {
            self.store_private(inode, first, last, true);
        }
        if !self.mutant(Mutant::ConvertSkipsHostUnmap) {
            self.gmem_unmap_host(inode, first, last);
        }
        if let Some(index) = self.first_unsafe(inode, first, last) {
            let offset = index.max(first) * PAGE_SIZE;
            let offset = if self.mutant(Mutant::ConvertReportsStart) { first * PAGE_SIZE } else { offset };
            let errno = if self.mutant(Mutant::ConvertBusyIsEbusy) { Errno::EBUSY } else { Errno::EAGAIN };
            return Err(ConvertError { errno, offset: Some(offset) });
        }
        if !self.mutant(Mutant::ConvertSkipsZap) {
            let _ = self.gmem_zap_bindings(inode, first, last, ZapFilter::Shared, ZapContext::Void);
        }
        self.schedule_point(SchedulePoint::ConversionUnmapped, &[Lock::Invalidate(inode)]);
        let before = self.gmem.inodes[&inode].converted.clone();
        self.store_private(inode, first, last, true);
        self.gmem_merge(inode, first, last).map_err(|index| {
            if let Some(node) = self.gmem.inodes.get_mut(&inode) {
                node.converted = before;
            }
            at(Errno::EAGAIN, index.max(first))
        })
    }

    fn convert_to_shared(&mut self, inode: InodeId, first: u64, last: u64) -> Result<(), ConvertError> {
        if !self.mutant(Mutant::ConvertSkipsZap) {
            self.gmem_zap_bindings(inode, first, last, ZapFilter::Private, ZapContext::Fallible)
                .map_err(|stuck| at(stuck.errno, stuck.index))?;
            if let Some(index) = self.policy_still_in_use(inode, first, last) {
                return Err(at(Errno::EFAULT, index));
            }
        }
        self.schedule_point(SchedulePoint::ConversionUnmapped, &[Lock::Invalidate(inode)]);
        self.gmem_split(inode, first, last).map_err(|index| at(Errno::EAGAIN, index))?;
        self.store_private(inode, first, last, false);
        Ok(())
    }

    fn store_private(&mut self, inode: InodeId, first: u64, last: u64, private: bool) {
        let last = if self.mutant(Mutant::ConvertOnePageShort) { last - 1 } else { last };
        if let Some(node) = self.gmem.inodes.get_mut(&inode) {
            node.set_private(first, last, private);
        }
    }

    /// First page index of the first folio in a range to which somebody besides the page cache holds a reference. LRU
    /// batches are drained once before a folio is called unsafe.
    fn first_unsafe(&mut self, inode: InodeId, first: u64, last: u64) -> Option<u64> {
        if self.profile.frames == FrameModel::PfnMap {
            return None;
        }
        if self.mutant(Mutant::ConvertIgnoresReferences) {
            return None;
        }
        let mut drained = self.mutant(Mutant::ConvertSkipsDrain);
        for FolioGroup { index, pfn, pages, quiet } in self.gmem_groups(inode, first, last) {
            self.costs.safety_checks += if quiet { pages } else { 1 };
            let pages = pages as u32;
            if quiet || self.look_at_refs(pfn) == pages {
                continue;
            }
            if !drained {
                self.host.drain_all_lru();
                self.costs.lru_drains += 1;
                drained = true;
            }
            self.costs.safety_checks += 1;
            if self.look_at_refs(pfn) != pages {
                return Some(index);
            }
        }
        None
    }
}
