//! Guest operations, executed on the model: one step under the lock at a time.

use super::super::World;
use super::super::mmu::VmId;
use super::super::mmu::capabilities::EXIT_MAP_GPA_RANGE;
use super::super::mmu::fault::Fault;
use super::guest::{Guest, Stop, next_piece};
use super::vcpu::Control;
use crate::machine::{Exit, GuestOp, PAGE_SIZE, Reply};
use crate::uapi::kvm_para::KVM_HC_MAP_GPA_RANGE;
use std::sync::atomic::Ordering;

/// What the guest finds in RAX when a hypercall is not there: -KVM_ENOSYS.
const KVM_ENOSYS: u64 = -1000_i64 as u64;
/// -KVM_EINVAL.
const KVM_EINVAL: u64 = -22_i64 as u64;

/// #UD.
const VECTOR_UD: u8 = 6;

/// What one step of an operation came to.
#[derive(Debug)]
pub(super) enum Step {
    /// There is more to do.
    Continue,
    /// The run ends.
    Exit(Exit),
    /// The VM is dead.
    Dead,
}

/// What the operation waits for from user space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wait {
    /// Nothing.
    Nothing,
    /// The value of an MMIO load.
    Load,
    /// An MMIO store.
    Store,
    /// What a hypercall returns.
    Hypercall,
    /// KVM_RUN after HLT.
    Resume,
}

/// A guest operation under way.
#[derive(Debug)]
pub(super) struct Operation {
    op: GuestOp,
    /// Bytes, or stores, done.
    done: u64,
    wait: Wait,
    /// What user space gave for the load, or the hypercall.
    answer: Option<u64>,
}

fn low_bytes(value: u64, size: u8) -> u64 {
    if size >= 8 { value } else { value & ((1 << (8 * size)) - 1) }
}

impl Operation {
    pub(super) fn new(op: GuestOp) -> Operation {
        Operation { op, done: 0, wait: Wait::Nothing, answer: None }
    }

    /// Takes what user space gives back after an exit.
    pub(super) fn take_reply(&mut self, reply: Reply) {
        self.answer = match (self.wait, reply) {
            (Wait::Load, Reply::MmioRead(value)) | (Wait::Hypercall, Reply::Hypercall(value)) => Some(value),
            (Wait::Nothing, _) => None,
            _ => Some(0),
        };
    }

    /// Executes until there is an exit, or the lock should be given to others.
    pub(super) fn step(&mut self, world: &mut World, vm: VmId, vcpu: u32, control: &Control) -> Step {
        let mut guest = Guest { world, vm, vcpu };
        let result = match self.op {
            GuestOp::Read { gpa, size } => self.read(&mut guest, gpa, size),
            GuestOp::Write { gpa, size, value } => self.write(&mut guest, gpa, size, value),
            GuestOp::Fill { gpa, len, byte } => self.fill(&mut guest, gpa, len, byte),
            GuestOp::Check { gpa, len, byte } => self.check(&mut guest, gpa, len, byte),
            GuestOp::Touch { gpa, len } => self.touch(&mut guest, gpa, len),
            GuestOp::Execute { gpa } => guest.call(gpa),
            GuestOp::ReadWhile { gpa, expect } => self.read_while(&mut guest, gpa, expect, control),
            GuestOp::WriteUntilStopped { gpa } => self.write_until_stopped(&mut guest, gpa, control),
            GuestOp::Accept { gpa, len, level } => self.accept(&mut guest, gpa, len, level),
            GuestOp::MapGpa { gpa, pages, attributes } if guest.is_td() => {
                let gpa = super::tdvmcall::operand(gpa, attributes);
                super::tdvmcall::map_gpa(&mut self.done, &mut self.wait, &mut self.answer, &mut guest, gpa, pages)
            }
            GuestOp::MapGpa { gpa, pages, attributes } => self.map_gpa(&mut guest, gpa, pages, attributes),
            GuestOp::Halt if self.wait == Wait::Resume => Ok(Some(0)),
            GuestOp::Halt => {
                self.wait = Wait::Resume;
                Err(Exit::Halted.into())
            }
        };
        match result {
            Ok(None) => Step::Continue,
            Err(Stop::Again) => Step::Continue,
            Ok(Some(value)) => {
                self.wait = Wait::Nothing;
                guest.leave();
                Step::Exit(Exit::Done(value))
            }
            Err(Stop::Exit(exit)) => {
                guest.count(|stats| stats.exits += 1);
                guest.leave();
                Step::Exit(*exit)
            }
        }
    }

    /// A load of up to 8 bytes; MMIO asks user space.
    fn load(&mut self, guest: &mut Guest<'_>, gpa: u64, size: u8) -> Result<u64, Stop> {
        if self.wait == Wait::Load
            && let Some(value) = self.answer.take()
        {
            self.wait = Wait::Nothing;
            return Ok(low_bytes(value, size));
        }
        let mut bytes = [0; 8];
        match guest.load(gpa, &mut bytes[..usize::from(size.min(8))]) {
            Ok(()) => Ok(u64::from_le_bytes(bytes)),
            Err((_, Fault::Mmio)) => {
                self.wait = Wait::Load;
                guest.count(|stats| stats.mmio_exits += 1);
                Err(Exit::Mmio { gpa: guest.plain(gpa), len: u32::from(size), write: None }.into())
            }
            Err((at, fault)) => Err(guest.stop(at, fault)),
        }
    }

