//! The IOMMU: page tables of its own, through which devices reach memory.
//!
//! Memory comes into a domain in two ways, which differ in who keeps the page there:
//! * by host virtual address ([`World::iommu_map`]), as VFIO and iommufd do it: a long-term pin of every page. The page
//!   cannot go away under the device; a conversion to private finds it held, and a punch frees it from the file only.
//! * by guest_memfd ([`World::iommu_map_gmem`]), the only way where frames have no struct page: no reference at all. The
//!   file tells the IOMMU when pages go, and the IOMMU has to let go of them at once; there is nobody to take an error.
//!
//! The second is in no kernel yet. What the discussion leaves open is settled here like this: only shared pages can be
//! mapped; a conversion in either direction, a punch, a close and a memory failure take the entries out of every domain,
//! before the attribute or the page cache changes; the device meets a fault afterwards, and nothing maps the page again.

use super::super::World;
use super::super::gmem::fault::Access;
use super::super::gmem::{FileId, InodeId};
use super::super::profile::FrameModel;
use super::folio::PIN_BIAS;
use super::{Backing, Cpu, Holder, Pfn, Poisoned};
use crate::machine::{Errno, PAGE_SIZE};
use std::collections::BTreeMap;

/// Identifies a domain: the id of its [`Holder::Iommu`].
pub type DomainId = u64;

/// An entry of a domain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Entry {
    pfn: Pfn,
    /// References that the entry holds.
    refs: u32,
    /// Inode and page index, of an entry that was made by file.
    by_file: Option<(InodeId, u64)>,
}

/// Why a device could not reach memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DmaError {
    /// No entry for the address.
    Fault {
        /// The I/O virtual address.
        iova: u64,
    },
    /// The memory is poisoned.
    Poisoned,
}

impl From<Poisoned> for DmaError {
    fn from(_: Poisoned) -> DmaError {
        DmaError::Poisoned
    }
}

/// The page tables of every domain.
#[derive(Debug, Default)]
pub struct Iommu {
    domains: BTreeMap<DomainId, BTreeMap<u64, Entry>>,
    invalidated: u64,
}

impl Iommu {
    /// Frame behind an I/O virtual address.
    pub fn translate(&self, domain: DomainId, iova: u64) -> Option<Pfn> {
        Some(self.domains.get(&domain)?.get(&(iova / PAGE_SIZE))?.pfn)
    }

    /// Entries of a domain.
    pub fn entries(&self, domain: DomainId) -> usize {
        self.domains.get(&domain).map_or(0, BTreeMap::len)
    }

    /// Entries that were taken out because the file let go of the page.
    pub fn invalidated(&self) -> u64 {
        self.invalidated
    }
}

impl World {
    /// A domain that maps nothing.
    pub fn iommu_domain(&mut self) -> DomainId {
        let id = self.fresh_id();
        self.host.iommu.domains.insert(id, BTreeMap::new());
        id
    }

    /// Page numbers of a range of a domain that is to be mapped.
    fn iommu_range(&self, domain: DomainId, iova: u64, len: u64) -> Result<std::ops::Range<u64>, Errno> {
        let table = self.host.iommu.domains.get(&domain).ok_or(Errno::ENOENT)?;
        let end = iova.checked_add(len).filter(|_| len > 0);
        let aligned = iova.is_multiple_of(PAGE_SIZE) && len.is_multiple_of(PAGE_SIZE);
        let end = end.filter(|_| aligned).ok_or(Errno::EINVAL)?;
        let pages = iova / PAGE_SIZE..end / PAGE_SIZE;
        if table.range(pages.clone()).next().is_some() {
            return Err(Errno::EEXIST);
        }
        Ok(pages)
    }

    /// Maps `len` bytes of the host process at `addr` for devices: every page is faulted in for writing and pinned.
    ///
    /// # Errors
    /// ENOENT (domain), EINVAL (alignment), EEXIST (something is mapped there), EFAULT (a page that cannot be pinned, as one
    /// of a private file, or of any guest_memfd without struct pages); nothing is mapped then.
    pub fn iommu_map(&mut self, domain: DomainId, iova: u64, addr: u64, len: u64) -> Result<(), Errno> {
        let pages = self.iommu_range(domain, iova, len)?;
        if !addr.is_multiple_of(PAGE_SIZE) {
            return Err(Errno::EINVAL);
        }
        for (i, page) in pages.enumerate() {
            if let Err(errno) = self.iommu_pin(domain, page, addr + i as u64 * PAGE_SIZE) {
                self.iommu_unmap(domain, iova, i as u64 * PAGE_SIZE);
                return Err(errno);
            }
        }
        Ok(())
    }

    fn iommu_pin(&mut self, domain: DomainId, page: u64, addr: u64) -> Result<(), Errno> {
        let vma = self.host.mm.vma_at(addr).ok_or(Errno::EFAULT)?;
        if self.profile.frames == FrameModel::PfnMap && matches!(vma.backing, Backing::Gmem { .. }) {
            return Err(Errno::EFAULT);
        }
        let pfn = self.host_translate(addr, Access::Write, Cpu::Host).map_err(|_| Errno::EFAULT)? / PAGE_SIZE;
        let refs = if self.host.frames.extent(pfn).1 > 1 { 1 } else { PIN_BIAS };
        self.host.frames.get(pfn, Holder::Iommu(domain), refs);
        self.iommu_insert(domain, page, Entry { pfn, refs, by_file: None });
        Ok(())
    }

