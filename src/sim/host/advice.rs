//! madvise(2).

use super::super::World;
use super::super::gmem::fault::Access;
use super::super::mutant::Mutant;
use super::mm::PoisonEntries;
use super::{AccessError, Backing, Cpu, Vma};
use crate::machine::{Errno, PAGE_SIZE};
use libc::{
    FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, MADV_COLD, MADV_DODUMP, MADV_DOFORK, MADV_DONTDUMP, MADV_DONTFORK,
    MADV_DONTNEED, MADV_FREE, MADV_HUGEPAGE, MADV_HWPOISON, MADV_KEEPONFORK, MADV_MERGEABLE, MADV_NOHUGEPAGE,
    MADV_NORMAL, MADV_PAGEOUT, MADV_POPULATE_READ, MADV_POPULATE_WRITE, MADV_RANDOM, MADV_REMOVE, MADV_SEQUENTIAL,
    MADV_SOFT_OFFLINE, MADV_UNMERGEABLE, MADV_WILLNEED, MADV_WIPEONFORK,
};

/// MADV_DONTNEED_LOCKED, 5.18.
const MADV_DONTNEED_LOCKED: i32 = 24;
/// MADV_COLLAPSE, 6.1.
const MADV_COLLAPSE: i32 = 25;

impl World {
    /// madvise(2) of a range.
    ///
    /// # Errors
    /// EINVAL (alignment, advice, advice for this memory), ENOMEM (a hole), and those of MADV_POPULATE_* and
    /// MADV_HWPOISON.
    pub fn advise(&mut self, start: u64, len: u64, advice: i32) -> Result<(), Errno> {
        let known = matches!(
            advice,
            MADV_NORMAL..=MADV_WILLNEED
                | MADV_DONTNEED
                | MADV_FREE..=MADV_DOFORK
                | MADV_MERGEABLE..=MADV_COLLAPSE
                | MADV_HWPOISON
                | MADV_SOFT_OFFLINE
        );
        if !known {
            return Err(Errno::EINVAL);
        }
        let end = self.host_range(start, len)?;
        if start == end {
            return Ok(());
        }
        match advice {
            MADV_HWPOISON | MADV_SOFT_OFFLINE => return self.advise_poison(start, end, advice),
            MADV_POPULATE_READ => return self.populate(start, end, Access::Read),
            MADV_POPULATE_WRITE => return self.populate(start, end, Access::Write),
            _ => {}
        }
        for part in self.host.mm.parts(start, end) {
            self.advise_part(&part, advice)?;
        }
        if self.host.mm.covers(start, end) { Ok(()) } else { Err(Errno::ENOMEM) }
    }

    fn advise_part(&mut self, vma: &Vma, advice: i32) -> Result<(), Errno> {
        let anonymous = !vma.is_shared();
        match advice {
            MADV_DONTNEED if vma.locked => Err(Errno::EINVAL),
            MADV_DONTNEED | MADV_DONTNEED_LOCKED => {
                self.unmap_host_range(vma.start, vma.end, PoisonEntries::Drop);
                if self.mutant(Mutant::DontneedFrees) {
                    self.remove_pages(vma)?;
                }
                Ok(())
            }
            MADV_REMOVE if vma.locked || anonymous => Err(Errno::EINVAL),
            MADV_REMOVE => self.remove_pages(vma),
            MADV_FREE | MADV_WIPEONFORK if !anonymous => Err(Errno::EINVAL),
            MADV_FREE => {
                self.drain_local_lru();
                Ok(())
            }
            MADV_COLLAPSE if !matches!(vma.backing, Backing::TransparentHuge) => Err(Errno::EINVAL),
            MADV_COLD | MADV_PAGEOUT => {
                self.drain_local_lru();
                Ok(())
            }
            MADV_RANDOM | MADV_SEQUENTIAL | MADV_NORMAL | MADV_WILLNEED | MADV_DONTFORK | MADV_DOFORK
            | MADV_MERGEABLE | MADV_UNMERGEABLE | MADV_HUGEPAGE | MADV_NOHUGEPAGE | MADV_DONTDUMP | MADV_DODUMP
            | MADV_WIPEONFORK | MADV_KEEPONFORK | MADV_COLLAPSE => Ok(()),
            _ => Err(Errno::EINVAL),
        }
    }

    /// Punches the range of the file or object behind a VMA.
    fn remove_pages(&mut self, vma: &Vma) -> Result<(), Errno> {
        let pages = (vma.end - vma.start) / PAGE_SIZE;
        match vma.backing {
            Backing::Gmem { file, pgoff } => self.gmem_fallocate(
                file,
                FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                (pgoff * PAGE_SIZE) as i64,
                (pages * PAGE_SIZE) as i64,
            ),
            Backing::Shmem { object, pgoff } => {
                self.unmap_host_range(vma.start, vma.end, PoisonEntries::Drop);
                self.free_shmem(object, pgoff, pgoff + pages);
                Ok(())
            }
            Backing::Anonymous | Backing::TransparentHuge => Err(Errno::EINVAL),
        }
    }

    fn populate(&mut self, start: u64, end: u64, access: Access) -> Result<(), Errno> {
        if !self.host.mm.covers(start, end) {
            return Err(Errno::ENOMEM);
        }
        for addr in (start..end).step_by(PAGE_SIZE as usize) {
            self.host_fault(addr, access, Cpu::Host).map_err(|error| match error {
                AccessError::Poisoned => Errno::EHWPOISON,
                AccessError::Forbidden => Errno::EINVAL,
                AccessError::OutOfMemory => Errno::ENOMEM,
                AccessError::NoMapping | AccessError::Bus => Errno::EFAULT,
            })?;
        }
        Ok(())
    }

    /// mm_populate(): what MAP_POPULATE and MAP_LOCKED fault in, up to the first page that cannot be.
    pub fn populate_quietly(&mut self, start: u64, end: u64, prot: i32) {
        let access = if prot & libc::PROT_WRITE != 0 { Access::Write } else { Access::Read };
        // The call that asked for it does not fail with it.
        let _ = self.populate(start, end, access);
    }

    fn advise_poison(&mut self, start: u64, end: u64, advice: i32) -> Result<(), Errno> {
        for addr in (start..end).step_by(PAGE_SIZE as usize) {
            let pa = self.host_translate(addr, Access::Read, Cpu::Host).map_err(|error| match error {
                AccessError::Poisoned => Errno::EHWPOISON,
                _ => Errno::EFAULT,
            })?;
            if advice == MADV_SOFT_OFFLINE {
                return Err(Errno::EBUSY);
            }
            self.memory_failure(pa / PAGE_SIZE)?;
        }
        Ok(())
    }
}
