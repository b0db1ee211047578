//! Ending a KVM_RUN from outside: `immediate_exit`, a signal, and a timer for guests that do not come back.

use crate::machine::Errno;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Mutex, Once};
use std::time::{Duration, Instant};

/// The signal that makes KVM_RUN return EINTR. Real-time signals have no meaning to anybody else here; its handler does
/// nothing, and SA_RESTART keeps every other system call of the thread out of it.
fn signal() -> i32 {
    static INSTALLED: Once = Once::new();
    let signal = libc::SIGRTMIN() + 5;
    INSTALLED.call_once(|| {
        extern "C" fn nothing(_: i32) {}
        // SAFETY: all-zero is a valid sigaction.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = nothing as *const () as usize;
        action.sa_flags = libc::SA_RESTART;
        // SAFETY: the handler does nothing.
        unsafe { libc::sigaction(signal, &action, std::ptr::null_mut()) };
    });
    signal
}

/// What other threads may do to a vCPU's KVM_RUN.
pub(super) struct Kicker {
    state: Mutex<State>,
}

struct State {
    /// `immediate_exit` in the vCPU's `kvm_run`, while the vCPU is open.
    immediate_exit: Option<NonNull<u8>>,
    /// The thread in KVM_RUN.
    runner: Option<libc::pid_t>,
    /// A kick that no KVM_RUN has answered yet.
    kicked: bool,
}

// SAFETY: the pointer is used under the lock, for as long as the vCPU has not taken it away in `detach`.
unsafe impl Send for State {}

impl Kicker {
    /// For a vCPU whose `immediate_exit` is at `immediate_exit`.
    pub(super) fn new(immediate_exit: NonNull<u8>) -> Kicker {
        Kicker { state: Mutex::new(State { immediate_exit: Some(immediate_exit), runner: None, kicked: false }) }
    }

    /// Makes the current KVM_RUN return EINTR, or the next one where none is under way.
    pub(super) fn kick(&self) {
        let mut state = self.lock();
        let Some(flag) = state.immediate_exit else { return };
        state.kicked = true;
        // SAFETY: the vCPU is open, so the byte is mapped; KVM reads it concurrently, hence the atomic.
        unsafe { AtomicU8::from_ptr(flag.as_ptr()) }.store(1, Ordering::SeqCst);
        if let Some(thread) = state.runner {
            // SAFETY: takes numbers. The thread is between `begin` and `end`, which wait for this lock.
            unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, signal()) };
        }
    }

    /// The calling thread is about to call KVM_RUN.
    pub(super) fn begin(&self) {
        signal();
        // SAFETY: takes nothing.
        self.lock().runner = Some(unsafe { libc::gettid() });
    }

    /// The calling thread is back; whether there was a kick, if KVM_RUN was interrupted.
    pub(super) fn end(&self, interrupted: Interrupted) -> bool {
        let mut state = self.lock();
        state.runner = None;
        if interrupted == Interrupted::No || !state.kicked {
            return false;
        }
        state.kicked = false;
        if let Some(flag) = state.immediate_exit {
            // SAFETY: as in `kick`.
            unsafe { AtomicU8::from_ptr(flag.as_ptr()) }.store(0, Ordering::SeqCst);
        }
        true
    }

    /// The vCPU is closed: kicks have no effect from now on.
    pub(super) fn detach(&self) {
        self.lock().immediate_exit = None;
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().expect("no holder of this lock panics")
    }
}

/// Whether KVM_RUN returned EINTR.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Interrupted {
    /// It did.
    Yes,
    /// It did not.
    No,
}

/// A running time limit: while it lives, the calling thread gets the kick signal once the time is up, and again every
/// 10 ms, so that a signal which came just before KVM_RUN is not the last one.
pub(super) struct TimeLimit {
    timer: libc::timer_t,
    end: Instant,
}

impl TimeLimit {
    /// Starts the limit for the calling thread.
    pub(super) fn start(limit: Duration) -> Result<TimeLimit, Errno> {
        thread_local! {
            static TIMER: ThreadTimer = ThreadTimer::new();
        }
        let timer = TIMER.with(|timer| timer.0)?;
        let again = libc::timespec { tv_sec: 0, tv_nsec: 10_000_000 };
        // A first expiry of zero would disarm the timer.
        let first = limit.max(Duration::from_nanos(1));
        let first = libc::timespec { tv_sec: first.as_secs() as i64, tv_nsec: i64::from(first.subsec_nanos()) };
        set(timer, libc::itimerspec { it_interval: again, it_value: first })?;
        Ok(TimeLimit { timer, end: Instant::now() + limit })
    }

    /// Whether the time is up.
    pub(super) fn is_over(&self) -> bool {
        Instant::now() >= self.end
    }
}

impl Drop for TimeLimit {
    fn drop(&mut self) {
        let zero = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        set(self.timer, libc::itimerspec { it_interval: zero, it_value: zero })
            .expect("timer_settime takes a timer of this thread and valid times");
    }
}

fn set(timer: libc::timer_t, time: libc::itimerspec) -> Result<(), Errno> {
    // SAFETY: the timer lives as long as the calling thread, `time` outlives the call.
    Errno::result(unsafe { libc::timer_settime(timer, 0, &time, std::ptr::null_mut()) }).map(drop)
}

/// A timer that signals the thread that made it.
struct ThreadTimer(Result<libc::timer_t, Errno>);

impl ThreadTimer {
    fn new() -> ThreadTimer {
        // SAFETY: all-zero is a valid sigevent.
        let mut event: libc::sigevent = unsafe { std::mem::zeroed() };
        event.sigev_notify = libc::SIGEV_THREAD_ID;
        event.sigev_signo = signal();
        // SAFETY: takes nothing.
        event.sigev_notify_thread_id = unsafe { libc::gettid() };
        let mut timer: libc::timer_t = std::ptr::null_mut();
        // SAFETY: both pointers outlive the call.
        let result = unsafe { libc::timer_create(libc::CLOCK_MONOTONIC, &mut event, &mut timer) };
        ThreadTimer(Errno::result(result).map(|_| timer))
    }
}

impl Drop for ThreadTimer {
    fn drop(&mut self) {
        if let Ok(timer) = self.0 {
            // SAFETY: made by `new`, deleted once.
            unsafe { libc::timer_delete(timer) };
        }
    }
}
