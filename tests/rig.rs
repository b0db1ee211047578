//! The rig: verdicts come back from a kernel, whatever it does, and nothing is left behind.
//!
//! GMEMTEST_RIG_KERNEL names the bzImage to boot; without it, or without QEMU, what needs a boot is not run.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use gmemtest::harness::Outcome;
use gmemtest::report::Document;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// The command with tests that take their kernel down.
fn rig() -> Command {
    Command::new(env!("CARGO_BIN_EXE_rig_fixture"))
}

/// The kernel to boot; says why when there is none.
fn kernel() -> Option<PathBuf> {
    let has_qemu = std::env::var_os("PATH").is_some_and(|path| {
        std::env::split_paths(&path).any(|directory| directory.join("qemu-system-x86_64").exists())
    });
    match std::env::var_os("GMEMTEST_RIG_KERNEL") {
        _ if !has_qemu => eprintln!("not run: qemu-system-x86_64 is not in PATH"),
        None => eprintln!("not run: GMEMTEST_RIG_KERNEL names no bzImage"),
        Some(kernel) => return Some(kernel.into()),
    }
    None
}

/// A boot of the kernel that runs `patterns` on the model, with more flags for `vm`.
fn boot(kernel: &Path, flags: &[&str], patterns: &[&str]) -> Command {
    let mut command = rig();
    command.args(["vm", "--accel", "tcg", "--memory", "512M", "--kernel"]).arg(kernel).args(flags);
    command.args(["--", "run", "--machine", "sim:default", "--format", "json"]).args(patterns);
    command
}

/// For tests that leave nothing for the one after them.
const ONE_AT_A_TIME: &str = "--jobs=1";

struct Ended {
    code: i32,
    stdout: String,
    stderr: String,
}

impl Ended {
    fn results(&self) -> Document {
        Document::parse(&self.stdout).unwrap_or_else(|error| panic!("{error}: {} {}", self.stdout, self.stderr))
    }

    fn outcomes(&self) -> Vec<(String, Outcome)> {
        self.results().results.into_iter().map(|record| (record.name, record.outcome)).collect()
    }
}

