//! A module brought up and TDs built by SEAMCALLs, as tests, scripts and benchmarks start from (TDX module spec 13, setups S1 and S2).

use super::call::Outcome;
use super::leaf::Leaf;
use super::lp::LpId;
use super::memory::{LineTag, PAGE_SIZE, SparseMemory};
use super::module::Module;
use super::platform::Platform;
use super::regs::{Reg, Regs};
use super::status::Status;
use super::switches::Switches;
use super::td::{ATTR_SEPT_VE_DISABLE, TDCS_PAGES};
use super::vcpu::TDVPS_PAGES;

/// Address of the first TDMR.
pub const TDMR_BASE: u64 = 16 << 30;
/// Host memory outside of every TDMR, for parameters and source pages.
pub const HOST_MEMORY: u64 = 16 << 20;
const PARAMS: u64 = HOST_MEMORY - PAGE_SIZE;
const TDMR_LIST: u64 = HOST_MEMORY - 2 * PAGE_SIZE;
const TDMR_INFO: u64 = HOST_MEMORY - 3 * PAGE_SIZE;
const PAMT_BASE: u64 = 1 << 30;

/// What TD to build.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TdSpec {
    /// ATTRIBUTES.
    pub attributes: u64,
    /// XFAM.
    pub xfam: u64,
    /// MAX_VCPUS.
    pub max_vcpus: u16,
    /// CONFIG_FLAGS; GPAW decides between 4 and 5 levels.
    pub config_flags: u64,
    /// TSC frequency in units of 25 MHz.
    pub tsc_frequency: u16,
}

impl Default for TdSpec {
    /// SEPT_VE_DISABLE, x87 and SSE, GPAW 0, 4 levels.
    fn default() -> TdSpec {
        TdSpec { attributes: ATTR_SEPT_VE_DISABLE, xfam: 3, max_vcpus: 16, config_flags: 0, tsc_frequency: 100 }
    }
}

/// A module that is ready, a TD in it, and pages to give.
pub struct Fixture {
    /// The module.
    pub module: Module,
    /// TDR of the TD.
    pub tdr: u64,
    /// TDVPR of the first vCPU; 0 if there is none.
    pub vcpu: u64,
    next_page: u64,
    next_range: u64,
    next_hkid: u16,
}

impl Fixture {
    /// A module brought up on `platform` over sparse memory, with one TDMR of `gib` GiB at [`TDMR_BASE`] and no TD.
    ///
    /// # Panics
    /// When a SEAMCALL of the bring-up fails: `platform` does not fit.
    pub fn bring_up(platform: Platform, gib: u64, switches: Switches) -> Fixture {
        let limit = TDMR_BASE + (gib << 30);
        let mut module = Module::new(platform, Box::new(SparseMemory::new(limit)));
        module.set_switches(switches);
        let range_base = limit - (gib << 30) / 2;
        let next_hkid = module.platform().first_private_hkid + 1;
        let mut fixture = Fixture {
            module,
            tdr: 0,
            vcpu: 0,
            next_page: TDMR_BASE,
            next_range: range_base & !((2 << 20) - 1),
            next_hkid,
        };
        fixture.configure_system(gib);
        fixture
    }

    /// Setup S1: a TD in INITIALIZED, GPAW 0, 4 levels, empty root. Two processors, 8 GiB of TDMR.
    ///
    /// # Panics
    /// When a SEAMCALL fails, which would be a defect of the module.
    pub fn s1() -> Fixture {
        Fixture::s1_with(Switches::default(), TdSpec::default())
    }

    /// Setup S1 with other switches or another TD.
    ///
    /// # Panics
    /// As [`Fixture::s1`].
    pub fn s1_with(switches: Switches, spec: TdSpec) -> Fixture {
        let mut fixture = Fixture::bring_up(Platform::new(4, 64 << 30), 8, switches);
        fixture.tdr = fixture.build_td(&spec);
        fixture
    }

    /// Setup S2: S1 with tables for GPA 0 at levels 3, 2 and 1, finalized, one READY vCPU not associated with any processor.
    ///
    /// # Panics
    /// As [`Fixture::s1`].
    pub fn s2() -> Fixture {
        Fixture::s2_with(Switches::default(), TdSpec::default())
    }

