//! `gmemtest policies`: every answer to a failed unmap, side by side.

use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, ValueEnum};

use super::failure::Failure;
use crate::harness::exit::GOOD;
use crate::report::policies::text::Colour;
use crate::report::policies::{Comparison, html, text};

/// The flags of `policies`.
#[derive(Debug, Args)]
pub(super) struct PoliciesArguments {
    /// Format of the comparison.
    #[arg(long, value_enum, default_value_t)]
    format: Format,
    /// Write it to a file instead of standard output.
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
enum Format {
    /// Tables for a terminal.
    #[default]
    Pretty,
    /// Every number.
    Json,
    /// One page with charts.
    Html,
}

/// Runs `policies`.
pub(super) fn policies(options: &PoliciesArguments) -> Result<ExitCode, Failure> {
    let colour = match options.output {
        None if io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none() => Colour::Ansi,
        _ => Colour::Plain,
    };
    // An output that cannot be written is found out before the work is done.
    let file = match &options.output {
        None => None,
        Some(path) => {
            let created = std::fs::File::create(path);
            Some(created.map_err(|error| format!("cannot write {}: {error}", path.display()))?)
        }
    };
    let comparison = Comparison::measure().map_err(|why| format!("the model failed: {why}"))?;
    let rendered = match options.format {
        Format::Pretty => text::render(&comparison, colour),
        Format::Html => html::render(&comparison),
        Format::Json => {
            let json = serde_json::to_string_pretty(&comparison).map_err(io::Error::other)?;
            json + "\n"
        }
    };
    match file {
        Some(mut file) => file.write_all(rendered.as_bytes())?,
        None => io::stdout().lock().write_all(rendered.as_bytes())?,
    }
    Ok(ExitCode::from(GOOD))
}
