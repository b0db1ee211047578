//! The guest's run, told to the host's reporters, and made whole where the guest did not come to its end.

use std::collections::BTreeMap;
use std::io;
use std::time::{Duration, Instant};

use super::boot::Boot;
use super::ending::Ending;
use super::stream::{Line, Names};
use crate::harness::event::{Event, Listener, RunInfo};
use crate::harness::exit::Stopped;
use crate::harness::outcome::{Outcome, Record, Summary};
use crate::harness::plan::{Claim, Plan, claims};
use crate::harness::{Seed, Suite, blame};
use crate::machine::MachineSpec;

/// Console lines that go into the record of a test that took the kernel with it.
const TAIL: usize = 60;

/// A run that may take several boots; the reporters see one.
pub struct Replay<'a> {
    claims: BTreeMap<String, Claim>,
    again: Vec<String>,
    listener: &'a mut dyn Listener,
    start: Instant,
    line: Vec<u8>,
    /// Lines of the guest's standard output that are not events.
    strays: Vec<String>,
    run: Option<Run>,
    boots: u32,
    /// The first error of the reporters.
    failed: Option<io::Error>,
}

struct Run {
    info: RunInfo,
    plan: Plan,
    summary: Summary,
    /// Claims and machines of the round that have no result.
    waiting: Vec<(MachineSpec, Claim)>,
    running: Vec<Started>,
    round: Option<(u64, Seed)>,
    stopped: Option<Stopped>,
    /// Whether the guest said that it had finished, in the boot that is under way.
    finished: bool,
    /// Microseconds in test code.
    tested_us: u64,
    /// Microseconds from the starts of tests' processes to their verdicts.
    processes_us: u64,
}

struct Started {
    claim: Claim,
    machine: MachineSpec,
    /// The name of its process in reports of the kernel.
    comm: String,
    at: Instant,
}

/// What is left to run.
#[derive(Debug)]
pub struct Rest {
    /// On these machines,
    pub machines: Vec<MachineSpec>,
    /// the claims of these names.
    pub claims: Vec<String>,
}

/// What a run came to.
#[derive(Debug)]
pub struct Replayed {
    /// How many claims came out how.
    pub summary: Summary,
    /// Why it ended early.
    pub stopped: Option<Stopped>,
    /// Time in the tests' own code.
    pub tested: Duration,
    /// Time from the start of each test's process to its verdict.
    pub processes: Duration,
}

impl<'a> Replay<'a> {
    /// Events of runs over `suites` go to `listener`; `again` are the words that run one test again on the host.
    pub fn new(suites: &[&'static Suite], again: Vec<String>, listener: &'a mut dyn Listener) -> Replay<'a> {
        let claims = claims(suites).into_iter().map(|claim| (claim.name.clone(), claim)).collect();
        let start = Instant::now();
        Replay {
            claims,
            again,
            listener,
            start,
            line: Vec::new(),
            strays: Vec::new(),
            run: None,
            boots: 0,
            failed: None,
        }
    }

