//! Who holds a page, and what that does to conversion, punch and close: the IOMMU, speculative references, the LRU batch,
//! memory without struct pages, and the pool of huge pages.

use crate::machine::{
    ConvertError, Errno, Exit, GuestMemfd, GuestOp, HoldKind, Machine, Mapping, MemoryRegion, PAGE_SIZE, Protection,
    Vcpu, Vm, VmConfig,
};
use crate::sim::host::iommu::DmaError;
use crate::sim::host::{Holder, Order};
use crate::sim::profile::{GMEM_FLAG_HUGETLB, GMEM_HUGE_SHIFT};
use crate::sim::{SimMachine, World};
use std::sync::Arc;

const GPA: u64 = 1 << 32;
const PAGES: u64 = 4;
const PRIVATE: u64 = 8;
const IOVA: u64 = 1 << 20;
const SHARED_MMAP: u64 = 3;
const MIB2: u64 = 2 << 20;
const GIB: u64 = 1 << 30;

struct Setup {
    map: Box<dyn Mapping>,
    vcpu: Box<dyn Vcpu>,
    file: Arc<dyn GuestMemfd>,
    vm: Arc<dyn Vm>,
    machine: SimMachine,
}

fn setup(spec: &str, size: u64, flags: u64) -> Setup {
    let machine = SimMachine::open(&spec.parse().unwrap()).unwrap();
    let vm = machine.create_vm(VmConfig::Payload { vcpus: 1 }).unwrap();
    let vcpu = vm.create_vcpu(0).unwrap();
    let file = vm.create_guest_memfd(size, flags).unwrap();
    vm.set_memory_region(&MemoryRegion::new(0, GPA, size).bound_to(&*file, 0)).unwrap();
    let map = file.map(size, 0, Protection::SHARED_RW).unwrap();
    Setup { map, vcpu, file, vm, machine }
}

fn shared(spec: &str) -> Setup {
    setup(spec, PAGES * PAGE_SIZE, SHARED_MMAP)
}

impl Setup {
    fn world<R>(&self, action: impl FnOnce(&mut World) -> R) -> R {
        self.machine.with_world(action)
    }

    fn holders(&self, page: u64) -> Vec<(&'static str, u32)> {
        let account = self.machine.page_account(&*self.file, page * PAGE_SIZE).unwrap().unwrap();
        let holders = account.holders.unwrap();
        assert_eq!(account.refs, holders.iter().map(|(_, n)| n).sum::<u32>());
        let mut holders: Vec<_> = holders.into_iter().collect();
        holders.sort_unstable();
        holders
    }

    fn convert(&self, attributes: u64) -> Result<(), ConvertError> {
        self.file.convert(0, PAGES * PAGE_SIZE, attributes)
    }
}

fn busy_at(page: u64) -> ConvertError {
    ConvertError { errno: Errno::EAGAIN, offset: Some(page * PAGE_SIZE) }
}

#[test]
fn a_page_that_the_iommu_maps_does_not_become_private_until_it_is_unmapped() {
    let s = shared("sim:sw-protected,kernel=in-place");
    let addr = s.map.addr() + 2 * PAGE_SIZE;
    let domain = s.world(|world| {
        let domain = world.iommu_domain();
        world.iommu_map(domain, IOVA, addr, PAGE_SIZE).unwrap();
        assert_eq!(world.iommu_map(domain, IOVA, addr, PAGE_SIZE), Err(Errno::EEXIST));
        domain
    });
    s.world(|world| world.host.drain_all_lru());
    assert_eq!(s.holders(2), [("iommu", 1024), ("page-cache", 1), ("pte", 1)]);
    assert_eq!(s.convert(PRIVATE), Err(busy_at(2)));
    s.world(|world| world.dma_write(domain, IOVA + 8, b"dma")).unwrap();
    let mut found = [0; 3];
    s.map.read(2 * PAGE_SIZE + 8, &mut found).unwrap();
    assert_eq!(&found, b"dma");
    assert_eq!(s.world(|world| world.iommu_unmap(domain, IOVA, PAGE_SIZE)), PAGE_SIZE);
    assert_eq!(s.convert(PRIVATE), Ok(()));
    assert_eq!(
        s.world(|world| world.iommu_map(domain, IOVA, addr, PAGE_SIZE)),
        Err(Errno::EFAULT),
        "a private page cannot be pinned"
    );
    assert_eq!(s.world(|world| world.dma_read(domain, IOVA, &mut found)), Err(DmaError::Fault { iova: IOVA }));
}

