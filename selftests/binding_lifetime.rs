//! What may be done with a memslot that is bound to a guest_memfd, and what outlives what.

use std::fs::OpenOptions;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;

use gmemtest::harness::{ChildEnd, Context, Stop, TestResult, in_child};
use gmemtest::machine::{Errno, GuestMemfd, MemoryRegion, PAGE_SIZE, Protection, RegionFile, Vm, VmConfig};
use gmemtest::uapi::kvm::GUEST_MEMFD_FLAG_MMAP;
use gmemtest::{claim_eq, claim_err, claim_ok};
use kvm_bindings::{
    KVM_MEM_GUEST_MEMFD, KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, kvm_userspace_memory_region,
    kvm_userspace_memory_region2,
};

gmemtest::suite! {
    /// Memslots bound to a guest_memfd: changing, deleting and re-creating them, several slots and several files, and what
    /// is left when a side is closed.
    pub static SUITE: binding_lifetime needs [Vm, GuestMemfd, UserMemory2] {
        /// A bound slot cannot be changed in any field: every call on it but deletion is EINVAL, the identical one too
        /// (kvm_set_memory_region(): no changes to guest_memfd slots). A failure means that a binding can change under
        /// mapped pages.
        bound_slot_is_immutable[CHANGES];

        /// An ordinary slot cannot be given a guest_memfd later (kvm_set_memory_region()). A failure means that private
        /// memory can appear in a slot whose mappings were made without it.
        ordinary_slot_cannot_be_bound_later;

        /// An ordinary slot may be set again as it is (KVM_MR_FLAGS_ONLY with no change): 0. A failure breaks VMMs that
        /// re-issue their slots.
        ordinary_slot_may_be_set_again;

        /// A size of 0 deletes the slot, whatever file the call names (kvm_set_memory_region(): the file is looked at only
        /// for a new slot). A failure means that a VMM has to keep the descriptor open to delete its slots.
        deletion_ignores_the_file[DELETIONS];

        /// The other fields of a deletion are still checked (check_memory_region_flags() and the alignment checks come
        /// first). A failure means that the check order changed.
        deletion_with_a_wrong_field_is_refused[WRONG_DELETIONS];

        /// A slot that does not exist cannot be deleted: EINVAL. A failure hides a VMM's book-keeping error.
        deleting_an_absent_slot_is_refused;

        /// A deleted slot's range of the file can be bound again at once, to any slot id at any address
        /// (kvm_gmem_unbind()). A failure means that deletion leaks the binding.
        deleted_range_can_be_bound_again[REBINDS];

        /// Any number of slots may bind disjoint ranges of one guest_memfd. A failure means that a VMM cannot have holes
        /// in a guest's memory.
        one_file_serves_many_slots;

        /// Several guest_memfds of one VM are independent: the same offset of each may be bound. A failure means that
        /// bindings are compared across files.
        same_offset_of_two_files_can_be_bound;

        /// A duplicate of the descriptor is the same file: it binds, and the overlap check sees through it
        /// (kvm_gmem_get_file() compares files, not descriptors). A failure lets one page into two slots.
        duplicate_descriptor_is_the_same_file;

        /// The slot stays when its guest_memfd is closed: its guest-physical range is taken, its id cannot be bound, and
        /// it can be deleted (kvm_gmem_release() only clears slot->gmem.file). A failure means that closing a file
        /// changes the memory map of the VM.
        slot_outlives_the_file;

        /// Pages stay in the file when the slot is deleted (kvm_gmem_unbind() frees nothing). A failure means that
        /// deleting a slot loses the guest's memory.
        pages_outlive_the_slot needs [Cachestat];

        /// A mapping does not stop the slot from going, nor the reverse. A failure means that a VMM's own mapping pins
        /// the memory map.
        mapping_and_slot_are_independent needs [GmemMmap];

        /// The guest_memfd keeps the VM alive: it is allocated and punched after the VM descriptor is closed
        /// (kvm_gmem_create() takes a reference on the VM). A failure is a use after free in the kernel.
        file_works_after_the_vm_is_closed;

        /// pad1 and pad2 of struct kvm_userspace_memory_region2 are not looked at. A failure means that VMMs which do not
        /// clear them break.
        padding_is_ignored needs [RealFiles];

        /// KVM_SET_USER_MEMORY_REGION2 reads all 160 bytes of its argument, KVM_SET_USER_MEMORY_REGION only 32; memory
        /// that is not there is EFAULT (kvm_vm_ioctl()). A failure means that the size of the ABI changed.
        argument_size_is_fixed[ARGUMENTS] needs [RealFiles];

        /// A descriptor opened with O_PATH is not a file that can be bound: EBADF (fget()). A failure means that a path
        /// handle gives access to the memory.
        o_path_descriptor_is_refused needs [RealFiles];

        /// A process that forked from the VMM cannot use the VM: EIO before any other check (kvm_vm_ioctl(): the mm
        /// differs). A failure lets a child change the parent's memory map.
        forked_child_is_refused[FORKED] needs [RealFiles];
    }
}

