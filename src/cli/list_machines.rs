//! `gmemtest list --machines`: which machines there are, and whether they are to be had here.

use std::io::{self, Write};

use serde::Serialize;

use super::machines::{Machines, SPECS};
use crate::harness::Stop;
use crate::machine::{Family, MachineSpec};
use crate::sim::combinations::{combinations, kernel_summary, policy_summary};
use crate::sim::policy::PolicyKind;
use crate::sim::{Kernel, Profile};

#[derive(Debug, Serialize)]
struct MachineList {
    schema: &'static str,
    machines: Vec<ListedMachine>,
}

#[derive(Debug, Serialize)]
struct ListedMachine {
    spec: String,
    auto: bool,
    available: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    kind: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
    /// What the options of a simulated machine come to, the ones that were left out as well.
    #[serde(skip_serializing_if = "Option::is_none")]
    kernel: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    policy: Option<&'static str>,
}

impl ListedMachine {
    fn new(spec: &MachineSpec, machines: &Machines, auto: &[MachineSpec]) -> ListedMachine {
        let opened = (machines.open)(spec);
        let (kind, reason) = match &opened {
            Ok(_) => (None, None),
            Err(Stop::Skip { kind, reason }) => (Some(kind.word()), Some(reason.clone())),
            Err(Stop::Fail(failure)) => (None, Some(failure.message.clone())),
        };
        let profile = (spec.family == Family::Sim).then(|| Profile::from_spec(spec).ok()).flatten();
        let is_td = spec.vm_type == crate::machine::VmType::Tdx;
        ListedMachine {
            spec: spec.to_string(),
            auto: auto.contains(spec),
            available: opened.is_ok(),
            kind,
            reason,
            kernel: profile.as_ref().map(|profile| profile.kernel.name()),
            policy: profile.as_ref().filter(|_| is_td).map(|profile| profile.policy.name()),
        }
    }

    /// What the options come to that the spec leaves out.
    fn defaults(&self) -> String {
        let options = [("kernel", self.kernel), ("policy", self.policy)];
        let left_out = options.into_iter().filter_map(|(name, value)| {
            let text = format!("{name}={}", value?);
            (!self.spec.contains(&format!("{name}="))).then_some(text)
        });
        left_out.collect::<Vec<_>>().join(",")
    }

    fn state(&self) -> String {
        match (&self.kind, &self.reason) {
            (Some(kind), Some(reason)) => format!("{kind}: {reason}"),
            (None, Some(reason)) => reason.clone(),
            _ => "available".to_owned(),
        }
    }
}

fn listed(machines: &Machines) -> Vec<ListedMachine> {
    let auto = (machines.auto)();
    let plain = SPECS.iter().filter_map(|spec| spec.parse().ok());
    plain.chain(combinations()).map(|spec| ListedMachine::new(&spec, machines, &auto)).collect()
}

/// Text for people: the machines, then what their options mean.
pub(super) fn pretty(machines: &Machines, out: &mut impl Write) -> io::Result<()> {
    let list = listed(machines);
    let width = list.iter().map(|machine| machine.spec.len()).max().unwrap_or(0);
    for machine in &list {
        let auto = if machine.auto { "auto" } else { "" };
        let defaults = machine.defaults();
        let defaults = if defaults.is_empty() { defaults } else { format!("  ({defaults})") };
        writeln!(out, "{:<width$}  {auto:<4}  {}{defaults}", machine.spec, machine.state())?;
    }
    writeln!(out, "\nkernel=     what a simulated machine behaves like")?;
    for kernel in Kernel::ALL {
        writeln!(out, "  {:<14} {}", kernel.name(), kernel_summary(kernel))?;
    }
    writeln!(out, "policy=     what becomes of a private page that cannot be unmapped")?;
    for policy in PolicyKind::ALL {
        writeln!(out, "  {:<14} {}", policy.name(), policy_summary(policy))?;
    }
    writeln!(out, "frames=     struct-page (the default), or pfnmap: memory without struct page")?;
    writeln!(out, "pending=    accept (the default), or exit: a TD dies of a page that it has not accepted")?;
    writeln!(out, "kvm-bug=    forget-remove: KVM drops the notification of one zap path")
}

/// One JSON document.
pub(super) fn json(machines: &Machines, out: &mut impl Write) -> io::Result<()> {
    let list = MachineList { schema: "gmemtest-machines/2", machines: listed(machines) };
    serde_json::to_writer_pretty(&mut *out, &list).map_err(io::Error::from)?;
    writeln!(out)
}
