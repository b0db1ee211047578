//! Where the memory goes: pages and VMs are charged to whoever asked for them, and given back when nothing uses them.
//!
//! Every test moves into a memory cgroup of its own and reads what is charged to it, which no other process disturbs.

use std::sync::Arc;
use std::thread::sleep;
use std::time::{Duration, Instant};

use gmemtest::harness::{Context, GmemVm, MemoryGroup, TestResult};
use gmemtest::machine::{
    Errno, Exit, Facility, GuestMemfd, GuestOp, HoldKind, MemoryAttributes, MemoryRegion, PAGE_SIZE, Protection, Vm,
    VmConfig, VmType,
};
use gmemtest::uapi::kvm::{GUEST_MEMFD_FLAG_INIT_SHARED, GUEST_MEMFD_FLAG_MMAP, KVM_MEMORY_ATTRIBUTE_PRIVATE};
use gmemtest::{claim, claim_eq, claim_matches, claim_ok};

gmemtest::suite! {
    /// Charges of guest_memfd and of its VMs to a memory cgroup, and what is given back.
    pub static SUITE: gmem_memory needs [Vm, GuestMemfd, MemoryCgroup, RealFiles] {
        /// Rounds that begin and end with nothing leave nothing behind: no page, no file, no VM. A failure is a reference
        /// that is taken and not given back (folio, file, kvm), or an error path that frees nothing: the host loses that
        /// memory until it reboots.
        rounds_leave_nothing_behind[ROUNDS] timeout 300;

        /// Pages of a file are charged to the process that allocates them, as file pages: one page each
        /// (filemap_add_folio() charges). A failure means that a guest's memory escapes its limit.
        allocated_pages_are_charged[WAYS];

        /// A punch gives the charge of its pages back. A failure leaves a guest charged for memory that it gave up.
        punch_gives_the_charge_back[WAYS];

        /// At the limit of the group, fallocate(2) fails with ENOMEM and the pages so far stay in the file
        /// (kvm_gmem_allocate()). A failure is a limit that does not hold, or a page that is in no file and in no list.
        allocation_at_the_limit_is_enomem needs [Cachestat];
    }
}

const PAGES: u64 = 8;
const LEN: u64 = PAGES * PAGE_SIZE;
/// Rounds that are counted, and pages that may stay charged: less than a page for each round of [`Cost::File`], less than
/// half of what the smallest VM or file of a round of [`Cost::Vm`] is; and more than what the kernel charges in advance for
/// a CPU (64 pages).
const SLACK: u64 = 128 * PAGE_SIZE;

/// What a round makes and takes away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cost {
    /// A file or less.
    File,
    /// A VM with vCPUs, which takes an emulator a tenth of a second.
    Vm,
}

impl Cost {
    fn rounds(self) -> u64 {
        match self {
            Cost::File => 192,
            Cost::Vm => 40,
        }
    }
}

/// Memory that RCU or a workqueue gives back is given back within this, also on a busy emulator.
const PATIENCE: Duration = Duration::from_secs(60);

/// What one round does; the VM is there for all rounds.
type Round = fn(&Context, &Standing) -> TestResult;

const ROUNDS: &[(&str, (Cost, Round))] = &[
    ("file_with_pages", (Cost::File, file_with_pages)),
    ("punch", (Cost::File, punch)),
    ("host_accesses", (Cost::File, host_accesses)),
    ("guest_accesses", (Cost::Vm, guest_accesses)),
    ("guest_accesses_and_punch", (Cost::Vm, guest_accesses_and_punch)),
    ("file_closed_before_its_slot", (Cost::File, file_closed_before_its_slot)),
    ("slot_recreated", (Cost::File, slot_recreated)),
    ("pre_fault", (Cost::Vm, pre_fault)),
    ("refused_bindings", (Cost::File, refused_bindings)),
    ("refused_files", (Cost::File, refused_files)),
    ("refused_accesses", (Cost::Vm, refused_accesses)),
    ("attributes", (Cost::File, attributes)),
    ("refused_attributes", (Cost::File, refused_attributes)),
    ("held_pages", (Cost::File, held_pages)),
    ("vm_with_everything", (Cost::Vm, vm_with_everything)),
    ("vm_closed_before_its_file", (Cost::Vm, vm_closed_before_its_file)),
    ("vm_closed_with_a_slot_whose_file_is_closed", (Cost::Vm, vm_closed_after_its_file)),
];

