//! fallocate(2) on a guest_memfd: the order of its checks, what it allocates and frees, and what cachestat(2) sees.

use std::process::ExitCode;
use std::sync::Arc;

use gmemtest::harness::{Context, TestResult};
use gmemtest::machine::{CacheStat, Errno, GuestMemfd, PAGE_SIZE, Protection, Vm, VmConfig};
use gmemtest::uapi::kvm::{GUEST_MEMFD_FLAG_INIT_SHARED, GUEST_MEMFD_FLAG_MMAP};
use gmemtest::{claim, claim_eq, claim_err, claim_ok};
use nix::sys::signal::{SaFlags, SigAction, SigEvent, SigHandler, SigSet, SigevNotify, Signal, sigaction};
use nix::sys::time::TimeSpec;
use nix::sys::timer::{Expiration, Timer, TimerSetTimeFlags};
use nix::time::ClockId;

gmemtest::suite! {
    /// fallocate(2) is how user space gives pages to a guest_memfd and takes them away. The VFS checks first (signs,
    /// mode bits, overflow), kvm_gmem_fallocate() next (KEEP_SIZE, PUNCH_HOLE, alignment), the range last.
    pub static SUITE: fallocate needs [Vm, GuestMemfd] {
        /// Each input, on a file of four pages, gives the result of the first check that it fails, also where it would
        /// fail several (guest_memfd notes 2.5; vfs_fallocate(), kvm_gmem_fallocate()). A failure means that a program
        /// which probes for a mode takes the wrong answer for it.
        input_gives_the_result_of_its_first_failed_check[INPUTS];

        /// A range of which offset or length is no multiple of the page size cannot be punched (guest_memfd_test).
        /// A failure means that a part of a page is freed, or zeroed.
        unaligned_range_cannot_be_punched[UNALIGNED];

        /// Nor can it be allocated. A failure means that a call for half a page does something to a whole one.
        unaligned_range_cannot_be_allocated[UNALIGNED];

        /// A call that fails changes nothing: the pages that were there stay, and no other comes. A failure means that
        /// a VMM cannot trust its picture of the file after an error.
        failing_call_leaves_the_pages_alone[INPUTS] needs [Cachestat];

        /// A bad descriptor is EBADF before anything else is looked at. A failure means that a mistaken descriptor
        /// reaches the file system.
        closed_descriptor_is_ebadf needs [RealFiles];

        /// allocate adds exactly the pages of its range that were missing, punch frees exactly those that were there;
        /// cachestat counts them (guest_memfd_test asserts the results, not the pages). A failure means that memory is
        /// lost or kept behind the VMM's back.
        steps_leave_this_many_pages[STEPS] needs [Cachestat];

        /// cachestat counts the pages of which the range covers any byte, and a length of 0 reaches to the end. A
        /// failure means that nobody can tell how much memory a file has.
        cachestat_counts_the_pages_of_its_range[RANGES] needs [Cachestat];

        /// Pages written by the host are in the cache, and are never dirty in the sense of cachestat nor under
        /// writeback: the mapping sets no dirty tag. A failure means that writeback can come to guest memory.
        written_pages_are_not_dirty_for_cachestat needs [Cachestat, GmemInitShared];

        /// mmap alone allocates nothing; each first access of the host allocates its page and no other (no
        /// fault-around); munmap frees nothing. A failure means that a mapping costs memory that nobody asked for.
        mapping_allocates_by_access_only needs [Cachestat, GmemInitShared];

        /// Allocating a range again keeps its contents. A failure means that guest memory is lost by a call that
        /// programs use to make sure that it is there.
        allocating_again_keeps_the_contents needs [GmemInitShared];

        /// Punching frees contents: the page that comes next at that offset reads zero, its neighbours are untouched
        /// (guest_memfd_test). A failure means that old data comes back, or that a neighbour loses its own.
        punched_page_comes_back_as_zeroes_and_its_neighbours_stay[PUNCHED] needs [GmemInitShared];

        /// A page that was allocated but never touched reads zero, although allocation itself does not zero it: after
        /// many pages of secret bytes were freed to the system, new ones show none of them. A failure leaks other
        /// processes' data into the guest's memory.
        allocated_page_reads_zero_at_first_touch needs [GmemInitShared];

        /// A punch from inside the file to far beyond its end frees the pages up to the end. A failure means that the
        /// last pages of a file cannot be freed by a generous range.
        punch_across_the_end_frees_up_to_the_end needs [Cachestat];

        /// A signal ends an allocation with EINTR between two pages; the pages so far stay. A failure means that an
        /// allocation of a terabyte cannot be interrupted.
        signal_interrupts_an_allocation_and_pages_stay needs [Cachestat, RealFiles];
    }
}

