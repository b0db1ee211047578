//! A vCPU in the guest: loads, stores and fetches through its page tables, or through the S-EPT where a TD uses private
//! memory.

use super::super::World;
use super::super::gmem::fault::Access;
use super::super::mmu::fault::{Fault, Origin, Request};
use super::super::mmu::tdx::SHARED_BIT;
use super::super::mmu::tdx::run::Instruction;
use super::super::mmu::vm::VcpuStats;
use super::super::mmu::{Spte, VmId};
use super::super::mutant::Mutant;
use crate::machine::{Errno, Exit, PAGE_SIZE};
use crate::uapi::kvm::{KVM_EXIT_MEMORY_FAULT, KVM_EXIT_UNKNOWN, KVM_INTERNAL_ERROR_EMULATION};

/// How often an instruction is tried again under one hold of the lock.
const RETRIES: u32 = 256;
/// #GP.
const VECTOR_GP: u8 = 13;
/// Bytes of a cache line: whole ones can be filled at once.
const LINE: u64 = 64;

/// Why an operation stopped for now.
#[derive(Debug)]
pub(super) enum Stop {
    /// With an exit.
    Exit(Box<Exit>),
    /// To be taken up again where it is.
    Again,
}

impl From<Exit> for Stop {
    fn from(exit: Exit) -> Stop {
        Stop::Exit(Box::new(exit))
    }
}

/// The part of `gpa+done..gpa+len` that lies in one page: its address and length.
pub(super) fn next_piece(gpa: u64, len: u64, done: u64) -> (u64, u64) {
    let at = gpa + done;
    (at, (PAGE_SIZE - at % PAGE_SIZE).min(len - done))
}

/// A vCPU in the guest.
pub(super) struct Guest<'a> {
    pub(super) world: &'a mut World,
    pub(super) vm: VmId,
    pub(super) vcpu: u32,
}

