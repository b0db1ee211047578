//! What QEMU is given to boot: a kernel it can start, and an initramfs with the task.

use std::path::Path;

use anyhow::{Context, Result};

use super::accel::Accel;
use super::boot_image::BootImage;
use super::initramfs::{self, Initramfs};
use super::modules;
use super::task::{Duty, MODULE_DIR, TASK_PATH, Task};

/// A kernel and an initramfs, in memory.
#[derive(Debug)]
pub struct Payload {
    /// An ELF kernel with a PVH entry, or the bzImage where there is none.
    pub kernel: Vec<u8>,
    /// Whether `kernel` was unpacked.
    pub unpacked: bool,
    /// The uncompressed archive.
    pub initramfs: Vec<u8>,
}

impl Payload {
    /// The payload that does `duty` on `image`, with the modules of a directory, or those that lie beside it
    /// as packages put them.
    pub fn new(image: &BootImage, module_directory: Option<&Path>, accel: Accel, duty: Duty) -> Result<Payload> {
        let beside = modules::beside(image.path(), image.release());
        let modules = match module_directory.or(beside.as_deref()) {
            Some(directory) => modules::collect(directory, image.release())?,
            None => Vec::new(),
        };
        let program = initramfs::own_program().context("this program cannot be packed")?;
        let mut archive = Initramfs::new(&program)?;
        archive.directory("rig")?;
        archive.directory(below_root(MODULE_DIR))?;
        for module in &modules {
            archive.file(&format!("{}/{}.ko", below_root(MODULE_DIR), module.file.name), &module.bytes)?;
        }
        let task = Task { duty, accel, modules: modules.into_iter().map(|module| module.file).collect() };
        archive.file(below_root(TASK_PATH), &serde_json::to_vec(&task)?)?;
        Ok(Payload::of(image, archive.finish()?))
    }

    /// The payload that powers off at once, with nothing else: what `--timing` compares with.
    pub fn power_off(image: &BootImage) -> Result<Payload> {
        Ok(Payload::of(image, Initramfs::new(&initramfs::power_off_program())?.finish()?))
    }

    fn of(image: &BootImage, initramfs: Vec<u8>) -> Payload {
        match image.unpack() {
            Some(kernel) => Payload { kernel, unpacked: true, initramfs },
            None => Payload { kernel: image.bytes().to_vec(), unpacked: false, initramfs },
        }
    }
}

/// Names in an archive have no leading slash.
fn below_root(path: &str) -> &str {
    path.trim_start_matches('/')
}