#[test]
fn a_punched_page_stays_the_devices_while_the_iommu_maps_it() {
    let s = shared("sim:sw-protected,kernel=in-place");
    s.map.fill(0, PAGE_SIZE, 7).unwrap();
    let addr = s.map.addr();
    let (domain, pfn) = s.world(|world| {
        let domain = world.iommu_domain();
        world.iommu_map(domain, IOVA, addr, PAGE_SIZE).unwrap();
        (domain, world.host.iommu.translate(domain, IOVA).unwrap())
    });
    s.file.punch_hole(0, PAGE_SIZE).unwrap();
    assert_eq!(s.map.read_u64(0), Ok(0), "the file has a new page");
    s.world(|world| {
        let mut found = [0];
        world.dma_read(domain, IOVA, &mut found).unwrap();
        assert_eq!(found, [7], "the device still has the old one");
        assert_eq!(world.host.frames.holders(pfn), [(Holder::Iommu(domain), 1024)]);
        assert!(!world.host.allocator.free_frames().any(|free| free == pfn));
        world.iommu_drop_domain(domain);
        assert!(world.host.allocator.free_frames().any(|free| free == pfn));
    });
}

#[test]
fn a_mapping_by_file_holds_nothing_and_goes_with_the_page() {
    for spec in ["sim:sw-protected,kernel=in-place", "sim:sw-protected,kernel=in-place,frames=pfnmap"] {
        let s = shared(spec);
        let file = s.file.handle();
        let map = |world: &mut World, domain| world.iommu_map_gmem(domain, IOVA, file, 0, PAGES * PAGE_SIZE);
        let domain = s.world(|world| {
            let domain = world.iommu_domain();
            map(world, domain).unwrap();
            world.host.drain_all_lru();
            domain
        });
        let entries = || s.world(|world| world.host.iommu.entries(domain));
        assert_eq!(s.holders(0), [("page-cache", 1)], "{spec}");
        s.file.punch_hole(0, PAGE_SIZE).unwrap();
        assert_eq!(entries(), 3, "{spec}");
        assert_eq!(s.convert(PRIVATE), Ok(()), "{spec}: nothing holds the pages");
        assert_eq!(entries(), 0, "{spec}");
        assert_eq!(s.world(|world| map(world, domain)), Err(Errno::EFAULT), "{spec}: private");
        s.convert(0).unwrap();
        s.world(|world| map(world, domain)).unwrap();
        let Setup { map, file, vcpu, vm, machine } = s;
        drop((map, file, vcpu, vm));
        machine.with_world(|world| {
            assert_eq!(world.host.iommu.entries(domain), 0, "{spec}: closed");
            assert_eq!(world.host.iommu.invalidated(), 8, "{spec}");
            assert_eq!(world.host.pages_in_use(), 0, "{spec}");
        });
    }
}

#[test]
fn a_speculative_reference_is_gone_at_the_second_look_and_a_longer_one_is_eagain() {
    let s = shared("sim:sw-protected,kernel=in-place");
    s.map.fill(0, PAGES * PAGE_SIZE, 1).unwrap();
    let pfn = s.machine.page_account(&*s.file, PAGE_SIZE).unwrap().unwrap().frame;
    s.world(|world| world.host.frames.get_speculative(pfn, 1, 1));
    assert_eq!(s.convert(PRIVATE), Ok(()), "seen once, then gone");
    s.convert(0).unwrap();
    s.world(|world| world.host.frames.get_speculative(pfn, 2, 3));
    assert_eq!(s.convert(PRIVATE), Err(busy_at(1)));
    assert_eq!(s.convert(PRIVATE), Ok(()), "user space tries again");
}

