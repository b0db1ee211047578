//! `gmemtest seam`: runs SEAMCALL scripts against the simulated TDX module.

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;

use super::failure::Failure;
use crate::harness::exit::{FAILED, GOOD, USAGE};
use crate::script::seam;

/// The flags of `seam`.
#[derive(Debug, Args)]
pub(super) struct SeamArguments {
    /// SEAMCALL scripts, as docs/seam-scripts.md describes them.
    #[arg(value_name = "FILE", required = true)]
    files: Vec<PathBuf>,
}

/// What became of all files.
#[derive(Default)]
struct Totals {
    passed: usize,
    failed: usize,
    malformed: usize,
    tests: usize,
    expectations: u64,
}

/// Runs every file, prints one line each and the totals.
///
/// The exit code is 0 when every expectation held, 1 when one did not, 2 when a file could not be run.
pub(super) fn seam(arguments: &SeamArguments) -> Result<ExitCode, Failure> {
    let mut out = io::stdout().lock();
    let mut totals = Totals::default();
    for path in &arguments.files {
        let file = path.display();
        let result = seam::read(path).map_err(seam::Failure::Script).and_then(|script| seam::run(&script));
        match result {
            Ok(summary) => {
                let seam::Summary { tests, expectations, .. } = &summary;
                writeln!(out, "pass   {file}: {} tests, {expectations} expectations", tests.len())?;
                totals.passed += 1;
                totals.tests += tests.len();
                totals.expectations += expectations;
            }
            Err(seam::Failure::Mismatch(mismatch)) => {
                writeln!(out, "fail   {mismatch}")?;
                totals.failed += 1;
            }
            Err(seam::Failure::Script(error)) => {
                out.flush()?;
                eprintln!("gmemtest: {error}");
                totals.malformed += 1;
            }
        }
    }
    let Totals { passed, failed, malformed, tests, expectations } = totals;
    writeln!(
        out,
        "{passed} passed, {failed} failed, {malformed} malformed; {tests} tests, {expectations} expectations in what passed"
    )?;
    Ok(ExitCode::from(match (malformed, failed) {
        (0, 0) => GOOD,
        (0, _) => FAILED,
        _ => USAGE,
    }))
}
