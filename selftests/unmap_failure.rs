//! A private page of a TD cannot be unmapped: what whoever wanted it away is told, what becomes of the VM, of the page and
//! of its references, and what still works, for every answer to that question that was given or proposed.
//!
//! The expectations are those of the discussion that ended with commit ce7b5695397b ("KVM: TDX: Drop superfluous page
//! pinning in S-EPT management"). What the machine under test is expected to answer is looked up in
//! [`gmemtest::inject::policy`]: what its spec says, else what Linux of its release does.

use std::sync::OnceLock;

use gmemtest::harness::private_td::{
    Answer, Event, PrivateTd, Size, claim_module_is_sound, complaints, evidence, expected_policy, is_owned, next_frames,
};
use gmemtest::harness::{Context, TestResult};
use gmemtest::inject::seamcall::{
    ALREADY_BLOCKED, BLOCK, BUSY, EPOCH_BUSY, INVALID, REMOVE, TRACK, TRACKING_NOT_DONE, WALK_FAILED, WBINVD,
};
use gmemtest::inject::{Failure, Policy, SeamcallFault};
use gmemtest::machine::{Errno, Exit, Facility, Family, PAGE_SIZE};
use gmemtest::observe::{KernelLog, is_complaint};
use gmemtest::{claim, claim_eq, claim_ok};

gmemtest::suite! {
    /// A private page cannot be unmapped: each thing that takes memory away from a TD, against each SEAMCALL that can fail
    /// on the way, at the first, a middle and the last page of the range.
    pub static SUITE: unmap_failure needs [Vm, Guest, PrivateMemory, ModuleInjection] {
        /// Everything that is promised of one failing unmap of a 4K page: what the caller is told and at which offset,
        /// whether the VM is dead, which pages the module still has, who holds the page, whether it stays in the file,
        /// how often the kernel complains; then that a punch and the close of the file work, that the TD's root page is
        /// lost exactly when the module still has a page of it, and whether the frame is handed out again.
        /// A failure names the first of these that is not so.
        a_page_that_cannot_be_unmapped[rows()]
            allows ["SEAMCALL", "WARNING", "TDX module", "Memory failure"];

        /// The same of a 2M page.
        a_huge_page_that_cannot_be_unmapped[huge_rows()]
            allows ["SEAMCALL", "WARNING", "TDX module", "Memory failure"];
    }
}

/// What the module and KVM make of a fault, whatever the policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    /// KVM tries once more, and that works.
    Unmapped,
    /// TDH.MEM.TRACK reports a failure, but the page is removed: TRACK's result bugs the VM and is otherwise ignored.
    VmDies,
    /// The module gave the page up, and KVM was told that something failed.
    Mistrusted,
    /// The module keeps the page.
    Stuck,
}

/// The faults: busy is retried exactly once (not for WBINVD); every other status that is not zero is a failure.
const FAULTS: &[(&str, SeamcallFault, Verdict)] = &[
    ("block_fails", SeamcallFault::new(BLOCK, WALK_FAILED, Failure::Always), Verdict::Stuck),
    ("block_is_done_already", SeamcallFault::new(BLOCK, ALREADY_BLOCKED, Failure::Always), Verdict::Stuck),
    ("block_fails_after_its_work", SeamcallFault::new(BLOCK, INVALID, Failure::AfterItsWork), Verdict::Stuck),
    ("block_is_busy_once", SeamcallFault::new(BLOCK, BUSY, Failure::Once), Verdict::Unmapped),
    ("block_is_busy_twice", SeamcallFault::new(BLOCK, BUSY, Failure::Twice), Verdict::Stuck),
    // Without the new epoch, TDH.MEM.PAGE.REMOVE answers TLB_TRACKING_NOT_DONE by itself.
    ("track_fails", SeamcallFault::new(TRACK, EPOCH_BUSY, Failure::Once), Verdict::Stuck),
    ("track_fails_after_its_work", SeamcallFault::new(TRACK, EPOCH_BUSY, Failure::AfterItsWork), Verdict::VmDies),
    ("track_is_busy_once", SeamcallFault::new(TRACK, BUSY, Failure::Once), Verdict::Unmapped),
    ("track_is_busy_twice", SeamcallFault::new(TRACK, BUSY, Failure::Twice), Verdict::Stuck),
    ("remove_fails", SeamcallFault::new(REMOVE, TRACKING_NOT_DONE, Failure::Always), Verdict::Stuck),
    ("remove_fails_after_its_work", SeamcallFault::new(REMOVE, INVALID, Failure::AfterItsWork), Verdict::Mistrusted),
    ("remove_is_busy_once", SeamcallFault::new(REMOVE, BUSY, Failure::Once), Verdict::Unmapped),
    ("remove_is_busy_twice", SeamcallFault::new(REMOVE, BUSY, Failure::Twice), Verdict::Stuck),
    ("write_back_fails", SeamcallFault::new(WBINVD, INVALID, Failure::Once), Verdict::Mistrusted),
    ("write_back_is_busy", SeamcallFault::new(WBINVD, BUSY, Failure::Once), Verdict::Mistrusted),
];

