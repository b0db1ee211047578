//! The broker between tests and the simulated TDX module: one port, any number of processes.
//!
//! A test's process connects to a socket and speaks the protocol of `crate::inject`; its questions go to the port one at a
//! time. When the process has gone, however it went, the faults that it planned are taken back.

use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use super::port;
use crate::inject::protocol::Question;
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
    let port = Arc::new(Mutex::new(BufReader::new(port)));
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let port = Arc::clone(&port);
            thread::spawn(move || converse(&stream, &port));
        }
    });
    None
}

/// Passes on a process's questions until it has gone.
pub fn converse(stream: &UnixStream, port: &Mutex<BufReader<File>>) {
    let mut planned = false;
    let mut lines = BufReader::new(stream);
    let mut line = Vec::new();
    loop {
        line.clear();
        match lines.read_until(b'\n', &mut line) {
            Ok(1..) if line.ends_with(b"\n") => {}
            _ => break,
        }
        match serde_json::from_slice(&line) {
            Ok(Question::AddFault(_)) => planned = true,
            Ok(Question::ClearFaults) => planned = false,
            _ => {}
        }
        let mut stream = stream;
        if ask(port, &line).and_then(|answer| stream.write_all(&answer)).is_err() {
            break;
        }
    }
    if planned && let Ok(line) = serde_json::to_string(&Question::ClearFaults) {
        // With the port gone there is no module to clear.
        let _ = ask(port, format!("{line}\n").as_bytes());
    }
}

fn ask(port: &Mutex<BufReader<File>>, line: &[u8]) -> io::Result<Vec<u8>> {
    let mut port = port.lock().unwrap_or_else(PoisonError::into_inner);
    port.get_mut().write_all(line)?;
    let mut answer = Vec::new();
    match port.read_until(b'\n', &mut answer)? {
        0 => Err(io::ErrorKind::UnexpectedEof.into()),
        _ => Ok(answer),
    }
}
