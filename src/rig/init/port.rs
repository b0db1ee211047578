//! The port for results: virtio-serial, or the second ISA serial port.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::rig::wire::{Frame, PORT_NAME};

/// How long the port may take to appear after its driver: the host names it in a message that the driver takes later.
const PATIENCE: Duration = Duration::from_secs(5);

/// An open port.
#[derive(Debug)]
pub struct Port {
    file: Mutex<File>,
    kind: Kind,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Virtio,
    Serial,
}

impl Port {
    /// What carries it.
    pub fn name(&self) -> &'static str {
        match self.kind {
            Kind::Virtio => "virtio",
            Kind::Serial => "serial",
        }
    }

    /// Sends one frame, and returns when the host has it, or nearly so: the kernel may be about to die.
    pub fn send(&self, frame: &Frame) {
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        // A host that does not read any more is about to end QEMU.
        if frame.write(&mut *file).is_ok() && self.kind == Kind::Serial {
            // SAFETY: the descriptor is open.
            unsafe { libc::tcdrain(file.as_raw_fd()) };
        }
        let _ = file.flush();
    }
}

/// Opens the port; `None` when the kernel has neither.
pub fn open() -> Option<Port> {
    let file = virtio().map(|file| (file, Kind::Virtio)).or_else(|| Some((serial().ok()?, Kind::Serial)));
    file.map(|(file, kind)| Port { file: Mutex::new(file), kind })
}

fn virtio() -> Option<File> {
    named(PORT_NAME, OpenOptions::new().write(true))
}

/// The virtio-serial port of this name.
pub fn named(wanted: &str, options: &OpenOptions) -> Option<File> {
    let start = Instant::now();
    // No driver, no port.
    while Path::new("/sys/bus/virtio/drivers/virtio_console").exists() && start.elapsed() < PATIENCE {
        let ports = fs::read_dir("/sys/class/virtio-ports").ok()?;
        let named = ports
            .flatten()
            .find(|port| fs::read_to_string(port.path().join("name")).is_ok_and(|name| name.trim() == wanted));
        if let Some(port) = named {
            super::devices::populate();
            if let Ok(file) = options.open(Path::new("/dev").join(port.file_name())) {
                return Some(file);
            }
        }
        thread::sleep(Duration::from_millis(5));
    }
    None
}

/// /dev/ttyS1 without any of a terminal's editing.
fn serial() -> io::Result<File> {
    let file = OpenOptions::new().write(true).read(true).open("/dev/ttyS1")?;
    // SAFETY: a zeroed termios is a valid value, and tcgetattr fills it in.
    let mut settings: libc::termios = unsafe { std::mem::zeroed() };
    // SAFETY: the descriptor is open and the pointer is to a termios. It fails (EIO) where there is no such UART.
    if unsafe { libc::tcgetattr(file.as_raw_fd(), &mut settings) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the pointer is to a termios.
    unsafe { libc::cfmakeraw(&mut settings) };
    settings.c_cflag |= libc::CLOCAL;
    // SAFETY: the descriptor is open and the pointer is to a termios that was read from it.
    match unsafe { libc::tcsetattr(file.as_raw_fd(), libc::TCSANOW, &settings) } {
        0 => Ok(file),
        _ => Err(io::Error::last_os_error()),
    }
}
