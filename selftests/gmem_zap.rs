//! One file behind several slots, none of which starts at the file's first page: whatever happens to a range of the file
//! reaches the guest's mappings of exactly that range.
//!
//! guest_memfd finds the mappings of a page through the file's table of bindings, where a slot stands by the offset that it
//! was bound at. A slot that starts at offset 0 hides every mistake in that arithmetic.

use std::sync::Arc;

use gmemtest::harness::{Context, TestResult};
use gmemtest::machine::{
    Errno, Exit, Facility, GuestMemfd, GuestOp, HostMemory, MemoryAttributes, MemoryRegion, PAGE_SIZE, Protection,
    Vcpu, Vm, VmConfig, VmType,
};
use gmemtest::uapi::kvm::{GUEST_MEMFD_FLAG_INIT_SHARED, GUEST_MEMFD_FLAG_MMAP, KVM_MEMORY_ATTRIBUTE_PRIVATE};
use gmemtest::{claim, claim_eq, claim_matches, claim_ok};

gmemtest::suite! {
    /// Changes to ranges of a file that is bound to several slots, at offsets of their own and in another order than in the
    /// guest's address space.
    pub static SUITE: gmem_zap needs [Vm, Guest, GuestMemfd, UserMemory2] {
        /// A punched page reads zero in whichever slot it is bound to, and every other page keeps its contents
        /// (kvm_gmem_invalidate_begin() walks all bindings of the range). A failure means that a guest goes on with a page
        /// that was freed, or loses one that was not.
        punch_reaches_the_slots_of_its_range[PUNCHES];

        /// After a punch, what the guest stores goes to the page that the file has now, and stays there. A failure means
        /// that two pages stand for one offset.
        stores_after_a_punch_go_to_the_new_page[PUNCHES];

        /// A punched and allocated page reads zero too: fallocate gives a page that nobody has zeroed, and the first
        /// mapping zeroes it (kvm_gmem_prepare_folio()). A failure shows a guest what the page held before.
        punched_and_allocated_page_reads_zero[PUNCHES];

        /// When the last descriptor is closed, no slot has its pages any more: every access ends in KVM_EXIT_MEMORY_FAULT
        /// with EFAULT (kvm_gmem_release()). A failure is a guest with access to freed pages.
        closing_the_file_reaches_every_slot needs [MemoryFaultInfo];

        /// Deleting a slot frees its range of the file for another slot, and no page beside it; its pages keep their
        /// contents and show in the new slot (kvm_gmem_unbind()). A failure binds a page twice, or loses a binding.
        deleting_a_slot_frees_its_range_alone;

        /// A conversion of guest-physical memory across several slots changes the side of its pages and of no other
        /// (kvm_vm_set_mem_attributes()). A failure leaves pages of a later slot on their old side.
        conversion_reaches_every_slot[CONVERSIONS] needs [PrivateMemory, MemoryAttributes];

        /// A guest access, or a pre-fault, allocates the page that its slot's offset says and no other
        /// (kvm_gmem_get_index()). A failure lets two slots fight for one page, or puts data where nobody looks for it.
        access_allocates_the_page_of_its_offset[ACCESSES] needs [Cachestat];

        /// A long random sequence of stores, punches, allocations, conversions and slots made anew, over slots at offsets
        /// of their own, always shows what plain arrays of values say. A failure prints the seed that repeats it.
        random_operations_agree_with_arrays timeout 120;

        /// An offset whose page number needs more than 32 bits is an offset like any other. A failure means that a page
        /// number is cut to 32 bits on the way, so that two offsets share a page.
        far_offset_has_its_own_page[FAR];
    }
}

/// Pages of the file; the first `LEAD` of them are bound to no slot.
const PAGES: u64 = LEAD + 3 * EACH;
const LEAD: u64 = 3;
/// Pages of each slot.
const EACH: u64 = 8;

/// Slot id, first page in the file, guest-physical address: in the file 1, 2, 3, in the guest's addresses 2, 3, 1.
const SLOTS: [(u32, u64, u64); 3] =
    [(1, LEAD, (1 << 32) + (4 << 20)), (2, LEAD + EACH, 1 << 32), (3, LEAD + 2 * EACH, (1 << 32) + EACH * PAGE_SIZE)];