const BASE: u64 = 1 << 32;
const SLOT: u32 = 5;
const LEN: u64 = 4 * PAGE_SIZE;

/// A VM, a guest_memfd of eight pages, and a region that binds its first four.
struct Scene {
    vm: Arc<dyn Vm>,
    gmem: Arc<dyn GuestMemfd>,
}

impl Scene {
    fn new(cx: &Context) -> TestResult<Scene> {
        let vm = claim_ok!(cx.machine().create_vm(VmConfig::Bare));
        let gmem = claim_ok!(vm.create_guest_memfd(2 * LEN, 0));
        Ok(Scene { vm, gmem })
    }

    fn bound(cx: &Context) -> TestResult<Scene> {
        let scene = Scene::new(cx)?;
        claim_ok!(scene.vm.set_memory_region(&scene.region()), "the slot that the test is about");
        Ok(scene)
    }

    fn region(&self) -> MemoryRegion<'_> {
        MemoryRegion::new(SLOT, BASE, LEN).bound_to(&*self.gmem, 0)
    }
}

type Change = for<'s> fn(MemoryRegion<'s>, &'s Scene) -> MemoryRegion<'s>;

const CHANGES: &[(&str, Change)] = &[
    ("nothing", |region, _| region),
    ("gpa", |region, _| MemoryRegion { gmem: region.gmem, gpa: BASE + (1 << 30), ..region }),
    ("userspace_addr", |region, _| region.at(0x10_0000)),
    ("grow", |region, _| MemoryRegion { size: 2 * LEN, ..region }),
    ("shrink", |region, _| MemoryRegion { size: LEN / 2, ..region }),
    ("offset", |region, scene| region.bound_to(&*scene.gmem, LEN)),
    ("closed_descriptor", |region, _| region.naming(RegionFile::NotOpen, 0)),
    ("drop_the_flag", |region, _| MemoryRegion { flags: 0, gmem: None, ..region }),
    ("drop_the_flag_and_move", |region, _| MemoryRegion { flags: 0, gmem: None, gpa: BASE + (1 << 30), ..region }),
    ("dirty_log", |region, _| MemoryRegion { flags: KVM_MEM_LOG_DIRTY_PAGES, gmem: None, ..region }),
    ("read_only", |region, _| MemoryRegion { flags: KVM_MEM_READONLY, gmem: None, ..region }),
];

fn bound_slot_is_immutable(cx: &Context, change: &Change) -> TestResult {
    let scene = Scene::bound(cx)?;
    claim_err!(scene.vm.set_memory_region(&change(scene.region(), &scene)), Errno::EINVAL, "the changed region");
    claim_ok!(scene.vm.set_memory_region(&MemoryRegion::deletion(SLOT)), "deletion after the refused change");
    Ok(())
}

