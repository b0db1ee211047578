//! What the guest reads and writes in memory that a guest_memfd backs, beside what the host sees of the same pages.

use gmemtest::harness::{Context, GmemVm, TestResult};
use gmemtest::machine::{
    Exit, Facility, GuestMemfd, GuestOp, HostMemory, MemoryRegion, PAGE_SIZE, Protection, Vcpu, VmConfig,
};
use gmemtest::uapi::kvm::{
    GUEST_MEMFD_FLAG_INIT_SHARED, GUEST_MEMFD_FLAG_MMAP, KVM_CAP_GUEST_MEMFD_MEMORY_ATTRIBUTES_RFC_V5,
};
use gmemtest::{claim_eq, claim_matches, claim_ok};

gmemtest::suite! {
    /// Contents of guest_memfd memory as the guest and the host see them: one set of pages, zero when fresh, gone when
    /// punched.
    pub static SUITE: guest_access needs [Vm, Guest, GuestMemfd, UserMemory2] {
        /// The guest reads what the host wrote through a mapping that is gone by then, and the host reads what the guest
        /// wrote through a new mapping (guest_memfd_test: test_guest_memfd_guest). A failure means that guest and host
        /// have different pages.
        guest_and_host_share_the_pages needs [GmemMmap, GmemInitShared];

        /// The same with userspace_addr 0: a slot whose file has GUEST_MEMFD_FLAG_MMAP is backed by the file for every
        /// guest access (kvm_memslot_is_gmem_only()). A failure means that a VMM needs a mapping to run the guest.
        guest_and_host_share_the_pages_without_a_userspace_addr needs [GmemMmap, GmemInitShared];

        /// userspace_addr is not used for guest accesses to a slot whose file has GUEST_MEMFD_FLAG_MMAP
        /// (kvm_mmu_faultin_pfn()). A failure means that the guest runs on pages that the file does not hold.
        mappable_file_wins_over_the_userspace_addr needs [GmemMmap, GmemInitShared];

        /// A file without GUEST_MEMFD_FLAG_MMAP is never used by a VM without private memory: the guest runs on
        /// userspace_addr and the file stays empty. Where files keep the PRIVATE attribute, every slot with a file is backed
        /// by it alone, and it is userspace_addr that is not used. A failure means that the guest's memory moved without
        /// being asked.
        unmappable_file_is_unused_without_private_memory needs [Cachestat];

        /// Memory that nobody wrote reads zero in the guest (kvm_gmem_get_pfn() clears a page before its first use). A
        /// failure leaks the former owner's data into the guest.
        fresh_memory_reads_zero[FRESH];

        /// A store of 1, 2, 4 or 8 bytes changes these bytes and no other, also across a page boundary. A failure means
        /// that two neighbouring pages of the file are not neighbours in the guest.
        store_changes_its_bytes_only[STORES];

        /// What one vCPU writes, another reads. A failure means that vCPUs have different pages.
        vcpus_share_the_pages;

        /// A punched page reads zero when the guest returns to it, and the pages beside it are as they were
        /// (kvm_gmem_punch_hole() unmaps the guest before it frees). A failure means that the guest goes on using a page
        /// that the host has given to somebody else.
        punched_page_reads_zero_in_the_guest[PUNCHES];

        /// A punched page reads zero through a host mapping that was there before, and guest and host go on sharing the
        /// fresh page whoever touches it first. A failure means that one of them kept the old page.
        punched_page_is_one_fresh_page_for_both[FIRST] needs [GmemMmap, GmemInitShared];

        /// Allocating a range that is there already keeps what the guest wrote. A failure means that fallocate loses guest
        /// memory.
        allocating_again_keeps_the_contents;

        /// The guest's first access to a page allocates it, a load too; pages that it does not touch stay absent. A failure
        /// means that memory is accounted that nobody uses, or used without being accounted.
        guest_access_allocates_what_it_touches[TOUCHES] needs [Cachestat];

        /// MADV_REMOVE on a host mapping is a punch hole for the guest too; MADV_DONTNEED takes nothing away
        /// (madvise_remove() calls vfs_fallocate()). A failure means that the guest keeps a freed page, or loses a live one.
        advice_on_the_mapping_reaches_the_guest[ADVICE] needs [GmemMmap, GmemInitShared];

        /// Each slot shows its own range of the file, in whatever order the ranges stand. A failure means that
        /// gfn - base_gfn + pgoff is computed wrongly.
        slots_show_their_own_ranges needs [GmemMmap, GmemInitShared];

        /// Files bound at the same offset do not share pages. A failure mixes the memory of two devices.
        files_do_not_share_pages needs [GmemMmap, GmemInitShared];

        /// A slot that is deleted and made again shows the same pages; made again with another offset, other pages. A
        /// failure means that a page table entry of the old slot is still used.
        recreated_slot_shows_its_new_range needs [GmemMmap, GmemInitShared];

        /// The guest executes code from the file, and after the host rewrote it the new code. A failure means that pages
        /// are mapped without execute permission.
        guest_executes_from_the_file needs [GmemMmap, GmemInitShared];

        /// The guest executes code that it wrote into the file itself. A failure means the same for memory that the host
        /// cannot write.
        guest_executes_what_it_wrote;
    }
}

