//! The tables of guest_memfd's system calls, row by row.

use crate::machine::{
    CacheStat, Errno, FileOp, GuestMemfd, HoldKind, Machine, Mapping, PAGE_SIZE, Protection, Vm, VmConfig,
};
use crate::sim::SimMachine;
use std::sync::Arc;

const MMAP: u64 = 1;
const SHARED: u64 = 3;

fn machine(spec: &str) -> SimMachine {
    SimMachine::open(&spec.parse().unwrap()).unwrap()
}

fn gmem(machine: &SimMachine, pages: u64, flags: u64) -> (Arc<dyn Vm>, Arc<dyn GuestMemfd>) {
    let vm = machine.create_vm(VmConfig::Bare).unwrap();
    let file = vm.create_guest_memfd(pages * PAGE_SIZE, flags).unwrap();
    (vm, file)
}

fn refs(machine: &SimMachine, file: &Arc<dyn GuestMemfd>, page: u64) -> Option<u32> {
    machine.page_account(&**file, page * PAGE_SIZE).unwrap().map(|account| account.refs)
}

#[test]
fn creation_checks_flags_before_size() {
    for (spec, flags, size, expected) in [
        ("sim:default", 4, 0, Err(Errno::EINVAL)),
        ("sim:default", 0, 0, Err(Errno::EINVAL)),
        ("sim:default", 0, 1 << 63, Err(Errno::EINVAL)),
        ("sim:default", 0, 4095, Err(Errno::EINVAL)),
        ("sim:default", 3, i64::MAX as u64 & !4095, Ok(())),
        ("sim:default", 2, 4096, Ok(())),
        ("sim:sw-protected", 2, 4096, Err(Errno::EINVAL)),
        ("sim:sw-protected", 1, 4096, Ok(())),
        ("sim:sw-protected,kernel=6.16", 1, 4096, Err(Errno::EINVAL)),
        ("sim:sw-protected,kernel=6.16", 0, 4096, Ok(())),
    ] {
        let vm = machine(spec).create_vm(VmConfig::Bare).unwrap();
        let got = vm.create_guest_memfd_with(size, flags, [7; 6]).map(|_| ());
        assert_eq!(got, expected, "{spec} flags={flags} size={size:#x}");
    }
}

#[test]
fn fallocate_checks_in_the_order_of_the_kernel() {
    let machine = machine("sim:default");
    let (_vm, file) = gmem(&machine, 4, SHARED);
    const KEEP: i32 = 1;
    const PUNCH: i32 = 2 | KEEP;
    for (mode, offset, len, expected) in [
        (KEEP, -1, 4096, Err(Errno::EINVAL)),
        (0x100, 0, 0, Err(Errno::EINVAL)),
        (0x100, 0, 4096, Err(Errno::EOPNOTSUPP)),
        (2, 0, 4096, Err(Errno::EOPNOTSUPP)),
        (8 | KEEP, 0, 4096, Err(Errno::EOPNOTSUPP)),
        (KEEP, i64::MAX - 4095, 4096, Err(Errno::EFBIG)),
        (0, 0, 4096, Err(Errno::EOPNOTSUPP)),
        (0x10 | KEEP, 0, 4096, Err(Errno::EOPNOTSUPP)),
        (0x10 | KEEP, 1, 1, Err(Errno::EOPNOTSUPP)),
        (KEEP, 1, 4096, Err(Errno::EINVAL)),
        (PUNCH, 0, 4095, Err(Errno::EINVAL)),
        (PUNCH, 4 * 4096, 4096, Ok(())),
        (PUNCH, 1 << 40, 4096, Ok(())),
        (KEEP, 3 * 4096, 2 * 4096, Err(Errno::EINVAL)),
        (KEEP, 4 * 4096, 4096, Err(Errno::EINVAL)),
        (KEEP, 0, 4 * 4096, Ok(())),
        (KEEP, 0, 4 * 4096, Ok(())),
    ] {
        assert_eq!(file.fallocate(mode, offset, len), expected, "mode={mode:#x} offset={offset} len={len}");
    }
    assert_eq!(file.cache_stat(0, 0).unwrap().cached, 4);
    assert_eq!(file.cache_stat(4096, 1).unwrap(), CacheStat { cached: 1, dirty: 0, writeback: 0 });
    file.punch_hole(4096, 8192).unwrap();
    assert_eq!(file.cache_stat(0, 0).unwrap().cached, 2);
}

