//! How a guest access ends when there is no memory for it: KVM_EXIT_MMIO, KVM_EXIT_MEMORY_FAULT, EFAULT, an exception.

use std::thread;
use std::time::Duration;

use gmemtest::harness::{Context, GmemVm, Side, TestResult};
use gmemtest::machine::{
    Errno, Exit, Facility, GuestOp, HostMemory, Mapping, MemoryRegion, PAGE_SIZE, Protection, Reply, Vcpu, Vm, VmConfig,
};
use gmemtest::uapi::kvm::{GUEST_MEMFD_FLAG_MMAP, KVM_EXIT_UNKNOWN};
use gmemtest::{claim, claim_eq, claim_matches, claim_ok, fail};

gmemtest::suite! {
    /// Guest accesses that find no memory, and the statistics of those that do.
    pub static SUITE: guest_exits needs [Vm, Guest, GuestMemfd, UserMemory2] {
        /// A shared access outside every slot is KVM_EXIT_MMIO with its address, size and data, and the value that user
        /// space gives is what the guest loads. A failure breaks every device model.
        access_outside_the_slots_is_mmio[MMIO];

        /// The same after the slot was deleted that was there: its mappings are gone (kvm_arch_flush_shadow_memslot()). A
        /// failure means that the guest goes on using memory that was taken from it.
        access_to_a_deleted_slot_is_mmio[MMIO] needs [GmemMmap, GmemInitShared];

        /// A guest that loads from the slot in a loop leaves with KVM_EXIT_MMIO when the slot goes
        /// (set_memory_region_test: test_delete_memory_region). A failure means that a running guest keeps a stale mapping.
        running_guest_leaves_when_its_slot_is_deleted needs [GmemMmap, GmemInitShared];

        /// A private access where no slot is left is EFAULT with KVM_EXIT_MEMORY_FAULT, flags PRIVATE
        /// (private_mem_kvm_exits_test). A failure means that a VMM cannot tell a missing page from a device.
        running_guest_leaves_when_its_private_slot_is_deleted needs [PrivateMemory, MemoryAttributes, MemoryFaultInfo];

        /// An access to a slot whose file is closed is EFAULT with KVM_EXIT_MEMORY_FAULT; flags say whether the access was
        /// private, gpa is the page, size is 4096 (kvm_gmem_get_pfn(), kvm_mmu_prepare_memory_fault_exit()). A failure
        /// means that the guest uses pages of a file that is gone, or that user space is not told.
        access_after_the_file_is_closed_is_a_memory_fault[ACCESSES] needs [MemoryFaultInfo];

        /// A guest in a loop leaves with KVM_EXIT_MEMORY_FAULT when the last reference to the file goes (kvm_gmem_release()
        /// unmaps the guest). A failure means that the guest runs on freed pages.
        running_guest_leaves_when_the_file_is_closed needs [MemoryFaultInfo];

        /// A mapping keeps the file open: closing the descriptor takes nothing from the guest until the mapping goes. A
        /// failure means that release does not wait for the last reference.
        mapping_keeps_the_file_open needs [GmemMmap, GmemInitShared, MemoryFaultInfo];

        /// An orphaned slot serves the guest again after it was deleted and bound to a new file. A failure means that a VM
        /// cannot recover from a closed file.
        new_slot_with_a_new_file_serves_the_guest_again needs [MemoryFaultInfo];

        /// A shared access whose userspace_addr cannot be faulted in is EFAULT and no KVM_EXIT_MEMORY_FAULT: exit_reason
        /// stays KVM_EXIT_UNKNOWN (kvm_handle_error_pfn()). A failure means that the rules by which a VMM tells its own bug
        /// from a conversion request have changed.
        unusable_userspace_addr_is_efault_without_an_exit[UNUSABLE];

        /// Each page that the guest touches is one 4 KiB mapping in the VM's statistics, and a punched page is one less
        /// (pages_4k; kvm_update_page_stats()). A failure means that guest_memfd pages are mapped twice, or not unmapped.
        mappings_are_counted[COUNTED] needs [KvmStats];

        /// An exception of the guest's code is reported with vector, error code and RIP. A failure means that this
        /// harness would misread a broken guest as a kernel bug.
        exceptions_are_reported[EXCEPTIONS];

        /// The guest is usable after an exception. A failure means that one broken access ends a whole test.
        guest_goes_on_after_an_exception;
    }
}

