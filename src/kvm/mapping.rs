//! A mapping of the host process: of a guest_memfd, or of anonymous memory for the shared side of a memslot.

use super::{hold, host_access, pagemap};
use crate::machine::{Errno, HoldKind, HostFault, HostMemory, Mapping, PAGE_SIZE, Protection};
use std::any::Any;
use std::io::Read;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::Mutex;

/// An mmap(2) of this process.
pub(super) struct KvmMapping {
    base: NonNull<u8>,
    len: u64,
    /// Byte ranges that `unmap_part` has given back, so that dropping leaves alone what may be mapped there by now.
    holes: Mutex<Vec<(u64, u64)>>,
}

// SAFETY: the mapping is plain memory that is accessed through the accessors of `host_access` and system calls only;
// concurrent accesses are those of a VMM and its guest, and create no Rust references.
unsafe impl Send for KvmMapping {}
// SAFETY: as above.
unsafe impl Sync for KvmMapping {}

impl KvmMapping {
    /// mmap(2) of a file.
    pub(super) fn of_file(file: &impl AsRawFd, len: u64, offset: u64, how: Protection) -> Result<KvmMapping, Errno> {
        KvmMapping::map(len, how.prot, how.flags, file.as_raw_fd(), offset as i64)
    }

    /// Memory of its own.
    pub(super) fn of_host_memory(kind: HostMemory, len: u64) -> Result<KvmMapping, Errno> {
        let rw = libc::PROT_READ | libc::PROT_WRITE;
        let private = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        match kind {
            HostMemory::Anonymous => {
                let mapping = KvmMapping::map(len, rw, private, -1, 0)?;
                // Kernels without CONFIG_TRANSPARENT_HUGEPAGE refuse the advice and have base pages anyway.
                let _ = mapping.advise(0, len, libc::MADV_NOHUGEPAGE);
                Ok(mapping)
            }
            HostMemory::TransparentHuge => KvmMapping::aligned(len, rw, private),
            HostMemory::Shmem => KvmMapping::map(len, rw, libc::MAP_SHARED | libc::MAP_ANONYMOUS, -1, 0),
            HostMemory::NoAccess => KvmMapping::map(len, libc::PROT_NONE, private, -1, 0),
        }
    }

    fn map(len: u64, prot: i32, flags: i32, fd: i32, offset: i64) -> Result<KvmMapping, Errno> {
        // SAFETY: without MAP_FIXED the kernel picks an unused range.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), len as usize, prot, flags, fd, offset) };
        if base == libc::MAP_FAILED {
            return Err(Errno::last());
        }
        let base = NonNull::new(base.cast()).ok_or(Errno::ENOMEM)?;
        Ok(KvmMapping { base, len, holes: Mutex::new(Vec::new()) })
    }

    /// Maps `len` bytes on a 2 MiB boundary with MADV_HUGEPAGE.
    fn aligned(len: u64, prot: i32, flags: i32) -> Result<KvmMapping, Errno> {
        const HUGE: u64 = 2 << 20;
        let mut mapping = KvmMapping::map(len + HUGE, prot, flags, -1, 0)?;
        let before = mapping.addr().next_multiple_of(HUGE) - mapping.addr();
        mapping.unmap_part(before + len, HUGE - before)?;
        if before > 0 {
            mapping.unmap_part(0, before)?;
        }
        // SAFETY: stays inside of the range mapped above, of which only `len` bytes from here are left.
        mapping.base = unsafe { mapping.base.add(before as usize) };
        mapping.len = len;
        mapping.holes = Mutex::default();
        mapping.advise(0, len, libc::MADV_HUGEPAGE)?;
        Ok(mapping)
    }

    /// The address of byte `at`, for a range of `len` bytes.
    ///
    /// # Panics
    /// When the range leaves the mapping: the test's own mistake.
    fn at(&self, at: u64, len: u64) -> *mut u8 {
        assert!(
            at.checked_add(len).is_some_and(|end| end <= self.len),
            "bytes {at:#x}..+{len:#x} are not in a mapping of {:#x} bytes",
            self.len
        );
        // SAFETY: checked above to stay inside.
        unsafe { self.base.as_ptr().add(at as usize) }
    }
}

