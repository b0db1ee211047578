//! What a run consists of: [`Plan`].

use std::collections::BTreeSet;

use super::select::Pattern;
use super::{Body, Seed, Suite, Test};
use crate::machine::MachineSpec;

/// One claim: a test function, or one row of one.
#[derive(Debug, Clone)]
pub struct Claim {
    /// The full name, unique in the program.
    pub name: String,
    /// The suite it belongs to.
    pub suite: &'static Suite,
    /// The test function.
    pub test: &'static Test,
    /// The row, for a table.
    pub row: Option<usize>,
}

impl Claim {
    /// The name without the suite's.
    pub fn name_in_suite(&self) -> &str {
        self.name.strip_prefix(self.suite.name).and_then(|rest| rest.strip_prefix("::")).unwrap_or(&self.name)
    }
}

/// Every claim of `suites`, in their order.
pub fn claims(suites: &[&'static Suite]) -> Vec<Claim> {
    let mut all = Vec::new();
    for &suite in suites {
        for test in suite.tests {
            for (index, name) in test.claims(suite).into_iter().enumerate() {
                let row = match test.body {
                    Body::Claim(_) => None,
                    Body::Table { .. } => Some(index),
                };
                all.push(Claim { name, suite, test, row });
            }
        }
    }
    all
}

/// What is wrong with the names of `claims`: two of the same name, or one that a result line cannot carry.
pub fn check_names(claims: &[Claim]) -> Result<(), String> {
    let mut seen = BTreeSet::new();
    for claim in claims {
        if !seen.insert(claim.name.as_str()) {
            return Err(format!("two claims are called {}", claim.name));
        }
        if claim.name.contains(|c: char| c == '#' || c == '*' || c.is_control() || c.is_whitespace()) {
            return Err(format!("the name {:?} has a character that result lines cannot carry", claim.name));
        }
    }
    Ok(())
}

/// Which claims to run, on which machines, in which order.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The machines, in the order in which they are run.
    pub machines: Vec<MachineSpec>,
    /// The claims, in the order in which each machine runs them.
    pub claims: Vec<Claim>,
}

impl Plan {
    /// The claims of `suites` that one of `patterns` means (all when there is none) and none of `excluded` does.
    ///
    /// # Errors
    /// One line that names the pattern that means nothing.
    pub fn new(
        suites: &[&'static Suite],
        machines: Vec<MachineSpec>,
        patterns: &[Pattern],
        excluded: &[Pattern],
    ) -> Result<Plan, String> {
        let all = claims(suites);
        check_names(&all)?;
        let names: Vec<String> = all.iter().map(|claim| claim.name.clone()).collect();
        let mut wanted = vec![patterns.is_empty(); all.len()];
        for pattern in patterns {
            let chosen = pattern.select(&names);
            if !chosen.contains(&true) {
                return Err(format!(
                    "pattern '{}' matches no test; `gmemtest list` prints their names",
                    pattern.as_str()
                ));
            }
            wanted.iter_mut().zip(chosen).for_each(|(wanted, chosen)| *wanted |= chosen);
        }
        for pattern in excluded {
            let chosen = pattern.select(&names);
            if !chosen.contains(&true) {
                return Err(format!(
                    "--exclude '{}' matches no test; `gmemtest list` prints their names",
                    pattern.as_str()
                ));
            }
            wanted.iter_mut().zip(chosen).for_each(|(wanted, chosen)| *wanted &= !chosen);
        }
        let claims: Vec<Claim> =
            all.into_iter().zip(wanted).filter(|(_, wanted)| *wanted).map(|(claim, _)| claim).collect();
        if claims.is_empty() {
            return Err("no test is left after --exclude".to_owned());
        }
        Ok(Plan { machines, claims })
    }

    /// How many results one round gives.
    pub fn results_per_round(&self) -> usize {
        self.machines.len() * self.claims.len()
    }

    /// The claims in an order that follows from `seed`.
    pub fn shuffled(mut self, seed: Seed) -> Plan {
        seed.rng().shuffle(&mut self.claims);
        self
    }

    /// The names of the suites that have a claim in the plan, in the order of their first claims, with how many they have.
    pub fn suites(&self) -> Vec<(&'static Suite, usize)> {
        let mut suites: Vec<(&'static Suite, usize)> = Vec::new();
        for claim in &self.claims {
            match suites.iter_mut().find(|(suite, _)| suite.name == claim.suite.name) {
                Some((_, count)) => *count += 1,
                None => suites.push((claim.suite, 1)),
            }
        }
        suites
    }
}
