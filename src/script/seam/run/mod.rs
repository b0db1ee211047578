//! Runs a script: statement by statement on a machine of its own, invariants after each, to the first difference.

mod call;
mod guest;
mod look;
mod machine;
mod outcome;

use std::collections::BTreeSet;
use std::fmt;

use super::ast::{Action, HoldPoint, Lock, LockObject, Lp, PageKind, Position, Script, Setup, Statement};
use super::error::{Complaint, ScriptError};
use super::expr::Expr;
use super::names;
use super::parse::SEPT_VE_DISABLE;
use crate::sim::tdx_module::lock::LockId;
use crate::sim::tdx_module::td::{ATTR_SEPT_VE_DISABLE, CONFIG_GPAW};
use crate::sim::tdx_module::{LpId, Switches};
use machine::{FixtureFailure, Machine, Plan};
use outcome::{Difference, Kind, Outcome};

/// How much a script did.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Summary {
    /// Names of its `test` blocks, in order.
    pub tests: Vec<String>,
    /// Statements executed, repetitions counted.
    pub statements: u64,
    /// Expectations compared.
    pub expectations: u64,
}

/// A result that differs from what was expected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mismatch {
    /// The file as named by the caller.
    pub file: String,
    /// Line, counted from 1.
    pub line: usize,
    /// The `test` block it is in.
    pub test: Option<String>,
    /// The statement as written.
    pub statement: String,
    /// The leaf, or the statement's first word.
    pub subject: String,
    /// What differs: `result`, a register, or `invariant`.
    pub what: String,
    /// What was expected.
    pub expected: String,
    /// What came instead.
    pub actual: String,
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: ", self.file, self.line)?;
        if let Some(test) = &self.test {
            write!(f, "{test}: ")?;
        }
        writeln!(f, "{}: {} differs", self.subject, self.what)?;
        writeln!(f, "    {}", self.statement)?;
        writeln!(f, "    expected  {}", self.expected)?;
        write!(f, "    actual    {}", self.actual)
    }
}

/// Why a script did not pass.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Failure {
    /// It cannot be run.
    Script(ScriptError),
    /// A result differs.
    Mismatch(Box<Mismatch>),
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Failure::Script(error) => error.fmt(f),
            Failure::Mismatch(mismatch) => mismatch.fmt(f),
        }
    }
}

impl std::error::Error for Failure {}

/// Runs a script that [`super::parse`] has read.
///
/// # Errors
/// The first statement that makes no sense, or whose result differs from its expectation, or that leaves an invariant broken.
pub fn run(script: &Script) -> Result<Summary, Failure> {
    names::check(script).map_err(Failure::Script)?;
    let mut runner = Runner {
        file: &script.file,
        machine: None,
        test: None,
        switches: Vec::new(),
        check: Position::On,
        untouched: true,
        momentary: BTreeSet::new(),
        hand_locks: Vec::new(),
        armed: None,
        summary: Summary::default(),
    };
    for statement in &script.statements {
        runner.statement(statement)?;
    }
    Ok(runner.summary)
}

/// Why a statement did not come to an outcome.
enum Stop {
    Complaint(Complaint),
    Difference(String, Difference),
    Inner(Failure),
}

impl From<Complaint> for Stop {
    fn from(complaint: Complaint) -> Stop {
        Stop::Complaint(complaint)
    }
}

impl From<FixtureFailure> for Stop {
    fn from(failure: FixtureFailure) -> Stop {
        let FixtureFailure { leaf, status } = failure;
        let what = "result while setting up".to_string();
        Stop::Difference(leaf.to_string(), Difference { what, expected: "0 (TDX_SUCCESS)".to_string(), actual: status })
    }
}

type Ran = Result<Outcome, Stop>;

/// The next call of this leaf, there or anywhere, is held at this point.
struct Armed {
    leaf: u16,
    lp: Option<Lp>,
    point: HoldPoint,
}

