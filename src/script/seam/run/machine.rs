//! The machine a script runs on: a module brought up by SEAMCALLs, the pages it gives, the fixtures.

use super::super::ast::{Fixture, PageKind};
use super::super::error::Complaint;
use super::super::expr::Names;
use super::super::names::{TDCS_PAGES, VCPU_TDCX_PAGES};
use super::outcome::status_text;
use crate::sim::tdx_module::memory::{PAGE_SIZE, SparseMemory};
use crate::sim::tdx_module::td::ATTR_SEPT_VE_DISABLE;
use crate::sim::tdx_module::{Leaf, LpId, Module, Outcome, Platform, Regs, Switches, VcpuState};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// The only TDMR: the first GiB gives pages, the second 2M ranges, then whole GiBs, the last is never initialised.
const TDMR_BASE: u64 = 16 * GIB;
const TDMR_SIZE: u64 = 8 * GIB;
const MEMORY: u64 = TDMR_BASE + TDMR_SIZE;
/// Pages of fixtures come first, then `q` and its neighbours, then `page`.
const SPARE_PAGES: u64 = TDMR_BASE + 64 * MIB;
const FREE_PAGES: u64 = TDMR_BASE + 128 * MIB;
const RESERVED: u64 = TDMR_BASE + 512 * MIB;
const RESERVED_SIZE: u64 = 64 << 10;
const RANGES: u64 = TDMR_BASE + GIB;
const GIGAPAGES: u64 = TDMR_BASE + 2 * GIB;
const UNINITIALISED: u64 = TDMR_BASE + 7 * GIB;
/// Convertible memory outside of the TDMR.
const OUTSIDE: u64 = 8 * GIB;
const PAMT: u64 = GIB;
/// The host's own pages.
const PARAMS: u64 = 16 * MIB;
const TDMR_LIST: u64 = PARAMS + PAGE_SIZE;
const TDMR_INFO: u64 = PARAMS + 2 * PAGE_SIZE;
const SHARED_PAGES: u64 = 32 * MIB;

/// What `setup` was told.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    pub fixture: Fixture,
    pub packages: u8,
    pub lps: u32,
    pub vcpus: Vec<String>,
    pub attributes: u64,
    pub config_flags: u64,
    pub max_vcpus: u64,
    pub switches: Switches,
}

impl Plan {
    pub fn new(fixture: Fixture) -> Plan {
        Plan {
            fixture,
            packages: 1,
            lps: 8,
            vcpus: vec!["V".to_string()],
            attributes: ATTR_SEPT_VE_DISABLE,
            config_flags: 0,
            max_vcpus: 16,
            switches: Switches::default(),
        }
    }
}

/// Where the next page of each kind comes from.
#[derive(Clone, Debug)]
struct Pages {
    fixture: u64,
    free: u64,
    ranges: u64,
    gigapages: u64,
    shared: u64,
}

/// A machine and the names of what is in it.
pub(super) struct Machine {
    pub module: Module,
    pub names: Names,
    pub plan: Plan,
    pages: Pages,
    hkids: u64,
}

/// Which leaf of a fixture failed, and how: a defect of the module, for fixtures only do what is legal.
pub(super) struct FixtureFailure {
    pub leaf: &'static str,
    pub status: String,
}

type Built<T> = Result<T, FixtureFailure>;

impl Machine {
    /// A machine brought as far as `plan` says.
    pub fn new(plan: Plan) -> Built<Machine> {
        let per_package = plan.lps.div_ceil(u32::from(plan.packages)).max(1);
        let packages = (0..plan.lps).map(|lp| (lp / per_package) as u8).collect();
        let mut module = Module::new(Platform::with_packages(packages, MEMORY), Box::new(SparseMemory::new(MEMORY)));
        module.set_switches(plan.switches);
        let global = u64::from(module.platform().first_private_hkid);
        let mut names = Names::new();
        for (name, value) in [
            ("q", SPARE_PAGES),
            ("src", SHARED_PAGES),
            ("params", PARAMS),
            ("tdmrs", TDMR_LIST),
            ("tdmr", TDMR_BASE),
            ("outside", OUTSIDE),
            ("reserved", RESERVED),
            ("uninit", UNINITIALISED),
            ("global_hkid", global),
            ("hkid", global + 1),
            ("hkid2", global + 2),
        ] {
            names.insert(name.to_string(), value);
        }
        let pages = Pages {
            fixture: TDMR_BASE,
            free: FREE_PAGES,
            ranges: RANGES,
            gigapages: GIGAPAGES,
            shared: SHARED_PAGES + PAGE_SIZE,
        };
        let mut machine = Machine { module, names, plan, pages, hkids: global + 3 };
        machine.write_parameters();
        machine.write_tdmr();
        if machine.plan.fixture > Fixture::None {
            machine.bring_up()?;
        }
        if machine.plan.fixture > Fixture::Ready {
            machine.build_td("", global + 1, machine.plan.fixture)?;
        }
        Ok(machine)
    }

