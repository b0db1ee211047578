//! The SEAMCALLs that unmap a private page, and how they fail.

use crate::machine::{FaultEffect, FaultWhen, ModuleFault};

/// TDH.VP.ENTER: a vCPU runs.
pub const VP_ENTER: u16 = 0;
/// TDH.MEM.SEPT.ADD: a table of the S-EPT.
pub const SEPT_ADD: u16 = 3;
/// TDH.MEM.PAGE.AUG: a page is mapped.
pub const AUG: u16 = 6;
/// TDH.MEM.RANGE.BLOCK: no new translation of the page.
pub const BLOCK: u16 = 7;
/// TDH.MNG.CREATE: a TD gets its root page.
pub const MNG_CREATE: u16 = 9;
/// TDH.MEM.PAGE.DEMOTE: a huge mapping is split.
pub const DEMOTE: u16 = 15;
/// TDH.PHYMEM.PAGE.RECLAIM: a page of a TD that is taken down becomes the host's.
pub const RECLAIM: u16 = 28;
/// TDH.MEM.PAGE.REMOVE: a page becomes the host's.
pub const REMOVE: u16 = 29;
/// TDH.MEM.TRACK: a new TLB epoch.
pub const TRACK: u16 = 38;
/// TDH.PHYMEM.PAGE.WBINVD: cache lines with the TD's key are written back.
pub const WBINVD: u16 = 41;

/// TDX_OPERAND_BUSY, RCX: the only status that KVM takes for busy.
pub const BUSY: u64 = 0x8000_0200_0000_0001;
/// TDX_OPERAND_BUSY, TD_EPOCH: what TDH.VP.ENTER answers while TDH.MEM.TRACK is at work.
pub const EPOCH_OPERAND_BUSY: u64 = 0x8000_0200_0000_00A9;
/// TDX_PREVIOUS_TLB_EPOCH_BUSY: a vCPU still runs in the epoch before. Not busy in KVM's eyes.
pub const EPOCH_BUSY: u64 = 0x8000_0201_0000_0000;
/// TDX_PAGE_METADATA_INCORRECT, R8: the page is not the host's to give.
pub const METADATA_INCORRECT: u64 = 0xC000_0300_0000_0008;
/// TDX_OPERAND_INVALID, RCX.
pub const INVALID: u64 = 0xC000_0100_0000_0001;
/// TDX_EPT_WALK_FAILED, RCX.
pub const WALK_FAILED: u64 = 0xC000_0B00_0000_0001;
/// TDX_GPA_RANGE_ALREADY_BLOCKED, RCX: of the class of successes, and not zero.
pub const ALREADY_BLOCKED: u64 = 0x0000_0B07_0000_0001;
/// TDX_TLB_TRACKING_NOT_DONE, RCX.
pub const TRACKING_NOT_DONE: u64 = 0xC000_0B08_0000_0001;

/// How a SEAMCALL fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Failure {
    /// Once, with nothing done.
    Once,
    /// The call, and its repetition.
    Twice,
    /// As often as it is made.
    Always,
    /// Once, although it did its work.
    AfterItsWork,
}

/// A failing SEAMCALL of an unmap.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SeamcallFault {
    /// The leaf.
    pub leaf: u16,
    /// What it returns.
    pub status: u64,
    /// How it fails.
    pub failure: Failure,
}

/// One mapping among those that are unmapped one after the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Mapping {
    /// Guest-physical address.
    pub gpa: u64,
    /// Level: 0 for 4 KiB, 1 for 2 MiB.
    pub level: u8,
    /// How many are unmapped before it.
    pub before: u64,
}

impl SeamcallFault {
    /// A fault.
    pub const fn new(leaf: u16, status: u64, failure: Failure) -> SeamcallFault {
        SeamcallFault { leaf, status, failure }
    }

    /// What to plan in the module so that the unmap of a mapping meets the fault. The leaves without a guest-physical
    /// operand are counted: one TRACK a mapping, one WBINVD a base page.
    pub fn plan(&self, mapping: Mapping) -> Vec<ModuleFault> {
        let Mapping { gpa, level, before } = mapping;
        let fault = ModuleFault::always(self.leaf, self.status);
        let counted = match self.leaf {
            TRACK => Some(before + 1),
            WBINVD => Some((before << (9 * level)) + 1),
            _ => None,
        };
        let effect = match self.failure {
            Failure::AfterItsWork => FaultEffect::After,
            _ => FaultEffect::InsteadOf,
        };
        let (first, fault) = match counted {
            Some(n) => (FaultWhen::Nth(n), fault),
            None => (FaultWhen::Nth(1), ModuleFault { level: Some(level), ..fault.at(gpa) }),
        };
        let fault = ModuleFault { effect, ..fault };
        match (self.failure, counted) {
            (Failure::Once | Failure::AfterItsWork, _) => vec![fault.when(first)],
            // A call that one fault strikes is not counted by the next.
            (Failure::Twice, _) => vec![fault.when(first); 2],
            (Failure::Always, Some(n)) => vec![fault.when(FaultWhen::From(n))],
            (Failure::Always, None) => vec![fault],
        }
    }
}
