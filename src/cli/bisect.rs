//! `gmemtest bisect`: which kernel, or which commit, is the first bad one.

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};
use serde::Serialize;

use super::failure::Failure;
use super::machines::Machines;
use super::run::GuestRun;
use super::values;
use super::vm::{BootArguments, tests_for_guest};
use crate::harness::Suite;
use crate::harness::exit::{FAILED, GOOD};
use crate::rig::bisect::{
    self, BuildOptions, Deploy, Found, Header, HostRunner, Judged, Log, Rates, RigRunner, Runner, Tree, TreeFound,
    Verdict,
};
use crate::rig::{BootImage, StopSignal};

/// The flags of `bisect`.
#[derive(Debug, Args)]
pub(super) struct BisectArguments {
    /// A kernel image; at least two, in the order of their releases. The change is found either way: from good to bad, or
    /// from bad to good where a failure went away.
    #[arg(long, value_name = "BZIMAGE", conflicts_with_all = ["tree", "good", "bad"], required_unless_present = "tree")]
    kernel: Vec<PathBuf>,
    /// A kernel's git repository, instead of images. It is not written to, but for a worktree that goes away again.
    #[arg(long, value_name = "DIR", requires_all = ["good", "bad"])]
    tree: Option<PathBuf>,
    /// A revision that is good.
    #[arg(long, value_name = "REV", requires = "tree")]
    good: Option<String>,
    /// A revision that is bad.
    #[arg(long, value_name = "REV", requires = "tree")]
    bad: Option<String>,
    /// Configuration to build with (default: tinyconfig).
    #[arg(long, value_name = "FILE", requires = "tree")]
    config: Option<PathBuf>,
    /// Config fragments to merge: base, coco, debug, fault, tdx-sim, or files (default: base, coco; with --simulated-tdx
    /// tdx-sim too).
    #[arg(long, value_name = "NAME", requires = "tree")]
    fragment: Vec<String>,
    /// Patch that every revision gets before it is built, unless it has it already: with --simulated-tdx the one of
    /// scripts/kernel for the release.
    #[arg(long, value_name = "FILE", requires = "tree")]
    patch: Vec<PathBuf>,
    /// Directory for the worktree and the build, which stay for the next bisection; of --tree alone.
    #[arg(long, value_name = "DIR", default_value = "gmemtest-bisect")]
    out: PathBuf,
    /// make -j (default: the number of cores).
    #[arg(long, value_name = "N", requires = "tree")]
    make_jobs: Option<usize>,
    /// How often a run of a bad kernel fails: 1 for a failure that shows every time.
    #[arg(long, value_name = "RATE", default_value_t = 1.0)]
    failure_rate: f64,
    /// How often a run of a good kernel fails all the same.
    #[arg(long, value_name = "RATE", default_value_t = 0.0)]
    noise_rate: f64,
    /// How often a good kernel may be called bad.
    #[arg(long, value_name = "RATE", default_value_t = 0.01)]
    false_bad: f64,
    /// How often a bad kernel may be called good.
    #[arg(long, value_name = "RATE", default_value_t = 0.01)]
    false_good: f64,
    /// Most runs on one kernel; without a verdict by then it cannot be judged.
    #[arg(long, value_name = "N", default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..))]
    max_runs: u32,
    /// The log of verdicts; an interrupted bisection goes on from it.
    #[arg(long, value_name = "FILE", default_value = "gmemtest-bisect.log")]
    log: PathBuf,
    /// Run the tests on this machine, over ssh, instead of in the rig.
    #[arg(long, value_name = "HOST", requires = "deploy")]
    host: Option<String>,
    /// Shell command that makes the machine boot a kernel; GMEMTEST_KERNEL, GMEMTEST_RELEASE and GMEMTEST_HOST are set.
    #[arg(long, value_name = "COMMAND", requires = "host")]
    deploy: Option<String>,
    /// How long the machine may take to come back.
    #[arg(long, value_name = "SECS", default_value = "600", value_parser = values::duration)]
    deploy_timeout: Duration,
    #[command(flatten)]
    boot: BootArguments,
    /// Format of the end.
    #[arg(long, value_enum, default_value_t)]
    format: Format,
    /// The `run` that fails on a bad kernel, with its flags.
    #[arg(last = true, value_name = "COMMAND")]
    command: Vec<String>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
enum Format {
    #[default]
    Pretty,
    Json,
}

/// How it ended.
#[derive(Debug, Serialize)]
struct Ended {
    schema: &'static str,
    /// One line.
    conclusion: String,
    /// The first bad one, when it was found.
    first_bad: Option<String>,
    /// The first good one, where the failure went away.
    #[serde(skip_serializing_if = "Option::is_none")]
    first_good: Option<String>,
    /// Those that it is among, when it was not.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    among: Vec<String>,
    /// The verdict on the good one next to the change, which is the last good one unless the failure went away, and what
    /// the verdict rests on.
    last_good: Option<Judged>,
    /// The same of the bad one; where nothing was found, of the one that kept it from being found.
    bad: Option<Judged>,
}

impl Default for Ended {
    fn default() -> Ended {
        Ended {
            schema: "gmemtest-bisection/1",
            conclusion: String::new(),
            first_bad: None,
            first_good: None,
            among: Vec::new(),
            last_good: None,
            bad: None,
        }
    }
}

/// Bisects.
pub(super) fn bisect(
    arguments: &BisectArguments,
    suites: &[&'static Suite],
    machines: &Machines,
) -> Result<ExitCode, Failure> {
    let rates = arguments.rates()?;
    let run = tests_for_guest("bisect", &arguments.command, suites, machines)?;
    if arguments.host.is_some() && arguments.boot.simulated_tdx {
        return Err("--simulated-tdx: is for kernels under QEMU; leave it out with --host".to_owned().into());
    }
    let words = |rest| run.words(rest);
    let stop = StopSignal::block().map_err(|errno| format!("signals cannot be blocked: {errno}"))?;
    let hardware;
    let mut runner: Box<dyn Runner + '_> = match &arguments.host {
        Some(host) => Box::new(HostRunner {
            host: host.clone(),
            deploy: Deploy {
                command: arguments.deploy.clone().unwrap_or_default(),
                patience: arguments.deploy_timeout,
            },
            suites,
            words: &words,
            stop: &stop,
        }),
        None => {
            let (machine, line) = arguments.boot.hardware()?;
            eprintln!("gmemtest: {line}");
            hardware = machine;
            Box::new(RigRunner {
                hardware: &hardware,
                timeout: arguments.boot.timeout,
                suites,
                words: &words,
                stop: &stop,
            })
        }
    };
    let ended = match &arguments.tree {
        Some(tree) => arguments.revisions(tree, rates, &run, runner.as_mut(), &stop),
        None => arguments.images(rates, &run, runner.as_mut()),
    };
    if let Some(signal) = stop.seen() {
        eprintln!("gmemtest: interrupted; the same command goes on from {}", arguments.log.display());
        return Ok(ExitCode::from(128u8.saturating_add(u8::try_from(signal).unwrap_or(127))));
    }
    let ended = ended.map_err(|error| format!("{error:#}"))?;
    let mut out = io::stdout().lock();
    match arguments.format {
        Format::Pretty => ended.show(&mut out)?,
        Format::Json => {
            serde_json::to_writer_pretty(&mut out, &ended).map_err(io::Error::from)?;
            writeln!(out)?;
        }
    }
    out.flush()?;
    Ok(ExitCode::from(if ended.first_bad.is_some() || ended.first_good.is_some() { GOOD } else { FAILED }))
}

impl BisectArguments {
    fn rates(&self) -> Result<Rates, Failure> {
        let rates = Rates {
            failing: self.failure_rate,
            noise: self.noise_rate,
            false_bad: self.false_bad,
            false_good: self.false_good,
        };
        Ok(rates.check()?)
    }

