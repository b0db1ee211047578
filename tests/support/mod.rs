//! What the tests of gmemtest share.

#![allow(dead_code, reason = "every test binary uses a part of it")]

pub mod ktap;

use std::process::{Command, Output};

use gmemtest::harness::Record;
use gmemtest::report::Document;

/// The selftest binary whose tests misbehave.
pub fn fixture() -> Command {
    Command::new(env!("CARGO_BIN_EXE_harness_fixture"))
}

/// The `gmemtest` command.
pub fn gmemtest() -> Command {
    Command::new(env!("CARGO_BIN_EXE_gmemtest"))
}

/// Runs a command to its end.
pub fn output(command: &mut Command) -> Output {
    command.output().expect("the binary under test can be started")
}

/// Standard output as text.
pub fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).expect("standard output is text")
}

/// Standard error as text.
pub fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).expect("standard error is text")
}

/// The exit code.
pub fn code(output: &Output) -> i32 {
    output.status.code().expect("the binary under test exits by itself")
}

/// What makes a run go one test at a time, unless the arguments say how many.
pub fn sequential(arguments: &[&str]) -> &'static [&'static str] {
    if arguments.contains(&"--jobs") { &[] } else { &["--jobs", "1"] }
}

/// Runs the fixture with `--format json`, one test at a time unless the arguments say otherwise, and reads what it says.
pub fn document(arguments: &[&str]) -> (Document, i32) {
    let output = output(fixture().args(arguments).args(sequential(arguments)).args(["--format", "json"]));
    let document = Document::parse(&stdout(&output)).unwrap_or_else(|error| panic!("{error}\n{}", stderr(&output)));
    (document, code(&output))
}

/// The result of a claim.
pub fn record<'a>(document: &'a Document, name: &str) -> &'a Record {
    document.results.iter().find(|record| record.name == name).unwrap_or_else(|| panic!("no result of {name}"))
}
