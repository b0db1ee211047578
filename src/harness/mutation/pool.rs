//! Worker processes: started, listened to, killed when a claim goes on for too long.

use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use super::worker::WORKER_ARGUMENT;
use super::{Finding, Job, Said};

/// What ends a claim and a job early.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// How long one claim may take.
    pub claim: Duration,
    /// How many claims that do not hold are enough.
    pub enough: usize,
}

/// A process that runs claims.
#[derive(Debug)]
pub struct Worker {
    child: Child,
    input: ChildStdin,
    said: Receiver<Said>,
}

/// How long a worker may take to start, and from one claim to the next; a claim has a limit of its own.
const BETWEEN_CLAIMS: Duration = Duration::from_secs(60);

impl Worker {
    /// Starts this program again as a worker. The process is killed with the thread that calls this.
    ///
    /// # Errors
    /// What fork(2), execve(2) and pipe(2) return.
    pub fn start() -> io::Result<Worker> {
        let mut command = Command::new("/proc/self/exe");
        command
            .arg0("gmemtest")
            .arg(WORKER_ARGUMENT)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null());
        // SAFETY: between fork and exec the closure makes one system call on constants, which is async-signal-safe, and
        // allocates nothing.
        unsafe {
            command.pre_exec(|| match libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) {
                -1 => Err(io::Error::last_os_error()),
                _ => Ok(()),
            });
        }
        let mut child = command.spawn()?;
        let pipes = child.stdin.take().zip(child.stdout.take());
        let (input, output) = pipes.ok_or_else(|| io::Error::other("a worker without pipes"))?;
        let (sender, said) = channel();
        std::thread::spawn(move || {
            // Ends with the pipe, which ends with the worker.
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                // What a test prints by itself is not for this reader.
                if let Ok(message) = serde_json::from_str(&line)
                    && sender.send(message).is_err()
                {
                    break;
                }
            }
        });
        Ok(Worker { child, input, said })
    }

    /// Carries out a job as far as it goes: the findings, and whether the worker can take another one.
    fn carry_out(&mut self, job: &Job, limit: Duration, found: &mut Vec<(usize, Finding)>) -> io::Result<bool> {
        let mut line = serde_json::to_vec(job)?;
        line.push(b'\n');
        self.input.write_all(&line)?;
        let mut running: Option<(usize, Instant)> = None;
        loop {
            let deadline =
                running.map_or_else(|| Instant::now() + BETWEEN_CLAIMS.max(limit), |(_, since)| since + limit);
            match self.said.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(Said::Begin(index)) => running = Some((index, Instant::now())),
                Ok(Said::End(index, finding)) => {
                    found.push((index, finding));
                    running = None;
                }
                Ok(Said::Done) => return Ok(true),
                Err(end) => {
                    let finding = if end == RecvTimeoutError::Timeout { Finding::TimedOut } else { Finding::Died };
                    match running {
                        Some((index, _)) => found.push((index, finding)),
                        None => return Err(io::Error::other("a worker ended between two claims")),
                    }
                    return Ok(false);
                }
            }
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // A worker that is gone already cannot be killed, and one that was killed can be waited for.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs `claims` on a machine, in a worker that is started when there is none, and again when one was lost.
///
/// # Errors
/// When no worker can be started, or one dies without a claim to blame.
pub fn run(
    worker: &mut Option<Worker>,
    machine: &str,
    claims: &[usize],
    limits: Limits,
) -> io::Result<Vec<(usize, Finding)>> {
    let mut found = Vec::new();
    loop {
        let failures = found.iter().filter(|(_, finding): &&(usize, Finding)| finding.is_failure()).count();
        if found.len() >= claims.len() || failures >= limits.enough {
            return Ok(found);
        }
        let rest = claims[found.len()..].to_vec();
        let job = Job { machine: machine.to_owned(), claims: rest, stop_after: limits.enough - failures };
        let mut current = match worker.take() {
            Some(current) => current,
            None => Worker::start()?,
        };
        if current.carry_out(&job, limits.claim, &mut found)? {
            *worker = Some(current);
        }
    }
}
