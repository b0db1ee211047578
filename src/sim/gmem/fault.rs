//! What an access to a page of the file gets: the host's page fault, and KVM's lookup for a guest.

use super::super::World;
use super::super::host::{AccessError, Cpu, Flags, Pfn};
use super::super::mutant::Mutant;
use super::FileId;
use crate::machine::Errno;

/// Whether an access stores.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Access {
    /// A load.
    Read,
    /// A store.
    Write,
    /// An instruction fetch.
    Fetch,
}

impl World {
    /// The frame for a host access (kvm_gmem_fault_user_mapping): up to date, not poisoned.
    ///
    /// # Errors
    /// [`AccessError::Bus`] beyond the size and in a private file, [`AccessError::Poisoned`], and no memory.
    pub fn gmem_host_fault(&mut self, file: FileId, index: u64, access: Access, cpu: Cpu) -> Result<Pfn, AccessError> {
        let node = self.gmem.inode_of(file).ok_or(AccessError::Bus)?;
        if index >= node.size_pages() && !self.mutant(Mutant::HostFaultIgnoresSize) {
            return Err(AccessError::Bus);
        }
        if node.is_private(index) && !self.mutant(Mutant::HostFaultIgnoresPrivate) {
            return Err(AccessError::Bus);
        }
        let inode = self.gmem.files[&file].inode;
        let pfn = self.gmem_get_folio(inode, index, cpu).map_err(|_| AccessError::OutOfMemory)?;
        if self.host.frames.flags(pfn).contains(Flags::HWPOISON) {
            return Err(AccessError::Poisoned);
        }
        if self.mutant(Mutant::ZeroTwice) {
            self.host.frames.clear_flags(pfn, Flags::UPTODATE);
        }
        self.make_uptodate(pfn);
        if access == Access::Write {
            self.host.frames.set_flags(pfn, Flags::DIRTY);
            let now = self.now_ns();
            if let Some(node) = self.gmem.inodes.get_mut(&inode) {
                node.modified_ns = now;
            }
        }
        Ok(pfn)
    }

    /// The frame for a guest mapping (kvm_gmem_get_pfn): up to date, not poisoned.
    ///
    /// # Errors
    /// EFAULT when the file is closed, EHWPOISON, ENOMEM.
    pub fn gmem_get_pfn(&mut self, file: Option<FileId>, index: u64) -> Result<Pfn, Errno> {
        let inode = file.and_then(|file| self.gmem.files.get(&file)).ok_or(Errno::EFAULT)?.inode;
        let pfn = self.gmem_get_folio(inode, index, Cpu::Guest)?;
        if self.host.frames.flags(pfn).contains(Flags::HWPOISON) && !self.mutant(Mutant::GuestIgnoresPoison) {
            return Err(Errno::EHWPOISON);
        }
        self.make_uptodate(pfn);
        Ok(pfn)
    }
}
