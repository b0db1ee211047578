//! The page allocator: fresh frames until some come back, then the last one that came back first.

use super::Pfn;
use crate::machine::Errno;
use std::collections::{HashMap, VecDeque};

/// Sizes of folios.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum Order {
    /// One base page.
    Base = 0,
    /// 2 MiB.
    Pmd = 9,
    /// 1 GiB.
    Pud = 18,
}

impl Order {
    /// Every order.
    pub const ALL: [Order; 3] = [Order::Base, Order::Pmd, Order::Pud];

    /// Base pages of a folio of this order.
    pub const fn pages(self) -> u64 {
        1 << (self as u8)
    }

    /// The largest number not above `n` that is a multiple of the folio's pages.
    pub const fn align_down(self, n: u64) -> u64 {
        n & !(self.pages() - 1)
    }

    const fn slot(self) -> usize {
        match self {
            Order::Base => 0,
            Order::Pmd => 1,
            Order::Pud => 2,
        }
    }
}

/// Where the frames of each order of folio lie; regions do not meet.
#[derive(Clone, Copy, Debug)]
pub struct Regions {
    /// First frame, by order.
    pub first: [Pfn; 3],
    /// One past the last frame, by order.
    pub limit: [Pfn; 3],
}

impl Default for Regions {
    /// As much as a physical address of 48 bits reaches.
    fn default() -> Regions {
        Regions { first: [1 << 16, 1 << 30, 1 << 34], limit: [1 << 30, 1 << 34, 1 << 36] }
    }
}

/// A pool of huge pages, in folios.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pool {
    /// All of them (HugePages_Total).
    pub total: u64,
    /// Those that nobody has (HugePages_Free).
    pub free: u64,
    /// Those of the free ones that files will need to be full (HugePages_Rsvd).
    pub reserved: u64,
    /// Those in use as base pages.
    pub split: u64,
}

/// Free frames of every order. Orders above base are a pool in the manner of hugetlb: frames of a split folio come back
/// one by one and stay base pages until they are merged.
#[derive(Debug)]
pub struct Allocator {
    regions: Regions,
    next: [Pfn; 3],
    free: [Vec<Pfn>; 3],
    retired: u64,
    failures: VecDeque<(u64, Errno)>,
    pool_limit: Option<u64>,
    /// Huge folios that were split: how many of their base frames came back.
    split: HashMap<Pfn, (Order, u64)>,
}

impl Default for Allocator {
    fn default() -> Allocator {
        Allocator::new(Regions::default())
    }
}

impl Allocator {
    /// Every frame of the regions is free.
    pub fn new(regions: Regions) -> Allocator {
        Allocator {
            regions,
            next: regions.first,
            free: Default::default(),
            retired: 0,
            failures: VecDeque::new(),
            pool_limit: None,
            split: HashMap::new(),
        }
    }

    /// Takes a folio's frames.
    ///
    /// # Errors
    /// ENOMEM when the region is used up, or the errno scripted with [`Allocator::fail_next`].
    pub fn take(&mut self, order: Order) -> Result<Pfn, Errno> {
        if let Some((wait, errno)) = self.failures.front_mut() {
            if *wait == 0 {
                let errno = *errno;
                self.failures.pop_front();
                return Err(errno);
            }
            *wait -= 1;
        }
        let slot = order.slot();
        if let Some(pfn) = self.free[slot].pop() {
            return Ok(pfn);
        }
        let pfn = self.next[slot];
        let used = (pfn - self.regions.first[slot]) / order.pages();
        if pfn + order.pages() > self.regions.limit[slot]
            || (order != Order::Base && self.pool_limit.is_some_and(|max| used >= max))
        {
            return Err(Errno::ENOMEM);
        }
        self.next[slot] += order.pages();
        Ok(pfn)
    }

    /// Notes that a huge folio is base pages now: its frames go back to the pool together, when the last one is free.
    pub fn note_split(&mut self, head: Pfn, order: Order) {
        self.split.insert(head, (order, 0));
    }

    /// Notes that a split folio is one again.
    pub fn note_merge(&mut self, head: Pfn) {
        self.split.remove(&head);
    }

    /// Takes a folio's frames back.
    pub fn give_back(&mut self, pfn: Pfn, order: Order) {
        if order == Order::Base {
            return self.give_back_pages(pfn, 1);
        }
        self.free[order.slot()].push(pfn);
    }

    /// Takes back base pages that lie side by side in one block of 2M.
    pub fn give_back_pages(&mut self, pfn: Pfn, pages: u64) {
        let heads = [Order::Pmd, Order::Pud].map(|huge| huge.align_down(pfn));
        if let Some(head) = heads.into_iter().find(|head| self.split.contains_key(head))
            && let Some((huge, back)) = self.split.get_mut(&head)
        {
            *back += pages;
            if *back < huge.pages() {
                return;
            }
            let huge = *huge;
            self.split.remove(&head);
            return self.free[huge.slot()].push(head);
        }
        self.free[Order::Base.slot()].extend(pfn..pfn + pages);
    }

    /// Takes frames out of circulation for good.
    pub fn retire(&mut self, _pfn: Pfn, order: Order) {
        self.retired += order.pages();
    }

    /// The pool of an order, nothing reserved.
    pub fn pool(&self, order: Order) -> Pool {
        let slot = order.slot();
        let room = (self.regions.limit[slot] - self.regions.first[slot]) / order.pages();
        let total = self.pool_limit.map_or(room, |limit| limit.min(room));
        let never_used = total.saturating_sub((self.next[slot] - self.regions.first[slot]) / order.pages());
        let split = self.split.values().filter(|(huge, _)| *huge == order).count() as u64;
        Pool { total, free: never_used + self.free[slot].len() as u64, reserved: 0, split }
    }

    /// Frames out of circulation, in pages.
    pub fn retired(&self) -> u64 {
        self.retired
    }

    /// First frames of the folios that came back and wait to be handed out again.
    pub fn free_frames(&self) -> impl Iterator<Item = Pfn> + '_ {
        self.free.iter().flatten().copied()
    }

    /// Makes an allocation fail: the one after `after` further successful ones.
    pub fn fail_next(&mut self, after: u64, errno: Errno) {
        self.failures.push_back((after, errno));
    }

    /// Limits each pool of huge folios to a number of folios.
    pub fn limit_pool(&mut self, folios: u64) {
        self.pool_limit = Some(folios);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn huge_folios_are_aligned_and_pools_end() {
        let mut allocator = Allocator::default();
        for order in Order::ALL {
            let pfn = allocator.take(order).unwrap();
            assert_eq!(order.align_down(pfn), pfn);
        }
        allocator.limit_pool(1);
        assert_eq!(allocator.take(Order::Pmd), Err(Errno::ENOMEM));
        assert!(allocator.take(Order::Base).is_ok());
    }

    #[test]
    fn scripted_failures_come_when_they_were_asked_for() {
        let mut allocator = Allocator::default();
        allocator.fail_next(1, Errno::ENOMEM);
        assert!(allocator.take(Order::Base).is_ok());
        assert_eq!(allocator.take(Order::Base), Err(Errno::ENOMEM));
        assert!(allocator.take(Order::Base).is_ok());
    }
}
