//! The payload's commands.

use super::cpu::{Cpu, Done, Exception, Stop};
use crate::guest::layout;
use crate::guest::mailbox::{command, word};
use crate::sim::tdx_module::Regs;
use crate::uapi::kvm_para::KVM_MAP_GPA_RANGE_ENCRYPTED;
use crate::uapi::tdvmcall::MAP_GPA;

/// Bytes of a page.
const PAGE: u64 = 4096;
/// VMX exit reason of HLT, and its TDVMCALL leaf.
const HLT: u64 = 12;
/// #BP, #UD, #GP.
const VECTOR_BP: u64 = 3;
const VECTOR_UD: u64 = 6;
const VECTOR_GP: u64 = 13;

/// How a command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// With this result.
    Done(u64),
    /// With two.
    DoneWith(u64, u64),
    /// A byte differs.
    Mismatch {
        /// Its address.
        gpa: u64,
        /// What is there.
        byte: u8,
    },
}

/// What a command waits for from the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wait {
    Nothing,
    /// The answer to a TDVMCALL.
    Answer,
}

/// A command under way.
#[derive(Debug)]
pub struct Operation {
    command: u64,
    gpa: u64,
    len: u64,
    value: u64,
    /// Bytes, or stores, done.
    done: u64,
    wait: Wait,
}

/// `size` as the payload's reads and writes take it.
fn access_size(len: u64) -> u64 {
    match len as u32 {
        0 | 1 => 1,
        2 => 2,
        4 => 4,
        _ => 8,
    }
}

impl Operation {
    /// A command as the mailbox has it.
    pub fn new(command: u64, gpa: u64, len: u64, value: u64) -> Operation {
        Operation { command, gpa, len, value, done: 0, wait: Wait::Nothing }
    }

    /// Virtual address of the instruction under way, where it is not one of the payload's own.
    pub fn rip(&self) -> Option<u64> {
        let there = layout::WINDOW + (self.gpa.wrapping_add(self.done) & (layout::HUGE - 1));
        (self.command == command::EXECUTE).then_some(there)
    }

    /// Whether its accesses are moves of one value, which the payload can do by TDVMCALL.
    pub fn is_one_value(&self) -> bool {
        let moves = [command::READ, command::WRITE, command::TOUCH, command::READ_WHILE, command::WRITE_UNTIL_STOPPED];
        moves.contains(&self.command)
    }

    /// Executes a little; `Some` at the end.
    pub fn step(&mut self, cpu: &mut Cpu<'_>, mailbox: u64) -> Done<Option<Outcome>> {
        let done = |result: u64| Ok(Some(Outcome::Done(result)));
        match self.command {
            command::READ => {
                let size = access_size(self.len);
                done(cpu.load(self.gpa, size)?)
            }
            command::WRITE => {
                let size = access_size(self.len);
                cpu.store(self.gpa, size, self.value)?;
                done(0)
            }
            command::FILL => self.fill(cpu),
            command::CHECK => self.check(cpu),
            command::TOUCH => self.touch(cpu),
            command::EXECUTE => self.execute(cpu),
            command::READ_WHILE => self.read_while(cpu, mailbox),
            command::WRITE_UNTIL_STOPPED => self.write_until_stopped(cpu, mailbox),
            command::ACCEPT => self.accept(cpu),
            command::MAP_GPA => self.map_gpa(cpu),
            _ => self.halt(cpu),
        }
    }

    /// The part of the range that is left in the current page: address and length.
    fn piece(&self) -> (u64, u64) {
        let at = self.gpa.wrapping_add(self.done);
        (at, (PAGE - at % PAGE).min(self.len - self.done))
    }

    fn fill(&mut self, cpu: &mut Cpu<'_>) -> Done<Option<Outcome>> {
        if self.done >= self.len {
            return Ok(Some(Outcome::Done(0)));
        }
        let (mut at, len) = self.piece();
        let end = self.done + len;
        while self.done < end {
            let size = (8 - at % 8).min(end - self.done);
            cpu.store(at, size, self.value)?;
            self.done += size;
            at += size;
        }
        Ok(None)
    }

    fn check(&mut self, cpu: &mut Cpu<'_>) -> Done<Option<Outcome>> {
        if self.done >= self.len {
            return Ok(Some(Outcome::Done(0)));
        }
        let (at, len) = self.piece();
        let end = self.done + len;
        let mut at = at;
        while self.done < end {
            let size = (8 - at % 8).min(end - self.done);
            let found = cpu.load(at, size)?;
            let wanted = self.value;
            for byte in 0..size {
                let (is, should) = ((found >> (8 * byte)) as u8, wanted as u8);
                if is != should {
                    return Ok(Some(Outcome::Mismatch { gpa: at + byte, byte: is }));
                }
            }
            self.done += size;
            at += size;
        }
        Ok(None)
    }

