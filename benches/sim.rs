//! Speed and size of the simulated machine: `cargo bench --bench sim`.
//!
//! Three parts. The first prints one table: guests of 1 GiB to 1 TiB, populated, converted to shared and back from end to
//! end, with the cost of a page, the flatness over the sizes, and the memory of this process a guest page costs. The
//! second is conversions a second by policy, at 4K and 2M. The third is what single operations cost, above all the look at
//! every reference count that a conversion to private takes.
//!
//! Times are processor time of the thread, so that a busy machine does not spoil them. Names of benchmarks select them as
//! with any criterion benchmark; the table comes only with `sizes` or without a name.
//!
//! On a shared two-core virtual machine, busy with other work:
//!
//! | what | cost |
//! |---|---|
//! | 1 TiB of 2M folios there and back, taking down included | 7.0 s (11.6 to 15.2 µs a folio from 1 GiB to 1 TiB, flatness 1.3) |
//! | memory of this process for it | 202 MiB, 403 bytes a folio |
//! | 1 GiB of 4K folios there and back | 3.0 s (10.8 to 11.9 µs a folio up to 16 GiB, flatness 1.1) |
//! | memory for a 4K page of the guest | 63 to 96 bytes |
//! | to shared and back and accepted again, 4K / 2M | 10 µs / 6 to 12 µs, by policy |
//! | punch and accept, 4K / 2M | 6.5 µs / 9.0 µs |
//! | look at every reference count of 1 MiB, 4K / 2M folios | 6.3 µs (25 ns a count) / 8 ns |
//! | conversion to private of 1 MiB that the host has mapped, 4K | 59 µs |
//!
//! The sizes can be limited: `GMEMTEST_BENCH_MAX_GIB=16 cargo bench --bench sim`.

mod support;

use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput};
use gmemtest::machine::{
    Exit, GuestMemfd, GuestOp, HoldKind, Machine, MemoryAttributes, MemoryRegion, PAGE_SIZE, Protection, Vcpu, Vm,
    VmConfig,
};
use gmemtest::sim::SimMachine;
use gmemtest::sim::policy::PolicyKind;
use gmemtest::sim::profile::{GMEM_FLAG_HUGETLB, GMEM_HUGE_SHIFT};
use support::CpuTime;

const GIB: u64 = 1 << 30;
const MIB: u64 = 1 << 20;
const LARGE: u64 = 2 * MIB;
const GPA: u64 = 4 * GIB;
const PRIVATE: u64 = 8;
/// GUEST_MEMFD_FLAG_MMAP with folios of 2M.
const HUGE_FILE: u64 = 1 | GMEM_FLAG_HUGETLB | 21 << GMEM_HUGE_SHIFT;
/// What the model is held to: a TiB there and back.
const TARGET_SECONDS: f64 = 60.0;
const TARGET_BYTES: u64 = 4 * GIB;
const TARGET_FLATNESS: f64 = 2.0;

/// Resident memory of this process, in bytes.
fn resident() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").expect("procfs is mounted");
    let pages = statm.split_whitespace().nth(1).and_then(|field| field.parse::<u64>().ok());
    pages.expect("statm has a second field") * PAGE_SIZE
}

/// Gives freed memory back to the system, so that [`resident`] tells what is in use.
fn trim() {
    // SAFETY: malloc_trim takes any number and has no preconditions.
    unsafe { libc::malloc_trim(0) };
}

/// Folios that a guest is made of.
#[derive(Clone, Copy, PartialEq)]
enum Folios {
    Base,
    Huge,
}

impl Folios {
    fn name(self) -> &'static str {
        if self == Folios::Base { "4K" } else { "2M" }
    }

    fn bytes(self) -> u64 {
        if self == Folios::Base { PAGE_SIZE } else { LARGE }
    }
}

