//! The broker between tests and the simulated TDX module: one port, any number of processes.
//!
//! A test's process connects to a socket and speaks the protocol of `crate::inject`; its questions go to the port one at a
//! time. When the process has gone, however it went, the faults that it planned are taken back. A process that begins while
//! no other one is there finds a module without anything that the ones before it left behind.

use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv};

use super::port;
use crate::inject::protocol::{Answer, Question};
use crate::inject::{PORT_NAME, SOCKET};

/// Listens; says what is missing.
pub fn broker() -> Option<String> {
    let Some(port) = port::named(PORT_NAME, OpenOptions::new().read(true).write(true)) else {
        return Some(format!("the port {PORT_NAME} is not there: tests cannot reach the simulated TDX module"));
    };
    let listener = match UnixListener::bind(SOCKET) {
        Ok(listener) => listener,
        Err(error) => return Some(format!("{SOCKET} cannot be listened on: {error}")),
    };
    let broker = Arc::new(Broker::new(port));
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let broker = Arc::clone(&broker);
            thread::spawn(move || broker.converse(stream));
        }
    });
    None
}

/// A process that talks to the module.
struct Conversation {
    stream: Arc<UnixStream>,
    /// It has planned faults and not taken them back.
    planned: bool,
}

impl Conversation {
    /// Whether the process has gone, of which the thread that reads from it need not know yet.
    fn is_over(&self) -> bool {
        let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
        !matches!(recv(self.stream.as_raw_fd(), &mut [0], flags), Ok(1..) | Err(Errno::EAGAIN))
    }
}

/// The port, and who talks through it.
pub struct Broker {
    port: Mutex<BufReader<File>>,
    open: Mutex<Vec<Conversation>>,
}

impl Broker {
    /// A broker in front of the module at this port.
    pub fn new(port: File) -> Broker {
        Broker { port: Mutex::new(BufReader::new(port)), open: Mutex::new(Vec::new()) }
    }

    fn open(&self) -> MutexGuard<'_, Vec<Conversation>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Passes on a process's questions until it has gone.
    pub fn converse(&self, stream: UnixStream) {
        let stream = Arc::new(stream);
        self.open().push(Conversation { stream: Arc::clone(&stream), planned: false });
        let mut lines = BufReader::new(&*stream);
        let mut line = Vec::new();
        loop {
            line.clear();
            match lines.read_until(b'\n', &mut line) {
                Ok(1..) if line.ends_with(b"\n") => {}
                _ => break,
            }
            let answer = match serde_json::from_slice(&line) {
                Ok(Question::Begin) => self.begin(&stream, &line),
                Ok(Question::AddFault(_)) => self.plan(&stream, true, &line),
                Ok(Question::ClearFaults) => self.plan(&stream, false, &line),
                _ => self.ask(&line),
            };
            if answer.and_then(|answer| (&*stream).write_all(&answer)).is_err() {
                break;
            }
        }
        self.end(&stream);
    }

    /// The module is told of a process that is alone; otherwise what is there is the others' too.
    fn begin(&self, stream: &Arc<UnixStream>, line: &[u8]) -> io::Result<Vec<u8>> {
        let mut open = self.open();
        open.retain(|other| Arc::ptr_eq(&other.stream, stream) || !other.is_over());
        if open.len() == 1 {
            return self.ask(line);
        }
        let mut answer = serde_json::to_vec(&Answer::Done)?;
        answer.push(b'\n');
        Ok(answer)
    }

    fn plan(&self, stream: &Arc<UnixStream>, planned: bool, line: &[u8]) -> io::Result<Vec<u8>> {
        let mut open = self.open();
        if let Some(own) = open.iter_mut().find(|own| Arc::ptr_eq(&own.stream, stream)) {
            own.planned = planned;
        }
        self.ask(line)
    }

    /// Takes back what a process planned, unless the next one has begun: then that is done.
    fn end(&self, stream: &Arc<UnixStream>) {
        let mut open = self.open();
        let Some(at) = open.iter().position(|own| Arc::ptr_eq(&own.stream, stream)) else { return };
        let own = open.remove(at);
        if own.planned
            && let Ok(line) = serde_json::to_string(&Question::ClearFaults)
        {
            // With the port gone there is no module to clear.
            let _ = self.ask(format!("{line}\n").as_bytes());
        }
    }

    fn ask(&self, line: &[u8]) -> io::Result<Vec<u8>> {
        let mut port = self.port.lock().unwrap_or_else(PoisonError::into_inner);
        port.get_mut().write_all(line)?;
        let mut answer = Vec::new();
        match port.read_until(b'\n', &mut answer)? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            _ => Ok(answer),
        }
    }
}
