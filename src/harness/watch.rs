//! What the kernel complained about while tests ran: its log and its taint, looked at whenever a test starts or ends.

use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::blame::is_stall;
use crate::observe::{KernelLog, REPORT_LINES, Taint, TaintFile, complaints, is_complaint, is_report_end};

/// A watch on the running kernel.
///
/// A complaint belongs to the tests that ran when it came and that it names (see [`super::blame`]); where it names none, to
/// every one that ran. What the kernel does later, in a workqueue or after an RCU grace period, is laid at the door of
/// whichever tests run then.
#[derive(Debug)]
pub struct Watch {
    log: Option<KernelLog>,
    taint_file: Option<TaintFile>,
    taint: Taint,
    /// When the log last had a complaint.
    complained: Option<Instant>,
}

/// Longest pause within a report, in milliseconds: between two lines on a slow console.
const PAUSE: u8 = 250;

/// A kernel taints itself at the end of its report, which a slow console draws out: for so long the taint may be that of a
/// complaint which was seen.
const REPORT: Duration = Duration::from_secs(5);

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
        (Watch { log, taint_file: TaintFile::open().ok(), taint, complained: None }, remarks)
    }

    /// A watch on `log`, and on the taint of the running kernel.
    pub fn over(log: KernelLog) -> Watch {
        Watch { taint: Taint::now().unwrap_or_default(), taint_file: TaintFile::open().ok(), ..Watch::blind(Some(log)) }
    }

    /// A watch that sees no taint.
    fn blind(log: Option<KernelLog>) -> Watch {
        Watch { log, taint_file: None, taint: Taint::default(), complained: None }
    }

    /// A descriptor that polls readable when there is something to look at.
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.log.as_ref().map(KernelLog::fd)
    }

    /// The complaints since the last look. Where `several` tests run, and of a CPU that did not get on, the rest of a report
    /// that has begun is waited for: it says whose doing it is, and what the CPU did.
    pub fn look(&mut self, several: bool) -> Vec<String> {
        let mut found = self.log.as_mut().map(|log| complaints(&read(log, several))).unwrap_or_default();
        if !found.is_empty() {
            self.complained = Some(Instant::now());
        }
        if let Some(Ok(now)) = self.taint_file.as_ref().map(TaintFile::now) {
            found.extend(self.tainted(now, found.is_empty()));
        }
        found
    }

    /// What there is to say of the taint `now`: nothing, where the complaint that it comes with was told before.
    fn tainted(&mut self, now: Taint, alone: bool) -> Option<String> {
        let new = now.since(self.taint).damage();
        self.taint = now;
        if new.is_clean() {
            return None;
        }
        let told = self.complained.take().is_some_and(|at| at.elapsed() < REPORT);
        (!(alone && told)).then(|| format!("new taint: {new}"))
    }
}

/// The new records; where `several` tests run or a CPU did not get on, with the rest of a report that has begun, which a
/// console draws out. A complaint without a report costs one [`PAUSE`].
fn read(log: &mut KernelLog, several: bool) -> Vec<String> {
    let mut records = log.read();
    if !several && !is_stall(&records) {
        return records;
    }
    let began = Instant::now();
    while is_open(&records) && began.elapsed() < REPORT {
        let mut fds = [PollFd::new(log.fd(), PollFlags::POLLIN)];
        let more = poll(&mut fds, PollTimeout::from(PAUSE));
        let before = records.len();
        records.extend(log.read());
        if more.is_err() || records.len() == before {
            break;
        }
    }
    records
}

/// Whether the last complaint among `records` may have more to its report.
fn is_open(records: &[String]) -> bool {
    let last = records.iter().rev().take(REPORT_LINES).find(|line| is_report_end(line) || is_complaint(line));
    last.is_some_and(|line| is_complaint(line))
}

#[cfg(test)]
mod tests {
    use super::*;

    const WARNED: Taint = Taint(1 << 9);
    const DIED: Taint = Taint(1 << 9 | 1 << 7);

    #[test]
    fn a_taint_after_its_complaint_was_told_is_not_told_again() {
        let mut watch = Watch { complained: Some(Instant::now()), ..Watch::blind(None) };
        assert_eq!(watch.tainted(WARNED, true), None);
        assert!(watch.tainted(DIED, true).is_some(), "another one, for which nothing was seen");
    }

    #[test]
    fn a_taint_without_a_complaint_is_told_and_so_is_one_that_comes_with_its_own() {
        let mut watch = Watch::blind(None);
        assert!(watch.tainted(WARNED, true).is_some());
        assert_eq!(watch.tainted(WARNED, true), None, "once");
        let mut watch = Watch { complained: Some(Instant::now()), ..Watch::blind(None) };
        assert!(watch.tainted(WARNED, false).is_some());
    }
}
