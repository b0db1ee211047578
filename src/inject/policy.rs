//! Which answer to a failed unmap the machine under test is expected to give: the one place where that is looked up.

use crate::machine::{Family, Machine, Release};

/// An answer to "a private page cannot be unmapped".
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Policy {
    /// The VM is bugged and the page freed like any other: Linux 6.19 and later (commit ce7b5695397b).
    BugVm,
    /// Every mapped page has a reference more, which a page that cannot be unmapped keeps: Linux 6.16 to 6.18.
    PinMapped,
    /// References are taken when the unmap fails (posted, June 2025).
    HoldOnError,
    /// guest_memfd counts the mappings of every GFN (proposed).
    GfnCount,
    /// The page is marked poisoned (proposed).
    Poison,
    /// The error goes up to who asked for the unmap (proposed).
    FailUnmap,
}

impl Policy {
    /// Every policy.
    pub const ALL: [Policy; 6] =
        [Policy::BugVm, Policy::PinMapped, Policy::HoldOnError, Policy::GfnCount, Policy::Poison, Policy::FailUnmap];

    /// The name, as in the machine option `policy=`.
    pub fn name(self) -> &'static str {
        match self {
            Policy::BugVm => "bug-vm",
            Policy::PinMapped => "pin-mapped",
            Policy::HoldOnError => "hold-on-error",
            Policy::GfnCount => "gfn-count",
            Policy::Poison => "poison",
            Policy::FailUnmap => "fail-unmap",
        }
    }

    /// The policy of a name.
    pub fn from_name(name: &str) -> Option<Policy> {
        Policy::ALL.into_iter().find(|policy| policy.name() == name)
    }
}

/// The first release that does not pin mapped private pages (commit ce7b5695397b).
const UNPINNED: Release = Release::series(6, 19);

/// The answer that a machine is expected to give: what its spec asks for, else what Linux of its release does.
pub fn expected_policy(machine: &dyn Machine) -> Policy {
    let spec = machine.spec();
    let asked = spec.option("policy").and_then(Policy::from_name);
    match asked {
        Some(policy) if spec.family == Family::Sim => policy,
        _ if machine.release() < UNPINNED => Policy::PinMapped,
        _ => Policy::BugVm,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sim::SimMachine;
    use crate::sim::policy::PolicyKind;

    #[test]
    fn the_spec_decides_and_otherwise_the_release() {
        for (spec, policy) in [
            ("sim:tdx", Policy::BugVm),
            ("sim:tdx,kernel=6.16", Policy::PinMapped),
            ("sim:tdx,kernel=6.18", Policy::PinMapped),
            ("sim:tdx,kernel=huge", Policy::BugVm),
            ("sim:tdx,kernel=6.18,policy=poison", Policy::Poison),
            ("sim:tdx,policy=gfn-count", Policy::GfnCount),
        ] {
            let machine = SimMachine::open(&spec.parse().unwrap()).unwrap();
            assert_eq!(expected_policy(&machine), policy, "{spec}");
        }
    }

    #[test]
    fn names_are_those_of_the_machine_option() {
        assert_eq!(Policy::ALL.map(Policy::name), PolicyKind::ALL.map(PolicyKind::name));
    }
}
