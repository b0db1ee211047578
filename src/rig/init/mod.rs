//! This program as PID 1 of the kernel under test.
//!
//! It mounts, loads modules, finds its port, runs the one command that it was given, relays the command's output as it
//! comes, gives a sign of life every second, reaps what it inherits, and powers off.

mod command;
mod devices;
mod emulated;
mod limits;
pub(super) mod module;
mod modules;
mod mounts;
mod port;
mod shell;

use std::fs;
use std::path::Path;
use std::sync::Arc;

use super::accel::Accel;
use super::task::{Duty, TASK_PATH, Task};
use super::wire::{CommandEnd, Frame, Hello};

/// What the init writes to the console when it finds no port for results; the host looks for it.
pub const NO_PORT: &str = "gmemtest: no port for results";
/// On the kernel's command line: results go to the console, for a rerun by hand.
pub const CONSOLE_PORT: &str = "gmemtest.port=console";

/// Whether this process is the rig's init: PID 1 of an initramfs that carries a task.
pub fn is_init() -> bool {
    std::process::id() == 1 && Path::new(TASK_PATH).exists()
}

/// Does the task and powers the machine off.
pub fn main() -> ! {
    let mut complaints = mounts::mount_all();
    match read_task() {
        Ok(task) => serve(&task, &mut complaints),
        Err(error) => tell(&format!("gmemtest: {TASK_PATH}: {error}")),
    }
    power_off()
}

fn read_task() -> Result<Task, String> {
    let text = fs::read(TASK_PATH).map_err(|error| error.to_string())?;
    serde_json::from_slice(&text).map_err(|error| error.to_string())
}

fn serve(task: &Task, complaints: &mut Vec<String>) {
    complaints.extend(modules::load(&task.modules));
    complaints.extend(devices::populate());
    limits::raise();
    let _held = match task.accel {
        Accel::Kvm => None,
        Accel::Tcg | Accel::SimulatedTdx => emulated::ease(),
    };
    let words = kernel_words();
    match &task.duty {
        Duty::Run(arguments) if words.iter().any(|word| word == CONSOLE_PORT) => {
            complaints.iter().for_each(|complaint| tell(&format!("gmemtest: {complaint}")));
            let end = command::run_on_console(arguments);
            tell(&format!("gmemtest: {end:?}"));
        }
        Duty::Run(arguments) => match port::open() {
            Some(port) => {
                let port = Arc::new(port);
                if task.accel == Accel::SimulatedTdx {
                    complaints.extend(module::broker());
                }
                let hello = hello(port.name(), std::mem::take(complaints));
                port.send(&Frame::Hello(hello));
                let end = command::run(arguments, &port);
                port.send(&Frame::End(end));
            }
            None => tell(NO_PORT),
        },
        Duty::Shell => shell::prompt(),
    }
}

fn hello(port: &str, complaints: Vec<String>) -> Hello {
    let trimmed = |path: &str| fs::read_to_string(path).unwrap_or_default().trim().to_owned();
    Hello {
        release: trimmed("/proc/sys/kernel/osrelease"),
        version: trimmed("/proc/sys/kernel/version"),
        port: port.to_owned(),
        uptime_ms: uptime_ms(),
        kvm: Path::new("/dev/kvm").exists(),
        cpus: std::thread::available_parallelism().map_or(1, usize::from),
        taint: trimmed("/proc/sys/kernel/tainted").parse().unwrap_or(0),
        complaints,
    }
}

/// Writes a line to the kernel log at the level of a warning: it reaches the boot console where there is no other one.
fn tell(line: &str) {
    // Without /dev/kmsg there is nobody to tell.
    let _ = fs::write("/dev/kmsg", format!("<4>{line}\n"));
}

/// Milliseconds since the kernel's start of time.
fn uptime_ms() -> u64 {
    let text = fs::read_to_string("/proc/uptime").unwrap_or_default();
    let seconds: f64 = text.split_whitespace().next().and_then(|word| word.parse().ok()).unwrap_or(0.0);
    (seconds * 1000.0) as u64
}

/// The words of the kernel's command line.
fn kernel_words() -> Vec<String> {
    let line = fs::read_to_string("/proc/cmdline").unwrap_or_default();
    line.split_whitespace().map(str::to_owned).collect()
}

/// Powers the machine off. A kernel that cannot (no ACPI) halts instead, and the host ends QEMU.
fn power_off() -> ! {
    // SAFETY: sync takes no arguments and always succeeds.
    unsafe { libc::sync() };
    // SAFETY: the machine has nothing left to lose: all its file systems are in memory.
    unsafe { libc::reboot(libc::RB_POWER_OFF) };
    loop {
        std::thread::park();
    }
}

impl CommandEnd {
    fn of(status: nix::sys::wait::WaitStatus) -> Option<CommandEnd> {
        match status {
            nix::sys::wait::WaitStatus::Exited(_, status) => Some(CommandEnd::Status(status)),
            nix::sys::wait::WaitStatus::Signaled(_, signal, _) => Some(CommandEnd::Signal(signal as i32)),
            _ => None,
        }
    }
}
