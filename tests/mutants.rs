//! `gmemtest mutants`: its output, its exit codes, what it says of a survivor.

mod support;

use serde_json::Value;
use support::{code, gmemtest, output, stderr, stdout};

/// Runs `mutants` with these arguments and `--format json`.
fn document(arguments: &[&str]) -> (Value, i32) {
    let output = output(gmemtest().arg("mutants").args(arguments).args(["--format", "json"]));
    let text = stdout(&output);
    let value = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}\n{text}\n{}", stderr(&output)));
    (value, code(&output))
}

fn text<'a>(value: &'a Value, field: &str) -> &'a str {
    value[field].as_str().unwrap_or_else(|| panic!("no text {field} in {value}"))
}

#[test]
fn a_mutant_that_a_claim_notices_is_killed_with_the_name_of_the_claim() {
    let (document, code) = document(&["punch-one-page-short", "--claim", "fallocate"]);
    assert_eq!(code, 0, "{document}");
    assert_eq!(text(&document, "schema"), "gmemtest-mutants/1");
    assert_eq!(document["killed"], 1);
    assert_eq!(document["survivors"], serde_json::json!([]));
    let mutant = &document["mutants"][0];
    assert_eq!((text(mutant, "name"), &mutant["killed"]), ("punch-one-page-short", &Value::Bool(true)));
    let killers = mutant["killers"].as_array().unwrap();
    assert_eq!(killers.len(), 3, "three are enough: {killers:?}");
    assert!(text(&killers[0], "claim").starts_with("fallocate::"), "{killers:?}");
    assert_eq!((text(&killers[0], "how"), text(&killers[0], "machine")), ("failed", "sim:default"));
    assert!(!text(&killers[0], "message").is_empty());
}

#[test]
fn every_machine_is_tried_without_a_mutant_first() {
    let (document, _) = document(&["mmap-ignores-flag", "--claim", "gmem_mmap"]);
    let baselines = document["baselines"].as_array().unwrap();
    let machines: Vec<&str> = baselines.iter().map(|baseline| text(baseline, "machine")).collect();
    assert_eq!(machines, ["sim:default", "sim:sw-protected,kernel=in-place"]);
    for baseline in baselines {
        assert!(baseline["hold"].as_u64().unwrap() > 20, "{baseline}");
    }
}

#[test]
fn a_mutant_that_no_claim_can_see_survives_and_the_exit_code_is_1() {
    let output = output(gmemtest().args(["mutants", "stat-counts-blocks", "poison-flag-lost", "--claim", "gmem_file"]));
    assert_eq!(code(&output), 1);
    let text = stdout(&output);
    assert!(text.contains("\nkilled   stat-counts-blocks on sim:default by gmem_file::"), "{text}");
    let survivor = "\nSURVIVES poison-flag-lost: Memory failure does not mark the page. (";
    assert!(text.contains(survivor), "{text}");
    let last = text.lines().last().unwrap();
    assert!(last.starts_with("2 mutants, 1 killed, 1 survive: poison-flag-lost ("), "{last}");
}

#[test]
fn a_model_that_panics_or_dies_is_a_kill_and_the_next_mutant_is_still_run() {
    let (document, code) = document(&["punch-frees-pinned", "punch-skips-host-unmap", "--claim", "gmem_pages"]);
    assert_eq!(code, 0, "{document}");
    let mutants = document["mutants"].as_array().unwrap();
    let pinned = mutants.iter().find(|mutant| text(mutant, "name") == "punch-frees-pinned").unwrap();
    let how: Vec<&str> = pinned["killers"].as_array().unwrap().iter().map(|killer| text(killer, "how")).collect();
    assert!(how.iter().all(|how| ["died", "panicked"].contains(how)), "{pinned}");
    assert_eq!(mutants.len(), 2);
}

#[test]
fn a_claim_that_goes_on_for_too_long_is_a_kill() {
    let arguments = ["skip-zeroing", "--claim", "gmem_create::size_is_refused", "--timeout", "0.000001"];
    let (document, _) = document(&arguments);
    let failing = document["baselines"][0]["failing"].as_array().unwrap();
    assert!(failing.iter().all(|claim| text(claim, "how") == "timed-out"), "{failing:?}");
}

#[test]
fn all_counts_every_killer() {
    let (few, _) = document(&["create-checks-reserved", "--claim", "gmem_create", "--killers", "1"]);
    let (all, _) = document(&["create-checks-reserved", "--claim", "gmem_create", "--all"]);
    let killers = |document: &Value| document["mutants"][0]["killers"].as_array().unwrap().len();
    assert_eq!(killers(&few), 1);
    assert!(killers(&all) >= 6, "{all}");
}

#[test]
fn the_list_says_what_each_mutant_breaks_and_where_it_shows() {
    let output = output(gmemtest().args(["mutants", "--list", "--format", "json"]));
    assert_eq!(code(&output), 0);
    let list: Value = serde_json::from_str(&stdout(&output)).unwrap();
    let mutants = list["mutants"].as_array().unwrap();
    assert!(mutants.len() >= 40, "{}", mutants.len());
    for mutant in mutants {
        assert!(!text(mutant, "description").is_empty());
        assert!(!mutant["machines"].as_array().unwrap().is_empty());
    }
}

#[test]
fn what_cannot_be_carried_out_is_one_line_and_exit_2() {
    for (arguments, line) in [
        (
            &["no-such-mutant"][..],
            "gmemtest: pattern 'no-such-mutant' matches no mutant; `gmemtest mutants --list` prints their names",
        ),
        (
            &["skip-zeroing", "--claim", "no_such_claim"],
            "gmemtest: pattern 'no_such_claim' matches no test; `gmemtest list` prints their names",
        ),
        (&["--killers", "0"], "gmemtest: invalid value '0' for '--killers <N>': expected a number from 1; try --help"),
    ] {
        let output = output(gmemtest().arg("mutants").args(arguments));
        assert_eq!((code(&output), stderr(&output).trim_end()), (2, line));
        assert_eq!(stdout(&output), "");
    }
}