const PAGES: u64 = 4;

/// What the guest finds at an address.
fn read(vcpu: &mut dyn Vcpu, gpa: u64) -> TestResult<u64> {
    match vcpu.execute(GuestOp::read_u64(gpa)) {
        Exit::Done(value) => Ok(value),
        other => gmemtest::fail!("the guest's load from {gpa:#x} ended in {other:x?}"),
    }
}

fn write(vcpu: &mut dyn Vcpu, gpa: u64, value: u64) -> TestResult {
    claim_matches!(vcpu.execute(GuestOp::write_u64(gpa, value)), Exit::Done(_), "a store to {gpa:#x}");
    Ok(())
}

/// Host fills a page and unmaps; guest checks and fills; host maps again and checks.
fn one_page_by_turns(vm: &GmemVm, gmem: &dyn GuestMemfd) -> TestResult {
    let first = claim_ok!(gmem.map(PAGE_SIZE, 0, Protection::SHARED_RW));
    first.fill(0, PAGE_SIZE, 0xAA)?;
    drop(first);
    let mut vcpu = vm.vcpu(0)?;
    let gpa = vm.gpa(0);
    claim_eq!(vcpu.execute(GuestOp::Check { gpa, len: PAGE_SIZE, byte: 0xAA }), Exit::Done(0), "what the host wrote");
    claim_matches!(vcpu.execute(GuestOp::Fill { gpa, len: PAGE_SIZE, byte: 0xFF }), Exit::Done(_));
    let second = claim_ok!(gmem.map(PAGE_SIZE, 0, Protection::SHARED_RW));
    claim_eq!(second.find_mismatch(0, PAGE_SIZE, 0xFF)?, None, "what the guest wrote");
    Ok(())
}

fn guest_and_host_share_the_pages(cx: &Context) -> TestResult {
    let vm = GmemVm::mappable(cx, 1)?;
    one_page_by_turns(&vm, &*vm.gmem)
}

fn guest_and_host_share_the_pages_without_a_userspace_addr(cx: &Context) -> TestResult {
    let vm = GmemVm::mappable(cx, 1)?;
    vm.delete_slot()?;
    claim_ok!(vm.vm.set_memory_region(&vm.region().at(0)));
    one_page_by_turns(&vm, &*vm.gmem)
}

fn mappable_file_wins_over_the_userspace_addr(cx: &Context) -> TestResult {
    let vm = GmemVm::mappable(cx, 1)?;
    vm.delete_slot()?;
    let decoy = claim_ok!(cx.machine().host_memory(HostMemory::Anonymous, PAGE_SIZE));
    decoy.write_u64(0, 0xDEC0)?;
    vm.shared.write_u64(0, 0xF11E)?;
    claim_ok!(vm.vm.set_memory_region(&vm.region().at(decoy.addr())));
    let mut vcpu = vm.vcpu(0)?;
    claim_eq!(read(&mut *vcpu, vm.gpa(0))?, 0xF11E, "the guest reads the file");
    write(&mut *vcpu, vm.gpa(0), 0x5107)?;
    claim_eq!(vm.shared.read_u64(0)?, 0x5107, "the guest writes the file");
    claim_eq!(decoy.read_u64(0)?, 0xDEC0, "the memory at userspace_addr is not touched");
    Ok(())
}

