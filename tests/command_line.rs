//! The command line: what cannot be carried out is one clear line, and exit codes mean what they are documented to mean.

mod support;

use std::os::unix::process::CommandExt;
use std::process::Command;

use gmemtest::report::Document;
use support::{code, fixture, gmemtest, output, stderr, stdout};

/// Exit code and the only line on standard error.
fn refused(command: &mut Command) -> (i32, String) {
    let output = output(command);
    let (text, results) = (stderr(&output), stdout(&output));
    assert_eq!(text.lines().count(), 1, "one line was expected: {text}");
    assert_eq!(results, "", "no results were expected");
    (code(&output), text.trim_end().to_owned())
}

#[test]
fn what_cannot_be_carried_out_is_one_line_and_exit_2() {
    for (arguments, line) in [
        (
            &["run", "--jbos", "2"][..],
            "gmemtest: unexpected argument '--jbos' found; tip: a similar argument exists: '--jobs'; try --help",
        ),
        (&["run", "--jobs", "0"], "gmemtest: invalid value '0' for '--jobs <N>': 0 is not in 1..=1024; try --help"),
        (
            &["run", "--machine", "xen:default"],
            "gmemtest: unknown machine 'xen:default'; known machines: auto, kvm:*, kvm:default, kvm:sw-protected, kvm:tdx, sim:default, sim:sw-protected, sim:tdx",
        ),
        (
            &["run", "no_such_test"],
            "gmemtest: pattern 'no_such_test' matches no test; `gmemtest list` prints their names",
        ),
        (
            &["run", "gmem_create", "--exclude", "nothing*"],
            "gmemtest: --exclude 'nothing*' matches no test; `gmemtest list` prints their names",
        ),
        (&["run", "gmem_create", "--exclude", "*"], "gmemtest: no test is left after --exclude"),
        (
            &["run", "--output", "/no/such/directory/out"],
            "gmemtest: cannot write /no/such/directory/out: No such file or directory (os error 2); give --output a file that can be made",
        ),
        (
            &["run", "--strict=config-of"],
            "gmemtest: --strict=config-of: 'config-of': expected one of unsupported-kernel, config-off, no-hardware, no-hardware-injection, no-privilege, declined",
        ),
        (
            &["run", "--seed", "x"],
            "gmemtest: invalid value 'x' for '--seed <SEED>': expected a 64-bit number, decimal or 0x hexadecimal; try --help",
        ),
        (
            &["run", "--duration", "soon"],
            "gmemtest: invalid value 'soon' for '--duration <TIME>': expected a time above zero and below 30 years: seconds, or a number with s, m, h or d, such as 90, 30m or 1.5h; try --help",
        ),
        (
            &["vm", "--shell", "--kernel", "bzImage"],
            "gmemtest: --shell: standard input is no terminal; to run a command without one leave --shell out and name it: gmemtest vm --kernel FILE -- probe",
        ),
        (
            &["run", "--resume"],
            "gmemtest: the following required arguments were not provided: --journal <DIR>; try --help",
        ),
        (&["nothing"], "gmemtest: unrecognized subcommand 'nothing'; try --help"),
        (
            &["list", "no_such_test"],
            "gmemtest: pattern 'no_such_test' matches no test; `gmemtest list` prints their names",
        ),
    ] {
        let (code, text) = refused(gmemtest().args(arguments));
        assert_eq!((code, text.as_str()), (2, line), "{arguments:?}");
    }
}

#[test]
fn a_missing_subcommand_is_one_line_that_names_them() {
    let (code, text) = refused(&mut gmemtest());
    assert_eq!(code, 2);
    assert!(text.contains("requires a subcommand") && text.contains("run, list, probe"), "{text}");
}

#[test]
fn a_bisection_is_stopped_by_what_cannot_be_carried_out() {
    for arguments in [&["--exit-style", "bisect", "--jbos"][..], &["--exit-style=bisect", "no_such_test"]] {
        assert_eq!(refused(fixture().args(arguments)).0, 255, "{arguments:?}");
    }
}

#[test]
fn kselftests_runner_does_not_take_a_usage_error_for_an_expected_failure() {
    for arguments in
        [&["--exit-style", "kselftest-runner", "--jbos"][..], &["--exit-style=kselftest-runner", "no_such"]]
    {
        assert_eq!(refused(fixture().args(arguments)).0, 1, "{arguments:?}");
    }
}

