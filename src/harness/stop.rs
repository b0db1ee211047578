//! How a test ends before its last line: [`Stop`].

use std::fmt;
use std::panic::Location;

use crate::machine::{Availability, ConvertError, Errno, HostFault, SkipKind};

/// What a test returns: `Ok(())` is a pass, anything else is a [`Stop`].
///
/// Helpers of a selftest return `TestResult<T>`, so that `?` carries a failure up with the place where it was found.
pub type TestResult<T = ()> = Result<T, Stop>;

/// Why a test ended without a pass. It is a value: nothing is unwound.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stop {
    /// An assertion did not hold, or a call that had to succeed did not.
    Fail(Failure),
    /// The test cannot be judged here.
    Skip {
        /// The machine-readable kind of the missing prerequisite.
        kind: SkipKind,
        /// What is missing and what would provide it, in one line.
        reason: String,
    },
}

/// A failed assertion: what was claimed, what was seen, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// The claim, the framed `actual` and `expected` values, or the message of an unexpected error.
    pub message: String,
    /// `file:line` of the assertion, or of the `?` that met an unexpected error.
    pub location: String,
}

impl Failure {
    /// A failure with a message of its own, at the caller's line.
    #[track_caller]
    pub fn new(message: impl Into<String>) -> Failure {
        let location = Location::caller();
        Failure { message: message.into(), location: format!("{}:{}", location.file(), location.line()) }
    }

    /// A comparison that did not hold: both values are framed under the claim, one a line, so that they can be
    /// compared by eye even when they are long.
    #[track_caller]
    pub fn compared(
        what: impl fmt::Display,
        actual: &dyn fmt::Debug,
        relation: &str,
        expected: &dyn fmt::Debug,
    ) -> Failure {
        Failure::new(format!("{what}\n  {:>8}: {actual:?}\n  {relation:>8}: {expected:?}", "actual"))
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}\n  at {}", self.message, self.location)
    }
}

impl Stop {
    /// A failure with a message of its own, at the caller's line.
    #[track_caller]
    pub fn fail(message: impl Into<String>) -> Stop {
        Stop::Fail(Failure::new(message))
    }

    /// A typed skip. The reason names what is missing and, where that is known, what would provide it.
    pub fn skip(kind: SkipKind, reason: impl Into<String>) -> Stop {
        Stop::Skip { kind, reason: reason.into() }
    }

    /// The skip for an absent facility; `None` when it is present.
    pub fn unless_present(what: impl fmt::Display, availability: &Availability) -> Option<Stop> {
        match availability {
            Availability::Present { .. } => None,
            Availability::Absent { kind, why, mend } => {
                let mend = if mend.is_empty() { String::new() } else { format!(" ({mend})") };
                Some(Stop::skip(*kind, format!("{what}: {why}{mend}")))
            }
        }
    }
}

impl From<Failure> for Stop {
    fn from(failure: Failure) -> Stop {
        Stop::Fail(failure)
    }
}

impl From<Errno> for Stop {
    #[track_caller]
    fn from(errno: Errno) -> Stop {
        Stop::fail(format!("unexpected {errno}"))
    }
}

impl From<std::io::Error> for Stop {
    #[track_caller]
    fn from(error: std::io::Error) -> Stop {
        Stop::fail(format!("unexpected error: {error}"))
    }
}

impl From<HostFault> for Stop {
    #[track_caller]
    fn from(fault: HostFault) -> Stop {
        Stop::fail(format!("unexpected {fault:?}"))
    }
}

impl From<ConvertError> for Stop {
    #[track_caller]
    fn from(error: ConvertError) -> Stop {
        Stop::fail(format!("unexpected {error:?}"))
    }
}