impl Guest<'_> {
    pub(super) fn count(&mut self, count: impl FnOnce(&mut VcpuStats)) {
        let stats = self.world.vms.get_mut(&self.vm).and_then(|vm| vm.vcpus.get_mut(&self.vcpu));
        if let Some(stats) = stats {
            count(stats);
        }
    }

    /// Whether the guest is a TD.
    pub(super) fn is_td(&self) -> bool {
        self.world.vm(self.vm).is_some_and(|vm| vm.has_mirror())
    }

    /// A guest-physical address as KVM reports it: without a TD's SHARED bit.
    pub(super) fn plain(&self, gpa: u64) -> u64 {
        if self.is_td() { gpa & !SHARED_BIT } else { gpa }
    }

    /// The vCPU leaves the guest: a TD's for the module too.
    pub(super) fn leave(&mut self) {
        if self.is_td() {
            self.world.td_leave(self.vm, self.vcpu);
        }
    }

    fn is_td_private(&self, gpa: u64) -> bool {
        gpa & SHARED_BIT == 0 && self.is_td()
    }

    /// What a fault at a guest-physical address ends in.
    pub(super) fn stop(&self, gpa: u64, fault: Fault) -> Stop {
        let exit = match fault {
            Fault::Retry => return Stop::Again,
            Fault::Exit(exit) => return Stop::Exit(exit),
            Fault::Mmio => Exit::InternalError { suberror: KVM_INTERNAL_ERROR_EMULATION, data: Vec::new() },
            Fault::Memory { errno: errno @ (Errno::EFAULT | Errno::EHWPOISON), private } => {
                let private = private && !self.world.mutant(Mutant::ExitLosesPrivateFlag);
                let gpa = self.plain(gpa);
                let gpa = if self.world.mutant(Mutant::ExitReportsByte) { gpa } else { gpa & !(PAGE_SIZE - 1) };
                Exit::MemoryFault { errno, flags: if private { 8 } else { 0 }, gpa, size: PAGE_SIZE }
            }
            Fault::Memory { errno, .. } => Exit::Failed { errno, reason: KVM_EXIT_MEMORY_FAULT },
            Fault::Failed(errno) => Exit::Failed { errno, reason: KVM_EXIT_UNKNOWN },
        };
        exit.into()
    }

    /// One instruction on a TD's private memory, tried again after every fault that was fixed.
    fn td(&mut self, instruction: Instruction) -> Result<u64, Fault> {
        for _ in 0..RETRIES {
            match self.world.td_execute(self.vm, self.vcpu, instruction) {
                Err(Fault::Retry) => {}
                other => return other,
            }
        }
        Err(Fault::Retry)
    }

    /// TDG.MEM.PAGE.ACCEPT; the answer is its status.
    pub(super) fn accept(&mut self, gpa: u64, level: u8) -> Result<u64, Fault> {
        self.td(Instruction::Accept(gpa, level))
    }

    /// Physical address behind a guest-physical one, by the page tables, which are filled where they are empty.
    fn translate(&mut self, gpa: u64, access: Access) -> Result<u64, Fault> {
        let gpa = self.plain(gpa);
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

    fn fault(&mut self, gfn: u64, access: Access) -> Result<(u64, Spte), Fault> {
        self.count(|stats| stats.taken += 1);
        let private = !self.is_td() && self.world.gfn_is_private(self.vm, gfn);
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

    /// Loads bytes of one page.
    fn load_piece(&mut self, at: u64, buf: &mut [u8]) -> Result<(), Fault> {
        if !self.is_td_private(at) {
            let pa = self.translate(at, Access::Read)?;
            return self.world.read_phys(pa, buf).map_err(|_| machine_check());
        }
        let mut done = 0;
        while done < buf.len() {
            let address = at + done as u64;
            let bytes = self.td(Instruction::Load(address & !7))?.to_le_bytes();
            let from = (address % 8) as usize;
            let n = (8 - from).min(buf.len() - done);
            buf[done..done + n].copy_from_slice(&bytes[from..from + n]);
            done += n;
        }
        Ok(())
    }

    /// Stores bytes of one page.
    fn store_piece(&mut self, at: u64, data: &[u8]) -> Result<(), Fault> {
        if !self.is_td_private(at) {
            let pa = self.translate(at, Access::Write)?;
            return self.world.write_phys(pa, data).map_err(|_| machine_check());
        }
        let mut done = 0;
        while done < data.len() {
            let address = at + done as u64;
            let from = (address % 8) as usize;
            let n = (8 - from).min(data.len() - done);
            let mut bytes = [0; 8];
            if n < 8 {
                bytes = self.td(Instruction::Load(address & !7))?.to_le_bytes();
            }
            bytes[from..from + n].copy_from_slice(&data[done..done + n]);
            self.td(Instruction::Store(address & !7, u64::from_le_bytes(bytes)))?;
            done += n;
        }
        Ok(())
    }

    /// Stores one byte over a part of one page.
    pub(super) fn fill(&mut self, at: u64, len: u64, byte: u8) -> Result<(), Fault> {
        if !self.is_td_private(at) {
            let pa = self.translate(at, Access::Write)?;
            return self.world.fill_phys(pa, len, byte).map_err(|_| machine_check());
        }
        if at.is_multiple_of(LINE) && len.is_multiple_of(LINE) {
            self.td(Instruction::Store(at, u64::from_le_bytes([byte; 8])))?;
            if self.world.td_fill(self.vm, self.vcpu, at, len, byte).is_some() {
                return Ok(());
            }
        }
        let mut done = 0;
        while done < len {
            let n = (8 - (at + done) % 8).min(len - done);
            self.store_piece(at + done, &[byte; 8][..n as usize])?;
            done += n;
        }
        Ok(())
    }

    /// Offset from `at` and value of the first byte in a part of one page that is not `byte`.
    pub(super) fn mismatch(&mut self, at: u64, len: u64, byte: u8) -> Result<Option<(u64, u8)>, Fault> {
        if !self.is_td_private(at) {
            let pa = self.translate(at, Access::Read)?;
            return self.world.mismatch_phys(pa, len, byte).map_err(|_| machine_check());
        }
        let mut done = 0;
        while done < len {
            let n = (8 - (at + done) % 8).min(len - done);
            let mut bytes = [0; 8];
            let bytes = &mut bytes[..n as usize];
            self.load_piece(at + done, bytes)?;
            if let Some(i) = bytes.iter().position(|found| *found != byte) {
                return Ok(Some((done + i as u64, bytes[i])));
            }
            done += n;
        }
        Ok(None)
    }

    /// Loads bytes; a fault comes with the address of the first byte that could not be loaded.
    pub(super) fn load(&mut self, gpa: u64, buf: &mut [u8]) -> Result<(), (u64, Fault)> {
        let len = buf.len() as u64;
        let mut done = 0;
        while done < len {
            let (at, part) = next_piece(gpa, len, done);
            let piece = &mut buf[done as usize..(done + part) as usize];
            self.load_piece(at, piece).map_err(|fault| (at, fault))?;
            done += part;
        }
        Ok(())
    }

    /// Stores bytes; a fault comes with the address of the first byte that could not be stored.
    pub(super) fn store(&mut self, gpa: u64, data: &[u8]) -> Result<(), (u64, Fault)> {
        let len = data.len() as u64;
        let mut done = 0;
        while done < len {
            let (at, part) = next_piece(gpa, len, done);
            self.store_piece(at, &data[done as usize..(done + part) as usize]).map_err(|fault| (at, fault))?;
            done += part;
        }
        Ok(())
    }

    /// Calls code: the instructions that tests place in memory are moves of an immediate, accesses to MSRs that no CPU has,
    /// and a return.
    pub(super) fn call(&mut self, gpa: u64) -> Result<Option<u64>, Stop> {
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
                [0xb9, ..] => rip += 5,
                [0x0f, 0x30 | 0x32, ..] => {
                    return Err(Exit::GuestException { vector: VECTOR_GP, error_code: 0, rip, cr2: 0 }.into());
                }
                [0xcc, ..] => {
                    return Err(Exit::GuestException { vector: 3, error_code: 0, rip: rip + 1, cr2: 0 }.into());
                }
                _ => return Err(Exit::GuestException { vector: 6, error_code: 0, rip, cr2: 0 }.into()),
            }
        }
    }

    /// Up to 10 bytes of code at an address.
    fn fetch(&mut self, rip: u64) -> Result<[u8; 10], Stop> {
        let mut code = [0; 10];
        for (i, byte) in code.iter_mut().enumerate() {
            let at = rip + i as u64;
            let fetched = if self.is_td_private(at) {
                self.td(Instruction::Fetch(at)).and_then(|_| self.load_piece(at, std::slice::from_mut(byte)))
            } else {
                self.translate(at, Access::Fetch)
                    .and_then(|pa| self.world.read_phys(pa, std::slice::from_mut(byte)).map_err(|_| machine_check()))
            };
            match fetched {
                Ok(()) => {}
                Err(fault) if i == 0 => return Err(self.stop(at, fault)),
                Err(_) => break,
            }
        }
        Ok(code)
    }
}

/// A guest that reads poison is shut down by its machine check.
fn machine_check() -> Fault {
    Fault::exit(Exit::Shutdown)
}
