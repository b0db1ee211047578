//! The known-issues table: kernel bugs by release range, and the tests that fail because of them.

use serde::Deserialize;

use super::select::matches_glob;
use crate::machine::{MachineSpec, Release};
use crate::observe::emulated_by_tcg;

/// A kernel bug.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KnownIssue {
    /// A unique name.
    pub id: String,
    #[serde(deserialize_with = "release")]
    since: Release,
    #[serde(default, deserialize_with = "optional_release")]
    fixed: Option<Release>,
    #[serde(default, deserialize_with = "releases")]
    backported: Vec<Release>,
    /// What happens, in one line.
    pub symptom: String,
    /// The upstream change that ends it.
    pub fix: String,
    tests: Vec<String>,
    machines: Vec<String>,
    #[serde(default)]
    shows: Option<String>,
    #[serde(default)]
    logs: Vec<String>,
    #[serde(default)]
    sometimes: bool,
    #[serde(default)]
    emulated: bool,
}

/// Every known issue.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KnownIssues {
    issue: Vec<KnownIssue>,
}

impl KnownIssues {
    /// The table that this program was built with, without what only happens under QEMU's TCG where this is none.
    ///
    /// # Errors
    /// One line when the table cannot be read; a test of this module makes sure that it can.
    pub fn embedded() -> Result<KnownIssues, String> {
        let mut table = KnownIssues::parse(include_str!("known_issues.toml"))?;
        if !emulated_by_tcg() {
            table.issue.retain(|issue| !issue.emulated);
        }
        Ok(table)
    }

    /// Reads a table.
    ///
    /// # Errors
    /// One line that names what cannot be read.
    pub fn parse(text: &str) -> Result<KnownIssues, String> {
        toml::from_str(text).map_err(|error| format!("known issues: {error}"))
    }

    /// No known issue.
    pub fn none() -> KnownIssues {
        KnownIssues { issue: Vec::new() }
    }

    /// The issues that say that `test` fails on `machine`, whose kernel is `release`; which one explains a failure, its
    /// message says ([`KnownIssue::explains`]).
    pub fn expected(&self, test: &str, machine: &MachineSpec, release: Release) -> Vec<&KnownIssue> {
        let machine = machine.to_string();
        let applies = |issue: &&KnownIssue| {
            issue.affects(release)
                && issue.tests.iter().any(|glob| matches_glob(glob, test))
                && issue.machines.iter().any(|glob| matches_glob(glob, &machine))
        };
        self.issue.iter().filter(applies).collect()
    }
}

impl KnownIssue {
    /// Whether a kernel has the bug.
    pub fn affects(&self, release: Release) -> bool {
        let series = |release: Release| (release.major, release.minor);
        let backported = self.backported.iter().any(|&with| series(with) == series(release) && with <= release);
        self.since <= release && self.fixed.is_none_or(|fixed| release < fixed) && !backported
    }

    /// Whether a pass is as likely, and nothing to be noted.
    pub fn shows_sometimes(&self) -> bool {
        self.sometimes
    }

    /// Whether it explains a failure with that message, during which the kernel said `log`.
    pub fn explains(&self, message: &str, log: &[String]) -> bool {
        self.shows.as_ref().is_none_or(|text| message.contains(text))
            && self.logs.iter().all(|text| log.iter().any(|line| line.contains(text)))
    }

    /// Whether it shows in the kernel's log, and may taint what passes.
    pub fn is_logged(&self) -> bool {
        !self.logs.is_empty()
    }
}

fn release<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Release, D::Error> {
    String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
}

fn optional_release<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<Release>, D::Error> {
    release(deserializer).map(Some)
}

fn releases<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Vec<Release>, D::Error> {
    let texts = Vec::<String>::deserialize(deserializer)?;
    texts.iter().map(|text| text.parse().map_err(serde::de::Error::custom)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &str = r#"
        [[issue]]
        id = "x"
        since = "6.8"
        fixed = "7.2"
        backported = ["6.18.50"]
        symptom = "s"
        fix = "f"
        tests = ["binding::overflow*"]
        machines = ["kvm:*"]
        shows = "Ok(())"
    "#;

    fn expected(test: &str, machine: &str, release: &str) -> bool {
        let table = KnownIssues::parse(TABLE).unwrap();
        !table.expected(test, &machine.parse().unwrap(), release.parse().unwrap()).is_empty()
    }

    #[test]
    fn an_issue_holds_in_its_releases_on_its_machines_for_its_tests() {
        assert!(expected("binding::overflow::max", "kvm:default", "6.18.44"));
        assert!(expected("binding::overflow::max", "kvm:tdx", "7.1.9"));
        for (test, machine, release) in [
            ("binding::other", "kvm:default", "6.18.44"),
            ("binding::overflow::max", "sim:default", "6.18.44"),
            ("binding::overflow::max", "kvm:default", "6.6"),
            ("binding::overflow::max", "kvm:default", "7.2"),
            ("binding::overflow::max", "kvm:default", "6.18.50"),
        ] {
            assert!(!expected(test, machine, release), "{test} {machine} {release}");
        }
    }

    #[test]
    fn another_failure_is_not_excused() {
        let table = KnownIssues::parse(TABLE).unwrap();
        assert!(table.issue[0].explains("actual: Ok(())", &[]));
        assert!(!table.issue[0].explains("actual: Err(EIO)", &[]));
    }

    #[test]
    fn the_embedded_table_is_readable_and_its_ids_are_unique() {
        let table = KnownIssues::embedded().unwrap();
        let mut ids: Vec<&str> = table.issue.iter().map(|issue| issue.id.as_str()).collect();
        ids.sort_unstable();
        ids.dedup();
        assert_eq!(ids.len(), table.issue.len());
    }

    #[test]
    fn an_unknown_field_is_an_error() {
        assert!(KnownIssues::parse("[[issue]]\nid = \"x\"\nsince = \"6.8\"\nfixd = \"7\"").is_err());
    }
}
