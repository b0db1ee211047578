//! Text for people: a line a result, the whole story of each failure, a summary; on a terminal a live line besides.

use std::io::{self, IsTerminal, Write};
use std::time::Duration;

use anstyle::{AnsiColor, Style};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::story;
use crate::harness::event::{Event, Listener, RunInfo};
use crate::harness::exit::Stopped;
use crate::harness::runner::Rounds;
use crate::harness::{Outcome, Record, Summary};

/// The live line, on standard error, when that is a terminal.
#[derive(Debug)]
pub struct Screen {
    bar: Option<ProgressBar>,
    running: Vec<String>,
}

impl Screen {
    /// A live line when standard error is a terminal, else nothing.
    pub fn new() -> Screen {
        let bar = io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
            if let Ok(style) = ProgressStyle::with_template("{spinner} {elapsed} {pos}/{len} {wide_msg}") {
                bar.set_style(style);
            }
            bar
        });
        Screen { bar, running: Vec::new() }
    }

    /// Lets `write` write to the terminal without disturbing the live line.
    fn beside<T>(&self, write: impl FnOnce() -> T) -> T {
        match &self.bar {
            Some(bar) => bar.suspend(write),
            None => write(),
        }
    }

    fn show(&self) {
        if let Some(bar) = &self.bar {
            bar.set_message(self.running.join(", "));
            bar.tick();
        }
    }
}

impl Default for Screen {
    fn default() -> Screen {
        Screen::new()
    }
}

/// Writes text for people.
pub struct Pretty<W> {
    out: W,
    screen: Screen,
    info: Option<RunInfo>,
    /// What the summary lists again.
    failures: Vec<Record>,
    kinds: Vec<(String, usize)>,
    known: usize,
    several_machines: bool,
}

impl<W: Write> Pretty<W> {
    /// Writes to `out`, which takes care of colour, and shows progress on `screen`.
    pub fn new(out: W, screen: Screen) -> Pretty<W> {
        Pretty { out, screen, info: None, failures: Vec::new(), kinds: Vec::new(), known: 0, several_machines: false }
    }

    fn finished(&mut self, record: &Record) -> io::Result<()> {
        let started = self.screen.running.iter().position(|name| *name == record.name);
        if let Some(at) = started {
            self.screen.running.remove(at);
        }
        if let Some(bar) = &self.screen.bar {
            bar.inc(1);
        }
        let (out, info, several) = (&mut self.out, self.info.as_ref(), self.several_machines);
        // Of a machine that is not to be had, one remark has told it all.
        if started.is_some() || record.outcome != Outcome::Skip {
            self.screen.beside(|| write_result(out, info, several, record))?;
        }
        match record.outcome {
            Outcome::Skip => {
                let kind = record.skip.as_ref().map(|skip| skip.kind.clone()).unwrap_or_default();
                match self.kinds.iter_mut().find(|(known, _)| *known == kind) {
                    Some((_, count)) => *count += 1,
                    None => self.kinds.push((kind, 1)),
                }
            }
            Outcome::Known => self.known += 1,
            outcome if outcome.counts_as_failure() => self.failures.push(record.clone()),
            _ => {}
        }
        self.screen.show();
        Ok(())
    }

    fn summary(&mut self, summary: &Summary, stopped: Option<&Stopped>, elapsed: Duration) -> io::Result<()> {
        if let Some(bar) = &self.screen.bar {
            bar.finish_and_clear();
        }
        let out = &mut self.out;
        if !self.failures.is_empty() {
            writeln!(out, "\nnot passed:")?;
        }
        for record in &self.failures {
            let style = style(record.outcome);
            writeln!(out, "  {style}{:<7}{style:#} {} on {}", record.outcome, record.name, record.machine)?;
            if let Some(info) = &self.info {
                writeln!(out, "          {}", info.reproduce(record))?;
            }
        }
        let mut parts: Vec<String> = Vec::new();
        for outcome in Outcome::ALL {
            let count = summary.of(outcome);
            if count > 0 || outcome == Outcome::Pass {
                let kinds: Vec<String> = self.kinds.iter().map(|(kind, count)| format!("{kind} {count}")).collect();
                let kinds = if outcome == Outcome::Skip { format!(" ({})", kinds.join(", ")) } else { String::new() };
                parts.push(format!("{count} {}{kinds}", plural(outcome)));
            }
        }
        if summary.not_run > 0 {
            parts.push(format!("{} not run", summary.not_run));
        }
        writeln!(out, "\n{} results in {:.2} s: {}", summary.run(), elapsed.as_secs_f64(), parts.join(", "))?;
        if let Some(stopped) = stopped {
            writeln!(out, "{stopped}")?;
        }
        out.flush()
    }
}

