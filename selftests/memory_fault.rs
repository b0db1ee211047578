//! KVM_EXIT_MEMORY_FAULT: when it comes, what it says, and how the guest goes on after user space mended the cause.

use std::sync::Arc;

use gmemtest::harness::{Context, GmemVm, Side, TestResult};
use gmemtest::machine::{
    Errno, Exit, GuestOp, HostMemory, Mapping, MemoryAttributes, MemoryRegion, PAGE_SIZE, Reply, Vcpu, Vm, VmConfig,
};
use gmemtest::uapi::kvm::{KVM_EXIT_UNKNOWN, KVM_MEMORY_ATTRIBUTE_PRIVATE};
use gmemtest::{claim, claim_eq, claim_matches, claim_ok, fail};

gmemtest::suite! {
    /// Private accesses that cannot be served, on VMs with private memory (private_mem_kvm_exits_test).
    pub static SUITE: memory_fault needs [Vm, Guest, GuestMemfd, UserMemory2, MemoryAttributes, MemoryFaultInfo] {
        /// A private access without a slot, or to a slot without a guest_memfd, is EFAULT with flags PRIVATE, the page's
        /// address and size 4096, whatever its own address, size and direction (kvm_mmu_prepare_memory_fault_exit()). A
        /// failure means that a VMM cannot find the page to mend, or takes it for a device.
        private_access_without_a_file_is_reported[CAUSES];

        /// The report names the page of the access: one in the middle of a page, and the second page of an access that
        /// straddles two. A failure makes a VMM mend the wrong page.
        report_names_the_page_that_is_missing[STRADDLES] needs [LazyAccept];

        /// A guest in a loop leaves when its frames become private and their slot has no guest_memfd. An access that began
        /// before the conversion may be reported as what it was, shared (flags 0); when it is done again it is private. In a
        /// TD the address says what an access is: shared it stays. A failure means that the guest goes on using shared memory
        /// as private.
        running_guest_leaves_when_its_frames_become_private;

        /// The access completes when user space mended the cause and runs the vCPU again: it makes the frame what the access
        /// is, binds a file, or makes the missing slot. A failure means that a conversion cannot be done on demand.
        access_completes_after_the_cause_is_mended[MENDS] needs [LazyAccept];

        /// The same access faults again, with the same report, as long as nothing is mended. A failure means that an
        /// unserved access is lost.
        unmended_access_faults_again;

        /// An EFAULT that comes after a memory fault and is none has exit_reason KVM_EXIT_UNKNOWN: the old reason does not
        /// stay (vcpu_run() resets it). A failure means that a VMM acts on a report that is not there.
        old_report_does_not_stay;
    }
}

const BASE: u64 = GmemVm::GPA;
const SLOT: u32 = GmemVm::SLOT;
const PRIVATE: u64 = KVM_MEMORY_ATTRIBUTE_PRIVATE;

fn report(gpa: u64) -> Exit {
    report_of(Side::Private, gpa)
}

fn report_of(side: Side, gpa: u64) -> Exit {
    Exit::MemoryFault { errno: Errno::EFAULT, flags: side.fault_flags(), gpa, size: PAGE_SIZE }
}

/// Whether the guest says by the address which side it means, so that an attribute does not change what an access is.
fn says_by_address(vm: &dyn Vm) -> bool {
    vm.shared_bit() != 0
}

/// A VM whose first three test pages are private, with ordinary memory that backs a slot of two pages if the test makes
/// one.
struct Scene {
    vm: Arc<dyn Vm>,
    memory: Box<dyn Mapping>,
    vcpu: Box<dyn Vcpu>,
}

impl Scene {
    fn new(cx: &Context) -> TestResult<Scene> {
        let vm = claim_ok!(cx.machine().create_vm(VmConfig::Payload { vcpus: 1 }));
        let memory = claim_ok!(cx.machine().host_memory(HostMemory::Anonymous, 2 * PAGE_SIZE));
        memory.write_u64(0, 0x5A4E)?;
        let vcpu = claim_ok!(vm.create_vcpu(0));
        let scene = Scene { vm, memory, vcpu };
        scene.set_attributes(PRIVATE)?;
        Ok(scene)
    }

    fn with_ordinary_slot(cx: &Context) -> TestResult<Scene> {
        let scene = Scene::new(cx)?;
        claim_ok!(scene.vm.set_memory_region(&scene.region()));
        Ok(scene)
    }

