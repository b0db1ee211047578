//! Names: which ones a fixture brings, and a check that none is used before it is made.

use std::collections::BTreeSet;

use super::ast::{
    Action, Call, Fault, Fixture, Guest, GuestOperation, HostAccess, Interrupt, Lock, LockObject, Look, Script, Setup,
    Statement,
};
use super::error::{Complaint, ScriptError};
use super::expect::{Expectation, Head, Value};
use super::expr::{Expr, Names, unknown_name};
use crate::sim::tdx_module::Reg;

/// Names every machine has.
pub(crate) const PLATFORM_NAMES: [&str; 11] =
    ["q", "src", "params", "tdmrs", "tdmr", "outside", "reserved", "uninit", "hkid", "hkid2", "global_hkid"];

/// TDCS pages of a fixture's TD.
pub(crate) const TDCS_PAGES: usize = 6;
/// TDCX pages of a fixture's vCPU.
pub(crate) const VCPU_TDCX_PAGES: usize = 5;

/// Names a TD brought to `fixture` has, without prefix.
pub(crate) fn td_names(fixture: Fixture, vcpus: usize) -> Vec<String> {
    let mut names = Vec::new();
    if fixture >= Fixture::Created {
        names.push("tdr".to_string());
    }
    if fixture >= Fixture::Tdcs {
        names.extend((0..TDCS_PAGES).map(|index| format!("tdcs{index}")));
        names.push("root".to_string());
    }
    if fixture >= Fixture::Built {
        names.extend(["sept3", "sept2", "sept1"].map(String::from));
        for index in 0..vcpus {
            names.extend(vcpu_names(&vcpu_name(index)));
        }
        names.push("tdvpr".to_string());
    }
    names
}

/// Name of a fixture's vCPU: V, V1, V2.
pub(crate) fn vcpu_name(index: usize) -> String {
    if index == 0 { "V".to_string() } else { format!("V{index}") }
}

/// A vCPU's own name and those of its pages.
pub(crate) fn vcpu_names(name: &str) -> Vec<String> {
    let mut names = vec![name.to_string(), format!("{name}.tdvpr")];
    names.extend((1..=VCPU_TDCX_PAGES).map(|index| format!("{name}.tdcx{index}")));
    names
}

/// How many vCPUs a setup asks for.
pub(crate) fn vcpu_count(setup: &Setup) -> Result<usize, Complaint> {
    match setup.options.iter().find(|(name, _)| name == "vcpus") {
        None => Ok(1),
        Some((_, count)) => match count.value(&Names::new()) {
            Ok(count @ 1..=16) => Ok(count as usize),
            _ => Err(Complaint::new("vcpus= is not between 1 and 16", "write vcpus=1 to vcpus=16")),
        },
    }
}

/// How far a further TD is brought: as the script says, or as the setup's own, but at least to INITIALIZED.
pub(crate) fn further_fixture(said: Option<Fixture>, setup: Option<Fixture>) -> Result<Fixture, Complaint> {
    match (said, setup) {
        (_, None | Some(Fixture::None)) => {
            Err(Complaint::new("a TD needs a module that is ready", "write `setup ready` or `setup S2` first"))
        }
        (Some(Fixture::None | Fixture::Ready), _) => {
            Err(Complaint::new("this fixture has no TD", "write td B setup=S1, or another from created on"))
        }
        (Some(said), _) => Ok(said),
        (None, Some(setup)) => Ok(setup.max(Fixture::S1)),
    }
}

/// Refuses the first name that is used before it is made, and fields a statement's result does not have.
///
/// # Errors
/// That name, with file, line and mend.
pub(crate) fn check(script: &Script) -> Result<(), ScriptError> {
    let mut scope = Scope::default();
    for statement in &script.statements {
        scope.statement(statement).map_err(|complaint| complaint.at(&script.file, statement.line))?;
    }
    Ok(())
}

#[derive(Default)]
struct Scope {
    names: BTreeSet<String>,
    fixture: Option<Fixture>,
}

impl Scope {
    fn add(&mut self, name: impl Into<String>) {
        self.names.insert(name.into());
    }

    fn expr(&self, expr: &Expr) -> Result<(), Complaint> {
        let mut unknown = None;
        expr.each_name(&mut |name| {
            if unknown.is_none() && !self.names.contains(name) {
                unknown = Some(unknown_name(name));
            }
        });
        unknown.map_or(Ok(()), Err)
    }

