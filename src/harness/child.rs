//! The process of one test: opens the machine, checks what the test needs, runs it, and says how it ended.

use std::fs::File;
use std::os::fd::{FromRawFd, RawFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::sync::Mutex;
use std::time::Instant;

use super::plan::{Claim, claims};
use super::wire::{FD_VARIABLE, Message, TEST_VARIABLE, Verdict, Wire};
use super::{Body, Context, Notes, Seed, Stop, Suite, TestResult, blame, needs};
use crate::machine::{Facility, Machine, MachineSpec};

/// Opens the machine that a spec names.
///
/// A machine that is not to be had here is a [`Stop::Skip`]; anything else that goes wrong is a [`Stop::Fail`], and is
/// reported as the harness's failure, not as the test's.
pub type Opener = fn(&MachineSpec) -> Result<Box<dyn Machine>, Stop>;

/// Most remarks one test can leave; the ones after that are counted and dropped.
const MOST_NOTES: usize = 256;

/// Carries out `__claim NAME MACHINE SEED`. The exit code is 0 whenever a verdict was sent.
pub fn run_claim(arguments: &[String], suites: &[&'static Suite], open: Opener) -> ExitCode {
    let Some(wire) = take_wire() else {
        eprintln!("gmemtest: {} is for the runner's own use", super::wire::CLAIM_ARGUMENT);
        return ExitCode::from(super::exit::USAGE);
    };
    match parse(arguments, suites) {
        Ok((claim, spec, seed)) => deliver(&claim, &spec, seed, open, &wire),
        Err(message) => wire.send(&Message::Verdict { verdict: Verdict::Error { message }, micros: 0 }),
    }
    ExitCode::SUCCESS
}

/// Runs a claim in this process and sends its verdict.
pub(super) fn deliver(claim: &Claim, spec: &MachineSpec, seed: Seed, open: Opener, wire: &Wire) {
    let notes = Bounded { wire, left: Mutex::new(MOST_NOTES) };
    let (verdict, micros) = judged(claim, spec, seed, open, &notes);
    wire.send(&Message::Verdict { verdict, micros });
}

/// The pipe to the runner, closed to whatever the test executes.
fn take_wire() -> Option<Wire> {
    let fd: RawFd = std::env::var(FD_VARIABLE).ok()?.parse().ok()?;
    // SAFETY: fcntl on a number that may or may not be a descriptor has no memory effect; an error is checked.
    if fd < 3 || unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) } == -1 {
        return None;
    }
    // SAFETY: the runner opened this descriptor for this process alone and left its number in the environment; nothing
    // else in the process has been given it.
    Some(Wire::new(unsafe { File::from_raw_fd(fd) }))
}