/// The faults that 2M pages are tried with.
const HUGE_FAULTS: [&str; 6] =
    ["block_fails", "track_fails", "remove_fails", "remove_is_busy_once", "remove_is_busy_twice", "write_back_fails"];

/// Which mapping of the range.
const POSITIONS: [&str; 3] = ["at_the_first", "in_the_middle", "at_the_last"];

/// One claim.
#[derive(Clone, Copy)]
pub struct Row {
    event: Event,
    fault: SeamcallFault,
    verdict: Verdict,
    position: usize,
    size: Size,
}

type Rows = Vec<(&'static str, Row)>;

fn every_row(size: Size, faults: impl Fn(&str) -> bool) -> Rows {
    let mut rows = Vec::new();
    for event in Event::ALL {
        for (fault_name, fault, verdict) in FAULTS.iter().filter(|(name, ..)| faults(name)) {
            for (position, position_name) in POSITIONS.iter().enumerate() {
                let name = format!("{}_{fault_name}_{position_name}", event.name());
                rows.push((&*name.leak(), Row { event, fault: *fault, verdict: *verdict, position, size }));
            }
        }
    }
    rows
}

fn rows() -> &'static [(&'static str, Row)] {
    static ROWS: OnceLock<Rows> = OnceLock::new();
    ROWS.get_or_init(|| every_row(Size::Base, |_| true))
}

fn huge_rows() -> &'static [(&'static str, Row)] {
    static ROWS: OnceLock<Rows> = OnceLock::new();
    ROWS.get_or_init(|| every_row(Size::Huge, |name| HUGE_FAULTS.contains(&name)))
}

