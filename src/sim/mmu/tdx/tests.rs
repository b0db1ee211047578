//! A TD's life on the module: mapping, accepting, converting, punching, taking down, and the SEAMCALLs of each step.

use super::SHARED_BIT;
use crate::machine::{
    Errno, Exit, GuestMemfd, GuestOp, HostMemory, Machine, Mapping, MemoryAttributes, MemoryRegion, PAGE_SIZE, Reply,
    Vcpu, Vm, VmConfig,
};
use crate::sim::SimMachine;
use crate::sim::tdx_module::fault::{FaultRule, When};
use crate::sim::tdx_module::trace::LeafCount;
use crate::sim::tdx_module::{AnyLeaf, Code, Leaf, Operand, Status};
use crate::uapi::tdx_status::TdxStatus;
use std::sync::Arc;

const GPA: u64 = 1 << 32;
const PAGES: u64 = 4;

struct TdGuest {
    vcpu: Box<dyn Vcpu>,
    shared: Box<dyn Mapping>,
    file: Arc<dyn GuestMemfd>,
    vm: Arc<dyn Vm>,
    machine: SimMachine,
}

fn td(spec: &str) -> TdGuest {
    let machine = SimMachine::open(&spec.parse().unwrap()).unwrap();
    let vm = machine.create_vm(VmConfig::Payload { vcpus: 1 }).unwrap();
    let vcpu = vm.create_vcpu(0).unwrap();
    let file = vm.create_guest_memfd(PAGES * PAGE_SIZE, 0).unwrap();
    let shared = machine.host_memory(HostMemory::Anonymous, PAGES * PAGE_SIZE).unwrap();
    let region = MemoryRegion::new(0, GPA, PAGES * PAGE_SIZE).at(shared.addr()).bound_to(&*file, 0);
    vm.set_memory_region(&region).unwrap();
    TdGuest { vcpu, shared, file, vm, machine }
}

impl TdGuest {
    fn attributes(&self, page: u64, pages: u64, attributes: u64) -> Result<(), Errno> {
        let (address, size) = (GPA + page * PAGE_SIZE, pages * PAGE_SIZE);
        self.vm.set_memory_attributes(&MemoryAttributes { address, size, attributes, flags: 0 })
    }

    fn accept(&mut self, page: u64, pages: u64) -> Exit {
        self.vcpu.execute(GuestOp::Accept { gpa: GPA + page * PAGE_SIZE, len: pages * PAGE_SIZE, level: 0 })
    }

    fn ready(&mut self) {
        self.attributes(0, PAGES, 8).unwrap();
        assert_eq!(self.accept(0, PAGES), Exit::Done(0));
    }

    fn count(&self, leaf: Leaf) -> LeafCount {
        self.machine.with_world(|world| world.tdx_host().module.trace().count(AnyLeaf::Seamcall(leaf)))
    }

    fn inject(&self, leaf: Leaf, when: When, status: Status) {
        self.machine.with_world(|world| {
            let rule = FaultRule::new(AnyLeaf::Seamcall(leaf), status).when(when);
            world.tdx_host().module.faults_mut().add(rule);
        });
    }

    fn log(&self) -> Vec<String> {
        self.machine.with_world(|world| world.log.clone())
    }
}

fn busy() -> Status {
    Status::on(Code::OperandBusy, Operand::SEPT_TREE)
}

fn hard() -> Status {
    Status::on(Code::OperandInvalid, Operand::RCX)
}

#[test]
fn an_accepted_page_reads_zero_and_keeps_what_the_guest_writes() {
    let mut td = td("sim:tdx");
    td.shared.fill(0, PAGES * PAGE_SIZE, 0x55).unwrap();
    td.ready();
    assert_eq!(td.vcpu.execute(GuestOp::Check { gpa: GPA, len: PAGES * PAGE_SIZE, byte: 0 }), Exit::Done(0));
    assert_eq!(td.vcpu.execute(GuestOp::Fill { gpa: GPA, len: PAGES * PAGE_SIZE, byte: 7 }), Exit::Done(0));
    assert_eq!(td.vcpu.execute(GuestOp::Write { gpa: GPA + 3, size: 2, value: 0x1234 }), Exit::Done(0));
    assert_eq!(td.vcpu.execute(GuestOp::Read { gpa: GPA, size: 8 }), Exit::Done(0x0707_0712_3407_0707));
    assert_eq!(td.shared.find_mismatch(0, PAGES * PAGE_SIZE, 0x55), Ok(None), "private memory is elsewhere");
    assert_eq!(td.vm.statistic("pages_4k"), Ok(PAGES));
}

