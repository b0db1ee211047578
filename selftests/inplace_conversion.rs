//! Conversion on the file, KVM_SET_MEMORY_ATTRIBUTES2: what it refuses, what it changes, what it leaves alone.

use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use gmemtest::harness::{Context, InPlaceVm, Side, TestResult, in_child};
use gmemtest::machine::{
    ConvertError, Errno, Exit, Facility, GuestOp, HoldKind, HostMemory, MemoryRegion, PAGE_SIZE, VmType,
};
use gmemtest::uapi::kvm::GUEST_MEMFD_FLAG_MMAP;
use gmemtest::{claim, claim_eq, claim_ne, claim_ok, fail};

gmemtest::suite! {
    /// Where a guest_memfd keeps the attribute of its pages, KVM_SET_MEMORY_ATTRIBUTES2 on the file converts them. To
    /// private wants every page free of foreign references; to shared always works (guest_memfd_conversions_test).
    pub static SUITE: inplace_conversion needs [Vm, GuestMemfd, InPlaceConversion] {
        /// Memory that begins private is SIGBUS for the host; converted, host and guest see the same. A failure exposes
        /// guest memory or hides shared memory.
        memory_that_begins_private_becomes_shared needs [Guest, LazyAccept];

        /// Memory that begins shared is one for host and guest; converted, the host gets SIGBUS.
        memory_that_begins_shared_becomes_private needs [Guest, LazyAccept];

        /// Converting one page of four converts that page only, whichever it is. A failure converts a neighbour.
        one_page_is_converted_alone[INDICES] needs [Guest, LazyAccept];

        /// Memory that nobody has touched can be converted, and the first access then behaves as its side says.
        memory_is_converted_before_it_is_allocated[SIDES] needs [Guest];

        /// A conversion reaches over holes: the pages that are there and those that are not. It allocates nothing.
        conversion_reaches_over_holes[SIDES] needs [Guest, Cachestat];

        /// A punch takes the page and leaves the attribute: the new page is zero and on the same side.
        punch_keeps_the_side[SIDES] needs [Guest];

        /// A forked child's mapping follows the conversions like its parent's: SIGBUS, or the data.
        forked_child_sees_the_same_side needs [Guest, RealFiles];

        /// One held page fails the conversion of every range with it: EAGAIN with the byte offset of that page. The other
        /// pages convert, and so does everything once it is let go. A failure lets the host write private memory.
        held_page_is_in_the_way[HELD] needs [Guest, LazyAccept];

        /// A conversion that is refused stores nothing, and has taken the host's page table entries of the whole range all
        /// the same: the next host access faults them in again with the same data.
        refused_conversion_unmaps_and_changes_nothing needs [Pagemap];

        /// A conversion to shared looks at no reference, nor does one that changes nothing.
        references_do_not_matter_where_nothing_becomes_private;

        /// A page in a per-CPU LRU batch has a reference more; conversion drains the batches before it calls the page held.
        /// A failure makes conversions fail at random.
        fresh_pages_are_converted_at_once needs [Guest, LazyAccept];

        /// Every slot with a file uses the file for both sides; what userspace_addr points to does not matter. A failure
        /// means that shared memory has two places.
        slot_uses_the_file_for_both_sides needs [Guest];

        /// A VM type whose private memory is not encrypted keeps the contents in both directions.
        contents_survive_both_directions needs [Guest];

        /// An access of a TD to the other side than the file's is KVM_EXIT_MEMORY_FAULT with the side that was tried.
        td_access_to_the_other_side_is_a_memory_fault[SIDES] needs [Guest, LazyAccept];

        /// A conversion under a running vCPU takes effect at once: it goes on on the new side, a TD leaves with a memory
        /// fault. A failure leaves a stale translation.
        running_vcpu_follows_the_conversion needs [Guest, LazyAccept] timeout 60;

        /// Two slots of one file show the same conversion where they show the same page; other files are not concerned.
        conversion_belongs_to_the_file needs [Guest, LazyAccept];

        /// KVM_PRE_FAULT_MEMORY maps what the file says the side is, and the mapping goes with a conversion.
        prefaulted_memory_is_converted needs [Guest, PreFault, LazyAccept];
    }
}

const P: u64 = PAGE_SIZE;
const PAGES: u64 = 4;

const SIDES: &[(&str, Side)] = &[("private", Side::Private), ("shared", Side::Shared)];
const INDICES: &[(&str, u64)] = &[("first", 0), ("second", 1), ("third", 2), ("last", 3)];