/// Where a page is, and who has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Page {
    /// In the file.
    InFile,
    /// In the file, with a reference a base page of this holder.
    InFileHeldBy(&'static str),
    /// In the file, marked poisoned.
    InFilePoisoned,
    /// Out of the file and free.
    Free,
    /// Out of the file, with a reference a base page of this holder: leaked.
    LeakedBy(&'static str),
    /// Out of the file and withdrawn from use because it is marked poisoned.
    Withdrawn,
}

/// What is expected of one unmap that does not work.
struct Expected {
    result: Result<(), Errno>,
    dead: bool,
    page: Page,
}

/// The pin of 6.16 to 6.18, by its holder's name.
const PIN: &str = "sept-pin";
/// A reference that keeps a page which the module has.
const STUCK: &str = "stuck-in-module";

/// The table: what each policy makes of an event whose unmap does not work.
fn failing(policy: Policy, event: Event, row: &Row, on_file: bool) -> Expected {
    use Page::{Free, InFile, InFileHeldBy, InFilePoisoned, LeakedBy, Withdrawn};
    let is = |result, dead, page| Expected { result, dead, page };
    let gone = Err(Errno::EBUSY);
    match (policy, event) {
        // The VM is dead and nobody else is told; the page goes the way of any other.
        (Policy::BugVm, Event::Convert | Event::DeleteSlot) => is(Ok(()), true, InFile),
        (Policy::BugVm, Event::Punch | Event::Close | Event::Destroy) => is(Ok(()), true, Free),
        (Policy::BugVm, Event::MemoryFailure) => is(gone, true, InFile),

        // The same, but the reference of the mapping stays. A huge folio with unexpected references cannot be split, and
        // EAGAIN says to try again what can never work.
        (Policy::PinMapped, Event::Convert) if on_file && row.size == Size::Huge => {
            is(Err(Errno::EAGAIN), true, InFileHeldBy(PIN))
        }
        (Policy::PinMapped, Event::Convert | Event::DeleteSlot) => is(Ok(()), true, InFileHeldBy(PIN)),
        (Policy::PinMapped, Event::Punch | Event::Close | Event::Destroy) => is(Ok(()), true, LeakedBy(PIN)),
        (Policy::PinMapped, Event::MemoryFailure) => is(gone, true, InFileHeldBy(PIN)),

        // The file's conversion looks at the references of what it unmapped and finds too many. The VM's ioctl knows no
        // folios and cannot look.
        (Policy::HoldOnError, Event::Convert) if on_file => is(Err(Errno::EFAULT), true, InFileHeldBy(STUCK)),
        (Policy::HoldOnError, Event::Convert | Event::DeleteSlot) => is(Ok(()), true, InFileHeldBy(STUCK)),
        (Policy::HoldOnError, Event::Punch | Event::Close | Event::Destroy) => is(Ok(()), true, LeakedBy(STUCK)),
        (Policy::HoldOnError, Event::MemoryFailure) => is(gone, true, InFileHeldBy(STUCK)),

        // The count says that the page is mapped still. References come when the page leaves the file, not before.
        (Policy::GfnCount, Event::Convert) if on_file => is(Err(Errno::EFAULT), true, InFile),
        (Policy::GfnCount, Event::Convert | Event::DeleteSlot) => is(Ok(()), true, InFile),
        (Policy::GfnCount, Event::Punch | Event::Close | Event::Destroy) => is(Ok(()), true, LeakedBy(STUCK)),
        (Policy::GfnCount, Event::MemoryFailure) => is(gone, true, InFile),

        // The conversion succeeds in name only.
        (Policy::Poison, Event::Convert | Event::DeleteSlot) => is(Ok(()), true, InFilePoisoned),
        (Policy::Poison, Event::Punch | Event::Close | Event::Destroy) => is(Ok(()), true, Withdrawn),
        (Policy::Poison, Event::MemoryFailure) => is(gone, true, InFilePoisoned),

        // Who can be told is told, and the VM lives. Where nobody can be told, the VM dies and the page is held.
        (Policy::FailUnmap, Event::Convert | Event::Punch) => is(Err(Errno::EFAULT), false, InFile),
        (Policy::FailUnmap, Event::DeleteSlot) => is(Ok(()), true, InFileHeldBy(STUCK)),
        (Policy::FailUnmap, Event::Close | Event::Destroy) => is(Ok(()), true, LeakedBy(STUCK)),
        (Policy::FailUnmap, Event::MemoryFailure) => is(gone, true, InFileHeldBy(STUCK)),
    }
}

/// What is expected of an unmap that works.
fn working(event: Event) -> Expected {
    let (result, page) = match event {
        Event::Convert | Event::DeleteSlot => (Ok(()), Page::InFile),
        Event::Punch | Event::Close | Event::Destroy => (Ok(()), Page::Free),
        // memory_failure() says EBUSY of a page that it may not take out of its file.
        Event::MemoryFailure => (Err(Errno::EBUSY), Page::InFile),
    };
    Expected { result, dead: false, page }
}

/// A run of one row.
struct Trial<'a> {
    cx: &'a Context<'a>,
    row: Row,
    policy: Policy,
    on_file: bool,
    td: PrivateTd,
    index: u64,
    /// What became of the fault, with the policy taken into account.
    verdict: Verdict,
    expected: Expected,
}

