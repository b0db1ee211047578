//! A vCPU in the guest: accesses to private memory and TDG.MEM.PAGE.ACCEPT, with the TD exits they end in.

use super::{TdState, TdVcpu};
use crate::machine::{Errno, Exit, PAGE_SIZE};
use crate::sim::World;
use crate::sim::gmem::fault::Access;
use crate::sim::mmu::VmId;
use crate::sim::mmu::fault::{Fault, Origin, Request};
use crate::sim::profile::Kernel;
use crate::sim::tdx_module::guest::{GuestException, GuestOutcome, TdExit, exit_reason};
use crate::sim::tdx_module::memory::LineTag;
use crate::sim::tdx_module::{Code, HoldPoint, Leaf, LpError, LpId, Reg, Regs, Released, Status, TdcallLeaf};
use crate::uapi::kvm::KVM_EXIT_UNKNOWN;

/// KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON.
const UNEXPECTED_EXIT_REASON: u32 = 4;
/// #VE.
const VECTOR_VE: u8 = 20;
/// #DF.
const VECTOR_DF: u8 = 8;
/// #PF.
const VECTOR_PF: u8 = 14;
/// Type of the extended exit qualification: ACCEPT found no page of its level to accept.
const ACCEPT_VIOLATION: u8 = 1;
/// Type of the extended exit qualification: the page is PENDING.
const PENDING_VIOLATION: u8 = 6;

/// One instruction of the guest.
#[derive(Clone, Copy, Debug)]
pub enum Instruction {
    /// Loads 8 aligned bytes.
    Load(u64),
    /// Stores 8 aligned bytes.
    Store(u64, u64),
    /// Fetches at an address.
    Fetch(u64),
    /// TDG.MEM.PAGE.ACCEPT of a page at a level.
    Accept(u64, u8),
}

impl Instruction {
    fn access(self) -> Access {
        match self {
            Instruction::Load(_) => Access::Read,
            Instruction::Fetch(_) => Access::Fetch,
            Instruction::Store(..) | Instruction::Accept(..) => Access::Write,
        }
    }
}

impl World {
    /// Whether KVM_RUN of a live TD fails before it enters the guest: the vCPU is not initialised, or the TD not finalised.
    pub fn td_cannot_run(&self, vm: VmId, vcpu: u32) -> bool {
        let Some(state) = self.vms.get(&vm).filter(|state| state.has_mirror() && !state.dead) else { return false };
        state.td.as_ref().is_none_or(|td| td.state != TdState::Runnable || !td.vcpus.contains_key(&vcpu))
    }

    fn td_vcpu(&self, vm: VmId, vcpu: u32) -> Option<TdVcpu> {
        self.td_of(vm)?.vcpus.get(&vcpu).cloned()
    }

    /// Executes one instruction of a TD's vCPU on private memory; the answer is the value loaded, or the status of ACCEPT.
    ///
    /// # Errors
    /// [`Fault`]; with [`Fault::Retry`] the instruction was not executed and is to be tried again.
    pub fn td_execute(&mut self, vm: VmId, vcpu: u32, instruction: Instruction) -> Result<u64, Fault> {
        let lp = self.td_enter(vm, vcpu)?;
        let interruptible = self.scheduler.is_active();
        let module = &mut self.tdx_host().module;
        if interruptible && matches!(instruction, Instruction::Accept(..)) {
            // The processor is in the guest and holds nothing, or the next line says so.
            let _ = module.hold_next(lp, HoldPoint::Entry);
        }
        let mut outcome = match instruction {
            Instruction::Load(gpa) => module.guest_read(lp, gpa),
            Instruction::Store(gpa, value) => module.guest_write(lp, gpa, value),
            Instruction::Fetch(gpa) => module.guest_fetch(lp, gpa),
            Instruction::Accept(gpa, level) => module.guest_accept(lp, gpa, level),
        };
        if interruptible && matches!(outcome, Ok(GuestOutcome::Held)) {
            outcome = self.stand_in_tdcall(lp).map_or_else(|| self.finish_tdcall(lp), Ok);
        }
        match outcome {
            Ok(GuestOutcome::Value(value)) => Ok(value),
            Ok(GuestOutcome::Done) => Ok(0),
            Ok(GuestOutcome::Tdcall(status)) => Ok(status.0),
            Ok(GuestOutcome::Exception(GuestException::Ve(info))) if info.exit_reason == exit_reason::EPT_VIOLATION => {
                self.td_handle_ve(vm, vcpu, info.gpa)
            }
            Ok(GuestOutcome::Exception(exception)) => Err(Fault::exit(exception_exit(exception))),
            Ok(GuestOutcome::Exit(exit)) => self.td_exit(vm, instruction, &exit),
            Ok(GuestOutcome::Held) | Err(_) => Err(Fault::Retry),
        }
    }