fn unmappable_file_is_unused_without_private_memory(cx: &Context) -> TestResult {
    if cx.has(Facility::PrivateMemory) {
        gmemtest::skip!(Declined, "about VM types without private memory");
    }
    let vm = claim_ok!(cx.machine().create_vm(VmConfig::Payload { vcpus: 1 }));
    let gmem = claim_ok!(vm.create_guest_memfd(PAGE_SIZE, 0));
    let shared = claim_ok!(cx.machine().host_memory(HostMemory::Anonymous, PAGE_SIZE));
    shared.write_u64(0, 0x5A4E)?;
    let region = MemoryRegion::new(GmemVm::SLOT, GmemVm::GPA, PAGE_SIZE).at(shared.addr()).bound_to(&*gmem, 0);
    claim_ok!(vm.set_memory_region(&region));
    let mut vcpu = claim_ok!(vm.create_vcpu(0));
    if claim_ok!(cx.machine().capability(KVM_CAP_GUEST_MEMFD_MEMORY_ATTRIBUTES_RFC_V5)) != 0 {
        claim_eq!(read(&mut *vcpu, GmemVm::GPA)?, 0, "the guest reads the file");
        write(&mut *vcpu, GmemVm::GPA, 0x6E57)?;
        claim_eq!(shared.read_u64(0)?, 0x5A4E, "the memory at userspace_addr is not touched");
        claim_eq!(claim_ok!(gmem.cache_stat(0, 0)).cached, 1, "pages in the file");
        return Ok(());
    }
    claim_eq!(read(&mut *vcpu, GmemVm::GPA)?, 0x5A4E, "the guest reads the memory at userspace_addr");
    write(&mut *vcpu, GmemVm::GPA, 0x6E57)?;
    claim_eq!(shared.read_u64(0)?, 0x6E57, "the guest writes the memory at userspace_addr");
    claim_eq!(claim_ok!(gmem.cache_stat(0, 0)).cached, 0, "pages in the file");
    Ok(())
}

/// Whether the pages are allocated before.
const FRESH: &[(&str, Option<u64>)] = &[("absent", None), ("allocated", Some(PAGES * PAGE_SIZE))];

fn fresh_memory_reads_zero(cx: &Context, allocate: &Option<u64>) -> TestResult {
    let vm = GmemVm::new(cx, PAGES)?;
    if let Some(len) = *allocate {
        claim_ok!(vm.gmem.allocate(0, len));
    }
    let mut vcpu = vm.vcpu(0)?;
    let check = GuestOp::Check { gpa: vm.gpa(0), len: vm.len, byte: 0 };
    claim_eq!(vcpu.execute(check), Exit::Done(0), "all of the fresh memory");
    Ok(())
}

/// Byte offset and size of the store.
const STORES: &[(&str, (u64, u8))] = &[
    ("one_byte", (5, 1)),
    ("two_bytes", (6, 2)),
    ("four_bytes", (8, 4)),
    ("eight_bytes", (16, 8)),
    ("last_byte_of_a_page", (PAGE_SIZE - 1, 1)),
    ("two_bytes_across_pages", (PAGE_SIZE - 1, 2)),
    ("eight_bytes_across_pages", (PAGE_SIZE - 3, 8)),
];

fn store_changes_its_bytes_only(cx: &Context, &(at, size): &(u64, u8)) -> TestResult {
    let vm = GmemVm::new(cx, 2)?;
    let mut vcpu = vm.vcpu(0)?;
    claim_matches!(vcpu.execute(GuestOp::Fill { gpa: vm.gpa(0), len: vm.len, byte: 0x11 }), Exit::Done(_));
    let value = 0x8877_6655_4433_2212;
    claim_matches!(vcpu.execute(GuestOp::Write { gpa: vm.gpa(at), size, value }), Exit::Done(_));
    let stored = value & (u64::MAX >> (64 - 8 * u32::from(size)));
    claim_eq!(vcpu.execute(GuestOp::Read { gpa: vm.gpa(at), size }), Exit::Done(stored), "the bytes stored");
    let after = at + u64::from(size);
    for (from, to) in [(0, at), (after, vm.len)] {
        let check = GuestOp::Check { gpa: vm.gpa(from), len: to - from, byte: 0x11 };
        claim_eq!(vcpu.execute(check), Exit::Done(0), "bytes {from:#x} to {to:#x}, which were not stored to");
    }
    Ok(())
}

