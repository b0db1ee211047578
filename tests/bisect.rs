//! Bisection and comparison, on kernels that are files: their QEMU runs the tests on this host.

mod support;

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use support::{code, output, stderr, stdout};

/// A directory with a QEMU that has no guest.
fn directory() -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    symlink(env!("CARGO_BIN_EXE_rig_fixture"), directory.path().join("qemu-system-x86_64")).unwrap();
    directory
}

/// The file that stands for a kernel of this release.
fn image(release: &str) -> Vec<u8> {
    let mut bytes = vec![0u8; 4096];
    bytes[0x1f1] = 1;
    bytes[0x202..0x206].copy_from_slice(b"HdrS");
    bytes[0x206..0x208].copy_from_slice(&0x20fu16.to_le_bytes());
    bytes[0x20e..0x210].copy_from_slice(&0x100u16.to_le_bytes());
    bytes[0x300..0x300 + release.len()].copy_from_slice(release.as_bytes());
    bytes
}

fn images(directory: &Path, releases: &[&str]) -> Vec<PathBuf> {
    let write = |(number, release): (usize, &&str)| {
        let path = directory.join(format!("{number}-{release}"));
        fs::write(&path, image(release)).unwrap();
        path
    };
    releases.iter().enumerate().map(write).collect()
}

/// `gmemtest SUBCOMMAND` with that QEMU, in that directory.
fn command(directory: &Path, subcommand: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_rig_fixture"));
    let path = std::env::join_paths(
        std::iter::once(directory.to_owned()).chain(std::env::split_paths(&std::env::var_os("PATH").unwrap())),
    );
    command.args([subcommand, "--accel", "tcg"]).current_dir(directory).env("PATH", path.unwrap());
    command.env("RIG_FIXTURE_COUNTER", directory.join("counter"));
    command
}

fn bisect(directory: &Path, images: &[PathBuf], flags: &[&str]) -> Output {
    let mut command = command(directory, "bisect");
    for image in images {
        command.arg("--kernel").arg(image);
    }
    output(command.args(flags).args(["--", "run", "aid::kernel_is_good", "--machine", "sim:default"]))
}

#[test]
fn the_first_bad_image_is_found_with_the_evidence_for_it() {
    let directory = directory();
    let images = images(directory.path(), &["6.1-good", "6.2-good", "6.3-dead", "6.4-good", "6.5-bad", "6.6-bad"]);
    let end = bisect(directory.path(), &images, &[]);
    let text = stdout(&end);
    assert!(text.starts_with("the first bad kernel is 6.5-bad ("), "{text} {}", stderr(&end));
    assert!(text.contains("; the last good one is 6.4-good ("), "{text}");
    assert!(text.contains("fail  aid::kernel_is_good  [sim:default]\n      6.5-bad calls itself bad"), "{text}");
    assert_eq!(code(&end), 0);
}

#[test]
fn a_failure_that_went_away_is_found_too() {
    let directory = directory();
    let images = images(directory.path(), &["6.1-bad", "6.2-bad", "6.3-good", "6.4-good"]);
    let end = bisect(directory.path(), &images, &["--format", "json"]);
    let found: serde_json::Value = serde_json::from_slice(&end.stdout).unwrap();
    assert_eq!(found["first_good"], images[2].display().to_string());
    assert_eq!(
        (&found["first_bad"], &found["bad"]["subject"]),
        (&serde_json::Value::Null, &images[1].display().to_string().into())
    );
    assert_eq!(code(&end), 0);
    let end = bisect(directory.path(), &images, &[]);
    let text = stdout(&end);
    assert!(
        text.starts_with("the first good kernel is 6.3-good (") && text.contains("; the last bad one is 6.2-bad ("),
        "{text}"
    );
    assert!(text.contains("\nfirst good: ") && text.contains("\nbad: "), "{text}");
}