#[test]
fn the_attribute_and_the_shared_bit_must_agree() {
    let mut td = td("sim:tdx");
    let fault = |flags| Exit::MemoryFault { errno: Errno::EFAULT, flags, gpa: GPA, size: PAGE_SIZE };
    assert_eq!(td.vcpu.execute(GuestOp::Read { gpa: GPA, size: 8 }), fault(8));
    td.shared.write_u64(0, 99).unwrap();
    assert_eq!(td.vcpu.execute(GuestOp::Read { gpa: GPA | SHARED_BIT, size: 8 }), Exit::Done(99));
    td.attributes(0, PAGES, 8).unwrap();
    assert_eq!(td.vcpu.execute(GuestOp::Read { gpa: GPA | SHARED_BIT, size: 8 }), fault(0));
}

#[test]
fn an_access_before_accept_kills_the_vm() {
    let mut td = td("sim:tdx,pending=exit");
    td.attributes(0, PAGES, 8).unwrap();
    let exit = td.vcpu.execute(GuestOp::Read { gpa: GPA, size: 8 });
    assert_eq!(exit, Exit::Failed { errno: Errno::EIO, reason: 0 });
    assert_eq!(td.vm.capability(10), Err(Errno::EIO), "dead");
    assert_eq!(td.file.punch_hole(0, PAGE_SIZE), Ok(()), "the file does not care");
    assert!(!td.machine.with_world(|world| world.vms.values().any(|vm| vm.bugged)), "dead, not bugged");
}

#[test]
fn the_payload_accepts_what_it_meets_pending() {
    let mut td = td("sim:tdx");
    td.attributes(0, PAGES, 8).unwrap();
    assert_eq!(td.vcpu.execute(GuestOp::Fill { gpa: GPA, len: PAGES * PAGE_SIZE, byte: 3 }), Exit::Done(0));
    assert_eq!(td.vcpu.execute(GuestOp::Check { gpa: GPA, len: PAGES * PAGE_SIZE, byte: 3 }), Exit::Done(0));
}

#[test]
fn unmapping_a_page_takes_one_call_of_each_leaf() {
    let mut td = td("sim:tdx");
    td.ready();
    td.machine.with_world(|world| world.tdx_host().module.trace_mut().reset_counters());
    td.file.punch_hole(PAGE_SIZE, PAGE_SIZE).unwrap();
    let leaves = [Leaf::MemRangeBlock, Leaf::MemTrack, Leaf::MemPageRemove, Leaf::PhymemPageWbinvd];
    for leaf in leaves {
        assert_eq!(td.count(leaf).calls, 1, "{}", leaf.name());
    }
    assert_eq!(td.vm.statistic("pages_4k"), Ok(PAGES - 1));
    assert_eq!(td.accept(1, 1), Exit::Done(0), "a fresh page");
}

