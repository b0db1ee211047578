//! JSON: one document that holds everything, and can be read back for comparison.

use std::io::{self, Write};

use serde::{Deserialize, Serialize};

use crate::harness::event::{Event, Listener, RunInfo};
use crate::harness::exit::Stopped;
use crate::harness::plan::Plan;
use crate::harness::runner::Rounds;
use crate::harness::{Record, Summary};
use crate::observe::Environment;

/// The value of `schema`. The number rises when a field changes its meaning or goes away; new fields do not change it.
pub const SCHEMA: &str = "gmemtest-results/1";

/// The results of a run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Document {
    /// [`SCHEMA`].
    pub schema: String,
    /// What made it.
    pub tool: Tool,
    /// The command line.
    pub arguments: Vec<String>,
    /// The seed that everything followed from.
    pub seed: String,
    /// The seed of the order, when it was shuffled.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shuffle: Option<String>,
    /// Most tests at a time.
    pub jobs: usize,
    /// How many rounds were planned; absent when the run had a duration instead.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rounds: Option<u64>,
    /// Specs of the machines.
    pub machines: Vec<String>,
    /// Seconds since the epoch when the run started.
    pub started: u64,
    /// Microseconds that it took.
    pub elapsed_us: u64,
    /// The kernel and the hardware.
    pub environment: Environment,
    /// What the user was told besides results.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub remarks: Vec<String>,
    /// In the order in which they came.
    pub results: Vec<Record>,
    /// Claims that were planned and not run, when the run ended early.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub not_run: Vec<NotRun>,
    /// Why the run ended early.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stopped: Option<String>,
    /// How many claims came out how.
    pub summary: Summary,
}

/// What made a document.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tool {
    /// `gmemtest`.
    pub name: String,
    /// Its version.
    pub version: String,
}

/// A claim that was planned and not run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NotRun {
    /// `suite::claim` or `suite::claim::row`.
    pub name: String,
    /// The machine's spec.
    pub machine: String,
    /// The round, from 0.
    pub round: u64,
}

impl Document {
    /// Reads a document.
    ///
    /// # Errors
    /// One line: not JSON, another schema, or a field that is missing or of another type.
    pub fn parse(text: &str) -> Result<Document, String> {
        #[derive(Deserialize)]
        struct Versioned {
            schema: String,
        }
        let versioned: Versioned =
            serde_json::from_str(text).map_err(|error| format!("not a results document: {error}"))?;
        if versioned.schema != SCHEMA {
            return Err(format!("schema '{}', this program reads '{SCHEMA}'", versioned.schema));
        }
        serde_json::from_str(text).map_err(|error| format!("not a results document: {error}"))
    }

    /// An empty document of a run.
    pub(super) fn new(info: &RunInfo, plan: &Plan) -> Document {
        Document {
            schema: SCHEMA.to_owned(),
            tool: Tool { name: "gmemtest".to_owned(), version: env!("CARGO_PKG_VERSION").to_owned() },
            arguments: info.arguments.clone(),
            seed: info.seed.to_string(),
            shuffle: info.shuffle.map(|seed| seed.to_string()),
            jobs: info.jobs,
            rounds: match info.rounds {
                Rounds::Count(count) => Some(count),
                Rounds::For(_) => None,
            },
            machines: plan.machines.iter().map(ToString::to_string).collect(),
            started: info.started,
            elapsed_us: 0,
            environment: info.environment.clone(),
            remarks: Vec::new(),
            results: Vec::new(),
            not_run: Vec::new(),
            stopped: None,
            summary: Summary::default(),
        }
    }
}

/// Writes JSON. Nothing is written before the end; `--journal` keeps results as they come.
pub struct Json<W> {
    out: W,
    gathered: Gathered,
}

/// A document that grows with the run's events.
#[derive(Default)]
pub(super) struct Gathered {
    /// The document, once the run has started.
    pub(super) document: Option<Document>,
    /// Claims of the round under way without a result.
    missing: Vec<NotRun>,
}

impl Gathered {
    /// Takes an event; true when the document is complete.
    pub(super) fn take(&mut self, event: &Event<'_>) -> bool {
        if let Event::RunStarted { info, plan } = event {
            self.document = Some(Document::new(info, plan));
        }
        let Some(document) = &mut self.document else {
            return false;
        };
        match event {
            Event::RunStarted { .. } | Event::ClaimStarted { .. } => {}
            Event::Remark(text) => document.remarks.push((*text).to_owned()),
            Event::RoundStarted { round, plan, .. } => self.missing = planned(*round, plan),
            Event::ClaimFinished { record, .. } => {
                self.missing.retain(|planned| planned.name != record.name || planned.machine != record.machine);
                document.results.push((*record).clone());
            }
            Event::RoundFinished { .. } => document.not_run.append(&mut self.missing),
            Event::RunFinished { summary, stopped, elapsed } => {
                document.summary = (*summary).clone();
                document.stopped = stopped.map(Stopped::to_string);
                document.elapsed_us = elapsed.as_micros() as u64;
                return true;
            }
        }
        false
    }
}

fn planned(round: u64, plan: &Plan) -> Vec<NotRun> {
    let mut planned = Vec::with_capacity(plan.results_per_round());
    for machine in &plan.machines {
        let machine = machine.to_string();
        planned.extend(plan.claims.iter().map(|claim| NotRun {
            name: claim.name.clone(),
            machine: machine.clone(),
            round,
        }));
    }
    planned
}

impl<W: Write> Json<W> {
    /// Writes to `out`.
    pub fn new(out: W) -> Json<W> {
        Json { out, gathered: Gathered::default() }
    }
}

impl<W: Write> Listener for Json<W> {
    fn hear(&mut self, event: &Event<'_>) -> io::Result<()> {
        if !self.gathered.take(event) {
            return Ok(());
        }
        serde_json::to_writer_pretty(&mut self.out, &self.gathered.document)?;
        writeln!(self.out)?;
        self.out.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_schema_is_named() {
        let error = Document::parse(r#"{"schema": "gmemtest-results/9", "results": {}}"#).unwrap_err();
        assert_eq!(error, "schema 'gmemtest-results/9', this program reads 'gmemtest-results/1'");
        assert!(Document::parse("[]").unwrap_err().starts_with("not a results document"));
    }
}
