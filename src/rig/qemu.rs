//! QEMU: its command line, and the process with the three streams that lead into the guest.
//!
//! Kernel and initramfs are handed over as memory files, and the streams as connected sockets: nothing is written to a
//! disk, which may be full, and nothing is left behind.

use std::ffi::{CStr, OsString};
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, ChildStderr, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::resource::{Resource, getrlimit};

use super::accel::Accel;
use super::bridge::{self, Ram};
use super::wire::PORT_NAME;

/// The program that is started.
pub const QEMU: &str = "qemu-system-x86_64";

/// What every boot gets on its command line, before `--append`.
///
/// * `panic=-1` and QEMU's `-no-reboot` end a panicked machine at once.
/// * `loglevel=5` lets warnings through to the console, and keeps the chatter of the boot off the slow serial port.
/// * `earlyprintk` shows what goes wrong before the console driver is up.
/// * `8250.nr_uarts=2`: the console and the result port; probing absent ports takes time under TCG.
/// * `numa=fake=2`: two nodes, for the tests of NUMA policy; a kernel without CONFIG_NUMA_EMU passes over it.
/// * `no_timer_check`: a host that is busy delays the emulated timer beyond what that check allows (a panic, "IO-APIC +
///   timer does not work"); the kernel leaves it out by itself where it finds KVM.
const KERNEL_LINE: &str =
    "console=ttyS0 earlyprintk=ttyS0 panic=-1 loglevel=5 8250.nr_uarts=2 numa=fake=2 no_timer_check";

/// The machine to boot on.
#[derive(Clone, Debug)]
pub struct Hardware {
    /// Accelerator, and with it the CPU.
    pub accel: Accel,
    /// Number of CPUs.
    pub cpus: u32,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// What is added to the kernel's command line.
    pub append: String,
}

impl Hardware {
    /// The arguments up to the streams. `kernel` and `initrd` are paths that QEMU can open.
    pub fn arguments(&self, kernel: &Path, initrd: &Path) -> Vec<OsString> {
        let mut arguments: Vec<OsString> = Vec::new();
        // No controllers that nothing is attached to: the kernel would probe them.
        arguments.extend(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"].map(Into::into));
        let backend = if self.accel == Accel::SimulatedTdx { ",memory-backend=ram" } else { "" };
        arguments.extend(["-machine".into(), format!("q35,sata=off,smbus=off,vmport=off{backend}").into()]);
        arguments.extend(self.accel.arguments().map(Into::into));
        // Each on a socket of its own: the kernel has a fake NUMA node for each, and on Intel processors warns of threads of
        // one package on two nodes (topology_sane()).
        arguments.extend(["-smp".into(), format!("{0},sockets={0}", self.cpus).into(), "-m".into()]);
        arguments.push(format!("{}M", self.memory_mib).into());
        arguments.extend(["-kernel".into(), kernel.into(), "-initrd".into(), initrd.into(), "-append".into()]);
        let words = [Some(KERNEL_LINE.to_owned()), self.accel.kernel_line(), Some(self.append.clone())];
        let words: Vec<String> = words.into_iter().flatten().filter(|words| !words.is_empty()).collect();
        arguments.push(words.join(" ").into());
        arguments
    }
}

/// A running QEMU. Dropping it kills the process and waits for it.
#[derive(Debug)]
pub struct Qemu {
    child: Child,
    /// The console, both ways.
    pub console: Option<UnixStream>,
    /// The result port on virtio-serial.
    pub virtio: Option<UnixStream>,
    /// The result port on the second ISA serial port.
    pub serial: Option<UnixStream>,
    /// What QEMU itself has to say.
    pub stderr: Option<ChildStderr>,
    /// What the simulated TDX module is served over.
    pub module: Option<ModuleSide>,
}

/// This process's side of a machine with the simulated TDX module.
pub struct ModuleSide {
    /// The guest's RAM.
    pub ram: Ram,
    /// From the debug console.
    pub doorbell: UnixStream,
    /// The module's virtio-serial port.
    pub channel: UnixStream,
}

impl std::fmt::Debug for ModuleSide {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ModuleSide").finish_non_exhaustive()
    }
}

