//! KVM_PRE_FAULT_MEMORY: mapping guest memory before the guest touches it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use gmemtest::harness::{ChildEnd, Context, GmemVm, Side, TestResult, in_child};
use gmemtest::machine::{
    Errno, Exit, Facility, GuestMemfd, GuestOp, HostMemory, Mapping, MemoryRegion, PAGE_SIZE, PreFault, Vcpu, Vm,
    VmConfig,
};
use gmemtest::uapi::kvm::{KVM_CAP_DISABLE_QUIRKS2, KVM_MEMORY_ATTRIBUTE_PRIVATE};
use gmemtest::uapi::kvm_x86::KVM_X86_QUIRK_SLOT_ZAP_ALL;
use gmemtest::{claim, claim_eq, claim_matches, claim_ok, fail};

gmemtest::suite! {
    /// KVM_PRE_FAULT_MEMORY (6.11): what it refuses, how it reports progress, what it maps, and what it does while its slot
    /// goes away (pre_fault_memory_test).
    pub static SUITE: prefault needs [Vm, Guest, UserMemory2, PreFault] {
        /// A wrong argument is EINVAL and is written back as it was (kvm_vcpu_pre_fault_memory()). A failure means that
        /// future flags cannot be told from garbage, or that progress is reported that was not made.
        wrong_argument_is_refused[WRONG];

        /// A range inside a slot is mapped as a whole: success, nothing left, the address advanced to its end. A failure
        /// means that user space cannot tell when it is done.
        range_inside_a_slot_is_mapped[BACKINGS];

        /// A range that runs off the end of its slot is success up to there, with the rest left over; the next call is the
        /// error (pre_fault_memory_test). A failure means that progress is lost or invented.
        range_that_runs_off_the_slot_is_partial[BACKINGS];

        /// A range outside every slot is an error and no progress: ENOENT for shared memory, which would be MMIO, EFAULT for
        /// private memory. A failure means that success is reported for what is not there.
        range_outside_the_slots_is_refused[BACKINGS];

        /// A page may be pre-faulted again and again. A failure means that a mapping that is there counts as an error.
        mapped_range_may_be_mapped_again[BACKINGS];

        /// Pre-faulting allocates the pages of the range in the file and no others. A failure means that memory is
        /// allocated at the wrong place, or counted twice.
        pages_of_the_range_are_allocated needs [GuestMemfd, Cachestat];

        /// Pages that are allocated in the file keep their contents, fresh ones read zero. A failure loses guest memory or
        /// leaks the host's.
        contents_are_kept needs [GuestMemfd];

        /// Memory that was pre-faulted is used by the guest without another page fault (pf_taken stays). A failure means
        /// that pre-faulting does not do what it is for.
        guest_takes_no_fault_on_prefaulted_memory[BACKINGS] needs [KvmStats];

        /// Each page is one mapping (pages_4k), and a pre-fault is no fault of the guest (pf_fixed stays). A failure means
        /// that the statistics lie about pre-faulting.
        mappings_are_counted_and_faults_are_not needs [GuestMemfd, KvmStats];

        /// The access is private where the attribute of the page says so: private pages are allocated in the file, shared
        /// ones are not. A failure populates the wrong side.
        attribute_decides_what_is_mapped needs [GuestMemfd, PrivateMemory, MemoryAttributes, Cachestat];

        /// A private page whose slot has no guest_memfd, or whose file is closed, is EFAULT. A failure maps memory that the
        /// guest does not own.
        private_page_without_a_file_is_efault[FILELESS] needs [GuestMemfd, PrivateMemory, MemoryAttributes];

        /// Shared memory that the process cannot access is EFAULT. A failure reports success for what cannot be mapped.
        inaccessible_memory_is_efault[INACCESSIBLE];

        /// While another thread deletes and makes the slot again, each call makes progress or fails with EAGAIN, ENOENT (or
        /// EFAULT when private), never both and never neither, and at the end the range can be mapped (6.18; kernels before
        /// it live-locked on a slot that was being deleted). A failure is a live-lock or a call that lies. Deleting a slot of
        /// a default VM invalidates every root (KVM_X86_QUIRK_SLOT_ZAP_ALL): a call that has loaded its root before and
        /// finds no slot after retries for ever on 7.3.4, and holds up the deletion that waits for it, until a signal comes.
        slot_may_go_away_meanwhile[RACES] timeout 60;

        /// A process that forked from the VMM cannot pre-fault: EIO. A failure lets a child fill the parent's memory.
        forked_child_is_refused needs [RealFiles];
    }
}

