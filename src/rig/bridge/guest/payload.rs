//! The payload's life: start, commands from the mailbox, results, reports.

use super::cpu::{Cpu, Done, Exception, Handled, Stop, VECTOR_NMI, VECTOR_VE};
use super::operation::{Operation, Outcome};
use crate::guest::mailbox::{command, status, word};
use crate::guest::{BootParameter, image, layout};
use crate::sim::tdx_module::Regs;

/// VMX exit reason of an I/O instruction, the TDVMCALL leaf of a report.
const IO_INSTRUCTION: u64 = 30;
/// Words of the image that are compared in one step.
const COMPARED: usize = 64;
/// Where the TSS descriptors are, whose busy bit changes.
const TSS_DESCRIPTORS: std::ops::Range<usize> = 0x30..0x30 + layout::MAX_VCPUS as usize * 16;
/// Their type byte.
const TYPE: u64 = 0xff << 40;

/// Where the payload is.
#[derive(Debug)]
enum At {
    /// At the reset vector.
    Reset,
    /// Its image is being compared, from this word on.
    Image(usize),
    /// Building its tables: this store is next.
    Start(usize),
    /// It reads the next command.
    Command,
    /// A command is under way.
    Operate(Operation),
    /// Writes to the mailbox, of which this one is next.
    Finish(Vec<(u64, u64)>, usize),
    /// It reports.
    Report,
}

/// The payload on one vCPU.
#[derive(Debug)]
pub struct Payload {
    at: At,
    index: u32,
    parameter: u64,
    /// Whether the access under way is done by a TDVMCALL.
    mmio: bool,
}

impl Default for Payload {
    /// A vCPU at the reset vector.
    fn default() -> Payload {
        Payload { at: At::Reset, index: 0, parameter: 0, mmio: false }
    }
}

impl Payload {
    /// Executes a little. `Err` gives the processor back to the host, with a remark where a person should know.
    pub fn step(&mut self, cpu: &mut Cpu<'_>) -> Result<(), (Stop, Option<String>)> {
        match self.take_nmi(cpu).and_then(|()| self.answer_access(cpu)).and_then(|()| self.advance(cpu)) {
            Ok(()) => Ok(()),
            Err(Stop::Exception(exception)) => self.exception(cpu, exception),
            Err(stop) => Err((stop, None)),
        }
    }

    /// An NMI comes between two instructions, once the payload has its handlers.
    fn take_nmi(&mut self, cpu: &mut Cpu<'_>) -> Done<()> {
        let ready = matches!(self.at, At::Command | At::Operate(_) | At::Finish(..) | At::Report);
        if ready && cpu.takes_nmi()? {
            return Err(Stop::Exception(Exception { vector: VECTOR_NMI, error: 0, cr2: 0 }));
        }
        Ok(())
    }

    /// The access that a TDVMCALL has done is over, or the #VE is reported.
    fn answer_access(&mut self, cpu: &mut Cpu<'_>) -> Done<()> {
        if std::mem::take(&mut self.mmio) && !cpu.answer_access() {
            return Err(Stop::Exception(Exception { vector: VECTOR_VE, error: 0, cr2: 0 }));
        }
        Ok(())
    }

    fn dead(&self, cpu: &mut Cpu<'_>, why: String) -> (Stop, Option<String>) {
        (cpu.triple_fault(), Some(format!("a TD's vCPU triple-faults: it found {why}")))
    }

    /// The payload reports the exceptions of its commands; any other ends it.
    fn exception(&mut self, cpu: &mut Cpu<'_>, exception: Exception) -> Result<(), (Stop, Option<String>)> {
        let nmi = exception.vector == VECTOR_NMI;
        if !nmi && !matches!(self.at, At::Operate(_)) {
            let why = format!("exception {} in the payload's own memory", exception.vector);
            return Err(self.dead(cpu, why));
        }
        self.mmio = false;
        if exception.vector == VECTOR_VE {
            match cpu.handle_ve().map_err(|stop| (stop, None))? {
                Handled::Again => return Ok(()),
                Handled::Mmio(regs) if matches!(&self.at, At::Operate(operation) if operation.is_one_value()) => {
                    self.mmio = true;
                    return Err((cpu.vmcall(*regs), None));
                }
                Handled::Mmio(_) | Handled::No => {}
            }
        }
        let rip = match &self.at {
            At::Operate(operation) => operation.rip(),
            _ => None,
        };
        self.at = At::Finish(
            vec![
                (word::VECTOR, exception.vector),
                (word::ERROR, exception.error),
                (word::RIP, rip.unwrap_or(layout::CODE + layout::LONG_MODE_ENTRY)),
                (word::CR2, exception.cr2),
                (word::STATUS, status::EXCEPTION),
            ],
            0,
        );
        Ok(())
    }

    fn mailbox(&self, cpu: &Cpu<'_>) -> u64 {
        (layout::area(self.index) + layout::MAILBOX) | cpu.shared_bit()
    }

