//! `gmemtest list`: the names of the tests, what they claim and what they need.

use std::io::{self, Write};
use std::process::ExitCode;

use clap::{Args, ValueEnum};
use serde::Serialize;

use super::failure::Failure;
use super::list_machines;
use super::machines::Machines;
use super::run::{RunArguments, patterns};
use crate::harness::exit::GOOD;
use crate::harness::plan::{Claim, Plan};
use crate::harness::{Sharing, Suite};

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

/// Prints the list.
pub(super) fn list(
    arguments: &ListArguments,
    suites: &[&'static Suite],
    machines: &Machines,
) -> Result<ExitCode, Failure> {
    let mut out = io::stdout().lock();
    if arguments.machines {
        match arguments.format {
            Format::Pretty => list_machines::pretty(machines, &mut out)?,
            Format::Json => list_machines::json(machines, &mut out)?,
        }
        return Ok(ExitCode::from(GOOD));
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

fn first_sentence(doc: &str) -> String {
    let text = doc.lines().map(str::trim).collect::<Vec<_>>().join(" ");
    let text = text.trim();
    text.split_once(". ").map_or(text, |(first, _)| first).trim_end_matches('.').to_owned()
}
