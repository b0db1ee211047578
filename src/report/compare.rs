//! Two results side by side: what newly fails, what is fixed, what changed.

use std::collections::BTreeMap;
use std::fmt;

use serde::Serialize;

use super::Document;
use crate::harness::{Outcome, Record};
use crate::machine::MachineSpec;

/// Times below this are noise, whatever their ratio: microseconds.
const NOTICEABLE_US: u64 = 10_000;

/// What is compared with what.
#[derive(Debug, Clone, Copy, Default)]
pub struct Criteria {
    /// Tell of claims that take more than so many times as long; none when absent.
    pub slower: Option<f64>,
    /// Whether a simulated machine may stand beside a real one.
    pub across: Across,
}

/// Whether a simulated machine may stand beside a real one.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Across {
    /// A pass on the model says nothing of hardware: refused.
    #[default]
    Refused,
    /// Asked for.
    Allowed,
}

/// The kind of a difference, in the order in which they are told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Change {
    /// Fails now, and did not, or was not there.
    NewlyFailing,
    /// Failed, and passes now.
    Fixed,
    /// Another outcome, neither of the above.
    Changed,
    /// Has no result any more.
    Disappeared,
    /// Had no result.
    Appeared,
    /// The same outcome after a longer time.
    Slower,
}

impl Change {
    const ALL: [Change; 6] =
        [Change::NewlyFailing, Change::Fixed, Change::Changed, Change::Disappeared, Change::Appeared, Change::Slower];

    fn title(self) -> &'static str {
        match self {
            Change::NewlyFailing => "newly failing",
            Change::Fixed => "fixed",
            Change::Changed => "changed",
            Change::Disappeared => "disappeared",
            Change::Appeared => "appeared",
            Change::Slower => "slower",
        }
    }
}

/// One claim on one machine that differs.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Difference {
    /// How.
    pub change: Change,
    /// The claim.
    pub name: String,
    /// The machine, of the second result where both have it.
    pub machine: String,
    /// The outcome in the first result.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub before: Option<Seen>,
    /// The outcome in the second result.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub after: Option<Seen>,
}

/// What a result says of a claim, over all its rounds.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Seen {
    /// The outcome: of several rounds the first that counts as a failure, or the first.
    pub outcome: Outcome,
    /// Rounds with that outcome.
    pub times: u64,
    /// Rounds.
    pub rounds: u64,
    /// Microseconds in the test's own code, on average.
    pub test_us: u64,
    /// What there is to say about it, in one line.
    pub headline: String,
}

/// A result's identity.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Subject {
    /// `uname -r` and `uname -v` of the kernel.
    pub kernel: String,
    /// The machines.
    pub machines: Vec<String>,
    /// Results.
    pub results: usize,
}

/// The differences of two results.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Comparison {
    /// `gmemtest-comparison/1`.
    pub schema: &'static str,
    /// The first result.
    pub before: Subject,
    /// The second result.
    pub after: Subject,
    /// By kind, then by name.
    pub differences: Vec<Difference>,
    /// Claims that are the same in both.
    pub same: usize,
}

impl Comparison {
    /// Compares.
    ///
    /// # Errors
    /// One line when the two have no machine in common and may not, or cannot, be compared across machines.
    pub fn new(before: &Document, after: &Document, criteria: Criteria) -> Result<Comparison, String> {
        let pairs = pair(&before.machines, &after.machines, criteria.across)?;
        let renamed = |machine: &String| pairs.get(machine).unwrap_or(machine).clone();
        let old = seen(&before.results, renamed);
        let new = seen(&after.results, Clone::clone);
        let mut differences = Vec::new();
        let mut same = 0;
        let keys: std::collections::BTreeSet<_> = old.keys().chain(new.keys()).collect();
        for key in keys {
            let (before, after) = (old.get(key), new.get(key));
            match change(before, after, criteria) {
                Some(change) => differences.push(Difference {
                    change,
                    name: key.0.clone(),
                    machine: key.1.clone(),
                    before: before.cloned(),
                    after: after.cloned(),
                }),
                None => same += 1,
            }
        }
        differences.sort_by_key(|difference| difference.change);
        let subject = |document: &Document| Subject {
            kernel: format!("{} {}", document.environment.kernel_release, document.environment.kernel_version),
            machines: document.machines.clone(),
            results: document.results.len(),
        };
        Ok(Comparison {
            schema: "gmemtest-comparison/1",
            before: subject(before),
            after: subject(after),
            differences,
            same,
        })
    }

    /// Whether anything newly fails.
    pub fn is_worse(&self) -> bool {
        self.differences.iter().any(|difference| difference.change == Change::NewlyFailing)
    }
}