/// What stays through all rounds.
struct Standing {
    vm: Arc<dyn Vm>,
    gmem: Arc<dyn GuestMemfd>,
    private: bool,
}

impl Standing {
    fn new(cx: &Context) -> TestResult<Standing> {
        let vm = claim_ok!(cx.machine().create_vm(VmConfig::Payload { vcpus: 2 }));
        let private = cx.has(Facility::PrivateMemory);
        let gmem = claim_ok!(vm.create_guest_memfd(LEN, flags(cx)?));
        Ok(Standing { vm, gmem, private })
    }

    fn slot(&self, gmem: &dyn GuestMemfd) -> TestResult {
        claim_ok!(self.vm.set_memory_region(&MemoryRegion::new(1, GmemVm::GPA, LEN).bound_to(gmem, 0)));
        self.set(if self.private { KVM_MEMORY_ATTRIBUTE_PRIVATE } else { 0 }, 0)
    }

    fn set(&self, attributes: u64, flags: u64) -> TestResult {
        if self.private {
            let range = MemoryAttributes { address: GmemVm::GPA, size: LEN, attributes, flags };
            claim_ok!(self.vm.set_memory_attributes(&range));
        }
        Ok(())
    }

    fn delete(&self) -> TestResult {
        claim_ok!(self.vm.set_memory_region(&MemoryRegion::deletion(1)));
        Ok(())
    }
}

/// Flags of a file that guest accesses use.
fn flags(cx: &Context) -> TestResult<u64> {
    if cx.machine().spec().vm_type == VmType::Tdx {
        gmemtest::skip!(Declined, "a TD's guest has to accept its pages first");
    }
    if cx.has(Facility::PrivateMemory) {
        return Ok(0);
    }
    cx.require(Facility::GmemMmap)?;
    cx.require(Facility::GmemInitShared)?;
    Ok(GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED)
}

fn new_file(cx: &Context, standing: &Standing) -> TestResult<Arc<dyn GuestMemfd>> {
    Ok(claim_ok!(standing.vm.create_guest_memfd(LEN, flags(cx)?)))
}

fn file_with_pages(cx: &Context, standing: &Standing) -> TestResult {
    let gmem = new_file(cx, standing)?;
    claim_ok!(gmem.allocate(0, LEN));
    Ok(())
}

fn punch(_: &Context, standing: &Standing) -> TestResult {
    claim_ok!(standing.gmem.allocate(0, LEN));
    claim_ok!(standing.gmem.punch_hole(0, PAGE_SIZE));
    claim_ok!(standing.gmem.punch_hole(LEN - PAGE_SIZE, 1 << 30));
    claim_ok!(standing.gmem.punch_hole(0, LEN));
    Ok(())
}

fn host_accesses(cx: &Context, standing: &Standing) -> TestResult {
    cx.require(Facility::GmemInitShared)?;
    let gmem = new_file(cx, standing)?;
    let mapping = claim_ok!(gmem.map(2 * LEN, 0, Protection::SHARED_RW));
    for page in 0..PAGES {
        claim_ok!(mapping.write_u64(page * PAGE_SIZE, page));
        claim_eq!(mapping.read_u64(page * PAGE_SIZE), Ok(page), "page {page}");
    }
    // An access that is refused takes nothing either.
    claim!(mapping.read_u64(LEN).is_err(), "an access beyond the end");
    Ok(())
}

fn touch(vm: &dyn Vm, private_or_shared: &str) -> TestResult {
    let mut vcpu = claim_ok!(vm.create_vcpu(0));
    let fill = GuestOp::Fill { gpa: GmemVm::GPA, len: LEN, byte: 0x77 };
    claim_matches!(vcpu.execute(fill), Exit::Done(_), "guest stores to {private_or_shared} memory");
    Ok(())
}

fn guest_accesses(cx: &Context, standing: &Standing) -> TestResult {
    let vm = GmemVm::new(cx, PAGES)?;
    touch(&*vm.vm, "the VM's")?;
    let gmem = new_file(cx, standing)?;
    standing.slot(&*gmem)?;
    standing.delete()
}

