//! Huge folios of a guest_memfd that is converted in place: mapped as a whole, split, merged, truncated.

use std::process::ExitCode;

use gmemtest::harness::{Context, FolioSize, InPlaceVm, Side, TestResult};
use gmemtest::machine::{Errno, Exit, Facility, GuestOp, HoldKind, PAGE_SIZE, Vm, VmType};
use gmemtest::{claim, claim_eq, claim_matches, claim_ok};

gmemtest::suite! {
    /// A file of 2M or 1G folios behaves like one of base pages, only that a block which is private as a whole is one folio
    /// and one mapping, and that a block with a shared page is split (1G guest_memfd series, TDX huge page series).
    pub static SUITE: huge_pages needs [Vm, Guest, GuestMemfd, InPlaceConversion] {
        /// A shared page is one page for host and guest.
        shared_page_is_one_for_host_and_guest[SIZES];

        /// A file that begins private is SIGBUS for the host wherever it looks.
        private_file_is_not_mappable[SIZES] needs [LazyAccept];

        /// A range is converted before anything is allocated.
        conversion_before_allocation[SIZES] needs [LazyAccept];

        /// A range with 4 of its 16 pages allocated is converted as a whole, there and back.
        conversion_of_a_partly_allocated_range[SIZES] needs [LazyAccept];

        /// Page 2 of 4 converts alone: its neighbours keep side and contents. A failure loses the rest of a huge page.
        conversion_of_one_page_leaves_its_neighbours[SIZES] needs [LazyAccept];

        /// Punching changes no side.
        truncation_keeps_the_sides[SIZES] needs [LazyAccept];

        /// A held page fails the conversion to private with its own offset, in any block.
        held_page_fails_the_conversion[HELD] needs [LazyAccept];

        /// The exit of an access to the wrong side does not depend on attributes of the VM, of which there are none.
        wrong_side_is_reported_by_the_file[SIZES];

        /// Whole folios go although a page is pinned when they are base pages; a huge folio that is split has to be merged
        /// first, which a pin forbids: EAGAIN, and success once it is gone.
        truncation_of_pinned_shared_memory[SIZES];

        /// Private memory is punched, and the next guest to look finds zeroes.
        truncation_of_private_memory_frees_it[SIZES] needs [LazyAccept];

        /// Closing while a page is pinned keeps that page and gives the rest back when the pin goes.
        closed_file_lives_on_in_its_pin[SIZES] needs [PageFlags, HoldPin];

        /// Allocating one page allocates its folio.
        allocation_of_a_page_brings_its_folio[SIZES] needs [Cachestat];

        /// Pages all over the file are converted one by one.
        single_pages_are_converted[SIZES] needs [LazyAccept];

        /// A private huge folio is one mapping; a shared page in it takes the level away, and it comes back when the folio is
        /// whole. In a TD it does not: what was split stays split.
        mapping_level_is_reached_lost_and_regained[LEVELS] needs [KvmStats, LazyAccept];

        /// Contents stay through a split and the merge after it, but for what a TD accepts anew.
        contents_survive_split_and_merge[SIZES] needs [LazyAccept];

        /// A folio that is whole again has the references of all of its pages (folio_ref_freeze()).
        merged_folio_is_one_again[LEVELS] needs [PageAccount, LazyAccept];

        /// Only the huge mappings across an end of the range are split: the head and the tail. Those between go whole.
        only_head_and_tail_are_split[RANGES] needs [ModuleInjection, LazyAccept];

        /// TDG.MEM.PAGE.ACCEPT at another level than the mapping's.
        accept_at_another_level[ACCEPTS] needs [ModuleInjection, PreFault, LazyAccept];
    }
}

const P: u64 = PAGE_SIZE;
const MIB2: u64 = 2 << 20;

const SIZES: &[(&str, FolioSize)] =
    &[("base_pages", FolioSize::Base), ("of_2_mib", FolioSize::Pmd), ("of_1_gib", FolioSize::Pud)];
const LEVELS: &[(&str, FolioSize)] = &[("of_2_mib", FolioSize::Pmd), ("of_1_gib", FolioSize::Pud)];

/// Two folios, or as many base pages as two small ones.
fn vm_of(cx: &Context, size: FolioSize, side: Side) -> TestResult<InPlaceVm> {
    let len = if size == FolioSize::Pud { size.bytes() } else { 2 * MIB2 };
    InPlaceVm::of_folios(cx, size, len, side)
}

