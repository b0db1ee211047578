//! Page tables: which gfn maps which frame, at which size.

use super::super::extent_map::ExtentMap;
use super::super::host::{Order, Pfn};

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

/// One root with its leaf entries. Entries of one size that map consecutive frames at consecutive gfns are kept as one run,
/// so that a root costs what its fragmentation costs, not what it maps.
#[derive(Debug, Default)]
pub struct Root {
    leaves: ExtentMap<(Order, bool)>,
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
        let (pfn, (order, writable)) = self.leaves.get(gfn)?;
        let first = order.align_down(gfn);
        Some((first, Spte { pfn: pfn - (gfn - first), order, writable }))
    }

    /// Installs an entry at an aligned gfn; other entries that map a part of it go.
    pub fn set(&mut self, gfn: u64, spte: Spte) {
        self.set_run(gfn, spte, 1);
    }

    /// Installs `count` entries of one size, of consecutive frames at consecutive gfns; other entries in their place go.
    pub fn set_run(&mut self, gfn: u64, spte: Spte, count: u64) {
        let pages = count * spte.order.pages();
        self.zap(gfn, gfn + pages);
        self.leaves.insert(gfn, pages, spte.pfn, (spte.order, spte.writable));
        self.counts[slot(spte.order)] += count;
    }

    /// Removes the entry that starts at a gfn.
    pub fn remove(&mut self, gfn: u64) -> Option<Spte> {
        let (_, spte) = self.get(gfn).filter(|(first, _)| *first == gfn)?;
        self.leaves.remove(gfn, gfn + spte.order.pages());
        self.counts[slot(spte.order)] -= 1;
        Some(spte)
    }

    /// First gfns of the entries that map a part of `first..last`.
    pub fn in_range(&self, first: u64, last: u64) -> Vec<u64> {
        let runs = self.leaves.pieces(first, last);
        runs.flat_map(|run| {
            let order = run.tag.0;
            (order.align_down(run.first)..run.end()).step_by(order.pages() as usize)
        })
        .collect()
    }

    /// Whether an entry maps a part of `first..last`.
    pub fn maps_any(&self, first: u64, last: u64) -> bool {
        self.leaves.pieces(first, last).next().is_some()
    }

    /// Removes every entry that maps a part of `first..last`; the answer is how many.
    pub fn zap(&mut self, first: u64, last: u64) -> usize {
        let runs: Vec<(u64, u64, Order)> = self
            .leaves
            .pieces(first, last)
            .map(|run| (run.tag.0.align_down(run.first), run.end().next_multiple_of(run.tag.0.pages()), run.tag.0))
            .collect();
        let mut gone = 0;
        for (from, to, order) in runs {
            let entries = (to - from) / order.pages();
            self.leaves.remove(from, to);
            self.counts[slot(order)] -= entries;
            gone += entries as usize;
        }
        gone
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
        self.leaves.pieces(0, u64::MAX).flat_map(|run| {
            let (order, writable) = run.tag;
            let entries = run.len / order.pages();
            (0..entries).map(move |i| {
                let offset = i * order.pages();
                (run.first + offset, Spte { pfn: run.base + offset, order, writable })
            })
        })
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

    #[test]
    fn entries_stay_apart_in_a_run() {
        let mut root = Root::default();
        for i in 0..4 {
            root.set(512 * i, Spte { pfn: 4096 + 512 * i, order: Order::Pmd, writable: true });
        }
        assert_eq!(root.leaves.runs(), 1);
        assert_eq!(root.get(1500), Some((1024, Spte { pfn: 5120, order: Order::Pmd, writable: true })));
        assert_eq!(root.in_range(600, 1025), vec![512, 1024]);
        assert_eq!(root.remove(513), None, "no entry starts there");
        assert_eq!(root.remove(512).map(|spte| spte.pfn), Some(4608));
        assert_eq!(root.iter().map(|(gfn, _)| gfn).collect::<Vec<_>>(), vec![0, 1024, 1536]);
        assert_eq!(root.zap(0, 2048), 3);
        assert!(root.is_empty());
    }
}
