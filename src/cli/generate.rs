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

/// The flags of `man`.
#[derive(Debug, Args)]
pub(super) struct ManArguments {
    /// The subcommand whose page is wanted; the command's own when none is given.
    subcommand: Option<String>,
}

/// Prints a manual page.
pub(super) fn man(arguments: &ManArguments, mut command: clap::Command) -> Result<ExitCode, Failure> {
    command.build();
    let page = match &arguments.subcommand {
        None => command,
        Some(name) => {
            let found = command.find_subcommand(name).cloned();
            found.ok_or_else(|| format!("no subcommand '{name}'; try --help"))?
        }
    };
    clap_mangen::Man::new(page).render(&mut io::stdout().lock())?;
    Ok(ExitCode::from(GOOD))
}