fn ordinary_slot_cannot_be_bound_later(cx: &Context) -> TestResult {
    let scene = Scene::new(cx)?;
    claim_ok!(scene.vm.set_memory_region(&MemoryRegion::new(SLOT, BASE, LEN)));
    claim_err!(scene.vm.set_memory_region(&scene.region()), Errno::EINVAL, "the same slot with KVM_MEM_GUEST_MEMFD");
    Ok(())
}

fn ordinary_slot_may_be_set_again(cx: &Context) -> TestResult {
    let scene = Scene::new(cx)?;
    let region = MemoryRegion::new(SLOT, BASE, LEN);
    claim_ok!(scene.vm.set_memory_region(&region));
    claim_ok!(scene.vm.set_memory_region(&region), "the identical call");
    Ok(())
}

/// How a slot is deleted.
#[derive(Clone, Copy, Debug)]
enum Deletion {
    /// Nothing but the id.
    Plain,
    /// With KVM_MEM_GUEST_MEMFD and a file.
    Naming(NamedFile),
    /// With the fields of the slot that is deleted.
    SameFields,
    /// KVM_SET_USER_MEMORY_REGION.
    FirstVersion,
}

#[derive(Clone, Copy, Debug)]
enum NamedFile {
    NotOpen,
    KvmDevice,
    OwnGmem,
}

const DELETIONS: &[(&str, Deletion)] = &[
    ("plain", Deletion::Plain),
    ("closed_descriptor", Deletion::Naming(NamedFile::NotOpen)),
    ("dev_kvm", Deletion::Naming(NamedFile::KvmDevice)),
    ("own_gmem", Deletion::Naming(NamedFile::OwnGmem)),
    ("with_the_fields_of_the_slot", Deletion::SameFields),
    ("by_the_first_version_of_the_ioctl", Deletion::FirstVersion),
];

fn deletion_ignores_the_file(cx: &Context, deletion: &Deletion) -> TestResult {
    let scene = Scene::bound(cx)?;
    let plain = MemoryRegion::deletion(SLOT);
    let result = match deletion {
        Deletion::Plain => scene.vm.set_memory_region(&plain),
        Deletion::Naming(file) => {
            let file = match file {
                NamedFile::NotOpen => RegionFile::NotOpen,
                NamedFile::KvmDevice => RegionFile::KvmDevice,
                NamedFile::OwnGmem => RegionFile::Gmem(&*scene.gmem),
            };
            scene.vm.set_memory_region(&plain.naming(file, 0))
        }
        Deletion::SameFields => scene.vm.set_memory_region(&MemoryRegion { size: 0, ..scene.region() }),
        Deletion::FirstVersion => scene.vm.set_memory_region_v1(&plain),
    };
    claim_ok!(result, "deletion, {deletion:?}");
    claim_ok!(scene.vm.set_memory_region(&scene.region()), "the slot can be made again");
    Ok(())
}

const WRONG_DELETIONS: &[(&str, Change)] = &[
    ("dirty_log_with_gmem", |region, _| region.with_flags(KVM_MEM_GUEST_MEMFD | KVM_MEM_LOG_DIRTY_PAGES)),
    ("unknown_flag", |region, _| region.with_flags(1 << 3)),
    ("gpa_unaligned", |region, _| MemoryRegion { gpa: BASE + 1, ..region }),
    ("userspace_addr_unaligned", |region, _| region.at(1)),
    ("offset_unaligned", |region, scene| region.bound_to(&*scene.gmem, 1)),
];

fn deletion_with_a_wrong_field_is_refused(cx: &Context, wrong: &Change) -> TestResult {
    let scene = Scene::bound(cx)?;
    let deletion = wrong(MemoryRegion::deletion(SLOT), &scene);
    claim_err!(scene.vm.set_memory_region(&deletion), Errno::EINVAL, "the deletion");
    claim_ok!(scene.vm.set_memory_region(&MemoryRegion::deletion(SLOT)), "the slot is still there");
    Ok(())
}

