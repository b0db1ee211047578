//! `gmemtest mutants`: the selftests against every switchable defect of the model.

use std::io::{self, Write};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};
use serde::Serialize;

use super::failure::Failure;
use super::run::patterns;
use super::values;
use crate::harness::Suite;
use crate::harness::exit::{FAILED, GOOD};
use crate::harness::mutation::{Baseline, Killer, Limits, Listener, Survey, Suspect, Trial, survey};
use crate::harness::plan::{Claim, Plan, claims};
use crate::sim::Mutant;

/// Killers that are named on a mutant's line.
const NAMED: usize = 3;

/// Claims that are named as failing without a mutant.
const SHOWN_FAILURES: usize = 5;

/// The flags of `mutants`.
#[derive(Debug, Args)]
pub(super) struct MutantsArguments {
    /// Names of mutants: a whole name, a part of one, or a pattern with *.
    #[arg(value_name = "PATTERN")]
    patterns: Vec<String>,
    /// Only the claims that this pattern means may kill.
    #[arg(long, value_name = "PATTERN")]
    claim: Vec<String>,
    /// Leave out the claims that this pattern means. Those on 1 GiB folios take seconds each, and there is one on 2 MiB
    /// folios beside each of them.
    #[arg(long, value_name = "PATTERN", default_value = "*1_gib*")]
    exclude: Vec<String>,
    /// Run every claim on every mutant, and count all killers, instead of stopping after the first few.
    #[arg(long)]
    all: bool,
    /// How many killers are enough.
    #[arg(long, value_name = "N", default_value_t = NAMED, conflicts_with = "all", value_parser = enough)]
    killers: usize,
    /// Print the names of the mutants, where each can show, and what each breaks; run nothing.
    #[arg(long)]
    list: bool,
    /// Processes that run claims (default: the CPUs of this host).
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    jobs: Option<u16>,
    /// Time limit of a claim, in seconds or with a unit. A claim takes milliseconds; one that gets into a loop is ended.
    #[arg(long, value_name = "SECS", default_value = "10", value_parser = values::duration)]
    timeout: Duration,
    /// Format of the results.
    #[arg(long, value_enum, default_value_t)]
    format: Format,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
enum Format {
    #[default]
    Pretty,
    Json,
}

fn enough(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|&n| n > 0).ok_or_else(|| "expected a number from 1".to_owned())
}

/// Runs the claims on the mutants. The exit code is 1 when one survives.
pub(super) fn mutants(arguments: &MutantsArguments, suites: &[&'static Suite]) -> Result<ExitCode, Failure> {
    let chosen = chosen(&arguments.patterns)?;
    let mut out = io::stdout().lock();
    if arguments.list {
        return list(&chosen, arguments.format, &mut out);
    }
    let all = claims(suites);
    let plan = Plan::new(suites, Vec::new(), &patterns(&arguments.claim), &patterns(&arguments.exclude))?;
    let wanted: Vec<usize> =
        (0..all.len()).filter(|&i| plan.claims.iter().any(|claim| claim.name == all[i].name)).collect();
    let suspects: Vec<Suspect> =
        chosen.iter().map(|mutant| Suspect { name: mutant.name(), machines: mutant.machines() }).collect();
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    let work = Survey {
        suspects: &suspects,
        claims: &wanted,
        limits: Limits { claim: arguments.timeout, enough: if arguments.all { usize::MAX } else { arguments.killers } },
        jobs: arguments.jobs.map_or(cpus, usize::from),
    };
    let began = Instant::now();
    let mut report = Report {
        out: &mut out,
        format: arguments.format,
        mutants: &chosen,
        claims: &all,
        planned: wanted.len(),
        document: Document { schema: "gmemtest-mutants/1", ..Document::default() },
    };
    survey(&work, &mut report).map_err(|error| format!("cannot go on: {error}"))?;
    report.finish(began.elapsed())?;
    Ok(ExitCode::from(if report.document.survivors.is_empty() { GOOD } else { FAILED }))
}

/// The mutants that the patterns mean; all when there is none.
fn chosen(texts: &[String]) -> Result<Vec<Mutant>, Failure> {
    let names: Vec<String> = Mutant::ALL.iter().map(|mutant| mutant.name().to_owned()).collect();
    let mut wanted = vec![texts.is_empty(); names.len()];
    for pattern in patterns(texts) {
        let meant = pattern.select(&names);
        if !meant.contains(&true) {
            let text = pattern.as_str();
            return Err(
                format!("pattern '{text}' matches no mutant; `gmemtest mutants --list` prints their names").into()
            );
        }
        wanted.iter_mut().zip(meant).for_each(|(wanted, meant)| *wanted |= meant);
    }
    Ok(Mutant::ALL.iter().copied().zip(wanted).filter(|(_, wanted)| *wanted).map(|(mutant, _)| mutant).collect())
}

fn list(mutants: &[Mutant], format: Format, out: &mut impl Write) -> Result<ExitCode, Failure> {
    match format {
        Format::Pretty => {
            for mutant in mutants {
                writeln!(out, "{:<32} {}", mutant.name(), mutant.description())?;
                writeln!(out, "{:<32}   on {}", "", mutant.machines().join(" and "))?;
            }
        }
        Format::Json => {
            let mutants: Vec<Listed> = mutants.iter().copied().map(Listed::new).collect();
            write_json(out, &MutantList { schema: "gmemtest-mutant-list/1", mutants })?;
        }
    }
    Ok(ExitCode::from(GOOD))
}

fn write_json(out: &mut impl Write, value: &impl Serialize) -> io::Result<()> {
    serde_json::to_writer_pretty(&mut *out, value).map_err(io::Error::from)?;
    writeln!(out)
}

#[derive(Debug, Serialize)]
struct MutantList {
    schema: &'static str,
    mutants: Vec<Listed>,
}

#[derive(Debug, Serialize)]
struct Listed {
    name: &'static str,
    description: &'static str,
    machines: &'static [&'static str],
}

