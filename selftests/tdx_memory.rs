//! Initial memory of a TD: KVM_TDX_INIT_MEM_REGION.

use gmemtest::harness::{Context, Td, TdMemory, TestResult, command_on, init_mem_region, set_cpuid};
use gmemtest::machine::{
    Errno, Exit, Facility, GuestOp, HostMemory, MemoryAttributes, MemoryRegion, PAGE_SIZE, TdxAnswer, TdxCommand,
    TdxData, Vcpu,
};
use gmemtest::uapi::kvm_x86::{KVM_TDX_INIT_MEM_REGION, KVM_TDX_MEASURE_MEMORY_REGION, KvmTdxInitMemRegion};
use gmemtest::{claim, claim_eq, claim_ok};

gmemtest::suite! {
    /// KVM_TDX_INIT_MEM_REGION (6.16): what it refuses, in the order of tdx_vcpu_init_mem_region() and kvm_gmem_populate();
    /// how it reports progress; what the guest finds.
    pub static SUITE: tdx_memory needs [Vm, Tdx, GuestMemfd] {
        /// A region that is not one is EINVAL, and is handed back as it was (tdx_vcpu_init_mem_region()). A failure adds
        /// memory at a place, or of a source, that nobody named.
        region_is_refused[REGIONS];

        /// Flags other than MEASURE are EINVAL, before the region is read, which is EFAULT where it cannot be. A failure
        /// means that flags of the future are ignored.
        flags_are_refused_before_the_region_is_read;

        /// A vCPU that has not been initialised cannot add memory: EINVAL before anything else. A failure makes calls to
        /// the module for a vCPU that it does not know.
        vcpu_has_to_be_initialized;

        /// Where no slot is, or one without a guest_memfd, EINVAL (kvm_gmem_populate()). A failure adds memory that the
        /// guest does not own.
        place_without_private_memory_is_refused;

        /// A slot whose guest_memfd is closed is EFAULT. A failure uses pages of a file that is gone.
        closed_file_is_efault needs [MemoryAttributes];

        /// A source that the process may not read is EFAULT, and nothing of it is added. A failure measures memory that
        /// user space cannot see.
        unreadable_source_is_efault;

        /// A page whose attribute is not PRIVATE is EINVAL, but stays allocated in the file: its attribute is looked at
        /// after it was (kvm_gmem_populate()). A failure adds memory that the host may map.
        shared_page_is_refused needs [MemoryAttributes];

        /// A page that was added cannot be added again: EIO, and the VM lives (kvm_tdp_mmu_map_private_pfn()). A failure
        /// lets the host replace what has been measured.
        page_is_added_once;

        /// Progress is reported page by page, also beside an error, which is what the call then returns: not how much was
        /// done (the opposite of pre-faulting). A failure makes user space add pages twice, or leave some out.
        progress_is_reported_beside_an_error;

        /// A region of which all was added has nothing left, source and address advanced to their ends; each page is
        /// mapped (pages_4k). A failure means that user space cannot tell when it is done.
        region_is_used_up needs [KvmStats];

        /// KVM_PRE_FAULT_MEMORY is EOPNOTSUPP until KVM_TDX_FINALIZE_VM, and does its work after it, also on pages that
        /// were added. A failure puts pages into the TD that its measurement does not know of.
        prefault_waits_for_finalization needs [PreFault];

        /// After KVM_TDX_FINALIZE_VM nothing is added: EINVAL. A failure lets the host change a TD that has been measured.
        nothing_is_added_after_finalization;

        /// The guest finds in an added page what was in its source at that time, needs not accept it, and writes to it;
        /// measured or not makes no difference. A failure runs a guest on other code than was given.
        guest_finds_what_was_added[MEASURED] needs [Guest];

        /// The source is copied: what the host writes to it later is not seen. A failure is shared memory that the guest
        /// takes for private.
        source_is_copied needs [Guest];

        /// An added page that is punched out of the file is gone for good: the guest's next access to it finds a page that
        /// it has not accepted, which ends the TD with EIO (SEPT_VE_DISABLE). A failure gives the guest a page of the
        /// host's making without its knowledge.
        punched_page_is_not_given_back_unnoticed needs [Guest];
    }
}

