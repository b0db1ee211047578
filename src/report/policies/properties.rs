//! What a policy can and cannot do.

use serde::Serialize;

use super::scenarios::{ScenarioRow, host_can_read, word};
use super::{for_each_policy, on_machine};
use crate::harness::private_td::{Event, PrivateTd, Size};
use crate::harness::{Context, Stop, TestResult};
use crate::inject::seamcall::{REMOVE, TRACKING_NOT_DONE};
use crate::inject::{Failure, SeamcallFault};
use crate::machine::{Exit, GuestOp, ModuleFault, PAGE_SIZE};
use crate::sim::SimMachine;
use crate::sim::policy::PolicyKind;
use crate::uapi::kvm::KVM_MEMORY_ATTRIBUTE_PRIVATE;

/// Whether something speaks for a policy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Judgement {
    /// It does.
    Good,
    /// It speaks against it.
    Bad,
}

/// An answer of one policy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PropertyCell {
    /// In a word or two.
    pub answer: String,
    /// Whether that is good.
    pub judgement: Judgement,
}

impl PropertyCell {
    fn new(good: bool, answer: impl Into<String>) -> PropertyCell {
        PropertyCell { answer: answer.into(), judgement: if good { Judgement::Good } else { Judgement::Bad } }
    }

    fn yes_or_no(good: bool) -> PropertyCell {
        PropertyCell::new(good, if good { "yes" } else { "no" })
    }
}

/// A question, and each policy's answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PropertyRow {
    /// The question, short.
    pub name: &'static str,
    /// How it was put to the model.
    pub measured: &'static str,
    /// One a policy.
    pub cells: Vec<PropertyCell>,
}

/// Puts every question to every policy.
///
/// # Errors
/// What the model could not do.
pub(super) fn measure(scenarios: &[ScenarioRow]) -> TestResult<Vec<PropertyRow>> {
    let safe = (0..PolicyKind::ALL.len()).map(|i| {
        let broken = scenarios.iter().filter(|row| row.cells[i].is_unsafe()).count();
        let answer = match broken {
            0 => "yes".to_owned(),
            1 => "no, 1 row".to_owned(),
            rows => format!("no, {rows} rows"),
        };
        PropertyCell::new(broken == 0, answer)
    });
    let mut rows = vec![PropertyRow {
        name: "never gives away owned memory",
        measured: "no row above has a page that is free or mapped by the host while the TDX module has it",
        cells: safe.collect(),
    }];
    for (name, measured, options, question) in QUESTIONS {
        rows.push(PropertyRow { name, measured, cells: for_each_policy(options, question)? });
    }
    rows.push(PropertyRow {
        name: "works without struct page",
        measured: "a machine with frames=pfnmap can be made",
        cells: PolicyKind::ALL.into_iter().map(works_with_pfnmap).collect(),
    });
    Ok(rows)
}

