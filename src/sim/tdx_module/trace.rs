//! A record of what was called: a ring of the last calls, and counters for each leaf.

use std::collections::{BTreeMap, VecDeque};

use super::call::{AnyLeaf, Outcome};
use super::leaf::Leaf;
use super::lp::LpId;
use super::regs::Regs;

/// One call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TraceRecord {
    /// Position among all calls, from 0.
    pub seq: u64,
    /// Who called.
    pub lp: LpId,
    /// What, or `None` for a leaf the dispatcher does not know.
    pub leaf: Option<AnyLeaf>,
    /// Registers in.
    pub input: Regs,
    /// Registers out, status in RAX.
    pub output: Regs,
    /// How it ended. A TDCALL that exits has its status only once the guest runs on.
    pub outcome: Outcome,
}

/// How often a leaf was called.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct LeafCount {
    /// Calls that are over.
    pub calls: u64,
    /// Those with a status other than zero.
    pub nonzero: u64,
}

/// The record.
pub struct Trace {
    ring: VecDeque<TraceRecord>,
    capacity: usize,
    seq: u64,
    seamcalls: [LeafCount; 64],
    tdcalls: BTreeMap<AnyLeaf, LeafCount>,
}

impl Default for Trace {
    fn default() -> Trace {
        let seamcalls = [LeafCount::default(); 64];
        Trace { ring: VecDeque::new(), capacity: 0, seq: 0, seamcalls, tdcalls: BTreeMap::new() }
    }
}

impl Trace {
    /// Keeps the last `capacity` calls; 0, the default, keeps none.
    pub fn set_capacity(&mut self, capacity: usize) {
        self.capacity = capacity;
        while self.ring.len() > capacity {
            self.ring.pop_front();
        }
    }

    /// The calls kept, oldest first.
    pub fn records(&self) -> impl Iterator<Item = &TraceRecord> {
        self.ring.iter()
    }

    /// All calls so far.
    pub fn calls(&self) -> u64 {
        self.seq
    }

    /// How often `leaf` was called since the start or [`Trace::reset_counters`].
    pub fn count(&self, leaf: AnyLeaf) -> LeafCount {
        match leaf {
            AnyLeaf::Seamcall(leaf) => self.seamcalls[leaf.number() as usize],
            AnyLeaf::Tdcall(_) => self.tdcalls.get(&leaf).copied().unwrap_or_default(),
        }
    }

    /// Sets every counter to zero.
    pub fn reset_counters(&mut self) {
        self.seamcalls = [LeafCount::default(); 64];
        self.tdcalls.clear();
    }

    /// Counts `calls` successful calls of a leaf in one; for a record that keeps none.
    pub(crate) fn count_successes(&mut self, leaf: Leaf, calls: u64) {
        self.seamcalls[leaf.number() as usize].calls += calls;
        self.seq += calls;
    }

    /// Whether calls are kept.
    pub(crate) fn keeps_calls(&self) -> bool {
        self.capacity > 0
    }

    #[inline]
    pub(crate) fn record(&mut self, lp: LpId, leaf: Option<AnyLeaf>, input: &Regs, output: &Regs, outcome: Outcome) {
        if outcome != Outcome::Held {
            let nonzero = u64::from(outcome.status().is_some_and(|status| !status.is_zero()));
            let count = match leaf {
                Some(AnyLeaf::Seamcall(leaf)) => Some(&mut self.seamcalls[leaf.number() as usize]),
                Some(leaf) => Some(self.tdcalls.entry(leaf).or_default()),
                None => None,
            };
            if let Some(count) = count {
                count.calls += 1;
                count.nonzero += nonzero;
            }
        }
        if self.capacity > 0 {
            if self.ring.len() == self.capacity {
                self.ring.pop_front();
            }
            let record = TraceRecord { seq: self.seq, lp, leaf, input: *input, output: *output, outcome };
            self.ring.push_back(record);
        }
        self.seq += 1;
    }
}
