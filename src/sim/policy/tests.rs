//! What each policy makes of one page that TDH.MEM.PAGE.REMOVE refuses to give up.

use crate::machine::{
    Errno, Exit, GuestMemfd, GuestOp, HostMemory, Machine, MemoryAttributes, MemoryRegion, PAGE_SIZE, Vcpu, Vm,
    VmConfig,
};
use crate::sim::SimMachine;
use crate::sim::host::{Flags, Holder};
use crate::sim::tdx_module::fault::{FaultRule, Filter, When};
use crate::sim::tdx_module::{AnyLeaf, Code, Leaf, Operand, Status, Switches};
use std::sync::Arc;

const GPA: u64 = 1 << 32;
const STUCK_PAGE: u64 = 1;

struct Td {
    vcpu: Box<dyn Vcpu>,
    file: Option<Arc<dyn GuestMemfd>>,
    vm: Arc<dyn Vm>,
    machine: SimMachine,
    stuck: u64,
}

/// A TD with 4 accepted pages, of which the second cannot be removed.
fn td(kernel: &str, policy: &str) -> Td {
    let spec = format!("sim:tdx,kernel={kernel},policy={policy}");
    let machine = SimMachine::open(&spec.parse().unwrap()).unwrap();
    let vm = machine.create_vm(VmConfig::Payload { vcpus: 1 }).unwrap();
    let mut vcpu = vm.create_vcpu(0).unwrap();
    let file = vm.create_guest_memfd(4 * PAGE_SIZE, 0).unwrap();
    vm.set_memory_region(&MemoryRegion::new(0, GPA, 4 * PAGE_SIZE).bound_to(&*file, 0)).unwrap();
    if kernel == "7.3" {
        vm.set_memory_attributes(&MemoryAttributes { address: GPA, size: 4 * PAGE_SIZE, attributes: 8, flags: 0 })
            .unwrap();
    }
    assert_eq!(vcpu.execute(GuestOp::Accept { gpa: GPA, len: 4 * PAGE_SIZE, level: 0 }), Exit::Done(0));
    machine.drain_lru().unwrap();
    let stuck = machine.page_account(&*file, STUCK_PAGE * PAGE_SIZE).unwrap().unwrap().frame;
    machine.with_world(|world| {
        let leaf = AnyLeaf::Seamcall(Leaf::MemPageRemove);
        let rule = FaultRule::new(leaf, Status::on(Code::OperandInvalid, Operand::RCX));
        let filter = Filter { gpa: Some(GPA + STUCK_PAGE * PAGE_SIZE), ..Filter::default() };
        world.tdx_host().module.faults_mut().add(rule.when(When::Always).filter(filter));
    });
    Td { vcpu, file: Some(file), vm, machine, stuck }
}

impl Td {
    fn file(&self) -> &dyn GuestMemfd {
        &**self.file.as_ref().unwrap()
    }

    fn is_free(&self, pfn: u64) -> bool {
        self.machine.with_world(|world| world.host.allocator.free_frames().any(|free| free == pfn))
    }

    fn is_dead(&self) -> bool {
        self.vm.capability(10) == Err(Errno::EIO)
    }
}

#[test]
fn a_punch_reports_the_failure_only_under_fail_unmap_and_frees_the_page_only_under_bug_vm() {
    for (policy, result, freed) in [
        ("bug-vm", Ok(()), true),
        ("pin-mapped", Ok(()), false),
        ("hold-on-error", Ok(()), false),
        ("gfn-count", Ok(()), false),
        ("poison", Ok(()), false),
        ("fail-unmap", Err(Errno::EFAULT), false),
    ] {
        let td = td("7.3", policy);
        assert_eq!(td.file().punch_hole(0, 4 * PAGE_SIZE), result, "{policy}");
        assert_eq!(td.is_dead(), result.is_ok(), "{policy}");
        assert_eq!(td.is_free(td.stuck), freed, "{policy}");
        let cached = td.file().cache_stat(0, 0).unwrap().cached;
        assert_eq!(cached, if result.is_ok() { 0 } else { 4 }, "{policy}: all or nothing is truncated");
        let owned = td.machine.with_world(|world| world.free_frames_owned_by_module());
        assert_eq!(owned, if freed { vec![td.stuck] } else { vec![] }, "{policy}");
        td.machine.with_world(|world| {
            let frames = &world.host.frames;
            let held = frames.held_by(td.stuck, Holder::StuckInModule) + frames.held_by(td.stuck, Holder::SeptPin);
            let expected = matches!(policy, "pin-mapped" | "hold-on-error" | "gfn-count");
            assert_eq!(held, u32::from(expected), "{policy}");
            assert_eq!(world.host.allocator.retired(), u64::from(policy == "poison"), "{policy}");
        });
    }
}

