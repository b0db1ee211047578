//! Runs on another machine, over ssh: a TDX host has to boot the kernel itself.

use std::fs::File;
use std::io::{Read, Write};
use std::process::{Command, Output, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::{Runner, Trial, child};
use crate::harness::{Outcome, Suite};
use crate::report::{Document, Json};
use crate::rig::boot_image::BootImage;
use crate::rig::replay::{Replay, Rest};
use crate::rig::stop::StopSignal;

/// Time between two looks at whether the machine is back.
const LOOK: Duration = Duration::from_secs(2);
/// Where this program is put on the other machine: in the home directory of the user that ssh logs in as.
const PROGRAM: &str = "./.gmemtest-bisect";
/// How ssh is called: it must not ask, nor wait for a machine that is down.
const SSH: [&str; 4] = ["-o", "BatchMode=yes", "-o", "ConnectTimeout=10"];

/// How a kernel gets onto the machine.
#[derive(Clone, Debug)]
pub struct Deploy {
    /// A shell command, run here with GMEMTEST_KERNEL (path of the image), GMEMTEST_RELEASE and GMEMTEST_HOST in its
    /// environment; it installs the kernel there and makes the machine boot it.
    pub command: String,
    /// How long the machine may take until it is back with another boot id.
    pub patience: Duration,
}

/// Runs on a machine.
pub struct HostRunner<'a> {
    /// As ssh takes it.
    pub host: String,
    /// How a kernel gets there.
    pub deploy: Deploy,
    /// Every suite of this program.
    pub suites: &'a [&'static Suite],
    /// The command there.
    pub words: &'a dyn Fn(Option<Rest>) -> Vec<String>,
    /// A signal ends it all.
    pub stop: &'a StopSignal,
}

impl Runner for HostRunner<'_> {
    /// Deploys the kernel and waits for the machine; it must come back with another boot id, and with this kernel.
    fn prepare(&mut self, image: &BootImage) -> Result<Option<Trial>> {
        let before = self.boot_id().with_context(|| format!("--host {}: cannot be reached", self.host))?;
        let mut deploy = Command::new("sh");
        deploy
            .args(["-c", &self.deploy.command])
            .env("GMEMTEST_KERNEL", image.path())
            .env("GMEMTEST_RELEASE", image.release())
            .env("GMEMTEST_HOST", &self.host);
        let deployed = child::run("--deploy", &mut deploy, self.stop)?;
        if !deployed.status.success() {
            return Ok(Some(Trial::none(format!("--deploy failed ({})", deployed.status), deployed.tail)));
        }
        let start = Instant::now();
        loop {
            child::interrupted(self.stop)?;
            if self.boot_id().is_ok_and(|now| now != before) {
                break;
            }
            if start.elapsed() > self.deploy.patience {
                let why = format!(
                    "{} did not come back with another boot id within {} s",
                    self.host,
                    start.elapsed().as_secs()
                );
                return Ok(Some(Trial::none(why, deployed.tail)));
            }
            sleep(LOOK.min(self.deploy.patience));
        }
        let running = self.ask("uname -r")?;
        if running != image.release() {
            let why = format!("{} runs {running} instead of {}", self.host, image.release());
            return Ok(Some(Trial::none(why, Vec::new())));
        }
        self.upload()?;
        Ok(None)
    }

    fn run(&mut self, _: &BootImage) -> Result<Trial> {
        let before = self.boot_id()?;
        let words = (self.words)(None);
        let command: Vec<String> = words.iter().map(|word| format!("'{}'", word.replace('\'', "'\\''"))).collect();
        let mut text = Vec::new();
        let mut json = Json::new(&mut text);
        let mut replay = Replay::new(self.suites, Vec::new(), &mut json);
        let mut ssh = self
            .ssh(&format!("{PROGRAM} {}", command.join(" ")))
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("ssh cannot be started")?;
        if let Some(mut events) = ssh.stdout.take() {
            let mut buffer = [0; 8192];
            while let Ok(count @ 1..) = events.read(&mut buffer) {
                replay.feed(&buffer[..count]);
            }
        }
        let output = ssh.wait_with_output().context("ssh")?;
        child::interrupted(self.stop)?;
        // The connection may have ended with the machine: then it comes back with another boot id, or not at all.
        if !replay.is_finished() {
            let same = self.boot_id().is_ok_and(|now| now == before);
            let why = match same {
                true => format!("the connection to {} ended", self.host),
                false => format!("{} went down", self.host),
            };
            replay.lost(&why, if same { Outcome::Error } else { Outcome::Crash }, &[]);
        }
        let ended = replay.finish();
        drop(json);
        match ended {
            Some(ended) => {
                let records = Document::parse(&String::from_utf8_lossy(&text)).map(|document| document.results);
                Ok(Trial::of(ended.summary, ended.stopped.as_ref(), &records.unwrap_or_default()))
            }
            None => Ok(Trial::none(format!("no run on {} ({})", self.host, output.status), lines(&output))),
        }
    }
}

impl HostRunner<'_> {
    fn ssh(&self, command: &str) -> Command {
        let mut ssh = Command::new("ssh");
        ssh.args(SSH).arg(&self.host).arg(command).stdin(Stdio::null());
        ssh
    }

    fn ask(&self, command: &str) -> Result<String> {
        let output = self.ssh(command).output().context("ssh cannot be started")?;
        if !output.status.success() {
            bail!("ssh {} {command}: {} {}", self.host, output.status, lines(&output).join(" "));
        }
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    }

    fn boot_id(&self) -> Result<String> {
        self.ask("cat /proc/sys/kernel/random/boot_id")
    }

    fn upload(&self) -> Result<()> {
        let mut program = File::open("/proc/self/exe").context("this program")?;
        let mut ssh = self
            .ssh(&format!("cat > {PROGRAM}.new && chmod 755 {PROGRAM}.new && mv {PROGRAM}.new {PROGRAM}"))
            .stdin(Stdio::piped())
            .spawn()
            .context("ssh cannot be started")?;
        if let Some(mut pipe) = ssh.stdin.take() {
            std::io::copy(&mut program, &mut pipe).and_then(|_| pipe.flush()).context("this program to the host")?;
        }
        match ssh.wait().context("ssh")? {
            status if status.success() => Ok(()),
            status => bail!("this program cannot be put at {}:{PROGRAM} ({status})", self.host),
        }
    }
}

/// The last lines of what a command said.
fn lines(output: &Output) -> Vec<String> {
    let text = [output.stdout.as_slice(), output.stderr.as_slice()].concat();
    let mut lines: Vec<String> = String::from_utf8_lossy(&text).lines().map(str::to_owned).collect();
    lines.drain(..lines.len().saturating_sub(20));
    lines
}
