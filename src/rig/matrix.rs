//! The same tests on several kernels, and the outcomes as a table.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use serde::Serialize;

use super::boot_image::BootImage;
use super::qemu::Hardware;
use super::replay::{Replay, Rest};
use super::session::{Guest, OnLoss, Session};
use super::stop::StopSignal;
use crate::harness::{Outcome, Suite, Summary};
use crate::report::{Document, Json};

/// What runs on every kernel.
pub struct Matrix<'a> {
    /// The kernels, in the order of the table's columns.
    pub images: &'a [BootImage],
    /// The machine that each is booted on.
    pub hardware: &'a Hardware,
    /// The limit for each boot.
    pub timeout: Duration,
    /// Most boots at a time.
    pub at_once: usize,
    /// Every suite of this program.
    pub suites: &'a [&'static Suite],
    /// The guest's command for what is left to run.
    pub words: &'a (dyn Fn(Option<Rest>) -> Vec<String> + Sync),
    /// A signal ends it all.
    pub stop: &'a StopSignal,
}

/// What one kernel came to.
#[derive(Debug, Clone, Serialize)]
pub struct Column {
    /// The kernel's file.
    pub kernel: String,
    /// The release that it says it has.
    pub release: String,
    /// The results, when the run began.
    pub results: Option<Document>,
    /// Why there are none, or why they are not complete.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trouble: Option<String>,
}

/// What all kernels came to.
#[derive(Debug, Clone, Serialize)]
pub struct Table {
    /// `gmemtest-matrix/1`.
    pub schema: &'static str,
    /// In the order in which the kernels were given.
    pub columns: Vec<Column>,
}

impl Matrix<'_> {
    /// Boots every kernel; `tell` hears of each as it ends.
    pub fn run(&self, tell: &(dyn Fn(&Column) + Sync)) -> Table {
        let next = AtomicUsize::new(0);
        let columns = Mutex::new(BTreeMap::new());
        thread::scope(|scope| {
            for _ in 0..self.at_once.min(self.images.len()) {
                scope.spawn(|| {
                    loop {
                        let index = next.fetch_add(1, Ordering::Relaxed);
                        let Some(image) = self.images.get(index) else { break };
                        let column = self.column(image);
                        tell(&column);
                        columns.lock().unwrap_or_else(PoisonError::into_inner).insert(index, column);
                    }
                });
            }
        });
        let columns = columns.into_inner().unwrap_or_else(PoisonError::into_inner);
        Table { schema: "gmemtest-matrix/1", columns: columns.into_values().collect() }
    }

    fn column(&self, image: &BootImage) -> Column {
        let session = Session {
            image,
            modules: None,
            hardware: self.hardware,
            timeout: self.timeout,
            console: None,
            stop: Some(self.stop),
        };
        let kernel = image.path().display().to_string();
        let again = ["gmemtest", "vm", "--kernel", &kernel, "--", "run"].map(str::to_owned).into();
        let mut text = Vec::new();
        let mut complaints = Complaints(Vec::new());
        let trouble = {
            let mut json = Json::new(&mut text);
            let mut replay = Replay::new(self.suites, again, &mut json);
            let boots = session.run_tests(self.words, OnLoss::Restart, &mut replay, &mut complaints);
            let begun = replay.has_begun();
            let stopped = replay.finish().and_then(|ended| ended.stopped);
            match (boots, stopped) {
                (Err(error), _) => Some(format!("{error:#}")),
                (Ok(_), Some(stopped)) => Some(stopped.to_string()),
                (Ok(boots), None) if !begun => Some(match boots.last.ending.hint() {
                    Some(hint) => format!("{}; {hint}", boots.last.ending),
                    None => boots.last.ending.to_string(),
                }),
                (Ok(_), None) => None,
            }
        };
        let results = Document::parse(&String::from_utf8_lossy(&text)).ok();
        Column { kernel, release: image.release().to_owned(), results, trouble }
    }
}

struct Complaints(Vec<u8>);

impl Guest for Complaints {
    fn hello(&mut self, _: &super::wire::Hello) {}

    fn stderr(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }
}

impl Column {
    /// How the claims came out, over all machines.
    pub fn summary(&self) -> Option<&Summary> {
        self.results.as_ref().map(|results| &results.summary)
    }
}

/// A machine of a kernel: a column as it is printed.
struct Cells {
    release: String,
    machine: String,
    outcomes: BTreeMap<String, Outcome>,
}

