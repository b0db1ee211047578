//! Speed and size of the simulated TDX module: `cargo bench --bench tdx_module`.
//!
//! Times are processor time of the thread, so that a busy machine does not spoil them; invariants are not checked. On one core of a
//! shared two-core virtual machine:
//!
//! | what | cost | a second |
//! |---|---|---|
//! | Secure EPT walk (SEPT.RD of a 4K entry) | 148 ns | 6.8 million |
//! | AUG 4K | 215 ns | 4.7 million |
//! | REMOVE 4K | 221 ns | 4.5 million |
//! | AUG + ACCEPT 4K | 310 ns | 3.2 million pairs |
//! | BLOCK + TRACK + REMOVE 4K | 552 ns | 1.8 million pages |
//! | DEMOTE 2M | 4.1 µs | 0.24 million |
//! | BLOCK + TRACK + REMOVE + AUG, random 2M ranges, 1 GiB mapped | 739 ns | |
//! | the same with 64 GiB mapped | 744 ns | |
//! | BLOCK + TRACK + REMOVE + AUG, random pages, 1 GiB mapped | 1.10 µs | |
//! | the same with 64 GiB mapped | 1.77 µs | |
//!
//! A 4K page that is mapped and accepted costs 40 bytes: 16 of PAMT, 8 of Secure EPT, 16 in the sparse memory. One TD with 64 GiB mapped
//! at 4K and 1 TiB mapped at 2M, all accepted, holds 679 MiB (685 MiB resident in the process). The work of a call does not depend on
//! how much is mapped; what random single pages add is misses of the processor's caches.

mod support;

use std::hint::black_box;
use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use gmemtest::sim::tdx_module::fixture::{Fixture, TdSpec};
use gmemtest::sim::tdx_module::{Leaf, LpId, Outcome, Platform, Regs, Status, Switches};
use support::CpuTime;

const GIB: u64 = 1 << 30;
const PAGE: u64 = 4096;
const LARGE: u64 = 2 << 20;

/// A finalized TD with a vCPU on a platform with `gib` GiB of TDMR, and where its memory may come from.
struct Bench {
    fixture: Fixture,
    tdr: u64,
    first_page: u64,
}

impl Bench {
    /// Leaves the first GiB of the TDMR to control pages; `tables` are added down to level `bottom` for `span` bytes of GPA from 0.
    fn new(gib: u64, span: u64, bottom: u8) -> Bench {
        let mut fixture = Fixture::bring_up(Platform::new(2, 4096 * GIB), gib + 1, Switches::default());
        let tdr = fixture.build_td(&TdSpec::default());
        fixture.tdr = tdr;
        let step = if bottom == 1 { LARGE } else { GIB };
        for gpa in (0..span).step_by(step as usize) {
            fixture.add_tables(tdr, gpa, bottom);
        }
        fixture.vcpu = fixture.build_vcpu(tdr);
        fixture.must(Leaf::MrFinalize, &[("rcx", tdr)]);
        let first_page = fixture.module.pamt().tdmrs()[0].base + GIB;
        Bench { fixture, tdr, first_page }
    }

    fn call(&mut self, leaf: Leaf, rcx: u64, rdx: u64, r8: u64) -> Regs {
        let mut regs = Regs { rax: leaf.number() as u64, rcx, rdx, r8, ..Regs::default() };
        let outcome = self.fixture.module.seamcall(LpId(0), &mut regs).expect("lp0 is free");
        assert_eq!(outcome, Outcome::Done(Status::SUCCESS), "{}", leaf.name());
        regs
    }

    fn aug(&mut self, gpa: u64, level: u64) {
        let (tdr, page) = (self.tdr, self.first_page + gpa);
        self.call(Leaf::MemPageAug, gpa | level, tdr, page);
    }

    fn track(&mut self) {
        let tdr = self.tdr;
        self.call(Leaf::MemTrack, tdr, 0, 0);
    }

    fn block(&mut self, gpa: u64, level: u64) {
        let tdr = self.tdr;
        self.call(Leaf::MemRangeBlock, gpa | level, tdr, 0);
    }

    fn remove(&mut self, gpa: u64, level: u64) {
        let tdr = self.tdr;
        self.call(Leaf::MemPageRemove, gpa | level, tdr, 0);
    }