impl<W: Write> Listener for Pretty<W> {
    fn hear(&mut self, event: &Event<'_>) -> io::Result<()> {
        match event {
            Event::RunStarted { info, plan } => {
                for line in story::header(info, plan) {
                    writeln!(self.out, "{line}")?;
                }
                self.several_machines = plan.machines.len() > 1;
                self.info = Some((*info).clone());
                self.out.flush()
            }
            Event::Remark(text) => {
                let out = &mut self.out;
                self.screen.beside(|| writeln!(out, "note: {text}"))
            }
            Event::RoundStarted { round, seed, plan } => {
                if let Some(bar) = &self.screen.bar {
                    bar.set_length((*round + 1) * plan.results_per_round() as u64);
                    bar.enable_steady_tick(Duration::from_millis(250));
                }
                let rounds = self.info.as_ref().is_some_and(|info| info.rounds != Rounds::Count(1));
                let out = &mut self.out;
                self.screen.beside(|| if rounds { writeln!(out, "round {}, seed {seed}", round + 1) } else { Ok(()) })
            }
            Event::ClaimStarted { claim, .. } => {
                self.screen.running.push(claim.name.clone());
                self.screen.show();
                Ok(())
            }
            Event::ClaimFinished { record, .. } => self.finished(record),
            Event::RoundFinished { .. } => Ok(()),
            Event::RunFinished { summary, stopped, elapsed } => self.summary(summary, *stopped, *elapsed),
        }
    }
}

fn write_result(out: &mut impl Write, info: Option<&RunInfo>, several: bool, record: &Record) -> io::Result<()> {
    let style = style(record.outcome);
    let milliseconds = record.duration_us as f64 / 1000.0;
    write!(out, "{style}{:<7}{style:#} {milliseconds:>8.1} ms  {}", record.outcome, record.name)?;
    if several {
        write!(out, "  [{}]", record.machine)?;
    }
    match record.outcome {
        Outcome::Skip => write!(out, ": {}", record.headline())?,
        Outcome::Known => write!(out, ": {}", record.known_issue.as_deref().unwrap_or_default())?,
        _ => {}
    }
    writeln!(out)?;
    if record.outcome != Outcome::Skip {
        for line in story::details(record) {
            writeln!(out, "        {line}")?;
        }
    }
    if record.outcome.counts_as_failure() {
        writeln!(out, "        on {}", record.machine)?;
        if let Some(info) = info {
            writeln!(out, "        again: {}", info.reproduce(record))?;
        }
    }
    out.flush()
}

fn plural(outcome: Outcome) -> &'static str {
    match outcome {
        Outcome::Pass => "passed",
        Outcome::Fail => "failed",
        Outcome::Skip => "skipped",
        Outcome::Known => "known",
        Outcome::Timeout => "timed out",
        Outcome::Crash => "crashed",
        Outcome::Error => "errors",
        Outcome::Tainted => "tainted",
    }
}

fn style(outcome: Outcome) -> Style {
    let colour = match outcome {
        Outcome::Pass => AnsiColor::Green,
        Outcome::Skip => AnsiColor::Blue,
        Outcome::Known => AnsiColor::Yellow,
        _ => AnsiColor::Red,
    };
    colour.on_default()
}
