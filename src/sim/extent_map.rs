//! A map from page numbers to page numbers that costs as much as it has runs: consecutive keys that map to consecutive
//! values, alike in everything else, are one entry.

use std::collections::BTreeMap;

/// Consecutive keys that map to consecutive values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent<T> {
    /// First key.
    pub first: u64,
    /// Number of keys.
    pub len: u64,
    /// Value of the first key; the n-th key has this plus n.
    pub base: u64,
    /// What all of them have in common.
    pub tag: T,
}

impl<T> Extent<T> {
    /// One past the last key.
    pub fn end(&self) -> u64 {
        self.first + self.len
    }
}

#[derive(Clone, Copy, Debug)]
struct Run<T> {
    len: u64,
    base: u64,
    tag: T,
}

/// The map.
#[derive(Clone, Debug)]
pub struct ExtentMap<T> {
    runs: BTreeMap<u64, Run<T>>,
    len: u64,
}

impl<T> Default for ExtentMap<T> {
    fn default() -> ExtentMap<T> {
        ExtentMap { runs: BTreeMap::new(), len: 0 }
    }
}

impl<T: Copy + PartialEq> ExtentMap<T> {
    /// The run that has a key, whole.
    pub fn run_of(&self, key: u64) -> Option<Extent<T>> {
        let (first, run) = self.runs.range(..=key).next_back()?;
        (key - first < run.len).then_some(Extent { first: *first, len: run.len, base: run.base, tag: run.tag })
    }

    /// Value and tag of a key.
    pub fn get(&self, key: u64) -> Option<(u64, T)> {
        self.run_of(key).map(|run| (run.base + (key - run.first), run.tag))
    }

    /// Maps `len` keys from `first` on to `base` and what follows it, whatever they were mapped to before.
    pub fn insert(&mut self, first: u64, len: u64, base: u64, tag: T) {
        if len == 0 {
            return;
        }
        self.remove(first, first + len);
        self.len += len;
        let mut run = Run { len, base, tag };
        if let Some(next) =
            self.runs.get(&(first + len)).copied().filter(|next| next.base == base + len && next.tag == tag)
        {
            self.runs.remove(&(first + len));
            run.len += next.len;
        }
        if let Some((at, before)) = self.runs.range_mut(..first).next_back()
            && at + before.len == first
            && before.base + before.len == base
            && before.tag == tag
        {
            before.len += run.len;
            return;
        }
        self.runs.insert(first, run);
    }

    /// Forgets the keys of `first..last`; the answer is how many there were.
    pub fn remove(&mut self, first: u64, last: u64) -> u64 {
        let mut gone = 0;
        if let Some((at, run)) = self.runs.range_mut(..first).next_back()
            && at + run.len > first
        {
            let (at, end, base, tag) = (*at, *at + run.len, run.base, run.tag);
            run.len = first - at;
            gone += end.min(last) - first;
            if end > last {
                self.runs.insert(last, Run { len: end - last, base: base + (last - at), tag });
            }
        }
        while let Some((at, run)) = self.runs.range(first..last).next().map(|(at, run)| (*at, *run)) {
            self.runs.remove(&at);
            let end = at + run.len;
            gone += end.min(last) - at;
            if end > last {
                self.runs.insert(last, Run { len: end - last, base: run.base + (last - at), tag: run.tag });
            }
        }
        self.len -= gone;
        gone
    }

    /// The parts of runs that lie in `first..last`, in order.
    pub fn pieces(&self, first: u64, last: u64) -> impl Iterator<Item = Extent<T>> + '_ {
        let before = self.run_of(first).filter(|run| run.first < first);
        let inside = self.runs.range(first..last.max(first));
        let inside = inside.map(|(at, run)| Extent { first: *at, len: run.len, base: run.base, tag: run.tag });
        before.into_iter().chain(inside).filter_map(move |run| {
            let (from, to) = (run.first.max(first), run.end().min(last));
            (from < to).then(|| Extent {
                first: from,
                len: to - from,
                base: run.base + (from - run.first),
                tag: run.tag,
            })
        })
    }

    /// Number of keys.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there is no key.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Number of runs: what the map costs.
    pub fn runs(&self) -> usize {
        self.runs.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agrees_with_a_plain_array_under_many_changes() {
        let mut map = ExtentMap::default();
        let mut plain: [Option<(u64, u8)>; 64] = [None; 64];
        let mut seed = 99u64;
        let mut next = |n: u64| {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (seed >> 33) % n
        };
        for _ in 0..5000 {
            let first = next(64);
            let len = next(64 - first) + 1;
            if next(3) == 0 {
                let expected = plain[first as usize..(first + len) as usize].iter().flatten().count() as u64;
                assert_eq!(map.remove(first, first + len), expected);
                plain[first as usize..(first + len) as usize].fill(None);
            } else {
                let (base, tag) = (first + 100 * next(2), next(2) as u8);
                map.insert(first, len, base, tag);
                for i in 0..len {
                    plain[(first + i) as usize] = Some((base + i, tag));
                }
            }
            for (key, expected) in plain.iter().enumerate() {
                assert_eq!(map.get(key as u64), *expected);
            }
            assert_eq!(map.len(), plain.iter().flatten().count() as u64);
            let (from, to) = (next(32), 32 + next(32));
            let mut seen = Vec::new();
            for piece in map.pieces(from, to) {
                seen.extend((0..piece.len).map(|i| (piece.first + i, (piece.base + i, piece.tag))));
            }
            let expected: Vec<_> = (from..to).filter_map(|key| plain[key as usize].map(|value| (key, value))).collect();
            assert_eq!(seen, expected);
        }
    }

    #[test]
    fn neighbours_join_whichever_comes_first() {
        let mut map = ExtentMap::default();
        for first in [0, 8, 4, 16, 12] {
            map.insert(first, 4, 1000 + first, ());
        }
        assert_eq!((map.runs(), map.len()), (1, 20));
        map.remove(9, 10);
        assert_eq!((map.runs(), map.len()), (2, 19));
    }
}