#[test]
fn an_end_that_cannot_be_judged_is_told_with_the_mend() {
    let directory = directory();
    let images = images(directory.path(), &["6.1-good", "6.2-dead"]);
    let end = bisect(directory.path(), &images, &[]);
    let text = stdout(&end);
    assert!(
        text.starts_with("the last kernel, 6.2-dead (") && text.contains("cannot be judged: name another one"),
        "{text}"
    );
    assert_eq!(code(&end), 1);
    let mut command = command(directory.path(), "bisect");
    command.args(["--log", "other.log", "--kernel"]).arg(&images[0]).arg("--kernel").arg(&images[1]);
    // Outside of the rig it declines.
    let end = output(command.args(["--", "run", "aid::kernel_panics", "--machine", "sim:default"]));
    let text = stdout(&end);
    assert!(text.starts_with("the first kernel, 6.1-good ("), "{text}");
    assert!(
        text.contains("cannot be judged: every test was skipped there; with --strict a skip is a failure"),
        "{text}"
    );
}

#[test]
fn an_interrupted_bisection_goes_on_from_its_log() {
    let directory = directory();
    let images = images(directory.path(), &["6.1-good", "6.2-good", "6.3-bad"]);
    assert_eq!(code(&bisect(directory.path(), &images, &[])), 0);
    let log = directory.path().join("gmemtest-bisect.log");
    // The last verdict was being written when it was interrupted.
    let text = fs::read_to_string(&log).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    fs::write(&log, format!("{}\n{}", lines[..3].join("\n"), &lines[3][..20])).unwrap();
    let end = bisect(directory.path(), &images, &[]);
    let told = stderr(&end);
    assert!(stdout(&end).starts_with("the first bad kernel is 6.3-bad"), "{told}");
    assert_eq!(told.matches("(from gmemtest-bisect.log)").count(), 2, "{told}");
    let other = bisect(directory.path(), &images[1..], &[]);
    assert_eq!(code(&other), 2);
    assert!(stderr(&other).contains("is of another bisection"), "{}", stderr(&other));
}

#[test]
fn a_flaky_failure_takes_as_many_runs_as_its_rate_asks_for() {
    let directory = directory();
    let images = images(directory.path(), &["6.1-good", "6.2-good", "6.3-flaky"]);
    let end = bisect(directory.path(), &images, &["--failure-rate", "0.3"]);
    let told = stderr(&end);
    assert!(stdout(&end).starts_with("the first bad kernel is 6.3-flaky"), "{} {told}", stdout(&end));
    // 0.7^13 is the first power below 0.01 / 0.99; the flaky one fails at its third run.
    assert_eq!(told.matches("good after 13 run(s), 0 failed").count(), 2, "{told}");
    assert!(told.contains("bad after 3 run(s), 1 failed"), "{told}");
}

#[test]
fn ends_that_do_not_differ_are_told() {
    let directory = directory();
    let images = images(directory.path(), &["6.1-good", "6.2-good"]);
    let end = bisect(directory.path(), &images, &[]);
    assert!(stdout(&end).starts_with("nothing changes: the first kernel, 6.1-good ("), "{}", stdout(&end));
    assert!(stdout(&end).contains("6.2-good") && stdout(&end).contains(", are both good\n"), "{}", stdout(&end));
    assert_eq!(code(&end), 1);
    for (flags, line) in [
        (&["--failure-rate", "2"][..], "gmemtest: --failure-rate 2: is a probability"),
        (&["--noise-rate", "1"], "gmemtest: --noise-rate 1 must be below --failure-rate 1"),
    ] {
        let end = bisect(directory.path(), &images, flags);
        assert_eq!(code(&end), 2);
        assert!(stderr(&end).starts_with(line), "{}", stderr(&end));
    }
}

