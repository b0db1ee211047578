//! Huge folios: mapped huge, split, merged, punched, held.

use crate::machine::{
    Errno, Exit, GuestMemfd, GuestOp, HoldKind, Machine, MemoryRegion, PAGE_SIZE, Protection, Vcpu, Vm, VmConfig,
};
use crate::sim::SimMachine;
use crate::sim::host::Order;
use crate::sim::profile::{GMEM_FLAG_HUGETLB, GMEM_HUGE_SHIFT};
use crate::sim::tdx_module::fault::{FaultRule, When};
use crate::sim::tdx_module::{AnyLeaf, Code, Leaf, Operand, Status};
use std::sync::Arc;

const GPA: u64 = 1 << 32;
const MIB2: u64 = 2 << 20;
const MMAP_2M: u64 = 1 | GMEM_FLAG_HUGETLB | 21 << GMEM_HUGE_SHIFT;
const PRIVATE: u64 = 8;

struct Huge {
    vcpu: Box<dyn Vcpu>,
    file: Arc<dyn GuestMemfd>,
    vm: Arc<dyn Vm>,
    machine: SimMachine,
}

fn huge(spec: &str, size: u64, flags: u64) -> Huge {
    let machine = SimMachine::open(&spec.parse().unwrap()).unwrap();
    let vm = machine.create_vm(VmConfig::Payload { vcpus: 1 }).unwrap();
    let vcpu = vm.create_vcpu(0).unwrap();
    let file = vm.create_guest_memfd(size, flags).unwrap();
    vm.set_memory_region(&MemoryRegion::new(0, GPA, size).bound_to(&*file, 0)).unwrap();
    Huge { vcpu, file, vm, machine }
}

impl Huge {
    fn leaves(&self) -> (u64, u64) {
        (self.vm.statistic("pages_2m").unwrap(), self.vm.statistic("pages_4k").unwrap())
    }

    fn fill(&mut self, at: u64, len: u64, byte: u8) {
        assert_eq!(self.vcpu.execute(GuestOp::Fill { gpa: GPA + at, len, byte }), Exit::Done(0));
    }

    fn check(&mut self, at: u64, len: u64, byte: u8) {
        assert_eq!(self.vcpu.execute(GuestOp::Check { gpa: GPA + at, len, byte }), Exit::Done(0), "{at:#x}");
    }
}

#[test]
fn creation_wants_a_known_page_size_that_divides_the_file() {
    let machine = SimMachine::open(&"sim:sw-protected,kernel=huge".parse().unwrap()).unwrap();
    let vm = machine.create_vm(VmConfig::Bare).unwrap();
    let create =
        |size, shift: u64| vm.create_guest_memfd(size, GMEM_FLAG_HUGETLB | shift << GMEM_HUGE_SHIFT).map(|_| ());
    assert_eq!(create(MIB2, 21), Ok(()));
    assert_eq!(create(1 << 30, 30), Ok(()));
    assert_eq!(create(MIB2 + PAGE_SIZE, 21), Err(Errno::EINVAL));
    assert_eq!(create(MIB2, 30), Err(Errno::EINVAL));
    assert_eq!(create(MIB2, 22), Err(Errno::EINVAL));
    let older = SimMachine::open(&"sim:sw-protected,kernel=in-place".parse().unwrap()).unwrap();
    assert!(older.create_vm(VmConfig::Bare).unwrap().create_guest_memfd(MIB2, MMAP_2M).is_err());
}

#[test]
fn private_huge_folios_are_mapped_huge_and_conversion_splits_and_merges() {
    for spec in ["sim:sw-protected,kernel=huge", "sim:tdx,kernel=huge"] {
        let mut huge = huge(spec, 2 * MIB2, MMAP_2M);
        huge.fill(0, 2 * MIB2, 5);
        assert_eq!(huge.leaves(), (2, 0), "{spec}");
        let map = huge.file.map(2 * MIB2, 0, Protection::SHARED_RW).unwrap();
        huge.file.convert(PAGE_SIZE, PAGE_SIZE, 0).unwrap();
        huge.check(0, PAGE_SIZE, 5);
        huge.check(2 * PAGE_SIZE, 2 * MIB2 - 2 * PAGE_SIZE, 5);
        map.write_u64(PAGE_SIZE, 9).unwrap();
        assert!(map.read_u64(0).is_err() && map.read_u64(2 * PAGE_SIZE).is_err(), "only one page is shared");
        assert_eq!(huge.leaves().0, 1, "{spec}: the other block is untouched");
        let pin = map.hold(PAGE_SIZE, PAGE_SIZE, HoldKind::Pin).unwrap();
        let error = huge.file.convert(0, MIB2, PRIVATE).unwrap_err();
        assert_eq!((error.errno, error.offset), (Errno::EAGAIN, Some(PAGE_SIZE)));
        drop(pin);
        huge.file.convert(0, MIB2, PRIVATE).unwrap();
        let pages = huge.machine.page_account(&*huge.file, PAGE_SIZE).unwrap().unwrap().refs;
        assert_eq!(pages, 512, "one folio again: one page cache reference a page");
        huge.check(2 * PAGE_SIZE, MIB2 - 2 * PAGE_SIZE, 5);
    }
}