impl Mapping for KvmMapping {
    fn addr(&self) -> u64 {
        self.base.as_ptr() as u64
    }

    fn len(&self) -> u64 {
        self.len
    }

    fn read(&self, at: u64, buf: &mut [u8]) -> Result<(), HostFault> {
        self.at(at, buf.len() as u64);
        // SAFETY: inside of the mapping, which holds no Rust objects.
        unsafe { host_access::read(self.base.as_ptr(), at, buf) }
    }

    fn write(&self, at: u64, data: &[u8]) -> Result<(), HostFault> {
        self.at(at, data.len() as u64);
        // SAFETY: inside of the mapping, which holds no Rust objects.
        unsafe { host_access::write(self.base.as_ptr(), at, data) }
    }

    fn fill(&self, at: u64, len: u64, byte: u8) -> Result<(), HostFault> {
        self.at(at, len);
        // SAFETY: inside of the mapping, which holds no Rust objects.
        unsafe { host_access::fill(self.base.as_ptr(), at, len, byte) }
    }

    fn find_mismatch(&self, at: u64, len: u64, byte: u8) -> Result<Option<(u64, u8)>, HostFault> {
        self.at(at, len);
        let mut page = [0; PAGE_SIZE as usize];
        let mut done = 0;
        while done < len {
            let chunk = &mut page[..(len - done).min(PAGE_SIZE) as usize];
            // SAFETY: inside of the mapping, which holds no Rust objects.
            let result = unsafe { host_access::read(self.base.as_ptr(), at + done, chunk) };
            let read = match result {
                Ok(()) => chunk.len(),
                Err(fault) => (fault.offset - at - done) as usize,
            };
            if let Some(i) = chunk[..read].iter().position(|&found| found != byte) {
                return Ok(Some((at + done + i as u64, chunk[i])));
            }
            result?;
            done += chunk.len() as u64;
        }
        Ok(None)
    }

    fn read_u64(&self, at: u64) -> Result<u64, HostFault> {
        self.at(at, 8);
        // SAFETY: inside of the mapping, which holds no Rust objects.
        unsafe { host_access::load(self.base.as_ptr(), at) }
    }

    fn write_u64(&self, at: u64, value: u64) -> Result<(), HostFault> {
        self.at(at, 8);
        // SAFETY: inside of the mapping, which holds no Rust objects.
        unsafe { host_access::store(self.base.as_ptr(), at, value) }
    }

    fn advise(&self, at: u64, len: u64, advice: i32) -> Result<(), Errno> {
        // SAFETY: the range is this mapping's, whose content no Rust object depends on.
        Errno::result(unsafe { libc::madvise(self.at(at, len).cast(), len as usize, advice) }).map(drop)
    }

    fn protect(&self, at: u64, len: u64, prot: i32) -> Result<(), Errno> {
        // SAFETY: the range is this mapping's; accesses that then fault end in a fixup.
        Errno::result(unsafe { libc::mprotect(self.at(at, len).cast(), len as usize, prot) }).map(drop)
    }

    fn lock(&self, at: u64, len: u64) -> Result<(), Errno> {
        // SAFETY: mlock changes no content.
        Errno::result(unsafe { libc::mlock(self.at(at, len).cast(), len as usize) }).map(drop)
    }

    fn unlock(&self, at: u64, len: u64) -> Result<(), Errno> {
        // SAFETY: munlock changes no content.
        Errno::result(unsafe { libc::munlock(self.at(at, len).cast(), len as usize) }).map(drop)
    }

    fn resident(&self, at: u64, len: u64) -> Result<Vec<bool>, Errno> {
        let mut pages = vec![0u8; len.div_ceil(PAGE_SIZE) as usize];
        // SAFETY: the vector has a byte for each page of the range.
        Errno::result(unsafe { libc::mincore(self.at(at, len).cast(), len as usize, pages.as_mut_ptr()) })?;
        Ok(pages.into_iter().map(|page| page & 1 != 0).collect())
    }

