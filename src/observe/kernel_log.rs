//! A window on the kernel log: the records of `/dev/kmsg` from a moment on, and which of them are complaints.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

/// A reader of `/dev/kmsg` that starts at the end and returns each record once.
#[derive(Debug)]
pub struct KernelLog {
    device: File,
    last: Option<u64>,
}

/// Parts of messages that only a kernel in trouble prints. The first half is what xfstests and rcutorture look for; the
/// end of the list is what KVM prints when the TDX module refused something (arch/x86/kvm/vmx/tdx.c).
const COMPLAINTS: &[&str] = &[
    "kernel BUG at",
    "BUG:",
    "WARNING:",
    "Oops:",
    "Oops ",
    "general protection fault",
    "unable to handle",
    "KASAN:",
    "KMSAN:",
    "KFENCE:",
    "UBSAN:",
    "kmemleak:",
    "detected stall",
    "stalls on CPU",
    "possible recursive locking detected",
    "possible circular locking dependency",
    "possible irq lock inversion",
    "suspicious RCU usage",
    "bad unlock balance",
    "held lock freed",
    "sleeping function called from invalid context",
    "scheduling while atomic",
    "Bad page state",
    "Bad page map",
    "Bad rss-counter",
    "list_add corruption",
    "list_del corruption",
    "refcount_t:",
    "soft lockup",
    "hard LOCKUP",
    "blocked for more than",
    "Kernel panic",
    "Objects remaining",
    "SEAMCALL",
    "is leaked",
];

/// Lines of a report that are taken, at most.
pub const REPORT_LINES: usize = 40;

/// Messages that hold one of [`COMPLAINTS`] and mean nothing.
const HARMLESS: &[&str] = &["This means that this is a DEBUG kernel", "WARNING: CPU features"];

impl KernelLog {
    /// Opens the log at its end.
    ///
    /// # Errors
    /// What opening `/dev/kmsg` gives: EACCES or EPERM without CAP_SYSLOG where `kernel.dmesg_restrict` is set.
    pub fn open() -> io::Result<KernelLog> {
        let device = File::options().read(true).custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC).open("/dev/kmsg")?;
        nix::unistd::lseek(&device, 0, nix::unistd::Whence::SeekEnd)?;
        Ok(KernelLog { device, last: None })
    }

    /// A log that comes over another descriptor: records as `/dev/kmsg` gives them, one a read(2), and EAGAIN when there
    /// is none.
    pub fn over(device: impl Into<OwnedFd>) -> KernelLog {
        KernelLog { device: File::from(device.into()), last: None }
    }

    /// A descriptor that polls readable when there is a new record.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.device.as_fd()
    }

    /// The messages since the last call, without their continuation lines (the device's key and value pairs). When the
    /// kernel overwrote records before they were read, a message says how many.
    pub fn read(&mut self) -> Vec<String> {
        let mut messages = Vec::new();
        // The device gives one record a read(2), and EINVAL when it does not fit: LOG_LINE_MAX and some.
        let mut buffer = [0; 8192];
        loop {
            match self.device.read(&mut buffer) {
                Ok(0) => return messages,
                Ok(count) => {
                    if let Some((sequence, message)) = parse(&buffer[..count]) {
                        if let Some(last) = self.last
                            && sequence > last + 1
                        {
                            messages.push(format!("{} records of the kernel log were lost", sequence - last - 1));
                        }
                        self.last = Some(sequence);
                        messages.push(message);
                    }
                }
                // EPIPE: records were overwritten; the next read goes on with the oldest there is.
                Err(error) if error.raw_os_error() == Some(libc::EPIPE) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return messages,
            }
        }
    }
}

/// Sequence number and text of a record: `6,339,5140900,-;message` and key-value lines that start with a space.
fn parse(record: &[u8]) -> Option<(u64, String)> {
    let text = String::from_utf8_lossy(record);
    let (head, body) = text.split_once(';')?;
    let sequence = head.split(',').nth(1)?.parse().ok()?;
    Some((sequence, body.lines().next().unwrap_or_default().to_owned()))
}

/// The complaints among `messages`: those with one of the known texts, and for each the lines of its report up to the end
/// of the trace, at most [`REPORT_LINES`] of them.
pub fn complaints(messages: &[String]) -> Vec<String> {
    let mut found = Vec::new();
    let mut report_lines_left = 0;
    for message in messages {
        if is_complaint(message) {
            found.push(message.clone());
            report_lines_left = REPORT_LINES;
        } else if is_report_end(message) {
            report_lines_left = 0;
        } else if report_lines_left > 0 {
            found.push(message.clone());
            report_lines_left -= 1;
        }
    }
    found
}

/// Whether a message is the end of a complaint's report.
pub fn is_report_end(message: &str) -> bool {
    message.contains("---[ end trace")
}

/// Whether a message begins a complaint; what follows it is its report.
pub fn is_complaint(message: &str) -> bool {
    COMPLAINTS.iter().any(|text| message.contains(text)) && !HARMLESS.iter().any(|text| message.contains(text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_its_first_line() {
        let record = b"4,817,123456789,-;WARNING: CPU: 0 PID: 1 at virt/kvm/x.c:1\n SUBSYSTEM=cpu\n DEVICE=+cpu:0\n";
        assert_eq!(parse(record), Some((817, "WARNING: CPU: 0 PID: 1 at virt/kvm/x.c:1".to_owned())));
    }

    #[test]
    fn a_complaint_brings_its_report_and_noise_does_not_count() {
        let log = [
            "EXT4-fs (vda): mounted",
            "WARNING: CPU: 1 PID: 99 at virt/kvm/guest_memfd.c:7 kvm_gmem_x+0x1/0x2",
            "Call Trace:",
            "---[ end trace 0000000000000000 ]---",
            "kvm: SMP vm created",
        ]
        .map(str::to_owned);
        assert_eq!(complaints(&log), log[1..3]);
        assert!(complaints(&["This means that this is a DEBUG kernel and it is slow. WARNING:".to_owned()]).is_empty());
    }

    #[test]
    fn what_is_written_to_the_log_is_read_back_once() {
        let Ok(mut log) = KernelLog::open() else {
            return;
        };
        let text = format!("gmemtest: unit test {} of the kernel log window", std::process::id());
        // Without the newline the record would stay open for a continuation, and unseen.
        if std::fs::write("/dev/kmsg", format!("{text}\n")).is_err() {
            return;
        }
        assert!(log.read().contains(&text));
        assert!(!log.read().contains(&text));
    }
}