    fn all<'a>(&self, exprs: impl IntoIterator<Item = &'a Expr>) -> Result<(), Complaint> {
        exprs.into_iter().try_for_each(|expr| self.expr(expr))
    }

    fn statement(&mut self, statement: &Statement) -> Result<(), Complaint> {
        let needs_machine = !matches!(
            statement.action,
            Action::Test(_) | Action::Setup(_) | Action::Switch(..) | Action::Invariants(_)
        );
        if needs_machine && self.fixture.is_none() {
            return Err(Complaint::new(
                format!("`{}` stands before any setup", statement.text),
                "write a line such as `setup S2` first",
            ));
        }
        self.action(&statement.action)?;
        if let Some(expectation) = &statement.expectation {
            self.expectation(expectation, &statement.action)?;
        }
        Ok(())
    }

    fn action(&mut self, action: &Action) -> Result<(), Complaint> {
        match action {
            Action::Test(_) => *self = Scope::default(),
            Action::Setup(setup) => {
                self.all(setup.options.iter().map(|(_, value)| value))?;
                *self = Scope { names: BTreeSet::new(), fixture: Some(setup.fixture) };
                PLATFORM_NAMES.into_iter().for_each(|name| self.add(name));
                td_names(setup.fixture, vcpu_count(setup)?).into_iter().for_each(|name| self.add(name));
            }
            Action::Page(names, _) => names.iter().for_each(|name| self.add(name)),
            Action::Td(name, fixture) => {
                let fixture = further_fixture(*fixture, self.fixture)?;
                self.add(name);
                self.add(format!("{name}.hkid"));
                td_names(fixture, 1).into_iter().for_each(|own| self.add(format!("{name}.{own}")));
            }
            Action::Vcpu(name, td) => {
                self.all(td)?;
                vcpu_names(name).into_iter().for_each(|name| self.add(name));
            }
            Action::Let(name, value) => {
                self.expr(value)?;
                self.add(name);
            }
            Action::Call(call) | Action::Hold(call, _) => self.call(call)?,
            Action::Guest(guest) | Action::HoldGuest(guest, _) => self.guest(guest)?,
            Action::Enter(vcpu, _) | Action::Exit(vcpu, _) => self.expr(vcpu)?,
            Action::Interrupt(Interrupt { after, .. }) => self.all(after)?,
            Action::Lock(lock) | Action::Unlock(lock) => self.lock(lock)?,
            Action::Fault(fault) => self.fault(fault)?,
            Action::Look(look) => self.look(look)?,
            Action::Host(HostAccess { pa, value, .. }) => {
                self.expr(pa)?;
                self.all(value)?;
            }
            Action::Repeat(count, name, body) => {
                self.expr(count)?;
                self.names.extend(name.clone());
                body.iter().try_for_each(|statement| self.statement(statement))?;
            }
            Action::Release(_)
            | Action::HoldNext(..)
            | Action::FaultOff
            | Action::Switch(..)
            | Action::ExpectInvariants
            | Action::Invariants(_)
            | Action::Advance(_) => {}
        }
        Ok(())
    }

    fn call(&self, call: &Call) -> Result<(), Complaint> {
        self.all(call.version.iter().chain(&call.rax))?;
        self.all(call.regs.iter().map(|(_, value)| value))
    }

    fn guest(&self, guest: &Guest) -> Result<(), Complaint> {
        self.expr(&guest.vcpu)?;
        match &guest.operation {
            GuestOperation::Access { gpa, value, .. } => self.all(std::iter::once(gpa).chain(value)),
            GuestOperation::Tdcall { rax, regs, .. } => self.all(rax.iter().chain(regs.iter().map(|(_, value)| value))),
            GuestOperation::Step => Ok(()),
        }
    }

    fn lock(&self, lock: &Lock) -> Result<(), Complaint> {
        self.all(&lock.td)?;
        match &lock.object {
            LockObject::SeptEntry { gpa, level } => self.all([gpa, level]),
            LockObject::Pamt { page, level } => self.all([page, level]),
            _ => Ok(()),
        }
    }

    fn fault(&self, fault: &Fault) -> Result<(), Complaint> {
        let Fault { nth, times, seed, gpa, level, td, page, status, .. } = fault;
        self.all([nth, times, seed, gpa, level, td, page, status].into_iter().flatten())
    }

    fn look(&self, look: &Look) -> Result<(), Complaint> {
        match look {
            Look::Rdmd(page, level) => self.all(std::iter::once(page).chain(level)),
            Look::Sept { gpa, level, td } => self.all([gpa, level].into_iter().chain(td)),
            Look::Td(td) => self.all(td),
            Look::Vcpu(object) | Look::Hkid(object) | Look::Line(object) => self.expr(object),
            Look::Sys => Ok(()),
        }
    }

    fn expectation(&mut self, expectation: &Expectation, action: &Action) -> Result<(), Complaint> {
        let known = fields(action);
        if let Some(head) = &expectation.head {
            self.head(head, matches!(action, Action::Look(_)))?;
        }
        for check in &expectation.checks {
            known_field(&check.field, known)?;
            // Fields other than registers may be compared with the name of a state.
            if let (Some(_), Some(expr)) = (Reg::from_name(&check.field), &check.value.number) {
                self.expr(expr)?;
            }
        }
        for save in &expectation.saves {
            known_field(&save.field, known)?;
            self.add(&save.name);
        }
        Ok(())
    }

    fn head(&self, head: &Head, states: bool) -> Result<(), Complaint> {
        match head {
            Head::Not(inner) => self.head(inner, states),
            Head::Exit(Some(reason)) => self.expr(reason),
            Head::Value(Value { status, number, text }) => {
                let mut wrong = Ok(());
                if let Some(status) = status {
                    status.each_name(&mut |name| {
                        if !self.names.contains(name) {
                            wrong = Err(not_an_operand(name));
                        }
                    });
                    return wrong;
                }
                match number {
                    _ if states => Ok(()),
                    Some(expr) => self.expr(expr).map_err(|_| not_an_outcome(text)),
                    None => Err(not_an_outcome(text)),
                }
            }
            _ => Ok(()),
        }
    }
}

