//! gmemtest: selftests, model and rig for KVM guest_memfd and TDX private memory.

// Selftests name the library `gmemtest::` whether they are built into the command or as a binary of their own.
extern crate self as gmemtest;

pub mod cli;
pub mod guest;
pub mod harness;
pub mod inject;
pub mod kvm;
pub mod machine;
pub mod observe;
pub mod report;
pub mod rig;
pub mod script;
pub mod sim;
pub mod uapi;