/// What it takes to convert a part of a folio of `size` that the guest has mapped.
fn require_split(cx: &Context, size: FolioSize) -> TestResult {
    if size == FolioSize::Base { Ok(()) } else { cx.require(Facility::SplitMappedFolio) }
}

/// Pages at the ends and in the middle.
fn corners(vm: &InPlaceVm) -> [u64; 5] {
    [0, P, vm.len / 2 - P, vm.len / 2, vm.len - P]
}

fn shared_page_is_one_for_host_and_guest(cx: &Context, &size: &FolioSize) -> TestResult {
    let mut vm = vm_of(cx, size, Side::Shared)?;
    for at in corners(&vm) {
        vm.map.write_u64(at, at + 1)?;
        vm.claim_guest(at, Side::Shared, at + 1)?;
        vm.guest_write(at, Side::Shared, at + 2)?;
        vm.claim_host(at, at + 2)?;
    }
    Ok(())
}

fn private_file_is_not_mappable(cx: &Context, &size: &FolioSize) -> TestResult {
    let mut vm = vm_of(cx, size, Side::Private)?;
    for at in corners(&vm) {
        vm.claim_sigbus(at)?;
        vm.guest_write(at, Side::Private, at + 1)?;
        vm.claim_sigbus(at)?;
        vm.claim_guest(at, Side::Private, at + 1)?;
    }
    Ok(())
}

fn conversion_before_allocation(cx: &Context, &size: &FolioSize) -> TestResult {
    for begin in [Side::Private, Side::Shared] {
        let mut vm = vm_of(cx, size, begin)?;
        vm.convert(0, vm.len, begin.other())?;
        for at in corners(&vm) {
            vm.claim_side(at, begin.other())?;
            vm.claim_guest(at, begin.other(), 0)?;
        }
    }
    Ok(())
}

fn conversion_of_a_partly_allocated_range(cx: &Context, &size: &FolioSize) -> TestResult {
    let mut vm = vm_of(cx, size, Side::Private)?;
    for page in (0..16).step_by(4) {
        claim_ok!(vm.gmem.allocate(page * P, P));
    }
    vm.convert(0, 16 * P, Side::Shared)?;
    for page in 0..16 {
        vm.map.write_u64(page * P, page)?;
        vm.claim_guest(page * P, Side::Shared, page)?;
    }
    vm.claim_sigbus(16 * P)?;
    vm.convert(0, 16 * P, Side::Private)?;
    for page in 0..17 {
        vm.claim_sigbus(page * P)?;
        vm.guest_write(page * P, Side::Private, page)?;
    }
    Ok(())
}

fn conversion_of_one_page_leaves_its_neighbours(cx: &Context, &size: &FolioSize) -> TestResult {
    require_split(cx, size)?;
    let mut vm = vm_of(cx, size, Side::Private)?;
    let pages = [0, 1, 2, 3, 511];
    for page in pages {
        vm.guest_write(page * P, Side::Private, 0x70 + page)?;
    }
    vm.convert(2 * P, P, Side::Shared)?;
    for page in pages.into_iter().filter(|page| *page != 2) {
        vm.claim_guest(page * P, Side::Private, 0x70 + page)?;
        vm.claim_sigbus(page * P)?;
    }
    vm.map.write_u64(2 * P, 9)?;
    vm.claim_guest(2 * P, Side::Shared, 9)?;
    vm.convert(2 * P, P, Side::Private)?;
    for page in pages.into_iter().filter(|page| *page != 2) {
        vm.claim_guest(page * P, Side::Private, 0x70 + page)?;
    }
    vm.claim_sigbus(2 * P)?;
    let kept = if InPlaceVm::keeps_contents(cx) { 9 } else { 0 };
    vm.claim_guest(2 * P, Side::Private, kept)
}

fn truncation_keeps_the_sides(cx: &Context, &size: &FolioSize) -> TestResult {
    let mut vm = vm_of(cx, size, Side::Private)?;
    vm.convert(P, P, Side::Shared)?;
    vm.map.write_u64(P, 5)?;
    vm.guest_write(0, Side::Private, 5)?;
    for (at, len) in [(0, 4 * P), (0, vm.len)] {
        claim_ok!(vm.gmem.punch_hole(at, len));
        vm.claim_host(P, 0)?;
        for page in [0, 2 * P, vm.len - P] {
            vm.claim_sigbus(page)?;
        }
        vm.claim_guest(P, Side::Shared, 0)?;
        vm.map.write_u64(P, 6)?;
    }
    // What a TD finds after the punch of a part of a huge page is TDX's affair; a page of its own is fresh.
    if InPlaceVm::keeps_contents(cx) || size == FolioSize::Base {
        vm.claim_guest(0, Side::Private, 0)?;
    }
    Ok(())
}

