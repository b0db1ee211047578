//! `gmemtest compare`: two results side by side.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, ValueEnum};

use super::failure::Failure;
use crate::harness::exit::{FAILED, GOOD};
use crate::report::{Across, Comparison, Criteria, Document};

/// The flags of `compare`.
#[derive(Debug, Args)]
pub(super) struct CompareArguments {
    /// The earlier result: JSON of `run --format json`.
    #[arg(value_name = "A.json")]
    before: PathBuf,
    /// The later result.
    #[arg(value_name = "B.json")]
    after: PathBuf,
    /// Tell of tests that take more than FACTOR times as long.
    #[arg(long, value_name = "FACTOR", value_parser = factor)]
    slower: Option<f64>,
    /// Compare a simulated machine with a real one.
    #[arg(long)]
    across_machines: bool,
    /// Format of the comparison.
    #[arg(long, value_enum, default_value_t)]
    format: Format,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
enum Format {
    #[default]
    Pretty,
    Json,
}

fn factor(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(factor) if factor > 1.0 && f64::is_finite(factor) => Ok(factor),
        _ => Err("expected a number above 1, such as 2 or 1.5".to_owned()),
    }
}

/// Compares.
pub(super) fn compare(arguments: &CompareArguments) -> Result<ExitCode, Failure> {
    let (before, after) = (read(&arguments.before)?, read(&arguments.after)?);
    let across = if arguments.across_machines { Across::Allowed } else { Across::Refused };
    let comparison = Comparison::new(&before, &after, Criteria { slower: arguments.slower, across })?;
    let mut out = io::stdout().lock();
    match arguments.format {
        Format::Pretty => write!(out, "{comparison}")?,
        Format::Json => {
            serde_json::to_writer_pretty(&mut out, &comparison).map_err(io::Error::from)?;
            writeln!(out)?;
        }
    }
    out.flush()?;
    Ok(ExitCode::from(if comparison.is_worse() { FAILED } else { GOOD }))
}

/// A results document.
pub(super) fn read(path: &Path) -> Result<Document, Failure> {
    let text = fs::read_to_string(path).map_err(|error| format!("{}: cannot be read: {error}", path.display()))?;
    Document::parse(&text).map_err(|error| format!("{}: {error}", path.display()).into())
}
