//! `gmemtest run`: runs tests and reports.

use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use clap::{Args, ValueEnum};

use super::failure::Failure;
use super::machines::{EVERY_KVM, Machines, Purpose};
use super::values;
use crate::harness::event::{Event, Listener, RunInfo};
use crate::harness::exit::ExitStyle;
use crate::harness::journal::Journal;
use crate::harness::outcome::Skipped;
use crate::harness::plan::Plan;
use crate::harness::runner::{self, OnFailure, Options, Rounds};
use crate::harness::select::Pattern;
use crate::harness::{Seed, Stop, Suite};
use crate::machine::{Family, MachineSpec, SkipKind, VmType};
use crate::observe::Environment;
use crate::report::{Json, Junit, Ktap, Pretty, Screen};
use crate::rig::{EventWriter, Rest};

/// The flags of `run`, which are those of every selftest binary too.
#[derive(Debug, Args)]
pub(super) struct RunArguments {
    /// Names of tests: a suite, a test, a row; `*` stands for any run of characters; a name that nothing has is looked
    /// for within the names.
    #[arg(value_name = "PATTERN")]
    pub(super) patterns: Vec<String>,
    /// Leave out the tests that a pattern means.
    #[arg(long, value_name = "PATTERN")]
    pub(super) exclude: Vec<String>,
    /// Machine to run on: kvm:default, sim:tdx,policy=bug-vm, .. (list --machines has all); kvm:* is every VM type that the
    /// running kernel offers, auto is that and sim:tdx where it does not offer TDX. The default is auto, and kvm:* for a
    /// verdict on a kernel: --exit-style bisect or kselftest-runner, vm, matrix, bisect.
    #[arg(long, value_name = "SPEC")]
    pub(super) machine: Vec<String>,
    /// Format of the results (default: pretty; of a selftest binary whose output is not a terminal: ktap).
    #[arg(long, value_enum)]
    format: Option<Format>,
    /// File for the results; standard output then shows them as text.
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Most tests at a time (default: one for each CPU where every machine is simulated, and in the rig; otherwise, and with
    /// kvm:tdx, one, so that what the kernel does is one test's doing).
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    jobs: Option<u16>,
    /// Time limit of a test, in seconds or with a unit; a test that states its own keeps that.
    #[arg(long, value_name = "SECS", default_value = "120", value_parser = values::duration)]
    timeout: Duration,
    /// Run everything N times.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..), conflicts_with = "duration")]
    repeat: Option<u64>,
    /// Run everything again until so much time has passed (30m); the round that is then under way is finished.
    #[arg(long, value_name = "TIME", value_parser = values::duration)]
    duration: Option<Duration>,
    /// Stop at the first failure; without --repeat or --duration, repeat until there is one.
    #[arg(long)]
    until_fail: bool,
    /// Shuffle the order, by the seed of the run or by one given here.
    #[arg(long, value_name = "SEED", num_args = 0..=1, require_equals = true)]
    shuffle: Option<Option<Seed>>,
    /// The seed that every random choice follows from.
    #[arg(long)]
    seed: Option<Seed>,
    /// Keep every result in DIR as it comes, synced to disk.
    #[arg(long, value_name = "DIR")]
    journal: Option<PathBuf>,
    /// Go on with the run in the journal: what has a result keeps it, what had only started is a crash.
    #[arg(long, requires = "journal")]
    resume: bool,
    /// A missing prerequisite is a failure: skips of these kinds, or of every kind but declined.
    #[arg(long, value_name = "KIND,..", num_args = 0..=1, require_equals = true)]
    strict: Option<Option<String>>,
    /// Meaning of the exit code. kselftest: 0 good, 1 failure, 2 usage, 4 all skipped. kselftest-runner: the same for
    /// run_kselftest.sh, with 1 for usage. bisect: 0 good, 1 bad, 125 cannot tell, 255 stop. A run ended by a signal exits with 128 and its number.
    #[arg(long, value_name = "STYLE", value_enum, default_value_t)]
    exit_style: StyleName,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
enum Format {
    /// Text for people.
    #[default]
    Pretty,
    /// KTAP version 1.
    Ktap,
    /// One JSON document, written at the end.
    Json,
    /// JUnit's XML, written at the end.
    Junit,
    /// Events as lines of JSON, from the rig's guest to its host.
    #[value(hide = true)]
    Events,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
enum StyleName {
    #[default]
    Kselftest,
    KselftestRunner,
    Bisect,
}

/// Runs tests. `again` are the words that start this program for one test again.
pub(super) fn run(
    arguments: &RunArguments,
    suites: &[&'static Suite],
    machines: &Machines,
    again: &[String],
) -> Result<ExitCode, Failure> {
    let plan = Plan::new(
        suites,
        machines.named_for(arguments.purpose(), &arguments.machine)?,
        &patterns(&arguments.patterns),
        &patterns(&arguments.exclude),
    )?;
    let jobs = arguments.jobs_for(&plan.machines);
    let mut reporters = arguments.reporters()?;
    let (journal, seed) = arguments.open_journal()?;
    let info = RunInfo {
        arguments: std::env::args_os().map(|text| text.to_string_lossy().into_owned()).collect(),
        again: again.to_vec(),
        seed,
        shuffle: arguments.shuffle.map(|order| order.unwrap_or(seed)),
        rounds: arguments.rounds(),
        jobs,
        started: SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs(),
        environment: Environment::read(),
    };
    let mut options = Options {
        jobs,
        timeout: arguments.timeout,
        on_failure: if arguments.until_fail { OnFailure::Stop } else { OnFailure::GoOn },
        strict: arguments.strict_kinds()?,
        known: (machines.known)()?,
        open: machines.open,
        watch: machines.watch,
        absent: absent(&plan, machines),
        journal,
    };
    let ended = runner::run(&info, &plan, &mut options, &mut reporters)?;
    Ok(ExitCode::from(arguments.style().code(&ended.summary, ended.stopped.as_ref())))
}

pub(super) fn patterns(texts: &[String]) -> Vec<Pattern> {
    texts.iter().map(Pattern::new).collect()
}

/// The machines of the plan that are not to be had here.
fn absent(plan: &Plan, machines: &Machines) -> Vec<(MachineSpec, Skipped)> {
    let skip = |spec: &MachineSpec| match (machines.open)(spec) {
        Err(Stop::Skip { kind, reason }) => Some((spec.clone(), Skipped::new(kind, reason))),
        _ => None,
    };
    plan.machines.iter().filter_map(skip).collect()
}

impl RunArguments {
    /// Which convention the exit code follows.
    pub(super) fn style(&self) -> ExitStyle {
        match self.exit_style {
            StyleName::Kselftest => ExitStyle::Kselftest,
            StyleName::KselftestRunner => ExitStyle::KselftestRunner,
            StyleName::Bisect => ExitStyle::Bisect,
        }
    }

    fn purpose(&self) -> Purpose {
        match self.style() {
            ExitStyle::Kselftest => Purpose::Survey,
            ExitStyle::KselftestRunner | ExitStyle::Bisect => Purpose::Verdict,
        }
    }

    /// The `run` that a guest is given: these tests on these machines, with its events on standard output. What the host
    /// does with the results is left out.
    ///
    /// # Errors
    /// One line that names what a guest cannot do, or that is wrong in itself.
    pub(super) fn for_guest(&self) -> Result<GuestRun, Failure> {
        if self.journal.is_some() {
            return Err("--journal: the guest has no disk that outlives it; results come to the host as they happen, use --output".to_owned().into());
        }
        self.strict_kinds()?;
        let seed = self.seed.map_or_else(Seed::fresh, Ok).map_err(|error| format!("cannot make a seed: {error}"))?;
        let mut words: Vec<String> = vec!["run".into(), "--format=events".into(), format!("--seed={seed}")];
        words.extend(self.jobs.map(|jobs| format!("--jobs={jobs}")));
        words.push(format!("--timeout={}s", self.timeout.as_secs_f64()));
        words.extend(self.repeat.map(|count| format!("--repeat={count}")));
        words.extend(self.duration.map(|time| format!("--duration={}s", time.as_secs_f64())));
        words.extend(self.until_fail.then(|| "--until-fail".to_owned()));
        words.extend(self.shuffle.map(|order| format!("--shuffle={}", order.unwrap_or(seed))));
        words.extend(self.strict.as_ref().map(|kinds| match kinds {
            Some(kinds) => format!("--strict={kinds}"),
            None => "--strict".to_owned(),
        }));
        Ok(GuestRun {
            repeats: self.repeat.is_some_and(|count| count > 1) || self.duration.is_some() || self.until_fail,
            flags: words,
            machines: if self.machine.is_empty() { vec![EVERY_KVM.to_owned()] } else { self.machine.clone() },
            patterns: self.patterns.clone(),
            exclude: self.exclude.clone(),
        })
    }

    fn rounds(&self) -> Rounds {
        match (self.repeat, self.duration) {
            (Some(count), _) => Rounds::Count(count),
            (None, Some(duration)) => Rounds::For(duration),
            (None, None) if self.until_fail => Rounds::For(Duration::MAX),
            (None, None) => Rounds::Count(1),
        }
    }

    fn jobs_for(&self, machines: &[MachineSpec]) -> usize {
        match self.jobs {
            Some(jobs) => jobs.into(),
            None if machines.iter().all(|machine| self.may_share(machine)) => {
                std::thread::available_parallelism().map_or(1, usize::from)
            }
            None => 1,
        }
    }

    /// Whether tests on that machine run beside others unless told otherwise: not where a kernel that other work depends on
    /// is on trial, nor where the tests have one TDX module in common. Events are written in the rig.
    fn may_share(&self, machine: &MachineSpec) -> bool {
        let in_rig = self.format == Some(Format::Events);
        machine.family == Family::Sim || (in_rig && machine.vm_type != VmType::Tdx)
    }

    fn strict_kinds(&self) -> Result<Vec<SkipKind>, Failure> {
        match &self.strict {
            None => Ok(Vec::new()),
            Some(None) => Ok(SkipKind::ALL.into_iter().filter(|&kind| kind != SkipKind::Declined).collect()),
            Some(Some(list)) => list
                .split(',')
                .map(|word| values::skip_kind(word).map_err(|why| format!("--strict={list}: '{word}': {why}").into()))
                .collect(),
        }
    }

    /// The journal, and the seed: that of the journal when it is taken up.
    fn open_journal(&self) -> Result<(Option<Journal>, Seed), Failure> {
        let fresh =
            || self.seed.map_or_else(|| Seed::fresh().map_err(|error| format!("cannot make a seed: {error}")), Ok);
        let Some(directory) = &self.journal else {
            return Ok((None, fresh()?));
        };
        if !self.resume {
            let seed = fresh()?;
            return Ok((Some(Journal::create(directory, seed)?), seed));
        }
        let (journal, seed) = Journal::resume(directory)?;
        match self.seed {
            Some(other) if other != seed => {
                Err(format!("--seed {other}: the run in {} has seed {seed}; leave --seed out", directory.display())
                    .into())
            }
            _ => Ok((Some(journal), seed)),
        }
    }

    fn format(&self) -> Format {
        self.format.unwrap_or_default()
    }

    /// What kselftest's runner and its like expect of a test binary, where nothing was asked for.
    pub(super) fn default_to_ktap(&mut self) {
        if self.output.is_none() && !io::stdout().is_terminal() {
            self.format.get_or_insert(Format::Ktap);
        }
    }

    /// Where the results go.
    pub(super) fn reporters(&self) -> Result<Reporters, Failure> {
        let mut reporters: Vec<Box<dyn Listener>> = Vec::new();
        let text = || Box::new(Pretty::new(anstream::AutoStream::auto(io::stdout()), Screen::new()));
        match &self.output {
            None if self.format() == Format::Pretty => reporters.push(text()),
            None => reporters.push(self.format().reporter(io::stdout())),
            Some(path) => {
                let file = File::options().write(true).create(true).truncate(false).open(path).map_err(|error| {
                    format!("cannot write {}: {error}; give --output a file that can be made", path.display())
                })?;
                reporters.push(self.format().reporter(OutputFile { file, old: true }));
                if self.format() != Format::Pretty {
                    reporters.push(text());
                }
            }
        }
        Ok(Reporters(reporters))
    }
}

impl Format {
    /// A reporter of this format, without colour.
    fn reporter(self, out: impl Write + 'static) -> Box<dyn Listener> {
        match self {
            Format::Pretty => {
                Box::new(Pretty::new(anstream::StripStream::new(Box::new(out) as Box<dyn Write>), Screen::new()))
            }
            Format::Ktap => Box::new(Ktap::new(out)),
            Format::Json => Box::new(Json::new(out)),
            Format::Junit => Box::new(Junit::new(out)),
            Format::Events => Box::new(EventWriter::new(out)),
        }
    }
}

/// The file of `--output`: opened before anything is run, emptied when there is something to put there, so that a command
/// line that is wrong in another place costs nobody the results of an earlier run.
struct OutputFile {
    file: File,
    old: bool,
}

impl Write for OutputFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if std::mem::take(&mut self.old) && self.file.metadata()?.is_file() {
            self.file.set_len(0)?;
        }
        self.file.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

/// A `run` for a guest.
#[derive(Debug)]
pub(super) struct GuestRun {
    /// Whether there is more than one round, or may be.
    pub(super) repeats: bool,
    flags: Vec<String>,
    machines: Vec<String>,
    patterns: Vec<String>,
    exclude: Vec<String>,
}

impl GuestRun {
    /// The words without the seed, which is another one every time.
    pub(super) fn unseeded_words(&self) -> Vec<String> {
        self.words(None).into_iter().filter(|word| !word.starts_with("--seed=")).collect()
    }

    /// The words of the whole run, or of what is left of it: claims by their full names, on these machines.
    pub(super) fn words(&self, rest: Option<Rest>) -> Vec<String> {
        let (machines, claims, exclude) = match rest {
            None => (self.machines.clone(), self.patterns.clone(), self.exclude.clone()),
            Some(Rest { machines, claims }) => (machines.iter().map(ToString::to_string).collect(), claims, Vec::new()),
        };
        let mut words = self.flags.clone();
        words.extend(machines.iter().map(|machine| format!("--machine={machine}")));
        words.extend(exclude.iter().map(|pattern| format!("--exclude={pattern}")));
        words.push("--".to_owned());
        words.extend(claims);
        words
    }
}

/// Every reporter hears every event, even when an earlier one could not write it.
pub(super) struct Reporters(Vec<Box<dyn Listener>>);

impl Listener for Reporters {
    fn hear(&mut self, event: &Event<'_>) -> io::Result<()> {
        let results: Vec<io::Result<()>> = self.0.iter_mut().map(|reporter| reporter.hear(event)).collect();
        results.into_iter().collect()
    }
}
