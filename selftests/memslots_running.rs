//! Memslots that change while a vCPU runs in them.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use gmemtest::harness::{Context, GmemVm, Side, TestResult};
use gmemtest::machine::{
    Exit, Facility, Family, GuestOp, HostMemory, Mapping, MemoryRegion, PAGE_SIZE, Reply, VcpuControl, Vm, VmConfig,
    VmType,
};
use gmemtest::uapi::kvm_x86::KVM_X86_QUIRK_SLOT_ZAP_ALL;
use gmemtest::{claim, claim_eq, claim_matches, claim_ok, fail};
use kvm_bindings::KVM_CAP_DISABLE_QUIRKS2;

gmemtest::suite! {
    /// Slots that are moved, deleted and made again under a running guest: it sees the old data, the new data, or
    /// KVM_EXIT_MMIO in between, and nothing else.
    pub static SUITE: memslots_running needs [Vm, Guest, UserMemory2] {
        /// A slot moved down by a page and back again and again shows the guest its first page, its second page, or
        /// KVM_EXIT_MMIO (set_memory_region_test: test_move_memory_region). A failure means that the guest reads memory
        /// through a stale mapping, or garbage.
        moving_slot_shows_old_or_new_data[QUIRK];

        /// A slot that is deleted and made again and again shows the guest its data or KVM_EXIT_MMIO
        /// (set_memory_region_test: test_delete_memory_region). A failure means that the guest reads freed memory, or never
        /// comes back to the new slot.
        recreated_slot_shows_its_data_or_mmio[QUIRK];

        /// The same with a slot of guest_memfd memory. A failure means that unbinding leaves mappings behind.
        recreated_gmem_slot_shows_its_data_or_mmio[QUIRK] needs [GuestMemfd, GmemMmap, GmemInitShared];

        /// Every deletion takes the guest out of its loop, and every new slot lets it go on. A failure means that one
        /// deletion in many is lost.
        every_deletion_is_seen[QUIRK];

        /// Deleting one slot of a default VM drops every mapping of the VM (KVM_X86_QUIRK_SLOT_ZAP_ALL, 6.12; before it
        /// there was no choice). A failure means that the quirk is not what the capability says.
        quirk_drops_every_mapping needs [KvmStats];

        /// With the quirk disabled, and always for other VM types, deleting a slot drops that slot's mappings and no other
        /// (kvm_mmu_zap_memslot()). A failure means that a guest pays for a slot that it does not use, or keeps its
        /// mappings.
        without_the_quirk_other_slots_stay_mapped needs [KvmStats, SlotZapAllQuirk];

        /// A guest whose own code and page tables are deleted gets nothing done any more, and KVM_RUN ends in
        /// KVM_EXIT_SHUTDOWN, KVM_EXIT_INTERNAL_ERROR (set_memory_region_test), or with a signal: code at CPL 3 that cannot
        /// be fetched is an exception to KVM, which it tries to deliver without end. A failure is a guest that goes on
        /// executing memory that is gone, or a vCPU that no signal gets out of the kernel.
        guest_without_its_code_stops;

        /// A VM without any slot cannot run: KVM_EXIT_INTERNAL_ERROR (set_memory_region_test: test_zero_memory_regions). A
        /// failure is a vCPU that spins in the kernel.
        vm_without_slots_cannot_run;
    }
}

const SLOT: u32 = 3;
const BASE: u64 = (1 << 32) + (1 << 21);
const ROUNDS: u32 = 20;
/// How long a waiting thread leaves its CPU to the others.
const PAUSE: Duration = Duration::from_micros(20);

/// Whether KVM_X86_QUIRK_SLOT_ZAP_ALL is left on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Quirk {
    On,
    Off,
}

const QUIRK: &[(&str, Quirk)] = &[("quirk_on", Quirk::On), ("quirk_off", Quirk::Off)];

impl Quirk {
    fn apply(self, cx: &Context, vm: &dyn Vm) -> TestResult {
        if self == Quirk::Off {
            cx.require(Facility::SlotZapAllQuirk)?;
            claim_ok!(vm.enable_capability(KVM_CAP_DISABLE_QUIRKS2, [KVM_X86_QUIRK_SLOT_ZAP_ALL, 0, 0, 0]));
        }
        Ok(())
    }
}

/// What a guest in a loop of loads has seen.
#[derive(Debug, Default)]
struct Seen {
    values: Vec<u64>,
    /// How many loads ended in KVM_EXIT_MMIO.
    mmio: u64,
}