    /// Takes bytes of the guest's standard output.
    pub fn feed(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            if byte != b'\n' {
                self.line.push(byte);
                continue;
            }
            let line = std::mem::take(&mut self.line);
            match serde_json::from_slice(&line) {
                Ok(event) => self.event(event),
                Err(_) => self.strays.push(String::from_utf8_lossy(&line).into_owned()),
            }
        }
    }

    /// Whether a run has begun.
    pub fn has_begun(&self) -> bool {
        self.run.is_some()
    }

    /// Lines of the guest's standard output that are not events.
    pub fn strays(&self) -> &[String] {
        &self.strays
    }

    /// The first error of the reporters.
    pub fn failed(&mut self) -> Option<io::Error> {
        self.failed.take()
    }

    fn event(&mut self, line: Line) {
        match line {
            Line::RunStarted { info, plan } => self.run_started(*info, &plan),
            Line::Remark(text) => self.tell(&Event::Remark(&text)),
            Line::RoundStarted { round, seed, plan } => self.round_started(round, seed, &plan),
            Line::ClaimStarted { claim, machine, comm } => self.claim_started(&claim, &machine, comm),
            Line::ClaimFinished(record) => self.claim_finished(&record),
            Line::RoundFinished { round, stopped } => {
                // Of a restarted round, the end is told when nothing is left of it.
                if let Some(run) = &mut self.run {
                    run.stopped = stopped;
                    if run.waiting.is_empty() || run.stopped.is_some() {
                        self.round_finished(round);
                    }
                }
            }
            Line::RunFinished { stopped, .. } => {
                if let Some(run) = &mut self.run {
                    run.stopped = stopped;
                    run.finished = true;
                }
            }
        }
    }

    fn run_started(&mut self, mut info: RunInfo, names: &Names) {
        self.boots += 1;
        if let Some(run) = &mut self.run {
            run.finished = false;
            return;
        }
        self.start = Instant::now();
        info.again = self.again.clone();
        let plan = self.plan(names);
        self.tell(&Event::RunStarted { info: &info, plan: &plan });
        self.run = Some(Run {
            info,
            plan,
            summary: Summary::default(),
            waiting: Vec::new(),
            running: Vec::new(),
            round: None,
            stopped: None,
            finished: false,
            tested_us: 0,
            processes_us: 0,
        });
    }

    fn round_started(&mut self, round: u64, seed: Seed, names: &Names) {
        let plan = self.plan(names);
        let Some(run) = &mut self.run else { return };
        if self.boots > 1 && run.round.is_some_and(|(current, _)| current == round) {
            return;
        }
        run.round = Some((round, seed));
        run.waiting = plan
            .machines
            .iter()
            .flat_map(|machine| plan.claims.iter().map(|claim| (machine.clone(), claim.clone())))
            .collect();
        self.tell(&Event::RoundStarted { round, seed, plan: &plan });
    }

    fn round_finished(&mut self, round: u64) {
        let Some(run) = &mut self.run else { return };
        run.summary.not_run += run.waiting.len() as u64;
        run.waiting.clear();
        let stopped = run.stopped.clone();
        self.tell(&Event::RoundFinished { round, stopped: stopped.as_ref() });
    }

    fn claim_started(&mut self, claim: &str, machine: &str, comm: String) {
        let (Some(claim), Ok(machine)) = (self.claims.get(claim).cloned(), machine.parse::<MachineSpec>()) else {
            return;
        };
        self.tell(&Event::ClaimStarted { comm: &comm, claim: &claim, machine: &machine });
        if let Some(run) = &mut self.run {
            run.running.push(Started { claim, machine, comm, at: Instant::now() });
        }
    }

    fn claim_finished(&mut self, record: &Record) {
        let (Some(claim), Ok(machine)) =
            (self.claims.get(&record.name).cloned(), record.machine.parse::<MachineSpec>())
        else {
            return;
        };
        let Some(run) = &mut self.run else { return };
        run.running.retain(|started| (&started.claim.name, &started.machine) != (&claim.name, &machine));
        run.waiting.retain(|(on, waiting)| (&waiting.name, on) != (&claim.name, &machine));
        run.summary.count(record.outcome);
        run.tested_us += record.test_us;
        run.processes_us += record.duration_us;
        self.tell(&Event::ClaimFinished { claim: &claim, machine: &machine, record });
    }

    /// Takes the end of a boot: what was running when the guest was lost has its result now.
    pub fn boot_ended(&mut self, boot: &Boot) {
        if !self.line.is_empty() {
            let cut = std::mem::take(&mut self.line);
            self.strays.push(String::from_utf8_lossy(&cut).into_owned());
        }
        if matches!(boot.ending, Ending::Command(_)) && self.is_finished() {
            return;
        }
        if let Ending::Interrupted(signal) = boot.ending {
            // What ran has no outcome: it was neither the kernel nor the rig that ended it.
            if let Some(run) = &mut self.run {
                run.stopped = Some(Stopped::Signal(signal));
            }
            return;
        }
        let outcome = match boot.ending {
            Ending::TimedOut(_) => Outcome::Timeout,
            ref ending if ending.is_the_kernels() => Outcome::Crash,
            _ => Outcome::Error,
        };
        self.lost(&boot.ending.to_string(), outcome, &boot.console.tail(TAIL));
    }

    /// Whether the run came to its end, in the boot that is under way.
    pub fn is_finished(&self) -> bool {
        self.run.as_ref().is_some_and(|run| run.finished)
    }

    /// The machine was lost: what was running has this outcome, for this reason, with the end of the console. Where that
    /// end names some of the tests that ran, the others have no result: they were not run.
    pub fn lost(&mut self, why: &str, outcome: Outcome, console: &[String]) {
        let Some(run) = &mut self.run else { return };
        let (round, seed) = run.round.unwrap_or((0, run.info.seed));
        let comms: Vec<&str> = run.running.iter().map(|started| started.comm.as_str()).collect();
        let accused = blame::accused(console, &comms);
        let lost: Vec<Started> =
            run.running.drain(..).zip(accused).filter_map(|(started, is)| is.then_some(started)).collect();
        let names: Vec<&String> = lost.iter().map(|started| &started.claim.name).collect();
        let lost: Vec<Record> = lost
            .iter()
            .map(|started| {
                let mut record =
                    Record::new(&started.claim.name, &started.machine.to_string(), round, seed.to_string());
                record.outcome = outcome;
                record.message = Some(why.to_owned());
                record.duration_us = started.at.elapsed().as_micros() as u64;
                record.kernel_log = console.to_vec();
                let others = names.iter().filter(|name| ***name != started.claim.name);
                record.overlapped = others.map(|&name| name.clone()).collect();
                record
            })
            .collect();
        lost.iter().for_each(|record| self.claim_finished(record));
        if let Some(run) = &mut self.run {
            run.stopped = Some(Stopped::MachineLost(why.to_owned()));
        }
    }

    /// Claims without a result and the machines that lack it, for one more boot: the claims of the first machine that
    /// lacks any, with every other machine that lacks the same.
    pub fn rest(&self) -> Option<Rest> {
        let run = self.run.as_ref()?;
        let of = |machine: &MachineSpec| -> Vec<String> {
            run.waiting.iter().filter(|(on, _)| on == machine).map(|(_, claim)| claim.name.clone()).collect()
        };
        let claims = of(&run.waiting.first()?.0);
        let machines = run.plan.machines.iter().filter(|machine| of(machine) == claims).cloned().collect();
        Some(Rest { machines, claims })
    }

    /// Goes on with a fresh boot.
    pub fn restart(&mut self) {
        if let Some(run) = &mut self.run {
            run.stopped = None;
        }
    }

    /// Ends the run towards the reporters; `None` when none has begun.
    pub fn finish(mut self) -> Option<Replayed> {
        let round = self.run.as_ref()?.round;
        let run = self.run.as_ref()?;
        if !(run.finished && run.waiting.is_empty())
            && let Some((round, _)) = round
        {
            self.round_finished(round);
        }
        let elapsed = self.start.elapsed();
        let run = self.run.take()?;
        self.tell(&Event::RunFinished { summary: &run.summary, stopped: run.stopped.as_ref(), elapsed });
        Some(Replayed {
            summary: run.summary,
            stopped: run.stopped,
            tested: Duration::from_micros(run.tested_us),
            processes: Duration::from_micros(run.processes_us),
        })
    }

    fn plan(&self, names: &Names) -> Plan {
        Plan {
            machines: names.machines.iter().filter_map(|spec| spec.parse().ok()).collect(),
            claims: names.claims.iter().filter_map(|name| self.claims.get(name).cloned()).collect(),
        }
    }

    fn tell(&mut self, event: &Event<'_>) {
        if let Err(error) = self.listener.hear(event)
            && self.failed.is_none()
        {
            self.failed = Some(error);
        }
    }
}