    fn finish_tdcall(&mut self, lp: LpId) -> Result<GuestOutcome, LpError> {
        match self.tdx_host().module.release(lp)? {
            Released::Guest(outcome) => Ok(outcome),
            Released::Host(..) => Err(LpError::HoldsNothing(lp)),
        }
    }

    /// The payload's #VE handler: it takes the information, accepts the page, and goes back to the instruction.
    fn td_handle_ve(&mut self, vm: VmId, vcpu: u32, gpa: u64) -> Result<u64, Fault> {
        let lp = self.td_enter(vm, vcpu)?;
        let mut regs = Regs { rax: u64::from(TdcallLeaf::VpVeinfoGet.number()), ..Regs::default() };
        if self.tdx_host().module.tdcall(lp, &mut regs).is_err() {
            return Err(Fault::Retry);
        }
        let mut level = u8::from(self.profile.kernel == Kernel::Huge);
        loop {
            let page = gpa & !((PAGE_SIZE << (9 * level)) - 1);
            match self.td_execute(vm, vcpu, Instruction::Accept(page, level)) {
                Ok(status) if Status(status).is(Code::PageSizeMismatch) && level > 0 => level -= 1,
                Ok(status) if Status(status).is_zero() || Status(status).is(Code::PageAlreadyAccepted) => {
                    return Err(Fault::Retry);
                }
                Ok(status) if Status(status).is(Code::OperandBusy) => {}
                Ok(status) => return Err(Fault::exit(unexpected(Status(status)))),
                Err(Fault::Retry) => {}
                Err(fault) => return Err(fault),
            }
        }
    }

    /// TDH.VP.ENTER, unless the vCPU is in the guest already.
    fn td_enter(&mut self, vm: VmId, vcpu: u32) -> Result<LpId, Fault> {
        let TdVcpu { tdvpr, lp, .. } = self.td_vcpu(vm, vcpu).ok_or(Fault::Failed(Errno::EINVAL))?;
        let tdvpr = tdvpr * PAGE_SIZE;
        if self.tdx_host().module.running(lp) == Some(tdvpr) {
            return Ok(lp);
        }
        let answer = self.tdx_host().seamcall(lp, Leaf::VpEnter, &[(Reg::Rcx, tdvpr)]);
        match answer.status {
            _ if self.tdx_host().module.running(lp) == Some(tdvpr) => Ok(lp),
            status if status.is(Code::OperandBusy) => Err(Fault::Retry),
            // Suspected of single-stepping, the module exits on the listed address before the guest runs.
            status if status == Status::new(Code::Success, exit_reason::EPT_VIOLATION) => {
                let gfn = answer.regs.r8 / PAGE_SIZE;
                self.handle_fault(vm, Request { gfn, private: true, access: Access::Write, origin: Origin::Guest })?;
                Err(Fault::Retry)
            }
            status => Err(Fault::exit(unexpected(status))),
        }
    }

