//! The host's memory management as far as guest_memfd and KVM lean on it.
//!
//! [`folio`] has the page frames and who holds them, [`allocator`] hands frames out and takes them back (last in, first
//! out, because reuse of a frame is what a failed unmap makes dangerous), [`content`] has the bytes, [`lru`] the per-CPU
//! batches that hide a reference, [`iommu`] the page tables of devices, [`vma`] and [`mm`] the address space of the host process, `access` and `advice` its page
//! faults and system calls. [`HostState`] is all of it.

mod access;
mod advice;
pub mod allocator;
pub mod content;
pub mod folio;
mod frame_table;
pub mod iommu;
pub mod lru;
pub mod mm;
pub mod phys;
pub mod vma;

pub use access::Locking;
pub use allocator::{Allocator, Order, Pool};
pub use content::Contents;
pub use folio::{Flags, Folio, FolioRef, Frames, Holder};
pub use iommu::Iommu;
pub use lru::{Cpu, LruBatches};
pub use mm::{AccessError, AddressSpace};
pub use phys::Poisoned;
pub use vma::{Backing, Pte, Vma};

use crate::machine::Errno;

/// A page frame number.
pub type Pfn = u64;

/// Frames, their contents, the allocator and the LRU batches.
#[derive(Debug, Default)]
pub struct HostState {
    /// Which folio a frame belongs to and who holds it.
    pub frames: Frames,
    /// What is in the frames.
    pub contents: Contents,
    /// Free frames.
    pub allocator: Allocator,
    /// References that the LRU batches hold.
    pub lru: LruBatches,
    /// Page tables of devices.
    pub iommu: Iommu,
    /// Address space of the host process.
    pub mm: AddressSpace,
}

impl HostState {
    /// Allocates a folio that `holder` holds once; its contents are what the frames last held.
    ///
    /// # Errors
    /// ENOMEM, or the errno that was scripted with [`Allocator::fail_next`].
    pub fn alloc_folio(&mut self, order: Order, holder: Holder) -> Result<Pfn, Errno> {
        let pfn = self.allocator.take(order)?;
        self.frames.insert(pfn, order, holder);
        Ok(pfn)
    }

    /// Drops `n` references of `holder` to the folio of `pfn`, and frees it with the last one.
    pub fn put(&mut self, pfn: Pfn, holder: Holder, n: u32) {
        if let Some((head, folio)) = self.frames.put(pfn, holder, n) {
            self.release(head, &folio);
        }
    }

    /// Drops the page cache's reference, the only one, to each of `pages` base pages from `pfn` on.
    pub fn drop_quiet_run(&mut self, pfn: Pfn, pages: u64) {
        self.frames.drop_quiet_run(pfn, pages);
        self.allocator.give_back_pages(pfn, pages);
    }

    fn release(&mut self, head: Pfn, folio: &Folio) {
        if folio.flags.contains(Flags::HWPOISON) {
            self.allocator.retire(head, folio.order);
        } else {
            self.allocator.give_back(head, folio.order);
        }
    }

    /// Queues a new page-cache or anonymous folio for the LRU: the batch of `cpu` holds a reference until it is drained,
    /// which happens at once when the folio fills the batch (folio_add_lru).
    pub fn lru_add(&mut self, cpu: Cpu, pfn: Pfn) {
        self.frames.get(pfn, Holder::LruBatch, 1);
        if self.lru.add(cpu, self.frames.head_of(pfn)) {
            self.drain_lru(cpu);
        }
    }

    /// lru_add_drain on one CPU.
    pub fn drain_lru(&mut self, cpu: Cpu) {
        for pfn in self.lru.take(cpu) {
            self.frames.set_flags(pfn, Flags::LRU);
            self.put(pfn, Holder::LruBatch, 1);
        }
    }

    /// lru_add_drain_all: every CPU.
    pub fn drain_all_lru(&mut self) {
        for cpu in Cpu::ALL {
            self.drain_lru(cpu);
        }
    }

    /// Host frames that somebody holds, in pages.
    pub fn pages_in_use(&self) -> u64 {
        self.frames.pages()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::PAGE_SIZE;

    #[test]
    fn a_fresh_folio_has_one_reference_and_the_lru_batch_hides_another() {
        let mut host = HostState::default();
        let pfn = host.alloc_folio(Order::Base, Holder::PageCache).unwrap();
        host.lru_add(Cpu::Host, pfn);
        assert_eq!(host.frames.refs(pfn), 2);
        host.drain_lru(Cpu::Guest);
        assert_eq!(host.frames.refs(pfn), 2, "another CPU's batch is not drained");
        host.drain_all_lru();
        assert_eq!(host.frames.refs(pfn), 1);
        assert!(host.frames.flags(pfn).contains(Flags::LRU));
    }

    #[test]
    fn the_thirty_first_folio_drains_its_batch() {
        let mut host = HostState::default();
        let pfns: Vec<Pfn> = (0..31)
            .map(|_| {
                let pfn = host.alloc_folio(Order::Base, Holder::PageCache).unwrap();
                host.lru_add(Cpu::Host, pfn);
                pfn
            })
            .collect();
        assert!(pfns.iter().all(|pfn| host.frames.refs(*pfn) == 1));
    }

    #[test]
    fn a_freed_frame_is_the_next_one_handed_out_with_its_old_contents() {
        let mut host = HostState::default();
        let pfn = host.alloc_folio(Order::Base, Holder::PageCache).unwrap();
        host.contents.write(pfn * PAGE_SIZE + 5, b"left over");
        host.put(pfn, Holder::PageCache, 1);
        let again = host.alloc_folio(Order::Base, Holder::PageCache).unwrap();
        assert_eq!(again, pfn);
        let mut found = [0; 9];
        host.contents.read(again * PAGE_SIZE + 5, &mut found);
        assert_eq!(&found, b"left over");
    }

    #[test]
    fn a_poisoned_frame_never_comes_back() {
        let mut host = HostState::default();
        let pfn = host.alloc_folio(Order::Base, Holder::PageCache).unwrap();
        host.frames.set_flags(pfn, Flags::HWPOISON);
        host.put(pfn, Holder::PageCache, 1);
        assert_ne!(host.alloc_folio(Order::Base, Holder::PageCache).unwrap(), pfn);
        assert_eq!(host.allocator.retired(), 1);
    }
}