    fn iommu_insert(&mut self, domain: DomainId, page: u64, entry: Entry) {
        if let Some(table) = self.host.iommu.domains.get_mut(&domain) {
            table.insert(page, entry);
        }
    }

    /// Maps `len` bytes of a guest_memfd from `offset` on for devices, without a reference: the file will say when they go.
    ///
    /// # Errors
    /// As [`World::iommu_map`]; EBADF, EINVAL beyond the end of the file, EFAULT for a private page, ENOMEM.
    pub fn iommu_map_gmem(
        &mut self,
        domain: DomainId,
        iova: u64,
        file: FileId,
        offset: u64,
        len: u64,
    ) -> Result<(), Errno> {
        let pages = self.iommu_range(domain, iova, len)?;
        let inode = self.gmem.files.get(&file).ok_or(Errno::EBADF)?.inode;
        let node = &self.gmem.inodes[&inode];
        let first = offset / PAGE_SIZE;
        let last = first + len / PAGE_SIZE;
        if !offset.is_multiple_of(PAGE_SIZE) || last > node.size_pages() {
            return Err(Errno::EINVAL);
        }
        if !node.all_private(first, last, false) {
            return Err(Errno::EFAULT);
        }
        for (index, page) in (first..last).zip(pages) {
            let pfn = match self.gmem_get_folio(inode, index, Cpu::Host) {
                Ok(pfn) => pfn,
                Err(errno) => {
                    self.iommu_unmap(domain, iova, (index - first) * PAGE_SIZE);
                    return Err(errno);
                }
            };
            self.make_uptodate(pfn);
            self.iommu_insert(domain, page, Entry { pfn, refs: 0, by_file: Some((inode, index)) });
        }
        Ok(())
    }

    /// Takes the entries of a range out, and drops their pins; the answer is how many bytes were mapped.
    pub fn iommu_unmap(&mut self, domain: DomainId, iova: u64, len: u64) -> u64 {
        let Some(table) = self.host.iommu.domains.get_mut(&domain) else { return 0 };
        let (first, last) = (iova / PAGE_SIZE, iova.saturating_add(len) / PAGE_SIZE);
        let pages: Vec<u64> = table.range(first..last).map(|(page, _)| *page).collect();
        let gone: Vec<Entry> = pages.iter().filter_map(|page| table.remove(page)).collect();
        for entry in gone.iter().filter(|entry| entry.refs > 0) {
            self.host.put(entry.pfn, Holder::Iommu(domain), entry.refs);
        }
        gone.len() as u64 * PAGE_SIZE
    }

    /// Takes a domain down with everything it maps.
    pub fn iommu_drop_domain(&mut self, domain: DomainId) {
        self.iommu_unmap(domain, 0, u64::MAX);
        self.host.iommu.domains.remove(&domain);
    }

    /// The file lets go of pages `first..last`: entries made by file go from every domain. This cannot fail. Pinned pages
    /// stay where they are, the pin keeps them.
    pub fn iommu_invalidate(&mut self, inode: InodeId, first: u64, last: u64) {
        let inside = |entry: &Entry| entry.by_file.is_some_and(|(of, at)| of == inode && (first..last).contains(&at));
        for table in self.host.iommu.domains.values_mut() {
            let before = table.len();
            table.retain(|_, entry| !inside(entry));
            self.host.iommu.invalidated += (before - table.len()) as u64;
        }
    }

    /// A device writes.
    ///
    /// # Errors
    /// [`DmaError`]; what lies before the failing page is written.
    pub fn dma_write(&mut self, domain: DomainId, iova: u64, data: &[u8]) -> Result<(), DmaError> {
        let mut done = 0;
        while done < data.len() {
            let at = iova + done as u64;
            let n = ((PAGE_SIZE - at % PAGE_SIZE) as usize).min(data.len() - done);
            let pfn = self.host.iommu.translate(domain, at).ok_or(DmaError::Fault { iova: at })?;
            self.write_phys(pfn * PAGE_SIZE + at % PAGE_SIZE, &data[done..done + n])?;
            done += n;
        }
        Ok(())
    }

    /// A device reads.
    ///
    /// # Errors
    /// [`DmaError`].
    pub fn dma_read(&mut self, domain: DomainId, iova: u64, buf: &mut [u8]) -> Result<(), DmaError> {
        let mut done = 0;
        while done < buf.len() {
            let at = iova + done as u64;
            let n = ((PAGE_SIZE - at % PAGE_SIZE) as usize).min(buf.len() - done);
            let pfn = self.host.iommu.translate(domain, at).ok_or(DmaError::Fault { iova: at })?;
            self.read_phys(pfn * PAGE_SIZE + at % PAGE_SIZE, &mut buf[done..done + n])?;
            done += n;
        }
        Ok(())
    }
}