fn guest_accesses_and_punch(cx: &Context, _: &Standing) -> TestResult {
    let vm = GmemVm::new(cx, PAGES)?;
    let mut vcpu = vm.vcpu(0)?;
    for _ in 0..2 {
        let fill = GuestOp::Fill { gpa: vm.gpa(0), len: LEN, byte: 0x77 };
        claim_matches!(vcpu.execute(fill), Exit::Done(_), "guest stores");
        claim_ok!(vm.gmem.punch_hole(0, LEN));
    }
    Ok(())
}

fn file_closed_before_its_slot(cx: &Context, standing: &Standing) -> TestResult {
    let gmem = new_file(cx, standing)?;
    claim_ok!(gmem.allocate(0, LEN));
    standing.slot(&*gmem)?;
    drop(gmem);
    standing.delete()
}

fn slot_recreated(_: &Context, standing: &Standing) -> TestResult {
    standing.slot(&*standing.gmem)?;
    standing.delete()?;
    standing.slot(&*standing.gmem)?;
    standing.delete()
}

fn pre_fault(cx: &Context, _: &Standing) -> TestResult {
    cx.require(Facility::PreFault)?;
    let vm = GmemVm::new(cx, PAGES)?;
    let mut vcpu = vm.vcpu(0)?;
    let done = vcpu.pre_fault(vm.gpa(0), LEN, 0);
    claim_eq!((done.result, done.size), (Ok(()), 0), "pre-fault of the slot");
    claim!(vcpu.pre_fault(vm.gpa(1 << 30), PAGE_SIZE, 0).result.is_err(), "pre-fault outside the slots");
    drop(vm.gmem);
    drop(vm.shared);
    Ok(())
}

fn refused_bindings(cx: &Context, standing: &Standing) -> TestResult {
    let gmem = new_file(cx, standing)?;
    claim_ok!(gmem.allocate(0, LEN));
    let other = claim_ok!(cx.machine().create_vm(VmConfig::Bare));
    let region = MemoryRegion::new(1, GmemVm::GPA, LEN);
    for (what, vm, region) in [
        ("beyond the end", &standing.vm, region.bound_to(&*gmem, PAGE_SIZE)),
        ("an unaligned offset", &standing.vm, region.bound_to(&*gmem, 1)),
        ("a VM that the file is not of", &other, region.bound_to(&*gmem, 0)),
        ("an address beyond the width", &standing.vm, MemoryRegion { gpa: 1 << 60, ..region.bound_to(&*gmem, 0) }),
    ] {
        claim!(vm.set_memory_region(&region).is_err(), "{what} is refused");
    }
    standing.slot(&*gmem)?;
    let overlapping = MemoryRegion { slot: 2, gpa: GmemVm::GPA + (1 << 30), ..region.bound_to(&*gmem, 0) };
    claim!(standing.vm.set_memory_region(&overlapping).is_err(), "a range that is bound is refused");
    let twice = MemoryRegion { slot: 2, ..region.bound_to(&*gmem, 0) };
    claim_eq!(standing.vm.set_memory_region(&twice), Err(Errno::EEXIST), "a guest-physical range that is taken");
    standing.delete()
}

fn refused_files(cx: &Context, _: &Standing) -> TestResult {
    // The VM is the round's own: a reference to it that an error keeps shows when it should go.
    let vm = claim_ok!(cx.machine().create_vm(VmConfig::Bare));
    for (size, flags) in [(0, 0), (1, 0), (LEN, 1 << 63), (1 << 63, 0)] {
        claim!(vm.create_guest_memfd(size, flags).is_err(), "size {size:#x}, flags {flags:#x} is refused");
    }
    Ok(())
}

fn refused_accesses(cx: &Context, _: &Standing) -> TestResult {
    cx.require(Facility::MemoryFaultInfo)?;
    let vm = claim_ok!(cx.machine().create_vm(VmConfig::Payload { vcpus: 1 }));
    let gmem = claim_ok!(vm.create_guest_memfd(LEN, flags(cx)?));
    let own = Standing { vm, gmem, private: cx.has(Facility::PrivateMemory) };
    own.slot(&*own.gmem)?;
    let mut vcpu = claim_ok!(own.vm.create_vcpu(0));
    claim_matches!(vcpu.execute(GuestOp::read_u64(GmemVm::GPA)), Exit::Done(_), "an access");
    let Standing { vm, gmem, .. } = own;
    drop(gmem);
    for page in 0..PAGES {
        let exit = vcpu.execute(GuestOp::read_u64(GmemVm::GPA + page * PAGE_SIZE));
        claim_matches!(exit, Exit::MemoryFault { .. }, "an access to page {page} of a file that is closed");
    }
    drop(vcpu);
    drop(vm);
    Ok(())
}