#[test]
fn a_td_splits_before_it_zaps_a_part_and_keeps_the_rest() {
    let mut huge = huge("sim:tdx,kernel=huge", MIB2, MMAP_2M);
    huge.fill(0, MIB2, 7);
    assert_eq!(huge.leaves(), (1, 0));
    huge.file.punch_hole(PAGE_SIZE, PAGE_SIZE).unwrap();
    assert_eq!(huge.leaves(), (0, 511));
    assert_eq!(huge.machine.with_world(|world| world.splits), 1);
    assert_eq!(huge.file.cache_stat(0, 0).unwrap().cached, 512, "a part is zeroed, not freed");
    huge.check(0, PAGE_SIZE, 7);
    huge.check(PAGE_SIZE, PAGE_SIZE, 0);
    huge.check(2 * PAGE_SIZE, MIB2 - 2 * PAGE_SIZE, 7);
    assert_eq!(huge.machine.with_world(|world| world.tdx_host().module.check()), vec![]);
}

#[test]
fn accepting_4k_of_a_pending_2m_mapping_splits_it_and_2m_below_a_table_is_a_mismatch() {
    let mut huge = huge("sim:tdx,kernel=huge", MIB2, MMAP_2M);
    assert_eq!(huge.vcpu.pre_fault(GPA, MIB2, 0).result, Ok(()));
    assert_eq!(huge.leaves(), (1, 0));
    let accept = |level| GuestOp::Accept { gpa: GPA, len: PAGE_SIZE, level };
    assert_eq!(huge.vcpu.execute(accept(0)), Exit::Done(0));
    assert_eq!(huge.leaves(), (0, 512));
    let Exit::Done(status) = huge.vcpu.execute(accept(1)) else { panic!("an exit") };
    assert!(Status(status).is(Code::PageSizeMismatch), "{}", Status(status));
}

#[test]
fn a_split_that_fails_stops_the_punch_and_bugs_the_vm() {
    let mut huge = huge("sim:tdx,kernel=huge", MIB2, MMAP_2M);
    huge.fill(0, MIB2, 7);
    huge.machine.with_world(|world| {
        let rule =
            FaultRule::new(AnyLeaf::Seamcall(Leaf::MemPageDemote), Status::on(Code::OperandInvalid, Operand::RCX));
        world.tdx_host().module.faults_mut().add(rule.when(When::Nth(1)));
    });
    assert_eq!(huge.file.punch_hole(0, PAGE_SIZE), Err(Errno::EIO));
    assert_eq!(huge.vm.capability(10), Err(Errno::EIO));
    assert_eq!(huge.file.cache_stat(0, 0).unwrap().cached, 512);
}

#[test]
fn speculative_references_are_waited_for_and_counted() {
    let huge = huge("sim:sw-protected,kernel=huge", MIB2, MMAP_2M);
    huge.file.allocate(0, MIB2).unwrap();
    let pfn = huge.machine.page_account(&*huge.file, 0).unwrap().unwrap().frame;
    huge.machine.with_world(|world| world.host.frames.get_speculative(pfn, 1, 10));
    huge.file.convert(0, PAGE_SIZE, 0).unwrap();
    let spins = huge.machine.with_world(|world| world.freeze_spins);
    assert_eq!(spins, 10, "ten looks saw it");
    let pfn = huge.machine.page_account(&*huge.file, MIB2 - PAGE_SIZE).unwrap().unwrap().frame;
    huge.machine.with_world(|world| world.host.frames.get_speculative(pfn, 2, 1000));
    let error = huge.file.convert(0, PAGE_SIZE, PRIVATE).unwrap_err();
    assert_eq!((error.errno, error.offset), (Errno::EAGAIN, Some(MIB2 - PAGE_SIZE)), "the merge is refused");
    let map = huge.file.map(PAGE_SIZE, 0, Protection::SHARED_RW).unwrap();
    assert_eq!(map.read_u64(0), Ok(0), "and the page is still shared");
}

