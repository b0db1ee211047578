//! Faults that tests plan, and what a kernel is expected to make of them.
//!
//! [`seamcall`] names the SEAMCALLs that KVM makes when it unmaps a private page and the ways in which they fail;
//! [`policy`] says which answer to a failed unmap the machine under test is expected to give.

pub mod policy;
pub mod seamcall;

pub use policy::{Policy, expected_policy};
pub use seamcall::{Failure, SeamcallFault};
