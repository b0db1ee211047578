//! `gmemtest vm`: boots a kernel under QEMU and runs a command of this program in it.

use std::fs::File;
use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Args;

use super::failure::Failure;
use super::machines::Machines;
use super::run::{GuestRun, RunArguments};
use super::{Command, Gmemtest, parse, run, values};
use crate::harness::Suite;
use crate::harness::exit::{CANNOT_TELL, ExitStyle, FAILED};
use crate::harness::plan::Plan;
use crate::rig::{
    self, AccelChoice, Boot, BootImage, CommandEnd, Duty, Ending, Hardware, Hello, OnLoss, Replay, Session, StopSignal,
};

/// Lines of the console that are shown when a boot has no verdict.
const TAIL: usize = 25;
/// Memory that a kernel needs to take the simulated TDX module into operation: TDMRs are whole gibibytes.
const TDX_MEMORY_MIB: u64 = 2048;

/// Packages that the module has a bit for.
const MOST_PACKAGES: u32 = 64;

/// The flags of `vm`.
#[derive(Debug, Args)]
pub(super) struct VmArguments {
    #[command(flatten)]
    pub(super) boot: BootArguments,
    /// The kernel: a bzImage, or a build directory that has one.
    #[arg(long, value_name = "BZIMAGE")]
    kernel: PathBuf,
    /// The kernel's modules: lib/modules/RELEASE, or a root that has it (default: those that lie beside the kernel as
    /// packages put them). Only those that the tests need are taken.
    #[arg(long, value_name = "DIR")]
    modules: Option<PathBuf>,
    /// Copy the kernel's console to FILE.
    #[arg(long, value_name = "FILE")]
    console: Option<PathBuf>,
    /// When a test takes the kernel down, run the rest in a fresh boot.
    #[arg(long)]
    restart_after_crash: bool,
    /// Say where the time went, and boot once more with an init that powers off at once, for comparison.
    #[arg(long)]
    timing: bool,
    /// Look around in the guest instead of running a command.
    #[arg(long, conflicts_with_all = ["command", "timing", "restart_after_crash", "console", "simulated_tdx"])]
    shell: bool,
    /// Leave kernel and initramfs in DIR (a fresh one below TMPDIR), and print how to start QEMU on them by hand.
    #[arg(long, value_name = "DIR", num_args = 0..=1, require_equals = true, conflicts_with = "simulated_tdx")]
    keep: Option<Option<PathBuf>>,
    /// What to run in the guest: any subcommand with its flags (default: run).
    #[arg(last = true, value_name = "COMMAND")]
    command: Vec<String>,
}

/// The flags that describe the machine; those of `matrix` and `bisect` too.
#[derive(Debug, Args)]
pub(super) struct BootArguments {
    /// Accelerator of QEMU. auto is kvm where the host's KVM can nest, and tcg elsewhere.
    #[arg(long, value_name = "WHICH", value_enum, default_value_t = AccelChoice::Auto)]
    pub(super) accel: AccelChoice,
    /// Serve the kernel's SEAMCALLs with the simulated TDX module, so that kvm:tdx runs without TDX. The kernel needs the patch
    /// for its release in scripts/kernel.
    #[arg(long)]
    pub(super) simulated_tdx: bool,
    /// Added to the kernel's command line; what comes last wins.
    #[arg(long, value_name = "STR", default_value = "", allow_hyphen_values = true)]
    pub(super) append: String,
    /// CPUs of the machine.
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=255))]
    pub(super) cpus: u32,
    /// Memory of the machine.
    #[arg(long, value_name = "SIZE", default_value = "2G", value_parser = memory)]
    pub(super) memory: u64,
    /// Limit for each boot, in seconds or with a unit.
    #[arg(long, value_name = "SECS", default_value = "900", value_parser = values::duration)]
    pub(super) timeout: Duration,
}

/// Mebibytes, of a size that a kernel can start in.
fn memory(text: &str) -> Result<u64, String> {
    match values::size(text)? >> 20 {
        mebibytes @ 128.. => Ok(mebibytes),
        _ => Err("is too little for a kernel and this program; give at least 128M".to_owned()),
    }
}

