//! The mailbox of a vCPU: commands in, outcomes out.
//!
//! A page of little-endian 64-bit words that the host and the payload take turns at: the host writes a command while the
//! vCPU is out of the guest, the payload writes the outcome before it reports. Two words are looked at while both run:
//! the stop flag and the iteration count.

use crate::machine::{Exit, GuestOp};
use std::sync::atomic::Ordering;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// Offsets of the words.
pub mod word {
    /// The command.
    pub const COMMAND: u64 = 0x00;
    /// Guest-physical address.
    pub const GPA: u64 = 0x08;
    /// Bytes, or pages for map-gpa.
    pub const LEN: u64 = 0x10;
    /// Value to store, byte pattern, value to wait on, attributes or level.
    pub const VALUE: u64 = 0x18;
    /// How the command ended.
    pub const STATUS: u64 = 0x20;
    /// First word of the result.
    pub const RESULT: u64 = 0x28;
    /// Second word of the result.
    pub const RESULT2: u64 = 0x30;
    /// Vector of an exception.
    pub const VECTOR: u64 = 0x38;
    /// Error code of an exception.
    pub const ERROR: u64 = 0x40;
    /// RIP of an exception.
    pub const RIP: u64 = 0x48;
    /// CR2 of an exception.
    pub const CR2: u64 = 0x50;
    /// Nonzero ends a loop.
    pub const STOP: u64 = 0x80;
    /// Iterations of the current loop.
    pub const ITERATIONS: u64 = 0xc0;
}

/// Command numbers: indices of the payload's table.
pub mod command {
    /// [`crate::machine::GuestOp::Read`]
    pub const READ: u64 = 0;
    /// [`crate::machine::GuestOp::Write`]
    pub const WRITE: u64 = 1;
    /// [`crate::machine::GuestOp::Fill`]
    pub const FILL: u64 = 2;
    /// [`crate::machine::GuestOp::Check`]
    pub const CHECK: u64 = 3;
    /// [`crate::machine::GuestOp::Touch`]
    pub const TOUCH: u64 = 4;
    /// [`crate::machine::GuestOp::Execute`]
    pub const EXECUTE: u64 = 5;
    /// [`crate::machine::GuestOp::ReadWhile`]
    pub const READ_WHILE: u64 = 6;
    /// [`crate::machine::GuestOp::WriteUntilStopped`]
    pub const WRITE_UNTIL_STOPPED: u64 = 7;
    /// [`crate::machine::GuestOp::Accept`]
    pub const ACCEPT: u64 = 8;
    /// [`crate::machine::GuestOp::MapGpa`]
    pub const MAP_GPA: u64 = 9;
    /// [`crate::machine::GuestOp::Halt`]
    pub const HALT: u64 = 10;
    /// How many there are.
    pub const COUNT: u64 = 11;
}

/// Values of the status word.
pub mod status {
    /// Nothing reported since the command was written.
    pub const NONE: u64 = 0;
    /// Done; the result is valid.
    pub const DONE: u64 = 1;
    /// A byte differs: address and byte are in the result.
    pub const MISMATCH: u64 = 2;
    /// An exception.
    pub const EXCEPTION: u64 = 3;
    /// The payload does not know the command.
    pub const BAD_COMMAND: u64 = 4;
}

/// The mailbox of one vCPU, in the host's mapping of the payload's memory.
pub struct Mailbox<'a> {
    memory: &'a GuestMemoryMmap,
    base: u64,
}

/// What the payload reported.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The command has ended, this way.
    Ended(Exit),
    /// The mailbox holds no report: what the guest did was not the payload's doing.
    Nothing,
}

impl<'a> Mailbox<'a> {
    /// The mailbox of `vcpu` in `memory`, the payload's memory.
    pub fn new(memory: &'a GuestMemoryMmap, vcpu: u32) -> Mailbox<'a> {
        Mailbox { memory, base: super::layout::area(vcpu) + super::layout::MAILBOX }
    }

    /// Writes the command for `op`.
    pub fn post(&self, op: GuestOp) {
        let (number, gpa, len, value) = match op {
            GuestOp::Read { gpa, size } => (command::READ, gpa, u64::from(size), 0),
            GuestOp::Write { gpa, size, value } => (command::WRITE, gpa, u64::from(size), value),
            GuestOp::Fill { gpa, len, byte } => (command::FILL, gpa, len, repeat(byte)),
            GuestOp::Check { gpa, len, byte } => (command::CHECK, gpa, len, repeat(byte)),
            GuestOp::Touch { gpa, len } => (command::TOUCH, gpa, len, 0),
            GuestOp::Execute { gpa } => (command::EXECUTE, gpa, 0, 0),
            GuestOp::ReadWhile { gpa, expect } => (command::READ_WHILE, gpa, 8, expect),
            GuestOp::WriteUntilStopped { gpa } => (command::WRITE_UNTIL_STOPPED, gpa, 8, 0),
            GuestOp::Accept { gpa, len, level } => (command::ACCEPT, gpa, len, u64::from(level)),
            GuestOp::MapGpa { gpa, pages, attributes } => (command::MAP_GPA, gpa, pages, attributes),
            GuestOp::Halt => (command::HALT, 0, 0, 0),
        };
        self.set(word::COMMAND, number);
        self.set(word::GPA, gpa);
        self.set(word::LEN, len);
        self.set(word::VALUE, value);
        self.set(word::STATUS, status::NONE);
        self.set(word::ITERATIONS, 0);
    }

    /// Takes the report of the command that was posted last.
    pub fn take(&self) -> Outcome {
        let exit = match self.get(word::STATUS) {
            status::DONE => Exit::Done(self.get(word::RESULT)),
            status::MISMATCH => Exit::Mismatch { gpa: self.get(word::RESULT), byte: self.get(word::RESULT2) as u8 },
            status::EXCEPTION => Exit::GuestException {
                vector: self.get(word::VECTOR) as u8,
                error_code: self.get(word::ERROR),
                rip: self.get(word::RIP),
                cr2: self.get(word::CR2),
            },
            _ => return Outcome::Nothing,
        };
        self.set(word::STATUS, status::NONE);
        self.set(word::STOP, 0);
        Outcome::Ended(exit)
    }

    /// Ends the current loop, or the next one where none is under way.
    pub fn stop(&self) {
        self.set(word::STOP, 1);
    }

    /// Iterations of the current loop.
    pub fn iterations(&self) -> u64 {
        self.get(word::ITERATIONS)
    }

    fn get(&self, offset: u64) -> u64 {
        self.memory
            .load(GuestAddress(self.base + offset), Ordering::SeqCst)
            .expect("mailboxes lie in the payload's memory")
    }

    fn set(&self, offset: u64, value: u64) {
        self.memory
            .store(value, GuestAddress(self.base + offset), Ordering::SeqCst)
            .expect("mailboxes lie in the payload's memory");
    }
}

/// A byte in all eight places.
fn repeat(byte: u8) -> u64 {
    u64::from_ne_bytes([byte; 8])
}
