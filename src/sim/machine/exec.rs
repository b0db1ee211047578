//! Guest operations, executed on the model: one step under the lock at a time.

use super::super::World;
use super::super::gmem::fault::Access;
use super::super::mmu::VmId;
use super::super::mmu::capabilities::EXIT_MAP_GPA_RANGE;
use super::super::mmu::fault::{Fault, Origin, Request};
use super::super::mutant::Mutant;
use super::vcpu::Control;
use crate::machine::{Errno, Exit, GuestOp, PAGE_SIZE, Reply};
use crate::uapi::kvm::{KVM_EXIT_MEMORY_FAULT, KVM_EXIT_UNKNOWN, KVM_INTERNAL_ERROR_EMULATION};
use crate::uapi::kvm_para::KVM_HC_MAP_GPA_RANGE;
use std::sync::atomic::Ordering;

/// What the guest finds in RAX when a hypercall is not there: -KVM_ENOSYS.
const KVM_ENOSYS: u64 = -1000_i64 as u64;
/// -KVM_EINVAL.
const KVM_EINVAL: u64 = -22_i64 as u64;

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
enum Wait {
    Nothing,
    Load,
    Store,
    Hypercall,
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

/// Splits `gpa+done..gpa+len` at the first page boundary.
fn next_piece(gpa: u64, len: u64, done: u64) -> (u64, u64) {
    let at = gpa + done;
    (at, (PAGE_SIZE - at % PAGE_SIZE).min(len - done))
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
            GuestOp::Accept { .. } => Err(Exit::GuestException { vector: 6, error_code: 0, rip: 0, cr2: 0 }),
            GuestOp::MapGpa { gpa, pages, attributes } => self.map_gpa(&mut guest, gpa, pages, attributes),
            GuestOp::Halt if self.wait == Wait::Resume => Ok(Some(0)),
            GuestOp::Halt => {
                self.wait = Wait::Resume;
                Err(Exit::Halted)
            }
        };
        match result {
            Ok(None) => Step::Continue,
            Ok(Some(value)) => {
                self.wait = Wait::Nothing;
                Step::Exit(Exit::Done(value))
            }
            Err(exit) => {
                guest.count(|stats| stats.exits += 1);
                Step::Exit(exit)
            }
        }
    }

    /// A load of up to 8 bytes; MMIO asks user space.
    fn load(&mut self, guest: &mut Guest<'_>, gpa: u64, size: u8) -> Result<u64, Exit> {
        if self.wait == Wait::Load
            && let Some(value) = self.answer.take()
        {
            self.wait = Wait::Nothing;
            return Ok(low_bytes(value, size));
        }
        let mut bytes = [0; 8];
        match guest.copy_out(gpa, &mut bytes[..usize::from(size.min(8))]) {
            Ok(()) => Ok(u64::from_le_bytes(bytes)),
            Err((_, Fault::Mmio)) => {
                self.wait = Wait::Load;
                guest.count(|stats| stats.mmio_exits += 1);
                Err(Exit::Mmio { gpa, len: u32::from(size), write: None })
            }
            Err((at, fault)) => Err(guest.exit(at, fault)),
        }
    }

    /// A store of up to 8 bytes; MMIO tells user space.
    fn store(&mut self, guest: &mut Guest<'_>, gpa: u64, size: u8, value: u64) -> Result<(), Exit> {
        if self.wait == Wait::Store && self.answer.take().is_some() {
            self.wait = Wait::Nothing;
            return Ok(());
        }
        match guest.copy_in(gpa, &value.to_le_bytes()[..usize::from(size.min(8))]) {
            Ok(()) => Ok(()),
            Err((_, Fault::Mmio)) => {
                self.wait = Wait::Store;
                guest.count(|stats| stats.mmio_exits += 1);
                Err(Exit::Mmio { gpa, len: u32::from(size), write: Some(low_bytes(value, size)) })
            }
            Err((at, fault)) => Err(guest.exit(at, fault)),
        }
    }

    fn read(&mut self, guest: &mut Guest<'_>, gpa: u64, size: u8) -> Result<Option<u64>, Exit> {
        self.load(guest, gpa, size).map(Some)
    }

    fn write(&mut self, guest: &mut Guest<'_>, gpa: u64, size: u8, value: u64) -> Result<Option<u64>, Exit> {
        self.store(guest, gpa, size, value).map(|()| Some(0))
    }

    fn fill(&mut self, guest: &mut Guest<'_>, gpa: u64, len: u64, byte: u8) -> Result<Option<u64>, Exit> {
        while self.done < len {
            let (at, part) = next_piece(gpa, len, self.done);
            match guest.translate(at, Access::Write) {
                Ok(pa) if self.wait == Wait::Nothing => {
                    guest.world.host.contents.fill(pa, part, byte);
                    self.done += part;
                }
                Ok(_) | Err(Fault::Mmio) => {
                    self.store(guest, at, 1, u64::from(byte))?;
                    self.done += 1;
                }
                Err(fault) => return Err(guest.exit(at, fault)),
            }
        }
        Ok(Some(0))
    }

    fn check(&mut self, guest: &mut Guest<'_>, gpa: u64, len: u64, byte: u8) -> Result<Option<u64>, Exit> {
        while self.done < len {
            let (at, part) = next_piece(gpa, len, self.done);
            match guest.translate(at, Access::Read) {
                Ok(pa) if self.wait == Wait::Nothing => {
                    if let Some((offset, found)) = guest.world.host.contents.find_mismatch(pa, part, byte) {
                        return Err(Exit::Mismatch { gpa: at + offset, byte: found });
                    }
                    self.done += part;
                }
                Ok(_) | Err(Fault::Mmio) => {
                    let found = self.load(guest, at, 1)? as u8;
                    if found != byte {
                        return Err(Exit::Mismatch { gpa: at, byte: found });
                    }
                    self.done += 1;
                }
                Err(fault) => return Err(guest.exit(at, fault)),
            }
        }
        Ok(Some(0))
    }

    fn touch(&mut self, guest: &mut Guest<'_>, gpa: u64, len: u64) -> Result<Option<u64>, Exit> {
        while self.done < len {
            self.load(guest, gpa + self.done, 8)?;
            self.done += PAGE_SIZE;
        }
        Ok(Some(len / PAGE_SIZE))
    }

    fn read_while(
        &mut self,
        guest: &mut Guest<'_>,
        gpa: u64,
        expect: u64,
        control: &Control,
    ) -> Result<Option<u64>, Exit> {
        let value = self.load(guest, gpa, 8)?;
        control.iterations.fetch_add(1, Ordering::SeqCst);
        let over = value != expect || control.stop.swap(false, Ordering::SeqCst);
        Ok(over.then_some(value))
    }

    fn write_until_stopped(&mut self, guest: &mut Guest<'_>, gpa: u64, control: &Control) -> Result<Option<u64>, Exit> {
        self.store(guest, gpa, 8, self.done + 1)?;
        self.done += 1;
        control.iterations.fetch_add(1, Ordering::SeqCst);
        Ok(control.stop.swap(false, Ordering::SeqCst).then_some(self.done))
    }

    fn map_gpa(&mut self, guest: &mut Guest<'_>, gpa: u64, pages: u64, attributes: u64) -> Result<Option<u64>, Exit> {
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
        Err(Exit::Hypercall { nr: KVM_HC_MAP_GPA_RANGE, args: [gpa, pages, attributes, 0, 0, 0], flags: 1 })
    }
}

