//! The selftests of failed unmaps on a machine that answers otherwise than they expect: each of them must be able to fail.

#[path = "../selftests/unmap_failure.rs"]
#[expect(dead_code, reason = "main is for the stand-alone binary")]
mod unmap_failure;
#[path = "../selftests/unmap_failure_after.rs"]
#[expect(dead_code, reason = "main is for the stand-alone binary")]
mod unmap_failure_after;
#[path = "../selftests/unmap_failure_reuse.rs"]
#[expect(dead_code, reason = "main is for the stand-alone binary")]
mod unmap_failure_reuse;

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::sync::Arc;

use gmemtest::harness::{Body, Context, Seed, Stop, Suite};
use gmemtest::inject::Policy;
use gmemtest::machine::{
    Availability, Errno, Facility, GuestMemfd, HostMemory, Machine, MachineSpec, Mapping, PageAccount, Release,
    TdxModule, Vm, VmConfig,
};
use gmemtest::sim::SimMachine;

const SUITES: [&Suite; 3] = [&unmap_failure::SUITE, &unmap_failure_reuse::SUITE, &unmap_failure_after::SUITE];

/// A machine that claims to be another.
struct Posing {
    spec: MachineSpec,
    machine: SimMachine,
}

impl Machine for Posing {
    fn spec(&self) -> &MachineSpec {
        &self.spec
    }
    fn release(&self) -> Release {
        self.machine.release()
    }
    fn facility(&self, facility: Facility) -> Availability {
        self.machine.facility(facility)
    }
    fn capability(&self, capability: u32) -> Result<i32, Errno> {
        self.machine.capability(capability)
    }
    fn create_vm(&self, config: VmConfig) -> Result<Arc<dyn Vm>, Errno> {
        self.machine.create_vm(config)
    }
    fn try_vm_type(&self, vm_type: u64) -> Result<(), Errno> {
        self.machine.try_vm_type(vm_type)
    }
    fn host_memory(&self, kind: HostMemory, len: u64) -> Result<Box<dyn Mapping>, Errno> {
        self.machine.host_memory(kind, len)
    }
    fn drain_lru(&self) -> Result<(), Errno> {
        self.machine.drain_lru()
    }
    fn page_account(&self, file: &dyn GuestMemfd, offset: u64) -> Result<Option<PageAccount>, Errno> {
        self.machine.page_account(file, offset)
    }
    fn frame_account(&self, frame: u64) -> Result<Option<PageAccount>, Errno> {
        self.machine.frame_account(frame)
    }
    fn memory_failure(&self, frame: u64) -> Result<(), Errno> {
        self.machine.memory_failure(frame)
    }
    fn complaints(&self) -> Result<u64, Errno> {
        self.machine.complaints()
    }
    fn tdx_module(&self) -> Option<Arc<dyn TdxModule>> {
        self.machine.tdx_module()
    }
}

/// The claims that fail on a machine with the options `real`, when its spec says `claimed`.
fn failing(claimed: &str, real: &str, wanted: impl Fn(&str) -> bool) -> BTreeSet<String> {
    let mut failed = BTreeSet::new();
    for suite in SUITES {
        for test in suite.tests {
            for (index, claim) in test.claims(suite).into_iter().enumerate().filter(|(_, claim)| wanted(claim)) {
                let machine = SimMachine::open(&format!("sim:tdx,{real}").parse().unwrap()).unwrap();
                let machine = Posing { spec: format!("sim:tdx,{claimed}").parse().unwrap(), machine };
                let notes = RefCell::new(Vec::new());
                let cx = Context::new(&machine, &claim, Seed(1), &notes);
                let result = match test.body {
                    Body::Claim(run) => run(&cx),
                    Body::Table { run, .. } => run(&cx, index),
                };
                if matches!(result, Err(Stop::Fail(_))) {
                    failed.insert(claim);
                }
            }
        }
    }
    failed
}

/// Every claim once, with the middle page for all three positions.
fn is_wanted(claim: &str) -> bool {
    !claim.ends_with("at_the_first") && !claim.ends_with("at_the_last")
}

fn every_claim() -> BTreeSet<String> {
    let claims = SUITES.iter().flat_map(|suite| suite.tests.iter().flat_map(|test| test.claims(suite)));
    claims.filter(|claim| is_wanted(claim)).collect()
}

/// Claims that hold with every policy: a wrong policy cannot make them fail, a defect can.
fn holds_with_every_policy(claim: &str) -> bool {
    is_wanted(claim) && (!claim.starts_with("unmap_failure::") || claim.contains("busy_once"))
}

#[test]
fn every_claim_fails_on_a_machine_with_another_policy_or_with_a_defect() {
    let mut failed = BTreeSet::new();
    for policy in Policy::ALL {
        let other = if policy == Policy::BugVm { Policy::FailUnmap } else { Policy::BugVm };
        let options = |policy: Policy| format!("kernel=huge,policy={}", policy.name());
        failed.extend(failing(&options(other), &options(policy), is_wanted));
    }
    for mutant in MUTANTS {
        let killers = failing("kernel=huge", &format!("kernel=huge,mutant={mutant}"), holds_with_every_policy);
        assert!(!killers.is_empty(), "mutant={mutant} survives");
        failed.extend(killers);
    }
    let never: Vec<String> = every_claim().difference(&failed).cloned().collect();
    assert_eq!(never, Vec::<String>::new(), "claims that no wrong machine makes fail");
}

/// Defects of the model under which the claims fail that hold with every policy.
const MUTANTS: [&str; 10] = [
    "unmap-never-retries",
    "unmap-stops-at-failure",
    "split-failure-ignored",
    "split-never-restarts",
    "bug-bugs-every-vm",
    "dead-vm-answers",
    "file-checks-dead",
    "teardown-keeps-tables",
    "convert-skips-drain",
    "convert-busy-is-ebusy",
];
