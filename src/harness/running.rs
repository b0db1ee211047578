//! The process of one test as the runner sees it: started, watched, ended, cleared away.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::signal::Signal;
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};

use super::capture::{KEPT, Stream};
use super::descendants;
use super::outcome::{Leftover, StuckThread};
use super::start::{Ends, How, Task};

/// From SIGTERM to SIGKILL.
const GRACE: Duration = Duration::from_secs(2);
/// From SIGKILL to the verdict that a process cannot be killed.
const PATIENCE: Duration = Duration::from_secs(10);
/// Bytes of messages that are kept; the test's process itself leaves no more than a part of this.
const MOST_MESSAGES: usize = 4 << 20;
/// Bytes taken from a stream before the other descriptors are looked at again.
const TURN: usize = 1 << 20;

/// How far the ending of a process has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// It has until the time limit.
    Running,
    /// SIGTERM was sent.
    Terminated,
    /// SIGKILL was sent.
    Killed,
    /// It survives SIGKILL.
    Unkillable,
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// exit(2) with that status.
    Exited(i32),
    /// A signal.
    Signaled(Signal),
    /// It survives SIGKILL; nothing more is known.
    Unkillable,
}

/// The process of one test.
#[derive(Debug)]
pub struct Running {
    pid: i32,
    pidfd: OwnedFd,
    mark: String,
    phase: Phase,
    until: Instant,
    limit: Duration,
    timed_out: bool,
    /// When the process was started.
    pub started: Instant,
    /// Standard output.
    pub stdout: Stream,
    /// Standard error.
    pub stderr: Stream,
    /// Messages of the test's process.
    pub messages: Stream,
    /// Where its threads were when the time limit passed.
    pub stuck: Vec<StuckThread>,
    /// The inode of the pipe behind `messages`, which tells forks of the process that never executed anything.
    wire: u64,
}

impl Running {
    /// Starts the process of `task`, in a process group of its own. `mark` is the value of [`TEST_VARIABLE`].
    ///
    /// # Errors
    /// What pipe(2), fork(2), execve(2) and pidfd_open(2) return.
    ///
    /// [`TEST_VARIABLE`]: super::wire::TEST_VARIABLE
    pub(super) fn start(task: &Task<'_>, how: How, mark: String, limit: Duration) -> io::Result<Running> {
        let (stdout, stdout_end) = io::pipe()?;
        let (stderr, stderr_end) = io::pipe()?;
        let (messages, messages_end) = io::pipe()?;
        let wire = nix::sys::stat::fstat(&messages)?.st_ino;
        let started = Instant::now();
        let pid = how.start(task, Ends { stdout: stdout_end, stderr: stderr_end, messages: messages_end }, &mark)?;
        // Nothing but this struct waits for the process, so the number means it until `reap`.
        let pidfd = match pidfd_open(pid) {
            Ok(pidfd) => pidfd,
            Err(error) => {
                signal_group(pid, Signal::SIGKILL);
                let _ = nix::sys::wait::waitpid(nix::unistd::Pid::from_raw(pid), None);
                return Err(error);
            }
        };
        Ok(Running {
            pid,
            pidfd,
            mark,
            phase: Phase::Running,
            until: started + limit,
            limit,
            timed_out: false,
            started,
            stdout: Stream::new(stdout, KEPT)?,
            stderr: Stream::new(stderr, KEPT)?,
            messages: Stream::new(messages, MOST_MESSAGES)?,
            stuck: Vec::new(),
            wire,
        })
    }

