//! Tests and suites: explicit tables of functions.
//!
//! A selftest file is plain functions and one [`suite!`](crate::suite) table that says what each of them claims:
//!
//! ```
//! use gmemtest::harness::{Context, TestResult};
//! use gmemtest::machine::{Errno, VmConfig};
//! use gmemtest::claim_err;
//!
//! gmemtest::suite! {
//!     /// KVM_CREATE_GUEST_MEMFD: which sizes and flags it takes.
//!     pub static SUITE: gmem_create needs [Vm, GuestMemfd] {
//!         /// A size of zero is refused with EINVAL (kvm_gmem_create()). A failure means that empty files can be made.
//!         size_of_zero_is_refused;
//!
//!         /// A size that is not a multiple of the page size is refused with EINVAL (kvm_gmem_create()).
//!         unaligned_size_is_refused[UNALIGNED] timeout 30;
//!     }
//! }
//!
//! /// Name of the row, size in bytes.
//! const UNALIGNED: &[(&str, u64)] = &[("one_byte", 1), ("page_and_a_byte", 4097)];
//!
//! fn size_of_zero_is_refused(cx: &Context) -> TestResult {
//!     let vm = cx.machine().create_vm(VmConfig::Bare)?;
//!     claim_err!(vm.create_guest_memfd(0, 0), Errno::EINVAL, "a guest_memfd of no bytes");
//!     Ok(())
//! }
//!
//! fn unaligned_size_is_refused(cx: &Context, &size: &u64) -> TestResult {
//!     let vm = cx.machine().create_vm(VmConfig::Bare)?;
//!     claim_err!(vm.create_guest_memfd(size, 0), Errno::EINVAL, "a guest_memfd of {size} bytes");
//!     Ok(())
//! }
//! assert_eq!(SUITE.tests[1].claims(&SUITE), ["gmem_create::unaligned_size_is_refused::one_byte", "gmem_create::unaligned_size_is_refused::page_and_a_byte"]);
//! ```
//!
//! The promise stands in the table and not at the function because a declarative macro can capture a doc comment only
//! from what it wraps, and rustfmt leaves wrapped functions alone.

use std::time::Duration;

use super::{Context, TestResult};
use crate::machine::Facility;

/// A subject: the tests of one selftest file.
#[derive(Debug)]
pub struct Suite {
    /// The first part of every claim's name.
    pub name: &'static str,
    /// The subject, one paragraph.
    pub doc: &'static str,
    /// What every test of the suite needs.
    pub needs: &'static [Facility],
    /// The tests, in the order in which they are run.
    pub tests: &'static [Test],
}

/// One test function: one claim, or a table of rows each of which is a claim.
#[derive(Debug)]
pub struct Test {
    /// The function's name, which reads as a claim.
    pub name: &'static str,
    /// The kernel's promise, its source, and what a failure means.
    pub doc: &'static str,
    /// What it needs besides the suite's own needs.
    pub needs: &'static [Facility],
    /// Its own time limit; `None` for the run's.
    pub timeout: Option<Duration>,
    /// Whether other tests may run beside it.
    pub sharing: Sharing,
    /// Texts in the kernel log that this test causes on purpose: a complaint that contains one is not held against it.
    pub log_allowed: &'static [&'static str],
    /// The function.
    pub body: Body,
}

/// Whether other tests may run at the same time (`--jobs`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sharing {
    /// It looks at its own VMs and files only.
    Parallel,
    /// It looks at, or turns, something that the whole system shares.
    Alone,
}

/// What a test runs.
#[derive(Debug, Clone, Copy)]
pub enum Body {
    /// One claim.
    Claim(fn(&Context) -> TestResult),
    /// One claim a row. Each row runs in a process of its own.
    Table {
        /// The names of the rows.
        rows: fn() -> Vec<&'static str>,
        /// Runs the row with that index.
        run: fn(&Context, usize) -> TestResult,
    },
}

impl Test {
    /// The names of the claims: `suite::test`, or `suite::test::row` for each row.
    pub fn claims(&self, suite: &Suite) -> Vec<String> {
        match self.body {
            Body::Claim(_) => vec![format!("{}::{}", suite.name, self.name)],
            Body::Table { rows, .. } => {
                rows().into_iter().map(|row| format!("{}::{}::{row}", suite.name, self.name)).collect()
            }
        }
    }
}

/// The names of a table's rows; used by [`suite!`](crate::suite).
pub fn row_names<T>(rows: &[(&'static str, T)]) -> Vec<&'static str> {
    rows.iter().map(|(name, _)| *name).collect()
}

/// Declares a suite: see [the module](crate::harness::test) for an example.
///
/// `/// doc` `NAME;` for a function `fn NAME(cx: &Context) -> TestResult`, and `NAME[ROWS];` for a table: `ROWS` is a
/// `&'static [(&'static str, T)]` and the function is `fn NAME(cx: &Context, row: &T) -> TestResult`. After the name may
/// follow, in this order: `needs [Facility, ..]`, `timeout SECONDS`, `allows ["text in the kernel log", ..]`,
/// `runs Alone`.
#[macro_export]
macro_rules! suite {
    (
        $(#[doc = $suite_doc:literal])+
        $vis:vis static $table:ident : $suite:ident $(needs [$($suite_need:ident),* $(,)?])? {
            $(
                $(#[doc = $doc:literal])+
                $name:ident $([$rows:expr])?
                $(needs [$($need:ident),* $(,)?])?
                $(timeout $seconds:literal)?
                $(allows [$($allowed:literal),* $(,)?])?
                $(runs $sharing:ident)?
                ;
            )*
        }
    ) => {
        $(#[doc = $suite_doc])+
        $vis static $table: $crate::harness::Suite = $crate::harness::Suite {
            name: stringify!($suite),
            doc: concat!($($suite_doc, "\n"),+),
            needs: &[$($($crate::machine::Facility::$suite_need),*)?],
            tests: &[$(
                $crate::harness::Test {
                    name: stringify!($name),
                    doc: concat!($($doc, "\n"),+),
                    needs: &[$($($crate::machine::Facility::$need),*)?],
                    timeout: $crate::suite!(@timeout $($seconds)?),
                    sharing: $crate::suite!(@sharing $($sharing)?),
                    log_allowed: &[$($($allowed),*)?],
                    body: $crate::suite!(@body $name $($rows)?),
                },
            )*],
        };
    };
    (@timeout) => { ::core::option::Option::None };
    (@timeout $seconds:literal) => { ::core::option::Option::Some(::core::time::Duration::from_secs($seconds)) };
    (@sharing) => { $crate::harness::Sharing::Parallel };
    (@sharing $sharing:ident) => { $crate::harness::Sharing::$sharing };
    (@body $name:ident) => { $crate::harness::Body::Claim($name) };
    (@body $name:ident $rows:expr) => {
        $crate::harness::Body::Table {
            rows: || $crate::harness::row_names($rows),
            run: |cx, index| $name(cx, &$rows[index].1),
        }
    };
}