    /// The vCPU leaves the guest, as it does to report the end of an operation.
    pub fn td_leave(&mut self, vm: VmId, vcpu: u32) {
        let Some(TdVcpu { tdvpr, lp, .. }) = self.td_vcpu(vm, vcpu) else { return };
        let module = &mut self.tdx_host().module;
        if module.running(lp) == Some(tdvpr * PAGE_SIZE) {
            // The only other answer is a TDCALL held half-way, which keeps the processor.
            let _ = module.kick(lp);
        }
    }

    /// KVM's exit handler: a violation is a fault, which is tried again once it is fixed.
    fn td_exit(&mut self, vm: VmId, instruction: Instruction, exit: &TdExit) -> Result<u64, Fault> {
        if exit.status.is(Code::NonRecoverableVcpu) && exit.reason() == exit_reason::TRIPLE_FAULT {
            return Err(Fault::exit(Exit::Shutdown));
        }
        if exit.status.upper() != 0 {
            return Err(Fault::exit(unexpected(exit.status)));
        }
        match exit.reason() {
            exit_reason::EXTERNAL_INTERRUPT => Err(Fault::Retry),
            exit_reason::EPT_VIOLATION if exit.extended_type() == PENDING_VIOLATION => {
                let state = self.vms.get_mut(&vm).ok_or(Fault::Failed(Errno::EIO))?;
                state.dead = true;
                let line = format!("guest access before accepting {:#x}", exit.regs.r8);
                self.log.push(line);
                Err(Fault::exit(Exit::Failed { errno: Errno::EIO, reason: KVM_EXIT_UNKNOWN }))
            }
            exit_reason::EPT_VIOLATION if exit.extended_type() == ACCEPT_VIOLATION => {
                let gfn = exit.regs.r8 / PAGE_SIZE;
                let requested_4k = exit.regs.rdx >> 32 & 7 == 0;
                if requested_4k {
                    self.tdx_split_for_accept(vm, gfn).map_err(|_| Fault::Failed(Errno::EIO))?;
                }
                if self.vms.get(&vm).is_none_or(|vm| vm.mirror.get(gfn).is_none()) {
                    self.handle_fault(
                        vm,
                        Request { gfn, private: true, access: Access::Write, origin: Origin::Guest },
                    )?;
                }
                Err(Fault::Retry)
            }
            exit_reason::EPT_VIOLATION => {
                let gfn = exit.regs.r8 / PAGE_SIZE;
                let access = if instruction.access() == Access::Fetch { Access::Fetch } else { Access::Write };
                self.handle_fault(vm, Request { gfn, private: true, access, origin: Origin::Guest })?;
                Err(Fault::Retry)
            }
            _ => Err(Fault::exit(unexpected(exit.status))),
        }
    }

    /// Writes the bytes of a private page that the guest has just stored its first word to: the same translation, the
    /// same key.
    pub fn td_fill(&mut self, vm: VmId, vcpu: u32, gpa: u64, len: u64, byte: u8) -> Option<()> {
        let TdVcpu { lp, .. } = self.td_vcpu(vm, vcpu)?;
        let td = self.td_of(vm)?;
        let (tdr, hkid) = (td.tdr_pa(), td.hkid);
        let module = &mut self.tdx_host().module;
        let translation = module.cached_translation(lp, tdr, gpa)?;
        let span = PAGE_SIZE << (9 * translation.level);
        let pa = translation.hpa + gpa % span;
        let pattern = u64::from_le_bytes([byte; 8]);
        module.memory.fill(pa, len, pattern, LineTag::private(hkid));
        Some(())
    }
}

fn unexpected(status: Status) -> Exit {
    Exit::InternalError { suberror: UNEXPECTED_EXIT_REASON, data: vec![status.0] }
}

fn exception_exit(exception: GuestException) -> Exit {
    let (vector, cr2) = match exception {
        GuestException::Ve(info) => (VECTOR_VE, info.gpa),
        GuestException::DoubleFault => (VECTOR_DF, 0),
        GuestException::ReservedPageFault => (VECTOR_PF, 0),
    };
    Exit::GuestException { vector, error_code: 0, rip: 0, cr2 }
}
