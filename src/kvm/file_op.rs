//! The system calls of [`FileOp`], issued as they are.

use super::mapping::errno_of;
use crate::machine::{Errno, FileOp};
use std::ffi::CString;
use std::os::fd::{AsRawFd, RawFd};

/// Issues one system call on `fd`; the value is the call's return value.
pub(super) fn perform(fd: RawFd, op: FileOp) -> Result<i64, Errno> {
    match op {
        FileOp::Read(len) | FileOp::Readv(len) | FileOp::Pread(len, _) | FileOp::Preadv(len, _) => read(fd, op, len),
        FileOp::Write(len) | FileOp::Writev(len) | FileOp::Pwrite(len, _) | FileOp::Pwritev(len, _) => {
            write(fd, op, len)
        }
        FileOp::Sendfile(_) | FileOp::Splice(_) => to_pipe(fd, op),
        FileOp::Execve => execve(fd),
        _ => plain(fd, op),
    }
}

fn read(fd: RawFd, op: FileOp, len: usize) -> Result<i64, Errno> {
    let mut buffer = vec![0u8; len];
    let base = buffer.as_mut_ptr().cast();
    let vector = libc::iovec { iov_base: base, iov_len: len };
    // SAFETY: the kernel writes at most `len` bytes to the buffer.
    let result = unsafe {
        match op {
            FileOp::Readv(_) => libc::readv(fd, &vector, 1),
            FileOp::Pread(_, offset) => libc::pread64(fd, base, len, offset),
            FileOp::Preadv(_, offset) => libc::preadv64(fd, &vector, 1, offset),
            _ => libc::read(fd, base, len),
        }
    };
    Errno::result(result).map(|n| n as i64)
}

fn write(fd: RawFd, op: FileOp, len: usize) -> Result<i64, Errno> {
    let mut buffer = vec![0u8; len];
    let vector = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: len };
    let base = buffer.as_ptr().cast();
    // SAFETY: the kernel reads at most `len` bytes of the buffer.
    let result = unsafe {
        match op {
            FileOp::Writev(_) => libc::writev(fd, &vector, 1),
            FileOp::Pwrite(_, offset) => libc::pwrite64(fd, base, len, offset),
            FileOp::Pwritev(_, offset) => libc::pwritev64(fd, &vector, 1, offset),
            _ => libc::write(fd, base, len),
        }
    };
    Errno::result(result).map(|n| n as i64)
}

fn to_pipe(fd: RawFd, op: FileOp) -> Result<i64, Errno> {
    let (_reader, writer) = std::io::pipe().map_err(errno_of)?;
    let out = writer.as_raw_fd();
    // SAFETY: no offset is passed, the kernel touches no memory of ours.
    let result = unsafe {
        match op {
            FileOp::Splice(len) => libc::splice(fd, std::ptr::null_mut(), out, std::ptr::null_mut(), len, 0),
            FileOp::Sendfile(len) => libc::sendfile64(out, fd, std::ptr::null_mut(), len),
            _ => unreachable!("only splice and sendfile need a pipe"),
        }
    };
    Errno::result(result).map(|n| n as i64)
}

/// execveat(2) in a child, which tells the errno over a close-on-exec pipe; end of file there means that it executed.
fn execve(fd: RawFd) -> Result<i64, Errno> {
    let (mut reader, writer) = std::io::pipe().map_err(errno_of)?;
    let arguments: [*const libc::c_char; 2] = [c"guest_memfd".as_ptr(), std::ptr::null()];
    let environment: [*const libc::c_char; 1] = [std::ptr::null()];
    // SAFETY: the child makes async-signal-safe system calls only, then exits.
    let child = Errno::result(unsafe { libc::fork() })?;
    if child == 0 {
        // SAFETY: the strings and the arrays outlive the calls; _exit runs no destructors.
        unsafe {
            libc::syscall(
                libc::SYS_execveat,
                fd,
                c"".as_ptr(),
                arguments.as_ptr(),
                environment.as_ptr(),
                libc::AT_EMPTY_PATH,
            );
            let errno = *libc::__errno_location();
            libc::write(writer.as_raw_fd(), (&raw const errno).cast(), 4);
            libc::_exit(127);
        }
    }
    drop(writer);
    let mut told = Vec::new();
    let read = std::io::Read::read_to_end(&mut reader, &mut told).map_err(errno_of);
    // SAFETY: the status is not asked for.
    unsafe { libc::waitpid(child, std::ptr::null_mut(), 0) };
    read?;
    match <[u8; 4]>::try_from(told.as_slice()) {
        Ok(errno) => Err(Errno::from_raw(i32::from_ne_bytes(errno))),
        Err(_) => Ok(0),
    }
}

