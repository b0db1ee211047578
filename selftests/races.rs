//! Operations that race with guest and host accesses: after each of them has returned, nobody may see what it took away.
//!
//! Writers stamp memory with a counter that only rises and is known from outside. So the age of whatever is found in a
//! page can be told, and one rule serves all tests: when a call that takes a page away has returned, that page holds
//! zero or a stamp that is younger than the call; and a store that was made after the call is found there. No test asserts
//! on time; all of them end after a fixed number of rounds.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use gmemtest::harness::{AtFault, Context, GmemVm, GuestWriter, Rng, TestResult};
use gmemtest::machine::{Errno, Exit, GuestMemfd, GuestOp, Mapping, PAGE_SIZE, Reply, Vcpu, VmType};
use gmemtest::uapi::kvm::KVM_MEMORY_ATTRIBUTE_PRIVATE;
use gmemtest::{claim, claim_eq, claim_ok, fail};

gmemtest::suite! {
    /// Punch hole, allocation, slot changes, conversion and close against running guests and host writers.
    pub static SUITE: races needs [Vm, Guest, GuestMemfd, UserMemory2] {
        /// When a punch hole has returned, the host finds zero or what the running guest stored after it, and the guest's
        /// later stores reach the file (kvm_gmem_punch_hole() unmaps the guest before it frees the page). A failure is the
        /// guest writing to a page that was freed: memory corruption of whoever owns it next.
        host_finds_no_guest_data_from_before_a_punch needs [GmemMmap, GmemInitShared] timeout 300;

        /// The same the other way round: the guest finds zero or what the host stored after the punch. A failure leaks
        /// freed memory into the guest.
        guest_finds_no_host_data_from_before_a_punch needs [GmemMmap, GmemInitShared] timeout 300;

        /// The same between two vCPUs, on memory that the host need not be able to map. A failure is a vCPU with a stale
        /// translation.
        vcpu_finds_no_data_of_another_from_before_a_punch timeout 300;

        /// The same while another thread allocates the file over and over, and at the end the file holds what the last
        /// calls left in it. A failure is a page that is lost or counted twice.
        punches_and_allocations_may_race needs [Cachestat] timeout 300;

        /// Stores of a running guest are never lost while its slot is deleted and made again: the page holds the latest one
        /// that did not go to user space, and goes back in time never. A failure means that a slot's pages change when it
        /// is re-created.
        no_store_is_lost_while_the_slot_comes_and_goes needs [GmemMmap, GmemInitShared] timeout 300;

        /// When a conversion to private has returned, the running guest's stores do not reach the shared side any more, and
        /// when one to shared has returned, they do. A failure leaks private data to the host.
        converted_page_takes_no_more_stores_on_its_old_side needs [MemoryAttributes, PrivateMemory] timeout 300;

        /// A guest that stores to a file while it is closed leaves with KVM_EXIT_MEMORY_FAULT, every time. A failure is a
        /// guest that runs on freed pages.
        guest_leaves_whenever_its_file_is_closed needs [MemoryFaultInfo] timeout 300;

        /// A long random sequence of punches, allocations, slot changes, host and guest accesses, beside a guest that stores
        /// without pause, always shows what a plain array of values says. A failure prints the seed that repeats it.
        random_operations_agree_with_an_array needs [GmemMmap, GmemInitShared] timeout 300;
    }
}

const PAGES: u64 = 4;
/// The page that everybody fights for.
const PAGE: u64 = PAGE_SIZE;
const ROUNDS: u64 = 150;
/// What page 0 holds before it is punched.
const MARK: u64 = 0x3A2C;
/// How long a waiting thread leaves its CPU to the others.
const PAUSE: Duration = Duration::from_micros(20);

/// The one rule: what is found after a call during which `before` was known to be stored.
fn claim_fresh(found: u64, before: u64, who: &str) -> TestResult {
    claim!(found == 0 || found > before, "{who} finds {found}, which was stored before {before}, before the call");
    Ok(())
}

fn read(vcpu: &mut dyn Vcpu, gpa: u64) -> TestResult<u64> {
    match vcpu.execute(GuestOp::read_u64(gpa)) {
        Exit::Done(value) => Ok(value),
        other => fail!("the guest's load from {gpa:#x} ended in {other:x?}"),
    }
}

