//! The mailboxes: one page for each CPU of the kernel under test, in its RAM.
//!
//! | offset | | |
//! |---|---|---|
//! | 0x00 | u32 | state: 0 idle, 1 request, 2 answered |
//! | 0x04 | u32 | the kernel sets it to 1 when an interrupt is pending while it waits |
//! | 0x08 | u64 | number of the request, one more each time |
//! | 0x10 | u64 each | RAX, RCX, RDX, RBX, nothing, RBP, RSI, RDI, R8 .. R15 |

use std::sync::atomic::Ordering;

use super::ram::Ram;
use crate::sim::tdx_module::{Reg, Regs};

/// Bytes of a mailbox.
pub const SIZE: u64 = 4096;
/// A request waits.
pub const REQUEST: u32 = 1;
/// The answer is there.
pub const ANSWERED: u32 = 2;

const STATE: u64 = 0x00;
const INTERRUPT: u64 = 0x04;
const SEQUENCE: u64 = 0x08;
const REGISTERS: u64 = 0x10;

/// The mailbox of one CPU.
#[derive(Clone, Copy)]
pub struct Mailbox<'a> {
    ram: &'a Ram,
    pa: u64,
}

impl<'a> Mailbox<'a> {
    /// The mailbox at a physical address, which must be RAM.
    pub fn new(ram: &'a Ram, pa: u64) -> Mailbox<'a> {
        Mailbox { ram, pa }
    }

    /// The state word. What the kernel wrote before it is seen after it.
    pub fn state(&self) -> u32 {
        self.ram.word32(self.pa + STATE).map_or(u32::MAX, |word| word.load(Ordering::Acquire))
    }

    /// Number of the request.
    pub fn sequence(&self) -> u64 {
        self.ram.word64(self.pa + SEQUENCE).map_or(0, |word| word.load(Ordering::Relaxed))
    }

    /// Whether an interrupt is pending on the CPU that waits.
    pub fn interrupt(&self) -> bool {
        self.ram.word32(self.pa + INTERRUPT).is_some_and(|word| word.load(Ordering::Acquire) != 0)
    }

    /// The registers of a request.
    pub fn registers(&self) -> Regs {
        let mut regs = Regs::default();
        for reg in Reg::ALL.into_iter().filter(|reg| *reg != Reg::Rsp) {
            if let Some(word) = self.ram.word64(self.pa + REGISTERS + 8 * reg as u64) {
                regs[reg] = word.load(Ordering::Relaxed);
            }
        }
        regs
    }

    /// Gives the answer.
    pub fn answer(&self, regs: &Regs) {
        for reg in Reg::ALL.into_iter().filter(|reg| *reg != Reg::Rsp) {
            if let Some(word) = self.ram.word64(self.pa + REGISTERS + 8 * reg as u64) {
                word.store(regs[reg], Ordering::Relaxed);
            }
        }
        if let Some(word) = self.ram.word32(self.pa + STATE) {
            word.store(ANSWERED, Ordering::Release);
        }
    }
}
