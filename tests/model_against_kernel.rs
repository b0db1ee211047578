//! The model against the kernel that runs here: every claim that both answer comes out the same.
//!
//! `kvm:default` is compared with `sim:default` as of the running series. Every claim whose outcome differs (pass, fail or
//! known) is printed, and there must be none. What only one side can be asked is counted, with the reasons. Where there
//! is no /dev/kvm, or no profile of the running series, the test says so and passes; with GMEMTEST_STRICT=1 a missing
//! /dev/kvm is a failure.

use std::collections::BTreeMap;
use std::process::Command;

use gmemtest::machine::Release;
use gmemtest::observe::Environment;
use gmemtest::sim::Kernel;
use serde_json::Value;

const REAL: &str = "kvm:default";

/// Outcome and, of a skip, its kind and reason, by machine and claim.
type Outcomes = BTreeMap<String, BTreeMap<String, (String, String)>>;

fn outcomes(machines: &[&str]) -> Outcomes {
    let mut command = Command::new(env!("CARGO_BIN_EXE_gmemtest"));
    command.args(["run", "--format", "json", "--jobs", "2", "--seed", "0x5eed"]);
    command.args(machines.iter().map(|machine| format!("--machine={machine}")));
    let output = command.output().expect("gmemtest starts");
    let document: Value = serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&output.stderr)));
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let mut outcomes = Outcomes::new();
    for result in document["results"].as_array().expect("a list of results") {
        let skip = format!("{}: {}", text(&result["skip"]["kind"]), text(&result["skip"]["reason"]));
        let of_machine = outcomes.entry(text(&result["machine"])).or_default();
        of_machine.insert(text(&result["name"]), (text(&result["outcome"]), skip));
    }
    outcomes
}

/// The model of the running series.
fn model() -> Option<String> {
    let running: Release = Environment::read().kernel_release.parse().ok()?;
    let series = Release::series(running.major, running.minor);
    let kernel = Kernel::ALL.into_iter().find(|kernel| kernel.release() == series && !kernel.converts_in_place())?;
    Some(format!("sim:default,kernel={}", kernel.name()))
}

#[test]
fn the_model_and_the_running_kernel_agree_on_every_claim() {
    let strict = std::env::var("GMEMTEST_STRICT").is_ok_and(|value| value == "1");
    if std::fs::File::options().read(true).write(true).open("/dev/kvm").is_err() {
        assert!(!strict, "GMEMTEST_STRICT=1 needs /dev/kvm");
        println!("no /dev/kvm here that can be opened: there is nothing to compare with");
        return;
    }
    let Some(model) = model() else {
        println!("the model has no profile of the running series, {}", Environment::read().kernel_release);
        return;
    };
    let outcomes = outcomes(&[REAL, &model]);
    let (real, modelled) = (&outcomes[REAL], &outcomes[&model]);
    let (mut compared, mut differences) = (0, Vec::new());
    let mut one_sided: BTreeMap<(String, String), usize> = BTreeMap::new();
    for (name, (kernel_says, kernel_skip)) in real {
        let (model_says, model_skip) = &modelled[name];
        match (kernel_says.as_str(), model_says.as_str()) {
            ("skip", "skip") => {}
            ("skip", _) => *one_sided.entry((REAL.to_owned(), kernel_skip.clone())).or_default() += 1,
            (_, "skip") => *one_sided.entry((model.clone(), model_skip.clone())).or_default() += 1,
            (kernel_says, model_says) if kernel_says == model_says => compared += 1,
            (kernel_says, model_says) => {
                differences.push(format!("{name}: {kernel_says} on {REAL}, {model_says} on {model}"));
            }
        }
    }
    println!("{compared} claims come out the same on {REAL} and on {model}, {} do not", differences.len());
    for ((machine, reason), count) in one_sided {
        println!("{count} claims are skipped on {machine} alone: {reason}");
    }
    assert!(compared > 0 || real.values().all(|(outcome, _)| outcome == "skip"), "nothing was compared");
    assert!(differences.is_empty(), "{} differences:\n{}", differences.len(), differences.join("\n"));
}
