//! Runs a plan: starts processes, waits for what happens to them, tells the listener.
//!
//! One thread and one poll(2): descriptors of the running tests, of the kernel log and of the signals that end a run.
//!
//! What a test costs besides its own code (`duration_us` less `test_us` of a [`Record`]: a process, its capture, its
//! judgement, its report) was measured with a release build on 2 virtual CPUs of an AMD EPYC that were six times
//! overcommitted: 1.0 ms median over 200 tests, 2.3 ms of wall-clock time and 1.4 ms of CPU time a test in the mean.

use std::collections::VecDeque;
use std::io;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::{Deserialize, Serialize};

use super::child::Opener;
use super::event::{Event, Listener, RunInfo};
use super::exit::Stopped;
use super::interrupt::Interrupts;
use super::journal::{Earlier, Journal};
use super::judge::{Evidence, judge, skip};
use super::known::KnownIssues;
use super::needs::Needs;
use super::outcome::{Outcome, Record, Skipped, Summary};
use super::plan::{Claim, Plan};
use super::running::{End, Running};
use super::start::{How, Task};
use super::watch::Watch;
use super::{Seed, Sharing, blame, descendants, memcg, wire};
use crate::machine::{MachineSpec, SkipKind};
use crate::observe::is_complaint;

/// How often everything is run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Rounds {
    /// So many times.
    Count(u64),
    /// Again until so much time has passed; the round that is then under way is finished, so that every claim was run
    /// as often as every other.
    For(Duration),
}

/// What to do when a claim fails.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum OnFailure {
    /// Run the rest.
    #[default]
    GoOn,
    /// Stop (`--until-fail`).
    Stop,
}

/// How a plan is run.
#[derive(Debug)]
pub struct Options {
    /// Most tests at a time, at least 1.
    pub jobs: usize,
    /// Time limit of a test that has none of its own.
    pub timeout: Duration,
    /// What to do when a claim fails.
    pub on_failure: OnFailure,
    /// Kinds of skip that are failures.
    pub strict: Vec<SkipKind>,
    /// Kernel bugs that may explain a failure.
    pub known: KnownIssues,
    /// Opens the machines.
    pub open: Opener,
    /// Starts to watch the kernel, and says what cannot be watched.
    pub watch: fn() -> (Watch, Vec<String>),
    /// Machines of the plan that are not to be had here: their claims are skipped without a process.
    pub absent: Vec<(MachineSpec, Skipped)>,
    /// Where results are kept as they come, and those of an earlier, interrupted run.
    pub journal: Option<Journal>,
}

/// What a run came to.
#[derive(Debug)]
pub struct Ended {
    /// How many claims came out how.
    pub summary: Summary,
    /// Why it ended early.
    pub stopped: Option<Stopped>,
}

/// A test that runs, and what it is.
struct Active<'p> {
    claim: &'p Claim,
    machine: &'p MachineSpec,
    record: Record,
    /// The name of its process in reports of the kernel.
    comm: String,
    process: Running,
}

struct Runner<'a> {
    info: &'a RunInfo,
    options: &'a mut Options,
    listener: &'a mut dyn Listener,
    watch: Watch,
    interrupts: Interrupts,
    how: How,
    /// What the machines are known to have and to lack.
    needs: Needs,
    /// Children that the process had before: not ours to touch.
    ours_before: Vec<i32>,
    began: Instant,
    next_index: u64,
    summary: Summary,
    stopped: Option<Stopped>,
}

