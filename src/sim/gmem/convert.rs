//! KVM_SET_MEMORY_ATTRIBUTES2 on the file: conversion in place, as posted ("guest_memfd: in-place conversion", v8).

use super::super::World;
use super::super::host::Cpu;
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
        let aligned = (offset.is_multiple_of(PAGE_SIZE) && len.is_multiple_of(PAGE_SIZE))
            || self.mutant(Mutant::ConvertIgnoresAlignment);
        let size = self.gmem.inodes[&inode].size;
        let inside = end.is_some_and(|end| end <= size) || self.mutant(Mutant::ConvertIgnoresSize);
        let has_private_memory = has_private_memory || self.mutant(Mutant::ConvertOnDefaultVm);
        let unknown = attributes & !KVM_MEMORY_ATTRIBUTE_PRIVATE;
        let unknown = if self.mutant(Mutant::ConvertIgnoresAttributes) { 0 } else { unknown };
        if len == 0 && self.mutant(Mutant::ConvertAcceptsNothing) {
            return Ok(());
        }
        if !has_private_memory || unknown != 0 || len == 0 || !aligned || !inside {
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
        self.spoil_pages(inode, first, last);
        converted.map_err(|error| {
            let hidden = self.mutant(Mutant::ConvertNeverReports);
            ConvertError { offset: error.offset.filter(|_| !hidden), ..error }
        })
    }

    /// What defects do to the pages of a converted range: the real call leaves them alone.
    fn spoil_pages(&mut self, inode: InodeId, first: u64, last: u64) {
        if self.mutant(Mutant::ConvertFrees) {
            self.gmem_truncate(inode, first, last);
        }
        if self.mutant(Mutant::ConvertAllocates) {
            for index in first..last {
                // A page that cannot be had is missing, as it was.
                let _ = self.gmem_get_folio(inode, index, Cpu::Host);
            }
        }
        if self.mutant(Mutant::ConvertZeroes) {
            for (_, pfn) in self.gmem_folios(inode, first, last) {
                self.zero_folio(pfn);
            }
        }
    }

    /// KVM_SET_MEMORY_ATTRIBUTES2 with every word of its argument: the flags and the reserved words come before the rest.
    ///
    /// # Errors
    /// As [`World::gmem_convert`].
    pub fn gmem_convert_words(&mut self, file: FileId, words: &[u64; 16]) -> Result<(), ConvertError> {
        let [offset, size, attributes, flags, _, reserved @ ..] = words;
        let flags_count = *flags != 0 && !self.mutant(Mutant::ConvertIgnoresFlags);
        let reserved_count = *reserved != [0; 11] && !self.mutant(Mutant::ConvertIgnoresReserved);
        if self.profile.kernel.converts_in_place() && (flags_count || reserved_count) {
            return Err(Errno::EINVAL.into());
        }
        let result = self.gmem_convert(file, *offset, *size, *attributes);
        if self.mutant(Mutant::ConvertAlwaysReports) {
            return result.map_err(|error| ConvertError { offset: error.offset.or(Some(*offset)), ..error });
        }
        result
    }

    fn convert_to_private(&mut self, inode: InodeId, first: u64, last: u64) -> Result<(), ConvertError> {
        if self.mutant(Mutant::ConvertStoresFirst) {
            self.store_private(inode, first, last, true);
        }
        if !self.mutant(Mutant::ConvertSkipsHostUnmap) {
            let last = if self.mutant(Mutant::ConvertUnmapsOneShort) { last - 1 } else { last };
            self.gmem_unmap_host(inode, first, last);
        }
        if let Some(index) = self.first_unsafe(inode, first, last) {
            let offset = index.max(first) * PAGE_SIZE;
            let offset = if self.mutant(Mutant::ConvertReportsStart) { first * PAGE_SIZE } else { offset };
            let errno = if self.mutant(Mutant::ConvertBusyIsEbusy) { Errno::EBUSY } else { Errno::EAGAIN };
            return Err(ConvertError { errno, offset: Some(offset) });
        }
        if !self.mutant(Mutant::ConvertSkipsZap) {
            let last = if self.mutant(Mutant::ConvertZapsOneShort) { last - 1 } else { last };
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
        if self.mutant(Mutant::ConvertSharedChecksReferences)
            && let Some(index) = self.first_unsafe(inode, first, last)
        {
            return Err(at(Errno::EAGAIN, index));
        }
        if self.mutant(Mutant::FailUnmapStoresAnyway) {
            self.store_private(inode, first, last, false);
        }
        if !self.mutant(Mutant::ConvertSkipsZap) {
            let end = match () {
                () if self.mutant(Mutant::ConvertZapsOneShort) => last - 1,
                () if self.mutant(Mutant::ConvertZapsOneLong) => last + 1,
                () => last,
            };
            let start_only = self.mutant(Mutant::FailUnmapReportsStart);
            let reported = |index| if start_only { first } else { index };
            let zapped = self.gmem_zap_bindings(inode, first, end, ZapFilter::Private, ZapContext::Fallible);
            zapped.map_err(|stuck| at(stuck.errno, reported(stuck.index)))?;
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
        let last = match () {
            () if self.mutant(Mutant::ConvertOnePageShort) => last - 1,
            () if self.mutant(Mutant::ConvertOnePageLong) => last + 1,
            () => last,
        };
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
        let last = if self.mutant(Mutant::ConvertLooksAtFirstOnly) { first + 1 } else { last };
        for FolioGroup { index, pfn, pages, quiet } in self.gmem_groups(inode, first, last) {
            self.costs.safety_checks += if quiet { pages } else { 1 };
            let pages = pages as u32;
            if quiet || self.look_at_refs(pfn) == pages {
                continue;
            }
            if !drained {
                if self.mutant(Mutant::ConvertDrainsOneCpu) {
                    self.drain_local_lru();
                } else {
                    self.host.drain_all_lru();
                }
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
