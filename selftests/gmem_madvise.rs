//! madvise(2) on mappings of a guest_memfd: what each advice returns, and what it leaves in the file.

use std::process::ExitCode;
use std::sync::Arc;

use gmemtest::harness::{Context, TestResult};
use gmemtest::machine::{Errno, Facility, GuestMemfd, Mapping, PAGE_SIZE, Protection, Vm, VmConfig};
use gmemtest::uapi::kvm::{GUEST_MEMFD_FLAG_INIT_SHARED, GUEST_MEMFD_FLAG_MMAP};
use gmemtest::{claim_eq, claim_err, claim_ok};

gmemtest::suite! {
    /// A mapping of a guest_memfd is a shared file mapping without page_mkwrite, never a candidate for huge pages. Of
    /// all advice only MADV_REMOVE touches the file: it is a punch.
    pub static SUITE: gmem_madvise needs [Vm, GuestMemfd, GmemMmap] {
        /// The result of each advice for a page of shared memory (guest_memfd notes 2.12; madvise_vma_behavior()). A
        /// failure means that an advice began, or ceased, to act on guest memory.
        advice_on_shared_memory_gives_its_result[ADVICE] needs [GmemInitShared];

        /// The result of each advice for a page that is private to the guest: populating it is EFAULT. A failure means
        /// that an advice reaches memory that the host may not touch.
        advice_on_private_memory_gives_its_result[ADVICE];

        /// The result of each advice for a page beyond the end of the file: as for private memory. A failure means that
        /// an advice makes pages where the file has none.
        advice_beyond_the_end_gives_its_result[ADVICE] needs [GmemInitShared];

        /// No advice but MADV_REMOVE loses a byte or frees a page. A failure means that memory of a running guest can
        /// be dropped by a call that is documented to be a hint, or to touch the caller's page tables only.
        advice_keeps_the_contents[ADVICE] needs [GmemInitShared, Cachestat];

        /// MADV_REMOVE is a punch: the pages are freed, the next access reads zero, the neighbours stay. A failure
        /// means that a VMM that frees through a mapping keeps the memory, or loses more.
        remove_punches_its_range needs [GmemInitShared, Cachestat];

        /// MADV_REMOVE through a mapping of private memory frees pages that the host could not touch. A failure means
        /// that private memory can be freed through the descriptor only.
        remove_punches_private_memory needs [Cachestat];

        /// MADV_REMOVE asks whether the file was opened for writing (VM_MAYWRITE), not whether the mapping is writable.
        /// A failure means that the check has moved, which changes who may free guest memory.
        remove_works_through_a_read_only_mapping needs [GmemInitShared, Cachestat];

        /// MADV_REMOVE of a locked mapping is EINVAL, and frees nothing. A failure means that mlock does not protect
        /// against one's own mistakes.
        remove_of_a_locked_mapping_is_einval needs [GmemInitShared, Cachestat];

        /// MADV_DONTNEED of a locked mapping is EINVAL; MADV_DONTNEED_LOCKED drops the page table entries, not the
        /// data. A failure means that a lock is ignored, or that advice on page tables loses data.
        dontneed_respects_the_lock needs [GmemInitShared];

        /// MADV_POPULATE_READ and MADV_POPULATE_WRITE allocate every page of the range. A failure means that they
        /// report success without having done it.
        populate_allocates_its_range[POPULATE] needs [GmemInitShared, Cachestat];

        /// MADV_POPULATE_WRITE through a read-only mapping is EINVAL. A failure means that pages become writable that
        /// were mapped for reading.
        populating_for_writing_through_a_read_only_mapping_is_einval needs [GmemInitShared];

        /// A populate that reaches beyond the end is EFAULT, with the pages before the end allocated. A failure means
        /// that the part before the end is lost, or that pages come beyond it.
        populate_across_the_end_is_efault_after_the_file needs [GmemInitShared, Cachestat];

        /// MADV_HUGEPAGE is accepted, MADV_COLLAPSE of a whole, aligned 2 MiB range is EINVAL, and the pages stay
        /// usable (guest_memfd_test). A failure means that guest_memfd pages can be replaced by a huge page behind
        /// KVM's back.
        collapse_of_a_full_range_is_refused needs [GmemInitShared, TransparentHugePages];

        /// An advice that no kernel knows, and an address inside a page, are EINVAL. A failure means that future advice
        /// cannot be told from garbage.
        bad_arguments_are_einval needs [GmemInitShared];
    }
}