impl BootArguments {
    /// The machine, and a line on why its accelerator is the one it is.
    pub(super) fn hardware(&self) -> Result<(Hardware, String), Failure> {
        let (accel, why) = match self.simulated_tdx {
            true => rig::choose_with_simulated_tdx(self.accel)?,
            false => rig::choose_accel(self.accel)?,
        };
        if self.simulated_tdx && self.memory < TDX_MEMORY_MIB {
            return Err(format!(
                "--memory: the simulated TDX module needs at least 2G, to find room for its tables; {}M is too little",
                self.memory
            )
            .into());
        }
        if self.simulated_tdx && self.cpus > MOST_PACKAGES {
            return Err(format!(
                "--cpus: the simulated TDX module knows {MOST_PACKAGES} packages, and each CPU is one; {} are too many",
                self.cpus
            )
            .into());
        }
        let hardware = Hardware { accel, cpus: self.cpus, memory_mib: self.memory, append: self.append.clone() };
        let line = format!("under {accel} ({why}), {} CPUs, {} MiB", self.cpus, self.memory);
        Ok((hardware, line))
    }
}

/// What the guest runs.
enum Errand {
    /// Tests, whose results are reported here.
    Tests(Box<RunArguments>),
    /// Something else, whose output is passed on.
    Other,
}

