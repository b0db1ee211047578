//! SEAMCALL scripts: text in, calls to the simulated TDX module, expectations compared.
//!
//! A script drives the module alone, no KVM and no guest_memfd around it. [`parse()`] reads it; [`run()`] refuses names that nothing has
//! made, and executes it statement by statement and stops at the first result that differs from what was
//! expected. The language is described in `docs/seam-scripts.md`.

mod args;
pub mod ast;
mod error;
pub mod expect;
pub mod expr;
mod lex;
mod names;
mod parse;
mod parse_fault;
mod parse_guest;
mod parse_look;
mod read;
mod run;

pub use error::ScriptError;
pub use parse::{KEYWORDS, parse};
pub use read::read;
pub use run::{Failure, Mismatch, Summary, run};
