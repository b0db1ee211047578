//! What a statement came to, and whether that is what was expected.

use super::super::error::Complaint;
use super::super::expect::{Check, Exception, Expectation, Head, Relation, StatusPattern, Value};
use super::super::expr::Names;
use crate::sim::tdx_module::{Code, Reg, Regs, Status};

/// What a statement came to.
#[derive(Clone, Debug)]
pub(super) struct Outcome {
    pub kind: Kind,
    pub regs: Option<Regs>,
    pub fields: Vec<(&'static str, Field)>,
}

/// How it ended.
#[derive(Clone, Debug)]
pub(super) enum Kind {
    /// Done, with nothing to show.
    Done,
    /// A leaf of the host or of the guest came back with this status.
    Status(u64),
    /// VP.ENTER came back without the guest having run, or a guest operation ended in a TD exit: RAX.
    Exit(u64),
    /// A TD exit the script asked for: RAX.
    Left(u64),
    /// The vCPU runs.
    Running,
    /// The vCPU was asked to leave a guest it was not in.
    Outside,
    /// The leaf is held half-way.
    Held,
    /// A value was read.
    Value(u64),
    /// An exception in the guest, or a machine check in the host.
    Exception(Exception),
    /// The state of what was looked at: name and number.
    State(&'static str, u64),
}

/// A field of an outcome beside the registers.
#[derive(Clone, Debug)]
pub(super) enum Field {
    Number(u64),
    Named(u64, &'static str),
    Text(String),
}

impl Outcome {
    pub fn new(kind: Kind) -> Outcome {
        Outcome { kind, regs: None, fields: Vec::new() }
    }

    pub fn with_regs(kind: Kind, regs: Regs) -> Outcome {
        Outcome { kind, regs: Some(regs), fields: Vec::new() }
    }

    pub fn field(mut self, name: &'static str, field: Field) -> Outcome {
        self.fields.push((name, field));
        self
    }

    pub fn number(self, name: &'static str, value: impl Into<u64>) -> Outcome {
        let value = value.into();
        self.field(name, Field::Number(value))
    }

    fn find(&self, name: &str) -> Option<Field> {
        if let Some((_, field)) = self.fields.iter().find(|(known, _)| *known == name) {
            return Some(field.clone());
        }
        let reg = Reg::from_name(name)?;
        self.regs.map(|regs| Field::Number(regs[reg]))
    }

    /// The number of a field, to be saved.
    pub fn saved(&self, name: &str) -> Option<u64> {
        match self.find(name)? {
            Field::Number(number) | Field::Named(number, _) => Some(number),
            Field::Text(_) => None,
        }
    }

