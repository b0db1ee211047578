//! The address space of the host process: VMAs and what their page-table entries map.

use super::{Backing, Flags, Holder, HostState, Order, Pte, Vma};
use crate::machine::PAGE_SIZE;
use std::collections::{BTreeMap, BTreeSet, HashMap};

/// Where mappings are placed first; addresses are never used twice.
const MMAP_BASE: u64 = 0x7f00_0000_0000 - (1 << 46);
/// One past the last address of user space with four-level page tables (TASK_SIZE_MAX).
pub const TASK_SIZE: u64 = 0x7fff_ffff_f000;

/// Why an access of the host process did not work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AccessError {
    /// No VMA: SIGSEGV, SEGV_MAPERR.
    NoMapping,
    /// The VMA's protection forbids it: SIGSEGV, SEGV_ACCERR.
    Forbidden,
    /// The fault handler said VM_FAULT_SIGBUS: BUS_ADRERR.
    Bus,
    /// The page is poisoned: BUS_MCEERR_AR.
    Poisoned,
    /// No memory.
    OutOfMemory,
}

/// VMAs and page tables.
#[derive(Debug)]
pub struct AddressSpace {
    vmas: BTreeMap<u64, Vma>,
    ptes: BTreeMap<u64, Pte>,
    shmem: HashMap<u64, BTreeMap<u64, u64>>,
    next: u64,
}

impl Default for AddressSpace {
    fn default() -> AddressSpace {
        AddressSpace { vmas: BTreeMap::new(), ptes: BTreeMap::new(), shmem: HashMap::new(), next: MMAP_BASE }
    }
}

impl AddressSpace {
    /// Finds room for `len` bytes at an alignment; a page is left free on either side.
    pub fn place(&mut self, len: u64, align: u64) -> Option<u64> {
        let start = self.next.next_multiple_of(align);
        let end = start.checked_add(len)?.checked_add(PAGE_SIZE)?;
        if end > TASK_SIZE {
            return None;
        }
        self.next = end;
        Some(start)
    }

    /// Puts a VMA in.
    pub fn insert(&mut self, vma: Vma) {
        if let Backing::Shmem { object, .. } = vma.backing {
            self.shmem.entry(object).or_default();
        }
        self.vmas.insert(vma.start, vma);
    }

    /// The VMA of an address.
    pub fn vma_at(&self, addr: u64) -> Option<&Vma> {
        self.vmas.range(..=addr).next_back().map(|(_, vma)| vma).filter(|vma| addr < vma.end)
    }

    /// Every VMA.
    pub fn vmas(&self) -> impl Iterator<Item = &Vma> {
        self.vmas.values()
    }

    /// The parts of VMAs that lie in a range.
    pub fn parts(&self, start: u64, end: u64) -> Vec<Vma> {
        let first = self.vma_at(start).map_or(start, |vma| vma.start);
        let inside = |vma: &Vma| (vma.start.max(start), vma.end.min(end));
        self.vmas
            .range(first..end)
            .map(|(_, vma)| (vma, inside(vma)))
            .filter(|(_, (from, to))| from < to)
            .map(|(vma, (from, to))| vma.part(from, to))
            .collect()
    }

    /// Whether VMAs cover a range without a gap.
    pub fn covers(&self, start: u64, end: u64) -> bool {
        let mut at = start;
        for vma in self.parts(start, end) {
            if vma.start != at {
                return false;
            }
            at = vma.end;
        }
        at >= end
    }

    /// Splits VMAs at the ends of a range, takes out the parts inside and puts back what `change` makes of each.
    pub fn change(&mut self, start: u64, end: u64, mut change: impl FnMut(Vma) -> Option<Vma>) -> Vec<Vma> {
        let inside = self.parts(start, end);
        for part in &inside {
            let whole = *self.vma_at(part.start).expect("a part has a VMA");
            self.vmas.remove(&whole.start);
            for rest in [(whole.start, part.start), (part.end, whole.end)] {
                if rest.0 < rest.1 {
                    self.vmas.insert(rest.0, whole.part(rest.0, rest.1));
                }
            }
            if let Some(new) = change(*part) {
                self.vmas.insert(new.start, new);
            }
        }
        inside
    }