/// A vCPU that loads from one address again and again on a thread of its own.
struct Watcher {
    ending: Arc<AtomicBool>,
    latest: Arc<AtomicU64>,
    /// Loads that ended in KVM_EXIT_MMIO so far.
    mmio: Arc<AtomicU64>,
    control: Arc<dyn VcpuControl>,
    /// Until it is joined.
    thread: Option<thread::JoinHandle<Result<Seen, Exit>>>,
}

impl Drop for Watcher {
    /// A guest that nobody watches any more would go on for ever.
    fn drop(&mut self) {
        if let Some(thread) = self.end() {
            // It has nothing to tell to a test that has failed.
            let _ = thread.join();
        }
    }
}

/// So many loads that find no slot after the slot was made are no matter of timing: one can be under way.
const MOST_LATE: u64 = 100;

/// The value given for a load that finds no slot; no test stores it.
const MMIO_VALUE: u64 = 0xBEEF;

impl Watcher {
    /// Starts the loop, on the shared side of `gpa`.
    fn start(vm: &dyn Vm, gpa: u64) -> TestResult<Watcher> {
        let mut vcpu = claim_ok!(vm.create_vcpu(0));
        let address = Side::Shared.address(vm, gpa);
        let (ending, latest) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let mmio = Arc::new(AtomicU64::new(0));
        let (until, value_now, missed, control) = (ending.clone(), latest.clone(), mmio.clone(), vcpu.control());
        let thread = thread::spawn(move || {
            let mut seen = Seen::default();
            let mut exit = vcpu.execute(GuestOp::ReadWhile { gpa: address, expect: 0 });
            loop {
                match exit {
                    Exit::Done(value) => {
                        if value != MMIO_VALUE && !seen.values.contains(&value) {
                            seen.values.push(value);
                        }
                        value_now.store(value, Ordering::Release);
                        if until.load(Ordering::Acquire) {
                            return Ok(seen);
                        }
                        exit = vcpu.execute(GuestOp::ReadWhile { gpa: address, expect: value });
                    }
                    Exit::Mmio { .. } if until.load(Ordering::Acquire) => return Ok(seen),
                    Exit::Mmio { gpa: at, write: None, .. } if at == gpa => {
                        seen.mmio = missed.fetch_add(1, Ordering::Relaxed) + 1;
                        exit = vcpu.resume(Reply::MmioRead(MMIO_VALUE));
                    }
                    other => return Err(other),
                }
            }
        });
        Ok(Watcher { ending, latest, mmio, control, thread: Some(thread) })
    }

    /// Waits until the guest has loaded `value`.
    fn wait_for(&mut self, value: u64) -> TestResult {
        let before = self.mmio.load(Ordering::Relaxed);
        while self.latest.load(Ordering::Acquire) != value {
            if self.is_gone() {
                let last = self.latest.load(Ordering::Acquire);
                let why = self.joined().err().unwrap_or_default();
                fail!("{why}; {value:#x} was to come after {last:#x}");
            }
            let late = self.mmio.load(Ordering::Relaxed) - before;
            claim!(
                value == MMIO_VALUE || late <= MOST_LATE,
                "the guest sees the slot that was made: {late} of its loads ended in KVM_EXIT_MMIO since"
            );
            thread::sleep(PAUSE);
        }
        Ok(())
    }

    fn is_gone(&self) -> bool {
        self.thread.as_ref().is_none_or(thread::JoinHandle::is_finished)
    }

    /// Ends the loop; the thread is at its end.
    fn end(&mut self) -> Option<thread::JoinHandle<Result<Seen, Exit>>> {
        self.ending.store(true, Ordering::Release);
        while !self.is_gone() {
            self.control.stop();
            thread::yield_now();
        }
        self.thread.take()
    }

    /// Ends the loop.
    fn finish(mut self) -> TestResult<Seen> {
        self.joined().or_else(|why| fail!("{why}"))
    }

    /// Ends the loop; the error says why it had ended by itself.
    fn joined(&mut self) -> Result<Seen, String> {
        match self.end().map(thread::JoinHandle::join) {
            Some(Ok(Ok(seen))) => Ok(seen),
            Some(Ok(Err(exit))) => Err(format!("the guest left its loop with {exit:x?}")),
            Some(Err(_)) | None => Err("the thread of the vCPU panicked".to_owned()),
        }
    }
}

