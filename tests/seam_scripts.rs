//! The SEAMCALL scripts under `tests/seam/`, the language's own mistakes, and the command that runs them.

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;

use gmemtest::script::seam::ast::{Action, Position, Script, Statement};
use gmemtest::script::seam::expect::{Expectation, Head, Relation};
use gmemtest::script::seam::{Failure, Summary, parse, read, run};

/// The test lines of TDX module spec 13 are numbered without a gap up to here.
const LAST_TEST_LINE: u32 = 147;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/seam")
}

fn scripts() -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = fs::read_dir(folder())
        .expect("tests/seam is there")
        .map(|entry| entry.expect("it can be listed").path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "seam"))
        .collect();
    files.sort();
    files
}

/// Runs `work` on every item, on two threads.
fn on_two_threads<T: Sync, R: Send>(items: &[T], work: impl Fn(&T) -> R + Sync) -> Vec<R> {
    let half = items.len().div_ceil(2).max(1);
    thread::scope(|scope| {
        let handles: Vec<_> =
            items.chunks(half).map(|chunk| scope.spawn(|| chunk.iter().map(&work).collect::<Vec<R>>())).collect();
        handles.into_iter().flat_map(|handle| handle.join().expect("no panic")).collect()
    })
}

/// `T62` of `T62.initialized`.
fn test_line(name: &str) -> Option<u32> {
    name.split('.').next()?.strip_prefix('T')?.parse().ok()
}

#[test]
fn every_test_line_of_the_specification_holds() {
    let files = scripts();
    let results: Vec<Result<Summary, Failure>> =
        on_two_threads(&files, |path| read(path).map_err(Failure::Script).and_then(|script| run(&script)));
    let mut lines = BTreeSet::new();
    let (mut tests, mut expectations, mut failures) = (0, 0, Vec::new());
    for result in results {
        match result {
            Ok(summary) => {
                lines.extend(summary.tests.iter().filter_map(|name| test_line(name)));
                tests += summary.tests.len();
                expectations += summary.expectations;
            }
            Err(failure) => failures.push(failure.to_string()),
        }
    }
    // Past the test harness, which shows nothing of a test that passes.
    let _ = writeln!(
        io::stderr(),
        "SEAMCALL scripts: {} test lines of the specification in {tests} tests, {expectations} expectations, {} files failed",
        lines.len(),
        failures.len(),
    );
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    let missing: Vec<u32> = (1..=LAST_TEST_LINE).filter(|line| !lines.contains(line)).collect();
    assert!(missing.is_empty(), "no script for T{missing:?}");
}

/// The blocks of a script, each a script that begins with its `test`.
fn blocks(script: &Script) -> Vec<Script> {
    let mut blocks: Vec<Script> = Vec::new();
    for statement in &script.statements {
        if matches!(statement.action, Action::Test(_)) || blocks.is_empty() {
            blocks.push(Script { file: script.file.clone(), statements: Vec::new() });
        }
        let block = blocks.last_mut().expect("one was pushed");
        block.statements.push(statement.clone());
        if matches!(statement.action, Action::Setup(_)) {
            // The invariants hold, as the scripts themselves show; here they would only cost time.
            let action = Action::Invariants(Position::Off);
            block.statements.push(Statement { action, expectation: None, ..statement.clone() });
        }
    }
    blocks
}

/// The expectations of a statement, those inside a `repeat` among them.
fn expectations(statement: &mut Statement) -> Vec<&mut Expectation> {
    let mut found: Vec<&mut Expectation> = statement.expectation.iter_mut().collect();
    if let Action::Repeat(_, _, body) = &mut statement.action {
        found.extend(body.iter_mut().flat_map(expectations));
    }
    found
}

/// Every way to turn one expectation of the block into its opposite, with the line it stands in.
fn perturbed(block: &Script) -> Vec<(usize, Script)> {
    let mut all = Vec::new();
    for index in 0..block.statements.len() {
        let line = block.statements[index].line;
        let count = expectations(&mut block.statements[index].clone()).len();
        for nth in 0..count {
            let change = |change: &dyn Fn(&mut Expectation) -> bool| {
                let mut script = block.clone();
                script.statements.truncate(index + 1);
                let changed = change(expectations(&mut script.statements[index]).remove(nth));
                changed.then_some((line, script))
            };
            all.extend(change(&|expectation| match expectation.head.take() {
                Some(head) => {
                    expectation.head = Some(Head::Not(Box::new(head)));
                    true
                }
                None => false,
            }));
            let checks = expectations(&mut block.statements[index].clone())[nth].checks.len();
            for check in 0..checks {
                all.extend(change(&|expectation| {
                    let check = &mut expectation.checks[check];
                    check.relation = match check.relation {
                        Relation::Equal => Relation::Different,
                        Relation::Different => Relation::Equal,
                    };
                    true
                }));
            }
        }
    }
    all
}

