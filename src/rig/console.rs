//! What the kernel under test wrote to its console: its end, its panic, and its complaints.

use std::io::{self, Write};

/// Bytes of the console that are kept for reports.
const KEPT: usize = 256 << 10;
/// Lines that begin a report of something gone wrong; the same words that xfstests and rcutorture look for.
const COMPLAINTS: [&str; 15] = [
    "BUG:",
    "kernel BUG at",
    "WARNING:",
    "Oops",
    "general protection fault",
    "KASAN:",
    "UBSAN:",
    "KCSAN:",
    "rcu: INFO: rcu_",
    "possible recursive locking",
    "possible circular locking",
    "suspicious RCU usage",
    "Bad page state",
    "soft lockup",
    "blocked for more than",
];
/// Words of a complaint that say that nothing is wrong.
const HARMLESS: [&str; 1] = ["This means that this is a DEBUG kernel"];

/// The console so far.
#[derive(Debug, Default)]
pub struct Console {
    kept: Vec<u8>,
    total: u64,
    copy: Option<Copy>,
}

#[derive(Debug)]
struct Copy {
    file: std::fs::File,
    failed: Option<io::Error>,
}

impl Console {
    /// An empty console; every byte also goes to `file` when there is one.
    pub fn new(file: Option<std::fs::File>) -> Console {
        Console { kept: Vec::new(), total: 0, copy: file.map(|file| Copy { file, failed: None }) }
    }

    /// Takes what the kernel wrote. A file that cannot be written is not written further; [`Console::copy_error`] tells.
    pub fn push(&mut self, bytes: &[u8]) {
        self.total += bytes.len() as u64;
        self.kept.extend_from_slice(bytes);
        if self.kept.len() > 2 * KEPT {
            self.kept.drain(..self.kept.len() - KEPT);
        }
        if let Some(copy) = self.copy.as_mut().filter(|copy| copy.failed.is_none())
            && let Err(error) = copy.file.write_all(bytes)
        {
            copy.failed = Some(error);
        }
    }

    /// Why the copy is not complete.
    pub fn copy_error(&self) -> Option<&io::Error> {
        self.copy.as_ref()?.failed.as_ref()
    }

    /// Whether the kernel wrote nothing at all.
    pub fn is_silent(&self) -> bool {
        self.total == 0
    }

    /// Bytes written so far.
    pub fn total(&self) -> u64 {
        self.total
    }

    /// The lines that are kept, without carriage returns and escape sequences.
    pub fn lines(&self) -> Vec<String> {
        String::from_utf8_lossy(&self.kept).lines().map(plain).filter(|line| !line.is_empty()).collect()
    }

    /// The last `count` lines.
    pub fn tail(&self, count: usize) -> Vec<String> {
        let mut lines = self.lines();
        lines.drain(..lines.len().saturating_sub(count));
        lines
    }

    /// The reason of a panic, without the words around it.
    pub fn panic(&self) -> Option<String> {
        self.lines().iter().find_map(|line| {
            let (_, reason) = line.split_once("Kernel panic - not syncing")?;
            Some(reason.trim_start_matches([':', ' ']).to_owned())
        })
    }

    /// The lines that begin a complaint.
    pub fn complaints(&self) -> Vec<String> {
        let is_complaint = |line: &String| {
            COMPLAINTS.iter().any(|words| line.contains(words)) && !HARMLESS.iter().any(|words| line.contains(words))
        };
        self.lines().into_iter().filter(is_complaint).collect()
    }
}

/// A line without control characters and without the escape sequences that firmware writes.
fn plain(line: &str) -> String {
    let mut text = String::new();
    let mut characters = line.chars().peekable();
    while let Some(character) = characters.next() {
        match character {
            '\x1b' => {
                // ESC c, or ESC [ parameters letter.
                if characters.next() == Some('[') {
                    while characters.next().is_some_and(|c| !c.is_ascii_alphabetic()) {}
                }
            }
            '\t' => text.push(' '),
            c if c.is_control() => {}
            c => text.push(c),
        }
    }
    text.trim_end().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_found_by_its_reason() {
        let mut console = Console::default();
        console.push(
            b"\x1bc\x1b[?7l\x1b[2J[    1.2] Linux\r\n[    2.0] Kernel panic - not syncing: sysrq triggered crash\r\n",
        );
        console.push(b"[    2.1] CPU: 0 PID: 77\r\n");
        assert_eq!(console.panic().as_deref(), Some("sysrq triggered crash"));
        assert_eq!(console.tail(1), ["[    2.1] CPU: 0 PID: 77"]);
        assert_eq!(console.lines()[0], "[    1.2] Linux");
    }

    #[test]
    fn complaints_are_the_lines_that_begin_one() {
        let mut console = Console::default();
        console.push(b"[ 1.0] WARNING: CPU: 0 PID: 1 at mm/memory.c:1 f+0x1/0x2\n[ 1.1] ** This means that this is a DEBUG kernel **\n[ 1.2] fine\n");
        assert_eq!(console.complaints().len(), 1);
        assert!(console.panic().is_none());
    }

    #[test]
    fn a_long_console_keeps_its_end() {
        let mut console = Console::default();
        for number in 0..200_000 {
            console.push(format!("line {number}\n").as_bytes());
        }
        assert_eq!(console.tail(1), ["line 199999"]);
        assert!(console.lines().len() < 100_000);
    }

    #[test]
    fn a_full_disk_is_told_and_the_console_goes_on() {
        let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
        let mut console = Console::new(Some(full));
        console.push(b"one\n");
        console.push(b"two\n");
        assert!(console.copy_error().is_some());
        assert_eq!(console.lines(), ["one", "two"]);
    }
}