impl Listed {
    fn new(mutant: Mutant) -> Listed {
        Listed { name: mutant.name(), description: mutant.description(), machines: mutant.machines() }
    }
}

/// The document of `--format json`.
#[derive(Debug, Default, Serialize)]
struct Document {
    schema: &'static str,
    claims: usize,
    baselines: Vec<ListedBaseline>,
    mutants: Vec<ListedTrial>,
    killed: usize,
    survivors: Vec<&'static str>,
    elapsed_ms: u64,
}

#[derive(Debug, Serialize)]
struct ListedBaseline {
    machine: &'static str,
    hold: usize,
    /// Claims that fail without any mutant, and so do not count as killers there.
    failing: Vec<Testimony>,
}

#[derive(Debug, Serialize)]
struct ListedTrial {
    #[serde(flatten)]
    mutant: Listed,
    killed: bool,
    killers: Vec<Testimony>,
    claims_run: usize,
    elapsed_ms: u64,
}

#[derive(Debug, Serialize)]
struct Testimony {
    claim: String,
    machine: &'static str,
    how: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    message: Option<String>,
}

struct Report<'a, W: Write> {
    out: &'a mut W,
    format: Format,
    mutants: &'a [Mutant],
    claims: &'a [Claim],
    planned: usize,
    document: Document,
}

impl<W: Write> Report<'_, W> {
    fn testimony(&self, Killer { claim, machine, finding }: &Killer) -> Testimony {
        let message = finding.message().map(str::to_owned);
        Testimony { claim: self.claims[*claim].name.clone(), machine, how: finding.word(), message }
    }

    fn finish(&mut self, elapsed: Duration) -> io::Result<()> {
        self.document.claims = self.planned;
        self.document.elapsed_ms = elapsed.as_millis() as u64;
        let Document { killed, survivors, .. } = &self.document;
        match self.format {
            Format::Json => write_json(self.out, &self.document),
            Format::Pretty => {
                let total = self.mutants.len();
                write!(self.out, "\n{total} mutants, {killed} killed")?;
                if !survivors.is_empty() {
                    write!(self.out, ", {} survive: {}", survivors.len(), survivors.join(", "))?;
                }
                writeln!(self.out, " ({} claims, {:.1} s)", self.planned, elapsed.as_secs_f64())
            }
        }
    }
}

impl<W: Write> Listener for Report<'_, W> {
    fn baseline(&mut self, baseline: &Baseline) -> io::Result<()> {
        let &Baseline { machine, ref witnesses, ref failing } = baseline;
        let failing: Vec<Testimony> = failing
            .iter()
            .map(|(claim, finding)| self.testimony(&Killer { claim: *claim, machine, finding: finding.clone() }))
            .collect();
        if self.format == Format::Pretty {
            let count = failing.len();
            let remark = if count == 0 { String::new() } else { format!(", {count} fail and do not count as killers") };
            writeln!(self.out, "without a mutant {machine:<36} {:>5} claims hold{remark}", witnesses.len())?;
            for Testimony { claim, how, message, .. } in failing.iter().take(SHOWN_FAILURES) {
                writeln!(self.out, "    {how} {claim}: {}", message.as_deref().unwrap_or_default())?;
            }
            if failing.len() > SHOWN_FAILURES {
                let more = failing.len() - SHOWN_FAILURES;
                writeln!(
                    self.out,
                    "    and {more} more, which --format json and `gmemtest run --machine {machine}` name"
                )?;
            }
            self.out.flush()?;
        }
        self.document.baselines.push(ListedBaseline { machine, hold: witnesses.len(), failing });
        Ok(())
    }

    fn trial(&mut self, trial: &Trial) -> io::Result<()> {
        let mutant = self.mutants[trial.suspect];
        let killers: Vec<Testimony> = trial.killers.iter().map(|killer| self.testimony(killer)).collect();
        if self.format == Format::Pretty {
            let name = mutant.name();
            match killers.as_slice() {
                [] => {
                    writeln!(
                        self.out,
                        "SURVIVES {name}: {} ({} claims saw nothing)",
                        mutant.description(),
                        trial.heard
                    )?;
                }
                [first, ..] => {
                    let names: Vec<String> = killers
                        .iter()
                        .take(NAMED)
                        .map(|killer| {
                            let how = if killer.how == "failed" { String::new() } else { format!(" ({})", killer.how) };
                            let place = if killer.machine == first.machine {
                                String::new()
                            } else {
                                format!(" [{}]", killer.machine)
                            };
                            format!("{}{how}{place}", killer.claim)
                        })
                        .collect();
                    let more = killers.len() - names.len();
                    let more = if more == 0 { String::new() } else { format!(" and {more} more") };
                    writeln!(self.out, "killed   {name} on {} by {}{more}", first.machine, names.join(", "))?;
                }
            }
            self.out.flush()?;
        }
        if killers.is_empty() {
            self.document.survivors.push(mutant.name());
        } else {
            self.document.killed += 1;
        }
        self.document.mutants.push(ListedTrial {
            mutant: Listed::new(mutant),
            killed: !killers.is_empty(),
            killers,
            claims_run: trial.heard,
            elapsed_ms: trial.elapsed.as_millis() as u64,
        });
        Ok(())
    }
}
