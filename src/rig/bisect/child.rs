//! Programs that a bisection calls: a compiler that runs for minutes must not outlive the signal that ends it all, nor
//! what such a signal cut short be taken for an answer.

use std::io::{self, PipeReader, Read};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread::{sleep, spawn};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::{SigSet, Signal, killpg};
use nix::unistd::Pid;

use crate::rig::stop::StopSignal;

/// Time between two looks at whether a program has ended.
const LOOK: Duration = Duration::from_millis(50);
/// How long a program that is told to end may take before it is killed.
const PATIENCE: Duration = Duration::from_secs(5);
/// Lines of what a program said that are kept.
const KEPT: usize = 20;
/// How long what a program said is waited for once it has ended: what it left in the background may hold the stream.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// What a program came to.
#[derive(Debug)]
pub(super) struct Ended {
    /// How it exited.
    pub status: ExitStatus,
    /// The last lines that it wrote, to either stream.
    pub tail: Vec<String>,
}

/// Runs a program to its end, in a process group of its own: a signal at the terminal reaches `stop` alone, and
/// then what the program started is ended with it.
///
/// # Errors
/// When it cannot be started; when a signal came, or the program itself was ended by one that is sent to stop things.
pub(super) fn run(name: &str, command: &mut Command, stop: &StopSignal) -> Result<Ended> {
    let (said, pipe) = io::pipe().context("a pipe")?;
    command.stdin(Stdio::null()).stdout(pipe.try_clone().context("a pipe")?).stderr(pipe).process_group(0);
    let takes_signals = || {
        // The signals are blocked here, which a program inherits; and it goes when this process is killed.
        SigSet::empty().thread_set_mask()?;
        set_pdeathsig(Signal::SIGTERM)?;
        Ok(())
    };
    // SAFETY: between fork and exec the closure makes two system calls on constants, which is async-signal-safe, and
    // allocates nothing.
    unsafe { command.pre_exec(takes_signals) };
    interrupted(stop)?;
    let mut child = command.spawn().with_context(|| format!("{name} cannot be started"))?;
    // The command holds the pipe's other end, on which the listener would wait for ever.
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let words = listen(said);
    let status = loop {
        if let Some(status) = child.try_wait().with_context(|| name.to_owned())? {
            break status;
        }
        if let Err(stopped) = interrupted(stop) {
            end(&mut child);
            return Err(stopped);
        }
        sleep(LOOK);
    };
    interrupted(stop)?;
    if let Some(signal @ (libc::SIGINT | libc::SIGTERM | libc::SIGHUP)) = status.signal() {
        bail!("{name} was stopped by signal {signal}");
    }
    Ok(Ended { status, tail: words.recv_timeout(LAST_WORDS).unwrap_or_default() })
}

/// Fails when a signal came.
pub(super) fn interrupted(stop: &StopSignal) -> Result<()> {
    match stop.seen() {
        Some(signal) => bail!("stopped by signal {signal}"),
        None => Ok(()),
    }
}

/// Ends a program and what it started: politely, so that make removes what is half written, then for good.
fn end(child: &mut Child) {
    let Ok(group) = i32::try_from(child.id()).map(Pid::from_raw) else { return };
    let _ = killpg(group, Signal::SIGTERM);
    let start = Instant::now();
    while start.elapsed() < PATIENCE && matches!(child.try_wait(), Ok(None)) {
        sleep(LOOK);
    }
    let _ = killpg(group, Signal::SIGKILL);
    let _ = child.wait();
}

/// The last lines of a stream, at its end.
fn listen(mut stream: PipeReader) -> Receiver<Vec<String>> {
    let (sender, words) = channel();
    spawn(move || {
        let (mut text, mut buffer) = (Vec::new(), [0; 4096]);
        while let Ok(count @ 1..) = stream.read(&mut buffer) {
            text.extend_from_slice(&buffer[..count]);
            // Twenty lines of a kernel's build are far from this long.
            if text.len() > 1 << 20 {
                text.drain(..text.len() / 2);
            }
        }
        let mut lines: Vec<String> = String::from_utf8_lossy(&text).lines().map(str::to_owned).collect();
        lines.drain(..lines.len().saturating_sub(KEPT));
        // Nobody listens any more when the program was ended.
        let _ = sender.send(lines);
    });
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn what_it_said_last_is_kept() {
        let stop = StopSignal::block().unwrap();
        let ended = run("sh", &mut shell("seq 30; echo e >&2; exit 3"), &stop).unwrap();
        assert_eq!(ended.status.code(), Some(3));
        assert_eq!((ended.tail.len(), ended.tail[0].as_str(), ended.tail[19].as_str()), (20, "12", "e"));
        let none = run("no-such-program", &mut Command::new("/no-such-program"), &stop).unwrap_err();
        assert_eq!(none.to_string(), "no-such-program cannot be started");
    }

    #[test]
    fn a_program_that_was_told_to_stop_is_no_failure_of_what_it_built() {
        let stop = StopSignal::block().unwrap();
        let error = run("make", &mut shell("kill -TERM $$"), &stop).unwrap_err();
        assert_eq!(error.to_string(), "make was stopped by signal 15");
        let word = run("sh", &mut shell("kill -WINCH $$; exit 4"), &stop).unwrap();
        assert_eq!(word.status.code(), Some(4), "a signal that stops nothing");
    }
}