    /// A store of up to 8 bytes; MMIO tells user space.
    fn store(&mut self, guest: &mut Guest<'_>, gpa: u64, size: u8, value: u64) -> Result<(), Stop> {
        if self.wait == Wait::Store && self.answer.take().is_some() {
            self.wait = Wait::Nothing;
            return Ok(());
        }
        match guest.store(gpa, &value.to_le_bytes()[..usize::from(size.min(8))]) {
            Ok(()) => Ok(()),
            Err((_, Fault::Mmio)) => {
                self.wait = Wait::Store;
                guest.count(|stats| stats.mmio_exits += 1);
                let write = Some(low_bytes(value, size));
                Err(Exit::Mmio { gpa: guest.plain(gpa), len: u32::from(size), write }.into())
            }
            Err((at, fault)) => Err(guest.stop(at, fault)),
        }
    }

    fn read(&mut self, guest: &mut Guest<'_>, gpa: u64, size: u8) -> Result<Option<u64>, Stop> {
        self.load(guest, gpa, size).map(Some)
    }

    fn write(&mut self, guest: &mut Guest<'_>, gpa: u64, size: u8, value: u64) -> Result<Option<u64>, Stop> {
        self.store(guest, gpa, size, value).map(|()| Some(0))
    }

    fn fill(&mut self, guest: &mut Guest<'_>, gpa: u64, len: u64, byte: u8) -> Result<Option<u64>, Stop> {
        while self.done < len {
            let (at, part) = next_piece(gpa, len, self.done);
            if self.wait == Wait::Store {
                self.store(guest, at, 1, u64::from(byte))?;
                self.done += 1;
                continue;
            }
            match guest.fill(at, part, byte) {
                Ok(()) => self.done += part,
                Err(Fault::Mmio) => {
                    self.store(guest, at, 1, u64::from(byte))?;
                    self.done += 1;
                }
                Err(fault) => return Err(guest.stop(at, fault)),
            }
        }
        Ok(Some(0))
    }

    fn check(&mut self, guest: &mut Guest<'_>, gpa: u64, len: u64, byte: u8) -> Result<Option<u64>, Stop> {
        while self.done < len {
            let (at, part) = next_piece(gpa, len, self.done);
            match guest.mismatch(at, part, byte) {
                Ok(None) if self.wait == Wait::Nothing => self.done += part,
                Ok(Some((offset, found))) if self.wait == Wait::Nothing => {
                    return Err(Exit::Mismatch { gpa: at + offset, byte: found }.into());
                }
                Ok(_) | Err(Fault::Mmio) => {
                    let found = self.load(guest, at, 1)? as u8;
                    if found != byte {
                        return Err(Exit::Mismatch { gpa: at, byte: found }.into());
                    }
                    self.done += 1;
                }
                Err(fault) => return Err(guest.stop(at, fault)),
            }
        }
        Ok(Some(0))
    }

    fn touch(&mut self, guest: &mut Guest<'_>, gpa: u64, len: u64) -> Result<Option<u64>, Stop> {
        while self.done < len {
            self.load(guest, gpa + self.done, 8)?;
            self.done += PAGE_SIZE;
        }
        Ok(Some(len / PAGE_SIZE))
    }

    /// TDG.MEM.PAGE.ACCEPT of every page; outside of a TD the instruction does not exist.
    fn accept(&mut self, guest: &mut Guest<'_>, gpa: u64, len: u64, level: u8) -> Result<Option<u64>, Stop> {
        if !guest.is_td() {
            return Err(Exit::GuestException { vector: VECTOR_UD, error_code: 0, rip: 0, cr2: 0 }.into());
        }
        while self.done < len {
            let at = gpa + self.done;
            let status = guest.accept(at, level).map_err(|fault| guest.stop(at, fault))?;
            if status != 0 {
                return Ok(Some(status));
            }
            self.done += PAGE_SIZE << (9 * u32::from(level));
        }
        Ok(Some(0))
    }

    fn read_while(
        &mut self,
        guest: &mut Guest<'_>,
        gpa: u64,
        expect: u64,
        control: &Control,
    ) -> Result<Option<u64>, Stop> {
        let value = self.load(guest, gpa, 8)?;
        control.iterations.fetch_add(1, Ordering::SeqCst);
        let over = value != expect || control.stop.swap(false, Ordering::SeqCst);
        Ok(over.then_some(value))
    }

    fn write_until_stopped(&mut self, guest: &mut Guest<'_>, gpa: u64, control: &Control) -> Result<Option<u64>, Stop> {
        self.store(guest, gpa, 8, self.done + 1)?;
        self.done += 1;
        control.iterations.fetch_add(1, Ordering::SeqCst);
        Ok(control.stop.swap(false, Ordering::SeqCst).then_some(self.done))
    }

    fn map_gpa(&mut self, guest: &mut Guest<'_>, gpa: u64, pages: u64, attributes: u64) -> Result<Option<u64>, Stop> {
        if self.wait == Wait::Hypercall {
            return Ok(Some(self.answer.take().unwrap_or(0)));
        }
        guest.count(|stats| stats.hypercalls += 1);
        let enabled = guest.world.vm(guest.vm).is_some_and(|vm| vm.exit_hypercalls & EXIT_MAP_GPA_RANGE != 0);
        if !enabled {
            return Ok(Some(KVM_ENOSYS));
        }
        let wraps = (gpa / PAGE_SIZE).checked_add(pages).is_none_or(|end| end > u64::MAX / PAGE_SIZE + 1);
        if !gpa.is_multiple_of(PAGE_SIZE) || pages == 0 || wraps {
            return Ok(Some(KVM_EINVAL));
        }
        self.wait = Wait::Hypercall;
        Err(Exit::Hypercall { nr: KVM_HC_MAP_GPA_RANGE, args: [gpa, pages, attributes, 0, 0, 0], flags: 1 }.into())
    }
}