impl Table {
    /// Whether every kernel was judged and nothing failed.
    pub fn is_good(&self) -> bool {
        self.columns
            .iter()
            .all(|column| column.trouble.is_none() && column.summary().is_some_and(|summary| summary.failures() == 0))
    }

    /// Columns of the print: machine by machine, so that the kernels of a machine stand side by side.
    fn cells(&self) -> Vec<Cells> {
        let mut machines: Vec<&String> = Vec::new();
        for machine in self.columns.iter().filter_map(|column| column.results.as_ref()).flat_map(|r| &r.machines) {
            if !machines.contains(&machine) {
                machines.push(machine);
            }
        }
        let mut cells = Vec::new();
        for machine in machines {
            for column in &self.columns {
                let Some(results) = column.results.as_ref().filter(|results| results.machines.contains(machine)) else {
                    continue;
                };
                let mut outcomes: BTreeMap<String, Outcome> = BTreeMap::new();
                for record in results.results.iter().filter(|record| &record.machine == machine) {
                    let kept = outcomes.entry(record.name.clone()).or_insert(record.outcome);
                    if record.outcome.counts_as_failure() {
                        *kept = record.outcome;
                    }
                }
                cells.push(Cells { release: column.release.clone(), machine: machine.clone(), outcomes });
            }
        }
        cells
    }
}

/// Rows of one test that came out alike become one: `suite::test::* (64)`.
fn grouped(rows: Vec<(String, Vec<&str>)>) -> Vec<(String, Vec<&str>)> {
    let mut groups: Vec<(String, Vec<&str>, usize)> = Vec::new();
    for (name, row) in rows {
        let parent = name.rsplit_once("::").map_or("", |(parent, _)| parent).to_owned();
        let is_row = parent.contains("::");
        match groups.last_mut() {
            Some((last, outcomes, count)) if is_row && *outcomes == row && last.starts_with(&format!("{parent}::")) => {
                *count += 1;
                *last = format!("{parent}::* ({count})");
            }
            _ => groups.push((name, row, 1)),
        }
    }
    groups.into_iter().map(|(name, row, _)| (name, row)).collect()
}

impl fmt::Display for Table {
    /// A row for each claim that did not come out the same everywhere; `*` marks an outcome that is another one than on
    /// the kernel before it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let cells = self.cells();
        for (number, column) in cells.iter().enumerate() {
            writeln!(f, "{:>3}  {}  [{}]", number + 1, column.release, column.machine)?;
        }
        for column in self.columns.iter().filter(|column| column.trouble.is_some()) {
            writeln!(f, "  -  {}: {}", column.release, column.trouble.as_deref().unwrap_or_default())?;
        }
        let mut names: Vec<&String> = cells.iter().flat_map(|column| column.outcomes.keys()).collect();
        names.sort();
        names.dedup();
        let width = names.iter().map(|name| name.len()).max().unwrap_or(0);
        writeln!(f)?;
        write!(f, "{:width$}", "")?;
        for number in 1..=cells.len() {
            write!(f, "  {number:<8}")?;
        }
        writeln!(f)?;
        let mut same: BTreeMap<&str, usize> = BTreeMap::new();
        let mut rows: Vec<(String, Vec<&str>)> = Vec::new();
        for name in &names {
            let row: Vec<&str> =
                cells.iter().map(|column| column.outcomes.get(*name).map_or("-", |outcome| outcome.word())).collect();
            if row.iter().all(|word| *word == row[0]) && matches!(row[0], "pass" | "skip") {
                *same.entry(row[0]).or_default() += 1;
            } else {
                rows.push(((*name).clone(), row));
            }
        }
        for (name, row) in grouped(rows) {
            write!(f, "{name:width$}")?;
            for (index, word) in row.iter().enumerate() {
                let beside = index > 0 && cells[index - 1].machine == cells[index].machine;
                let mark = if beside && row[index - 1] != *word { "*" } else { "" };
                write!(f, "  {:<8}", format!("{word}{mark}"))?;
            }
            writeln!(f)?;
        }
        let same: Vec<String> = same.iter().map(|(word, count)| format!("{count} {word} everywhere")).collect();
        if !same.is_empty() {
            writeln!(f, "\n{}", same.join(", "))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_that_came_out_alike_are_one_row() {
        let rows = [("s::t::a", "fail"), ("s::t::b", "fail"), ("s::t::c", "pass"), ("s::u", "fail"), ("s::v", "fail")];
        let rows = rows.iter().map(|&(name, word)| (name.to_owned(), vec![word])).collect();
        let names: Vec<String> = grouped(rows).into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["s::t::* (2)", "s::t::c", "s::u", "s::v"]);
    }
}