    fn unmap_part(&self, at: u64, len: u64) -> Result<(), Errno> {
        let mut holes = self.holes.lock().expect("no holder of this lock panics");
        // SAFETY: the range is this mapping's; accesses that then fault end in a fixup.
        Errno::result(unsafe { libc::munmap(self.at(at, len).cast(), len as usize) })?;
        holes.push((at, len.next_multiple_of(PAGE_SIZE)));
        Ok(())
    }

    fn kernel_read(&self, at: u64) -> Result<u8, Errno> {
        let (mut reader, writer) = std::io::pipe().map_err(errno_of)?;
        // SAFETY: write(2) copies one byte with copy_from_user, which fails with EFAULT where it cannot.
        Errno::result(unsafe { libc::write(writer.as_raw_fd(), self.at(at, 1).cast_const().cast(), 1) })?;
        let mut byte = [0];
        reader.read_exact(&mut byte).map_err(errno_of)?;
        Ok(byte[0])
    }

    fn hold(&self, at: u64, len: u64, kind: HoldKind) -> Result<Box<dyn Any + Send>, Errno> {
        hold::hold(self.at(at, len), len, kind)
    }

    fn frame(&self, at: u64) -> Result<u64, Errno> {
        pagemap::frame(self.at(at, 1) as u64)
    }
}

impl Drop for KvmMapping {
    fn drop(&mut self) {
        let holes = self.holes.get_mut().expect("no holder of this lock panics");
        holes.sort_unstable();
        let mut from = 0;
        let end = self.len.next_multiple_of(PAGE_SIZE);
        for (at, len) in holes.iter().copied().chain([(end, 0)]) {
            if at > from {
                // SAFETY: the range was mapped by `map` and not given back since.
                unsafe { libc::munmap(self.base.as_ptr().add(from as usize).cast(), (at - from) as usize) };
            }
            from = from.max(at + len);
        }
    }
}

