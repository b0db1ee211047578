//! What a test does from a forked child: [`in_child`].

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};

use super::{Stop, TestResult};
use crate::machine::Errno;

/// How a forked child ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChildEnd {
    /// Its body returned this.
    Returned(Result<u64, Errno>),
    /// A signal killed it.
    Killed {
        /// The signal's number.
        signal: i32,
    },
}

impl ChildEnd {
    /// What the child returned.
    ///
    /// # Errors
    /// A failure of the test when a signal killed the child.
    #[track_caller]
    pub fn returned(self) -> TestResult<Result<u64, Errno>> {
        match self {
            ChildEnd::Returned(result) => Ok(result),
            ChildEnd::Killed { signal } => Err(Stop::fail(format!("the forked child was killed by signal {signal}"))),
        }
    }
}

/// Runs `body` in a forked child of the test, with a copy of its address space and all of its descriptors, and waits
/// for its end. Nothing of the child is dropped or flushed: it leaves with _exit(2).
///
/// Only the calling thread lives on in the child, so a test that has other threads may do no more in `body` than system
/// calls and accesses to memory.
///
/// # Errors
/// A failure of the test when fork(2), pipe(2) or waitpid(2) fails, or when `body` panics.
pub fn in_child(body: impl FnOnce() -> Result<u64, Errno>) -> TestResult<ChildEnd> {
    let mut ends = [0; 2];
    // SAFETY: `ends` has room for the two descriptors that the call writes.
    Errno::result(unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) })?;
    // SAFETY: both descriptors are new and nothing else owns them.
    let (reader, writer) = unsafe { (OwnedFd::from_raw_fd(ends[0]), OwnedFd::from_raw_fd(ends[1])) };

    // SAFETY: the child does nothing but `body`, one write and _exit; what `body` may do beside other threads is the
    // caller's promise.
    let child = Errno::result(unsafe { libc::fork() })?;
    if child == 0 {
        let status = match catch_unwind(AssertUnwindSafe(body)) {
            Ok(result) => {
                let (errno, value) = match result {
                    Ok(value) => (0, value),
                    Err(errno) => (errno as i32, 0),
                };
                let mut message = [0u8; 12];
                message[..4].copy_from_slice(&errno.to_ne_bytes());
                message[4..].copy_from_slice(&value.to_ne_bytes());
                // SAFETY: pointer and length describe `message`, and the descriptor is open.
                let sent = unsafe { libc::write(writer.as_raw_fd(), message.as_ptr().cast(), message.len()) };
                i32::from(sent != message.len() as isize)
            }
            Err(_) => 1,
        };
        // SAFETY: _exit ends the process without running anything of it.
        unsafe { libc::_exit(status) }
    }

    drop(writer);
    let mut message = Vec::new();
    File::from(reader).read_to_end(&mut message)?;
    let mut status = 0;
    // SAFETY: `status` has room for what the call writes, and `child` is a child of this process that nobody else reaps.
    Errno::result(unsafe { libc::waitpid(child, &mut status, 0) })?;
    if libc::WIFSIGNALED(status) {
        return Ok(ChildEnd::Killed { signal: libc::WTERMSIG(status) });
    }
    let Ok(message) = <[u8; 12]>::try_from(message) else {
        return Err(Stop::fail(format!("the forked child ended with wait status {status:#x} and without a result")));
    };
    let [e0, e1, e2, e3, value @ ..] = message;
    Ok(ChildEnd::Returned(match i32::from_ne_bytes([e0, e1, e2, e3]) {
        0 => Ok(u64::from_ne_bytes(value)),
        errno => Err(Errno::from_raw(errno)),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_come_back_as_they_were_returned() {
        assert_eq!(in_child(|| Ok(0x1234_5678_9ABC_DEF0)), Ok(ChildEnd::Returned(Ok(0x1234_5678_9ABC_DEF0))));
        assert_eq!(in_child(|| Err(Errno::EIO)), Ok(ChildEnd::Returned(Err(Errno::EIO))));
    }

    #[test]
    fn a_killing_signal_is_told_from_a_result() {
        let killed = in_child(|| {
            // SAFETY: raising a signal in the own process.
            unsafe { libc::raise(libc::SIGKILL) };
            Ok(0)
        });
        assert_eq!(killed, Ok(ChildEnd::Killed { signal: libc::SIGKILL }));
    }
}