struct Runner<'a> {
    file: &'a str,
    machine: Option<Machine>,
    test: Option<String>,
    switches: Vec<(String, Position)>,
    check: Position,
    /// Nothing but pages and names since the setup: it may be built anew.
    untouched: bool,
    /// Processors whose guest is inside only for the one operation held there.
    momentary: BTreeSet<LpId>,
    hand_locks: Vec<(Lp, LockObject, LockId)>,
    armed: Option<Armed>,
    summary: Summary,
}

impl Runner<'_> {
    fn statement(&mut self, statement: &Statement) -> Result<(), Failure> {
        let mismatch = |runner: &Runner, subject: String, difference: Difference| {
            Failure::Mismatch(Box::new(Mismatch {
                file: runner.file.to_string(),
                line: statement.line,
                test: runner.test.clone(),
                statement: statement.text.clone(),
                subject,
                what: difference.what,
                expected: difference.expected,
                actual: difference.actual,
            }))
        };
        self.summary.statements += 1;
        let outcome = match self.action(&statement.action) {
            Ok(outcome) => outcome,
            Err(Stop::Complaint(complaint)) => {
                return Err(Failure::Script(complaint.at(self.file, statement.line)));
            }
            Err(Stop::Difference(subject, difference)) => return Err(mismatch(self, subject, difference)),
            Err(Stop::Inner(failure)) => return Err(failure),
        };
        if let Some(expectation) = &statement.expectation {
            self.summary.expectations += 1;
            let empty = super::expr::Names::new();
            let known = self.machine.as_ref().map_or(&empty, |machine| &machine.names);
            let compared = outcome::compare(&outcome, expectation, known);
            match compared.map_err(|complaint| Failure::Script(complaint.at(self.file, statement.line)))? {
                Some(difference) => return Err(mismatch(self, subject(statement), difference)),
                None => self.save(statement, &outcome)?,
            }
        }
        if let Some(difference) = self.broken_invariant(&statement.action) {
            return Err(mismatch(self, subject(statement), difference));
        }
        Ok(())
    }

    fn save(&mut self, statement: &Statement, outcome: &Outcome) -> Result<(), Failure> {
        let saves = statement.expectation.iter().flat_map(|expectation| &expectation.saves);
        for save in saves {
            let Some(value) = outcome.saved(&save.field) else {
                let complaint = Complaint::new(
                    format!("`{}` has no number to save here", save.field),
                    "save a register or a field the statement's result has",
                );
                return Err(Failure::Script(complaint.at(self.file, statement.line)));
            };
            if let Some(machine) = &mut self.machine {
                machine.names.insert(save.name.clone(), value);
            }
        }
        Ok(())
    }

    fn broken_invariant(&self, action: &Action) -> Option<Difference> {
        let asked = matches!(action, Action::ExpectInvariants);
        let quiet = matches!(
            action,
            Action::Test(_)
                | Action::Page(..)
                | Action::Let(..)
                | Action::Look(_)
                | Action::Repeat(..)
                | Action::Switch(..)
        );
        if !asked && (quiet || self.check == Position::Off) {
            return None;
        }
        let broken = self.machine.as_ref()?.module.check();
        let actual = broken.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ");
        (!broken.is_empty()).then(|| Difference {
            what: "state".to_string(),
            expected: "every invariant of TDX module spec 15.3".to_string(),
            actual,
        })
    }

    fn action(&mut self, action: &Action) -> Ran {
        let touches = !matches!(
            action,
            Action::Test(_)
                | Action::Setup(_)
                | Action::Page(..)
                | Action::Let(..)
                | Action::Switch(..)
                | Action::Vcpu(..)
                | Action::Interrupt(_)
                | Action::Fault(_)
                | Action::FaultOff
                | Action::Invariants(_)
                | Action::ExpectInvariants
                | Action::Look(_)
        );
        let done = Ok(Outcome::new(Kind::Done));
        let ran = match action {
            Action::Test(name) => {
                self.reset();
                self.summary.tests.push(name.clone());
                self.test = Some(name.clone());
                done
            }
            Action::Setup(setup) => self.setup(setup).map(|()| Outcome::new(Kind::Done)),
            Action::Switch(name, position) => self.switch(name, *position).map(|()| Outcome::new(Kind::Done)),
            Action::Let(name, value) => {
                let value = self.value(value)?;
                self.machine()?.names.insert(name.clone(), value);
                Ok(Outcome::new(Kind::Value(value)))
            }
            Action::Page(names, kind) => self.pages(names, *kind),
            Action::Td(name, fixture) => {
                let machine = self.machine()?;
                let fixture = names::further_fixture(*fixture, Some(machine.plan.fixture))?;
                machine.further_td(name, fixture)?;
                done
            }
            Action::Vcpu(name, td) => self.vcpu(name, td.as_ref()).map(|()| Outcome::new(Kind::Done)),
            Action::Call(call) => self.call(call),
            Action::Hold(call, point) => self.hold(call, point.as_deref()),
            Action::HoldNext(leaf, lp, point) => {
                self.armed = Some(Armed { leaf: *leaf, lp: *lp, point: point.clone() });
                done
            }
            Action::HoldGuest(guest, point) => self.hold_guest(guest, point.as_deref()),
            Action::Release(lp) => self.release(*lp),
            Action::Guest(guest) => self.guest(guest),
            Action::Enter(vcpu, lp) => self.enter(vcpu, *lp),
            Action::Exit(vcpu, cause) => self.exit(vcpu, *cause),
            Action::Interrupt(interrupt) => self.interrupt(interrupt),
            Action::Lock(lock) => self.lock(lock),
            Action::Unlock(lock) => self.unlock(lock),
            Action::Fault(fault) => self.fault(fault),
            Action::FaultOff => {
                self.machine()?.module.faults_mut().clear();
                done
            }
            Action::ExpectInvariants => done,
            Action::Invariants(position) => {
                self.check = *position;
                done
            }
            Action::Look(look) => self.look(look),
            Action::Host(access) => self.host(access),
            Action::Advance(ns) => {
                let module = &mut self.machine()?.module;
                if module.clock_ns().checked_add(*ns).is_none() {
                    return Err(Complaint::new("the clock has come to its end", "advance it by less").into());
                }
                module.advance_clock(*ns);
                done
            }
            Action::Repeat(count, name, body) => return self.repeat(count, name.as_deref(), body),
        };
        if touches {
            self.untouched = false;
        }
        ran
    }

    fn reset(&mut self) {
        self.machine = None;
        self.switches.clear();
        self.forget();
    }

    fn forget(&mut self) {
        self.check = Position::On;
        self.untouched = true;
        self.momentary.clear();
        self.hand_locks.clear();
        self.armed = None;
    }

    fn machine(&mut self) -> Result<&mut Machine, Stop> {
        self.machine
            .as_mut()
            .ok_or_else(|| Complaint::new("there is no machine yet", "write a line such as `setup S2` first").into())
    }

    fn value(&mut self, expr: &Expr) -> Result<u64, Stop> {
        let machine = self.machine()?;
        Ok(expr.value(&machine.names)?)
    }

    fn pages(&mut self, names: &[String], kind: PageKind) -> Ran {
        let machine = self.machine()?;
        let mut page = 0;
        for name in names {
            page = machine.page(kind)?;
            machine.names.insert(name.clone(), page);
        }
        Ok(Outcome::new(Kind::Value(page)))
    }

    fn setup(&mut self, setup: &Setup) -> Result<(), Stop> {
        let mut plan = Plan::new(setup.fixture);
        plan.vcpus = (0..names::vcpu_count(setup)?).map(names::vcpu_name).collect();
        for (name, value) in &setup.options {
            set_option(&mut plan, name, value.value(&super::expr::Names::new())?)?;
        }
        for (name, position) in self.switches.iter().chain(&setup.switches) {
            set_switch(&mut plan, name, *position);
        }
        self.forget();
        self.machine = Some(Machine::new(plan)?);
        Ok(())
    }

    fn switch(&mut self, name: &str, position: Position) -> Result<(), Stop> {
        self.switches.push((name.to_string(), position));
        let untouched = self.untouched;
        let Some(machine) = &mut self.machine else { return Ok(()) };
        let mut plan = machine.plan.clone();
        set_switch(&mut plan, name, position);
        if !matches!(name, "dpamt" | SEPT_VE_DISABLE) {
            machine.module.set_switches(plan.switches);
            machine.plan = plan;
        } else if untouched {
            *machine = machine.rebuilt(plan)?;
        } else {
            return Err(Complaint::new(
                format!("`{name}` cannot change any more: a leaf has been called since the setup"),
                format!("write it in the setup, as `setup S2 {name}=on`"),
            )
            .into());
        }
        Ok(())
    }

    /// A further vCPU: before finalisation by SEAMCALLs, in an untouched S2 by building it anew with one more.
    fn vcpu(&mut self, name: &str, td: Option<&Expr>) -> Result<(), Stop> {
        let tdr = match td {
            Some(td) => self.value(td)?,
            None => self.value(&Expr::Name("tdr".to_string()))?,
        };
        let untouched = self.untouched;
        let machine = self.machine()?;
        let finalised = machine.plan.fixture == super::ast::Fixture::S2;
        if finalised && untouched && td.is_none() {
            let mut plan = machine.plan.clone();
            plan.vcpus.push(name.to_string());
            *machine = machine.rebuilt(plan)?;
            return Ok(());
        }
        let lp = machine.next_vcpu_lp();
        machine.build_vcpu(name, tdr, lp)?;
        self.untouched = false;
        Ok(())
    }

    fn repeat(&mut self, count: &Expr, name: Option<&str>, body: &[Statement]) -> Ran {
        let count = self.value(count)?;
        for index in 0..count {
            if let Some(name) = name {
                self.machine()?.names.insert(name.to_string(), index);
            }
            for statement in body {
                self.statement(statement).map_err(|failure| Stop::Inner(at_repetition(failure, index)))?;
            }
        }
        Ok(Outcome::new(Kind::Value(count)))
    }

    fn hand_lock(&self, lock: &Lock) -> Option<usize> {
        self.hand_locks.iter().rposition(|(lp, object, _)| *lp == lock.lp && *object == lock.object)
    }
}