/// The calls that pass numbers, or small constants.
fn plain(fd: RawFd, op: FileOp) -> Result<i64, Errno> {
    let result = match op {
        // SAFETY: takes numbers only.
        FileOp::Seek(offset, whence) => return Errno::result(unsafe { libc::lseek64(fd, offset, whence) }),
        // SAFETY: takes numbers only.
        FileOp::Truncate(size) => unsafe { libc::ftruncate64(fd, size) },
        // SAFETY: takes numbers only.
        FileOp::Chmod(mode) => unsafe { libc::fchmod(fd, mode) },
        // SAFETY: takes numbers only.
        FileOp::Chown => unsafe { libc::fchown(fd, libc::getuid(), libc::getgid()) },
        // SAFETY: a null pointer means now.
        FileOp::Utimens => unsafe { libc::futimens(fd, std::ptr::null()) },
        // SAFETY: takes numbers only.
        FileOp::Fsync => unsafe { libc::fsync(fd) },
        // SAFETY: takes numbers only.
        FileOp::Fdatasync => unsafe { libc::fdatasync(fd) },
        FileOp::Fadvise(advice) => {
            // SAFETY: takes numbers only. Unlike the others it returns the error number.
            return match unsafe { libc::posix_fadvise64(fd, 0, 0, advice) } {
                0 => Ok(0),
                errno => Err(Errno::from_raw(errno)),
            };
        }
        // SAFETY: takes numbers only.
        FileOp::AddSeals(seals) => unsafe { libc::fcntl(fd, libc::F_ADD_SEALS, seals) },
        // SAFETY: takes numbers only.
        FileOp::GetSeals => unsafe { libc::fcntl(fd, libc::F_GET_SEALS) },
        // SAFETY: takes numbers only.
        FileOp::GetFlags => unsafe { libc::fcntl(fd, libc::F_GETFL) },
        FileOp::Reopen => {
            let path = CString::new(format!("/proc/self/fd/{fd}")).expect("no NUL in a number");
            // SAFETY: the string outlives the call.
            let opened = Errno::result(unsafe { libc::open(path.as_ptr(), libc::O_RDWR | libc::O_CLOEXEC) })?;
            // SAFETY: just opened, owned by nobody else.
            unsafe { libc::close(opened) };
            return Ok(i64::from(opened));
        }
        FileOp::Fionread => {
            let mut count: libc::c_int = 0;
            // SAFETY: FIONREAD writes one int.
            unsafe { libc::ioctl(fd, libc::FIONREAD, &raw mut count) }
        }
        FileOp::StatfsType => {
            // SAFETY: all-zero is a valid statfs.
            let mut statfs: libc::statfs64 = unsafe { std::mem::zeroed() };
            // SAFETY: the kernel writes one statfs.
            Errno::result(unsafe { libc::fstatfs64(fd, &mut statfs) })?;
            #[allow(clippy::unnecessary_cast, reason = "the field's type differs between C libraries")]
            return Ok(statfs.f_type as i64);
        }
        FileOp::Setxattr => {
            // SAFETY: the name and the one byte of value outlive the call.
            unsafe { libc::fsetxattr(fd, c"user.x".as_ptr(), c"x".as_ptr().cast(), 1, 0) }
        }
        _ => unreachable!("handled by `perform`"),
    };
    Errno::result(result).map(i64::from)
}