    /// The process.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// The descriptors to poll for input.
    pub fn fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        use std::os::fd::AsFd;
        let streams = [&self.stdout, &self.stderr, &self.messages];
        streams.into_iter().filter_map(Stream::fd).chain([self.pidfd.as_fd()])
    }

    /// When [`Running::press`] has something to do.
    pub fn until(&self) -> Instant {
        self.until
    }

    /// The time limit, when it passed.
    pub fn timed_out(&self) -> Option<Duration> {
        self.timed_out.then_some(self.limit)
    }

    /// Takes what its streams hold.
    pub fn listen(&mut self) {
        for stream in [&mut self.stdout, &mut self.stderr, &mut self.messages] {
            stream.take_available(TURN);
        }
    }

    /// At the time limit notes where the threads are and sends SIGTERM to the group, then SIGKILL, then gives up.
    pub fn press(&mut self, now: Instant) {
        if now < self.until {
            return;
        }
        match self.phase {
            Phase::Running => {
                self.timed_out = true;
                self.stuck = descendants::threads(&descendants::with_descendants(self.pid));
                self.terminate(now);
            }
            Phase::Terminated => {
                signal_group(self.pid, Signal::SIGKILL);
                self.phase = Phase::Killed;
                self.until = now + PATIENCE;
            }
            Phase::Killed => {
                // Where it hangs in the kernel is worth more than where it was before it was killed.
                self.stuck = descendants::threads(&descendants::with_descendants(self.pid));
                self.phase = Phase::Unkillable;
                self.until = now + PATIENCE;
            }
            Phase::Unkillable => self.until = now + PATIENCE,
        }
    }

    /// Sends SIGTERM to the group; SIGKILL follows, at once when this is asked for again.
    pub fn terminate(&mut self, now: Instant) {
        match self.phase {
            Phase::Running => {
                signal_group(self.pid, Signal::SIGTERM);
                self.phase = Phase::Terminated;
                self.until = now + GRACE;
            }
            Phase::Terminated => self.until = now,
            Phase::Killed | Phase::Unkillable => {}
        }
    }

    /// How it ended; `None` while it runs. The process stays a zombie until [`Running::clear_away`], so that its number,
    /// which is its group's too, cannot be given to another.
    pub fn ended(&self) -> Option<End> {
        let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
        match waitid(Id::PIDFd(std::os::fd::AsFd::as_fd(&self.pidfd)), flags) {
            Ok(WaitStatus::Exited(_, status)) => Some(End::Exited(status)),
            Ok(WaitStatus::Signaled(_, signal, _)) => Some(End::Signaled(signal)),
            _ if self.phase == Phase::Unkillable => Some(End::Unkillable),
            _ => None,
        }
    }

    /// Kills and reaps everything that the test left behind, then the test's own process, and takes the last of its
    /// output. `others` are the processes of the other running tests, `ours` children that the runner had before.
    pub fn clear_away(&mut self, others: &[&Running], ours: &[i32]) -> Vec<Leftover> {
        let mut leftovers: Vec<Leftover> = Vec::new();
        let deadline = Instant::now() + PATIENCE;
        let alone = others.is_empty() && ours.is_empty();
        // Killing a process hands its children to the runner: once more until there is none.
        while !(alone && no_child_lives()) {
            let found = self.adopted(others, ours);
            let Some(alive) = found.iter().find(|pid| !leftovers.iter().any(|left| left.pid == **pid && !left.killed))
            else {
                break;
            };
            let alive = *alive;
            if let Some(stat) = descendants::stat(alive)
                && stat.state != 'Z'
            {
                leftovers.push(Leftover {
                    pid: alive,
                    name: stat.name,
                    escaped: stat.group != self.pid,
                    killed: kill_and_reap(alive, deadline),
                });
            } else {
                let _ = nix::sys::wait::waitpid(nix::unistd::Pid::from_raw(alive), Some(WaitPidFlag::WNOHANG));
            }
        }
        if self.phase != Phase::Unkillable {
            // The group can hold processes that are nobody's orphan yet.
            signal_group(self.pid, Signal::SIGKILL);
            let _ =
                waitid(Id::PIDFd(std::os::fd::AsFd::as_fd(&self.pidfd)), WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG);
        }
        if alone {
            // Orphans that died by themselves.
            while nix::sys::wait::waitpid(None, Some(WaitPidFlag::WNOHANG)).is_ok_and(|state| state.pid().is_some()) {}
        }
        for stream in [&mut self.stdout, &mut self.stderr, &mut self.messages] {
            stream.take_available(usize::MAX);
        }
        leftovers
    }

    /// The runner's children that come from this test.
    fn adopted(&self, others: &[&Running], ours: &[i32]) -> Vec<i32> {
        let mut found = descendants::children(std::process::id() as i32);
        found.retain(|&pid| {
            if pid == self.pid || others.iter().any(|other| other.pid == pid) || ours.contains(&pid) {
                return false;
            }
            let Some(stat) = descendants::stat(pid) else {
                return false;
            };
            // Tests that still run keep their orphans. What is new here comes from one that has ended: from this one,
            // unless it is to be seen that it comes from another that ended at the same moment.
            self.is_marked(pid, stat.group)
                .unwrap_or_else(|| !others.iter().any(|other| other.is_marked(pid, stat.group) == Some(true)))
        });
        found
    }

    /// Whether a process of that group comes from this test; `None` when it bears no mark of it, nor of another.
    fn is_marked(&self, pid: i32, group: i32) -> Option<bool> {
        if group == self.pid || descendants::holds_pipe(pid, self.wire) {
            return Some(true);
        }
        descendants::mark(pid).map(|mark| mark == self.mark)
    }
}

/// Whether every child of the runner is a zombie: waitid(2) that does not ask for zombies says ECHILD then. Everything that
/// a test started is the runner's child or below one, so that /proc need not be searched, which takes long where it has
/// no list of children.
fn no_child_lives() -> bool {
    let flags = WaitPidFlag::WSTOPPED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
    waitid(Id::All, flags) == Err(nix::errno::Errno::ECHILD)
}

/// Kills a process that is the runner's child and waits for it; false when it is still there at the deadline.
pub fn kill_and_reap(pid: i32, deadline: Instant) -> bool {
    let Ok(pidfd) = pidfd_open(pid) else {
        return true;
    };
    // SAFETY: the pidfd is open and the other arguments are plain numbers and a null pointer, as pidfd_send_signal allows.
    unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            libc::SIGKILL,
            std::ptr::null::<libc::siginfo_t>(),
            0,
        );
    }
    let left = deadline.saturating_duration_since(Instant::now());
    let mut fds = [nix::poll::PollFd::new(std::os::fd::AsFd::as_fd(&pidfd), nix::poll::PollFlags::POLLIN)];
    let timeout = nix::poll::PollTimeout::try_from(left).unwrap_or(nix::poll::PollTimeout::MAX);
    let gone = matches!(nix::poll::poll(&mut fds, timeout), Ok(1..));
    if gone {
        let _ = nix::sys::wait::waitpid(nix::unistd::Pid::from_raw(pid), Some(WaitPidFlag::WNOHANG));
    }
    gone
}

fn signal_group(group: i32, signal: Signal) {
    match nix::sys::signal::killpg(nix::unistd::Pid::from_raw(group), signal) {
        // The process may be gone already, or may be another user's after a setuid exec.
        Ok(()) | Err(Errno::ESRCH | Errno::EPERM) => {}
        Err(error) => eprintln!("gmemtest: cannot signal process group {group}: {error}"),
    }
}

fn pidfd_open(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: pidfd_open takes two numbers and returns a new descriptor (close-on-exec) or -1.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just made this descriptor for this call; nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}