#[test]
fn under_fail_unmap_the_pages_before_the_stuck_one_are_gone_and_a_retry_can_succeed() {
    let mut td = td("7.3", "fail-unmap");
    assert_eq!(td.file().punch_hole(0, 4 * PAGE_SIZE), Err(Errno::EFAULT));
    assert_eq!(td.vm.statistic("pages_4k"), Ok(3), "one removed, one stuck, two not reached");
    td.machine.with_world(|world| world.tdx_host().module.faults_mut().clear());
    assert_eq!(td.file().punch_hole(0, 4 * PAGE_SIZE), Ok(()));
    assert_eq!(td.vm.statistic("pages_4k"), Ok(0));
    let accept = GuestOp::Accept { gpa: GPA, len: 4 * PAGE_SIZE, level: 0 };
    assert_eq!(td.vcpu.execute(accept), Exit::Done(0), "the VM lives");
}

#[test]
fn a_vm_ioctl_conversion_succeeds_unless_the_unmap_may_fail() {
    for policy in ["bug-vm", "hold-on-error", "gfn-count", "poison", "fail-unmap"] {
        let td = td("7.3", policy);
        let convert = MemoryAttributes { address: GPA, size: 4 * PAGE_SIZE, attributes: 0, flags: 0 };
        let expected = if policy == "fail-unmap" { Err(Errno::EFAULT) } else { Ok(()) };
        assert_eq!(td.vm.set_memory_attributes(&convert), expected, "{policy}");
        let private = td.machine.with_world(|world| {
            let vm = *world.vms.keys().next().unwrap();
            world.gfn_is_private(vm, GPA / PAGE_SIZE)
        });
        assert_eq!(private, expected.is_err(), "{policy}: a failed conversion stores nothing");
    }
}

#[test]
fn an_in_place_conversion_says_where_it_got_stuck() {
    for (policy, expected) in [
        ("bug-vm", Ok(())),
        ("poison", Ok(())),
        ("hold-on-error", Err(Errno::EFAULT)),
        ("gfn-count", Err(Errno::EFAULT)),
        ("fail-unmap", Err(Errno::EFAULT)),
    ] {
        let td = td("in-place", policy);
        let got = td.file().convert(0, 4 * PAGE_SIZE, 0);
        let expected = expected.map_err(|errno| (errno, Some(STUCK_PAGE * PAGE_SIZE)));
        assert_eq!(got.map_err(|error| (error.errno, error.offset)), expected, "{policy}");
        let poisoned = td.machine.with_world(|world| world.host.frames.flags(td.stuck).contains(Flags::HWPOISON));
        assert_eq!(poisoned, policy == "poison");
    }
}

#[test]
fn close_always_succeeds_and_leaks_the_tdr_with_the_stuck_page() {
    for (policy, freed) in [("bug-vm", true), ("pin-mapped", false), ("hold-on-error", false), ("fail-unmap", false)] {
        let mut td = td("7.3", policy);
        let stuck = td.stuck;
        td.file = None;
        let Td { vcpu, vm, machine, .. } = td;
        assert_eq!(vm.capability(10), Err(Errno::EIO), "{policy}");
        drop((vcpu, vm));
        machine.with_world(|world| {
            assert!(world.vms.is_empty());
            assert!(world.log.iter().any(|line| line.contains("TDR") && line.contains("leaked")), "{:?}", world.log);
            let free = world.host.allocator.free_frames().any(|pfn| pfn == stuck);
            assert_eq!(free, freed, "{policy}");
        });
    }
}