/// A script that passes whatever the module answers would prove nothing: of every block, one expectation at a time is turned
/// into its opposite, and the run must end at that line.
#[test]
fn every_expectation_can_fail() {
    let files = scripts();
    let results = on_two_threads(&files, |path| {
        let script = read(path).expect("it is well-formed");
        let mut survivors = Vec::new();
        let mut count = 0;
        for block in blocks(&script) {
            // Blocks of hundreds of repetitions are sampled at their end.
            let large = block.statements.iter().filter(|s| matches!(s.action, Action::Repeat(..))).count() > 1;
            let mut mutants = perturbed(&block);
            if large {
                mutants = mutants.split_off(mutants.len().saturating_sub(1));
            }
            for (line, mutant) in mutants {
                count += 1;
                match run(&mutant) {
                    Err(Failure::Mismatch(mismatch)) if mismatch.line == line => {}
                    other => survivors.push(format!("{}:{line}: {other:?}", path.display())),
                }
            }
        }
        (count, survivors)
    });
    let count: usize = results.iter().map(|(count, _)| count).sum();
    let survivors: Vec<String> = results.into_iter().flat_map(|(_, survivors)| survivors).collect();
    assert!(survivors.is_empty(), "{}", survivors.join("\n"));
    assert!(count > 500, "only {count} expectations were perturbed");
}

fn failure(text: &str) -> Failure {
    match parse("x.seam", text) {
        Ok(script) => run(&script).expect_err(text),
        Err(error) => Failure::Script(error),
    }
}

#[test]
fn a_wrong_expectation_names_file_line_leaf_and_both_statuses() {
    let text = "setup S2\npage p\ncall TDH.MEM.PAGE.AUG rcx=0x0 rdx=tdr r8=p -> 0\n\
                call TDH.MEM.PAGE.AUG rcx=0x0 rdx=tdr r8=p -> TDX_OPERAND_BUSY|SEPT_TREE\n";
    let message = failure(text).to_string();
    assert_eq!(
        message,
        "x.seam:4: TDH.MEM.PAGE.AUG: result differs\n    \
         call TDH.MEM.PAGE.AUG rcx=0x0 rdx=tdr r8=p -> TDX_OPERAND_BUSY|SEPT_TREE\n    \
         expected  0x8000020000000092 (TDX_OPERAND_BUSY | SEPT_TREE)\n    \
         actual    0xc0000b0d00000001 (TDX_EPT_ENTRY_STATE_INCORRECT | RCX)"
    );
}

#[test]
fn wrong_registers_exits_and_values_are_differences() {
    let cases = [
        ("call TDH.MEM.SEPT.RD rcx=0|1 rdx=tdr -> 0, rcx=8", "rcx differs", "expected  8", "actual    0x7"),
        ("call TDH.MEM.TRACK rcx=tdr -> 1", "result differs", "0x0000000000000001", "0 (TDX_SUCCESS)"),
        ("call TDH.MEM.TRACK rcx=q -> 0", "result differs", "0 (TDX_SUCCESS)", "TDX_PAGE_METADATA_INCORRECT | RCX"),
        ("guest V read gpa=0x0 -> ok", "result differs", "ok", "TD exit, 0x0000000000000030"),
        ("guest V read gpa=0x0 -> exit 1", "result differs", "reason 1", "TD exit, 0x0000000000000030"),
        ("guest V read gpa=0x0 -> #VE", "result differs", "#VE", "TD exit"),
        (
            "guest V accept gpa=0x0 level=2 -> 0",
            "TDG.MEM.PAGE.ACCEPT: result",
            "0 (TDX_SUCCESS)",
            "TDX_OPERAND_INVALID | RCX",
        ),
        ("enter V -> 80000701", "TDH.VP.ENTER: result", "TDX_VCPU_ASSOCIATED", "the vCPU runs"),
        ("sept gpa=0 level=1 -> MAPPED", "result differs", "MAPPED", "NL_MAPPED"),
        ("rdmd sept1 -> type=REG", "type differs", "REG", "PT_EPT (8)"),
        ("look td -> chldcnt=0", "chldcnt differs", "expected  0", "actual    0xf"),
        ("look td -> mrtd=00", "mrtd differs", "expected  00", "38b060a7"),
        ("exit V -> ok", "result differs", "ok", "the vCPU is not in the guest"),
        ("host read q -> 1", "result differs", "0x1", "actual    0x0"),
    ];
    for (statement, what, expected, actual) in cases {
        let failure = failure(&format!("setup S2\n{statement}\n"));
        assert!(matches!(failure, Failure::Mismatch(_)), "{statement}: {failure}");
        let message = failure.to_string();
        for part in ["x.seam:2: ", what, expected, actual] {
            assert!(message.contains(part), "{statement}: no `{part}` in\n{message}");
        }
    }
}

