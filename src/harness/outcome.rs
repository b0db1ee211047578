//! How a claim came out, and everything that is kept about it.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::machine::SkipKind;

/// How a claim came out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// Every assertion held.
    Pass,
    /// An assertion did not hold, or a call failed that had to succeed.
    Fail,
    /// Not judged, for a typed reason.
    Skip,
    /// Failed as the known-issues table says it must on this kernel.
    Known,
    /// The time limit passed.
    Timeout,
    /// The test's process died before its verdict.
    Crash,
    /// The harness could not do its part, or the test left processes behind.
    Error,
    /// Passed, but the kernel complained meanwhile. Counts as a failure.
    Tainted,
}

impl Outcome {
    /// Every outcome, in the order in which summaries list them.
    pub const ALL: [Outcome; 8] = [
        Outcome::Pass,
        Outcome::Fail,
        Outcome::Tainted,
        Outcome::Crash,
        Outcome::Timeout,
        Outcome::Error,
        Outcome::Known,
        Outcome::Skip,
    ];

    /// The machine-readable word.
    pub fn word(self) -> &'static str {
        match self {
            Outcome::Pass => "pass",
            Outcome::Fail => "fail",
            Outcome::Skip => "skip",
            Outcome::Known => "known",
            Outcome::Timeout => "timeout",
            Outcome::Crash => "crash",
            Outcome::Error => "error",
            Outcome::Tainted => "tainted",
        }
    }

    /// Whether a run with this outcome in it is not a good run.
    pub fn counts_as_failure(self) -> bool {
        match self {
            Outcome::Pass | Outcome::Skip | Outcome::Known => false,
            Outcome::Fail | Outcome::Timeout | Outcome::Crash | Outcome::Error | Outcome::Tainted => true,
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.word())
    }
}

/// The kind and the reason of a skip.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Skipped {
    /// The word of a [`SkipKind`].
    pub kind: String,
    /// What is missing and what would provide it.
    pub reason: String,
}

impl Skipped {
    /// The skip of that kind and reason.
    pub fn new(kind: SkipKind, reason: impl Into<String>) -> Skipped {
        Skipped { kind: kind.word().to_owned(), reason: reason.into() }
    }
}

/// What a process wrote to one of its streams.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Output {
    /// The text; when it was long, its beginning and its end with a line between them that says how much was left out.
    pub text: String,
    /// Bytes written in all.
    pub bytes: u64,
}

/// Where a thread was when its time limit passed, from `/proc/PID/task/TID`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StuckThread {
    /// Process and thread id.
    pub pid: i32,
    /// Thread id.
    pub tid: i32,
    /// `comm`.
    pub name: String,
    /// The state letter of `stat`: `D` for uninterruptible sleep.
    pub state: String,
    /// `wchan`: the kernel function it sleeps in; empty when it runs.
    pub wchan: String,
    /// `syscall`: number, arguments, stack pointer, instruction pointer.
    pub syscall: String,
    /// `stack`: the kernel stack; readable by root only.
    pub stack: Vec<String>,
}

/// A process that a test left behind.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Leftover {
    /// Process id.
    pub pid: i32,
    /// `comm`.
    pub name: String,
    /// Whether it had left the test's process group.
    pub escaped: bool,
    /// Whether it went away when it was killed.
    pub killed: bool,
}

