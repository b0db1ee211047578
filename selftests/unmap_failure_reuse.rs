//! Who gets the page of a TD that could not be unmapped, and what they find: the next TD, the host, the other VMs.

use std::collections::BTreeSet;
use std::process::ExitCode;

use gmemtest::harness::private_td::{Event, PrivateTd, Size, claim_module_is_sound, expected_policy, is_owned};
use gmemtest::harness::{Context, OneCpu, TestResult};
use gmemtest::inject::seamcall::{AUG, METADATA_INCORRECT, REMOVE, TRACKING_NOT_DONE};
use gmemtest::inject::{Failure, Policy, SeamcallFault};
use gmemtest::machine::{
    Errno, Exit, Facility, Family, GuestOp, HostFault, HostMemory, MemoryRegion, PAGE_SIZE, Protection,
};
use gmemtest::{claim, claim_eq, claim_matches, claim_ok, skip};

gmemtest::suite! {
    /// The frame of a page that could not be unmapped: who gets it next, and what that does to them.
    pub static SUITE: unmap_failure_reuse needs [Vm, Guest, PrivateMemory, ModuleInjection] {
        /// A frame that the kernel handed out although the module has it (bug-vm: a window that commit ce7b5695397b
        /// knows of and accepts) is refused by the module for the next TD, TDX_PAGE_METADATA_INCORRECT, and that bugs the
        /// next VM, which did nothing wrong. Every other policy keeps the frame, and the next TD lives.
        next_td_is_bugged_exactly_when_it_gets_the_frame[SIZES] allows ["SEAMCALL", "WARNING"];

        /// The host that gets the frame finds zeroes in it and its own stores, never what the guest wrote. A failure means
        /// that private memory leaks through a bug.
        host_that_gets_the_frame_finds_no_secret needs [Pagemap] allows ["SEAMCALL", "WARNING"];

        /// A conversion that "succeeds" although the page is the module's shows the host no secret; with `poison` the
        /// host is killed by SIGBUS, BUS_MCEERR_AR; where the conversion was refused the page is private as before, and an
        /// access is SIGBUS, BUS_ADRERR.
        host_access_after_the_conversion[SIZES] needs [InPlaceConversion] allows ["SEAMCALL", "WARNING"];

        /// Whatever cannot be unmapped in one TD, another TD goes on: its memory keeps its content, it gets new pages and
        /// loses them.
        other_td_is_not_affected[EVENTS] allows ["SEAMCALL", "WARNING", "Memory failure"];

        /// One page that is stuck in the module costs the TD's root page and itself; S-EPT pages, TDCS and vCPU pages come
        /// back (in-flight discussion: TDR reclaim needs a child count of 0, every other page only TEARDOWN).
        only_the_root_page_is_lost_with_the_stuck_page[EVENTS]
            allows ["SEAMCALL", "WARNING", "Memory failure"];

        /// Without a failure nothing is lost at all.
        nothing_is_lost_without_a_failure[EVENTS] allows ["Memory failure"];
    }
}

const SIZES: &[(&str, Size)] = &[("4k", Size::Base), ("2m", Size::Huge)];

const EVENTS: &[(&str, Event)] = &[
    ("convert", Event::Convert),
    ("punch", Event::Punch),
    ("close", Event::Close),
    ("delete_slot", Event::DeleteSlot),
    ("destroy", Event::Destroy),
    ("memory_failure", Event::MemoryFailure),
];

/// The mapping that cannot be unmapped.
const STUCK: u64 = 1;

/// TDH.MEM.PAGE.REMOVE of the stuck mapping fails from now on.
fn fail_remove(td: &PrivateTd) -> TestResult {
    td.plan(&SeamcallFault::new(REMOVE, TRACKING_NOT_DONE, Failure::Always), STUCK, 0)?;
    Ok(())
}