type Question = fn(&Context<'_>, &SimMachine) -> TestResult<PropertyCell>;

const QUESTIONS: [(&str, &str, &str, Question); 7] = [
    (
        "caller learns which page",
        "the error_offset of a conversion, where one 4K mapping inside a 2M folio is stuck",
        "kernel=huge",
        names_the_page,
    ),
    (
        "EAGAIN means: a user holds it",
        "no EAGAIN from converting a range, a part of which is shared, to shared and back, with a stuck page (4K, 2M) that no user holds",
        "kernel=huge",
        tells_eagain,
    ),
    (
        "no false alarm",
        "conversion to shared with a transient reference to a page, and no failure",
        "kernel=in-place",
        has_no_false_alarm,
    ),
    (
        "a second try can succeed",
        "the punch is repeated after the fault is gone: the VM lives and every page is the host's",
        "kernel=7.3",
        can_be_retried,
    ),
    (
        "survives forget-remove, punch",
        "kvm-bug=forget-remove: no frame is free while the TDX module has it",
        "kernel=7.3,kvm-bug=forget-remove",
        survives_a_punch,
    ),
    (
        "survives forget-remove, convert",
        "kvm-bug=forget-remove: the host cannot map what the TDX module has",
        "kernel=in-place,kvm-bug=forget-remove",
        survives_a_conversion,
    ),
    ("2M folios convert", "to shared and back of 2M folios without a failure", "kernel=huge", works_with_huge_folios),
];

const STUCK: u64 = 1;

fn fail_remove(td: &PrivateTd) -> TestResult {
    td.plan(&SeamcallFault::new(REMOVE, TRACKING_NOT_DONE, Failure::Always), STUCK, 0)?;
    Ok(())
}

/// One mapping of 4K in the middle of a 2M folio, all of whose mappings the guest accepted one by one, is stuck.
fn names_the_page(cx: &Context<'_>, _machine: &SimMachine) -> TestResult<PropertyCell> {
    const PAGE: u64 = 5;
    let mut td = PrivateTd::new(cx, Size::Huge, 1)?;
    // The first accept of a part splits the mapping; the folio stays whole.
    td.file()?.punch_hole(PAGE * PAGE_SIZE, PAGE_SIZE)?;
    let gpa = PrivateTd::GPA + PAGE * PAGE_SIZE;
    let accepted = td.execute(GuestOp::Accept { gpa, len: PAGE_SIZE, level: 0 });
    if accepted != Exit::Done(0) {
        return Err(Stop::fail(format!("ACCEPT of a 4K page in a 2M folio: {accepted:?}")));
    }
    td.module.add_fault(&ModuleFault::always(REMOVE, TRACKING_NOT_DONE).at(gpa))?;
    let answer = td.convert(cx, 0, td.len(), 0)?;
    Ok(match (answer.result, answer.offset) {
        (Ok(()), _) => PropertyCell::new(false, "is not told"),
        (Err(_), Some(offset)) if offset == PAGE * PAGE_SIZE => PropertyCell::new(true, "the page"),
        (Err(_), Some(_)) => PropertyCell::new(false, "the folio"),
        (Err(_), None) => PropertyCell::new(false, "no offset"),
    })
}

fn tells_eagain(cx: &Context<'_>, _machine: &SimMachine) -> TestResult<PropertyCell> {
    let mut confused = Vec::new();
    for size in [Size::Base, Size::Huge] {
        let mut td = PrivateTd::new(cx, size, 3)?;
        // A part that is shared already lets the way back look at the whole range.
        td.convert(cx, 0, size.bytes(), 0)?;
        fail_remove(&td)?;
        let there = td.meet(cx, Event::Convert, STUCK)?;
        let back = td.convert(cx, 0, td.len(), KVM_MEMORY_ATTRIBUTE_PRIVATE)?;
        confused.extend([there, back].iter().map(|answer| word(answer.result)).filter(|word| word == "EAGAIN"));
        td.module.clear_faults()?;
    }
    Ok(if confused.is_empty() { PropertyCell::yes_or_no(true) } else { PropertyCell::new(false, "no: EAGAIN") })
}

fn has_no_false_alarm(cx: &Context<'_>, machine: &SimMachine) -> TestResult<PropertyCell> {
    let td = PrivateTd::new(cx, Size::Base, 3)?;
    machine.with_world(|world| {
        let id = world.fresh_id();
        world.host.frames.get_speculative(td.frames[STUCK as usize], id, 2);
    });
    let answer = td.convert(cx, 0, td.len(), 0)?;
    let good = answer.result.is_ok();
    Ok(PropertyCell::new(good, if good { "yes".to_owned() } else { format!("no: {}", word(answer.result)) }))
}

fn can_be_retried(cx: &Context<'_>, _machine: &SimMachine) -> TestResult<PropertyCell> {
    let mut td = PrivateTd::new(cx, Size::Base, 3)?;
    fail_remove(&td)?;
    td.meet(cx, Event::Punch, STUCK)?;
    td.module.clear_faults()?;
    let again = td.meet(cx, Event::Punch, STUCK)?.result.is_ok();
    Ok(PropertyCell::yes_or_no(again && td.is_dead() == Some(false) && !td.is_owned(STUCK)?))
}

fn survives_a_punch(cx: &Context<'_>, machine: &SimMachine) -> TestResult<PropertyCell> {
    let td = PrivateTd::new(cx, Size::Base, 512)?;
    td.file()?.punch_hole(0, td.len())?;
    let free = machine.with_world(|world| world.free_frames_owned_by_module().len());
    Ok(PropertyCell::yes_or_no(free == 0))
}

fn survives_a_conversion(cx: &Context<'_>, _machine: &SimMachine) -> TestResult<PropertyCell> {
    let td = PrivateTd::new(cx, Size::Base, 512)?;
    td.convert(cx, 0, td.len(), 0)?;
    Ok(PropertyCell::yes_or_no(!(td.is_owned(0)? && host_can_read(&td, 0))))
}

fn works_with_huge_folios(cx: &Context<'_>, _machine: &SimMachine) -> TestResult<PropertyCell> {
    let mut td = PrivateTd::new(cx, Size::Huge, 2)?;
    let there = td.meet(cx, Event::Convert, 0)?.result;
    let back = td.convert(cx, 0, td.len(), KVM_MEMORY_ATTRIBUTE_PRIVATE)?.result;
    Ok(PropertyCell::yes_or_no(there.and(back).is_ok() && td.accept(0) == Exit::Done(0)))
}

fn works_with_pfnmap(policy: PolicyKind) -> PropertyCell {
    let options = format!("kernel=in-place,frames=pfnmap,policy={}", policy.name());
    PropertyCell::yes_or_no(on_machine(&options, |cx, _| PrivateTd::new(cx, Size::Base, 3)).is_ok())
}
