//! The pages of a guest_memfd as the page allocator and the page tables see them: flags, map counts, holders, and what
//! becomes of a page that was punched.

use std::any::Any;
use std::collections::HashSet;
use std::process::ExitCode;
use std::sync::Arc;

use gmemtest::harness::{Context, Side, TestResult, in_child};
use gmemtest::machine::{
    Errno, Exit, GuestMemfd, GuestOp, HoldKind, Mapping, MemoryRegion, PAGE_SIZE, Protection, Vcpu, Vm, VmConfig,
};
use gmemtest::uapi::kvm::{GUEST_MEMFD_FLAG_INIT_SHARED, GUEST_MEMFD_FLAG_MMAP};
use gmemtest::{claim, claim_eq, claim_ne, claim_ok};

gmemtest::suite! {
    /// A page of a guest_memfd is in the page cache of its inode, on the unevictable LRU list, never dirty for
    /// writeback. Page table entries of the host count in its map count, the guest's do not. A punch takes the page out
    /// of the file whatever holds it.
    pub static SUITE: gmem_pages needs [Vm, GuestMemfd, GmemInitShared, Pagemap] {
        /// A page that nobody touched through this mapping has no page table entry in it, although it is in the file:
        /// no fault-around, no pre-population. A failure means that the host maps more of the guest's memory than it
        /// asked for.
        untouched_page_has_no_frame_in_the_page_table;

        /// Each of the flags of a page that was read once: up to date, mapped, not dirty. A failure means that later
        /// claims about flags start from another state.
        page_read_by_the_host_is_up_to_date_and_clean needs [PageFlags];

        /// A page written through a fault is dirty at once (fault_dirty_shared_page()). A failure means that a memory
        /// error on written data is taken for harmless.
        page_written_by_a_fault_is_dirty needs [PageFlags];

        /// A store to a page that was mapped by a read makes the page dirty only when its page table entry goes. A
        /// failure means that the dirty bit of the hardware is lost with the entry.
        page_stored_to_without_a_fault_is_dirty_once_zapped needs [PageFlags];

        /// Once the per-CPU batches are drained a page is on the LRU list, and unevictable: reclaim passes it over.
        /// A failure means that guest memory may be swapped or reclaimed.
        drained_page_is_on_the_unevictable_list needs [PageFlags, DropCaches];

        /// No page is ever part of a huge page, swap-backed or anonymous: order 0, file. A failure means that code that
        /// counts on pages of 4 KiB counts wrongly.
        page_is_neither_huge_nor_anonymous needs [PageFlags];

        /// The map count is the number of host page table entries: one for each mapping that touched the page. A
        /// failure means that a conversion that looks at the count lets a mapped page go, or refuses a free one.
        map_count_counts_the_mappings_that_touched_the_page needs [PageMapCount];

        /// fork copies no page table entries of shared file mappings: the child's first access adds its own. A failure
        /// means that a fork makes mappings that nobody knows of.
        child_maps_the_page_by_its_own_access needs [PageMapCount, RealFiles];

        /// A page that the guest reads and writes has no page table entry of the host and no map count: the guest's
        /// entries are KVM's own. The host finds what the guest wrote, and then counts one. A failure means that guest
        /// mappings are counted as the host's, or that guest and host have two pages.
        guest_mapping_is_not_in_the_map_count needs [PageMapCount, Guest];

        /// A page that the guest wrote is dirty, and on no other list than one that the host wrote
        /// (kvm_release_faultin_page()). A failure means that its contents could be taken for dispensable.
        page_written_by_the_guest_is_dirty_and_unevictable needs [PageFlags, DropCaches, Guest];

        /// Two mappings, and a mapping made again, show the same frame: the page stays where it is. A failure means
        /// that the page was moved or copied.
        frame_is_the_same_through_every_mapping;

        /// Contents and frame stay when page table entries are dropped: MADV_DONTNEED, MADV_COLD, MADV_PAGEOUT.
        /// A failure means that guest_memfd pages migrate or are reclaimed.
        advice_does_not_move_the_page[KEEPING];

        /// Reclaim and compaction leave the page where it is, with its contents. A failure means that a page moves, or
        /// goes, under the guest's page tables.
        draining_and_dropping_caches_does_not_move_the_page needs [DropCaches];

        /// The frames of punched pages lose every mark of a page in use: they go back to the system. A failure means
        /// that punching leaks memory.
        punched_frames_go_back_to_the_system[FREED] needs [PageFlags, DropCaches];

        /// A punch unmaps: the page table entries of every mapping are gone before it returns. A failure means that the
        /// host reaches a page that was given away.
        punch_empties_the_page_tables_of_every_mapping;

        /// A page that is held is out of the file after a punch all the same: the holder keeps a detached page, the
        /// next access finds a new one, with zeroes. A failure means that a pin blocks the punch, or that a page comes
        /// back into the file that somebody else can still write.
        punch_detaches_a_held_page[HOLDS] needs [Cachestat];

        /// The detached page keeps its frame from being used again until the holder lets go. A failure means that a
        /// device writes to memory that has a new owner.
        detached_page_is_kept_by_its_holder[HOLDS] needs [PageFlags, DropCaches];

        /// Holding a page adds no page table entry, and frees nothing when it ends. A failure means that a hold is
        /// mistaken for a mapping, or leaks.
        hold_changes_neither_map_count_nor_file[HOLDS] needs [Cachestat, PageMapCount];

        /// Private memory cannot be held: there is no page table entry to take it from, and the fault fails. A failure
        /// lets a device reach private memory.
        private_memory_cannot_be_held[HOLDS] needs [GmemMmap];

        /// Memory beyond the end cannot be held. A failure means that a hold makes pages where the file has none.
        memory_beyond_the_end_cannot_be_held[HOLDS];

        /// A held page outlives file, VM and mapping, and frees without harm. A failure is a page that is used after it
        /// was freed, or never freed.
        hold_outlives_everything[HOLDS];
    }
}