    fn region(&self) -> MemoryRegion<'_> {
        MemoryRegion::new(SLOT, BASE, 2 * PAGE_SIZE).at(self.memory.addr())
    }

    fn set_attributes(&self, attributes: u64) -> TestResult {
        let range = MemoryAttributes { address: BASE, size: 3 * PAGE_SIZE, attributes, flags: 0 };
        claim_ok!(self.vm.set_memory_attributes(&range));
        Ok(())
    }
}

/// Whether a slot is there, and the access.
const CAUSES: &[(&str, (Cause, GuestOp))] = &[
    ("load_without_a_slot", (Cause::NoSlot, GuestOp::read_u64(BASE))),
    ("store_without_a_slot", (Cause::NoSlot, GuestOp::write_u64(BASE, 1))),
    ("fetch_without_a_slot", (Cause::NoSlot, GuestOp::Execute { gpa: BASE })),
    ("load_from_an_ordinary_slot", (Cause::OrdinarySlot, GuestOp::read_u64(BASE))),
    ("store_to_an_ordinary_slot", (Cause::OrdinarySlot, GuestOp::write_u64(BASE, 1))),
    ("fetch_from_an_ordinary_slot", (Cause::OrdinarySlot, GuestOp::Execute { gpa: BASE })),
];

#[derive(Clone, Copy, Debug)]
enum Cause {
    NoSlot,
    OrdinarySlot,
}

impl Cause {
    fn scene(self, cx: &Context) -> TestResult<Scene> {
        match self {
            Cause::NoSlot => Scene::new(cx),
            Cause::OrdinarySlot => Scene::with_ordinary_slot(cx),
        }
    }
}

fn private_access_without_a_file_is_reported(cx: &Context, &(cause, op): &(Cause, GuestOp)) -> TestResult {
    let mut scene = cause.scene(cx)?;
    claim_eq!(scene.vcpu.execute(op), report(BASE), "{op:x?} with {cause:?}");
    claim_eq!(scene.memory.read_u64(0)?, 0x5A4E, "the shared memory of the slot is not touched");
    Ok(())
}

/// Offset and size of a load, and the page that is reported. Pages 0 and 1 are in an ordinary slot and private.
const STRADDLES: &[(&str, (u64, u8, u64))] = &[
    ("middle_of_a_page", (0x7F8, 8, 0)),
    ("last_byte_of_a_page", (PAGE_SIZE - 1, 1, 0)),
    ("second_page", (PAGE_SIZE + 16, 4, PAGE_SIZE)),
];

fn report_names_the_page_that_is_missing(cx: &Context, &(at, size, page): &(u64, u8, u64)) -> TestResult {
    let mut scene = Scene::with_ordinary_slot(cx)?;
    let exit = scene.vcpu.execute(GuestOp::Read { gpa: BASE + at, size });
    claim_eq!(exit, report(BASE + page), "{size} bytes at {at:#x}");
    // The page before has its file, so that only the second half of a straddling access is missing.
    let gmem = claim_ok!(scene.vm.create_guest_memfd(PAGE_SIZE, 0));
    claim_ok!(scene.vm.set_memory_region(&MemoryRegion::deletion(SLOT)));
    claim_ok!(scene.vm.set_memory_region(&MemoryRegion::new(SLOT, BASE, PAGE_SIZE).bound_to(&*gmem, 0)));
    let exit = scene.vcpu.execute(GuestOp::Read { gpa: BASE + PAGE_SIZE - 4, size: 8 });
    claim_eq!(exit, report(BASE + PAGE_SIZE), "a load that straddles two pages of which the second is missing");
    Ok(())
}

fn running_guest_leaves_when_its_frames_become_private(cx: &Context) -> TestResult {
    let scene = Scene::with_ordinary_slot(cx)?;
    scene.set_attributes(0)?;
    let Scene { vm, memory, mut vcpu } = scene;
    let control = vcpu.control();
    let gpa = Side::Shared.address(&*vm, BASE);
    let runner = std::thread::spawn(move || {
        let exit = vcpu.execute(GuestOp::ReadWhile { gpa, expect: 0x5A4E });
        (vcpu, exit)
    });
    while control.iterations() == 0 && !runner.is_finished() {
        std::thread::sleep(std::time::Duration::from_micros(20));
    }
    claim_ok!(vm.set_memory_attributes(&MemoryAttributes {
        address: BASE,
        size: PAGE_SIZE,
        attributes: PRIVATE,
        flags: 0
    }));
    match runner.join() {
        Ok((mut vcpu, exit)) => {
            let page = matches!(exit, Exit::MemoryFault { errno: Errno::EFAULT, gpa: BASE, size: PAGE_SIZE, .. });
            claim!(page, "the loop was left with {exit:x?}");
            let again = if says_by_address(&*vm) { Side::Shared } else { Side::Private };
            claim_eq!(vcpu.resume(Reply::None), report_of(again, BASE), "the access done again");
        }
        Err(_) => fail!("the thread of the vCPU panicked"),
    }
    drop(memory);
    Ok(())
}