/// A VM and two pages of ordinary memory that start with 1 and 2.
fn two_pages(cx: &Context) -> TestResult<(Arc<dyn Vm>, Box<dyn Mapping>)> {
    let vm = claim_ok!(cx.machine().create_vm(VmConfig::Payload { vcpus: 1 }));
    let memory = claim_ok!(cx.machine().host_memory(HostMemory::Anonymous, 2 * PAGE_SIZE));
    memory.write_u64(0, 1)?;
    memory.write_u64(PAGE_SIZE, 2)?;
    Ok((vm, memory))
}

fn moving_slot_shows_old_or_new_data(cx: &Context, quirk: &Quirk) -> TestResult {
    let (vm, memory) = two_pages(cx)?;
    quirk.apply(cx, &*vm)?;
    let region = MemoryRegion::new(SLOT, BASE, 2 * PAGE_SIZE).at(memory.addr());
    claim_ok!(vm.set_memory_region(&region));
    let mut watcher = Watcher::start(&*vm, BASE)?;
    watcher.wait_for(1)?;
    for round in 0..ROUNDS {
        for (gpa, value) in [(BASE - PAGE_SIZE, 2), (BASE, 1)] {
            claim_ok!(vm.set_memory_region(&MemoryRegion { gpa, ..region }), "the move to {gpa:#x}, round {round}");
            watcher.wait_for(value)?;
        }
    }
    let mut seen = watcher.finish()?;
    seen.values.sort_unstable();
    claim_eq!(seen.values, [1, 2], "the values that the guest saw");
    cx.note(format_args!("{} loads found no slot", seen.mmio));
    Ok(())
}

/// Deletes and makes the slot, waiting now and then for the guest, which expects `value`.
fn recreate(cx: &Context, vm: &dyn Vm, region: &MemoryRegion, value: u64) -> TestResult {
    let mut rng = cx.rng();
    let mut watcher = Watcher::start(vm, region.gpa)?;
    watcher.wait_for(value)?;
    for round in 0..10 * ROUNDS {
        claim_ok!(vm.set_memory_region(&MemoryRegion::deletion(region.slot)), "deletion {round}");
        if rng.one_in(4) {
            watcher.wait_for(MMIO_VALUE)?;
        }
        claim_ok!(vm.set_memory_region(region), "creation {round}");
        if rng.one_in(4) {
            watcher.wait_for(value)?;
        }
    }
    let seen = watcher.finish()?;
    claim!(seen.mmio > 0, "the guest met the missing slot at least once");
    claim_eq!(seen.values, [value], "the values that the guest saw");
    cx.note(format_args!("{} loads found no slot", seen.mmio));
    Ok(())
}

fn recreated_slot_shows_its_data_or_mmio(cx: &Context, quirk: &Quirk) -> TestResult {
    let (vm, memory) = two_pages(cx)?;
    quirk.apply(cx, &*vm)?;
    let region = MemoryRegion::new(SLOT, BASE, 2 * PAGE_SIZE).at(memory.addr());
    claim_ok!(vm.set_memory_region(&region));
    recreate(cx, &*vm, &region, 1)
}

fn recreated_gmem_slot_shows_its_data_or_mmio(cx: &Context, quirk: &Quirk) -> TestResult {
    let vm = GmemVm::mappable(cx, 2)?;
    quirk.apply(cx, &*vm.vm)?;
    vm.shared.write_u64(0, 0x6E3)?;
    recreate(cx, &*vm.vm, &vm.region(), 0x6E3)
}

fn every_deletion_is_seen(cx: &Context, quirk: &Quirk) -> TestResult {
    let (vm, memory) = two_pages(cx)?;
    quirk.apply(cx, &*vm)?;
    let region = MemoryRegion::new(SLOT, BASE, PAGE_SIZE).at(memory.addr());
    claim_ok!(vm.set_memory_region(&region));
    let mut watcher = Watcher::start(&*vm, BASE)?;
    watcher.wait_for(1)?;
    for round in 0..ROUNDS {
        claim_ok!(vm.set_memory_region(&MemoryRegion::deletion(SLOT)), "deletion {round}");
        watcher.wait_for(MMIO_VALUE)?;
        claim_ok!(vm.set_memory_region(&region), "creation {round}");
        watcher.wait_for(1)?;
    }
    let seen = watcher.finish()?;
    claim!(seen.mmio >= ROUNDS.into(), "{} of {ROUNDS} deletions were seen", seen.mmio);
    claim_eq!(seen.values, [1], "the values that the guest saw");
    Ok(())
}

