//! After a private page of a TD could not be unmapped: how often the kernel complains, what still works, what a conversion
//! that failed has changed, and whether EAGAIN, "somebody holds a page, try again", is said of a page that nobody but the
//! TDX module has.

use std::process::ExitCode;

use gmemtest::harness::private_td::{
    Answer, Event, PrivateTd, Size, claim_module_is_sound, complaints, expected_policy,
};
use gmemtest::harness::{Context, TestResult};
use gmemtest::inject::seamcall::{BLOCK, DEMOTE, INVALID, REMOVE, TRACKING_NOT_DONE, WALK_FAILED};
use gmemtest::inject::{Failure, Policy, SeamcallFault};
use gmemtest::machine::{
    Errno, Exit, Facility, GuestOp, HoldKind, HostFault, MemoryAttributes, MemoryRegion, ModuleFault, PAGE_SIZE,
    Protection,
};
use gmemtest::uapi::kvm::KVM_MEMORY_ATTRIBUTE_PRIVATE;
use gmemtest::{claim, claim_eq, claim_matches, claim_ok};

gmemtest::suite! {
    /// What is left after a private page could not be unmapped.
    pub static SUITE: unmap_failure_after needs [Vm, Guest, PrivateMemory, ModuleInjection] {
        /// However many pages fail, the kernel complains once for the VM: a VM that is bugged already fails silently
        /// (KVM_BUG_ON()). `fail-unmap` does not take it for a bug, and stops at the first.
        many_failures_are_one_complaint allows ["SEAMCALL", "WARNING"];

        /// Each VM has its own complaint.
        two_vms_are_two_complaints allows ["SEAMCALL", "WARNING"];

        /// After one page the unmap goes on with the rest of the range: every other page is the host's.
        rest_of_the_range_is_unmapped[LEAVES] allows ["SEAMCALL", "WARNING"];

        /// A dead VM answers EIO to every ioctl on it and on its vCPUs.
        dead_vm_answers_eio_to_every_ioctl allows ["SEAMCALL", "WARNING"];

        /// Its file does not care: allocation, punch, stat and, where it exists, conversion work; a zap still makes its
        /// SEAMCALLs.
        file_of_a_dead_vm_works_and_still_unmaps allows ["SEAMCALL", "WARNING"];

        /// A conversion that was refused has changed no page's attribute. The pages before the one that failed are
        /// unmapped and their content is lost all the same: it cannot be undone. The pages behind it are as they were.
        refused_conversion_keeps_attributes_and_loses_the_pages_before_it allows ["SEAMCALL", "WARNING"];

        /// Converting the range back to private after the failure: where a reference keeps the page, EAGAIN at the page,
        /// which no retry can cure; elsewhere it works.
        converting_back_is_eagain_exactly_where_references_keep_the_page needs [InPlaceConversion]
            allows ["SEAMCALL", "WARNING"];

        /// A shared page of the range that user space holds is EAGAIN at its own offset, whatever else failed, and is not
        /// taken for the one that the module has.
        held_neighbour_is_eagain_and_the_stuck_page_is_not[HOLDS] needs [InPlaceConversion, HoldGet, HoldPin]
            allows ["SEAMCALL", "WARNING"];

        /// A new page waits in a per-CPU batch for its LRU list and has a reference more meanwhile. It is no reason for
        /// EAGAIN: the batches are drained before a page is called unsafe.
        page_in_an_lru_batch_is_not_eagain needs [InPlaceConversion];

        /// A conversion that races with a punch, another conversion, the guest's and the host's accesses while a page is
        /// held now and then returns 0, EAGAIN or ENOMEM, and nothing else; afterwards the TD is well and the module sound.
        racing_conversions_are_ok_eagain_or_enomem[RACES] needs [InPlaceConversion, HoldGet];

        /// Conversion or punch of a part of a 2M page splits the mapping first. A split that fails is reported under every
        /// policy, EIO, with nothing converted or punched and the VM bugged: it comes before anything that cannot be
        /// undone.
        failing_split_is_eio_and_changes_nothing[SPLITS] allows ["SEAMCALL", "WARNING"];

        /// TDH.MEM.PAGE.DEMOTE that is interrupted is started again, with no trace of it.
        interrupted_split_is_started_again;
    }
}

const LEAVES: &[(&str, SeamcallFault)] = &[
    ("block", SeamcallFault::new(BLOCK, WALK_FAILED, Failure::Always)),
    ("remove", SeamcallFault::new(REMOVE, TRACKING_NOT_DONE, Failure::Always)),
];