fn next_td_is_bugged_exactly_when_it_gets_the_frame(cx: &Context, &size: &Size) -> TestResult {
    let policy = expected_policy(cx);
    let mut td = PrivateTd::new(cx, size, 3)?;
    // The next TD is there, with the S-EPT tables of its range and most of its file not allocated.
    let mut next = PrivateTd::new(cx, size, 1)?;
    let more = 64;
    let vm = claim_ok!(next.vm.as_ref().ok_or("closed"));
    let file = gmemtest::harness::private_td::create_file(cx, &**vm, size, more * size.bytes())?;
    let gpa = next.gpa(0) + (1 << 30);
    claim_ok!(vm.set_memory_region(&MemoryRegion::new(1, gpa, more * size.bytes()).bound_to(&*file, 0)));
    if !cx.has(Facility::InPlaceConversion) {
        let size = more * size.bytes();
        claim_ok!(vm.set_memory_attributes(&gmemtest::machine::MemoryAttributes {
            address: gpa,
            size,
            attributes: 8,
            flags: 0
        }));
    }
    let accept = |i: u64| GuestOp::Accept { gpa: gpa + i * size.bytes(), len: size.bytes(), level: size.level() };
    claim_eq!(next.execute(accept(0)), Exit::Done(0), "the first page of the next TD");

    fail_remove(&td)?;
    // A page that fails in the middle of a range that is punched is the last but one that is freed.
    let answer = td.meet(cx, Event::Punch, STUCK)?;
    claim_eq!(answer.result.is_err(), policy == Policy::FailUnmap, "the punch {answer:?}");
    claim_ok!(td.module.clear_faults());
    let frame = td.frames[STUCK as usize];
    claim!(is_owned(&*td.module, frame)?, "the module has frame {frame:#x}");

    let mark = claim_ok!(td.module.position());
    let mut exit = Exit::Done(0);
    for i in 1..more {
        exit = next.execute(accept(i));
        if exit != Exit::Done(0) {
            break;
        }
    }
    let calls = claim_ok!(td.module.calls_since(mark));
    let refused = calls.iter().find(|call| call.leaf == AUG && !call.guest && call.operands[2] / PAGE_SIZE == frame);
    if policy != Policy::BugVm {
        claim_eq!(refused, None, "the frame was offered to the module for the next TD");
        claim_eq!(exit, Exit::Done(0), "the next TD's run");
        claim_eq!(next.is_dead(), Some(false), "the next VM is dead");
        return claim_module_is_sound(&*td.module);
    }
    let Some(refused) = refused else {
        if cx.has(Facility::PageAccount) {
            gmemtest::fail!("frame {frame:#x} is free and was not among the {more} that the next TD got");
        }
        skip!(Declined, "the allocator did not hand frame {frame:#x} out among {more}");
    };
    claim_eq!(refused.status, METADATA_INCORRECT, "what the module said of the frame that it has");
    claim_matches!(exit, Exit::Failed { errno: Errno::EIO, .. }, "KVM_RUN of the next TD");
    claim_eq!(next.is_dead(), Some(true), "the next VM is dead");
    claim_module_is_sound(&*td.module)
}

fn host_that_gets_the_frame_finds_no_secret(cx: &Context) -> TestResult {
    let policy = expected_policy(cx);
    // A real kernel gives out first what was freed on the same CPU, and has its own ideas of the order.
    let real = cx.machine().spec().family == Family::Kvm;
    let _here = real.then(OneCpu::stay);
    let mut td = PrivateTd::new(cx, Size::Base, 3)?;
    fail_remove(&td)?;
    td.meet(cx, Event::Close, STUCK)?;
    let frame = td.frames[STUCK as usize];
    let len = if real { 4096 } else { 64 } * PAGE_SIZE;
    let memory = claim_ok!(cx.machine().host_memory(HostMemory::Anonymous, len));
    let mut found = None;
    for at in (0..len).step_by(PAGE_SIZE as usize) {
        claim_ok!(memory.write_u64(at + 8, at));
        if claim_ok!(memory.frame(at)) == frame {
            found = Some(at);
            break;
        }
    }
    if found.is_none() && real && policy == Policy::BugVm {
        skip!(Declined, "the allocator did not hand frame {frame:#x} out among {} pages", len / PAGE_SIZE);
    }
    claim_eq!(found.is_some(), policy == Policy::BugVm, "the host got frame {frame:#x}");
    let Some(at) = found else { return Ok(()) };
    claim!(is_owned(&*td.module, frame)?, "the module has frame {frame:#x} still");
    claim_eq!(memory.read_u64(at), Ok(0), "the first bytes, where the guest's secret was");
    claim_eq!(memory.read_u64(at + 8), Ok(at), "the host's own store");
    Ok(())
}

