//! Calls of git.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

/// What git said, on either stream.
pub(super) struct Said {
    pub(super) text: String,
    pub(super) success: bool,
}

/// Runs git in a directory, in English.
///
/// # Errors
/// When it cannot be started.
pub(super) fn said(directory: &Path, arguments: &[&str]) -> Result<Said> {
    let output = Command::new("git")
        .arg("-C")
        .arg(directory)
        .args(arguments)
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .output()
        .context("git cannot be started")?;
    let text = [output.stdout.as_slice(), output.stderr.as_slice()].concat();
    Ok(Said { text: String::from_utf8_lossy(&text).into_owned(), success: output.status.success() })
}

/// Runs git in a directory and gives what it said.
///
/// # Errors
/// When it fails, with what it said.
pub(super) fn git(directory: &Path, arguments: &[&str]) -> Result<String> {
    let said = said(directory, arguments)?;
    match said.success {
        true => Ok(said.text.trim().to_owned()),
        false => bail!("git {}: {}", arguments.join(" "), said.text.trim()),
    }
}