/// Punches the file from its start to beyond [`PAGE`], sometimes to beyond its end.
fn punch(gmem: &dyn GuestMemfd, rng: &mut Rng) -> TestResult {
    let len = PAGE + PAGE_SIZE + rng.below(PAGES) * PAGE_SIZE;
    claim_ok!(gmem.punch_hole(0, len), "{len:#x} bytes");
    Ok(())
}

fn host_finds_no_guest_data_from_before_a_punch(cx: &Context) -> TestResult {
    let vm = GmemVm::mappable(cx, PAGES)?;
    let mut rng = cx.rng();
    let writer = GuestWriter::start(vm.vcpu(0)?, vm.gpa(PAGE), AtFault::Leave);
    for _ in 0..ROUNDS {
        vm.shared.write_u64(0, MARK)?;
        let before = writer.stored();
        punch(&*vm.gmem, &mut rng)?;
        claim_fresh(vm.shared.read_u64(PAGE)?, before, "the host")?;
        claim_eq!(vm.shared.read_u64(0)?, 0, "the page beside it, to which nobody stores");
        let after = writer.next()?;
        let found = vm.shared.read_u64(PAGE)?;
        claim!(found >= after, "the guest stored {after} after the punch, the host finds {found}");
    }
    cx.note(format_args!("{} stores", writer.stored()));
    writer.finish()?;
    Ok(())
}

/// A thread of the host that stores a rising counter to [`PAGE`] without pause.
struct HostWriter {
    stored: AtomicU64,
    ending: AtomicBool,
}

impl HostWriter {
    fn new() -> HostWriter {
        HostWriter { stored: AtomicU64::new(0), ending: AtomicBool::new(false) }
    }

    fn run(&self, mapping: &dyn Mapping) -> TestResult {
        for stamp in 1.. {
            mapping.write_u64(PAGE, stamp)?;
            self.stored.store(stamp, Ordering::Release);
            if self.ending.load(Ordering::Relaxed) {
                break;
            }
        }
        Ok(())
    }

    fn stored(&self) -> u64 {
        self.stored.load(Ordering::Acquire)
    }

    fn next(&self, alive: impl Fn() -> bool) -> u64 {
        let stamp = self.stored() + 2;
        while self.stored() < stamp && alive() {
            thread::sleep(PAUSE);
        }
        stamp
    }
}

fn guest_finds_no_host_data_from_before_a_punch(cx: &Context) -> TestResult {
    let vm = GmemVm::mappable(cx, PAGES)?;
    let mut vcpu = vm.vcpu(0)?;
    let mut rng = cx.rng();
    let writer = HostWriter::new();
    thread::scope(|scope| {
        let thread = scope.spawn(|| writer.run(&*vm.shared));
        let mut rounds = || {
            for _ in 0..ROUNDS {
                vm.shared.write_u64(0, MARK)?;
                let before = writer.stored();
                punch(&*vm.gmem, &mut rng)?;
                claim_fresh(read(&mut *vcpu, vm.gpa(PAGE))?, before, "the guest")?;
                claim_eq!(read(&mut *vcpu, vm.gpa(0))?, 0, "the page beside it, to which nobody stores");
                let after = writer.next(|| !thread.is_finished());
                let found = read(&mut *vcpu, vm.gpa(PAGE))?;
                claim!(found >= after, "the host stored {after} after the punch, the guest finds {found}");
            }
            Ok(())
        };
        let seen = rounds();
        writer.ending.store(true, Ordering::Relaxed);
        match thread.join() {
            Ok(written) => seen.and(written),
            Err(_) => fail!("the writing thread panicked"),
        }
    })
}

/// One punch beside a writing vCPU, looked at from another.
fn punch_beside(vm: &GmemVm, rng: &mut Rng, writer: &GuestWriter, reader: &mut dyn Vcpu) -> TestResult {
    claim!(matches!(reader.execute(GuestOp::write_u64(vm.gpa(0), MARK)), Exit::Done(_)), "the mark is stored");
    let before = writer.stored();
    punch(&*vm.gmem, rng)?;
    claim_fresh(read(reader, vm.gpa(PAGE))?, before, "the other vCPU")?;
    claim_eq!(read(reader, vm.gpa(0))?, 0, "the page beside it, to which nobody stores");
    let after = writer.next()?;
    let found = read(reader, vm.gpa(PAGE))?;
    claim!(found >= after, "a vCPU stored {after} after the punch, the other finds {found}");
    Ok(())
}

