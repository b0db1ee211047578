//! fallocate(2): allocation, and the punch that takes pages away from everybody.

use super::super::World;
use super::super::host::{Cpu, Holder};
use super::super::mmu::tdx::unmap::ZapContext;
use super::super::mutant::Mutant;
use super::super::schedule::{Lock, SchedulePoint};
use super::file::MAX_FILE_SIZE;
use super::{FileId, InodeId};
use crate::machine::{Errno, PAGE_SIZE};
use libc::{
    FALLOC_FL_COLLAPSE_RANGE, FALLOC_FL_INSERT_RANGE, FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE,
    FALLOC_FL_UNSHARE_RANGE, FALLOC_FL_ZERO_RANGE,
};

/// FALLOC_FL_WRITE_ZEROES, 6.17.
const FALLOC_FL_WRITE_ZEROES: i32 = 0x80;

/// What the VFS checks before it asks the file (vfs_fallocate).
///
/// # Errors
/// EINVAL, EOPNOTSUPP, EFBIG, in this order.
fn vfs_checks(mode: i32, offset: i64, len: i64) -> Result<(), Errno> {
    if offset < 0 || len <= 0 {
        return Err(Errno::EINVAL);
    }
    let keeps_size = mode & FALLOC_FL_KEEP_SIZE != 0;
    let allowed = match mode & !FALLOC_FL_KEEP_SIZE {
        0 | FALLOC_FL_UNSHARE_RANGE | FALLOC_FL_ZERO_RANGE => true,
        FALLOC_FL_PUNCH_HOLE => keeps_size,
        FALLOC_FL_COLLAPSE_RANGE | FALLOC_FL_INSERT_RANGE | FALLOC_FL_WRITE_ZEROES => !keeps_size,
        _ => false,
    };
    if !allowed {
        return Err(Errno::EOPNOTSUPP);
    }
    if offset.checked_add(len).is_none() {
        return Err(Errno::EFBIG);
    }
    Ok(())
}

impl World {
    /// fallocate(2) on a guest_memfd.
    ///
    /// # Errors
    /// EBADF, EINVAL, EOPNOTSUPP, EFBIG, EINVAL (alignment, size), ENOMEM; EFAULT from a punch, with nothing punched, when a
    /// private page cannot be unmapped and the policy reports it; EIO when a huge mapping cannot be split; EAGAIN when
    /// somebody holds a page of a split huge folio.
    pub fn gmem_fallocate(&mut self, file: FileId, mode: i32, offset: i64, len: i64) -> Result<(), Errno> {
        let open = self.gmem.files.get(&file).ok_or(Errno::EBADF)?;
        let inode = open.inode;
        if self.mutant(Mutant::FileChecksDead) && self.vm(open.vm).is_some_and(|vm| vm.dead) {
            return Err(Errno::EIO);
        }
        let unsupported = if self.mutant(Mutant::FallocateModeIsEinval) { Errno::EINVAL } else { Errno::EOPNOTSUPP };
        vfs_checks(mode, offset, len).map_err(|errno| if errno == Errno::EOPNOTSUPP { unsupported } else { errno })?;
        if mode & FALLOC_FL_KEEP_SIZE == 0 || mode & !(FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE) != 0 {
            return Err(unsupported);
        }
        let (offset, len) = (offset as u64, len as u64);
        let len_is_aligned = len.is_multiple_of(PAGE_SIZE) || self.mutant(Mutant::FallocateIgnoresLenAlignment);
        if !offset.is_multiple_of(PAGE_SIZE) || !len_is_aligned {
            return Err(Errno::EINVAL);
        }
        let (first, last) = (offset / PAGE_SIZE, (offset + len) / PAGE_SIZE);
        if mode & FALLOC_FL_PUNCH_HOLE != 0 {
            let invalidated = self.gmem_invalidate_begin(inode, first, last);
            let punched = self.gmem_punch(inode, first, last);
            self.gmem_invalidate_end(invalidated);
            punched?;
            if self.mutant(Mutant::PunchKeepsTimes) {
                return Ok(());
            }
        } else {
            self.gmem_allocate(inode, first, last)?;
        }
        let now = self.now_ns();
        if let Some(node) = self.gmem.inodes.get_mut(&inode) {
            node.modified_ns = now;
        }
        Ok(())
    }

    fn gmem_allocate(&mut self, inode: InodeId, first: u64, last: u64) -> Result<(), Errno> {
        let size = self.gmem.inodes.get(&inode).map_or(0, |node| node.size);
        if last * PAGE_SIZE > size && !self.mutant(Mutant::AllocateIgnoresSize) {
            return Err(Errno::EINVAL);
        }
        let mut index = first;
        while index < last {
            if self.mutant(Mutant::AllocateReplaces) {
                self.gmem_truncate(inode, index, index + 1);
            }
            let pfn = self.gmem_get_folio(inode, index, Cpu::Host)?;
            if self.mutant(Mutant::AllocateZeroes) {
                self.make_uptodate(pfn);
            }
            index += self.gmem_block_rest(inode, index);
        }
        Ok(())
    }

    fn gmem_punch(&mut self, inode: InodeId, first: u64, last: u64) -> Result<(), Errno> {
        let size = self.gmem.inodes.get(&inode).map_or(0, |node| node.size_pages());
        if self.mutant(Mutant::PunchChecksSize) && last > size {
            return Err(Errno::EINVAL);
        }
        let last = match () {
            () if self.mutant(Mutant::PunchOnePageShort) => last - 1,
            () if self.mutant(Mutant::PunchOnePageLong) => last + 1,
            () => last,
        };
        if !self.mutant(Mutant::PunchSkipsZap) {
            let filter = self.punch_filter(inode);
            let end = if self.mutant(Mutant::PunchZapsOneLong) { last.saturating_add(1) } else { last };
            let zapped = self.gmem_zap_bindings(inode, first, end, filter, ZapContext::Fallible);
            zapped.map_err(|stuck| stuck.errno)?;
        }
        self.schedule_point(SchedulePoint::PunchUnmapped, &[Lock::Invalidate(inode)]);
        if self.mutant(Mutant::PunchResetsSide)
            && let Some(node) = self.gmem.inodes.get_mut(&inode)
        {
            node.converted.set(first, last.min(size), false);
        }
        let (first, last) = self.gmem_punch_huge(inode, first, last.min(MAX_FILE_SIZE / PAGE_SIZE))?;
        self.gmem_truncate(inode, first, last);
        Ok(())
    }

    /// Whether somebody besides the page cache, the LRU and host page tables holds the folio of a page of the file.
    pub fn gmem_is_pinned(&self, inode: InodeId, index: u64) -> bool {
        self.gmem_lookup(inode, index).is_some_and(|pfn| {
            self.host.frames.holders(pfn).iter().any(|(holder, _)| matches!(holder, Holder::Gup(_) | Holder::Pin(_)))
        })
    }
}