const PAGES: u64 = 4;
const EINVAL: Result<(), Errno> = Err(Errno::EINVAL);
const MEASURED: &[(&str, u32)] = &[("measured", KVM_TDX_MEASURE_MEMORY_REGION), ("unmeasured", 0)];

/// Whether a region without a source stands for memory whose contents are in place.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kernel {
    Any,
    WithoutInPlace,
}

/// What is done to a region that is right, given the SHARED bit.
type Mistake = (fn(&mut KvmTdxInitMemRegion, u64), Kernel);

const REGIONS: &[(&str, Mistake)] = &[
    ("no_source", (|region, _| region.source_addr = 0, Kernel::WithoutInPlace)),
    ("source_off_a_page", (|region, _| region.source_addr += 8, Kernel::Any)),
    ("address_off_a_page", (|region, _| region.gpa += 1, Kernel::Any)),
    ("no_pages", (|region, _| region.nr_pages = 0, Kernel::Any)),
    ("wraps_to_zero", (|region, _| region.nr_pages = 1 << 52, Kernel::Any)),
    ("wraps_below_itself", (|region, _| region.nr_pages = (1 << 52) - 1, Kernel::Any)),
    ("first_page_shared", (|region, shared| region.gpa |= shared, Kernel::Any)),
    ("last_page_shared", (|region, shared| (region.gpa, region.nr_pages) = (shared - PAGE_SIZE, 2), Kernel::Any)),
];

/// A TD with an initialised vCPU and a private slot of four pages, its source filled with their numbers.
struct Scene {
    vcpu: Box<dyn Vcpu>,
    memory: TdMemory,
    td: Td,
}

impl Scene {
    fn new(cx: &Context) -> TestResult<Scene> {
        let td = Td::initialized(cx)?;
        let vcpu = td.ready_vcpu(0)?;
        Scene::with_memory(cx, td, vcpu)
    }

    /// Whose vCPU can execute guest operations once it is finalised.
    fn with_guest(cx: &Context) -> TestResult<Scene> {
        let td = Td::with_payload(cx, 1)?;
        let vcpu = td.vcpu(0)?;
        Scene::with_memory(cx, td, vcpu)
    }

    fn with_memory(cx: &Context, td: Td, vcpu: Box<dyn Vcpu>) -> TestResult<Scene> {
        let memory = td.memory(cx, PAGES)?;
        for page in 0..PAGES {
            claim_ok!(memory.source.fill(page * PAGE_SIZE, PAGE_SIZE, 0x11 * (page as u8 + 1)));
        }
        Ok(Scene { vcpu, memory, td })
    }

    fn add(&mut self, region: &mut KvmTdxInitMemRegion) -> TestResult<Result<(), Errno>> {
        init_mem_region(&mut *self.vcpu, region, 0)
    }

    /// Adds pages and claims that it worked.
    fn add_pages(&mut self, page: u64, pages: u64, flags: u32) -> TestResult {
        let mut region = self.memory.region(page, pages);
        claim_eq!(init_mem_region(&mut *self.vcpu, &mut region, flags)?, Ok(()), "adding {pages} pages from {page}");
        Ok(())
    }

    fn finalize(&self) -> TestResult {
        claim_eq!(self.td.finalize()?, TdxAnswer::OK, "KVM_TDX_FINALIZE_VM");
        Ok(())
    }
}