const BASE: u64 = GmemVm::GPA;
const SLOT: u32 = GmemVm::SLOT;
const MIB2: u64 = 2 << 20;
const LEN: u64 = MIB2 + PAGE_SIZE;

/// What is behind the slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Backing {
    /// Anonymous memory.
    Ordinary,
    /// A guest_memfd, by the way that the VM type has.
    Gmem,
}

const BACKINGS: &[(&str, Backing)] = &[("ordinary_memory", Backing::Ordinary), ("guest_memfd", Backing::Gmem)];

/// A VM with a slot of 2 MiB and a page.
struct Scene {
    vm: Arc<dyn Vm>,
    gmem: Option<Arc<dyn GuestMemfd>>,
    shared: Box<dyn Mapping>,
    /// The side by which the guest reaches what is behind the slot.
    side: Side,
    /// The errno of an access where no slot is.
    nowhere: Errno,
}

impl Scene {
    fn new(cx: &Context, backing: Backing) -> TestResult<Scene> {
        if backing == Backing::Gmem {
            let GmemVm { vm, gmem, shared, side, .. } = GmemVm::new(cx, LEN / PAGE_SIZE)?;
            // Where the file has the attribute, frames without a file have none: they are shared.
            let private_nowhere = side == Side::Private && cx.has(Facility::MemoryAttributes);
            let nowhere = if private_nowhere { Errno::EFAULT } else { Errno::ENOENT };
            let scene = Scene { vm, gmem: Some(gmem), shared, side, nowhere };
            if private_nowhere {
                scene.make_private(BASE + LEN, MIB2)?;
            }
            return Ok(scene);
        }
        let vm = claim_ok!(cx.machine().create_vm(VmConfig::Payload { vcpus: 1 }));
        let shared = claim_ok!(cx.machine().host_memory(HostMemory::Anonymous, LEN));
        let scene = Scene { vm, gmem: None, shared, side: Side::Shared, nowhere: Errno::ENOENT };
        claim_ok!(scene.vm.set_memory_region(&scene.region()));
        Ok(scene)
    }

    fn make_private(&self, address: u64, size: u64) -> TestResult {
        let attributes = KVM_MEMORY_ATTRIBUTE_PRIVATE;
        let range = gmemtest::machine::MemoryAttributes { address, size, attributes, flags: 0 };
        claim_ok!(self.vm.set_memory_attributes(&range));
        Ok(())
    }

    fn region(&self) -> MemoryRegion<'_> {
        let region = MemoryRegion::new(SLOT, BASE, LEN).at(self.shared.addr());
        self.gmem.as_ref().map_or(region, |gmem| region.bound_to(&**gmem, 0))
    }

    /// The address by which the guest reaches `gpa`.
    fn address(&self, gpa: u64) -> u64 {
        self.side.address(&*self.vm, gpa)
    }

    fn vcpu(&self) -> TestResult<Box<dyn Vcpu>> {
        Ok(claim_ok!(self.vm.create_vcpu(0)))
    }
}

const WRONG: &[(&str, PreFault)] = &[
    ("flag", PreFault { result: Err(Errno::EINVAL), gpa: BASE, size: PAGE_SIZE }),
    ("gpa_unaligned", PreFault { result: Err(Errno::EINVAL), gpa: BASE + 1, size: PAGE_SIZE }),
    ("size_unaligned", PreFault { result: Err(Errno::EINVAL), gpa: BASE, size: PAGE_SIZE - 1 }),
    ("size_zero", PreFault { result: Err(Errno::EINVAL), gpa: BASE, size: 0 }),
    ("wraps", PreFault { result: Err(Errno::EINVAL), gpa: 0_u64.wrapping_sub(PAGE_SIZE), size: 2 * PAGE_SIZE }),
    (
        "ends_at_two_to_the_64",
        PreFault { result: Err(Errno::EINVAL), gpa: 0_u64.wrapping_sub(PAGE_SIZE), size: PAGE_SIZE },
    ),
];

fn wrong_argument_is_refused(cx: &Context, wrong: &PreFault) -> TestResult {
    let scene = Scene::new(cx, Backing::Ordinary)?;
    let flags = u64::from(cx.name().ends_with("::flag"));
    claim_eq!(scene.vcpu()?.pre_fault(wrong.gpa, wrong.size, flags), *wrong, "flags {flags}");
    Ok(())
}

