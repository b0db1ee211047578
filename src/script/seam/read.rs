//! From a file to a script.

use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use super::ast::Script;
use super::error::ScriptError;
use super::parse::parse;

/// Reads and parses a script.
///
/// # Errors
/// A file that cannot be read or is not text, or the first mistake in it.
pub fn read(path: &Path) -> Result<Script, ScriptError> {
    let file = path.display().to_string();
    let wrong = |line: usize, what: &str, mend: &str| ScriptError {
        file: file.clone(),
        line,
        what: what.to_string(),
        mend: mend.to_string(),
    };
    let bytes = fs::read(path).map_err(|error| match error.kind() {
        ErrorKind::NotFound => wrong(0, "there is no such file", "name a SEAMCALL script, such as tests/seam/abi.seam"),
        ErrorKind::IsADirectory => wrong(0, "is a directory", "name the scripts in it, such as tests/seam/*.seam"),
        _ => wrong(0, &format!("cannot be read: {error}"), "make it readable"),
    })?;
    let line_of = |at: usize| 1 + bytes[..at].iter().filter(|byte| **byte == b'\n').count();
    let text = std::str::from_utf8(&bytes).map_err(|error| {
        wrong(line_of(error.valid_up_to()), "is not UTF-8 text", "name a SEAMCALL script, which is a text file")
    })?;
    if let Some(at) = bytes.iter().position(|byte| *byte < b' ' && !matches!(byte, b'\n' | b'\r' | b'\t')) {
        return Err(wrong(line_of(at), "holds a control character", "name a SEAMCALL script, which is a text file"));
    }
    parse(&file, text)
}
