//! KVM's TDX code on top of the simulated module: what arch/x86/kvm/vmx/tdx.c and the SEAMCALL wrappers below it do.
//!
//! [`boot`] brings the module up, [`seamcall`] calls it, [`command`] is KVM_MEMORY_ENCRYPT_OP with the answers of
//! [`capabilities`], [`create`] builds a TD and [`destroy`] takes it down, [`map`] and
//! [`unmap`] keep the S-EPT in step with the mirror root, [`run`] executes guest accesses to private memory. A [`Td`] is
//! what KVM remembers of one TD: its key id and every page it gave to the module.

pub mod boot;
pub mod capabilities;
pub mod command;
pub mod create;
pub mod destroy;
pub mod map;
mod populate;
pub mod run;
pub mod seamcall;
pub mod split;
#[cfg(test)]
mod tests;
pub mod unmap;

pub use boot::TdxHost;
pub use unmap::UnmapError;

use super::super::host::Pfn;
use super::super::tdx_module::LpId;
use std::collections::{BTreeMap, BTreeSet};

/// The SHARED bit of guest-physical addresses with 48 bits of them (GPAW 0).
pub const SHARED_BIT: u64 = 1 << 47;

/// How far a TD is (KVM's TD states).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TdState {
    /// KVM_TDX_INIT_VM is done, pages can be added.
    Initialized,
    /// KVM_TDX_FINALIZE_VM is done.
    Runnable,
}

/// A vCPU of a TD.
#[derive(Clone, Debug)]
pub struct TdVcpu {
    /// Its root page.
    pub tdvpr: Pfn,
    /// Its other control pages.
    pub tdcx: Vec<Pfn>,
    /// The processor it runs on.
    pub lp: LpId,
}

/// What KVM keeps of a TD.
#[derive(Clone, Debug)]
pub struct Td {
    /// Its private key id.
    pub hkid: u16,
    /// Whether the key id is still assigned.
    pub key_assigned: bool,
    /// Its root page.
    pub tdr: Pfn,
    /// Its control pages.
    pub tdcs: Vec<Pfn>,
    /// How far it is.
    pub state: TdState,
    /// Pages of the S-EPT: level of the entry that points to the table and first gfn, to the frame.
    pub tables: BTreeMap<(u8, u64), Pfn>,
    /// vCPU ids whose CPUID has x2APIC, without which KVM_TDX_INIT_VCPU fails.
    pub x2apic: BTreeSet<u32>,
    /// Until 6.18: frame numbers whose TDH.MEM.PAGE.ADD failed. Their folios count as prepared (kvm_gmem_prepare_folio()), and
    /// are not populated any more.
    pub prepared: BTreeSet<u64>,
    /// vCPUs that KVM_TDX_INIT_VCPU has made, by id.
    pub vcpus: BTreeMap<u32, TdVcpu>,
}

/// What the SEAMCALLs on a TD's memory need of it.
#[derive(Clone, Copy, Debug)]
pub struct TdIds {
    /// Physical address of the TDR.
    pub tdr: u64,
    /// Private key id.
    pub hkid: u16,
    /// How far the TD is.
    pub state: TdState,
}

impl Td {
    /// What the SEAMCALLs on its memory need.
    pub fn ids(&self) -> TdIds {
        TdIds { tdr: self.tdr_pa(), hkid: self.hkid, state: self.state }
    }

    /// Physical address of the TDR, the operand of most SEAMCALLs.
    pub fn tdr_pa(&self) -> u64 {
        self.tdr * crate::machine::PAGE_SIZE
    }
}
