//! Files: one VM's view of an inode, from KVM_CREATE_GUEST_MEMFD to the last close.

use super::super::host::mm::{PoisonEntries, TASK_SIZE};
use super::super::host::{Backing, Vma};
use super::super::mmu::tdx::unmap::ZapContext;
use super::super::mmu::{SlotKey, VmId, ZapFilter};
use super::super::mutant::Mutant;
use super::super::{ExtentMap, RangeMap, World};
use super::huge::folio_order;
use super::{Inode, InodeId};
use crate::machine::{Errno, PAGE_SIZE, Protection};
use crate::uapi::kvm::GUEST_MEMFD_FLAG_MMAP;

/// Identifies an open file in the model.
pub type FileId = u64;

/// A range of the file that a memslot is bound to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Binding {
    /// The slot.
    pub slot: SlotKey,
    /// First page index.
    pub pgoff: u64,
    /// Pages.
    pub pages: u64,
}

/// An open guest_memfd.
#[derive(Debug)]
pub struct File {
    /// The VM it was created on; the file keeps it alive.
    pub vm: VmId,
    /// The inode.
    pub inode: InodeId,
    /// Open descriptors.
    pub descriptors: u32,
    /// Bindings of memslots.
    pub bindings: Vec<Binding>,
}

/// Where an unmap got stuck.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StuckAt {
    /// Page index of the first page that stays mapped.
    pub index: u64,
    /// What the call returns.
    pub errno: Errno,
}

/// MAX_LFS_FILESIZE on 64-bit.
pub const MAX_FILE_SIZE: u64 = i64::MAX as u64;
const MAP_SYNC: i32 = 0x80000;

impl World {
    /// KVM_CREATE_GUEST_MEMFD.
    ///
    /// # Errors
    /// In the order of the checks: EIO, EINVAL (flags), EINVAL (size).
    pub fn create_guest_memfd(&mut self, vm: VmId, size: u64, flags: u64, reserved: [u64; 6]) -> Result<FileId, Errno> {
        let vm_type = self.live_vm(vm)?.vm_type;
        let negative = (size as i64) <= 0;
        if negative && size != 0 && self.mutant(Mutant::CreateSizeIsEfbig) {
            return Err(Errno::EFBIG);
        }
        if self.mutant(Mutant::CreateChecksReserved) && reserved != [0; 6] {
            return Err(Errno::EINVAL);
        }
        let asked = folio_order(self.profile.kernel, flags, size);
        let flags = asked.map_or(flags, |(_, flags)| flags);
        if flags & !self.profile.kernel.gmem_flags(Some(vm_type)) != 0 && !self.mutant(Mutant::CreateIgnoresFlags) {
            return Err(Errno::EINVAL);
        }
        if negative || (!size.is_multiple_of(PAGE_SIZE) && !self.mutant(Mutant::CreateAcceptsUnaligned)) {
            return Err(Errno::EINVAL);
        }
        let (order, _) = asked?;
        let inode = self.fresh_id();
        let number = if self.mutant(Mutant::InodeNumberReused) { 4000 } else { 4000 + inode };
        let modified_ns = self.now_ns();
        self.gmem.inodes.insert(
            inode,
            Inode {
                number,
                size,
                flags,
                order,
                pages: ExtentMap::default(),
                converted: RangeMap::default(),
                mapped_counts: RangeMap::default(),
                modified_ns,
            },
        );
        let file = self.fresh_id();
        self.gmem.files.insert(file, super::File { vm, inode, descriptors: 1, bindings: Vec::new() });
        Ok(file)
    }

    /// dup(2).
    ///
    /// # Errors
    /// EBADF when the file is gone.
    pub fn gmem_dup(&mut self, file: FileId) -> Result<(), Errno> {
        self.gmem.files.get_mut(&file).ok_or(Errno::EBADF)?.descriptors += 1;
        Ok(())
    }

    /// close(2) of one descriptor.
    pub fn gmem_close(&mut self, file: FileId) {
        if let Some(open) = self.gmem.files.get_mut(&file) {
            open.descriptors -= 1;
        }
        self.gmem_release_if_unused(file);
    }

