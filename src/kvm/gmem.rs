//! A guest_memfd of the running kernel.

use super::file_op;
use super::ioctl;
use super::mapping::{KvmMapping, errno_of};
use crate::machine::{CacheStat, ConvertError, Errno, FileOp, FileStat, GuestMemfd, Mapping, PAGE_SIZE, Protection};
use crate::uapi::bindings::kvm_create_guest_memfd;
use crate::uapi::kvm::{KVM_CREATE_GUEST_MEMFD, KVM_SET_MEMORY_ATTRIBUTES2, KvmMemoryAttributes2};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Arc;

/// A guest_memfd: owns its descriptor, which is close-on-exec unless it was made by [`create_as_the_kernel_does`].
pub struct KvmGuestMemfd {
    fd: OwnedFd,
    /// The memory of the payload of a TD. A file keeps its VM alive, and what a test takes away from the TD last is to be its own
    /// file, not the payload's.
    payload: Option<Arc<dyn GuestMemfd>>,
}

/// KVM_CREATE_GUEST_MEMFD and nothing else: the descriptor as the kernel hands it out, which is *not* close-on-exec.
///
/// # Errors
/// The errno of the ioctl.
pub fn create_as_the_kernel_does(
    vm: &impl AsRawFd,
    size: u64,
    flags: u64,
    reserved: [u64; 6],
) -> Result<OwnedFd, Errno> {
    let mut argument = kvm_create_guest_memfd { size, flags, reserved };
    // SAFETY: the structure is the ioctl's and holds no pointers.
    let fd = unsafe { ioctl::with_struct(vm, KVM_CREATE_GUEST_MEMFD, &mut argument) }?;
    // SAFETY: a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

impl KvmGuestMemfd {
    /// KVM_CREATE_GUEST_MEMFD, then FD_CLOEXEC: a child that inherited the file would hold a reference to its pages.
    ///
    /// # Errors
    /// The errno of the ioctl.
    pub(super) fn create(vm: &impl AsRawFd, size: u64, flags: u64, reserved: [u64; 6]) -> Result<KvmGuestMemfd, Errno> {
        let fd = create_as_the_kernel_does(vm, size, flags, reserved)?;
        // SAFETY: F_SETFD takes a number.
        Errno::result(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFD, libc::FD_CLOEXEC) })?;
        Ok(KvmGuestMemfd::from(fd))
    }

    /// The same file, which the memory of the VM's payload outlives.
    pub(super) fn with_payload(self, payload: Option<Arc<dyn GuestMemfd>>) -> KvmGuestMemfd {
        KvmGuestMemfd { payload, ..self }
    }
}

impl From<OwnedFd> for KvmGuestMemfd {
    /// Takes a descriptor of a guest_memfd that came some other way: inherited, or through SCM_RIGHTS.
    fn from(fd: OwnedFd) -> KvmGuestMemfd {
        KvmGuestMemfd { fd, payload: None }
    }
}

impl AsRawFd for KvmGuestMemfd {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

/// `struct cachestat_range` and `struct cachestat` of `linux/mman.h`, 6.5.
#[repr(C)]
struct CachestatRange {
    off: u64,
    len: u64,
}

#[repr(C)]
#[derive(Default)]
struct Cachestat {
    nr_cache: u64,
    nr_dirty: u64,
    nr_writeback: u64,
    nr_evicted: u64,
    nr_recently_evicted: u64,
}

/// The number of cachestat(2), which libc has for some targets only.
const SYS_CACHESTAT: libc::c_long = 451;

/// cachestat(2) of a byte range; a length of 0 reaches to the end.
///
/// # Errors
/// ENOSYS before 6.5 and without CONFIG_CACHESTAT_SYSCALL, or the errno of the call.
pub(super) fn cachestat(fd: &impl AsRawFd, offset: u64, len: u64) -> Result<CacheStat, Errno> {
    let range = CachestatRange { off: offset, len };
    let mut stat = Cachestat::default();
    // SAFETY: the kernel reads one range and writes one result.
    let result = unsafe { libc::syscall(SYS_CACHESTAT, fd.as_raw_fd(), &raw const range, &raw mut stat, 0u32) };
    Errno::result(result)?;
    Ok(CacheStat { cached: stat.nr_cache, dirty: stat.nr_dirty, writeback: stat.nr_writeback })
}

impl GuestMemfd for KvmGuestMemfd {
    fn fallocate(&self, mode: i32, offset: i64, len: i64) -> Result<(), Errno> {
        // SAFETY: takes numbers only.
        Errno::result(unsafe { libc::fallocate64(self.as_raw_fd(), mode, offset, len) }).map(drop)
    }