/// Four pages in one slot and two in another, all touched: how many 4 KiB mappings go with the second slot, of how many.
fn mappings_lost(cx: &Context, quirk: Quirk) -> TestResult<(u64, u64)> {
    let vm = GmemVm::new(cx, 4)?;
    quirk.apply(cx, &*vm.vm)?;
    let memory = claim_ok!(cx.machine().host_memory(HostMemory::Anonymous, 2 * PAGE_SIZE));
    claim_ok!(vm.vm.set_memory_region(&MemoryRegion::new(SLOT, BASE, 2 * PAGE_SIZE).at(memory.addr())));
    let mut vcpu = vm.vcpu(0)?;
    claim_matches!(vcpu.execute(GuestOp::Touch { gpa: vm.gpa(0), len: vm.len }), Exit::Done(4));
    let ordinary = Side::Shared.address(&*vm.vm, BASE);
    claim_matches!(vcpu.execute(GuestOp::Touch { gpa: ordinary, len: 2 * PAGE_SIZE }), Exit::Done(2));
    let before = claim_ok!(vm.vm.statistic("pages_4k"));
    claim_ok!(vm.vm.set_memory_region(&MemoryRegion::deletion(SLOT)));
    let after = claim_ok!(vm.vm.statistic("pages_4k"));
    claim_matches!(vcpu.execute(GuestOp::Touch { gpa: vm.gpa(0), len: vm.len }), Exit::Done(4), "the other slot");
    Ok((before - after, before))
}

fn quirk_drops_every_mapping(cx: &Context) -> TestResult {
    if cx.has(Facility::PrivateMemory) {
        gmemtest::skip!(Declined, "the quirk is about the default VM type");
    }
    let (lost, mapped) = mappings_lost(cx, Quirk::On)?;
    claim_eq!(lost, mapped, "pages_4k that went with one slot");
    Ok(())
}

fn without_the_quirk_other_slots_stay_mapped(cx: &Context) -> TestResult {
    let (lost, mapped) = mappings_lost(cx, Quirk::Off)?;
    claim_eq!(lost, 2, "pages_4k that went with a slot of two pages, of {mapped} mapped");
    Ok(())
}

fn guest_without_its_code_stops(cx: &Context) -> TestResult {
    if cx.machine().spec().family == Family::Sim {
        gmemtest::skip!(Declined, "the model's guest has no code in memory");
    }
    let vm = claim_ok!(cx.machine().create_vm(VmConfig::Payload { vcpus: 1 }));
    let mut vcpu = claim_ok!(vm.create_vcpu(0));
    let load = GuestOp::read_u64(Side::Shared.address(&*vm, BASE));
    claim_matches!(vcpu.execute(load), Exit::Mmio { .. }, "the guest runs");
    let mut slot = vm.first_reserved_slot();
    while vm.set_memory_region(&MemoryRegion::deletion(slot)).is_ok() {
        slot += 1;
    }
    claim!(slot > vm.first_reserved_slot(), "the payload had a slot");
    vcpu.set_time_limit(Duration::from_millis(200));
    let exit = vcpu.resume(Reply::MmioRead(0));
    // A TD's code is private: its fetch is a fault of private memory.
    claim_matches!(
        exit,
        Exit::Shutdown | Exit::InternalError { .. } | Exit::TimedOut | Exit::MemoryFault { flags: 8, .. },
        "without the payload's memory"
    );
    Ok(())
}

fn vm_without_slots_cannot_run(cx: &Context) -> TestResult {
    if cx.machine().spec().vm_type == VmType::Tdx {
        gmemtest::skip!(Declined, "KVM_CREATE_VCPU is EIO before KVM_TDX_INIT_VM: there is no vCPU at a reset vector");
    }
    let vm = claim_ok!(cx.machine().create_vm(VmConfig::Bare));
    // KVM counts its budget of shadow pages when slots come and go: a VM that never had one has no budget, and with shadow
    // paging KVM_RUN is ENOSPC before anything else.
    claim_ok!(vm.set_memory_region(&MemoryRegion::new(SLOT, BASE, PAGE_SIZE)));
    claim_ok!(vm.set_memory_region(&MemoryRegion::deletion(SLOT)));
    let mut vcpu = claim_ok!(vm.create_vcpu(0));
    claim_matches!(vcpu.run(), Exit::InternalError { .. }, "KVM_RUN of a vCPU at its reset vector");
    Ok(())
}

/// The stand-alone binary.
pub fn main() -> std::process::ExitCode {
    gmemtest::cli::selftest_main(&[&SUITE])
}
