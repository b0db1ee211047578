//! SEAMCALLs as the kernel makes them: retries for entropy, "busy" as KVM understands it, and what a failure does to a VM.

use super::TdxHost;
use super::boot::HOST_LP;
use crate::sim::World;
use crate::sim::mmu::VmId;
use crate::sim::mutant::Mutant;
use crate::sim::tdx_module::{Code, Leaf, LpId, Outcome, Reg, Regs, Released, Status};

/// How often a leaf that finds no entropy is called again (TDX_SEAMCALL_RETRIES).
const ENTROPY_RETRIES: u32 = 10;

/// What a SEAMCALL returned.
#[derive(Clone, Copy, Debug)]
pub struct Answer {
    /// RAX.
    pub status: Status,
    /// Every register.
    pub regs: Regs,
}

impl Answer {
    /// What KVM calls busy: OPERAND_BUSY and nothing else.
    pub fn is_busy(&self) -> bool {
        self.status.is(Code::OperandBusy)
    }
}

impl TdxHost {
    /// One SEAMCALL on a processor.
    pub fn seamcall(&mut self, lp: LpId, leaf: Leaf, operands: &[(Reg, u64)]) -> Answer {
        let mut tries = 0;
        loop {
            let answer = self.call_once(lp, leaf, operands);
            tries += 1;
            if !answer.status.is(Code::RndNoEntropy) || tries > ENTROPY_RETRIES {
                return answer;
            }
        }
    }

    fn call_once(&mut self, lp: LpId, leaf: Leaf, operands: &[(Reg, u64)]) -> Answer {
        let mut regs = Regs { rax: u64::from(leaf.number()), ..Regs::default() };
        for (reg, value) in operands {
            regs[*reg] = *value;
        }
        match self.module.seamcall(lp, &mut regs) {
            Ok(Outcome::Done(status)) => Answer { status, regs },
            Ok(Outcome::Entered) => Answer { status: Status::SUCCESS, regs },
            Ok(Outcome::Held) => match self.module.release(lp) {
                Ok(Released::Host(Outcome::Done(status), regs)) => Answer { status, regs },
                _ => Answer { status: Code::OperandBusy.into(), regs },
            },
            Err(_) => Answer { status: Code::OperandBusy.into(), regs },
        }
    }
}

impl World {
    /// The module's side of a TDX machine.
    ///
    /// # Panics
    /// On a machine without TDX.
    pub fn tdx_host(&mut self) -> &mut TdxHost {
        self.tdx.as_mut().expect("only TDX machines have TDs")
    }

    /// One SEAMCALL on the host's processor.
    pub fn tdh(&mut self, leaf: Leaf, operands: &[(Reg, u64)]) -> Answer {
        self.tdx_host().seamcall(HOST_LP, leaf, operands)
    }

    /// TDX_BUG_ON: an unexpected status marks the VM bugged, with a line in the log for the first one.
    pub fn tdx_bug_on(&mut self, vm: VmId, leaf: Leaf, status: Status) {
        let Some(state) = self.vms.get_mut(&vm) else { return };
        if state.bugged {
            return;
        }
        if self.profile.mutant == Some(Mutant::BuggedVmLives) {
            state.bugged = true;
        } else {
            state.bug();
        }
        if self.mutant(Mutant::BugBugsEveryVm) {
            self.vms.values_mut().for_each(crate::sim::mmu::Vm::bug);
        }
        let line = format!("SEAMCALL {} failed: {:#x} ({status})", leaf.name(), status.0);
        self.log.push(line);
    }
}
