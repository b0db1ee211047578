//! From what happened to a test's process to the outcome of its claim.

use std::time::Duration;

use super::Outcome;
use super::known::{KnownIssue, KnownIssues};
use super::outcome::{Record, Skipped};
use super::running::End;
use super::wire::{Message, Verdict};
use crate::machine::{MachineSpec, Release, SkipKind};

/// What is judged besides the record itself, which holds leftovers and complaints already.
#[derive(Debug)]
pub struct Evidence<'a> {
    /// How the process ended.
    pub end: End,
    /// The time limit, when it passed.
    pub timed_out: Option<Duration>,
    /// What the test's process said.
    pub messages: Vec<Message>,
    /// Kernel bugs that may explain a failure.
    pub known: &'a KnownIssues,
    /// The machine.
    pub machine: &'a MachineSpec,
    /// The kinds of skip that are failures (`--strict`).
    pub strict: &'a [SkipKind],
}

/// Completes `record` with its outcome and what there is to say about it.
pub fn judge(record: &mut Record, evidence: Evidence<'_>) {
    let mut verdict = None;
    let mut release: Option<Release> = None;
    for message in evidence.messages {
        match message {
            Message::Begin { release: machine } => release = machine.parse().ok(),
            Message::Note(note) => record.notes.push(note),
            Message::Lacks { .. } => {}
            Message::Verdict { verdict: last, micros } => {
                record.test_us = micros;
                verdict = Some(last);
            }
        }
    }
    if let Some(limit) = evidence.timed_out {
        record.outcome = Outcome::Timeout;
        record.message = Some(timeout_message(limit, evidence.end, verdict.is_some()));
    } else {
        match (verdict, evidence.end) {
            (Some(verdict), End::Exited(0)) => take_verdict(record, verdict),
            (verdict, end) => {
                record.outcome = Outcome::Crash;
                record.message = Some(crash_message(end, verdict.is_some()));
            }
        }
    }
    note_leftovers(record);
    if record.outcome == Outcome::Pass && !record.kernel_log.is_empty() {
        record.outcome = Outcome::Tainted;
        let first = &record.kernel_log[0];
        record.message = Some(format!("passed, but the kernel complained: {first}"));
    }
    let expected = release.map(|release| evidence.known.expected(&record.name, evidence.machine, release));
    explain(record, &expected.unwrap_or_default());
    be_strict(record, evidence.strict);
}

/// Makes `record` a skip, or the failure that `strict` makes of it.
pub fn skip(record: &mut Record, skipped: Skipped, strict: &[SkipKind]) {
    record.outcome = Outcome::Skip;
    record.skip = Some(skipped);
    be_strict(record, strict);
}

fn take_verdict(record: &mut Record, verdict: Verdict) {
    match verdict {
        Verdict::Pass => record.outcome = Outcome::Pass,
        Verdict::Fail { message, location } => {
            record.outcome = Outcome::Fail;
            record.message = Some(message);
            record.location = Some(location);
        }
        Verdict::Skip { kind, reason } => {
            record.outcome = Outcome::Skip;
            record.skip = Some(Skipped { kind, reason });
        }
        Verdict::Error { message } => {
            record.outcome = Outcome::Error;
            record.message = Some(message);
        }
    }
}

fn timeout_message(limit: Duration, end: End, judged: bool) -> String {
    let limit = limit.as_secs_f64();
    let when = if judged { " after its verdict, while its process was ending" } else { "" };
    match end {
        End::Unkillable => format!("unkillable: ran for more than {limit} s and survives SIGKILL"),
        End::Exited(_) | End::Signaled(_) => format!("ran for more than {limit} s{when}"),
    }
}

fn crash_message(end: End, judged: bool) -> String {
    let when = if judged { "after" } else { "before" };
    match end {
        End::Signaled(signal) => format!("killed by {signal} {when} its verdict"),
        End::Exited(status) => format!("exited with status {status} {when} its verdict"),
        End::Unkillable => "unkillable".to_owned(),
    }
}

