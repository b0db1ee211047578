//! The command with tests that do to their kernel what the rig has to cope with. They are for guests of the rig and do
//! nothing anywhere else.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::process::ExitCode;

use gmemtest::harness::{Context, Stop, TestResult};
use gmemtest::machine::SkipKind;

gmemtest::suite! {
    /// What a test can do to its kernel, in an order that leaves something to run after each.
    static SUITE: aid {
        /// Nothing to object to.
        passes_before;
        /// The kernel complains, and goes on.
        kernel_complains;
        /// The kernel panics.
        kernel_panics;
        /// Nothing to object to, in a fresh boot.
        passes_between;
        /// Every CPU stops taking interrupts.
        kernel_hangs;
        /// Nothing to object to, in another fresh boot.
        passes_after;
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
    for cpu in 0.. {
        let path = format!("/dev/cpu/{cpu}/msr");
        let Ok(msr) = OpenOptions::new().read(true).write(true).open(path) else { break };
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

fn main() -> ExitCode {
    gmemtest::cli::main(&[&SUITE])
}