    /// Where the tests run, for the log.
    fn machine(&self) -> String {
        match &self.host {
            Some(host) => host.clone(),
            None => {
                let module = if self.boot.simulated_tdx { "--simulated-tdx " } else { "" };
                format!(
                    "{module}--cpus {} --memory {}M --append '{}'",
                    self.boot.cpus, self.boot.memory, self.boot.append
                )
            }
        }
    }

    /// The fragments that were asked for.
    fn fragments(&self) -> Vec<String> {
        let usual: &[&str] = if self.boot.simulated_tdx { &["base", "coco", "tdx-sim"] } else { &["base", "coco"] };
        match self.fragment.is_empty() {
            true => usual.iter().map(|&name| name.to_owned()).collect(),
            false => self.fragment.clone(),
        }
    }

    fn open_log(&self, subjects: Vec<String>, build: Vec<String>, rates: Rates, run: &GuestRun) -> anyhow::Result<Log> {
        let header = Header {
            schema: "gmemtest-bisect/2".to_owned(),
            subjects,
            build,
            machine: self.machine(),
            command: run.unseeded_words(),
            rates: [rates.failing, rates.noise, rates.false_bad, rates.false_good],
        };
        Log::open(&self.log, &header)
    }

    fn images(&self, rates: Rates, run: &GuestRun, runner: &mut dyn Runner) -> anyhow::Result<Ended> {
        if self.kernel.len() < 2 {
            anyhow::bail!("--kernel: a bisection needs at least two images, in the order of their releases");
        }
        let images = self.kernel.iter().map(|path| BootImage::read(path)).collect::<Result<Vec<_>, _>>()?;
        let names: Vec<String> = images.iter().map(|image| image.path().display().to_string()).collect();
        let mut log = self.open_log(names.clone(), Vec::new(), rates, run)?;
        let title = |index: usize| format!("{} ({})", images[index].release(), names[index]);
        let found = bisect::change(images.len(), |index| {
            self.verdict(&names[index], &title(index), &mut log, || {
                bisect::judge(&names[index], &images[index], runner, rates, self.max_runs)
            })
        })?;
        let judged = |index: usize| log.verdict(&names[index]).cloned();
        let verdict = |index: usize| log.verdict(&names[index]).map_or(Verdict::CannotTell, |judged| judged.verdict);
        Ok(match found {
            Found::Change { before, after } => {
                let (is, was) = (verdict(after), verdict(before));
                let conclusion = format!(
                    "the first {} kernel is {}; the last {} one is {}",
                    is.word(),
                    title(after),
                    was.word(),
                    title(before)
                );
                let name = Some(names[after].clone());
                let ended = Ended { conclusion, ..Ended::between([before, after].map(judged)) };
                match is {
                    Verdict::Bad => Ended { first_bad: name, ..ended },
                    _ => Ended { first_good: name, ..ended },
                }
            }
            Found::Among { before, after } => Ended {
                conclusion: format!(
                    "the first {} kernel is {} or one before it after {}: those between cannot be judged",
                    verdict(after).word(),
                    title(after),
                    title(before)
                ),
                among: names[before + 1..=after].to_vec(),
                ..Ended::between([before, after].map(judged))
            },
            Found::EndCannotTell(end) => {
                let judged = judged(end);
                let skipped = judged.as_ref().is_some_and(|judged| judged.evidence.is_all_skipped());
                let mend = if skipped {
                    "every test was skipped there; with --strict a skip is a failure"
                } else {
                    "name another one"
                };
                Ended {
                    conclusion: format!(
                        "the {} kernel, {}, cannot be judged: {mend}",
                        if end == 0 { "first" } else { "last" },
                        title(end)
                    ),
                    bad: judged,
                    ..Ended::default()
                }
            }
            Found::Same(is) => Ended {
                conclusion: format!(
                    "nothing changes: the first kernel, {}, and the last, {}, are both {}",
                    title(0),
                    title(images.len() - 1),
                    is.word()
                ),
                ..Ended::between([0, images.len() - 1].map(judged))
            },
        })
    }

