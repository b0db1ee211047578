//! The named races, each with its one outcome, and the defects that only they show.

use super::{Actor, Event, Lock, Progress, RaceDefect, Schedule, SchedulePoint, Turn, turns};
use crate::machine::{
    Exit, GuestMemfd, GuestOp, Machine, MemoryAttributes, MemoryRegion, PAGE_SIZE, Vcpu, Vm, VmConfig,
};
use crate::sim::gmem::fault::Access;
use crate::sim::gmem::{FileId, InodeId};
use crate::sim::mmu::VmId;
use crate::sim::mmu::fault::{Fault, Origin, Request};
use crate::sim::mmu::tdx::run::Instruction;
use crate::sim::{SimMachine, World};
use std::sync::Arc;

const GPA: u64 = 1 << 32;
const GFN: u64 = GPA / PAGE_SIZE;
const PAGES: u64 = 4;
const PUNCH: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;

/// A VM of 4 private pages, none of them allocated.
struct Setup {
    vcpu: Box<dyn Vcpu>,
    _file: Arc<dyn GuestMemfd>,
    vm: Arc<dyn Vm>,
    machine: SimMachine,
    ids: Ids,
}

#[derive(Clone, Copy)]
struct Ids {
    vm: VmId,
    file: FileId,
    inode: InodeId,
}

fn setup(spec: &str) -> Setup {
    let machine = SimMachine::open(&spec.parse().unwrap()).unwrap();
    let vm = machine.create_vm(VmConfig::Payload { vcpus: 1 }).unwrap();
    let vcpu = vm.create_vcpu(0).unwrap();
    let file = vm.create_guest_memfd(PAGES * PAGE_SIZE, 0).unwrap();
    vm.set_memory_region(&MemoryRegion::new(0, GPA, PAGES * PAGE_SIZE).bound_to(&*file, 0)).unwrap();
    vm.set_memory_attributes(&attributes(8)).unwrap();
    let ids = machine.with_world(|world| Ids {
        vm: *world.vms.keys().next().unwrap(),
        file: file.handle(),
        inode: world.gmem.files[&file.handle()].inode,
    });
    Setup { vcpu, _file: file, vm, machine, ids }
}

fn attributes(attributes: u64) -> MemoryAttributes {
    MemoryAttributes { address: GPA, size: PAGES * PAGE_SIZE, attributes, flags: 0 }
}

/// One private store of a guest without S-EPT, tried again while the fault is.
fn store(world: &mut World, vm: VmId) -> Progress {
    let private = world.gfn_is_private(vm, GFN);
    let request = Request { gfn: GFN, private, access: Access::Write, origin: Origin::Guest };
    match world.handle_fault(vm, request) {
        Err(Fault::Retry) => Progress::Again,
        _ => Progress::Done,
    }
}

fn punch(world: &mut World, ids: Ids) -> Progress {
    world.gmem_fallocate(ids.file, PUNCH, 0, (PAGES * PAGE_SIZE) as i64).unwrap();
    Progress::Done
}

/// Whether the guest maps a page that is not the file's.
fn maps_a_stranger(world: &World, ids: Ids) -> bool {
    let mapped = world.vms[&ids.vm].direct.get(GFN).map(|(_, spte)| spte.pfn);
    mapped.is_some() && mapped != world.gmem_lookup(ids.inode, 0)
}

fn fault_against_punch(schedule: Schedule, defect: Option<RaceDefect>) -> (Vec<Event>, bool) {
    let setup = setup("sim:sw-protected");
    let ids = setup.ids;
    setup.machine.with_world(|world| {
        world.scheduler.defect = defect;
        let guest = Actor::new("vcpu").step("store", &[], move |world| store(world, ids.vm));
        let host = Actor::new("host").step("punch", &[Lock::Invalidate(ids.inode)], move |world| punch(world, ids));
        let events = world.run_actors(schedule, vec![guest, host]);
        (events, maps_a_stranger(world, ids))
    })
}

fn at(point: SchedulePoint, visit: u32, actor: &'static str) -> Turn {
    Turn { point, visit, actor }
}