fn region_is_refused(cx: &Context, &(apply, kernel): &Mistake) -> TestResult {
    if kernel == Kernel::WithoutInPlace && cx.has(Facility::InPlaceConversion) {
        gmemtest::skip!(Declined, "with in-place conversion a region without a source has its contents in place");
    }
    let mut scene = Scene::new(cx)?;
    let right = scene.memory.region(0, 1);
    let mut wrong = right;
    apply(&mut wrong, scene.td.vm.shared_bit());
    let before = wrong;
    let errno = match kernel {
        // Before 6.19 a source of 0 is an address like any other.
        Kernel::WithoutInPlace => cx.by_release(&[((6, 16), Errno::EFAULT), ((6, 19), Errno::EINVAL)])?,
        _ => Errno::EINVAL,
    };
    claim_eq!(scene.add(&mut wrong)?, Err(errno), "KVM_TDX_INIT_MEM_REGION of {before:x?}");
    claim_eq!(wrong, before, "the region afterwards");
    scene.add_pages(0, 1, 0)
}

fn flags_are_refused_before_the_region_is_read(cx: &Context) -> TestResult {
    let mut scene = Scene::new(cx)?;
    for flags in [2, 1 << 31, u32::MAX] {
        let mut region = scene.memory.region(0, 1);
        claim_eq!(init_mem_region(&mut *scene.vcpu, &mut region, flags)?, EINVAL, "with flags {flags:#x}");
        let nowhere = TdxCommand::new(KVM_TDX_INIT_MEM_REGION, TdxData::NOWHERE).with_flags(flags);
        claim_eq!(command_on(&mut *scene.vcpu, nowhere)?.result, EINVAL, "flags {flags:#x} and no region");
    }
    for flags in [0, KVM_TDX_MEASURE_MEMORY_REGION] {
        let nowhere = TdxCommand::new(KVM_TDX_INIT_MEM_REGION, TdxData::NOWHERE).with_flags(flags);
        claim_eq!(command_on(&mut *scene.vcpu, nowhere)?.result, Err(Errno::EFAULT), "no region, flags {flags}");
    }
    Ok(())
}

fn vcpu_has_to_be_initialized(cx: &Context) -> TestResult {
    let td = Td::initialized(cx)?;
    let mut vcpu = td.vcpu(0)?;
    let memory = td.memory(cx, 1)?;
    claim_eq!(init_mem_region(&mut *vcpu, &mut memory.region(0, 1), 0)?, EINVAL, "on a new vCPU");
    let nowhere = TdxCommand::new(KVM_TDX_INIT_MEM_REGION, TdxData::NOWHERE);
    claim_eq!(command_on(&mut *vcpu, nowhere)?.result, EINVAL, "on a new vCPU, of no region");
    let cpuid = td.vcpu_cpuid(&mut *vcpu)?;
    set_cpuid(&mut *vcpu, &cpuid)?;
    claim_eq!(init_mem_region(&mut *vcpu, &mut memory.region(0, 1), 0)?, EINVAL, "on one with a CPUID");
    let mut other = td.ready_vcpu(1)?;
    claim_eq!(init_mem_region(&mut *other, &mut memory.region(0, 1), 0)?, Ok(()), "on one that is initialised");
    Ok(())
}

fn place_without_private_memory_is_refused(cx: &Context) -> TestResult {
    const ELSEWHERE: u64 = 2 << 30;
    let mut scene = Scene::new(cx)?;
    let mut region = KvmTdxInitMemRegion { gpa: ELSEWHERE, ..scene.memory.region(0, 1) };
    claim_eq!(scene.add(&mut region)?, EINVAL, "where no slot is");
    let ordinary = claim_ok!(cx.machine().host_memory(HostMemory::Anonymous, PAGE_SIZE));
    let slot = MemoryRegion::new(Td::SLOT + 1, ELSEWHERE, PAGE_SIZE).at(ordinary.addr());
    claim_ok!(scene.td.vm.set_memory_region(&slot));
    claim_eq!(scene.add(&mut region)?, EINVAL, "in a slot without a guest_memfd");
    claim_eq!(region.nr_pages, 1, "pages left");
    Ok(())
}

