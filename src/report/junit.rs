//! JUnit's XML, written at the end: a `testsuite` for each suite on each machine, a `testcase` for each claim.
//!
//! An assertion that did not hold, and a pass that is tainted, is a `failure`; a crash, a time limit, a failure of the
//! harness and a claim that was not run is an `error`; a skip and a known issue is `skipped`, because JUnit has no word for
//! a failure that was expected. The `type` tells them apart.

use std::io::{self, Write};
use std::time::Duration;

use quick_junit::{NonSuccessKind, Property, Report, TestCase, TestCaseStatus, TestSuite};

use super::json::{Document, Gathered, NotRun};
use super::story;
use crate::harness::event::{Event, Listener};
use crate::harness::{Outcome, Record};

/// Writes JUnit's XML.
pub struct Junit<W> {
    out: W,
    gathered: Gathered,
}

impl<W: Write> Junit<W> {
    /// Writes to `out`.
    pub fn new(out: W) -> Junit<W> {
        Junit { out, gathered: Gathered::default() }
    }
}

impl<W: Write> Listener for Junit<W> {
    fn hear(&mut self, event: &Event<'_>) -> io::Result<()> {
        if !self.gathered.take(event) {
            return Ok(());
        }
        if let Some(document) = &self.gathered.document {
            report(document).serialize(&mut self.out).map_err(io::Error::other)?;
            writeln!(self.out)?;
        }
        self.out.flush()
    }
}

fn report(document: &Document) -> Report {
    let mut report = Report::new("gmemtest");
    report.set_time(Duration::from_micros(document.elapsed_us));
    let mut suites: Vec<TestSuite> = Vec::new();
    let results = document.results.iter().map(|record| (suite_name(document, record), test_case(record)));
    let not_run = document.not_run.iter().map(|planned| (suite_of(document, planned), not_run_case(document, planned)));
    for (name, case) in results.chain(not_run) {
        let at = suites.iter().position(|suite| suite.name.as_str() == name).unwrap_or_else(|| {
            let mut suite = TestSuite::new(name);
            suite.add_properties(properties(document));
            suites.push(suite);
            suites.len() - 1
        });
        suites[at].add_test_case(case);
    }
    report.add_test_suites(suites);
    report
}

fn suite_name(document: &Document, record: &Record) -> String {
    name_of_suite(document, &record.name, &record.machine, record.round)
}

fn suite_of(document: &Document, planned: &NotRun) -> String {
    name_of_suite(document, &planned.name, &planned.machine, planned.round)
}

/// The machine is part of the name, so that no result can be taken for one of another machine.
fn name_of_suite(document: &Document, claim: &str, machine: &str, round: u64) -> String {
    let suite = split(claim).0;
    if document.rounds == Some(1) {
        format!("{machine}/{suite}")
    } else {
        format!("{machine}/{suite}/round-{}", round + 1)
    }
}

fn split(name: &str) -> (&str, &str) {
    name.split_once("::").unwrap_or(("", name))
}

fn test_case(record: &Record) -> TestCase {
    let (suite, claim) = split(&record.name);
    let mut status = match record.outcome {
        Outcome::Pass => TestCaseStatus::success(),
        Outcome::Skip | Outcome::Known => TestCaseStatus::skipped(),
        Outcome::Fail | Outcome::Tainted => TestCaseStatus::non_success(NonSuccessKind::Failure),
        Outcome::Timeout | Outcome::Crash | Outcome::Error => TestCaseStatus::non_success(NonSuccessKind::Error),
    };
    if record.outcome != Outcome::Pass {
        let kind = record.skip.as_ref().map_or(record.outcome.word(), |skip| &skip.kind);
        status.set_type(kind).set_message(record.headline()).set_description(story::details(record).join("\n"));
    }
    let mut case = TestCase::new(claim, status);
    case.set_classname(suite).set_time(Duration::from_micros(record.duration_us));
    case.add_property(Property::new("machine", record.machine.as_str()));
    case.add_property(Property::new("seed", record.seed.as_str()));
    if let Some(issue) = &record.known_issue {
        case.add_property(Property::new("known-issue", issue.as_str()));
    }
    if !record.stdout.is_empty() {
        case.set_system_out(record.stdout.text.as_str());
    }
    if !record.stderr.is_empty() {
        case.set_system_err(record.stderr.text.as_str());
    }
    case
}

fn not_run_case(document: &Document, planned: &NotRun) -> TestCase {
    let (suite, claim) = split(&planned.name);
    let mut status = TestCaseStatus::non_success(NonSuccessKind::Error);
    status.set_type("not-run").set_message(document.stopped.as_deref().unwrap_or("the run ended early"));
    let mut case = TestCase::new(claim, status);
    case.set_classname(suite);
    case
}

fn properties(document: &Document) -> Vec<Property> {
    let environment = &document.environment;
    let mut properties = vec![
        Property::new("tool", format!("{} {}", document.tool.name, document.tool.version)),
        Property::new("arguments", document.arguments.join(" ")),
        Property::new("seed", document.seed.as_str()),
        Property::new("started", document.started.to_string()),
        Property::new("kernel-release", environment.kernel_release.as_str()),
        Property::new("kernel-version", environment.kernel_version.as_str()),
        Property::new("command-line", environment.command_line.as_str()),
        Property::new("boot-id", environment.boot_id.as_str()),
        Property::new("cpu-model", environment.cpu_model.as_str()),
        Property::new("taint", environment.taint.to_string()),
    ];
    if let Some(config) = &environment.config {
        properties.push(Property::new("config-sha256", config.sha256.as_str()));
        let set: Vec<String> = config.options.iter().map(|(name, value)| format!("{name}={value}")).collect();
        properties.push(Property::new("config", set.join(" ")));
    }
    for (module, parameters) in &environment.module_parameters {
        let set: Vec<String> = parameters.iter().map(|(name, value)| format!("{name}={value}")).collect();
        properties.push(Property::new(format!("module-{module}"), set.join(" ")));
    }
    properties
}
