//! Accesses of the host process: page faults, system calls on mappings, and references to pages of mappings.

use super::super::World;
use super::super::gmem::fault::Access;
use super::super::mutant::Mutant;
use super::super::profile::FrameModel;
use super::folio::PIN_BIAS;
use super::mm::PoisonEntries;
use super::{AccessError, Backing, Cpu, Flags, Holder, Order, Pfn, Pte, Vma};
use crate::machine::{Errno, HoldKind, HostMemory, PAGE_SIZE};

const HUGE: u64 = 2 << 20;

impl World {
    /// The page-table entry for an access, faulted in when it is not there.
    ///
    /// # Errors
    /// [`AccessError`].
    pub fn host_fault(&mut self, addr: u64, access: Access, cpu: Cpu) -> Result<Pte, AccessError> {
        let vma = *self.host.mm.vma_at(addr).ok_or(AccessError::NoMapping)?;
        let needed = if access == Access::Write { libc::PROT_WRITE } else { libc::PROT_READ | libc::PROT_WRITE };
        if vma.prot & needed == 0 {
            return Err(AccessError::Forbidden);
        }
        if self.host.mm.pte(addr).is_none() {
            self.host_fault_in(&vma, addr, access, cpu)?;
        }
        let pte = self.host.mm.pte(addr).ok_or(AccessError::Bus)?;
        if pte.poisoned {
            return Err(AccessError::Poisoned);
        }
        if access == Access::Write {
            self.host.mm.dirty_pte(addr);
        }
        Ok(pte)
    }

    fn host_fault_in(&mut self, vma: &Vma, addr: u64, access: Access, cpu: Cpu) -> Result<(), AccessError> {
        let index = vma.index_of(addr);
        let page = addr & !(PAGE_SIZE - 1);
        let pfn = match vma.backing {
            Backing::Gmem { file, .. } => self.gmem_host_fault(file, index, access, cpu)?,
            Backing::Shmem { object, .. } => match self.host.mm.shmem_page(object, index) {
                Some(pfn) => pfn,
                None => {
                    let pfn = self.fresh_page(Order::Base, Holder::PageCache)?;
                    self.host.mm.set_shmem_page(object, index, pfn);
                    self.host.lru_add(cpu, pfn);
                    pfn
                }
            },
            Backing::TransparentHuge if self.huge_fits(vma, addr) => {
                return self.map_anonymous(addr & !(HUGE - 1), Order::Pmd, cpu);
            }
            Backing::Anonymous | Backing::TransparentHuge => return self.map_anonymous(page, Order::Base, cpu),
        };
        self.host.map_pte(page, Pte { pfn, order: Order::Base, dirty: false, poisoned: false });
        Ok(())
    }

    fn fresh_page(&mut self, order: Order, holder: Holder) -> Result<Pfn, AccessError> {
        let pfn = self.alloc_folio(order, holder).map_err(|_| AccessError::OutOfMemory)?;
        self.zero_folio(pfn);
        self.host.frames.set_flags(pfn, Flags::UPTODATE);
        Ok(pfn)
    }

    fn map_anonymous(&mut self, addr: u64, order: Order, cpu: Cpu) -> Result<(), AccessError> {
        let pfn = self.fresh_page(order, Holder::Lookup)?;
        self.host.map_pte(addr, Pte { pfn, order, dirty: false, poisoned: false });
        self.host.lru_add(cpu, pfn);
        self.host.put(pfn, Holder::Lookup, 1);
        Ok(())
    }

    /// Whether a huge page can be mapped at an address: the block lies in the VMA and nothing is mapped in it.
    fn huge_fits(&self, vma: &Vma, addr: u64) -> bool {
        let block = addr & !(HUGE - 1);
        let free = |page: u64| self.host.mm.pte(page).is_none();
        block >= vma.start && block + HUGE <= vma.end && (block..block + HUGE).step_by(PAGE_SIZE as usize).all(free)
    }

    /// Physical address of a byte of a mapping, for an access.
    ///
    /// # Errors
    /// [`AccessError`].
    pub fn host_translate(&mut self, addr: u64, access: Access, cpu: Cpu) -> Result<u64, AccessError> {
        let pte = self.host_fault(addr, access, cpu)?;
        Ok(pte.pfn * PAGE_SIZE + addr % (pte.order.pages() * PAGE_SIZE))
    }

