//! Bringing the module up: SYS.INIT to the last TDMR, as the kernel does at boot.

use crate::machine::PAGE_SIZE;
use crate::sim::host::allocator::Regions;
use crate::sim::tdx_module::memory::SparseMemory;
use crate::sim::tdx_module::{Leaf, LpId, Module, Platform, Reg, Switches};
use std::fmt;

/// The processor on which the host makes SEAMCALLs.
pub const HOST_LP: LpId = LpId(0);
/// Processors for vCPUs besides the host's.
const GUEST_LPS: u32 = 31;
/// Where the only TDMR begins: all allocatable memory is above.
const TDMR_BASE: u64 = 16 << 30;
const PAMT_BASE: u64 = 1 << 30;
const TDMR_LIST: u64 = (16 << 20) - 2 * PAGE_SIZE;
const TDMR_INFO: u64 = (16 << 20) - 3 * PAGE_SIZE;
/// Where TD_PARAMS is handed over.
pub const PARAMS: u64 = (16 << 20) - PAGE_SIZE;

/// The module, and what the kernel around it keeps for all TDs.
pub struct TdxHost {
    /// The simulated module.
    pub module: Module,
    /// Private key ids that no TD has.
    pub free_hkids: Vec<u16>,
    /// Processors for vCPUs that none was created for.
    pub free_lps: Vec<LpId>,
}

impl fmt::Debug for TdxHost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TdxHost").field("free_hkids", &self.free_hkids).finish_non_exhaustive()
    }
}

impl TdxHost {
    /// The frames of each order of folio, in GiB each, above the start of the TDMR.
    pub fn regions(base_gib: u64, pmd_gib: u64, pud_gib: u64) -> Regions {
        let frames = |gib: u64| (gib << 30) / PAGE_SIZE;
        let start = TDMR_BASE / PAGE_SIZE;
        let pmd = start + frames(base_gib);
        let pud = pmd + frames(pmd_gib);
        Regions { first: [start, pmd, pud], limit: [pmd, pud, pud + frames(pud_gib)] }
    }

    /// A module that is ready, with one TDMR over all of the regions' frames.
    ///
    /// # Panics
    /// When a SEAMCALL of the bring-up fails, which would be a defect of the module.
    pub fn boot(regions: &Regions, switches: Switches) -> TdxHost {
        let end = regions.limit[2] * PAGE_SIZE;
        let platform = Platform::new(1 + GUEST_LPS, end + (1 << 30));
        let mut module = Module::new(platform, Box::new(SparseMemory::new(end)));
        module.set_switches(switches);
        let first = module.platform().first_private_hkid;
        let keys = module.platform().keys() as u16;
        let mut host = TdxHost {
            module,
            free_hkids: (first + 1..keys).rev().collect(),
            free_lps: (1..=GUEST_LPS).rev().map(LpId).collect(),
        };
        let size = end - TDMR_BASE;
        let areas = [size >> 30, size >> 21, size >> 12].map(|pages| (pages * 16).next_multiple_of(PAGE_SIZE));
        let starts = [PAMT_BASE, PAMT_BASE + areas[0], PAMT_BASE + areas[0] + areas[1]];
        host.module.host_reset(TDMR_INFO, 2 * PAGE_SIZE);
        host.module.host_write(TDMR_LIST, TDMR_INFO);
        let info = [TDMR_BASE, size, starts[0], areas[0], starts[1], areas[1], starts[2], areas[2]];
        for (i, word) in info.into_iter().enumerate() {
            host.module.host_write(TDMR_INFO + 8 * i as u64, word);
        }
        host.module.host_flush(TDMR_INFO, 2 * PAGE_SIZE);
        host.must(HOST_LP, Leaf::SysInit, &[]);
        for lp in host.module.platform().lps() {
            host.must(lp, Leaf::SysLpInit, &[]);
        }
        let config = [(Reg::Rcx, TDMR_LIST), (Reg::Rdx, 1), (Reg::R8, u64::from(first))];
        host.must(HOST_LP, Leaf::SysConfig, &config);
        host.must(HOST_LP, Leaf::SysKeyConfig, &[]);
        while host.must(HOST_LP, Leaf::SysTdmrInit, &[(Reg::Rcx, TDMR_BASE)]) < end {}
        host.module.trace_mut().reset_counters();
        host
    }

    /// A call of the bring-up; the answer is RDX.
    fn must(&mut self, lp: LpId, leaf: Leaf, operands: &[(Reg, u64)]) -> u64 {
        let answer = self.seamcall(lp, leaf, operands);
        assert!(answer.status.is_zero(), "{} of the bring-up: {}", leaf.name(), answer.status);
        answer.regs.rdx
    }
}
