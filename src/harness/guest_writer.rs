//! A guest that stores without pause: [`GuestWriter`].

use std::sync::Arc;
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
    thread: thread::JoinHandle<(Box<dyn Vcpu>, Exit)>,
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
        let thread = thread::spawn(move || {
            let mut exit = vcpu.execute(GuestOp::WriteUntilStopped { gpa });
            loop {
                exit = match exit {
                    Exit::Mmio { write: Some(_), .. } => vcpu.resume(Reply::None),
                    Exit::MemoryFault { .. } if at_fault == AtFault::TryAgain => vcpu.resume(Reply::None),
                    exit => return (vcpu, exit),
                };
            }
        });
        let writer = GuestWriter { control, thread };
        writer.wait_for(1);
        writer
    }

    /// A stamp that has been stored.
    pub fn stored(&self) -> u64 {
        self.control.iterations()
    }

    /// Whether the guest has left its loop.
    pub fn is_gone(&self) -> bool {
        self.thread.is_finished()
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
        while !self.is_gone() {
            self.control.stop();
            thread::yield_now();
        }
        match self.left()? {
            (vcpu, Exit::Done(_)) => Ok(vcpu),
            (_, exit) => fail!("the writing guest left with {exit:x?}"),
        }
    }

    /// Waits until it leaves by itself, and gives the vCPU and its exit back.
    ///
    /// # Errors
    /// A failure when its thread has panicked.
    pub fn left(self) -> TestResult<(Box<dyn Vcpu>, Exit)> {
        match self.thread.join() {
            Ok(left) => Ok(left),
            Err(_) => fail!("the thread of the vCPU panicked"),
        }
    }
}