const NOWHERE: u64 = GmemVm::GPA + (1 << 30);

/// One access to memory that is not there: operation on an address, size, value stored.
#[derive(Clone, Copy, Debug)]
struct Access {
    size: u8,
    store: Option<u64>,
}

impl Access {
    fn op(self, gpa: u64) -> GuestOp {
        let Access { size, store } = self;
        store.map_or(GuestOp::Read { gpa, size }, |value| GuestOp::Write { gpa, size, value })
    }
}

const MMIO: &[(&str, Access)] = &[
    ("load_8", Access { size: 8, store: None }),
    ("load_4", Access { size: 4, store: None }),
    ("load_1", Access { size: 1, store: None }),
    ("store_8", Access { size: 8, store: Some(0x1122_3344_5566_7788) }),
    ("store_2", Access { size: 2, store: Some(0x7788) }),
];

/// Claims that the shared access ends in KVM_EXIT_MMIO and that the guest takes the answer.
fn claim_mmio(vm: &dyn Vm, vcpu: &mut dyn Vcpu, access: Access, gpa: u64) -> TestResult {
    let exit = vcpu.execute(access.op(Side::Shared.address(vm, gpa)));
    claim_eq!(exit, Exit::Mmio { gpa, len: access.size.into(), write: access.store }, "the guest's access");
    if access.store.is_some() {
        claim_matches!(vcpu.resume(Reply::None), Exit::Done(_), "the guest after the store");
    } else {
        let value = 0xBEEF & (u64::MAX >> (64 - 8 * u32::from(access.size)));
        claim_eq!(vcpu.resume(Reply::MmioRead(value)), Exit::Done(value), "the value that user space gave");
    }
    Ok(())
}

fn access_outside_the_slots_is_mmio(cx: &Context, &access: &Access) -> TestResult {
    let vm = claim_ok!(cx.machine().create_vm(VmConfig::Payload { vcpus: 1 }));
    let mut vcpu = claim_ok!(vm.create_vcpu(0));
    claim_mmio(&*vm, &mut *vcpu, access, NOWHERE)
}

fn access_to_a_deleted_slot_is_mmio(cx: &Context, &access: &Access) -> TestResult {
    let vm = GmemVm::mappable(cx, 1)?;
    let mut vcpu = vm.vcpu(0)?;
    claim_matches!(vcpu.execute(GuestOp::write_u64(vm.gpa(0), 0x5EED)), Exit::Done(_));
    vm.delete_slot()?;
    claim_mmio(&*vm.vm, &mut *vcpu, access, vm.slot_gpa(0))?;
    vm.create_slot()?;
    claim_eq!(vcpu.execute(GuestOp::read_u64(vm.gpa(0))), Exit::Done(0x5EED), "the slot made again");
    Ok(())
}

/// Runs a loop of loads on another thread, calls `disturb` once the guest is in it, and gives the vCPU's exit back.
fn exit_of_a_running_guest(
    vcpu: Box<dyn Vcpu>,
    gpa: u64,
    expect: u64,
    disturb: impl FnOnce() -> TestResult,
) -> TestResult<(Box<dyn Vcpu>, Exit)> {
    let control = vcpu.control();
    let mut vcpu = vcpu;
    let runner = thread::spawn(move || {
        let exit = vcpu.execute(GuestOp::ReadWhile { gpa, expect });
        (vcpu, exit)
    });
    while control.iterations() == 0 && !runner.is_finished() {
        thread::sleep(Duration::from_micros(50));
    }
    let disturbed = disturb();
    if disturbed.is_err() {
        control.stop();
    }
    let ended = runner.join();
    disturbed?;
    match ended {
        Ok(ended) => Ok(ended),
        Err(_) => fail!("the thread of the vCPU panicked"),
    }
}

