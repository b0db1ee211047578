//! Results that are more than what the test returned: the kernel complained, or a known issue explains it.

mod support;

use gmemtest::harness::Outcome;
use gmemtest::report::Document;
use support::{code, fixture, output, record, sequential, stderr, stdout};

/// Runs the fixture with a kernel log of its own.
fn judged(arguments: &[&str]) -> (Document, i32) {
    let directory = tempfile::tempdir().expect("a directory");
    let mut command = fixture();
    command.env("FIXTURE_LOG", directory.path().join("log")).args(arguments).args(sequential(arguments));
    command.args(["--format", "json"]);
    let output = output(&mut command);
    let document = Document::parse(&stdout(&output)).unwrap_or_else(|error| panic!("{error}\n{}", stderr(&output)));
    (document, code(&output))
}

#[test]
fn a_pass_is_tainted_when_the_kernel_complains_meanwhile() {
    let (document, code) = judged(&["judged::kernel_complains", "good::passes"]);
    let tainted = record(&document, "judged::kernel_complains");
    assert_eq!((tainted.outcome, code), (Outcome::Tainted, 1));
    assert_eq!(tainted.kernel_log, ["WARNING: CPU: 0 PID: 1 at virt/kvm/fixture.c:1"]);
    assert_eq!(tainted.overlapped, [""; 0]);
    assert_eq!(record(&document, "good::passes").outcome, Outcome::Pass);
}

#[test]
fn a_complaint_that_a_test_announces_is_not_held_against_it() {
    let (document, code) = judged(&["judged::kernel_complains_as_expected"]);
    assert_eq!((document.results[0].outcome, code), (Outcome::Pass, 0));
}

#[test]
fn a_complaint_belongs_to_every_test_that_ran_then_and_says_so() {
    let arguments = ["judged::takes_its_time", "judged::kernel_complains", "--jobs", "2"];
    let (document, _) = judged(&arguments);
    let (first, second) = (record(&document, "judged::takes_its_time"), record(&document, "judged::kernel_complains"));
    assert_eq!((first.outcome, second.outcome), (Outcome::Tainted, Outcome::Tainted));
    assert_eq!(first.overlapped, ["judged::kernel_complains"]);
    assert_eq!(second.overlapped, ["judged::takes_its_time"]);
}

#[test]
fn a_complaint_that_names_a_task_belongs_to_its_test() {
    let (document, _) = judged(&["judged::takes_its_time", "judged::kernel_complains_by_name", "--jobs", "2"]);
    let other = record(&document, "judged::takes_its_time");
    assert_eq!((other.outcome, other.kernel_log.len()), (Outcome::Pass, 0));
    let named = record(&document, "judged::kernel_complains_by_name");
    assert_eq!((named.outcome, named.kernel_log.len()), (Outcome::Tainted, 2), "{:?}", named.kernel_log);
    assert_eq!(named.overlapped, [""; 0]);
}

#[test]
fn a_known_issue_excuses_the_failure_that_it_describes_and_no_other() {
    let (document, code) = judged(&["judged::*known"]);
    let known = record(&document, "judged::fails_as_known");
    assert_eq!((known.outcome, known.known_issue.as_deref()), (Outcome::Known, Some("fixture-bug")));
    assert_eq!(record(&document, "judged::fails_otherwise_than_known").outcome, Outcome::Fail);
    let passes = record(&document, "judged::passes_although_known");
    assert_eq!((passes.outcome, passes.known_issue.as_deref()), (Outcome::Pass, Some("fixture-bug")));
    assert_eq!(passes.notes, ["passes, although known issue fixture-bug says that it fails on this kernel"]);
    assert_eq!(code, 1);
    let (_, code) = judged(&["judged::fails_as_known"]);
    assert_eq!(code, 0);
}

#[test]
fn a_known_issue_is_xfail_in_ktap() {
    let output = output(fixture().args(["judged::fails_as_known", "--format", "ktap"]));
    let document = support::ktap::parse(&stdout(&output)).expect("KTAP");
    let result = &document.results[0].children[0];
    assert_eq!((result.ok, result.directive.as_deref(), result.data.as_str()), (true, Some("XFAIL"), "fixture-bug"));
    assert!(
        result.diagnostics.iter().any(|line| line == "note: known issue fixture-bug: some tests fail; fixed by: none")
    );
}
