//! How a boot can end, and what to tell about each way.

use std::fmt;
use std::io;
use std::process::ExitStatus;
use std::time::Duration;

use super::qemu::QEMU;
use super::wire::CommandEnd;

/// How a boot ended. Everything but [`Ending::Command`] means that there is no verdict of the command.
#[derive(Debug)]
pub enum Ending {
    /// The command ran to its end.
    Command(CommandEnd),
    /// The kernel panicked, for this reason.
    Panicked(String),
    /// The machine was powered off or reset, without a word.
    PoweredOff,
    /// The init was up, and then gave no sign of life for this long.
    Hung(Duration),
    /// The init did not come up within this time, though the kernel wrote to its console.
    NeverUp(Duration),
    /// The init did not come up within this time, and the kernel wrote nothing.
    NeverUpSilent(Duration),
    /// The limit for everything passed.
    TimedOut(Duration),
    /// The init found neither of its ports.
    NoPort,
    /// The result port carried something else than results.
    Noise(String),
    /// QEMU could not be started or waited for.
    NotStarted(io::Error),
    /// QEMU ended by itself, with what it wrote to standard error.
    QemuDied {
        /// Its exit status, when it could be had.
        status: Option<ExitStatus>,
        /// Its standard error.
        stderr: String,
    },
    /// The kernel came up and does not know of the simulated TDX module.
    NoModulePatch,
    /// The kernel broke the rules of the mailboxes that its SEAMCALLs go through.
    ModuleMisused(String),
    /// The service of the simulated TDX module failed.
    ModuleFailed(String),
    /// This program was told to stop, by this signal.
    Interrupted(i32),
}

impl Ending {
    /// The machine-readable word.
    pub fn word(&self) -> &'static str {
        match self {
            Ending::Command(_) => "command-ended",
            Ending::Panicked(_) => "panic",
            Ending::PoweredOff => "reset",
            Ending::Hung(_) => "hang",
            Ending::NeverUp(_) => "boot-hang",
            Ending::NeverUpSilent(_) => "silent",
            Ending::TimedOut(_) => "timeout",
            Ending::NoPort => "no-port",
            Ending::Noise(_) => "noise",
            Ending::NotStarted(_) => "no-qemu",
            Ending::QemuDied { .. } => "qemu-died",
            Ending::NoModulePatch => "no-module-patch",
            Ending::ModuleMisused(_) => "module-misused",
            Ending::ModuleFailed(_) => "module-failed",
            Ending::Interrupted(_) => "interrupted",
        }
    }

    /// Whether the kernel under test is to blame: a test that was running has crashed. Otherwise the rig could not do
    /// its part.
    pub fn is_the_kernels(&self) -> bool {
        match self {
            Ending::Panicked(_)
            | Ending::PoweredOff
            | Ending::Hung(_)
            | Ending::NeverUp(_)
            | Ending::ModuleMisused(_) => true,
            Ending::Command(_)
            | Ending::NeverUpSilent(_)
            | Ending::TimedOut(_)
            | Ending::NoPort
            | Ending::Noise(_)
            | Ending::NotStarted(_)
            | Ending::QemuDied { .. }
            | Ending::NoModulePatch
            | Ending::ModuleFailed(_)
            | Ending::Interrupted(_) => false,
        }
    }

    /// What would mend it, where that is known.
    pub fn hint(&self) -> Option<String> {
        let text = match self {
            Ending::Panicked(reason) if reason.contains("Unable to mount root fs") => {
                "the kernel did not take the initramfs: it needs CONFIG_BLK_DEV_INITRD=y (and room: see --memory)"
            }
            Ending::Panicked(reason) if reason.contains("No working init found") => {
                "the kernel cannot run this program: it needs CONFIG_64BIT=y and CONFIG_BINFMT_ELF=y"
            }
            Ending::NeverUpSilent(_) => {
                "the kernel needs CONFIG_SERIAL_8250_CONSOLE=y to be heard, or it died at once; \
                 `gmemtest vm --append earlyprintk=ttyS0,keep` may tell"
            }
            Ending::NeverUp(_) => "raise --timeout on a slow machine; --append loglevel=7 shows how far it came",
            Ending::NoPort => {
                "the kernel needs CONFIG_VIRTIO_CONSOLE=y and CONFIG_VIRTIO_PCI=y, or CONFIG_SERIAL_8250=y; \
                 with any of them =m, give its modules with --modules"
            }
            Ending::NoModulePatch => {
                "build it with the patch for its release in scripts/kernel, or leave out --simulated-tdx"
            }
            Ending::NotStarted(error) if error.kind() == io::ErrorKind::NotFound => {
                "install QEMU (Debian: qemu-system-x86, Fedora: qemu-system-x86-core)"
            }
            Ending::QemuDied { stderr, .. } if stderr.contains("without PVH ELF Note") => {
                "give the bzImage as it was built"
            }
            Ending::QemuDied { stderr, .. } if stderr.contains("annot allocate memory") => "give less --memory",
            _ => return None,
        };
        Some(text.to_owned())
    }
}