const P: i64 = PAGE_SIZE as i64;
/// FALLOC_FL_KEEP_SIZE.
const KEEP: i32 = libc::FALLOC_FL_KEEP_SIZE;
/// FALLOC_FL_PUNCH_HOLE.
const HOLE: i32 = libc::FALLOC_FL_PUNCH_HOLE;
/// FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE.
const PUNCH: i32 = HOLE | KEEP;
/// FALLOC_FL_NO_HIDE_STALE, which no kernel implements.
const NO_HIDE_STALE: i32 = 4;
const COLLAPSE: i32 = libc::FALLOC_FL_COLLAPSE_RANGE;
const ZERO: i32 = libc::FALLOC_FL_ZERO_RANGE;
const INSERT: i32 = libc::FALLOC_FL_INSERT_RANGE;
const UNSHARE: i32 = libc::FALLOC_FL_UNSHARE_RANGE;
/// FALLOC_FL_WRITE_ZEROES, known since 6.17, refused before as an unknown bit with the same errno.
const WRITE_ZEROES: i32 = 0x80;
/// A bit that no kernel knows.
const UNKNOWN: i32 = 0x4000;
const MAX: i64 = i64::MAX;

/// mode, offset, length, and the result on a file of four pages.
struct Input(i32, i64, i64, Result<(), Errno>);

const EINVAL: Result<(), Errno> = Err(Errno::EINVAL);
const EOPNOTSUPP: Result<(), Errno> = Err(Errno::EOPNOTSUPP);
const EFBIG: Result<(), Errno> = Err(Errno::EFBIG);