    /// mmap(2) of memory that is not a guest_memfd.
    ///
    /// # Errors
    /// EINVAL for length 0, ENOMEM.
    pub fn map_host_memory(&mut self, kind: HostMemory, len: u64) -> Result<u64, Errno> {
        if len == 0 {
            return Err(Errno::EINVAL);
        }
        let len = len.checked_next_multiple_of(PAGE_SIZE).ok_or(Errno::ENOMEM)?;
        let start = self.host.mm.place(len, HUGE).ok_or(Errno::ENOMEM)?;
        let read_write = libc::PROT_READ | libc::PROT_WRITE;
        let (backing, prot) = match kind {
            HostMemory::Anonymous => (Backing::Anonymous, read_write),
            HostMemory::TransparentHuge => (Backing::TransparentHuge, read_write),
            HostMemory::Shmem => (Backing::Shmem { object: self.fresh_id(), pgoff: 0 }, read_write),
            HostMemory::NoAccess => (Backing::Anonymous, libc::PROT_NONE),
        };
        self.host.mm.insert(Vma { start, end: start + len, prot, backing, locked: false });
        Ok(start)
    }

    /// munmap(2).
    pub fn unmap_host(&mut self, start: u64, end: u64) {
        self.unmap_host_range(start, end, PoisonEntries::Drop);
        let gone = self.host.mm.change(start, end, |_| None);
        for vma in gone {
            if let Backing::Gmem { file, .. } = vma.backing {
                self.gmem_release_if_unused(file);
            }
        }
        for object in self.host.mm.orphans() {
            self.free_shmem(object, 0, u64::MAX);
            self.host.mm.forget_shmem(object);
        }
    }

    /// Frees pages of a shmem object.
    pub fn free_shmem(&mut self, object: u64, first: u64, last: u64) {
        for pfn in self.host.mm.take_shmem_pages(object, first, last) {
            self.host.put(pfn, Holder::PageCache, 1);
        }
    }

    /// mprotect(2).
    ///
    /// # Errors
    /// EINVAL (alignment), ENOMEM (a hole), EACCES (PROT_EXEC on a guest_memfd).
    pub fn protect_host(&mut self, start: u64, len: u64, prot: i32) -> Result<(), Errno> {
        let end = self.host_range(start, len)?;
        if !self.host.mm.covers(start, end) {
            return Err(Errno::ENOMEM);
        }
        let is_gmem = |vma: &Vma| matches!(vma.backing, Backing::Gmem { .. });
        if prot & libc::PROT_EXEC != 0 && self.host.mm.parts(start, end).iter().any(is_gmem) {
            return Err(Errno::EACCES);
        }
        self.host.mm.change(start, end, |vma| Some(Vma { prot, ..vma }));
        if prot & libc::PROT_WRITE == 0 {
            self.notify_guests(start, end);
        }
        Ok(())
    }

    /// One past the last byte of a page-aligned range of a system call.
    ///
    /// # Errors
    /// EINVAL.
    pub fn host_range(&self, start: u64, len: u64) -> Result<u64, Errno> {
        if !start.is_multiple_of(PAGE_SIZE) {
            return Err(Errno::EINVAL);
        }
        let len = len.checked_next_multiple_of(PAGE_SIZE).ok_or(Errno::EINVAL)?;
        start.checked_add(len).ok_or(Errno::EINVAL)
    }

    /// mlock(2) or munlock(2).
    ///
    /// # Errors
    /// ENOMEM for a hole, or a page that cannot be faulted in; the VMA stays locked then.
    pub fn lock_host(&mut self, start: u64, len: u64, lock: Locking) -> Result<(), Errno> {
        let start = start & !(PAGE_SIZE - 1);
        let end = self.host_range(start, len)?;
        self.drain_local_lru();
        if !self.host.mm.covers(start, end) {
            return Err(Errno::ENOMEM);
        }
        self.host.mm.change(start, end, |vma| Some(Vma { locked: lock == Locking::Lock, ..vma }));
        if lock == Locking::Unlock {
            return Ok(());
        }
        for addr in (start..end).step_by(PAGE_SIZE as usize) {
            let vma = self.host.mm.vma_at(addr).copied();
            let write = vma.is_some_and(|vma| vma.prot & libc::PROT_WRITE != 0 && !vma.is_shared());
            let access = if write { Access::Write } else { Access::Read };
            self.host_fault(addr, access, Cpu::Host).map_err(|_| Errno::ENOMEM)?;
        }
        Ok(())
    }

