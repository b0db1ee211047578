//! What the kernel complained about while tests ran: its log and its taint, looked at whenever a test starts or ends.

use std::os::fd::BorrowedFd;

use crate::observe::{KernelLog, Taint, complaints};

/// A watch on the running kernel.
///
/// A complaint belongs to every test that ran when it came; with `--jobs 1` that is one test. What the kernel does later,
/// in a workqueue or after an RCU grace period, is laid at the door of whichever test runs then.
#[derive(Debug)]
pub struct Watch {
    log: Option<KernelLog>,
    taint: Taint,
}

impl Watch {
    /// Starts now. The remarks say what cannot be watched, and whether the kernel is damaged already.
    pub fn start() -> (Watch, Vec<String>) {
        let mut remarks = Vec::new();
        let log = KernelLog::open()
            .map_err(|error| {
                remarks.push(format!(
                    "the kernel log cannot be read (/dev/kmsg: {error}): complaints of the kernel go unseen but for new \
                     taint; root or CAP_SYSLOG can read it"
                ));
            })
            .ok();
        let taint = Taint::now().unwrap_or_default();
        if !taint.damage().is_clean() {
            remarks.push(format!("the kernel is tainted from before this run: {}", taint.damage()));
        }
        (Watch { log, taint }, remarks)
    }

    /// A watch on `log`, and on the taint of the running kernel.
    pub fn over(log: KernelLog) -> Watch {
        Watch { log: Some(log), taint: Taint::now().unwrap_or_default() }
    }

    /// A descriptor that polls readable when there is something to look at.
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.log.as_ref().map(KernelLog::fd)
    }

    /// The complaints since the last look.
    pub fn look(&mut self) -> Vec<String> {
        let mut found = self.log.as_mut().map(|log| complaints(&log.read())).unwrap_or_default();
        if let Ok(now) = Taint::now() {
            let new = now.since(self.taint).damage();
            if !new.is_clean() {
                found.push(format!("new taint: {new}"));
            }
            self.taint = now;
        }
        found
    }
}