fn deleting_an_absent_slot_is_refused(cx: &Context) -> TestResult {
    let scene = Scene::bound(cx)?;
    claim_err!(scene.vm.set_memory_region(&MemoryRegion::deletion(SLOT + 1)), Errno::EINVAL, "another slot's id");
    claim_ok!(scene.vm.set_memory_region(&MemoryRegion::deletion(SLOT)));
    claim_err!(scene.vm.set_memory_region(&MemoryRegion::deletion(SLOT)), Errno::EINVAL, "the second deletion");
    Ok(())
}

/// Slot id and guest-physical address of the new slot.
const REBINDS: &[(&str, (u32, u64))] =
    &[("same_slot", (SLOT, BASE)), ("other_slot", (SLOT + 1, BASE)), ("other_gpa", (SLOT, BASE + (1 << 30)))];

fn deleted_range_can_be_bound_again(cx: &Context, &(slot, gpa): &(u32, u64)) -> TestResult {
    let scene = Scene::bound(cx)?;
    for round in 0..8 {
        let old = if round == 0 { SLOT } else { slot };
        claim_ok!(scene.vm.set_memory_region(&MemoryRegion::deletion(old)), "deletion, round {round}");
        let region = MemoryRegion { slot, gpa, ..scene.region() };
        claim_ok!(scene.vm.set_memory_region(&region), "binding, round {round}");
    }
    Ok(())
}

fn one_file_serves_many_slots(cx: &Context) -> TestResult {
    let scene = Scene::new(cx)?;
    let pages = 2 * LEN / PAGE_SIZE;
    // In reverse and with gaps in the guest, so that neither order is the file's.
    for page in (0..pages).rev() {
        let region = MemoryRegion::new(SLOT + page as u32, BASE + (pages - page) * 3 * PAGE_SIZE, PAGE_SIZE);
        claim_ok!(scene.vm.set_memory_region(&region.bound_to(&*scene.gmem, page * PAGE_SIZE)), "page {page}");
    }
    Ok(())
}

fn same_offset_of_two_files_can_be_bound(cx: &Context) -> TestResult {
    let scene = Scene::bound(cx)?;
    let second = claim_ok!(scene.vm.create_guest_memfd(LEN, 0));
    let region = MemoryRegion::new(SLOT + 1, BASE + LEN, LEN).bound_to(&*second, 0);
    claim_ok!(scene.vm.set_memory_region(&region), "offset 0 of a second file");
    Ok(())
}

fn duplicate_descriptor_is_the_same_file(cx: &Context) -> TestResult {
    let scene = Scene::bound(cx)?;
    let duplicate = claim_ok!(scene.gmem.duplicate());
    let again = MemoryRegion::new(SLOT + 1, BASE + LEN, LEN).bound_to(&*duplicate, 0);
    // EEXIST came with "KVM guest_memfd changes for 7.2".
    let taken = cx.by_release(&[((6, 8), Errno::EINVAL), ((7, 2), Errno::EEXIST)])?;
    claim_err!(scene.vm.set_memory_region(&again), taken, "the bound range by the duplicate");
    claim_ok!(scene.vm.set_memory_region(&again.bound_to(&*duplicate, LEN)), "the free range by the duplicate");
    Ok(())
}

fn slot_outlives_the_file(cx: &Context) -> TestResult {
    let Scene { vm, gmem } = Scene::bound(cx)?;
    drop(gmem);
    let fresh = claim_ok!(vm.create_guest_memfd(LEN, 0));
    let other = MemoryRegion::new(SLOT + 1, BASE, LEN).bound_to(&*fresh, 0);
    claim_err!(vm.set_memory_region(&other), Errno::EEXIST, "another slot at the address of the orphan");
    let same = MemoryRegion { slot: SLOT, ..other };
    claim_err!(vm.set_memory_region(&same), Errno::EINVAL, "the orphan's own id, with a new file");
    claim_ok!(vm.set_memory_region(&MemoryRegion::deletion(SLOT)), "deletion of the orphan");
    claim_ok!(vm.set_memory_region(&same), "the id with a new file after the deletion");
    Ok(())
}

