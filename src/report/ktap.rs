//! KTAP version 1 (Documentation/dev-tools/ktap.rst), as the kernel's tools/testing/kunit parser reads it.
//!
//! One level a machine when there are several, one a suite, one a claim; of a repeated run the rounds are the outermost
//! level. Results of a block appear as they come, in the order of the plan; blocks that are not yet at the front wait.
//!
//! ```text
//! KTAP version 1
//! 1..1
//! # seed 0x00000000000004d2
//!   KTAP version 1
//!   # Subtest: gmem_create
//!   1..2
//!   ok 1 size_of_zero_is_refused
//!   ok 2 numa_policy_decides_the_node # SKIP no-hardware: numa-nodes: one node (a host with two NUMA nodes)
//! ok 1 gmem_create
//! ```
//!
//! A known issue is `ok .. # XFAIL`, because the parser takes `not ok .. # XFAIL` for a failure. A claim that was planned
//! and not run is `not ok .. # ERROR`, so that the plan always holds.

use std::io::{self, Write};

use crate::harness::event::{Event, Listener, RunInfo};
use crate::harness::exit::Stopped;
use crate::harness::plan::Plan;
use crate::harness::runner::Rounds;
use crate::harness::{Outcome, Record};
use crate::machine::MachineSpec;

/// Writes KTAP.
pub struct Ktap<W> {
    out: W,
    info: Option<RunInfo>,
    /// The blocks of the round under way, in the order of the plan.
    blocks: Vec<Block>,
    /// The first block that is not finished.
    front: usize,
    /// How the finished blocks at each level around it did.
    levels: Levels,
}

/// The results of one suite on one machine.
struct Block {
    machine: String,
    suite: &'static str,
    /// Name in the suite and result of each claim, in the order of the plan.
    results: Vec<(String, Option<Record>)>,
    /// How many results were written.
    written: usize,
}

/// Which levels there are besides the suite's, and the results of their finished children.
#[derive(Default)]
struct Levels {
    rounds: bool,
    machines: bool,
    round_number: u64,
    /// Results of the machines of this round, or of its suites when there is no machine level.
    in_round: Tally,
    /// Results of the suites of this machine.
    in_machine: Tally,
}

/// What a parent line says about its children.
#[derive(Default)]
struct Tally {
    children: usize,
    failed: usize,
    skipped: usize,
}

impl Tally {
    fn add(&mut self, status: Status) {
        self.children += 1;
        match status {
            Status::Ok => {}
            Status::Skipped => self.skipped += 1,
            Status::NotOk => self.failed += 1,
        }
    }