/// A vCPU in the guest: the model, seen through its page tables.
struct Guest<'a> {
    world: &'a mut World,
    vm: VmId,
    vcpu: u32,
}

impl Guest<'_> {
    fn count(&mut self, count: impl FnOnce(&mut super::super::mmu::vm::VcpuStats)) {
        let stats = self.world.vms.get_mut(&self.vm).and_then(|vm| vm.vcpus.get_mut(&self.vcpu));
        if let Some(stats) = stats {
            count(stats);
        }
    }

    /// The exit that a fault at a guest-physical address ends in.
    fn exit(&self, gpa: u64, fault: Fault) -> Exit {
        match fault {
            Fault::Mmio => Exit::InternalError { suberror: KVM_INTERNAL_ERROR_EMULATION, data: Vec::new() },
            Fault::Memory { errno: errno @ (Errno::EFAULT | Errno::EHWPOISON), private } => {
                let private = private && !self.world.mutant(Mutant::ExitLosesPrivateFlag);
                let gpa = if self.world.mutant(Mutant::ExitReportsByte) { gpa } else { gpa & !(PAGE_SIZE - 1) };
                Exit::MemoryFault { errno, flags: if private { 8 } else { 0 }, gpa, size: PAGE_SIZE }
            }
            Fault::Memory { errno, .. } => Exit::Failed { errno, reason: KVM_EXIT_MEMORY_FAULT },
            Fault::Failed(errno) => Exit::Failed { errno, reason: KVM_EXIT_UNKNOWN },
        }
    }

    /// Physical address behind a guest-physical one, by the page tables, which are filled where they are empty.
    fn translate(&mut self, gpa: u64, access: Access) -> Result<u64, Fault> {
        let gfn = gpa / PAGE_SIZE;
        let present = self.world.vms.get(&self.vm).and_then(|vm| vm.direct.get(gfn));
        let (first, spte) = match present.filter(|(_, spte)| spte.writable || access != Access::Write) {
            Some(found) => found,
            None => self.fault(gfn, access)?,
        };
        if access == Access::Write {
            self.mark_dirty(gfn);
        }
        Ok(spte.pfn * PAGE_SIZE + (gpa - first * PAGE_SIZE))
    }

    fn fault(&mut self, gfn: u64, access: Access) -> Result<(u64, super::super::mmu::Spte), Fault> {
        self.count(|stats| stats.taken += 1);
        let private = self.world.gfn_is_private(self.vm, gfn);
        let request = Request { gfn, private, access, origin: Origin::Guest };
        let result = self.world.handle_fault(self.vm, request);
        match result {
            Ok(_) => self.count(|stats| stats.fixed += 1),
            Err(Fault::Mmio) => self.count(|stats| stats.emulated += 1),
            Err(_) => {}
        }
        result
    }

    /// Sets a page's bit in the dirty bitmap of its slot, if that has one.
    fn mark_dirty(&mut self, gfn: u64) {
        let Some(vm) = self.world.vms.get_mut(&self.vm) else { return };
        let Some((key, slot)) = vm.slots.at(gfn) else { return };
        if slot.dirty.is_none() {
            return;
        }
        if let Some(slot) = vm.slots.get_mut(key) {
            let page = gfn - slot.base_gfn;
            if let Some(bits) = &mut slot.dirty {
                bits[(page / 64) as usize] |= 1 << (page % 64);
            }
        }
    }

    /// Loads bytes; a fault comes with the address of the first byte that could not be loaded.
    fn copy_out(&mut self, gpa: u64, buf: &mut [u8]) -> Result<(), (u64, Fault)> {
        let len = buf.len() as u64;
        let mut done = 0;
        while done < len {
            let (at, part) = next_piece(gpa, len, done);
            let pa = self.translate(at, Access::Read).map_err(|fault| (at, fault))?;
            self.world.host.contents.read(pa, &mut buf[done as usize..(done + part) as usize]);
            done += part;
        }
        Ok(())
    }

    /// Stores bytes; a fault comes with the address of the first byte that could not be stored.
    fn copy_in(&mut self, gpa: u64, data: &[u8]) -> Result<(), (u64, Fault)> {
        let len = data.len() as u64;
        let mut done = 0;
        while done < len {
            let (at, part) = next_piece(gpa, len, done);
            let pa = self.translate(at, Access::Write).map_err(|fault| (at, fault))?;
            self.world.host.contents.write(pa, &data[done as usize..(done + part) as usize]);
            done += part;
        }
        Ok(())
    }

    /// Calls code: the instructions that tests place in memory are moves of an immediate to RAX, and a return.
    fn call(&mut self, gpa: u64) -> Result<Option<u64>, Exit> {
        let mut rip = gpa;
        let mut rax = 0;
        loop {
            let code = self.fetch(rip)?;
            let immediate = |from: usize, len: usize| {
                let mut bytes = [0; 8];
                bytes[..len].copy_from_slice(&code[from..from + len]);
                u64::from_le_bytes(bytes)
            };
            match code {
                [0xc3, ..] => return Ok(Some(rax)),
                [0x90, ..] => rip += 1,
                [0xf3, 0x0f, 0x1e, 0xfa, ..] => rip += 4,
                [0x31, 0xc0, ..] => (rax, rip) = (0, rip + 2),
                [0xb8, ..] => (rax, rip) = (immediate(1, 4), rip + 5),
                [0x48, 0xb8, ..] => (rax, rip) = (immediate(2, 8), rip + 10),
                [0xcc, ..] => return Err(Exit::GuestException { vector: 3, error_code: 0, rip: rip + 1, cr2: 0 }),
                _ => return Err(Exit::GuestException { vector: 6, error_code: 0, rip, cr2: 0 }),
            }
        }
    }

    /// Up to 10 bytes of code at an address.
    fn fetch(&mut self, rip: u64) -> Result<[u8; 10], Exit> {
        let mut code = [0; 10];
        for (i, byte) in code.iter_mut().enumerate() {
            let at = rip + i as u64;
            match self.translate(at, Access::Fetch) {
                Ok(pa) => self.world.host.contents.read(pa, std::slice::from_mut(byte)),
                Err(fault) if i == 0 => return Err(self.exit(at, fault)),
                Err(_) => break,
            }
        }
        Ok(code)
    }
}