#[test]
fn file_operations_are_refused_as_the_vfs_refuses_them() {
    let machine = machine("sim:default");
    let (_vm, file) = gmem(&machine, 1, 0);
    for (op, expected) in [
        (FileOp::Read(1), Err(Errno::EINVAL)),
        (FileOp::Pread(1, 0), Err(Errno::ESPIPE)),
        (FileOp::Pwrite(1, -1), Err(Errno::EINVAL)),
        (FileOp::Seek(0, 4), Err(Errno::ESPIPE)),
        (FileOp::Seek(0, 5), Err(Errno::EINVAL)),
        (FileOp::Truncate(4096), Err(Errno::EINVAL)),
        (FileOp::Fsync, Err(Errno::EINVAL)),
        (FileOp::Fadvise(4), Ok(0)),
        (FileOp::Fadvise(6), Err(Errno::EINVAL)),
        (FileOp::Reopen, Err(Errno::ENXIO)),
        (FileOp::Execve, Err(Errno::EACCES)),
        (FileOp::Fionread, Err(Errno::ENOTTY)),
        (FileOp::Setxattr, Err(Errno::EOPNOTSUPP)),
        (FileOp::StatfsType, Ok(0x474d_454d)),
        (FileOp::GetFlags, Ok(0x8002)),
    ] {
        assert_eq!(file.file_op(op), expected, "{op:?}");
    }
    let stat = file.stat().unwrap();
    assert_eq!((stat.mode, stat.size, stat.block_size, stat.blocks, stat.links), (0o100600, 4096, 4096, 0, 1));
}

#[test]
fn mmap_checks_in_the_order_of_the_kernel() {
    let machine = machine("sim:default");
    let (_vm, file) = gmem(&machine, 4, SHARED);
    let (_vm2, unmappable) = gmem(&machine, 4, 0);
    let map = |file: &Arc<dyn GuestMemfd>, len, offset, prot, flags| {
        file.map(len, offset, Protection { prot, flags }).map(|mapping| mapping.len())
    };
    use libc::{MAP_PRIVATE, MAP_SHARED, MAP_SHARED_VALIDATE, PROT_EXEC, PROT_READ};
    assert_eq!(map(&file, 0, 0, PROT_READ, MAP_SHARED), Err(Errno::EINVAL));
    assert_eq!(map(&file, 4096, 1, PROT_READ, MAP_SHARED), Err(Errno::EINVAL));
    assert_eq!(map(&file, 1 << 48, 0, PROT_READ, MAP_SHARED), Err(Errno::ENOMEM));
    assert_eq!(map(&file, 4096, (1 << 63) - 4096, PROT_READ, MAP_SHARED), Err(Errno::EOVERFLOW));
    assert_eq!(map(&file, 4096, 0, PROT_READ, MAP_SHARED_VALIDATE | 0x80000), Err(Errno::EOPNOTSUPP));
    assert_eq!(map(&unmappable, 4096, 0, PROT_EXEC, MAP_PRIVATE), Err(Errno::EPERM));
    assert_eq!(map(&unmappable, 4096, 0, PROT_READ, MAP_PRIVATE), Err(Errno::ENODEV));
    assert_eq!(map(&file, 4096, 0, PROT_READ, MAP_PRIVATE), Err(Errno::EINVAL));
    assert_eq!(map(&file, 1 << 30, 1 << 40, PROT_READ, MAP_SHARED), Ok(1 << 30));
}

#[test]
fn host_faults_zero_once_and_stop_at_the_end() {
    let machine = machine("sim:default");
    let (_vm, file) = gmem(&machine, 2, SHARED);
    let map = file.map(4 * PAGE_SIZE, 0, Protection::SHARED_RW).unwrap();
    file.allocate(0, PAGE_SIZE).unwrap();
    assert_eq!(map.resident(0, 2 * PAGE_SIZE).unwrap(), [false, false], "allocated is not up to date");
    assert_eq!(map.read_u64(0), Ok(0));
    map.fill(0, 2 * PAGE_SIZE, 0xaa).unwrap();
    assert_eq!(map.find_mismatch(0, 2 * PAGE_SIZE, 0xaa), Ok(None));
    let fault = map.fill(0, 4 * PAGE_SIZE, 0xbb).unwrap_err();
    assert_eq!((fault.signal, fault.code, fault.offset), (libc::SIGBUS, 2, 2 * PAGE_SIZE));
    assert_eq!(map.find_mismatch(0, 2 * PAGE_SIZE, 0xbb), Ok(None), "what came before the end was written");
    file.punch_hole(0, PAGE_SIZE).unwrap();
    assert_eq!(map.read_u64(0), Ok(0));
    assert_eq!(map.read_u64(PAGE_SIZE), Ok(0xbbbb_bbbb_bbbb_bbbb));
}

