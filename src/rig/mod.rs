//! The rig: boots a kernel under QEMU with this program as its init, and brings the verdicts back.
//!
//! ```text
//! host                                                guest
//! boot_image  bzImage -> kernel QEMU can start
//! modules     lib/modules -> what its KVM needs
//! initramfs   this program as /init        ---->      init     mounts, modules, limits; runs the command
//! qemu        command line and process                         relays its output, reaps, powers off
//! bridge      the simulated TDX module under the kernel, on request
//! boot        watches from outside         <----      wire     frames over virtio-serial or a second serial port
//! console     panics and complaints        <----               the kernel's console, kept apart
//! ending      every way in which a boot can end
//! ```
//!
//! The kernel under test may do anything: panic, hang, reset, write garbage. A boot ends all the same, within its limits,
//! with the reason and the console's end, and without a process left behind.

mod accel;
pub mod bisect;
mod boot;
mod boot_image;
pub mod bridge;
mod console;
mod decompress;
mod ending;
pub mod init;
mod initramfs;
mod matrix;
mod modules;
mod payload;
mod qemu;
mod replay;
mod session;
mod stop;
mod stream;
pub mod task;
pub mod wire;

pub use accel::{Accel, AccelChoice, choose as choose_accel, choose_with_simulated_tdx};
pub use boot::{Boot, Clock, Limits, Listener, boot};
pub use boot_image::{BootImage, ImageError};
pub use console::Console;
pub use ending::Ending;
pub use matrix::{Column, Matrix, Table};
pub use payload::Payload;
pub use qemu::Hardware;
pub use replay::{Replay, Replayed, Rest};
pub use session::{Boots, Guest, Kept, OnLoss, Session};
pub use stop::StopSignal;
pub use stream::EventWriter;
pub use task::Duty;
pub use wire::{CommandEnd, Hello};
