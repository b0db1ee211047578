//! Host leaves: calls, calls held half-way, entries and exits, locks by hand, faults.

use super::super::ast::{
    Call, ExitCause, Fault, FaultMoment, Interrupt, Lock, LockMode, LockObject, Lp, Position, Side,
};
use super::super::error::Complaint;
use super::super::expr::Expr;
use super::look::sept_level;
use super::outcome::{Kind, Outcome};
use super::{Armed, Ran, Runner, Stop};
use crate::sim::tdx_module::fault::{Effect, FaultRule, Filter, When};
use crate::sim::tdx_module::guest::TdExit;
use crate::sim::tdx_module::leaf::seamcall_info;
use crate::sim::tdx_module::lock::{LockId, Mode, Side as LockSide};
use crate::sim::tdx_module::{
    Code, HoldPoint, Interrupt as Line, Leaf, LpError, LpId, Module, Operand, Outcome as LeafOutcome, Regs, Released,
    Status,
};

/// The name of a call's leaf, or its number.
pub(super) fn leaf_name(call: &Call) -> String {
    match (&call.rax, seamcall_info(call.leaf)) {
        (None, Some(info)) => info.name.to_string(),
        (None, None) => format!("leaf {}", call.leaf),
        (Some(_), _) => "SEAMCALL".to_string(),
    }
}

impl From<LpError> for Stop {
    fn from(error: LpError) -> Stop {
        let mend = match error {
            LpError::NoSuchLp(_) => "write lps= in the setup, or a smaller number",
            LpError::InGuest(_) => "write another lp=, or `exit` the vCPU first",
            LpError::NotInGuest(_) => "write `enter` first",
            LpError::HoldsLeaf(_) => "write another lp=, or `release` it first",
            LpError::HoldsNothing(_) => "write `hold` first",
        };
        Complaint::new(error.to_string(), mend).into()
    }
}

/// Whether a processor can call.
fn idle(module: &Module, lp: LpId) -> bool {
    module.running(lp).is_none() && module.held(lp).is_none()
}

fn first_idle(module: &Module) -> Result<LpId, Stop> {
    module.platform().lps().find(|lp| idle(module, *lp)).ok_or_else(|| {
        Complaint::new("every logical processor runs a guest or holds a leaf", "write lps=16 in the setup").into()
    })
}

/// Where a leaf is called if the script does not say: a vCPU's own processor for what is bound to it, else the first that is idle.
pub(super) fn default_lp(module: &Module, vcpu: Option<u64>) -> Result<LpId, Stop> {
    let own = vcpu.and_then(|tdvpr| module.vcpu(tdvpr)).and_then(|vcpu| vcpu.assoc);
    match own.filter(|lp| idle(module, *lp)) {
        Some(lp) => Ok(lp),
        None => first_idle(module),
    }
}

pub(super) fn id(lp: Lp) -> LpId {
    LpId(lp.0)
}

pub(super) fn exit_outcome(kind: fn(u64) -> Kind, exit: TdExit) -> Outcome {
    Outcome::with_regs(kind(exit.regs.rax), exit.regs)
        .number("reason", exit.reason())
        .number("qualification", exit.qualification())
        .number("eeq", exit.regs.rdx)
        .number("gpa", exit.regs.r8)
        .number("type", exit.regs.rdx & 0xF)
        .number("req", exit.regs.rdx >> 32 & 7)
        .number("level", exit.regs.rdx >> 35 & 7)
        .number("state", exit.regs.rdx >> 38 & 0xFF)
        .number("leaf", exit.regs.rdx >> 46 & 1)
}

fn hold_point(name: Option<&str>) -> Result<HoldPoint, Complaint> {
    let Some(name) = name else { return Ok(HoldPoint::Commit) };
    let name = match name {
        "locked" | "locks" | "locks-taken" | "before-commit" => "commit",
        "sept-tree" => "tree",
        "sept-entry" => "entry",
        "td-epoch" => "epoch",
        other => other,
    };
    HoldPoint::from_name(name).ok_or_else(|| {
        let points = HoldPoint::ALL.map(HoldPoint::name).join(", ");
        Complaint::new(format!("`{name}` is no point where a leaf can be held"), format!("write at= one of {points}"))
    })
}