fn set_switch(plan: &mut Plan, name: &str, position: Position) {
    let on = position == Position::On;
    if name == SEPT_VE_DISABLE {
        plan.attributes =
            if on { plan.attributes | ATTR_SEPT_VE_DISABLE } else { plan.attributes & !ATTR_SEPT_VE_DISABLE };
    } else {
        let known = Switches::set(&mut plan.switches, name, on);
        debug_assert!(known, "the parser knows the switches");
    }
}

fn set_option(plan: &mut Plan, name: &str, value: u64) -> Result<(), Complaint> {
    let small = |most: u64| match value {
        value if (1..=most).contains(&value) => Ok(value as u32),
        _ => Err(Complaint::new(format!("{name}={value} is not between 1 and {most}"), format!("write {name}=2"))),
    };
    match name {
        "packages" => plan.packages = small(8)? as u8,
        "lps" => plan.lps = small(64)?,
        "gpaw" => {
            plan.config_flags =
                if value == 0 { plan.config_flags & !CONFIG_GPAW } else { plan.config_flags | CONFIG_GPAW }
        }
        "attributes" => plan.attributes = value,
        "max_vcpus" => plan.max_vcpus = value,
        "config_flags" => plan.config_flags |= value,
        _ => {}
    }
    Ok(())
}

/// A failure inside a `repeat`, which says where it had come to.
fn at_repetition(failure: Failure, index: u64) -> Failure {
    match failure {
        Failure::Mismatch(mut mismatch) => {
            mismatch.statement.push_str(&format!("    # repetition {index}"));
            Failure::Mismatch(mismatch)
        }
        script => script,
    }
}

/// What a mismatch of this statement is about.
fn subject(statement: &Statement) -> String {
    match &statement.action {
        Action::Call(call) | Action::Hold(call, _) => call::leaf_name(call),
        Action::Guest(guest) | Action::HoldGuest(guest, _) => guest::operation_name(&guest.operation),
        Action::Enter(..) => "TDH.VP.ENTER".to_string(),
        Action::Look(look) => look::subject(look).to_string(),
        _ => statement.text.split_whitespace().next().unwrap_or_default().to_string(),
    }
}