    fn enter(&mut self) {
        let mut regs = Regs { rax: Leaf::VpEnter.number() as u64, rcx: self.fixture.vcpu, ..Regs::default() };
        let outcome = self.fixture.module.seamcall(LpId(1), &mut regs).expect("lp1 is free");
        assert_eq!(outcome, Outcome::Entered);
    }

    fn kick(&mut self) {
        self.fixture.module.kick(LpId(1)).expect("the vCPU runs");
    }

    fn accept(&mut self, gpa: u64, level: u8) {
        black_box(self.fixture.module.guest_accept(LpId(1), gpa, level).expect("the vCPU runs"));
    }
}

/// Time of `iterations` of `work` over the 4K pages of 1 GiB, `undo` not counted.
fn timed(
    bench: &mut Bench,
    iterations: u64,
    mut work: impl FnMut(&mut Bench, u64),
    mut undo: impl FnMut(&mut Bench, u64),
) -> Duration {
    let mut spent = Duration::ZERO;
    let mut left = iterations;
    while left > 0 {
        let batch = left.min(GIB / PAGE);
        let start = CpuTime::now();
        for n in 0..batch {
            work(bench, n * PAGE);
        }
        spent += CpuTime::now() - start;
        for n in 0..batch {
            undo(bench, n * PAGE);
        }
        left -= batch;
    }
    spent
}

fn remove_all(bench: &mut Bench, pages: impl Iterator<Item = u64> + Clone) {
    for gpa in pages.clone() {
        bench.block(gpa, 0);
    }
    bench.track();
    for gpa in pages {
        bench.remove(gpa, 0);
    }
}

fn leaves(c: &mut Criterion<CpuTime>) {
    let mut group = c.benchmark_group("tdx_module");
    group.throughput(Throughput::Elements(1)).sample_size(20);
    let mut bench = Bench::new(1, GIB, 1);
    group.bench_function("sept walk (SEPT.RD level 0)", |b| {
        let tdr = bench.tdr;
        let mut gpa = 0;
        b.iter(|| {
            gpa = (gpa + PAGE) % GIB;
            black_box(bench.call(Leaf::MemSeptRd, gpa, tdr, 0));
        });
    });
    group.bench_function("AUG 4K", |b| {
        b.iter_custom(|n| {
            let mut spent = Duration::ZERO;
            let mut left = n;
            while left > 0 {
                let batch = left.min(GIB / PAGE);
                let start = CpuTime::now();
                (0..batch).for_each(|n| bench.aug(n * PAGE, 0));
                spent += CpuTime::now() - start;
                remove_all(&mut bench, (0..batch).map(|n| n * PAGE));
                left -= batch;
            }
            spent
        });
    });
    group.bench_function("REMOVE 4K", |b| {
        b.iter_custom(|n| {
            let mut spent = Duration::ZERO;
            let mut left = n;
            while left > 0 {
                let batch = left.min(GIB / PAGE);
                (0..batch).for_each(|n| bench.aug(n * PAGE, 0));
                (0..batch).for_each(|n| bench.block(n * PAGE, 0));
                bench.track();
                let start = CpuTime::now();
                (0..batch).for_each(|n| bench.remove(n * PAGE, 0));
                spent += CpuTime::now() - start;
                left -= batch;
            }
            spent
        });
    });
    group.bench_function("AUG + ACCEPT 4K", |b| {
        b.iter_custom(|n| {
            let mut spent = Duration::ZERO;
            let mut left = n;
            while left > 0 {
                let batch = left.min(GIB / PAGE);
                bench.enter();
                let start = CpuTime::now();
                for n in 0..batch {
                    bench.aug(n * PAGE, 0);
                    bench.accept(n * PAGE, 0);
                }
                spent += CpuTime::now() - start;
                bench.kick();
                remove_all(&mut bench, (0..batch).map(|n| n * PAGE));
                left -= batch;
            }
            spent
        });
    });
    group.bench_function("BLOCK + TRACK + REMOVE 4K", |b| {
        let undo = |_: &mut Bench, _| {};
        b.iter_custom(|n| {
            let mut spent = Duration::ZERO;
            let mut left = n;
            while left > 0 {
                let batch = left.min(GIB / PAGE);
                (0..batch).for_each(|n| bench.aug(n * PAGE, 0));
                let unmap = |bench: &mut Bench, gpa| {
                    bench.block(gpa, 0);
                    bench.track();
                    bench.remove(gpa, 0);
                };
                spent += timed(&mut bench, batch, unmap, undo);
                left -= batch;
            }
            spent
        });
    });
    group.finish();
}

