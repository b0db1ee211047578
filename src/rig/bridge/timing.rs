//! What SEAMCALLs cost.

use std::time::{Duration, Instant};

/// Calls that are kept for the median.
const KEPT: usize = 1 << 16;

/// Times of calls.
#[derive(Clone, Debug, Default)]
pub struct Timing {
    calls: u64,
    /// From a request to the next request of the same CPU, where both are of a leaf that the kernel calls in a tight loop:
    /// a round trip and the loop around it.
    rounds: Vec<u32>,
    /// From seeing a request to its answer.
    services: Vec<u32>,
}

/// The last request of a CPU.
#[derive(Clone, Copy, Debug)]
pub struct Last {
    /// When it was seen.
    pub at: Instant,
    /// Its leaf.
    pub leaf: u16,
}

impl Timing {
    /// Takes one call.
    pub fn add(&mut self, last: Option<Last>, now: Last, service: Duration, tight: bool) {
        let nanoseconds = |time: Duration| u32::try_from(time.as_nanos()).unwrap_or(u32::MAX);
        self.calls += 1;
        if self.services.len() < KEPT {
            self.services.push(nanoseconds(service));
        }
        if let Some(last) = last.filter(|last| tight && last.leaf == now.leaf)
            && self.rounds.len() < KEPT
        {
            self.rounds.push(nanoseconds(now.at - last.at));
        }
    }

    /// How many calls there were.
    pub fn calls(&self) -> u64 {
        self.calls
    }

    /// Median round trip, with the kernel's loop around it.
    pub fn round_trip(&self) -> Option<Duration> {
        median(&self.rounds)
    }

    /// Median time from seeing a request to its answer.
    pub fn service(&self) -> Option<Duration> {
        median(&self.services)
    }
}

fn median(times: &[u32]) -> Option<Duration> {
    let mut times = times.to_vec();
    times.sort_unstable();
    times.get(times.len() / 2).map(|&nanoseconds| Duration::from_nanos(nanoseconds.into()))
}