/// Which machine of the second result stands for each machine of the first: the same spec; else the only other one of
/// its family and VM type; else, across machines, the only one of its VM type.
fn pair(before: &[String], after: &[String], across: Across) -> Result<BTreeMap<String, String>, String> {
    let spec = |text: &String| text.parse::<MachineSpec>().ok();
    let mut pairs = BTreeMap::new();
    for machine in before {
        if after.contains(machine) {
            pairs.insert(machine.clone(), machine.clone());
            continue;
        }
        let Some(wanted) = spec(machine) else { continue };
        let only = |fits: &dyn Fn(&MachineSpec) -> bool| {
            let mut fitting =
                after.iter().filter(|other| !before.contains(other) && spec(other).is_some_and(|other| fits(&other)));
            fitting.next().filter(|_| fitting.next().is_none()).cloned()
        };
        let near = only(&|other| (other.family, other.vm_type) == (wanted.family, wanted.vm_type));
        let far = || match across {
            Across::Allowed => only(&|other| other.vm_type == wanted.vm_type),
            Across::Refused => None,
        };
        if let Some(other) = near.or_else(far) {
            pairs.insert(machine.clone(), other);
        }
    }
    if !pairs.is_empty() {
        return Ok(pairs);
    }
    let (old, new) = (before.join(", "), after.join(", "));
    let simulated = |machines: &[String]| machines.iter().any(|machine| machine.starts_with("sim:"));
    Err(match simulated(before) != simulated(after) && across == Across::Refused {
        true => format!(
            "{old} and {new}: a simulated machine is not compared with a real one; give --across-machines if that is meant"
        ),
        false => format!("{old} and {new} have no machine in common"),
    })
}

/// Results by claim and machine.
fn seen(records: &[Record], machine: impl Fn(&String) -> String) -> BTreeMap<(String, String), Seen> {
    let mut rounds: BTreeMap<(String, String), Vec<&Record>> = BTreeMap::new();
    for record in records {
        rounds.entry((record.name.clone(), machine(&record.machine))).or_default().push(record);
    }
    let sum_up = |records: Vec<&Record>| {
        let worst = records.iter().find(|record| record.outcome.counts_as_failure()).unwrap_or(&records[0]);
        Seen {
            outcome: worst.outcome,
            times: records.iter().filter(|record| record.outcome == worst.outcome).count() as u64,
            rounds: records.len() as u64,
            test_us: records.iter().map(|record| record.test_us).sum::<u64>() / records.len() as u64,
            headline: worst.headline(),
        }
    };
    rounds.into_iter().map(|(key, records)| (key, sum_up(records))).collect()
}

fn change(before: Option<&Seen>, after: Option<&Seen>, criteria: Criteria) -> Option<Change> {
    let (before, after) = match (before, after) {
        (None, Some(after)) if after.outcome.counts_as_failure() => return Some(Change::NewlyFailing),
        (None, _) => return Some(Change::Appeared),
        (Some(_), None) => return Some(Change::Disappeared),
        (Some(before), Some(after)) => (before, after),
    };
    let failed = (before.outcome.counts_as_failure(), after.outcome.counts_as_failure());
    match (failed, after.outcome) {
        ((false, true), _) => Some(Change::NewlyFailing),
        ((true, false), Outcome::Pass | Outcome::Known) => Some(Change::Fixed),
        _ if before.outcome != after.outcome => Some(Change::Changed),
        _ => {
            let longer = after.test_us.saturating_sub(before.test_us) >= NOTICEABLE_US;
            let slower = criteria.slower.is_some_and(|factor| after.test_us as f64 > before.test_us as f64 * factor);
            (longer && slower).then_some(Change::Slower)
        }
    }
}

impl fmt::Display for Seen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.outcome.word())?;
        match self.rounds {
            1 => Ok(()),
            rounds => write!(f, " ({} of {rounds})", self.times),
        }
    }
}

impl fmt::Display for Comparison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (word, subject) in [("before", &self.before), ("after ", &self.after)] {
            writeln!(f, "{word}  {} on {}; {} results", subject.kernel, subject.machines.join(" "), subject.results)?;
        }
        for change in Change::ALL {
            let mut these = self.differences.iter().filter(|difference| difference.change == change).peekable();
            if these.peek().is_none() {
                continue;
            }
            writeln!(f, "\n{}:", change.title())?;
            for difference in these {
                write!(f, "  {}  [{}]: ", difference.name, difference.machine)?;
                let side = |seen: &Option<Seen>| seen.as_ref().map_or_else(|| "none".to_owned(), Seen::to_string);
                match (change, &difference.before, &difference.after) {
                    (Change::Slower, Some(before), Some(after)) => {
                        let milliseconds = |time: u64| time as f64 / 1000.0;
                        writeln!(f, "{:.1} ms -> {:.1} ms", milliseconds(before.test_us), milliseconds(after.test_us))?;
                    }
                    (_, before, after) => {
                        writeln!(f, "{} -> {}", side(before), side(after))?;
                        let said = after.as_ref().or(before.as_ref()).map_or("", |seen| seen.headline.as_str());
                        if !said.is_empty() {
                            writeln!(f, "      {said}")?;
                        }
                    }
                }
            }
        }
        let counts: Vec<String> = Change::ALL
            .iter()
            .map(|&change| (change, self.differences.iter().filter(|other| other.change == change).count()))
            .filter(|&(_, count)| count > 0)
            .map(|(change, count)| format!("{count} {}", change.title()))
            .collect();
        let counts = if counts.is_empty() { "no difference".to_owned() } else { counts.join(", ") };
        writeln!(f, "\n{counts}; {} the same", self.same)
    }
}