fn demote(c: &mut Criterion<CpuTime>) {
    let mut group = c.benchmark_group("tdx_module");
    group.sample_size(20);
    let mut bench = Bench::new(1, GIB, 2);
    let (tdr, table) = (bench.tdr, bench.fixture.page());
    bench.aug(0, 1);
    group.bench_function("DEMOTE 2M", |b| {
        b.iter_custom(|n| {
            let mut spent = Duration::ZERO;
            for _ in 0..n {
                bench.block(0, 1);
                bench.track();
                let start = CpuTime::now();
                bench.call(Leaf::MemPageDemote, 1, tdr, table);
                spent += CpuTime::now() - start;
                bench.block(0, 1);
                bench.track();
                bench.call(Leaf::MemPagePromote, 1, tdr, 0);
            }
            spent
        });
    });
    group.finish();
}

/// The same calls with 1 GiB and with 64 GiB mapped at 4K: pages unmapped and mapped again, a random 2M range after the other as an
/// unmap of a range goes, or every page at random, where the processor's caches no longer help.
fn flatness(c: &mut Criterion<CpuTime>) {
    for gib in [1, 64] {
        let mut bench = Bench::new(gib, gib * GIB, 1);
        (0..gib * GIB / PAGE).for_each(|n| bench.aug(n * PAGE, 0));
        let mut remap = |gpa: u64| {
            bench.block(gpa, 0);
            bench.track();
            bench.remove(gpa, 0);
            bench.aug(gpa, 0);
        };
        let (pages, mut at, mut step) = (gib * GIB / PAGE, 0u64, 0u64);
        let name = format!("{gib} GiB mapped");
        let mut group = c.benchmark_group("tdx_module/remap 4K");
        group.throughput(Throughput::Elements(1)).sample_size(10);
        group.bench_function(BenchmarkId::new("random 2M ranges", &name), |b| {
            b.iter(|| {
                if step.is_multiple_of(512) {
                    at = ((at + 0x9E37_79B1) % pages) & !511;
                }
                remap((at + step % 512) * PAGE);
                step += 1;
            });
        });
        group.bench_function(BenchmarkId::new("random pages", &name), |b| {
            b.iter(|| {
                at = (at + 0x9E37_79B1) % pages;
                remap(at * PAGE);
            });
        });
        group.finish();
    }
}

/// Not a time: 64 GiB at 4K and 1 TiB at 2M mapped and accepted in one TD, and what the process holds for it.
fn size(_: &mut Criterion<CpuTime>) {
    let (small, large) = (64 * GIB, 1024 * GIB);
    let mut bench = Bench::new(64 + 1024, small, 1);
    let empty = bench.fixture.module.resident_bytes();
    let start = CpuTime::now();
    bench.enter();
    for gpa in (0..small).step_by(PAGE as usize) {
        bench.aug(gpa, 0);
        bench.accept(gpa, 0);
    }
    let with_small = bench.fixture.module.resident_bytes();
    let pages = small / PAGE;
    println!(
        "64 GiB at 4K: {} MiB, {:.1} bytes a mapped and accepted page ({:.1} s)",
        (with_small - empty) >> 20,
        (with_small - empty) as f64 / pages as f64,
        (CpuTime::now() - start).as_secs_f64(),
    );
    for gpa in (small..small + large).step_by(GIB as usize) {
        let tdr = bench.tdr;
        bench.fixture.add_tables(tdr, gpa, 2);
    }
    for gpa in (small..small + large).step_by(LARGE as usize) {
        bench.aug(gpa, 1);
        bench.accept(gpa, 1);
    }
    bench.kick();
    println!(
        "and 1 TiB at 2M: {} MiB by the module's own count, {} MiB resident in the process",
        bench.fixture.module.resident_bytes() >> 20,
        resident_mib()
    );
    println!("(bare module and TD: {} MiB)", empty >> 20);
}

fn resident_mib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok()).unwrap_or(0) >> 10
}

criterion_group! {
    name = benches;
    config = Criterion::default().with_measurement(CpuTime::measurement());
    targets = leaves, demote, flatness, size
}
criterion_main!(benches);
