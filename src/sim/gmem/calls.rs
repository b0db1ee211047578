//! fstat, cachestat, and the system calls that a guest_memfd refuses.

use super::super::World;
use super::super::mutant::Mutant;
use super::FileId;
use crate::machine::{CacheStat, Errno, FileOp, FileStat, PAGE_SIZE};

impl World {
    /// fstat(2).
    ///
    /// # Errors
    /// EBADF.
    pub fn gmem_stat(&self, file: FileId) -> Result<FileStat, Errno> {
        let node = self.gmem.inode_of(file).ok_or(Errno::EBADF)?;
        let blocks = if self.mutant(Mutant::StatCountsBlocks) { node.pages.len() as i64 * 8 } else { 0 };
        // SAFETY: geteuid and getegid have no preconditions and cannot fail.
        let (uid, gid) = unsafe { (libc::geteuid(), libc::getegid()) };
        Ok(FileStat {
            mode: libc::S_IFREG | 0o600,
            size: node.size as i64,
            block_size: PAGE_SIZE as i64,
            blocks,
            links: 1,
            inode: node.number,
            uid,
            gid,
            modified_ns: node.modified_ns,
        })
    }

    /// cachestat(2): pages that the byte range touches; dirty and writeback pages are never counted.
    ///
    /// # Errors
    /// EBADF.
    pub fn gmem_cache_stat(&self, file: FileId, offset: u64, len: u64) -> Result<CacheStat, Errno> {
        let inode = self.gmem.files.get(&file).ok_or(Errno::EBADF)?.inode;
        let first = offset / PAGE_SIZE;
        let last = if len == 0 { u64::MAX } else { offset.saturating_add(len).div_ceil(PAGE_SIZE) };
        let cached = self.gmem_cached_pages(inode, first, last) + u64::from(self.mutant(Mutant::CachestatOffByOne));
        Ok(CacheStat { cached, dirty: 0, writeback: 0 })
    }

    /// Any other system call; only fadvise, GETFL and fstatfs do anything.
    ///
    /// # Errors
    /// What the VFS answers for a file without the operation.
    pub fn gmem_file_op(&self, file: FileId, op: FileOp) -> Result<i64, Errno> {
        self.gmem.files.get(&file).ok_or(Errno::EBADF)?;
        match op {
            FileOp::Read(_) | FileOp::Readv(_) | FileOp::Write(_) | FileOp::Writev(_) => Err(Errno::EINVAL),
            FileOp::Pread(_, at) | FileOp::Pwrite(_, at) | FileOp::Preadv(_, at) | FileOp::Pwritev(_, at) => {
                Err(if at < 0 { Errno::EINVAL } else { Errno::ESPIPE })
            }
            FileOp::Seek(_, whence) => Err(if (0..=4).contains(&whence) { Errno::ESPIPE } else { Errno::EINVAL }),
            FileOp::Truncate(_) | FileOp::Chmod(_) | FileOp::Chown | FileOp::Utimens => Err(Errno::EINVAL),
            FileOp::Fsync | FileOp::Fdatasync | FileOp::AddSeals(_) | FileOp::GetSeals => Err(Errno::EINVAL),
            FileOp::Fadvise(advice) if (0..=5).contains(&advice) => Ok(0),
            FileOp::Fadvise(_) | FileOp::Sendfile(_) | FileOp::Splice(_) => Err(Errno::EINVAL),
            FileOp::Reopen => Err(Errno::ENXIO),
            FileOp::Execve => Err(Errno::EACCES),
            FileOp::Fionread => Err(Errno::ENOTTY),
            FileOp::StatfsType => Ok(self.profile.kernel.gmem_magic()),
            FileOp::Setxattr => Err(Errno::EOPNOTSUPP),
            FileOp::GetFlags => Ok(i64::from(libc::O_RDWR) | 0x8000),
        }
    }
}