#[test]
fn a_fault_is_tried_again_when_its_page_was_punched_after_the_lookup() {
    let schedule = Schedule::Explicit(vec![at(SchedulePoint::FaultLookedUp, 1, "host")]);
    let (events, strange) = fault_against_punch(schedule.clone(), None);
    let told: Vec<String> = events.iter().map(ToString::to_string).collect();
    assert_eq!(told, ["vcpu: store, again", "at fault-looked-up 1, host: punch", "vcpu: store"]);
    assert!(!strange);
    let defect = Some(RaceDefect::FaultIgnoresInvalidation);
    assert!(fault_against_punch(schedule, defect).1, "the frame went back to the allocator and is mapped");
    let one_by_one = Schedule::Explicit(Vec::new());
    assert!(!fault_against_punch(one_by_one, defect).1, "without the race nothing shows");
}

#[test]
fn some_seed_finds_the_race_and_its_turns_keep_it() {
    let defect = Some(RaceDefect::FaultIgnoresInvalidation);
    let mut found = None;
    for seed in 0..64 {
        assert!(!fault_against_punch(Schedule::Seeded(seed), None).1, "seed {seed}");
        let (events, strange) = fault_against_punch(Schedule::Seeded(seed), defect);
        let again = fault_against_punch(Schedule::Seeded(seed), defect);
        assert_eq!((&events, strange), (&again.0, again.1), "seed {seed} does the same twice");
        if strange {
            found = Some(events);
        }
    }
    let kept = turns(&found.expect("one of 64 seeds finds it"));
    assert_eq!(kept, [at(SchedulePoint::FaultLookedUp, 1, "host")]);
    assert!(fault_against_punch(Schedule::Explicit(kept), defect).1);
}

#[test]
fn a_fault_between_unmap_and_store_of_a_conversion_waits_for_the_attribute() {
    let run = |defect| {
        let setup = setup("sim:sw-protected");
        let ids = setup.ids;
        setup.machine.with_world(|world| {
            world.scheduler.defect = defect;
            let host = Actor::new("host").step("convert", &[Lock::Slots(ids.vm)], move |world| {
                world.set_attributes(ids.vm, &attributes(0)).unwrap();
                Progress::Done
            });
            let guest = Actor::new("vcpu").step("store", &[], move |world| store(world, ids.vm));
            let turn = at(SchedulePoint::ConversionUnmapped, 1, "vcpu");
            let events = world.run_actors(Schedule::Explicit(vec![turn]), vec![host, guest]);
            let private_page = world.gmem_lookup(ids.inode, 0);
            let mapped = world.vms[&ids.vm].direct.get(GFN).map(|(_, spte)| spte.pfn);
            (events, mapped.is_some() && mapped == private_page, world.gfn_is_private(ids.vm, GFN))
        })
    };
    let (events, maps_private, private) = run(None);
    let told: Vec<String> = events.iter().map(ToString::to_string).collect();
    assert_eq!(told, ["host: convert", "at conversion-unmapped 1, vcpu: store, again", "vcpu: store"]);
    assert_eq!((maps_private, private), (false, false));
    let (_, maps_private, private) = run(Some(RaceDefect::FaultIgnoresInvalidation));
    assert_eq!((maps_private, private), (true, false), "the guest's shared gfn maps the private page");
}

/// One instruction of a TD's vCPU.
fn td_step(world: &mut World, vm: VmId, instruction: Instruction) -> Progress {
    match world.td_execute(vm, 0, instruction) {
        Err(Fault::Retry) => Progress::Again,
        _ => Progress::Done,
    }
}

