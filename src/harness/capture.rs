//! What comes out of a pipe, kept within bounds: the beginning, the end, and how much there was.

use std::collections::VecDeque;
use std::io::{PipeReader, Read};
use std::os::fd::{AsFd, BorrowedFd};

use nix::fcntl::{FcntlArg, OFlag, fcntl};

use super::outcome::Output;

/// Bytes kept of the beginning of a stream, and as many of its end.
pub const KEPT: usize = 32 * 1024;

/// A stream of which the beginning and the end are kept.
#[derive(Debug)]
pub struct Capture {
    head: Vec<u8>,
    tail: VecDeque<u8>,
    kept: usize,
    total: u64,
}

impl Capture {
    /// Keeps the first `kept` bytes and the last `kept` bytes.
    pub fn new(kept: usize) -> Capture {
        Capture { head: Vec::new(), tail: VecDeque::new(), kept, total: 0 }
    }

    /// Takes the next bytes of the stream.
    pub fn push(&mut self, bytes: &[u8]) {
        self.total += bytes.len() as u64;
        let (first, rest) = bytes.split_at(bytes.len().min(self.kept - self.head.len()));
        self.head.extend_from_slice(first);
        let rest = &rest[rest.len().saturating_sub(self.kept)..];
        let excess = (self.tail.len() + rest.len()).saturating_sub(self.kept);
        self.tail.drain(..excess);
        self.tail.extend(rest);
    }

    /// The bytes that are kept.
    pub fn bytes(&self) -> Vec<u8> {
        self.head.iter().chain(&self.tail).copied().collect()
    }

    /// The text that is kept, with a line that says how much was left out between its two parts.
    pub fn output(&self) -> Output {
        let left_out = self.total - (self.head.len() + self.tail.len()) as u64;
        let text = if left_out == 0 {
            String::from_utf8_lossy(&self.bytes()).into_owned()
        } else {
            let head = String::from_utf8_lossy(&self.head);
            let tail: Vec<u8> = self.tail.iter().copied().collect();
            let tail = String::from_utf8_lossy(&tail);
            format!("{head}\n[... {left_out} bytes left out ...]\n{tail}")
        };
        Output { text, bytes: self.total }
    }
}

/// The reading end of a stream of a test's process.
#[derive(Debug)]
pub struct Stream {
    pipe: Option<PipeReader>,
    /// What came so far.
    pub capture: Capture,
}

impl Stream {
    /// Reads from `pipe`, which becomes non-blocking.
    ///
    /// # Errors
    /// What fcntl(2) returns.
    pub fn new(pipe: PipeReader, kept: usize) -> std::io::Result<Stream> {
        let flags = OFlag::from_bits_retain(fcntl(&pipe, FcntlArg::F_GETFL)?);
        fcntl(&pipe, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        Ok(Stream { pipe: Some(pipe), capture: Capture::new(kept) })
    }

    /// The descriptor to poll; `None` after the end of the stream.
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.pipe.as_ref().map(AsFd::as_fd)
    }

    /// Takes what is there, at most about `limit` bytes, so that one busy stream cannot keep the runner from the others.
    pub fn take_available(&mut self, limit: usize) {
        // Most tests say little, and the buffer is cleared each time.
        let mut buffer = [0; 4096];
        let mut taken = 0;
        while taken < limit {
            let Some(pipe) = self.pipe.as_mut() else {
                return;
            };
            match pipe.read(&mut buffer) {
                Ok(0) => self.pipe = None,
                Ok(count) => {
                    self.capture.push(&buffer[..count]);
                    taken += count;
                }
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return,
                Err(_) => self.pipe = None,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_beginning_and_the_end_are_kept_and_the_rest_is_counted() {
        let mut capture = Capture::new(4);
        for piece in ["ab", "cdef", "ghijklmnop", "q"] {
            capture.push(piece.as_bytes());
        }
        let output = capture.output();
        assert_eq!(output.bytes, 17);
        assert_eq!(output.text, "abcd\n[... 9 bytes left out ...]\nnopq");
    }

    #[test]
    fn what_fits_is_kept_as_it_is() {
        let mut capture = Capture::new(4);
        capture.push(b"abcd");
        capture.push(b"efgh");
        assert_eq!(capture.output().text, "abcdefgh");
    }
}