/// The folios, and the page that is held.
const HELD: &[(&str, (FolioSize, u64))] = &[
    ("base_page_0", (FolioSize::Base, 0)),
    ("base_page_700", (FolioSize::Base, 700)),
    ("first_of_2_mib", (FolioSize::Pmd, 0)),
    ("page_3_of_2_mib", (FolioSize::Pmd, 3)),
    ("last_of_2_mib", (FolioSize::Pmd, 511)),
    ("second_block_of_2_mib", (FolioSize::Pmd, 700)),
    ("page_3_of_1_gib", (FolioSize::Pud, 3)),
];

fn held_page_fails_the_conversion(cx: &Context, &(size, held): &(FolioSize, u64)) -> TestResult {
    cx.require(Facility::HoldGet)?;
    cx.require(Facility::HoldPin)?;
    for kind in [HoldKind::Get, HoldKind::Pin] {
        let mut vm = vm_of(cx, size, Side::Shared)?;
        let hold = claim_ok!(vm.map.hold(held * P, P, kind));
        vm.claim_busy(0, vm.len, held * P)?;
        vm.claim_busy(held * P, P, held * P)?;
        vm.claim_side(held * P, Side::Shared)?;
        let neighbour = (held ^ 1) * P;
        vm.convert(neighbour, P, Side::Private)?;
        vm.claim_sigbus(neighbour)?;
        drop(hold);
        vm.convert(0, vm.len, Side::Private)?;
        vm.claim_sigbus(held * P)?;
        vm.guest_write(held * P, Side::Private, 1)?;
    }
    Ok(())
}

fn wrong_side_is_reported_by_the_file(cx: &Context, &size: &FolioSize) -> TestResult {
    if cx.machine().spec().vm_type != VmType::Tdx {
        gmemtest::skip!(Declined, "only the guest-physical addresses of a TD say which side they mean");
    }
    let mut vm = vm_of(cx, size, Side::Private)?;
    vm.convert(P, P, Side::Shared)?;
    for (at, is, flags) in [(0, Side::Private, 0), (P, Side::Shared, 8), (2 * P, Side::Private, 0)] {
        let exit = vm.vcpu.execute(GuestOp::read_u64(vm.gpa(at, is.other())));
        let fault = Exit::MemoryFault { errno: Errno::EFAULT, flags, gpa: InPlaceVm::GPA + at, size: P };
        claim_eq!(exit, fault, "a {:?} load of {is:?} memory", is.other());
    }
    Ok(())
}

fn truncation_of_pinned_shared_memory(cx: &Context, &size: &FolioSize) -> TestResult {
    cx.require(Facility::HoldPin)?;
    let vm = vm_of(cx, size, Side::Shared)?;
    let block = size.bytes();
    vm.map.write_u64(0, 0x5EED)?;
    let pin = claim_ok!(vm.map.hold(0, P, HoldKind::Pin));
    if size == FolioSize::Base {
        claim_eq!(vm.gmem.punch_hole(0, block), Ok(()), "a base page that is pinned");
    } else {
        claim_eq!(vm.gmem.punch_hole(0, block), Err(Errno::EAGAIN), "a split folio with a pinned page");
        vm.claim_host(0, 0x5EED)?;
        claim_eq!(vm.gmem.punch_hole(0, P), Ok(()), "a part of it is zeroed, not freed");
        vm.claim_host(0, 0)?;
        claim_eq!(vm.gmem.punch_hole(0, block), Err(Errno::EAGAIN), "the whole again");
    }
    drop(pin);
    claim_eq!(vm.gmem.punch_hole(0, block), Ok(()), "when the pin is gone");
    claim_eq!(claim_ok!(vm.gmem.cache_stat(0, block)).cached, 0, "pages left in the block");
    vm.claim_host(0, 0)
}

