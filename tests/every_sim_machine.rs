//! Every claim of every suite on simulated machines, in this process: nothing may fail.
//!
//! A claim that can be asked passes; one that cannot is a typed skip. Every `kernel=` and every `policy=` has its turn, and so
//! has each further option; GMEMTEST_ALL_MACHINES=1 asks every claim of every combination that `list --machines` has, which takes minutes. No
//! process is started for a claim, claims that need no guest are left out where only the policy differs, where the others are a sample, and rows
//! on folios of 1 GiB are left out: they take minutes without optimisation (`gmemtest run` has them).

#[path = "../src/main.rs"]
#[expect(dead_code, reason = "main is the command's")]
mod command;

use std::any::Any;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use gmemtest::harness::plan::{Claim, claims};
use gmemtest::harness::{Body, Context, Seed, Stop};
use gmemtest::machine::{Facility, Machine, MachineSpec, SkipKind, VmType};
use gmemtest::sim::SimMachine;
use gmemtest::sim::combinations::combinations;

/// How a claim ended.
#[derive(Debug, Clone, PartialEq, Eq)]
enum End {
    Passed,
    Skipped(SkipKind),
    Failed(String),
}

fn text_of(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
    format!("panicked: {}", text.unwrap_or("with a value that is no text"))
}

fn ask(claim: &Claim, machine: &dyn Machine) -> End {
    for &facility in claim.suite.needs.iter().chain(claim.test.needs) {
        if let Some(Stop::Skip { kind, .. }) = Stop::unless_present(facility, &machine.facility(facility)) {
            return End::Skipped(kind);
        }
    }
    let notes = RefCell::new(Vec::new());
    let seed: Seed = "0x5eed".parse().expect("a seed");
    let context = Context::new(machine, &claim.name, seed.of_test(&claim.name), &notes);
    let run = || match (claim.test.body, claim.row) {
        (Body::Claim(run), _) => run(&context),
        (Body::Table { run, .. }, row) => run(&context, row.expect("a claim of a table has a row")),
    };
    match catch_unwind(AssertUnwindSafe(run)) {
        Ok(Ok(())) => End::Passed,
        Ok(Err(Stop::Skip { kind, .. })) => End::Skipped(kind),
        Ok(Err(Stop::Fail(failure))) => End::Failed(failure.to_string()),
        Err(panic) => End::Failed(text_of(&*panic)),
    }
}

/// One machine for every kernel, every policy and every other option. The first four are asked everything.
const REPRESENTATIVES: &[&str] = &[
    "sim:default,kernel=6.12",
    "sim:sw-protected,kernel=6.16",
    "sim:tdx,kernel=7.3,policy=bug-vm",
    "sim:tdx,kernel=in-place,policy=bug-vm,frames=pfnmap",
    "sim:tdx,kernel=6.18,policy=pin-mapped",
    "sim:tdx,kernel=in-place,policy=hold-on-error",
    "sim:tdx,kernel=huge,policy=gfn-count",
    "sim:tdx,kernel=huge,policy=poison",
    "sim:tdx,kernel=huge,policy=fail-unmap",
    "sim:tdx,kernel=6.16,pending=exit",
];

/// Of the claims that depend on the policy, one in so many is asked of a machine that differs in nothing else: the whole of
/// them takes minutes without optimisation.
const SAMPLE: usize = 8;

fn asks_everything() -> bool {
    std::env::var("GMEMTEST_ALL_MACHINES").is_ok_and(|value| value == "1")
}

fn machines() -> Vec<MachineSpec> {
    let all = combinations();
    if asks_everything() {
        return all;
    }
    let specs: Vec<MachineSpec> = REPRESENTATIVES.iter().map(|text| text.parse().expect("a spec")).collect();
    for option in ["kernel", "policy", "frames", "pending"] {
        for spec in all.iter().filter(|spec| spec.option(option).is_some()) {
            assert!(
                specs.iter().any(|chosen| chosen.option(option) == spec.option(option)),
                "no representative of {option}={}",
                spec.option(option).unwrap_or_default()
            );
        }
    }
    specs
}

/// Whether the answer can depend on what becomes of a private page that cannot be unmapped.
fn depends_on_policy(claim: &Claim) -> bool {
    let guest = [Facility::Guest, Facility::ModuleInjection];
    claim.suite.needs.iter().chain(claim.test.needs).any(|need| guest.contains(need))
}

/// Every claim on every machine, by several threads; the ends by machine.
fn ask_all(specs: &[MachineSpec]) -> BTreeMap<MachineSpec, Vec<(String, End)>> {
    let all: Vec<Claim> = claims(command::SUITES).into_iter().filter(|claim| !claim.name.ends_with("1_gib")).collect();
    let known = gmemtest::harness::known::KnownIssues::embedded().expect("the table of known issues");
    let everything = asks_everything();
    let errands: Vec<(&MachineSpec, &Claim)> = specs
        .iter()
        .enumerate()
        .flat_map(|(at, spec)| {
            let same =
                spec.option("policy").is_some_and(|policy| policy != "bug-vm") || spec.option("pending").is_some();
            let every = if same && !everything { SAMPLE } else { 1 };
            let asked = all.iter().filter(move |claim| !same || depends_on_policy(claim));
            asked.skip(at % every).step_by(every).map(move |claim| (spec, claim))
        })
        .collect();
    let next = AtomicUsize::new(0);
    let ends = Mutex::new(BTreeMap::<MachineSpec, Vec<(String, End)>>::new());
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(2, usize::from) {
            scope.spawn(|| {
                while let Some((spec, claim)) = errands.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let machine = SimMachine::open(spec).expect("a machine of the list");
                    let mut end = ask(claim, &machine);
                    let issues = known.expected(&claim.name, spec, machine.release());
                    if matches!(&end, End::Failed(text) if issues.iter().any(|issue| issue.explains(text, &[]))) {
                        end = End::Passed;
                    }
                    let mut ends = ends.lock().expect("no thread panics while it holds the lock");
                    ends.entry((*spec).clone()).or_default().push((claim.name.clone(), end));
                }
            });
        }
    });
    ends.into_inner().expect("the threads are gone")
}

#[test]
fn no_claim_fails_on_any_simulated_machine() {
    let specs = machines();
    let ends = ask_all(&specs);
    let mut failures = Vec::new();
    for spec in &specs {
        let ends = &ends[spec];
        let count = |wanted: fn(&End) -> bool| ends.iter().filter(|(_, end)| wanted(end)).count();
        let (passed, skipped) = (count(|end| *end == End::Passed), count(|end| matches!(end, End::Skipped(_))));
        println!("{spec}: {passed} passed, {skipped} skipped, {} asked", ends.len());
        if spec.vm_type == VmType::Tdx && spec.option("policy") == Some("bug-vm") && spec.option("frames").is_none() {
            assert!(passed >= 300, "{spec}: only {passed} claims were asked and passed");
        }
        let named = |(name, end): &(String, End)| match end {
            End::Failed(text) => Some(format!("{name} on {spec}: {text}")),
            _ => None,
        };
        failures.extend(ends.iter().filter_map(named));
    }
    assert!(failures.is_empty(), "{} claims failed:\n{}", failures.len(), failures.join("\n"));
}
