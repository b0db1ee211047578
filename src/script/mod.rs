//! Sequences of operations as text.
//!
//! [`seam`] is the language of SEAMCALL scripts, which drive the simulated TDX module alone.

pub mod seam;
