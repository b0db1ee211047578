//! VMAs and page-table entries of the host process.

use super::{Order, Pfn};

/// What stands behind a VMA.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backing {
    /// Private anonymous memory of base pages.
    Anonymous,
    /// Private anonymous memory, huge where it can be.
    TransparentHuge,
    /// Shared anonymous memory: the object, and the page index of the VMA's start in it.
    Shmem {
        /// The object.
        object: u64,
        /// Page index of the first byte.
        pgoff: u64,
    },
    /// A guest_memfd: the file, and the page index of the VMA's start in it.
    Gmem {
        /// The file.
        file: u64,
        /// Page index of the first byte.
        pgoff: u64,
    },
}

/// A VMA: `start..end` of host virtual addresses.
#[derive(Clone, Copy, Debug)]
pub struct Vma {
    /// First byte.
    pub start: u64,
    /// One past the last byte.
    pub end: u64,
    /// PROT_* bits.
    pub prot: i32,
    /// What stands behind it.
    pub backing: Backing,
    /// VM_LOCKED.
    pub locked: bool,
}

impl Vma {
    /// The part of the VMA from `start` to `end`, which lie inside it.
    pub fn part(&self, start: u64, end: u64) -> Vma {
        let skipped = (start - self.start) / crate::machine::PAGE_SIZE;
        let backing = match self.backing {
            Backing::Shmem { object, pgoff } => Backing::Shmem { object, pgoff: pgoff + skipped },
            Backing::Gmem { file, pgoff } => Backing::Gmem { file, pgoff: pgoff + skipped },
            other => other,
        };
        Vma { start, end, backing, ..*self }
    }

    /// Page index in the file or object behind the VMA of the byte at `addr`.
    pub fn index_of(&self, addr: u64) -> u64 {
        let skipped = (addr - self.start) / crate::machine::PAGE_SIZE;
        match self.backing {
            Backing::Shmem { pgoff, .. } | Backing::Gmem { pgoff, .. } => pgoff + skipped,
            Backing::Anonymous | Backing::TransparentHuge => skipped,
        }
    }

    /// Whether stores become visible to others who map the same.
    pub fn is_shared(&self) -> bool {
        matches!(self.backing, Backing::Shmem { .. } | Backing::Gmem { .. })
    }
}

/// A present or poisoned page-table entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pte {
    /// First frame.
    pub pfn: Pfn,
    /// How much the entry maps.
    pub order: Order,
    /// The dirty bit.
    pub dirty: bool,
    /// A hwpoison entry: no mapping, every access is a SIGBUS.
    pub poisoned: bool,
}
