//! What becomes of the runner's events: text for people, KTAP, JSON and JUnit for programs.
//!
//! A reporter is a [`Listener`](crate::harness::event::Listener) that writes to one output. Results go there and nothing
//! else does.

mod compare;
mod json;
mod junit;
mod ktap;
pub mod policies;
mod pretty;
mod story;

pub use compare::{Across, Change, Comparison, Criteria, Difference, Seen};
pub use json::{Document, Json, NotRun, SCHEMA, Tool};
pub use junit::Junit;
pub use ktap::Ktap;
pub use pretty::{Pretty, Screen};
