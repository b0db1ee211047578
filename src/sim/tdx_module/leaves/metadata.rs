//! Metadata: SYS.RD, MNG.RD, VP.RD and VP.WR, for the fields Linux and this project read.
//!
//! A field id carries a class (bits 61:56) and a code (bits 23:0); the other bits describe element sizes and are not compared, as Linux
//! does not either. Field codes are those of `arch/x86/virt/vmx/tdx/tdx_global_metadata.c` and `arch/x86/kvm/vmx/tdx_arch.h`.

use super::super::call::{Call, Stop};
use super::super::dispatch::{DONE, LeafResult};
use super::super::leaf::Leaf;
use super::super::lock::Mode;
use super::super::lp::HoldPoint;
use super::super::module::Module;
use super::super::operand::Operand;
use super::super::status::{Code, Status};
use super::super::td::TDCS_PAGES;
use super::super::vcpu::TDVPS_PAGES;
use super::config::{MAX_RESERVED, MAX_TDMRS, PAMT_ENTRY};
use super::td_params::{XFAM_ALLOWED, XFAM_REQUIRED};

const CLASS_VMCS: u64 = 0;
const CLASS_TD_PARAMS: u64 = 0x11;
const CLASS_CPUID: u64 = 0x14;
const CLASS_OTHER_GUEST: u64 = 0x11;
const CLASS_GUEST_GPR: u64 = 0x10;
const CLASS_MANAGEMENT: u64 = 0x20;
const PEND_NMI: u64 = 11;
const VCPU_STATE_DETAILS: u64 = 0x100;
const NO_NEXT_FIELD: u64 = u64::MAX;

/// FEATURES0 bits this model publishes.
mod features0 {
    pub const HOST_PRIORITY_LOCKS: u64 = 1 << 10;
    pub const PENDING_EPT_VIOLATION_V2: u64 = 1 << 16;
    pub const NO_RBP_MOD: u64 = 1 << 18;
    pub const TOPOLOGY_ENUM: u64 = 1 << 20;
    pub const DYNAMIC_PAMT: u64 = 1 << 36;
    pub const ENHANCED_DEMOTE: u64 = 1 << 51;
}

fn class_and_code(field: u64) -> (u64, u64) {
    (field >> 56 & 0x3F, field & 0xFF_FFFF)
}

fn unknown_field() -> Stop {
    Status::on(Code::MetadataFieldIdIncorrect, Operand::RDX).into()
}

impl Module {
    /// FEATURES0 as SYS.RD shows it.
    pub fn features0(&self) -> u64 {
        use features0::*;
        let dpamt = if self.switches.dpamt { DYNAMIC_PAMT } else { 0 };
        let demote = if self.switches.enhanced_demote { ENHANCED_DEMOTE } else { 0 };
        HOST_PRIORITY_LOCKS | PENDING_EPT_VIOLATION_V2 | NO_RBP_MOD | TOPOLOGY_ENUM | dpamt | demote
    }

    pub(super) fn sys_rd(&mut self, call: &mut Call) -> LeafResult {
        call.point(HoldPoint::Commit)?;
        let (class, code) = class_and_code(call.input.rdx);
        let value = self.sys_field(class, code).ok_or_else(unknown_field)?;
        call.regs.r8 = value;
        call.regs.rdx = NO_NEXT_FIELD;
        DONE
    }

    fn sys_field(&self, class: u64, code: u64) -> Option<u64> {
        let (major, minor, update) = if self.switches.newer() { (2, 0, 0) } else { (1, 5, 1) };
        let cmr = |n: u64| self.platform.cmrs.get(n as usize).copied().unwrap_or((0, 0));
        Some(match (class, code) {
            (0x08, 1) => 20240201,
            (0x08, 2) => 0,
            (0x08, 3) => minor,
            (0x08, 4) => major,
            (0x08, 5) => update,
            (0x08, 6) => 0,
            (0x0A, 8) => self.features0(),
            (0x10, 0) => self.platform.cmrs.len() as u64,
            (0x10, 0x80..=0x9F) => cmr(code - 0x80).0,
            (0x10, 0x100..=0x11F) => cmr(code - 0x100).1,
            (0x11, 8) => MAX_TDMRS,
            (0x11, 9) => MAX_RESERVED,
            (0x11, 0x10..=0x12) => PAMT_ENTRY,
            (0x11, 0x13) if self.switches.dpamt => 1,
            (0x18, 0) => 4096,
            (0x18, 0x100) => TDCS_PAGES as u64 * 4096,
            (0x18, 0x200) => TDVPS_PAGES as u64 * 4096,
            (0x19, 0) => self.attributes_allowed(),
            (0x19, 1) => 0,
            (0x19, 2) => XFAM_ALLOWED,
            (0x19, 3) => XFAM_REQUIRED,
            (0x19, 4) => self.platform.cpuid_configs.len() as u64,
            (0x19, 8) => 0xFFFF,
            (0x19, 0x400..=0x47F) => {
                let (leaf, subleaf, _) = self.platform.cpuid_configs.get((code - 0x400) as usize)?;
                *leaf as u64 | (*subleaf as u64) << 32
            }
            (0x19, 0x500..=0x5FF) => {
                let (_, _, mask) = self.platform.cpuid_configs.get((code - 0x500) as usize / 2)?;
                let half = (code & 1) as usize * 2;
                mask[half] as u64 | (mask[half + 1] as u64) << 32
            }
            _ => return None,
        })
    }