fn attributes(cx: &Context, standing: &Standing) -> TestResult {
    cx.require(Facility::MemoryAttributes)?;
    standing.set(KVM_MEMORY_ATTRIBUTE_PRIVATE, 0)?;
    standing.set(0, 0)?;
    let far = |attributes| MemoryAttributes { address: 1 << 45, size: 4 << 20, attributes, flags: 0 };
    claim_ok!(standing.vm.set_memory_attributes(&far(KVM_MEMORY_ATTRIBUTE_PRIVATE)));
    claim_ok!(standing.vm.set_memory_attributes(&far(0)));
    Ok(())
}

fn refused_attributes(cx: &Context, standing: &Standing) -> TestResult {
    cx.require(Facility::MemoryAttributes)?;
    let range = MemoryAttributes { address: GmemVm::GPA, size: LEN, attributes: 1, flags: 0 };
    claim_eq!(standing.vm.set_memory_attributes(&range), Err(Errno::EINVAL), "an unknown attribute");
    let range = MemoryAttributes { attributes: KVM_MEMORY_ATTRIBUTE_PRIVATE, flags: 1, ..range };
    claim_eq!(standing.vm.set_memory_attributes(&range), Err(Errno::EINVAL), "a flag");
    Ok(())
}

fn held_pages(cx: &Context, standing: &Standing) -> TestResult {
    cx.require(Facility::GmemInitShared)?;
    cx.require(Facility::HoldPin)?;
    let gmem = new_file(cx, standing)?;
    let mapping = claim_ok!(gmem.map(LEN, 0, Protection::SHARED_RW));
    claim_ok!(mapping.fill(0, LEN, 0x11));
    let hold = claim_ok!(mapping.hold(0, LEN, HoldKind::Pin));
    claim_ok!(gmem.punch_hole(0, LEN));
    claim_ok!(mapping.fill(0, LEN, 0x22));
    drop(hold);
    Ok(())
}

fn vm_with_everything(cx: &Context, _: &Standing) -> TestResult {
    let vm = GmemVm::new(cx, PAGES)?;
    touch(&*vm.vm, "the VM's")?;
    vm.delete_slot()?;
    Ok(())
}

fn vm_closed_before_its_file(cx: &Context, _: &Standing) -> TestResult {
    let vm = GmemVm::new(cx, PAGES)?;
    touch(&*vm.vm, "the VM's")?;
    let GmemVm { vm, gmem, shared, .. } = vm;
    drop(vm);
    claim_ok!(gmem.punch_hole(0, PAGE_SIZE));
    claim_ok!(gmem.allocate(0, LEN));
    drop(gmem);
    drop(shared);
    Ok(())
}

fn vm_closed_after_its_file(cx: &Context, _: &Standing) -> TestResult {
    let vm = GmemVm::new(cx, PAGES)?;
    touch(&*vm.vm, "the VM's")?;
    let GmemVm { vm, gmem, shared, .. } = vm;
    drop(shared);
    drop(gmem);
    drop(vm);
    Ok(())
}

/// Claims that the charge comes down to `limit`: some of it is given back by RCU and workqueues.
fn claim_charge_at_most(group: &MemoryGroup, limit: u64, what: &str) -> TestResult {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let charged = group.charged()?;
        if charged <= limit {
            return Ok(());
        }
        if Instant::now() > deadline {
            claim!(charged <= limit, "{what}: {} pages too much are charged", (charged - limit).div_ceil(PAGE_SIZE));
        }
        sleep(Duration::from_millis(20));
    }
}

fn rounds_leave_nothing_behind(cx: &Context, &(cost, round): &(Cost, Round)) -> TestResult {
    let group = MemoryGroup::enter()?;
    let standing = Standing::new(cx)?;
    // The first rounds fill caches.
    for _ in 0..4 {
        round(cx, &standing)?;
    }
    let before = group.charged()?;
    for _ in 0..cost.rounds() {
        round(cx, &standing)?;
    }
    cx.note(format!(
        "{} KiB more were charged right after {} rounds",
        group.charged()?.saturating_sub(before) >> 10,
        cost.rounds()
    ));
    claim_charge_at_most(&group, before + SLACK, "after all rounds")?;
    drop(standing);
    drop(group);
    Ok(())
}

