//! Shared memory that KVM maps with huge pages, with private pages among it.
//!
//! A huge mapping covers 512 guest frames at once, so one private frame among them must keep KVM from making it: KVM keeps,
//! for every slot and every huge frame, whether the attributes below it are mixed (KVM_LPAGE_MIXED_FLAG). A mistake there
//! shows nowhere but here: with base pages every frame has its own entry.

use std::sync::Arc;

use gmemtest::harness::{Context, TestResult};
use gmemtest::machine::{
    Exit, Facility, GuestMemfd, GuestOp, HostMemory, Mapping, MemoryAttributes, MemoryRegion, PAGE_SIZE, Vcpu, Vm,
    VmConfig, VmType,
};
use gmemtest::uapi::kvm::KVM_MEMORY_ATTRIBUTE_PRIVATE;
use gmemtest::{claim_eq, claim_matches, claim_ok};

gmemtest::suite! {
    /// Private pages within shared memory that is mapped with huge pages, on VM types with both.
    pub static SUITE: huge_mappings
        needs [Vm, Guest, GuestMemfd, UserMemory2, PrivateMemory, MemoryAttributes, TransparentHugePages] {
        /// A page made private within a huge page that the guest uses shows its private contents, and the pages around it
        /// the shared ones, also when the guest touches its neighbours first (kvm_mmu_page_set_lpage_mixed and the zap of
        /// kvm_arch_pre_set_memory_attributes()). A failure gives the guest the host's data for a private page.
        private_page_within_a_huge_page_has_its_own_contents[PRIVATE];

        /// The same when the attributes were there before the slot (kvm_mmu_init_memslot_memory_attributes()). A failure
        /// means that a slot made later forgets what is private below it.
        slot_made_later_knows_its_private_pages[PRIVATE];

        /// With the last private page shared again, the whole range shows the shared side; private once more, it shows what
        /// the private side held. A failure leaves a page on the wrong side after a round trip.
        round_trip_within_a_huge_page_keeps_both_sides[PRIVATE];

        /// A guest that stores to a private page does not store to the huge page around it. A failure writes private data
        /// where the host reads it.
        private_store_does_not_reach_the_huge_page[PRIVATE];

        /// A uniformly shared huge page is mapped with one entry, and again after a conversion there and back
        /// (hugepage_set_mixed() is undone). A failure costs the guest its huge pages for good.
        huge_mapping_comes_back_with_uniform_attributes needs [KvmStats];
    }
}

const HUGE: u64 = 2 << 20;
const PAGES: u64 = 512;
/// Three huge frames.
const LEN: u64 = 3 * HUGE;
const BASE: u64 = 1 << 32;
const SLOT: u32 = 1;
const SHARED: u8 = 0x5A;

/// First private page and number, from the start of the memory.
type Range = (u64, u64);

const PRIVATE: &[(&str, Range)] = &[
    ("first_page_of_a_huge_page", (PAGES, 1)),
    ("last_page_of_a_huge_page", (2 * PAGES - 1, 1)),
    ("page_in_the_middle", (PAGES + 200, 1)),
    ("last_page_and_first_of_the_next", (2 * PAGES - 1, 2)),
    ("all_but_the_first_page", (PAGES + 1, PAGES - 1)),
    ("all_but_the_last_page", (PAGES, PAGES - 1)),
    ("a_huge_page", (PAGES, PAGES)),
    ("a_huge_page_and_a_page_on_either_side", (PAGES - 1, PAGES + 2)),
    ("page_of_the_first_huge_page", (3, 1)),
    ("last_page_of_the_slot", (3 * PAGES - 1, 1)),
];

struct Memory {
    vm: Arc<dyn Vm>,
    gmem: Arc<dyn GuestMemfd>,
    shared: Box<dyn Mapping>,
}

impl Memory {
    fn new(cx: &Context) -> TestResult<Memory> {
        if cx.machine().spec().vm_type == VmType::Tdx {
            gmemtest::skip!(Declined, "a TD says by the address whether an access is private");
        }
        let vm = claim_ok!(cx.machine().create_vm(VmConfig::Payload { vcpus: 1 }));
        let gmem = claim_ok!(vm.create_guest_memfd(LEN, 0));
        let shared = claim_ok!(cx.machine().host_memory(HostMemory::TransparentHuge, LEN));
        claim_ok!(shared.fill(0, LEN, SHARED));
        Ok(Memory { vm, gmem, shared })
    }

    fn with_slot(cx: &Context) -> TestResult<Memory> {
        let memory = Memory::new(cx)?;
        memory.create_slot()?;
        Ok(memory)
    }

    fn create_slot(&self) -> TestResult {
        let region = MemoryRegion::new(SLOT, BASE, LEN).at(self.shared.addr()).bound_to(&*self.gmem, 0);
        claim_ok!(self.vm.set_memory_region(&region));
        Ok(())
    }

    fn convert(&self, (first, count): Range, attributes: u64) -> TestResult {
        let (address, size) = (BASE + first * PAGE_SIZE, count * PAGE_SIZE);
        let range = MemoryAttributes { address, size, attributes, flags: 0 };
        claim_ok!(self.vm.set_memory_attributes(&range), "attributes {attributes:#x} for {range:x?}");
        Ok(())
    }

    fn vcpu(&self) -> TestResult<Box<dyn Vcpu>> {
        Ok(claim_ok!(self.vm.create_vcpu(0)))
    }
}