fn vcpus_share_the_pages(cx: &Context) -> TestResult {
    let vm = GmemVm::new(cx, 1)?;
    let (mut first, mut second) = (vm.vcpu(0)?, vm.vcpu(1)?);
    write(&mut *first, vm.gpa(0), 1)?;
    claim_eq!(read(&mut *second, vm.gpa(0))?, 1, "the second vCPU reads what the first wrote");
    write(&mut *second, vm.gpa(0), 2)?;
    claim_eq!(read(&mut *first, vm.gpa(0))?, 2, "the first vCPU reads what the second wrote");
    Ok(())
}

/// First page and number of pages of the hole, in a file of [`PAGES`].
const PUNCHES: &[(&str, (u64, u64))] = &[
    ("first_page", (0, 1)),
    ("middle_pages", (1, 2)),
    ("last_page", (3, 1)),
    ("all", (0, 4)),
    ("beyond_the_end", (3, 9)),
];

fn punched_page_reads_zero_in_the_guest(cx: &Context, &(first, pages): &(u64, u64)) -> TestResult {
    let vm = GmemVm::new(cx, PAGES)?;
    let mut vcpu = vm.vcpu(0)?;
    claim_matches!(vcpu.execute(GuestOp::Fill { gpa: vm.gpa(0), len: vm.len, byte: 0x5C }), Exit::Done(_));
    claim_ok!(vm.gmem.punch_hole(first * PAGE_SIZE, pages * PAGE_SIZE));
    for page in 0..PAGES {
        let byte = if (first..first + pages).contains(&page) { 0 } else { 0x5C };
        let check = GuestOp::Check { gpa: vm.gpa(page * PAGE_SIZE), len: PAGE_SIZE, byte };
        claim_eq!(vcpu.execute(check), Exit::Done(0), "page {page} after pages {first} to {} went", first + pages - 1);
    }
    Ok(())
}

/// Who touches the fresh page first, and whether it was allocated before.
#[derive(Clone, Copy, Debug)]
enum FirstTouch {
    Guest,
    Host,
    GuestAfterAllocation,
    HostAfterAllocation,
}

const FIRST: &[(&str, FirstTouch)] = &[
    ("guest_first", FirstTouch::Guest),
    ("host_first", FirstTouch::Host),
    ("allocated_then_guest", FirstTouch::GuestAfterAllocation),
    ("allocated_then_host", FirstTouch::HostAfterAllocation),
];

fn punched_page_is_one_fresh_page_for_both(cx: &Context, &first: &FirstTouch) -> TestResult {
    let vm = GmemVm::mappable(cx, PAGES)?;
    let mut vcpu = vm.vcpu(0)?;
    vm.shared.write_u64(PAGE_SIZE, 0x01D0)?;
    claim_eq!(read(&mut *vcpu, vm.gpa(PAGE_SIZE))?, 0x01D0);
    claim_ok!(vm.gmem.punch_hole(PAGE_SIZE, PAGE_SIZE));
    if matches!(first, FirstTouch::GuestAfterAllocation | FirstTouch::HostAfterAllocation) {
        claim_ok!(vm.gmem.allocate(0, vm.len));
    }
    if matches!(first, FirstTouch::Guest | FirstTouch::GuestAfterAllocation) {
        claim_eq!(read(&mut *vcpu, vm.gpa(PAGE_SIZE))?, 0, "the guest after the punch");
        claim_eq!(vm.shared.read_u64(PAGE_SIZE)?, 0, "the host after the guest");
    } else {
        claim_eq!(vm.shared.read_u64(PAGE_SIZE)?, 0, "the host after the punch");
        claim_eq!(read(&mut *vcpu, vm.gpa(PAGE_SIZE))?, 0, "the guest after the host");
    }
    write(&mut *vcpu, vm.gpa(PAGE_SIZE), 0x6E57)?;
    claim_eq!(vm.shared.read_u64(PAGE_SIZE)?, 0x6E57, "the host sees the guest's store");
    vm.shared.write_u64(PAGE_SIZE, 0x4057)?;
    claim_eq!(read(&mut *vcpu, vm.gpa(PAGE_SIZE))?, 0x4057, "the guest sees the host's store");
    Ok(())
}

