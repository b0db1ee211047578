//! Faults that tests plan, what a kernel is expected to make of them, and the way to the module from inside a booted kernel.
//!
//! [`seamcall`] names the SEAMCALLs that KVM makes when it unmaps a private page and the ways in which they fail;
//! [`policy`] says which answer to a failed unmap the machine under test is expected to give.
//!
//! Where a kernel runs on the simulated module, the module is on the host, in the process that started QEMU. A
//! virtio-serial port leads to it ([`PORT_NAME`]); the guest's init owns the port and lets one test process after the other
//! talk through it ([`SOCKET`]), so that the faults of a process end with it. [`ModuleClient`] is that process's side;
//! [`protocol`] what is said. On a TDX host there is neither port nor socket, and [`module`] finds nothing.

mod client;
pub mod policy;
pub mod protocol;
pub mod seamcall;

pub use client::{ModuleClient, module};
pub use policy::{Policy, expected_policy};
pub use seamcall::{Failure, SeamcallFault};

/// Whether the running kernel's TDX module is the simulated one.
pub fn is_here() -> bool {
    std::path::Path::new(SOCKET).exists()
}

/// The name of the virtio-serial port that leads to the module.
pub const PORT_NAME: &str = "org.gmemtest.module";
/// Where the guest's init listens.
pub const SOCKET: &str = "/run/gmemtest-module";