fn ended(command: &mut Command) -> Ended {
    let output = command.stdin(Stdio::null()).output().unwrap();
    Ended {
        code: output.status.code().unwrap_or(-1),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

fn named(outcomes: &[(&str, Outcome)]) -> Vec<(String, Outcome)> {
    outcomes.iter().map(|(name, outcome)| (format!("aid::{name}"), *outcome)).collect()
}

#[test]
fn verdicts_come_back_and_a_full_disk_costs_only_the_copy_of_the_console() {
    let Some(kernel) = kernel() else { return };
    let end = ended(&mut boot(
        &kernel,
        &["--console", "/dev/full"],
        &["aid::passes*", "aid::kernel_complains", ONE_AT_A_TIME],
    ));
    assert_eq!(
        end.outcomes(),
        named(&[
            ("passes_before", Outcome::Pass),
            ("kernel_complains", Outcome::Tainted),
            ("passes_between", Outcome::Pass),
            ("passes_after", Outcome::Pass),
        ]),
        "{}",
        end.stderr
    );
    assert_eq!(end.code, 1);
    assert!(end.stderr.contains("--console: the copy is not complete"), "{}", end.stderr);
    let release = end.results().environment.kernel_release;
    assert!(end.stderr.contains(&format!("gmemtest: {release} under TCG")), "{}", end.stderr);
}

#[test]
fn what_takes_the_kernel_down_crashed_and_the_rest_runs_in_fresh_boots() {
    let Some(kernel) = kernel() else { return };
    let flags = ["--restart-after-crash", "--timeout", "120"];
    let end = ended(&mut boot(&kernel, &flags, &["aid::passes*", "aid::kernel_panics", ONE_AT_A_TIME]));
    let passed_once = |name: &str| (format!("aid::{name}"), Outcome::Pass);
    assert_eq!(
        end.outcomes(),
        [
            passed_once("passes_before"),
            ("aid::kernel_panics".to_owned(), Outcome::Crash),
            passed_once("passes_between"),
            passed_once("passes_after"),
        ],
        "{}",
        end.stderr
    );
    let results = end.results();
    let crash = &results.results[1];
    assert_eq!(crash.message.as_deref(), Some("the kernel panicked: sysrq triggered crash"));
    assert!(crash.kernel_log.iter().any(|line| line.contains("Kernel panic - not syncing")), "{crash:?}");
    assert_eq!((end.code, results.stopped), (1, None));
}

#[test]
fn a_panic_is_laid_at_the_door_of_the_test_that_it_names() {
    let Some(kernel) = kernel() else { return };
    let patterns = ["aid::kernel_panics", "aid::takes_its_time"];
    let end = ended(&mut boot(&kernel, &["--restart-after-crash"], &patterns));
    let expected = named(&[("kernel_panics", Outcome::Crash), ("takes_its_time", Outcome::Pass)]);
    assert_eq!(end.outcomes(), expected, "{}", end.stderr);
    let results = end.results();
    assert_eq!(results.jobs, 2, "one for each CPU of the guest");
    assert_eq!(results.results[0].overlapped, [""; 0]);
    let end = ended(&mut boot(&kernel, &[], &patterns));
    assert_eq!(end.outcomes(), expected[..1], "what ran beside it has no result");
    assert_eq!(end.results().summary.not_run, 1);
}

#[test]
fn without_a_restart_the_rest_is_not_run() {
    let Some(kernel) = kernel() else { return };
    let end = ended(&mut boot(&kernel, &[], &["aid::kernel_panics", "aid::passes_after", ONE_AT_A_TIME]));
    let results = end.results();
    assert_eq!(end.outcomes(), named(&[("kernel_panics", Outcome::Crash)]));
    assert_eq!(results.summary.not_run, 1);
    assert_eq!(
        results.stopped.as_deref(),
        Some("stopped because the machine was lost: the kernel panicked: sysrq triggered crash")
    );
    assert!(end.stderr.contains("  | "), "the console's tail is shown: {}", end.stderr);
}

#[test]
fn a_kernel_that_takes_no_interrupts_is_a_crash_within_the_limit() {
    let Some(kernel) = kernel() else { return };
    let end = ended(&mut boot(&kernel, &["--timeout", "90"], &["aid::kernel_hangs"]));
    assert_eq!(end.outcomes(), named(&[("kernel_hangs", Outcome::Crash)]), "{}", end.stderr);
    let message = end.results().results[0].message.clone().unwrap();
    assert_eq!(message, "the kernel hangs: no sign of life for 30 s");
}

#[test]
fn a_kernel_without_virtio_console_speaks_over_a_serial_port() {
    let Some(kernel) = kernel() else { return };
    let end =
        ended(&mut boot(&kernel, &["--append", "initcall_blacklist=virtio_console_init"], &["aid::passes_before"]));
    assert_eq!(end.outcomes(), named(&[("passes_before", Outcome::Pass)]), "{}", end.stderr);
    assert_eq!(end.code, 0);
}

#[test]
fn a_kernel_that_takes_no_initramfs_is_told_what_it_needs_and_cannot_be_judged() {
    let Some(kernel) = kernel() else { return };
    let mut command = boot(&kernel, &["--append", "rdinit=/none"], &["aid::passes_before", "--exit-style", "bisect"]);
    let end = ended(&mut command);
    assert_eq!((end.code, end.stdout.as_str()), (125, ""));
    assert!(end.stderr.contains("needs CONFIG_BLK_DEV_INITRD=y"), "{}", end.stderr);
    assert!(end.stderr.contains("  | "), "{}", end.stderr);
}

#[test]
fn other_commands_run_in_the_guest_too() {
    let Some(kernel) = kernel() else { return };
    let mut command = rig();
    command.args(["vm", "--accel", "tcg", "--timing", "--kernel"]).arg(&kernel).args(["--", "list", "aid"]);
    let end = ended(&mut command);
    assert!(end.stdout.contains("aid::passes_before"), "{} {}", end.stdout, end.stderr);
    assert_eq!(end.code, 0);
    assert!(end.stderr.contains("timing: the same boot with an init that powers off at once"), "{}", end.stderr);
}

/// A file that has everything that is looked at before QEMU is started.
fn hollow_image(directory: &Path) -> PathBuf {
    let mut bytes = vec![0u8; 4096];
    bytes[0x1f1] = 1;
    bytes[0x202..0x206].copy_from_slice(b"HdrS");
    bytes[0x206..0x208].copy_from_slice(&0x20fu16.to_le_bytes());
    let path = directory.join("bzImage");
    fs::write(&path, bytes).unwrap();
    path
}

/// A command line whose QEMU is a shell script.
fn with_qemu(directory: &Path, script: Option<&str>) -> Command {
    if let Some(script) = script {
        let path = directory.join("qemu-system-x86_64");
        fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }
    let mut command = boot(&hollow_image(directory), &["--timeout", "100"], &["aid::passes_before"]);
    command.env("PATH", directory);
    command
}

#[test]
fn a_qemu_that_is_not_there_or_dies_is_told_as_such() {
    let directory = tempfile::tempdir().unwrap();
    let end = ended(&mut with_qemu(directory.path(), None));
    assert_eq!(end.code, 2);
    assert!(end.stderr.contains("gmemtest: qemu-system-x86_64 is not in PATH; install QEMU"), "{}", end.stderr);
    let end = ended(&mut with_qemu(directory.path(), Some("echo 'qemu: no room' >&2; exit 3")));
    assert_eq!(end.code, 1);
    assert!(end.stderr.contains("gmemtest: QEMU died (exit status: 3): qemu: no room"), "{}", end.stderr);
    let end = ended(with_qemu(directory.path(), Some("kill -SEGV $$")).args(["--exit-style", "bisect"]));
    assert_eq!(end.code, 125);
    assert!(end.stderr.contains("gmemtest: QEMU died (signal: 11"), "{}", end.stderr);
}

/// Starts a boot on a QEMU that does nothing, and gives its process id and QEMU's once that runs.
fn started(directory: &Path) -> (std::process::Child, Pid) {
    let noted = directory.join("pid");
    let script = format!("echo $$ > {0}.new; /bin/mv {0}.new {0}; exec /bin/sleep 1000", noted.display());
    let mut rig = with_qemu(directory, Some(&script)).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    loop {
        if let Ok(text) = fs::read_to_string(&noted) {
            return (rig, Pid::from_raw(text.trim().parse().unwrap()));
        }
        if let Some(status) = rig.try_wait().unwrap() {
            panic!("QEMU was not started: {status}");
        }
        sleep(Duration::from_millis(5));
    }
}

fn is_gone(process: Pid) -> bool {
    let deadline = Instant::now() + Duration::from_secs(60);
    while Instant::now() < deadline {
        // A zombie whose reaper is slow is gone.
        let state = fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
        if state.is_empty() || state.contains(") Z ") {
            return true;
        }
        sleep(Duration::from_millis(5));
    }
    false
}

#[test]
fn no_process_is_left_when_the_rig_is_interrupted_or_killed() {
    let directory = tempfile::tempdir().unwrap();
    let (mut rig, qemu) = started(directory.path());
    kill(Pid::from_raw(rig.id() as i32), Signal::SIGINT).unwrap();
    assert_eq!(rig.wait().unwrap().code(), Some(130));
    assert!(is_gone(qemu));

    let directory = tempfile::tempdir().unwrap();
    let (mut rig, qemu) = started(directory.path());
    kill(Pid::from_raw(rig.id() as i32), Signal::SIGKILL).unwrap();
    rig.wait().unwrap();
    assert!(is_gone(qemu));
}

#[test]
fn what_cannot_be_booted_is_one_line_and_exit_2() {
    let directory = tempfile::tempdir().unwrap();
    let image = hollow_image(directory.path());
    let text = directory.path().join("text");
    fs::write(&text, "hello").unwrap();
    let (image, text) = (image.to_str().unwrap(), text.to_str().unwrap());
    for (arguments, line) in [
        (&["--kernel", "/nonexistent"][..], "--kernel /nonexistent: cannot be read: No such file or directory"),
        (&["--kernel", text], "is not a bzImage"),
        (&["--kernel", image, "--memory", "1M"], "invalid value '1M' for '--memory <SIZE>'"),
        (
            &["--kernel", image, "--simulated-tdx", "--memory", "1G"],
            "--memory: the simulated TDX module needs at least 2G",
        ),
        (&["--kernel", image, "--simulated-tdx", "--cpus", "65"], "--cpus: the simulated TDX module knows 64 packages"),
        (&["--kernel", image, "--modules", text], "is not a directory"),
        (&["--kernel", image, "--console", "/nonexistent/c"], "--console /nonexistent/c: cannot be written"),
        (&["--kernel", image, "--", "vm", "--kernel", image], "vm: runs on the host"),
        (&["--kernel", image, "--", "run", "no_such_test"], "pattern 'no_such_test' matches no test"),
        (&["--kernel", image, "--", "run", "--journal", "d"], "--journal: the guest has no disk"),
        (&["--kernel", image, "--restart-after-crash", "--", "run", "--repeat", "3"], "--restart-after-crash: goes on"),
    ] {
        let end = ended(rig().args(["vm", "--accel", "tcg"]).args(arguments));
        assert_eq!(end.code, 2, "{arguments:?}: {}", end.stderr);
        let said = end.stderr.lines().last().unwrap_or_default();
        assert!(said.starts_with("gmemtest: ") && said.contains(line), "{arguments:?}: {}", end.stderr);
        assert_eq!(end.stdout, "");
    }
}
