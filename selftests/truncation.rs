//! Taking pages out of a guest_memfd that is in use: by a guest, by the host, by both while they change sides.

use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use gmemtest::harness::sides::TwoSided;
use gmemtest::harness::{Context, FolioSize, InPlaceVm, Side, TestResult};
use gmemtest::machine::{Exit, Facility, GuestOp, HoldKind, MemoryAttributes, PAGE_SIZE};
use gmemtest::{claim, claim_eq, claim_matches, claim_ok};

gmemtest::suite! {
    /// A punch takes exactly its pages, from the guest and from the host, and the next to look finds zeroes.
    pub static SUITE: truncation needs [Vm, Guest, GuestMemfd, PrivateMemory] {
        /// Exactly the pages of the hole are fresh; a TD's other pages stay accepted with their contents. A failure frees
        /// the memory beside a hole, or unmaps more than it has to.
        hole_is_exact_to_the_guest[HOLES] needs [LazyAccept];

        /// A hole in memory of both sides takes the file's pages of both, and leaves each page its side.
        hole_spans_both_sides needs [LazyAccept];

        /// A page that is held by the host goes out of the file all the same, and its holder keeps what it had.
        held_page_goes_out_of_the_file[HOLDS] needs [InPlaceConversion, LazyAccept];

        /// A part of a huge folio is zeroed and stays, the folio as a whole goes.
        part_of_a_huge_folio_is_zeroed[PARTS] needs [InPlaceConversion, Cachestat, LazyAccept];

        /// The host's mapping finds a fresh page after the hole, the same that the guest finds.
        host_and_guest_find_the_same_fresh_page needs [InPlaceConversion];

        /// Holes and conversions may race: no call fails, no access ends in anything but its data, zeroes, or the exit of
        /// the wrong side.
        holes_and_conversions_may_race needs [LazyAccept] timeout 60;
    }
}

const P: u64 = PAGE_SIZE;

/// First page and number of pages, of 520.
const HOLES: &[(&str, (u64, u64))] = &[
    ("first_page", (0, 1)),
    ("second_page", (1, 1)),
    ("last_of_the_block", (511, 1)),
    ("across_the_boundary", (510, 4)),
    ("block", (0, 512)),
    ("last_page", (519, 1)),
    ("everything", (0, 520)),
];

fn hole_is_exact_to_the_guest(cx: &Context, &(first, pages): &(u64, u64)) -> TestResult {
    let mut scene = TwoSided::new(cx, 520)?;
    scene.fill(0, 520 * P, Side::Private, 0x11)?;
    claim_ok!(scene.gmem().punch_hole(first * P, pages * P));
    claim_eq!(claim_ok!(scene.gmem().cache_stat(0, 0)).cached, 520 - pages, "pages of the file");
    let end = first + pages;
    scene.claim_guest(0, first * P, Side::Private, 0x11)?;
    scene.claim_guest(end * P, (520 - end) * P, Side::Private, 0x11)?;
    scene.claim_guest(first * P, pages * P, Side::Private, 0)?;
    scene.fill(first * P, pages * P, Side::Private, 0x22)?;
    scene.claim_guest(0, first * P, Side::Private, 0x11)
}

fn hole_spans_both_sides(cx: &Context) -> TestResult {
    let mut scene = TwoSided::new(cx, 8)?;
    scene.fill(0, 8 * P, Side::Private, 0x11)?;
    scene.convert(3 * P, 2 * P, Side::Shared)?;
    scene.fill(3 * P, 2 * P, Side::Shared, 0x22)?;
    claim_ok!(scene.gmem().punch_hole(2 * P, 4 * P));
    claim_eq!(claim_ok!(scene.gmem().cache_stat(0, 0)).cached, 4, "pages of the file");
    for page in [0, 1, 6, 7] {
        scene.claim_guest(page * P, P, Side::Private, 0x11)?;
    }
    scene.claim_guest(2 * P, P, Side::Private, 0)?;
    scene.claim_guest(5 * P, P, Side::Private, 0)?;
    // The shared side is memory of its own unless the file has both.
    let left = if cx.has(Facility::InPlaceConversion) { 0 } else { 0x22 };
    scene.claim_guest(3 * P, 2 * P, Side::Shared, left)?;
    scene.claim_host(3 * P, 2 * P, left)
}

const HOLDS: &[(&str, HoldKind)] = &[("vmsplice", HoldKind::Get), ("io_uring", HoldKind::Pin)];

fn held_page_goes_out_of_the_file(cx: &Context, &kind: &HoldKind) -> TestResult {
    cx.require(if kind == HoldKind::Get { Facility::HoldGet } else { Facility::HoldPin })?;
    let mut vm = InPlaceVm::new(cx, 4, Side::Shared)?;
    vm.map.fill(0, vm.len, 0x33)?;
    let hold = claim_ok!(vm.map.hold(P, P, kind));
    vm.claim_busy(0, vm.len, P)?;
    claim_ok!(vm.gmem.punch_hole(P, P));
    claim_eq!(claim_ok!(vm.gmem.cache_stat(0, 0)).cached, 3, "pages of the file");
    // What was in the way is not in the file any more.
    vm.convert(0, vm.len, Side::Private)?;
    vm.claim_sigbus(P)?;
    vm.claim_guest(P, Side::Private, 0)?;
    drop(hold);
    vm.claim_guest(P, Side::Private, 0)
}