    /// Setup S2 with other switches or another TD.
    ///
    /// # Panics
    /// As [`Fixture::s1`].
    pub fn s2_with(switches: Switches, spec: TdSpec) -> Fixture {
        let mut fixture = Fixture::s1_with(switches, spec);
        let tdr = fixture.tdr;
        fixture.add_tables(tdr, 0, 1);
        fixture.vcpu = fixture.build_vcpu(tdr);
        fixture.must(Leaf::MrFinalize, &[("rcx", tdr)]);
        fixture
    }

    /// Calls a leaf on `lp0` with the registers named; the rest are zero. Returns the registers as the leaf left them.
    ///
    /// # Panics
    /// When a register name is wrong or the processor cannot call.
    pub fn call(&mut self, leaf: Leaf, registers: &[(&str, u64)]) -> (Outcome, Regs) {
        self.call_on(LpId(0), leaf, registers)
    }

    /// As [`Fixture::call`], on another processor.
    ///
    /// # Panics
    /// As [`Fixture::call`].
    pub fn call_on(&mut self, lp: LpId, leaf: Leaf, registers: &[(&str, u64)]) -> (Outcome, Regs) {
        let mut regs = Regs { rax: leaf.number() as u64, ..Regs::default() };
        for (name, value) in registers {
            if *name == "version" {
                regs.rax |= value << 16;
                continue;
            }
            let reg = Reg::from_name(name).unwrap_or_else(|| panic!("no register {name}"));
            regs[reg] = *value;
        }
        let outcome = self.module.seamcall(lp, &mut regs).unwrap_or_else(|error| panic!("{error}"));
        (outcome, regs)
    }

    /// The status of a call on `lp0` that ends.
    ///
    /// # Panics
    /// As [`Fixture::call`], or when the leaf is held or enters a guest.
    pub fn status(&mut self, leaf: Leaf, registers: &[(&str, u64)]) -> Status {
        self.call(leaf, registers).0.status().expect("the leaf ends")
    }

    /// A call that must succeed.
    ///
    /// # Panics
    /// When it does not.
    pub fn must(&mut self, leaf: Leaf, registers: &[(&str, u64)]) -> Regs {
        self.must_on(LpId(0), leaf, registers)
    }

    /// A call that must succeed, on another processor.
    ///
    /// # Panics
    /// When it does not.
    pub fn must_on(&mut self, lp: LpId, leaf: Leaf, registers: &[(&str, u64)]) -> Regs {
        let (outcome, regs) = self.call_on(lp, leaf, registers);
        assert_eq!(outcome, Outcome::Done(Status::SUCCESS), "{} {registers:x?}", leaf.name());
        regs
    }

    /// A TDMR page nobody has had yet. With a dynamic PAMT its range has the page pair it needs.
    pub fn page(&mut self) -> u64 {
        let at = self.next_page;
        if self.module.pamt.dynamic && at.is_multiple_of(2 << 20) {
            let pair = [("rcx", at | 1), ("rdx", at), ("r8", at + PAGE_SIZE)];
            self.must(Leaf::PhymemPamtAdd, &pair);
            self.next_page = at + 2 * PAGE_SIZE;
        }
        let page = self.next_page;
        self.next_page += PAGE_SIZE;
        page
    }

    /// A 2M-aligned range of 512 pages nobody has had yet.
    pub fn range(&mut self) -> u64 {
        let range = self.next_range;
        self.next_range += 2 << 20;
        range
    }

    /// A TD in INITIALIZED. Returns its TDR.
    ///
    /// # Panics
    /// When a SEAMCALL fails.
    pub fn build_td(&mut self, spec: &TdSpec) -> u64 {
        let tdr = self.build_td_keys();
        for _ in 0..TDCS_PAGES {
            let page = self.page();
            self.must(Leaf::MngAddcx, &[("rcx", page), ("rdx", tdr)]);
        }
        let params = self.td_params(spec);
        self.must(Leaf::MngInit, &[("rcx", tdr), ("rdx", params)]);
        tdr
    }

    /// A TD with its keys configured and no TDCS page yet. Returns its TDR.
    ///
    /// # Panics
    /// When a SEAMCALL fails.
    pub fn build_td_keys(&mut self) -> u64 {
        let tdr = self.page();
        let hkid = self.hkid();
        self.must(Leaf::MngCreate, &[("rcx", tdr), ("rdx", hkid)]);
        for lp in self.package_leaders() {
            self.must_on(lp, Leaf::MngKeyConfig, &[("rcx", tdr)]);
        }
        tdr
    }

