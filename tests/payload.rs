//! The payload on the KVM of the running kernel: every command, faults, exceptions, several vCPUs at once.
//!
//! The VM type is taken from GMEMTEST_PAYLOAD_VM (`default` where it is not set). Without /dev/kvm each test says so and
//! passes; nothing here asserts on time.

use gmemtest::kvm::KvmMachine;
use gmemtest::machine::{
    Availability, Errno, Exit, Facility, GmemBinding, GuestOp, HostMemory, Machine, Mapping, MemoryAttributes,
    MemoryRegion, PAGE_SIZE, PreFault, Protection, RegionFile, Reply, Vcpu, Vm, VmConfig, VmType,
};
use gmemtest::uapi::kvm::{
    GUEST_MEMFD_FLAG_INIT_SHARED, GUEST_MEMFD_FLAG_MMAP, KVM_CAP_EXIT_HYPERCALL, KVM_MEM_GUEST_MEMFD,
    KVM_MEMORY_ATTRIBUTE_PRIVATE, KVM_MEMORY_EXIT_FLAG_PRIVATE,
};
use gmemtest::uapi::kvm_para::{
    KVM_ENOSYS, KVM_EXIT_HYPERCALL_LONG_MODE, KVM_HC_MAP_GPA_RANGE, KVM_MAP_GPA_RANGE_ENCRYPTED,
};
use std::sync::Arc;
use std::time::Duration;

/// Where tests put memory: above 4 GiB, on a 2 MiB boundary.
const GPA: u64 = 0x1_0000_0000;
const MIB: u64 = 1 << 20;

fn machine(needs: &[Facility]) -> Option<KvmMachine> {
    let wanted = std::env::var("GMEMTEST_PAYLOAD_VM").unwrap_or_else(|_| "default".to_owned());
    let vm_type = VmType::ALL.into_iter().find(|t| t.name() == wanted).expect("GMEMTEST_PAYLOAD_VM names a VM type");
    let machine = KvmMachine::new(vm_type);
    for &facility in [Facility::Guest].iter().chain(needs) {
        if let Availability::Absent { kind, why, mend } = machine.facility(facility) {
            println!("skipped ({kind}): {facility}: {why}; needs {mend}");
            return None;
        }
    }
    Some(machine)
}

fn payload_vm(machine: &KvmMachine, vcpus: u32) -> Arc<dyn Vm> {
    machine.create_vm(VmConfig::Payload { vcpus }).expect("a VM with the payload")
}

/// Anonymous memory at `gpa`, in slot `slot`.
fn memory(machine: &KvmMachine, vm: &Arc<dyn Vm>, slot: u32, gpa: u64, size: u64) -> Box<dyn Mapping> {
    let memory = machine.host_memory(HostMemory::Anonymous, size).expect("anonymous memory");
    let region = MemoryRegion { slot, flags: 0, gpa, size, userspace_addr: memory.addr(), gmem: None };
    vm.set_memory_region(&region).expect("a slot");
    memory
}

fn vcpu(vm: &Arc<dyn Vm>, id: u32) -> Box<dyn Vcpu> {
    vm.create_vcpu(id).expect("a vCPU")
}

#[test]
fn stores_and_loads_of_every_size_reach_the_slot() {
    let Some(machine) = machine(&[]) else { return };
    let vm = payload_vm(&machine, 1);
    let memory = memory(&machine, &vm, 0, GPA, MIB);
    let mut vcpu = vcpu(&vm, 0);
    memory.write_u64(0, u64::MAX).unwrap();
    for (size, found) in
        [(1, 0xffff_ffff_ffff_ff88), (2, 0xffff_ffff_ffff_7788), (4, 0xffff_ffff_5566_7788), (8, 0x1122_3344_5566_7788)]
    {
        let value = 0x1122_3344_5566_7788;
        assert_eq!(vcpu.execute(GuestOp::Write { gpa: GPA, size, value }), Exit::Done(0));
        assert_eq!(memory.read_u64(0), Ok(found), "{size} bytes");
        let low = if size == 8 { value } else { value & ((1 << (size * 8)) - 1) };
        assert_eq!(vcpu.execute(GuestOp::Read { gpa: GPA, size }), Exit::Done(low), "{size} bytes");
    }
}