const P: u64 = PAGE_SIZE;

/// KPF_* of linux/kernel-page-flags.h, as masks.
mod kpf {
    pub const UPTODATE: u64 = 1 << 3;
    pub const DIRTY: u64 = 1 << 4;
    pub const LRU: u64 = 1 << 5;
    pub const WRITEBACK: u64 = 1 << 8;
    pub const BUDDY: u64 = 1 << 10;
    pub const MMAP: u64 = 1 << 11;
    pub const ANON: u64 = 1 << 12;
    pub const SWAPCACHE: u64 = 1 << 13;
    pub const SWAPBACKED: u64 = 1 << 14;
    pub const COMPOUND_HEAD: u64 = 1 << 15;
    pub const COMPOUND_TAIL: u64 = 1 << 16;
    pub const HUGE: u64 = 1 << 17;
    pub const UNEVICTABLE: u64 = 1 << 18;
    pub const HWPOISON: u64 = 1 << 19;
    pub const KSM: u64 = 1 << 21;
    pub const THP: u64 = 1 << 22;
}

type File = (Arc<dyn Vm>, Arc<dyn GuestMemfd>);

/// A file of `pages` pages that the host may touch, and a mapping of all of it.
fn shared(cx: &Context, pages: u64) -> TestResult<(File, Box<dyn Mapping>)> {
    let vm = cx.machine().create_vm(VmConfig::Bare)?;
    let gmem = vm.create_guest_memfd(pages * P, GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED)?;
    let mapping = gmem.map(pages * P, 0, Protection::SHARED_RW)?;
    Ok(((vm, gmem), mapping))
}

/// The flags of the page behind byte `at`.
fn flags(cx: &Context, mapping: &dyn Mapping, at: u64) -> TestResult<u64> {
    let frame = claim_ok!(mapping.frame(at), "frame of the page at {at:#x}");
    Ok(claim_ok!(cx.machine().page_flags(frame), "flags of frame {frame:#x}"))
}

fn untouched_page_has_no_frame_in_the_page_table(cx: &Context) -> TestResult {
    let ((_vm, gmem), mapping) = shared(cx, 4)?;
    gmem.allocate(0, 4 * P)?;
    mapping.read_u64(P)?;
    let present: Vec<bool> = (0..4).map(|page| mapping.frame(page * P).is_ok()).collect();
    claim_eq!(present, [false, true, false, false], "page table entries after four pages were allocated, one read");
    Ok(())
}

fn page_read_by_the_host_is_up_to_date_and_clean(cx: &Context) -> TestResult {
    let (_file, mapping) = shared(cx, 1)?;
    mapping.read_u64(0)?;
    let flags = flags(cx, &*mapping, 0)?;
    claim_eq!(flags & (kpf::UPTODATE | kpf::MMAP), kpf::UPTODATE | kpf::MMAP, "UPTODATE and MMAP in {flags:#x}");
    claim_eq!(flags & (kpf::DIRTY | kpf::WRITEBACK), 0, "DIRTY and WRITEBACK in {flags:#x}");
    Ok(())
}

