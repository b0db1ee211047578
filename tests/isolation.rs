//! Tests whose processes get out of hand: each is an outcome with its name on it, nothing stays behind, and the run goes on.

mod support;

use std::time::Duration;

use gmemtest::harness::Outcome;
use support::{document, record};

/// Whether a process sleeps for that odd number of seconds, as the fixture's leftovers do.
fn sleeps(seconds: &str) -> bool {
    let processes = std::fs::read_dir("/proc").expect("/proc is there").flatten();
    processes
        .filter_map(|process| std::fs::read(process.path().join("cmdline")).ok())
        .any(|line| line.split(|&byte| byte == 0).eq([b"sleep".as_slice(), seconds.as_bytes(), b""]))
}

#[test]
fn each_misbehaviour_is_an_outcome_and_the_run_goes_on() {
    let (document, code) = document(&["unruly", "good::passes", "--timeout", "1", "--jobs", "3"]);
    assert_eq!(code, 1);
    let seen = |name: &str| {
        let record = record(&document, name);
        (record.outcome, record.message.clone().unwrap_or_default())
    };
    assert_eq!(seen("unruly::is_killed"), (Outcome::Crash, "killed by SIGKILL before its verdict".to_owned()));
    assert_eq!(seen("unruly::aborts"), (Outcome::Crash, "killed by SIGABRT before its verdict".to_owned()));
    assert_eq!(seen("unruly::exits_early"), (Outcome::Crash, "exited with status 0 before its verdict".to_owned()));
    assert_eq!(seen("unruly::hangs"), (Outcome::Timeout, "ran for more than 1 s".to_owned()));
    assert_eq!(seen("unruly::hangs_and_ignores_sigterm").0, Outcome::Timeout);
    assert_eq!(seen("unruly::prints_much").0, Outcome::Pass);
    assert_eq!(seen("unruly::leaves_a_child").0, Outcome::Error);
    assert_eq!(seen("unruly::leaves_a_daemon").0, Outcome::Error);
    assert_eq!(seen("unruly::is_alone").0, Outcome::Pass);
    assert_eq!(seen("good::passes").0, Outcome::Pass);
    assert_eq!(document.not_run, []);
    assert_eq!(document.summary.run(), document.results.len() as u64);
}

#[test]
fn what_a_test_leaves_behind_is_killed_and_laid_at_its_door() {
    let (document, _) = document(&["unruly::leaves*", "good", "--jobs", "4"]);
    for (name, escaped) in [("unruly::leaves_a_child", false), ("unruly::leaves_a_daemon", true)] {
        let leftovers = &record(&document, name).leftovers;
        assert_eq!(leftovers.len(), 1, "{name}: {leftovers:?}");
        assert_eq!((leftovers[0].name.as_str(), leftovers[0].escaped, leftovers[0].killed), ("sleep", escaped, true));
        assert!(!std::path::Path::new(&format!("/proc/{}", leftovers[0].pid)).exists(), "{name}: it still runs");
    }
    assert!(
        document
            .results
            .iter()
            .filter(|record| record.name.starts_with("good"))
            .all(|record| record.leftovers.is_empty())
    );
}

#[test]
fn a_hanging_test_is_told_to_end_and_then_killed_and_its_threads_are_shown() {
    let (document, _) = document(&["unruly::hangs*", "--timeout", "300ms", "--jobs", "2"]);
    let hangs = record(&document, "unruly::hangs");
    assert!(
        !hangs.stuck.is_empty() && hangs.stuck[0].syscall.starts_with(&libc::SYS_clock_nanosleep.to_string()),
        "{:?}",
        hangs.stuck
    );
    let stubborn = record(&document, "unruly::hangs_and_ignores_sigterm");
    assert!(
        Duration::from_micros(stubborn.duration_us) >= Duration::from_secs(3),
        "it has a second of its own, and two of grace"
    );
    assert_eq!(stubborn.message.as_deref(), Some("ran for more than 1 s"));
}

#[test]
fn much_output_is_kept_in_part_and_counted_in_whole() {
    let (document, code) = document(&["unruly::prints_much"]);
    let stdout = &record(&document, "unruly::prints_much").stdout;
    assert_eq!(code, 0);
    assert_eq!(stdout.bytes, 100_000_000 + "the beginning\nthe end\n".len() as u64);
    assert!(
        stdout.text.len() < 100_000 && stdout.text.starts_with("the beginning\n") && stdout.text.ends_with("the end\n")
    );
    assert!(stdout.text.contains("bytes left out"));
}

#[test]
fn an_interrupted_run_reports_what_was_measured_and_leaves_nothing() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("out.json");
    let arguments = ["good::passes", "unruly::hangs", "unruly::aborts", "--format", "json", "--output"];
    let mut runner =
        support::fixture().args(arguments).arg(&path).stdout(std::process::Stdio::piped()).spawn().expect("it starts");
    // The live text shows the first result; the second test then hangs.
    let mut text = std::io::BufReader::new(runner.stdout.take().expect("a pipe"));
    let mut line = String::new();
    while !line.contains("good::passes") {
        line.clear();
        assert_ne!(std::io::BufRead::read_line(&mut text, &mut line).expect("text"), 0, "the runner ended");
    }
    let pid = nix::unistd::Pid::from_raw(runner.id() as i32);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT).expect("it runs");
    std::io::Read::read_to_string(&mut text, &mut line).expect("text");
    assert_eq!(runner.wait().expect("it ends").code(), Some(130));
    assert!(line.contains("stopped by SIGINT"), "{line}");
    let document =
        gmemtest::report::Document::parse(&std::fs::read_to_string(path).expect("the file")).expect("a document");
    assert_eq!(document.results.len(), 1);
    let not_run: Vec<&str> = document.not_run.iter().map(|planned| planned.name.as_str()).collect();
    assert_eq!(not_run, ["unruly::hangs", "unruly::aborts"]);
    assert_eq!(document.stopped.as_deref(), Some("stopped by SIGINT"));
    assert_eq!(document.summary.not_run, 2);
}

#[test]
fn a_test_that_asks_for_it_runs_alone() {
    let (document, _) =
        document(&["good", "orderly", "unruly::is_alone", "judged::takes_its_time", "--jobs", "4", "--shuffle=3"]);
    let span = |record: &gmemtest::harness::Record| (record.started_us, record.started_us + record.duration_us);
    let alone = span(record(&document, "unruly::is_alone"));
    let spans = document.results.iter().filter(|record| record.name != "unruly::is_alone").map(span);
    let others: Vec<(u64, u64)> = spans.collect();
    assert!(others.iter().all(|other| other.1 <= alone.0 || alone.1 <= other.0), "{alone:?} {others:?}");
    assert!(
        others.iter().any(|a| others.iter().any(|b| a.0 < b.0 && b.0 < a.1)),
        "the others do run beside each other"
    );
}

#[test]
fn nothing_of_the_fixture_sleeps_on() {
    let (_, _) = document(&["unruly::leaves*"]);
    // Another test of this file may run the same fixture just now: its sleepers live for milliseconds.
    let gone = (0..100).any(|_| {
        std::thread::sleep(Duration::from_millis(20));
        !sleeps("4321") && !sleeps("4322")
    });
    assert!(gone, "a process that a test left behind still runs");
}