fn closed_file_is_efault(cx: &Context) -> TestResult {
    let Scene { mut vcpu, memory, td } = Scene::new(cx)?;
    let mut region = memory.region(0, 1);
    drop(memory.gmem);
    claim_eq!(init_mem_region(&mut *vcpu, &mut region, 0)?, Err(Errno::EFAULT), "with the file closed");
    drop(td);
    Ok(())
}

fn unreadable_source_is_efault(cx: &Context) -> TestResult {
    let mut scene = Scene::new(cx)?;
    let forbidden = claim_ok!(cx.machine().host_memory(HostMemory::NoAccess, PAGE_SIZE));
    let mut region = KvmTdxInitMemRegion { source_addr: forbidden.addr(), ..scene.memory.region(1, 1) };
    let before = region;
    claim_eq!(scene.add(&mut region)?, Err(Errno::EFAULT), "from memory that may not be read");
    claim_eq!(region, before, "the region afterwards");
    scene.add_pages(1, 1, 0)
}

fn shared_page_is_refused(cx: &Context) -> TestResult {
    let mut scene = Scene::new(cx)?;
    let shared = MemoryAttributes { address: scene.memory.gpa(2), size: PAGE_SIZE, attributes: 0, flags: 0 };
    claim_ok!(scene.td.vm.set_memory_attributes(&shared));
    let mut region = scene.memory.region(2, 1);
    claim_eq!(scene.add(&mut region)?, EINVAL, "a page that is shared");
    if cx.has(Facility::Cachestat) {
        let cached = claim_ok!(scene.memory.gmem.cache_stat(2 * PAGE_SIZE, PAGE_SIZE)).cached;
        claim_eq!(cached, 1, "pages of it in the file");
    }
    scene.td.set_private(cx, &*scene.memory.gmem, 2, 1)?;
    scene.add_pages(2, 1, 0)
}

/// What adding a page is that was added before: kvm_gmem_populate() looked at the folio until 6.18, KVM's page tables are
/// asked since.
const THERE: [((u32, u32), Errno); 2] = [((6, 16), Errno::EEXIST), ((6, 19), Errno::EIO)];

fn page_is_added_once(cx: &Context) -> TestResult {
    let mut scene = Scene::new(cx)?;
    scene.add_pages(1, 1, 0)?;
    let mut region = scene.memory.region(1, 1);
    claim_eq!(scene.add(&mut region)?, Err(cx.by_release(&THERE)?), "the same page again");
    claim_eq!(region.nr_pages, 1, "pages left");
    scene.add_pages(2, 1, 0)?;
    scene.finalize()
}

fn progress_is_reported_beside_an_error(cx: &Context) -> TestResult {
    let mut scene = Scene::new(cx)?;
    scene.add_pages(2, 1, 0)?;
    let mut region = scene.memory.region(0, PAGES);
    claim_eq!(scene.add(&mut region)?, Err(cx.by_release(&THERE)?), "a range whose third page is there already");
    let left = scene.memory.region(2, PAGES - 2);
    claim_eq!(region, left, "what is left");
    let mut beyond = scene.memory.region(3, 2);
    claim_eq!(scene.add(&mut beyond)?, EINVAL, "a range that runs off its slot");
    claim_eq!(beyond, scene.memory.region(PAGES, 1), "what is left of that");
    Ok(())
}

fn region_is_used_up(cx: &Context) -> TestResult {
    let mut scene = Scene::new(cx)?;
    let before = claim_ok!(scene.td.vm.statistic("pages_4k"));
    let mut region = scene.memory.region(0, PAGES);
    claim_eq!(scene.add(&mut region)?, Ok(()), "KVM_TDX_INIT_MEM_REGION of the whole slot");
    claim_eq!(region, scene.memory.region(PAGES, 0), "the region afterwards");
    claim_eq!(claim_ok!(scene.td.vm.statistic("pages_4k")) - before, PAGES, "pages mapped");
    Ok(())
}