const HOLDS: &[(&str, HoldKind)] = &[("get", HoldKind::Get), ("pin", HoldKind::Pin)];

/// What a conversion races with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rival {
    /// Punch hole of the same range.
    Punch,
    /// Conversion of the same range the other way.
    Convert,
    /// Loads of the guest.
    Guest,
    /// Loads of the host.
    Host,
}

const RACES: &[(&str, Rival)] = &[
    ("punch", Rival::Punch),
    ("second_conversion", Rival::Convert),
    ("guest_access", Rival::Guest),
    ("host_access", Rival::Host),
];

/// What needs the split, and which leaf of it fails.
const SPLITS: &[(&str, (Event, u16))] = &[
    ("convert_block", (Event::Convert, BLOCK)),
    ("convert_demote", (Event::Convert, DEMOTE)),
    ("punch_block", (Event::Punch, BLOCK)),
    ("punch_demote", (Event::Punch, DEMOTE)),
];

/// The mapping that cannot be unmapped.
const STUCK: u64 = 1;
const PRIVATE: u64 = KVM_MEMORY_ATTRIBUTE_PRIVATE;
const BUS_ADRERR: i32 = 2;

const REMOVE_FAILS: SeamcallFault = SeamcallFault::new(REMOVE, TRACKING_NOT_DONE, Failure::Always);

/// A TD with `count` pages, the second of which TDH.MEM.PAGE.REMOVE does not give up.
fn stuck(cx: &Context, count: u64) -> TestResult<PrivateTd> {
    let td = PrivateTd::new(cx, Size::Base, count)?;
    td.plan(&REMOVE_FAILS, STUCK, 0)?;
    Ok(td)
}

fn many_failures_are_one_complaint(cx: &Context) -> TestResult {
    let reports = expected_policy(cx) == Policy::FailUnmap;
    let mut td = PrivateTd::new(cx, Size::Base, 4)?;
    let fault = claim_ok!(td.module.add_fault(&ModuleFault::always(REMOVE, TRACKING_NOT_DONE)));
    let mark = complaints(cx.machine());
    let answer = td.meet(cx, Event::Punch, 0)?;
    claim_eq!(answer.result, if reports { Err(Errno::EFAULT) } else { Ok(()) }, "the punch");
    claim_eq!(claim_ok!(td.module.fault_hits(fault)), if reports { 1 } else { 4 }, "pages that failed");
    claim_eq!(complaints(cx.machine()), mark.map(|mark| mark + u64::from(!reports)), "complaints");
    Ok(())
}

fn two_vms_are_two_complaints(cx: &Context) -> TestResult {
    let mut tds = [stuck(cx, 3)?, PrivateTd::new(cx, Size::Base, 3)?];
    tds[0].plan(&REMOVE_FAILS, STUCK, 0)?;
    let mark = complaints(cx.machine());
    for td in &mut tds {
        // Whoever reports errors cannot report this one.
        td.meet(cx, Event::Close, STUCK)?;
        claim_eq!(td.is_dead(), Some(true), "the VM is dead");
    }
    claim_eq!(complaints(cx.machine()), mark.map(|mark| mark + 2), "complaints");
    Ok(())
}

fn rest_of_the_range_is_unmapped(cx: &Context, fault: &SeamcallFault) -> TestResult {
    let mut td = PrivateTd::new(cx, Size::Base, 40)?;
    for index in [3, 20] {
        td.plan(fault, index, 0)?;
    }
    td.meet(cx, Event::Close, 0)?;
    for index in 0..40 {
        claim_eq!(td.is_owned(index)?, [3, 20].contains(&index), "the module has page {index}");
    }
    Ok(())
}

