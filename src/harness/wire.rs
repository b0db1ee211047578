//! What the process of a test tells the runner, over a pipe of its own: one JSON object a line.

use std::fs::File;
use std::io::Write;
use std::sync::Mutex;

use serde::{Deserialize, Serialize};

use super::Notes;

/// Environment variable with the number of the descriptor that messages go to.
pub const FD_VARIABLE: &str = "GMEMTEST_RESULT_FD";
/// Environment variable with the number of the test in its run; inherited by whatever the test starts, so that a process
/// that left the test's process group can still be laid at its door.
pub const TEST_VARIABLE: &str = "GMEMTEST_TEST";
/// First argument of the internal mode: `__claim NAME MACHINE SEED`.
pub const CLAIM_ARGUMENT: &str = "__claim";

/// One message.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Message {
    /// The machine is open and the test starts now.
    Begin {
        /// The kernel release whose behaviour the machine shows.
        release: String,
    },
    /// A remark.
    Note(String),
    /// The machine lacks what the claim needs: the skip that follows is that of every claim with this need.
    Lacks {
        /// The facility's name.
        facility: String,
    },
    /// The last message.
    Verdict {
        /// What the test returned.
        verdict: Verdict,
        /// Microseconds in the test's function.
        micros: u64,
    },
}

/// What a test returned.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// `Ok(())`.
    Pass,
    /// [`super::Stop::Fail`], or a panic.
    Fail {
        /// The message without the location.
        message: String,
        /// `file:line`.
        location: String,
    },
    /// [`super::Stop::Skip`].
    Skip {
        /// The word of the kind.
        kind: String,
        /// The reason.
        reason: String,
    },
    /// The harness's own part failed in the test's process.
    Error {
        /// What failed.
        message: String,
    },
}

/// The writing end in the test's process.
#[derive(Debug)]
pub struct Wire(Mutex<File>);

impl Wire {
    /// Messages go to `file`.
    pub fn new(file: File) -> Wire {
        Wire(Mutex::new(file))
    }

    /// Writes one message. When the runner is gone there is nobody to tell, and the parent-death signal is on its way.
    pub fn send(&self, message: &Message) {
        if let Ok(mut line) = serde_json::to_vec(message) {
            line.push(b'\n');
            let mut file = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            let _ = file.write_all(&line);
        }
    }
}

impl Notes for Wire {
    fn note(&self, text: String) {
        self.send(&Message::Note(text));
    }
}

/// Messages of `bytes`, up to the first line that is not one: a process that died may have cut its last line short.
pub fn parse(bytes: &[u8]) -> Vec<Message> {
    bytes.split(|&byte| byte == b'\n').map_while(|line| serde_json::from_slice(line).ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_that_was_cut_short_ends_the_messages() {
        let mut bytes = Vec::new();
        for message in [Message::Begin { release: "7.3.0".to_owned() }, Message::Note("two\nlines".to_owned())] {
            bytes.extend(serde_json::to_vec(&message).unwrap());
            bytes.push(b'\n');
        }
        bytes.extend_from_slice(b"{\"verdict\":{\"verd");
        assert_eq!(parse(&bytes)[1..], [Message::Note("two\nlines".to_owned())]);
    }
}