/// How the cause is mended.
#[derive(Clone, Copy, Debug)]
enum Mend {
    MakeShared,
    BindAFile,
    MakeTheSlot,
}

const MENDS: &[(&str, Mend)] = &[
    ("by_making_the_frame_shared", Mend::MakeShared),
    ("by_binding_a_file", Mend::BindAFile),
    ("by_making_the_slot", Mend::MakeTheSlot),
];

fn access_completes_after_the_cause_is_mended(cx: &Context, &mend: &Mend) -> TestResult {
    let mut scene = match mend {
        Mend::MakeTheSlot => Scene::new(cx)?,
        Mend::MakeShared | Mend::BindAFile => Scene::with_ordinary_slot(cx)?,
    };
    let wrong_side = if matches!(mend, Mend::MakeShared) { Side::Shared } else { Side::Private };
    let gpa = wrong_side.address(&*scene.vm, BASE);
    let reported = if says_by_address(&*scene.vm) { wrong_side } else { Side::Private };
    claim_eq!(scene.vcpu.execute(GuestOp::read_u64(gpa)), report_of(reported, BASE), "the access");
    let gmem = claim_ok!(scene.vm.create_guest_memfd(2 * PAGE_SIZE, 0));
    let value = match mend {
        Mend::MakeShared => {
            scene.set_attributes(0)?;
            0x5A4E
        }
        Mend::BindAFile => {
            claim_ok!(scene.vm.set_memory_region(&MemoryRegion::deletion(SLOT)));
            claim_ok!(scene.vm.set_memory_region(&scene.region().bound_to(&*gmem, 0)));
            0
        }
        Mend::MakeTheSlot => {
            claim_ok!(scene.vm.set_memory_region(&scene.region().bound_to(&*gmem, 0)));
            0
        }
    };
    claim_eq!(scene.vcpu.resume(Reply::None), Exit::Done(value), "the same load after {mend:?}");
    claim_matches!(scene.vcpu.execute(GuestOp::write_u64(gpa, 9)), Exit::Done(_), "a store after it");
    Ok(())
}

fn unmended_access_faults_again(cx: &Context) -> TestResult {
    let mut scene = Scene::with_ordinary_slot(cx)?;
    let gpa = Side::Shared.address(&*scene.vm, BASE);
    let reported = report_of(if says_by_address(&*scene.vm) { Side::Shared } else { Side::Private }, BASE);
    claim_eq!(scene.vcpu.execute(GuestOp::write_u64(gpa, 0x77)), reported, "the store");
    for round in 0..3 {
        claim_eq!(scene.vcpu.resume(Reply::None), reported, "the store again, round {round}");
    }
    scene.set_attributes(0)?;
    claim_matches!(scene.vcpu.resume(Reply::None), Exit::Done(_), "the store when the page is shared");
    claim_eq!(scene.memory.read_u64(0)?, 0x77, "the memory");
    Ok(())
}

fn old_report_does_not_stay(cx: &Context) -> TestResult {
    let mut scene = Scene::with_ordinary_slot(cx)?;
    let gpa = Side::Shared.address(&*scene.vm, BASE);
    let reported = report_of(if says_by_address(&*scene.vm) { Side::Shared } else { Side::Private }, BASE);
    claim_eq!(scene.vcpu.execute(GuestOp::read_u64(gpa)), reported, "the access to the private page");
    scene.set_attributes(0)?;
    claim_ok!(scene.memory.unmap_part(0, 2 * PAGE_SIZE));
    let exit = scene.vcpu.resume(Reply::None);
    claim_eq!(
        exit,
        Exit::Failed { errno: Errno::EFAULT, reason: KVM_EXIT_UNKNOWN },
        "the shared access without memory"
    );
    Ok(())
}

/// The stand-alone binary.
pub fn main() -> std::process::ExitCode {
    gmemtest::cli::selftest_main(&[&SUITE])
}
