//! Device nodes, for kernels without devtmpfs.

use std::fs;
use std::path::Path;

use nix::sys::stat::{Mode, SFlag, makedev, mknod};

/// Makes the character devices that sysfs knows and /dev lacks; says so when one cannot be made.
pub fn populate() -> Option<String> {
    if Path::new("/dev/zero").exists() && !has_unmade_ports() {
        return None;
    }
    let entries = fs::read_dir("/sys/dev/char").ok()?;
    let mut failed = None;
    for entry in entries.flatten() {
        let number = entry.file_name().into_string().unwrap_or_default();
        let Ok(uevent) = fs::read_to_string(entry.path().join("uevent")) else { continue };
        let name = uevent.lines().find_map(|line| line.strip_prefix("DEVNAME="));
        let parts = number.split_once(':').and_then(|(major, minor)| Some((major.parse().ok()?, minor.parse().ok()?)));
        let (Some(name), Some((major, minor))) = (name, parts) else { continue };
        let path = Path::new("/dev").join(name);
        if path.exists() {
            continue;
        }
        if let Some(parent) = path.parent() {
            // An error shows in mknod.
            let _ = fs::create_dir_all(parent);
        }
        if let Err(errno) = mknod(&path, SFlag::S_IFCHR, Mode::from_bits_truncate(0o666), makedev(major, minor)) {
            failed = Some(format!("{} cannot be made: {errno}", path.display()));
        }
    }
    failed
}

/// Whether a virtio-serial port is known that has no node yet.
pub fn has_unmade_ports() -> bool {
    let Ok(ports) = fs::read_dir("/sys/class/virtio-ports") else { return false };
    ports.flatten().any(|port| !Path::new("/dev").join(port.file_name()).exists())
}
