//! The host side: mappings, what an access to them may do, and what can hold on to their pages.

use super::Errno;
use std::any::Any;

/// A host access that ended in a signal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostFault {
    /// SIGBUS or SIGSEGV.
    pub signal: i32,
    /// `si_code`: BUS_ADRERR, BUS_MCEERR_AR, SEGV_MAPERR, SEGV_ACCERR.
    pub code: i32,
    /// Byte offset into the mapping of the first byte that could not be accessed.
    pub offset: u64,
}

/// Memory of the host process for the shared side of a memslot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HostMemory {
    /// Private anonymous memory of base pages.
    Anonymous,
    /// Private anonymous memory aligned to 2 MiB with MADV_HUGEPAGE.
    TransparentHuge,
    /// Shared anonymous memory (shmem).
    Shmem,
    /// An address range with PROT_NONE.
    NoAccess,
}

/// What takes a reference to pages of a mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum HoldKind {
    /// One plain reference a page: the page sits in a pipe after vmsplice(2).
    Get,
    /// A long-term pin: the page is in an io_uring registered buffer.
    Pin,
}

/// A mapping of the host process. Dropping it unmaps.
///
/// Accesses are real memory accesses; one that raises a signal returns it as a [`HostFault`], with everything before the
/// faulting byte done.
pub trait Mapping: Send + Sync {
    /// Address of the first byte in the host process, for `userspace_addr`.
    fn addr(&self) -> u64;

    /// Length in bytes.
    fn len(&self) -> u64;

    /// Whether the mapping has no bytes; mmap(2) refuses to make such a one.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Reads into `buf` from byte `at`.
    fn read(&self, at: u64, buf: &mut [u8]) -> Result<(), HostFault>;

    /// Writes `data` at byte `at`.
    fn write(&self, at: u64, data: &[u8]) -> Result<(), HostFault>;

    /// Writes `len` bytes of `byte` from byte `at`.
    fn fill(&self, at: u64, len: u64, byte: u8) -> Result<(), HostFault>;

    /// Offset and value of the first byte in `at..at+len` that is not `byte`.
    fn find_mismatch(&self, at: u64, len: u64, byte: u8) -> Result<Option<(u64, u8)>, HostFault>;

    /// Reads the little-endian u64 at byte `at`.
    fn read_u64(&self, at: u64) -> Result<u64, HostFault> {
        let mut bytes = [0; 8];
        self.read(at, &mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }

    /// Writes a little-endian u64 at byte `at`.
    fn write_u64(&self, at: u64, value: u64) -> Result<(), HostFault> {
        self.write(at, &value.to_le_bytes())
    }

    /// madvise(2) of a range.
    fn advise(&self, at: u64, len: u64, advice: i32) -> Result<(), Errno>;

    /// mprotect(2) of a range.
    fn protect(&self, at: u64, len: u64, prot: i32) -> Result<(), Errno>;

    /// mlock(2) of a range.
    fn lock(&self, at: u64, len: u64) -> Result<(), Errno>;

    /// munlock(2) of a range.
    fn unlock(&self, at: u64, len: u64) -> Result<(), Errno>;

    /// mincore(2): for each page of a range, whether it is resident.
    fn resident(&self, at: u64, len: u64) -> Result<Vec<bool>, Errno>;

    /// munmap(2) of a part; accesses to it then fault.
    fn unmap_part(&self, at: u64, len: u64) -> Result<(), Errno>;

    /// Whether a system call of the kernel can read the byte at `at` (copy_from_user): EFAULT where it cannot.
    fn kernel_read(&self, at: u64) -> Result<u8, Errno>;

    /// Takes references to the pages of a range until the returned value is dropped.
    fn hold(&self, at: u64, len: u64, kind: HoldKind) -> Result<Box<dyn Any + Send>, Errno>;

    /// The page frame number behind byte `at`, where the machine can tell (pagemap with CAP_SYS_ADMIN, page present).
    fn frame(&self, at: u64) -> Result<u64, Errno>;
}
