//! The tables of memslots, attributes, faults and pre-fault, row by row.

use crate::machine::{
    Errno, Exit, GuestMemfd, GuestOp, HostMemory, Machine, MemoryAttributes, MemoryRegion, PAGE_SIZE, Protection,
    RegionFile, Reply, Vcpu, Vm, VmConfig,
};
use crate::sim::SimMachine;
use std::sync::Arc;

const GPA: u64 = 1 << 32;

fn machine(spec: &str) -> SimMachine {
    SimMachine::open(&spec.parse().unwrap()).unwrap()
}

struct Guest {
    machine: SimMachine,
    vm: Arc<dyn Vm>,
    vcpu: Box<dyn Vcpu>,
}

fn guest(spec: &str) -> Guest {
    let machine = machine(spec);
    let vm = machine.create_vm(VmConfig::Payload { vcpus: 1 }).unwrap();
    let vcpu = vm.create_vcpu(0).unwrap();
    Guest { machine, vm, vcpu }
}

fn set(vm: &Arc<dyn Vm>, address: u64, size: u64, attributes: u64) -> Result<(), Errno> {
    vm.set_memory_attributes(&MemoryAttributes { address, size, attributes, flags: 0 })
}

fn gmem_slot(
    vm: &Arc<dyn Vm>,
    slot: u32,
    gpa: u64,
    size: u64,
    file: &dyn GuestMemfd,
    offset: u64,
) -> Result<(), Errno> {
    vm.set_memory_region(&MemoryRegion::new(slot, gpa, size).bound_to(file, offset))
}

#[test]
fn the_first_check_that_fails_gives_the_errno() {
    let machine = machine("sim:sw-protected");
    let vm = machine.create_vm(VmConfig::Bare).unwrap();
    let other = machine.create_vm(VmConfig::Bare).unwrap();
    let file = vm.create_guest_memfd(4 * PAGE_SIZE, 0).unwrap();
    let foreign = other.create_guest_memfd(4 * PAGE_SIZE, 0).unwrap();
    gmem_slot(&vm, 0, GPA, 2 * PAGE_SIZE, &*file, 0).unwrap();
    let new = |slot, gpa, size| MemoryRegion::new(slot, gpa, size);
    let far = GPA << 1;
    for (name, region, expected) in [
        ("id", new(32764, GPA, 4096), Errno::EINVAL),
        ("dirty log of a gmem slot", new(1, far, 4096).bound_to(&*file, 8192).with_flags(1), Errno::EINVAL),
        ("read-only gmem slot", new(1, far, 4096).bound_to(&*file, 8192).with_flags(2), Errno::EINVAL),
        ("unknown flag", new(1, far, 4096).with_flags(8), Errno::EINVAL),
        ("size", new(1, far, 4095), Errno::EINVAL),
        ("gpa", new(1, far + 1, 4096), Errno::EINVAL),
        ("hva", new(1, far, 4096).at(1), Errno::EINVAL),
        ("hva above user space", new(1, far, 4096).at(0x7fff_ffff_f000), Errno::EINVAL),
        ("offset", new(1, far, 4096).bound_to(&*file, 1), Errno::EINVAL),
        ("offset wraps", new(1, far, 4096).bound_to(&*file, u64::MAX - 4095), Errno::EINVAL),
        ("address space", new(1 << 16, far, 4096), Errno::EINVAL),
        ("pages", new(1, far, 1 << 43), Errno::EINVAL),
        ("deletion of nothing", MemoryRegion::deletion(1), Errno::EINVAL),
        ("a gmem slot again", new(0, GPA, 8192).bound_to(&*file, 0), Errno::EINVAL),
        ("a gmem slot moved", new(0, far, 8192), Errno::EINVAL),
        ("overlap before bad fd", new(1, GPA, 4096).naming(RegionFile::NotOpen, 0), Errno::EEXIST),
        ("bad fd", new(1, far, 4096).naming(RegionFile::NotOpen, 0), Errno::EBADF),
        ("other file", new(1, far, 4096).naming(RegionFile::Memfd, 0), Errno::EINVAL),
        ("other VM's", new(1, far, 4096).bound_to(&*foreign, 0), Errno::EINVAL),
        ("beyond the end", new(1, far, 8192).bound_to(&*file, 3 * 4096), Errno::EINVAL),
        ("beyond MAXPHYADDR", new(1, 1 << 48, 4096).bound_to(&*file, 8192), Errno::EINVAL),
        ("bad fd before MAXPHYADDR", new(1, 1 << 48, 4096).naming(RegionFile::NotOpen, 0), Errno::EBADF),
        ("bound already", new(1, far, 4096).bound_to(&*file, 4096), Errno::EEXIST),
        ("largest offset", new(1, far, 4096).bound_to(&*file, (1 << 63) - 4096), Errno::EINVAL),
    ] {
        assert_eq!(vm.set_memory_region(&region), Err(expected), "{name}");
    }
    assert_eq!(vm.set_memory_region(&new(1, far, 8192).bound_to(&*file, 8192)), Ok(()));
    assert_eq!(vm.set_memory_region(&MemoryRegion::deletion(0)), Ok(()));
    assert_eq!(gmem_slot(&vm, 3, GPA, 2 * PAGE_SIZE, &*file, 0), Ok(()), "the binding went with the slot");
}