/// First page, number of pages, and the pages that are left of two folios of 2 MiB.
const PARTS: &[(&str, (u64, u64, u64))] = &[
    ("first_page", (0, 1, 1024)),
    ("middle", (100, 50, 1024)),
    ("last_page", (511, 1, 1024)),
    ("folio", (0, 512, 512)),
    ("folio_and_a_page", (0, 513, 512)),
    ("end_and_folio", (511, 513, 512)),
    ("two_halves", (256, 512, 1024)),
    ("everything", (0, 1024, 0)),
];

fn part_of_a_huge_folio_is_zeroed(cx: &Context, &(first, pages, left): &(u64, u64, u64)) -> TestResult {
    for side in [Side::Private, Side::Shared] {
        let mut vm = InPlaceVm::of_folios(cx, FolioSize::Pmd, 1024 * P, side)?;
        vm.guest_fill(0, vm.len, side, 0x44)?;
        claim_ok!(vm.gmem.punch_hole(first * P, pages * P));
        claim_eq!(claim_ok!(vm.gmem.cache_stat(0, 0)).cached, left, "pages of the file, {side:?}");
        let end = first + pages;
        vm.claim_guest_range(0, first * P, side, 0x44)?;
        vm.claim_guest_range(end * P, (1024 - end) * P, side, 0x44)?;
        vm.claim_guest_range(first * P, pages * P, side, 0)?;
    }
    Ok(())
}

fn host_and_guest_find_the_same_fresh_page(cx: &Context) -> TestResult {
    let mut vm = InPlaceVm::new(cx, 4, Side::Shared)?;
    for round in 1..5 {
        vm.map.fill(0, vm.len, 0x55)?;
        vm.claim_guest_range(0, vm.len, Side::Shared, 0x55)?;
        claim_ok!(vm.gmem.punch_hole(P, 2 * P));
        if round % 2 == 0 {
            vm.claim_guest(P, Side::Shared, 0)?;
        }
        vm.map.write_u64(P, round)?;
        vm.claim_guest(P, Side::Shared, round)?;
        vm.guest_write(2 * P, Side::Shared, round + 7)?;
        vm.claim_host(2 * P, round + 7)?;
        vm.claim_guest_range(3 * P, P, Side::Shared, 0x55)?;
    }
    Ok(())
}

/// Rounds of the racing threads.
const ROUNDS: u32 = 300;

fn holes_and_conversions_may_race(cx: &Context) -> TestResult {
    let mut scene = TwoSided::new(cx, 4)?;
    let gpas = [scene.gpa(P, Side::Private), scene.gpa(P, Side::Shared)];
    let mut other = claim_ok!(scene.vm().create_vcpu(1));
    let ending = AtomicBool::new(false);
    let (vm, gmem, in_place) = (scene.vm_handle(), scene.gmem_handle(), cx.has(Facility::InPlaceConversion));
    let convert = |side: Side| {
        let attributes = side.attributes();
        let range = MemoryAttributes { address: TwoSided::GPA, size: 4 * P, attributes, flags: 0 };
        if in_place {
            gmem.convert(0, 4 * P, attributes).map_err(|error| error.errno)
        } else {
            vm.set_memory_attributes(&range)
        }
    };
    let results: [TestResult; 3] = thread::scope(|scope| {
        let puncher = scope.spawn(|| -> TestResult {
            for _ in 0..ROUNDS {
                claim_ok!(gmem.punch_hole(0, 3 * P), "a hole");
                claim_ok!(gmem.allocate(P, P), "an allocation");
            }
            Ok(())
        });
        let guest = scope.spawn(|| -> TestResult {
            let mut turn = 0_usize;
            while !ending.load(Ordering::Relaxed) {
                turn += 1;
                match other.execute(GuestOp::write_u64(gpas[turn % 2], 0x5EED)) {
                    Exit::Done(_) | Exit::MemoryFault { .. } => {}
                    exit => gmemtest::fail!("a store of the guest ended in {exit:x?}"),
                }
            }
            Ok(())
        });
        let converter = || -> TestResult {
            for round in 0..ROUNDS {
                let side = if round % 2 == 0 { Side::Shared } else { Side::Private };
                claim_ok!(convert(side), "a conversion to {side:?}");
            }
            Ok(())
        };
        let converted = converter();
        let punched = puncher.join().unwrap_or_else(|_| Err(gmemtest::harness::Stop::fail("the puncher panicked")));
        ending.store(true, Ordering::Relaxed);
        let ran = guest.join().unwrap_or_else(|_| Err(gmemtest::harness::Stop::fail("the guest panicked")));
        [converted, punched, ran]
    });
    for result in results {
        result?;
    }
    scene.convert(0, 4 * P, Side::Private)?;
    claim_ok!(scene.gmem().punch_hole(0, 4 * P));
    scene.claim_guest(0, 4 * P, Side::Private, 0)?;
    let gpa = scene.gpa(P, Side::Private);
    claim_matches!(scene.vcpu().execute(GuestOp::write_u64(gpa, 1)), Exit::Done(_), "a store afterwards");
    claim!(scene.pages() == 4, "the memory is what it was");
    Ok(())
}

/// The stand-alone binary.
pub fn main() -> ExitCode {
    gmemtest::cli::selftest_main(&[&SUITE])
}