#[test]
fn a_malformed_script_names_file_line_and_mend() {
    let cases = [
        ("call TDH.MEM.PAGE.GUA rcx=0", "`TDH.MEM.PAGE.GUA` is no SEAMCALL leaf", "TDH.MEM.PAGE.AUG"),
        ("call TDH.MEM.TRACK rxc=tdr", "`rxc` is no register", "write rax"),
        ("call TDH.MEM.TRACK rcx=tdr -> 0, rxc=1", "`rxc` is no register", "r8 to r15"),
        ("call TDH.MEM.TRACK rcx=tdr ->", "`->` has no expectation", "TDX_OPERAND_BUSY|RCX"),
        ("call TDH.MEM.TRACK rcx=tdr -> 0, rcx=", "`rcx=` has no expected value", "reg=value"),
        ("call TDH.MEM.TRACK rcx=tdr -> 0,", "beside a comma", "STATUS, reg=value"),
        ("call TDH.MEM.TRACK rcx=", "`rcx=` has no value", "rcx=VALUE"),
        ("call TDH.MEM.TRACK rcx=tdr rcx=tdr", "`rcx` is given twice", "once"),
        ("call TDH.MEM.PAGE.AUG rcx=0 rdx=tdr r8=p", "`p` is used before it is made", "page p"),
        ("call TDH.MEM.TRACK rcx=tdr -> TDX_OPERAND_BUSY|THING", "`THING` is neither an operand", "SEPT_TREE"),
        ("call TDH.MEM.TRACK rcx=tdr -> TDX_OPERAND_BUZY", "`TDX_OPERAND_BUZY` is not a completion status", "TDX_"),
        ("call TDH.MEM.TRACK rcx=tdr -> sucess", "`sucess` is neither a status", "ok"),
        ("call TDH.MEM.TRACK rcx=0xZZ", "`0xZZ` is not a value", "0x1000"),
        ("call", "`call` needs a leaf", "call TDH.MEM.PAGE.AUG"),
        ("cal TDH.MEM.TRACK", "`cal` is no statement", "call"),
        ("rcx=5", "`rcx=5` is no statement", "let"),
        ("page", "`page` needs a name", "page p"),
        ("page 5x", "`5x` cannot be a name", "a letter"),
        ("guest V frobnicate", "a guest cannot `frobnicate`", "accept"),
        ("guest W read gpa=0", "`W` is used before it is made", "page W"),
        ("guest V read", "`guest` needs an address", "gpa=0x0"),
        ("guest V accept", "TDG.MEM.PAGE.ACCEPT needs gpa=", "gpa=0x0"),
        ("lock thing by=lp1", "`thing` is no lock", "sept-tree"),
        ("lock sept-tree sideways by=lp1", "`sideways` is no lock mode", "shared"),
        ("unlock sept-tree by=lp1", "lp1 has not locked this", "by="),
        ("call TDH.MEM.TRACK rcx=tdr lp=lp99", "there is no logical processor lp99", "lps="),
        ("hold TDH.MEM.TRACK rcx=tdr at=nowhere", "`nowhere` is no point", "commit"),
        ("release lp1", "lp1 has no leaf held", "hold"),
        ("switch warp on", "`warp` is no switch", "dpamt"),
        ("switch dpamt maybe", "`maybe` is neither on nor off", "switch dpamt on"),
        ("call TDH.MEM.TRACK rcx=tdr ; switch dpamt on", "`dpamt` cannot change any more", "setup S2 dpamt=on"),
        ("fault leaf=TDH.MEM.TRACK", "`fault` has neither", "status="),
        ("fault busy-thrice leaf=TDH.MEM.TRACK", "`busy-thrice` is no preset", "busy-once"),
        ("fault busy-once leaf=TDH.NO", "`TDH.NO` is no leaf", "TDH.MEM.PAGE.REMOVE"),
        ("advance 1h", "`1h` is no duration", "1s"),
        ("setup S3", "`S3` is no fixture", "S2"),
        ("setup S2 warp=on", "`warp` is no switch", "dpamt"),
        ("sept gpa=0 level=0 td=q", "this TD has no Secure EPT", "td=tdr"),
        ("look td -> colour=1", "`colour` is no register and no field", "chldcnt"),
        ("repeat 3", "`repeat` repeats nothing", "repeat 512"),
        ("invariants perhaps", "`perhaps` is neither on nor off", "invariants off"),
    ];
    for (statement, what, mend) in cases {
        let failure = failure(&format!("# first\nsetup S2\n{statement}\n"));
        let Failure::Script(error) = &failure else { panic!("{statement}: {failure}") };
        assert_eq!(error.line, 3, "{statement}: {error}");
        assert!(error.what.contains(what), "{statement}: {error}");
        assert!(error.mend.contains(mend), "{statement}: {error}");
        assert!(!error.to_string().contains('\n'), "{statement}: {error}");
    }
    let early = failure("page p\n").to_string();
    assert!(early.starts_with("x.seam:1: `page p` stands before any setup; "), "{early}");
}