#[test]
fn older_kernels_differ_where_they_are_known_to() {
    let bind = |spec: &str, offset| {
        let vm = machine(spec).create_vm(VmConfig::Bare).unwrap();
        let file = vm.create_guest_memfd(4 * PAGE_SIZE, 0).unwrap();
        gmem_slot(&vm, 0, GPA, PAGE_SIZE, &*file, 0)?;
        gmem_slot(&vm, 1, 2 * GPA, PAGE_SIZE, &*file, offset)
    };
    assert_eq!(bind("sim:default,kernel=6.18", (1 << 63) - 4096), Ok(()), "the signed comparison of 6.18");
    assert_eq!(bind("sim:default,kernel=7.3", (1 << 63) - 4096), Err(Errno::EINVAL));
    assert_eq!(bind("sim:default,kernel=6.18", 0), Err(Errno::EINVAL));
    assert_eq!(bind("sim:default,kernel=7.3", 0), Err(Errno::EEXIST));
    assert_eq!(bind("sim:default,kernel=6.12", 4096), Err(Errno::EINVAL), "no guest_memfd slots on default VMs");
    assert_eq!(bind("sim:sw-protected,kernel=6.12", 4096), Ok(()));
}

#[test]
fn attributes_check_in_the_order_of_the_kernel() {
    let vm = machine("sim:sw-protected").create_vm(VmConfig::Bare).unwrap();
    for (address, size, attributes, flags, expected) in [
        (0, 0, 1, 1, Err(Errno::EINVAL)),
        (0, 4096, 1, 0, Err(Errno::EINVAL)),
        (0, 0, 8, 0, Err(Errno::EINVAL)),
        (u64::MAX - 4095, 4096, 8, 0, Err(Errno::EINVAL)),
        (1, 4096, 8, 0, Err(Errno::EINVAL)),
        (0, 4095, 8, 0, Err(Errno::EINVAL)),
        (0, 4096, 8, 0, Ok(())),
        (1 << 60, 4096, 8, 0, Ok(())),
    ] {
        let got = vm.set_memory_attributes(&MemoryAttributes { address, size, attributes, flags });
        assert_eq!(got, expected, "{address:#x} {size:#x} {attributes} {flags}");
    }
    let default = machine("sim:default").create_vm(VmConfig::Bare).unwrap();
    assert_eq!(set(&default, 0, 4096, 8), Err(Errno::EINVAL));
    assert_eq!(set(&default, 0, 4096, 0), Ok(()));
}