#[test]
fn a_private_file_faults_and_allocates_nothing() {
    let machine = machine("sim:sw-protected");
    let (_vm, file) = gmem(&machine, 2, MMAP);
    let map = file.map(2 * PAGE_SIZE, 0, Protection::SHARED_RW).unwrap();
    assert_eq!(map.read_u64(8).unwrap_err().signal, libc::SIGBUS);
    assert_eq!(map.kernel_read(0), Err(Errno::EFAULT));
    assert_eq!(map.lock(0, PAGE_SIZE), Err(Errno::ENOMEM));
    assert_eq!(map.advise(0, PAGE_SIZE, libc::MADV_POPULATE_READ), Err(Errno::EFAULT));
    assert!(map.hold(0, PAGE_SIZE, HoldKind::Get).is_err());
    assert_eq!(file.cache_stat(0, 0).unwrap().cached, 0);
}

#[test]
fn references_follow_the_table_of_holders() {
    let machine = machine("sim:default");
    let (_vm, file) = gmem(&machine, 2, SHARED);
    file.allocate(0, PAGE_SIZE).unwrap();
    assert_eq!(refs(&machine, &file, 0), Some(2), "the LRU batch holds one");
    machine.drain_lru().unwrap();
    assert_eq!(refs(&machine, &file, 0), Some(1));
    let maps: Vec<Box<dyn Mapping>> = (0..3).map(|_| file.map(PAGE_SIZE, 0, Protection::SHARED_RW).unwrap()).collect();
    for (i, map) in maps.iter().enumerate() {
        map.write_u64(0, 1).unwrap();
        assert_eq!(refs(&machine, &file, 0), Some(2 + i as u32));
    }
    let pin = maps[0].hold(0, PAGE_SIZE, HoldKind::Pin).unwrap();
    let get = maps[0].hold(0, PAGE_SIZE, HoldKind::Get).unwrap();
    assert_eq!(refs(&machine, &file, 0), Some(4 + 1024 + 1));
    let account = machine.page_account(&*file, 0).unwrap().unwrap();
    assert_eq!(account.held_by("pte"), Some(3));
    file.punch_hole(0, PAGE_SIZE).unwrap();
    assert_eq!(
        machine.with_world(|world| world.host.frames.refs(account.frame)),
        1025,
        "detached, and kept by the pins"
    );
    assert_eq!(maps[0].read_u64(0), Ok(0));
    assert_ne!(maps[0].frame(0).unwrap(), account.frame);
    drop((pin, get));
    assert_eq!(machine.with_world(|world| world.host.frames.refs(account.frame)), 0);
}

#[test]
fn a_mapping_keeps_a_closed_file_and_the_last_one_frees_it() {
    let machine = machine("sim:default");
    let (vm, file) = gmem(&machine, 1, SHARED);
    let map = file.map(PAGE_SIZE, 0, Protection::SHARED_RW).unwrap();
    map.write_u64(0, 77).unwrap();
    drop(file);
    drop(vm);
    assert_eq!(map.read_u64(0), Ok(77));
    assert_eq!(machine.with_world(|world| (world.vms.len(), world.host.pages_in_use())), (1, 1));
    drop(map);
    machine.drain_lru().unwrap();
    assert_eq!(machine.with_world(|world| (world.vms.len(), world.host.pages_in_use())), (0, 0));
}

#[test]
fn poison_stays_with_the_page_until_it_is_punched() {
    let machine = machine("sim:default");
    let (_vm, file) = gmem(&machine, 1, SHARED);
    let map = file.map(PAGE_SIZE, 0, Protection::SHARED_RW).unwrap();
    map.write_u64(0, 5).unwrap();
    assert_eq!(map.advise(0, PAGE_SIZE, libc::MADV_HWPOISON), Err(Errno::EBUSY));
    let fault = map.read_u64(0).unwrap_err();
    assert_eq!((fault.signal, fault.code), (libc::SIGBUS, 4));
    file.punch_hole(0, PAGE_SIZE).unwrap();
    assert!(map.read_u64(0).is_err(), "the old entry stays poisoned");
    map.advise(0, PAGE_SIZE, libc::MADV_DONTNEED).unwrap();
    assert_eq!(map.read_u64(0), Ok(0));
}