/// Every example of the manual runs, and every statement has one.
#[test]
fn the_manual_is_true() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/seam-scripts.md");
    let text = fs::read_to_string(&path).expect("the manual is there");
    let mut examples = 0;
    let mut begun: Option<(usize, String)> = None;
    for (index, line) in text.lines().enumerate() {
        match &mut begun {
            None if line == "```seam" => begun = Some((index + 1, String::new())),
            None => {}
            Some(_) if line == "```" => {
                let (first, example) = begun.take().expect("it was begun");
                // Blank lines in front keep the line numbers those of the manual.
                let script = parse("docs/seam-scripts.md", &format!("{}{example}", "\n".repeat(first)));
                let script = script.unwrap_or_else(|error| panic!("{error}"));
                run(&script).unwrap_or_else(|failure| panic!("{failure}"));
                examples += 1;
            }
            Some((_, example)) => {
                example.push_str(line);
                example.push('\n');
            }
        }
    }
    assert!(examples > 20, "{examples} examples");
    for keyword in gmemtest::script::seam::KEYWORDS {
        assert!(text.contains(&format!("### `{keyword}")), "the manual has no section `{keyword}`");
    }
}

fn gmemtest_seam(files: &[&Path]) -> (Option<i32>, String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_gmemtest")).arg("seam").args(files).output().expect("it starts");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("it prints text");
    (output.status.code(), text(output.stdout), text(output.stderr))
}

#[test]
fn the_command_prints_a_line_a_file_and_totals_and_says_by_its_exit_code_what_happened() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let write = |name: &str, text: &[u8]| {
        let path = dir.path().join(name);
        fs::write(&path, text).expect("it can be written");
        path
    };
    let good = write("good.seam", b"test A\nsetup S2\ncall TDH.MEM.TRACK rcx=tdr -> 0\n");
    let wrong = write("wrong.seam", b"setup S2\ncall TDH.MEM.TRACK rcx=tdr -> 0xC000030000000001\n");
    let malformed = write("malformed.seam", b"setup S2\ncall TDH.MEM.TRUCK rcx=tdr\n");
    let binary = write("binary.seam", b"setup S2\n\xff\xfe\n");
    let control = write("control.seam", b"setup S2\n\0\n");
    let missing = dir.path().join("missing.seam");

    let (code, out, err) = gmemtest_seam(&[&good]);
    assert_eq!((code, err.as_str()), (Some(0), ""));
    assert!(
        out.starts_with(&format!("pass   {}: 1 tests, 1 expectations\n1 passed, 0 failed", good.display())),
        "{out}"
    );

    let (code, out, err) = gmemtest_seam(&[&wrong, &good]);
    assert_eq!((code, err.as_str()), (Some(1), ""));
    assert!(out.starts_with(&format!("fail   {}:2: TDH.MEM.TRACK: result differs\n", wrong.display())), "{out}");
    assert!(out.contains("\npass   ") && out.contains("\n1 passed, 1 failed, 0 malformed;"), "{out}");

    for (path, place, what) in [
        (&malformed, ":2", "`TDH.MEM.TRUCK` is no SEAMCALL leaf"),
        (&binary, ":2", "is not UTF-8 text"),
        (&control, ":2", "holds a control character"),
        (&missing, "", "there is no such file"),
        (&dir.path().to_path_buf(), "", "is a directory"),
    ] {
        let (code, _, err) = gmemtest_seam(&[path]);
        assert_eq!(code, Some(2), "{err}");
        assert!(err.starts_with(&format!("gmemtest: {}{place}: {what}", path.display())), "{err}");
        assert_eq!(err.lines().count(), 1, "{err}");
    }
    let (code, _, err) = gmemtest_seam(&[]);
    assert_eq!(code, Some(2), "{err}");
}