    fn revisions(
        &self,
        directory: &std::path::Path,
        rates: Rates,
        run: &GuestRun,
        runner: &mut dyn Runner,
        stop: &StopSignal,
    ) -> anyhow::Result<Ended> {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let options = BuildOptions {
            config: self.config.clone(),
            fragments: self.fragments(),
            patches: self.patch.clone(),
            jobs: self.make_jobs.unwrap_or(cores),
        };
        let paths = self.config.iter().chain(&self.patch).map(|path| path.display().to_string());
        let build = self.fragments().into_iter().chain(paths).collect();
        let tree = Tree::open(directory, &self.out, options)?;
        let good = tree.commit("--good", self.good.as_deref().unwrap_or_default())?;
        let bad = tree.commit("--bad", self.bad.as_deref().unwrap_or_default())?;
        let mut log = self.open_log(vec![good.clone(), bad.clone()], build, rates, run)?;
        let ends = [good.clone(), bad.clone()];
        let found = tree.bisect(&good, &bad, |tree, commit| {
            // What kept one of the ends from being judged has been mended, or else the bisection would not be tried again.
            if ends.iter().any(|end| end == commit) {
                log.forget_untold(commit);
            }
            self.verdict(commit, &tree.title(commit), &mut log, || {
                eprintln!("gmemtest: {}: building", tree.title(commit));
                let start = Instant::now();
                match tree.build(commit, stop)? {
                    Ok(image) => {
                        eprintln!("gmemtest: {}: built in {} s", image.release(), start.elapsed().as_secs());
                        bisect::judge(commit, &image, runner, rates, self.max_runs)
                    }
                    Err(unbuilt) => Ok(unbuilt),
                }
            })
        })?;
        Ok(match found {
            TreeFound::First(first) => Ended {
                last_good: tree.last_good(&first, &log),
                bad: log.verdict(&first).cloned(),
                first_bad: Some(first.clone()),
                conclusion: format!("the first bad commit is {}", tree.title(&first)),
                ..Ended::default()
            },
            TreeFound::Among(among) => Ended {
                conclusion: format!("the first bad commit is one of {}: the others cannot be judged", among.len()),
                bad: among.iter().find_map(|commit| log.verdict(commit)).cloned(),
                among,
                ..Ended::default()
            },
            TreeFound::WrongEnd { revision, taken_for, is } => Ended {
                bad: log.verdict(&revision).cloned(),
                conclusion: format!("{} ought to be {}: {}", tree.title(&revision), taken_for.word(), is.word()),
                ..Ended::default()
            },
        })
    }