#[test]
fn ranges_are_filled_and_checked_to_the_byte() {
    let Some(machine) = machine(&[]) else { return };
    let vm = payload_vm(&machine, 1);
    let memory = memory(&machine, &vm, 0, GPA, 8 * MIB);
    let mut vcpu = vcpu(&vm, 0);
    // Over two 2 MiB boundaries, from and to odd addresses.
    let (from, len) = (MIB + 13, 4 * MIB + 7);
    assert_eq!(vcpu.execute(GuestOp::Fill { gpa: GPA + from, len, byte: 0xa5 }), Exit::Done(0));
    assert_eq!(memory.find_mismatch(0, from, 0), Ok(None));
    assert_eq!(memory.find_mismatch(from, len, 0xa5), Ok(None));
    assert_eq!(memory.find_mismatch(from + len, 8 * MIB - from - len, 0), Ok(None));
    assert_eq!(vcpu.execute(GuestOp::Check { gpa: GPA + from, len, byte: 0xa5 }), Exit::Done(0));
    for at in [from - 1, from + len] {
        let check = GuestOp::Check { gpa: GPA + at, len: 1, byte: 0xa5 };
        assert_eq!(vcpu.execute(check), Exit::Mismatch { gpa: GPA + at, byte: 0 });
    }
    for at in [from, from + 1, from + 8, 2 * MIB - 1, 2 * MIB, 4 * MIB + 5, from + len - 1] {
        memory.write(at, &[0x5a]).unwrap();
        let check = GuestOp::Check { gpa: GPA + from, len, byte: 0xa5 };
        assert_eq!(vcpu.execute(check), Exit::Mismatch { gpa: GPA + at, byte: 0x5a });
        memory.write(at, &[0xa5]).unwrap();
    }
    let check = GuestOp::Check { gpa: GPA + from, len: 0, byte: 1 };
    assert_eq!(vcpu.execute(check), Exit::Done(0), "nothing to check");
    let touch = GuestOp::Touch { gpa: GPA, len: 8 * MIB };
    assert_eq!(vcpu.execute(touch), Exit::Done(8 * MIB / PAGE_SIZE));
}

#[test]
fn memory_above_512_gib_and_at_zero_is_in_reach() {
    let Some(machine) = machine(&[]) else { return };
    let vm = payload_vm(&machine, 1);
    let mut vcpu = vcpu(&vm, 0);
    let mut memories = Vec::new();
    // 40 bits are below the MAXPHYADDR of every CPU with KVM.
    for (slot, gpa) in [(0, 0), (1, 0x7f_ffe0_0000), (2, 0x80_0000_0000), (3, 0xff_ffff_f000)] {
        memories.push(memory(&machine, &vm, slot, gpa, PAGE_SIZE));
        assert_eq!(vcpu.execute(GuestOp::Write { gpa: gpa + 8, size: 8, value: gpa + 1 }), Exit::Done(0));
        assert_eq!(memories[slot as usize].read_u64(8), Ok(gpa + 1), "{gpa:#x}");
    }
    // The window keeps nothing of an address that it showed before.
    assert_eq!(vcpu.execute(GuestOp::Read { gpa: 8, size: 8 }), Exit::Done(1));
}