fn done(gpa: u64) -> PreFault {
    PreFault { result: Ok(()), gpa, size: 0 }
}

fn range_inside_a_slot_is_mapped(cx: &Context, &backing: &Backing) -> TestResult {
    let scene = Scene::new(cx, backing)?;
    let mut vcpu = scene.vcpu()?;
    claim_eq!(vcpu.pre_fault(BASE, MIB2, 0), done(BASE + MIB2), "2 MiB from the start of the slot");
    claim_eq!(vcpu.pre_fault(BASE + MIB2, PAGE_SIZE, 0), done(BASE + LEN), "the last page of the slot");
    let touch = vcpu.execute(GuestOp::Touch { gpa: scene.address(BASE), len: LEN });
    claim_eq!(touch, Exit::Done(LEN / PAGE_SIZE), "the guest's loads from every page");
    Ok(())
}

fn range_that_runs_off_the_slot_is_partial(cx: &Context, &backing: &Backing) -> TestResult {
    let scene = Scene::new(cx, backing)?;
    let mut vcpu = scene.vcpu()?;
    let rest = PreFault { result: Ok(()), gpa: BASE + LEN, size: PAGE_SIZE };
    claim_eq!(vcpu.pre_fault(BASE + MIB2, 2 * PAGE_SIZE, 0), rest, "the last page of the slot and one beyond");
    let refused = PreFault { result: Err(scene.nowhere), ..rest };
    claim_eq!(vcpu.pre_fault(rest.gpa, rest.size, 0), refused, "the rest");
    Ok(())
}

fn range_outside_the_slots_is_refused(cx: &Context, &backing: &Backing) -> TestResult {
    let scene = Scene::new(cx, backing)?;
    let refused = PreFault { result: Err(scene.nowhere), gpa: BASE + LEN, size: 4 * PAGE_SIZE };
    claim_eq!(scene.vcpu()?.pre_fault(refused.gpa, refused.size, 0), refused, "four pages beyond the slot");
    Ok(())
}

fn mapped_range_may_be_mapped_again(cx: &Context, &backing: &Backing) -> TestResult {
    let scene = Scene::new(cx, backing)?;
    let mut vcpu = scene.vcpu()?;
    for round in 0..3 {
        claim_eq!(vcpu.pre_fault(BASE, 8 * PAGE_SIZE, 0), done(BASE + 8 * PAGE_SIZE), "round {round}");
    }
    Ok(())
}

fn pages_of_the_range_are_allocated(cx: &Context) -> TestResult {
    let vm = GmemVm::new(cx, 8)?;
    let mut vcpu = vm.vcpu(0)?;
    let (at, len) = (2 * PAGE_SIZE, 3 * PAGE_SIZE);
    claim_eq!(vcpu.pre_fault(vm.slot_gpa(at), len, 0), done(vm.slot_gpa(at + len)));
    claim_eq!(claim_ok!(vm.gmem.cache_stat(at, len)).cached, 3, "pages in the range");
    claim_eq!(claim_ok!(vm.gmem.cache_stat(0, 0)).cached, 3, "pages in the file");
    Ok(())
}

fn contents_are_kept(cx: &Context) -> TestResult {
    let vm = GmemVm::new(cx, 3)?;
    let mut vcpu = vm.vcpu(0)?;
    claim_matches!(vcpu.execute(GuestOp::Fill { gpa: vm.gpa(0), len: 2 * PAGE_SIZE, byte: 0x77 }), Exit::Done(_));
    claim_ok!(vm.gmem.punch_hole(PAGE_SIZE, PAGE_SIZE));
    claim_eq!(vcpu.pre_fault(vm.slot_gpa(0), vm.len, 0), done(vm.slot_gpa(vm.len)));
    for (page, byte) in [0x77, 0, 0].into_iter().enumerate() {
        let gpa = vm.gpa(page as u64 * PAGE_SIZE);
        claim_eq!(vcpu.execute(GuestOp::Check { gpa, len: PAGE_SIZE, byte }), Exit::Done(0), "page {page}");
    }
    Ok(())
}