const P: u64 = PAGE_SIZE;

/// An advice, what it returns on shared memory, on private memory and beyond the end, and what it needs.
struct Advice {
    advice: i32,
    shared: Result<(), Errno>,
    private: Result<(), Errno>,
    beyond: Result<(), Errno>,
    needs: Option<Facility>,
}

const OK: Result<(), Errno> = Ok(());
const EINVAL: Result<(), Errno> = Err(Errno::EINVAL);
const EFAULT: Result<(), Errno> = Err(Errno::EFAULT);
const MADV_DONTNEED_LOCKED: i32 = 24;
const MADV_COLLAPSE: i32 = 25;

/// An advice with one result everywhere.
const fn same(advice: i32, result: Result<(), Errno>) -> Advice {
    Advice { advice, shared: result, private: result, beyond: result, needs: None }
}

const fn with_huge_pages(advice: i32) -> Advice {
    Advice { needs: Some(Facility::TransparentHugePages), ..same(advice, OK) }
}

/// An advice that faults pages in.
const fn populate(advice: i32) -> Advice {
    Advice { private: EFAULT, beyond: EFAULT, ..same(advice, OK) }
}

const ADVICE: &[(&str, Advice)] = &[
    ("normal", same(libc::MADV_NORMAL, OK)),
    ("random", same(libc::MADV_RANDOM, OK)),
    ("sequential", same(libc::MADV_SEQUENTIAL, OK)),
    ("willneed", same(libc::MADV_WILLNEED, OK)),
    ("dontneed", same(libc::MADV_DONTNEED, OK)),
    ("free", same(libc::MADV_FREE, EINVAL)),
    ("dontfork", same(libc::MADV_DONTFORK, OK)),
    ("dofork", same(libc::MADV_DOFORK, OK)),
    ("dontdump", same(libc::MADV_DONTDUMP, OK)),
    ("dodump", same(libc::MADV_DODUMP, OK)),
    ("wipeonfork", same(libc::MADV_WIPEONFORK, EINVAL)),
    ("keeponfork", same(libc::MADV_KEEPONFORK, OK)),
    ("hugepage", with_huge_pages(libc::MADV_HUGEPAGE)),
    ("nohugepage", with_huge_pages(libc::MADV_NOHUGEPAGE)),
    ("cold", same(libc::MADV_COLD, OK)),
    ("pageout", same(libc::MADV_PAGEOUT, OK)),
    ("dontneed_locked", same(MADV_DONTNEED_LOCKED, OK)),
    ("collapse", same(MADV_COLLAPSE, EINVAL)),
    ("populate_read", populate(libc::MADV_POPULATE_READ)),
    ("populate_write", populate(libc::MADV_POPULATE_WRITE)),
];

type File = (Arc<dyn Vm>, Arc<dyn GuestMemfd>);

const SHARED: u64 = GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED;

/// A file of four pages, and a mapping of eight from its start.
fn mapped(cx: &Context, flags: u64) -> TestResult<(File, Box<dyn Mapping>)> {
    let vm = cx.machine().create_vm(VmConfig::Bare)?;
    let gmem = vm.create_guest_memfd(4 * P, flags)?;
    let mapping = gmem.map(8 * P, 0, Protection::SHARED_RW)?;
    Ok(((vm, gmem), mapping))
}

fn require(cx: &Context, row: &Advice) -> TestResult {
    row.needs.map_or(Ok(()), |facility| cx.require(facility))
}

fn advice_on_shared_memory_gives_its_result(cx: &Context, row: &Advice) -> TestResult {
    require(cx, row)?;
    let (_file, mapping) = mapped(cx, SHARED)?;
    mapping.write_u64(0, 1)?;
    claim_eq!(mapping.advise(0, P, row.advice), row.shared, "madvise({}) of a page that is there", row.advice);
    claim_eq!(mapping.advise(P, P, row.advice), row.shared, "madvise({}) of a hole", row.advice);
    Ok(())
}