/// A guest all of whose memory is one guest_memfd.
struct Guest {
    vcpu: Box<dyn Vcpu>,
    file: Arc<dyn GuestMemfd>,
    vm: Arc<dyn Vm>,
    machine: SimMachine,
    folios: Folios,
}

impl Guest {
    fn new(spec: &str, size: u64, folios: Folios) -> Guest {
        let machine = SimMachine::open(&spec.parse().expect("a spec")).expect("a machine");
        let vm = machine.create_vm(VmConfig::Payload { vcpus: 1 }).expect("a VM");
        let vcpu = vm.create_vcpu(0).expect("a vCPU");
        let flags = if folios == Folios::Huge { HUGE_FILE } else { 1 };
        let file = vm.create_guest_memfd(size, flags).expect("a guest_memfd");
        vm.set_memory_region(&MemoryRegion::new(0, GPA, size).bound_to(&*file, 0)).expect("a slot");
        let mut guest = Guest { vcpu, file, vm, machine, folios };
        guest.vcpu.set_time_limit(Duration::from_secs(600));
        if !guest.in_place() {
            guest.convert(0, size, PRIVATE);
        }
        guest
    }

    fn in_place(&self) -> bool {
        self.machine.release() >= gmemtest::machine::Release::series(7, 4)
    }

    /// On the machine with as much memory as the guest has.
    fn sized(options: &str, size: u64, folios: Folios) -> Guest {
        Guest::new(&format!("sim:tdx,memory={}G,{options}", size / GIB + 1), size, folios)
    }

    fn convert(&self, offset: u64, len: u64, attributes: u64) {
        if self.in_place() {
            self.file.convert(offset, len, attributes).expect("nobody holds a page");
        } else {
            let argument = MemoryAttributes { address: GPA + offset, size: len, attributes, flags: 0 };
            self.vm.set_memory_attributes(&argument).expect("a conversion by the VM");
        }
    }

    /// The guest accepts its memory: every page is faulted in, mapped and accepted.
    fn populate(&mut self, offset: u64, len: u64) {
        let level = u8::from(self.folios == Folios::Huge);
        let exit = self.vcpu.execute(GuestOp::Accept { gpa: GPA + offset, len, level });
        assert_eq!(exit, Exit::Done(0));
    }

    fn mapped(&self, name: &str) -> u64 {
        self.vm.statistic(name).expect("the VM lives")
    }
}

/// What one guest of the table came to.
struct Row {
    gib: u64,
    seconds: f64,
    bytes: u64,
    pages: u64,
}

/// Whether a guest's row is printed.
#[derive(Clone, Copy, PartialEq)]
enum Show {
    Row,
    Nothing,
}

/// One guest, there and back: all private and accepted, all shared, all private and accepted again.
fn there_and_back(gib: u64, folios: Folios, show: Show) -> Row {
    let size = gib * GIB;
    trim();
    let before = resident();
    let (cpu, wall) = (CpuTime::now(), Instant::now());
    let mut guest = Guest::sized("kernel=huge", size, folios);
    guest.populate(0, size);
    let leaves = if folios == Folios::Huge { "pages_2m" } else { "pages_4k" };
    assert_eq!(guest.mapped(leaves), size / folios.bytes(), "all of it is mapped at the size of its folios");
    let populated = resident();
    let start = CpuTime::now();
    guest.convert(0, size, 0);
    let to_shared = CpuTime::now() - start;
    let shared = resident();
    assert_eq!(guest.mapped(leaves), 0);
    let start = CpuTime::now();
    guest.convert(0, size, PRIVATE);
    let to_private = CpuTime::now() - start;
    guest.populate(0, size);
    let peak = resident();
    assert_eq!(guest.mapped(leaves), size / folios.bytes(), "the folios were merged again");
    drop(guest);
    let spent = CpuTime::now() - cpu;
    let pages = size / folios.bytes();
    let bytes = peak.max(shared).max(populated).saturating_sub(before);
    if show == Show::Nothing {
        return Row { gib, seconds: spent.as_secs_f64(), bytes, pages };
    }
    println!(
        "{:>6} GiB of {}: {:>7.2} s processor, {:>7.2} s elapsed; to shared {:>7.1} ns, to private {:>6.1} ns a folio; \
         {:>7.1} MiB, {:>6.1} bytes a folio",
        gib,
        folios.name(),
        spent.as_secs_f64(),
        wall.elapsed().as_secs_f64(),
        to_shared.as_nanos() as f64 / pages as f64,
        to_private.as_nanos() as f64 / pages as f64,
        bytes as f64 / MIB as f64,
        bytes as f64 / pages as f64,
    );
    Row { gib, seconds: spent.as_secs_f64(), bytes, pages }
}

