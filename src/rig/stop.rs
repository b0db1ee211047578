//! SIGINT, SIGTERM and SIGHUP for several boots at once: one signal ends them all.

use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::harness::interrupt::Interrupts;

/// The signals, blocked while this value lives. Make it before any thread is started.
#[derive(Debug)]
pub struct StopSignal {
    interrupts: Mutex<Interrupts>,
    seen: AtomicI32,
}

impl StopSignal {
    /// Blocks the signals.
    ///
    /// # Errors
    /// What sigprocmask(2) and signalfd(2) return.
    pub fn block() -> nix::Result<StopSignal> {
        Ok(StopSignal { interrupts: Mutex::new(Interrupts::block()?), seen: AtomicI32::new(0) })
    }

    /// The signal that came, for every caller from then on.
    pub fn seen(&self) -> Option<i32> {
        let mut interrupts = self.interrupts.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(signal) = interrupts.take() {
            self.seen.store(signal, Ordering::Relaxed);
        }
        Some(self.seen.load(Ordering::Relaxed)).filter(|&signal| signal != 0)
    }
}