#[test]
fn a_whole_split_folio_goes_only_when_nobody_holds_a_page_of_it() {
    let huge = huge("sim:sw-protected,kernel=huge", MIB2, MMAP_2M | 2);
    let map = huge.file.map(MIB2, 0, Protection::SHARED_RW).unwrap();
    map.write_u64(0, 1).unwrap();
    let pin = map.hold(0, PAGE_SIZE, HoldKind::Pin).unwrap();
    assert_eq!(huge.file.punch_hole(0, PAGE_SIZE), Ok(()), "a part is zeroed");
    assert_eq!(map.read_u64(0), Ok(0));
    assert_eq!(huge.file.punch_hole(0, MIB2), Err(Errno::EAGAIN));
    drop(pin);
    assert_eq!(huge.file.punch_hole(0, MIB2), Ok(()));
    assert_eq!(huge.file.cache_stat(0, 0).unwrap().cached, 0);
}

#[test]
fn a_closed_file_gives_its_huge_pages_back_when_the_last_pin_goes() {
    let Huge { file, vm, vcpu, machine } = huge("sim:sw-protected,kernel=huge", MIB2, MMAP_2M | 2);
    let map = file.map(MIB2, 0, Protection::SHARED_RW).unwrap();
    let pin = map.hold(0, PAGE_SIZE, HoldKind::Pin).unwrap();
    drop((map, file, vm, vcpu));
    let free = || machine.with_world(|world| world.host.allocator.free_frames().count());
    assert_eq!(free(), 0, "one page is missing");
    drop(pin);
    assert_eq!(free(), 1, "one huge page");
}

/// Write-backs counted, and whether the VM lives, after one mapped huge page was punched.
fn write_backs(prepare: impl FnOnce(&mut crate::sim::tdx_module::Module)) -> (u64, bool) {
    let mut huge = huge("sim:tdx,kernel=huge", MIB2, MMAP_2M);
    huge.fill(0, MIB2, 7);
    huge.machine.with_world(|world| prepare(&mut world.tdx_host().module));
    let wbinvd = AnyLeaf::Seamcall(Leaf::PhymemPageWbinvd);
    let count = || huge.machine.with_world(|world| world.tdx_host().module.trace().count(wbinvd).calls);
    let before = count();
    huge.file.punch_hole(0, MIB2).unwrap();
    assert_eq!(huge.machine.with_world(|world| world.tdx_host().module.check()), vec![]);
    (count() - before, huge.vm.capability(10).is_ok())
}

#[test]
fn a_huge_page_is_written_back_by_512_calls_whether_or_not_they_are_made_one_by_one() {
    assert_eq!(write_backs(|_| {}), (512, true), "in one step");
    assert_eq!(write_backs(|module| module.trace_mut().set_capacity(4)), (512, true), "each on record");
    let rule = |when| {
        let leaf = AnyLeaf::Seamcall(Leaf::PhymemPageWbinvd);
        FaultRule::new(leaf, Status::on(Code::OperandInvalid, Operand::RCX)).when(when)
    };
    assert_eq!(write_backs(|module| module.faults_mut().add(rule(When::Nth(3)))), (3, false), "the third fails");
    assert_eq!(write_backs(|module| module.faults_mut().add(rule(When::Nth(513)))), (512, true), "none of them fails");
}

#[test]
fn a_guest_of_2m_folios_costs_by_the_block_split_or_not() {
    let blocks = 1024;
    let size = blocks * MIB2;
    let mut huge = huge("sim:tdx,kernel=huge", size, MMAP_2M);
    let accept = GuestOp::Accept { gpa: GPA, len: size, level: 1 };
    assert_eq!(huge.vcpu.execute(accept), Exit::Done(0));
    assert_eq!(huge.leaves(), (blocks, 0));
    let cost = |huge: &Huge| {
        huge.machine.with_world(|world| {
            let runs = world.gmem.inodes.values().map(|node| node.pages.runs()).sum::<usize>();
            (world.host.frames.resident_bytes() / blocks, runs)
        })
    };
    let (mapped, runs) = cost(&huge);
    assert!(mapped < 256 && runs == 1, "{mapped} bytes a block, {runs} runs");
    huge.file.convert(0, size, 0).unwrap();
    let (split, runs) = cost(&huge);
    assert!(split < 256 && runs == 1, "{split} bytes a split block, {runs} runs");
    let account = huge.machine.page_account(&*huge.file, size - PAGE_SIZE).unwrap().unwrap();
    assert_eq!((account.refs, account.map_count), (1, 0), "the last page is a folio of its own");
    huge.file.convert(0, size, PRIVATE).unwrap();
    assert_eq!(huge.vcpu.execute(accept), Exit::Done(0));
    assert_eq!(huge.leaves(), (blocks, 0), "mapped huge again");
    huge.file.convert(0, size, 0).unwrap();
    let Huge { vcpu, file, vm, machine } = huge;
    drop((file, vcpu, vm));
    assert_eq!(machine.with_world(|world| world.gmem_pool(Order::Pmd).split), 0, "closed while split: nothing is lost");
}
