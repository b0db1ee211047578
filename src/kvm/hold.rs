//! What takes a reference to pages of a mapping and keeps it: a pipe, or an io_uring registered buffer.

use super::mapping::errno_of;
use crate::machine::{Errno, HoldKind, PAGE_SIZE};
use std::any::Any;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// Takes references to the pages of a range until the returned value is dropped.
///
/// # Errors
/// EFAULT where a page cannot be had (a private guest_memfd page, a hole); ENOSYS or EPERM where io_uring is off.
pub(super) fn hold(base: *mut u8, len: u64, kind: HoldKind) -> Result<Box<dyn Any + Send>, Errno> {
    match kind {
        HoldKind::Get => Ok(Box::new(PipeHold::new(base, len)?)),
        HoldKind::Pin => Ok(Box::new(PinHold::new(base, len)?)),
    }
}

/// Whether io_uring can be used at all: the errno of io_uring_setup(2) where not.
pub(super) fn io_uring_works() -> Result<(), Errno> {
    setup_ring().map(drop)
}

/// Pages in a pipe: one plain reference each (vmsplice(2), FOLL_GET).
struct PipeHold {
    _reader: std::io::PipeReader,
    _writer: std::io::PipeWriter,
}

impl PipeHold {
    fn new(base: *mut u8, len: u64) -> Result<PipeHold, Errno> {
        let (reader, writer) = std::io::pipe().map_err(errno_of)?;
        let pages = (base as u64 % PAGE_SIZE + len).div_ceil(PAGE_SIZE);
        // One pipe buffer a page; the default is 16.
        let room = (pages * PAGE_SIZE).max(16 * PAGE_SIZE) as libc::c_int;
        // SAFETY: F_SETPIPE_SZ takes a number.
        Errno::result(unsafe { libc::fcntl(writer.as_raw_fd(), libc::F_SETPIPE_SZ, room) })?;
        let mut done = 0;
        while done < len {
            // SAFETY: stays inside of the range that the caller owns.
            let from = unsafe { base.add(done as usize) };
            let rest = libc::iovec { iov_base: from.cast(), iov_len: (len - done) as usize };
            // SAFETY: vmsplice takes references to the pages and changes nothing in them.
            let spliced = unsafe { libc::vmsplice(writer.as_raw_fd(), &rest, 1, libc::SPLICE_F_NONBLOCK) };
            done += Errno::result(spliced)? as u64;
        }
        Ok(PipeHold { _reader: reader, _writer: writer })
    }
}

/// Pages in an io_uring registered buffer: a long-term pin each (FOLL_PIN | FOLL_LONGTERM).
struct PinHold {
    ring: OwnedFd,
}

/// `IORING_REGISTER_BUFFERS` and `IORING_UNREGISTER_BUFFERS` of `linux/io_uring.h`.
const IORING_REGISTER_BUFFERS: u32 = 0;
const IORING_UNREGISTER_BUFFERS: u32 = 1;

/// Bytes of `struct io_uring_params` of `linux/io_uring.h`.
const IO_URING_PARAMS: usize = 120;

fn setup_ring() -> Result<OwnedFd, Errno> {
    let mut params = [0u64; IO_URING_PARAMS / 8];
    // SAFETY: the kernel reads and writes one `struct io_uring_params`, which is as long as the array.
    let fd = unsafe { libc::syscall(libc::SYS_io_uring_setup, 1u32, params.as_mut_ptr()) };
    let fd = Errno::result(fd)? as i32;
    // SAFETY: a new descriptor that nobody else owns; the kernel makes it close-on-exec.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

impl PinHold {
    fn new(base: *mut u8, len: u64) -> Result<PinHold, Errno> {
        let ring = setup_ring()?;
        let buffer = libc::iovec { iov_base: base.cast(), iov_len: len as usize };
        // SAFETY: one iovec; the kernel pins its pages, and nothing is ever read or written through the ring.
        let result = unsafe {
            libc::syscall(
                libc::SYS_io_uring_register,
                ring.as_raw_fd(),
                IORING_REGISTER_BUFFERS,
                &raw const buffer,
                1u32,
            )
        };
        Errno::result(result)?;
        Ok(PinHold { ring })
    }
}

impl Drop for PinHold {
    /// Unregisters first: closing alone drops the pins later, from a kernel worker.
    fn drop(&mut self) {
        // SAFETY: takes no argument.
        unsafe {
            libc::syscall(
                libc::SYS_io_uring_register,
                self.ring.as_raw_fd(),
                IORING_UNREGISTER_BUFFERS,
                std::ptr::null::<libc::iovec>(),
                0u32,
            )
        };
    }
}
