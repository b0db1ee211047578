//! guest_memfd: inodes with a page cache, files with the bindings of one VM.
//!
//! [`inode`] owns the pages and allocates them, [`file`] creates, maps and releases, [`fallocate`] allocates and punches,
//! [`fault`] is what a host access and a guest access get, [`calls`] is every other system call, [`memory_failure`] is
//! poison, [`convert`] conversion in place, [`huge`] folios of 2M and 1G. The order of the checks in each is the kernel's (virt/kvm/guest_memfd.c and the VFS in front of it).

pub mod calls;
pub mod convert;
pub mod fallocate;
pub mod fault;
pub mod file;
#[cfg(test)]
mod holder_tests;
pub mod huge;
#[cfg(test)]
mod huge_tests;
pub mod inode;
pub mod memory_failure;
#[cfg(test)]
mod tests;

pub use file::{Binding, File, FileId};
pub use inode::{FolioGroup, Inode, InodeId};

use std::collections::BTreeMap;

/// Every guest_memfd.
#[derive(Debug, Default)]
pub struct GmemState {
    /// Inodes.
    pub inodes: BTreeMap<InodeId, Inode>,
    /// Open files.
    pub files: BTreeMap<FileId, File>,
}

impl GmemState {
    /// The inode of an open file.
    pub fn inode_of(&self, file: FileId) -> Option<&Inode> {
        self.inodes.get(&self.files.get(&file)?.inode)
    }
}