#[test]
fn exit_codes_of_a_run() {
    for (arguments, kselftest, bisect) in [
        (&["good"][..], 0, 0),
        (&["good::passes", "orderly::skips"], 0, 0),
        (&["orderly::skips"], 4, 125),
        (&["orderly::skips", "--strict"], 1, 1),
        (&["orderly::skips", "--strict=config-off"], 1, 1),
        (&["orderly::skips", "--strict=no-hardware,no-privilege"], 4, 125),
        (&["orderly::fails_with_values", "good"], 1, 1),
        (&["unruly::hangs", "--timeout", "0.1"], 1, 125),
        (&["unruly::leaves_a_child"], 1, 125),
        (&["unruly::aborts"], 1, 1),
        (&["good", "--machine", "kvm:default"], 4, 125),
        (&["good", "--machine", "kvm:tdx"], 1, 125),
    ] {
        assert_eq!(code(&output(fixture().args(arguments))), kselftest, "{arguments:?}");
        let code_in = |style| code(&output(fixture().args(arguments).args(["--exit-style", style])));
        assert_eq!(code_in("bisect"), bisect, "{arguments:?}");
        assert_eq!(code_in("kselftest-runner"), kselftest, "{arguments:?}");
    }
}

#[test]
fn a_machine_that_is_not_to_be_had_is_one_line_and_typed_skips() {
    let output = output(fixture().args(["good", "--machine", "kvm:default", "--format", "pretty"]));
    let text = stdout(&output);
    let told: Vec<&str> = text.lines().filter(|line| line.contains("EACCES")).collect();
    assert_eq!(told, ["note: no kvm:default here: no-privilege: /dev/kvm: EACCES (be root, or in the group kvm)"]);
    assert!(text.ends_with("0 passed, 6 skipped (no-privilege 6)\n"), "{text}");
}

#[test]
fn results_are_without_colour_where_there_is_no_terminal() {
    let output = output(fixture().args(["good", "orderly", "--format", "pretty"]));
    assert!(!output.stdout.contains(&0x1b) && output.stderr.is_empty());
    let text = stdout(&output);
    assert!(text.starts_with("seed 0x"), "the seed comes first: {text}");
}

#[test]
fn a_selftest_binary_speaks_ktap_where_there_is_no_terminal() {
    assert!(stdout(&output(fixture().arg("good"))).starts_with("KTAP version 1\n"));
}

#[test]
fn the_same_seed_gives_the_same_numbers_and_another_does_not() {
    let notes = |seed: &str| {
        let (document, _) = support::document(&["good::tells_its_seed", "--seed", seed]);
        support::record(&document, "good::tells_its_seed").notes.clone()
    };
    assert_eq!(notes("1"), notes("0x1"));
    assert_ne!(notes("1"), notes("2"));
}

#[test]
fn the_line_that_reproduces_a_failure_of_a_later_round_has_the_seed_of_that_round() {
    let (document, _) = support::document(&["good::tells_its_seed", "--repeat", "2", "--seed", "9"]);
    let second = &document.results[1];
    assert_ne!(second.seed, document.seed);
    let (again, _) = support::document(&["good::tells_its_seed", "--seed", &second.seed]);
    assert_eq!(again.results[0].notes, second.notes);
}

#[test]
fn a_selftest_lists_its_claims() {
    let output = output(fixture().args(["--list", "good"]));
    let rows = "good::rows_are_claims::first\ngood::rows_are_claims::second\ngood::rows_are_claims::third\n";
    let expected = format!("good::passes\ngood::errors_are_values\n{rows}good::tells_its_seed\n");
    assert_eq!((stdout(&output), code(&output)), (expected, 0));
}

#[test]
fn an_output_file_holds_the_results_and_the_text_is_shown_besides() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("out");
    for format in ["ktap", "json", "junit"] {
        let output = output(fixture().args(["good", "--format", format, "--output"]).arg(&path));
        assert!(stdout(&output).contains("6 passed"), "{}", stdout(&output));
        let text = std::fs::read_to_string(&path).expect("the file");
        match format {
            "ktap" => drop(support::ktap::parse(&text).expect("KTAP")),
            "json" => drop(Document::parse(&text).expect("JSON")),
            _ => assert!(
                text.starts_with("<?xml") && text.contains(r#"<testsuites name="gmemtest" tests="6""#),
                "{text}"
            ),
        }
    }
}

#[test]
fn a_reader_that_goes_away_ends_the_run() {
    let mut runner = fixture()
        .args(["good", "--repeat", "1000"])
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .expect("it starts");
    drop(runner.stdout.take());
    let output = runner.wait_with_output().expect("it ends");
    assert_eq!(code(&output), 2, "{}", stderr(&output));
    assert_eq!(stderr(&output), "gmemtest: cannot write the results: Broken pipe (os error 32)\n");
}

