//! One boot: QEMU from its start to its end, watched from outside.
//!
//! Whatever the kernel does, the boot ends: by the command's end, by a panic, by QEMU's end, or by one of three limits.

use std::io::Read;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant};

use super::bridge::{Bridge, Notice, Timing};
use super::console::Console;
use super::ending::Ending;
use super::qemu::{Hardware, ModuleSide, Qemu};
use super::stop::StopSignal;
use super::wire::{CommandEnd, Frame, Hello};

/// How often the state of QEMU and the limits are looked at when nothing happens.
const TICK: Duration = Duration::from_millis(50);
/// How long QEMU may take to exit once its streams are closed.
const EXIT: Duration = Duration::from_secs(1);
/// How long a panicked kernel may go on writing to its console when something keeps it from ending.
const LAST_WORDS: Duration = Duration::from_secs(2);
/// How long the power-off may take once the command has ended; a kernel without ACPI never does it.
const POWER_OFF: Duration = Duration::from_secs(3);

/// How long a boot may take.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// From QEMU's start to the end of the command.
    pub total: Duration,
    /// From QEMU's start to the init's first word.
    pub boot: Duration,
    /// Between two signs of life of the init, which sends one every second.
    pub silence: Duration,
}

impl Limits {
    /// The limits that follow from a limit for everything.
    pub fn within(total: Duration) -> Limits {
        Limits { total, boot: total.min(Duration::from_secs(120)), silence: total.min(Duration::from_secs(30)) }
    }
}

/// Who is told what the guest sends, as it comes.
pub trait Listener {
    /// The init is up.
    fn hello(&mut self, hello: &Hello);
    /// The command wrote to its standard output.
    fn stdout(&mut self, bytes: &[u8]);
    /// The command wrote to its standard error.
    fn stderr(&mut self, bytes: &[u8]);
    /// The command has ended; its output is complete.
    fn end(&mut self, end: CommandEnd);
}

/// When things happened, from QEMU's start.
#[derive(Clone, Copy, Debug, Default)]
pub struct Clock {
    /// The first byte on the console.
    pub console: Option<Duration>,
    /// The init's first word.
    pub hello: Option<Duration>,
    /// The command's end.
    pub end: Option<Duration>,
    /// QEMU's end.
    pub gone: Duration,
}

/// What a boot came to.
#[derive(Debug)]
pub struct Boot {
    /// How it ended.
    pub ending: Ending,
    /// What the init said of the kernel, when it came up.
    pub hello: Option<Hello>,
    /// What the kernel wrote.
    pub console: Console,
    /// When things happened.
    pub clock: Clock,
    /// What SEAMCALLs took, with the simulated TDX module.
    pub seamcalls: Option<Timing>,
}

enum Word {
    Console(Vec<u8>),
    Frame(Frame),
    Noise(String),
    Qemu(Vec<u8>),
    Module(Notice),
}

/// Boots, listens until the end, and leaves no process behind. A signal that `stop` has seen ends
/// it all.
pub fn boot(
    hardware: &Hardware,
    kernel: &[u8],
    initramfs: &[u8],
    limits: Limits,
    console: Console,
    stop: Option<&StopSignal>,
    listener: &mut dyn Listener,
) -> Boot {
    let start = Instant::now();
    let mut watch = Watch {
        start,
        hello: None,
        console,
        clock: Clock::default(),
        stderr: Vec::new(),
        beat: start,
        module: ModuleState::None,
    };
    let mut seamcalls = None;
    let started = Qemu::start(hardware, kernel, initramfs).and_then(|mut qemu| {
        let (sender, words) = mpsc::channel();
        let bridge = qemu.module.take().map(|side| bridge(side, hardware.cpus, sender.clone())).transpose()?;
        listen(&mut qemu, sender);
        Ok((qemu, words, bridge))
    });
    let ending = match started {
        Ok((mut qemu, words, bridge)) => {
            if bridge.is_some() {
                watch.module = ModuleState::Expected;
            }
            let ending = watch.until_the_end(&mut qemu, &words, limits, stop, listener);
            qemu.kill();
            seamcalls = bridge.as_ref().map(Bridge::timing);
            // The streams are at their end now: nothing that was sent is lost.
            while let Ok(word) = words.recv_timeout(Duration::from_secs(1)) {
                watch.take(word, listener);
            }
            ending
        }
        Err(error) => Ending::NotStarted(error),
    };
    watch.clock.gone = start.elapsed();
    let ending = watch.settle(ending);
    Boot { ending, hello: watch.hello, console: watch.console, clock: watch.clock, seamcalls }
}

