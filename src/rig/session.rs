//! A kernel to be booted, as often as it takes.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::boot::{Boot, Limits, Listener, boot};
use super::boot_image::BootImage;
use super::console::Console;
use super::payload::Payload;
use super::qemu::Hardware;
use super::replay::{Replay, Rest};
use super::stop::StopSignal;
use super::task::Duty;
use super::wire::{CommandEnd, Hello};

/// What boots have in common.
pub struct Session<'a> {
    /// The kernel.
    pub image: &'a BootImage,
    /// `lib/modules/RELEASE`, for a kernel that has its KVM as modules.
    pub modules: Option<&'a Path>,
    /// The machine.
    pub hardware: &'a Hardware,
    /// The limit for each boot.
    pub timeout: Duration,
    /// Takes a copy of the console.
    pub console: Option<File>,
    /// A signal ends it all.
    pub stop: Option<&'a StopSignal>,
}

/// What a run of tests took, besides what the reporters heard.
#[derive(Debug)]
pub struct Boots {
    /// The last boot.
    pub last: Boot,
    /// How many there were.
    pub count: u32,
    /// From the beginning of the first boot's preparation to the last verdict.
    pub to_verdict: Duration,
    /// Preparing the first kernel and initramfs.
    pub preparation: Duration,
}

/// Whether a lost machine is replaced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnLoss {
    /// What has no result is not run.
    Stop,
    /// What has no result runs in a fresh boot.
    Restart,
}

impl Session<'_> {
    /// Boots and does `duty`.
    pub fn boot(&self, duty: Duty, listener: &mut dyn Listener) -> Result<Boot> {
        let payload = Payload::new(self.image, self.modules, self.hardware.accel, duty)?;
        self.boot_payload(&payload, listener)
    }

    fn boot_payload(&self, payload: &Payload, listener: &mut dyn Listener) -> Result<Boot> {
        let copy = self.console.as_ref().map(File::try_clone).transpose().context("the console's file")?;
        let limits = Limits::within(self.timeout);
        let console = Console::new(copy);
        Ok(boot(self.hardware, &payload.kernel, &payload.initramfs, limits, console, self.stop, listener))
    }

    /// The time from QEMU's start to its end with an init that powers off at once.
    pub fn boot_and_power_off(&self) -> Result<Duration> {
        let payload = Payload::power_off(self.image)?;
        let session = Session { console: None, ..*self };
        Ok(session.boot_payload(&payload, &mut Silent)?.clock.gone)
    }

    /// Runs tests: `words` gives the guest's command for what is left to run, everything at first.
    pub fn run_tests(
        &self,
        words: &dyn Fn(Option<Rest>) -> Vec<String>,
        on_loss: OnLoss,
        replay: &mut Replay<'_>,
        guest: &mut dyn Guest,
    ) -> Result<Boots> {
        let start = Instant::now();
        let mut duty = Duty::Run(words(None));
        let mut count = 0;
        let mut preparation = Duration::ZERO;
        loop {
            let before = Instant::now();
            let payload = Payload::new(self.image, self.modules, self.hardware.accel, duty)?;
            if count == 0 {
                preparation = before.elapsed();
            }
            count += 1;
            let mut relay = Relay { replay, guest, verdict: None };
            let last = self.boot_payload(&payload, &mut relay)?;
            let verdict = relay.verdict.unwrap_or_else(Instant::now);
            replay.boot_ended(&last);
            let lost = last.ending.is_the_kernels() && last.hello.is_some();
            match replay.rest().filter(|_| lost && on_loss == OnLoss::Restart) {
                Some(rest) => {
                    replay.restart();
                    duty = Duty::Run(words(Some(rest)));
                }
                None => return Ok(Boots { last, count, to_verdict: verdict - start, preparation }),
            }
        }
    }
}

/// Who hears of the guest besides the run's events.
pub trait Guest {
    /// A boot has reached its init.
    fn hello(&mut self, hello: &Hello);
    /// The guest's standard error.
    fn stderr(&mut self, bytes: &[u8]);
}

struct Relay<'a, 'r> {
    replay: &'a mut Replay<'r>,
    guest: &'a mut dyn Guest,
    verdict: Option<Instant>,
}

impl Listener for Relay<'_, '_> {
    fn hello(&mut self, hello: &Hello) {
        self.guest.hello(hello);
    }

    fn stdout(&mut self, bytes: &[u8]) {
        self.replay.feed(bytes);
    }

    fn stderr(&mut self, bytes: &[u8]) {
        self.guest.stderr(bytes);
    }

    fn end(&mut self, _: CommandEnd) {
        self.verdict = Some(Instant::now());
    }
}

struct Silent;

impl Listener for Silent {
    fn hello(&mut self, _: &Hello) {}
    fn stdout(&mut self, _: &[u8]) {}
    fn stderr(&mut self, _: &[u8]) {}
    fn end(&mut self, _: CommandEnd) {}
}

/// Where a boot is kept for a rerun by hand.
#[derive(Debug)]
pub struct Kept {
    /// The directory.
    pub directory: PathBuf,
    /// One shell line.
    pub command: String,
}

impl Session<'_> {
    /// Writes kernel and initramfs to `directory` and says how to start QEMU on them by hand. The guest's results go to
    /// the console there.
    pub fn keep(&self, duty: Duty, directory: &Path) -> Result<Kept> {
        let write = |name: &str, bytes: &[u8]| -> Result<PathBuf> {
            let path = directory.join(name);
            std::fs::write(&path, bytes).with_context(|| path.display().to_string())?;
            Ok(path)
        };
        std::fs::create_dir_all(directory).with_context(|| directory.display().to_string())?;
        let payload = Payload::new(self.image, self.modules, self.hardware.accel, duty)?;
        let kernel = write(if payload.unpacked { "vmlinux" } else { "bzImage" }, &payload.kernel)?;
        let initramfs = write("initramfs.cpio", &payload.initramfs)?;
        let append = format!("{} {}", self.hardware.append, super::init::CONSOLE_PORT);
        let hardware = Hardware { append: append.trim().to_owned(), ..self.hardware.clone() };
        let mut words = vec![super::qemu::QEMU.to_owned()];
        words.extend(hardware.arguments(&kernel, &initramfs).iter().map(|word| quoted(&word.to_string_lossy())));
        words.extend(["-serial".to_owned(), "mon:stdio".to_owned()]);
        Ok(Kept { directory: directory.to_owned(), command: words.join(" ") })
    }

    /// Boots with the terminal as the console and a prompt; returns when QEMU ends.
    pub fn shell(&self) -> Result<std::process::ExitStatus> {
        let payload = Payload::new(self.image, self.modules, self.hardware.accel, Duty::Shell)?;
        super::qemu::interactive(self.hardware, &payload.kernel, &payload.initramfs).map_err(|error| {
            let ending = super::ending::Ending::NotStarted(error);
            match ending.hint() {
                Some(hint) => anyhow::anyhow!("{ending}; {hint}"),
                None => anyhow::anyhow!("{ending}"),
            }
        })
    }
}

/// A word as a shell reads it back.
fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_=+,./:".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', "'\\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_quoted_for_a_shell() {
        assert_eq!(quoted("-machine"), "-machine");
        assert_eq!(quoted("console=ttyS0 panic=-1"), "'console=ttyS0 panic=-1'");
        assert_eq!(quoted("it's"), "'it'\\''s'");
        assert_eq!(quoted(""), "''");
    }
}