fn truncation_of_private_memory_frees_it(cx: &Context, &size: &FolioSize) -> TestResult {
    let mut vm = vm_of(cx, size, Side::Private)?;
    for round in 1..3 {
        vm.guest_write(0, Side::Private, round)?;
        vm.guest_write(vm.len - P, Side::Private, round)?;
        claim_ok!(vm.gmem.punch_hole(0, vm.len));
        claim_eq!(claim_ok!(vm.gmem.cache_stat(0, 0)).cached, 0, "pages left");
        vm.claim_guest(0, Side::Private, 0)?;
        vm.claim_guest(vm.len - P, Side::Private, 0)?;
        vm.claim_sigbus(0)?;
    }
    Ok(())
}

fn closed_file_lives_on_in_its_pin(cx: &Context, &size: &FolioSize) -> TestResult {
    const KPF_BUDDY: u64 = 1 << 10;
    const KPF_NOPAGE: u64 = 1 << 20;
    let InPlaceVm { vcpu, map, gmem, vm, .. } = vm_of(cx, size, Side::Shared)?;
    map.write_u64(P, 1)?;
    map.write_u64(2 * P, 1)?;
    let (pinned, free) = (map.frame(P)?, map.frame(2 * P)?);
    let pin = claim_ok!(map.hold(P, P, HoldKind::Pin));
    drop((map, gmem, vm, vcpu));
    let is_free = |frame| cx.machine().page_flags(frame).map(|flags| flags & (KPF_BUDDY | KPF_NOPAGE) != 0);
    claim_eq!(is_free(pinned)?, false, "the pinned page is free while the pin is there");
    drop(pin);
    claim_eq!((is_free(pinned)?, is_free(free)?), (true, true), "the pinned page and its neighbour are free");
    Ok(())
}

fn allocation_of_a_page_brings_its_folio(cx: &Context, &size: &FolioSize) -> TestResult {
    for side in [Side::Private, Side::Shared] {
        let vm = vm_of(cx, size, side)?;
        claim_ok!(vm.gmem.allocate(3 * P, P));
        let cached = claim_ok!(vm.gmem.cache_stat(0, 0)).cached;
        claim_eq!(cached, size.bytes() / P, "pages of the file after one was allocated, {side:?}");
        claim_ok!(vm.gmem.allocate(4 * P, P));
        let again = cached + u64::from(size == FolioSize::Base);
        claim_eq!(claim_ok!(vm.gmem.cache_stat(0, 0)).cached, again, "after its neighbour was allocated, {side:?}");
    }
    Ok(())
}

fn single_pages_are_converted(cx: &Context, &size: &FolioSize) -> TestResult {
    require_split(cx, size)?;
    let mut vm = vm_of(cx, size, Side::Private)?;
    let step = vm.len / 8;
    for at in (0..vm.len).step_by(step as usize) {
        vm.guest_write(at + P, Side::Private, at + 1)?;
        vm.convert(at, P, Side::Shared)?;
        vm.map.write_u64(at, at + 3)?;
        vm.claim_guest(at, Side::Shared, at + 3)?;
        vm.claim_guest(at + P, Side::Private, at + 1)?;
    }
    for at in (0..vm.len).step_by(step as usize) {
        vm.convert(at, P, Side::Private)?;
        vm.claim_sigbus(at)?;
        vm.claim_guest(at + P, Side::Private, at + 1)?;
    }
    Ok(())
}

/// Mappings of 2 MiB and 1 GiB.
fn levels(vm: &dyn Vm) -> TestResult<(u64, u64)> {
    Ok((claim_ok!(vm.statistic("pages_2m")), claim_ok!(vm.statistic("pages_1g"))))
}