fn memory_that_begins_private_becomes_shared(cx: &Context) -> TestResult {
    let mut vm = InPlaceVm::new(cx, PAGES, Side::Private)?;
    for page in 0..PAGES {
        vm.claim_sigbus(page * P)?;
        vm.guest_write(page * P, Side::Private, 0xA0 + page)?;
        vm.claim_sigbus(page * P)?;
    }
    vm.convert(0, vm.len, Side::Shared)?;
    for at in (0..vm.len).step_by(P as usize) {
        vm.map.write_u64(at, at + 1)?;
        vm.claim_guest(at, Side::Shared, at + 1)?;
        vm.guest_write(at, Side::Shared, at + 2)?;
        vm.claim_host(at, at + 2)?;
    }
    Ok(())
}

fn memory_that_begins_shared_becomes_private(cx: &Context) -> TestResult {
    let mut vm = InPlaceVm::new(cx, PAGES, Side::Shared)?;
    vm.map.write_u64(0, 0x11)?;
    vm.claim_guest(0, Side::Shared, 0x11)?;
    vm.guest_write(P, Side::Shared, 0x22)?;
    vm.claim_host(P, 0x22)?;
    vm.convert(0, vm.len, Side::Private)?;
    for page in 0..PAGES {
        vm.claim_sigbus(page * P)?;
        vm.guest_write(page * P, Side::Private, 0x33 + page)?;
        vm.claim_guest(page * P, Side::Private, 0x33 + page)?;
    }
    Ok(())
}

fn one_page_is_converted_alone(cx: &Context, &index: &u64) -> TestResult {
    for begin in [Side::Private, Side::Shared] {
        let mut vm = InPlaceVm::new(cx, PAGES, begin)?;
        for page in 0..PAGES {
            vm.guest_write(page * P, begin, 0x50 + page)?;
        }
        vm.convert(index * P, P, begin.other())?;
        for page in 0..PAGES {
            let side = if page == index { begin.other() } else { begin };
            vm.claim_side(page * P, side)?;
            if page != index {
                vm.claim_guest(page * P, side, 0x50 + page)?;
            } else {
                vm.guest_write(page * P, side, 0x60)?;
                vm.claim_guest(page * P, side, 0x60)?;
            }
        }
        vm.convert(index * P, P, begin)?;
        vm.claim_side(index * P, begin)?;
    }
    Ok(())
}

/// What it takes for the guest to touch fresh memory of `side`.
fn require_touch(cx: &Context, side: Side) -> TestResult {
    if side == Side::Private { cx.require(Facility::LazyAccept) } else { Ok(()) }
}

fn memory_is_converted_before_it_is_allocated(cx: &Context, &side: &Side) -> TestResult {
    require_touch(cx, side)?;
    let mut vm = InPlaceVm::new(cx, PAGES, side.other())?;
    vm.convert(0, vm.len, side)?;
    for page in 0..PAGES {
        vm.claim_side(page * P, side)?;
        vm.claim_guest(page * P, side, 0)?;
        vm.guest_write(page * P, side, 7)?;
        vm.claim_guest(page * P, side, 7)?;
    }
    Ok(())
}

fn conversion_reaches_over_holes(cx: &Context, &side: &Side) -> TestResult {
    require_touch(cx, side)?;
    let mut vm = InPlaceVm::new(cx, 2 * PAGES, side.other())?;
    for page in (0..2 * PAGES).step_by(4) {
        claim_ok!(vm.gmem.allocate(page * P, P));
    }
    vm.convert(0, vm.len, side)?;
    claim_eq!(claim_ok!(vm.gmem.cache_stat(0, 0)).cached, 2, "pages in the file after the conversion");
    for page in 0..2 * PAGES {
        vm.claim_side(page * P, side)?;
        vm.guest_write(page * P, side, page)?;
        vm.claim_guest(page * P, side, page)?;
    }
    Ok(())
}

fn punch_keeps_the_side(cx: &Context, &side: &Side) -> TestResult {
    require_touch(cx, side)?;
    let mut vm = InPlaceVm::new(cx, PAGES, side.other())?;
    vm.convert(0, vm.len, side)?;
    vm.guest_fill(0, vm.len, side, 0x5A)?;
    claim_ok!(vm.gmem.punch_hole(P, 2 * P));
    for page in 0..PAGES {
        let byte = if page == 1 || page == 2 { 0 } else { 0x5A };
        vm.claim_side(page * P, side)?;
        vm.claim_guest_range(page * P, P, side, byte)?;
    }
    Ok(())
}