impl Qemu {
    /// Starts QEMU on a kernel and an initramfs.
    pub fn start(hardware: &Hardware, kernel: &[u8], initramfs: &[u8]) -> io::Result<Qemu> {
        let kernel = memory_file(c"kernel", kernel)?;
        let initramfs = memory_file(c"initramfs", initramfs)?;
        let (console, console_far) = UnixStream::pair()?;
        let (virtio, virtio_far) = UnixStream::pair()?;
        let (serial, serial_far) = UnixStream::pair()?;
        let inherited: [OwnedFd; 5] =
            [kernel.into(), initramfs.into(), console_far.into(), virtio_far.into(), serial_far.into()];
        let path = |index: usize| format!("/proc/self/fd/{}", inherited[index].as_raw_fd());
        let socket = |index: usize| format!("socket,fd={}", inherited[index].as_raw_fd());
        let mut command = Command::new(QEMU);
        command.args(hardware.arguments(Path::new(&path(0)), Path::new(&path(1))));
        command.args(stream_arguments(&socket(2), &socket(3), &socket(4)));
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut numbers = inherited.each_ref().map(AsRawFd::as_raw_fd).to_vec();
        let mut module = None;
        let mut far = None;
        if hardware.accel == Accel::SimulatedTdx {
            let ram = Ram::new(hardware.memory_mib << 20)
                .map_err(|error| io::Error::new(error.kind(), format!("the RAM file cannot be made: {error}")))?;
            let (doorbell, doorbell_far) = UnixStream::pair()?;
            let (channel, channel_far) = UnixStream::pair()?;
            let fds = [ram.file().as_raw_fd(), doorbell_far.as_raw_fd(), channel_far.as_raw_fd()];
            command.args(module_arguments(hardware.memory_mib, fds));
            numbers.extend(fds);
            module = Some(ModuleSide { ram, doorbell, channel });
            far = Some((doorbell_far, channel_far));
        }
        let mut child = spawn(&mut command, &numbers)?;
        drop(far);
        let stderr = child.stderr.take();
        Ok(Qemu { child, console: Some(console), virtio: Some(virtio), serial: Some(serial), stderr, module })
    }

    /// The exit status once the process has ended.
    pub fn ended(&mut self) -> io::Result<Option<ExitStatus>> {
        self.child.try_wait()
    }

    /// The exit status of a process that has closed its streams and is about to end.
    pub fn ending_status(&mut self, patience: Duration) -> Option<ExitStatus> {
        let deadline = Instant::now() + patience;
        while Instant::now() < deadline {
            if let Ok(Some(status)) = self.child.try_wait() {
                return Some(status);
            }
            thread::sleep(Duration::from_millis(1));
        }
        None
    }