#[test]
fn a_conversion_changes_the_side_and_frees_nothing() {
    let Guest { machine, vm, mut vcpu } = guest("sim:sw-protected");
    let file = vm.create_guest_memfd(4 * PAGE_SIZE, 0).unwrap();
    let shared = machine.host_memory(HostMemory::Anonymous, 4 * PAGE_SIZE).unwrap();
    vm.set_memory_region(&MemoryRegion::new(0, GPA, 4 * PAGE_SIZE).at(shared.addr()).bound_to(&*file, 0)).unwrap();
    shared.fill(0, 4 * PAGE_SIZE, 1).unwrap();
    set(&vm, GPA + PAGE_SIZE, PAGE_SIZE, 8).unwrap();
    let fill = GuestOp::Fill { gpa: GPA, len: 4 * PAGE_SIZE, byte: 2 };
    assert_eq!(vcpu.execute(fill), Exit::Done(0));
    assert_eq!(shared.find_mismatch(PAGE_SIZE, PAGE_SIZE, 1), Ok(None), "the private page is elsewhere");
    assert_eq!(shared.find_mismatch(0, PAGE_SIZE, 2), Ok(None));
    assert_eq!(vm.statistic("pages_4k"), Ok(4));
    set(&vm, GPA, 4 * PAGE_SIZE, 0).unwrap();
    assert_eq!(vcpu.execute(GuestOp::Read { gpa: GPA + PAGE_SIZE, size: 1 }), Exit::Done(1));
    assert_eq!(file.cache_stat(0, 0).unwrap().cached, 1);
    set(&vm, GPA, 4 * PAGE_SIZE, 8).unwrap();
    assert_eq!(vcpu.execute(GuestOp::Read { gpa: GPA + PAGE_SIZE, size: 1 }), Exit::Done(2));
    file.punch_hole(0, 4 * PAGE_SIZE).unwrap();
    assert_eq!(vcpu.execute(GuestOp::Check { gpa: GPA, len: 4 * PAGE_SIZE, byte: 0 }), Exit::Done(0));
}

#[test]
fn memory_fault_exits_follow_the_table() {
    let Guest { machine, vm, mut vcpu } = guest("sim:sw-protected");
    let fault = |gpa: u64| Exit::MemoryFault { errno: Errno::EFAULT, flags: 8, gpa, size: PAGE_SIZE };
    let shared = machine.host_memory(HostMemory::Anonymous, 2 * PAGE_SIZE).unwrap();
    let read = |gpa| GuestOp::Read { gpa, size: 8 };
    set(&vm, GPA, 1 << 30, 8).unwrap();
    assert_eq!(vcpu.execute(read(GPA + 8)), fault(GPA), "no slot");
    vm.set_memory_region(&MemoryRegion::new(0, GPA, 2 * PAGE_SIZE).at(shared.addr())).unwrap();
    assert_eq!(vcpu.execute(read(GPA)), fault(GPA), "a slot without guest_memfd");
    vm.set_memory_region(&MemoryRegion::deletion(0)).unwrap();
    let file = vm.create_guest_memfd(2 * PAGE_SIZE, 0).unwrap();
    gmem_slot(&vm, 0, GPA, 2 * PAGE_SIZE, &*file, 0).unwrap();
    assert_eq!(vcpu.execute(read(GPA)), Exit::Done(0));
    drop(file);
    assert_eq!(vcpu.execute(read(GPA + PAGE_SIZE + 16)), fault(GPA + PAGE_SIZE), "the file is closed");
    set(&vm, GPA, 1 << 30, 0).unwrap();
    let failed = Exit::Failed { errno: Errno::EFAULT, reason: 0 };
    assert_eq!(vcpu.execute(read(GPA)), failed, "nothing at userspace_addr 0: no memory fault exit");
}

#[test]
fn a_shared_file_serves_the_guest_of_a_default_vm() {
    let Guest { vm, mut vcpu, .. } = guest("sim:default");
    let file = vm.create_guest_memfd(PAGE_SIZE, 3).unwrap();
    gmem_slot(&vm, 1, GPA, PAGE_SIZE, &*file, 0).unwrap();
    let map = file.map(PAGE_SIZE, 0, Protection::SHARED_RW).unwrap();
    map.fill(0, PAGE_SIZE, 0xaa).unwrap();
    assert_eq!(vcpu.execute(GuestOp::Check { gpa: GPA, len: PAGE_SIZE, byte: 0xaa }), Exit::Done(0));
    assert_eq!(vcpu.execute(GuestOp::Fill { gpa: GPA, len: PAGE_SIZE, byte: 0xff }), Exit::Done(0));
    assert_eq!(map.find_mismatch(0, PAGE_SIZE, 0xff), Ok(None));
    map.write(0, &[0xb8, 42, 0, 0, 0, 0xc3]).unwrap();
    assert_eq!(vcpu.execute(GuestOp::Execute { gpa: GPA }), Exit::Done(42));
    let frame = map.frame(0).unwrap();
    assert_eq!(map.advise(0, PAGE_SIZE, libc::MADV_HWPOISON), Err(Errno::EBUSY));
    let read = GuestOp::Read { gpa: GPA, size: 8 };
    let poisoned = Exit::MemoryFault { errno: Errno::EHWPOISON, flags: 0, gpa: GPA, size: PAGE_SIZE };
    assert_eq!(vcpu.execute(read), poisoned);
    file.punch_hole(0, PAGE_SIZE).unwrap();
    assert_eq!(vcpu.execute(read), Exit::Done(0));
    map.advise(0, PAGE_SIZE, libc::MADV_DONTNEED).unwrap();
    map.read_u64(0).unwrap();
    assert_ne!(map.frame(0).unwrap(), frame, "the poisoned frame is not handed out again");
}

