//! Selftests against defects of the model that were put there on purpose: which claim notices which defect.
//!
//! A run of one claim on a simulated machine takes less time than a process does, so that many of them share one: a
//! [`worker`] runs the claims of a [`Job`] one after another and says what came of each. A defect may make the model
//! panic or go round in circles. The first is caught in the worker; for the second each claim has a time limit, after
//! which a [`pool::Worker`] is killed and another one takes up the rest. Both mean that the claim noticed.
//!
//! [`survey`] first runs every claim on the machines as they are. A claim that does not pass there cannot testify, and is
//! left out: its failure on a mutant would say nothing.

mod pool;
mod survey;
mod worker;

pub use pool::Limits;
pub use survey::{Baseline, Killer, Listener, Survey, Suspect, Trial, survey};
pub use worker::{WORKER_ARGUMENT, worker};

use serde::{Deserialize, Serialize};

/// What a worker is asked to do: one line of JSON.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Job {
    /// Spec of the machine, with its mutant.
    pub machine: String,
    /// The claims, by their position among all claims of the program.
    pub claims: Vec<usize>,
    /// Ends the job early after so many claims that do not hold.
    pub stop_after: usize,
}

/// How a claim came out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "verdict")]
pub enum Finding {
    /// Every assertion held.
    Held,
    /// The machine has not what the claim needs.
    Skipped,
    /// An assertion did not hold: its first line.
    Failed {
        /// The claim in words.
        message: String,
    },
    /// The model contradicted itself, or the claim's code panicked.
    Panicked {
        /// The panic's first line.
        message: String,
    },
    /// It did not end within its time limit.
    TimedOut,
    /// The process died.
    Died,
}

impl Finding {
    /// Whether the claim noticed something.
    pub fn is_failure(&self) -> bool {
        !matches!(self, Finding::Held | Finding::Skipped)
    }

    /// The machine-readable word.
    pub fn word(&self) -> &'static str {
        match self {
            Finding::Held => "held",
            Finding::Skipped => "skipped",
            Finding::Failed { .. } => "failed",
            Finding::Panicked { .. } => "panicked",
            Finding::TimedOut => "timed-out",
            Finding::Died => "died",
        }
    }

    /// What it said, where it said something.
    pub fn message(&self) -> Option<&str> {
        match self {
            Finding::Failed { message } | Finding::Panicked { message } => Some(message),
            Finding::Held | Finding::Skipped | Finding::TimedOut | Finding::Died => None,
        }
    }
}

/// What a worker says: one line of JSON each.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Said {
    /// A claim begins.
    Begin(usize),
    /// It has ended.
    End(usize, Finding),
    /// The job is done.
    Done,
}