const INPUTS: &[(&str, Input)] = &[
    // Signs and zero length, before the mode is looked at.
    ("negative_offset", Input(KEEP, -P, P, EINVAL)),
    ("negative_length", Input(KEEP, 0, -P, EINVAL)),
    ("zero_length", Input(KEEP, 0, 0, EINVAL)),
    ("punch_of_zero_length", Input(PUNCH, 0, 0, EINVAL)),
    ("punch_at_a_negative_offset", Input(PUNCH, -P, P, EINVAL)),
    ("zero_length_and_unknown_mode", Input(UNKNOWN, 0, 0, EINVAL)),
    ("negative_offset_and_missing_keep_size", Input(0, -P, P, EINVAL)),
    ("negative_offset_and_unaligned_length", Input(KEEP, -P, P + 1, EINVAL)),
    // Mode bits that the VFS refuses, before the sum of offset and length is looked at.
    ("unknown_mode", Input(UNKNOWN | KEEP, 0, P, EOPNOTSUPP)),
    ("unknown_mode_and_overflow", Input(UNKNOWN | KEEP, P, MAX, EOPNOTSUPP)),
    ("unknown_mode_and_unaligned_offset", Input(UNKNOWN | KEEP, 1, P, EOPNOTSUPP)),
    ("punch_and_zero_range", Input(PUNCH | ZERO, 0, P, EOPNOTSUPP)),
    ("punch_and_collapse", Input(PUNCH | COLLAPSE, 0, P, EOPNOTSUPP)),
    ("punch_without_keep_size", Input(HOLE, 0, P, EOPNOTSUPP)),
    ("punch_without_keep_size_and_overflow", Input(HOLE, P, MAX, EOPNOTSUPP)),
    ("collapse_and_keep_size", Input(COLLAPSE | KEEP, 0, P, EOPNOTSUPP)),
    ("insert_and_keep_size", Input(INSERT | KEEP, 0, P, EOPNOTSUPP)),
    ("write_zeroes_and_keep_size", Input(WRITE_ZEROES | KEEP, 0, P, EOPNOTSUPP)),
    ("no_hide_stale", Input(NO_HIDE_STALE | KEEP, 0, P, EOPNOTSUPP)),
    ("punch_and_no_hide_stale", Input(NO_HIDE_STALE | PUNCH, 0, P, EOPNOTSUPP)),
    // Overflow, before guest_memfd is asked.
    ("overflow", Input(KEEP, P, MAX, EFBIG)),
    ("overflow_of_aligned_numbers", Input(KEEP, P, MAX - (P - 1), EFBIG)),
    ("overflow_of_a_punch", Input(PUNCH, P, MAX - (P - 1), EFBIG)),
    ("overflow_and_missing_keep_size", Input(0, P, MAX, EFBIG)),
    // What guest_memfd does not offer, before alignment.
    ("mode_zero", Input(0, 0, P, EOPNOTSUPP)),
    ("mode_zero_and_unaligned_offset", Input(0, 1, P, EOPNOTSUPP)),
    ("mode_zero_beyond_the_end", Input(0, 4 * P, P, EOPNOTSUPP)),
    ("zero_range", Input(ZERO, 0, P, EOPNOTSUPP)),
    ("zero_range_and_keep_size", Input(ZERO | KEEP, 0, P, EOPNOTSUPP)),
    ("zero_range_and_keep_size_and_unaligned_offset", Input(ZERO | KEEP, 1, P, EOPNOTSUPP)),
    ("collapse", Input(COLLAPSE, 0, P, EOPNOTSUPP)),
    ("insert", Input(INSERT, 0, P, EOPNOTSUPP)),
    ("unshare", Input(UNSHARE, 0, P, EOPNOTSUPP)),
    ("unshare_and_keep_size", Input(UNSHARE | KEEP, 0, P, EOPNOTSUPP)),
    ("write_zeroes", Input(WRITE_ZEROES, 0, P, EOPNOTSUPP)),
    // Alignment, before the end of the file.
    ("unaligned_offset_beyond_the_end", Input(KEEP, 8 * P + 1, P, EINVAL)),
    ("unaligned_length_of_a_punch_beyond_the_end", Input(PUNCH, 8 * P, P + 1, EINVAL)),
    // The end of the file: allocation must stay inside, punching need not.
    ("allocate_at_the_end", Input(KEEP, 4 * P, P, EINVAL)),
    ("allocate_after_the_end", Input(KEEP, 5 * P, P, EINVAL)),
    ("allocate_across_the_end", Input(KEEP, 3 * P, 2 * P, EINVAL)),
    ("allocate_more_than_the_file", Input(KEEP, 0, 5 * P, EINVAL)),
    ("allocate_the_largest_range", Input(KEEP, 0, MAX - (P - 1), EINVAL)),
    ("allocate_at_the_largest_offset", Input(KEEP, MAX - (2 * P - 1), P, EINVAL)),
    ("punch_at_the_end", Input(PUNCH, 4 * P, P, Ok(()))),
    ("punch_after_the_end", Input(PUNCH, 5 * P, P, Ok(()))),
    ("punch_at_the_largest_offset", Input(PUNCH, MAX - (2 * P - 1), P, Ok(()))),
    ("punch_a_hole", Input(PUNCH, 0, P, Ok(()))),
    ("allocate_what_is_there", Input(KEEP, 2 * P, P, Ok(()))),
];