fn guest_takes_no_fault_on_prefaulted_memory(cx: &Context, &backing: &Backing) -> TestResult {
    let scene = Scene::new(cx, backing)?;
    let mut vcpu = scene.vcpu()?;
    // The payload's own pages are faulted in by a first operation of the same kind.
    claim_eq!(vcpu.execute(GuestOp::Touch { gpa: scene.address(BASE + MIB2), len: PAGE_SIZE }), Exit::Done(1));
    claim_eq!(vcpu.pre_fault(BASE, 64 * PAGE_SIZE, 0), done(BASE + 64 * PAGE_SIZE));
    let before = claim_ok!(vcpu.statistic("pf_taken"));
    claim_eq!(vcpu.execute(GuestOp::Touch { gpa: scene.address(BASE), len: 64 * PAGE_SIZE }), Exit::Done(64));
    claim_eq!(claim_ok!(vcpu.statistic("pf_taken")), before, "pf_taken after loads from 64 pages");
    Ok(())
}

fn mappings_are_counted_and_faults_are_not(cx: &Context) -> TestResult {
    let vm = GmemVm::new(cx, 16)?;
    let mut vcpu = vm.vcpu(0)?;
    claim_eq!(vcpu.execute(GuestOp::Touch { gpa: vm.gpa(0), len: PAGE_SIZE }), Exit::Done(1));
    let (mapped, fixed) = (claim_ok!(vm.vm.statistic("pages_4k")), claim_ok!(vcpu.statistic("pf_fixed")));
    claim_eq!(vcpu.pre_fault(vm.slot_gpa(0), vm.len, 0), done(vm.slot_gpa(vm.len)));
    claim_eq!(claim_ok!(vm.vm.statistic("pages_4k")), mapped + 15, "pages_4k after 15 more pages");
    claim_eq!(claim_ok!(vcpu.statistic("pf_fixed")), fixed, "pf_fixed after the pre-fault");
    Ok(())
}

fn attribute_decides_what_is_mapped(cx: &Context) -> TestResult {
    let vm = GmemVm::convertible(cx, 4)?;
    let mut vcpu = vm.vcpu(0)?;
    vm.set_attributes(PAGE_SIZE, 2 * PAGE_SIZE, KVM_MEMORY_ATTRIBUTE_PRIVATE)?;
    claim_eq!(
        vcpu.pre_fault(vm.slot_gpa(0), vm.len, 0),
        done(vm.slot_gpa(vm.len)),
        "a range that is shared and private"
    );
    for (page, cached) in [0, 1, 1, 0].into_iter().enumerate() {
        let at = page as u64 * PAGE_SIZE;
        claim_eq!(claim_ok!(vm.gmem.cache_stat(at, PAGE_SIZE)).cached, cached, "page {page} in the file");
    }
    Ok(())
}

/// Why there is no file behind the private page.
#[derive(Clone, Copy, Debug)]
enum Fileless {
    OrdinarySlot,
    Closed,
}

const FILELESS: &[(&str, Fileless)] = &[("ordinary_slot", Fileless::OrdinarySlot), ("closed_file", Fileless::Closed)];

fn private_page_without_a_file_is_efault(cx: &Context, fileless: &Fileless) -> TestResult {
    let scene = match fileless {
        Fileless::OrdinarySlot => {
            let scene = Scene::new(cx, Backing::Ordinary)?;
            scene.make_private(BASE, PAGE_SIZE)?;
            scene
        }
        Fileless::Closed => Scene { gmem: None, ..Scene::new(cx, Backing::Gmem)? },
    };
    let refused = PreFault { result: Err(Errno::EFAULT), gpa: BASE, size: PAGE_SIZE };
    claim_eq!(scene.vcpu()?.pre_fault(BASE, PAGE_SIZE, 0), refused, "{fileless:?}");
    Ok(())
}

const INACCESSIBLE: &[(&str, HostMemory)] =
    &[("prot_none", HostMemory::NoAccess), ("not_mapped", HostMemory::Anonymous)];

fn inaccessible_memory_is_efault(cx: &Context, &memory: &HostMemory) -> TestResult {
    let scene = Scene::new(cx, Backing::Ordinary)?;
    // Before the hole is made, so that nothing of the vCPU is mapped into it.
    let mut vcpu = scene.vcpu()?;
    let hole = claim_ok!(cx.machine().host_memory(memory, PAGE_SIZE));
    let at = BASE + (1 << 30);
    claim_ok!(scene.vm.set_memory_region(&MemoryRegion::new(SLOT + 1, at, PAGE_SIZE).at(hole.addr())));
    if memory != HostMemory::NoAccess {
        claim_ok!(hole.unmap_part(0, PAGE_SIZE));
    }
    let refused = PreFault { result: Err(Errno::EFAULT), gpa: at, size: PAGE_SIZE };
    claim_eq!(vcpu.pre_fault(at, PAGE_SIZE, 0), refused, "{memory:?}");
    Ok(())
}