/// The result of one claim on one machine in one round.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// `suite::claim` or `suite::claim::row`.
    pub name: String,
    /// The spec of the machine it was obtained on.
    pub machine: String,
    /// The round of a repeated run, from 0.
    pub round: u64,
    /// The seed of that round, for `--seed`.
    pub seed: String,
    /// How it came out.
    pub outcome: Outcome,
    /// Kind and reason when it was skipped.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub skip: Option<Skipped>,
    /// The failed assertion with its values, or what happened to the process.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// `file:line` of the failed assertion.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub location: Option<String>,
    /// The id of the known issue that explains the failure, or that was expected and did not show.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub known_issue: Option<String>,
    /// The test's own remarks, then the harness's.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
    /// Microseconds from the start of the run.
    pub started_us: u64,
    /// Microseconds from the start of the process to its verdict collected and its remains cleared away.
    pub duration_us: u64,
    /// Microseconds of `duration_us` in which the test's own code ran; the rest is the harness's cost.
    pub test_us: u64,
    /// Standard output of the test's process.
    #[serde(default, skip_serializing_if = "Output::is_empty")]
    pub stdout: Output,
    /// Standard error of the test's process.
    #[serde(default, skip_serializing_if = "Output::is_empty")]
    pub stderr: Output,
    /// Complaints in the kernel log, and new taint, while it ran.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub kernel_log: Vec<String>,
    /// The other claims that ran during one of those complaints; any of them may be the cause.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub overlapped: Vec<String>,
    /// Processes that it left behind.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub leftovers: Vec<Leftover>,
    /// Where its threads were when the time limit passed.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub stuck: Vec<StuckThread>,
}

impl Output {
    /// Whether nothing was written.
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }
}

impl Record {
    /// A passed record with nothing in it yet.
    pub fn new(name: &str, machine: &str, round: u64, seed: String) -> Record {
        Record {
            name: name.to_owned(),
            machine: machine.to_owned(),
            round,
            seed,
            outcome: Outcome::Pass,
            skip: None,
            message: None,
            location: None,
            known_issue: None,
            notes: Vec::new(),
            started_us: 0,
            duration_us: 0,
            test_us: 0,
            stdout: Output::default(),
            stderr: Output::default(),
            kernel_log: Vec::new(),
            overlapped: Vec::new(),
            leftovers: Vec::new(),
            stuck: Vec::new(),
        }
    }

    /// What there is to say about the outcome in one line: the first line of the message, or the skip's kind and reason.
    pub fn headline(&self) -> String {
        match (&self.skip, &self.message) {
            (Some(skip), None) => format!("{}: {}", skip.kind, skip.reason),
            (_, Some(message)) => message.lines().next().unwrap_or_default().to_owned(),
            (None, None) => String::new(),
        }
    }
}

/// How many claims came out how.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Summary {
    /// Claims that passed.
    pub pass: u64,
    /// Claims that failed.
    pub fail: u64,
    /// Claims that were skipped.
    pub skip: u64,
    /// Failures that the known-issues table explains.
    pub known: u64,
    /// Time limits passed.
    pub timeout: u64,
    /// Processes that died.
    pub crash: u64,
    /// Failures of the harness.
    pub error: u64,
    /// Passes during which the kernel complained.
    pub tainted: u64,
    /// Claims that were planned and not run.
    pub not_run: u64,
}

impl Summary {
    /// Counts one outcome.
    pub fn count(&mut self, outcome: Outcome) {
        *self.slot(outcome) += 1;
    }

    /// How many claims had that outcome.
    pub fn of(&self, outcome: Outcome) -> u64 {
        *self.clone().slot(outcome)
    }

    /// How many claims have an outcome.
    pub fn run(&self) -> u64 {
        Outcome::ALL.iter().map(|&outcome| self.of(outcome)).sum()
    }

    /// How many claims count as failures.
    pub fn failures(&self) -> u64 {
        Outcome::ALL.iter().filter(|outcome| outcome.counts_as_failure()).map(|&outcome| self.of(outcome)).sum()
    }

    fn slot(&mut self, outcome: Outcome) -> &mut u64 {
        match outcome {
            Outcome::Pass => &mut self.pass,
            Outcome::Fail => &mut self.fail,
            Outcome::Skip => &mut self.skip,
            Outcome::Known => &mut self.known,
            Outcome::Timeout => &mut self.timeout,
            Outcome::Crash => &mut self.crash,
            Outcome::Error => &mut self.error,
            Outcome::Tainted => &mut self.tainted,
        }
    }
}