/// A test that leaves processes behind disturbs the ones after it: whatever it claimed, it is not in order.
fn note_leftovers(record: &mut Record) {
    if record.leftovers.is_empty() {
        return;
    }
    let list: Vec<String> = record
        .leftovers
        .iter()
        .map(|left| {
            let how = if left.escaped { ", outside its process group" } else { "" };
            let fate = if left.killed { "killed" } else { "survives SIGKILL" };
            format!("{} ({}{how}, {fate})", left.name, left.pid)
        })
        .collect();
    let plural = if list.len() == 1 { "process" } else { "processes" };
    let text = format!("left {} {plural} behind: {}", list.len(), list.join(", "));
    match record.outcome {
        Outcome::Pass | Outcome::Skip => {
            record.outcome = Outcome::Error;
            record.skip = None;
            record.message = Some(text);
        }
        _ => record.notes.push(text),
    }
}

fn explain(record: &mut Record, expected: &[&KnownIssue]) {
    let message = record.message.as_deref().unwrap_or_default();
    let (issue, note) = match record.outcome {
        Outcome::Fail | Outcome::Tainted => {
            let explains = |issue: &&&KnownIssue| {
                issue.explains(message, &record.kernel_log) && (record.outcome == Outcome::Fail || issue.is_logged())
            };
            let Some(issue) = expected.iter().find(explains) else { return };
            record.outcome = Outcome::Known;
            (issue, format!("known issue {}: {}; fixed by: {}", issue.id, issue.symptom, issue.fix))
        }
        Outcome::Pass => {
            let Some(issue) = expected.iter().find(|issue| !issue.shows_sometimes()) else { return };
            (issue, format!("passes, although known issue {} says that it fails on this kernel", issue.id))
        }
        _ => return,
    };
    record.known_issue = Some(issue.id.clone());
    record.notes.push(note);
}

