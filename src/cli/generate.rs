//! Shell completions and the manual page, both generated from the command line's definition.

use std::io;
use std::process::ExitCode;

use clap::Args;

use super::failure::Failure;
use crate::harness::exit::GOOD;

/// The flags of `completions`.
#[derive(Debug, Args)]
pub(super) struct CompletionsArguments {
    /// The shell.
    shell: clap_complete::Shell,
}

/// Prints a completion script.
pub(super) fn completions(arguments: &CompletionsArguments, mut command: clap::Command) -> Result<ExitCode, Failure> {
    clap_complete::generate(arguments.shell, &mut command, "gmemtest", &mut io::stdout().lock());
    Ok(ExitCode::from(GOOD))
}

/// Prints the manual page.
pub(super) fn man(command: clap::Command) -> Result<ExitCode, Failure> {
    clap_mangen::Man::new(command).render(&mut io::stdout().lock())?;
    Ok(ExitCode::from(GOOD))
}
