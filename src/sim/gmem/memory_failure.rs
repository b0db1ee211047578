//! memory_failure() on a page of a guest_memfd.

use super::super::World;
use super::super::host::{Flags, Holder, Pfn};
use super::super::mutant::Mutant;
use crate::machine::{Errno, PAGE_SIZE};

impl World {
    /// Poisons a frame: guests and host lose their mappings, the page stays in the file, a reference is never dropped.
    ///
    /// # Errors
    /// EBUSY, which is what memory_failure() makes of guest_memfd's MF_DELAYED although the page is poisoned.
    pub fn memory_failure(&mut self, pfn: Pfn) -> Result<(), Errno> {
        let Some((inode, first)) = self.host.frames.folio(pfn).and_then(|folio| folio.mapping) else {
            return Err(Errno::EIO);
        };
        if self.host.frames.flags(pfn).contains(Flags::HWPOISON) {
            return Err(Errno::EHWPOISON);
        }
        let (head, pages) = self.host.frames.extent(pfn);
        if !self.mutant(Mutant::MemoryFailureTakesNoReference) {
            self.host.frames.get(head, Holder::MemoryFailure, 1);
        }
        if !self.mutant(Mutant::PoisonFlagLost) {
            self.host.frames.set_flags(head, Flags::HWPOISON);
        }
        self.poison_host_entries(inode, first, first + pages);
        self.iommu_invalidate(inode, first, first + pages);
        if !self.mutant(Mutant::MemoryFailureKeepsGuestMapping) {
            self.gmem_zap_void(inode, first, first + pages);
        }
        Err(Errno::EBUSY)
    }

    /// Replaces the host's entries for pages of an inode by hwpoison entries.
    fn poison_host_entries(&mut self, inode: u64, first: u64, last: u64) {
        let mut addresses = Vec::new();
        for vma in self.host.mm.vmas() {
            let super::super::host::Backing::Gmem { file, pgoff } = vma.backing else { continue };
            if self.gmem.files.get(&file).map(|open| open.inode) != Some(inode) {
                continue;
            }
            let pages = (vma.end - vma.start) / PAGE_SIZE;
            for index in first.max(pgoff)..last.min(pgoff + pages) {
                addresses.push(vma.start + (index - pgoff) * PAGE_SIZE);
            }
        }
        for addr in addresses {
            if let Some(pte) = self.host.mm.pte(addr).filter(|pte| !pte.poisoned) {
                self.unmap_host_range(addr, addr + PAGE_SIZE, super::super::host::mm::PoisonEntries::Drop);
                self.host.mm.set_pte(addr, super::super::host::Pte { poisoned: true, ..pte });
            }
        }
    }
}