fn prefault_waits_for_finalization(cx: &Context) -> TestResult {
    let mut scene = Scene::new(cx)?;
    scene.add_pages(0, 1, 0)?;
    let gpa = scene.memory.gpa(0);
    let size = PAGES * PAGE_SIZE;
    let early = scene.vcpu.pre_fault(gpa, size, 0);
    claim_eq!((early.result, early.gpa, early.size), (Err(Errno::EOPNOTSUPP), gpa, size), "before finalisation");
    scene.finalize()?;
    let late = scene.vcpu.pre_fault(gpa, size, 0);
    claim_eq!((late.result, late.gpa, late.size), (Ok(()), gpa + size, 0), "after it");
    let again = scene.vcpu.pre_fault(gpa, size, 0);
    claim_eq!((again.result, again.size), (Ok(()), 0), "once more");
    Ok(())
}

fn nothing_is_added_after_finalization(cx: &Context) -> TestResult {
    let mut scene = Scene::new(cx)?;
    scene.finalize()?;
    let mut region = scene.memory.region(0, 1);
    claim_eq!(scene.add(&mut region)?, EINVAL, "KVM_TDX_INIT_MEM_REGION after KVM_TDX_FINALIZE_VM");
    claim_eq!(region.nr_pages, 1, "pages left");
    Ok(())
}

fn guest_finds_what_was_added(cx: &Context, &flags: &u32) -> TestResult {
    let mut scene = Scene::with_guest(cx)?;
    scene.add_pages(0, 3, flags)?;
    scene.finalize()?;
    for page in 0..3 {
        let check = GuestOp::Check { gpa: scene.memory.gpa(page), len: PAGE_SIZE, byte: 0x11 * (page as u8 + 1) };
        claim_eq!(scene.vcpu.execute(check), Exit::Done(0), "what the guest finds in page {page}");
    }
    let gpa = scene.memory.gpa(1);
    claim_eq!(scene.vcpu.execute(GuestOp::write_u64(gpa, 0xabcd)), Exit::Done(0), "the guest's store");
    claim_eq!(scene.vcpu.execute(GuestOp::read_u64(gpa)), Exit::Done(0xabcd), "what it finds afterwards");
    let unchanged = claim_ok!(scene.memory.source.find_mismatch(PAGE_SIZE, PAGE_SIZE, 0x22));
    claim_eq!(unchanged, None, "the first byte of the source that has changed");
    Ok(())
}

fn source_is_copied(cx: &Context) -> TestResult {
    let mut scene = Scene::with_guest(cx)?;
    scene.add_pages(0, 1, 0)?;
    claim_ok!(scene.memory.source.fill(0, PAGE_SIZE, 0xee));
    scene.finalize()?;
    let check = GuestOp::Check { gpa: scene.memory.gpa(0), len: PAGE_SIZE, byte: 0x11 };
    claim_eq!(scene.vcpu.execute(check), Exit::Done(0), "what the guest finds");
    Ok(())
}

fn punched_page_is_not_given_back_unnoticed(cx: &Context) -> TestResult {
    let mut scene = Scene::with_guest(cx)?;
    scene.add_pages(0, 2, 0)?;
    scene.finalize()?;
    claim_ok!(scene.memory.gmem.fallocate(libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE, 0, PAGE_SIZE as i64));
    let second = GuestOp::Check { gpa: scene.memory.gpa(1), len: PAGE_SIZE, byte: 0x22 };
    claim_eq!(scene.vcpu.execute(second), Exit::Done(0), "the page beside the punched one");
    let exit = scene.vcpu.execute(GuestOp::read_u64(scene.memory.gpa(0)));
    claim!(matches!(exit, Exit::Failed { errno: Errno::EIO, .. }), "the guest's load from the punched page: {exit:?}");
    Ok(())
}

/// The stand-alone binary.
pub fn main() -> std::process::ExitCode {
    gmemtest::cli::selftest_main(&[&SUITE])
}
