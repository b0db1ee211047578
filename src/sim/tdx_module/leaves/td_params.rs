//! MNG.INIT and the checks of TD_PARAMS (TDX module spec 5.5, 10.2, 10.4).

use sha2::{Digest, Sha384};

use super::super::call::{Call, Stop};
use super::super::dispatch::{DONE, LeafResult};
use super::super::leaf::Leaf;
use super::super::lock::Mode;
use super::super::lp::{Disorder, HoldPoint};
use super::super::module::Module;
use super::super::operand::Operand;
use super::super::state::OpState;
use super::super::status::{Code, invalid};
use super::super::td::{
    ATTR_DEBUG, ATTR_SEPT_VE_DISABLE, CONFIG_FLEXIBLE_PENDING_VE, CONFIG_GPAW, CONFIG_NO_RBP_MOD, CONFIG_PAGE_RELEASE,
    Gpaw, SEPT_ROOT_PAGE, TDCS_PAGES,
};

/// Bytes of TD_PARAMS, and its alignment.
pub(super) const TD_PARAMS_SIZE: u64 = 1024;
const ATTR_MIGRATABLE: u64 = 1 << 29;
const ATTR_PKS: u64 = 1 << 30;
const ATTR_PERFMON: u64 = 1 << 63;
const NEWER_ATTRIBUTES: u64 = 1 << 4 | 1 << 5 | 1 << 6 | 1 << 16 | 1 << 27 | 1 << 31 | 1 << 62;
/// XFAM bits a TD may have.
pub(super) const XFAM_ALLOWED: u64 = 0x6DBE7;
/// XFAM bits a TD must have.
pub(super) const XFAM_REQUIRED: u64 = 3;
const NEWER_CONFIG_FLAGS: u64 = 1 << 3 | 1 << 4;
const CPUID_CONFIG_OFFSET: usize = 256;

/// The 1024 bytes as the host wrote them.
struct TdParams(Vec<u8>);

impl TdParams {
    fn bytes<const N: usize>(&self, offset: usize) -> [u8; N] {
        std::array::from_fn(|i| self.0[offset + i])
    }

    fn u16(&self, offset: usize) -> u16 {
        u16::from_le_bytes(self.bytes(offset))
    }

    fn u32(&self, offset: usize) -> u32 {
        u32::from_le_bytes(self.bytes(offset))
    }

    fn u64(&self, offset: usize) -> u64 {
        u64::from_le_bytes(self.bytes(offset))
    }

    fn zero(&self, range: std::ops::Range<usize>) -> bool {
        self.0[range].iter().all(|byte| *byte == 0)
    }
}

impl Module {
    /// ATTRIBUTES bits a TD may have on this module.
    pub(super) fn attributes_allowed(&self) -> u64 {
        let newer = if self.switches.newer() { NEWER_ATTRIBUTES } else { 0 };
        ATTR_DEBUG | ATTR_SEPT_VE_DISABLE | ATTR_MIGRATABLE | ATTR_PKS | ATTR_PERFMON | newer
    }

    pub(super) fn mng_init(&mut self, call: &mut Call) -> LeafResult {
        let (tdr, params) = (call.input.rcx, call.input.rdx);
        self.explicit_tdr(call, tdr, Operand::RCX, Mode::Exclusive)?;
        self.td_state(call, tdr, Leaf::MngInit, None)?;
        self.shared_hpa(params, TD_PARAMS_SIZE, Operand::RDX)?;
        let bytes = (0..TD_PARAMS_SIZE / 8).flat_map(|n| self.read_as(params + 8 * n, 0).unwrap_or(0).to_le_bytes());
        let params = TdParams(bytes.collect());
        let pages = self.td_ref(tdr)?.tdcx_pa.len();
        self.check_td_params(call, &params, pages)?;
        call.point(HoldPoint::Commit)?;
        let cpuid = (0..self.platform.cpuid_configs.len()).map(|n| cpuid_values(&params, n)).collect();
        let td = self.td_mut(tdr)?;
        td.attributes = params.u64(0);
        td.xfam = params.u64(8);
        td.max_vcpus = params.u16(16) as u32;
        td.num_l2_vms = params.0[18];
        td.eptp_controls = params.u64(24);
        td.config_flags = params.u64(32);
        td.tsc_frequency = params.u16(40);
        td.mr_config = [params.bytes(80), params.bytes(128), params.bytes(176)];
        td.cpuid_config = cpuid;
        td.gpaw = if td.config_flags & CONFIG_GPAW != 0 { Gpaw::Bits52 } else { Gpaw::Bits48 };
        td.root_level = (td.eptp_controls >> 3 & 7) as u8;
        td.root_pa = td.tdcx_pa[SEPT_ROOT_PAGE];
        td.td_ctls = u64::from(td.attributes & ATTR_SEPT_VE_DISABLE != 0);
        td.epoch = 1;
        td.refcount = [0; 2];
        td.rtmr = [[0; 48]; 4];
        td.measurement = Sha384::new();
        td.measured_blocks = 0;
        td.op_state = OpState::Initialized;
        DONE
    }