/// A git repository that `make` makes a "kernel" of: the file `image` is it; a commit with a file `broken` cannot be built.
/// With SLOW in the environment a bad one takes for ever, with PATCHED there has to be a file `patched`.
fn tree(directory: &Path, releases: &[&str]) -> PathBuf {
    let tree = directory.join("linux");
    fs::create_dir(&tree).unwrap();
    let git = |arguments: &[&str]| {
        let end = output(Command::new("git").arg("-C").arg(&tree).args(arguments));
        assert!(end.status.success(), "{}", stderr(&end));
    };
    git(&["init", "--quiet"]);
    let makefile = "tinyconfig olddefconfig:\n\ttouch $(O)/.config\n\
                    bzImage:\n\ttest ! -e broken\n\ttest -z \"$$PATCHED\" || test -e patched\n\
                    \ttest -z \"$$SLOW\" || ! grep -q bad image || { echo $$$$ > $$SLOW; exec sleep 1000; }\n\tgrep -q CONFIG_KVM=y $(O)/.config\n\
                    \tmkdir -p $(O)/arch/x86/boot\n\tcp image $(O)/arch/x86/boot/bzImage\n";
    fs::write(tree.join("Makefile"), makefile).unwrap();
    for (number, release) in releases.iter().enumerate() {
        fs::write(tree.join("image"), image(&format!("6.{number}-{release}"))).unwrap();
        let _ = fs::remove_file(tree.join("broken"));
        if *release == "broken" {
            fs::write(tree.join("broken"), "").unwrap();
        }
        git(&["add", "--all"]);
        git(&["-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "-m", &format!("mm: change {number}")]);
        git(&["tag", &format!("v{number}")]);
    }
    tree
}

#[test]
fn the_first_bad_commit_of_a_tree_is_found_and_the_tree_stays_as_it_was() {
    let directory = directory();
    let tree = tree(directory.path(), &["good", "good", "broken", "good", "good", "bad", "bad", "bad"]);
    let mut command = command(directory.path(), "bisect");
    command.arg("--tree").arg(&tree).args(["--good", "v0", "--bad", "v7", "--make-jobs", "1"]);
    let end = output(command.args(["--", "run", "aid::kernel_is_good", "--machine", "sim:default"]));
    let text = stdout(&end);
    assert!(text.starts_with("the first bad commit is "), "{text} {}", stderr(&end));
    assert!(text.lines().next().unwrap().contains("mm: change 5 (a, "), "{text}");
    assert!(text.contains("last good: ") && text.contains("6.5-bad calls itself bad"), "{text}");
    assert_eq!(code(&end), 0);
    let state = output(Command::new("git").arg("-C").arg(&tree).args(["status", "--porcelain"]));
    assert_eq!(stdout(&state), "");
    let worktrees = output(Command::new("git").arg("-C").arg(&tree).args(["worktree", "list"]));
    assert_eq!(stdout(&worktrees).lines().count(), 1, "{}", stdout(&worktrees));
    let nowhere = output(
        Command::new(env!("CARGO_BIN_EXE_rig_fixture"))
            .args(["bisect", "--accel", "tcg", "--good", "v9", "--bad", "v7", "--tree"])
            .arg(&tree)
            .current_dir(directory.path()),
    );
    assert_eq!(code(&nowhere), 2);
    assert!(stderr(&nowhere).contains("gmemtest: --good v9: is no commit of"), "{}", stderr(&nowhere));
}

/// The command that bisects that repository.
fn bisect_tree(directory: &Path, tree: &Path, bad: &str, flags: &[&str]) -> Command {
    let mut command = command(directory, "bisect");
    command.arg("--tree").arg(tree).args(["--good", "v0", "--bad", bad, "--make-jobs", "1"]).args(flags);
    command.args(["--", "run", "aid::kernel_is_good", "--machine", "sim:default"]);
    command
}

#[test]
fn a_signal_ends_the_build_and_the_same_command_goes_on() {
    use nix::sys::signal::{Signal, kill};
    use nix::unistd::Pid;
    let directory = directory();
    let tree = tree(directory.path(), &["good", "good", "good", "bad", "bad", "bad"]);
    let slow = directory.path().join("slow");
    let mut bisection = bisect_tree(directory.path(), &tree, "v5", &[])
        .env("SLOW", &slow)
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let builder = loop {
        match fs::read_to_string(&slow).map(|text| text.trim().parse::<i32>()) {
            Ok(Ok(pid)) => break pid,
            _ => std::thread::sleep(std::time::Duration::from_millis(10)),
        }
        assert!(bisection.try_wait().unwrap().is_none(), "the bisection ended before it built anything");
    };
    kill(Pid::from_raw(i32::try_from(bisection.id()).unwrap()), Signal::SIGINT).unwrap();
    let end = bisection.wait_with_output().unwrap();
    let told = stderr(&end);
    assert_eq!(code(&end), 128 + 2, "{told}");
    assert!(told.contains("interrupted; the same command goes on from gmemtest-bisect.log"), "{told}");
    assert!(kill(Pid::from_raw(builder), None).is_err(), "what make started goes on");
    let log = fs::read_to_string(directory.path().join("gmemtest-bisect.log")).unwrap();
    assert_eq!((log.lines().count(), log.contains("cannot-tell")), (2, false), "{log}");

    let end = output(&mut bisect_tree(directory.path(), &tree, "v5", &[]));
    assert!(stdout(&end).contains("mm: change 3 (a, "), "{} {}", stdout(&end), stderr(&end));
    assert_eq!(stderr(&end).matches("(from gmemtest-bisect.log)").count(), 1, "{}", stderr(&end));
    let worktrees = output(Command::new("git").arg("-C").arg(&tree).args(["worktree", "list"]));
    assert_eq!(stdout(&worktrees).lines().count(), 1, "{}", stdout(&worktrees));
}

#[test]
fn every_revision_is_patched() {
    let directory = directory();
    let tree = tree(directory.path(), &["good", "good", "bad", "bad"]);
    let patch = directory.path().join("add.patch");
    let text = "A file more.\n---\n--- /dev/null\n+++ b/patched\n@@ -0,0 +1 @@\n+yes\n";
    fs::write(&patch, text).unwrap();
    let bisect = |log: &str, patch: &[&str]| {
        let flags: Vec<&str> = ["--log", log].iter().chain(patch).copied().collect();
        output(bisect_tree(directory.path(), &tree, "v3", &flags).env("PATCHED", "1"))
    };
    let end = bisect("without", &[]);
    assert!(stdout(&end).contains("ought to be good: cannot tell"), "{} {}", stdout(&end), stderr(&end));
    let end = bisect("with", &["--patch", "add.patch"]);
    assert!(stdout(&end).contains("mm: change 2 (a, "), "{} {}", stdout(&end), stderr(&end));
    fs::write(&patch, "--- a/Makefile\n+++ b/Makefile\n@@ -1 +1 @@\n-of another release\n+of this one\n").unwrap();
    let end = bisect("wrong", &["--patch", "add.patch"]);
    let text = stdout(&end);
    assert!(text.contains("git apply") && text.contains("Makefile:1"), "{text} {}", stderr(&end));
    let end = bisect("none", &["--patch", "nosuch.patch"]);
    assert!(stderr(&end).contains("--patch nosuch.patch: cannot be read"), "{}", stderr(&end));
}

/// An ssh that runs the command here, as if on a machine that boots what was deployed last.
const SSH: &str = r#"#!/bin/sh
while [ "$1" = -o ]; do shift 2; done
shift
case $1 in
*boot_id*) cat booted ;;
"uname -r") cut -d' ' -f2 booted ;;
"cat > "*) cat > program; chmod 755 program ;;
*) RIG_FIXTURE_KERNEL=$(cut -d' ' -f2 booted) sh -c "./program ${1#* }" ;;
esac
"#;