impl Runner<'_> {
    fn registers(&mut self, call: &Call) -> Result<Regs, Stop> {
        let mut regs = Regs::default();
        for (reg, value) in &call.regs {
            regs[*reg] = self.value(value)?;
        }
        let version = call.version.as_ref().map(|version| self.value(version)).transpose()?.unwrap_or(0);
        regs.rax = match &call.rax {
            Some(rax) => self.value(rax)?,
            None => u64::from(call.leaf) | version << 16,
        };
        Ok(regs)
    }

    fn call_lp(&mut self, call: &Call, regs: &Regs) -> Result<LpId, Stop> {
        let leaf = Leaf::from_number(regs.rax as u16);
        let bound = matches!(leaf, Some(Leaf::VpEnter | Leaf::VpFlush));
        let machine = self.machine()?;
        let module = &machine.module;
        let spread = machine.next_vcpu_lp();
        match call.lp {
            Some(lp) => Ok(id(lp)),
            None if leaf == Some(Leaf::VpInit) && idle(module, spread) => Ok(spread),
            None => default_lp(module, bound.then_some(regs.rcx & 0x000F_FFFF_FFFF_F000)),
        }
    }

    pub(super) fn call(&mut self, call: &Call) -> Ran {
        let mut regs = self.registers(call)?;
        let lp = self.call_lp(call, &regs)?;
        let armed = |armed: &mut Armed| armed.leaf == regs.rax as u16 && armed.lp.is_none_or(|on| id(on) == lp);
        if let Some(armed) = self.armed.take_if(armed) {
            self.machine()?.module.hold_next(lp, hold_point(armed.point.as_deref())?)?;
        }
        let enters = Leaf::from_number(regs.rax as u16) == Some(Leaf::VpEnter);
        let outcome = self.machine()?.module.seamcall(lp, &mut regs)?;
        Ok(leaf_outcome(outcome, regs, enters))
    }

    pub(super) fn hold(&mut self, call: &Call, point: Option<&str>) -> Ran {
        let point = hold_point(point)?;
        let regs = self.registers(call)?;
        let lp = self.call_lp(call, &regs)?;
        self.machine()?.module.hold_next(lp, point)?;
        self.call(&Call { lp: Some(Lp(lp.0)), ..call.clone() })
    }

    /// Asks for the next leaf on `lp` to be held.
    pub(super) fn hold_next(&mut self, lp: LpId, point: Option<&str>) -> Result<(), Stop> {
        // A TDCALL commits right after its checks: the entry lock is the last point it passes.
        let point = hold_point(Some(point.unwrap_or("entry")))?;
        Ok(self.machine()?.module.hold_next(lp, point)?)
    }

    pub(super) fn release(&mut self, lp: Option<Lp>) -> Ran {
        let module = &self.machine()?.module;
        let held: Vec<LpId> = module.platform().lps().filter(|lp| module.held(*lp).is_some()).collect();
        let lp = match (lp, held.as_slice()) {
            (Some(lp), _) => id(lp),
            (None, [only]) => *only,
            (None, []) => return Err(Complaint::new("no leaf is held half-way", "write `hold` first").into()),
            (None, _) => return Err(Complaint::new("several leaves are held", "write release lp1").into()),
        };
        let enters = module.held(lp).is_some_and(|call| call.leaf.name() == Leaf::VpEnter.name());
        match self.machine()?.module.release(lp)? {
            Released::Host(outcome, regs) => Ok(leaf_outcome(outcome, regs, enters)),
            Released::Guest(outcome) => {
                let outcome = self.guest_outcome(lp, outcome)?;
                if self.momentary.remove(&lp) {
                    self.leave(lp)?;
                }
                Ok(outcome)
            }
        }
    }

    pub(super) fn enter(&mut self, vcpu: &Expr, lp: Option<Lp>) -> Ran {
        let tdvpr = self.value(vcpu)?;
        let module = &mut self.machine()?.module;
        let lp = match lp {
            Some(lp) => id(lp),
            None => default_lp(module, Some(tdvpr))?,
        };
        let mut regs = Regs { rax: u64::from(Leaf::VpEnter.number()), rcx: tdvpr, ..Regs::default() };
        let outcome = module.seamcall(lp, &mut regs)?;
        Ok(leaf_outcome(outcome, regs, true))
    }

    pub(super) fn exit(&mut self, vcpu: &Expr, cause: ExitCause) -> Ran {
        let tdvpr = self.value(vcpu)?;
        let module = &mut self.machine()?.module;
        let Some(lp) = module.runs_on(tdvpr) else {
            return Ok(Outcome::new(Kind::Outside));
        };
        let exit = match cause {
            ExitCause::Interrupt => module.kick(lp)?,
            ExitCause::TripleFault => module.guest_triple_fault(lp)?,
            ExitCause::MachineCheck => module.guest_machine_check(lp)?,
            ExitCause::Hlt | ExitCause::Other(_) => {
                return Err(Complaint::new(
                    "the module does not model this reason to leave a guest",
                    "write exit V, exit V triple-fault, exit V machine-check, or a `guest V vmcall`",
                )
                .into());
            }
        };
        Ok(exit_outcome(Kind::Left, exit))
    }

    pub(super) fn interrupt(&mut self, interrupt: &Interrupt) -> Ran {
        let line = match (interrupt.position, &interrupt.after) {
            (Position::Off, _) => Line::None,
            (Position::On, None) => Line::Pending,
            (Position::On, Some(after)) => Line::After(self.value(after)?.saturating_sub(1)),
        };
        let module = &mut self.machine()?.module;
        let lps: Vec<LpId> = match interrupt.lp {
            Some(lp) => vec![id(lp)],
            None => module.platform().lps().collect(),
        };
        for lp in lps {
            module.set_interrupt(lp, line)?;
        }
        Ok(Outcome::new(Kind::Done))
    }

    fn lock_id(&mut self, lock: &Lock) -> Result<LockId, Stop> {
        let tdr = match &lock.td {
            Some(td) => self.value(td)?,
            None => self.machine()?.names.get("tdr").copied().unwrap_or(0),
        };
        Ok(match &lock.object {
            LockObject::SeptTree => LockId::SeptTree(tdr),
            LockObject::TdEpoch => LockId::Epoch(tdr),
            LockObject::OpState => LockId::OpState(tdr),
            LockObject::Kot => LockId::Kot,
            LockObject::Ket => LockId::Ket,
            LockObject::Sys => LockId::Sys,
            LockObject::Wbcache => {
                let packages = &self.machine()?.module.platform().lp_packages;
                LockId::Wbcache(packages.get(lock.lp.0 as usize).copied().unwrap_or(0))
            }
            LockObject::Pamt { page, level } => {
                let (page, level) = (self.value(page)?, self.value(level)?);
                if level > 2 || !self.machine()?.module.pamt().covers(page) {
                    return Err(Complaint::new(
                        format!("there is no PAMT entry of level {level} for {page:#x}"),
                        "write level=0, 1 or 2 and a page of the TDMR",
                    )
                    .into());
                }
                LockId::Pamt(level as u8, page)
            }
            LockObject::SeptEntry { gpa, level } => {
                let (gpa, level) = (self.value(gpa)?, self.value(level)?);
                let found = self.machine()?.module.sept_entry_lock(tdr, gpa, sept_level(level)?);
                found.ok_or_else(|| {
                    Complaint::new(
                        format!("there is no Secure EPT entry of level {level} for gpa {gpa:#x}"),
                        "add the tables above it first",
                    )
                })?
            }
        })
    }

    pub(super) fn lock(&mut self, lock: &Lock) -> Ran {
        let object = self.lock_id(lock)?;
        let mode = match lock.mode {
            LockMode::Shared => Mode::Shared,
            LockMode::Exclusive => Mode::Exclusive,
        };
        let side = match lock.side {
            Side::Host => LockSide::Host,
            Side::Guest => LockSide::Guest,
        };
        match self.machine()?.module.lock_by_hand(id(lock.lp), object, mode, side)? {
            Ok(()) => {
                self.hand_locks.push((lock.lp, lock.object.clone(), object));
                Ok(Outcome::new(Kind::Done))
            }
            Err(_) => Ok(Outcome::new(Kind::Status(Status::from(Code::OperandBusy).0))),
        }
    }

    pub(super) fn unlock(&mut self, lock: &Lock) -> Ran {
        let Some(at) = self.hand_lock(lock) else {
            return Err(Complaint::new(
                format!("lp{} has not locked this", lock.lp.0),
                "write the same object, td= and by= as in the line that locked it",
            )
            .into());
        };
        let (lp, _, object) = self.hand_locks.remove(at);
        self.machine()?.module.unlock_by_hand(id(lp), object)?;
        Ok(Outcome::new(Kind::Done))
    }

    pub(super) fn fault(&mut self, fault: &Fault) -> Ran {
        let value = |runner: &mut Self, expr: &Option<Expr>| expr.as_ref().map(|expr| runner.value(expr)).transpose();
        let (nth, times) = (value(self, &fault.nth)?, value(self, &fault.times)?);
        let seed = value(self, &fault.seed)?.unwrap_or(1);
        let filter = Filter {
            gpa: value(self, &fault.gpa)?,
            level: value(self, &fault.level)?.map(|level| level as u8),
            tdr: value(self, &fault.td)?,
            page: value(self, &fault.page)?,
        };
        let status = value(self, &fault.status)?.map(Status);
        let Some(leaf) = fault.leaf else {
            return Err(Complaint::new("`fault` has no leaf=", "write fault busy-once leaf=TDH.MEM.PAGE.REMOVE").into());
        };
        let mut rule = match (fault.preset, status) {
            (Some(preset), None) => preset.rule(leaf),
            (Some(preset), Some(status)) => FaultRule::new(leaf, status).when(preset.rule(leaf).when),
            (None, status) => FaultRule::new(leaf, status.unwrap_or(Status::on(Code::OperandBusy, Operand::RCX))),
        };
        let when = match (nth, fault.every, times, fault.percent) {
            (_, _, _, Some(percent)) => {
                Some(When::Probability { chance: (u64::from(percent) * u64::from(u32::MAX) / 100) as u32, seed })
            }
            (Some(n), true, ..) => Some(When::From(n)),
            (Some(n), false, ..) => Some(When::Nth(n)),
            (None, true, ..) => Some(When::Always),
            (None, false, Some(times), _) => Some(When::First(times)),
            (None, false, None, None) => None,
        };
        if let Some(when) = when {
            rule = rule.when(when);
        }
        let effect = match fault.when {
            FaultMoment::InsteadOfEffect => Effect::InsteadOf,
            FaultMoment::AfterEffect => Effect::After,
        };
        self.machine()?.module.faults_mut().add(rule.filter(filter).effect(effect));
        Ok(Outcome::new(Kind::Done))
    }

    /// Takes the guest on `lp` out if it is still inside.
    pub(super) fn leave(&mut self, lp: LpId) -> Result<(), Stop> {
        let module = &mut self.machine()?.module;
        if module.running(lp).is_some() {
            module.kick(lp)?;
        }
        Ok(())
    }
}

fn leaf_outcome(outcome: LeafOutcome, regs: Regs, enters: bool) -> Outcome {
    match outcome {
        LeafOutcome::Done(status) => {
            // VP.ENTER that comes back with an exit reason: an emulated TD exit.
            let exit = enters && status.upper() == 0 && status.details() != 0;
            Outcome::with_regs(if exit { Kind::Exit(status.0) } else { Kind::Status(status.0) }, regs)
                .number("reason", status.details())
                .number("eeq", regs.rdx)
                .number("gpa", regs.r8)
        }
        LeafOutcome::Entered => Outcome::with_regs(Kind::Running, regs),
        LeafOutcome::Held => Outcome::with_regs(Kind::Held, regs),
    }
}