fn advice_on_private_memory_gives_its_result(cx: &Context, row: &Advice) -> TestResult {
    require(cx, row)?;
    let ((_vm, gmem), mapping) = mapped(cx, GUEST_MEMFD_FLAG_MMAP)?;
    gmem.allocate(0, P)?;
    claim_eq!(mapping.advise(0, P, row.advice), row.private, "madvise({}) of a page that is there", row.advice);
    claim_eq!(mapping.advise(P, P, row.advice), row.private, "madvise({}) of a hole", row.advice);
    Ok(())
}

fn advice_beyond_the_end_gives_its_result(cx: &Context, row: &Advice) -> TestResult {
    require(cx, row)?;
    let (_file, mapping) = mapped(cx, SHARED)?;
    claim_eq!(mapping.advise(4 * P, P, row.advice), row.beyond, "madvise({}) of the page at the end", row.advice);
    Ok(())
}

fn advice_keeps_the_contents(cx: &Context, row: &Advice) -> TestResult {
    require(cx, row)?;
    let ((_vm, gmem), mapping) = mapped(cx, SHARED)?;
    mapping.fill(0, 4 * P, 0x4d)?;
    let result = mapping.advise(0, 4 * P, row.advice);
    claim_eq!(gmem.cache_stat(0, 0)?.cached, 4, "pages after madvise({}) gave {result:?}", row.advice);
    claim_eq!(mapping.find_mismatch(0, 4 * P, 0x4d)?, None, "contents after madvise({})", row.advice);
    Ok(())
}

fn remove_punches_its_range(cx: &Context) -> TestResult {
    let ((_vm, gmem), mapping) = mapped(cx, SHARED)?;
    mapping.fill(0, 4 * P, 0x4d)?;
    claim_ok!(mapping.advise(P, 2 * P, libc::MADV_REMOVE), "MADV_REMOVE of two pages of four");
    claim_eq!(gmem.cache_stat(0, 0)?.cached, 2, "pages left");
    claim_eq!(mapping.find_mismatch(P, 2 * P, 0)?, None, "what was removed");
    claim_eq!(mapping.find_mismatch(0, P, 0x4d)?, None, "before it");
    claim_eq!(mapping.find_mismatch(3 * P, P, 0x4d)?, None, "after it");
    Ok(())
}

fn remove_punches_private_memory(cx: &Context) -> TestResult {
    let ((_vm, gmem), mapping) = mapped(cx, GUEST_MEMFD_FLAG_MMAP)?;
    gmem.allocate(0, 4 * P)?;
    claim_ok!(mapping.advise(P, 2 * P, libc::MADV_REMOVE), "MADV_REMOVE of two pages of four");
    claim_eq!(gmem.cache_stat(0, 0)?.cached, 2, "pages left");
    Ok(())
}

fn remove_works_through_a_read_only_mapping(cx: &Context) -> TestResult {
    let ((_vm, gmem), mapping) = mapped(cx, SHARED)?;
    mapping.fill(0, 4 * P, 0x4d)?;
    let read_only = gmem.map(4 * P, 0, Protection::SHARED_READ)?;
    claim_ok!(read_only.advise(0, P, libc::MADV_REMOVE), "MADV_REMOVE through a mapping of PROT_READ");
    claim_eq!(gmem.cache_stat(0, 0)?.cached, 3, "pages left");
    Ok(())
}

fn remove_of_a_locked_mapping_is_einval(cx: &Context) -> TestResult {
    let ((_vm, gmem), mapping) = mapped(cx, SHARED)?;
    mapping.lock(0, 2 * P)?;
    claim_err!(mapping.advise(0, P, libc::MADV_REMOVE), Errno::EINVAL, "MADV_REMOVE of a locked page");
    claim_eq!(gmem.cache_stat(0, 0)?.cached, 2, "pages left");
    mapping.unlock(0, 2 * P)?;
    claim_ok!(mapping.advise(0, P, libc::MADV_REMOVE), "MADV_REMOVE once unlocked");
    claim_eq!(gmem.cache_stat(0, 0)?.cached, 1, "pages left then");
    Ok(())
}

