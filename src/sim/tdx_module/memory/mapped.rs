//! A file mapped into the process: the physical memory of a machine under emulation, shared with it.

use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

use super::{LineTag, PAGE_SIZE, PhysicalMemory, SparseMemory};

/// A piece of the physical address space and where in the file it lies. Machines with a hole below 4 GiB need two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// First physical address, in bytes, page-aligned.
    pub pa: u64,
    /// Length in bytes, a whole number of pages.
    pub len: u64,
    /// Offset into the file, in bytes, page-aligned.
    pub offset: u64,
}

struct Mapping {
    window: Window,
    base: NonNull<u8>,
}

/// Physical memory in a mapped file. The other party's writes are seen at once but leave no trace in the line tags.
pub struct MappedMemory {
    mappings: Vec<Mapping>,
    tags: SparseMemory,
}

// SAFETY: the mappings belong to this value alone; every access goes through volatile reads and writes of plain words.
unsafe impl Send for MappedMemory {}

impl MappedMemory {
    /// Maps the windows of `file`, shared, readable and writable.
    ///
    /// # Errors
    /// Whatever mmap(2) says; `EINVAL` for a window that is empty or not page-aligned.
    pub fn new(file: &File, windows: &[Window]) -> io::Result<MappedMemory> {
        let limit = windows.iter().map(|window| window.pa + window.len).max().unwrap_or(0);
        let mut memory = MappedMemory { mappings: Vec::new(), tags: SparseMemory::new(limit) };
        for &window in windows {
            let aligned = (window.pa | window.len | window.offset).is_multiple_of(PAGE_SIZE);
            let Some(len) = NonZeroUsize::new(window.len as usize).filter(|_| aligned) else {
                return Err(io::Error::from_raw_os_error(nix::libc::EINVAL));
            };
            let prot = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
            // SAFETY: a fresh mapping at an address the kernel chooses replaces nothing.
            let base = unsafe { mmap(None, len, prot, MapFlags::MAP_SHARED, file, window.offset as i64)? };
            memory.mappings.push(Mapping { window, base: base.cast() });
        }
        Ok(memory)
    }

    fn word(&self, pa: u64) -> Option<*mut u64> {
        let mapping = self.mappings.iter().find(|mapping| pa.wrapping_sub(mapping.window.pa) < mapping.window.len)?;
        let offset = (pa - mapping.window.pa) & !7;
        // SAFETY: the window is a whole number of pages and `offset` an aligned word inside of it.
        Some(unsafe { mapping.base.as_ptr().add(offset as usize) }.cast())
    }
}

impl Drop for MappedMemory {
    fn drop(&mut self) {
        for mapping in &self.mappings {
            // SAFETY: this very mapping was made in `new` and nothing borrows from it.
            let _ = unsafe { munmap(mapping.base.cast(), mapping.window.len as usize) };
        }
    }
}

impl PhysicalMemory for MappedMemory {
    fn read_u64(&self, pa: u64) -> u64 {
        match self.word(pa) {
            // SAFETY: `word` returns an aligned word of a live mapping; volatile because the other party writes too.
            Some(word) => u64::from_le(unsafe { word.read_volatile() }),
            None => 0,
        }
    }

    fn write_u64(&mut self, pa: u64, value: u64) {
        if let Some(word) = self.word(pa) {
            // SAFETY: as in `read_u64`; the mapping is writable.
            unsafe { word.write_volatile(value.to_le()) }
        }
    }

    fn update_u64(&mut self, pa: u64, mask: u64, value: u64) {
        let Some(word) = self.word(pa) else { return };
        // SAFETY: `word` returns an aligned word of a live mapping, and nobody holds a Rust reference to it.
        let word = unsafe { AtomicU64::from_ptr(word) };
        let merged = |old: u64| Some((u64::from_le(old) & !mask | value & mask).to_le());
        // The closure never declines, so that there is no error.
        let _ = word.fetch_update(Ordering::SeqCst, Ordering::SeqCst, merged);
    }

    fn fill(&mut self, pa: u64, len: u64, pattern: u64, tag: LineTag) {
        for at in (pa..pa + len).step_by(8) {
            self.write_u64(at, pattern);
        }
        self.tags.fill(pa, len, 0, tag);
    }

    fn copy_page(&mut self, from: u64, to: u64, tag: LineTag) {
        for at in (0..PAGE_SIZE).step_by(8) {
            let word = self.read_u64(from + at);
            self.write_u64(to + at, word);
        }
        self.tags.fill(to, PAGE_SIZE, 0, tag);
    }

    fn tag(&self, pa: u64) -> LineTag {
        self.tags.tag(pa)
    }

    fn set_tag(&mut self, pa: u64, tag: LineTag) {
        self.tags.set_tag(pa, tag);
    }

    fn sees_host_writes(&self) -> bool {
        false
    }

    fn resident_bytes(&self) -> u64 {
        self.tags.resident_bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    #[test]
    fn both_windows_of_a_file_are_seen_from_both_sides() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(0x4000).unwrap();
        let low = Window { pa: 0, len: 0x2000, offset: 0 };
        let high = Window { pa: 4 << 30, len: 0x2000, offset: 0x2000 };
        let mut memory = MappedMemory::new(&file, &[low, high]).unwrap();
        memory.write_u64((4 << 30) + 8, 0x1122_3344_5566_7788);
        let mut bytes = [0; 8];
        file.read_at(&mut bytes, 0x2008).unwrap();
        assert_eq!(u64::from_le_bytes(bytes), 0x1122_3344_5566_7788);
        file.write_at(&7u64.to_le_bytes(), 0x1000).unwrap();
        assert_eq!(memory.read_u64(0x1000), 7);
        assert_eq!(memory.read_u64(0x3000), 0);
        memory.update_u64(0x1000, 0xFF00, 0x1234);
        assert_eq!(memory.read_u64(0x1000), 0x1207);
        memory.copy_page(0x1000, 0, LineTag::private(32));
        assert_eq!(
            (memory.read_u64(0), memory.tag(0), memory.tag(0x1000)),
            (0x1207, LineTag::private(32), LineTag::HOST)
        );
        assert!(MappedMemory::new(&file, &[Window { pa: 0, len: 1, offset: 0 }]).is_err());
    }
}