    /// Ends the process, however it is, and waits for it.
    pub fn kill(&mut self) {
        // ESRCH: it has ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Runs QEMU with the terminal as the guest's console, until it ends. Ctrl-A X ends it.
pub fn interactive(hardware: &Hardware, kernel: &[u8], initramfs: &[u8]) -> io::Result<ExitStatus> {
    let files = [memory_file(c"kernel", kernel)?, memory_file(c"initramfs", initramfs)?];
    let path = |index: usize| format!("/proc/self/fd/{}", files[index].as_raw_fd());
    let mut command = Command::new(QEMU);
    command.args(hardware.arguments(Path::new(&path(0)), Path::new(&path(1)))).args(["-serial", "mon:stdio"]);
    let numbers = files.each_ref().map(AsRawFd::as_raw_fd);
    bind(&mut command, &numbers);
    command.status()
}

/// The console and the two forms of the result port, for the given chardev backends.
pub fn stream_arguments(console: &str, virtio: &str, serial: &str) -> Vec<String> {
    let device = format!("virtserialport,chardev=virtio,name={PORT_NAME}");
    [
        "-chardev",
        &format!("{console},id=console"),
        "-serial",
        "chardev:console",
        "-chardev",
        &format!("{serial},id=serial"),
        "-serial",
        "chardev:serial",
        "-chardev",
        &format!("{virtio},id=virtio"),
        "-device",
        "virtio-serial-pci,max_ports=3",
        "-device",
        &device,
    ]
    .map(str::to_owned)
    .into()
}

/// RAM in a file, the doorbell and the module's port, over these descriptors.
fn module_arguments(memory_mib: u64, [ram, doorbell, channel]: [RawFd; 3]) -> Vec<String> {
    let words = [
        "-object",
        &format!("memory-backend-file,id=ram,mem-path=/proc/self/fd/{ram},share=on,size={memory_mib}M"),
        "-chardev",
        &format!("socket,fd={doorbell},id=doorbell"),
        "-device",
        &format!("isa-debugcon,iobase={:#x},chardev=doorbell", bridge::PORT),
        "-chardev",
        &format!("socket,fd={channel},id=module"),
        "-device",
        &format!("virtserialport,chardev=module,name={}", crate::inject::PORT_NAME),
    ];
    words.map(str::to_owned).into()
}

/// Starts `command` in a process group of its own, so that the terminal's Ctrl-C reaches only this program.
fn spawn(command: &mut Command, inherited: &[RawFd]) -> io::Result<Child> {
    command.process_group(0);
    bind(command, inherited);
    command.spawn()
}

/// Binds `command` to the life of the thread that will start it: when that ends, for whatever reason, the kernel kills
/// the process. `inherited` stay open in it.
fn bind(command: &mut Command, inherited: &[RawFd]) {
    let inherited = inherited.to_vec();
    let parent = nix::unistd::getpid();
    let prepare = move || {
        nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL)?;
        // The parent may have died before that.
        if nix::unistd::getppid() != parent {
            return Err(io::Error::from(nix::errno::Errno::ESRCH));
        }
        for &fd in &inherited {
            // SAFETY: the descriptors belong to the caller, who keeps them open until the process is started.
            let fd = unsafe { BorrowedFd::borrow_raw(fd) };
            fcntl(fd, FcntlArg::F_SETFD(FdFlag::empty()))?;
        }
        Ok(())
    };
    // SAFETY: the closure makes system calls only (prctl, getppid, fcntl) and allocates nothing: it is async-signal-safe.
    unsafe { command.pre_exec(prepare) };
}

/// A file in memory with these contents.
fn memory_file(name: &CStr, bytes: &[u8]) -> io::Result<File> {
    let (limit, _) = getrlimit(Resource::RLIMIT_FSIZE)?;
    if bytes.len() as u64 > limit {
        let text = format!(
            "the {} of {} bytes is more than a file may have here, {limit} (RLIMIT_FSIZE, ulimit -f)",
            name.to_string_lossy(),
            bytes.len()
        );
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, text));
    }
    let mut file = File::from(memfd_create(name, MFdFlags::MFD_CLOEXEC)?);
    file.write_all(bytes)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_appended_comes_last_and_wins() {
        let hardware =
            Hardware { accel: Accel::Tcg, cpus: 2, memory_mib: 1024, append: "loglevel=7 numa=fake=2".to_owned() };
        let arguments = hardware.arguments(Path::new("k"), Path::new("i"));
        let line = arguments.last().unwrap().to_str().unwrap();
        assert!(line.starts_with("console=ttyS0") && line.ends_with("loglevel=7 numa=fake=2"), "{line}");
        assert!(arguments.windows(2).any(|pair| pair == ["-m", "1024M"]));
    }
}