fn allocating_again_keeps_the_contents(cx: &Context) -> TestResult {
    let vm = GmemVm::new(cx, PAGES)?;
    let mut vcpu = vm.vcpu(0)?;
    write(&mut *vcpu, vm.gpa(2 * PAGE_SIZE), 0x1CE)?;
    claim_ok!(vm.gmem.allocate(0, vm.len));
    claim_eq!(read(&mut *vcpu, vm.gpa(2 * PAGE_SIZE))?, 0x1CE, "the page that was there");
    claim_eq!(read(&mut *vcpu, vm.gpa(3 * PAGE_SIZE))?, 0, "a page that was not");
    Ok(())
}

/// First page and number of pages touched, and how.
type Touching = (u64, u64, fn(u64, u64) -> GuestOp);

const TOUCHES: &[(&str, Touching)] = &[
    ("load", (1, 2, |gpa, len| GuestOp::Touch { gpa, len })),
    ("store", (1, 2, |gpa, len| GuestOp::Fill { gpa, len, byte: 7 })),
    ("load_of_all", (0, PAGES, |gpa, len| GuestOp::Touch { gpa, len })),
];

fn guest_access_allocates_what_it_touches(cx: &Context, &(first, pages, op): &Touching) -> TestResult {
    let vm = GmemVm::new(cx, PAGES)?;
    claim_eq!(claim_ok!(vm.gmem.cache_stat(0, 0)).cached, 0, "pages in the file before");
    let mut vcpu = vm.vcpu(0)?;
    claim_matches!(vcpu.execute(op(vm.gpa(first * PAGE_SIZE), pages * PAGE_SIZE)), Exit::Done(_));
    for page in 0..PAGES {
        let cached = claim_ok!(vm.gmem.cache_stat(page * PAGE_SIZE, PAGE_SIZE)).cached;
        claim_eq!(cached, u64::from((first..first + pages).contains(&page)), "pages in the file at page {page}");
    }
    Ok(())
}

/// The advice, and what the guest then finds in the page that held 0x5EED.
const ADVICE: &[(&str, (i32, u64))] =
    &[("remove", (libc::MADV_REMOVE, 0)), ("dontneed", (libc::MADV_DONTNEED, 0x5EED))];

fn advice_on_the_mapping_reaches_the_guest(cx: &Context, &(advice, left): &(i32, u64)) -> TestResult {
    let vm = GmemVm::mappable(cx, PAGES)?;
    let mut vcpu = vm.vcpu(0)?;
    write(&mut *vcpu, vm.gpa(0), 0x5EED)?;
    write(&mut *vcpu, vm.gpa(PAGE_SIZE), 0x5EED)?;
    claim_ok!(vm.shared.advise(0, PAGE_SIZE, advice));
    claim_eq!(read(&mut *vcpu, vm.gpa(0))?, left, "the page advised");
    claim_eq!(read(&mut *vcpu, vm.gpa(PAGE_SIZE))?, 0x5EED, "the page beside it");
    claim_eq!(vm.shared.read_u64(0)?, left, "the page advised, from the host");
    Ok(())
}

fn slots_show_their_own_ranges(cx: &Context) -> TestResult {
    let vm = GmemVm::mappable(cx, PAGES)?;
    vm.delete_slot()?;
    for page in 0..PAGES {
        vm.shared.write_u64(page * PAGE_SIZE, 100 + page)?;
        let region = MemoryRegion::new(10 + page as u32, vm.slot_gpa(2 * (PAGES - page) * PAGE_SIZE), PAGE_SIZE);
        let region = region.at(vm.shared.addr() + page * PAGE_SIZE).bound_to(&*vm.gmem, page * PAGE_SIZE);
        claim_ok!(vm.vm.set_memory_region(&region), "the slot of page {page}");
    }
    let mut vcpu = vm.vcpu(0)?;
    for page in 0..PAGES {
        let gpa = vm.gpa(2 * (PAGES - page) * PAGE_SIZE);
        claim_eq!(read(&mut *vcpu, gpa)?, 100 + page, "page {page} in the guest");
        write(&mut *vcpu, gpa, 200 + page)?;
        claim_eq!(vm.shared.read_u64(page * PAGE_SIZE)?, 200 + page, "page {page} in the host");
    }
    Ok(())
}