#[test]
fn code_is_executed_and_its_result_comes_back() {
    let Some(machine) = machine(&[]) else { return };
    let vm = payload_vm(&machine, 1);
    let memory = memory(&machine, &vm, 0, GPA, PAGE_SIZE);
    let mut vcpu = vcpu(&vm, 0);
    // mov eax, 0x12345678; ret
    memory.write(16, &[0xb8, 0x78, 0x56, 0x34, 0x12, 0xc3]).unwrap();
    assert_eq!(vcpu.execute(GuestOp::Execute { gpa: GPA + 16 }), Exit::Done(0x1234_5678));
    // ud2
    memory.write(32, &[0x0f, 0x0b]).unwrap();
    match vcpu.execute(GuestOp::Execute { gpa: GPA + 32 }) {
        Exit::GuestException { vector: 6, error_code: 0, .. } => {}
        exit => panic!("{exit:x?}"),
    }
    // mov eax, [0]: nothing is mapped at virtual address 0. #PF, user, not present.
    memory.write(48, &[0x8b, 0x04, 0x25, 0x10, 0, 0, 0, 0xc3]).unwrap();
    match vcpu.execute(GuestOp::Execute { gpa: GPA + 48 }) {
        Exit::GuestException { vector: 14, error_code: 4, cr2: 0x10, .. } => {}
        exit => panic!("{exit:x?}"),
    }
    // hlt at CPL 3: #GP(0)
    memory.write(64, &[0xf4]).unwrap();
    match vcpu.execute(GuestOp::Execute { gpa: GPA + 64 }) {
        Exit::GuestException { vector: 13, error_code: 0, .. } => {}
        exit => panic!("{exit:x?}"),
    }
    // xor edx, edx; div edx: #DE
    memory.write(80, &[0x31, 0xd2, 0xf7, 0xf2]).unwrap();
    match vcpu.execute(GuestOp::Execute { gpa: GPA + 80 }) {
        Exit::GuestException { vector: 0, error_code: 0, .. } => {}
        exit => panic!("{exit:x?}"),
    }
    // int3 that is not the payload's own way of calling
    memory.write(96, &[0xcc, 0xc3]).unwrap();
    match vcpu.execute(GuestOp::Execute { gpa: GPA + 96 }) {
        Exit::GuestException { vector: 3, error_code: 0, .. } => {}
        exit => panic!("{exit:x?}"),
    }
    assert_eq!(vcpu.execute(GuestOp::Execute { gpa: GPA + 16 }), Exit::Done(0x1234_5678), "after exceptions");
}

#[test]
fn an_address_without_a_slot_is_an_mmio_exit_that_goes_on_with_the_reply() {
    let Some(machine) = machine(&[]) else { return };
    let vm = payload_vm(&machine, 1);
    let mut vcpu = vcpu(&vm, 0);
    assert_eq!(vcpu.execute(GuestOp::Read { gpa: GPA + 8, size: 4 }), Exit::Mmio { gpa: GPA + 8, len: 4, write: None });
    assert_eq!(vcpu.resume(Reply::MmioRead(0xdead_beef)), Exit::Done(0xdead_beef));
    let write = GuestOp::Write { gpa: GPA, size: 2, value: 0x1_2345 };
    assert_eq!(vcpu.execute(write), Exit::Mmio { gpa: GPA, len: 2, write: Some(0x2345) });
    assert_eq!(vcpu.resume(Reply::None), Exit::Done(0));
}

#[test]
fn an_operation_that_was_given_up_does_not_spoil_the_next() {
    let Some(machine) = machine(&[]) else { return };
    let vm = payload_vm(&machine, 1);
    let memory = memory(&machine, &vm, 0, GPA, PAGE_SIZE);
    let mut vcpu = vcpu(&vm, 0);
    for round in 0..3 {
        let read = GuestOp::Read { gpa: 2 * GPA, size: 8 };
        assert_eq!(vcpu.execute(read), Exit::Mmio { gpa: 2 * GPA, len: 8, write: None });
        assert_eq!(vcpu.execute(GuestOp::Write { gpa: GPA, size: 8, value: round }), Exit::Done(0));
        assert_eq!(memory.read_u64(0), Ok(round));
    }
}

#[test]
fn halt_is_an_exit_and_the_guest_goes_on_behind_it() {
    let Some(machine) = machine(&[]) else { return };
    let vm = payload_vm(&machine, 1);
    let mut vcpu = vcpu(&vm, 0);
    assert_eq!(vcpu.execute(GuestOp::Halt), Exit::Halted);
    assert_eq!(vcpu.resume(Reply::None), Exit::Done(0));
}

