//! The simulated module as tests see it: faults, calls, owners of pages.

use super::Shared;
use crate::machine::{Errno, FaultEffect, FaultWhen, ModuleCall, ModuleFault, PAGE_SIZE, PageOwner, TdxModule};
use crate::sim::tdx_module::fault::{Effect, FaultRule, Filter, When};
use crate::sim::tdx_module::trace::TraceRecord;
use crate::sim::tdx_module::{AnyLeaf, Leaf, Module, Outcome, Status};
use std::sync::Arc;

/// How many calls are kept.
const KEPT_CALLS: usize = 1 << 16;

/// Access to the module of a simulated machine.
#[derive(Debug)]
pub(super) struct SimModule {
    shared: Arc<Shared>,
}

impl SimModule {
    /// Access to the module behind `shared`, which keeps its calls from now on; `None` on a machine without one.
    pub(super) fn of(shared: &Arc<Shared>) -> Option<Arc<dyn TdxModule>> {
        let there = shared.with(|world| {
            let host = world.tdx.as_mut()?;
            host.module.trace_mut().set_capacity(KEPT_CALLS);
            Some(())
        });
        there.map(|()| Arc::new(SimModule { shared: shared.clone() }) as Arc<dyn TdxModule>)
    }

    fn with<R>(&self, action: impl FnOnce(&mut Module) -> Result<R, Errno>) -> Result<R, Errno> {
        self.shared.with(|world| action(&mut world.tdx.as_mut().ok_or(Errno::ENODEV)?.module))
    }
}

/// The module's own form of a fault.
///
/// # Errors
/// EINVAL for a number that is no leaf's.
pub fn rule_of(fault: &ModuleFault) -> Result<FaultRule, Errno> {
    let leaf = Leaf::from_number(fault.leaf).ok_or(Errno::EINVAL)?;
    let when = match fault.when {
        FaultWhen::Nth(n) => When::Nth(n),
        FaultWhen::First(n) => When::First(n),
        FaultWhen::From(n) => When::From(n),
        FaultWhen::Every(n) => When::Every(n),
        FaultWhen::Always => When::Always,
    };
    let effect = match fault.effect {
        FaultEffect::InsteadOf => Effect::InsteadOf,
        FaultEffect::After => Effect::After,
    };
    let filter = Filter { gpa: fault.gpa, level: fault.level, page: fault.page, tdr: None };
    Ok(FaultRule::new(AnyLeaf::Seamcall(leaf), Status(fault.status)).when(when).filter(filter).effect(effect))
}

/// What tests are told of a call; `None` for one that is not over.
pub fn call_of(record: &TraceRecord) -> Option<ModuleCall> {
    let (leaf, guest) = match record.leaf {
        Some(AnyLeaf::Seamcall(leaf)) => (leaf.number(), false),
        Some(AnyLeaf::Tdcall(leaf)) => (leaf.number(), true),
        None => (record.input.rax as u16, false),
    };
    if record.outcome == Outcome::Held {
        return None;
    }
    let status = record.outcome.status().map_or(0, |status| status.0);
    let input = &record.input;
    let operands = [input.rcx, input.rdx, input.r8, input.r9];
    Some(ModuleCall { seq: record.seq, processor: record.lp.0, leaf, guest, operands, status })
}

impl TdxModule for SimModule {
    fn add_fault(&self, fault: &ModuleFault) -> Result<u64, Errno> {
        let rule = rule_of(fault)?;
        self.with(|module| {
            module.faults_mut().add(rule);
            Ok(module.faults_mut().rules().len() as u64 - 1)
        })
    }

    fn fault_hits(&self, fault: u64) -> Result<u64, Errno> {
        self.with(|module| {
            let rules = module.faults_mut().rules();
            rules.get(fault as usize).map(FaultRule::hits).ok_or(Errno::ENOENT)
        })
    }

    fn clear_faults(&self) -> Result<(), Errno> {
        self.with(|module| {
            module.faults_mut().clear();
            Ok(())
        })
    }

    fn position(&self) -> Result<u64, Errno> {
        self.with(|module| Ok(module.trace().calls()))
    }

    fn calls_since(&self, seq: u64) -> Result<Vec<ModuleCall>, Errno> {
        self.with(|module| {
            let trace = module.trace();
            let kept = trace.records().next().map_or(trace.calls(), |record| record.seq);
            if seq < kept {
                return Err(Errno::ERANGE);
            }
            Ok(trace.records().filter(|record| record.seq >= seq).filter_map(call_of).collect())
        })
    }

    fn page_owner(&self, frame: u64) -> Result<PageOwner, Errno> {
        self.with(|module| {
            let info = module.page(frame * PAGE_SIZE).ok_or(Errno::ENXIO)?;
            let page_type = info.ty as u8;
            let tdr = if page_type == 0 { 0 } else { info.owner };
            Ok(PageOwner { page_type, tdr, size: info.size })
        })
    }

    fn measurement(&self, tdr: u64) -> Result<[u8; 48], Errno> {
        self.with(|module| module.td(tdr).map(|td| td.mrtd).ok_or(Errno::ENOENT))
    }

    fn violations(&self) -> Result<Vec<String>, Errno> {
        self.with(|module| Ok(module.check().iter().map(ToString::to_string).collect()))
    }
}
