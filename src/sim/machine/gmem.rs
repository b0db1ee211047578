//! The guest_memfd handle.

use super::super::gmem::FileId;
use super::Shared;
use super::mapping::SimMapping;
use crate::machine::{CacheStat, ConvertError, Errno, FileOp, FileStat, GuestMemfd, Mapping, Protection};
use std::os::fd::RawFd;
use std::sync::Arc;

/// A guest_memfd file descriptor.
#[derive(Debug)]
pub(super) struct SimGmem {
    shared: Arc<Shared>,
    file: FileId,
}

impl SimGmem {
    pub(super) fn open(shared: &Arc<Shared>, file: FileId) -> Arc<dyn GuestMemfd> {
        Arc::new(SimGmem { shared: shared.clone(), file })
    }
}

impl Drop for SimGmem {
    fn drop(&mut self) {
        self.shared.with(|world| world.gmem_close(self.file));
    }
}

impl GuestMemfd for SimGmem {
    fn fallocate(&self, mode: i32, offset: i64, len: i64) -> Result<(), Errno> {
        self.shared.with(|world| world.gmem_fallocate(self.file, mode, offset, len))
    }

    fn convert(&self, offset: u64, len: u64, attributes: u64) -> Result<(), ConvertError> {
        self.shared.with(|world| world.gmem_convert(self.file, offset, len, attributes))
    }

    fn convert_words(&self, words: &mut [u64; 16]) -> Result<(), Errno> {
        let error = match self.shared.with(|world| world.gmem_convert_words(self.file, words)) {
            Ok(()) => return Ok(()),
            Err(error) => error,
        };
        if let Some(offset) = error.offset {
            words[4] = offset;
        }
        Err(error.errno)
    }

    fn map(&self, len: u64, offset: u64, protection: Protection) -> Result<Box<dyn Mapping>, Errno> {
        let addr = self.shared.with(|world| world.gmem_mmap(self.file, len, offset, protection))?;
        Ok(SimMapping::boxed(&self.shared, addr, len))
    }

    fn stat(&self) -> Result<FileStat, Errno> {
        self.shared.with(|world| world.gmem_stat(self.file))
    }

    fn cache_stat(&self, offset: u64, len: u64) -> Result<CacheStat, Errno> {
        self.shared.with(|world| world.gmem_cache_stat(self.file, offset, len))
    }

    fn file_op(&self, op: FileOp) -> Result<i64, Errno> {
        self.shared.with(|world| world.gmem_file_op(self.file, op))
    }

    fn duplicate(&self) -> Result<Arc<dyn GuestMemfd>, Errno> {
        self.shared.with(|world| world.gmem_dup(self.file))?;
        Ok(SimGmem::open(&self.shared, self.file))
    }

    fn raw_fd(&self) -> Option<RawFd> {
        None
    }

    fn handle(&self) -> u64 {
        self.file
    }
}