#[test]
fn every_vcpu_has_its_own_mailbox_and_they_run_at_once() {
    let Some(machine) = machine(&[]) else { return };
    let vm = payload_vm(&machine, 16);
    let memory = memory(&machine, &vm, 0, GPA, MIB);
    for id in [1, 15, 0] {
        let mut vcpu = vcpu(&vm, id);
        let gpa = GPA + u64::from(id) * 8;
        assert_eq!(vcpu.execute(GuestOp::Write { gpa, size: 8, value: u64::from(id) + 100 }), Exit::Done(0));
        assert_eq!(memory.read_u64(u64::from(id) * 8), Ok(u64::from(id) + 100));
    }
    // Two guests that need each other to get on: one waits for what the other writes.
    let (mut reader, mut writer) = (vcpu(&vm, 2), vcpu(&vm, 3));
    memory.write_u64(0x800, 7).unwrap();
    let reading = reader.control();
    std::thread::scope(|scope| {
        let reader = scope.spawn(move || reader.execute(GuestOp::ReadWhile { gpa: GPA + 0x800, expect: 7 }));
        while reading.iterations() == 0 {
            std::thread::yield_now();
        }
        assert_eq!(writer.execute(GuestOp::Write { gpa: GPA + 0x800, size: 8, value: 9 }), Exit::Done(0));
        assert_eq!(reader.join().unwrap(), Exit::Done(9));
    });
}

#[test]
fn loops_end_when_they_are_stopped_even_before_they_start() {
    let Some(machine) = machine(&[]) else { return };
    let vm = payload_vm(&machine, 1);
    let memory = memory(&machine, &vm, 0, GPA, PAGE_SIZE);
    let mut vcpu = vcpu(&vm, 0);
    let control = vcpu.control();
    control.stop();
    assert_eq!(vcpu.execute(GuestOp::WriteUntilStopped { gpa: GPA }), Exit::Done(1));
    std::thread::scope(|scope| {
        let writer = scope.spawn(move || vcpu.execute(GuestOp::WriteUntilStopped { gpa: GPA }));
        while control.iterations() < 1000 {
            std::thread::yield_now();
        }
        control.stop();
        let Exit::Done(last) = writer.join().unwrap() else { panic!("the loop did not end by itself") };
        assert!(last >= 1000);
        assert_eq!(memory.read_u64(0), Ok(last));
    });
}

#[test]
fn a_kick_and_a_time_limit_take_a_looping_guest_out() {
    let Some(machine) = machine(&[]) else { return };
    let vm = payload_vm(&machine, 1);
    let _memory = memory(&machine, &vm, 0, GPA, PAGE_SIZE);
    let mut vcpu = vcpu(&vm, 0);
    let control = vcpu.control();
    let looping = GuestOp::ReadWhile { gpa: GPA, expect: 0 };
    std::thread::scope(|scope| {
        let vcpu = &mut vcpu;
        let runner = scope.spawn(move || vcpu.execute(looping));
        while control.iterations() == 0 {
            std::thread::yield_now();
        }
        control.kick();
        // KVM_EXIT_INTR, because the signal found the guest running.
        assert_eq!(runner.join().unwrap(), Exit::Failed { errno: Errno::EINTR, reason: 10 });
    });
    control.stop();
    assert_eq!(vcpu.resume(Reply::None), Exit::Done(0), "goes on where it was");
    vcpu.set_time_limit(Duration::from_millis(20));
    assert_eq!(vcpu.execute(looping), Exit::TimedOut);
    vcpu.set_time_limit(Duration::from_secs(20));
    assert_eq!(vcpu.execute(GuestOp::Read { gpa: GPA, size: 8 }), Exit::Done(0));
    drop(vcpu);
    // The handle outlives the vCPU and does nothing.
    control.kick();
    control.stop();
}