#[test]
fn madvise_answers_by_the_table() {
    let machine = machine("sim:default");
    let (_vm, file) = gmem(&machine, 2, SHARED);
    let map = file.map(2 * PAGE_SIZE, 0, Protection::SHARED_RW).unwrap();
    map.fill(0, 2 * PAGE_SIZE, 9).unwrap();
    for (advice, expected) in [
        (libc::MADV_FREE, Err(Errno::EINVAL)),
        (libc::MADV_WIPEONFORK, Err(Errno::EINVAL)),
        (25, Err(Errno::EINVAL)),
        (libc::MADV_HUGEPAGE, Ok(())),
        (libc::MADV_COLD, Ok(())),
        (libc::MADV_DONTNEED, Ok(())),
    ] {
        assert_eq!(map.advise(0, PAGE_SIZE, advice), expected, "{advice}");
    }
    assert_eq!(map.read(0, &mut [0]), Ok(()));
    assert_eq!(map.find_mismatch(0, PAGE_SIZE, 9), Ok(None), "MADV_DONTNEED keeps the data");
    map.advise(0, PAGE_SIZE, libc::MADV_REMOVE).unwrap();
    assert_eq!(map.read_u64(0), Ok(0), "MADV_REMOVE is a punch");
    map.lock(PAGE_SIZE, PAGE_SIZE).unwrap();
    assert_eq!(map.advise(PAGE_SIZE, PAGE_SIZE, libc::MADV_REMOVE), Err(Errno::EINVAL));
}

#[test]
fn conversion_checks_and_reports_the_page_that_is_held() {
    let machine = machine("sim:sw-protected,kernel=in-place");
    let (_vm, file) = gmem(&machine, 4, SHARED);
    let convert = |page: u64, pages: u64, attributes| {
        file.convert(page * PAGE_SIZE, pages * PAGE_SIZE, attributes).map_err(|error| (error.errno, error.offset))
    };
    for (offset, len, attributes) in
        [(0, 0, 8), (0, 4096, 1), (1, 4096, 8), (0, 4097, 8), (4096, 16384, 8), (u64::MAX - 4095, 4096, 8)]
    {
        assert_eq!(file.convert(offset, len, attributes).unwrap_err().errno, Errno::EINVAL, "{offset} {len}");
    }
    let map = file.map(4 * PAGE_SIZE, 0, Protection::SHARED_RW).unwrap();
    map.fill(0, 4 * PAGE_SIZE, 7).unwrap();
    let pin = map.hold(2 * PAGE_SIZE, PAGE_SIZE, HoldKind::Pin).unwrap();
    assert_eq!(convert(0, 4, 8), Err((Errno::EAGAIN, Some(2 * PAGE_SIZE))));
    assert_eq!(map.find_mismatch(0, 4 * PAGE_SIZE, 7), Ok(None), "nothing was converted");
    assert_eq!(convert(0, 2, 8), Ok(()));
    assert_eq!(convert(2, 1, 8), Err((Errno::EAGAIN, Some(2 * PAGE_SIZE))));
    drop(pin);
    assert_eq!(convert(0, 4, 8), Ok(()));
    assert!((0..4).all(|page| map.read_u64(page * PAGE_SIZE).is_err()));
    assert_eq!(file.cache_stat(0, 0).unwrap().cached, 4);
    assert_eq!(convert(1, 1, 0), Ok(()));
    assert_eq!(map.read_u64(PAGE_SIZE), Ok(0x0707_0707_0707_0707), "the bytes stay on a VM without encryption");
    assert!(map.read_u64(0).is_err() && map.read_u64(2 * PAGE_SIZE).is_err());
    file.punch_hole(PAGE_SIZE, PAGE_SIZE).unwrap();
    assert_eq!(map.read_u64(PAGE_SIZE), Ok(0), "punched, and still shared");
}

#[test]
fn conversion_waits_for_a_speculative_reference_once() {
    let machine = machine("sim:sw-protected,kernel=in-place");
    let (_vm, file) = gmem(&machine, 1, SHARED);
    file.allocate(0, PAGE_SIZE).unwrap();
    let pfn = machine.page_account(&*file, 0).unwrap().unwrap().frame;
    machine.with_world(|world| world.host.frames.get_speculative(pfn, 1, 3));
    assert_eq!(file.convert(0, PAGE_SIZE, 8).unwrap_err().errno, Errno::EAGAIN);
    assert_eq!(file.convert(0, PAGE_SIZE, 8), Ok(()));
    assert_eq!(machine_without_ioctl(), Errno::ENOTTY);
}

fn machine_without_ioctl() -> Errno {
    let machine = machine("sim:sw-protected,kernel=7.3");
    let (_vm, file) = gmem(&machine, 1, MMAP);
    file.convert(1, 1, 1).unwrap_err().errno
}