fn vcpu_finds_no_data_of_another_from_before_a_punch(cx: &Context) -> TestResult {
    let vm = GmemVm::new(cx, PAGES)?;
    let mut rng = cx.rng();
    let mut reader = vm.vcpu(1)?;
    let writer = GuestWriter::start(vm.vcpu(0)?, vm.gpa(PAGE), AtFault::Leave);
    for _ in 0..ROUNDS {
        punch_beside(&vm, &mut rng, &writer, &mut *reader)?;
    }
    writer.finish()?;
    Ok(())
}

fn punches_and_allocations_may_race(cx: &Context) -> TestResult {
    let vm = GmemVm::new(cx, PAGES)?;
    let mut rng = cx.rng();
    let mut reader = vm.vcpu(1)?;
    let writer = GuestWriter::start(vm.vcpu(0)?, vm.gpa(PAGE), AtFault::Leave);
    let ending = AtomicBool::new(false);
    thread::scope(|scope| {
        let thread = scope.spawn(|| {
            while !ending.load(Ordering::Relaxed) {
                vm.gmem.allocate(0, vm.len)?;
            }
            Ok::<_, Errno>(())
        });
        let mut rounds = || {
            for _ in 0..ROUNDS {
                punch_beside(&vm, &mut rng, &writer, &mut *reader)?;
            }
            Ok(())
        };
        let seen: TestResult = rounds();
        ending.store(true, Ordering::Relaxed);
        match thread.join() {
            Ok(allocated) => claim_ok!(allocated, "allocation beside the punches"),
            Err(_) => fail!("the allocating thread panicked"),
        }
        seen
    })?;
    writer.finish()?;
    claim_ok!(vm.gmem.punch_hole(0, vm.len));
    claim_eq!(claim_ok!(vm.gmem.cache_stat(0, 0)).cached, 0, "pages after the last punch");
    claim_ok!(vm.gmem.allocate(0, vm.len));
    claim_eq!(claim_ok!(vm.gmem.cache_stat(0, 0)).cached, PAGES, "pages after the last allocation");
    Ok(())
}

fn no_store_is_lost_while_the_slot_comes_and_goes(cx: &Context) -> TestResult {
    let vm = GmemVm::mappable(cx, PAGES)?;
    let writer = GuestWriter::start(vm.vcpu(0)?, vm.gpa(PAGE), AtFault::Leave);
    let mut latest = 0;
    for _ in 0..ROUNDS / 3 {
        vm.delete_slot()?;
        let deleted = vm.shared.read_u64(PAGE)?;
        claim!(deleted >= latest, "the page went back from {latest} to {deleted} when the slot was deleted");
        writer.next()?;
        claim_eq!(vm.shared.read_u64(PAGE)?, deleted, "the page while there is no slot");
        vm.create_slot()?;
        let after = writer.next()?;
        latest = vm.shared.read_u64(PAGE)?;
        claim!(latest >= after, "the guest stored {after} to the slot made again, the host finds {latest}");
    }
    writer.finish()?;
    Ok(())
}

fn converted_page_takes_no_more_stores_on_its_old_side(cx: &Context) -> TestResult {
    if cx.machine().spec().vm_type == VmType::Tdx {
        gmemtest::skip!(
            Declined,
            "a TD's stores to the shared side of a private page are memory faults, not stores to its other side"
        );
    }
    let vm = GmemVm::convertible(cx, PAGES)?;
    // A store that began before a conversion and is looked at after it is a memory fault with the flags of before.
    let writer = GuestWriter::start(vm.vcpu(0)?, vm.gpa(PAGE), AtFault::TryAgain);
    for _ in 0..ROUNDS {
        vm.set_attributes(PAGE, PAGE_SIZE, KVM_MEMORY_ATTRIBUTE_PRIVATE)?;
        let left = vm.shared.read_u64(PAGE)?;
        writer.next()?;
        claim_eq!(vm.shared.read_u64(PAGE)?, left, "the shared side after stores to the private page");
        vm.set_attributes(PAGE, PAGE_SIZE, 0)?;
        let after = writer.next()?;
        let found = vm.shared.read_u64(PAGE)?;
        claim!(found >= after, "the guest stored {after} to the shared page, the host finds {found}");
    }
    writer.finish()?;
    Ok(())
}

