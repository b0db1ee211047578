//! Every policy meets every failure.

use serde::Serialize;

use super::for_each_policy;
use crate::harness::private_td::{Answer, Event, PrivateTd, Size, complaints};
use crate::harness::{Context, TestResult};
use crate::inject::seamcall::{
    BLOCK, BUSY, DEMOTE, EPOCH_BUSY, INVALID, REMOVE, TRACK, TRACKING_NOT_DONE, WALK_FAILED, WBINVD,
};
use crate::inject::{Failure, SeamcallFault};
use crate::machine::{Errno, PAGE_SIZE, Protection};
use crate::sim::SimMachine;

/// What a policy made of a failure.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Cell {
    /// What the caller was told: the name of the errno, or `0`.
    pub result: String,
    /// `error_offset`, bytes, where one was reported.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub offset: Option<u64>,
    /// Whether the VM is dead; `None` when it was closed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vm_dead: Option<bool>,
    /// The page allocator has a frame that the TDX module has too: the next owner of it meets a machine check, garbage, or
    /// TDX_PAGE_METADATA_INCORRECT.
    pub free_while_owned: bool,
    /// The host may map a page that the TDX module has.
    pub mapped_while_owned: bool,
    /// Guest pages that are lost when everything is closed.
    pub leaked_pages: u64,
    /// Whether the TD's root page is lost too.
    pub root_lost: bool,
    /// Lines that the kernel logged.
    pub complaints: u64,
}

impl Cell {
    /// Whether memory was given to somebody while the module had it.
    pub fn is_unsafe(&self) -> bool {
        self.free_while_owned || self.mapped_while_owned
    }
}

/// A failure, and what each policy made of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ScenarioRow {
    /// What belongs together.
    pub group: &'static str,
    /// What happens.
    pub name: &'static str,
    /// `kernel=` of the machine.
    pub kernel: &'static str,
    /// Size of the page.
    pub page: &'static str,
    /// The SEAMCALL that fails, and how.
    pub fault: &'static str,
    /// One a policy.
    pub cells: Vec<Cell>,
}

/// What part of the memory it is about.
#[derive(Clone, Copy)]
enum Range {
    Whole,
    /// Four base pages of the first huge one.
    Part,
}

struct Scenario {
    group: &'static str,
    name: &'static str,
    kernel: &'static str,
    size: Size,
    event: Event,
    range: Range,
    fault_name: &'static str,
    fault: SeamcallFault,
}

const REMOVE_FAILS: SeamcallFault = SeamcallFault::new(REMOVE, TRACKING_NOT_DONE, Failure::Always);
const DEMOTE_FAILS: SeamcallFault = SeamcallFault::new(DEMOTE, INVALID, Failure::Always);

const fn removal(name: &'static str, kernel: &'static str, event: Event) -> Scenario {
    let (group, fault_name, range) = ("4K page, REMOVE fails", "TDH.MEM.PAGE.REMOVE fails", Range::Whole);
    Scenario { group, name, kernel, size: Size::Base, event, range, fault_name, fault: REMOVE_FAILS }
}

const fn huge(name: &'static str, event: Event, range: Range) -> Scenario {
    let (fault_name, fault) = match range {
        Range::Whole => ("TDH.MEM.PAGE.REMOVE fails", REMOVE_FAILS),
        Range::Part => ("TDH.MEM.PAGE.DEMOTE fails", DEMOTE_FAILS),
    };
    let group = match range {
        Range::Whole => "2M page, REMOVE fails",
        Range::Part => "part of a 2M page, DEMOTE fails",
    };
    Scenario { group, name, kernel: "huge", size: Size::Huge, event, range, fault_name, fault }
}

const fn other(name: &'static str, fault: SeamcallFault) -> Scenario {
    let group = "4K punch, other SEAMCALLs";
    let (size, event, range) = (Size::Base, Event::Punch, Range::Whole);
    Scenario { group, name, kernel: "7.3", size, event, range, fault_name: name, fault }
}

