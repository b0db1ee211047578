//! The guest's RAM as this process sees it.

use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64};

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use nix::sys::resource::{Resource, getrlimit};

use crate::sim::tdx_module::memory::{MappedMemory, PhysicalMemory, Window};

/// Memory from which on QEMU's q35 machine leaves the upper half of the low 4 GiB to devices.
const SPLIT_FROM: u64 = 0xb000_0000;
/// What it puts below 4 GiB then.
const LOW: u64 = 0x8000_0000;

/// Where the RAM file of a q35 machine with `len` bytes lies in its physical address space.
pub fn windows(len: u64) -> Vec<Window> {
    if len < SPLIT_FROM {
        return vec![Window { pa: 0, len, offset: 0 }];
    }
    vec![Window { pa: 0, len: LOW, offset: 0 }, Window { pa: 4 << 30, len: len - LOW, offset: LOW }]
}

/// A memory file that QEMU uses as the guest's RAM, mapped here too.
pub struct Ram {
    file: File,
    windows: Vec<Window>,
    base: NonNull<u8>,
    len: NonZeroUsize,
}

// SAFETY: the mapping lives as long as the value, and is accessed through atomics only.
unsafe impl Send for Ram {}
// SAFETY: as above; atomics may be shared.
unsafe impl Sync for Ram {}

impl Ram {
    /// Makes a file of `len` bytes.
    ///
    /// # Errors
    /// Those of memfd_create(2), ftruncate(2) and mmap(2); a limit on the size of files is named.
    pub fn new(len: u64) -> io::Result<Ram> {
        // Past the limit ftruncate(2) is SIGXFSZ, of which nobody would learn why.
        let (limit, _) = getrlimit(Resource::RLIMIT_FSIZE)?;
        if len > limit {
            let text = format!("its {len} bytes are more than a file may have here, {limit} (RLIMIT_FSIZE, ulimit -f)");
            return Err(io::Error::new(io::ErrorKind::FileTooLarge, text));
        }
        let file = File::from(memfd_create(c"gmemtest-ram", MFdFlags::MFD_CLOEXEC)?);
        file.set_len(len)?;
        Ram::of(file, len)
    }

    /// RAM of `len` bytes that lies in `file`.
    ///
    /// # Errors
    /// Those of mmap(2).
    pub fn of(file: File, len: u64) -> io::Result<Ram> {
        let size = NonZeroUsize::new(len as usize).ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a fresh mapping at an address the kernel chooses replaces nothing.
        let base = unsafe { mmap(None, size, protection, MapFlags::MAP_SHARED, &file, 0)? }.cast();
        Ok(Ram { file, windows: windows(len), base, len: size })
    }

    /// The file, for QEMU.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// The same RAM as the module's physical memory.
    ///
    /// # Errors
    /// Those of mmap(2).
    pub fn for_module(&self) -> io::Result<Box<dyn PhysicalMemory>> {
        Ok(Box::new(MappedMemory::new(&self.file, &self.windows)?))
    }

    /// Convertible memory: the RAM above the first MiB.
    pub fn convertible(&self) -> Vec<(u64, u64)> {
        const FIRST: u64 = 1 << 20;
        let range =
            |window: &Window| if window.pa == 0 { (FIRST, window.len - FIRST) } else { (window.pa, window.len) };
        self.windows.iter().map(range).collect()
    }

    /// Whether the whole range is RAM.
    pub fn contains(&self, pa: u64, len: u64) -> bool {
        self.offset(pa, len).is_some()
    }

    fn offset(&self, pa: u64, len: u64) -> Option<u64> {
        let window = self.windows.iter().find(|window| pa >= window.pa && pa - window.pa < window.len)?;
        let within = pa - window.pa;
        (len <= window.len - within).then_some(window.offset + within)
    }

    /// The 4 aligned bytes at a physical address.
    pub fn word32(&self, pa: u64) -> Option<&AtomicU32> {
        let offset = self.offset(pa, 4).filter(|_| pa.is_multiple_of(4))?;
        // SAFETY: the offset lies in the mapping, is aligned, and the mapping lives as long as `self`; the other party is
        // another process, to which atomics are the way to talk.
        Some(unsafe { AtomicU32::from_ptr(self.base.as_ptr().add(offset as usize).cast()) })
    }

    /// The 8 aligned bytes at a physical address.
    pub fn word64(&self, pa: u64) -> Option<&AtomicU64> {
        let offset = self.offset(pa, 8).filter(|_| pa.is_multiple_of(8))?;
        // SAFETY: as in `word32`.
        Some(unsafe { AtomicU64::from_ptr(self.base.as_ptr().add(offset as usize).cast()) })
    }
}

impl Drop for Ram {
    fn drop(&mut self) {
        // SAFETY: the mapping was made in `new`, and no reference into it outlives `self`.
        let _ = unsafe { munmap(self.base.cast(), self.len.get()) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_large_machine_has_a_hole_below_4_gib() {
        assert_eq!(windows(2 << 30), [Window { pa: 0, len: 2 << 30, offset: 0 }]);
        let large = windows(6 << 30);
        assert_eq!(large[0], Window { pa: 0, len: 2 << 30, offset: 0 });
        assert_eq!(large[1], Window { pa: 4 << 30, len: 4 << 30, offset: 2 << 30 });
    }

    #[test]
    fn only_ram_has_words() {
        let ram = Ram::new(1 << 21).unwrap();
        assert!(ram.word64(0x1000).is_some() && ram.word64(0x1004).is_none() && ram.word64(1 << 21).is_none());
        assert!(ram.contains((1 << 21) - 4096, 4096) && !ram.contains((1 << 21) - 4096, 8192));
        assert!(!ram.contains(u64::MAX - 4095, 4096));
    }
}