    /// Releases a file that no descriptor and no VMA holds any more: its slots lose it, its pages go.
    pub fn gmem_release_if_unused(&mut self, file: FileId) {
        let Some(open) = self.gmem.files.get(&file) else { return };
        let mapped = self.host.mm.vmas().any(|vma| matches!(vma.backing, Backing::Gmem { file: of, .. } if of == file));
        if open.descriptors > 0 || (mapped && !self.mutant(Mutant::MappingDropsFile)) {
            return;
        }
        let (vm, inode) = (open.vm, open.inode);
        if let Some(state) = self.vms.get_mut(&vm) {
            state.slots.forget_file(file);
        }
        if !self.mutant(Mutant::CloseSkipsZap) {
            self.gmem_zap_void(inode, 0, u64::MAX);
        }
        self.iommu_invalidate(inode, 0, u64::MAX);
        self.gmem.files.remove(&file);
        self.gmem_truncate(inode, 0, u64::MAX);
        self.gmem.inodes.remove(&inode);
        self.drop_vm_if_unused(vm);
    }

    /// What taking pages out of a file unmaps: private mappings, or shared ones when the file is shared; both once a file
    /// can have pages of both kinds.
    pub fn punch_filter(&self, inode: InodeId) -> ZapFilter {
        let shared = self.gmem.inodes.get(&inode).is_some_and(Inode::is_init_shared);
        match shared {
            _ if self.profile.kernel.converts_in_place() => ZapFilter::Both,
            true => ZapFilter::Shared,
            false => ZapFilter::Private,
        }
    }

    /// Unmaps pages of an inode from every guest, where nobody can take an error.
    pub fn gmem_zap_void(&mut self, inode: InodeId, first: u64, last: u64) {
        let done = self.gmem_zap_bindings(inode, first, last, self.punch_filter(inode), ZapContext::Void);
        debug_assert!(done.is_ok(), "{done:?}");
    }

    /// Makes faults on pages `first..last` of an inode wait, in every guest, and takes the pages away from devices that have no
    /// pin; the answer is for [`World::gmem_invalidate_end`].
    pub fn gmem_invalidate_begin(&mut self, inode: InodeId, first: u64, last: u64) -> Vec<(VmId, u64, u64)> {
        let mut ranges = Vec::new();
        for file in self.gmem.files.values().filter(|file| file.inode == inode) {
            for binding in &file.bindings {
                let (from, to) = (first.max(binding.pgoff), last.min(binding.pgoff.saturating_add(binding.pages)));
                let slot = self.vms.get(&file.vm).and_then(|vm| vm.slots.get(binding.slot));
                if let Some(slot) = slot.filter(|_| from < to) {
                    let gfn = slot.base_gfn + (from - binding.pgoff);
                    ranges.push((file.vm, gfn, gfn + (to - from)));
                }
            }
        }
        self.iommu_invalidate(inode, first, last);
        for (vm, first, last) in &ranges {
            self.invalidate_begin(*vm, *first, *last);
        }
        ranges
    }

    /// Ends what [`World::gmem_invalidate_begin`] began.
    pub fn gmem_invalidate_end(&mut self, ranges: Vec<(VmId, u64, u64)>) {
        for (vm, first, last) in ranges {
            self.invalidate_end(vm, first, last);
        }
    }

    /// Unmaps from every guest the pages `first..last` of an inode, by the bindings of its files.
    ///
    /// # Errors
    /// The first page that stays mapped, under a policy that reports it or when a huge mapping cannot be split.
    pub fn gmem_zap_bindings(
        &mut self,
        inode: InodeId,
        first: u64,
        last: u64,
        filter: ZapFilter,
        context: ZapContext,
    ) -> Result<(), StuckAt> {
        let bindings: Vec<(VmId, Binding)> = self
            .gmem
            .files
            .values()
            .filter(|file| file.inode == inode)
            .flat_map(|file| file.bindings.iter().map(|binding| (file.vm, *binding)))
            .collect();
        for (vm, binding) in bindings {
            let (from, to) = (first.max(binding.pgoff), last.min(binding.pgoff.saturating_add(binding.pages)));
            let Some(slot) = self.vms.get(&vm).and_then(|vm| vm.slots.get(binding.slot)) else { continue };
            if from < to {
                let base_gfn = slot.base_gfn;
                let gfn = base_gfn + (from - binding.pgoff);
                self.zap_gfns(vm, gfn, gfn + (to - from), filter, context).map_err(|error| StuckAt {
                    index: binding.pgoff + (error.gfn.max(gfn) - base_gfn),
                    errno: if self.mutant(Mutant::FailUnmapSaysEagain) { Errno::EAGAIN } else { error.errno },
                })?;
            }
        }
        Ok(())
    }