#[test]
fn pre_fault_reports_progress_and_then_the_error() {
    let Guest { machine, vm, mut vcpu } = guest("sim:default");
    let shared = machine.host_memory(HostMemory::Anonymous, 4 * PAGE_SIZE).unwrap();
    vm.set_memory_region(&MemoryRegion::new(0, GPA, 4 * PAGE_SIZE).at(shared.addr())).unwrap();
    let call = |vcpu: &mut Box<dyn Vcpu>, gpa, size, flags| {
        let done = vcpu.pre_fault(gpa, size, flags);
        (done.result, done.gpa, done.size)
    };
    assert_eq!(call(&mut vcpu, GPA, PAGE_SIZE, 1).0, Err(Errno::EINVAL));
    assert_eq!(call(&mut vcpu, GPA, 0, 0).0, Err(Errno::EINVAL));
    assert_eq!(call(&mut vcpu, GPA + 1, PAGE_SIZE, 0).0, Err(Errno::EINVAL));
    let end = GPA + 4 * PAGE_SIZE;
    assert_eq!(call(&mut vcpu, GPA, 5 * PAGE_SIZE, 0), (Ok(()), end, PAGE_SIZE));
    assert_eq!(call(&mut vcpu, end, PAGE_SIZE, 0), (Err(Errno::ENOENT), end, PAGE_SIZE));
    assert_eq!(vm.statistic("pages_4k"), Ok(4));
    assert_eq!(vcpu.statistic("pf_fixed"), Ok(0), "a pre-fault is not counted as fixed");
}

#[test]
fn mmio_is_what_has_no_slot() {
    let Guest { vm: _vm, mut vcpu, .. } = guest("sim:default");
    let exit = vcpu.execute(GuestOp::Read { gpa: GPA + 4, size: 4 });
    assert_eq!(exit, Exit::Mmio { gpa: GPA + 4, len: 4, write: None });
    assert_eq!(vcpu.resume(Reply::MmioRead(0x1_2345_6789)), Exit::Done(0x2345_6789));
    let exit = vcpu.execute(GuestOp::Write { gpa: GPA, size: 2, value: 0x12345 });
    assert_eq!(exit, Exit::Mmio { gpa: GPA, len: 2, write: Some(0x2345) });
    assert_eq!(vcpu.resume(Reply::None), Exit::Done(0));
}

#[test]
fn deleting_a_slot_zaps_it_or_everything() {
    for (spec, quirk_off, left) in [("sim:default", false, 0), ("sim:default", true, 1), ("sim:sw-protected", false, 1)]
    {
        let Guest { machine, vm, mut vcpu } = guest(spec);
        if quirk_off {
            vm.enable_capability(213, [0x80, 0, 0, 0]).unwrap();
        }
        let shared = machine.host_memory(HostMemory::Anonymous, 2 * PAGE_SIZE).unwrap();
        for slot in 0..2 {
            let gpa = GPA + u64::from(slot) * PAGE_SIZE;
            let hva = shared.addr() + u64::from(slot) * PAGE_SIZE;
            vm.set_memory_region(&MemoryRegion::new(slot, gpa, PAGE_SIZE).at(hva)).unwrap();
        }
        assert_eq!(vcpu.execute(GuestOp::Touch { gpa: GPA, len: 2 * PAGE_SIZE }), Exit::Done(2));
        vm.set_memory_region(&MemoryRegion::deletion(0)).unwrap();
        assert_eq!(vm.statistic("pages_4k"), Ok(left), "{spec}, quirk off: {quirk_off}");
    }
}

