//! Tests and suites, requirements, isolation, time limits, journal, seeds.
//!
//! A test is a function with a claim for a name ([`Test`]); a [`Suite`] is an explicit table of tests. A test gets a
//! [`Context`] and returns a [`TestResult`]; how it may end early is a [`Stop`].

mod claim;
mod context;
mod fork;
mod seed;
mod stop;
pub mod test;

pub use context::{Context, Notes, by_release};
pub use fork::{ChildEnd, in_child};
pub use seed::{Rng, Seed};
pub use stop::{Failure, Stop, TestResult};
pub use test::{Body, Sharing, Suite, Test, row_names};
