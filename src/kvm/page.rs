//! Page frames as the kernel describes them in /proc/kpageflags and /proc/kpagecount, and the LRU batches they wait in.

use super::mapping::{KvmMapping, errno_of};
use crate::machine::{Errno, HostMemory, Mapping, PAGE_SIZE};
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::FileExt;

/// The word of one frame in a file that has a u64 for each.
///
/// # Errors
/// ENXIO for a frame beyond the memory of the machine, or the errno of opening and reading the file.
fn word_of(path: &str, frame: u64) -> Result<u64, Errno> {
    let file = File::open(path).map_err(errno_of)?;
    let offset = frame.checked_mul(8).ok_or(Errno::ENXIO)?;
    let mut word = [0; 8];
    match file.read_at(&mut word, offset).map_err(errno_of)? {
        8 => Ok(u64::from_ne_bytes(word)),
        _ => Err(Errno::ENXIO),
    }
}

/// The KPF_* bits of a frame.
pub(super) fn flags(frame: u64) -> Result<u64, Errno> {
    word_of("/proc/kpageflags", frame)
}

/// How many page table entries map a frame.
pub(super) fn map_count(frame: u64) -> Result<u64, Errno> {
    word_of("/proc/kpagecount", frame)
}

/// memory_failure() on a frame. The kernel never uses the frame again, until it is booted anew or the poison is taken
/// back through debugfs.
///
/// Through the file of memory blocks (CONFIG_MEMORY_HOTPLUG), or else that of the injector (CONFIG_HWPOISON_INJECT, debugfs).
///
/// # Errors
/// ENOENT without either file, or what memory_failure() says.
pub(super) fn memory_failure(frame: u64) -> Result<(), Errno> {
    const BY_ADDRESS: &str = "/sys/devices/system/memory/hard_offline_page";
    const BY_FRAME: &str = "/sys/kernel/debug/hwpoison/corrupt-pfn";
    let address = frame.checked_mul(PAGE_SIZE).ok_or(Errno::ENXIO)?;
    match write_existing(BY_ADDRESS, &format!("{address:#x}")) {
        Err(Errno::ENOENT) => write_existing(BY_FRAME, &format!("{frame:#x}")),
        result => result,
    }
}

fn write_existing(path: &str, text: &str) -> Result<(), Errno> {
    let mut file = File::options().write(true).open(path).map_err(errno_of)?;
    file.write_all(text.as_bytes()).map_err(errno_of)
}

/// Drains the LRU batches of every CPU, by the call that disturbs the system least: see [`move_to_its_own_node`].
/// Where a kernel has no migration, by dropping the page cache.
pub(super) fn drain_lru() -> Result<(), Errno> {
    match move_to_its_own_node() {
        Err(Errno::ENOSYS) => fs::write("/proc/sys/vm/drop_caches", "1").map_err(errno_of),
        result => result,
    }
}

/// move_pages(2) of a page of our own to the node on which it is. Nothing moves, but the call begins with
/// lru_cache_disable(), which drains the batches of every CPU (5.13, do_pages_move()).
///
/// # Errors
/// ENOSYS without CONFIG_MIGRATION or CONFIG_NUMA, or another errno of the call.
pub(super) fn move_to_its_own_node() -> Result<(), Errno> {
    const MPOL_MF_MOVE: i32 = 1 << 1;
    let page = KvmMapping::of_host_memory(HostMemory::Anonymous, PAGE_SIZE)?;
    page.write_u64(0, 1).map_err(|_| Errno::ENOMEM)?;
    let pages = [page.addr()];
    let (mut node, mut status) = ([0i32; 1], [0i32; 1]);
    // SAFETY: each pointer leads to one element, and 1 is their number; without nodes the call only reports.
    let asked = unsafe {
        libc::syscall(libc::SYS_move_pages, 0, 1usize, pages.as_ptr(), 0usize, node.as_mut_ptr(), MPOL_MF_MOVE)
    };
    Errno::result(asked)?;
    // SAFETY: as above.
    let moved = unsafe {
        libc::syscall(libc::SYS_move_pages, 0, 1usize, pages.as_ptr(), node.as_ptr(), status.as_mut_ptr(), MPOL_MF_MOVE)
    };
    Errno::result(moved).map(drop)
}