#[test]
fn the_reference_that_an_lru_batch_hides_does_not_stop_a_conversion() {
    let s = shared("sim:sw-protected,kernel=in-place");
    s.map.write_u64(0, 1).unwrap();
    assert_eq!(s.holders(0), [("lru-batch", 1), ("page-cache", 1), ("pte", 1)]);
    assert_eq!(s.convert(PRIVATE), Ok(()));
    assert_eq!(s.holders(0), [("page-cache", 1)]);
}

#[test]
fn memory_without_struct_pages_converts_punches_and_closes_without_a_count_to_look_at() {
    for spec in ["sim:sw-protected,kernel=in-place,frames=pfnmap", "sim:tdx,kernel=in-place,frames=pfnmap"] {
        let mut s = shared(spec);
        s.map.fill(0, PAGES * PAGE_SIZE, 7).unwrap();
        assert!(s.map.hold(0, PAGE_SIZE, HoldKind::Get).is_err(), "{spec}: nothing to take a reference of");
        let frame = s.machine.page_account(&*s.file, 0).unwrap().unwrap().frame;
        assert_eq!(s.machine.page_flags(frame), Ok(1 << 20), "{spec}: KPF_NOPAGE");
        assert_eq!(s.convert(PRIVATE), Ok(()), "{spec}");
        assert!(s.map.read_u64(0).is_err(), "{spec}: the host's entries are gone");
        let fill = GuestOp::Fill { gpa: GPA, len: PAGES * PAGE_SIZE, byte: 9 };
        assert_eq!(s.vcpu.execute(fill), Exit::Done(0), "{spec}");
        s.file.punch_hole(0, PAGE_SIZE).unwrap();
        assert_eq!(s.vcpu.execute(GuestOp::Check { gpa: GPA, len: PAGE_SIZE, byte: 0 }), Exit::Done(0), "{spec}");
        assert_eq!(s.convert(0), Ok(()), "{spec}");
        let Setup { map, file, vcpu, vm, machine } = s;
        drop((map, file, vcpu, vm));
        assert_eq!(machine.with_world(|world| world.host.pages_in_use()), 0, "{spec}");
    }
}

#[test]
fn the_pool_counts_pages_reserved_in_use_and_split_and_has_them_back_after_the_last_pin() {
    for (shift, order, size) in [(21, Order::Pmd, MIB2), (30, Order::Pud, GIB)] {
        let flags = SHARED_MMAP | GMEM_FLAG_HUGETLB | shift << GMEM_HUGE_SHIFT;
        let s = setup("sim:sw-protected,kernel=huge", 2 * size, flags);
        s.world(|world| world.host.allocator.limit_pool(4));
        let pool = |machine: &SimMachine| {
            let pool = machine.with_world(|world| world.gmem_pool(order));
            (pool.total, pool.free, pool.reserved, pool.split)
        };
        assert_eq!(pool(&s.machine), (4, 4, 2, 0), "{order:?}");
        s.map.write_u64(PAGE_SIZE, 1).unwrap();
        assert_eq!(pool(&s.machine), (4, 3, 1, 1), "a shared block is split at once");
        assert_eq!(s.file.convert(0, size, PRIVATE), Ok(()));
        assert_eq!(pool(&s.machine), (4, 3, 1, 0), "merged");
        assert_eq!(s.file.convert(0, size, 0), Ok(()));
        let pin = s.map.hold(PAGE_SIZE, PAGE_SIZE, HoldKind::Pin).unwrap();
        let Setup { map, file, vcpu, vm, machine } = s;
        drop((map, file, vcpu, vm));
        assert_eq!(pool(&machine), (4, 3, 0, 1), "closed while pinned: the merge is put off");
        drop(pin);
        assert_eq!(pool(&machine), (4, 4, 0, 0), "the pool has its page back");
    }
}