/// Boots and runs.
pub(super) fn vm(arguments: &VmArguments, suites: &[&'static Suite], machines: &Machines) -> Result<ExitCode, Failure> {
    if arguments.shell && !std::io::stdin().is_terminal() {
        let instead = "to run a command without one leave --shell out and name it: gmemtest vm --kernel FILE -- probe";
        return Err(format!("--shell: standard input is no terminal; {instead}").into());
    }
    let words = if arguments.command.is_empty() { vec!["run".to_owned()] } else { arguments.command.clone() };
    let errand = errand(&words, suites, machines)?;
    let image = BootImage::read(&arguments.kernel).map_err(|error| error.to_string())?;
    let (hardware, machine) = arguments.boot.hardware()?;
    eprintln!("gmemtest: {} {machine}", image.release());
    let console = arguments.console.as_ref().map(|path| {
        File::create(path).map_err(|error| format!("--console {}: cannot be written: {error}", path.display()))
    });
    let mut session = Session {
        image: &image,
        modules: arguments.modules.as_deref(),
        hardware: &hardware,
        timeout: arguments.boot.timeout,
        console: console.transpose()?,
        stop: None,
    };
    if arguments.shell {
        let status = session.shell().map_err(|error| format!("{error:#}"))?;
        return Ok(ExitCode::from(u8::try_from(status.code().unwrap_or(1)).unwrap_or(1)));
    }
    let stop = StopSignal::block().map_err(|errno| format!("signals cannot be blocked: {errno}"))?;
    session.stop = Some(&stop);
    match errand {
        Errand::Tests(tests) => run_tests(arguments, &tests, &session, suites),
        Errand::Other => run_other(arguments, words, &session),
    }
}

/// Reads the guest's command here, where a mistake costs no boot.
fn errand(words: &[String], suites: &[&'static Suite], machines: &Machines) -> Result<Errand, Failure> {
    let line = std::iter::once("gmemtest".to_owned()).chain(words.iter().cloned()).map(Into::into);
    let parsed: Gmemtest = parse(&line.collect::<Vec<_>>())?;
    match parsed.command {
        Command::Run(tests) => {
            let (wanted, excluded) = (run::patterns(&tests.patterns), run::patterns(&tests.exclude));
            Plan::new(suites, machines.named(&tests.machine)?, &wanted, &excluded)?;
            Ok(Errand::Tests(Box::new(tests)))
        }
        Command::Vm(_) | Command::Matrix(_) | Command::Bisect(_) | Command::Compare(_) => {
            Err(format!("{}: runs on the host; give run, list, probe or another command", words[0]).into())
        }
        _ => Ok(Errand::Other),
    }
}

/// The `run` that `command` is, for a subcommand that runs nothing else in its guests.
pub(super) fn tests_for_guest(
    of: &str,
    command: &[String],
    suites: &[&'static Suite],
    machines: &Machines,
) -> Result<GuestRun, Failure> {
    let run = ["run".to_owned()];
    match errand(if command.is_empty() { &run } else { command }, suites, machines)? {
        Errand::Tests(tests) => {
            let guest_run = tests.for_guest()?;
            match guest_run.repeats {
                true => Err(format!("{of}: takes one round; leave out --repeat, --duration and --until-fail").into()),
                false => Ok(guest_run),
            }
        }
        Errand::Other => Err(format!("{of}: only run can stand after --, not {}", command[0]).into()),
    }
}

fn run_tests(
    arguments: &VmArguments,
    tests: &RunArguments,
    session: &Session<'_>,
    suites: &[&'static Suite],
) -> Result<ExitCode, Failure> {
    let guest_run = tests.for_guest()?;
    if guest_run.repeats && arguments.restart_after_crash {
        return Err("--restart-after-crash: goes on with one round; leave out --repeat, --duration and --until-fail"
            .to_owned()
            .into());
    }
    keep(arguments, session, guest_run.words(None))?;
    let mut reporters = tests.reporters()?;
    let mut replay = Replay::new(suites, again(arguments), &mut reporters);
    let on_loss = if arguments.restart_after_crash { OnLoss::Restart } else { OnLoss::Stop };
    let words = |rest| guest_run.words(rest);
    let boots = session.run_tests(&words, on_loss, &mut replay, &mut Voice).map_err(|error| format!("{error:#}"))?;
    for stray in replay.strays() {
        eprintln!("{stray}");
    }
    let failed = replay.failed();
    let ended = replay.finish();
    if let Some(error) = failed {
        return Err(error.into());
    }
    tell(&boots.last);
    if arguments.timing {
        let (own, processes) = ended.as_ref().map_or_else(Default::default, |ended| (ended.tested, ended.processes));
        timing(session, &boots, Tests { own, processes })?;
    }
    let style = tests.style();
    Ok(match ended {
        Some(ended) => ExitCode::from(style.code(&ended.summary, ended.stopped.as_ref())),
        None => code_of(&boots.last.ending, style),
    })
}

/// The words that run one test again.
fn again(arguments: &VmArguments) -> Vec<String> {
    let mut words = vec!["gmemtest".to_owned(), "vm".to_owned(), "--kernel".to_owned()];
    words.push(arguments.kernel.display().to_string());
    if let Some(modules) = &arguments.modules {
        words.extend(["--modules".to_owned(), modules.display().to_string()]);
    }
    if arguments.boot.simulated_tdx {
        words.push("--simulated-tdx".to_owned());
    }
    if !arguments.boot.append.is_empty() {
        words.extend(["--append".to_owned(), format!("'{}'", arguments.boot.append)]);
    }
    words.extend(["--".to_owned(), "run".to_owned()]);
    words
}

fn run_other(arguments: &VmArguments, words: Vec<String>, session: &Session<'_>) -> Result<ExitCode, Failure> {
    keep(arguments, session, words.clone())?;
    let start = Instant::now();
    let boot = session.boot(Duty::Run(words), &mut Relay).map_err(|error| format!("{error:#}"))?;
    tell(&boot);
    let complaints = boot.console.complaints();
    if let Some(first) = complaints.first() {
        eprintln!("gmemtest: the kernel complained ({} lines); the first: {first}", complaints.len());
    }
    let code = code_of(&boot.ending, ExitStyle::Kselftest);
    if arguments.timing {
        let to_verdict = boot.clock.end.map_or_else(|| start.elapsed(), |end| end + start.elapsed() - boot.clock.gone);
        let boots =
            rig::Boots { preparation: to_verdict.saturating_sub(boot.clock.gone), last: boot, count: 1, to_verdict };
        timing(session, &boots, Tests::default())?;
    }
    Ok(code)
}

/// The exit code of a boot whose command reported nothing here.
fn code_of(ending: &Ending, style: ExitStyle) -> ExitCode {
    ExitCode::from(match (ending, style) {
        (Ending::Command(CommandEnd::Status(status)), _) => u8::try_from(*status).unwrap_or(FAILED),
        (Ending::Interrupted(signal), _) => 128u8.saturating_add(u8::try_from(*signal).unwrap_or(127)),
        (Ending::NotStarted(_), style) => style.usage(),
        (_, ExitStyle::Kselftest | ExitStyle::KselftestRunner) => FAILED,
        (_, ExitStyle::Bisect) => CANNOT_TELL,
    })
}

fn keep(arguments: &VmArguments, session: &Session<'_>, words: Vec<String>) -> Result<(), Failure> {
    let Some(directory) = &arguments.keep else { return Ok(()) };
    let directory = match directory {
        Some(directory) => directory.clone(),
        None => std::env::temp_dir().join(format!("gmemtest-{}", std::process::id())),
    };
    let kept = session.keep(Duty::Run(words), &directory).map_err(|error| format!("--keep: {error:#}"))?;
    eprintln!("gmemtest: {}", kept.command);
    Ok(())
}

/// Says how a boot without a verdict ended, and shows the end of its console.
fn tell(boot: &Boot) {
    if let Some(error) = boot.console.copy_error() {
        eprintln!("gmemtest: --console: the copy is not complete: {error}");
    }
    if matches!(boot.ending, Ending::Command(CommandEnd::Status(_))) {
        return;
    }
    let hint = boot.ending.hint().map(|hint| format!("; {hint}")).unwrap_or_default();
    eprintln!("gmemtest: {}{hint}", boot.ending);
    let tail = boot.console.tail(TAIL);
    if !tail.is_empty() && !matches!(boot.ending, Ending::Interrupted(_)) {
        eprintln!("the console's last lines:");
        tail.iter().for_each(|line| eprintln!("  | {line}"));
    }
}

/// Time that tests took.
#[derive(Default)]
struct Tests {
    /// In their own code.
    own: Duration,
    /// From the starts of their processes to their verdicts.
    processes: Duration,
}

fn timing(session: &Session<'_>, boots: &rig::Boots, tests: Tests) -> Result<(), Failure> {
    let seconds = |time: Duration| format!("{:.2} s", time.as_secs_f64());
    let clock = &boots.last.clock;
    let boot = clock.hello.map_or_else(|| "none".to_owned(), seconds);
    eprintln!(
        "timing: verdict after {}: preparing {}, boot to init {boot}, tests {} ({} in their own code), boots {}",
        seconds(boots.to_verdict),
        seconds(boots.preparation),
        seconds(tests.processes),
        seconds(tests.own),
        boots.count
    );
    if let Some(seamcalls) = &boots.last.seamcalls {
        let micros = |time: Option<Duration>| {
            time.map_or_else(|| "not measured".to_owned(), |time| format!("{:.1} us", time.as_secs_f64() * 1e6))
        };
        eprintln!(
            "timing: {} SEAMCALLs; median round trip of TDH.MR.EXTEND in KVM's loop {}, of it in the module {}",
            seamcalls.calls(),
            micros(seamcalls.round_trip()),
            micros(seamcalls.service())
        );
    }
    let yardstick = session.boot_and_power_off().map_err(|error| format!("{error:#}"))?;
    let limit = yardstick.mul_f64(1.5) + tests.processes;
    let judged = if boots.to_verdict <= limit { "within" } else { "above" };
    eprintln!(
        "timing: the same boot with an init that powers off at once: {}; 1.5 times that and the tests: {}: {judged}",
        seconds(yardstick),
        seconds(limit)
    );
    Ok(())
}

/// What the guest says besides results.
pub(super) struct Voice;

impl rig::Guest for Voice {
    fn hello(&mut self, hello: &Hello) {
        for complaint in &hello.complaints {
            eprintln!("gmemtest: in the guest: {complaint}");
        }
        if !hello.kvm {
            eprintln!(
                "gmemtest: {} has no /dev/kvm: it needs CONFIG_KVM and CONFIG_KVM_AMD (CONFIG_KVM_INTEL under nested KVM on Intel); with them =m, give its modules with --modules",
                hello.release
            );
        }
        if hello.taint != 0 {
            eprintln!("gmemtest: {} was tainted ({:#x}) before the first test", hello.release, hello.taint);
        }
    }

    fn stderr(&mut self, bytes: &[u8]) {
        // Standard error is where errors would be told.
        let _ = std::io::stderr().write_all(bytes);
    }
}

/// Passes on what a command other than `run` writes.
struct Relay;

impl rig::Listener for Relay {
    fn hello(&mut self, hello: &Hello) {
        rig::Guest::hello(&mut Voice, hello);
    }

    fn stdout(&mut self, bytes: &[u8]) {
        let mut out = std::io::stdout();
        // A reader that has gone away needs nothing more.
        let _ = out.write_all(bytes).and_then(|()| out.flush());
    }

    fn stderr(&mut self, bytes: &[u8]) {
        rig::Guest::stderr(&mut Voice, bytes);
    }

    fn end(&mut self, _: CommandEnd) {}
}
