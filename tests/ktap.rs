//! The KTAP that the runner prints, checked line by line.

mod support;

use support::ktap::{self, Document};
use support::{code, fixture, output, stderr, stdout};

fn parsed(arguments: &[&str]) -> (Document, i32) {
    let output = output(fixture().args(arguments).args(["--format", "ktap"]));
    let text = stdout(&output);
    let document = ktap::parse(&text).unwrap_or_else(|error| panic!("{error}\n{text}\n{}", stderr(&output)));
    (document, code(&output))
}

#[test]
fn every_outcome_has_its_line() {
    let (document, code) = parsed(&["--exclude", "unruly::hangs*", "--exclude", "unruly::prints_much", "--seed", "7"]);
    assert_eq!(code, 1);
    assert!(document.results.iter().map(|suite| suite.name.as_str()).eq(["good", "orderly", "unruly", "judged"]));
    let leaves = document.leaves();
    let line = |path: &str| {
        let (_, result) = leaves.iter().find(|(found, _)| found == path).unwrap_or_else(|| panic!("no result {path}"));
        (result.ok, result.directive.as_deref().unwrap_or_default(), result.data.as_str())
    };
    assert_eq!(line("good/passes"), (true, "", ""));
    assert_eq!(line("good/rows_are_claims::second"), (true, "", ""));
    assert_eq!(line("orderly/fails_with_values"), (false, "", ""));
    assert_eq!(line("orderly/skips"), (true, "SKIP", "config-off: nothing to see here (CONFIG_SOMETHING)"));
    assert_eq!(line("unruly/is_killed"), (false, "ERROR", "crash: killed by SIGKILL before its verdict"));
    assert_eq!(line("unruly/prints_result_lines"), (false, "", ""));
}

#[test]
fn the_seed_is_printed_first_and_a_failure_prints_the_line_that_reproduces_it() {
    let (document, _) = parsed(&["orderly::fails_with_values", "--seed", "0x2a"]);
    let suite = &document.results[0];
    assert_eq!(suite.diagnostics[0], "seed 0x000000000000002a");
    let diagnostics = &suite.children[0].diagnostics;
    let framed = ["binding a range twice ~ is refused", "    actual: Err(EINVAL)", "  expected: Err(EEXIST)"];
    assert_eq!(diagnostics[..3], framed);
    let again = diagnostics.iter().find_map(|line| line.strip_prefix("again: ")).expect("a line to run it again");
    assert!(again.ends_with("orderly::fails_with_values --machine sim:default --seed 0x000000000000002a"), "{again}");
}

#[test]
fn several_machines_are_a_level_of_their_own() {
    let (document, code) =
        parsed(&["good", "orderly", "--machine", "sim:tdx", "--machine", "kvm:default", "--jobs", "4"]);
    assert_eq!(code, 1);
    let paths: Vec<String> = document.leaves().into_iter().map(|(path, _)| path).collect();
    assert!(paths.contains(&"sim:tdx/good/passes".to_owned()), "{paths:?}");
    assert!(paths.contains(&"kvm:default/good/passes".to_owned()), "{paths:?}");
    assert_eq!(document.results[1].directive.as_deref(), Some("SKIP"));
}

#[test]
fn the_order_is_that_of_the_plan_however_many_run_at_a_time() {
    let names = |jobs: &str| {
        let (document, _) = parsed(&["good", "orderly", "unruly::aborts", "--jobs", jobs, "--shuffle=5"]);
        document.leaves().into_iter().map(|(path, _)| path).collect::<Vec<_>>()
    };
    assert_eq!(names("1"), names("4"));
}

#[test]
fn rounds_are_the_outermost_level() {
    let (document, code) = parsed(&["good", "--repeat", "3"]);
    assert_eq!((document.plan, code), (Some(3), 0));
    assert!(document.results.iter().map(|round| round.name.as_str()).eq(["round-1", "round-2", "round-3"]));
    let (document, code) = parsed(&["good::passes", "--duration", "100ms"]);
    assert_eq!((document.plan, code), (None, 0));
    assert!(document.results.len() > 1, "{document:?}");
}

#[test]
fn the_plan_holds_when_the_run_ends_early() {
    let (document, code) = parsed(&["orderly", "good", "--until-fail", "--repeat", "4", "--shuffle=1"]);
    assert_eq!((document.plan, document.results.len(), code), (Some(4), 4, 1));
    let leaves = document.leaves();
    let not_run = leaves.iter().filter(|(_, result)| result.data.starts_with("not run: stopped at the first failure"));
    assert!(not_run.count() >= 3, "{leaves:?}");
}

#[test]
fn the_parser_of_these_tests_refuses_what_is_wrong() {
    for (wrong, text) in [
        ("no version", "1..1\nok 1 a\n"),
        ("a plan that does not hold", "KTAP version 1\n1..2\nok 1 a\n"),
        ("a number out of order", "KTAP version 1\n1..1\nok 2 a\n"),
        ("a name twice", "KTAP version 1\n1..2\nok 1 a\nok 2 a\n"),
        (
            "a parent that contradicts",
            "KTAP version 1\n1..1\n  KTAP version 1\n  # Subtest: a\n  1..1\n  not ok 1 b\nok 1 a\n",
        ),
        (
            "a subtest of another name",
            "KTAP version 1\n1..1\n  KTAP version 1\n  # Subtest: x\n  1..1\n  ok 1 b\nok 1 a\n",
        ),
        ("not ok XFAIL", "KTAP version 1\n1..1\nnot ok 1 a # XFAIL b\n"),
        ("noise", "KTAP version 1\n1..1\nhello\nok 1 a\n"),
    ] {
        assert!(ktap::parse(text).is_err(), "{wrong} is taken");
    }
    assert!(ktap::parse("KTAP version 1\n1..1\n  KTAP version 1\n  # Subtest: a\n  1..1\n  ok 1 b\nok 1 a\n").is_ok());
}

#[test]
fn the_command_prints_it_too() {
    let output = output(support::gmemtest().args(["run", "gmem_create", "--format", "ktap", "--jobs", "2"]));
    let text = stdout(&output);
    let document = ktap::parse(&text).unwrap_or_else(|error| panic!("{error}\n{text}"));
    let names: Vec<String> = document.leaves().into_iter().map(|(path, _)| path).collect();
    assert!(names.len() > 10, "{names:?}");
}