    /// What it came to, in words.
    pub fn describe(&self) -> String {
        match &self.kind {
            Kind::Done => "ok".to_string(),
            Kind::Status(status) => status_text(*status),
            Kind::Exit(rax) | Kind::Left(rax) => format!("TD exit, {}", status_text(*rax)),
            Kind::Running => "the vCPU runs".to_string(),
            Kind::Outside => "nothing: the vCPU is not in the guest".to_string(),
            Kind::Held => "held half-way".to_string(),
            Kind::Value(value) => format!("{value:#x}"),
            Kind::Exception(exception) => exception.name().to_string(),
            Kind::State(name, _) => (*name).to_string(),
        }
    }
}

/// A status as number and name.
pub(super) fn status_text(status: u64) -> String {
    match status {
        0 => "0 (TDX_SUCCESS)".to_string(),
        _ => format!("{status:#018x} ({})", Status(status)),
    }
}

/// A difference between outcome and expectation.
pub(super) struct Difference {
    pub what: String,
    pub expected: String,
    pub actual: String,
}

/// The first difference, if there is one.
pub(super) fn compare(
    outcome: &Outcome,
    expectation: &Expectation,
    names: &Names,
) -> Result<Option<Difference>, Complaint> {
    if let Some(head) = &expectation.head
        && !matches(outcome, head, names)?
    {
        let expected = describe_head(head, &outcome.kind, names);
        return Ok(Some(Difference { what: "result".to_string(), expected, actual: outcome.describe() }));
    }
    for check in &expectation.checks {
        if let Some(difference) = field_difference(outcome, check, names)? {
            return Ok(Some(difference));
        }
    }
    Ok(None)
}

fn field_difference(outcome: &Outcome, check: &Check, names: &Names) -> Result<Option<Difference>, Complaint> {
    let expected = |value: Option<u64>| {
        let sign = if check.relation == Relation::Equal { "" } else { "anything but " };
        match value {
            Some(number) if number > 9 => format!("{sign}{} ({number:#x})", check.value.text),
            _ => format!("{sign}{}", check.value.text),
        }
    };
    let number = check.value.number.as_ref().map(|expr| expr.value(names));
    let Some(field) = outcome.find(&check.field) else {
        let actual = format!("{}, which has no {}", outcome.describe(), check.field);
        let number = number.and_then(Result::ok);
        return Ok(Some(Difference { what: check.field.clone(), expected: expected(number), actual }));
    };
    let (equal, actual) = match &field {
        Field::Number(actual) => match number.clone() {
            Some(number) => (number? == *actual, format!("{actual:#x}")),
            None => (false, format!("{actual:#x}")),
        },
        Field::Named(actual, name) => {
            let equal = same_word(name, &check.value.text) || matches!(&number, Some(Ok(number)) if number == actual);
            (equal, format!("{name} ({actual})"))
        }
        Field::Text(text) => (text.eq_ignore_ascii_case(&check.value.text), text.clone()),
    };
    if equal == (check.relation == Relation::Equal) {
        return Ok(None);
    }
    let expected = expected(number.and_then(Result::ok));
    Ok(Some(Difference { what: check.field.clone(), expected, actual }))
}

/// State names match with or without the prefix of their kind.
fn same_word(name: &str, word: &str) -> bool {
    let dashed = word.replace('-', "_");
    name.eq_ignore_ascii_case(&dashed)
        || ["PT_", "TD_", "HKID_", "VCPU_", "SYS_"]
            .iter()
            .any(|prefix| name.strip_prefix(prefix).is_some_and(|rest| rest.eq_ignore_ascii_case(&dashed)))
}

fn matches(outcome: &Outcome, head: &Head, names: &Names) -> Result<bool, Complaint> {
    let status = match outcome.kind {
        Kind::Status(status) | Kind::Exit(status) | Kind::Left(status) => Some(status),
        _ => None,
    };
    Ok(match head {
        Head::Not(inner) => !matches(outcome, inner, names)?,
        Head::Ok => match outcome.kind {
            Kind::Status(status) => status == 0,
            Kind::Left(rax) => rax >> 32 == 0,
            Kind::Exit(_) | Kind::Exception(_) | Kind::Outside => false,
            Kind::Done | Kind::Running | Kind::Held | Kind::Value(_) | Kind::State(..) => true,
        },
        Head::Held => matches!(outcome.kind, Kind::Held),
        Head::Error => status.is_some_and(|status| status >> 61 != 0),
        Head::Nonzero => match outcome.kind {
            Kind::Value(value) => value != 0,
            _ => status.is_some_and(|status| status != 0),
        },
        Head::Exit(reason) => {
            let reason = reason.as_ref().map(|reason| reason.value(names)).transpose()?;
            match outcome.kind {
                Kind::Exit(rax) | Kind::Left(rax) => reason.is_none_or(|reason| rax & 0xFFFF_FFFF == reason),
                _ => false,
            }
        }
        Head::Exception(wanted) => match outcome.kind {
            Kind::Exception(exception) => exception == *wanted,
            // A machine check in the guest reaches the host as the end of the TD.
            Kind::Exit(rax) | Kind::Left(rax) => {
                *wanted == Exception::MachineCheck && rax >> 32 == Code::NonRecoverableTdNonAccessible as u64
            }
            _ => false,
        },
        Head::Value(value) => matches_value(outcome, value, names)?,
    })
}

fn matches_value(outcome: &Outcome, value: &Value, names: &Names) -> Result<bool, Complaint> {
    let number = || value.number.as_ref().map(|expr| expr.value(names));
    let is = |actual: u64| match number() {
        Some(number) => number.map(|number| number == actual),
        None => Ok(false),
    };
    let has_status = |status: u64| match &value.status {
        Some(StatusPattern::Upper(upper)) => Ok(status >> 32 == u64::from(*upper)),
        Some(StatusPattern::Both(upper, details)) => {
            Ok(status >> 32 == u64::from(*upper) && status & 0xFFFF_FFFF == details.value(names)?)
        }
        Some(StatusPattern::Full(full)) => Ok(status == *full),
        None => is(status),
    };
    match outcome.kind {
        Kind::Status(status) => has_status(status),
        // A TD exit is never the plain success of what was asked.
        Kind::Exit(rax) => Ok(rax != 0 && has_status(rax)?),
        Kind::Left(rax) => Ok(has_status(rax)? || rax >> 32 == 0 && is(0)?),
        Kind::Value(actual) => is(actual),
        Kind::Done | Kind::Running | Kind::Held => is(0),
        Kind::Exception(_) | Kind::Outside => Ok(false),
        Kind::State(name, actual) => {
            Ok(same_word(name, &value.text) || matches!(number(), Some(Ok(number)) if number == actual || number == 0))
        }
    }
}

fn describe_head(head: &Head, kind: &Kind, names: &Names) -> String {
    match head {
        Head::Ok => "ok".to_string(),
        Head::Not(inner) => format!("anything but {}", describe_head(inner, kind, names)),
        Head::Error => "an error status".to_string(),
        Head::Held => "held half-way".to_string(),
        Head::Nonzero => "anything but 0".to_string(),
        Head::Exit(None) => "a TD exit".to_string(),
        Head::Exit(Some(reason)) => match reason.value(names) {
            Ok(reason) => format!("a TD exit with reason {reason}"),
            Err(_) => "a TD exit".to_string(),
        },
        Head::Exception(exception) => exception.name().to_string(),
        Head::Value(value) => {
            let is_status = matches!(kind, Kind::Status(_) | Kind::Exit(_) | Kind::Left(_));
            let status = match &value.status {
                Some(StatusPattern::Upper(upper)) => Some(u64::from(*upper) << 32),
                Some(StatusPattern::Both(upper, details)) => {
                    details.value(names).ok().map(|details| u64::from(*upper) << 32 | details)
                }
                Some(StatusPattern::Full(full)) => Some(*full),
                None => value.number.as_ref().and_then(|expr| expr.value(names).ok()),
            };
            match (status, &value.status) {
                (Some(status), Some(StatusPattern::Upper(upper))) => match Code::from_upper(*upper) {
                    Some(code) => format!("{status:#018x} ({}, any details)", code.name()),
                    None => format!("{status:#018x}"),
                },
                (Some(status), _) if is_status => status_text(status),
                (Some(number), _) => format!("{number:#x}"),
                (None, _) => value.text.clone(),
            }
        }
    }
}