#[test]
fn a_guest_that_runs_between_block_and_remove_faults_until_the_page_is_gone() {
    for point in [SchedulePoint::ZapBlocked, SchedulePoint::ZapTracked] {
        let mut setup = setup("sim:tdx");
        let accept = GuestOp::Accept { gpa: GPA, len: PAGES * PAGE_SIZE, level: 0 };
        assert_eq!(setup.vcpu.execute(accept), Exit::Done(0));
        let ids = setup.ids;
        let (events, left) = setup.machine.with_world(|world| {
            let host = Actor::new("host").step("punch", &[Lock::Invalidate(ids.inode)], move |world| punch(world, ids));
            let guest = Actor::new("vcpu").step("load", &[], move |world| {
                td_step(world, ids.vm, Instruction::Load(GPA));
                Progress::Done
            });
            let events = world.run_actors(Schedule::Explicit(vec![at(point, 1, "vcpu")]), vec![host, guest]);
            world.td_leave(ids.vm, 0);
            (events, world.vms[&ids.vm].mirror.leaves(crate::sim::host::Order::Base))
        });
        let told: Vec<String> = events.iter().map(ToString::to_string).collect();
        assert_eq!(told, ["host: punch".to_string(), format!("at {} 1, vcpu: load", point.name())]);
        assert_eq!(left, 0, "{}: the fault that needed the MMU lock installed nothing", point.name());
        assert!(setup.vm.capability(10).is_ok(), "{}: the VM lives", point.name());
        let check = GuestOp::Check { gpa: GPA, len: PAGE_SIZE, byte: 0 };
        assert_eq!(setup.vcpu.execute(check), Exit::Done(0), "a new page");
    }
}

fn punch_under_accept(schedule: Schedule, defect: Option<RaceDefect>) -> (Vec<Event>, bool) {
    let setup = setup("sim:tdx");
    let ids = setup.ids;
    assert_eq!({ setup.vcpu }.pre_fault(GPA, PAGES * PAGE_SIZE, 0).result, Ok(()));
    setup.machine.with_world(|world| {
        world.scheduler.defect = defect;
        let accept = move |world: &mut World| td_step(world, ids.vm, Instruction::Accept(GPA, 0));
        let guest = Actor::new("vcpu").step("accept", &[], accept);
        let host = Actor::new("host").step("punch", &[Lock::Invalidate(ids.inode)], move |world| punch(world, ids));
        let events = world.run_actors(schedule, vec![guest, host]);
        let violations = world.tdx_host().module.check();
        assert!(violations.is_empty(), "{violations:?}");
        (events, world.vms[&ids.vm].bugged)
    })
}

#[test]
fn a_kick_ends_the_accept_that_holds_the_entry_so_that_one_retry_is_enough() {
    let turn = Schedule::Explicit(vec![at(SchedulePoint::AcceptHolding, 1, "host")]);
    let (events, bugged) = punch_under_accept(turn.clone(), None);
    let told: Vec<String> = events.iter().map(ToString::to_string).collect();
    assert_eq!(told, ["vcpu: accept", "at accept-holding 1, host: punch"]);
    assert!(!bugged);
    assert!(punch_under_accept(turn, Some(RaceDefect::KickIgnoresTdcall)).1, "the entry stays busy");
    let found = (0..64).any(|seed| {
        assert!(!punch_under_accept(Schedule::Seeded(seed), None).1, "seed {seed}");
        punch_under_accept(Schedule::Seeded(seed), Some(RaceDefect::KickIgnoresTdcall)).1
    });
    assert!(found);
}

#[test]
fn a_step_that_needs_a_held_lock_waits() {
    let setup = setup("sim:sw-protected");
    let ids = setup.ids;
    let events = setup.machine.with_world(|world| {
        let first = Actor::new("first").step("punch", &[Lock::Invalidate(ids.inode)], move |world| punch(world, ids));
        let second = Actor::new("second").step("punch", &[Lock::Invalidate(ids.inode)], move |world| punch(world, ids));
        let turn = at(SchedulePoint::PunchUnmapped, 1, "second");
        world.run_actors(Schedule::Explicit(vec![turn]), vec![first, second])
    });
    assert!(events.iter().all(|event| event.at.is_none()), "{events:?}");
    assert_eq!(events.len(), 2);
}

#[test]
fn unrest_changes_nothing_that_a_guest_can_see() {
    for spec in ["sim:sw-protected,schedule=3", "sim:tdx,schedule=3"] {
        let mut setup = setup(spec);
        let all = PAGES * PAGE_SIZE;
        assert_eq!(setup.vcpu.execute(GuestOp::Fill { gpa: GPA, len: all, byte: 5 }), Exit::Done(0), "{spec}");
        assert_eq!(setup.vcpu.execute(GuestOp::Check { gpa: GPA, len: all, byte: 5 }), Exit::Done(0), "{spec}");
        let seqs = setup.machine.with_world(|world| world.vms[&setup.ids.vm].invalidate_seq);
        assert!(seqs > 1, "{spec}: at least one lookup was disturbed");
    }
}