    pub(super) fn mng_rd(&mut self, call: &mut Call) -> LeafResult {
        let tdr = self.explicit_tdr(call, call.input.rcx, Operand::RCX, Mode::Shared)?;
        self.td_state(call, tdr, Leaf::MngRd, Some(Mode::Shared))?;
        call.point(HoldPoint::Commit)?;
        let (class, code) = class_and_code(call.input.rdx);
        let value = match class {
            CLASS_CPUID => Some(self.cpuid_field(tdr, code)?),
            CLASS_TD_PARAMS => self.td_field(tdr, code)?,
            _ => None,
        };
        call.regs.r8 = value.ok_or_else(unknown_field)?;
        if call.version > 0 {
            call.regs.rdx = NO_NEXT_FIELD;
        }
        DONE
    }

    fn td_field(&self, tdr: u64, code: u64) -> Result<Option<u64>, Stop> {
        let td = self.td_ref(tdr)?;
        Ok(Some(match code {
            0 => td.attributes,
            1 => td.xfam,
            2 => td.max_vcpus as u64,
            3 => td.gpaw as u64,
            4 => td.root_pa | (td.root_level as u64) << 3 | 6,
            10 => 0,
            11 => 1 << 48,
            0x10 => td.notify_enables,
            0x16 => td.config_flags,
            0x17 => td.td_ctls,
            _ => return Ok(None),
        }))
    }

    /// CPUID values of a TD: leaf bit 31 in bit 16, leaf bits 6:0 in 15:9, no subleaf in 8, subleaf in 7:1, register pair in 0.
    /// What the host configured is shown; leaves that are not configurable read as zero.
    fn cpuid_field(&self, tdr: u64, code: u64) -> Result<u64, Stop> {
        let leaf = (code >> 16 & 1) << 31 | code >> 9 & 0x7F;
        let no_subleaf = code >> 8 & 1 == 1;
        let subleaf = if no_subleaf { u32::MAX } else { (code >> 1 & 0x7F) as u32 };
        let known = |config: &(u32, u32, [u32; 4])| config.0 as u64 == leaf && config.1 == subleaf;
        let Some(at) = self.platform.cpuid_configs.iter().position(known) else { return Ok(0) };
        let values = self.td_ref(tdr)?.cpuid_config.get(at).copied().unwrap_or_default();
        let half = (code & 1) as usize * 2;
        Ok(values[half] as u64 | (values[half + 1] as u64) << 32)
    }

    pub(super) fn vp_rd(&mut self, call: &mut Call) -> LeafResult {
        let (tdvpr, tdr) = self.explicit_tdvpr(call, call.input.rcx, Operand::RCX, Mode::Shared, Mode::Shared)?;
        self.td_state(call, tdr, Leaf::VpRd, Some(Mode::Shared))?;
        call.point(HoldPoint::Commit)?;
        call.regs.r8 = self.vcpu_field(tdvpr, tdr, call.input.rdx)?;
        if call.version > 0 {
            call.regs.rdx = NO_NEXT_FIELD;
        }
        DONE
    }

    fn vcpu_field(&self, tdvpr: u64, tdr: u64, field: u64) -> Result<u64, Stop> {
        let vcpu = self.vcpu_ref(tdvpr)?;
        let key = field_key(field);
        match class_and_code(field) {
            (CLASS_VMCS, _) | (CLASS_MANAGEMENT, PEND_NMI) => Ok(vcpu.fields.get(&key).copied().unwrap_or(0)),
            (CLASS_OTHER_GUEST, VCPU_STATE_DETAILS) => Ok(0),
            (CLASS_GUEST_GPR, code @ 0..=15) => {
                if self.td_ref(tdr)?.attributes & super::super::td::ATTR_DEBUG == 0 {
                    return Err(Status::on(Code::MetadataFieldNotReadable, Operand::RDX).into());
                }
                Ok(vcpu.gpr[super::super::regs::Reg::ALL[code as usize]])
            }
            _ => Err(unknown_field()),
        }
    }

    pub(super) fn vp_wr(&mut self, call: &mut Call) -> LeafResult {
        let (tdvpr, tdr) = self.explicit_tdvpr(call, call.input.rcx, Operand::RCX, Mode::Exclusive, Mode::Shared)?;
        self.td_state(call, tdr, Leaf::VpWr, Some(Mode::Shared))?;
        let (field, value, mask) = (call.input.rdx, call.input.r8, call.input.r9);
        let old = self.vcpu_field(tdvpr, tdr, field)?;
        if !matches!(class_and_code(field), (CLASS_VMCS, _) | (CLASS_MANAGEMENT, PEND_NMI)) {
            return Err(Status::on(Code::MetadataFieldNotWritable, Operand::RDX).into());
        }
        call.point(HoldPoint::Commit)?;
        self.vcpu_ref_mut(tdvpr)?.fields.insert(field_key(field), old & !mask | value & mask);
        call.regs.r8 = old;
        DONE
    }
}

/// Class and code alone, so that one field written with different size bits stays one field.
fn field_key(field: u64) -> u64 {
    let (class, code) = class_and_code(field);
    class << 56 | code
}