    fn convert(&self, offset: u64, len: u64, attributes: u64) -> Result<(), ConvertError> {
        // The kernel writes the offset only where a page is in the way; a value that no page offset can have tells.
        const NOT_REPORTED: u64 = PAGE_SIZE - 1;
        let mut argument =
            KvmMemoryAttributes2 { offset, size: len, attributes, error_offset: NOT_REPORTED, ..Default::default() };
        // SAFETY: the structure is the ioctl's and holds no pointers.
        match unsafe { ioctl::with_struct(&self.fd, KVM_SET_MEMORY_ATTRIBUTES2, &mut argument) } {
            Ok(_) => Ok(()),
            Err(errno) => Err(ConvertError {
                errno,
                offset: (argument.error_offset != NOT_REPORTED).then_some(argument.error_offset),
            }),
        }
    }

    fn convert_words(&self, words: &mut [u64; 16]) -> Result<(), Errno> {
        let [offset, size, attributes, flags, error_offset, reserved @ ..] = *words;
        let mut argument = KvmMemoryAttributes2 { offset, size, attributes, flags, error_offset, reserved };
        // SAFETY: the structure is the ioctl's and holds no pointers.
        let result = unsafe { ioctl::with_struct(&self.fd, KVM_SET_MEMORY_ATTRIBUTES2, &mut argument) };
        let KvmMemoryAttributes2 { offset, size, attributes, flags, error_offset, reserved } = argument;
        words[..5].copy_from_slice(&[offset, size, attributes, flags, error_offset]);
        words[5..].copy_from_slice(&reserved);
        result.map(drop)
    }

    fn map(&self, len: u64, offset: u64, protection: Protection) -> Result<Box<dyn Mapping>, Errno> {
        Ok(Box::new(KvmMapping::of_file(&self.fd, len, offset, protection)?))
    }

    fn stat(&self) -> Result<FileStat, Errno> {
        let stat = nix::sys::stat::fstat(&self.fd)?;
        Ok(FileStat {
            mode: stat.st_mode,
            size: stat.st_size,
            block_size: stat.st_blksize,
            blocks: stat.st_blocks,
            links: stat.st_nlink,
            inode: stat.st_ino,
            uid: stat.st_uid,
            gid: stat.st_gid,
            modified_ns: i128::from(stat.st_mtime) * 1_000_000_000 + i128::from(stat.st_mtime_nsec),
        })
    }

    fn cache_stat(&self, offset: u64, len: u64) -> Result<CacheStat, Errno> {
        cachestat(&self.fd, offset, len)
    }

    fn file_op(&self, op: FileOp) -> Result<i64, Errno> {
        file_op::perform(self.as_raw_fd(), op)
    }

    fn duplicate(&self) -> Result<Arc<dyn GuestMemfd>, Errno> {
        // The standard library duplicates with F_DUPFD_CLOEXEC.
        let fd = self.fd.try_clone().map_err(errno_of)?;
        Ok(Arc::new(KvmGuestMemfd { fd, payload: self.payload.clone() }))
    }

    fn raw_fd(&self) -> Option<RawFd> {
        Some(self.as_raw_fd())
    }

    fn handle(&self) -> u64 {
        self.as_raw_fd() as u64
    }
}