/// Runs `plan` and tells `listener` what happens.
///
/// # Errors
/// When signals cannot be blocked, or the listener could not take the first or the last event.
pub fn run(info: &RunInfo, plan: &Plan, options: &mut Options, listener: &mut dyn Listener) -> io::Result<Ended> {
    become_subreaper()?;
    let interrupts = Interrupts::block()?;
    let (watch, remarks) = (options.watch)();
    listener.hear(&Event::RunStarted { info, plan })?;
    for remark in &remarks {
        listener.hear(&Event::Remark(remark))?;
    }
    let how = How::best(options.open);
    let mut runner = Runner {
        info,
        options,
        listener,
        watch,
        interrupts,
        how,
        needs: Needs::default(),
        ours_before: descendants::children(std::process::id() as i32),
        began: Instant::now(),
        next_index: 0,
        summary: Summary::default(),
        stopped: None,
    };
    for (machine, skipped) in runner.options.absent.clone() {
        runner.tell(&Event::Remark(&format!("no {machine} here: {}: {}", skipped.kind, skipped.reason)));
    }
    let mut round = 0;
    while runner.stopped.is_none() && runner.another_round(round) {
        let seed = info.seed.of_round(round);
        let ordered = info.shuffle.map(|order| plan.clone().shuffled(order.of_round(round)));
        runner.round(ordered.as_ref().unwrap_or(plan), round, seed);
        round += 1;
    }
    runner.sweep();
    let (summary, stopped) = (runner.summary, runner.stopped);
    let elapsed = runner.began.elapsed();
    listener.hear(&Event::RunFinished { summary: &summary, stopped: stopped.as_ref(), elapsed })?;
    Ok(Ended { summary, stopped })
}

