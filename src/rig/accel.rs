//! Which of QEMU's accelerators can give the kernel under test a KVM of its own.

use std::fmt;

use kvm_ioctls::Kvm;
use serde::{Deserialize, Serialize};

/// What `--accel` asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum AccelChoice {
    /// KVM when the host's KVM can nest, TCG otherwise.
    Auto,
    /// The host's KVM; refused when it cannot nest.
    Kvm,
    /// QEMU's interpreter, with an AMD CPU that has SVM: works everywhere.
    Tcg,
}

/// What QEMU is started with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Accel {
    /// `-accel kvm -cpu host`.
    Kvm,
    /// `-accel tcg,thread=multi -cpu max,+svm,+npt`.
    Tcg,
    /// TCG, with a CPU and a kernel command line that take the kernel's TDX code to the simulated module.
    SimulatedTdx,
}

/// A CPU that TDX code runs on without the erratum of partial writes (which would need MOVDIR64B), and without SVM. Below 48
/// address bits, KVM would leave pages of the shared EPT behind.
const TDX_CPU: &str = "max,-svm,vendor=GenuineIntel,family=6,model=173,stepping=1,xlevel=0x80000008,phys-bits=52";

impl Accel {
    /// QEMU's arguments.
    pub fn arguments(self) -> [&'static str; 4] {
        match self {
            Accel::Kvm => ["-accel", "kvm", "-cpu", "host"],
            Accel::Tcg => ["-accel", "tcg,thread=multi", "-cpu", "max,+svm,+npt"],
            Accel::SimulatedTdx => ["-accel", "tcg,thread=multi", "-cpu", TDX_CPU],
        }
    }

    /// What the accelerator wants on the kernel's command line.
    pub fn kernel_line(self) -> Option<String> {
        (self == Accel::SimulatedTdx).then(|| format!("kvm_intel.tdx=1 tdx_sim={:#x}", super::bridge::PORT))
    }
}

impl fmt::Display for Accel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Accel::Kvm => "KVM",
            Accel::Tcg => "TCG",
            Accel::SimulatedTdx => "TCG and the simulated TDX module",
        })
    }
}

/// The accelerator for a choice together with the simulated TDX module, and why it is that.
pub fn choose_with_simulated_tdx(choice: AccelChoice) -> Result<(Accel, String), String> {
    match choice {
        AccelChoice::Tcg => Ok((Accel::SimulatedTdx, "asked for".to_owned())),
        AccelChoice::Auto => Ok((Accel::SimulatedTdx, "--simulated-tdx goes with TCG only".to_owned())),
        AccelChoice::Kvm => Err("--simulated-tdx: goes with TCG only; leave out --accel kvm".to_owned()),
    }
}

/// The accelerator for a choice, and the reason where there was something to decide; the error says why `kvm` cannot be had.
pub fn choose(choice: AccelChoice) -> Result<(Accel, String), String> {
    match (choice, nesting()) {
        (AccelChoice::Tcg, _) => Ok((Accel::Tcg, "asked for".to_owned())),
        (AccelChoice::Kvm, Ok(())) => Ok((Accel::Kvm, "asked for".to_owned())),
        (AccelChoice::Auto, Ok(())) => Ok((Accel::Kvm, "the host's KVM can nest".to_owned())),
        (AccelChoice::Auto, Err(why)) => Ok((Accel::Tcg, why)),
        (AccelChoice::Kvm, Err(why)) => Err(format!("--accel kvm: {why}; use --accel tcg")),
    }
}

/// Whether the host's KVM offers its guests SVM or VMX: KVM_GET_SUPPORTED_CPUID has the bit only when `nested` is on.
fn nesting() -> Result<(), String> {
    let kvm = Kvm::new().map_err(|error| format!("/dev/kvm cannot be opened ({})", nix_text(error.errno())))?;
    let cpuid = kvm
        .get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES)
        .map_err(|error| format!("KVM_GET_SUPPORTED_CPUID fails ({})", nix_text(error.errno())))?;
    let register = |function: u32| cpuid.as_slice().iter().find(|entry| entry.function == function).map(|e| e.ecx);
    let vmx = register(1).is_some_and(|ecx| ecx & (1 << 5) != 0);
    let svm = register(0x8000_0001).is_some_and(|ecx| ecx & (1 << 2) != 0);
    match vmx || svm {
        true => Ok(()),
        false => Err("the host's KVM does not nest (its guests get neither VMX nor SVM)".to_owned()),
    }
}

fn nix_text(errno: i32) -> &'static str {
    nix::errno::Errno::from_raw(errno).desc()
}
