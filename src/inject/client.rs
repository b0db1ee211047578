//! The test's side of the channel.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use super::SOCKET;
use super::protocol::{Answer, Question};
use crate::machine::{Errno, ModuleCall, ModuleFault, PageOwner, TdxModule};

/// The simulated module below the running kernel, for a process that is to keep the conversation until it ends; `None` where
/// there is none.
pub fn module() -> Option<Arc<dyn TdxModule>> {
    let client = ModuleClient::connect(Path::new(SOCKET)).ok()?;
    client.begin().ok()?;
    Some(Arc::new(client))
}

/// A conversation with the module. Its faults are taken back when it ends, however it ends.
#[derive(Debug)]
pub struct ModuleClient {
    stream: Mutex<BufReader<UnixStream>>,
}

impl ModuleClient {
    /// Connects to a broker.
    ///
    /// # Errors
    /// Those of connect(2).
    pub fn connect(path: &Path) -> std::io::Result<ModuleClient> {
        Ok(ModuleClient { stream: Mutex::new(BufReader::new(UnixStream::connect(path)?)) })
    }

    /// Says that the process has come; what other processes left behind is cleared away where this one is alone.
    ///
    /// # Errors
    /// ENODEV without a module.
    pub fn begin(&self) -> Result<(), Errno> {
        self.ask(&Question::Begin).map(drop)
    }

    /// Ends the conversation at once, without a word, as a process does that is killed.
    #[cfg(test)]
    pub(crate) fn hang_up(&self) {
        let stream = self.stream.lock().unwrap_or_else(PoisonError::into_inner);
        stream.get_ref().shutdown(std::net::Shutdown::Both).expect("the connection is open");
    }

    fn ask(&self, question: &Question) -> Result<Answer, Errno> {
        let mut stream = self.stream.lock().unwrap_or_else(PoisonError::into_inner);
        let mut line = serde_json::to_string(question).map_err(|_| Errno::EPROTO)?;
        line.push('\n');
        stream.get_mut().write_all(line.as_bytes()).map_err(|_| Errno::ENODEV)?;
        line.clear();
        match stream.read_line(&mut line) {
            Ok(1..) => {}
            _ => return Err(Errno::ENODEV),
        }
        match serde_json::from_str(&line).map_err(|_| Errno::EPROTO)? {
            Answer::Errno(errno) => Err(Errno::from_raw(errno)),
            answer => Ok(answer),
        }
    }

    fn number(&self, question: &Question) -> Result<u64, Errno> {
        match self.ask(question)? {
            Answer::Number(number) => Ok(number),
            _ => Err(Errno::EPROTO),
        }
    }
}

impl TdxModule for ModuleClient {
    fn add_fault(&self, fault: &ModuleFault) -> Result<u64, Errno> {
        self.number(&Question::AddFault(fault.into()))
    }

    fn fault_hits(&self, fault: u64) -> Result<u64, Errno> {
        self.number(&Question::FaultHits(fault))
    }

    fn clear_faults(&self) -> Result<(), Errno> {
        self.ask(&Question::ClearFaults).map(drop)
    }

    fn position(&self) -> Result<u64, Errno> {
        self.number(&Question::Position)
    }

    fn calls_since(&self, seq: u64) -> Result<Vec<ModuleCall>, Errno> {
        let mut all: Vec<ModuleCall> = Vec::new();
        loop {
            let from = all.last().map_or(seq, |call| call.seq + 1);
            let Answer::Calls { calls, more } = self.ask(&Question::CallsSince(from))? else {
                return Err(Errno::EPROTO);
            };
            all.extend(calls.into_iter().map(ModuleCall::from));
            if !more {
                return Ok(all);
            }
        }
    }

    fn page_owner(&self, frame: u64) -> Result<PageOwner, Errno> {
        match self.ask(&Question::PageOwner(frame))? {
            Answer::Owner(page_type, tdr, size) => Ok(PageOwner { page_type, tdr, size }),
            _ => Err(Errno::EPROTO),
        }
    }

    fn measurement(&self, tdr: u64) -> Result<[u8; 48], Errno> {
        match self.ask(&Question::Measurement(tdr))? {
            Answer::Measurement(bytes) => bytes.try_into().map_err(|_| Errno::EPROTO),
            _ => Err(Errno::EPROTO),
        }
    }

    fn violations(&self) -> Result<Vec<String>, Errno> {
        match self.ask(&Question::Violations)? {
            Answer::Lines(lines) => Ok(lines),
            _ => Err(Errno::EPROTO),
        }
    }
}

impl Drop for ModuleClient {
    fn drop(&mut self) {
        // The broker does it too, for a process that dies; here the next test cannot come in between.
        let _ = self.clear_faults();
    }
}