fn pages_outlive_the_slot(cx: &Context) -> TestResult {
    let Scene { vm, gmem } = Scene::bound(cx)?;
    claim_ok!(gmem.allocate(0, LEN));
    claim_ok!(vm.set_memory_region(&MemoryRegion::deletion(SLOT)));
    claim_eq!(claim_ok!(gmem.cache_stat(0, 0)).cached, LEN / PAGE_SIZE, "pages in the file after the deletion");
    Ok(())
}

fn mapping_and_slot_are_independent(cx: &Context) -> TestResult {
    let vm = claim_ok!(cx.machine().create_vm(VmConfig::Bare));
    let gmem = claim_ok!(vm.create_guest_memfd(LEN, GUEST_MEMFD_FLAG_MMAP));
    let mapping = claim_ok!(gmem.map(LEN, 0, Protection::SHARED_RW));
    let region = MemoryRegion::new(SLOT, BASE, LEN).at(mapping.addr()).bound_to(&*gmem, 0);
    claim_ok!(vm.set_memory_region(&region), "a slot whose userspace_addr maps the same file");
    claim_ok!(vm.set_memory_region(&MemoryRegion::deletion(SLOT)), "deletion while mapped");
    claim_ok!(vm.set_memory_region(&region));
    drop(mapping);
    claim_ok!(vm.set_memory_region(&MemoryRegion::deletion(SLOT)), "deletion after the mapping is gone");
    Ok(())
}

fn file_works_after_the_vm_is_closed(cx: &Context) -> TestResult {
    let Scene { vm, gmem } = Scene::bound(cx)?;
    drop(vm);
    claim_ok!(gmem.allocate(0, LEN), "allocation");
    claim_ok!(gmem.punch_hole(0, 2 * LEN), "punch hole");
    claim_ok!(gmem.allocate(0, 2 * LEN), "allocation after the punch");
    Ok(())
}

fn raw_vm(vm: &dyn Vm) -> TestResult<RawFd> {
    vm.raw_fd().ok_or_else(|| Stop::fail("the machine has real files and no descriptor for its VM"))
}

fn raw_gmem(gmem: &dyn GuestMemfd) -> TestResult<RawFd> {
    gmem.raw_fd().ok_or_else(|| Stop::fail("the machine has real files and no descriptor for its guest_memfd"))
}

/// KVM_SET_USER_MEMORY_REGION and KVM_SET_USER_MEMORY_REGION2, by number because the arguments here are wrong on purpose.
const SET_REGION: [libc::c_ulong; 2] = [0x4020_AE46, 0x40A0_AE49];

/// One of the two ioctls with any address as its argument.
fn set_region_raw(vm: RawFd, version: usize, argument: *const u8) -> Result<(), Errno> {
    // SAFETY: both ioctls only read their argument, through copy_from_user(), which answers a bad address with EFAULT.
    match unsafe { libc::ioctl(vm, SET_REGION[version - 1] as _, argument) } {
        0 => Ok(()),
        _ => Err(Errno::last()),
    }
}

fn padding_is_ignored(cx: &Context) -> TestResult {
    let scene = Scene::new(cx)?;
    let region = kvm_userspace_memory_region2 {
        slot: SLOT,
        flags: KVM_MEM_GUEST_MEMFD,
        guest_phys_addr: BASE,
        memory_size: LEN,
        guest_memfd: raw_gmem(&*scene.gmem)? as u32,
        pad1: u32::MAX,
        pad2: [u64::MAX; 14],
        ..Default::default()
    };
    claim_ok!(set_region_raw(raw_vm(&*scene.vm)?, 2, (&raw const region).cast()), "a region with all padding bits set");
    Ok(())
}

/// Version of the ioctl, how many bytes of its argument are mapped, and the result.
type Argument = (usize, usize, Result<(), Errno>);