    /// The verdict in the log, or a new one that is kept there; either is told.
    fn verdict(
        &self,
        subject: &str,
        title: &str,
        log: &mut Log,
        judge: impl FnOnce() -> anyhow::Result<Judged>,
    ) -> anyhow::Result<Verdict> {
        if let Some(known) = log.verdict(subject) {
            eprintln!("gmemtest: {title}: {} (from {})", told(known), self.log.display());
            return Ok(known.verdict);
        }
        let judged = judge()?;
        eprintln!("gmemtest: {title}: {}", told(&judged));
        log.keep(&judged)?;
        Ok(judged.verdict)
    }
}

/// A verdict in one line.
fn told(judged: &Judged) -> String {
    let runs = judged.failed + judged.passed + judged.untold;
    let untold = if judged.untold > 0 { format!(", {} without a verdict", judged.untold) } else { String::new() };
    format!(
        "{} after {runs} run(s), {} failed{untold}: {}",
        judged.verdict.word(),
        judged.failed,
        judged.evidence.headline()
    )
}

impl Ended {
    /// What is known of two kernels next to the change, in the order of the list.
    fn between(judged: [Option<Judged>; 2]) -> Ended {
        let mut ended = Ended::default();
        for judged in judged.into_iter().flatten() {
            match judged.verdict {
                Verdict::Good => ended.last_good = Some(judged),
                _ => ended.bad = Some(judged),
            }
        }
        ended
    }

    fn show(&self, out: &mut impl Write) -> io::Result<()> {
        writeln!(out, "{}", self.conclusion)?;
        for commit in &self.among {
            writeln!(out, "  {commit}")?;
        }
        let good = if self.first_good.is_some() { "first good" } else { "last good" };
        for (good, judged) in [(good, &self.last_good), ("good", &self.bad)] {
            let Some(judged) = judged else { continue };
            let title = if judged.verdict == Verdict::Good { good } else { judged.verdict.word() };
            writeln!(out, "\n{title}: {}\n  {}", judged.subject, told(judged))?;
            for record in &judged.evidence.failures {
                writeln!(out, "  {}  {}  [{}]", record.outcome, record.name, record.machine)?;
                for line in record.message.iter().flat_map(|message| message.lines()) {
                    writeln!(out, "      {line}")?;
                }
                for line in &record.kernel_log {
                    writeln!(out, "      kernel: {line}")?;
                }
            }
            match judged.evidence.failures_left_out() {
                0 => {}
                more => writeln!(out, "  and {more} more that failed")?,
            }
            for line in &judged.evidence.tail {
                writeln!(out, "  | {line}")?;
            }
        }
        Ok(())
    }
}