    fn advance(&mut self, cpu: &mut Cpu<'_>) -> Done<()> {
        match &mut self.at {
            At::Reset => self.reset(cpu),
            At::Image(next) => {
                let from = *next;
                if !same_code(cpu, from)? {
                    return Err(Stop::Exception(Exception { vector: 6, error: 0, cr2: 0 }));
                }
                let next = from + COMPARED;
                self.at = if next * 8 < image::bytes().len() { At::Image(next) } else { At::Start(0) };
                Ok(())
            }
            At::Start(next) => {
                let stores = start(self.index, self.parameter, cpu.shared_bit());
                match stores.get(*next) {
                    Some(&(gpa, size, value)) => {
                        cpu.store(gpa, size, value)?;
                        *next += 1;
                    }
                    None => self.at = At::Command,
                }
                Ok(())
            }
            At::Command => {
                let mailbox = self.mailbox(cpu);
                self.at = command(cpu, mailbox)?;
                Ok(())
            }
            At::Operate(operation) => {
                let mailbox = (layout::area(self.index) + layout::MAILBOX) | cpu.shared_bit();
                if let Some(outcome) = operation.step(cpu, mailbox)? {
                    self.at = At::Finish(writes(outcome), 0);
                }
                Ok(())
            }
            At::Finish(writes, next) => {
                let mailbox = (layout::area(self.index) + layout::MAILBOX) | cpu.shared_bit();
                match writes.get(*next) {
                    Some(&(offset, value)) => {
                        cpu.store(mailbox + offset, 8, value)?;
                        *next += 1;
                    }
                    None => self.at = At::Report,
                }
                Ok(())
            }
            At::Report => {
                self.at = At::Command;
                let port = u64::from(layout::REPORT_PORT);
                Err(cpu.vmcall(Regs { rcx: 0xfc00, r11: IO_INSTRUCTION, r12: 1, r13: 1, r14: port, ..Regs::default() }))
            }
        }
    }

    fn reset(&mut self, cpu: &mut Cpu<'_>) -> Done<()> {
        cpu.fetch(layout::RESET_ADDRESS)?;
        let regs = cpu.registers();
        let known = regs.rsi < u64::from(layout::MAX_VCPUS) && regs.rcx as u32 == BootParameter::Td as u32;
        if !known {
            return Err(Stop::Exception(Exception { vector: 6, error: 0, cr2: 0 }));
        }
        (self.index, self.parameter) = (regs.rsi as u32, regs.rcx & 0xffff_ffff);
        self.at = At::Image(0);
        Ok(())
    }
}

/// Whether a piece of the TD's code is the payload's.
fn same_code(cpu: &mut Cpu<'_>, from: usize) -> Done<bool> {
    let bytes = image::bytes();
    for word in from..(from + COMPARED).min(bytes.len() / 8) {
        let offset = word * 8;
        let wanted = bytes[offset..offset + 8].iter().rev().fold(0, |value, &byte| value << 8 | u64::from(byte));
        let found = cpu.load(layout::CODE + offset as u64, 8)?;
        let ignored = if TSS_DESCRIPTORS.contains(&offset) { TYPE } else { 0 };
        if (found ^ wanted) & !ignored != 0 {
            return Ok(false);
        }
    }
    Ok(true)
}

/// What the payload stores before its first command: address, bytes and value.
fn start(index: u32, parameter: u64, shared_bit: u64) -> [(u64, u64, u64); 11] {
    let area = layout::area(index);
    let (table, page) = (0x7, layout::BASE & !(layout::HUGE - 1) | 0xe7);
    [
        (area + layout::PARAMETER, 4, parameter),
        (area + layout::SHARED_BIT, 8, shared_bit),
        (area + layout::DIRECTORY + layout::ALIAS_ENTRY, 8, page | shared_bit),
        (area + layout::DIRECTORY + 511 * 8, 4, page),
        (area + layout::PDPT + 3 * 8, 4, (area + layout::DIRECTORY) | table),
        (area + layout::PML4, 4, (area + layout::PDPT) | table),
        (area + layout::PRIVATE + 4, 8, area + layout::KERNEL_STACK_END),
        (area + layout::PRIVATE + 0x66, 2, layout::IO_BITMAP),
        // LTR makes the descriptor busy.
        (layout::CODE + 0x30 + u64::from(index) * 16 + 5, 1, 0x8b),
        (area + layout::WINDOW_GPA, 8, u64::MAX),
        (area + layout::USER_STACK_END - 8, 8, 0),
    ]
}

/// Reads a command.
fn command(cpu: &mut Cpu<'_>, mailbox: u64) -> Done<At> {
    cpu.fetch(layout::CODE + layout::LONG_MODE_ENTRY)?;
    let number = cpu.load(mailbox + word::COMMAND, 4)?;
    let gpa = cpu.load(mailbox + word::GPA, 8)?;
    let len = cpu.load(mailbox + word::LEN, 8)?;
    let value = cpu.load(mailbox + word::VALUE, 8)?;
    Ok(match number {
        0..command::COUNT => At::Operate(Operation::new(number, gpa, len, value)),
        _ => At::Finish(vec![(word::STATUS, status::BAD_COMMAND)], 0),
    })
}

/// What the payload writes at the end of a command.
fn writes(outcome: Outcome) -> Vec<(u64, u64)> {
    match outcome {
        Outcome::Done(result) => vec![(word::RESULT, result), (word::STATUS, status::DONE)],
        Outcome::DoneWith(result, second) => {
            vec![(word::RESULT2, second), (word::RESULT, result), (word::STATUS, status::DONE)]
        }
        Outcome::Mismatch { gpa, byte } => {
            vec![(word::RESULT2, u64::from(byte)), (word::RESULT, gpa), (word::STATUS, status::MISMATCH)]
        }
    }
}