fn dead_vm_answers_eio_to_every_ioctl(cx: &Context) -> TestResult {
    let mut td = stuck(cx, 3)?;
    td.meet(cx, Event::DeleteSlot, STUCK)?;
    let vm = claim_ok!(td.vm.clone().ok_or("closed"));
    let eio = Err(Errno::EIO);
    claim_eq!(vm.capability(10), Err(Errno::EIO), "KVM_CHECK_EXTENSION");
    claim_eq!(vm.set_memory_region(&MemoryRegion::new(3, 1 << 33, PAGE_SIZE)), eio, "KVM_SET_USER_MEMORY_REGION2");
    let attributes = MemoryAttributes { address: 1 << 33, size: PAGE_SIZE, attributes: 0, flags: 0 };
    claim_eq!(vm.set_memory_attributes(&attributes), eio, "KVM_SET_MEMORY_ATTRIBUTES");
    claim_eq!(vm.create_guest_memfd(PAGE_SIZE, 0).err(), Some(Errno::EIO), "KVM_CREATE_GUEST_MEMFD");
    claim_eq!(vm.create_vcpu(1).err(), Some(Errno::EIO), "KVM_CREATE_VCPU");
    claim_matches!(td.read(0), Exit::Failed { errno: Errno::EIO, .. }, "KVM_RUN");
    let vcpu = claim_ok!(td.vcpu.as_mut().ok_or("closed"));
    claim_eq!(vcpu.pre_fault(PrivateTd::GPA, PAGE_SIZE, 0).result, eio, "KVM_PRE_FAULT_MEMORY");
    Ok(())
}

fn file_of_a_dead_vm_works_and_still_unmaps(cx: &Context) -> TestResult {
    let mut td = PrivateTd::new(cx, Size::Base, 4)?;
    // Memory failure, as the unmap of one page that nobody can be told of, leaves the others mapped.
    cx.require(Facility::HwPoison)?;
    td.plan(&REMOVE_FAILS, STUCK, 0)?;
    td.meet(cx, Event::MemoryFailure, STUCK)?;
    claim_eq!(td.is_dead(), Some(true), "the VM is dead");
    let mark = claim_ok!(td.module.position());
    let file = td.file()?;
    claim_ok!(file.stat());
    claim_eq!(file.allocate(0, td.len()), Ok(()), "allocation");
    if cx.has(Facility::InPlaceConversion) {
        claim_eq!(td.convert(cx, 3 * PAGE_SIZE, PAGE_SIZE, 0)?.result, Ok(()), "conversion of the last page");
        claim!(!td.is_owned(3)?, "the last page is the host's");
    }
    claim_eq!(file.punch_hole(0, td.len()), Ok(()), "a punch");
    let calls = claim_ok!(td.module.calls_since(mark));
    let removed = calls.iter().filter(|call| call.leaf == REMOVE && call.status == 0).count();
    claim_eq!(removed, 3, "pages that TDH.MEM.PAGE.REMOVE took away from the dead VM");
    claim_eq!(claim_ok!(file.cache_stat(0, 0)).cached, 0, "pages in the file");
    Ok(())
}

/// Whether the host is refused each page of the file because it is private, seen by a load.
fn private_pages(td: &PrivateTd) -> TestResult<Vec<bool>> {
    let mapping = claim_ok!(td.file()?.map(td.len(), 0, Protection::SHARED_RW));
    let pages = (0..td.count()).map(|i| i * PAGE_SIZE);
    let is_private = |at| {
        let sigbus = HostFault { signal: libc::SIGBUS, code: BUS_ADRERR, offset: at };
        mapping.read_u64(at) == Err(sigbus)
    };
    Ok(pages.map(is_private).collect())
}

fn refused_conversion_keeps_attributes_and_loses_the_pages_before_it(cx: &Context) -> TestResult {
    let policy = expected_policy(cx);
    let mut td = stuck(cx, 4)?;
    let answer = td.meet(cx, Event::Convert, STUCK)?;
    claim_ok!(td.module.clear_faults());
    if cx.has(Facility::InPlaceConversion) {
        let refused = answer.result.is_err();
        claim_eq!(private_pages(&td)?, [refused; 4], "pages that are private after {answer:?}");
    }
    if policy != Policy::FailUnmap {
        return Ok(());
    }
    claim_eq!(answer.result, Err(Errno::EFAULT), "the conversion");
    for index in [2, 3] {
        claim_eq!(td.read(index), Exit::Done(PrivateTd::SECRET), "page {index}, behind the one that failed");
    }
    claim!(!td.is_owned(0)?, "page 0 is the host's");
    claim_eq!(td.accept(0), Exit::Done(0), "page 0 has to be accepted anew, which works because it is private");
    claim_eq!(td.read(0), Exit::Done(0), "the content of page 0 is lost");
    Ok(())
}