fn host_access_after_the_conversion(cx: &Context, &size: &Size) -> TestResult {
    let policy = expected_policy(cx);
    let mut td = PrivateTd::new(cx, size, 3)?;
    fail_remove(&td)?;
    td.meet(cx, Event::Convert, STUCK)?;
    let mapping = claim_ok!(td.file()?.map(td.len(), 0, Protection::SHARED_RW));
    let at = STUCK * size.bytes();
    let sigbus = |code| Err(HostFault { signal: libc::SIGBUS, code, offset: at });
    const BUS_ADRERR: i32 = 2;
    const BUS_MCEERR_AR: i32 = 4;
    let expected = match policy {
        Policy::Poison => sigbus(BUS_MCEERR_AR),
        Policy::HoldOnError | Policy::GfnCount | Policy::FailUnmap => sigbus(BUS_ADRERR),
        // The split of the huge folio failed, and so did the conversion.
        Policy::PinMapped if size == Size::Huge => sigbus(BUS_ADRERR),
        Policy::BugVm | Policy::PinMapped => {
            let value = claim_ok!(mapping.read_u64(at), "the page is shared now");
            claim!(value != PrivateTd::SECRET, "the host reads what the guest wrote: {value:#x}");
            return Ok(());
        }
    };
    claim_eq!(mapping.read_u64(at), expected, "a load of the host");
    Ok(())
}

fn other_td_is_not_affected(cx: &Context, &event: &Event) -> TestResult {
    let mut td = PrivateTd::new(cx, Size::Base, 3)?;
    let mut other = PrivateTd::new(cx, Size::Base, 3)?;
    fail_remove(&td)?;
    td.meet(cx, event, STUCK)?;
    // The fault is planned for an address that both TDs have: it is the first one's alone.
    claim_ok!(td.module.clear_faults());
    claim_eq!(other.is_dead(), Some(false), "the other VM is dead");
    for i in 0..3 {
        claim_eq!(other.read(i), Exit::Done(PrivateTd::SECRET), "page {i} of the other TD");
    }
    claim_eq!(other.write(0, 1), Exit::Done(0), "a store of the other TD");
    claim_eq!(other.meet(cx, Event::Punch, 0)?.result, Ok(()), "a punch in the other TD's file");
    claim_eq!(other.is_dead(), Some(false), "the other VM is dead after the punch");
    for i in 0..3 {
        claim!(!other.is_owned(i)?, "page {i} of the other TD is the host's");
    }
    Ok(())
}

/// The frames that the host gave to the module for a TD besides guest memory.
fn control_frames(td: &PrivateTd, mark: u64) -> TestResult<BTreeSet<u64>> {
    /// TDH.MNG.ADDCX, TDH.VP.ADDCX, TDH.MNG.CREATE and TDH.VP.CREATE name the page in RCX, TDH.MEM.SEPT.ADD in R8.
    const IN_RCX: [u16; 4] = [1, 4, 9, 10];
    const SEPT_ADD: u16 = 3;
    let calls = claim_ok!(td.module.calls_since(mark));
    let given = calls.iter().filter(|call| !call.guest && call.status == 0).filter_map(|call| match call.leaf {
        leaf if IN_RCX.contains(&leaf) => Some(call.operands[0]),
        SEPT_ADD => Some(call.operands[2]),
        _ => None,
    });
    Ok(given.map(|address| address / PAGE_SIZE).collect())
}

/// What the module has of a TD that is gone, of the frames that it was given.
fn lost(cx: &Context, event: Event, failure: bool) -> TestResult<(PrivateTd, BTreeSet<u64>)> {
    let module = gmemtest::harness::private_td::module_of(cx)?;
    let mark = claim_ok!(module.position());
    let mut td = PrivateTd::new(cx, Size::Base, 3)?;
    let mut frames = control_frames(&td, mark)?;
    claim!(frames.len() > 10, "control and S-EPT pages: {}", frames.len());
    frames.extend(&td.frames);
    if failure {
        fail_remove(&td)?;
    }
    td.meet(cx, event, STUCK)?;
    td.take_down();
    let mut lost = BTreeSet::new();
    for frame in frames {
        if is_owned(&*td.module, frame)? {
            lost.insert(frame);
        }
    }
    Ok((td, lost))
}

fn only_the_root_page_is_lost_with_the_stuck_page(cx: &Context, &event: &Event) -> TestResult {
    // With `fail-unmap`, the close of the file is what fails in the end.
    let (td, lost) = lost(cx, event, true)?;
    claim_eq!(lost, BTreeSet::from([td.tdr, td.frames[STUCK as usize]]), "frames that the module keeps");
    cx.note(format_args!("{} frames are lost", lost.len()));
    claim_module_is_sound(&*td.module)
}

fn nothing_is_lost_without_a_failure(cx: &Context, &event: &Event) -> TestResult {
    let (_td, lost) = lost(cx, event, false)?;
    claim_eq!(lost, BTreeSet::new(), "frames that the module keeps");
    Ok(())
}

/// The stand-alone binary.
pub fn main() -> ExitCode {
    gmemtest::cli::selftest_main(&[&SUITE])
}
