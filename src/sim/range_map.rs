//! A map from ranges of page numbers to values, with the cost of the ranges, not of the pages.

use std::collections::BTreeMap;

/// Values of ranges; pages that were never set have the default.
#[derive(Clone, Debug, Default)]
pub struct RangeMap<V> {
    /// Start to (end, value); ranges do not meet, and neighbours with equal values are joined.
    ranges: BTreeMap<u64, (u64, V)>,
}

impl<V: Copy + PartialEq + Default> RangeMap<V> {
    /// The value of a page.
    pub fn get(&self, page: u64) -> V {
        self.ranges
            .range(..=page)
            .next_back()
            .filter(|(_, (end, _))| page < *end)
            .map_or_else(V::default, |(_, (_, value))| *value)
    }

    /// Sets `first..last`.
    pub fn set(&mut self, first: u64, last: u64, value: V) {
        if first >= last {
            return;
        }
        let mut start = first;
        let mut end = last;
        let before = self.ranges.range(..first).next_back().map(|(at, (to, old))| (*at, *to, *old));
        if let Some((at, to, old)) = before
            && to >= first
        {
            if old == value {
                self.ranges.remove(&at);
                start = at;
                end = end.max(to);
            } else {
                self.ranges.insert(at, (first, old));
                if to > last {
                    self.ranges.insert(last, (to, old));
                }
            }
        }
        let inside: Vec<u64> = self.ranges.range(first..=last).map(|(at, _)| *at).collect();
        for at in inside {
            let (to, old) = self.ranges[&at];
            if at == last && old != value {
                continue;
            }
            self.ranges.remove(&at);
            if old == value {
                end = end.max(to);
            } else if to > last {
                self.ranges.insert(last, (to, old));
            }
        }
        if value != V::default() {
            self.ranges.insert(start, (end, value));
        } else if end > last {
            debug_assert!(false, "default values are not stored");
        }
    }

    /// The pieces of `first..last` with equal values, defaults included.
    pub fn pieces(&self, first: u64, last: u64) -> Vec<(u64, u64, V)> {
        let mut pieces = Vec::new();
        let mut at = first;
        let from = self.ranges.range(..=first).next_back().map_or(first, |(start, _)| *start);
        for (start, (end, value)) in self.ranges.range(from..last) {
            if *end <= at {
                continue;
            }
            if *start > at {
                pieces.push((at, *start, V::default()));
            }
            pieces.push(((*start).max(at), (*end).min(last), *value));
            at = (*end).min(last);
        }
        if at < last {
            pieces.push((at, last, V::default()));
        }
        pieces
    }

    /// Whether every page of `first..last` has this value.
    pub fn all(&self, first: u64, last: u64, value: V) -> bool {
        self.pieces(first, last).iter().all(|(_, _, found)| *found == value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agrees_with_a_plain_array_under_many_sets() {
        let mut map = RangeMap::default();
        let mut plain = [0u8; 64];
        let mut seed = 12345u64;
        let mut next = |n: u64| {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (seed >> 33) % n
        };
        for _ in 0..5000 {
            let a = next(64);
            let b = a + next(64 - a) + 1;
            let value = next(3) as u8;
            map.set(a, b, value);
            plain[a as usize..b as usize].fill(value);
            for (page, expected) in plain.iter().enumerate() {
                assert_eq!(map.get(page as u64), *expected);
            }
            let pieces = map.pieces(0, 64);
            assert_eq!(pieces.iter().map(|(a, b, _)| b - a).sum::<u64>(), 64);
            assert!(pieces.windows(2).all(|pair| pair[0].1 == pair[1].0));
            assert!(pieces.iter().all(|(a, b, v)| plain[*a as usize..*b as usize].iter().all(|p| p == v)));
        }
    }
}
