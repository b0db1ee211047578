//! Every suspect before every claim that can testify.

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use super::pool::{Worker, run};
use super::{Finding, Limits};

/// A defect and the machines on which it can show.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Suspect {
    /// The value of the machine option `mutant=`.
    pub name: &'static str,
    /// Specs without the mutant, in the order in which they are tried.
    pub machines: &'static [&'static str],
}

/// What the claims say of a machine as it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Baseline {
    /// The machine.
    pub machine: &'static str,
    /// Claims that hold there.
    pub witnesses: Vec<usize>,
    /// Claims that do not, and what they say: they cannot testify there.
    pub failing: Vec<(usize, Finding)>,
}

/// A claim that noticed a mutant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Killer {
    /// The claim.
    pub claim: usize,
    /// The machine on which it did, without the mutant.
    pub machine: &'static str,
    /// How.
    pub finding: Finding,
}

/// What became of a mutant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trial {
    /// Which one: its position in the list of suspects.
    pub suspect: usize,
    /// The claims that noticed it; it survives when there is none.
    pub killers: Vec<Killer>,
    /// How many claims were run.
    pub heard: usize,
    /// How long it took.
    pub elapsed: Duration,
}

/// Takes the results as they come, each kind in the order of the lists.
pub trait Listener {
    /// A machine as it is.
    ///
    /// # Errors
    /// When it cannot be told to anybody.
    fn baseline(&mut self, baseline: &Baseline) -> io::Result<()>;

    /// A mutant.
    ///
    /// # Errors
    /// When it cannot be told to anybody.
    fn trial(&mut self, trial: &Trial) -> io::Result<()>;
}

/// What a survey does.
#[derive(Debug)]
pub struct Survey<'a> {
    /// The mutants.
    pub suspects: &'a [Suspect],
    /// The claims to run, by their position among all claims.
    pub claims: &'a [usize],
    /// When a claim, and when a mutant is done with.
    pub limits: Limits,
    /// Worker processes.
    pub jobs: usize,
}

/// Runs the claims on the machines as they are, then on every mutant.
///
/// # Errors
/// When no worker can be started, or the listener cannot go on.
pub fn survey(survey: &Survey<'_>, listener: &mut dyn Listener) -> io::Result<()> {
    let mut machines: Vec<&'static str> = Vec::new();
    for &machine in survey.suspects.iter().flat_map(|suspect| suspect.machines) {
        if !machines.contains(&machine) {
            machines.push(machine);
        }
    }
    let mut witnesses: BTreeMap<&'static str, Vec<usize>> = BTreeMap::new();
    let everything = Limits { enough: usize::MAX, ..survey.limits };
    in_order(
        survey.jobs,
        machines.len(),
        |worker, index| {
            let found = run(worker, machines[index], survey.claims, everything)?;
            let mut baseline = Baseline { machine: machines[index], witnesses: Vec::new(), failing: Vec::new() };
            for (claim, finding) in found {
                match finding {
                    Finding::Held => baseline.witnesses.push(claim),
                    Finding::Skipped => {}
                    finding => baseline.failing.push((claim, finding)),
                }
            }
            Ok(baseline)
        },
        |baseline| {
            witnesses.insert(baseline.machine, baseline.witnesses.clone());
            listener.baseline(&baseline)
        },
    )?;
    let witnesses = &witnesses;
    in_order(
        survey.jobs,
        survey.suspects.len(),
        |worker, index| try_suspect(worker, index, survey, witnesses),
        |trial| listener.trial(&trial),
    )
}

fn try_suspect(
    worker: &mut Option<Worker>,
    index: usize,
    survey: &Survey<'_>,
    witnesses: &BTreeMap<&'static str, Vec<usize>>,
) -> io::Result<Trial> {
    let suspect = &survey.suspects[index];
    let began = Instant::now();
    let mut trial = Trial { suspect: index, killers: Vec::new(), heard: 0, elapsed: Duration::ZERO };
    for &machine in suspect.machines {
        let enough = survey.limits.enough - trial.killers.len();
        if enough == 0 {
            break;
        }
        let spec = format!("{machine},mutant={}", suspect.name);
        let claims = witnesses.get(machine).map_or(&[][..], Vec::as_slice);
        let found = run(worker, &spec, claims, Limits { enough, ..survey.limits })?;
        trial.heard += found.len();
        let failed = found.into_iter().filter(|(_, finding)| finding.is_failure());
        trial.killers.extend(failed.map(|(claim, finding)| Killer { claim, machine, finding }));
    }
    trial.elapsed = began.elapsed();
    Ok(trial)
}

/// Does `count` pieces of work on `jobs` threads with a worker each, and hands the results on in order.
fn in_order<T: Send>(
    jobs: usize,
    count: usize,
    work: impl Fn(&mut Option<Worker>, usize) -> io::Result<T> + Sync,
    mut hand_on: impl FnMut(T) -> io::Result<()>,
) -> io::Result<()> {
    let next = AtomicUsize::new(0);
    let (sender, results) = mpsc::channel::<(usize, io::Result<T>)>();
    std::thread::scope(|scope| {
        for _ in 0..jobs.clamp(1, count.max(1)) {
            let (sender, next, work) = (sender.clone(), &next, &work);
            scope.spawn(move || {
                let mut worker = None;
                loop {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    if index >= count || sender.send((index, work(&mut worker, index))).is_err() {
                        break;
                    }
                }
            });
        }
        drop(sender);
        let mut early: BTreeMap<usize, T> = BTreeMap::new();
        let mut due = 0;
        let mut outcome = Ok(());
        while let Ok((index, result)) = results.recv() {
            match result {
                Ok(value) => drop(early.insert(index, value)),
                Err(error) => outcome = Err(error),
            }
            while let Some(value) = early.remove(&due).filter(|_| outcome.is_ok()) {
                outcome = hand_on(value);
                due += 1;
            }
            if outcome.is_err() {
                // No thread begins anything new; what is under way ends by its own limits.
                next.store(count, Ordering::Relaxed);
                break;
            }
        }
        drop(results);
        outcome
    })
}