fn file(cx: &Context, pages: u64, flags: u64) -> TestResult<(Arc<dyn Vm>, Arc<dyn GuestMemfd>)> {
    let vm = cx.machine().create_vm(VmConfig::Bare)?;
    let gmem = vm.create_guest_memfd(pages * PAGE_SIZE, flags)?;
    Ok((vm, gmem))
}

fn shared_file(cx: &Context, pages: u64) -> TestResult<(Arc<dyn Vm>, Arc<dyn GuestMemfd>)> {
    file(cx, pages, GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED)
}

fn input_gives_the_result_of_its_first_failed_check(
    cx: &Context,
    &Input(mode, offset, len, expected): &Input,
) -> TestResult {
    let (_vm, gmem) = file(cx, 4, 0)?;
    gmem.allocate(2 * PAGE_SIZE, PAGE_SIZE)?;
    claim_eq!(gmem.fallocate(mode, offset, len), expected, "fallocate(mode {mode:#x}, {offset:#x}, {len:#x})");
    Ok(())
}

fn failing_call_leaves_the_pages_alone(cx: &Context, &Input(mode, offset, len, _): &Input) -> TestResult {
    let (_vm, gmem) = file(cx, 4, 0)?;
    gmem.allocate(2 * PAGE_SIZE, PAGE_SIZE)?;
    let result = gmem.fallocate(mode, offset, len);
    let pages: Vec<u64> = (0..4)
        .map(|page| gmem.cache_stat(page * PAGE_SIZE, PAGE_SIZE).map(|stat| stat.cached))
        .collect::<Result<_, _>>()?;
    claim_eq!(pages, [0, 0, 1, 0], "pages after fallocate(mode {mode:#x}, {offset:#x}, {len:#x}) gave {result:?}");
    Ok(())
}

/// Offset and length of ranges of which one is unaligned.
const UNALIGNED: &[(&str, (i64, i64))] = &[
    ("0_1", (0, 1)),
    ("0_4095", (0, P - 1)),
    ("0_4097", (0, P + 1)),
    ("1_1", (1, 1)),
    ("1_4095", (1, P - 1)),
    ("1_4096", (1, P)),
    ("1_4097", (1, P + 1)),
    ("4096_1", (P, 1)),
    ("4096_4095", (P, P - 1)),
    ("4096_4097", (P, P + 1)),
];

fn unaligned_range_cannot_be_punched(cx: &Context, &(offset, len): &(i64, i64)) -> TestResult {
    let (_vm, gmem) = file(cx, 4, 0)?;
    gmem.allocate(0, 4 * PAGE_SIZE)?;
    claim_err!(gmem.fallocate(PUNCH, offset, len), Errno::EINVAL, "punch of {len} bytes at {offset}");
    Ok(())
}

fn unaligned_range_cannot_be_allocated(cx: &Context, &(offset, len): &(i64, i64)) -> TestResult {
    let (_vm, gmem) = file(cx, 4, 0)?;
    claim_err!(gmem.fallocate(KEEP, offset, len), Errno::EINVAL, "allocation of {len} bytes at {offset}");
    Ok(())
}

fn closed_descriptor_is_ebadf(_cx: &Context) -> TestResult {
    // SAFETY: the call touches no memory, and there is no descriptor -1.
    let result = Errno::result(unsafe { libc::fallocate(-1, UNKNOWN, -1, -1) });
    claim_err!(result, Errno::EBADF, "fallocate of descriptor -1 with everything else wrong");
    Ok(())
}

/// mode, first page and number of pages.
type Step = (i32, u64, u64);

