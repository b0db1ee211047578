//! What the machines of a run have been found to have and to lack: [`Needs`].

use std::collections::HashMap;

use super::outcome::Skipped;
use super::plan::Claim;
use super::wire::{Message, Verdict};
use crate::machine::Facility;

/// What a claim needs before it is run: its suite's needs, then its own.
pub(super) fn of(claim: &Claim) -> impl Iterator<Item = Facility> {
    claim.suite.needs.iter().chain(claim.test.needs).copied()
}

/// The answers of the machines so far, so that no process is started for a claim whose skip is known.
///
/// A facility is what the kernel, its configuration, the hardware and the privileges of the run offer; none of that
/// changes while a run lasts. The question is still asked in a test's process, never in the runner: it opens the machine.
#[derive(Debug, Default)]
pub(super) struct Needs(HashMap<(String, Facility), Option<Skipped>>);

impl Needs {
    /// Takes what the process of `claim` said about the machine `spec`.
    pub(super) fn learn(&mut self, claim: &Claim, spec: &str, messages: &[Message]) {
        let mut lacks = None;
        let mut verdict = None;
        for message in messages {
            match message {
                Message::Lacks { facility } => lacks = Some(facility.as_str()),
                Message::Verdict { verdict: last, .. } => verdict = Some(last),
                Message::Begin { .. } | Message::Note(_) => {}
            }
        }
        // Before the machine is open nothing was asked, and a process that died has not said how far it came.
        let opened = messages.iter().any(|message| matches!(message, Message::Begin { .. }));
        let Some(verdict) = verdict.filter(|_| opened) else { return };
        for facility in of(claim) {
            let key = (spec.to_owned(), facility);
            if lacks == Some(facility.name()) {
                if let Verdict::Skip { kind, reason } = verdict {
                    self.0.insert(key, Some(Skipped { kind: kind.clone(), reason: reason.clone() }));
                }
                return;
            }
            self.0.insert(key, None);
        }
    }

    /// The skip of `claim` on the machine `spec`, when it is known.
    pub(super) fn missing(&self, claim: &Claim, spec: &str) -> Option<&Skipped> {
        for facility in of(claim) {
            match self.0.get(&(spec.to_owned(), facility)) {
                Some(None) => {}
                Some(Some(skipped)) => return Some(skipped),
                // The first one that is absent gives the reason, and this may be it.
                None => return None,
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::harness::test::{Body, Sharing, Suite, Test};

    static TESTS: [Test; 2] =
        [test("a", &[Facility::MemoryAttributes]), test("b", &[Facility::MemoryAttributes, Facility::Tdx])];
    static SUITE: Suite = Suite { name: "s", doc: "", needs: &[Facility::GuestMemfd], tests: &TESTS };

    const fn test(name: &'static str, needs: &'static [Facility]) -> Test {
        let body = Body::Claim(|_| Ok(()));
        Test { name, doc: "", needs, timeout: None, sharing: Sharing::Parallel, log_allowed: &[], body }
    }

    fn claim(index: usize) -> Claim {
        Claim { name: TESTS[index].name.to_owned(), suite: &SUITE, test: &TESTS[index], row: None }
    }

    fn said(lacks: Option<Facility>, verdict: Verdict) -> Vec<Message> {
        let lacks = lacks.map(|facility| Message::Lacks { facility: facility.name().to_owned() });
        let begin = Message::Begin { release: "7.3.4".to_owned() };
        [begin].into_iter().chain(lacks).chain([Message::Verdict { verdict, micros: 1 }]).collect()
    }

    fn skipped(reason: &str) -> Verdict {
        Verdict::Skip { kind: "declined".to_owned(), reason: reason.to_owned() }
    }

    #[test]
    fn reason_is_that_of_the_first_facility_that_is_absent() {
        let mut needs = Needs::default();
        needs.learn(&claim(1), "m", &said(Some(Facility::Tdx), skipped("no TD")));
        assert_eq!(needs.missing(&claim(0), "m"), None, "what was asked before the absent one is there");
        assert_eq!(needs.missing(&claim(1), "m").map(|skip| skip.reason.as_str()), Some("no TD"));
        assert_eq!(needs.missing(&claim(1), "other"), None);
        needs.learn(&claim(0), "other", &said(Some(Facility::GuestMemfd), skipped("no file")));
        assert_eq!(needs.missing(&claim(1), "other").map(|skip| skip.reason.as_str()), Some("no file"));
    }

    #[test]
    fn a_skip_of_the_test_itself_says_nothing_of_its_needs() {
        let mut needs = Needs::default();
        needs.learn(&claim(0), "m", &said(None, skipped("not on a Tuesday")));
        assert_eq!(needs.missing(&claim(0), "m"), None);
    }

    #[test]
    fn a_process_that_gave_no_verdict_or_opened_no_machine_says_nothing() {
        let mut needs = Needs::default();
        let mut silent = said(Some(Facility::Tdx), skipped("no TD"));
        silent.pop();
        needs.learn(&claim(1), "m", &silent);
        needs.learn(&claim(1), "m", &said(Some(Facility::Tdx), skipped("no TD"))[1..]);
        assert!(needs.0.is_empty());
    }
}
