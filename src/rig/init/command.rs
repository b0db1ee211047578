//! The command that the init was given.

use std::io::Read;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use super::port::Port;
use crate::rig::wire::{CommandEnd, Frame};

/// Time between two signs of life.
const BEAT: Duration = Duration::from_secs(1);
/// How long killed processes may take to be gone before they are left to the power-off.
const GRACE: Duration = Duration::from_secs(5);

/// Runs this program with `arguments`, relays its output, and returns when it, and everything that it started, has ended.
pub fn run(arguments: &[String], port: &Arc<Port>) -> CommandEnd {
    let mut command = command(arguments);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = match command.spawn() {
        Ok(child) => child,
        Err(error) => return CommandEnd::NotStarted(error.raw_os_error().unwrap_or(0)),
    };
    let relays = [
        child.stdout.take().map(|pipe| relay(pipe, port, Frame::Stdout)),
        child.stderr.take().map(|pipe| relay(pipe, port, Frame::Stderr)),
    ];
    let over = Arc::new(AtomicBool::new(false));
    let beats = beat(port, &over);
    let end = reap_until(Pid::from_raw(child.id() as i32));
    kill_the_rest();
    let deadline = Instant::now() + GRACE;
    for relay in relays.into_iter().flatten() {
        // A process that SIGKILL does not end keeps the pipe open.
        while !relay.is_finished() && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(1));
        }
    }
    over.store(true, Ordering::Relaxed);
    beats.thread().unpark();
    end
}

/// The same, with the console as standard output and standard error.
pub fn run_on_console(arguments: &[String]) -> CommandEnd {
    match command(arguments).spawn() {
        Ok(child) => {
            let end = reap_until(Pid::from_raw(child.id() as i32));
            kill_the_rest();
            end
        }
        Err(error) => CommandEnd::NotStarted(error.raw_os_error().unwrap_or(0)),
    }
}

fn command(arguments: &[String]) -> Command {
    let mut command = Command::new("/init");
    command.args(arguments).env_clear().env("PATH", "/").env("HOME", "/").env("TMPDIR", "/tmp");
    command.stdin(Stdio::null());
    command
}

fn relay(mut pipe: impl Read + Send + 'static, port: &Arc<Port>, frame: fn(Vec<u8>) -> Frame) -> JoinHandle<()> {
    let port = Arc::clone(port);
    thread::spawn(move || {
        let mut buffer = vec![0; 16 << 10];
        while let Ok(count @ 1..) = pipe.read(&mut buffer) {
            port.send(&frame(buffer[..count].to_vec()));
        }
    })
}

fn beat(port: &Arc<Port>, over: &Arc<AtomicBool>) -> JoinHandle<()> {
    let (port, over) = (Arc::clone(port), Arc::clone(over));
    thread::spawn(move || {
        while !over.load(Ordering::Relaxed) {
            port.send(&Frame::Beat(super::uptime_ms()));
            thread::park_timeout(BEAT);
        }
    })
}

/// Reaps every child and every orphan until `wanted` has ended.
fn reap_until(wanted: Pid) -> CommandEnd {
    loop {
        match waitpid(None, None) {
            Ok(status) if status.pid() == Some(wanted) => {
                if let Some(end) = CommandEnd::of(status) {
                    return end;
                }
            }
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return CommandEnd::NotStarted(errno as i32),
        }
    }
}

/// Kills everything but this process and the kernel's own threads, and reaps it.
fn kill_the_rest() {
    // ESRCH: nothing is left.
    let _ = kill(Pid::from_raw(-1), Signal::SIGKILL);
    let deadline = Instant::now() + GRACE;
    while Instant::now() < deadline {
        match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::StillAlive) => thread::sleep(Duration::from_millis(1)),
            Ok(_) => {}
            Err(_) => return,
        }
    }
}
