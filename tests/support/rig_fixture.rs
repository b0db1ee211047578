//! The command with tests that do to their kernel what the rig has to cope with. They are for guests of the rig and do
//! nothing anywhere else.
//!
//! Called by the name of QEMU it is one that has no guest: it runs the guest's command here, and speaks to the rig as the
//! guest's init does. What is bisected then are files whose names for themselves say good, bad, flaky or dead.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::FromRawFd;
use std::os::unix::fs::FileExt;
use std::process::{Command, ExitCode};

use gmemtest::harness::{Context, OneCpu, Stop, TestResult};
use gmemtest::machine::SkipKind;
use gmemtest::rig::task::{Duty, TASK_PATH, Task};
use gmemtest::rig::wire::{CommandEnd, Frame, Hello};

gmemtest::suite! {
    /// What a test can do to its kernel, in an order that leaves something to run after each.
    static SUITE: aid {
        /// Nothing to object to.
        passes_before;
        /// The kernel complains, and goes on.
        kernel_complains;
        /// The kernel panics.
        kernel_panics;
        /// Nothing to object to, for a while.
        takes_its_time;
        /// Nothing to object to, in a fresh boot.
        passes_between;
        /// Every CPU stops taking interrupts.
        kernel_hangs;
        /// Nothing to object to, in another fresh boot.
        passes_after;
        /// The kernel, which is a file here, does not call itself bad; a flaky one is bad every third time.
        kernel_is_good;
    }
}

/// MSR_IA32_APICBASE, and the bit without which the local APIC delivers nothing.
const APIC_BASE: u64 = 0x1b;
const APIC_ENABLED: u64 = 1 << 11;

fn in_the_rig() -> TestResult {
    match fs::read_to_string("/proc/1/cmdline") {
        Ok(line) if line.starts_with("/init") => Ok(()),
        _ => Err(Stop::skip(SkipKind::Declined, "is for a guest of the rig: it would take this machine down")),
    }
}

fn passes_before(_: &Context) -> TestResult {
    Ok(())
}

fn passes_between(_: &Context) -> TestResult {
    Ok(())
}

fn takes_its_time(_: &Context) -> TestResult {
    std::thread::sleep(std::time::Duration::from_secs(2));
    Ok(())
}

fn passes_after(_: &Context) -> TestResult {
    Ok(())
}

fn kernel_complains(_: &Context) -> TestResult {
    in_the_rig()?;
    fs::write("/dev/kmsg", "<4>WARNING: CPU: 0 PID: 1 at tests/support/rig_fixture.rs:1\n")
        .map_err(|error| Stop::fail(format!("/dev/kmsg: {error}")))
}

fn kernel_panics(_: &Context) -> TestResult {
    in_the_rig()?;
    fs::write("/proc/sysrq-trigger", "c").map_err(|error| Stop::fail(format!("/proc/sysrq-trigger: {error}")))?;
    Err(Stop::fail("the kernel went on"))
}

fn kernel_hangs(_: &Context) -> TestResult {
    in_the_rig()?;
    let _stays = OneCpu::stay();
    let own = nix::sched::sched_getcpu().map_err(|errno| Stop::fail(format!("sched_getcpu(2): {errno}")))?;
    let path = |cpu: usize| format!("/dev/cpu/{cpu}/msr");
    let others = (0..).take_while(|&cpu| fs::exists(path(cpu)).is_ok_and(|is| is)).filter(|&cpu| cpu != own);
    // Its own is the last: the others are reached by interrupts, which its local APIC sends.
    for cpu in others.chain([own]) {
        let open = OpenOptions::new().read(true).write(true).open(path(cpu));
        let msr = open.map_err(|error| Stop::fail(format!("MSRs of CPU {cpu}: {error}")))?;
        let mut value = [0; 8];
        let done = msr
            .read_exact_at(&mut value, APIC_BASE)
            .and_then(|()| msr.write_all_at(&(u64::from_le_bytes(value) & !APIC_ENABLED).to_le_bytes(), APIC_BASE));
        done.map_err(|error| Stop::fail(format!("MSR of CPU {cpu}: {error}")))?;
    }
    loop {
        std::hint::spin_loop();
    }
}

fn kernel_is_good(_: &Context) -> TestResult {
    let Ok(kernel) = std::env::var("RIG_FIXTURE_KERNEL") else {
        return Err(Stop::skip(SkipKind::Declined, "is for the tests of bisect"));
    };
    let third = |path: String| {
        let count = fs::read_to_string(&path).map_or(0, |text| text.len());
        fs::write(&path, "x".repeat(count + 1)).is_ok() && count % 3 == 2
    };
    let fails =
        kernel.contains("bad") || kernel.contains("flaky") && std::env::var("RIG_FIXTURE_COUNTER").is_ok_and(third);
    if fails { Err(Stop::fail(format!("{kernel} calls itself bad"))) } else { Ok(()) }
}

/// What follows `flag` on the command line.
fn argument(arguments: &[String], flag: &str) -> Option<String> {
    arguments.windows(2).find(|pair| pair[0] == flag).map(|pair| pair[1].clone())
}

/// The task in an initramfs.
fn task(initramfs: &[u8]) -> Option<Task> {
    let mut rest = initramfs;
    loop {
        let mut reader = cpio::NewcReader::new(rest).ok()?;
        if reader.entry().is_trailer() {
            return None;
        }
        if reader.entry().name() == TASK_PATH.trim_start_matches('/') {
            let mut text = Vec::new();
            reader.read_to_end(&mut text).ok()?;
            return serde_json::from_slice(&text).ok();
        }
        rest = reader.finish().ok()?;
    }
}

/// QEMU without a guest.
fn pose_as_qemu(arguments: &[String]) -> Option<()> {
    let image = fs::read(argument(arguments, "-kernel")?).ok()?;
    let kernel = String::from_utf8_lossy(image.get(0x300..0x340)?).trim_end_matches('\0').to_owned();
    if kernel.contains("dead") {
        return None;
    }
    let Duty::Run(words) = task(&fs::read(argument(arguments, "-initrd")?).ok()?)?.duty else { return None };
    let number = arguments.iter().filter_map(|word| word.strip_prefix("socket,fd=")).find_map(|rest| {
        let (number, id) = rest.split_once(',')?;
        (id == "id=virtio").then_some(number)
    });
    let number: i32 = number?.parse().ok()?;
    // SAFETY: the rig hands this descriptor over on the command line, and nothing else here uses it.
    let mut port = unsafe { File::from_raw_fd(number) };
    let hello = Hello {
        release: kernel.clone(),
        version: String::new(),
        port: "virtio".to_owned(),
        uptime_ms: 0,
        kvm: true,
        cpus: 1,
        taint: 0,
        complaints: Vec::new(),
    };
    Frame::Hello(hello).write(&mut port).ok()?;
    let output = Command::new("/proc/self/exe").args(words).env("RIG_FIXTURE_KERNEL", kernel).output().ok()?;
    for chunk in output.stdout.chunks(4096) {
        Frame::Stdout(chunk.to_vec()).write(&mut port).ok()?;
    }
    Frame::Stderr(output.stderr).write(&mut port).ok()?;
    Frame::End(CommandEnd::Status(output.status.code().unwrap_or(1))).write(&mut port).ok()?;
    port.flush().ok()
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    if arguments[0].ends_with("qemu-system-x86_64") {
        return if pose_as_qemu(&arguments).is_some() { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    }
    gmemtest::cli::main(&[&SUITE])
}