impl Trial<'_> {
    fn frame(&self) -> u64 {
        self.td.frames[self.index as usize]
    }

    /// The policy reports the failure and lets the unmap be tried again.
    fn is_reported(&self) -> bool {
        self.policy == Policy::FailUnmap
            && !self.expected.dead
            && self.expected.result.is_err()
            && self.row.event != Event::MemoryFailure
    }

    /// Whether the module must still have a mapping's frame after the event.
    fn must_be_owned(&self, index: u64) -> bool {
        if index == self.index {
            return self.verdict == Verdict::Stuck;
        }
        // Memory failure is about one page. Who reports a failure stops there, everybody else goes on.
        self.row.event == Event::MemoryFailure || (self.is_reported() && index > self.index)
    }

    /// What the call, the VM, the module and the kernel's log say.
    fn check_answer(&self, answer: Answer) -> TestResult {
        let Expected { result, dead, .. } = self.expected;
        claim_eq!(answer.result, result, "what {} was told", self.row.event.name());
        let told_where = self.on_file && self.row.event == Event::Convert && result.is_err();
        let offset = told_where.then_some(self.index * self.row.size.bytes());
        claim_eq!(answer.offset, offset, "error_offset");
        if let Some(is_dead) = self.td.is_dead() {
            claim_eq!(is_dead, dead, "the VM is dead");
        }
        for index in 0..self.td.count() {
            claim_eq!(self.td.is_owned(index)?, self.must_be_owned(index), "the module has mapping {index}");
        }
        claim_module_is_sound(&*self.td.module)
    }

    /// Where the page is and who has it, where that can be told.
    fn check_page(&self) -> TestResult {
        const KPF_HWPOISON: u64 = 1 << 19;
        if let Some(file) = self.td.file.as_ref().filter(|_| self.cx.has(Facility::Cachestat)) {
            let all = self.td.count() * self.row.size.pages();
            let left = matches!(self.expected.page, Page::InFile | Page::InFileHeldBy(_) | Page::InFilePoisoned);
            let cached = claim_ok!(file.cache_stat(0, 0)).cached;
            claim_eq!(cached, if left { all } else { 0 }, "pages in the file: all or nothing is truncated");
        }
        if !self.cx.has(Facility::PageAccount) {
            return Ok(());
        }
        let account = claim_ok!(self.cx.machine().frame_account(self.frame()));
        let split = self.row.event == Event::Convert && self.on_file && self.expected.result.is_ok();
        let pages = if split { 1 } else { self.row.size.pages() as u32 };
        let mut holders = match self.expected.page {
            Page::InFile | Page::InFilePoisoned => vec![("page-cache", pages)],
            Page::InFileHeldBy(holder) => vec![("page-cache", pages), (holder, self.row.size.pages() as u32)],
            Page::LeakedBy(holder) => vec![(holder, self.row.size.pages() as u32)],
            Page::Free | Page::Withdrawn => Vec::new(),
        };
        if self.row.event == Event::MemoryFailure {
            holders.push(("memory-failure", 1));
        }
        let poisoned = self.expected.page == Page::InFilePoisoned || self.row.event == Event::MemoryFailure;
        let flags = account.as_ref().map_or(0, |account| account.flags);
        claim_eq!(flags & KPF_HWPOISON != 0, poisoned, "frame {:#x} is marked poisoned", self.frame());
        let mut found = account.and_then(|account| account.holders).unwrap_or_default();
        found.sort_unstable();
        holders.sort_unstable();
        claim_eq!(found, holders, "who holds frame {:#x}", self.frame());
        Ok(())
    }

    /// A reported failure can be tried again: the event works now, and the guest goes on with new pages.
    fn check_second_try(&mut self) -> TestResult {
        let answer = self.td.meet(self.cx, self.row.event, self.index)?;
        claim_eq!(answer.result, Ok(()), "a second try, without the fault");
        claim_eq!(self.td.is_dead(), Some(false), "the VM is dead after the second try");
        for index in 0..self.td.count() {
            claim!(!self.td.is_owned(index)?, "the module has given mapping {index} up");
        }
        if self.row.event == Event::Punch {
            claim_eq!(self.td.accept(self.index), Exit::Done(0), "ACCEPT of a new page");
            claim_eq!(self.td.read(self.index), Exit::Done(0), "its content");
            if self.cx.has(Facility::DropCaches) {
                // A page that waits for its LRU list has a reference that would keep it after the punch.
                claim_ok!(self.cx.machine().drain_lru());
            }
            claim_eq!(self.td.meet(self.cx, Event::Punch, 0)?.result, Ok(()), "a punch");
        }
        Ok(())
    }

    /// Operations on the file do not ask whether the VM is dead.
    fn check_file_still_works(&self) -> TestResult {
        let Some(file) = &self.td.file else { return Ok(()) };
        let before = complaints(self.cx.machine());
        claim_eq!(file.punch_hole(0, self.td.len()), Ok(()), "a punch after the event");
        if self.cx.has(Facility::Cachestat) {
            claim_eq!(claim_ok!(file.cache_stat(0, 0)).cached, 0, "pages in the file after the punch");
        }
        claim_eq!(complaints(self.cx.machine()), before, "complaints after the punch: a bugged VM is silent");
        Ok(())
    }

    /// The frame is handed out again exactly when nobody keeps it.
    fn check_reuse(&self) -> TestResult {
        if !self.cx.has(Facility::PageAccount) {
            return Ok(());
        }
        let failed = self.verdict == Verdict::Stuck || self.verdict == Verdict::Mistrusted;
        let kept = match self.row.event {
            Event::MemoryFailure => true,
            _ if self.is_reported() => false,
            _ => failed && self.policy != Policy::BugVm,
        };
        // More than the pages that the TD has given back.
        let count = if self.row.size == Size::Base { 96 } else { 6 };
        let again = next_frames(self.cx, self.row.size, count)?.contains(&self.frame());
        claim_eq!(again, !kept, "frame {:#x} is handed out again", self.frame());
        if again && self.verdict == Verdict::Stuck && !self.is_reported() {
            self.cx.note(format_args!("frame {:#x} was handed out while the TDX module had it", self.frame()));
            claim!(is_owned(&*self.td.module, self.frame())?, "the module has the frame that was handed out");
        }
        Ok(())
    }
}

