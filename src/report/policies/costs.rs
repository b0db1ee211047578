//! What a policy costs while nothing fails: counted, not timed.

use serde::Serialize;

use super::for_each_policy;
use crate::harness::private_td::{Event, PrivateTd, Size};
use crate::harness::{Context, TestResult};
use crate::machine::PAGE_SIZE;
use crate::sim::SimMachine;
use crate::sim::policy::Costs;
use crate::uapi::kvm::KVM_MEMORY_ATTRIBUTE_PRIVATE;

/// A number of one policy.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Figure {
    /// The number, in the row's unit.
    pub value: f64,
}

/// Something that costs, and what each policy needs of it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct CostRow {
    /// Size of the pages.
    pub page: &'static str,
    /// When.
    pub phase: &'static str,
    /// What is counted.
    pub name: &'static str,
    /// Unit of the numbers.
    pub unit: &'static str,
    /// One a policy.
    pub cells: Vec<Figure>,
}

/// What one policy did in one size of page.
struct Measured {
    mib: f64,
    map: Costs,
    to_shared: Costs,
    to_private: Costs,
    /// Bytes of counters for each guest page, one counter a page.
    flat_bytes: f64,
    /// Bytes of counters for each guest page, with equal neighbours in one record, every other mapping there.
    ranged_bytes: f64,
    /// References besides the page cache's to each page that is mapped.
    references: f64,
}

/// Counts everything.
///
/// # Errors
/// What the model could not do.
pub(super) fn measure() -> TestResult<Vec<CostRow>> {
    let mut rows = Vec::new();
    for (page, options, size, count) in
        [("4K", "kernel=in-place", Size::Base, 1024), ("2M", "kernel=huge", Size::Huge, 4)]
    {
        let measured = for_each_policy(options, |cx, machine| convert_there_and_back(cx, machine, size, count))?;
        let mut row = |phase, name, unit, value: &dyn Fn(&Measured) -> f64| {
            let cells = measured.iter().map(|one| Figure { value: value(one) }).collect();
            rows.push(CostRow { page, phase, name, unit, cells });
        };
        let per_mib = |count: u64, one: &Measured| count as f64 / one.mib;
        row("map", "reference updates", "per MiB", &|one| per_mib(one.map.reference_updates, one));
        row("map", "counter updates", "per MiB", &|one| per_mib(one.map.counter_updates, one));
        row("to shared", "reference checks", "per MiB", &|one| per_mib(one.to_shared.reference_checks, one));
        row("to shared", "reference updates", "per MiB", &|one| per_mib(one.to_shared.reference_updates, one));
        row("to shared", "counter checks", "per MiB", &|one| per_mib(one.to_shared.counter_checks, one));
        row("to shared", "counter updates", "per MiB", &|one| per_mib(one.to_shared.counter_updates, one));
        row("to shared", "LRU drains, all CPUs", "per call", &|one| one.to_shared.lru_drains as f64);
        row("to private", "safety checks of references", "per MiB", &|one| per_mib(one.to_private.safety_checks, one));
        row("memory", "counters, one a page", "bytes/page", &|one| one.flat_bytes);
        row("memory", "counters, in ranges, every other mapping", "bytes/page", &|one| one.ranged_bytes);
        row("memory", "references to a mapped page", "per page", &|one| one.references);
    }
    Ok(rows)
}

fn difference(after: Costs, before: Costs) -> Costs {
    Costs {
        reference_updates: after.reference_updates - before.reference_updates,
        reference_checks: after.reference_checks - before.reference_checks,
        counter_updates: after.counter_updates - before.counter_updates,
        counter_checks: after.counter_checks - before.counter_checks,
        lru_drains: after.lru_drains - before.lru_drains,
        safety_checks: after.safety_checks - before.safety_checks,
    }
}

/// Maps `count` pages, converts them to shared and back to private.
fn convert_there_and_back(cx: &Context<'_>, machine: &SimMachine, size: Size, count: u64) -> TestResult<Measured> {
    let costs = || machine.with_world(|world| world.costs);
    let start = costs();
    let mut td = PrivateTd::new(cx, size, count)?;
    let mapped = costs();
    let pages = (count * size.pages()) as f64;
    let cache_refs = size.pages() as u32;
    let references = td.frames.iter().map(|frame| machine.with_world(|world| world.host.frames.refs(*frame)));
    let references = references.map(|refs| f64::from(refs - cache_refs)).sum::<f64>() / pages;
    let counters = |machine: &SimMachine| {
        machine.with_world(|world| {
            let counts = world.gmem.inodes.values().flat_map(|node| node.mapped_counts.pieces(0, node.size_pages()));
            let counts: Vec<(u64, u64, u32)> = counts.filter(|(.., count)| *count > 0).collect();
            (counts.iter().map(|(from, to, _)| to - from).sum::<u64>(), counts.len() as u64)
        })
    };
    let (counted, _) = counters(machine);
    td.meet(cx, Event::Convert, 0)?;
    let shared = costs();
    td.convert(cx, 0, td.len(), KVM_MEMORY_ATTRIBUTE_PRIVATE)?;
    let private = costs();
    // No two neighbours are alike: every other mapping is there.
    for index in (0..count).step_by(2) {
        td.accept(index);
    }
    let (_, ranges) = counters(machine);
    let record = size_of::<(u64, (u64, u32))>() as u64;
    Ok(Measured {
        mib: pages * PAGE_SIZE as f64 / f64::from(1 << 20),
        map: difference(mapped, start),
        to_shared: difference(shared, mapped),
        to_private: difference(private, shared),
        flat_bytes: (counted * size_of::<u32>() as u64) as f64 / pages,
        ranged_bytes: (ranges * record) as f64 / pages,
        references,
    })
}