fn forked_child_sees_the_same_side(cx: &Context) -> TestResult {
    let vm = InPlaceVm::new(cx, PAGES, Side::Shared)?;
    vm.map.write_u64(0, 0x5EED)?;
    let look = |vm: &InPlaceVm| in_child(|| vm.map.read_u64(0).map_err(|_| Errno::EFAULT))?.returned();
    claim_eq!(look(&vm)?, Ok(0x5EED), "the child on shared memory");
    vm.convert(0, vm.len, Side::Private)?;
    claim_eq!(look(&vm)?, Err(Errno::EFAULT), "the child on private memory");
    vm.convert(0, vm.len, Side::Shared)?;
    claim!(look(&vm)?.is_ok(), "the child on memory that is shared again");
    Ok(())
}

const HELD: &[(&str, (HoldKind, u64))] = &[
    ("first_by_vmsplice", (HoldKind::Get, 0)),
    ("second_by_vmsplice", (HoldKind::Get, 1)),
    ("last_by_vmsplice", (HoldKind::Get, 3)),
    ("first_by_io_uring", (HoldKind::Pin, 0)),
    ("third_by_io_uring", (HoldKind::Pin, 2)),
    ("last_by_io_uring", (HoldKind::Pin, 3)),
];

/// What a machine has to have for a hold.
fn require(cx: &Context, kind: HoldKind) -> TestResult {
    cx.require(match kind {
        HoldKind::Get => Facility::HoldGet,
        HoldKind::Pin => Facility::HoldPin,
    })
}

fn held_page_is_in_the_way(cx: &Context, &(kind, held): &(HoldKind, u64)) -> TestResult {
    require(cx, kind)?;
    let mut vm = InPlaceVm::new(cx, PAGES, Side::Shared)?;
    for page in 0..PAGES {
        vm.map.write_u64(page * P, 0xB0 + page)?;
    }
    let hold = claim_ok!(vm.map.hold(held * P, P, kind));
    vm.claim_busy(0, vm.len, held * P)?;
    vm.claim_busy(held * P, P, held * P)?;
    for page in 0..PAGES {
        vm.claim_host(page * P, 0xB0 + page)?;
        vm.claim_guest(page * P, Side::Shared, 0xB0 + page)?;
    }
    for page in (0..PAGES).filter(|page| *page != held) {
        vm.convert(page * P, P, Side::Private)?;
        vm.claim_sigbus(page * P)?;
    }
    vm.claim_busy(0, vm.len, held * P)?;
    vm.claim_host(held * P, 0xB0 + held)?;
    drop(hold);
    vm.convert(0, vm.len, Side::Private)?;
    for page in 0..PAGES {
        vm.claim_sigbus(page * P)?;
        let found = if InPlaceVm::keeps_contents(cx) { 0xB0 + page } else { 0 };
        vm.claim_guest(page * P, Side::Private, found)?;
    }
    Ok(())
}

fn refused_conversion_unmaps_and_changes_nothing(cx: &Context) -> TestResult {
    require(cx, HoldKind::Get)?;
    let vm = InPlaceVm::new(cx, PAGES, Side::Shared)?;
    vm.map.fill(0, vm.len, 0x5A)?;
    let hold = claim_ok!(vm.map.hold(P, P, HoldKind::Get));
    vm.claim_busy(0, 3 * P, P)?;
    for page in 0..PAGES {
        let mapped = vm.map.frame(page * P).is_ok();
        claim_eq!(mapped, page == 3, "page {page} has a page table entry after pages 0 to 2 were refused");
    }
    claim_eq!(vm.map.find_mismatch(0, vm.len, 0x5A)?, None, "the data after the refusal");
    drop(hold);
    Ok(())
}

fn references_do_not_matter_where_nothing_becomes_private(cx: &Context) -> TestResult {
    require(cx, HoldKind::Get)?;
    let vm = InPlaceVm::new(cx, PAGES, Side::Shared)?;
    vm.map.fill(0, vm.len, 0x5A)?;
    vm.convert(3 * P, P, Side::Private)?;
    let hold = claim_ok!(vm.map.hold(0, P, HoldKind::Get));
    vm.convert(0, P, Side::Shared)?;
    vm.convert(3 * P, P, Side::Private)?;
    vm.convert(0, vm.len, Side::Shared)?;
    vm.claim_side(3 * P, Side::Shared)?;
    claim_eq!(vm.map.find_mismatch(0, 3 * P, 0x5A)?, None, "the data");
    drop(hold);
    Ok(())
}