    fn status(&self) -> Status {
        if self.failed > 0 {
            Status::NotOk
        } else if self.skipped == self.children {
            Status::Skipped
        } else {
            Status::Ok
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Status {
    Ok,
    Skipped,
    NotOk,
}

impl<W: Write> Ktap<W> {
    /// Writes to `out`.
    pub fn new(out: W) -> Ktap<W> {
        Ktap { out, info: None, blocks: Vec::new(), front: 0, levels: Levels::default() }
    }

    fn start(&mut self, info: &RunInfo, plan: &Plan) -> io::Result<()> {
        self.levels.rounds = info.rounds != Rounds::Count(1);
        self.levels.machines = plan.machines.len() > 1;
        writeln!(self.out, "KTAP version 1")?;
        match info.rounds {
            Rounds::Count(1) => self.outer_plan(0, plan)?,
            Rounds::Count(count) => writeln!(self.out, "1..{count}")?,
            // How many rounds there will be is not known; KTAP allows to leave the plan out then.
            Rounds::For(_) => {}
        }
        for line in environment_lines(info, plan) {
            writeln!(self.out, "# {}", clean(&line))?;
        }
        self.info = Some(info.clone());
        self.out.flush()
    }

    /// The plan of a level that holds machines, or suites when there is one machine.
    fn outer_plan(&mut self, depth: usize, plan: &Plan) -> io::Result<()> {
        let count = if self.levels.machines { plan.machines.len() } else { plan.suites().len() };
        writeln!(self.out, "{:1$}1..{count}", "", depth * 2)
    }

    fn start_round(&mut self, round: u64, seed: impl std::fmt::Display, plan: &Plan) -> io::Result<()> {
        self.levels.round_number = round;
        self.levels.in_round = Tally::default();
        if self.levels.rounds {
            writeln!(self.out, "  KTAP version 1")?;
            writeln!(self.out, "  # Subtest: round-{}", round + 1)?;
            self.outer_plan(1, plan)?;
            writeln!(self.out, "  # seed {seed}")?;
        }
        self.blocks = blocks(plan);
        self.front = 0;
        self.out.flush()
    }

    fn take(&mut self, machine: &MachineSpec, suite: &str, record: &Record) -> io::Result<()> {
        let machine = machine.to_string();
        let name = record.name.strip_prefix(suite).and_then(|rest| rest.strip_prefix("::")).unwrap_or(&record.name);
        let block = self.blocks.iter_mut().find(|block| block.machine == machine && block.suite == suite);
        if let Some((_, result)) = block.and_then(|block| block.results.iter_mut().find(|(claim, _)| claim == name)) {
            *result = Some(record.clone());
        }
        self.write_ready(None)
    }

    /// Writes what can be written in order. With `rest`, a reason, claims without a result become errors.
    fn write_ready(&mut self, rest: Option<&str>) -> io::Result<()> {
        while self.front < self.blocks.len() {
            while self.blocks[self.front].written < self.blocks[self.front].results.len() {
                let block = &self.blocks[self.front];
                if block.results[block.written].1.is_none() && rest.is_none() {
                    return self.out.flush();
                }
                if block.written == 0 {
                    self.open_block()?;
                }
                self.write_result(rest.unwrap_or_default())?;
                self.blocks[self.front].written += 1;
            }
            self.close_block()?;
            self.front += 1;
        }
        self.out.flush()
    }

    fn depth(&self) -> usize {
        usize::from(self.levels.rounds) + usize::from(self.levels.machines)
    }

    fn open_block(&mut self) -> io::Result<()> {
        let block = &self.blocks[self.front];
        let first_of_machine = self.front == 0 || self.blocks[self.front - 1].machine != block.machine;
        if self.levels.machines && first_of_machine {
            self.levels.in_machine = Tally::default();
            let pad = " ".repeat(2 * self.depth());
            let suites = self.blocks.iter().filter(|other| other.machine == block.machine).count();
            writeln!(self.out, "{pad}KTAP version 1\n{pad}# Subtest: {}\n{pad}1..{suites}", clean(&block.machine))?;
        }
        let pad = " ".repeat(2 * (self.depth() + 1));
        writeln!(self.out, "{pad}KTAP version 1\n{pad}# Subtest: {}\n{pad}1..{}", block.suite, block.results.len())
    }

    fn write_result(&mut self, reason: &str) -> io::Result<()> {
        let pad = " ".repeat(2 * (self.depth() + 1));
        let block = &self.blocks[self.front];
        let number = block.written + 1;
        let (name, record) = &block.results[block.written];
        let name = clean(name);
        let Some(record) = record else {
            return writeln!(self.out, "{pad}not ok {number} {name} # ERROR not run: {}", clean(reason));
        };
        if let Some(info) = &self.info {
            for line in diagnostics(info, record) {
                writeln!(self.out, "{pad}# {}", clean(&line))?;
            }
        }
        writeln!(self.out, "{pad}{}", result_line(number, &name, record))
    }

    fn close_block(&mut self) -> io::Result<()> {
        let block = &self.blocks[self.front];
        let mut tally = Tally::default();
        for (_, record) in &block.results {
            tally.add(record.as_ref().map_or(Status::NotOk, |record| status(record.outcome)));
        }
        let status = tally.status();
        let suite = block.suite;
        let machine = clean(&block.machine);
        let last_of_machine = self.blocks.get(self.front + 1).is_none_or(|next| next.machine != block.machine);
        if self.levels.machines {
            self.levels.in_machine.add(status);
            let depth = self.depth();
            write_parent(&mut self.out, depth, self.levels.in_machine.children, suite, status)?;
            if last_of_machine {
                let status = self.levels.in_machine.status();
                self.levels.in_round.add(status);
                write_parent(&mut self.out, depth - 1, self.levels.in_round.children, &machine, status)?;
            }
        } else {
            self.levels.in_round.add(status);
            let depth = self.depth();
            write_parent(&mut self.out, depth, self.levels.in_round.children, suite, status)?;
        }
        Ok(())
    }

    fn finish_round(&mut self, round: u64, stopped: Option<&Stopped>) -> io::Result<()> {
        let reason = stopped.map_or_else(|| "the round ended early".to_owned(), Stopped::to_string);
        self.write_ready(Some(&reason))?;
        if self.levels.rounds {
            let name = format!("round-{}", round + 1);
            write_parent(&mut self.out, 0, (round + 1) as usize, &name, self.levels.in_round.status())?;
        }
        self.out.flush()
    }

    /// Rounds that were planned and never started.
    fn finish(&mut self, stopped: Option<&Stopped>) -> io::Result<()> {
        if let Some(Rounds::Count(count)) = self.info.as_ref().map(|info| info.rounds)
            && count > 1
        {
            let reason = stopped.map_or_else(|| "the run ended early".to_owned(), Stopped::to_string);
            for round in self.levels.round_number + 2..=count {
                writeln!(self.out, "not ok {round} round-{round} # ERROR not run: {}", clean(&reason))?;
            }
        }
        self.out.flush()
    }
}

impl<W: Write> Listener for Ktap<W> {
    fn hear(&mut self, event: &Event<'_>) -> io::Result<()> {
        match event {
            Event::RunStarted { info, plan } => self.start(info, plan),
            Event::Remark(text) => writeln!(self.out, "# {}", clean(text)),
            Event::RoundStarted { round, seed, plan } => self.start_round(*round, seed, plan),
            Event::ClaimStarted { .. } => Ok(()),
            Event::ClaimFinished { claim, machine, record } => self.take(machine, claim.suite.name, record),
            Event::RoundFinished { round, stopped } => self.finish_round(*round, *stopped),
            Event::RunFinished { stopped, .. } => self.finish(*stopped),
        }
    }
}

fn blocks(plan: &Plan) -> Vec<Block> {
    let mut blocks = Vec::new();
    for machine in &plan.machines {
        for (suite, _) in plan.suites() {
            let claims = plan.claims.iter().filter(|claim| claim.suite.name == suite.name);
            blocks.push(Block {
                machine: machine.to_string(),
                suite: suite.name,
                results: claims.map(|claim| (claim.name_in_suite().to_owned(), None)).collect(),
                written: 0,
            });
        }
    }
    blocks
}

fn write_parent(out: &mut impl Write, depth: usize, number: usize, name: &str, status: Status) -> io::Result<()> {
    let pad = " ".repeat(2 * depth);
    match status {
        Status::Ok => writeln!(out, "{pad}ok {number} {name}"),
        Status::Skipped => writeln!(out, "{pad}ok {number} {name} # SKIP every test of it was skipped"),
        Status::NotOk => writeln!(out, "{pad}not ok {number} {name}"),
    }
}

fn status(outcome: Outcome) -> Status {
    match outcome {
        Outcome::Pass | Outcome::Known => Status::Ok,
        Outcome::Skip => Status::Skipped,
        Outcome::Fail | Outcome::Timeout | Outcome::Crash | Outcome::Error | Outcome::Tainted => Status::NotOk,
    }
}

fn result_line(number: usize, name: &str, record: &Record) -> String {
    let headline = clean(&record.headline());
    match record.outcome {
        Outcome::Pass => format!("ok {number} {name}"),
        Outcome::Skip => format!("ok {number} {name} # SKIP {headline}"),
        Outcome::Known => format!("ok {number} {name} # XFAIL {}", record.known_issue.as_deref().unwrap_or_default()),
        Outcome::Fail => format!("not ok {number} {name}"),
        Outcome::Timeout => format!("not ok {number} {name} # TIMEOUT {headline}"),
        Outcome::Crash | Outcome::Error | Outcome::Tainted => {
            format!("not ok {number} {name} # ERROR {}: {headline}", record.outcome)
        }
    }
}

/// What is said about a result, before its line.
fn diagnostics(info: &RunInfo, record: &Record) -> Vec<String> {
    let mut lines = super::story::details(record);
    if record.outcome.counts_as_failure() || record.outcome == Outcome::Known {
        lines.push(format!("on {}", record.machine));
        lines.push(format!("again: {}", info.reproduce(record)));
    }
    lines
}

fn environment_lines(info: &RunInfo, plan: &Plan) -> Vec<String> {
    let mut lines = super::story::header(info, plan);
    let environment = &info.environment;
    lines.push(format!("cmdline {}", environment.command_line));
    if let Some(config) = &environment.config {
        let set: Vec<String> = config.options.iter().map(|(name, value)| format!("{name}={value}")).collect();
        lines.push(format!("config sha256 {}", config.sha256));
        lines.push(format!("config {}", set.join(" ")));
    }
    for (module, parameters) in &environment.module_parameters {
        let set: Vec<String> = parameters.iter().map(|(name, value)| format!("{name}={value}")).collect();
        lines.push(format!("module {module} {}", set.join(" ")));
    }
    lines.extend(environment.tdx_module.iter().cloned());
    lines.push(format!("argv {}", info.arguments.join(" ")));
    lines.push(format!("started {} taint {}", info.started, environment.taint));
    lines
}

/// Text that a KTAP line can carry: no control character, and no `#`, which would start a directive.
fn clean(text: &str) -> String {
    text.chars()
        .map(|c| {
            if c == '#' {
                '~'
            } else if c.is_control() {
                ' '
            } else {
                c
            }
        })
        .collect()
}
