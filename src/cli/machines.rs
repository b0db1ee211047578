//! Every machine by its spec.

use crate::harness::Stop;
use crate::harness::child::Opener;
use crate::harness::known::KnownIssues;
use crate::harness::watch::Watch;
use crate::inject;
use crate::kvm::KvmMachine;
use crate::machine::{Facility, Family, Machine, MachineSpec, SkipKind, SpecError, VmType};
use crate::sim::{Profile, SimMachine};

/// Where machines come from.
#[derive(Debug, Clone, Copy)]
pub struct Machines {
    /// Opens the machine that a spec names.
    pub open: Opener,
    /// What `auto` stands for here; never empty.
    pub auto: fn() -> Vec<MachineSpec>,
    /// Starts to watch the kernel that they run on, and says what cannot be watched.
    pub watch: fn() -> (Watch, Vec<String>),
    /// The kernel bugs that their tests are known to fail on.
    pub known: fn() -> Result<KnownIssues, String>,
}

/// Every spec without options.
pub const SPECS: &[&str] =
    &["kvm:default", "kvm:sw-protected", "kvm:tdx", "sim:default", "sim:sw-protected", "sim:tdx"];

/// The machines of this program.
pub static EVERY: Machines = Machines { open, auto, watch: Watch::start, known: KnownIssues::embedded };

/// Opens a machine.
///
/// # Errors
/// A [`Stop::Skip`] when it is not to be had here, with what would provide it.
pub fn open(spec: &MachineSpec) -> Result<Box<dyn Machine>, Stop> {
    match spec.family {
        Family::Kvm => {
            let mut machine = KvmMachine::new(spec.vm_type);
            if spec.has_simulated_module() {
                if !inject::is_here() {
                    let why =
                        "the simulated TDX module is not under this kernel; boot it with `gmemtest vm --simulated-tdx`";
                    return Err(Stop::skip(SkipKind::NoHardware, why.to_owned()));
                }
                // From here on until the machine is closed: what a test plans ends with it, and what it leaves behind is
                // cleared away before the next one.
                let Some(module) = inject::module() else {
                    return Err(Stop::fail("the simulated TDX module does not answer".to_owned()));
                };
                machine = machine.with_module(spec.clone(), module);
            }
            match Stop::unless_present(Facility::Vm, &machine.facility(Facility::Vm)) {
                Some(stop) => Err(stop),
                None => Ok(Box::new(machine)),
            }
        }
        Family::Sim => match SimMachine::open(spec) {
            Ok(machine) => Ok(Box::new(machine)),
            Err(error) => Err(Stop::skip(SkipKind::Declined, error.to_string())),
        },
    }
}

/// Every VM type that the running kernel offers, `kvm:default` when it offers none, so that the reason is reported; and
/// `sim:tdx` where it does not offer TDX.
pub fn auto() -> Vec<MachineSpec> {
    let mut machines = offered_by_kvm();
    if !machines.iter().any(|spec| spec.vm_type == VmType::Tdx) {
        machines.push(MachineSpec::new(Family::Sim, VmType::Tdx));
    }
    machines
}

/// What `kvm:*` stands for: every VM type that the running kernel offers, `kvm:default` when it offers none.
fn offered_by_kvm() -> Vec<MachineSpec> {
    let mut offered: Vec<MachineSpec> =
        VmType::ALL.iter().map(|&vm_type| labelled(MachineSpec::new(Family::Kvm, vm_type))).collect();
    offered.retain(|spec| open(spec).is_ok());
    if offered.is_empty() {
        offered.push(MachineSpec::new(Family::Kvm, VmType::Default));
    }
    offered
}

/// The spec of a machine by what is under it: a TD on the simulated module is not a TD on TDX hardware.
fn labelled(spec: MachineSpec) -> MachineSpec {
    let simulated = spec.family == Family::Kvm && spec.vm_type == VmType::Tdx && inject::is_here();
    if simulated { spec.with_simulated_module() } else { spec }
}

/// The word for every VM type that the running kernel offers and nothing simulated.
pub const EVERY_KVM: &str = "kvm:*";

/// What a run is for, where nobody named a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// To see what there is to be seen.
    Survey,
    /// To judge the running kernel: what the model does is no evidence for it.
    Verdict,
}

/// The spec that `text` is, with the options that its machine knows.
fn readable(text: &str) -> Result<MachineSpec, SpecError> {
    let spec: MachineSpec = text.parse()?;
    if spec.family == Family::Sim {
        Profile::from_spec(&spec)?;
    }
    Ok(labelled(spec))
}

impl Machines {
    /// The machines that `specs` name, or when there is none those that `auto` stands for and that say something for the
    /// purpose; each once.
    ///
    /// # Errors
    /// One line that names the spec that cannot be read.
    pub fn named_for(&self, purpose: Purpose, specs: &[String]) -> Result<Vec<MachineSpec>, String> {
        if !specs.is_empty() {
            return self.named(specs);
        }
        let mut machines = (self.auto)();
        if purpose == Purpose::Verdict && machines.iter().any(|spec| spec.family == Family::Kvm) {
            machines.retain(|spec| spec.family == Family::Kvm);
        }
        Ok(machines)
    }

    /// The machines that `specs` name, `auto` when there is none; each once.
    ///
    /// # Errors
    /// One line that names the spec that cannot be read.
    pub fn named(&self, specs: &[String]) -> Result<Vec<MachineSpec>, String> {
        let mut named: Vec<MachineSpec> = Vec::new();
        let auto = ["auto".to_owned()];
        for text in if specs.is_empty() { &auto } else { specs } {
            let these = match text.as_str() {
                "auto" => (self.auto)(),
                EVERY_KVM => offered_by_kvm(),
                _ => vec![readable(text).map_err(|error| error.to_string())?],
            };
            for spec in these {
                if !named.contains(&spec) {
                    named.push(spec);
                }
            }
        }
        Ok(named)
    }
}