fn running_guest_leaves_when_its_slot_is_deleted(cx: &Context) -> TestResult {
    let vm = GmemVm::mappable(cx, 1)?;
    let (mut vcpu, exit) = exit_of_a_running_guest(vm.vcpu(0)?, vm.gpa(0), 0, || vm.delete_slot())?;
    claim_eq!(exit, Exit::Mmio { gpa: vm.slot_gpa(0), len: 8, write: None }, "how the loop was left");
    claim_eq!(vcpu.resume(Reply::MmioRead(0xBEEF)), Exit::Done(0xBEEF), "the loop ends with the value given");
    Ok(())
}

fn running_guest_leaves_when_its_private_slot_is_deleted(cx: &Context) -> TestResult {
    let vm = GmemVm::private(cx, 1)?;
    let (_, exit) = exit_of_a_running_guest(vm.vcpu(0)?, vm.gpa(0), 0, || vm.delete_slot())?;
    claim_eq!(exit, memory_fault(Side::Private, vm.slot_gpa(0)), "how the loop was left");
    Ok(())
}

fn memory_fault(side: Side, gpa: u64) -> Exit {
    Exit::MemoryFault { errno: Errno::EFAULT, flags: side.fault_flags(), gpa, size: PAGE_SIZE }
}

/// Byte offset into the slot, and the access.
const ACCESSES: &[(&str, (u64, Access))] = &[
    ("load", (0, Access { size: 8, store: None })),
    ("store", (0, Access { size: 8, store: Some(1) })),
    ("load_in_the_middle_of_a_page", (PAGE_SIZE + 0x123, Access { size: 1, store: None })),
    ("store_at_the_end_of_a_page", (2 * PAGE_SIZE - 4, Access { size: 4, store: Some(1) })),
];

fn access_after_the_file_is_closed_is_a_memory_fault(cx: &Context, &(at, access): &(u64, Access)) -> TestResult {
    let vm = GmemVm::new(cx, 2)?;
    let mut vcpu = vm.vcpu(0)?;
    claim_matches!(vcpu.execute(GuestOp::Touch { gpa: vm.gpa(0), len: vm.len }), Exit::Done(_));
    let (gpa, fault) = (vm.gpa(at), memory_fault(vm.side_without_a_file(cx), vm.slot_gpa(at) & !(PAGE_SIZE - 1)));
    drop((vm.gmem, vm.shared));
    claim_eq!(vcpu.execute(access.op(gpa)), fault, "the access after the file is closed");
    claim_eq!(vcpu.resume(Reply::None), fault, "the same access when nothing was mended");
    Ok(())
}

fn running_guest_leaves_when_the_file_is_closed(cx: &Context) -> TestResult {
    let vm = GmemVm::new(cx, 1)?;
    let (vcpu, gpa) = (vm.vcpu(0)?, vm.gpa(0));
    let side = vm.side_without_a_file(cx);
    let GmemVm { vm: _open, gmem, shared, .. } = vm;
    let close = || {
        drop((shared, gmem));
        Ok(())
    };
    let (_, exit) = exit_of_a_running_guest(vcpu, gpa, 0, close)?;
    claim_eq!(exit, memory_fault(side, GmemVm::GPA), "how the loop was left");
    Ok(())
}