#[test]
fn guest_accesses_to_a_slot_of_a_mappable_guest_memfd_reach_the_file() {
    let Some(machine) = machine(&[Facility::GmemMmap, Facility::GmemInitShared]) else { return };
    let vm = payload_vm(&machine, 1);
    let flags = GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED;
    let gmem = vm.create_guest_memfd(MIB, flags).unwrap();
    let host = gmem.map(MIB, 0, Protection::SHARED_RW).unwrap();
    let binding = Some(GmemBinding { file: RegionFile::Gmem(&*gmem), offset: 0 });
    // No userspace_addr: what reaches the guest can only come from the file.
    let flags = KVM_MEM_GUEST_MEMFD;
    let region = MemoryRegion { slot: 0, flags, gpa: GPA, size: MIB, userspace_addr: 0, gmem: binding };
    vm.set_memory_region(&region).unwrap();
    let mut vcpu = vcpu(&vm, 0);
    host.fill(0, MIB, 0x3c).unwrap();
    assert_eq!(vcpu.execute(GuestOp::Check { gpa: GPA, len: MIB, byte: 0x3c }), Exit::Done(0));
    assert_eq!(vcpu.execute(GuestOp::Fill { gpa: GPA + 5, len: MIB - 10, byte: 0xc3 }), Exit::Done(0));
    assert_eq!(host.find_mismatch(5, MIB - 10, 0xc3), Ok(None));
    host.write(0, &[0xb8, 1, 2, 3, 4, 0xc3]).unwrap();
    assert_eq!(vcpu.execute(GuestOp::Execute { gpa: GPA }), Exit::Done(0x0403_0201));
    gmem.punch_hole(0, MIB).unwrap();
    assert_eq!(vcpu.execute(GuestOp::Check { gpa: GPA, len: MIB, byte: 0 }), Exit::Done(0));
    assert_eq!(host.find_mismatch(0, MIB, 0), Ok(None));
    // The mapping holds the file: only without it does closing the descriptor close the file.
    drop(host);
    drop(gmem);
    let fault = Exit::MemoryFault { errno: Errno::EFAULT, flags: 0, gpa: GPA, size: PAGE_SIZE };
    assert_eq!(vcpu.execute(GuestOp::Read { gpa: GPA + 8, size: 8 }), fault);
}

#[test]
fn a_page_that_the_host_cannot_give_is_efault_without_a_memory_fault() {
    let Some(machine) = machine(&[]) else { return };
    let vm = payload_vm(&machine, 1);
    let nothing = machine.host_memory(HostMemory::NoAccess, PAGE_SIZE).unwrap();
    let userspace_addr = nothing.addr();
    let region = MemoryRegion { slot: 0, flags: 0, gpa: GPA, size: PAGE_SIZE, userspace_addr, gmem: None };
    vm.set_memory_region(&region).unwrap();
    let mut vcpu = vcpu(&vm, 0);
    let exit = vcpu.execute(GuestOp::Read { gpa: GPA, size: 8 });
    assert_eq!(exit, Exit::Failed { errno: Errno::EFAULT, reason: 0 });
}

#[test]
fn more_vcpus_than_areas_and_ids_beyond_the_number_asked_for_are_refused() {
    let Some(machine) = machine(&[]) else { return };
    assert_eq!(machine.create_vm(VmConfig::Payload { vcpus: 17 }).err(), Some(Errno::EINVAL));
    assert_eq!(machine.create_vm(VmConfig::Payload { vcpus: 0 }).err(), Some(Errno::EINVAL));
    let vm = payload_vm(&machine, 2);
    assert_eq!(vm.create_vcpu(2).err(), Some(Errno::EINVAL));
    assert!(vm.create_vcpu(1).is_ok());
    assert_eq!(vm.first_reserved_slot(), 32763);
}

#[test]
fn a_vm_without_payload_executes_nothing() {
    let Some(machine) = machine(&[]) else { return };
    let vm = machine.create_vm(VmConfig::Bare).unwrap();
    let mut vcpu = vm.create_vcpu(0).unwrap();
    assert_eq!(vcpu.execute(GuestOp::Halt), Exit::Failed { errno: Errno::EOPNOTSUPP, reason: 0 });
}

