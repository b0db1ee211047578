//! `gmemtest policies`.

use std::process::{Command, Output};

use serde_json::Value;

fn policies(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_gmemtest")).arg("policies").args(arguments).output().unwrap()
}

const POLICIES: [&str; 6] = ["bug-vm", "pin-mapped", "hold-on-error", "gfn-count", "poison", "fail-unmap"];

/// The cells of a row, by the policy's name.
fn row<'a>(json: &'a Value, table: &str, is_it: impl Fn(&Value) -> bool) -> Vec<&'a Value> {
    let rows = json[table].as_array().unwrap();
    let row = rows.iter().find(|row| is_it(row)).unwrap();
    let cells: Vec<&Value> = row["cells"].as_array().unwrap().iter().collect();
    assert_eq!(cells.len(), POLICIES.len(), "{row}");
    cells
}

#[test]
fn json_has_a_schema_every_policy_and_what_tells_them_apart() {
    let output = policies(&["--format", "json"]);
    assert!(output.status.success(), "{output:?}");
    let json: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(json["schema"], "gmemtest-policies-1");
    let names: Vec<&str> = json["policies"].as_array().unwrap().iter().map(|p| p["name"].as_str().unwrap()).collect();
    assert_eq!(names, POLICIES);
    let punch = row(&json, "scenarios", |row| row["name"] == "punch hole" && row["page"] == "4K");
    let results: Vec<&str> = punch.iter().map(|cell| cell["result"].as_str().unwrap()).collect();
    assert_eq!(results, ["0", "0", "0", "0", "0", "EFAULT"]);
    let freed: Vec<bool> = punch.iter().map(|cell| cell["free_while_owned"].as_bool().unwrap()).collect();
    assert_eq!(freed, [true, false, false, false, false, false]);
    let checks = row(&json, "costs", |row| {
        row["page"] == "4K" && row["phase"] == "to shared" && row["name"] == "reference checks"
    });
    let checks: Vec<f64> = checks.iter().map(|cell| cell["value"].as_f64().unwrap()).collect();
    assert_eq!(checks, [0.0, 0.0, 256.0, 0.0, 0.0, 0.0], "one check a 4K page under hold-on-error");
    let forgotten = row(&json, "properties", |row| row["name"] == "survives forget-remove, convert");
    let good: Vec<bool> = forgotten.iter().map(|cell| cell["judgement"] == "good").collect();
    assert_eq!(good, [false, false, false, true, false, false], "only who counts for itself");
}

#[test]
fn the_terminal_form_fits_120_columns_and_has_no_escapes_in_a_pipe() {
    let output = policies(&[]);
    assert!(output.status.success());
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.lines().all(|line| line.chars().count() <= 120), "{text}");
    assert!(!text.contains('\x1b'));
    for name in POLICIES {
        assert!(text.contains(name), "{name}");
    }
}

#[test]
fn html_is_one_file_without_scripts_and_resources_from_elsewhere() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("policies.html");
    let output = policies(&["--format", "html", "--output", path.to_str().unwrap()]);
    assert!(output.status.success() && output.stdout.is_empty());
    let html = std::fs::read_to_string(&path).unwrap();
    for name in POLICIES {
        assert!(html.contains(&format!("<code>{name}</code>")), "{name}");
    }
    assert!(html.starts_with("<!doctype html>") && html.contains("prefers-color-scheme:dark") && html.contains("<svg"));
    for foreign in ["<script", "http://", "https://", "<link", "url("] {
        assert!(!html.contains(foreign), "{foreign}");
    }
}

#[test]
fn bad_arguments_are_one_line_and_exit_2() {
    for (arguments, part) in
        [(&["--format", "xml"][..], "xml"), (&["--output", "/nonexistent/p.json"], "cannot write /nonexistent/p.json")]
    {
        let output = policies(arguments);
        let line = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{line}");
        assert_eq!(line.lines().count(), 1, "{line}");
        assert!(line.contains(part), "{line}");
        assert!(output.stdout.is_empty());
    }
}