/// Steps on a file of eight pages, and which pages are there at the end, as a mask.
const STEPS: &[(&str, (&[Step], u8))] = &[
    ("allocate_the_first", (&[(KEEP, 0, 1)], 0b0000_0001)),
    ("allocate_the_last", (&[(KEEP, 7, 1)], 0b1000_0000)),
    ("allocate_all", (&[(KEEP, 0, 8)], 0b1111_1111)),
    ("allocate_twice", (&[(KEEP, 2, 2), (KEEP, 2, 2)], 0b0000_1100)),
    ("allocate_overlapping", (&[(KEEP, 1, 3), (KEEP, 2, 4)], 0b0011_1110)),
    ("allocate_around", (&[(KEEP, 3, 1), (KEEP, 0, 8)], 0b1111_1111)),
    ("punch_the_first", (&[(KEEP, 0, 8), (PUNCH, 0, 1)], 0b1111_1110)),
    ("punch_the_last", (&[(KEEP, 0, 8), (PUNCH, 7, 1)], 0b0111_1111)),
    ("punch_the_middle", (&[(KEEP, 0, 8), (PUNCH, 3, 2)], 0b1110_0111)),
    ("punch_all", (&[(KEEP, 0, 8), (PUNCH, 0, 8)], 0)),
    ("punch_twice", (&[(KEEP, 0, 8), (PUNCH, 1, 1), (PUNCH, 1, 1)], 0b1111_1101)),
    ("punch_more_than_there_is", (&[(KEEP, 3, 2), (PUNCH, 0, 8)], 0)),
    ("punch_and_allocate_again", (&[(KEEP, 0, 8), (PUNCH, 2, 3), (KEEP, 3, 1)], 0b1110_1011)),
    ("punch_across_the_end", (&[(KEEP, 0, 8), (PUNCH, 6, 1 << 20)], 0b0011_1111)),
];

fn steps_leave_this_many_pages(cx: &Context, &(steps, mask): &(&[Step], u8)) -> TestResult {
    let (_vm, gmem) = file(cx, 8, 0)?;
    for &(mode, page, pages) in steps {
        let result = gmem.fallocate(mode, page as i64 * P, pages as i64 * P);
        claim_eq!(result, Ok(()), "fallocate(mode {mode:#x}) of {pages} pages at page {page}");
    }
    let mut present = 0u8;
    for page in 0..8 {
        present |= u8::from(gmem.cache_stat(page * PAGE_SIZE, PAGE_SIZE)?.cached == 1) << page;
    }
    claim_eq!(format!("{present:#010b}"), format!("{mask:#010b}"), "pages in the cache after {steps:?}");
    claim_eq!(gmem.cache_stat(0, 0)?.cached, u64::from(mask.count_ones()), "count over the whole file");
    Ok(())
}

/// Offset and length given to cachestat on a file of eight pages with pages 0, 1, 4 and 7, and the count.
const RANGES: &[(&str, (u64, u64, u64))] = &[
    ("whole_file", (0, 8 * PAGE_SIZE, 4)),
    ("length_of_zero", (0, 0, 4)),
    ("length_of_zero_from_the_middle", (4 * PAGE_SIZE, 0, 2)),
    ("first_two_pages", (0, 2 * PAGE_SIZE, 2)),
    ("a_hole", (2 * PAGE_SIZE, 2 * PAGE_SIZE, 0)),
    ("one_byte", (4 * PAGE_SIZE + 17, 1, 1)),
    ("two_bytes_in_two_pages", (PAGE_SIZE - 1, 2, 2)),
    ("beyond_the_end", (8 * PAGE_SIZE, PAGE_SIZE, 0)),
    ("across_the_end", (7 * PAGE_SIZE, 4 * PAGE_SIZE, 1)),
    ("far_beyond_the_end", (1 << 50, 0, 0)),
];

fn cachestat_counts_the_pages_of_its_range(cx: &Context, &(offset, len, cached): &(u64, u64, u64)) -> TestResult {
    let (_vm, gmem) = file(cx, 8, 0)?;
    for page in [0, 1, 4, 7] {
        gmem.allocate(page * PAGE_SIZE, PAGE_SIZE)?;
    }
    claim_eq!(gmem.cache_stat(offset, len), Ok(CacheStat { cached, dirty: 0, writeback: 0 }), "{len} at {offset:#x}");
    Ok(())
}