fn mapping_keeps_the_file_open(cx: &Context) -> TestResult {
    let vm = GmemVm::mappable(cx, 1)?;
    let mut vcpu = vm.vcpu(0)?;
    let load = GuestOp::read_u64(vm.gpa(0));
    vm.shared.write_u64(0, 0x0BE7)?;
    drop(vm.gmem);
    claim_eq!(vcpu.execute(load), Exit::Done(0x0BE7), "with the mapping");
    drop(vm.shared);
    claim_eq!(vcpu.execute(load), memory_fault(Side::Shared, GmemVm::GPA), "without the mapping");
    Ok(())
}

fn new_slot_with_a_new_file_serves_the_guest_again(cx: &Context) -> TestResult {
    let mut vm = GmemVm::new(cx, 1)?;
    let mut vcpu = vm.vcpu(0)?;
    claim_matches!(vcpu.execute(GuestOp::write_u64(vm.gpa(0), 0x01D)), Exit::Done(_));
    let fresh = GmemVm::new(cx, 1)?;
    vm.gmem = vm.new_file()?;
    vm.shared = fresh.shared;
    let exit = vcpu.execute(GuestOp::read_u64(vm.gpa(0)));
    claim_eq!(exit, memory_fault(vm.side_without_a_file(cx), vm.slot_gpa(0)), "the orphaned slot");
    vm.delete_slot()?;
    vm.create_slot()?;
    claim_eq!(vcpu.execute(GuestOp::read_u64(vm.gpa(0))), Exit::Done(0), "the slot with the new file");
    Ok(())
}

/// What stands behind the userspace_addr of an ordinary slot.
#[derive(Clone, Copy, Debug)]
enum Unusable {
    NoAccess,
    NotMapped,
    PrivateGmem,
}

const UNUSABLE: &[(&str, Unusable)] = &[
    ("prot_none", Unusable::NoAccess),
    ("not_mapped", Unusable::NotMapped),
    ("mapping_of_a_private_file", Unusable::PrivateGmem),
];

fn unusable_userspace_addr_is_efault_without_an_exit(cx: &Context, &unusable: &Unusable) -> TestResult {
    let vm = claim_ok!(cx.machine().create_vm(VmConfig::Payload { vcpus: 1 }));
    // Before the hole is made, so that nothing of the vCPU is mapped into it.
    let mut vcpu = claim_ok!(vm.create_vcpu(0));
    let memory: Box<dyn Mapping> = match unusable {
        Unusable::NoAccess => claim_ok!(cx.machine().host_memory(HostMemory::NoAccess, PAGE_SIZE)),
        Unusable::NotMapped => claim_ok!(cx.machine().host_memory(HostMemory::Anonymous, PAGE_SIZE)),
        Unusable::PrivateGmem => {
            cx.require(Facility::GmemMmap)?;
            let gmem = claim_ok!(vm.create_guest_memfd(PAGE_SIZE, GUEST_MEMFD_FLAG_MMAP));
            claim_ok!(gmem.map(PAGE_SIZE, 0, Protection::SHARED_RW))
        }
    };
    claim_ok!(vm.set_memory_region(&MemoryRegion::new(GmemVm::SLOT, GmemVm::GPA, PAGE_SIZE).at(memory.addr())));
    if matches!(unusable, Unusable::NotMapped) {
        claim_ok!(memory.unmap_part(0, PAGE_SIZE));
    }
    let gpa = Side::Shared.address(&*vm, GmemVm::GPA);
    for op in [GuestOp::read_u64(gpa), GuestOp::write_u64(gpa, 1)] {
        let exit = vcpu.execute(op);
        claim_eq!(exit, Exit::Failed { errno: Errno::EFAULT, reason: KVM_EXIT_UNKNOWN }, "{op:x?} on {unusable:?}");
    }
    Ok(())
}

/// The hole, in pages, and how many of four pages stay mapped.
const COUNTED: &[(&str, (u64, u64, u64))] = &[
    ("after_punching_one_page", (1, 1, 3)),
    ("after_punching_all", (0, 4, 0)),
    ("after_punching_beyond_the_end", (4, 1, 4)),
];