fn parse(arguments: &[String], suites: &[&'static Suite]) -> Result<(Claim, MachineSpec, Seed), String> {
    let [name, spec, seed] = arguments else {
        return Err(format!("expected a test, a machine and a seed, got {arguments:?}"));
    };
    // Only the suite in question is spelt out: under an emulator the names of all tests cost as much as a short test.
    let suite: Vec<&'static Suite> =
        suites.iter().copied().filter(|suite| name.split("::").next() == Some(suite.name)).collect();
    let claim = claims(&suite).into_iter().find(|claim| claim.name == *name).ok_or(format!("no test {name}"))?;
    Ok((claim, spec.parse().map_err(|error| format!("{error}"))?, seed.parse()?))
}

fn judged(claim: &Claim, spec: &MachineSpec, seed: Seed, open: Opener, notes: &Bounded<'_>) -> (Verdict, u64) {
    name_process(&blame::comm(claim.name_in_suite(), &std::env::var(TEST_VARIABLE).unwrap_or_default()));
    let machine = match open(spec) {
        Ok(machine) => machine,
        Err(Stop::Skip { kind, reason }) => {
            return (Verdict::Skip { kind: kind.word().to_owned(), reason }, 0);
        }
        Err(Stop::Fail(failure)) => {
            return (Verdict::Error { message: format!("cannot open {spec}: {failure}") }, 0);
        }
    };
    let context = Context::new(machine.as_ref(), &claim.name, seed.of_test(&claim.name), notes);
    notes.wire.send(&Message::Begin { release: machine.release().to_string() });
    catch_panics();
    let started = Instant::now();
    let result = catch_unwind(AssertUnwindSafe(|| {
        if let Some((facility, stop)) = lacking(claim, &context) {
            notes.wire.send(&Message::Lacks { facility: facility.name().to_owned() });
            return Err(stop);
        }
        call(claim, &context)
    }));
    let micros = started.elapsed().as_micros() as u64;
    // Closing the machine is part of the test: when it hangs, that is this test's time limit.
    drop(machine);
    let verdict = match result {
        Ok(Ok(())) => Verdict::Pass,
        Ok(Err(Stop::Fail(failure))) => Verdict::Fail { message: failure.message, location: failure.location },
        Ok(Err(Stop::Skip { kind, reason })) => Verdict::Skip { kind: kind.word().to_owned(), reason },
        Err(_) => {
            let (message, location) =
                FIRST_PANIC.lock().map_or_else(|_| None, |mut first| first.take()).unwrap_or_default();
            Verdict::Fail { message: format!("panicked: {message}"), location }
        }
    };
    (verdict, micros)
}

/// Runs a claim on the machine of `context`, when the machine has what it needs.
pub(super) fn run(claim: &Claim, context: &Context<'_>) -> TestResult {
    match lacking(claim, context) {
        Some((_, stop)) => Err(stop),
        None => call(claim, context),
    }
}

/// The first thing that `claim` needs and the machine has not.
fn lacking(claim: &Claim, context: &Context<'_>) -> Option<(Facility, Stop)> {
    needs::of(claim).find_map(|need| context.require(need).err().map(|stop| (need, stop)))
}

fn call(claim: &Claim, context: &Context<'_>) -> TestResult {
    match (claim.test.body, claim.row) {
        (Body::Claim(function), _) => function(context),
        (Body::Table { run, .. }, row) => run(context, row.unwrap_or_default()),
    }
}

/// Message and place of the first panic on the main thread.
static FIRST_PANIC: Mutex<Option<(String, String)>> = Mutex::new(None);

/// From here on a panic is one line on standard error, and the first one on the main thread is remembered.
fn catch_panics() {
    std::panic::set_hook(Box::new(|info| {
        let message = panic_text(info.payload());
        let location = info.location().map(|at| format!("{}:{}", at.file(), at.line())).unwrap_or_default();
        let thread = std::thread::current();
        eprintln!("thread '{}' panicked at {location}: {message}", thread.name().unwrap_or("unnamed"));
        if thread.name() == Some("main")
            && let Ok(mut first) = FIRST_PANIC.lock()
        {
            first.get_or_insert((message, location));
        }
    }));
}

/// What a panic said.
pub(super) fn panic_text(payload: &dyn std::any::Any) -> String {
    let owned = payload.downcast_ref::<String>().map(String::as_str);
    owned.or_else(|| payload.downcast_ref::<&str>().copied()).unwrap_or("a value that is not text").to_owned()
}

/// Gives the process the name that reports of the kernel show (`comm`).
fn name_process(name: &str) {
    if let Ok(name) = std::ffi::CString::new(name) {
        // SAFETY: PR_SET_NAME reads at most 16 bytes of a string that ends in a NUL byte, and this one lives on.
        unsafe { libc::prctl(libc::PR_SET_NAME, name.as_ptr()) };
    }
}

/// Keeps a test that remarks in a loop from filling the runner's memory.
struct Bounded<'a> {
    wire: &'a Wire,
    left: Mutex<usize>,
}

impl Notes for Bounded<'_> {
    fn note(&self, text: String) {
        let mut left = self.left.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        match *left {
            0 => {}
            1 => self.wire.note("further remarks were dropped".to_owned()),
            _ => self.wire.note(text),
        }
        *left = left.saturating_sub(1);
    }
}
