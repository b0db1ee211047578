//! `gmemtest list`: the names of the tests, what they claim and what they need.

use std::io::{self, Write};
use std::process::ExitCode;

use clap::{Args, ValueEnum};
use serde::Serialize;

use super::failure::Failure;
use super::machines::Machines;
use super::run::{RunArguments, patterns};
use crate::harness::exit::GOOD;
use crate::harness::plan::{Claim, Plan};
use crate::harness::{Sharing, Stop, Suite};

/// The flags of `list`.
#[derive(Debug, Args)]
pub(super) struct ListArguments {
    /// Names of tests, as for `run`.
    #[arg(value_name = "PATTERN")]
    patterns: Vec<String>,
    /// List the machines instead, and whether they are to be had here.
    #[arg(long)]
    machines: bool,
    /// Format of the list.
    #[arg(long, value_enum, default_value_t)]
    format: Format,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
enum Format {
    #[default]
    Pretty,
    Json,
}

/// What a list holds.
#[derive(Debug, Serialize)]
struct TestList<'a> {
    schema: &'static str,
    tests: Vec<ListedTest<'a>>,
}

#[derive(Debug, Serialize)]
struct ListedTest<'a> {
    name: &'a str,
    suite: &'a str,
    doc: String,
    needs: Vec<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    timeout_s: Option<u64>,
    alone: bool,
}

#[derive(Debug, Serialize)]
struct MachineList {
    schema: &'static str,
    machines: Vec<ListedMachine>,
}

#[derive(Debug, Serialize)]
struct ListedMachine {
    spec: String,
    auto: bool,
    available: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    kind: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
}

/// Prints the list.
pub(super) fn list(
    arguments: &ListArguments,
    suites: &[&'static Suite],
    machines: &Machines,
) -> Result<ExitCode, Failure> {
    let mut out = io::stdout().lock();
    if arguments.machines {
        return list_machines(arguments.format, machines, &mut out);
    }
    let plan = Plan::new(suites, Vec::new(), &patterns(&arguments.patterns), &[])?;
    match arguments.format {
        Format::Pretty => {
            for (suite, _) in plan.suites() {
                writeln!(out, "{}: {}", suite.name, first_sentence(suite.doc))?;
                for claim in plan.claims.iter().filter(|claim| claim.suite.name == suite.name) {
                    writeln!(out, "  {}", claim.name)?;
                }
            }
        }
        Format::Json => {
            let list = TestList { schema: "gmemtest-tests/1", tests: plan.claims.iter().map(listed).collect() };
            serde_json::to_writer_pretty(&mut out, &list).map_err(io::Error::from)?;
            writeln!(out)?;
        }
    }
    Ok(ExitCode::from(GOOD))
}

/// `--list` of a selftest binary: bare names, one a line.
pub(super) fn names(arguments: &RunArguments, suites: &[&'static Suite]) -> Result<ExitCode, Failure> {
    let plan = Plan::new(suites, Vec::new(), &patterns(&arguments.patterns), &patterns(&arguments.exclude))?;
    let mut out = io::stdout().lock();
    for claim in &plan.claims {
        writeln!(out, "{}", claim.name)?;
    }
    Ok(ExitCode::from(GOOD))
}

fn listed(claim: &Claim) -> ListedTest<'_> {
    ListedTest {
        name: &claim.name,
        suite: claim.suite.name,
        doc: claim.test.doc.lines().map(str::trim).collect::<Vec<_>>().join(" ").trim().to_owned(),
        needs: claim.suite.needs.iter().chain(claim.test.needs).map(|need| need.name()).collect(),
        timeout_s: claim.test.timeout.map(|timeout| timeout.as_secs()),
        alone: claim.test.sharing == Sharing::Alone,
    }
}

fn list_machines(format: Format, machines: &Machines, out: &mut impl Write) -> Result<ExitCode, Failure> {
    let auto = (machines.auto)();
    let list: Vec<ListedMachine> = super::machines::SPECS
        .iter()
        .map(|spec| {
            let opened = spec.parse().map_err(|_| Stop::fail("not a spec")).and_then(|spec| (machines.open)(&spec));
            let (kind, reason) = match &opened {
                Ok(_) => (None, None),
                Err(Stop::Skip { kind, reason }) => (Some(kind.word()), Some(reason.clone())),
                Err(Stop::Fail(failure)) => (None, Some(failure.message.clone())),
            };
            let auto = auto.iter().any(|chosen| chosen.to_string() == *spec);
            ListedMachine { spec: (*spec).to_owned(), auto, available: opened.is_ok(), kind, reason }
        })
        .collect();
    match format {
        Format::Pretty => {
            for machine in &list {
                let auto = if machine.auto { "auto" } else { "" };
                let state = match (&machine.kind, &machine.reason) {
                    (Some(kind), Some(reason)) => format!("{kind}: {reason}"),
                    (None, Some(reason)) => reason.clone(),
                    _ => "available".to_owned(),
                };
                writeln!(out, "{:<18} {auto:<5} {state}", machine.spec)?;
            }
        }
        Format::Json => {
            serde_json::to_writer_pretty(&mut *out, &MachineList { schema: "gmemtest-machines/1", machines: list })
                .map_err(io::Error::from)?;
            writeln!(out)?;
        }
    }
    Ok(ExitCode::from(GOOD))
}

fn first_sentence(doc: &str) -> String {
    let text = doc.lines().map(str::trim).collect::<Vec<_>>().join(" ");
    let text = text.trim();
    text.split_once(". ").map_or(text, |(first, _)| first).trim_end_matches('.').to_owned()
}
