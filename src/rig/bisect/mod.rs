//! Bisection: which kernel, or which commit, is the first bad one.
//!
//! [`search`] finds where the verdict changes in a list of images, [`tree`] lets git choose revisions and builds them.
//! Either asks a [`Runner`] for one run of the tests after another until [`sequential`] has enough of them for a verdict,
//! and keeps every verdict in a [`log`], from which an interrupted bisection goes on. [`rigged`] runs the tests in a
//! kernel under QEMU, [`host`] on another machine that is made to boot the kernel.

mod child;
mod git;
mod host;
mod log;
mod rigged;
mod search;
mod sequential;
mod tree;
mod worktree;

use anyhow::Result;
use serde::{Deserialize, Serialize};

pub use host::{Deploy, HostRunner};
pub use log::{Header, Log};
pub use rigged::RigRunner;
pub use search::{Found, change};
pub use sequential::{Rates, Sequential, Tendency};
pub use tree::{BuildOptions, Tree, TreeFound};

use super::boot_image::BootImage;
use crate::harness::exit::{ExitStyle, FAILED, GOOD, Stopped};
use crate::harness::{Record, Summary};

/// Failed results that are kept as evidence of one kernel.
const KEPT: usize = 10;
/// Runs without a verdict in a row after which a kernel cannot be judged.
const UNTOLD: u32 = 2;

/// What is thought of a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// The tests do not fail.
    Good,
    /// They do.
    Bad,
    /// It cannot be built, or booted, or judged.
    CannotTell,
}

impl Verdict {
    /// The word for people.
    pub fn word(self) -> &'static str {
        match self {
            Verdict::Good => "good",
            Verdict::Bad => "bad",
            Verdict::CannotTell => "cannot tell",
        }
    }
}

/// One run of the tests.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trial {
    /// How many claims came out how; `None` when the run did not begin.
    pub summary: Option<Summary>,
    /// Why it ended early.
    pub stopped: Option<String>,
    /// Results that count as failures, the first ones.
    pub failures: Vec<Record>,
    /// The end of the console, or what the build or the other machine said, when there is no result.
    pub tail: Vec<String>,
}

impl Trial {
    /// A run that did not begin.
    pub fn none(why: impl Into<String>, tail: Vec<String>) -> Trial {
        Trial { summary: None, stopped: Some(why.into()), failures: Vec::new(), tail }
    }

    /// A run that began.
    pub fn of(summary: Summary, stopped: Option<&Stopped>, records: &[Record]) -> Trial {
        let failures = records.iter().filter(|record| record.outcome.counts_as_failure()).take(KEPT).cloned();
        Trial {
            summary: Some(summary),
            stopped: stopped.map(ToString::to_string),
            failures: failures.collect(),
            tail: Vec::new(),
        }
    }

    /// How many results count as failures besides those that are kept.
    pub fn failures_left_out(&self) -> u64 {
        let failed = self.summary.as_ref().map_or(0, Summary::failures);
        failed.saturating_sub(self.failures.len() as u64)
    }

    /// What the run says by itself: as the exit code of `run --exit-style bisect`.
    pub fn verdict(&self) -> Verdict {
        let Some(summary) = &self.summary else { return Verdict::CannotTell };
        let lost = self.stopped.clone().map(Stopped::MachineLost);
        match ExitStyle::Bisect.code(summary, lost.as_ref()) {
            GOOD => Verdict::Good,
            FAILED => Verdict::Bad,
            _ => Verdict::CannotTell,
        }
    }

    /// Whether it ran and every claim was skipped, which says nothing of the kernel.
    pub fn is_all_skipped(&self) -> bool {
        self.summary.as_ref().is_some_and(|summary| summary.skip > 0 && summary.skip == summary.run())
    }

    /// One line.
    pub fn headline(&self) -> String {
        let counts = self
            .summary
            .as_ref()
            .map(|summary| format!("{} passed, {} failed, {} skipped", summary.pass, summary.failures(), summary.skip));
        let parts: Vec<String> = counts.into_iter().chain(self.stopped.clone()).collect();
        parts.join("; ")
    }
}

/// Something that runs the tests once on a kernel.
pub trait Runner {
    /// Makes ready for runs on this kernel; `None` when it is ready, and a run without a result when it cannot be.
    ///
    /// # Errors
    /// What makes every further kernel fail too.
    fn prepare(&mut self, image: &BootImage) -> Result<Option<Trial>>;

    /// Runs the tests.
    ///
    /// # Errors
    /// What makes every further run fail too: no QEMU, no other machine.
    fn run(&mut self, image: &BootImage) -> Result<Trial>;
}

/// The verdict on one kernel, and what it rests on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Judged {
    /// Revision, or path of the image.
    pub subject: String,
    /// The verdict.
    pub verdict: Verdict,
    /// Runs that failed.
    pub failed: u32,
    /// Runs that did not.
    pub passed: u32,
    /// Runs that said nothing.
    pub untold: u32,
    /// The run that speaks for the verdict: the last one that failed for a bad kernel, else the last one.
    pub evidence: Trial,
}

impl Judged {
    /// A kernel that could not even be tried.
    pub fn untried(subject: &str, evidence: Trial) -> Judged {
        Judged { subject: subject.to_owned(), verdict: Verdict::CannotTell, failed: 0, passed: 0, untold: 0, evidence }
    }
}

/// Runs the tests on a kernel until the accepted error rates are reached, at most `most` times.
///
/// # Errors
/// What the runner returns.
pub fn judge(subject: &str, image: &BootImage, runner: &mut dyn Runner, rates: Rates, most: u32) -> Result<Judged> {
    if let Some(untried) = runner.prepare(image)? {
        return Ok(Judged::untried(subject, untried));
    }
    let mut runs = Sequential::new(rates);
    let (mut untold, mut in_a_row) = (0, 0);
    let mut evidence = Trial::default();
    let verdict = loop {
        let trial = runner.run(image)?;
        let told = trial.verdict();
        if told == Verdict::Bad || runs.failed == 0 {
            evidence = trial;
        }
        let tendency = match told {
            Verdict::Bad => runs.fail(),
            Verdict::Good => runs.pass(),
            Verdict::CannotTell => {
                untold += 1;
                in_a_row += 1;
                if in_a_row == UNTOLD {
                    break Verdict::CannotTell;
                }
                continue;
            }
        };
        in_a_row = 0;
        match tendency {
            Tendency::Good => break Verdict::Good,
            Tendency::Bad => break Verdict::Bad,
            Tendency::Open if runs.failed + runs.passed >= most => break Verdict::CannotTell,
            Tendency::Open => {}
        }
    };
    let subject = subject.to_owned();
    Ok(Judged { subject, verdict, failed: runs.failed, passed: runs.passed, untold, evidence })
}