fn be_strict(record: &mut Record, strict: &[SkipKind]) {
    if let Some(skip) = &record.skip
        && strict.iter().any(|kind| kind.word() == skip.kind)
    {
        record.outcome = Outcome::Fail;
        record.message = Some(format!("skipped under --strict: {}: {}", skip.kind, skip.reason));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::signal::Signal;

    fn judged(end: End, messages: Vec<Message>, change: impl FnOnce(&mut Record)) -> Record {
        let mut record = Record::new("a::b", "kvm:default", 0, "0x1".to_owned());
        change(&mut record);
        let (known, machine) = (KnownIssues::none(), "kvm:default".parse().unwrap());
        let strict = &[SkipKind::ConfigOff];
        judge(&mut record, Evidence { end, timed_out: None, messages, known: &known, machine: &machine, strict });
        record
    }

    fn verdict(verdict: Verdict) -> Vec<Message> {
        vec![Message::Verdict { verdict, micros: 1500 }]
    }

    #[test]
    fn a_verdict_counts_only_when_the_process_then_ends_well() {
        assert_eq!(judged(End::Exited(0), verdict(Verdict::Pass), |_| {}).outcome, Outcome::Pass);
        for end in [End::Exited(1), End::Signaled(Signal::SIGSEGV)] {
            let record = judged(end, verdict(Verdict::Pass), |_| {});
            assert_eq!(record.outcome, Outcome::Crash);
            assert!(record.message.unwrap().contains("after its verdict"));
        }
    }

    #[test]
    fn no_verdict_is_a_crash_even_with_status_zero() {
        let record = judged(End::Exited(0), vec![Message::Note("n".to_owned())], |_| {});
        assert_eq!(
            (record.outcome, record.message.as_deref()),
            (Outcome::Crash, Some("exited with status 0 before its verdict"))
        );
    }

    #[test]
    fn a_pass_is_tainted_by_a_complaint_and_a_failure_stays_one() {
        let complain = |record: &mut Record| record.kernel_log.push("WARNING: x".to_owned());
        assert_eq!(judged(End::Exited(0), verdict(Verdict::Pass), complain).outcome, Outcome::Tainted);
        let fail = Verdict::Fail { message: "m".to_owned(), location: "l".to_owned() };
        assert_eq!(judged(End::Exited(0), verdict(fail), complain).outcome, Outcome::Fail);
    }

    #[test]
    fn a_pass_is_noted_unless_the_issue_shows_only_sometimes() {
        for (sometimes, notes) in [("", 1), ("sometimes = true", 0)] {
            let table = format!(
                "[[issue]]\nid = \"x\"\nsince = \"6.8\"\nsymptom = \"s\"\nfix = \"f\"\ntests = [\"a::*\"]\nmachines = [\"kvm:*\"]\n{sometimes}"
            );
            let known = KnownIssues::parse(&table).unwrap();
            let machine = "kvm:default".parse().unwrap();
            let mut record = Record::new("a::b", "kvm:default", 0, "0x1".to_owned());
            let messages = [vec![Message::Begin { release: "7.3".to_owned() }], verdict(Verdict::Pass)].concat();
            let end = End::Exited(0);
            let evidence = Evidence { end, timed_out: None, messages, known: &known, machine: &machine, strict: &[] };
            judge(&mut record, evidence);
            assert_eq!((record.outcome, record.notes.len()), (Outcome::Pass, notes), "{sometimes}");
        }
    }

    #[test]
    fn the_issue_that_explains_a_failure_is_found_among_several() {
        let issue = |id: &str, shows: &str| {
            format!(
                "[[issue]]\nid = \"{id}\"\nsince = \"6.8\"\nsymptom = \"s\"\nfix = \"f\"\ntests = [\"*\"]\nmachines = [\"kvm:*\"]\nshows = \"{shows}\"\nsometimes = true\n"
            )
        };
        let known = KnownIssues::parse(&(issue("first", "Astray") + &issue("second", "Shutdown"))).unwrap();
        let machine = "kvm:default".parse().unwrap();
        for (message, outcome, id) in [
            ("left with Astray", Outcome::Known, Some("first")),
            ("left with Shutdown", Outcome::Known, Some("second")),
            ("left with TimedOut", Outcome::Fail, None),
        ] {
            let mut record = Record::new("a::b", "kvm:default", 0, "0x1".to_owned());
            let fail = Verdict::Fail { message: message.to_owned(), location: "l".to_owned() };
            let messages = [vec![Message::Begin { release: "7.3".to_owned() }], verdict(fail)].concat();
            let end = End::Exited(0);
            let evidence = Evidence { end, timed_out: None, messages, known: &known, machine: &machine, strict: &[] };
            judge(&mut record, evidence);
            assert_eq!((record.outcome, record.known_issue.as_deref()), (outcome, id), "{message}");
        }
    }

    #[test]
    fn an_issue_that_the_log_shows_explains_what_comes_with_that_log() {
        let table = "[[issue]]\nid = \"x\"\nsince = \"6.8\"\nsymptom = \"s\"\nfix = \"f\"\ntests = [\"*\"]\nmachines = [\"kvm:*\"]\nlogs = [\"stall\", \"0 ticks\"]\n";
        let known = KnownIssues::parse(table).unwrap();
        let machine = "kvm:default".parse().unwrap();
        let fail = Verdict::Fail { message: "m".to_owned(), location: "l".to_owned() };
        for (with, log, outcome) in [
            (fail.clone(), &["a stall", "after 0 ticks"][..], Outcome::Known),
            (fail, &["a stall"], Outcome::Fail),
            (Verdict::Pass, &["a stall", "after 0 ticks"], Outcome::Known),
            (Verdict::Pass, &["a stall"], Outcome::Tainted),
        ] {
            let mut record = Record::new("a::b", "kvm:default", 0, "0x1".to_owned());
            record.kernel_log = log.iter().map(ToString::to_string).collect();
            let messages = [vec![Message::Begin { release: "7.3".to_owned() }], verdict(with)].concat();
            let end = End::Exited(0);
            let evidence = Evidence { end, timed_out: None, messages, known: &known, machine: &machine, strict: &[] };
            judge(&mut record, evidence);
            assert_eq!(record.outcome, outcome, "{log:?}");
        }
    }

    #[test]
    fn strict_fails_the_kinds_it_names_and_no_other() {
        let skip = |kind: SkipKind| verdict(Verdict::Skip { kind: kind.word().to_owned(), reason: "r".to_owned() });
        assert_eq!(judged(End::Exited(0), skip(SkipKind::ConfigOff), |_| {}).outcome, Outcome::Fail);
        assert_eq!(judged(End::Exited(0), skip(SkipKind::NoHardware), |_| {}).outcome, Outcome::Skip);
    }
}