const SCENARIOS: &[Scenario] = &[
    removal("convert to shared, VM ioctl", "7.3", Event::Convert),
    removal("convert to shared, file ioctl", "in-place", Event::Convert),
    removal("punch hole", "7.3", Event::Punch),
    removal("close of the file", "7.3", Event::Close),
    removal("deletion of the slot", "7.3", Event::DeleteSlot),
    removal("destruction of the VM", "7.3", Event::Destroy),
    removal("memory failure in the page", "7.3", Event::MemoryFailure),
    huge("convert to shared, file ioctl", Event::Convert, Range::Whole),
    huge("punch hole", Event::Punch, Range::Whole),
    huge("close of the file", Event::Close, Range::Whole),
    huge("convert to shared, file ioctl", Event::Convert, Range::Part),
    huge("punch hole", Event::Punch, Range::Part),
    other("BLOCK fails", SeamcallFault::new(BLOCK, WALK_FAILED, Failure::Always)),
    other("TRACK fails", SeamcallFault::new(TRACK, EPOCH_BUSY, Failure::Once)),
    other("WBINVD fails", SeamcallFault::new(WBINVD, INVALID, Failure::Once)),
    other("REMOVE is busy once", SeamcallFault::new(REMOVE, BUSY, Failure::Once)),
    other("REMOVE is busy twice", SeamcallFault::new(REMOVE, BUSY, Failure::Twice)),
];

/// Mappings of a TD, and the one that fails.
const MAPPINGS: u64 = 4;
const STUCK: u64 = 1;

/// Lets every policy meet every failure.
///
/// # Errors
/// What the model could not do.
pub(super) fn measure() -> TestResult<Vec<ScenarioRow>> {
    SCENARIOS
        .iter()
        .map(|scenario| {
            let options = format!("kernel={}", scenario.kernel);
            let cells = for_each_policy(&options, |cx, machine| meet(cx, machine, scenario))?;
            let Scenario { group, name, kernel, size, fault_name, .. } = *scenario;
            let page = if size == Size::Base { "4K" } else { "2M" };
            Ok(ScenarioRow { group, name, kernel, page, fault: fault_name, cells })
        })
        .collect()
}

/// The errno as a word.
pub(super) fn word(result: Result<(), Errno>) -> String {
    result.map_or_else(|errno| format!("{errno:?}"), |()| "0".to_owned())
}

/// Pages that are not to be had any more: held, or taken out of circulation.
pub(super) fn pages_away(machine: &SimMachine) -> u64 {
    machine.with_world(|world| world.host.pages_in_use() + world.host.allocator.retired())
}

fn meet(cx: &Context<'_>, machine: &SimMachine, scenario: &Scenario) -> TestResult<Cell> {
    let before = pages_away(machine);
    let mut td = PrivateTd::new(cx, scenario.size, MAPPINGS)?;
    let part = 4 * PAGE_SIZE;
    let index = match scenario.range {
        Range::Whole => STUCK,
        Range::Part => 0,
    };
    let mapped_before = if scenario.event == Event::MemoryFailure { 0 } else { index };
    td.plan(&scenario.fault, index, mapped_before)?;
    let mark = complaints(machine).unwrap_or(0);
    let answer = match (scenario.range, scenario.event) {
        (Range::Part, Event::Convert) => td.convert(cx, part, part, 0)?,
        (Range::Part, _) => Answer { result: td.file()?.punch_hole(part, part), offset: None },
        (Range::Whole, event) => td.meet(cx, event, index)?,
    };
    let vm_dead = td.is_dead();
    let owned = td.is_owned(index)?;
    let mapped_while_owned = owned && host_can_read(&td, index * scenario.size.bytes());
    let complaints = complaints(machine).unwrap_or(0) - mark;
    td.take_down();
    let root_lost = crate::harness::private_td::is_owned(&*td.module, td.tdr)?;
    let free_while_owned = machine.with_world(|world| !world.free_frames_owned_by_module().is_empty());
    let leaked_pages = (pages_away(machine) - before).saturating_sub(u64::from(root_lost));
    Ok(Cell {
        result: word(answer.result),
        offset: answer.offset,
        vm_dead,
        free_while_owned,
        mapped_while_owned,
        leaked_pages,
        root_lost,
        complaints,
    })
}

/// Whether the host can read a byte of the file.
pub(super) fn host_can_read(td: &PrivateTd, at: u64) -> bool {
    let Some(file) = &td.file else { return false };
    let Ok(mapping) = file.map(td.len(), 0, Protection::SHARED_RW) else { return false };
    mapping.read_u64(at).is_ok()
}