#[test]
fn map_gpa_is_a_hypercall_exit_whose_reply_the_guest_gets() {
    let Some(machine) = machine(&[Facility::ExitHypercall]) else { return };
    let vm = payload_vm(&machine, 1);
    let mut vcpu = vcpu(&vm, 0);
    let map = GuestOp::MapGpa { gpa: GPA, pages: 3, attributes: KVM_MAP_GPA_RANGE_ENCRYPTED };
    // Not enabled: -KVM_ENOSYS, and no exit.
    assert_eq!(vcpu.execute(map), Exit::Done(KVM_ENOSYS.wrapping_neg()));
    vm.enable_capability(KVM_CAP_EXIT_HYPERCALL, [1 << KVM_HC_MAP_GPA_RANGE, 0, 0, 0]).unwrap();
    match vcpu.execute(map) {
        Exit::Hypercall { nr: KVM_HC_MAP_GPA_RANGE, args: [GPA, 3, KVM_MAP_GPA_RANGE_ENCRYPTED, ..], flags } => {
            assert_eq!(flags, KVM_EXIT_HYPERCALL_LONG_MODE);
        }
        exit => panic!("{exit:x?}"),
    }
    assert_eq!(vcpu.resume(Reply::Hypercall(5)), Exit::Done(5));
    // A page count of zero is refused by KVM itself: -EINVAL, and no exit.
    let nothing = GuestOp::MapGpa { gpa: GPA, pages: 0, attributes: 0 };
    assert_eq!(vcpu.execute(nothing), Exit::Done(22u64.wrapping_neg()));
}

#[test]
fn a_private_page_is_the_files_and_a_shared_one_the_mappings() {
    let Some(machine) = machine(&[Facility::MemoryAttributes, Facility::GuestMemfd]) else { return };
    let vm = payload_vm(&machine, 1);
    let memory = machine.host_memory(HostMemory::Anonymous, MIB).unwrap();
    let gmem = vm.create_guest_memfd(MIB, 0).unwrap();
    let binding = Some(GmemBinding { file: RegionFile::Gmem(&*gmem), offset: 0 });
    let userspace_addr = memory.addr();
    let flags = KVM_MEM_GUEST_MEMFD;
    vm.set_memory_region(&MemoryRegion { slot: 0, flags, gpa: GPA, size: MIB, userspace_addr, gmem: binding }).unwrap();
    let convert = |attributes| {
        vm.set_memory_attributes(&MemoryAttributes { address: GPA, size: PAGE_SIZE, attributes, flags: 0 }).unwrap();
    };
    let mut vcpu = vcpu(&vm, 0);
    memory.write_u64(0, 1).unwrap();
    assert_eq!(vcpu.execute(GuestOp::Read { gpa: GPA, size: 8 }), Exit::Done(1));
    convert(KVM_MEMORY_ATTRIBUTE_PRIVATE);
    assert_eq!(vcpu.execute(GuestOp::Read { gpa: GPA, size: 8 }), Exit::Done(0));
    assert_eq!(vcpu.execute(GuestOp::Write { gpa: GPA, size: 8, value: 2 }), Exit::Done(0));
    assert_eq!(memory.read_u64(0), Ok(1));
    convert(0);
    assert_eq!(vcpu.execute(GuestOp::Read { gpa: GPA, size: 8 }), Exit::Done(1));
    convert(KVM_MEMORY_ATTRIBUTE_PRIVATE);
    assert_eq!(vcpu.execute(GuestOp::Read { gpa: GPA, size: 8 }), Exit::Done(2));
    drop(gmem);
    let flags = KVM_MEMORY_EXIT_FLAG_PRIVATE;
    let fault = Exit::MemoryFault { errno: Errno::EFAULT, flags, gpa: GPA, size: PAGE_SIZE };
    assert_eq!(vcpu.execute(GuestOp::Read { gpa: GPA + 16, size: 8 }), fault);
}

#[test]
fn pages_are_mapped_ahead_of_the_guest() {
    let Some(machine) = machine(&[Facility::PreFault]) else { return };
    let vm = payload_vm(&machine, 1);
    let _memory = memory(&machine, &vm, 0, GPA, MIB);
    let mut vcpu = vcpu(&vm, 0);
    assert_eq!(vcpu.pre_fault(GPA, MIB, 0), PreFault { result: Ok(()), gpa: GPA + MIB, size: 0 });
    let unaligned = PreFault { result: Err(Errno::EINVAL), gpa: GPA + 1, size: MIB };
    assert_eq!(vcpu.pre_fault(GPA + 1, MIB, 0), unaligned);
    let outside = PreFault { result: Err(Errno::ENOENT), gpa: 2 * GPA, size: MIB };
    assert_eq!(vcpu.pre_fault(2 * GPA, MIB, 0), outside);
}
