//! `gmemtest probe`: what this kernel and this host offer, and what each missing piece would need.

use std::io::{self, Write};
use std::process::ExitCode;

use clap::{Args, ValueEnum};
use serde::Serialize;

use super::failure::Failure;
use super::machines::Machines;
use crate::harness::exit::GOOD;
use crate::harness::{Stop, unmap_failure};
use crate::machine::{Availability, Facility, Machine, MachineSpec};
use crate::observe::Environment;

/// The flags of `probe`.
#[derive(Debug, Args)]
pub(super) struct ProbeArguments {
    /// Machine to ask; all of the running kernel's when none is given.
    #[arg(long, value_name = "SPEC")]
    machine: Vec<String>,
    /// Format of the answer.
    #[arg(long, value_enum, default_value_t)]
    format: Format,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
enum Format {
    #[default]
    Pretty,
    Json,
}

#[derive(Debug, Serialize)]
struct Probe {
    schema: &'static str,
    environment: Environment,
    machines: Vec<ProbedMachine>,
}

#[derive(Debug, Serialize)]
struct ProbedMachine {
    spec: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    release: Option<String>,
    /// Why it cannot be opened.
    #[serde(skip_serializing_if = "Option::is_none")]
    absent: Option<Missing>,
    facilities: Vec<ProbedFacility>,
    /// What it does when a private page cannot be unmapped, on machines with a TDX module.
    #[serde(skip_serializing_if = "Option::is_none")]
    unmap_failure: Option<ProbedUnmap>,
}

#[derive(Debug, Serialize)]
struct ProbedUnmap {
    answer: String,
    /// What was seen.
    #[serde(skip_serializing_if = "String::is_empty")]
    evidence: String,
}

#[derive(Debug, Serialize)]
struct ProbedFacility {
    name: &'static str,
    description: &'static str,
    present: bool,
    #[serde(skip_serializing_if = "String::is_empty")]
    detail: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    missing: Option<Missing>,
}

#[derive(Debug, Serialize)]
struct Missing {
    kind: &'static str,
    why: String,
    mend: String,
}

/// Prints the answer.
pub(super) fn probe(arguments: &ProbeArguments, machines: &Machines) -> Result<ExitCode, Failure> {
    let specs = if arguments.machine.is_empty() {
        let kvm = super::machines::SPECS.iter().filter(|spec| spec.starts_with("kvm:"));
        machines.named(&kvm.map(|spec| spec.to_string()).collect::<Vec<_>>())?
    } else {
        machines.named(&arguments.machine)?
    };
    let probe = Probe {
        schema: "gmemtest-probe/1",
        environment: Environment::read(),
        machines: specs.iter().map(|spec| probed(spec, machines)).collect(),
    };
    let mut out = io::stdout().lock();
    match arguments.format {
        Format::Pretty => pretty(&probe, &mut out)?,
        Format::Json => {
            serde_json::to_writer_pretty(&mut out, &probe).map_err(io::Error::from)?;
            writeln!(out)?;
        }
    }
    Ok(ExitCode::from(GOOD))
}

fn probed(spec: &MachineSpec, machines: &Machines) -> ProbedMachine {
    let mut probed = ProbedMachine {
        spec: spec.to_string(),
        release: None,
        absent: None,
        facilities: Vec::new(),
        unmap_failure: None,
    };
    match (machines.open)(spec) {
        Ok(machine) => {
            probed.release = Some(machine.release().to_string());
            let ask = |&facility: &Facility| ProbedFacility::new(facility, machine.facility(facility));
            probed.facilities = Facility::ALL.iter().map(ask).collect();
            probed.unmap_failure = unmap_failure(&*machine);
        }
        Err(Stop::Skip { kind, reason }) => {
            probed.absent = Some(Missing { kind: kind.word(), why: reason, mend: String::new() });
        }
        Err(Stop::Fail(failure)) => {
            probed.absent = Some(Missing { kind: "error", why: failure.message, mend: String::new() });
        }
    }
    probed
}

/// Makes one unmap fail, where the machine has a TDX module that can be made to fail.
fn unmap_failure(machine: &dyn Machine) -> Option<ProbedUnmap> {
    if !machine.facility(Facility::Tdx).is_present() {
        return None;
    }
    let (answer, evidence) = match (machine.facility(Facility::ModuleInjection), unmap_failure::measure(machine)) {
        (Availability::Absent { kind, .. }, _) => (format!("not measured ({kind})"), String::new()),
        (_, None) => ("not measured (the module cannot be reached)".to_owned(), String::new()),
        (_, Some(Ok(seen))) => (seen.answer(), seen.to_string()),
        (_, Some(Err(why))) => (format!("not measured ({why})"), String::new()),
    };
    Some(ProbedUnmap { answer, evidence })
}

impl ProbedFacility {
    fn new(facility: Facility, availability: Availability) -> ProbedFacility {
        let (detail, missing) = match availability {
            Availability::Present { detail } => (detail, None),
            Availability::Absent { kind, why, mend } => (String::new(), Some(Missing { kind: kind.word(), why, mend })),
        };
        ProbedFacility {
            name: facility.name(),
            description: facility.description(),
            present: missing.is_none(),
            detail,
            missing,
        }
    }
}

fn pretty(probe: &Probe, out: &mut impl Write) -> io::Result<()> {
    let environment = &probe.environment;
    writeln!(out, "kernel {} {}", environment.kernel_release, environment.kernel_version)?;
    writeln!(out, "cpu {} x {}", environment.cpus, environment.cpu_model)?;
    for machine in &probe.machines {
        writeln!(out)?;
        match (&machine.absent, &machine.release) {
            (Some(missing), _) => writeln!(out, "{}: {}: {}", machine.spec, missing.kind, missing.why)?,
            (None, release) => writeln!(out, "{} (behaves as {})", machine.spec, release.as_deref().unwrap_or("?"))?,
        }
        for facility in &machine.facilities {
            match &facility.missing {
                None => writeln!(out, "  present  {:<22} {}", facility.name, facility.detail)?,
                Some(Missing { kind, why, mend }) => {
                    writeln!(out, "  absent   {:<22} {kind}: {why}", facility.name)?;
                    if !mend.is_empty() {
                        writeln!(out, "           {:<22} would need: {mend}", "")?;
                    }
                }
            }
        }
        if let Some(unmap) = &machine.unmap_failure {
            writeln!(out, "  unmap failure: {}", unmap.answer)?;
            if !unmap.evidence.is_empty() {
                writeln!(out, "           seen: {}", unmap.evidence)?;
            }
        }
    }
    Ok(())
}
