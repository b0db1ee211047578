//! What the runner tells the reporters, as it happens.

use std::io;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::exit::Stopped;
use super::outcome::{Record, Summary};
use super::plan::{Claim, Plan};
use super::{Seed, runner::Rounds};
use crate::machine::MachineSpec;
use crate::observe::Environment;

/// What is known of a run before it starts.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RunInfo {
    /// The command line.
    pub arguments: Vec<String>,
    /// How a single test is run again: the words before its name.
    pub again: Vec<String>,
    /// The seed that everything follows from.
    pub seed: Seed,
    /// The seed of the order, when it was shuffled.
    pub shuffle: Option<Seed>,
    /// How often everything is run.
    pub rounds: Rounds,
    /// Most tests at a time.
    pub jobs: usize,
    /// Seconds since the epoch.
    pub started: u64,
    /// The kernel and the hardware.
    pub environment: Environment,
}

impl RunInfo {
    /// The command line that runs one claim again as it was run.
    pub fn reproduce(&self, record: &Record) -> String {
        let again = self.again.join(" ");
        format!("{again} {} --machine {} --seed {}", record.name, record.machine, record.seed)
    }
}

/// What happens in a run.
#[derive(Debug)]
pub enum Event<'a> {
    /// First of all. The plan of a later round may have another order.
    RunStarted {
        /// What is known.
        info: &'a RunInfo,
        /// What is to be run.
        plan: &'a Plan,
    },
    /// Something the user should know, said once.
    Remark(&'a str),
    /// A round starts.
    RoundStarted {
        /// From 0.
        round: u64,
        /// The seed of the round.
        seed: Seed,
        /// What is run, in order.
        plan: &'a Plan,
    },
    /// The process of a test was started.
    ClaimStarted {
        /// The name of its process in reports of the kernel.
        comm: &'a str,
        /// The claim.
        claim: &'a Claim,
        /// The machine.
        machine: &'a MachineSpec,
    },
    /// A claim has a result.
    ClaimFinished {
        /// The claim.
        claim: &'a Claim,
        /// The machine.
        machine: &'a MachineSpec,
        /// The result.
        record: &'a Record,
    },
    /// A round is over; claims of its plan without a result were not run.
    RoundFinished {
        /// From 0.
        round: u64,
        /// Why the claims without a result were not run.
        stopped: Option<&'a Stopped>,
    },
    /// Last of all.
    RunFinished {
        /// How many claims came out how.
        summary: &'a Summary,
        /// Why the run ended early.
        stopped: Option<&'a Stopped>,
        /// From the first event.
        elapsed: Duration,
    },
}

/// Something that wants to hear of events.
pub trait Listener {
    /// Takes one event.
    ///
    /// # Errors
    /// When the event cannot be written where it has to go; the run is then stopped.
    fn hear(&mut self, event: &Event<'_>) -> io::Result<()>;
}