fn mapping_level_is_reached_lost_and_regained(cx: &Context, &size: &FolioSize) -> TestResult {
    require_split(cx, size)?;
    let mut vm = vm_of(cx, size, Side::Private)?;
    let is_td = vm.vm.shared_bit() != 0;
    // A TD is mapped at 2 MiB at most.
    let whole = if size == FolioSize::Pud && !is_td { (0, 1) } else { (1, 0) };
    vm.guest_write(0, Side::Private, 1)?;
    claim_eq!(levels(&*vm.vm)?, whole, "2M and 1G mappings when the folio is whole");
    vm.convert(P, P, Side::Shared)?;
    vm.claim_guest(0, Side::Private, 1)?;
    vm.map.write_u64(P, 1)?;
    vm.claim_guest(P, Side::Shared, 1)?;
    claim_eq!(levels(&*vm.vm)?, (0, 0), "when a page of it is shared");
    vm.convert(P, P, Side::Private)?;
    if is_td {
        vm.claim_guest(P, Side::Private, 0)?;
        claim_eq!(levels(&*vm.vm)?, (0, 0), "a TD's mapping that was split stays split");
        claim_ok!(vm.gmem.punch_hole(0, size.bytes()));
        vm.guest_write(P, Side::Private, 2)?;
        claim_eq!(levels(&*vm.vm)?, (0, 0), "also when its pages were taken: KVM does not promote");
        return Ok(());
    }
    vm.guest_write(P, Side::Private, 2)?;
    claim_eq!(levels(&*vm.vm)?, whole, "when nothing of it is shared any more");
    Ok(())
}

fn contents_survive_split_and_merge(cx: &Context, &size: &FolioSize) -> TestResult {
    require_split(cx, size)?;
    let mut vm = vm_of(cx, size, Side::Private)?;
    vm.guest_fill(0, MIB2, Side::Private, 0x3C)?;
    let (at, len) = (5 * P, 3 * P);
    vm.convert(at, len, Side::Shared)?;
    vm.claim_guest_range(0, at, Side::Private, 0x3C)?;
    vm.claim_guest_range(at + len, MIB2 - at - len, Side::Private, 0x3C)?;
    if InPlaceVm::keeps_contents(cx) {
        claim_eq!(vm.map.find_mismatch(at, len, 0x3C)?, None, "the shared pages");
    }
    vm.map.fill(at, len, 0x4D)?;
    vm.claim_guest_range(at, len, Side::Shared, 0x4D)?;
    vm.convert(at, len, Side::Private)?;
    vm.claim_guest_range(0, at, Side::Private, 0x3C)?;
    vm.claim_guest_range(at + len, MIB2 - at - len, Side::Private, 0x3C)?;
    let kept = if InPlaceVm::keeps_contents(cx) { 0x4D } else { 0 };
    vm.claim_guest_range(at, len, Side::Private, kept)
}

fn merged_folio_is_one_again(cx: &Context, &size: &FolioSize) -> TestResult {
    require_split(cx, size)?;
    let mut vm = vm_of(cx, size, Side::Private)?;
    vm.guest_write(0, Side::Private, 1)?;
    let pages = (size.bytes() / P) as u32;
    let frame = vm.account(cx, 0)?.frame;
    // What a TD's mappings hold, where they hold anything, does not count here.
    let by_the_file = |vm: &InPlaceVm| -> TestResult<u32> {
        let account = vm.account(cx, 3 * P)?;
        Ok(account.held_by("page-cache").unwrap_or(account.refs))
    };
    claim_eq!(by_the_file(&vm)?, pages, "references of the file to the whole folio");
    vm.convert(P, P, Side::Shared)?;
    claim_eq!(by_the_file(&vm)?, 1, "to a page of the split folio");
    vm.convert(P, P, Side::Private)?;
    claim_eq!(by_the_file(&vm)?, pages, "to the folio that is whole again");
    claim_eq!(vm.account(cx, 0)?.frame, frame, "and it has not moved");
    Ok(())
}

/// TDH.MEM.PAGE.DEMOTE.
const DEMOTE: u16 = 15;

/// First page, number of pages, splits: in three blocks of 2 MiB.
const RANGES: &[(&str, (u64, u64, usize))] = &[
    ("one_page", (3, 1, 1)),
    ("first_page", (0, 1, 1)),
    ("last_page", (511, 1, 1)),
    ("across_one_boundary", (510, 4, 2)),
    ("head_and_tail", (100, 1200, 2)),
    ("head_only", (100, 412, 1)),
    ("tail_only", (512, 600, 1)),
    ("one_block", (512, 512, 0)),
    ("everything", (0, 1536, 0)),
];