fn page_written_by_a_fault_is_dirty(cx: &Context) -> TestResult {
    let (_file, mapping) = shared(cx, 1)?;
    mapping.write_u64(0, 1)?;
    let flags = flags(cx, &*mapping, 0)?;
    claim_eq!(flags & kpf::DIRTY, kpf::DIRTY, "DIRTY in {flags:#x}");
    claim_eq!(flags & kpf::WRITEBACK, 0, "WRITEBACK in {flags:#x}");
    Ok(())
}

fn page_stored_to_without_a_fault_is_dirty_once_zapped(cx: &Context) -> TestResult {
    let (_file, mapping) = shared(cx, 1)?;
    mapping.read_u64(0)?;
    mapping.write_u64(0, 1)?;
    let stored = flags(cx, &*mapping, 0)?;
    claim_eq!(stored & kpf::DIRTY, 0, "DIRTY in {stored:#x}, with the store in the page table entry only");
    let frame = mapping.frame(0)?;
    mapping.advise(0, P, libc::MADV_DONTNEED)?;
    let zapped = cx.machine().page_flags(frame)?;
    claim_eq!(zapped & kpf::DIRTY, kpf::DIRTY, "DIRTY in {zapped:#x}, with the page table entry zapped");
    claim_eq!(zapped & kpf::MMAP, 0, "MMAP in {zapped:#x}");
    Ok(())
}

fn drained_page_is_on_the_unevictable_list(cx: &Context) -> TestResult {
    let (_file, mapping) = shared(cx, 1)?;
    mapping.read_u64(0)?;
    cx.machine().drain_lru()?;
    let flags = flags(cx, &*mapping, 0)?;
    claim_eq!(flags & (kpf::LRU | kpf::UNEVICTABLE), kpf::LRU | kpf::UNEVICTABLE, "LRU and UNEVICTABLE in {flags:#x}");
    Ok(())
}

fn page_is_neither_huge_nor_anonymous(cx: &Context) -> TestResult {
    const NEVER: u64 = kpf::ANON
        | kpf::SWAPCACHE
        | kpf::SWAPBACKED
        | kpf::COMPOUND_HEAD
        | kpf::COMPOUND_TAIL
        | kpf::HUGE
        | kpf::HWPOISON
        | kpf::KSM
        | kpf::THP
        | kpf::BUDDY;
    let (_file, mapping) = shared(cx, 512)?;
    for page in [0, 1, 255, 511] {
        mapping.write_u64(page * P, 1)?;
        let flags = flags(cx, &*mapping, page * P)?;
        claim_eq!(flags & NEVER, 0, "page {page}: {flags:#x}");
    }
    Ok(())
}

fn map_count_counts_the_mappings_that_touched_the_page(cx: &Context) -> TestResult {
    let ((_vm, gmem), mapping) = shared(cx, 1)?;
    mapping.read_u64(0)?;
    let frame = mapping.frame(0)?;
    let count = || cx.machine().page_map_count(frame);
    claim_eq!(count(), Ok(1), "one mapping");
    let second = gmem.map(P, 0, Protection::SHARED_RW)?;
    claim_eq!(count(), Ok(1), "a second that was not touched");
    second.write_u64(0, 1)?;
    claim_eq!(count(), Ok(2), "a second that was");
    mapping.advise(0, P, libc::MADV_DONTNEED)?;
    claim_eq!(count(), Ok(1), "the first zapped");
    drop(second);
    claim_eq!(count(), Ok(0), "the second unmapped");
    mapping.read_u64(0)?;
    claim_eq!((mapping.frame(0), count()), (Ok(frame), Ok(1)), "the first touched again: frame and count");
    Ok(())
}

fn child_maps_the_page_by_its_own_access(cx: &Context) -> TestResult {
    let (_file, mapping) = shared(cx, 1)?;
    mapping.read_u64(0)?;
    let frame = mapping.frame(0)?;
    let machine = cx.machine();
    let counts = in_child(|| {
        let inherited = machine.page_map_count(frame)?;
        mapping.read_u64(0).map_err(|_| Errno::EFAULT)?;
        Ok(inherited << 32 | machine.page_map_count(frame)?)
    })?
    .returned()?;
    claim_eq!(counts.map(|counts| (counts >> 32, counts & 0xffff_ffff)), Ok((1, 2)), "in the child, before and after");
    claim_eq!(machine.page_map_count(frame), Ok(1), "once the child is gone");
    Ok(())
}