fn mappings_are_counted(cx: &Context, &(first, pages, left): &(u64, u64, u64)) -> TestResult {
    let vm = GmemVm::new(cx, 4)?;
    let mut vcpu = vm.vcpu(0)?;
    // The payload's own pages are mapped by a first operation of each kind.
    claim_matches!(vcpu.execute(GuestOp::Touch { gpa: vm.gpa(0), len: PAGE_SIZE }), Exit::Done(_));
    let before = claim_ok!(vm.vm.statistic("pages_4k"));
    claim_matches!(vcpu.execute(GuestOp::Touch { gpa: vm.gpa(0), len: vm.len }), Exit::Done(_));
    let touched = claim_ok!(vm.vm.statistic("pages_4k"));
    claim_eq!(touched, before + 3, "pages_4k after three more pages");
    claim_ok!(vm.gmem.punch_hole(first * PAGE_SIZE, pages * PAGE_SIZE));
    claim_eq!(claim_ok!(vm.vm.statistic("pages_4k")) + 4, touched + left, "pages_4k, {left} of four pages left");
    Ok(())
}

/// Code that raises an exception, at which byte of it, its vector and error code.
#[derive(Clone, Copy, Debug)]
struct Raising {
    code: [u8; 8],
    at: u64,
    vector: u8,
    error_code: u64,
}

const EXCEPTIONS: &[(&str, Raising)] = &[
    // ud2
    (
        "undefined_opcode",
        Raising { code: [0x0F, 0x0B, 0xC3, 0xC3, 0xC3, 0xC3, 0xC3, 0xC3], at: 0, vector: 6, error_code: 0 },
    ),
    // mov ecx, 0xdeadbeef; rdmsr: no CPU has that MSR
    (
        "general_protection",
        Raising { code: [0xB9, 0xEF, 0xBE, 0xAD, 0xDE, 0x0F, 0x32, 0xC3], at: 5, vector: 13, error_code: 0 },
    ),
];

fn raise(vm: &GmemVm, vcpu: &mut dyn Vcpu, code: [u8; 8]) -> TestResult<Exit> {
    let code = u64::from_le_bytes(code);
    claim_matches!(vcpu.execute(GuestOp::write_u64(vm.gpa(0), code)), Exit::Done(_));
    Ok(vcpu.execute(GuestOp::Execute { gpa: vm.gpa(0) }))
}

fn exceptions_are_reported(cx: &Context, raising: &Raising) -> TestResult {
    let vm = GmemVm::new(cx, 1)?;
    let mut vcpu = vm.vcpu(0)?;
    match raise(&vm, &mut *vcpu, raising.code)? {
        Exit::GuestException { vector, error_code, rip, .. } => {
            claim_eq!((vector, error_code), (raising.vector, raising.error_code), "vector and error code");
            claim_eq!(rip % PAGE_SIZE, raising.at, "RIP within the page");
        }
        other => fail!("expected exception {}, the guest ended in {other:x?}", raising.vector),
    }
    Ok(())
}

fn guest_goes_on_after_an_exception(cx: &Context) -> TestResult {
    let vm = GmemVm::new(cx, 1)?;
    let mut vcpu = vm.vcpu(0)?;
    let exit = raise(&vm, &mut *vcpu, EXCEPTIONS[0].1.code)?;
    claim!(matches!(exit, Exit::GuestException { .. }), "an exception, not {exit:x?}");
    claim_matches!(vcpu.execute(GuestOp::write_u64(vm.gpa(64), 9)), Exit::Done(_), "the next operation");
    claim_eq!(vcpu.execute(GuestOp::read_u64(vm.gpa(64))), Exit::Done(9), "the operation after it");
    Ok(())
}

/// The stand-alone binary.
pub fn main() -> std::process::ExitCode {
    gmemtest::cli::selftest_main(&[&SUITE])
}
