//! The journal of a run: every start and every result, on disk before the run goes on.
//!
//! `DIR/journal.jsonl` holds one JSON object a line: first what the run is, then `start` and `finish` as they happen, each
//! synced to disk. A run that was cut off, by a kernel that went down under it for example, is taken up again with
//! `--resume`: what has a result keeps it, and what had started without coming to one is a crash.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::Seed;
use super::outcome::Record;

/// Version of the journal's format.
const FORMAT: u32 = 1;

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Entry {
    Run { format: u32, tool: String, seed: String },
    Start { name: String, machine: String, round: u64 },
    Finish(Box<Record>),
}

/// What an earlier run knows of a claim.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Earlier {
    /// Its result.
    Finished(Box<Record>),
    /// It was started, and then nothing.
    Started,
}

/// An open journal.
#[derive(Debug)]
pub struct Journal {
    file: File,
    path: PathBuf,
    earlier: HashMap<(String, String, u64), Earlier>,
}

impl Journal {
    /// Starts a journal in `directory`, which is made when it is not there.
    ///
    /// # Errors
    /// One line; a journal that is there already is not overwritten.
    pub fn create(directory: &Path, seed: Seed) -> Result<Journal, String> {
        std::fs::create_dir_all(directory).map_err(|error| format!("cannot make {}: {error}", directory.display()))?;
        let path = directory.join("journal.jsonl");
        let file = File::options().write(true).create_new(true).open(&path).map_err(|error| match error.kind() {
            io::ErrorKind::AlreadyExists => format!(
                "{} is there already: give --resume to go on with that run, or another directory",
                path.display()
            ),
            _ => format!("cannot make {}: {error}", path.display()),
        })?;
        let mut journal = Journal { file, path, earlier: HashMap::new() };
        let tool = env!("CARGO_PKG_VERSION").to_owned();
        journal
            .append(&Entry::Run { format: FORMAT, tool, seed: seed.to_string() })
            .and_then(|()| File::open(directory)?.sync_all())
            .map_err(|error| format!("cannot write {}: {error}", journal.path.display()))?;
        Ok(journal)
    }

    /// Takes up the journal in `directory`, and says the seed of its run.
    ///
    /// # Errors
    /// One line, when there is none or it is not one.
    pub fn resume(directory: &Path) -> Result<(Journal, Seed), String> {
        let path = directory.join("journal.jsonl");
        let text = std::fs::read_to_string(&path)
            .map_err(|error| format!("cannot resume from {}: {error}", path.display()))?;
        // The last line may have been cut short; what it would have said did not happen.
        let whole = text.rfind('\n').map_or(0, |last| last + 1);
        let mut lines = text[..whole].lines().enumerate();
        let bad = |line: usize, why: &str| format!("{}: line {}: {why}", path.display(), line + 1);
        let seed = match lines.next().map(|(_, line)| serde_json::from_str(line)) {
            Some(Ok(Entry::Run { format: FORMAT, seed, .. })) => {
                seed.parse::<Seed>().map_err(|error| bad(0, &error))?
            }
            Some(Ok(Entry::Run { format, .. })) => {
                return Err(bad(0, &format!("format {format}, this program writes format {FORMAT}")));
            }
            _ => return Err(bad(0, "not the beginning of a gmemtest journal")),
        };
        let mut earlier = HashMap::new();
        for (number, line) in lines {
            match serde_json::from_str(line).map_err(|error| bad(number, &error.to_string()))? {
                Entry::Run { .. } => {}
                Entry::Start { name, machine, round } => {
                    earlier.insert((name, machine, round), Earlier::Started);
                }
                Entry::Finish(record) => {
                    let key = (record.name.clone(), record.machine.clone(), record.round);
                    earlier.insert(key, Earlier::Finished(record));
                }
            }
        }
        let file = File::options()
            .write(true)
            .open(&path)
            .map_err(|error| format!("cannot write {}: {error}", path.display()))?;
        file.set_len(whole as u64).map_err(|error| format!("cannot write {}: {error}", path.display()))?;
        let mut journal = Journal { file, path, earlier };
        io::Seek::seek(&mut journal.file, io::SeekFrom::End(0))
            .map_err(|error| format!("cannot write {}: {error}", journal.path.display()))?;
        Ok((journal, seed))
    }

    /// What the earlier run knows of a claim; asked once.
    pub fn earlier(&mut self, name: &str, machine: &str, round: u64) -> Option<Earlier> {
        self.earlier.remove(&(name.to_owned(), machine.to_owned(), round))
    }

    /// Notes that a claim is being started.
    ///
    /// # Errors
    /// What writing or syncing the file returns.
    pub fn started(&mut self, name: &str, machine: &str, round: u64) -> io::Result<()> {
        self.append(&Entry::Start { name: name.to_owned(), machine: machine.to_owned(), round })
    }

    /// Notes a result.
    ///
    /// # Errors
    /// What writing or syncing the file returns.
    pub fn finished(&mut self, record: &Record) -> io::Result<()> {
        self.append(&Entry::Finish(Box::new(record.clone())))
    }

    fn append(&mut self, entry: &Entry) -> io::Result<()> {
        let mut line = serde_json::to_vec(entry)?;
        line.push(b'\n');
        self.file.write_all(&line)?;
        self.file.sync_data()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_journal_cut_off_in_the_middle_is_taken_up() {
        let directory = tempfile::tempdir().unwrap();
        let mut journal = Journal::create(directory.path(), Seed(7)).unwrap();
        let done = Record::new("a::done", "kvm:default", 0, Seed(7).to_string());
        journal.started("a::done", "kvm:default", 0).unwrap();
        journal.finished(&done).unwrap();
        journal.started("a::cut", "kvm:default", 0).unwrap();
        journal.file.write_all(b"{\"finish\":{\"name\":\"a::c").unwrap();
        drop(journal);

        let (mut journal, seed) = Journal::resume(directory.path()).unwrap();
        assert_eq!(seed, Seed(7));
        assert_eq!(journal.earlier("a::done", "kvm:default", 0), Some(Earlier::Finished(Box::new(done))));
        assert_eq!(journal.earlier("a::cut", "kvm:default", 0), Some(Earlier::Started));
        assert_eq!(journal.earlier("a::done", "kvm:default", 1), None);
        journal.started("a::next", "kvm:default", 0).unwrap();
        drop(journal);
        assert!(Journal::resume(directory.path()).is_ok());
        assert!(Journal::create(directory.path(), Seed(8)).unwrap_err().contains("--resume"));
    }

    #[test]
    fn what_is_not_a_journal_is_named() {
        let directory = tempfile::tempdir().unwrap();
        assert!(Journal::resume(directory.path()).unwrap_err().contains("journal.jsonl"));
        std::fs::write(directory.path().join("journal.jsonl"), "hello\n").unwrap();
        assert!(Journal::resume(directory.path()).unwrap_err().contains("line 1"));
    }
}