const ARGUMENTS: &[(&str, Argument)] = &[
    ("v1_nothing_mapped", (1, 0, Err(Errno::EFAULT))),
    ("v1_31_bytes", (1, 31, Err(Errno::EFAULT))),
    ("v1_32_bytes", (1, size_of::<kvm_userspace_memory_region>(), Ok(()))),
    ("v2_nothing_mapped", (2, 0, Err(Errno::EFAULT))),
    ("v2_32_bytes", (2, 32, Err(Errno::EFAULT))),
    ("v2_159_bytes", (2, 159, Err(Errno::EFAULT))),
    ("v2_160_bytes", (2, size_of::<kvm_userspace_memory_region2>(), Ok(()))),
];

fn argument_size_is_fixed(cx: &Context, &(version, mapped, result): &Argument) -> TestResult {
    let scene = Scene::new(cx)?;
    let pages = claim_ok!(cx.machine().host_memory(gmemtest::machine::HostMemory::Anonymous, 2 * PAGE_SIZE));
    let region =
        kvm_userspace_memory_region { slot: SLOT, guest_phys_addr: BASE, memory_size: LEN, ..Default::default() };
    let mut bytes = [0; size_of::<kvm_userspace_memory_region2>()];
    // SAFETY: the struct is plain integers without padding; the slice covers it and lives shorter than it does.
    let head = unsafe { std::slice::from_raw_parts((&raw const region).cast::<u8>(), size_of_val(&region)) };
    bytes[..head.len()].copy_from_slice(head);
    let at = PAGE_SIZE - mapped as u64;
    pages.write(at, &bytes[..mapped])?;
    claim_ok!(pages.unmap_part(PAGE_SIZE, PAGE_SIZE));
    let argument = (pages.addr() + at) as *const u8;
    claim_eq!(set_region_raw(raw_vm(&*scene.vm)?, version, argument), result, "{mapped} bytes of v{version}");
    Ok(())
}

fn o_path_descriptor_is_refused(cx: &Context) -> TestResult {
    let scene = Scene::new(cx)?;
    let path = format!("/proc/self/fd/{}", raw_gmem(&*scene.gmem)?);
    let handle = OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(path)?;
    let region = kvm_userspace_memory_region2 {
        slot: SLOT,
        flags: KVM_MEM_GUEST_MEMFD,
        guest_phys_addr: BASE,
        memory_size: LEN,
        guest_memfd: handle.as_raw_fd() as u32,
        ..Default::default()
    };
    let result = set_region_raw(raw_vm(&*scene.vm)?, 2, (&raw const region).cast());
    claim_err!(result, Errno::EBADF, "an O_PATH descriptor of the guest_memfd");
    Ok(())
}

type Call = fn(&Scene) -> Result<(), Errno>;

const FORKED: &[(&str, Call)] = &[
    ("binding", |scene| scene.vm.set_memory_region(&MemoryRegion { slot: SLOT + 1, ..scene.region() })),
    ("binding_with_a_wrong_flag", |scene| scene.vm.set_memory_region(&scene.region().with_flags(1 << 3))),
    ("deletion", |scene| scene.vm.set_memory_region(&MemoryRegion::deletion(SLOT))),
    ("creating_a_file", |scene| scene.vm.create_guest_memfd(PAGE_SIZE, 0).map(drop)),
];

fn forked_child_is_refused(cx: &Context, call: &Call) -> TestResult {
    let scene = Scene::bound(cx)?;
    let end = in_child(|| call(&scene).map(|()| 0))?;
    claim_eq!(end, ChildEnd::Returned(Err(Errno::EIO)), "how the call ended in the child");
    claim_ok!(scene.vm.set_memory_region(&MemoryRegion::deletion(SLOT)), "the parent still can");
    Ok(())
}

/// The stand-alone binary.
pub fn main() -> std::process::ExitCode {
    gmemtest::cli::selftest_main(&[&SUITE])
}