fn files_do_not_share_pages(cx: &Context) -> TestResult {
    let vm = GmemVm::mappable(cx, 1)?;
    let flags = GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED;
    let other = claim_ok!(vm.vm.create_guest_memfd(PAGE_SIZE, flags));
    let mapping = claim_ok!(other.map(PAGE_SIZE, 0, Protection::SHARED_RW));
    let region = MemoryRegion::new(2, vm.slot_gpa(vm.len), PAGE_SIZE).at(mapping.addr()).bound_to(&*other, 0);
    claim_ok!(vm.vm.set_memory_region(&region));
    let mut vcpu = vm.vcpu(0)?;
    write(&mut *vcpu, vm.gpa(0), 0xA)?;
    write(&mut *vcpu, vm.gpa(vm.len), 0xB)?;
    claim_eq!((vm.shared.read_u64(0)?, mapping.read_u64(0)?), (0xA, 0xB), "what the two files hold");
    claim_ok!(vm.gmem.punch_hole(0, PAGE_SIZE));
    claim_eq!(read(&mut *vcpu, vm.gpa(0))?, 0, "the punched file");
    claim_eq!(read(&mut *vcpu, vm.gpa(vm.len))?, 0xB, "the other file");
    Ok(())
}

fn recreated_slot_shows_its_new_range(cx: &Context) -> TestResult {
    let vm = GmemVm::mappable(cx, 2)?;
    let mut vcpu = vm.vcpu(0)?;
    write(&mut *vcpu, vm.gpa(0), 0xA)?;
    write(&mut *vcpu, vm.gpa(PAGE_SIZE), 0xB)?;
    vm.delete_slot()?;
    vm.create_slot()?;
    claim_eq!(read(&mut *vcpu, vm.gpa(0))?, 0xA, "the same range again");
    vm.delete_slot()?;
    let second = MemoryRegion::new(GmemVm::SLOT, vm.slot_gpa(0), PAGE_SIZE);
    let second = second.at(vm.shared.addr() + PAGE_SIZE).bound_to(&*vm.gmem, PAGE_SIZE);
    claim_ok!(vm.vm.set_memory_region(&second));
    claim_eq!(read(&mut *vcpu, vm.gpa(0))?, 0xB, "the second page at the address of the first");
    Ok(())
}

/// `mov eax, value; ret`, as 8 bytes.
fn code_returning(value: u32) -> u64 {
    let [a, b, c, d] = value.to_le_bytes();
    u64::from_le_bytes([0xB8, a, b, c, d, 0xC3, 0xCC, 0xCC])
}

fn guest_executes_from_the_file(cx: &Context) -> TestResult {
    let vm = GmemVm::mappable(cx, 2)?;
    let mut vcpu = vm.vcpu(0)?;
    for (value, at) in [(0x1111, 0), (0x2222, PAGE_SIZE), (0x3333, 0)] {
        vm.shared.write_u64(at, code_returning(value))?;
        let exit = vcpu.execute(GuestOp::Execute { gpa: vm.gpa(at) });
        claim_eq!(exit, Exit::Done(u64::from(value)), "code that the host wrote at {at:#x}");
    }
    claim_ok!(vm.gmem.punch_hole(0, PAGE_SIZE));
    vm.shared.write_u64(0, code_returning(0x4444))?;
    let exit = vcpu.execute(GuestOp::Execute { gpa: vm.gpa(0) });
    claim_eq!(exit, Exit::Done(0x4444), "code in the page that took the place of the punched one");
    Ok(())
}

fn guest_executes_what_it_wrote(cx: &Context) -> TestResult {
    let vm = GmemVm::new(cx, 1)?;
    let mut vcpu = vm.vcpu(0)?;
    for value in [0x4444, 0x5555] {
        write(&mut *vcpu, vm.gpa(0), code_returning(value))?;
        let exit = vcpu.execute(GuestOp::Execute { gpa: vm.gpa(0) });
        claim_eq!(exit, Exit::Done(u64::from(value)), "code that the guest wrote");
    }
    Ok(())
}

/// The stand-alone binary.
pub fn main() -> std::process::ExitCode {
    gmemtest::cli::selftest_main(&[&SUITE])
}