#[cfg(test)]
mod tests {
    use super::super::{SCHEMA, Tool};
    use super::*;
    use crate::harness::Summary;
    use crate::observe::Environment;

    fn document(machine: &str, outcomes: &[(&str, Outcome)]) -> Document {
        let results = outcomes.iter().map(|&(name, outcome)| {
            let mut record = Record::new(name, machine, 0, "0x1".to_owned());
            record.outcome = outcome;
            record
        });
        Document {
            schema: SCHEMA.to_owned(),
            tool: Tool { name: "gmemtest".to_owned(), version: "0".to_owned() },
            arguments: Vec::new(),
            seed: "0x1".to_owned(),
            shuffle: None,
            jobs: 1,
            rounds: Some(1),
            machines: vec![machine.to_owned()],
            started: 0,
            elapsed_us: 0,
            environment: Environment::default(),
            remarks: Vec::new(),
            results: results.collect(),
            not_run: Vec::new(),
            stopped: None,
            summary: Summary::default(),
        }
    }

    fn changes(before: &Document, after: &Document) -> Vec<(Change, String)> {
        let comparison = Comparison::new(before, after, Criteria::default()).unwrap();
        comparison.differences.into_iter().map(|difference| (difference.change, difference.name)).collect()
    }

    #[test]
    fn every_kind_of_difference_has_its_name() {
        use Outcome::*;
        let before = document(
            "kvm:default",
            &[("a", Pass), ("b", Fail), ("c", Pass), ("d", Pass), ("e", Fail), ("g", Skip), ("h", Fail)],
        );
        let after = document(
            "kvm:default",
            &[
                ("a", Fail),
                ("b", Pass),
                ("c", Skip),
                ("e", Crash),
                ("f", Pass),
                ("g", Tainted),
                ("h", Fail),
                ("i", Fail),
            ],
        );
        let names: Vec<(Change, &str)> = vec![
            (Change::NewlyFailing, "a"),
            (Change::NewlyFailing, "g"),
            (Change::NewlyFailing, "i"),
            (Change::Fixed, "b"),
            (Change::Changed, "c"),
            (Change::Changed, "e"),
            (Change::Disappeared, "d"),
            (Change::Appeared, "f"),
        ];
        let names: Vec<(Change, String)> = names.into_iter().map(|(change, name)| (change, name.to_owned())).collect();
        assert_eq!(changes(&before, &after), names);
        assert!(Comparison::new(&before, &after, Criteria::default()).unwrap().is_worse());
        assert!(!Comparison::new(&before, &before, Criteria::default()).unwrap().is_worse());
    }

    #[test]
    fn one_failed_round_is_a_failure() {
        let before = document("kvm:default", &[("a", Outcome::Pass), ("a", Outcome::Pass)]);
        let after = document("kvm:default", &[("a", Outcome::Pass), ("a", Outcome::Fail)]);
        let comparison = Comparison::new(&before, &after, Criteria::default()).unwrap();
        assert_eq!(comparison.differences[0].after.as_ref().unwrap().to_string(), "fail (1 of 2)");
        assert!(comparison.is_worse());
    }

    #[test]
    fn a_simulated_machine_is_compared_with_a_real_one_only_when_asked() {
        let real = document("kvm:tdx", &[("a", Outcome::Pass)]);
        let model = document("sim:tdx,policy=bug-vm", &[("a", Outcome::Fail)]);
        let error = Comparison::new(&real, &model, Criteria::default()).unwrap_err();
        assert!(error.contains("--across-machines"), "{error}");
        let across = Criteria { across: Across::Allowed, ..Criteria::default() };
        assert!(Comparison::new(&real, &model, across).unwrap().is_worse());
        // Another VM type is another question, whoever asks.
        let other = document("kvm:default", &[("a", Outcome::Pass)]);
        assert!(Comparison::new(&real, &other, across).is_err());
    }

    #[test]
    fn options_of_the_model_do_not_keep_it_apart() {
        let one = document("sim:tdx,policy=bug-vm", &[("a", Outcome::Pass)]);
        let other = document("sim:tdx,policy=poison", &[("a", Outcome::Fail)]);
        assert_eq!(changes(&one, &other), [(Change::NewlyFailing, "a".to_owned())]);
    }

    #[test]
    fn slower_is_told_by_factor_when_it_can_be_noticed() {
        let timed = |microseconds| {
            let mut document = document("kvm:default", &[("a", Outcome::Pass)]);
            document.results[0].test_us = microseconds;
            document
        };
        let twice = Criteria { slower: Some(2.0), ..Criteria::default() };
        let told = |before, after, criteria| {
            !Comparison::new(&timed(before), &timed(after), criteria).unwrap().differences.is_empty()
        };
        assert!(told(20_000, 50_000, twice));
        assert!(!told(20_000, 39_000, twice));
        assert!(!told(100, 900, twice));
        assert!(!told(20_000, 50_000, Criteria::default()));
    }
}