fn guest_leaves_whenever_its_file_is_closed(cx: &Context) -> TestResult {
    let mut vm = GmemVm::new(cx, PAGES)?;
    // Closes the first file: the VM's slot is made anew with a file that nothing else holds.
    let GmemVm { shared, .. } = GmemVm::new(cx, PAGES)?;
    vm.shared = shared;
    let mut vcpu = vm.vcpu(0)?;
    for round in 0..ROUNDS / 15 {
        vm.delete_slot()?;
        vm.gmem = vm.new_file()?;
        vm.create_slot()?;
        let writer = GuestWriter::start(vcpu, vm.gpa(PAGE), AtFault::Leave);
        // Another file takes the place of this one, which is closed by that.
        vm.gmem = vm.new_file()?;
        let (back, exit) = writer.left()?;
        vcpu = back;
        let (flags, gpa) = (vm.side_without_a_file(cx).fault_flags(), vm.slot_gpa(PAGE));
        let fault = Exit::MemoryFault { errno: Errno::EFAULT, flags, gpa, size: PAGE_SIZE };
        claim_eq!(exit, fault, "how the guest left in round {round}");
        // The store is still under way; it completes in a slot with a file, so that the vCPU can be used again.
        vm.delete_slot()?;
        vm.gmem = vm.new_file()?;
        vm.create_slot()?;
        vcpu.control().stop();
        claim!(matches!(vcpu.resume(Reply::None), Exit::Done(_)), "the guest goes on in round {round}");
    }
    Ok(())
}

fn random_operations_agree_with_an_array(cx: &Context) -> TestResult {
    const MANY: u64 = 16;
    let vm = GmemVm::mappable(cx, MANY)?;
    let mut rng = cx.rng();
    let mut vcpu = vm.vcpu(1)?;
    // The noise: page 0 belongs to a guest that stores without pause; the others are the model's.
    let writer = GuestWriter::start(vm.vcpu(0)?, vm.gpa(0), AtFault::Leave);
    let mut model = [0_u64; MANY as usize];
    for step in 1..=6 * ROUNDS {
        let page = rng.within(1..MANY);
        let at = page * PAGE_SIZE;
        match rng.below(16) {
            0..4 => {
                vm.shared.write_u64(at, step)?;
                model[page as usize] = step;
            }
            4..8 => {
                claim!(matches!(vcpu.execute(GuestOp::write_u64(vm.gpa(at), step)), Exit::Done(_)), "step {step}");
                model[page as usize] = step;
            }
            8 | 9 => claim_eq!(vm.shared.read_u64(at)?, model[page as usize], "page {page} to the host at step {step}"),
            10 | 11 => {
                let found = read(&mut *vcpu, vm.gpa(at))?;
                claim_eq!(found, model[page as usize], "page {page} to the guest at step {step}");
            }
            12 | 13 => {
                let pages = rng.within(1..5).min(MANY - page);
                claim_ok!(vm.gmem.punch_hole(at, pages * PAGE_SIZE));
                model[page as usize..(page + pages) as usize].fill(0);
            }
            14 => claim_ok!(vm.gmem.allocate(at, PAGE_SIZE)),
            _ => {
                vm.delete_slot()?;
                vm.create_slot()?;
            }
        }
    }
    for page in 1..MANY {
        let found = (vm.shared.read_u64(page * PAGE_SIZE)?, read(&mut *vcpu, vm.gpa(page * PAGE_SIZE))?);
        claim_eq!(found, (model[page as usize], model[page as usize]), "page {page} to host and guest at the end");
    }
    writer.finish()?;
    Ok(())
}

/// The stand-alone binary.
pub fn main() -> std::process::ExitCode {
    gmemtest::cli::selftest_main(&[&SUITE])
}
