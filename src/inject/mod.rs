//! Faults from inside: how a test in a booted kernel reaches the simulated TDX module under that kernel.
//!
//! The module runs on the host, in the process that started QEMU. A virtio-serial port leads to it ([`PORT_NAME`]); the
//! guest's init owns the port and lets one test process after the other talk through it ([`SOCKET`]), so that the faults
//! of a process end with it. [`ModuleClient`] is that process's side; [`protocol`] what is said.
//!
//! On a TDX host there is neither port nor socket, and [`module`] finds nothing.

mod client;
pub mod protocol;

pub use client::{ModuleClient, module};

/// Whether the running kernel's TDX module is the simulated one.
pub fn is_here() -> bool {
    std::path::Path::new(SOCKET).exists()
}

/// The name of the virtio-serial port that leads to the module.
pub const PORT_NAME: &str = "org.gmemtest.module";
/// Where the guest's init listens.
pub const SOCKET: &str = "/run/gmemtest-module";