/// A VM whose guest has written `VALUE` at `GPA`, the start of a file of one page.
fn written_by_the_guest(cx: &Context) -> TestResult<(File, Box<dyn Vcpu>)> {
    let vm = cx.machine().create_vm(VmConfig::Payload { vcpus: 1 })?;
    let gmem = vm.create_guest_memfd(P, GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED)?;
    vm.set_memory_region(&MemoryRegion::new(1, GPA, P).bound_to(&*gmem, 0))?;
    let mut vcpu = vm.create_vcpu(0)?;
    let write = GuestOp::Write { gpa: Side::Shared.address(&*vm, GPA), size: 8, value: VALUE };
    claim_eq!(vcpu.execute(write), Exit::Done(0), "a guest write");
    Ok(((vm, gmem), vcpu))
}

const GPA: u64 = 1 << 32;
const VALUE: u64 = 0x6775_6573_7421;

fn guest_mapping_is_not_in_the_map_count(cx: &Context) -> TestResult {
    let ((vm, gmem), mut vcpu) = written_by_the_guest(cx)?;
    let mapping = gmem.map(P, 0, Protection::SHARED_RW)?;
    claim!(mapping.frame(0).is_err(), "no page table entry of the host before it looks");
    claim_eq!(mapping.read_u64(0)?, VALUE, "what the host reads");
    let frame = mapping.frame(0)?;
    claim_eq!(cx.machine().page_map_count(frame), Ok(1), "map count with one mapping, and the guest's");
    mapping.advise(0, P, libc::MADV_DONTNEED)?;
    let read = GuestOp::Read { gpa: Side::Shared.address(&*vm, GPA), size: 8 };
    claim_eq!(vcpu.execute(read), Exit::Done(VALUE), "a guest read");
    claim_eq!(cx.machine().page_map_count(frame), Ok(0), "map count with the guest's mapping only");
    Ok(())
}

fn page_written_by_the_guest_is_dirty_and_unevictable(cx: &Context) -> TestResult {
    const EXPECTED: u64 = kpf::DIRTY | kpf::UPTODATE | kpf::LRU | kpf::UNEVICTABLE;
    let ((_vm, gmem), _vcpu) = written_by_the_guest(cx)?;
    let mapping = gmem.map(P, 0, Protection::SHARED_READ)?;
    mapping.read_u64(0)?;
    cx.machine().drain_lru()?;
    let flags = flags(cx, &*mapping, 0)?;
    claim_eq!(flags & EXPECTED, EXPECTED, "DIRTY, UPTODATE, LRU and UNEVICTABLE in {flags:#x}");
    Ok(())
}

fn frame_is_the_same_through_every_mapping(cx: &Context) -> TestResult {
    let ((_vm, gmem), mapping) = shared(cx, 4)?;
    mapping.write_u64(2 * P, 1)?;
    let frame = mapping.frame(2 * P)?;
    let second = gmem.map(2 * P, 2 * P, Protection::SHARED_READ)?;
    second.read_u64(0)?;
    claim_eq!(second.frame(0), Ok(frame), "through a second mapping");
    drop((mapping, second));
    let third = gmem.map(4 * P, 0, Protection::SHARED_RW)?;
    third.read_u64(2 * P)?;
    claim_eq!(third.frame(2 * P), Ok(frame), "through a third, made when no other was left");
    Ok(())
}

const KEEPING: &[(&str, i32)] =
    &[("dontneed", libc::MADV_DONTNEED), ("cold", libc::MADV_COLD), ("pageout", libc::MADV_PAGEOUT)];

fn advice_does_not_move_the_page(cx: &Context, &advice: &i32) -> TestResult {
    let (_file, mapping) = shared(cx, 1)?;
    mapping.write_u64(0, 0x77)?;
    let frame = mapping.frame(0)?;
    mapping.advise(0, P, advice)?;
    claim_eq!(mapping.read_u64(0)?, 0x77, "contents after madvise({advice})");
    claim_eq!(mapping.frame(0), Ok(frame), "frame after madvise({advice})");
    Ok(())
}

fn draining_and_dropping_caches_does_not_move_the_page(cx: &Context) -> TestResult {
    let ((_vm, gmem), mapping) = shared(cx, 8)?;
    mapping.fill(0, 8 * P, 0x2b)?;
    let frames = || (0..8).map(|page| mapping.frame(page * P)).collect::<Result<Vec<_>, _>>();
    let before = frames()?;
    cx.machine().drain_lru()?;
    let again = gmem.map(8 * P, 0, Protection::SHARED_RW)?;
    claim_eq!(again.find_mismatch(0, 8 * P, 0x2b)?, None, "contents");
    claim_eq!(frames()?, before, "frames");
    Ok(())
}