#[test]
fn a_conversion_round_trip_reaches_both_sides() {
    let mut td = td("sim:tdx");
    td.ready();
    td.vm.enable_capability(201, [0x1000, 0, 0, 0]).unwrap();
    td.vcpu.execute(GuestOp::Write { gpa: GPA, size: 8, value: 0x41 });
    let exit = td.vcpu.execute(GuestOp::MapGpa { gpa: GPA, pages: 1, attributes: 0 });
    assert_eq!(exit, Exit::Hypercall { nr: 12, args: [GPA, 1, 0, 0, 0, 0], flags: 1 });
    td.attributes(0, 1, 0).unwrap();
    assert_eq!(td.vcpu.resume(Reply::Hypercall(0)), Exit::Done(0));
    td.vcpu.execute(GuestOp::Write { gpa: GPA | SHARED_BIT, size: 8, value: 0x42 });
    assert_eq!(td.shared.read_u64(0), Ok(0x42));
    td.shared.write_u64(0, 0x43).unwrap();
    assert_eq!(td.vcpu.execute(GuestOp::Read { gpa: GPA | SHARED_BIT, size: 8 }), Exit::Done(0x43));
    td.attributes(0, 1, 8).unwrap();
    assert_eq!(td.accept(0, 1), Exit::Done(0));
    assert_eq!(td.vcpu.execute(GuestOp::Read { gpa: GPA, size: 8 }), Exit::Done(0), "lost on the way");
    let refused = td.vcpu.execute(GuestOp::MapGpa { gpa: GPA | 1, pages: 1, attributes: 0 });
    assert_eq!(refused, Exit::Done(1 << 63 | 2));
}

#[test]
fn a_hypercall_for_more_than_2_mib_comes_in_chunks() {
    let mut td = td("sim:tdx");
    td.vm.enable_capability(201, [0x1000, 0, 0, 0]).unwrap();
    let exit = td.vcpu.execute(GuestOp::MapGpa { gpa: GPA, pages: 600, attributes: 16 });
    assert_eq!(exit, Exit::Hypercall { nr: 12, args: [GPA, 512, 16, 0, 0, 0], flags: 1 });
    let exit = td.vcpu.resume(Reply::Hypercall(0));
    assert_eq!(exit, Exit::Hypercall { nr: 12, args: [GPA + (2 << 20), 88, 16, 0, 0, 0], flags: 1 });
    assert_eq!(td.vcpu.resume(Reply::Hypercall(11)), Exit::Done(1), "EAGAIN is RETRY to the guest");
}

#[test]
fn busy_once_is_retried_and_busy_twice_is_a_bug() {
    for leaf in [Leaf::MemRangeBlock, Leaf::MemTrack, Leaf::MemPageRemove] {
        let mut once = td("sim:tdx");
        once.ready();
        once.inject(leaf, When::Nth(1), busy());
        assert_eq!(once.file.punch_hole(0, PAGE_SIZE), Ok(()));
        assert_eq!(once.vm.statistic("pages_4k"), Ok(PAGES - 1), "{}", leaf.name());
        assert!(once.log().is_empty());

        let mut twice = td("sim:tdx");
        twice.ready();
        twice.inject(leaf, When::First(2), busy());
        assert_eq!(twice.file.punch_hole(0, PAGE_SIZE), Ok(()), "the punch says nothing");
        assert_eq!(twice.vm.statistic("pages_4k"), Err(Errno::EIO), "{}", leaf.name());
        assert_eq!(twice.log().len(), 1);
    }
}

#[test]
fn a_busy_map_is_tried_again_and_a_failed_one_is_a_bug() {
    let mut td = td("sim:tdx");
    td.inject(Leaf::MemPageAug, When::First(3), busy());
    td.inject(Leaf::MemSeptAdd, When::First(3), busy());
    td.ready();
    td.inject(Leaf::MemPageAug, When::Nth(1), hard());
    td.file.punch_hole(0, PAGE_SIZE).unwrap();
    assert_eq!(td.accept(0, 1), Exit::Failed { errno: Errno::EIO, reason: 0 });
    assert_eq!(td.vm.statistic("pages_4k"), Err(Errno::EIO));
}

#[test]
fn everything_is_given_back_when_the_last_descriptor_goes() {
    let mut td = td("sim:tdx");
    td.ready();
    let TdGuest { vcpu, shared, file, vm, machine } = td;
    drop(vm);
    drop(shared);
    drop(vcpu);
    assert_eq!(machine.with_world(|world| world.vms.len()), 1, "the file keeps the VM");
    drop(file);
    machine.drain_lru().unwrap();
    machine.with_world(|world| {
        assert!(world.vms.is_empty());
        assert_eq!(world.host.pages_in_use(), 0, "{:?}", world.log);
        assert_eq!(world.tdx_host().module.tds().count(), 0);
        assert_eq!(world.tdx_host().module.check(), vec![]);
        assert!(world.log.is_empty(), "{:?}", world.log);
    });
}