    /// A private key id not given out yet.
    pub fn hkid(&mut self) -> u64 {
        let hkid = self.next_hkid;
        self.next_hkid += 1;
        hkid as u64
    }

    /// Writes TD_PARAMS for `spec` to host memory and returns its address.
    pub fn td_params(&mut self, spec: &TdSpec) -> u64 {
        self.module.host_reset(PARAMS, 1024);
        let wide = spec.config_flags & 1 != 0;
        let eptp_controls = 6 | if wide { 4 << 3 } else { 3 << 3 };
        let words = [
            (0, spec.attributes),
            (8, spec.xfam),
            (16, spec.max_vcpus as u64),
            (24, eptp_controls),
            (32, spec.config_flags),
            (40, spec.tsc_frequency as u64),
        ];
        for (offset, word) in words {
            self.module.host_write(PARAMS + offset, word);
        }
        self.module.host_flush(PARAMS, 1024);
        PARAMS
    }

    /// A READY vCPU, initialised on `lp0` and flushed from it. Returns its TDVPR.
    ///
    /// # Panics
    /// When a SEAMCALL fails.
    pub fn build_vcpu(&mut self, tdr: u64) -> u64 {
        let tdvpr = self.page();
        self.must(Leaf::VpCreate, &[("rcx", tdvpr), ("rdx", tdr)]);
        for _ in 1..TDVPS_PAGES {
            let page = self.page();
            self.must(Leaf::VpAddcx, &[("rcx", page), ("rdx", tdvpr)]);
        }
        self.must(Leaf::VpInit, &[("rcx", tdvpr)]);
        self.must(Leaf::VpFlush, &[("rcx", tdvpr)]);
        tdvpr
    }

    /// Adds the missing tables above `gpa` down to those that hold entries of level `bottom - 1`.
    ///
    /// # Panics
    /// When a SEAMCALL fails.
    pub fn add_tables(&mut self, tdr: u64, gpa: u64, bottom: u8) {
        let root_level = self.module.td(tdr).map_or(3, |td| td.root_level);
        for level in (bottom..=root_level).rev() {
            let present = matches!(self.module.sept_entry(tdr, gpa, level - 1), Some(Ok(_)));
            if !present {
                let page = self.page();
                let rcx = gpa & !(super::sept::span(level) - 1) | level as u64;
                self.must(Leaf::MemSeptAdd, &[("rcx", rcx), ("rdx", tdr), ("r8", page)]);
            }
        }
    }

    /// The first processor of every package.
    pub fn package_leaders(&self) -> Vec<LpId> {
        let packages = &self.module.platform().lp_packages;
        let first =
            |lp: &LpId| packages.iter().position(|other| *other == packages[lp.0 as usize]) == Some(lp.0 as usize);
        self.module.platform().lps().filter(first).collect()
    }

    fn configure_system(&mut self, gib: u64) {
        let words = (gib << 30) >> 12;
        let sizes = [gib * 16, gib * 512 * 16, words * 16].map(|bytes| bytes.next_multiple_of(PAGE_SIZE));
        let areas = [PAMT_BASE, PAMT_BASE + sizes[0], PAMT_BASE + sizes[0] + sizes[1]];
        self.module.memory.fill(TDMR_INFO, PAGE_SIZE, 0, LineTag::HOST);
        self.module.memory.fill(TDMR_LIST, PAGE_SIZE, 0, LineTag::HOST);
        self.module.memory.write_u64(TDMR_LIST, TDMR_INFO);
        let info = [TDMR_BASE, gib << 30, areas[0], sizes[0], areas[1], sizes[1], areas[2], sizes[2]];
        for (i, word) in info.into_iter().enumerate() {
            self.module.memory.write_u64(TDMR_INFO + 8 * i as u64, word);
        }
        self.must(Leaf::SysInit, &[]);
        for lp in self.module.platform().lps() {
            self.must_on(lp, Leaf::SysLpInit, &[]);
        }
        let dynamic = if self.module.switches().dpamt { 1 << 16 } else { 0 };
        let global = self.module.platform().first_private_hkid as u64;
        self.must(Leaf::SysConfig, &[("rcx", TDMR_LIST), ("rdx", 1), ("r8", global | dynamic)]);
        for lp in self.package_leaders() {
            self.must_on(lp, Leaf::SysKeyConfig, &[]);
        }
        while self.must(Leaf::SysTdmrInit, &[("rcx", TDMR_BASE)]).rdx < TDMR_BASE + (gib << 30) {}
    }
}