/// The errno of a failed system call of the standard library.
pub(super) fn errno_of(error: std::io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::EIO, Errno::from_raw)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn anonymous(pages: u64) -> KvmMapping {
        KvmMapping::of_host_memory(HostMemory::Anonymous, pages * PAGE_SIZE).unwrap()
    }

    #[test]
    fn a_fault_names_the_first_byte_that_could_not_be_accessed_and_keeps_what_went_before() {
        let mapping = anonymous(3);
        mapping.fill(0, 3 * PAGE_SIZE, 0x11).unwrap();
        mapping.protect(PAGE_SIZE, PAGE_SIZE, libc::PROT_NONE).unwrap();
        let fault = HostFault { signal: libc::SIGSEGV, code: 2 /* SEGV_ACCERR */, offset: PAGE_SIZE };
        let mut buf = [0; 64];
        assert_eq!(mapping.read(PAGE_SIZE - 16, &mut buf), Err(fault));
        assert_eq!(buf[..16], [0x11; 16]);
        assert_eq!(buf[16..], [0; 48]);
        assert_eq!(mapping.write(PAGE_SIZE - 16, &[0x22; 32]), Err(fault));
        assert_eq!(mapping.fill(PAGE_SIZE - 8, 16, 0x33), Err(fault));
        let mut before = [0; 16];
        mapping.read(PAGE_SIZE - 16, &mut before).unwrap();
        assert_eq!(before, *b"\x22\x22\x22\x22\x22\x22\x22\x22\x33\x33\x33\x33\x33\x33\x33\x33");
        assert_eq!(mapping.read_u64(PAGE_SIZE + 8), Err(HostFault { offset: PAGE_SIZE + 8, ..fault }));
        assert_eq!(mapping.write_u64(PAGE_SIZE + 8, 1), Err(HostFault { offset: PAGE_SIZE + 8, ..fault }));
        assert_eq!(mapping.kernel_read(PAGE_SIZE), Err(Errno::EFAULT));
        assert_eq!(mapping.kernel_read(0), Ok(0x11));
    }

    #[test]
    fn a_mismatch_before_a_fault_is_found_and_one_behind_it_is_not() {
        let mapping = anonymous(2);
        mapping.protect(PAGE_SIZE, PAGE_SIZE, libc::PROT_NONE).unwrap();
        assert!(mapping.find_mismatch(8, PAGE_SIZE, 0).is_err());
        mapping.write(100, &[7]).unwrap();
        assert_eq!(mapping.find_mismatch(8, PAGE_SIZE, 0), Ok(Some((100, 7))));
        assert_eq!(mapping.find_mismatch(101, 200, 0), Ok(None));
    }

    #[test]
    fn what_was_unmapped_faults_with_maperr_and_is_left_alone_by_the_drop() {
        let mapping = anonymous(4);
        mapping.unmap_part(PAGE_SIZE, PAGE_SIZE).unwrap();
        let hole = mapping.addr() + PAGE_SIZE;
        let fault = HostFault { signal: libc::SIGSEGV, code: 1 /* SEGV_MAPERR */, offset: PAGE_SIZE };
        assert_eq!(mapping.read_u64(PAGE_SIZE), Err(fault));
        // SAFETY: maps a page where there is none, or fails.
        let other = unsafe {
            libc::mmap(
                hole as *mut libc::c_void,
                PAGE_SIZE as usize,
                libc::PROT_READ,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE,
                -1,
                0,
            )
        };
        // Another thread's mapping may have come first; the drop must leave that one alone as well.
        let ours = other as u64 == hole;
        drop(mapping);
        if ours {
            let mut page = 0u8;
            // SAFETY: one byte for one page.
            let still_there = unsafe { libc::mincore(other, PAGE_SIZE as usize, &mut page) };
            assert_eq!(still_there, 0);
            // SAFETY: mapped above.
            assert_eq!(unsafe { libc::munmap(other, PAGE_SIZE as usize) }, 0);
        }
    }

    #[test]
    fn threads_fault_at_the_same_time() {
        let mapping = anonymous(1);
        mapping.protect(0, PAGE_SIZE, libc::PROT_NONE).unwrap();
        std::thread::scope(|scope| {
            for thread in 0..4u64 {
                let mapping = &mapping;
                scope.spawn(move || {
                    for i in 0..1000 {
                        let at = (thread * 1000 + i) % (PAGE_SIZE - 8);
                        assert_eq!(mapping.read_u64(at).unwrap_err().offset, at);
                    }
                });
            }
        });
    }

    #[test]
    fn pages_are_held_in_a_pipe_and_in_a_ring() {
        let mapping = anonymous(40);
        mapping.fill(0, 40 * PAGE_SIZE, 1).unwrap();
        drop(mapping.hold(0, 40 * PAGE_SIZE, HoldKind::Get).unwrap());
        match mapping.hold(0, 40 * PAGE_SIZE, HoldKind::Pin) {
            Ok(pin) => drop(pin),
            Err(errno) => assert!(matches!(errno, Errno::ENOSYS | Errno::EPERM | Errno::ENOMEM), "{errno}"),
        }
        let nothing = KvmMapping::of_host_memory(HostMemory::NoAccess, PAGE_SIZE).unwrap();
        assert_eq!(nothing.hold(0, PAGE_SIZE, HoldKind::Get).err(), Some(Errno::EFAULT));
    }

    #[test]
    fn huge_memory_is_aligned_and_whole() {
        let Ok(mapping) = KvmMapping::of_host_memory(HostMemory::TransparentHuge, 4 << 20) else { return };
        assert_eq!(mapping.addr() % (2 << 20), 0);
        mapping.fill(0, 4 << 20, 9).unwrap();
        assert_eq!(mapping.find_mismatch(0, 4 << 20, 9), Ok(None));
    }
}