fn converting_back_is_eagain_exactly_where_references_keep_the_page(cx: &Context) -> TestResult {
    let policy = expected_policy(cx);
    let mut td = stuck(cx, 3)?;
    td.meet(cx, Event::Convert, STUCK)?;
    claim_ok!(td.module.clear_faults());
    let back = td.convert(cx, 0, td.len(), PRIVATE)?;
    let eagain = Answer { result: Err(Errno::EAGAIN), offset: Some(STUCK * PAGE_SIZE) };
    let expected = match policy {
        // The pin of the mapping looks like anybody's reference.
        Policy::PinMapped => eagain,
        // Nothing to do: the range is private still.
        Policy::HoldOnError | Policy::GfnCount | Policy::FailUnmap => Answer { result: Ok(()), offset: None },
        Policy::BugVm | Policy::Poison => Answer { result: Ok(()), offset: None },
    };
    claim_eq!(back, expected, "conversion of the range to private");
    claim_eq!(private_pages(&td)?, [expected.result.is_ok(); 3], "pages that are private");
    Ok(())
}

fn held_neighbour_is_eagain_and_the_stuck_page_is_not(cx: &Context, &kind: &HoldKind) -> TestResult {
    let policy = expected_policy(cx);
    let td = PrivateTd::new(cx, Size::Base, 4)?;
    let held = 0;
    claim_eq!(td.convert(cx, held, PAGE_SIZE, 0)?.result, Ok(()), "conversion of page 0 to shared");
    let mapping = claim_ok!(td.file()?.map(td.len(), 0, Protection::SHARED_RW));
    claim_ok!(mapping.write_u64(held, 7));
    let hold = claim_ok!(mapping.hold(held, PAGE_SIZE, kind));

    td.plan(&REMOVE_FAILS, 2, 0)?;
    let refused = Answer { result: Err(Errno::EFAULT), offset: Some(2 * PAGE_SIZE) };
    let expected = match policy {
        Policy::HoldOnError | Policy::GfnCount | Policy::FailUnmap => refused,
        Policy::BugVm | Policy::PinMapped | Policy::Poison => Answer { result: Ok(()), offset: None },
    };
    claim_eq!(td.convert(cx, 0, td.len(), 0)?, expected, "conversion to shared: page 0 is held, and page 2 stuck");
    claim_ok!(td.module.clear_faults());

    let eagain = |index: u64| Answer { result: Err(Errno::EAGAIN), offset: Some(index * PAGE_SIZE) };
    claim_eq!(td.convert(cx, 0, td.len(), PRIVATE)?, eagain(0), "conversion to private with page 0 held");
    claim_eq!(mapping.read_u64(held), Ok(7), "page 0 is shared still");
    drop(hold);
    let back = td.convert(cx, 0, td.len(), PRIVATE)?;
    let expected = match policy {
        // A reference that keeps the stuck page is taken for that of a user who will let go.
        Policy::PinMapped | Policy::HoldOnError => eagain(2),
        _ => Answer { result: Ok(()), offset: None },
    };
    claim_eq!(back, expected, "conversion to private with nothing held");
    Ok(())
}

fn page_in_an_lru_batch_is_not_eagain(cx: &Context) -> TestResult {
    let td = PrivateTd::new(cx, Size::Base, 2)?;
    claim_eq!(td.convert(cx, 0, td.len(), 0)?.result, Ok(()), "to shared");
    claim_eq!(td.file()?.punch_hole(0, td.len()), Ok(()), "a punch");
    let mapping = claim_ok!(td.file()?.map(td.len(), 0, Protection::SHARED_RW));
    claim_ok!(mapping.write_u64(0, 1));
    if cx.has(Facility::PageAccount) {
        let account = claim_ok!(cx.machine().page_account(td.file()?, 0));
        let waiting = account.and_then(|account| account.held_by("lru-batch"));
        claim_matches!(waiting, None | Some(1), "references of an LRU batch to a page that was just allocated");
    }
    let back = td.convert(cx, 0, td.len(), PRIVATE)?;
    claim_eq!(back, Answer { result: Ok(()), offset: None }, "to private");
    Ok(())
}

