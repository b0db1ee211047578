//! Which simulated machines there are: every combination of options that makes sense.

use super::policy::PolicyKind;
use super::profile::{Kernel, Profile};
use crate::machine::{Family, MachineSpec, VmType};

/// Every simulated machine, spelt out: each VM type with each `kernel=` that has it; a TD with each `policy=` besides, with
/// bare PFN ranges under the policies that work there, and with a guest that dies of pages that it has not accepted.
///
/// Left out are `kvm-bug=` and `mutant=`, which are there to be found out, and what [`Profile::from_spec`] refuses.
pub fn combinations() -> Vec<MachineSpec> {
    let mut specs = Vec::new();
    for vm_type in [VmType::Default, VmType::SwProtected] {
        specs.extend(Kernel::ALL.iter().map(|kernel| spec(vm_type, &[("kernel", kernel.name())])));
    }
    for kernel in Kernel::ALL.map(Kernel::name) {
        for policy in PolicyKind::ALL {
            specs.push(spec(VmType::Tdx, &[("kernel", kernel), ("policy", policy.name())]));
        }
        for policy in PolicyKind::without_struct_page() {
            let options = [("kernel", kernel), ("policy", policy.name()), ("frames", "pfnmap")];
            specs.push(spec(VmType::Tdx, &options));
        }
        specs.push(spec(VmType::Tdx, &[("kernel", kernel), ("pending", "exit")]));
    }
    specs.retain(|spec| Profile::from_spec(spec).is_ok());
    specs
}

fn spec(vm_type: VmType, options: &[(&str, &str)]) -> MachineSpec {
    let options = options.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    MachineSpec { options, ..MachineSpec::new(Family::Sim, vm_type) }
}

/// What a `kernel=` behaves like, in one line.
pub fn kernel_summary(kernel: Kernel) -> &'static str {
    match kernel {
        Kernel::V6_12 => "guest_memfd for VMs with private memory only, no TDX",
        Kernel::V6_16 => "TDX; every mapped private page is pinned",
        Kernel::V6_18 => "mmap and INIT_SHARED; mapped private pages still pinned",
        Kernel::V7_3 => "no pin (the default)",
        Kernel::InPlace => "conversion on the guest_memfd itself, expected in 7.4",
        Kernel::Huge => "in-place, and 2M and 1G folios that are split, merged and demoted",
    }
}

/// What a `policy=` does with a private page that cannot be unmapped, in one line.
pub fn policy_summary(policy: PolicyKind) -> &'static str {
    match policy {
        PolicyKind::BugVm => "the VM is bugged, the page is freed like any other (the default from 7.3 on)",
        PolicyKind::PinMapped => "every mapped page has a reference, which then stays (the default up to 6.18)",
        PolicyKind::HoldOnError => "references are taken when the unmap fails",
        PolicyKind::GfnCount => "guest_memfd counts mappings per GFN and keeps the pages that are still counted",
        PolicyKind::Poison => "the page is marked poisoned",
        PolicyKind::FailUnmap => "the error goes up to the caller, with the offset",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kernel_and_every_policy_is_there_and_each_machine_once() {
        let specs = combinations();
        for (i, spec) in specs.iter().enumerate() {
            assert!(!specs[..i].contains(spec), "{spec}");
        }
        for vm_type in VmType::ALL {
            for kernel in Kernel::ALL.iter().filter(|kernel| vm_type != VmType::Tdx || **kernel >= Kernel::V6_16) {
                let there =
                    |spec: &&MachineSpec| spec.vm_type == vm_type && spec.option("kernel") == Some(kernel.name());
                let policies: Vec<_> = specs.iter().filter(there).filter_map(|spec| spec.option("policy")).collect();
                let wanted = if vm_type == VmType::Tdx { &PolicyKind::ALL[..] } else { &[] };
                assert!(specs.iter().any(|spec| there(&spec)), "{vm_type:?} {}", kernel.name());
                assert!(wanted.iter().all(|policy| policies.contains(&policy.name())), "{}", kernel.name());
            }
        }
        assert!(specs.iter().all(|spec| spec.option("policy") != Some("poison") || spec.option("frames").is_none()));
    }
}