fn only_head_and_tail_are_split(cx: &Context, &(first, pages, splits): &(u64, u64, usize)) -> TestResult {
    require_split(cx, if splits == 0 { FolioSize::Base } else { FolioSize::Pmd })?;
    let mut vm = InPlaceVm::of_folios(cx, FolioSize::Pmd, 3 * MIB2, Side::Private)?;
    let Some(module) = cx.machine().tdx_module() else { gmemtest::skip!(NoHardwareInjection, "no module to look at") };
    for block in 0..3 {
        vm.guest_fill(block * MIB2, MIB2, Side::Private, 0x10)?;
    }
    let position = claim_ok!(module.position());
    vm.convert(first * P, pages * P, Side::Shared)?;
    let calls = claim_ok!(module.calls_since(position));
    let demoted = calls.iter().filter(|call| call.leaf == DEMOTE && call.status == 0).count();
    claim_eq!(demoted, splits, "huge mappings split by the conversion of {pages} pages from {first}");
    for page in [0, 99, 100, 509, 511, 512, 1023, 1024, 1300, 1535] {
        if !(first..first + pages).contains(&page) {
            vm.claim_guest_range(page * P, P, Side::Private, 0x10)?;
        }
    }
    claim_eq!(claim_ok!(module.violations()), Vec::<String>::new(), "the module's invariants");
    Ok(())
}

/// How the block stands when the guest accepts.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Block {
    Empty,
    Pending,
    Mapped,
    Small,
}

const ALREADY_ACCEPTED_2M: u64 = 0x0000_0B0A_0000_0001;
const SIZE_MISMATCH: u64 = 0xC000_0B0B;

/// The state, the level that is accepted, the upper half or the whole of the status, and the splits.
type Accept = (Block, u8, u64, usize);

const ACCEPTS: &[(&str, Accept)] = &[
    ("base_page_of_nothing", (Block::Empty, 0, 0, 0)),
    ("block_of_nothing", (Block::Empty, 1, 0, 0)),
    ("base_page_of_a_pending_block", (Block::Pending, 0, 0, 1)),
    ("pending_block", (Block::Pending, 1, 0, 0)),
    ("base_page_of_a_mapped_block", (Block::Mapped, 0, ALREADY_ACCEPTED_2M, 0)),
    ("mapped_block", (Block::Mapped, 1, ALREADY_ACCEPTED_2M, 0)),
    ("block_of_base_pages", (Block::Small, 1, SIZE_MISMATCH << 32, 0)),
];

fn accept_at_another_level(cx: &Context, &(block, level, status, splits): &Accept) -> TestResult {
    let mut vm = InPlaceVm::of_folios(cx, FolioSize::Pmd, MIB2, Side::Private)?;
    let Some(module) = cx.machine().tdx_module() else { gmemtest::skip!(NoHardwareInjection, "no module to look at") };
    let base = InPlaceVm::GPA;
    match block {
        Block::Empty => {}
        Block::Pending => {
            let done = vm.vcpu.pre_fault(base, MIB2, 0);
            claim_eq!((done.result, done.size), (Ok(()), 0), "pre-fault of the block");
            claim_eq!(levels(&*vm.vm)?.0, 1, "2M mappings");
        }
        Block::Mapped => {
            vm.guest_write(0, Side::Private, 0x5EED)?;
            claim_eq!(levels(&*vm.vm)?.0, 1, "2M mappings");
        }
        Block::Small => {
            claim_eq!(vm.vcpu.execute(GuestOp::Accept { gpa: base + P, len: P, level: 0 }), Exit::Done(0), "a page");
        }
    }
    let position = claim_ok!(module.position());
    let len = if level == 0 { P } else { MIB2 };
    let exit = vm.vcpu.execute(GuestOp::Accept { gpa: base, len, level });
    let Exit::Done(found) = exit else { gmemtest::fail!("ACCEPT ended in {exit:x?}") };
    let found = if status == SIZE_MISMATCH << 32 { found & !0xFFFF_FFFF } else { found };
    claim_eq!(found, status, "the status of TDG.MEM.PAGE.ACCEPT");
    let calls = claim_ok!(module.calls_since(position));
    let demoted = calls.iter().filter(|call| call.leaf == DEMOTE && call.status == 0).count();
    claim_eq!(demoted, splits, "huge mappings split by the host");
    let left = if block == Block::Mapped { 0x5EED } else { 0 };
    vm.claim_guest(0, Side::Private, left)?;
    claim_matches!(vm.vcpu.execute(GuestOp::write_u64(base + 5 * P, 1)), Exit::Done(_), "the rest of the block");
    claim!(claim_ok!(module.violations()).is_empty(), "the module's invariants hold");
    Ok(())
}

/// The stand-alone binary.
pub fn main() -> ExitCode {
    gmemtest::cli::selftest_main(&[&SUITE])
}