/// Serves the simulated TDX module.
fn bridge(side: ModuleSide, cpus: u32, sender: Sender<Word>) -> std::io::Result<Bridge> {
    // Whoever watched has gone when the boot is over.
    let tell = move |notice| drop(sender.send(Word::Module(notice)));
    Bridge::start(side.ram, cpus, side.doorbell, side.channel, Box::new(tell))
}

/// One thread for each stream; the channel ends when all of them are at their end.
fn listen(qemu: &mut Qemu, sender: Sender<Word>) {
    let bytes = |stream: Option<Box<dyn Read + Send>>, sender: Sender<Word>, word: fn(Vec<u8>) -> Word| {
        let Some(mut stream) = stream else { return };
        thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(count @ 1..) = stream.read(&mut buffer) {
                if sender.send(word(buffer[..count].to_vec())).is_err() {
                    break;
                }
            }
        });
    };
    bytes(qemu.console.take().map(|stream| Box::new(stream) as _), sender.clone(), Word::Console);
    bytes(qemu.stderr.take().map(|stream| Box::new(stream) as _), sender.clone(), Word::Qemu);
    for port in [qemu.virtio.take(), qemu.serial.take()].into_iter().flatten() {
        let sender = sender.clone();
        thread::spawn(move || {
            let mut port = std::io::BufReader::new(port);
            loop {
                let word = match Frame::read(&mut port) {
                    Ok(Some(frame)) => Word::Frame(frame),
                    Ok(None) => break,
                    Err(error) if error.kind() == std::io::ErrorKind::InvalidData => Word::Noise(error.to_string()),
                    Err(_) => break,
                };
                let last = matches!(word, Word::Noise(_));
                if sender.send(word).is_err() || last {
                    break;
                }
            }
        });
    }
}

/// How far the kernel is with the simulated TDX module.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ModuleState {
    /// There is none.
    None,
    /// The kernel has not said that it knows of it.
    Expected,
    /// It has.
    Up,
}

struct Watch {
    start: Instant,
    hello: Option<Hello>,
    console: Console,
    clock: Clock,
    stderr: Vec<u8>,
    /// The last sign of life.
    beat: Instant,
    module: ModuleState,
}

impl Watch {
    fn until_the_end(
        &mut self,
        qemu: &mut Qemu,
        words: &Receiver<Word>,
        limits: Limits,
        stop: Option<&StopSignal>,
        listener: &mut dyn Listener,
    ) -> Ending {
        let mut panicked: Option<Instant> = None;
        let mut ended: Option<(Instant, CommandEnd)> = None;
        let mut looked_at = 0;
        loop {
            let mut open = true;
            match words.recv_timeout(TICK) {
                Ok(word) => match self.take(word, listener) {
                    Some(Taken::End(end)) => ended = Some((Instant::now(), end)),
                    Some(Taken::Noise(noise)) => return Ending::Noise(noise),
                    Some(Taken::Module(ending)) => return ending,
                    None => {}
                },
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => open = false,
            }
            let gone = match qemu.ended() {
                Ok(status) => status,
                Err(error) => return Ending::NotStarted(error),
            };
            if !open || gone.is_some() {
                // Streams first, so that a panic that ended QEMU is known as a panic.
                while let Ok(word) = words.recv_timeout(TICK) {
                    if let Some(Taken::End(end)) = self.take(word, listener) {
                        ended = Some((Instant::now(), end));
                    }
                }
                return match (ended, gone.or_else(|| qemu.ending_status(EXIT))) {
                    (Some((_, end)), _) => Ending::Command(end),
                    (None, Some(status)) if status.success() => Ending::PoweredOff,
                    (None, status) => Ending::QemuDied { status, stderr: String::new() },
                };
            }
            if let Some((since, end)) = ended
                && since.elapsed() > POWER_OFF
            {
                return Ending::Command(end);
            }
            if panicked.is_none() && self.console.total() != looked_at {
                looked_at = self.console.total();
                panicked = self.console.panic().map(|_| Instant::now());
            }
            if panicked.is_some_and(|since| since.elapsed() > LAST_WORDS) {
                return Ending::PoweredOff;
            }
            if let Some(signal) = stop.and_then(StopSignal::seen) {
                return Ending::Interrupted(signal);
            }
            if ended.is_none()
                && panicked.is_none()
                && let Some(ending) = self.past_a_limit(limits)
            {
                return ending;
            }
        }
    }