impl fmt::Display for Ending {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Ending::Command(CommandEnd::Status(status)) => write!(f, "the command ended with exit status {status}"),
            Ending::Command(CommandEnd::Signal(signal)) => write!(f, "the command was killed by signal {signal}"),
            Ending::Command(CommandEnd::NotStarted(errno)) => {
                let errno = nix::errno::Errno::from_raw(*errno);
                write!(f, "the command could not be started in the guest: {errno}")
            }
            Ending::Panicked(reason) => write!(f, "the kernel panicked: {reason}"),
            Ending::PoweredOff => f.write_str("the machine reset or powered off without a panic"),
            Ending::Hung(limit) => write!(f, "the kernel hangs: no sign of life for {} s", limit.as_secs()),
            Ending::NeverUp(limit) => write!(f, "the kernel did not reach its init within {} s", limit.as_secs()),
            Ending::NeverUpSilent(limit) => {
                write!(
                    f,
                    "the kernel wrote nothing to its console and did not reach its init within {} s",
                    limit.as_secs()
                )
            }
            Ending::TimedOut(limit) => write!(f, "the time limit of {} s passed", limit.as_secs()),
            Ending::NoPort => f.write_str("the kernel has neither of the ports for results"),
            Ending::Noise(what) => f.write_str(what),
            Ending::NotStarted(error) if error.kind() == io::ErrorKind::NotFound => {
                write!(f, "{QEMU} is not in PATH")
            }
            Ending::NotStarted(error) => write!(f, "{QEMU} could not be started: {error}"),
            Ending::QemuDied { status, stderr } => {
                f.write_str("QEMU died")?;
                if let Some(status) = status {
                    write!(f, " ({status})")?;
                }
                match stderr.lines().rfind(|line| !line.trim().is_empty()) {
                    Some(line) => write!(f, ": {line}"),
                    None => Ok(()),
                }
            }
            Ending::NoModulePatch => f.write_str(
                "the kernel came up without a word to the simulated TDX module: it lacks the patch of scripts/kernel",
            ),
            Ending::ModuleMisused(why) => {
                write!(f, "the kernel misused the mailboxes of the simulated TDX module: {why}")
            }
            Ending::ModuleFailed(why) => write!(f, "the service of the simulated TDX module failed: {why}"),
            Ending::Interrupted(signal) => {
                let name = nix::sys::signal::Signal::try_from(*signal).map_or("a signal", |signal| signal.as_str());
                write!(f, "stopped by {name}")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_initramfs_is_named_by_its_config_symbol() {
        let ending = Ending::Panicked("VFS: Unable to mount root fs on unknown-block(0,0)".to_owned());
        assert!(ending.hint().unwrap().contains("CONFIG_BLK_DEV_INITRD"));
        assert!(ending.is_the_kernels());
    }

    #[test]
    fn a_missing_qemu_is_named_with_its_package() {
        let ending = Ending::NotStarted(io::Error::from(io::ErrorKind::NotFound));
        assert_eq!(ending.to_string(), "qemu-system-x86_64 is not in PATH");
        assert!(ending.hint().unwrap().contains("install QEMU"));
        assert!(!ending.is_the_kernels());
    }

    #[test]
    fn qemus_last_line_is_its_reason() {
        let ending =
            Ending::QemuDied { status: None, stderr: "warning: x\nqemu: could not load kernel\n\n".to_owned() };
        assert_eq!(ending.to_string(), "QEMU died: qemu: could not load kernel");
    }
}
