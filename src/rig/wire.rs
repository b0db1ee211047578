//! What the guest's init tells the host, over a port of its own: frames of a kind, a length and a payload.
//!
//! The first frame is [`Frame::Hello`]; anything else there is not ours, and the port is not read further.

use std::io::{self, Read, Write};

use serde::{Deserialize, Serialize};

/// The name of the virtio-serial port.
pub const PORT_NAME: &str = "gmemtest.rig";
/// What the payload of the first frame begins with; the number changes when the frames do.
const MAGIC: &str = "gmemtest-rig-1 ";
/// Longest payload that is sent in one frame, in bytes.
pub const MAX_PAYLOAD: usize = 64 << 10;

/// What the kernel under test is, as its init found it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// `uname -r`.
    pub release: String,
    /// `uname -v`.
    pub version: String,
    /// Which port carries this: `virtio` or `serial`.
    pub port: String,
    /// Milliseconds from the kernel's start of time to this frame.
    pub uptime_ms: u64,
    /// Whether /dev/kvm is there.
    pub kvm: bool,
    /// Online CPUs.
    pub cpus: usize,
    /// /proc/sys/kernel/tainted.
    pub taint: u64,
    /// What went wrong on the way: mounts, modules.
    pub complaints: Vec<String>,
}

/// How the command ended in the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum CommandEnd {
    /// With this exit status.
    Status(i32),
    /// By this signal.
    Signal(i32),
    /// It was not started, for this errno.
    NotStarted(i32),
}

/// One frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Frame {
    /// The init is up, and the command is started now.
    Hello(Hello),
    /// Bytes of the command's standard output.
    Stdout(Vec<u8>),
    /// Bytes of the command's standard error.
    Stderr(Vec<u8>),
    /// The guest's user space is alive: milliseconds since its kernel's start of time.
    Beat(u64),
    /// The command has ended and its output is complete.
    End(CommandEnd),
}

impl Frame {
    /// Writes the frame in one piece.
    pub fn write(&self, port: &mut impl Write) -> io::Result<()> {
        let (kind, payload) = match self {
            Frame::Hello(hello) => {
                let mut payload = MAGIC.as_bytes().to_vec();
                serde_json::to_writer(&mut payload, hello)?;
                (b'H', payload)
            }
            Frame::Stdout(bytes) => (b'o', bytes.clone()),
            Frame::Stderr(bytes) => (b'e', bytes.clone()),
            Frame::Beat(uptime_ms) => (b'b', uptime_ms.to_le_bytes().to_vec()),
            Frame::End(end) => (b'E', serde_json::to_vec(end)?),
        };
        let mut frame = Vec::with_capacity(payload.len() + 5);
        frame.push(kind);
        frame.extend_from_slice(&(payload.len() as u32).to_le_bytes());
        frame.extend_from_slice(&payload);
        port.write_all(&frame)?;
        port.flush()
    }

    /// Reads one frame; `None` at the end of the stream. A frame that was cut short by the end is the end.
    pub fn read(port: &mut impl Read) -> io::Result<Option<Frame>> {
        let mut head = [0; 5];
        if !fill(port, &mut head)? {
            return Ok(None);
        }
        let length = u32::from_le_bytes([head[1], head[2], head[3], head[4]]) as usize;
        if length > MAX_PAYLOAD {
            return Err(not_ours());
        }
        let mut payload = vec![0; length];
        if !fill(port, &mut payload)? {
            return Ok(None);
        }
        let frame = match head[0] {
            b'H' => {
                let json = payload.strip_prefix(MAGIC.as_bytes()).ok_or_else(not_ours)?;
                Frame::Hello(serde_json::from_slice(json).map_err(|_| not_ours())?)
            }
            b'o' => Frame::Stdout(payload),
            b'e' => Frame::Stderr(payload),
            b'b' => Frame::Beat(u64::from_le_bytes(payload.try_into().map_err(|_| not_ours())?)),
            b'E' => Frame::End(serde_json::from_slice(&payload).map_err(|_| not_ours())?),
            _ => return Err(not_ours()),
        };
        Ok(Some(frame))
    }
}

fn not_ours() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "the guest wrote something else than frames to the result port")
}

fn fill(port: &mut impl Read, buffer: &mut [u8]) -> io::Result<bool> {
    match port.read_exact(buffer) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hello() -> Hello {
        Hello {
            release: "7.3.4".to_owned(),
            version: "#1".to_owned(),
            port: "virtio".to_owned(),
            uptime_ms: 1900,
            kvm: true,
            cpus: 2,
            taint: 0,
            complaints: vec!["no tracefs".to_owned()],
        }
    }

    #[test]
    fn frames_read_back_and_a_cut_one_is_the_end() {
        let frames = [
            Frame::Hello(hello()),
            Frame::Stdout(b"ok 1\n\xff".to_vec()),
            Frame::Stderr(Vec::new()),
            Frame::Beat(12_345),
            Frame::End(CommandEnd::Signal(11)),
        ];
        let mut bytes = Vec::new();
        for frame in &frames {
            frame.write(&mut bytes).unwrap();
        }
        let mut stream = &bytes[..];
        for frame in &frames {
            assert_eq!(Frame::read(&mut stream).unwrap().as_ref(), Some(frame));
        }
        assert_eq!(Frame::read(&mut stream).unwrap(), None);
        let mut cut = &bytes[..bytes.len() - 1];
        for _ in 0..4 {
            Frame::read(&mut cut).unwrap();
        }
        assert_eq!(Frame::read(&mut cut).unwrap(), None);
    }

    #[test]
    fn noise_is_refused() {
        assert!(Frame::read(&mut &b"Linux version 7.3.4"[..]).is_err());
        assert!(Frame::read(&mut &b"H\x02\0\0\0{}"[..]).is_err());
    }
}
