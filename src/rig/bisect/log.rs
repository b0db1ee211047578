//! The verdicts of a bisection, on disk: an interrupted one goes on from there.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use super::{Judged, Verdict};

/// What a bisection is about; a log is taken up only by the same one.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Header {
    /// `gmemtest-bisect/2`.
    pub schema: String,
    /// Paths of the images in order, or the tree with the good and the bad revision.
    pub subjects: Vec<String>,
    /// What revisions are built with: the configuration and its fragments; nothing for images.
    pub build: Vec<String>,
    /// What the machine is made of.
    pub machine: String,
    /// The tests.
    pub command: Vec<String>,
    /// The four rates: failing, noise, false bad, false good.
    pub rates: [f64; 4],
}

/// An open log.
#[derive(Debug)]
pub struct Log {
    path: PathBuf,
    file: File,
    verdicts: BTreeMap<String, Judged>,
}

impl Log {
    /// Makes the log, or takes up one of the same bisection.
    ///
    /// # Errors
    /// When the file cannot be read or written, or is of another bisection.
    pub fn open(path: &Path, header: &Header) -> Result<Log> {
        let shown = || format!("--log {}", path.display());
        let text = match std::fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
            Err(error) => return Err(error).with_context(shown),
        };
        // A line that was cut short by a crash is the last one, and is written again.
        let complete = text.rfind('\n').map_or("", |end| &text[..=end]);
        let mut lines = complete.lines();
        let mut verdicts = BTreeMap::new();
        if let Some(first) = lines.next() {
            match serde_json::from_str::<Header>(first) {
                Ok(found) if found == *header => {}
                Ok(_) => bail!("{} is of another bisection: give --log another file, or remove it", path.display()),
                Err(_) => {
                    bail!(
                        "{} is not the log of a bisection, or of another gmemtest: give --log another file",
                        path.display()
                    )
                }
            }
            for line in lines {
                let judged: Judged = serde_json::from_str(line).with_context(shown)?;
                verdicts.insert(judged.subject.clone(), judged);
            }
        }
        let file = OpenOptions::new().create(true).append(true).open(path).with_context(shown)?;
        file.set_len(complete.len() as u64).with_context(shown)?;
        let mut log = Log { path: path.to_owned(), file, verdicts };
        if complete.is_empty() {
            log.append(header)?;
        }
        Ok(log)
    }

    /// The verdict on a kernel, when it has one.
    pub fn verdict(&self, subject: &str) -> Option<&Judged> {
        self.verdicts.get(subject)
    }

    /// Lets a kernel be tried again that could not be judged.
    pub fn forget_untold(&mut self, subject: &str) {
        if self.verdict(subject).is_some_and(|judged| judged.verdict == Verdict::CannotTell) {
            self.verdicts.remove(subject);
        }
    }

    /// Every verdict.
    pub fn verdicts(&self) -> impl Iterator<Item = &Judged> {
        self.verdicts.values()
    }

    /// Keeps a verdict, synced to disk.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn keep(&mut self, judged: &Judged) -> Result<()> {
        self.append(judged)?;
        self.verdicts.insert(judged.subject.clone(), judged.clone());
        Ok(())
    }

    fn append(&mut self, line: &impl Serialize) -> Result<()> {
        let mut text = serde_json::to_vec(line)?;
        text.push(b'\n');
        let written = self.file.write_all(&text).and_then(|()| self.file.sync_data());
        written.with_context(|| format!("--log {}", self.path.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::super::Trial;
    use super::*;

    fn header(test: &str) -> Header {
        Header {
            schema: "gmemtest-bisect/2".to_owned(),
            subjects: vec!["a".to_owned(), "b".to_owned()],
            build: Vec::new(),
            machine: "2 CPUs".to_owned(),
            command: vec!["run".to_owned(), test.to_owned()],
            rates: [1.0, 0.0, 0.01, 0.01],
        }
    }

    #[test]
    fn verdicts_are_there_again_and_a_cut_line_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        let mut log = Log::open(&path, &header("t")).unwrap();
        let judged = Judged { verdict: Verdict::Bad, failed: 1, ..Judged::untried("a", Trial::none("x", Vec::new())) };
        log.keep(&judged).unwrap();
        drop(log);
        OpenOptions::new().append(true).open(&path).unwrap().write_all(b"{\"subject\":\"b\"").unwrap();
        let mut log = Log::open(&path, &header("t")).unwrap();
        assert_eq!(log.verdict("a"), Some(&judged));
        assert_eq!(log.verdict("b"), None);
        log.keep(&Judged { subject: "b".to_owned(), ..judged }).unwrap();
        assert_eq!(Log::open(&path, &header("t")).unwrap().verdicts().count(), 2);
    }

    #[test]
    fn the_log_of_another_bisection_is_not_taken_up() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        Log::open(&path, &header("t")).unwrap();
        assert!(Log::open(&path, &header("u")).unwrap_err().to_string().contains("of another bisection"));
        std::fs::write(&path, "hello\n").unwrap();
        assert!(Log::open(&path, &header("t")).unwrap_err().to_string().contains("is not the log"));
    }
}