fn written_pages_are_not_dirty_for_cachestat(cx: &Context) -> TestResult {
    let (_vm, gmem) = shared_file(cx, 4)?;
    let mapping = gmem.map(4 * PAGE_SIZE, 0, Protection::SHARED_RW)?;
    mapping.fill(0, 3 * PAGE_SIZE, 0x5a)?;
    let mapped = gmem.cache_stat(0, 0)?;
    drop(mapping);
    let expected = CacheStat { cached: 3, dirty: 0, writeback: 0 };
    claim_eq!((mapped, gmem.cache_stat(0, 0)?), (expected, expected), "while mapped, and after munmap");
    Ok(())
}

fn mapping_allocates_by_access_only(cx: &Context) -> TestResult {
    let (_vm, gmem) = shared_file(cx, 16)?;
    let mapping = gmem.map(16 * PAGE_SIZE, 0, Protection::SHARED_RW)?;
    claim_eq!(gmem.cache_stat(0, 0)?.cached, 0, "pages after mmap");
    mapping.read_u64(5 * PAGE_SIZE)?;
    claim_eq!(gmem.cache_stat(0, 0)?.cached, 1, "pages after a read fault");
    mapping.write_u64(7 * PAGE_SIZE, 1)?;
    claim_eq!(gmem.cache_stat(0, 0)?.cached, 2, "pages after a write fault");
    mapping.write_u64(5 * PAGE_SIZE, 1)?;
    claim_eq!(gmem.cache_stat(0, 0)?.cached, 2, "pages after a store to a page that was there");
    drop(mapping);
    claim_eq!(gmem.cache_stat(0, 0)?.cached, 2, "pages after munmap");
    Ok(())
}

fn allocating_again_keeps_the_contents(cx: &Context) -> TestResult {
    let (_vm, gmem) = shared_file(cx, 4)?;
    let mapping = gmem.map(4 * PAGE_SIZE, 0, Protection::SHARED_RW)?;
    mapping.fill(0, 2 * PAGE_SIZE, 0x77)?;
    gmem.allocate(0, 4 * PAGE_SIZE)?;
    claim_eq!(mapping.find_mismatch(0, 2 * PAGE_SIZE, 0x77)?, None, "pages that were there");
    claim_eq!(mapping.find_mismatch(2 * PAGE_SIZE, 2 * PAGE_SIZE, 0)?, None, "pages that came");
    Ok(())
}

/// First page and number of pages punched in a file of eight, and whether they are allocated again before they are read.
const PUNCHED: &[(&str, (u64, u64, Again))] = &[
    ("first", (0, 1, Again::Fault)),
    ("last", (7, 1, Again::Fault)),
    ("middle", (3, 2, Again::Fault)),
    ("all", (0, 8, Again::Fault)),
    ("middle_then_allocated", (3, 2, Again::Allocate)),
];

/// How pages come back after a punch.
#[derive(Clone, Copy, PartialEq)]
enum Again {
    /// By the host's next access.
    Fault,
    /// By fallocate.
    Allocate,
}

fn punched_page_comes_back_as_zeroes_and_its_neighbours_stay(
    cx: &Context,
    &(page, pages, again): &(u64, u64, Again),
) -> TestResult {
    let (_vm, gmem) = shared_file(cx, 8)?;
    let mapping = gmem.map(8 * PAGE_SIZE, 0, Protection::SHARED_RW)?;
    mapping.fill(0, 8 * PAGE_SIZE, 0xaa)?;
    let (start, end) = (page * PAGE_SIZE, (page + pages) * PAGE_SIZE);
    gmem.punch_hole(start, end - start)?;
    if again == Again::Allocate {
        gmem.allocate(start, end - start)?;
    }
    claim_eq!(mapping.find_mismatch(start, end - start, 0)?, None, "what was punched");
    claim_eq!(mapping.find_mismatch(0, start, 0xaa)?, None, "what is before it");
    claim_eq!(mapping.find_mismatch(end, 8 * PAGE_SIZE - end, 0xaa)?, None, "what is after it");
    mapping.fill(start, end - start, 0x55)?;
    claim_eq!(mapping.find_mismatch(start, end - start, 0x55)?, None, "what was punched, written again");
    Ok(())
}

