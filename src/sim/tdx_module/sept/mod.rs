//! The Secure EPT: 512-entry pages in physical memory with the raw bits the module gives them (TDX module spec 4).
//!
//! [`SeptEntry`] is one raw word, [`SeptState`] what its state bits say, [`SeptState::allows`] which leaf takes which state, [`walk`]
//! the way from the root to an entry and the information a failing leaf returns about it.

mod entry;
mod state_table;
pub(crate) mod walk;

pub use entry::SeptEntry;
pub use state_table::{SeptOp, SeptState};

/// Entries of one page of the Secure EPT.
pub const ENTRIES: u64 = 512;

/// Bytes an entry of a level-`level` table spans.
pub const fn span(level: u8) -> u64 {
    4096 << (9 * level)
}
