//! The answers to a failed unmap, measured one beside the other: what `gmemtest policies` shows.
//!
//! Nothing here is known beforehand but names: [`scenarios`] lets every policy meet every failure on a simulated machine of
//! its own and looks at what came of it, [`properties`] asks what else a policy can and cannot do, [`costs`] counts what it
//! does while nothing fails. [`text`] and [`html`] show the result; as JSON it is [`Comparison`] itself.

pub mod costs;
pub mod html;
pub mod properties;
pub mod scenarios;
pub mod text;

use std::cell::RefCell;

use serde::Serialize;

use crate::harness::{Context, Seed, Stop, TestResult};
use crate::machine::MachineSpec;
use crate::sim::SimMachine;
use crate::sim::policy::PolicyKind;

pub use costs::{CostRow, Figure};
pub use properties::PropertyRow;
pub use scenarios::{Cell, ScenarioRow};

/// Version of the JSON form.
pub const SCHEMA: &str = "gmemtest-policies-1";

/// A policy: a column.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Column {
    /// The value of `policy=`.
    pub name: &'static str,
    /// What it does, in a few words.
    pub summary: &'static str,
}

/// Everything that was measured. The cells of every row stand in the order of the columns.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Comparison {
    /// [`SCHEMA`].
    pub schema: &'static str,
    /// The policies.
    pub policies: Vec<Column>,
    /// What each makes of each failure.
    pub scenarios: Vec<ScenarioRow>,
    /// What else it can and cannot do.
    pub properties: Vec<PropertyRow>,
    /// What it costs while nothing fails.
    pub costs: Vec<CostRow>,
}

impl Comparison {
    /// Measures everything.
    ///
    /// # Errors
    /// What went wrong with the model, in one line: a defect of this program.
    pub fn measure() -> Result<Comparison, String> {
        let scenarios = scenarios::measure().map_err(in_one_line)?;
        let properties = properties::measure(&scenarios).map_err(in_one_line)?;
        let costs = costs::measure().map_err(in_one_line)?;
        let column = |policy: PolicyKind| Column { name: policy.name(), summary: summary(policy) };
        Ok(Comparison {
            schema: SCHEMA,
            policies: PolicyKind::ALL.into_iter().map(column).collect(),
            scenarios,
            properties,
            costs,
        })
    }
}

fn summary(policy: PolicyKind) -> &'static str {
    match policy {
        PolicyKind::BugVm => "the VM is bugged, nobody else is told (6.19 and later)",
        PolicyKind::PinMapped => "a reference for every mapped page (6.16 to 6.18)",
        PolicyKind::HoldOnError => "references taken when the unmap fails",
        PolicyKind::GfnCount => "guest_memfd counts mappings per GFN",
        PolicyKind::Poison => "the page is marked as failed memory",
        PolicyKind::FailUnmap => "the error goes up to the caller",
    }
}

fn in_one_line(stop: Stop) -> String {
    let text = match stop {
        Stop::Fail(failure) => failure.to_string(),
        Stop::Skip { reason, .. } => reason,
    };
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Does something on a machine of its own.
fn on_machine<T>(options: &str, action: impl FnOnce(&Context<'_>, &SimMachine) -> TestResult<T>) -> TestResult<T> {
    let spec: MachineSpec = format!("sim:tdx,{options}").parse().map_err(|error| Stop::fail(format!("{error}")))?;
    let machine = SimMachine::open(&spec).map_err(|error| Stop::fail(error.to_string()))?;
    let notes = RefCell::new(Vec::new());
    let cx = Context::new(&machine, "policies", Seed(0), &notes);
    action(&cx, &machine)
}

/// The same for every policy.
fn for_each_policy<T>(
    options: &str,
    mut action: impl FnMut(&Context<'_>, &SimMachine) -> TestResult<T>,
) -> TestResult<Vec<T>> {
    let each = |policy: PolicyKind| {
        let options = format!("{options},policy={}", policy.name());
        on_machine(&options, |cx, machine| action(cx, machine))
    };
    PolicyKind::ALL.into_iter().map(each).collect()
}