/// The guest-physical address of a page of the file.
fn gpa(page: u64) -> u64 {
    let (_, first, gpa) = SLOTS[((page - LEAD) / EACH) as usize];
    gpa + (page - first) * PAGE_SIZE
}

/// What the guest stores to a page of the file.
fn mark(page: u64) -> u64 {
    0x6D61_726B_0000_0001 + (page << 8)
}

/// Three slots over one file, whose pages are what guest accesses use.
struct Bound {
    vm: Arc<dyn Vm>,
    gmem: Arc<dyn GuestMemfd>,
}

impl Bound {
    fn new(cx: &Context) -> TestResult<Bound> {
        let bound = Bound::empty(cx, PAGES * PAGE_SIZE)?;
        for (id, first, gpa) in SLOTS {
            claim_ok!(bound.vm.set_memory_region(&bound.region(id, first, gpa, EACH)), "slot {id}");
            bound.make_private(cx, gpa, EACH)?;
        }
        Ok(bound)
    }

    /// A file of `size` bytes that guest accesses will use, and no slot.
    fn empty(cx: &Context, size: u64) -> TestResult<Bound> {
        if cx.machine().spec().vm_type == VmType::Tdx {
            gmemtest::skip!(Declined, "a TD loses what its pages held whenever they are unmapped");
        }
        let private = cx.has(Facility::PrivateMemory);
        cx.require(if private { Facility::MemoryAttributes } else { Facility::GmemMmap })?;
        if !private {
            cx.require(Facility::GmemInitShared)?;
        }
        let flags = if private { 0 } else { GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED };
        let vm = claim_ok!(cx.machine().create_vm(VmConfig::Payload { vcpus: 1 }));
        let gmem = claim_ok!(vm.create_guest_memfd(size, flags));
        Ok(Bound { vm, gmem })
    }

    fn region(&self, id: u32, first: u64, gpa: u64, pages: u64) -> MemoryRegion<'_> {
        MemoryRegion::new(id, gpa, pages * PAGE_SIZE).bound_to(&*self.gmem, first * PAGE_SIZE)
    }

    fn make_private(&self, cx: &Context, gpa: u64, pages: u64) -> TestResult {
        if cx.has(Facility::PrivateMemory) {
            self.convert(gpa, pages, KVM_MEMORY_ATTRIBUTE_PRIVATE)?;
        }
        Ok(())
    }

    fn convert(&self, address: u64, pages: u64, attributes: u64) -> TestResult {
        let range = MemoryAttributes { address, size: pages * PAGE_SIZE, attributes, flags: 0 };
        claim_ok!(self.vm.set_memory_attributes(&range), "attributes {attributes:#x} for {range:x?}");
        Ok(())
    }

    /// A vCPU that has stored its mark to every bound page.
    fn marked(&self) -> TestResult<Box<dyn Vcpu>> {
        let mut vcpu = claim_ok!(self.vm.create_vcpu(0));
        for page in LEAD..PAGES {
            claim_matches!(
                vcpu.execute(GuestOp::write_u64(gpa(page), mark(page))),
                Exit::Done(_),
                "store to page {page}"
            );
        }
        Ok(vcpu)
    }
}

/// First page and number of pages, in the file.
type Range = (u64, u64);

const PUNCHES: &[(&str, Range)] = &[
    ("first_page_of_the_first_slot", (LEAD, 1)),
    ("last_page_of_the_first_slot", (LEAD + EACH - 1, 1)),
    ("first_page_of_the_last_slot", (LEAD + 2 * EACH, 1)),
    ("last_page_of_the_file", (PAGES - 1, 1)),
    ("inside_the_middle_slot", (LEAD + EACH + 2, 3)),
    ("the_middle_slot", (LEAD + EACH, EACH)),
    ("last_and_first_of_two_slots", (LEAD + EACH - 1, 2)),
    ("middle_slot_and_a_page_on_either_side", (LEAD + EACH - 1, EACH + 2)),
    ("all_but_the_outermost_pages", (LEAD + 1, 3 * EACH - 2)),
    ("pages_of_no_slot_and_the_first_of_one", (0, LEAD + 1)),
    ("pages_of_no_slot", (0, LEAD)),
    ("whole_file", (0, PAGES)),
    ("last_page_and_beyond_the_end", (PAGES - 1, 1 << 30)),
    ("as_far_as_offsets_go", (LEAD + EACH + 5, (i64::MAX as u64) / PAGE_SIZE - (LEAD + EACH + 5))),
];