/// Whether KVM_X86_QUIRK_SLOT_ZAP_ALL is left on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Quirk {
    On,
    Off,
}

const RACES: &[(&str, (Backing, Quirk))] = &[
    ("ordinary_memory_quirk_on", (Backing::Ordinary, Quirk::On)),
    ("ordinary_memory_quirk_off", (Backing::Ordinary, Quirk::Off)),
    ("guest_memfd_quirk_on", (Backing::Gmem, Quirk::On)),
    ("guest_memfd_quirk_off", (Backing::Gmem, Quirk::Off)),
];

/// A call that takes so long has been ended by a signal: it got nowhere.
const STUCK: Duration = Duration::from_secs(5);

fn slot_may_go_away_meanwhile(cx: &Context, &(backing, quirk): &(Backing, Quirk)) -> TestResult {
    cx.by_release(&[((6, 18), ())])?;
    let scene = Scene::new(cx, backing)?;
    if quirk == Quirk::Off {
        cx.require(Facility::SlotZapAllQuirk)?;
        let disabled = [KVM_X86_QUIRK_SLOT_ZAP_ALL, 0, 0, 0];
        claim_ok!(scene.vm.enable_capability(KVM_CAP_DISABLE_QUIRKS2, disabled));
    }
    let mut vcpu = scene.vcpu()?;
    vcpu.set_time_limit(STUCK);
    let region = scene.region();
    let ending = AtomicBool::new(false);
    let mut errors = 0;
    let outcome = thread::scope(|scope| {
        let deleting = scope.spawn(|| {
            while !ending.load(Ordering::Relaxed) {
                scene.vm.set_memory_region(&MemoryRegion::deletion(SLOT))?;
                scene.vm.set_memory_region(&region)?;
            }
            Ok::<_, Errno>(())
        });
        let racing = (0..20).try_for_each(|_| race(&mut *vcpu, scene.nowhere, &mut errors));
        ending.store(true, Ordering::Relaxed);
        match deleting.join() {
            Ok(deleted) => {
                claim_ok!(deleted, "deletion and creation of the slot");
                racing
            }
            Err(_) => fail!("the deleting thread panicked"),
        }
    });
    outcome?;
    claim_eq!(vcpu.pre_fault(BASE, LEN, 0), done(BASE + LEN), "the whole slot when nobody deletes it");
    cx.note(format_args!("{errors} calls met no slot"));
    Ok(())
}

/// One pass over the slot, as far as the other thread lets it.
fn race(vcpu: &mut dyn Vcpu, nowhere: Errno, errors: &mut u32) -> TestResult {
    let (mut gpa, mut size) = (BASE, LEN);
    for _ in 0..1000 {
        let began = Instant::now();
        let call = vcpu.pre_fault(gpa, size, 0);
        claim!(began.elapsed() < STUCK, "live-lock: only a signal ended the call, with {call:x?}");
        claim_eq!(call.gpa + call.size, BASE + LEN, "the end of the range written back by {call:x?}");
        claim_eq!(call.size < size, call.result.is_ok(), "progress from {size:#x} exactly on success: {call:x?}");
        if let Err(errno) = call.result {
            let allowed = [Errno::EAGAIN, nowhere];
            claim!(allowed.contains(&errno), "one of {allowed:?}, not {errno}");
            *errors += 1;
        }
        (gpa, size) = (call.gpa, call.size);
        if size == 0 {
            return Ok(());
        }
    }
    Ok(())
}

fn forked_child_is_refused(cx: &Context) -> TestResult {
    let scene = Scene::new(cx, Backing::Ordinary)?;
    let mut vcpu = scene.vcpu()?;
    let end = in_child(|| vcpu.pre_fault(BASE, PAGE_SIZE, 0).result.map(|()| 0))?;
    claim_eq!(end, ChildEnd::Returned(Err(Errno::EIO)), "the call in the child");
    Ok(())
}

/// The stand-alone binary.
pub fn main() -> std::process::ExitCode {
    gmemtest::cli::selftest_main(&[&SUITE])
}