/// How pages leave the file.
#[derive(Clone, Copy)]
enum Freed {
    /// fallocate(FALLOC_FL_PUNCH_HOLE).
    Punch,
    /// madvise(MADV_REMOVE).
    Remove,
    /// The last descriptor and the last mapping are closed.
    Close,
}

const FREED: &[(&str, Freed)] = &[("punch", Freed::Punch), ("remove", Freed::Remove), ("close", Freed::Close)];

fn punched_frames_go_back_to_the_system(cx: &Context, &how: &Freed) -> TestResult {
    const PAGES: u64 = 64;
    // A page that somebody still holds loses MMAP by the punch, and keeps these.
    const IN_USE: u64 = kpf::LRU | kpf::UNEVICTABLE;
    let ((vm, gmem), mapping) = shared(cx, PAGES)?;
    mapping.fill(0, PAGES * P, 1)?;
    cx.machine().drain_lru()?;
    let frames = (0..PAGES).map(|page| mapping.frame(page * P)).collect::<Result<Vec<_>, _>>()?;
    let in_use = || {
        let flags = frames.iter().map(|&frame| cx.machine().page_flags(frame)).collect::<Result<Vec<_>, _>>()?;
        Ok::<_, Errno>(flags.iter().filter(|&flags| flags & IN_USE == IN_USE).count() as u64)
    };
    claim_eq!(in_use(), Ok(PAGES), "frames on the unevictable list, before");
    let kept: Option<(File, Box<dyn Mapping>)> = match how {
        Freed::Punch => {
            gmem.punch_hole(0, PAGES * P)?;
            Some(((vm, gmem), mapping))
        }
        Freed::Remove => {
            mapping.advise(0, PAGES * P, libc::MADV_REMOVE)?;
            Some(((vm, gmem), mapping))
        }
        Freed::Close => {
            drop((mapping, gmem, vm));
            None
        }
    };
    let left = in_use()?;
    drop(kept);
    cx.note(format_args!("{left} of {PAGES} frames are in use again"));
    // Another process may be given a frame at once, but hardly mlock it, and never most of them.
    claim!(left < PAGES / 4, "{left} of {PAGES} frames are still on the unevictable list");
    Ok(())
}

fn punch_empties_the_page_tables_of_every_mapping(cx: &Context) -> TestResult {
    let ((_vm, gmem), one) = shared(cx, 4)?;
    let two = gmem.map(4 * P, 0, Protection::SHARED_RW)?;
    for page in 0..4 {
        one.write_u64(page * P, 1)?;
        two.read_u64(page * P)?;
    }
    gmem.punch_hole(P, 2 * P)?;
    let present = |mapping: &dyn Mapping| (0..4).map(|page| mapping.frame(page * P).is_ok()).collect::<Vec<_>>();
    claim_eq!(present(&*one), [true, false, false, true], "page table entries of the first");
    claim_eq!(present(&*two), [true, false, false, true], "page table entries of the second");
    Ok(())
}

const HOLDS: &[(&str, HoldKind)] = &[("vmsplice", HoldKind::Get), ("io_uring", HoldKind::Pin)];

/// Holds the whole mapping, after asking for the facility.
fn hold(cx: &Context, mapping: &dyn Mapping, kind: HoldKind) -> TestResult<Box<dyn Any + Send>> {
    require(cx, kind)?;
    Ok(claim_ok!(mapping.hold(0, mapping.len(), kind), "a hold of kind {kind:?}"))
}

fn require(cx: &Context, kind: HoldKind) -> TestResult {
    cx.require(match kind {
        HoldKind::Get => gmemtest::machine::Facility::HoldGet,
        HoldKind::Pin => gmemtest::machine::Facility::HoldPin,
    })
}

fn punch_detaches_a_held_page(cx: &Context, &kind: &HoldKind) -> TestResult {
    let ((_vm, gmem), mapping) = shared(cx, 2)?;
    mapping.fill(0, 2 * P, 0x5f)?;
    let frame = mapping.frame(0)?;
    let held = hold(cx, &*mapping, kind)?;
    claim_ok!(gmem.punch_hole(0, 2 * P), "a punch of held pages");
    claim_eq!(gmem.cache_stat(0, 0)?.cached, 0, "pages left in the file");
    claim_eq!(mapping.find_mismatch(0, 2 * P, 0)?, None, "what the host finds there now");
    claim_ne!(mapping.frame(0), Ok(frame), "the frame that it finds");
    drop(held);
    claim_eq!(mapping.find_mismatch(0, 2 * P, 0)?, None, "what it finds when the holder has let go");
    Ok(())
}

