//! A guest that stores without pause: [`GuestWriter`].

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use super::TestResult;
use crate::machine::{Exit, GuestOp, Reply, Vcpu, VcpuControl};
use crate::{claim, fail};

/// Time limit of the vCPU: that of a long test (300 s), less what ending one takes.
const WHOLE_TEST: Duration = Duration::from_secs(290);
/// How long a waiting thread leaves its CPU to the others.
const PAUSE: Duration = Duration::from_micros(20);

/// A vCPU that stores a rising counter to one address without pause, on a thread of its own.
pub struct GuestWriter {
    control: Arc<dyn VcpuControl>,
    ending: Arc<AtomicBool>,
    /// Until it is joined.
    thread: Option<thread::JoinHandle<(Box<dyn Vcpu>, Exit)>>,
}

impl Drop for GuestWriter {
    /// A guest that no test waits for any more would go on for ever.
    fn drop(&mut self) {
        self.ending.store(true, Ordering::Release);
        self.stop();
        if let Some(thread) = self.thread.take() {
            // It has nothing to tell to a test that has failed.
            let _ = thread.join();
        }
    }
}

/// What the writer does at KVM_EXIT_MEMORY_FAULT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AtFault {
    /// It ends.
    Leave,
    /// It makes the same store again, until it goes through.
    TryAgain,
}

impl GuestWriter {
    /// Starts it, and waits until it has stored. A store without a slot is dropped.
    pub fn start(mut vcpu: Box<dyn Vcpu>, gpa: u64, at_fault: AtFault) -> GuestWriter {
        let control = vcpu.control();
        // It runs as long as the test does, which is long on a busy emulator.
        vcpu.set_time_limit(WHOLE_TEST);
        let ending = Arc::new(AtomicBool::new(false));
        let until = ending.clone();
        let thread = thread::spawn(move || {
            let mut exit = vcpu.execute(GuestOp::WriteUntilStopped { gpa });
            loop {
                exit = match exit {
                    exit if until.load(Ordering::Acquire) => return (vcpu, exit),
                    Exit::Mmio { write: Some(_), .. } => vcpu.resume(Reply::None),
                    Exit::MemoryFault { .. } if at_fault == AtFault::TryAgain => vcpu.resume(Reply::None),
                    exit => return (vcpu, exit),
                };
            }
        });
        let writer = GuestWriter { control, ending, thread: Some(thread) };
        writer.wait_for(1);
        writer
    }

    /// A stamp that has been stored.
    pub fn stored(&self) -> u64 {
        self.control.iterations()
    }

    /// Whether the guest has left its loop.
    pub fn is_gone(&self) -> bool {
        self.thread.as_ref().is_none_or(thread::JoinHandle::is_finished)
    }

    /// Waits until `stamp` has been stored, or the guest is gone.
    pub fn wait_for(&self, stamp: u64) {
        while self.stored() < stamp && !self.is_gone() {
            thread::sleep(PAUSE);
        }
    }

    /// A stamp that was stored as a whole after this was called.
    ///
    /// # Errors
    /// A failure when the guest is gone.
    pub fn next(&self) -> TestResult<u64> {
        // The store after the one that is known may be under way already; the one after that is not.
        let stamp = self.stored() + 2;
        self.wait_for(stamp);
        claim!(self.stored() >= stamp, "the writing guest goes on");
        Ok(stamp)
    }

    /// Ends it and gives the vCPU back.
    ///
    /// # Errors
    /// A failure when it had left its loop before.
    pub fn finish(self) -> TestResult<Box<dyn Vcpu>> {
        self.stop();
        match self.left()? {
            (vcpu, Exit::Done(_)) => Ok(vcpu),
            (_, exit) => fail!("the writing guest left with {exit:x?}"),
        }
    }

    /// Asks until it has left.
    fn stop(&self) {
        while !self.is_gone() {
            self.control.stop();
            thread::yield_now();
        }
    }

    /// Waits until it leaves by itself, and gives the vCPU and its exit back.
    ///
    /// # Errors
    /// A failure when its thread has panicked.
    pub fn left(mut self) -> TestResult<(Box<dyn Vcpu>, Exit)> {
        match self.thread.take().map(thread::JoinHandle::join) {
            Some(Ok(left)) => Ok(left),
            Some(Err(_)) | None => fail!("the thread of the vCPU panicked"),
        }
    }
}
