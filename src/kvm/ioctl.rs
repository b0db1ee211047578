//! ioctl(2) with its result as a value.

use crate::machine::Errno;
use libc::Ioctl;
use std::os::fd::AsRawFd;

/// An ioctl whose argument is a number, or that takes none.
///
/// # Errors
/// The errno of the call.
pub(super) fn with_value(fd: &impl AsRawFd, request: Ioctl, argument: u64) -> Result<i32, Errno> {
    // SAFETY: the callers pass requests whose argument KVM takes as a number, so the kernel touches no memory of ours.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), request, argument) };
    Errno::result(result)
}

/// An ioctl that reads, and possibly writes, a structure.
///
/// # Errors
/// The errno of the call.
///
/// # Safety
/// `T` must be the structure that `request` takes on this kind of descriptor, of at least the size that the kernel
/// copies, and every pointer in it must be valid for what the kernel does with it.
pub(super) unsafe fn with_struct<T>(fd: &impl AsRawFd, request: Ioctl, argument: &mut T) -> Result<i32, Errno> {
    // SAFETY: the caller promises that the kernel copies no more than a `T` in and out.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), request, std::ptr::from_mut(argument)) };
    Errno::result(result)
}