/// The table over sizes, with what the model is held to.
fn sizes() {
    let max = std::env::var("GMEMTEST_BENCH_MAX_GIB").ok().and_then(|text| text.parse().ok()).unwrap_or(1024);
    for (folios, sizes) in [(Folios::Huge, &[1, 4, 16, 64, 256, 1024][..]), (Folios::Base, &[1, 4][..])] {
        // A first guest warms the allocator and the code up.
        there_and_back(1, folios, Show::Nothing);
        let rows: Vec<Row> =
            sizes.iter().filter(|gib| **gib <= max).map(|gib| there_and_back(*gib, folios, Show::Row)).collect();
        let cost = |row: &Row| row.seconds / row.pages as f64;
        let cheapest = rows.iter().map(cost).fold(f64::INFINITY, f64::min);
        let dearest = rows.iter().map(cost).fold(0.0, f64::max);
        let flatness = dearest / cheapest;
        println!(
            "{} folios: {:.0} to {:.0} ns a folio there and back, flatness {flatness:.2} (target {TARGET_FLATNESS}): {}",
            folios.name(),
            cheapest * 1e9,
            dearest * 1e9,
            if flatness <= TARGET_FLATNESS { "met" } else { "MISSED" },
        );
        if let Some(last) = rows.last().filter(|row| row.gib == 1024) {
            let met = last.seconds < TARGET_SECONDS && last.bytes < TARGET_BYTES;
            println!(
                "1 TiB there and back: {:.1} s of {TARGET_SECONDS} s, {:.2} GiB of {} GiB: {}",
                last.seconds,
                last.bytes as f64 / GIB as f64,
                TARGET_BYTES / GIB,
                if met { "met" } else { "MISSED" },
            );
        }
    }
}

/// Conversions of one folio to shared and back, with the guest accepting it again, by policy.
fn conversions(c: &mut Criterion<CpuTime>) {
    let mut group = c.benchmark_group("convert_and_back");
    group.throughput(Throughput::Elements(2));
    for folios in [Folios::Base, Folios::Huge] {
        for policy in PolicyKind::ALL {
            // Pinned pages are what makes a conversion to private impossible in place: it is a policy of the VM ioctl.
            let kernel = match (folios, policy) {
                (Folios::Huge, PolicyKind::PinMapped) => continue,
                (Folios::Huge, _) => "huge",
                (Folios::Base, PolicyKind::PinMapped) => "6.18",
                (Folios::Base, _) => "in-place",
            };
            let size = 64 * MIB;
            let options = format!("kernel={kernel},policy={}", policy.name());
            let mut guest = Guest::sized(&options, size, folios);
            guest.populate(0, size);
            let mut at = 0;
            group.bench_function(BenchmarkId::new(folios.name(), policy.name()), |b| {
                b.iter(|| {
                    guest.convert(at, folios.bytes(), 0);
                    guest.convert(at, folios.bytes(), PRIVATE);
                    guest.populate(at, folios.bytes());
                    at = (at + folios.bytes()) % size;
                });
            });
        }
    }
    group.finish();
}