fn is_in(page: u64, (first, count): Range) -> bool {
    (first..first + count).contains(&page)
}

fn claim_contents(vcpu: &mut dyn Vcpu, when: &str, contents: impl Fn(u64) -> u64) -> TestResult {
    for page in LEAD..PAGES {
        let exit = vcpu.execute(GuestOp::read_u64(gpa(page)));
        claim_eq!(exit, Exit::Done(contents(page)), "page {page} of the file, {when}");
    }
    Ok(())
}

fn punch_reaches_the_slots_of_its_range(cx: &Context, &range: &Range) -> TestResult {
    let bound = Bound::new(cx)?;
    let mut vcpu = bound.marked()?;
    claim_ok!(bound.gmem.punch_hole(range.0 * PAGE_SIZE, range.1 * PAGE_SIZE));
    claim_contents(&mut *vcpu, "after the punch", |page| if is_in(page, range) { 0 } else { mark(page) })
}

fn stores_after_a_punch_go_to_the_new_page(cx: &Context, &range: &Range) -> TestResult {
    let bound = Bound::new(cx)?;
    let mut vcpu = bound.marked()?;
    claim_ok!(bound.gmem.punch_hole(range.0 * PAGE_SIZE, range.1 * PAGE_SIZE));
    let new = |page: u64| !mark(page);
    for page in (LEAD..PAGES).filter(|&page| is_in(page, range)) {
        claim_matches!(vcpu.execute(GuestOp::write_u64(gpa(page), new(page))), Exit::Done(_), "store to page {page}");
    }
    let expected = |page| if is_in(page, range) { new(page) } else { mark(page) };
    claim_contents(&mut *vcpu, "after stores to what was punched", expected)?;
    // Through fresh mappings of the guest: slots made anew have none of the old ones.
    for (id, first, gpa) in SLOTS {
        claim_ok!(bound.vm.set_memory_region(&MemoryRegion::deletion(id)));
        claim_ok!(bound.vm.set_memory_region(&bound.region(id, first, gpa, EACH)), "slot {id} again");
    }
    claim_contents(&mut *vcpu, "in slots made anew", expected)?;
    if !cx.has(Facility::PrivateMemory) {
        let view = claim_ok!(bound.gmem.map(PAGES * PAGE_SIZE, 0, Protection::SHARED_RW));
        for page in LEAD..PAGES {
            claim_eq!(view.read_u64(page * PAGE_SIZE), Ok(expected(page)), "the host's view of page {page}");
        }
    }
    Ok(())
}

fn punched_and_allocated_page_reads_zero(cx: &Context, &range: &Range) -> TestResult {
    let bound = Bound::new(cx)?;
    let mut vcpu = bound.marked()?;
    claim_ok!(bound.gmem.punch_hole(range.0 * PAGE_SIZE, range.1 * PAGE_SIZE));
    let count = range.1.min(PAGES - range.0);
    claim_ok!(bound.gmem.allocate(range.0 * PAGE_SIZE, count * PAGE_SIZE));
    claim_contents(&mut *vcpu, "after punch and allocation", |page| if is_in(page, range) { 0 } else { mark(page) })
}

