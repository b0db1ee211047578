//! The doorbell: a stream from the kernel under test, one byte a request.

use std::io::{self, Read};
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use super::Notice;
use super::mailbox;
use super::service::{Broken, Service};

/// What the kernel says first.
const MAGIC: [u8; 4] = *b"GMT1";
/// How long the mailboxes are watched for the next request after an answer: the kernel seldom makes one call alone.
const WATCH: Duration = Duration::from_micros(40);

/// What has been heard of a CPU.
#[derive(Clone, Copy, Default)]
struct Heard {
    /// Times that it has rung.
    rung: u64,
    /// Requests taken up.
    served: u64,
    /// Number of the last one.
    sequence: Option<u64>,
}

/// Serves until the other side closes the stream.
pub fn serve(service: &Service, stream: &UnixStream) {
    let result = catch_unwind(AssertUnwindSafe(|| listen(service, stream)));
    match result {
        Ok(Ok(())) => {}
        Ok(Err(End::Broken(why))) => service.notify(Notice::Broken(why)),
        Ok(Err(End::Io(error))) if service.stopping() || error.kind() == io::ErrorKind::ConnectionReset => {}
        Ok(Err(End::Io(error))) => service.notify(Notice::Failed(format!("the doorbell's socket: {error}"))),
        Err(_) => service.notify(Notice::Failed("its thread panicked".to_owned())),
    }
    service.hang_up();
}

enum End {
    Broken(Broken),
    Io(io::Error),
}

impl From<Broken> for End {
    fn from(why: Broken) -> End {
        End::Broken(why)
    }
}

impl From<io::Error> for End {
    fn from(error: io::Error) -> End {
        End::Io(error)
    }
}

fn listen(service: &Service, mut stream: &UnixStream) -> Result<(), End> {
    let mut hello = [0; 16];
    match stream.read_exact(&mut hello) {
        // A kernel without the patch never writes here.
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
        result => result?,
    }
    let (magic, rest) = hello.split_at(4);
    if magic != MAGIC {
        return Err(End::Broken(format!(
            "its first words are {hello:02x?}, not {:?} and where its mailboxes are",
            "GMT1"
        )));
    }
    let number = |bytes: &[u8]| bytes.iter().rev().fold(0, |value, &byte| value << 8 | u64::from(byte));
    service.hello(number(&rest[..8]), number(&rest[8..]) as u32)?;
    let mut heard = vec![Heard::default(); service.mailbox_count() as usize];
    let mut bytes = [0; 256];
    loop {
        let count = stream.read(&mut bytes)?;
        if count == 0 {
            return Ok(());
        }
        for &cpu in &bytes[..count] {
            ring(service, &mut heard, u32::from(cpu))?;
        }
        let mut since = Instant::now();
        while since.elapsed() < WATCH {
            if look_around(service, &mut heard)? {
                since = Instant::now();
            }
            std::hint::spin_loop();
        }
    }
}

/// Takes up a new request of a CPU, if there is one.
fn take(service: &Service, heard: &mut Heard, cpu: u32) -> Result<bool, Broken> {
    let Some(mailbox) = service.mailbox(cpu) else { return Ok(false) };
    if service.busy(cpu) {
        return Ok(false);
    }
    match mailbox.state() {
        mailbox::REQUEST => {}
        0 | mailbox::ANSWERED => return Ok(false),
        state => return Err(format!("the mailbox of CPU {cpu} is in state {state:#x}, which is none")),
    }
    let sequence = mailbox.sequence();
    // The state may have been that of the request before, whose answer was on its way: the kernel writes the number of the
    // next one before it changes the state.
    if heard.sequence == Some(sequence) || mailbox.state() != mailbox::REQUEST {
        return Ok(false);
    }
    if heard.sequence.is_some_and(|last| sequence != last.wrapping_add(1)) {
        let last = heard.sequence.unwrap_or(0);
        return Err(format!("the mailbox of CPU {cpu} has request {sequence} after request {last}"));
    }
    heard.sequence = Some(sequence);
    heard.served += 1;
    service.serve(cpu)?;
    Ok(true)
}

fn ring(service: &Service, heard: &mut [Heard], cpu: u32) -> Result<(), Broken> {
    let Some(heard) = heard.get_mut(cpu as usize) else {
        return Err(format!("CPU {cpu} rings, but there are {} mailboxes", service.mailbox_count()));
    };
    heard.rung += 1;
    take(service, heard, cpu)?;
    if heard.rung > heard.served {
        let state = service.mailbox(cpu).map_or(0, |mailbox| mailbox.state());
        return Err(format!("CPU {cpu} rings without a request: its mailbox is in state {state:#x}"));
    }
    Ok(())
}

/// Takes up requests that have not been rung for yet.
fn look_around(service: &Service, heard: &mut [Heard]) -> Result<bool, Broken> {
    let mut any = false;
    for (cpu, heard) in heard.iter_mut().enumerate() {
        any |= take(service, heard, cpu as u32)?;
    }
    Ok(any)
}