    fn check_td_params(&self, call: &mut Call, params: &TdParams, tdcs_pages: usize) -> Result<(), Stop> {
        let refuse = |operand| Err(Stop::Fail(invalid(operand)));
        let attributes = params.u64(0);
        let migratable_clash = attributes & ATTR_MIGRATABLE != 0 && attributes & (ATTR_DEBUG | ATTR_PERFMON) != 0;
        if attributes & !self.attributes_allowed() != 0 || migratable_clash {
            return refuse(Operand::ATTRIBUTES);
        }
        if !xfam_is_legal(params.u64(8)) {
            return refuse(Operand::XFAM);
        }
        if params.u16(16) == 0 {
            return refuse(Operand::MAX_VCPUS);
        }
        let l2_vms = params.0[18] as usize;
        if l2_vms > 3 {
            return refuse(Operand::NUM_L2_VMS);
        }
        if tdcs_pages < TDCS_PAGES + l2_vms {
            return Err(Code::TdcsNotAllocated.into());
        }
        // L2 partitions are out of this model's scope.
        if l2_vms > 0 {
            return refuse(Operand::NUM_L2_VMS);
        }
        if !params.zero(19..24) {
            return refuse(Operand::RDX);
        }
        let flags = params.u64(32);
        if flags & !self.config_flags_allowed() != 0 {
            return refuse(Operand::CONFIG_FLAGS);
        }
        let eptp = params.u64(24);
        let levels = eptp >> 3 & 7;
        let wide_but_shallow = flags & CONFIG_GPAW != 0 && levels != 4;
        if eptp & 7 != 6 || !(3..=4).contains(&levels) || eptp >> 6 != 0 || wide_but_shallow {
            return refuse(Operand::EPTP_CONTROLS);
        }
        if !(4..=400).contains(&params.u16(40)) {
            return refuse(Operand::TSC_FREQUENCY);
        }
        self.check_order(call, Disorder::TscAdjustChanged)?;
        let cpuid_end = CPUID_CONFIG_OFFSET + 16 * self.platform.cpuid_configs.len();
        if !params.zero(42..80) || !params.zero(232..256) || !params.zero(cpuid_end..1024) {
            return refuse(Operand::RDX);
        }
        for (n, (leaf, subleaf, mask)) in self.platform.cpuid_configs.iter().enumerate() {
            let values = cpuid_values(params, n);
            if values.iter().zip(mask).any(|(value, mask)| value & !mask != 0) {
                call.regs.rcx = *leaf as u64 | (*subleaf as u64) << 32;
                return refuse(Operand::CPUID_CONFIG);
            }
        }
        if params.u64(224) != 0 {
            return refuse(Operand::IA32_ARCH_CAPABILITIES_CONFIG);
        }
        Ok(())
    }

    fn config_flags_allowed(&self) -> u64 {
        let newer = if self.switches.newer() { NEWER_CONFIG_FLAGS } else { 0 };
        let release = if self.switches.page_release { CONFIG_PAGE_RELEASE } else { 0 };
        CONFIG_GPAW | CONFIG_FLEXIBLE_PENDING_VE | CONFIG_NO_RBP_MOD | newer | release
    }
}

fn cpuid_values(params: &TdParams, n: usize) -> [u32; 4] {
    std::array::from_fn(|i| params.u32(CPUID_CONFIG_OFFSET + 16 * n + 4 * i))
}

fn xfam_is_legal(xfam: u64) -> bool {
    let bit = |n: u64| xfam >> n & 1;
    let avx512 = xfam >> 5 & 7;
    xfam & !XFAM_ALLOWED == 0
        && xfam & XFAM_REQUIRED == XFAM_REQUIRED
        && (avx512 == 0 || avx512 == 7 && bit(2) == 1)
        && bit(11) == bit(12)
        && bit(17) == bit(18)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn xfam_components_come_in_whole_groups() {
        for legal in [0x3, 0x7, 0xE7, 0x1803, 0x60003, 0x6DBE7] {
            assert!(xfam_is_legal(legal), "{legal:#x}");
        }
        for illegal in [0x0, 0x1, 0xE3, 0x27, 0x803, 0x20003, 0x13] {
            assert!(!xfam_is_legal(illegal), "{illegal:#x}");
        }
    }
}