    /// mincore(2): a page is there when it is mapped, or cached and up to date.
    ///
    /// # Errors
    /// EINVAL, ENOMEM for a hole.
    pub fn resident(&self, start: u64, len: u64) -> Result<Vec<bool>, Errno> {
        let end = self.host_range(start, len)?;
        if !self.host.mm.covers(start, end) {
            return Err(Errno::ENOMEM);
        }
        let page = |addr: u64| {
            let vma = self.host.mm.vma_at(addr)?;
            match vma.backing {
                Backing::Gmem { file, .. } => {
                    let inode = self.gmem.files.get(&file)?.inode;
                    let pfn = self.gmem_lookup(inode, vma.index_of(addr))?;
                    let uptodate = self.host.frames.flags(pfn).contains(Flags::UPTODATE);
                    (uptodate || self.mutant(Mutant::MincoreIgnoresUptodate)).then_some(())
                }
                Backing::Shmem { object, .. } => self.host.mm.shmem_page(object, vma.index_of(addr)).map(|_| ()),
                Backing::Anonymous | Backing::TransparentHuge => self.host.mm.pte(addr).map(|_| ()),
            }
        };
        Ok((start..end).step_by(PAGE_SIZE as usize).map(|addr| page(addr).is_some()).collect())
    }

    /// GUP of every page of a range: the frames that were taken, to be given to [`World::release_hold`].
    ///
    /// # Errors
    /// EFAULT; nothing is held then.
    pub fn hold(&mut self, id: u64, start: u64, len: u64, kind: HoldKind) -> Result<Vec<Pfn>, Errno> {
        let mut frames = Vec::new();
        let end = start.checked_add(len).ok_or(Errno::EFAULT)?;
        let mut addr = start & !(PAGE_SIZE - 1);
        while addr < end {
            let vma = self.host.mm.vma_at(addr);
            let pfnmap = self.profile.frames == FrameModel::PfnMap;
            if pfnmap && vma.is_some_and(|vma| matches!(vma.backing, Backing::Gmem { .. })) {
                self.release_hold(id, &frames, kind);
                return Err(Errno::EFAULT);
            }
            let access = if kind == HoldKind::Pin { Access::Write } else { Access::Read };
            match self.host_translate(addr, access, Cpu::Host) {
                Ok(pa) => {
                    let pfn = pa / PAGE_SIZE;
                    let (holder, refs) = self.hold_refs(id, pfn, kind);
                    self.host.frames.get(pfn, holder, refs);
                    frames.push(pfn);
                }
                Err(_) => {
                    self.release_hold(id, &frames, kind);
                    return Err(Errno::EFAULT);
                }
            }
            addr += PAGE_SIZE;
        }
        Ok(frames)
    }

    fn hold_refs(&self, id: u64, pfn: Pfn, kind: HoldKind) -> (Holder, u32) {
        match kind {
            HoldKind::Get if self.mutant(Mutant::GetTakesTwo) => (Holder::Gup(id), 2),
            HoldKind::Get => (Holder::Gup(id), 1),
            HoldKind::Pin if self.mutant(Mutant::PinCountsOne) => (Holder::Pin(id), 1),
            HoldKind::Pin if self.host.frames.extent(pfn).1 > 1 => (Holder::Pin(id), 1),
            HoldKind::Pin => (Holder::Pin(id), PIN_BIAS),
        }
    }

    /// Drops what [`World::hold`] took.
    pub fn release_hold(&mut self, id: u64, frames: &[Pfn], kind: HoldKind) {
        for pfn in frames {
            let (holder, refs) = self.hold_refs(id, *pfn, kind);
            if self.mutant(Mutant::UnpinDropsTwice) && self.host.frames.refs(*pfn) > refs {
                self.host.put(*pfn, Holder::PageCache, 1);
            }
            self.host.put(*pfn, holder, refs);
        }
    }
}

/// Whether a range is locked or unlocked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Locking {
    /// mlock(2).
    Lock,
    /// munlock(2).
    Unlock,
}
