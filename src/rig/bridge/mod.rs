//! The simulated TDX module under a real kernel.
//!
//! The kernel under test runs under QEMU and has the patch of scripts/kernel, which puts the registers of every SEAMCALL
//! into a mailbox page in its RAM and rings. QEMU's RAM is a memory file that this process maps too ([`ram`]), and the
//! module works on that mapping: it finds the kernel's TDMRs, control pages and Secure EPT where the kernel put them.
//!
//! ```text
//! kernel, CPU n                     QEMU                         this process
//! mailbox n: registers, request
//! OUT 0x5e8, n               ---->  debugcon  -- socket -->      doorbell: mailbox n -> Module::seamcall
//! waits for its answer       <------------- RAM file --------    mailbox n: registers, answered
//! ```
//!
//! TDH.VP.ENTER runs the guest ([`guest`]) until its TD exit: a short stay in the thread of the doorbell, a longer one in
//! the thread of its CPU, so that other CPUs are served meanwhile. A pending interrupt, of which the waiting kernel tells
//! in the mailbox, ends the stay.
//!
//! Nothing here polls while nothing happens; for a moment after an answer the mailboxes are watched for the next request.

mod channel;
mod doorbell;
mod guest;
mod mailbox;
mod platform;
mod ram;
mod service;
#[cfg(test)]
mod tests;
mod timing;

use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread::JoinHandle;

pub use ram::Ram;
use service::Service;
pub use timing::Timing;

/// The I/O port of the doorbell.
pub const PORT: u16 = 0x5e8;

/// What the bridge tells whoever watches the boot.
#[derive(Debug)]
pub enum Notice {
    /// The kernel has the patch: it has said where its mailboxes are.
    Hello {
        /// How many mailboxes.
        cpus: u32,
    },
    /// Something a person should know.
    Remark(String),
    /// The kernel broke the mailboxes' rules, and is not served any more.
    Broken(String),
    /// The service cannot go on for a reason of its own.
    Failed(String),
}

/// Takes notices.
pub type Listener = Box<dyn Fn(Notice) + Send>;

/// The module, its RAM and its threads. Dropping it ends them.
pub struct Bridge {
    service: Arc<Service>,
    ends: Vec<UnixStream>,
    threads: Vec<JoinHandle<()>>,
}

impl std::fmt::Debug for Bridge {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Bridge").field("threads", &self.threads.len()).finish_non_exhaustive()
    }
}

impl Bridge {
    /// Serves a machine with this RAM and this many CPUs: SEAMCALLs that are rung for on `doorbell`, questions on `channel`.
    ///
    /// # Errors
    /// Those of mapping the RAM, duplicating a socket and starting a thread.
    pub fn start(
        ram: Ram,
        cpus: u32,
        doorbell: UnixStream,
        channel: UnixStream,
        listener: Listener,
    ) -> io::Result<Bridge> {
        let service = Arc::new(Service::new(ram, cpus, listener)?);
        let mut bridge = Bridge {
            service: Arc::clone(&service),
            ends: vec![doorbell.try_clone()?, channel.try_clone()?],
            threads: Vec::new(),
        };
        for cpu in 0..cpus {
            let service = Arc::clone(&service);
            bridge.spawn(format!("td-cpu{cpu}"), move || service::run_guests(&service, cpu))?;
        }
        let questions = Arc::clone(&service);
        bridge.spawn("module-channel".to_owned(), move || channel::serve(&questions, &channel))?;
        bridge.spawn("doorbell".to_owned(), move || doorbell::serve(&service, &doorbell))?;
        Ok(bridge)
    }

    fn spawn(&mut self, name: String, work: impl FnOnce() + Send + 'static) -> io::Result<()> {
        self.threads.push(std::thread::Builder::new().name(name).spawn(work)?);
        Ok(())
    }

    /// What calls took so far.
    pub fn timing(&self) -> Timing {
        self.service.timing()
    }
}

impl Drop for Bridge {
    fn drop(&mut self) {
        self.service.stop();
        for end in &self.ends {
            // ENOTCONN: the other side has gone.
            let _ = end.shutdown(Shutdown::Both);
        }
        for thread in self.threads.drain(..) {
            // A thread that panicked has said so.
            let _ = thread.join();
        }
    }
}