#[test]
fn shared_huge_pages_are_mapped_huge_until_attributes_are_mixed() {
    let Guest { machine, vm, mut vcpu } = guest("sim:sw-protected");
    let size = 4 << 20;
    let shared = machine.host_memory(HostMemory::TransparentHuge, size).unwrap();
    let file = vm.create_guest_memfd(size, 0).unwrap();
    vm.set_memory_region(&MemoryRegion::new(0, GPA, size).at(shared.addr()).bound_to(&*file, 0)).unwrap();
    let touch = GuestOp::Touch { gpa: GPA, len: size };
    assert_eq!(vcpu.execute(touch), Exit::Done(1024));
    assert_eq!((vm.statistic("pages_2m"), vm.statistic("pages_4k")), (Ok(2), Ok(0)));
    set(&vm, GPA, PAGE_SIZE, 8).unwrap();
    assert_eq!(vm.statistic("pages_2m"), Ok(1), "the conversion zapped the huge entry it is in");
    assert_eq!(vcpu.execute(touch), Exit::Done(1024));
    assert_eq!((vm.statistic("pages_2m"), vm.statistic("pages_4k")), (Ok(1), Ok(512)));
}

#[test]
fn the_dirty_log_has_what_the_guest_wrote_since_the_last_look() {
    let Guest { machine, vm, mut vcpu } = guest("sim:default");
    let shared = machine.host_memory(HostMemory::Anonymous, 4 * PAGE_SIZE).unwrap();
    let region = MemoryRegion::new(0, GPA, 4 * PAGE_SIZE).at(shared.addr());
    vm.set_memory_region(&region).unwrap();
    assert_eq!(vm.dirty_log(0, 4), Err(Errno::ENOENT));
    vm.set_memory_region(&region.with_flags(1)).unwrap();
    assert_eq!(vcpu.execute(GuestOp::Write { gpa: GPA + 2 * PAGE_SIZE, size: 1, value: 1 }), Exit::Done(0));
    assert_eq!(vm.dirty_log(0, 4), Ok(vec![4]));
    assert_eq!(vm.dirty_log(0, 4), Ok(vec![0]));
}

#[test]
fn a_loop_ends_when_another_thread_stops_it() {
    let Guest { machine, vm, mut vcpu } = guest("sim:default");
    let shared = machine.host_memory(HostMemory::Anonymous, PAGE_SIZE).unwrap();
    vm.set_memory_region(&MemoryRegion::new(0, GPA, PAGE_SIZE).at(shared.addr())).unwrap();
    let control = vcpu.control();
    let runner = std::thread::spawn(move || vcpu.execute(GuestOp::ReadWhile { gpa: GPA, expect: 0 }));
    while control.iterations() < 3 {
        std::thread::yield_now();
    }
    shared.write_u64(0, 5).unwrap();
    assert_eq!(runner.join().unwrap(), Exit::Done(5));
}

#[test]
fn map_gpa_exits_only_when_it_was_enabled() {
    let Guest { vm, mut vcpu, .. } = guest("sim:default");
    let call = |gpa, pages| GuestOp::MapGpa { gpa, pages, attributes: 0x7f };
    assert_eq!(vcpu.execute(call(GPA, 1)), Exit::Done(-1000_i64 as u64));
    vm.enable_capability(201, [0x1000, 0, 0, 0]).unwrap();
    assert_eq!(vcpu.execute(call(GPA, 0)), Exit::Done(-22_i64 as u64));
    assert_eq!(vcpu.execute(call(GPA + 1, 1)), Exit::Done(-22_i64 as u64));
    let Exit::Hypercall { nr: 12, args, flags: 1 } = vcpu.execute(call(GPA, 3)) else { panic!("no exit") };
    assert_eq!(args[..3], [GPA, 3, 0x7f]);
    assert_eq!(vcpu.resume(Reply::Hypercall(11)), Exit::Done(11));
}