fn detached_page_is_kept_by_its_holder(cx: &Context, &kind: &HoldKind) -> TestResult {
    const PAGES: u64 = 8;
    let ((_vm, gmem), mapping) = shared(cx, PAGES)?;
    mapping.fill(0, PAGES * P, 0x5f)?;
    cx.machine().drain_lru()?;
    let frames = (0..PAGES).map(|page| mapping.frame(page * P)).collect::<Result<Vec<_>, _>>()?;
    let held = hold(cx, &*mapping, kind)?;
    gmem.punch_hole(0, PAGES * P)?;
    for &frame in &frames {
        let flags = cx.machine().page_flags(frame)?;
        const KEPT: u64 = kpf::UPTODATE | kpf::LRU | kpf::UNEVICTABLE;
        claim_eq!(flags & KEPT, KEPT, "UPTODATE, LRU and UNEVICTABLE of the detached frame {frame:#x}: {flags:#x}");
        claim_eq!(flags & (kpf::MMAP | kpf::BUDDY), 0, "MMAP and BUDDY of the detached frame {frame:#x}: {flags:#x}");
    }
    // As many new pages as the page allocator likes to hand out: none of them is one that is held.
    let ((_vm, _gmem), other) = shared(cx, 256)?;
    other.fill(0, 256 * P, 1)?;
    let others = (0..256).map(|page| other.frame(page * P)).collect::<Result<HashSet<_>, _>>()?;
    let reused: Vec<u64> = frames.iter().copied().filter(|frame| others.contains(frame)).collect();
    claim_eq!(reused, Vec::<u64>::new(), "held frames that were given to another file");
    drop(held);
    Ok(())
}

fn hold_changes_neither_map_count_nor_file(cx: &Context, &kind: &HoldKind) -> TestResult {
    let ((_vm, gmem), mapping) = shared(cx, 2)?;
    mapping.fill(0, 2 * P, 0x60)?;
    let frame = mapping.frame(0)?;
    let held = hold(cx, &*mapping, kind)?;
    claim_eq!(cx.machine().page_map_count(frame), Ok(1), "map count while held");
    claim_eq!(gmem.cache_stat(0, 0)?.cached, 2, "pages while held");
    drop(held);
    claim_eq!(cx.machine().page_map_count(frame), Ok(1), "map count afterwards");
    claim_eq!(mapping.find_mismatch(0, 2 * P, 0x60)?, None, "contents afterwards");
    Ok(())
}

fn private_memory_cannot_be_held(cx: &Context, &kind: &HoldKind) -> TestResult {
    require(cx, kind)?;
    let vm = cx.machine().create_vm(VmConfig::Bare)?;
    let gmem = vm.create_guest_memfd(P, GUEST_MEMFD_FLAG_MMAP)?;
    gmem.allocate(0, P)?;
    let mapping = gmem.map(P, 0, Protection::SHARED_RW)?;
    claim_eq!(mapping.hold(0, P, kind).map(drop), Err(Errno::EFAULT), "a hold of private memory");
    Ok(())
}

fn memory_beyond_the_end_cannot_be_held(cx: &Context, &kind: &HoldKind) -> TestResult {
    require(cx, kind)?;
    let ((_vm, gmem), _mapping) = shared(cx, 1)?;
    let beyond = gmem.map(P, P, Protection::SHARED_RW)?;
    claim_eq!(beyond.hold(0, P, kind).map(drop), Err(Errno::EFAULT), "a hold of memory beyond the end");
    Ok(())
}

fn hold_outlives_everything(cx: &Context, &kind: &HoldKind) -> TestResult {
    let ((vm, gmem), mapping) = shared(cx, 4)?;
    mapping.fill(0, 4 * P, 0x61)?;
    let held = hold(cx, &*mapping, kind)?;
    drop((mapping, gmem, vm));
    drop(held);
    let (_file, mapping) = shared(cx, 4)?;
    claim_eq!(mapping.find_mismatch(0, 4 * P, 0)?, None, "contents of a new file afterwards");
    Ok(())
}

/// The stand-alone binary.
pub fn main() -> ExitCode {
    gmemtest::cli::selftest_main(&[&SUITE])
}