fn closing_the_file_reaches_every_slot(cx: &Context) -> TestResult {
    let bound = Bound::new(cx)?;
    let mut vcpu = bound.marked()?;
    let Bound { vm, gmem } = bound;
    drop(gmem);
    let flags = if cx.has(Facility::PrivateMemory) { KVM_MEMORY_ATTRIBUTE_PRIVATE } else { 0 };
    for page in LEAD..PAGES {
        let fault = Exit::MemoryFault { errno: Errno::EFAULT, flags, gpa: gpa(page), size: PAGE_SIZE };
        claim_eq!(vcpu.execute(GuestOp::read_u64(gpa(page))), fault, "page {page} of the file that is closed");
    }
    for (id, _, _) in SLOTS {
        claim_ok!(vm.set_memory_region(&MemoryRegion::deletion(id)), "slot {id} without its file");
    }
    Ok(())
}

fn deleting_a_slot_frees_its_range_alone(cx: &Context) -> TestResult {
    const OTHER: u32 = 9;
    let bound = Bound::new(cx)?;
    let mut vcpu = bound.marked()?;
    let (id, first, old) = SLOTS[1];
    claim_ok!(bound.vm.set_memory_region(&MemoryRegion::deletion(id)));
    let elsewhere = (1 << 32) + (16 << 20);
    for (what, page, pages) in [
        ("a page before the freed range", first - 1, 2),
        ("a page behind the freed range", first + EACH - 1, 2),
        ("the freed range and a page on either side", first - 1, EACH + 2),
        ("the last page of the slot before", first - 1, 1),
        ("the first page of the slot behind", first + EACH, 1),
    ] {
        let refused = bound.vm.set_memory_region(&bound.region(OTHER, page, elsewhere, pages));
        // EEXIST since 7.2, EINVAL before.
        let errno = cx.by_release(&[((6, 8), Errno::EINVAL), ((7, 2), Errno::EEXIST)])?;
        claim_eq!(refused, Err(errno), "{what}");
    }
    claim_ok!(bound.vm.set_memory_region(&bound.region(OTHER, first, elsewhere, EACH)), "the freed range");
    bound.make_private(cx, elsewhere, EACH)?;
    for page in LEAD..PAGES {
        let moved = (first..first + EACH).contains(&page);
        let at = if moved { elsewhere + (page - first) * PAGE_SIZE } else { gpa(page) };
        claim_eq!(vcpu.execute(GuestOp::read_u64(at)), Exit::Done(mark(page)), "page {page} of the file at {at:#x}");
    }
    let exit = vcpu.execute(GuestOp::read_u64(old));
    claim!(matches!(exit, Exit::Mmio { .. } | Exit::MemoryFault { .. }), "the deleted slot's address: {exit:x?}");
    Ok(())
}

/// In pages from the address of the second slot, which the third one follows: first and number.
const CONVERSIONS: &[(&str, Range)] = &[
    ("both_slots", (0, 2 * EACH)),
    ("last_and_first_page", (EACH - 1, 2)),
    ("last_page_of_the_first", (EACH - 1, 1)),
    ("first_page_of_the_second", (EACH, 1)),
    ("slots_and_no_slot_behind", (EACH + 3, 4 * EACH)),
];

fn conversion_reaches_every_slot(cx: &Context, &range: &Range) -> TestResult {
    let bound = Bound::empty(cx, PAGES * PAGE_SIZE)?;
    let shared = claim_ok!(cx.machine().host_memory(HostMemory::Shmem, PAGES * PAGE_SIZE));
    for page in LEAD..PAGES {
        claim_ok!(shared.write_u64(page * PAGE_SIZE, !mark(page)));
    }
    for (id, first, gpa) in SLOTS {
        let region = bound.region(id, first, gpa, EACH).at(shared.addr() + first * PAGE_SIZE);
        claim_ok!(bound.vm.set_memory_region(&region), "slot {id}");
        bound.convert(gpa, EACH, KVM_MEMORY_ATTRIBUTE_PRIVATE)?;
    }
    let mut vcpu = bound.marked()?;
    let start = SLOTS[1].2;
    bound.convert(start + range.0 * PAGE_SIZE, range.1, 0)?;
    let converted = |page: u64| gpa(page).checked_sub(start).is_some_and(|at| is_in(at / PAGE_SIZE, range));
    let expected = |page| if converted(page) { !mark(page) } else { mark(page) };
    claim_contents(&mut *vcpu, "after a conversion to shared", expected)?;
    bound.convert(start + range.0 * PAGE_SIZE, range.1, KVM_MEMORY_ATTRIBUTE_PRIVATE)?;
    claim_contents(&mut *vcpu, "after the way back", mark)
}