#[test]
fn an_interrupted_run_is_taken_up_from_its_journal() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("journal");
    let journal = path.to_str().expect("a path that is text");
    let arguments = ["good", "orderly", "--journal", journal];
    let (first, _) = support::document(&[&arguments[..], &["--seed", "77", "--until-fail", "--repeat", "1"]].concat());
    assert_eq!(first.not_run.len(), 4);

    let again = refused(fixture().args(arguments));
    assert!(again.0 == 2 && again.1.contains("--resume"), "{again:?}");

    let (second, code) = support::document(&[&arguments[..], &["--resume"]].concat());
    assert_eq!((second.seed.as_str(), code), (first.seed.as_str(), 1));
    assert_eq!(second.results[..first.results.len()], first.results, "what has a result keeps it");
    assert_eq!((second.results.len(), second.not_run.len()), (11, 0));
}

#[test]
fn simulated_machines_get_a_test_a_cpu_and_others_one_at_a_time() {
    let cpus = std::thread::available_parallelism().expect("a number of CPUs").get();
    for (machines, jobs) in [(&["sim:default"][..], cpus), (&["sim:default", "kvm:default"], 1)] {
        let machines = machines.iter().flat_map(|machine| ["--machine", machine]);
        let output = output(fixture().arg("good").args(machines).args(["--format", "json"]));
        let document = gmemtest::report::Document::parse(&stdout(&output)).expect("a document");
        assert_eq!(document.jobs, jobs);
    }
}

#[test]
fn what_had_only_started_when_the_machine_went_down_is_a_crash() {
    let directory = tempfile::tempdir().expect("a directory");
    let journal = directory.path().to_str().expect("a path that is text").to_owned();
    let (_, _) = support::document(&["good::passes", "--journal", &journal]);
    let path = directory.path().join("journal.jsonl");
    let text = std::fs::read_to_string(&path).expect("the journal");
    let cut: String = text.lines().take(2).map(|line| format!("{line}\n")).collect();
    std::fs::write(&path, cut).expect("it can be written");
    let (document, code) = support::document(&["good::passes", "--journal", &journal, "--resume"]);
    let record = support::record(&document, "good::passes");
    assert_eq!((record.outcome, code), (gmemtest::harness::Outcome::Crash, 1));
}

#[test]
fn every_suite_of_the_command_is_listed_with_its_promises() {
    let output = output(gmemtest().args(["list", "--format", "json"]));
    let list: serde_json::Value = serde_json::from_str(&stdout(&output)).expect("JSON");
    assert_eq!(list["schema"], "gmemtest-tests/1");
    let tests = list["tests"].as_array().expect("a list");
    assert!(tests.len() > 120, "{} claims", tests.len());
    for test in tests {
        assert!(test["doc"].as_str().is_some_and(|doc| doc.ends_with('.')), "{test}");
    }
}

#[test]
fn probe_says_what_each_missing_piece_would_need() {
    let output = output(gmemtest().args(["probe", "--format", "json"]));
    assert_eq!(code(&output), 0);
    let probe: serde_json::Value = serde_json::from_str(&stdout(&output)).expect("JSON");
    for machine in probe["machines"].as_array().expect("a list") {
        if machine["absent"].is_null() {
            let facilities = machine["facilities"].as_array().expect("a list");
            assert_eq!(facilities.len(), gmemtest::machine::Facility::ALL.len());
            for facility in facilities.iter().filter(|facility| facility["present"] == false) {
                assert_ne!(facility["missing"]["mend"], "", "{facility}");
            }
        }
    }
}

/// Runs the command as nobody; `None` for a caller that may not become another user.
fn as_nobody(mut command: Command) -> Option<Command> {
    if !nix::unistd::geteuid().is_root() {
        return None;
    }
    // The build directory need not be open to everybody: a copy of the binary is.
    let directory = std::env::temp_dir().join(format!("gmemtest-nobody-{}", std::process::id()));
    std::fs::create_dir_all(&directory).ok()?;
    let copy = directory.join("gmemtest");
    std::fs::copy(command.get_program(), &copy).ok()?;
    let mut copied = Command::new(copy);
    copied.args(command.get_args()).uid(65534).gid(65534).current_dir("/");
    command = copied;
    Some(command)
}

#[test]
fn an_unprivileged_user_gets_typed_skips_and_exit_4() {
    let mut command = gmemtest();
    command.args(["run", "gmem_create", "--machine", "kvm:default"]);
    // Where /dev/kvm is open to everybody, this user may do what root may.
    let open_to_all =
        std::fs::metadata("/dev/kvm").is_ok_and(|kvm| std::os::unix::fs::MetadataExt::mode(&kvm) & 0o6 == 0o6);
    let Some(mut command) = as_nobody(command).filter(|_| !open_to_all) else {
        return;
    };
    let output = output(&mut command);
    let text = stdout(&output);
    let _ = std::fs::remove_dir_all(std::path::Path::new(command.get_program()).parent().expect("a directory"));
    assert_eq!(code(&output), 4, "{text}{}", stderr(&output));
    assert_eq!(text.lines().filter(|line| line.contains("/dev/kvm")).count(), 1, "{text}");
    assert!(text.contains("0 passed"), "{text}");
}