fn racing_conversions_are_ok_eagain_or_enomem(cx: &Context, &rival: &Rival) -> TestResult {
    const ROUNDS: u32 = 200;
    if rival == Rival::Guest {
        cx.require(Facility::LazyAccept)?;
    }
    let mut td = PrivateTd::new(cx, Size::Base, 4)?;
    let len = td.len();
    let file = claim_ok!(td.file.clone().ok_or("closed"));
    claim_eq!(td.convert(cx, 0, len, 0)?.result, Ok(()), "to shared");
    let mapping = claim_ok!(file.map(len, 0, Protection::SHARED_RW));
    let hold = claim_ok!(mapping.hold(2 * PAGE_SIZE, PAGE_SIZE, HoldKind::Get));
    let first = td.convert(cx, 0, len, PRIVATE)?;
    claim_eq!(first.result, Err(Errno::EAGAIN), "to private with a page held");
    drop(hold);

    let allowed = [Ok(()), Err(Errno::EAGAIN), Err(Errno::ENOMEM)];
    let convert = |attributes| file.convert(0, len, attributes).map_err(|error| error.errno);
    let unexpected = std::thread::scope(|scope| {
        let rivals = scope.spawn(|| {
            let mut wrong = Vec::new();
            for round in 0..ROUNDS {
                match rival {
                    Rival::Punch => drop(file.punch_hole(0, len)),
                    Rival::Convert => wrong.push(convert(if round % 2 == 0 { 0 } else { PRIVATE })),
                    Rival::Guest => drop(td.execute(GuestOp::read_u64(PrivateTd::GPA))),
                    Rival::Host => drop(mapping.read_u64(2 * PAGE_SIZE)),
                }
                // The page is private as often as not, and cannot be held then.
                drop(mapping.hold(2 * PAGE_SIZE, PAGE_SIZE, HoldKind::Get));
            }
            wrong
        });
        let mut results: Vec<_> = (0..ROUNDS).map(|round| convert(if round % 2 == 0 { PRIVATE } else { 0 })).collect();
        results.extend(rivals.join().unwrap_or_default());
        results.retain(|result| !allowed.contains(result));
        results
    });
    claim_eq!(unexpected, Vec::new(), "results of conversions besides 0, EAGAIN and ENOMEM");
    claim_eq!(td.is_dead(), Some(false), "the VM is dead");
    claim_module_is_sound(&*td.module)
}

fn failing_split_is_eio_and_changes_nothing(cx: &Context, &(event, leaf): &(Event, u16)) -> TestResult {
    let td = PrivateTd::new(cx, Size::Huge, 1)?;
    claim_ok!(td.module.add_fault(&ModuleFault { level: Some(1), ..ModuleFault::always(leaf, INVALID) }));
    let (offset, len) = (16 * PAGE_SIZE, 4 * PAGE_SIZE);
    let result = match event {
        Event::Convert => td.convert(cx, offset, len, 0)?.result,
        _ => td.file()?.punch_hole(offset, len),
    };
    claim_eq!(result, Err(Errno::EIO), "{} of a part of a 2M page", event.name());
    claim_eq!(td.is_dead(), Some(true), "the VM is dead");
    claim!(td.is_owned(0)?, "the module has the page");
    claim_eq!(claim_ok!(td.file()?.cache_stat(0, 0)).cached, 512, "pages in the file");
    let mapping = claim_ok!(td.file()?.map(td.len(), 0, Protection::SHARED_RW));
    let sigbus = HostFault { signal: libc::SIGBUS, code: BUS_ADRERR, offset };
    claim_eq!(mapping.read_u64(offset), Err(sigbus), "a load of the host: the page is private still");
    Ok(())
}

fn interrupted_split_is_started_again(cx: &Context) -> TestResult {
    /// TDX_INTERRUPTED_RESTARTABLE.
    const RESTARTABLE: u64 = 0x8000_0004_0000_0000;
    let mut td = PrivateTd::new(cx, Size::Huge, 1)?;
    let times = gmemtest::machine::FaultWhen::First(3);
    let fault = claim_ok!(td.module.add_fault(&ModuleFault::always(DEMOTE, RESTARTABLE).when(times)));
    let (offset, len) = (16 * PAGE_SIZE, 4 * PAGE_SIZE);
    claim_eq!(td.file()?.punch_hole(offset, len), Ok(()), "a punch of a part of the 2M page");
    claim_eq!(claim_ok!(td.module.fault_hits(fault)), 3, "interruptions");
    claim_eq!(td.is_dead(), Some(false), "the VM is dead");
    claim_eq!(td.read(0), Exit::Done(PrivateTd::SECRET), "the rest of the page keeps its content");
    let gpa = PrivateTd::GPA + offset;
    claim_eq!(td.execute(GuestOp::Accept { gpa, len, level: 0 }), Exit::Done(0), "ACCEPT of what was punched");
    claim_eq!(td.execute(GuestOp::read_u64(gpa)), Exit::Done(0), "its content");
    Ok(())
}

/// The stand-alone binary.
pub fn main() -> ExitCode {
    gmemtest::cli::selftest_main(&[&SUITE])
}
