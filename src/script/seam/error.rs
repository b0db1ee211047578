//! What is wrong with a script, and how to mend it.

use std::fmt;

/// A script that cannot be run: malformed text, an unknown name, a statement that makes no sense where it stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ScriptError {
    /// The file as named by the caller.
    pub file: String,
    /// The line, counted from 1; 0 when the file as a whole is meant.
    pub line: usize,
    /// What is wrong, naming the offending word.
    pub what: String,
    /// What to write instead.
    pub mend: String,
}

impl fmt::Display for ScriptError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            0 => write!(f, "{}: {}; {}", self.file, self.what, self.mend),
            line => write!(f, "{}:{line}: {}; {}", self.file, self.what, self.mend),
        }
    }
}

impl std::error::Error for ScriptError {}

/// What is wrong and the mend, before file and line are known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Complaint {
    pub what: String,
    pub mend: String,
}

impl Complaint {
    pub(crate) fn new(what: impl Into<String>, mend: impl Into<String>) -> Complaint {
        Complaint { what: what.into(), mend: mend.into() }
    }

    pub(crate) fn at(self, file: &str, line: usize) -> ScriptError {
        ScriptError { file: file.to_string(), line, what: self.what, mend: self.mend }
    }
}