    fn past_a_limit(&self, limits: Limits) -> Option<Ending> {
        match self.hello {
            None if self.start.elapsed() > limits.boot => Some(Ending::NeverUp(limits.boot)),
            Some(_) if self.beat.elapsed() > limits.silence => Some(Ending::Hung(limits.silence)),
            _ if self.start.elapsed() > limits.total => Some(Ending::TimedOut(limits.total)),
            _ => None,
        }
    }

    fn take(&mut self, word: Word, listener: &mut dyn Listener) -> Option<Taken> {
        match word {
            Word::Console(bytes) => {
                self.clock.console.get_or_insert_with(|| self.start.elapsed());
                self.console.push(&bytes);
            }
            Word::Qemu(bytes) => self.stderr.extend(bytes),
            Word::Noise(text) => return Some(Taken::Noise(text)),
            Word::Module(Notice::Hello { .. }) => self.module = ModuleState::Up,
            Word::Module(Notice::Remark(text)) => listener.stderr(format!("gmemtest: {text}\n").as_bytes()),
            Word::Module(Notice::Broken(why)) => return Some(Taken::Module(Ending::ModuleMisused(why))),
            Word::Module(Notice::Failed(why)) => return Some(Taken::Module(Ending::ModuleFailed(why))),
            Word::Frame(frame) => {
                self.beat = Instant::now();
                match frame {
                    Frame::Hello(hello) => {
                        self.clock.hello.get_or_insert_with(|| self.start.elapsed());
                        listener.hello(&hello);
                        self.hello = Some(hello);
                        if self.module == ModuleState::Expected {
                            return Some(Taken::Module(Ending::NoModulePatch));
                        }
                    }
                    Frame::Stdout(bytes) => listener.stdout(&bytes),
                    Frame::Stderr(bytes) => listener.stderr(&bytes),
                    Frame::Beat(_) => {}
                    Frame::End(end) => {
                        self.clock.end = Some(self.start.elapsed());
                        listener.end(end);
                        return Some(Taken::End(end));
                    }
                }
            }
        }
        None
    }

    /// The ending with what only the whole console and QEMU's own words tell.
    fn settle(&self, ending: Ending) -> Ending {
        if matches!(
            ending,
            Ending::Command(_)
                | Ending::Interrupted(_)
                | Ending::NotStarted(_)
                | Ending::NoModulePatch
                | Ending::ModuleMisused(_)
                | Ending::ModuleFailed(_)
        ) {
            return ending;
        }
        if let Some(reason) = self.console.panic() {
            return Ending::Panicked(reason);
        }
        if self.console.lines().iter().any(|line| line.contains(super::init::NO_PORT)) {
            return Ending::NoPort;
        }
        match ending {
            Ending::QemuDied { status, .. } => {
                Ending::QemuDied { status, stderr: String::from_utf8_lossy(&self.stderr).trim().to_owned() }
            }
            Ending::NeverUp(limit) if self.console.is_silent() => Ending::NeverUpSilent(limit),
            other => other,
        }
    }
}

enum Taken {
    End(CommandEnd),
    Noise(String),
    Module(Ending),
}