fn dontneed_respects_the_lock(cx: &Context) -> TestResult {
    let (_file, mapping) = mapped(cx, SHARED)?;
    mapping.fill(0, P, 0x4d)?;
    mapping.lock(0, P)?;
    claim_err!(mapping.advise(0, P, libc::MADV_DONTNEED), Errno::EINVAL, "MADV_DONTNEED of a locked page");
    claim_ok!(mapping.advise(0, P, MADV_DONTNEED_LOCKED), "MADV_DONTNEED_LOCKED of it");
    claim_eq!(mapping.find_mismatch(0, P, 0x4d)?, None, "contents");
    Ok(())
}

const POPULATE: &[(&str, i32)] = &[("read", libc::MADV_POPULATE_READ), ("write", libc::MADV_POPULATE_WRITE)];

fn populate_allocates_its_range(cx: &Context, &advice: &i32) -> TestResult {
    let ((_vm, gmem), mapping) = mapped(cx, SHARED)?;
    claim_ok!(mapping.advise(P, 2 * P, advice), "madvise({advice}) of two pages of four");
    let pages: Vec<u64> =
        (0..4).map(|page| gmem.cache_stat(page * P, P).map(|stat| stat.cached)).collect::<Result<_, _>>()?;
    claim_eq!(pages, [0, 1, 1, 0], "pages in the cache");
    claim_eq!(mapping.find_mismatch(P, 2 * P, 0)?, None, "contents");
    Ok(())
}

fn populating_for_writing_through_a_read_only_mapping_is_einval(cx: &Context) -> TestResult {
    let ((_vm, gmem), _mapping) = mapped(cx, SHARED)?;
    let read_only = gmem.map(4 * P, 0, Protection::SHARED_READ)?;
    claim_err!(read_only.advise(0, P, libc::MADV_POPULATE_WRITE), Errno::EINVAL, "MADV_POPULATE_WRITE");
    claim_ok!(read_only.advise(0, P, libc::MADV_POPULATE_READ), "MADV_POPULATE_READ");
    Ok(())
}

fn populate_across_the_end_is_efault_after_the_file(cx: &Context) -> TestResult {
    let ((_vm, gmem), mapping) = mapped(cx, SHARED)?;
    claim_err!(mapping.advise(0, 8 * P, libc::MADV_POPULATE_READ), Errno::EFAULT, "four pages and four beyond");
    claim_eq!(gmem.cache_stat(0, 0)?.cached, 4, "pages in the cache");
    Ok(())
}

fn collapse_of_a_full_range_is_refused(cx: &Context) -> TestResult {
    const HUGE: u64 = 2 << 20;
    let vm = cx.machine().create_vm(VmConfig::Bare)?;
    let gmem = vm.create_guest_memfd(2 * HUGE, SHARED)?;
    let mapping = gmem.map(2 * HUGE, 0, Protection::SHARED_RW)?;
    // Any 4 MiB of addresses hold 2 MiB that are aligned.
    let start = mapping.addr().next_multiple_of(HUGE) - mapping.addr();
    mapping.fill(start, HUGE, 0x3c)?;
    claim_ok!(mapping.advise(start, HUGE, libc::MADV_HUGEPAGE), "MADV_HUGEPAGE");
    claim_err!(mapping.advise(start, HUGE, MADV_COLLAPSE), Errno::EINVAL, "MADV_COLLAPSE of 512 pages that are there");
    claim_eq!(mapping.find_mismatch(start, HUGE, 0x3c)?, None, "contents after it");
    claim_ok!(mapping.advise(start, HUGE, libc::MADV_DONTNEED), "MADV_DONTNEED");
    claim_eq!(mapping.find_mismatch(start, HUGE, 0x3c)?, None, "contents after MADV_DONTNEED");
    Ok(())
}

fn bad_arguments_are_einval(cx: &Context) -> TestResult {
    let (_file, mapping) = mapped(cx, SHARED)?;
    claim_err!(mapping.advise(0, P, 999), Errno::EINVAL, "advice 999");
    claim_err!(mapping.advise(1, P, libc::MADV_DONTNEED), Errno::EINVAL, "an address inside a page");
    claim_err!(mapping.advise(1, P, libc::MADV_REMOVE), Errno::EINVAL, "an address inside a page, to be removed");
    claim_ok!(mapping.advise(0, 0, libc::MADV_REMOVE), "no bytes at all");
    Ok(())
}

/// The stand-alone binary.
pub fn main() -> ExitCode {
    gmemtest::cli::selftest_main(&[&SUITE])
}