    fn touch(&mut self, cpu: &mut Cpu<'_>) -> Done<Option<Outcome>> {
        if self.done >= self.len {
            return Ok(Some(Outcome::Done(self.len.div_ceil(PAGE))));
        }
        cpu.load(self.gpa + self.done, 8)?;
        self.done += PAGE;
        Ok(None)
    }

    fn read_while(&mut self, cpu: &mut Cpu<'_>, mailbox: u64) -> Done<Option<Outcome>> {
        let value = cpu.load(self.gpa, 8)?;
        let stop = cpu.load(mailbox + word::STOP, 8)?;
        let iterations = cpu.load(mailbox + word::ITERATIONS, 8)?;
        cpu.store(mailbox + word::ITERATIONS, 8, iterations.wrapping_add(1))?;
        let over = value != self.value || stop != 0;
        Ok(over.then_some(Outcome::Done(value)))
    }

    fn write_until_stopped(&mut self, cpu: &mut Cpu<'_>, mailbox: u64) -> Done<Option<Outcome>> {
        let next = self.done + 1;
        cpu.store(self.gpa, 8, next)?;
        let stop = cpu.load(mailbox + word::STOP, 8)?;
        cpu.store(mailbox + word::ITERATIONS, 8, next)?;
        self.done = next;
        Ok((stop != 0).then_some(Outcome::Done(next)))
    }

    fn accept(&mut self, cpu: &mut Cpu<'_>) -> Done<Option<Outcome>> {
        let level = (self.value & 7) as u8;
        let status = cpu.accept(self.gpa.wrapping_add(self.done), level)?;
        self.done += if self.value as u32 == 0 { PAGE } else { PAGE << 9 };
        let over = status != 0 || self.done >= self.len;
        Ok(over.then_some(Outcome::Done(status)))
    }

    fn map_gpa(&mut self, cpu: &mut Cpu<'_>) -> Done<Option<Outcome>> {
        if self.wait == Wait::Answer {
            let regs = cpu.registers();
            return Ok(Some(Outcome::DoneWith(regs.r10, regs.r11)));
        }
        self.wait = Wait::Answer;
        let shared = if self.value & KVM_MAP_GPA_RANGE_ENCRYPTED == 0 { cpu.shared_bit() } else { 0 };
        let (r12, r13) = (self.gpa | shared, self.len << 12);
        Err(cpu.vmcall(Regs { rcx: 0x3c00, r11: MAP_GPA, r12, r13, ..Regs::default() }))
    }

    fn halt(&mut self, cpu: &mut Cpu<'_>) -> Done<Option<Outcome>> {
        if self.wait == Wait::Answer {
            return Ok(Some(Outcome::Done(0)));
        }
        self.wait = Wait::Answer;
        Err(cpu.vmcall(Regs { rcx: 0x1c00, r11: HLT, ..Regs::default() }))
    }

    /// Calls code: what tests place in memory are moves of an immediate, accesses to MSRs that no CPU has, and a return.
    fn execute(&mut self, cpu: &mut Cpu<'_>) -> Done<Option<Outcome>> {
        let exception = |vector: u64| Err(Stop::Exception(Exception { vector, error: 0, cr2: 0 }));
        let (mut rip, mut rax) = (self.gpa, 0);
        loop {
            self.done = rip - self.gpa;
            cpu.fetch(rip & !7)?;
            let mut code = [0; 10];
            // What tests place in memory does not straddle pages.
            let here = (PAGE - rip % PAGE).min(code.len() as u64);
            for (address, byte) in (rip..rip + here).zip(&mut code) {
                *byte = cpu.load(address, 1)? as u8;
            }
            let immediate = |from: usize, len: usize| {
                code[from..from + len].iter().rev().fold(0u64, |value, &byte| value << 8 | u64::from(byte))
            };
            match code {
                [0xc3, ..] => return Ok(Some(Outcome::Done(rax))),
                [0x90, ..] => rip += 1,
                [0xf3, 0x0f, 0x1e, 0xfa, ..] => rip += 4,
                [0x31, 0xc0, ..] => (rax, rip) = (0, rip + 2),
                [0xb8, ..] => (rax, rip) = (immediate(1, 4), rip + 5),
                [0x48, 0xb8, ..] => (rax, rip) = (immediate(2, 8), rip + 10),
                [0xb9, ..] => rip += 5,
                [0x0f, 0x30 | 0x32, ..] => return exception(VECTOR_GP),
                [0xcc, ..] => return exception(VECTOR_BP),
                _ => return exception(VECTOR_UD),
            }
        }
    }
}