    /// The same machine built anew under another plan; pages given out so far keep their names.
    pub fn rebuilt(&self, plan: Plan) -> Built<Machine> {
        let mut machine = Machine::new(plan)?;
        for (name, value) in &self.names {
            machine.names.entry(name.clone()).or_insert(*value);
        }
        let fixture = machine.pages.fixture;
        machine.pages = Pages { fixture, ..self.pages.clone() };
        Ok(machine)
    }

    /// A page nobody has had yet.
    pub fn page(&mut self, kind: PageKind) -> Result<u64, Complaint> {
        let (next, size, end) = match kind {
            PageKind::Free => (&mut self.pages.free, PAGE_SIZE, RESERVED),
            PageKind::Range2M => (&mut self.pages.ranges, 2 * MIB, GIGAPAGES),
            PageKind::Range1G => (&mut self.pages.gigapages, GIB, UNINITIALISED),
            PageKind::Shared => (&mut self.pages.shared, PAGE_SIZE, PAMT),
        };
        if *next + size > end {
            return Err(Complaint::new(
                "the machine has no more pages of this kind",
                "use fewer, or begin a new `test`",
            ));
        }
        let page = *next;
        *next += size;
        Ok(page)
    }

    /// Builds a further TD named `name`.
    pub fn further_td(&mut self, name: &str, fixture: Fixture) -> Built<()> {
        let hkid = self.hkids;
        self.hkids += 1;
        self.build_td(&format!("{name}."), hkid, fixture)?;
        self.names.insert(format!("{name}.hkid"), hkid);
        let tdr = self.names.get(&format!("{name}.tdr")).copied().unwrap_or(0);
        self.names.insert(name.to_string(), tdr);
        Ok(())
    }

    fn call(&mut self, lp: LpId, leaf: Leaf, input: Regs) -> Built<Regs> {
        let mut regs = Regs { rax: u64::from(leaf.number()), ..input };
        let status = match self.module.seamcall(lp, &mut regs) {
            Ok(Outcome::Done(status)) if status.is_zero() => return Ok(regs),
            Ok(Outcome::Done(status)) => status_text(status.0),
            Ok(Outcome::Entered) => "the vCPU runs".to_string(),
            Ok(Outcome::Held) => "held half-way".to_string(),
            Err(error) => error.to_string(),
        };
        Err(FixtureFailure { leaf: leaf.name(), status })
    }

    fn host_store(&mut self, pa: u64, words: &[(u64, u64)]) {
        self.module.host_reset(pa, PAGE_SIZE);
        for (offset, word) in words {
            self.module.host_write(pa + offset, *word);
        }
        self.module.host_flush(pa, PAGE_SIZE);
    }

    /// TD_PARAMS (TDX module spec 10.4) at `params`.
    fn write_parameters(&mut self) {
        let Plan { attributes, config_flags, max_vcpus, .. } = self.plan;
        let walk_length = if config_flags & 1 != 0 { 4 } else { 3 };
        let words =
            [(0, attributes), (8, 3), (16, max_vcpus), (24, 6 | walk_length << 3), (32, config_flags), (40, 100)];
        self.host_store(PARAMS, &words);
    }

    /// TDMR_INFO (TDX module spec 5.1) and the array that points to it, at `tdmrs`.
    fn write_tdmr(&mut self) {
        let sizes = [TDMR_SIZE / GIB * 16, TDMR_SIZE / (2 * MIB) * 16, TDMR_SIZE / PAGE_SIZE * 16]
            .map(|bytes: u64| bytes.next_multiple_of(PAGE_SIZE));
        let words = [
            (0, TDMR_BASE),
            (8, TDMR_SIZE),
            (16, PAMT),
            (24, sizes[0]),
            (32, PAMT + sizes[0]),
            (40, sizes[1]),
            (48, PAMT + sizes[0] + sizes[1]),
            (56, sizes[2]),
            (64, RESERVED - TDMR_BASE),
            (72, RESERVED_SIZE),
        ];
        self.host_store(TDMR_INFO, &words);
        self.host_store(TDMR_LIST, &[(0, TDMR_INFO)]);
    }

    fn bring_up(&mut self) -> Built<()> {
        self.call(LpId(0), Leaf::SysInit, Regs::default())?;
        let lps: Vec<LpId> = self.module.platform().lps().collect();
        for lp in &lps {
            self.call(*lp, Leaf::SysLpInit, Regs::default())?;
        }
        let dynamic = u64::from(self.plan.switches.dpamt) << 16;
        let global = u64::from(self.module.platform().first_private_hkid);
        let input = Regs { rcx: TDMR_LIST, rdx: 1, r8: global | dynamic, ..Regs::default() };
        self.call(LpId(0), Leaf::SysConfig, input)?;
        for lp in self.package_leaders() {
            self.call(lp, Leaf::SysKeyConfig, Regs::default())?;
        }
        loop {
            let regs = self.call(LpId(0), Leaf::SysTdmrInit, Regs { rcx: TDMR_BASE, ..Regs::default() })?;
            if regs.rdx >= UNINITIALISED {
                return Ok(());
            }
        }
    }

