//! What becomes of the runner's events: text for people, KTAP, JSON and JUnit for programs.
//!
//! A reporter is a [`Listener`](crate::harness::event::Listener) that writes to one output. Results go there and nothing
//! else does.

mod ktap;
mod pretty;

pub use ktap::Ktap;
pub use pretty::{Pretty, Screen};