#[test]
fn the_next_owner_of_a_freed_stuck_page_is_bugged_too() {
    let td = td("7.3", "bug-vm");
    td.file().punch_hole(STUCK_PAGE * PAGE_SIZE, PAGE_SIZE).unwrap();
    let victim = td.machine.create_vm(VmConfig::Payload { vcpus: 1 });
    let reused = td.machine.with_world(|world| world.reused_while_owned.clone());
    assert_eq!(reused, vec![td.stuck], "the frame was handed out again, for a control page of the next TD");
    assert_eq!(victim.err(), Some(Errno::EIO), "the module does not take it: PAGE_METADATA_INCORRECT");
    assert!(td.machine.with_world(|world| world.log.iter().any(|line| line.contains("TDX_PAGE_METADATA_INCORRECT"))));
}

#[test]
fn only_who_counts_for_itself_survives_a_forgotten_notification() {
    for (policy, safe) in [("bug-vm", false), ("hold-on-error", false), ("poison", false), ("gfn-count", true)] {
        let spec = format!("sim:tdx,policy={policy},kvm-bug=forget-remove");
        let machine = SimMachine::open(&spec.parse().unwrap()).unwrap();
        let vm = machine.create_vm(VmConfig::Payload { vcpus: 1 }).unwrap();
        let mut vcpu = vm.create_vcpu(0).unwrap();
        let size = 2 << 20;
        let file = vm.create_guest_memfd(size, 0).unwrap();
        vm.set_memory_region(&MemoryRegion::new(0, GPA, size).bound_to(&*file, 0)).unwrap();
        vm.set_memory_attributes(&MemoryAttributes { address: GPA, size, attributes: 8, flags: 0 }).unwrap();
        assert_eq!(vcpu.execute(GuestOp::Accept { gpa: GPA, len: 4 * PAGE_SIZE, level: 0 }), Exit::Done(0));
        file.punch_hole(0, size).unwrap();
        machine.drain_lru().unwrap();
        let owned = machine.with_world(|world| world.free_frames_owned_by_module().len());
        assert_eq!(owned, if safe { 0 } else { 4 }, "{policy}");
    }
}

#[test]
fn a_transient_reference_is_a_false_alarm_only_where_references_mean_failure() {
    for (policy, expected) in [("bug-vm", Ok(())), ("gfn-count", Ok(())), ("hold-on-error", Err(Errno::EFAULT))] {
        let td = td("in-place", policy);
        td.machine.with_world(|world| {
            world.tdx_host().module.faults_mut().clear();
            world.host.frames.get_speculative(td.stuck, 1, 2);
        });
        assert_eq!(td.file().convert(0, 4 * PAGE_SIZE, 0).map_err(|error| error.errno), expected, "{policy}");
    }
}

#[test]
fn a_transient_reference_that_stays_is_eagain_on_the_way_to_private() {
    let td = td("in-place", "bug-vm");
    td.machine.with_world(|world| world.tdx_host().module.faults_mut().clear());
    td.file().convert(0, 4 * PAGE_SIZE, 0).unwrap();
    for (looks, expected) in [(1, Ok(())), (3, Err(Errno::EAGAIN))] {
        td.machine.with_world(|world| world.host.frames.get_speculative(td.stuck, looks, looks as u32));
        let result = td.file().convert(0, 4 * PAGE_SIZE, 8).map_err(|error| error.errno);
        assert_eq!(result, expected, "{looks} looks");
        td.file().convert(0, 4 * PAGE_SIZE, 0).unwrap();
    }
}

#[test]
fn the_next_owner_of_a_stuck_page_reads_zeroes_or_with_the_erratum_meets_a_machine_check() {
    for erratum in [false, true] {
        let td = td("7.3", "bug-vm");
        td.machine.with_world(|world| {
            let module = &mut world.tdx_host().module;
            let switches = Switches { partial_write_erratum: erratum, ..module.switches() };
            module.set_switches(switches);
        });
        td.file().punch_hole(0, 4 * PAGE_SIZE).unwrap();
        let memory = td.machine.host_memory(HostMemory::Anonymous, 4 * PAGE_SIZE).unwrap();
        let at = (0..4 * PAGE_SIZE).step_by(PAGE_SIZE as usize).find(|at| {
            let _ = memory.read_u64(*at);
            memory.frame(*at) == Ok(td.stuck)
        });
        let read = memory.read_u64(at.expect("the frame is handed out again"));
        assert_eq!(read.is_err(), erratum, "{read:?}");
        assert!(erratum || read == Ok(0));
    }
}
