//! The command line: one file per subcommand. Results go to standard output, everything else to standard error.
//!
//! A selftest binary is `run` without the word: same flags, same exit codes, and `--list`.

mod bisect;
mod compare;
mod failure;
mod generate;
mod list;
mod list_machines;
pub mod machines;
mod matrix;
mod mutants;
mod policies;
mod probe;
mod run;
mod seam;
mod values;
mod vm;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};

use crate::harness::child::run_claim;
use crate::harness::exit::ExitStyle;
use crate::harness::{Suite, mutation, wire};
use crate::rig;
use failure::Failure;
use machines::Machines;

/// Selftests, model and rig for KVM guest_memfd and TDX private memory.
#[derive(Debug, Parser)]
#[command(name = "gmemtest", version, arg_required_else_help = false)]
struct Gmemtest {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run tests.
    Run(run::RunArguments),
    /// Print the names of the tests.
    List(list::ListArguments),
    /// Say what this kernel and this host offer, and what each missing piece would need.
    Probe(probe::ProbeArguments),
    /// Boot a kernel under QEMU and run a command in it.
    Vm(vm::VmArguments),
    /// Compare the answers to a private page that cannot be unmapped, measured on the model.
    Policies(policies::PoliciesArguments),
    /// Run SEAMCALL scripts against the simulated TDX module.
    Seam(seam::SeamArguments),
    /// Run tests on several kernels and show the outcomes as a table.
    Matrix(matrix::MatrixArguments),
    /// Find the first bad kernel, or the first bad commit of a kernel tree.
    Bisect(Box<bisect::BisectArguments>),
    /// Compare two results: what newly fails, what is fixed, what changed. Exits with 1 when anything newly fails.
    Compare(compare::CompareArguments),
    /// Run the tests against every switchable defect of the model. Exits with 1 when one survives.
    Mutants(mutants::MutantsArguments),
    /// Print a completion script for a shell.
    #[command(hide = true)]
    Completions(generate::CompletionsArguments),
    /// Print the manual page of a subcommand.
    #[command(hide = true)]
    Man(generate::ManArguments),
}

/// The `run` of a selftest binary.
#[derive(Debug, Parser)]
#[command(version)]
struct Selftest {
    /// Print the names of the tests instead of running them.
    #[arg(long)]
    list: bool,
    #[command(flatten)]
    run: run::RunArguments,
}

/// The `gmemtest` command: every subcommand, over `suites`.
pub fn main(suites: &[&'static Suite]) -> ExitCode {
    if rig::init::is_init() {
        rig::init::main();
    }
    let machines = &machines::EVERY;
    with_arguments(suites, machines, |arguments| {
        let parsed: Gmemtest = parse(&arguments)?;
        match parsed.command {
            Command::Run(options) => run::run(&options, suites, machines, &[program(&arguments), "run".to_owned()]),
            Command::List(options) => list::list(&options, suites, machines),
            Command::Probe(options) => probe::probe(&options, machines),
            Command::Matrix(options) => matrix::matrix(&options, suites, machines),
            Command::Bisect(options) => bisect::bisect(&options, suites, machines),
            Command::Compare(options) => compare::compare(&options),
            Command::Mutants(options) => mutants::mutants(&options, suites),
            Command::Vm(options) => vm::vm(&options, suites, machines),
            Command::Policies(options) => policies::policies(&options),
            Command::Seam(options) => seam::seam(&options),
            Command::Completions(options) => generate::completions(&options, Gmemtest::command()),
            Command::Man(options) => generate::man(&options, Gmemtest::command()),
        }
    })
}

/// The `main` of a selftest binary: `run` over `suites`.
pub fn selftest_main(suites: &[&'static Suite]) -> ExitCode {
    selftest_main_on(suites, &machines::EVERY)
}

/// [`selftest_main`] with machines of the caller's own.
pub fn selftest_main_on(suites: &[&'static Suite], machines: &Machines) -> ExitCode {
    with_arguments(suites, machines, |arguments| {
        let mut parsed: Selftest = parse(&arguments)?;
        if parsed.list {
            return list::names(&parsed.run, suites);
        }
        parsed.run.default_to_ktap();
        run::run(&parsed.run, suites, machines, &[program(&arguments)])
    })
}

/// How this program was called.
fn program(arguments: &[OsString]) -> String {
    arguments.first().map_or_else(|| "gmemtest".to_owned(), |name| name.to_string_lossy().into_owned())
}

/// Runs one claim when the runner started this process, else the command; a failure becomes its one line.
fn with_arguments(
    suites: &[&'static Suite],
    machines: &Machines,
    command: impl FnOnce(Vec<OsString>) -> Result<ExitCode, Failure>,
) -> ExitCode {
    let arguments: Vec<OsString> = std::env::args_os().collect();
    if arguments.get(1).is_some_and(|first| first == wire::CLAIM_ARGUMENT) {
        let rest: Vec<String> = arguments[2..].iter().map(|text| text.to_string_lossy().into_owned()).collect();
        return run_claim(&rest, suites, machines.open);
    }
    if arguments.get(1).is_some_and(|first| first == mutation::WORKER_ARGUMENT) {
        return mutation::worker(suites, machines.open);
    }
    let style = exit_style(&arguments);
    command(arguments).unwrap_or_else(|failure| failure.report(style))
}

/// The exit style, known even when the rest of the command line cannot be read: `git bisect run` takes a usage error's
/// usual 2 for "this revision is bad".
fn exit_style(arguments: &[OsString]) -> ExitStyle {
    let texts: Vec<&str> = arguments.iter().filter_map(|text| text.to_str()).collect();
    let asked = |style: &str| {
        texts.iter().any(|text| text.strip_prefix("--exit-style=") == Some(style))
            || texts.windows(2).any(|two| two == ["--exit-style", style])
    };
    match (asked("bisect"), asked("kselftest-runner")) {
        (true, _) => ExitStyle::Bisect,
        (false, true) => ExitStyle::KselftestRunner,
        (false, false) => ExitStyle::Kselftest,
    }
}

fn parse<T: CommandFactory + FromArgMatches>(arguments: &[OsString]) -> Result<T, Failure> {
    let matches = T::command().try_get_matches_from(arguments)?;
    Ok(T::from_arg_matches(&matches)?)
}