#[test]
fn another_machine_boots_the_kernels_over_ssh() {
    use std::os::unix::fs::PermissionsExt;
    let directory = directory();
    let ssh = directory.path().join("ssh");
    fs::write(&ssh, SSH).unwrap();
    fs::set_permissions(&ssh, fs::Permissions::from_mode(0o755)).unwrap();
    fs::write(directory.path().join("booted"), "0 none\n").unwrap();
    let images = images(directory.path(), &["6.1-good", "6.2-good", "6.3-bad", "6.4-bad"]);
    let deploy = "echo \"$(date +%N)$$ $GMEMTEST_RELEASE\" > booted";
    let end = bisect(directory.path(), &images, &["--host", "tdx1", "--deploy", deploy]);
    assert!(stdout(&end).starts_with("the first bad kernel is 6.3-bad"), "{} {}", stdout(&end), stderr(&end));
    // A machine that was not rebooted is not judged.
    let flags = ["--host", "tdx1", "--deploy", "true", "--deploy-timeout", "1", "--log", "other"];
    let end = bisect(directory.path(), &images, &flags);
    assert!(stderr(&end).contains("tdx1 did not come back with another boot id"), "{}", stderr(&end));
    assert_eq!(code(&end), 1);
}

#[test]
fn results_are_compared() {
    let directory = directory();
    let images = images(directory.path(), &["6.1-good", "6.2-bad"]);
    let results: Vec<PathBuf> = images.iter().map(|image| image.with_extension("json")).collect();
    for (image, result) in images.iter().zip(&results) {
        let mut vm = command(directory.path(), "vm");
        vm.arg("--kernel").arg(image).args(["--", "run", "aid::kernel_is_good", "aid::passes*"]);
        output(vm.args(["--machine", "sim:default", "--format", "json", "--output"]).arg(result));
    }
    let compare = |flags: &[&str], from: usize, to: usize| {
        output(
            Command::new(env!("CARGO_BIN_EXE_rig_fixture"))
                .arg("compare")
                .args(flags)
                .args([&results[from], &results[to]]),
        )
    };
    let worse = compare(&[], 0, 1);
    let text = stdout(&worse);
    assert_eq!(code(&worse), 1, "{text} {}", stderr(&worse));
    assert!(text.contains("newly failing:\n  aid::kernel_is_good  [sim:default]: pass -> fail"), "{text}");
    assert!(text.ends_with("1 newly failing; 3 the same\n"), "{text}");
    assert_eq!(code(&compare(&[], 1, 0)), 0);
    let json: serde_json::Value = serde_json::from_str(&stdout(&compare(&["--format", "json"], 1, 0))).unwrap();
    assert_eq!(json["differences"][0]["change"], "fixed");

    let changed = fs::read_to_string(&results[0]).unwrap().replace("sim:default", "kvm:default");
    fs::write(&results[0], changed).unwrap();
    let across = compare(&[], 0, 1);
    assert_eq!(code(&across), 2);
    assert!(stderr(&across).contains("a simulated machine is not compared with a real one"), "{}", stderr(&across));
    assert_eq!(code(&compare(&["--across-machines"], 0, 1)), 1);
}

#[test]
fn several_kernels_make_a_table() {
    let directory = directory();
    let images = images(directory.path(), &["6.1-good", "6.2-bad", "6.3-dead"]);
    let mut matrix = command(directory.path(), "matrix");
    for image in &images {
        matrix.arg("--kernel").arg(image);
    }
    matrix.args(["--output", "all.json", "--", "run", "aid::kernel_is_good", "aid::passes*"]);
    let end = output(matrix.args(["--machine", "sim:default"]));
    let text = stdout(&end);
    assert!(text.contains("  1  6.1-good  [sim:default]\n  2  6.2-bad  [sim:default]\n"), "{text} {}", stderr(&end));
    assert!(text.contains("  -  6.3-dead: QEMU died"), "{text}");
    assert!(text.contains("aid::kernel_is_good  pass      fail*"), "{text}");
    assert!(text.ends_with("3 pass everywhere\n"), "{text}");
    assert_eq!(code(&end), 1);
    let json = fs::read_to_string(directory.path().join("all.json")).unwrap();
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json["columns"][1]["results"]["summary"]["fail"], 1);
}
