//! The exit codes of the runner and of every test binary.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::{Outcome, Summary};

/// Every claim that was judged passed, or failed as the known-issues table says.
pub const GOOD: u8 = 0;
/// At least one claim failed, timed out, crashed, or passed while the kernel complained. The code that
/// `git bisect run` reads as "bad".
pub const FAILED: u8 = 1;
/// The command line asks for something that cannot be: unknown flag or machine, a pattern that matches nothing, an
/// output file that cannot be written.
pub const USAGE: u8 = 2;
/// Everything was skipped (KSFT_SKIP).
pub const SKIPPED: u8 = 4;
/// `--exit-style bisect`: this revision cannot be judged; `git bisect run` skips it.
pub const CANNOT_TELL: u8 = 125;
/// `--exit-style bisect`: the set-up is wrong, so that every further revision would be judged wrongly; any code above
/// 127 ends `git bisect run`.
pub const STOP_BISECTION: u8 = 255;

/// Which convention the exit code follows.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum ExitStyle {
    /// [`GOOD`], [`FAILED`], [`USAGE`], [`SKIPPED`].
    #[default]
    Kselftest,
    /// [`GOOD`], [`FAILED`], [`SKIPPED`], and [`FAILED`] for a usage error as well: kselftest's own runner reads 2 as an
    /// expected failure (KSFT_XFAIL), which is none.
    KselftestRunner,
    /// [`GOOD`], [`FAILED`], [`CANNOT_TELL`], [`STOP_BISECTION`].
    Bisect,
}

impl FromStr for ExitStyle {
    type Err = String;

    fn from_str(text: &str) -> Result<ExitStyle, String> {
        match text {
            "kselftest" => Ok(ExitStyle::Kselftest),
            "kselftest-runner" => Ok(ExitStyle::KselftestRunner),
            "bisect" => Ok(ExitStyle::Bisect),
            _ => Err("expected kselftest, kselftest-runner or bisect".to_owned()),
        }
    }
}

/// Why a run ended before everything planned was run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Stopped {
    /// SIGINT, SIGTERM or SIGHUP: its number.
    Signal(i32),
    /// `--until-fail`: a claim failed.
    FirstFailure,
    /// A process survives SIGKILL, so that the kernel is stuck.
    Unkillable,
    /// The machine that the tests ran on was lost: a boot of the rig ended before the run did, and why.
    MachineLost(String),
    /// The results, or the journal, cannot be written any more: the reason.
    CannotWrite(String),
}

impl fmt::Display for Stopped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Stopped::Signal(number) => {
                let name = nix::sys::signal::Signal::try_from(*number).map_or("a signal", |signal| signal.as_str());
                write!(f, "stopped by {name}")
            }
            Stopped::FirstFailure => f.write_str("stopped at the first failure"),
            Stopped::Unkillable => f.write_str("stopped because a process survives SIGKILL: the kernel is stuck"),
            Stopped::MachineLost(why) => write!(f, "stopped because the machine was lost: {why}"),
            Stopped::CannotWrite(why) => write!(f, "stopped because results cannot be written: {why}"),
        }
    }
}

impl ExitStyle {
    /// The code of a run that ended by itself.
    ///
    /// A run that was stopped by a signal ends with 128 and the signal's number in either style, as a shell reports it;
    /// being above 127 that ends a bisection too.
    pub fn code(self, summary: &Summary, stopped: Option<&Stopped>) -> u8 {
        match (stopped, self) {
            (Some(Stopped::Signal(number)), _) => return 128u8.saturating_add(u8::try_from(*number).unwrap_or(127)),
            (Some(Stopped::CannotWrite(_)), style) => return style.usage(),
            (Some(Stopped::FirstFailure | Stopped::Unkillable | Stopped::MachineLost(_)) | None, _) => {}
        }
        match self {
            ExitStyle::Kselftest | ExitStyle::KselftestRunner => {
                // A run that lost its machine is not good, whatever had passed until then.
                if summary.failures() > 0 || matches!(stopped, Some(Stopped::MachineLost(_))) {
                    FAILED
                } else if summary.run() == summary.skip {
                    SKIPPED
                } else {
                    GOOD
                }
            }
            ExitStyle::Bisect => {
                // A time limit or the harness's own failure says nothing about the revision; an assertion, a dead test
                // process and a kernel that complains do.
                let bad = [Outcome::Fail, Outcome::Crash, Outcome::Tainted].iter().any(|&bad| summary.of(bad) > 0);
                if bad {
                    FAILED
                } else if summary.failures() > 0
                    || summary.run() == summary.skip
                    || matches!(stopped, Some(Stopped::MachineLost(_)))
                {
                    CANNOT_TELL
                } else {
                    GOOD
                }
            }
        }
    }

    /// The code for a command line that cannot be carried out.
    pub fn usage(self) -> u8 {
        match self {
            ExitStyle::Kselftest => USAGE,
            ExitStyle::KselftestRunner => FAILED,
            ExitStyle::Bisect => STOP_BISECTION,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(outcomes: &[Outcome]) -> Summary {
        let mut summary = Summary::default();
        outcomes.iter().for_each(|&outcome| summary.count(outcome));
        summary
    }

    #[test]
    fn kselftest_codes() {
        use Outcome::*;
        let code = |outcomes: &[Outcome]| ExitStyle::Kselftest.code(&of(outcomes), None);
        assert_eq!(code(&[Pass, Known, Skip]), GOOD);
        assert_eq!(code(&[Known]), GOOD);
        assert_eq!(code(&[Skip, Skip]), SKIPPED);
        for bad in [Fail, Timeout, Crash, Error, Tainted] {
            assert_eq!(code(&[Pass, bad, Skip]), FAILED, "{bad}");
        }
    }

    #[test]
    fn bisect_codes() {
        use Outcome::*;
        let code = |outcomes: &[Outcome]| ExitStyle::Bisect.code(&of(outcomes), None);
        assert_eq!(code(&[Pass, Skip]), GOOD);
        assert_eq!(code(&[Skip]), CANNOT_TELL);
        assert_eq!(code(&[Pass, Timeout]), CANNOT_TELL);
        assert_eq!(code(&[Pass, Error]), CANNOT_TELL);
        assert_eq!(code(&[Timeout, Fail]), FAILED);
        assert_eq!(code(&[Crash]), FAILED);
        assert_eq!(code(&[Tainted]), FAILED);
    }

    #[test]
    fn a_signal_gives_what_a_shell_would_report() {
        let stopped = Stopped::Signal(libc::SIGINT);
        assert_eq!(ExitStyle::Kselftest.code(&of(&[Outcome::Pass]), Some(&stopped)), 130);
        assert_eq!(ExitStyle::Bisect.code(&of(&[Outcome::Fail]), Some(&stopped)), 130);
    }
}