    /// The entry that maps an address, if any.
    pub fn pte(&self, addr: u64) -> Option<Pte> {
        self.ptes.get(&self.pte_key(addr)?).copied()
    }

    fn pte_key(&self, addr: u64) -> Option<u64> {
        let vpn = addr / PAGE_SIZE;
        let (key, pte) = self.ptes.range(..=vpn).next_back()?;
        (vpn < key + pte.order.pages()).then_some(*key)
    }

    /// Installs an entry at an address that is aligned to its size.
    pub fn set_pte(&mut self, addr: u64, pte: Pte) {
        self.ptes.insert(addr / PAGE_SIZE, pte);
    }

    /// Sets the dirty bit of the entry that maps an address.
    pub fn dirty_pte(&mut self, addr: u64) {
        if let Some(key) = self.pte_key(addr)
            && let Some(pte) = self.ptes.get_mut(&key)
        {
            pte.dirty = true;
        }
    }

    /// Takes the entries of a range out; a huge entry that reaches out of it is split. The numbers are virtual page
    /// numbers.
    pub fn take_ptes(&mut self, start: u64, end: u64) -> Vec<(u64, Pte)> {
        let (first, last) = (start / PAGE_SIZE, end.div_ceil(PAGE_SIZE));
        let mut keys: Vec<u64> = self.ptes.range(first..last).map(|(key, _)| *key).collect();
        if let Some(key) = self.pte_key(start)
            && key < first
        {
            keys.insert(0, key);
        }
        let mut taken = Vec::with_capacity(keys.len());
        for key in keys {
            let Some(pte) = self.ptes.remove(&key) else { continue };
            if key >= first && key + pte.order.pages() <= last {
                taken.push((key, pte));
                continue;
            }
            for i in 0..pte.order.pages() {
                let small = Pte { pfn: pte.pfn + i, order: Order::Base, ..pte };
                if (first..last).contains(&(key + i)) {
                    taken.push((key + i, small));
                } else {
                    self.ptes.insert(key + i, small);
                }
            }
        }
        taken
    }

    /// Virtual page numbers of the huge entries that reach across an end of a range.
    pub fn straddles(&self, start: u64, end: u64) -> BTreeSet<u64> {
        [start, end]
            .into_iter()
            .filter(|addr| addr % (Order::Pmd.pages() * PAGE_SIZE) != 0)
            .filter_map(|addr| self.pte_key(addr))
            .filter(|key| self.ptes[key].order != Order::Base)
            .collect()
    }

    /// The page of a shmem object.
    pub fn shmem_page(&self, object: u64, index: u64) -> Option<u64> {
        self.shmem.get(&object)?.get(&index).copied()
    }

    /// Puts a page into a shmem object.
    pub fn set_shmem_page(&mut self, object: u64, index: u64, pfn: u64) {
        self.shmem.entry(object).or_default().insert(index, pfn);
    }

    /// Takes the pages of a range out of a shmem object.
    pub fn take_shmem_pages(&mut self, object: u64, first: u64, last: u64) -> Vec<u64> {
        let Some(pages) = self.shmem.get_mut(&object) else { return Vec::new() };
        let indices: Vec<u64> = pages.range(first..last).map(|(index, _)| *index).collect();
        indices.into_iter().filter_map(|index| pages.remove(&index)).collect()
    }

    /// Shmem objects that no VMA maps any more.
    pub fn orphans(&self) -> Vec<u64> {
        let mapped = |object: u64| {
            self.vmas.values().any(|vma| matches!(vma.backing, Backing::Shmem { object: of, .. } if of == object))
        };
        self.shmem.keys().copied().filter(|object| !mapped(*object)).collect()
    }

    /// Forgets an empty shmem object.
    pub fn forget_shmem(&mut self, object: u64) {
        self.shmem.remove(&object);
    }
}