/// Makes whatever loses its parent below this process its child, so that it can be found.
fn become_subreaper() -> io::Result<()> {
    // SAFETY: PR_SET_CHILD_SUBREAPER takes a number and changes an attribute of the calling process.
    match unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

impl Runner<'_> {
    fn another_round(&self, round: u64) -> bool {
        match self.info.rounds {
            Rounds::Count(count) => round < count,
            Rounds::For(duration) => round == 0 || self.began.elapsed() < duration,
        }
    }

    fn round(&mut self, plan: &Plan, round: u64, seed: Seed) {
        self.tell(&Event::RoundStarted { round, seed, plan });
        let mut waiting: VecDeque<(&MachineSpec, &Claim)> =
            plan.machines.iter().flat_map(|machine| plan.claims.iter().map(move |claim| (machine, claim))).collect();
        let mut active: Vec<Active<'_>> = Vec::new();
        loop {
            while self.stopped.is_none()
                && let Some(&(machine, claim)) = waiting.front()
                && self.has_room(&active, claim)
            {
                waiting.pop_front();
                let started = self.start(claim, machine, round, seed, &mut active);
                active.extend(started);
            }
            if active.is_empty() {
                break;
            }
            self.wait(&active);
            self.look_at_kernel(&mut active);
            self.look_at_signals(&mut active);
            self.attend(&mut active);
        }
        self.summary.not_run += waiting.len() as u64;
        let stopped = self.stopped.clone();
        self.tell(&Event::RoundFinished { round, stopped: stopped.as_ref() });
    }

    fn has_room(&self, active: &[Active<'_>], claim: &Claim) -> bool {
        let alone = |claim: &Claim| claim.test.sharing == Sharing::Alone;
        active.is_empty()
            || (active.len() < self.options.jobs && !alone(claim) && !active.iter().any(|test| alone(test.claim)))
    }

    /// Starts a claim's process; `None` when it has its result without one.
    fn start<'p>(
        &mut self,
        claim: &'p Claim,
        machine: &'p MachineSpec,
        round: u64,
        seed: Seed,
        active: &mut [Active<'p>],
    ) -> Option<Active<'p>> {
        let spec = machine.to_string();
        let mut record = Record::new(&claim.name, &spec, round, seed.to_string());
        record.started_us = microseconds(self.began.elapsed());
        match self.options.journal.as_mut().and_then(|journal| journal.earlier(&claim.name, &spec, round)) {
            Some(Earlier::Finished(earlier)) => {
                self.finished(claim, machine, *earlier);
                return None;
            }
            Some(Earlier::Started) => {
                record.outcome = Outcome::Crash;
                record.message = Some("the machine or the runner went down while it ran".to_owned());
                self.keep(&record);
                self.finished(claim, machine, record);
                return None;
            }
            None => {}
        }
        let absent = self.options.absent.iter().find(|(absent, _)| absent == machine).map(|(_, skipped)| skipped);
        if let Some(skipped) = absent.or_else(|| self.needs.missing(claim, &spec)) {
            skip(&mut record, skipped.clone(), &self.options.strict);
            self.keep(&record);
            self.finished(claim, machine, record);
            return None;
        }
        if let Some(journal) = &mut self.options.journal
            && let Err(error) = journal.started(&claim.name, &spec, round)
        {
            self.stop(Stopped::CannotWrite(error.to_string()));
            self.summary.not_run += 1;
            return None;
        }
        // What the kernel said before this test began is not its doing.
        self.look_at_kernel(active);
        let index = self.next_index;
        self.next_index += 1;
        let mark = format!("{}.{index}", std::process::id());
        let comm = blame::comm(claim.name_in_suite(), &mark);
        let limit = claim.test.timeout.unwrap_or(self.options.timeout);
        let task = Task { claim, machine, seed };
        match Running::start(&task, self.how, mark, limit) {
            Ok(process) => {
                self.tell(&Event::ClaimStarted { comm: &comm, claim, machine });
                Some(Active { claim, machine, record, comm, process })
            }
            Err(error) => {
                record.outcome = Outcome::Error;
                record.message = Some(format!("cannot start a process for the test: {error}"));
                self.keep(&record);
                self.finished(claim, machine, record);
                None
            }
        }
    }

    /// Sleeps until something happened or the first time limit passed.
    fn wait(&self, active: &[Active<'_>]) {
        let mut fds = vec![PollFd::new(self.interrupts.fd(), PollFlags::POLLIN)];
        fds.extend(self.watch.fd().map(|fd| PollFd::new(fd, PollFlags::POLLIN)));
        fds.extend(active.iter().flat_map(|test| test.process.fds()).map(|fd| PollFd::new(fd, PollFlags::POLLIN)));
        let until = active.iter().map(|test| test.process.until()).min();
        let left = until.map_or(Duration::ZERO, |until| until.saturating_duration_since(Instant::now()));
        // Rounded up, so that the last millisecond is slept and not polled away.
        let timeout = PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX);
        // EINTR and the like mean to look again, which comes next anyway.
        let _ = poll(&mut fds, timeout);
    }

    /// Lays new complaints at the doors of the running tests that they name, or of all.
    fn look_at_kernel(&mut self, active: &mut [Active<'_>]) {
        let complaints = self.watch.look(active.len() > 1);
        if complaints.is_empty() {
            return;
        }
        if active.is_empty() {
            let first = &complaints[0];
            self.tell(&Event::Remark(&format!("the kernel complained while no test ran: {first}")));
            return;
        }
        let comms: Vec<&str> = active.iter().map(|test| test.comm.as_str()).collect();
        let accused = blame::accused(&complaints, &comms);
        let mut accused: Vec<&mut Active<'_>> =
            active.iter_mut().zip(accused).filter_map(|(test, is)| is.then_some(test)).collect();
        let names: Vec<String> = accused.iter().map(|test| test.record.name.clone()).collect();
        for test in &mut accused {
            let allowed = |line: &String| test.claim.test.log_allowed.iter().any(|text| line.contains(text));
            // A complaint that is allowed brings its report with it.
            let mut covered = false;
            let excused = |line: &String| {
                covered = if is_complaint(line) { allowed(line) } else { covered || allowed(line) };
                covered
            };
            if complaints.iter().all(excused) {
                continue;
            }
            test.record.kernel_log.extend(complaints.iter().cloned());
            let others = names.iter().filter(|&name| *name != test.record.name);
            for other in others {
                if !test.record.overlapped.contains(other) {
                    test.record.overlapped.push(other.clone());
                }
            }
        }
    }

    fn look_at_signals(&mut self, active: &mut [Active<'_>]) {
        let before = self.is_abandoned();
        let mut asked = false;
        while let Some(signal) = self.interrupts.take() {
            self.stop(Stopped::Signal(signal));
            asked = true;
        }
        if asked || (self.is_abandoned() && !before) {
            active.iter_mut().for_each(|test| test.process.terminate(Instant::now()));
        }
    }

    /// Whether the tests that run are ended, too: they have nobody left to report to, or were told to stop.
    fn is_abandoned(&self) -> bool {
        matches!(self.stopped, Some(Stopped::Signal(_) | Stopped::CannotWrite(_)))
    }

    /// Takes output, presses on those whose time is over, and finishes those that ended.
    fn attend(&mut self, active: &mut Vec<Active<'_>>) {
        let now = Instant::now();
        for test in active.iter_mut() {
            test.process.listen();
            test.process.press(now);
        }
        let mut next = 0;
        while next < active.len() {
            match active[next].process.ended() {
                None => next += 1,
                Some(end) => {
                    // The last complaints are its own too.
                    self.look_at_kernel(active);
                    let test = active.remove(next);
                    self.finish(test, end, active);
                }
            }
        }
    }

    fn finish(&mut self, mut test: Active<'_>, end: End, others: &[Active<'_>]) {
        let beside: Vec<&Running> = others.iter().map(|other| &other.process).collect();
        let mut record = test.record;
        record.leftovers = test.process.clear_away(&beside, &self.ours_before);
        record.duration_us = microseconds(test.process.started.elapsed());
        record.stdout = test.process.stdout.capture.output();
        record.stderr = test.process.stderr.capture.output();
        record.stuck = std::mem::take(&mut test.process.stuck);
        let timed_out = test.process.timed_out();
        if self.is_abandoned() && timed_out.is_none() && end != End::Exited(0) {
            // It was ended with the run, and has no verdict.
            self.summary.not_run += 1;
            return;
        }
        let messages = wire::parse(&test.process.messages.capture.bytes());
        self.needs.learn(test.claim, &record.machine, &messages);
        let evidence = Evidence {
            end,
            timed_out,
            messages,
            known: &self.options.known,
            machine: test.machine,
            strict: &self.options.strict,
        };
        judge(&mut record, evidence);
        if end == End::Unkillable || record.leftovers.iter().any(|left| !left.killed) {
            self.stop(Stopped::Unkillable);
        }
        self.keep(&record);
        self.finished(test.claim, test.machine, record);
    }

    fn keep(&mut self, record: &Record) {
        if let Some(journal) = &mut self.options.journal
            && let Err(error) = journal.finished(record)
        {
            self.stop(Stopped::CannotWrite(error.to_string()));
        }
    }

    fn finished(&mut self, claim: &Claim, machine: &MachineSpec, record: Record) {
        self.summary.count(record.outcome);
        self.tell(&Event::ClaimFinished { claim, machine, record: &record });
        if record.outcome.counts_as_failure() && self.options.on_failure == OnFailure::Stop {
            self.stop(Stopped::FirstFailure);
        }
    }

    /// Ends what no test could be found for: it descends from one of them all the same.
    fn sweep(&mut self) {
        for pid in descendants::children(std::process::id() as i32) {
            if self.ours_before.contains(&pid) {
                continue;
            }
            let name = descendants::stat(pid).map(|stat| stat.name).unwrap_or_default();
            super::running::kill_and_reap(pid, Instant::now() + Duration::from_secs(1));
            self.tell(&Event::Remark(&format!(
                "killed process {pid} ({name}), which some test of this run left behind"
            )));
        }
        memcg::clear_away();
        self.look_at_kernel(&mut []);
    }

    fn tell(&mut self, event: &Event<'_>) {
        if let Err(error) = self.listener.hear(event) {
            self.stop(Stopped::CannotWrite(error.to_string()));
        }
    }

    /// The first reason stands.
    fn stop(&mut self, why: Stopped) {
        self.stopped.get_or_insert(why);
    }
}

fn microseconds(duration: Duration) -> u64 {
    duration.as_micros() as u64
}
