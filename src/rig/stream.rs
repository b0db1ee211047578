//! A run's events as lines of JSON: from the runner in the guest to the reporters on the host.
//!
//! Both ends are the same program, so that claims are sent by name.

use std::io::{self, Write};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::harness::Seed;
use crate::harness::event::{Event, Listener, RunInfo};
use crate::harness::exit::Stopped;
use crate::harness::outcome::{Record, Summary};
use crate::harness::plan::Plan;

/// One event.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Line {
    /// [`Event::RunStarted`].
    RunStarted {
        /// What is known of the run.
        info: Box<RunInfo>,
        /// What is to be run.
        plan: Names,
    },
    /// [`Event::Remark`].
    Remark(String),
    /// [`Event::RoundStarted`].
    RoundStarted {
        /// From 0.
        round: u64,
        /// The seed of the round.
        seed: Seed,
        /// What is run, in order.
        plan: Names,
    },
    /// [`Event::ClaimStarted`].
    ClaimStarted {
        /// The claim's name.
        claim: String,
        /// The machine's spec.
        machine: String,
        /// The name of its process in reports of the kernel.
        comm: String,
    },
    /// [`Event::ClaimFinished`]; the record has the names.
    ClaimFinished(Box<Record>),
    /// [`Event::RoundFinished`].
    RoundFinished {
        /// From 0.
        round: u64,
        /// Why the claims without a result were not run.
        stopped: Option<Stopped>,
    },
    /// [`Event::RunFinished`].
    RunFinished {
        /// How many claims came out how.
        summary: Summary,
        /// Why the run ended early.
        stopped: Option<Stopped>,
        /// From the first event.
        elapsed: Duration,
    },
}

/// A [`Plan`] by name.
#[derive(Debug, Serialize, Deserialize)]
pub struct Names {
    /// The machines' specs.
    pub machines: Vec<String>,
    /// The claims' names.
    pub claims: Vec<String>,
}

impl Names {
    fn of(plan: &Plan) -> Names {
        Names {
            machines: plan.machines.iter().map(ToString::to_string).collect(),
            claims: plan.claims.iter().map(|claim| claim.name.clone()).collect(),
        }
    }
}

/// Writes every event as a line, at once.
#[derive(Debug)]
pub struct EventWriter<W>(W);

impl<W: Write> EventWriter<W> {
    /// Lines go to `out`.
    pub fn new(out: W) -> EventWriter<W> {
        EventWriter(out)
    }
}

impl<W: Write> Listener for EventWriter<W> {
    fn hear(&mut self, event: &Event<'_>) -> io::Result<()> {
        let line = match *event {
            Event::RunStarted { info, plan } => {
                Line::RunStarted { info: Box::new(info.clone()), plan: Names::of(plan) }
            }
            Event::Remark(text) => Line::Remark(text.to_owned()),
            Event::RoundStarted { round, seed, plan } => Line::RoundStarted { round, seed, plan: Names::of(plan) },
            Event::ClaimStarted { comm, claim, machine } => {
                Line::ClaimStarted { claim: claim.name.clone(), machine: machine.to_string(), comm: comm.to_owned() }
            }
            Event::ClaimFinished { record, .. } => Line::ClaimFinished(Box::new(record.clone())),
            Event::RoundFinished { round, stopped } => Line::RoundFinished { round, stopped: stopped.cloned() },
            Event::RunFinished { summary, stopped, elapsed } => {
                Line::RunFinished { summary: summary.clone(), stopped: stopped.cloned(), elapsed }
            }
        };
        let mut text = serde_json::to_vec(&line)?;
        text.push(b'\n');
        // In one piece: the kernel may die with the test that is announced here.
        self.0.write_all(&text)?;
        self.0.flush()
    }
}