/// How pages come into a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Fallocate,
    HostStore,
    HostLoad,
    GuestStore,
    PreFault,
}

const WAYS: &[(&str, Way)] = &[
    ("fallocate", Way::Fallocate),
    ("host_store", Way::HostStore),
    ("host_load", Way::HostLoad),
    ("guest_store", Way::GuestStore),
    ("pre_fault", Way::PreFault),
];

const MANY: u64 = 512;

/// A VM whose file got all of its pages in the group.
fn allocated(cx: &Context, way: Way) -> TestResult<GmemVm> {
    flags(cx)?;
    let vm = GmemVm::new(cx, MANY)?;
    match way {
        Way::Fallocate => claim_ok!(vm.gmem.allocate(0, vm.len)),
        Way::HostStore => {
            cx.require(Facility::GmemInitShared)?;
            claim_ok!(vm.shared.fill(0, vm.len, 0x42));
        }
        Way::HostLoad => {
            cx.require(Facility::GmemInitShared)?;
            claim_eq!(vm.shared.find_mismatch(0, vm.len, 0), Ok(None), "the file");
        }
        Way::GuestStore => {
            let fill = GuestOp::Fill { gpa: vm.gpa(0), len: vm.len, byte: 0x42 };
            claim_matches!(vm.vcpu(0)?.execute(fill), Exit::Done(_), "guest stores");
        }
        Way::PreFault => {
            cx.require(Facility::PreFault)?;
            let done = vm.vcpu(0)?.pre_fault(vm.gpa(0), vm.len, 0);
            claim_eq!((done.result, done.size), (Ok(()), 0), "pre-fault");
        }
    }
    Ok(vm)
}

/// The count of file pages may lag behind by a batch for each CPU.
const LAG: u64 = 64;

fn allocated_pages_are_charged(cx: &Context, &way: &Way) -> TestResult {
    let group = MemoryGroup::enter()?;
    let before = group.statistic("file")?;
    let charged_before = group.charged()?;
    let _vm = allocated(cx, way)?;
    let file = (group.statistic("file")?.saturating_sub(before)) / PAGE_SIZE;
    claim!(file + LAG >= MANY && file <= MANY + LAG, "file pages of the group after {MANY} pages came: {file} more");
    let charged = (group.charged()?.saturating_sub(charged_before)) / PAGE_SIZE;
    claim!(charged + LAG >= MANY, "pages charged to the group after {MANY} pages came: {charged} more");
    Ok(())
}

fn punch_gives_the_charge_back(cx: &Context, &way: &Way) -> TestResult {
    let group = MemoryGroup::enter()?;
    let vm = allocated(cx, way)?;
    let before = group.charged()?;
    claim_ok!(vm.gmem.punch_hole(0, vm.len));
    claim_charge_at_most(&group, before - (MANY - LAG) * PAGE_SIZE, "after a punch of the whole file")
}

fn allocation_at_the_limit_is_enomem(cx: &Context) -> TestResult {
    const ROOM: u64 = 8 << 20;
    let group = MemoryGroup::enter()?;
    let vm = claim_ok!(cx.machine().create_vm(VmConfig::Bare));
    let gmem = claim_ok!(vm.create_guest_memfd(4 * ROOM, 0));
    group.limit(group.charged()? + ROOM)?;
    // The process itself needs memory now and then: its text and heap are there already.
    claim_eq!(gmem.allocate(0, 4 * ROOM), Err(Errno::ENOMEM), "allocation of four times what is left");
    let cached = claim_ok!(gmem.cache_stat(0, 0)).cached;
    let room = ROOM / PAGE_SIZE;
    claim!(cached > room / 2 && cached <= room + LAG, "pages in the file: {cached}, room for {room}");
    claim_ok!(gmem.punch_hole(0, 4 * ROOM));
    claim_ok!(gmem.allocate(0, ROOM / 4), "allocation after a punch");
    Ok(())
}

/// The stand-alone binary.
pub fn main() -> std::process::ExitCode {
    gmemtest::cli::selftest_main(&[&SUITE])
}
