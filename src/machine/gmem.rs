//! A guest_memfd: the file and what may be done to it.

use super::{Errno, Mapping};
use std::os::fd::RawFd;
use std::sync::Arc;

/// Protection and kind of a mapping: the `prot` and `flags` arguments of mmap(2), as in `libc`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Protection {
    /// PROT_* bits.
    pub prot: i32,
    /// MAP_* bits.
    pub flags: i32,
}

impl Protection {
    /// PROT_READ | PROT_WRITE, MAP_SHARED.
    pub const SHARED_RW: Protection = Protection { prot: libc::PROT_READ | libc::PROT_WRITE, flags: libc::MAP_SHARED };
    /// PROT_READ, MAP_SHARED.
    pub const SHARED_READ: Protection = Protection { prot: libc::PROT_READ, flags: libc::MAP_SHARED };
    /// PROT_READ | PROT_WRITE, MAP_PRIVATE.
    pub const PRIVATE_RW: Protection =
        Protection { prot: libc::PROT_READ | libc::PROT_WRITE, flags: libc::MAP_PRIVATE };
}

/// The fields of fstat(2) that a guest_memfd gives a meaning to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileStat {
    /// `st_mode`.
    pub mode: u32,
    /// `st_size`, bytes.
    pub size: i64,
    /// `st_blksize`, bytes.
    pub block_size: i64,
    /// `st_blocks`, 512-byte units.
    pub blocks: i64,
    /// `st_nlink`.
    pub links: u64,
    /// `st_ino`.
    pub inode: u64,
    /// `st_uid`.
    pub uid: u32,
    /// `st_gid`.
    pub gid: u32,
    /// `st_mtime` with nanoseconds, as nanoseconds since the epoch.
    pub modified_ns: i128,
}

/// The counts of cachestat(2), in pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CacheStat {
    /// Pages in the page cache.
    pub cached: u64,
    /// Dirty pages.
    pub dirty: u64,
    /// Pages under writeback.
    pub writeback: u64,
}

/// A system call on the file that is expected to fail, or to have no effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FileOp {
    /// read(2) of `len` bytes.
    Read(usize),
    /// readv(2) with one vector of `len` bytes.
    Readv(usize),
    /// write(2) of `len` bytes.
    Write(usize),
    /// writev(2) with one vector of `len` bytes.
    Writev(usize),
    /// pread(2): length, offset.
    Pread(usize, i64),
    /// pwrite(2): length, offset.
    Pwrite(usize, i64),
    /// preadv(2) with one vector: length, offset.
    Preadv(usize, i64),
    /// pwritev(2) with one vector: length, offset.
    Pwritev(usize, i64),
    /// lseek(2): offset, whence.
    Seek(i64, i32),
    /// ftruncate(2) to a size.
    Truncate(i64),
    /// fchmod(2).
    Chmod(u32),
    /// fchown(2) to the caller's own ids.
    Chown,
    /// futimens(2) to now.
    Utimens,
    /// fsync(2).
    Fsync,
    /// fdatasync(2).
    Fdatasync,
    /// posix_fadvise(2) over the whole file: advice.
    Fadvise(i32),
    /// fcntl(F_ADD_SEALS): seals.
    AddSeals(i32),
    /// fcntl(F_GET_SEALS).
    GetSeals,
    /// sendfile(2) from the file to a pipe: length.
    Sendfile(usize),
    /// splice(2) from the file to a pipe with no offset: length.
    Splice(usize),
    /// open(2) of /proc/self/fd/N.
    Reopen,
    /// execveat(2) with AT_EMPTY_PATH, in a child that would exit if it worked.
    Execve,
    /// ioctl(FIONREAD).
    Fionread,
    /// fstatfs(2): the result is `f_type`.
    StatfsType,
    /// fsetxattr(2) of `user.x`.
    Setxattr,
    /// fcntl(F_GETFL): the result is the flags.
    GetFlags,
}

/// Why a conversion on the file (KVM_SET_MEMORY_ATTRIBUTES2) failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConvertError {
    /// The errno; ENOTTY where the kernel has no such ioctl.
    pub errno: Errno,
    /// `error_offset`: the byte offset of the page that could not be converted, where the kernel reports one.
    pub offset: Option<u64>,
}

/// A guest_memfd file descriptor.
pub trait GuestMemfd: Send + Sync {
    /// fallocate(2).
    fn fallocate(&self, mode: i32, offset: i64, len: i64) -> Result<(), Errno>;

    /// fallocate(FALLOC_FL_KEEP_SIZE): allocates the pages of a range.
    fn allocate(&self, offset: u64, len: u64) -> Result<(), Errno> {
        self.fallocate(libc::FALLOC_FL_KEEP_SIZE, offset as i64, len as i64)
    }

    /// fallocate(FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE): frees the pages of a range.
    fn punch_hole(&self, offset: u64, len: u64) -> Result<(), Errno> {
        self.fallocate(libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE, offset as i64, len as i64)
    }

    /// KVM_SET_MEMORY_ATTRIBUTES2 on the file: converts a range in place. Out of tree as of 7.3.
    fn convert(&self, offset: u64, len: u64, attributes: u64) -> Result<(), ConvertError>;

    /// KVM_SET_MEMORY_ATTRIBUTES2 with every word of its argument: offset, size, attributes, flags, error_offset and eleven
    /// reserved ones, written back as the kernel writes them. ENOTTY where there is no such ioctl.
    fn convert_words(&self, _words: &mut [u64; 16]) -> Result<(), Errno> {
        Err(Errno::ENOTTY)
    }

    /// mmap(2): `len` bytes from `offset`.
    fn map(&self, len: u64, offset: u64, protection: Protection) -> Result<Box<dyn Mapping>, Errno>;

    /// fstat(2).
    fn stat(&self) -> Result<FileStat, Errno>;

    /// cachestat(2) of a byte range; a length of 0 reaches to the end.
    fn cache_stat(&self, offset: u64, len: u64) -> Result<CacheStat, Errno>;

    /// Any other system call on the file; the value is the call's return value.
    fn file_op(&self, op: FileOp) -> Result<i64, Errno>;

    /// dup(2).
    fn duplicate(&self) -> Result<Arc<dyn GuestMemfd>, Errno>;

    /// The raw descriptor, on machines where a guest_memfd is one.
    fn raw_fd(&self) -> Option<RawFd>;

    /// The number that identifies this file to the machine that made it (the descriptor, or the model's handle).
    fn handle(&self) -> u64;
}
