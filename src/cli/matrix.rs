//! `gmemtest matrix`: the same tests on several kernels, as a table.

use std::fs::File;
use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, ValueEnum};

use super::failure::Failure;
use super::machines::Machines;
use super::vm::{BootArguments, tests_for_guest};
use crate::harness::Suite;
use crate::harness::exit::{FAILED, GOOD};
use crate::rig::{BootImage, Column, Matrix, StopSignal};

/// The flags of `matrix`.
#[derive(Debug, Args)]
pub(super) struct MatrixArguments {
    /// A kernel, as for `vm`; once for each column, in their order. Modules are taken from where packages put them beside
    /// the kernel.
    #[arg(long, value_name = "BZIMAGE", required = true)]
    kernel: Vec<PathBuf>,
    #[command(flatten)]
    boot: BootArguments,
    /// Most boots at a time (default: as many as the host has cores for).
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    boots: Option<u16>,
    /// Format of the table; json has every result of every kernel.
    #[arg(long, value_enum, default_value_t)]
    format: Format,
    /// File for the JSON of all; standard output then shows the table.
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// The `run` for every kernel, with its flags (default: run).
    #[arg(last = true, value_name = "COMMAND")]
    command: Vec<String>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
enum Format {
    #[default]
    Pretty,
    Json,
}

/// Runs the matrix.
pub(super) fn matrix(
    arguments: &MatrixArguments,
    suites: &[&'static Suite],
    machines: &Machines,
) -> Result<ExitCode, Failure> {
    let run = tests_for_guest("matrix", &arguments.command, suites, machines)?;
    let images = arguments.kernel.iter().map(|path| BootImage::read(path));
    let images = images.collect::<Result<Vec<BootImage>, _>>().map_err(|error| error.to_string())?;
    let (hardware, machine) = arguments.boot.hardware()?;
    let output = arguments.output.as_ref().map(|path| {
        File::create(path).map_err(|error| format!("--output {}: cannot be written: {error}", path.display()))
    });
    let output = output.transpose()?;
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let at_once = arguments.boots.map_or_else(|| (cores / hardware.cpus as usize).max(1), usize::from);
    eprintln!("gmemtest: {} kernels {machine}, {at_once} at a time", images.len());
    let stop = StopSignal::block().map_err(|errno| format!("signals cannot be blocked: {errno}"))?;
    let table = Matrix {
        images: &images,
        hardware: &hardware,
        timeout: arguments.boot.timeout,
        at_once,
        suites,
        words: &|rest| run.words(rest),
        stop: &stop,
    }
    .run(&tell);
    if let Some(mut file) = output {
        serde_json::to_writer_pretty(&mut file, &table).map_err(io::Error::from)?;
        file.write_all(b"\n")?;
    }
    let mut out = io::stdout().lock();
    match arguments.format {
        Format::Json if arguments.output.is_none() => {
            serde_json::to_writer_pretty(&mut out, &table).map_err(io::Error::from)?;
            writeln!(out)?;
        }
        Format::Json | Format::Pretty => write!(out, "{table}")?,
    }
    out.flush()?;
    Ok(match stop.seen() {
        Some(signal) => ExitCode::from(128u8.saturating_add(u8::try_from(signal).unwrap_or(127))),
        None => ExitCode::from(if table.is_good() { GOOD } else { FAILED }),
    })
}

fn tell(column: &Column) {
    let counts = match column.summary() {
        Some(summary) => format!("{} passed, {} failed, {} skipped", summary.pass, summary.failures(), summary.skip),
        None => "no result".to_owned(),
    };
    let trouble = column.trouble.as_ref().map(|trouble| format!("; {trouble}")).unwrap_or_default();
    eprintln!("gmemtest: {}: {counts}{trouble}", column.release);
}