/// How a page is asked for.
#[derive(Clone, Copy, Debug)]
enum Access {
    Load,
    Store,
    PreFault,
}

const ACCESSES: &[(&str, Access)] =
    &[("load", Access::Load), ("store", Access::Store), ("pre_fault", Access::PreFault)];

fn access_allocates_the_page_of_its_offset(cx: &Context, &access: &Access) -> TestResult {
    let bound = Bound::new(cx)?;
    let mut vcpu = claim_ok!(bound.vm.create_vcpu(0));
    let mut there: Vec<u64> = Vec::new();
    for page in [LEAD, LEAD + EACH - 1, LEAD + EACH, LEAD + 2 * EACH + 3, PAGES - 1, LEAD + EACH + 1] {
        match access {
            Access::Load => {
                claim_eq!(vcpu.execute(GuestOp::read_u64(gpa(page))), Exit::Done(0), "load from page {page}")
            }
            Access::Store => {
                let store = GuestOp::write_u64(gpa(page), mark(page));
                claim_matches!(vcpu.execute(store), Exit::Done(_), "store to page {page}");
            }
            Access::PreFault => {
                cx.require(Facility::PreFault)?;
                let done = vcpu.pre_fault(gpa(page), PAGE_SIZE, 0);
                claim_eq!((done.result, done.size), (Ok(()), 0), "pre-fault of page {page}");
            }
        }
        there.push(page);
        for page in 0..PAGES {
            let cached = claim_ok!(bound.gmem.cache_stat(page * PAGE_SIZE, PAGE_SIZE)).cached;
            claim_eq!(cached, u64::from(there.contains(&page)), "page {page} of the file, after accesses to {there:?}");
        }
    }
    Ok(())
}

/// What a VM's memory should hold, by page of the file.
struct Arrays {
    /// Whether the attribute of the page's frame is private; always, without private memory.
    private: Vec<bool>,
    /// The file's first word, and the shared side's.
    sides: [Vec<u64>; 2],
}

const STEPS: u64 = 400;

fn random_operations_agree_with_arrays(cx: &Context) -> TestResult {
    let has_private = cx.has(Facility::PrivateMemory);
    let bound = Bound::empty(cx, PAGES * PAGE_SIZE)?;
    let shared = claim_ok!(cx.machine().host_memory(HostMemory::Shmem, PAGES * PAGE_SIZE));
    let region =
        |(id, first, gpa): (u32, u64, u64)| bound.region(id, first, gpa, EACH).at(shared.addr() + first * PAGE_SIZE);
    for slot in SLOTS {
        claim_ok!(bound.vm.set_memory_region(&region(slot)), "slot {}", slot.0);
    }
    let mut vcpu = claim_ok!(bound.vm.create_vcpu(0));
    let mut arrays = Arrays {
        private: vec![!has_private; PAGES as usize],
        sides: [vec![0; PAGES as usize], vec![0; PAGES as usize]],
    };
    let mut rng = cx.rng();
    for step in 0..STEPS {
        let first = LEAD + rng.below(PAGES - LEAD);
        let slot = SLOTS[((first - LEAD) / EACH) as usize];
        // Within a slot: guest-physical order and file order are the same there.
        let count = 1 + rng.below(slot.1 + EACH - first);
        let pages = first as usize..(first + count) as usize;
        match rng.below(if has_private { 7 } else { 5 }) {
            0 => {
                claim_ok!(bound.gmem.punch_hole(first * PAGE_SIZE, count * PAGE_SIZE), "step {step}");
                arrays.sides[0][pages].fill(0);
            }
            1 => claim_ok!(bound.gmem.allocate(first * PAGE_SIZE, count * PAGE_SIZE), "step {step}"),
            2 => {
                claim_ok!(bound.vm.set_memory_region(&MemoryRegion::deletion(slot.0)), "step {step}");
                claim_ok!(bound.vm.set_memory_region(&region(slot)), "step {step}: slot {}", slot.0);
            }
            3 | 4 => {
                let value = rng.next_u64();
                claim_matches!(vcpu.execute(GuestOp::write_u64(gpa(first), value)), Exit::Done(_), "step {step}");
                let page = first as usize;
                arrays.sides[usize::from(!arrays.private[page])][page] = value;
            }
            5 => {
                bound.convert(gpa(first), count, KVM_MEMORY_ATTRIBUTE_PRIVATE)?;
                arrays.private[pages].fill(true);
            }
            _ => {
                bound.convert(gpa(first), count, 0)?;
                arrays.private[pages].fill(false);
            }
        }
        // The page of the step, and any other one.
        for page in [first, LEAD + rng.below(PAGES - LEAD)] {
            let side = usize::from(!arrays.private[page as usize]);
            let expected = Exit::Done(arrays.sides[side][page as usize]);
            let exit = vcpu.execute(GuestOp::read_u64(gpa(page)));
            claim_eq!(exit, expected, "page {page} after step {step}, which was at page {first}; seed {}", cx.seed());
        }
    }
    for page in LEAD..PAGES {
        if has_private {
            claim_eq!(
                shared.read_u64(page * PAGE_SIZE),
                Ok(arrays.sides[1][page as usize]),
                "shared side of page {page}"
            );
        }
        let side = usize::from(!arrays.private[page as usize]);
        let exit = vcpu.execute(GuestOp::read_u64(gpa(page)));
        claim_eq!(exit, Exit::Done(arrays.sides[side][page as usize]), "page {page} at the end; seed {}", cx.seed());
    }
    Ok(())
}