fn not_an_operand(name: &str) -> Complaint {
    Complaint::new(
        format!("`{name}` is neither an operand nor a name made before"),
        "write an operand such as RCX, R8, SEPT_TREE, TD_EPOCH, or its number",
    )
}

fn not_an_outcome(text: &str) -> Complaint {
    Complaint::new(
        format!("`{text}` is neither a status nor a value nor a name made before"),
        "write 0, a number, a status such as TDX_OPERAND_BUSY|RCX, ok, exit 48 or #VE",
    )
}

fn known_field(field: &str, known: &[&str]) -> Result<(), Complaint> {
    if Reg::from_name(field).is_some() || known.contains(&field) {
        return Ok(());
    }
    let more = if known.is_empty() { String::new() } else { format!(", or {}", known.join(", ")) };
    Err(Complaint::new(
        format!("`{field}` is no register and no field of this statement"),
        format!("write rax, rbx, rcx, rdx, rsi, rdi, rbp, r8 to r15{more}"),
    ))
}

/// Fields of a statement's result beside the registers.
pub(crate) fn fields(action: &Action) -> &'static [&'static str] {
    match action {
        Action::Guest(_) | Action::HoldGuest(..) | Action::Enter(..) | Action::Exit(..) | Action::Release(_) => {
            &["value", "reason", "qualification", "eeq", "gpa", "type", "req", "level", "state", "leaf"]
        }
        Action::Host(_) => &["value"],
        Action::Look(look) => match look {
            Look::Rdmd(..) => &["type", "owner", "size", "bepoch"],
            Look::Sept { .. } => {
                &["state", "raw", "entry", "info", "level", "hpa", "leaf", "counter", "locked", "priority"]
            }
            Look::Td(_) => &[
                "chldcnt",
                "epoch",
                "refcount0",
                "refcount1",
                "op",
                "life",
                "fatal",
                "hkid",
                "num_vcpus",
                "num_assoc_vcpus",
                "num_tdcx",
                "mrtd",
            ],
            Look::Vcpu(_) => &["state", "epoch", "assoc", "index", "rip", "last_exit"],
            Look::Hkid(_) => &["state", "wbinvd"],
            Look::Sys => &["state", "translations"],
            Look::Line(_) => &["hkid", "td", "poison", "value"],
        },
        _ => &[],
    }
}
