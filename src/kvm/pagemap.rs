//! /proc/self/pagemap: the page frame behind an address of this process.

use super::mapping::errno_of;
use crate::machine::{Errno, PAGE_SIZE};
use std::fs::File;
use std::os::unix::fs::FileExt;

/// Bit 63 of an entry: the page is present.
const PRESENT: u64 = 1 << 63;
/// Bits 54:0 of an entry: the page frame number, zero without CAP_SYS_ADMIN.
const FRAME: u64 = (1 << 55) - 1;

/// The page frame number behind `address`.
///
/// # Errors
/// ENODATA when no page is present there, EPERM when the kernel hides the number (no CAP_SYS_ADMIN), or the errno of
/// opening and reading the file.
pub(super) fn frame(address: u64) -> Result<u64, Errno> {
    let mut entry = [0; 8];
    let pagemap = File::open("/proc/self/pagemap").map_err(errno_of)?;
    pagemap.read_exact_at(&mut entry, address / PAGE_SIZE * 8).map_err(errno_of)?;
    let entry = u64::from_le_bytes(entry);
    if entry & PRESENT == 0 {
        return Err(Errno::ENODATA);
    }
    match entry & FRAME {
        0 => Err(Errno::EPERM),
        frame => Ok(frame),
    }
}