/// The evidence of a failing unmap, noted step by step with the result.
struct Shown {
    /// `None` where nothing failed.
    log: Option<Option<KernelLog>>,
}

impl Shown {
    fn start(cx: &Context, trial: &Trial<'_>, verdict: Verdict) -> TestResult<Shown> {
        let fails = matches!(verdict, Verdict::Stuck | Verdict::Mistrusted);
        let real = cx.machine().spec().family == Family::Kvm;
        let shown = Shown { log: fails.then(|| KernelLog::open().ok().filter(|_| real)) };
        shown.after(cx, trial, "mapped")?;
        Ok(shown)
    }

    fn after(&self, cx: &Context, trial: &Trial<'_>, what: &str) -> TestResult {
        if self.log.is_some() {
            let evidence = evidence(cx, &*trial.td.module, trial.frame())?;
            cx.note(format_args!("frame {:#x}, {what}: {evidence}", trial.frame()));
        }
        Ok(())
    }

    fn log(self, cx: &Context) {
        for line in self.log.flatten().map(|mut log| log.read()).unwrap_or_default() {
            if is_complaint(&line) {
                cx.note(format_args!("kernel log: {line}"));
            }
        }
    }
}

fn try_row(cx: &Context, row: &Row) -> TestResult {
    let policy = expected_policy(cx);
    let on_file = cx.has(Facility::InPlaceConversion);
    let td = PrivateTd::new(cx, row.size, if row.size == Size::Base { 4 } else { 3 })?;
    let index = [0, 1, td.count() - 1][row.position];
    // Whoever can report a failure reports that of TRACK too, and removes nothing.
    let reports = policy == Policy::FailUnmap;
    let verdict = if reports && row.verdict == Verdict::VmDies { Verdict::Stuck } else { row.verdict };
    let expected = match verdict {
        Verdict::Unmapped => working(row.event),
        Verdict::VmDies => Expected { dead: true, ..working(row.event) },
        Verdict::Mistrusted | Verdict::Stuck => failing(policy, row.event, row, on_file),
    };
    let mut trial = Trial { cx, row: *row, policy, on_file, td, index, verdict, expected };

    let before = if row.event == Event::MemoryFailure { 0 } else { index };
    let fault = trial.td.plan(&row.fault, index, before)?;
    let mark = complaints(cx.machine());
    let shown = Shown::start(cx, &trial, verdict)?;
    let answer = trial.td.meet(cx, row.event, index)?;
    shown.after(cx, &trial, &format!("{} returned {answer:?}", row.event.name()))?;
    claim!(
        claim_ok!(trial.td.module.fault_hits(fault)) > 0,
        "the fault has struck; {} returned {answer:?}",
        row.event.name()
    );
    trial.check_answer(answer)?;
    trial.check_page()?;
    let stuck = verdict == Verdict::Stuck && !trial.is_reported();
    let lost_at_once = stuck && row.event == Event::Destroy;
    let reports = u64::from(trial.expected.dead) + u64::from(lost_at_once);
    claim_eq!(complaints(cx.machine()), mark.map(|mark| mark + reports), "complaints of the kernel");

    claim_ok!(trial.td.module.clear_faults());
    if trial.is_reported() {
        trial.check_second_try()?;
    }
    trial.check_file_still_works()?;
    shown.after(cx, &trial, "after a punch of the whole file")?;
    trial.td.take_down();
    shown.after(cx, &trial, "after the end of the TD")?;
    shown.log(cx);
    claim_eq!(
        is_owned(&*trial.td.module, trial.td.tdr)?,
        stuck,
        "the TD's root page is lost, because TD_ASSOCIATED_PAGES_EXIST"
    );
    claim_module_is_sound(&*trial.td.module)?;
    trial.check_reuse()
}

fn a_page_that_cannot_be_unmapped(cx: &Context, row: &Row) -> TestResult {
    try_row(cx, row)
}

fn a_huge_page_that_cannot_be_unmapped(cx: &Context, row: &Row) -> TestResult {
    debug_assert_eq!(row.size.bytes(), 512 * PAGE_SIZE);
    try_row(cx, row)
}

/// The stand-alone binary.
pub fn main() -> std::process::ExitCode {
    gmemtest::cli::selftest_main(&[&SUITE])
}
