//! Page tables: which gfn maps which frame, at which size.

use super::super::host::{Order, Pfn};
use std::collections::BTreeMap;

/// A present leaf entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Spte {
    /// First frame.
    pub pfn: Pfn,
    /// Size.
    pub order: Order,
    /// Whether the guest may store.
    pub writable: bool,
}

/// One root with its leaf entries.
#[derive(Debug, Default)]
pub struct Root {
    leaves: BTreeMap<u64, Spte>,
    counts: [u64; 3],
}

const fn slot(order: Order) -> usize {
    match order {
        Order::Base => 0,
        Order::Pmd => 1,
        Order::Pud => 2,
    }
}

impl Root {
    /// The entry that maps a gfn, with its first gfn.
    pub fn get(&self, gfn: u64) -> Option<(u64, Spte)> {
        let (first, spte) = self.leaves.range(..=gfn).next_back()?;
        (gfn < first + spte.order.pages()).then_some((*first, *spte))
    }

    /// Installs an entry at an aligned gfn; smaller entries below it must be gone.
    pub fn set(&mut self, gfn: u64, spte: Spte) {
        if let Some(old) = self.leaves.insert(gfn, spte) {
            self.counts[slot(old.order)] -= 1;
        }
        self.counts[slot(spte.order)] += 1;
    }

    /// Removes the entry that starts at a gfn.
    pub fn remove(&mut self, gfn: u64) -> Option<Spte> {
        let old = self.leaves.remove(&gfn)?;
        self.counts[slot(old.order)] -= 1;
        Some(old)
    }

    /// First gfns of the entries that map a part of `first..last`.
    pub fn in_range(&self, first: u64, last: u64) -> Vec<u64> {
        let head = self.get(first).map_or(first, |(gfn, _)| gfn);
        self.leaves.range(head..last.max(head)).map(|(gfn, _)| *gfn).collect()
    }

    /// Removes every entry that maps a part of `first..last`; the answer is how many.
    pub fn zap(&mut self, first: u64, last: u64) -> usize {
        let gfns = self.in_range(first, last);
        for gfn in &gfns {
            self.remove(*gfn);
        }
        gfns.len()
    }

    /// Removes everything.
    pub fn clear(&mut self) {
        *self = Root::default();
    }

    /// Present leaf entries of a size.
    pub fn leaves(&self, order: Order) -> u64 {
        self.counts[slot(order)]
    }

    /// Every entry.
    pub fn iter(&self) -> impl Iterator<Item = (u64, Spte)> + '_ {
        self.leaves.iter().map(|(gfn, spte)| (*gfn, *spte))
    }

    /// Whether nothing is mapped.
    pub fn is_empty(&self) -> bool {
        self.leaves.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zapping_a_part_of_a_huge_entry_takes_it_whole() {
        let mut root = Root::default();
        root.set(512, Spte { pfn: 1024, order: Order::Pmd, writable: true });
        root.set(1024, Spte { pfn: 9, order: Order::Base, writable: true });
        assert_eq!(root.get(700).unwrap().0, 512);
        assert_eq!(root.zap(1023, 1024), 1);
        assert_eq!((root.leaves(Order::Pmd), root.leaves(Order::Base)), (0, 1));
        assert_eq!(root.zap(0, 512), 0);
    }
}