/// The pages that tell whether a range is where it should be: its edges, their neighbours, and those of each huge page,
/// neighbours first, because their faults are what would map too much.
fn telling((first, count): Range) -> Vec<u64> {
    let last = first + count - 1;
    let mut pages = vec![first.wrapping_sub(1), last + 1];
    pages.extend([0, PAGES - 1, PAGES, 2 * PAGES - 1, 2 * PAGES, 3 * PAGES - 1]);
    pages.extend([first, first + count / 2, last]);
    pages.retain(|&page| page < LEN / PAGE_SIZE);
    pages
}

fn is_in(page: u64, (first, count): Range) -> bool {
    (first..first + count).contains(&page)
}

/// Claims what byte each telling page is full of.
fn claim_bytes(vcpu: &mut dyn Vcpu, range: Range, when: &str, private: u8) -> TestResult {
    for page in telling(range) {
        let byte = if is_in(page, range) { private } else { SHARED };
        let check = GuestOp::Check { gpa: BASE + page * PAGE_SIZE, len: PAGE_SIZE, byte };
        claim_eq!(vcpu.execute(check), Exit::Done(0), "page {page} {when}");
    }
    Ok(())
}

fn touch_everything(vcpu: &mut dyn Vcpu) -> TestResult {
    claim_matches!(vcpu.execute(GuestOp::Touch { gpa: BASE, len: LEN }), Exit::Done(_), "a touch of every page");
    Ok(())
}

fn private_page_within_a_huge_page_has_its_own_contents(cx: &Context, &range: &Range) -> TestResult {
    let memory = Memory::with_slot(cx)?;
    let mut vcpu = memory.vcpu()?;
    touch_everything(&mut *vcpu)?;
    memory.convert(range, KVM_MEMORY_ATTRIBUTE_PRIVATE)?;
    claim_bytes(&mut *vcpu, range, "after the conversion", 0)
}

fn slot_made_later_knows_its_private_pages(cx: &Context, &range: &Range) -> TestResult {
    let memory = Memory::new(cx)?;
    memory.convert(range, KVM_MEMORY_ATTRIBUTE_PRIVATE)?;
    memory.create_slot()?;
    let mut vcpu = memory.vcpu()?;
    claim_bytes(&mut *vcpu, range, "in a slot made after the conversion", 0)
}

fn round_trip_within_a_huge_page_keeps_both_sides(cx: &Context, &range: &Range) -> TestResult {
    const PRIVATE: u8 = 0x91;
    let memory = Memory::with_slot(cx)?;
    let mut vcpu = memory.vcpu()?;
    memory.convert(range, KVM_MEMORY_ATTRIBUTE_PRIVATE)?;
    let (gpa, len) = (BASE + range.0 * PAGE_SIZE, range.1 * PAGE_SIZE);
    claim_matches!(vcpu.execute(GuestOp::Fill { gpa, len, byte: PRIVATE }), Exit::Done(_), "stores to private pages");
    claim_bytes(&mut *vcpu, range, "after private stores", PRIVATE)?;
    memory.convert(range, 0)?;
    claim_bytes(&mut *vcpu, range, "after the way back", SHARED)?;
    memory.convert(range, KVM_MEMORY_ATTRIBUTE_PRIVATE)?;
    claim_bytes(&mut *vcpu, range, "private once more", PRIVATE)
}

fn private_store_does_not_reach_the_huge_page(cx: &Context, &range: &Range) -> TestResult {
    let memory = Memory::with_slot(cx)?;
    let mut vcpu = memory.vcpu()?;
    touch_everything(&mut *vcpu)?;
    memory.convert(range, KVM_MEMORY_ATTRIBUTE_PRIVATE)?;
    let (gpa, len) = (BASE + range.0 * PAGE_SIZE, range.1 * PAGE_SIZE);
    claim_matches!(vcpu.execute(GuestOp::Fill { gpa, len, byte: 0x91 }), Exit::Done(_), "stores to private pages");
    claim_eq!(memory.shared.find_mismatch(0, LEN, SHARED), Ok(None), "the shared side");
    Ok(())
}

fn huge_mapping_comes_back_with_uniform_attributes(cx: &Context) -> TestResult {
    let memory = Memory::with_slot(cx)?;
    let mut vcpu = memory.vcpu()?;
    let mut huge_mappings = || -> TestResult<u64> {
        touch_everything(&mut *vcpu)?;
        Ok(claim_ok!(memory.vm.statistic("pages_2m")))
    };
    let before = huge_mappings()?;
    if before == 0 {
        gmemtest::skip!(Declined, "the host gave no huge page, or KVM maps none here");
    }
    let page = (PAGES + 7, 1);
    memory.convert(page, KVM_MEMORY_ATTRIBUTE_PRIVATE)?;
    claim_eq!(huge_mappings()?, before - 1, "huge mappings with a private page in one of them");
    memory.convert(page, 0)?;
    claim_eq!(huge_mappings()?, before, "huge mappings with everything shared again");
    if cx.has(Facility::Cachestat) {
        let cached = claim_ok!(memory.gmem.cache_stat(0, 0)).cached;
        claim_eq!(cached, 1, "pages of the file: the one that was private");
    }
    Ok(())
}

/// The stand-alone binary.
pub fn main() -> std::process::ExitCode {
    gmemtest::cli::selftest_main(&[&SUITE])
}
