//! What a test is given: [`Context`].

use std::cell::RefCell;
use std::fmt;

use super::{Rng, Seed, Stop, TestResult};
use crate::machine::{Facility, Machine, Release};

/// What a test is given: the machine, its seed, and a place for remarks.
pub struct Context<'a> {
    machine: &'a dyn Machine,
    name: &'a str,
    seed: Seed,
    notes: &'a dyn Notes,
}

/// Where the remarks of a test go.
pub trait Notes {
    /// Takes one remark. What was said is kept even when the test does not come to its end.
    fn note(&self, text: String);
}

/// Remarks kept in memory, for tests of tests.
impl Notes for RefCell<Vec<String>> {
    fn note(&self, text: String) {
        self.borrow_mut().push(text);
    }
}

impl<'a> Context<'a> {
    /// A context for the claim called `name`.
    pub fn new(machine: &'a dyn Machine, name: &'a str, seed: Seed, notes: &'a dyn Notes) -> Context<'a> {
        Context { machine, name, seed, notes }
    }

    /// The machine under test.
    pub fn machine(&self) -> &'a dyn Machine {
        self.machine
    }

    /// The full name of the running claim.
    pub fn name(&self) -> &'a str {
        self.name
    }

    /// The seed of this test, derived from the run's seed and the test's name.
    pub fn seed(&self) -> Seed {
        self.seed
    }

    /// A generator that starts at this test's seed.
    pub fn rng(&self) -> Rng {
        self.seed.rng()
    }

    /// The kernel release whose behaviour the machine shows.
    pub fn kernel_release(&self) -> Release {
        self.machine.release()
    }

    /// Skips the test unless the machine has `facility`; for what only some rows or some branches need.
    ///
    /// # Errors
    /// [`Stop::Skip`] with the kind and the reason that the machine gives.
    pub fn require(&self, facility: Facility) -> TestResult {
        match Stop::unless_present(facility, &self.machine.facility(facility)) {
            None => Ok(()),
            Some(stop) => Err(stop),
        }
    }

    /// Whether the machine has `facility`; for a test that asserts more where more is there.
    pub fn has(&self, facility: Facility) -> bool {
        self.machine.facility(facility).is_present()
    }

    /// What is right for the machine's kernel release, from a table of `((major, minor), value)` in rising order: the
    /// last entry that is not newer than the kernel. A comment at the table names the commit behind each change.
    ///
    /// ```
    /// # use gmemtest::harness::by_release;
    /// # use gmemtest::machine::{Errno, Release};
    /// // 7.2 gave overlapping bindings an errno of their own.
    /// let overlap = [((6, 8), Errno::EINVAL), ((7, 2), Errno::EEXIST)];
    /// assert_eq!(by_release(Release::series(7, 3), &overlap), Some(&Errno::EEXIST));
    /// assert_eq!(by_release(Release::series(6, 1), &overlap), None);
    /// ```
    ///
    /// # Errors
    /// [`Stop::Skip`] of the kind `unsupported-kernel` when the kernel is older than the first entry.
    pub fn by_release<T: Clone>(&self, table: &[((u32, u32), T)]) -> TestResult<T> {
        by_release(self.kernel_release(), table).cloned().ok_or_else(|| {
            let first =
                table.first().map_or_else(String::new, |((major, minor), _)| format!(" before {major}.{minor}"));
            let release = self.kernel_release();
            Stop::skip(
                crate::machine::SkipKind::UnsupportedKernel,
                format!("nothing is promised{first}, this is {release}"),
            )
        })
    }

    /// Leaves a remark in the result: a measured number, the way that was taken.
    pub fn note(&self, text: impl fmt::Display) {
        self.notes.note(text.to_string());
    }
}

/// The last entry of `table` that is not newer than `release`; `None` when all are newer.
pub fn by_release<T>(release: Release, table: &[((u32, u32), T)]) -> Option<&T> {
    table.iter().rev().find(|((major, minor), _)| Release::series(*major, *minor) <= release).map(|(_, value)| value)
}