fn fresh_pages_are_converted_at_once(cx: &Context) -> TestResult {
    let mut vm = InPlaceVm::new(cx, PAGES, Side::Shared)?;
    for round in 1..=4 {
        vm.map.write_u64(0, round)?;
        vm.guest_write(P, Side::Shared, round)?;
        claim_ok!(vm.gmem.allocate(2 * P, P));
        vm.convert(0, vm.len, Side::Private)?;
        vm.guest_write(3 * P, Side::Private, round)?;
        vm.convert(0, vm.len, Side::Shared)?;
        claim_ok!(vm.gmem.punch_hole(0, vm.len));
    }
    Ok(())
}

fn slot_uses_the_file_for_both_sides(cx: &Context) -> TestResult {
    let mut vm = InPlaceVm::new(cx, PAGES, Side::Shared)?;
    let other = claim_ok!(cx.machine().host_memory(HostMemory::Shmem, vm.len));
    other.fill(0, vm.len, 0xEE)?;
    let gmem = claim_ok!(vm.vm.create_guest_memfd(vm.len, GUEST_MEMFD_FLAG_MMAP));
    claim_ok!(gmem.convert(0, vm.len, Side::Shared.attributes()));
    let region = MemoryRegion::new(InPlaceVm::SLOT + 1, vm.gpa(vm.len, Side::Private), vm.len).at(other.addr());
    claim_ok!(vm.vm.set_memory_region(&region.bound_to(&*gmem, 0)));
    let at = vm.len;
    vm.claim_guest(at, Side::Shared, 0)?;
    vm.guest_write(at, Side::Shared, 0x77)?;
    claim_eq!(other.find_mismatch(0, vm.len, 0xEE)?, None, "the memory at userspace_addr, which nobody uses");
    Ok(())
}

fn contents_survive_both_directions(cx: &Context) -> TestResult {
    if !InPlaceVm::keeps_contents(cx) {
        gmemtest::skip!(Declined, "a TD accepts its private pages zeroed, and leaves nothing that the host can read");
    }
    let mut vm = InPlaceVm::new(cx, PAGES, Side::Shared)?;
    vm.map.fill(0, vm.len, 0x11)?;
    vm.convert(0, vm.len, Side::Private)?;
    vm.claim_guest_range(0, vm.len, Side::Private, 0x11)?;
    vm.guest_fill(P, 2 * P, Side::Private, 0x22)?;
    vm.convert(0, vm.len, Side::Shared)?;
    claim_eq!(vm.map.find_mismatch(0, P, 0x11)?, None, "what the host wrote before");
    claim_eq!(vm.map.find_mismatch(P, 2 * P, 0x22)?, None, "what the guest wrote to its private memory");
    vm.claim_guest_range(3 * P, P, Side::Shared, 0x11)
}

fn td_access_to_the_other_side_is_a_memory_fault(cx: &Context, &side: &Side) -> TestResult {
    if cx.machine().spec().vm_type != VmType::Tdx {
        gmemtest::skip!(Declined, "only the guest-physical addresses of a TD say which side they mean");
    }
    let mut vm = InPlaceVm::new(cx, PAGES, side)?;
    vm.guest_write(P, side, 0x5EED)?;
    let flags = if side == Side::Shared { 8 } else { 0 };
    let fault = Exit::MemoryFault { errno: Errno::EFAULT, flags, gpa: InPlaceVm::GPA + P, size: P };
    let gpa = vm.gpa(P + 8, side.other());
    claim_eq!(vm.vcpu.execute(GuestOp::read_u64(gpa)), fault, "a {:?} load of {side:?} memory", side.other());
    vm.convert(P, P, side.other())?;
    vm.guest_write(P, side.other(), 0x77)?;
    vm.claim_guest(P, side.other(), 0x77)
}

