//! How the process of a test comes to be: a fork of the runner, or this program again.
//!
//! Both give the test a process of its own, in a process group of its own, that dies with the runner and reports over a
//! pipe. Under an emulator, where a program's start is hundreds of page faults, a test costs half as much in a fork: 36 ms
//! instead of 88 ms besides its own code, in the mean over 166 tests on a busy host, both measured at the same time. It needs
//! a runner of one thread (the locks of other threads would stay locked in the fork).

use std::io::{self, PipeWriter, Write};
use std::os::fd::{AsRawFd, IntoRawFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use nix::errno::Errno;
use nix::sys::signal::SigSet;

use super::Seed;
use super::child::{Opener, deliver};
use super::plan::Claim;
use super::wire::{CLAIM_ARGUMENT, FD_VARIABLE, TEST_VARIABLE, Wire};
use crate::machine::MachineSpec;

/// What a test's process has to do.
pub(super) struct Task<'a> {
    /// The test.
    pub(super) claim: &'a Claim,
    /// The machine it runs on.
    pub(super) machine: &'a MachineSpec,
    /// The seed of the round.
    pub(super) seed: Seed,
}

/// The ends of the three pipes that the process writes to.
pub(super) struct Ends {
    /// Standard output.
    pub(super) stdout: PipeWriter,
    /// Standard error.
    pub(super) stderr: PipeWriter,
    /// Messages to the runner.
    pub(super) messages: PipeWriter,
}

/// How the processes of a run are started.
#[derive(Clone, Copy, Debug)]
pub(super) enum How {
    /// fork(2); the process opens its machine with this.
    Fork(Opener),
    /// fork(2) and execve(2) of /proc/self/exe.
    Exec,
}

impl How {
    /// The cheapest way that is right for this runner.
    pub(super) fn best(open: Opener) -> How {
        let threads = std::fs::read_dir("/proc/self/task").map_or(0, Iterator::count);
        if threads == 1 { How::Fork(open) } else { How::Exec }
    }

    /// Starts the process and returns its number.
    pub(super) fn start(self, task: &Task<'_>, ends: Ends, mark: &str) -> io::Result<i32> {
        match self {
            How::Fork(open) => fork(task, open, ends, mark),
            How::Exec => exec(task, ends, mark),
        }
    }
}

fn exec(task: &Task<'_>, ends: Ends, mark: &str) -> io::Result<i32> {
    let mut command = Command::new("/proc/self/exe");
    command
        .arg0("gmemtest")
        .args([CLAIM_ARGUMENT, &task.claim.name, &task.machine.to_string(), &task.seed.to_string()])
        .env(FD_VARIABLE, ends.messages.as_raw_fd().to_string())
        .env(TEST_VARIABLE, mark)
        .stdin(Stdio::null())
        .stdout(ends.stdout)
        .stderr(ends.stderr)
        .process_group(0);
    let (runner, inherited) = (std::process::id() as i32, ends.messages.as_raw_fd());
    // SAFETY: between fork and exec the closure only makes system calls that are async-signal-safe (prctl, fcntl,
    // sigprocmask, getppid) on values copied into it, and allocates nothing.
    unsafe {
        command.pre_exec(move || {
            Errno::result(libc::fcntl(inherited, libc::F_SETFD, 0))?;
            become_the_tests(runner)
        });
    }
    Ok(command.spawn()?.id() as i32)
}

/// What both kinds of process do first.
fn become_the_tests(runner: i32) -> io::Result<()> {
    // SAFETY: both options take numbers and change attributes of the calling process.
    unsafe {
        Errno::result(libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL))?;
        // Orphans of the test stay below it while it lives, so that none is laid at another test's door.
        Errno::result(libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1))?;
    }
    SigSet::empty().thread_set_mask()?;
    // The runner may have died before the signal was asked for.
    // SAFETY: takes nothing and always succeeds.
    if unsafe { libc::getppid() } != runner {
        return Err(io::Error::from_raw_os_error(libc::ESRCH));
    }
    Ok(())
}

fn fork(task: &Task<'_>, open: Opener, ends: Ends, mark: &str) -> io::Result<i32> {
    // What waits in a buffer would be written by both.
    io::stdout().flush()?;
    let runner = std::process::id() as i32;
    // SAFETY: the runner has one thread (`How::best`), so the child is as whole as the parent.
    let child = Errno::result(unsafe { libc::fork() })?;
    if child != 0 {
        // As in the child: whichever comes first. EACCES and ESRCH: the child has done it, or is gone.
        let _ = nix::unistd::setpgid(nix::unistd::Pid::from_raw(child), nix::unistd::Pid::from_raw(child));
        return Ok(child);
    }
    let status = match settle(runner, ends, mark) {
        Ok(wire) => {
            deliver(task.claim, task.machine, task.seed, open, &wire);
            0
        }
        Err(error) => {
            eprintln!("gmemtest: the test's process cannot be set up: {error}");
            1
        }
    };
    let _ = io::stdout().flush();
    // SAFETY: _exit ends the process; nothing that it shares with the runner in memory is dropped or flushed.
    unsafe { libc::_exit(status) }
}

/// Makes the fork the test's: its streams and nothing else of the runner's.
fn settle(runner: i32, ends: Ends, mark: &str) -> io::Result<Wire> {
    nix::unistd::setpgid(nix::unistd::Pid::from_raw(0), nix::unistd::Pid::from_raw(0))?;
    become_the_tests(runner)?;
    let null = std::fs::File::open("/dev/null")?;
    let streams = [null.into_raw_fd(), ends.stdout.into_raw_fd(), ends.stderr.into_raw_fd()];
    for (number, fd) in (0..).zip(streams) {
        // SAFETY: both are numbers of descriptors; the old 0, 1 and 2 belong to the process, not to a value.
        Errno::result(unsafe { libc::dup2(fd, number) })?;
    }
    // Number 3, and everything behind it closed: a test finds the descriptors that a program's start leaves.
    // SAFETY: the pipe's end was taken out of its value above, and what the runner's values hold in this copy of its
    // memory is never used or dropped again.
    let wire = unsafe { adopt(ends.messages.into_raw_fd())? };
    // SAFETY: the process has one thread.
    unsafe { std::env::set_var(TEST_VARIABLE, mark) };
    Ok(Wire::new(wire))
}

/// The descriptor as number 3, close-on-exec, with all others above 2 closed.
///
/// # Safety
/// No value of this process that is used or dropped from now on owns a descriptor above 2.
unsafe fn adopt(fd: RawFd) -> io::Result<std::fs::File> {
    const WIRE: RawFd = 3;
    // SAFETY: numbers of descriptors, which the caller gave up; and flags.
    unsafe {
        if fd == WIRE {
            Errno::result(libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC))?;
        } else {
            Errno::result(libc::dup3(fd, WIRE, libc::O_CLOEXEC))?;
        }
        Errno::result(libc::syscall(libc::SYS_close_range, WIRE as u32 + 1, u32::MAX, 0u32))?;
        Ok(std::os::fd::FromRawFd::from_raw_fd(WIRE))
    }
}