/// First page of the slot in the file.
const FAR: &[(&str, u64)] = &[
    ("page_2_to_the_20", 1 << 20),
    ("page_2_to_the_31", 1 << 31),
    ("page_2_to_the_32", 1 << 32),
    ("last_pages_below_2_to_the_63_bytes", (1 << 51) - 4),
];

fn far_offset_has_its_own_page(cx: &Context, &far: &u64) -> TestResult {
    const SLOT_PAGES: u64 = 2;
    let bound = Bound::empty(cx, (far + SLOT_PAGES) * PAGE_SIZE)?;
    let (near_gpa, far_gpa) = (SLOTS[1].2, SLOTS[0].2);
    for (id, first, gpa) in [(1, 0, near_gpa), (2, far, far_gpa)] {
        claim_ok!(bound.vm.set_memory_region(&bound.region(id, first, gpa, SLOT_PAGES)), "slot {id}");
        bound.make_private(cx, gpa, SLOT_PAGES)?;
    }
    let mut vcpu = claim_ok!(bound.vm.create_vcpu(0));
    let mut read = |gpa, expected, when: &str| -> TestResult {
        claim_eq!(vcpu.execute(GuestOp::read_u64(gpa)), Exit::Done(expected), "{gpa:#x} {when}");
        if expected == 0 {
            claim_matches!(vcpu.execute(GuestOp::write_u64(gpa, gpa)), Exit::Done(_), "store at {gpa:#x}");
        }
        Ok(())
    };
    read(far_gpa, 0, "at first")?;
    read(near_gpa, 0, "at first")?;
    read(far_gpa, far_gpa, "after both stores")?;
    read(near_gpa, near_gpa, "after both stores")?;
    claim_ok!(bound.gmem.punch_hole(far * PAGE_SIZE, PAGE_SIZE));
    read(far_gpa, 0, "after a punch there")?;
    read(near_gpa, near_gpa, "after a punch at the far offset")?;
    claim_ok!(bound.gmem.punch_hole(0, PAGE_SIZE));
    read(far_gpa, far_gpa, "after a punch at the near offset")?;
    if cx.has(Facility::Cachestat) {
        let cached = claim_ok!(bound.gmem.cache_stat(far * PAGE_SIZE, 2 * PAGE_SIZE)).cached;
        claim_eq!(cached, 1, "pages at the far offset");
    }
    Ok(())
}

/// The stand-alone binary.
pub fn main() -> std::process::ExitCode {
    gmemtest::cli::selftest_main(&[&SUITE])
}