/// Punch hole, pre-fault and accept of one folio.
fn operations(c: &mut Criterion<CpuTime>) {
    let mut group = c.benchmark_group("operation");
    group.throughput(Throughput::Elements(1));
    for folios in [Folios::Base, Folios::Huge] {
        let size = 64 * MIB;
        let mut guest = Guest::sized("kernel=huge", size, folios);
        guest.populate(0, size);
        let mut at = 0;
        group.bench_function(BenchmarkId::new("punch_and_accept", folios.name()), |b| {
            b.iter(|| {
                guest.file.punch_hole(at, folios.bytes()).expect("a punch");
                guest.populate(at, folios.bytes());
                at = (at + folios.bytes()) % size;
            });
        });
        group.bench_function(BenchmarkId::new("punch_and_pre_fault", folios.name()), |b| {
            b.iter(|| {
                guest.file.punch_hole(at, folios.bytes()).expect("a punch");
                let done = guest.vcpu.pre_fault(GPA + at, folios.bytes(), 0);
                assert_eq!(done.result, Ok(()));
                at = (at + folios.bytes()) % size;
            });
        });
    }
    group.finish();
}

/// The look at every reference count of 1 MiB that a conversion to private takes: 256 counts of base pages, or half of one
/// of a huge folio. In the kernel the count lies in a struct page; here it is the model's own look, count by count.
fn reference_checks(c: &mut Criterion<CpuTime>) {
    let mut group = c.benchmark_group("reference_check_per_MiB");
    for folios in [Folios::Base, Folios::Huge] {
        let size = 64 * MIB;
        let guest = Guest::sized("kernel=huge", size, folios);
        guest.file.allocate(0, size).expect("an allocation");
        let heads: Vec<u64> = (0..size)
            .step_by(folios.bytes() as usize)
            .map(|at| guest.machine.page_account(&*guest.file, at).expect("an account").expect("a page").frame)
            .collect();
        guest.machine.with_world(|world| {
            world.checks = false;
            group.bench_function(BenchmarkId::new("look", folios.name()), |b| {
                b.iter_custom(|iterations| {
                    let start = CpuTime::now();
                    for _ in 0..iterations {
                        for head in &heads {
                            black_box(world.look_at_refs(*head));
                        }
                    }
                    (CpuTime::now() - start) / (size / MIB) as u32
                });
            });
        });
    }
    // The same in a conversion, of memory that the host has mapped, so that every count is looked at and every entry of
    // the host's page tables goes; 1 MiB a conversion.
    let size = 64 * MIB;
    let guest = Guest::new("sim:sw-protected,kernel=in-place", size, Folios::Base);
    guest.file.convert(0, size, 0).expect("a conversion");
    let map = guest.file.map(size, 0, Protection::SHARED_RW).expect("a mapping");
    let mut at = 0;
    group.bench_function("convert/mapped-4K", |b| {
        b.iter_custom(|iterations| {
            let mut spent = Duration::ZERO;
            for _ in 0..iterations {
                drop(map.hold(at, MIB, HoldKind::Get).expect("pages to hold"));
                let start = CpuTime::now();
                guest.file.convert(at, MIB, PRIVATE).expect("nobody holds a page");
                spent += CpuTime::now() - start;
                guest.file.convert(at, MIB, 0).expect("a conversion");
                at = (at + MIB) % size;
            }
            spent
        });
    });
    group.finish();
}

fn main() {
    let args: Vec<String> = std::env::args().skip(1).filter(|arg| !arg.starts_with("--")).collect();
    if args.is_empty() || args.iter().any(|arg| "sizes".contains(arg.as_str())) {
        sizes();
    }
    let mut criterion = Criterion::default()
        .with_measurement(CpuTime::measurement())
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1))
        .sample_size(20)
        .configure_from_args();
    conversions(&mut criterion);
    operations(&mut criterion);
    reference_checks(&mut criterion);
    criterion.final_summary();
}