impl HostState {
    /// Maps one folio, or one page of a huge one, at an address: the entry takes a reference.
    pub fn map_pte(&mut self, addr: u64, pte: Pte) {
        self.frames.get(pte.pfn, Holder::HostPte, 1);
        self.frames.add_mapcount(pte.pfn, 1);
        self.mm.set_pte(addr, pte);
    }

    /// Takes the page-table entries of a range out and drops their references. Poison entries stay unless `forget`.
    pub fn zap_ptes(&mut self, start: u64, end: u64, poison: PoisonEntries) {
        for key in self.mm.straddles(start, end) {
            let pte = self.mm.pte(key * PAGE_SIZE).expect("a key has an entry");
            self.frames.get(pte.pfn, Holder::HostPte, pte.order.pages() as u32 - 1);
            self.frames.add_mapcount(pte.pfn, pte.order.pages() as i32 - 1);
        }
        for (vpn, pte) in self.mm.take_ptes(start, end) {
            if pte.poisoned {
                if poison == PoisonEntries::Keep {
                    self.mm.set_pte(vpn * PAGE_SIZE, pte);
                }
                continue;
            }
            if pte.dirty {
                self.frames.set_flags(pte.pfn, Flags::DIRTY);
            }
            self.frames.add_mapcount(pte.pfn, -1);
            self.put(pte.pfn, Holder::HostPte, 1);
        }
    }
}

/// What happens to hwpoison entries when a range is unmapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PoisonEntries {
    /// They stay: the folio is not mapped any more, so truncation does not look for its entries.
    Keep,
    /// They go: munmap(2), MADV_DONTNEED.
    Drop,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn anonymous(start: u64, pages: u64) -> Vma {
        let end = start + pages * PAGE_SIZE;
        Vma { start, end, prot: libc::PROT_READ, backing: Backing::Anonymous, locked: false }
    }

    #[test]
    fn changing_the_middle_of_a_vma_splits_it() {
        let mut mm = AddressSpace::default();
        mm.insert(anonymous(0x10000, 4));
        mm.change(0x11000, 0x13000, |vma| Some(Vma { prot: libc::PROT_NONE, ..vma }));
        assert_eq!(mm.vma_at(0x10fff).unwrap().prot, libc::PROT_READ);
        assert_eq!(mm.vma_at(0x12fff).unwrap().prot, libc::PROT_NONE);
        assert_eq!(mm.vma_at(0x13000).unwrap().start, 0x13000);
        assert!(mm.covers(0x10000, 0x14000));
        mm.change(0x11000, 0x12000, |_| None);
        assert!(!mm.covers(0x10000, 0x14000));
        assert_eq!(mm.parts(0, u64::MAX).len(), 3);
    }

    #[test]
    fn unmapping_part_of_a_huge_entry_leaves_small_ones_and_exact_counts() {
        let mut host = HostState::default();
        let pfn = host.alloc_folio(Order::Pmd, Holder::Lookup).unwrap();
        host.map_pte(2 << 20, Pte { pfn, order: Order::Pmd, dirty: false, poisoned: false });
        host.put(pfn, Holder::Lookup, 1);
        assert_eq!((host.frames.refs(pfn), host.frames.mapcount(pfn)), (1, 1));
        host.zap_ptes((2 << 20) + PAGE_SIZE, (2 << 20) + 2 * PAGE_SIZE, PoisonEntries::Drop);
        assert_eq!((host.frames.refs(pfn), host.frames.mapcount(pfn)), (511, 511));
        assert_eq!(host.mm.pte((2 << 20) + PAGE_SIZE), None);
        assert_eq!(host.mm.pte((2 << 20) + 5 * PAGE_SIZE).unwrap().pfn, pfn + 5);
        host.zap_ptes(2 << 20, 4 << 20, PoisonEntries::Drop);
        assert_eq!(host.frames.pages(), 0);
        assert_eq!(host.frames.check_touched(), Ok(()));
    }
}