    /// Unmaps pages `first..last` of an inode from the host's page tables.
    pub fn gmem_unmap_host(&mut self, inode: InodeId, first: u64, last: u64) {
        let vmas: Vec<Vma> = self.host.mm.vmas().copied().collect();
        for vma in vmas {
            let Backing::Gmem { file, pgoff } = vma.backing else { continue };
            if self.gmem.files.get(&file).map(|open| open.inode) != Some(inode) {
                continue;
            }
            let pages = (vma.end - vma.start) / PAGE_SIZE;
            let (from, to) = (first.max(pgoff), last.min(pgoff.saturating_add(pages)));
            if from < to {
                let start = vma.start + (from - pgoff) * PAGE_SIZE;
                self.unmap_host_range(start, start + (to - from) * PAGE_SIZE, PoisonEntries::Keep);
            }
        }
    }

    /// mmap(2) of a guest_memfd: the address of the first byte.
    ///
    /// # Errors
    /// In the order of the checks: EINVAL (offset, MAP_HUGETLB, length 0), ENOMEM (no room), EOVERFLOW, EOPNOTSUPP, EPERM,
    /// ENODEV, EINVAL (MAP_PRIVATE).
    pub fn gmem_mmap(&mut self, file: FileId, len: u64, offset: u64, protection: Protection) -> Result<u64, Errno> {
        let node = self.gmem.inode_of(file).ok_or(Errno::EBADF)?;
        let can_map = node.flags & GUEST_MEMFD_FLAG_MMAP != 0 || self.mutant(Mutant::MmapIgnoresFlag);
        let huge = protection.flags & libc::MAP_HUGETLB != 0;
        if !offset.is_multiple_of(PAGE_SIZE) || huge || len == 0 {
            return Err(Errno::EINVAL);
        }
        let len = len.checked_next_multiple_of(PAGE_SIZE).ok_or(Errno::ENOMEM)?;
        if len > TASK_SIZE {
            return Err(Errno::ENOMEM);
        }
        if offset.checked_add(len).is_none_or(|end| end > MAX_FILE_SIZE) {
            return Err(Errno::EOVERFLOW);
        }
        let kind = protection.flags & libc::MAP_TYPE;
        if kind == libc::MAP_SHARED_VALIDATE && protection.flags & MAP_SYNC != 0 {
            return Err(Errno::EOPNOTSUPP);
        }
        if ![libc::MAP_SHARED, libc::MAP_SHARED_VALIDATE, libc::MAP_PRIVATE].contains(&kind) {
            return Err(Errno::EINVAL);
        }
        if protection.prot & libc::PROT_EXEC != 0 && self.profile.kernel.gmem_is_noexec() {
            return Err(Errno::EPERM);
        }
        if !can_map {
            return Err(Errno::ENODEV);
        }
        if kind == libc::MAP_PRIVATE && !self.mutant(Mutant::MmapAcceptsPrivate) {
            return Err(Errno::EINVAL);
        }
        let start = self.host.mm.place(len, 2 << 20).ok_or(Errno::ENOMEM)?;
        let backing = Backing::Gmem { file, pgoff: offset / PAGE_SIZE };
        let locked = protection.flags & libc::MAP_LOCKED != 0;
        self.host.mm.insert(Vma { start, end: start + len, prot: protection.prot, backing, locked });
        if protection.flags & (libc::MAP_LOCKED | libc::MAP_POPULATE) != 0 {
            self.populate_quietly(start, start + len, protection.prot);
        }
        Ok(start)
    }
}
