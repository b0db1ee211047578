//! SIGINT, SIGTERM and SIGHUP as something to poll for.

use std::os::fd::{AsFd, BorrowedFd};

use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

/// The three signals, blocked and readable from a descriptor while this value lives.
#[derive(Debug)]
pub struct Interrupts {
    fd: SignalFd,
    before: SigSet,
}

impl Interrupts {
    /// Blocks the signals for the calling thread. Threads started later inherit that.
    ///
    /// # Errors
    /// What sigprocmask(2) and signalfd(2) return.
    pub fn block() -> nix::Result<Interrupts> {
        let signals: SigSet = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP].into_iter().collect();
        let before = SigSet::thread_get_mask()?;
        signals.thread_block()?;
        let fd = SignalFd::with_flags(&signals, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?;
        Ok(Interrupts { fd, before })
    }

    /// The descriptor to poll for input.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// The number of a signal that came, if one did.
    pub fn take(&mut self) -> Option<i32> {
        self.fd.read_signal().ok().flatten().map(|info| info.ssi_signo as i32)
    }
}

impl Drop for Interrupts {
    fn drop(&mut self) {
        let _ = self.before.thread_set_mask();
    }
}