fn allocated_page_reads_zero_at_first_touch(cx: &Context) -> TestResult {
    const PAGES: u64 = 64;
    let (_vm, gmem) = shared_file(cx, PAGES)?;
    let mapping = gmem.map(PAGES * PAGE_SIZE, 0, Protection::SHARED_RW)?;
    for round in 0..4u8 {
        mapping.fill(0, PAGES * PAGE_SIZE, 0xc0 | round)?;
        gmem.punch_hole(0, PAGES * PAGE_SIZE)?;
        gmem.allocate(0, PAGES * PAGE_SIZE)?;
        let stale = mapping.find_mismatch(0, PAGES * PAGE_SIZE, 0)?;
        claim_eq!(stale, None, "offset and value of a stale byte in round {round}");
    }
    Ok(())
}

fn punch_across_the_end_frees_up_to_the_end(cx: &Context) -> TestResult {
    let (_vm, gmem) = file(cx, 4, 0)?;
    gmem.allocate(0, 4 * PAGE_SIZE)?;
    claim_ok!(gmem.fallocate(PUNCH, P, MAX - (2 * P - 1)), "punch from the second page to the largest offset");
    claim_eq!(gmem.cache_stat(0, 0)?.cached, 1, "pages left");
    Ok(())
}

/// Does nothing: its delivery is what interrupts.
extern "C" fn on_signal(_signal: libc::c_int) {}

fn signal_interrupts_an_allocation_and_pages_stay(cx: &Context) -> TestResult {
    const LARGEST: u64 = 2 << 30;
    let (_vm, gmem) = file(cx, LARGEST / PAGE_SIZE, 0)?;
    let action = SigAction::new(SigHandler::Handler(on_signal), SaFlags::empty(), SigSet::empty());
    // SAFETY: the handler does nothing.
    unsafe { sigaction(Signal::SIGALRM, &action) }?;
    let to_this_thread =
        SigevNotify::SigevThreadId { signal: Signal::SIGALRM, si_value: 0, thread_id: nix::unistd::gettid().as_raw() };
    let mut timer = Timer::new(ClockId::CLOCK_MONOTONIC, SigEvent::new(to_this_thread))?;
    let every = TimeSpec::new(0, 1_000_000);
    timer.set(Expiration::Interval(every), TimerSetTimeFlags::empty())?;
    // The range grows until a signal falls into it; one that falls before the first page is tried again.
    let mut len = 16 << 20;
    let cached = loop {
        gmem.punch_hole(0, LARGEST)?;
        let result = gmem.allocate(0, len);
        let cached = gmem.cache_stat(0, 0)?.cached;
        match result {
            Ok(()) if len < LARGEST => len *= 2,
            Err(Errno::EINTR) if cached == 0 => {}
            result => {
                claim_err!(result, Errno::EINTR, "allocation of {len:#x} bytes under a signal every millisecond");
                break cached;
            }
        }
    };
    drop(timer);
    cx.note(format_args!("{cached} of {} pages came before the signal", len / PAGE_SIZE));
    claim!(cached < len / PAGE_SIZE, "the allocation was cut short, at {cached} pages");
    claim_eq!(gmem.cache_stat(0, cached * PAGE_SIZE)?.cached, cached, "the pages that came are those at the start");
    Ok(())
}

/// The stand-alone binary.
pub fn main() -> ExitCode {
    gmemtest::cli::selftest_main(&[&SUITE])
}