fn running_vcpu_follows_the_conversion(cx: &Context) -> TestResult {
    let InPlaceVm { mut vcpu, map, gmem, vm, .. } = InPlaceVm::new(cx, PAGES, Side::Private)?;
    let control = vcpu.control();
    let is_td = vm.shared_bit() != 0;
    let guest = thread::spawn(move || (vcpu.execute(GuestOp::WriteUntilStopped { gpa: InPlaceVm::GPA + P }), vcpu));
    let more = |from: u64| {
        while control.iterations() < from + 2 && !guest.is_finished() {
            thread::sleep(Duration::from_micros(20));
        }
        control.iterations()
    };
    let seen = more(0);
    let converted = gmem.convert(0, 3 * P, Side::Shared.attributes());
    let rounds = || -> TestResult {
        claim_eq!(converted, Ok(()), "to shared under a running vCPU");
        if is_td {
            return Ok(());
        }
        let now = more(seen);
        let found = map.read_u64(P)?;
        claim!(found >= seen && found <= control.iterations() + 1, "the host finds {found} when the guest is at {now}");
        claim_eq!(gmem.convert(0, 3 * P, Side::Private.attributes()), Ok(()), "to private under a running vCPU");
        claim!(map.read_u64(P).is_err(), "the host gets a signal for private memory");
        let again = more(control.iterations());
        claim_eq!(gmem.convert(0, 3 * P, Side::Shared.attributes()), Ok(()), "to shared again");
        let found = map.read_u64(P)?;
        claim!(found >= again.saturating_sub(1), "the host finds {found}, the guest was at {again} before");
        Ok(())
    };
    let result = rounds();
    while !guest.is_finished() {
        control.stop();
        thread::sleep(Duration::from_micros(20));
    }
    let Ok((exit, _vcpu)) = guest.join() else { fail!("the thread of the vCPU panicked") };
    result?;
    if is_td {
        let gone = Exit::MemoryFault { errno: Errno::EFAULT, flags: 8, gpa: InPlaceVm::GPA + P, size: P };
        claim_eq!(exit, gone, "the private store of a TD to memory that became shared");
    } else {
        claim!(matches!(exit, Exit::Done(_)), "the guest's loop ended in {exit:x?}");
    }
    Ok(())
}

fn conversion_belongs_to_the_file(cx: &Context) -> TestResult {
    let mut vm = InPlaceVm::new(cx, PAGES, Side::Shared)?;
    let stranger = InPlaceVm::new(cx, PAGES, Side::Shared)?;
    stranger.map.fill(0, stranger.len, 0x33)?;
    vm.map.fill(0, vm.len, 0x11)?;
    claim_ok!(vm.vm.set_memory_region(&MemoryRegion::deletion(InPlaceVm::SLOT)));
    for (slot, page) in [(1, 2), (2, 0)] {
        let gpa = InPlaceVm::GPA + (2 - page) * P;
        let region = MemoryRegion::new(slot, gpa, 2 * P).at(vm.map.addr());
        claim_ok!(vm.vm.set_memory_region(&region.bound_to(&*vm.gmem, page * P)));
    }
    // Guest pages 0 to 3 are pages 2, 3, 0, 1 of the file.
    vm.claim_guest_range(0, vm.len, Side::Shared, 0x11)?;
    vm.convert(P, 2 * P, Side::Private)?;
    for (guest_page, side) in [(0, Side::Private), (1, Side::Shared), (2, Side::Shared), (3, Side::Private)] {
        vm.claim_side((guest_page + 2) % 4 * P, side)?;
        vm.guest_write(guest_page * P, side, 0x44 + guest_page)?;
        vm.claim_guest(guest_page * P, side, 0x44 + guest_page)?;
    }
    claim_eq!(stranger.map.find_mismatch(0, stranger.len, 0x33)?, None, "the file of another VM");
    Ok(())
}

fn prefaulted_memory_is_converted(cx: &Context) -> TestResult {
    let mut vm = InPlaceVm::new(cx, PAGES, Side::Private)?;
    let done = vm.vcpu.pre_fault(InPlaceVm::GPA, vm.len, 0);
    claim_eq!(done.result, Ok(()), "pre-fault of private memory");
    claim_eq!(done.size, 0, "what is left of the range");
    vm.convert(P, P, Side::Shared)?;
    vm.map.write_u64(P, 0x99)?;
    vm.claim_guest(P, Side::Shared, 0x99)?;
    vm.claim_guest(0, Side::Private, 0)?;
    let mapped = claim_ok!(vm.vm.statistic("pages_4k"));
    claim_ne!(mapped, 0, "mapped pages");
    let error = ConvertError { errno: Errno::EINVAL, offset: None };
    claim_eq!(vm.try_convert(vm.len, P, Side::Shared), Err(error), "beyond the end");
    Ok(())
}

/// The stand-alone binary.
pub fn main() -> ExitCode {
    gmemtest::cli::selftest_main(&[&SUITE])
}
