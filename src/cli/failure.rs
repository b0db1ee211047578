//! A command line that cannot be carried out: one line, and the exit code for it.

use std::process::ExitCode;

use crate::harness::exit::{ExitStyle, GOOD};

/// Why a command line cannot be carried out.
#[derive(Debug)]
pub(super) enum Failure {
    /// One line that names the input and the mend.
    Usage(String),
    /// Not a failure: `--help` or `--version`.
    Shown(clap::Error),
}

impl Failure {
    /// Prints it and gives the exit code.
    pub(super) fn report(self, style: ExitStyle) -> ExitCode {
        match self {
            Failure::Usage(line) => {
                eprintln!("gmemtest: {line}");
                ExitCode::from(style.usage())
            }
            Failure::Shown(text) => match text.print() {
                Ok(()) => ExitCode::from(GOOD),
                Err(_) => ExitCode::from(style.usage()),
            },
        }
    }
}

impl From<String> for Failure {
    fn from(line: String) -> Failure {
        Failure::Usage(line)
    }
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Failure {
        Failure::Usage(format!("cannot write the results: {error}"))
    }
}

impl From<clap::Error> for Failure {
    fn from(error: clap::Error) -> Failure {
        use clap::error::ErrorKind;
        match error.kind() {
            ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => Failure::Shown(error),
            _ => Failure::Usage(one_line(&error.to_string())),
        }
    }
}

/// clap's error without its usage text, on one line.
fn one_line(text: &str) -> String {
    let text = text.strip_prefix("error: ").unwrap_or(text);
    let end = ["\n\nUsage:", "\n\nFor more information"].iter().filter_map(|mark| text.find(mark)).min();
    let lines: Vec<&str> =
        text[..end.unwrap_or(text.len())].lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    format!("{}; try --help", lines.join("; ").replace(":; ", ": "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clap_speaks_in_one_line() {
        let text = "error: unexpected argument '--jbos' found\n\n  tip: a similar argument exists: '--jobs'\n\nUsage: gmemtest run\n\nFor more information, try '--help'.\n";
        assert_eq!(
            one_line(text),
            "unexpected argument '--jbos' found; tip: a similar argument exists: '--jobs'; try --help"
        );
    }
}