    fn package_leaders(&self) -> Vec<LpId> {
        let packages = &self.module.platform().lp_packages;
        self.module
            .platform()
            .lps()
            .filter(|lp| lp.0 == 0 || packages[lp.0 as usize] != packages[lp.0 as usize - 1])
            .collect()
    }

    /// A page for a fixture, with its pair underneath if there must be one.
    fn fixture_page(&mut self) -> Built<u64> {
        if self.plan.switches.dpamt && self.pages.fixture.is_multiple_of(2 * MIB) {
            let range = self.pages.fixture;
            self.pages.fixture += 2 * PAGE_SIZE;
            let input = Regs { rcx: range | 1, rdx: range, r8: range + PAGE_SIZE, ..Regs::default() };
            self.call(LpId(0), Leaf::PhymemPamtAdd, input)?;
        }
        let page = self.pages.fixture;
        self.pages.fixture += PAGE_SIZE;
        Ok(page)
    }

    fn build_td(&mut self, prefix: &str, hkid: u64, fixture: Fixture) -> Built<()> {
        let tdr = self.fixture_page()?;
        self.call(LpId(0), Leaf::MngCreate, Regs { rcx: tdr, rdx: hkid, ..Regs::default() })?;
        self.names.insert(format!("{prefix}tdr"), tdr);
        if fixture < Fixture::Keyed {
            return Ok(());
        }
        for lp in self.package_leaders() {
            self.call(lp, Leaf::MngKeyConfig, Regs { rcx: tdr, ..Regs::default() })?;
        }
        if fixture < Fixture::Tdcs {
            return Ok(());
        }
        for index in 0..TDCS_PAGES {
            let page = self.fixture_page()?;
            self.call(LpId(0), Leaf::MngAddcx, Regs { rcx: page, rdx: tdr, ..Regs::default() })?;
            self.names.insert(format!("{prefix}tdcs{index}"), page);
            if index == 3 {
                self.names.insert(format!("{prefix}root"), page);
            }
        }
        if fixture < Fixture::S1 {
            return Ok(());
        }
        self.call(LpId(0), Leaf::MngInit, Regs { rcx: tdr, rdx: PARAMS, ..Regs::default() })?;
        if fixture < Fixture::Built {
            return Ok(());
        }
        let top = if self.plan.config_flags & 1 != 0 { 4 } else { 3 };
        for level in (1..=top).rev() {
            let page = self.fixture_page()?;
            self.call(LpId(0), Leaf::MemSeptAdd, Regs { rcx: level, rdx: tdr, r8: page, ..Regs::default() })?;
            self.names.insert(format!("{prefix}sept{level}"), page);
        }
        let vcpus = if prefix.is_empty() { self.plan.vcpus.clone() } else { vec!["V".to_string()] };
        for (index, name) in vcpus.iter().enumerate() {
            let lp = self.next_vcpu_lp();
            let tdvpr = self.build_vcpu(&format!("{prefix}{name}"), tdr, lp)?;
            if index == 0 {
                self.names.insert(format!("{prefix}tdvpr"), tdvpr);
            }
        }
        if fixture == Fixture::S2 {
            self.call(LpId(0), Leaf::MrFinalize, Regs { rcx: tdr, ..Regs::default() })?;
        }
        Ok(())
    }

    /// Where the next vCPU is initialised: one processor after the other, so that all can run at the same time.
    pub fn next_vcpu_lp(&self) -> LpId {
        let initialised = self.module.vcpus().filter(|vcpu| vcpu.state != VcpuState::Uninitialized).count();
        LpId(initialised as u32 % self.plan.lps)
    }

    /// A READY vCPU, initialised on `lp` and therefore associated with it.
    pub fn build_vcpu(&mut self, name: &str, tdr: u64, lp: LpId) -> Built<u64> {
        let tdvpr = self.fixture_page()?;
        self.call(lp, Leaf::VpCreate, Regs { rcx: tdvpr, rdx: tdr, ..Regs::default() })?;
        self.names.insert(name.to_string(), tdvpr);
        self.names.insert(format!("{name}.tdvpr"), tdvpr);
        for index in 1..=VCPU_TDCX_PAGES {
            let page = self.fixture_page()?;
            self.call(lp, Leaf::VpAddcx, Regs { rcx: page, rdx: tdvpr, ..Regs::default() })?;
            self.names.insert(format!("{name}.tdcx{index}"), page);
        }
        self.call(lp, Leaf::VpInit, Regs { rcx: tdvpr, ..Regs::default() })?;
        Ok(tdvpr)
    }
}
