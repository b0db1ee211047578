//! TD guests, between TDH.VP.ENTER and the TD exit.
//!
//! The payload of `crate::guest` in a TD is not executed instruction by instruction: what it does is carried out here,
//! against the module's Secure EPT and the host's shared EPT, with the accesses, TDCALLs and exits that the code would
//! make. That its code is what lies in the TD's memory is looked up first; a guest with other code triple-faults.
//!
//! [`cpu`] is the instructions, [`payload`] the program up to a command and from its end on, [`operation`] the commands.

mod cpu;
mod operation;
mod payload;

pub use cpu::{Cpu, Stop};
pub use payload::Payload;