#[test]
fn pre_fault_maps_pending_pages_that_the_guest_still_accepts() {
    let mut td = td("sim:tdx");
    td.attributes(0, PAGES, 8).unwrap();
    let done = td.vcpu.pre_fault(GPA, PAGES * PAGE_SIZE, 0);
    assert_eq!((done.result, done.size), (Ok(()), 0));
    assert_eq!(td.vm.statistic("pages_4k"), Ok(PAGES));
    assert_eq!(td.vcpu.pre_fault(GPA | SHARED_BIT, PAGE_SIZE, 0).result, Err(Errno::EINVAL));
    assert_eq!(td.accept(0, PAGES), Exit::Done(0));
    assert!(matches!(td.accept(0, 1), Exit::Done(status) if status != 0), "accepted already");
}

#[test]
fn a_running_vcpu_is_kicked_out_for_a_zap() {
    let mut td = td("sim:tdx");
    td.ready();
    let control = td.vcpu.control();
    let mut vcpu = td.vcpu;
    let runner = std::thread::spawn(move || vcpu.execute(GuestOp::ReadWhile { gpa: GPA, expect: 0 }));
    while control.iterations() < 3 {
        std::thread::yield_now();
    }
    for _ in 0..20 {
        td.file.punch_hole(PAGE_SIZE, 3 * PAGE_SIZE).unwrap();
        assert_eq!(td.vm.statistic("pages_4k"), Ok(1));
    }
    control.stop();
    assert_eq!(runner.join().unwrap(), Exit::Done(0));
    assert_eq!(td.machine.with_world(|world| world.tdx_host().module.check()), vec![]);
}

#[test]
fn statuses_are_called_by_the_names_that_the_module_has_for_them() {
    let mut named = 0;
    for &code in Code::ALL {
        if let Some(name) = TdxStatus(Status::from(code).0).name() {
            assert_eq!(format!("TDX_{name}"), code.name());
            named += 1;
        }
    }
    assert!(named > 30, "{named} of {} codes", Code::ALL.len());
}

/// Surprise 39 of the notes on 7.3: read from the source, run by nobody.
#[test]
fn a_punch_of_a_mappable_file_leaves_the_shared_mappings_of_a_td_until_7_4() {
    for (kernel, stale) in [("6.18", true), ("7.3", true), ("in-place", false)] {
        let machine = SimMachine::open(&format!("sim:tdx,kernel={kernel}").parse().unwrap()).unwrap();
        let vm = machine.create_vm(VmConfig::Payload { vcpus: 1 }).unwrap();
        let mut vcpu = vm.create_vcpu(0).unwrap();
        let file = vm.create_guest_memfd(PAGES * PAGE_SIZE, 1).unwrap();
        vm.set_memory_region(&MemoryRegion::new(0, GPA, PAGES * PAGE_SIZE).bound_to(&*file, 0)).unwrap();
        if kernel == "in-place" {
            file.convert(0, PAGES * PAGE_SIZE, 0).unwrap();
        }
        let write = GuestOp::Write { gpa: GPA | SHARED_BIT, size: 8, value: 0x1234 };
        assert_eq!(vcpu.execute(write), Exit::Done(0), "{kernel}: shared accesses use the file");
        let frame = machine.page_account(&*file, 0).unwrap().unwrap().frame;
        file.punch_hole(0, PAGE_SIZE).unwrap();
        machine.drain_lru().unwrap();
        assert_eq!(vm.statistic("pages_4k"), Ok(u64::from(stale)), "{kernel}");
        machine.with_world(|world| {
            assert!(world.host.allocator.free_frames().any(|free| free == frame), "{kernel}: the page is free");
        });
        let read = GuestOp::Read { gpa: GPA | SHARED_BIT, size: 8 };
        let seen = if stale { 0x1234 } else { 0 };
        assert_eq!(
            vcpu.execute(read),
            Exit::Done(seen),
            "{kernel}: whoever has the frame next shares it with the guest"
        );
    }
}
