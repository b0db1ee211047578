//! The TDX module under a machine, where a test can look into it and make its calls fail.
//!
//! In this process it is the simulated module itself; under a kernel that runs on the simulated module it is reached
//! through a channel. On TDX hardware there is no such access, and tests that need it are skipped as
//! `no-hardware-injection`. Leaves, statuses, page types and operands are the numbers of the TDX module's interface.

use super::Errno;

/// Which of the calls that match a fault fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultWhen {
    /// The n-th, from 1.
    Nth(u64),
    /// The first n.
    First(u64),
    /// The n-th, from 1, and every one after it.
    From(u64),
    /// Every n-th: the n-th, the 2n-th and so on.
    Every(u64),
    /// Every one.
    Always,
}

/// Whether a leaf that is made to fail does its work first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultEffect {
    /// It does nothing; the status is all there is.
    InsteadOf,
    /// It runs, and where it succeeds the status is returned in place of success.
    After,
}

/// A fault on plan: which calls of a SEAMCALL leaf return what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ModuleFault {
    /// SEAMCALL leaf number, 29 for TDH.MEM.PAGE.REMOVE.
    pub leaf: u16,
    /// Narrows it to calls whose guest-physical operand lies in this page.
    pub gpa: Option<u64>,
    /// Narrows it to calls at this level: 0 for 4 KiB, 1 for 2 MiB.
    pub level: Option<u8>,
    /// Narrows it to calls that name, give or take this physical page: its address.
    pub page: Option<u64>,
    /// Which of the matching calls.
    pub when: FaultWhen,
    /// With the leaf's effect or without.
    pub effect: FaultEffect,
    /// The completion status that they return.
    pub status: u64,
}

impl ModuleFault {
    /// Every call of `leaf` does nothing and returns `status`.
    pub const fn always(leaf: u16, status: u64) -> ModuleFault {
        let (when, effect) = (FaultWhen::Always, FaultEffect::InsteadOf);
        ModuleFault { leaf, gpa: None, level: None, page: None, when, effect, status }
    }

    /// The same for the calls that `when` says.
    pub const fn when(self, when: FaultWhen) -> ModuleFault {
        ModuleFault { when, ..self }
    }

    /// The same for calls on this guest-physical page only.
    pub const fn at(self, gpa: u64) -> ModuleFault {
        ModuleFault { gpa: Some(gpa), ..self }
    }
}

/// One call that the module answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ModuleCall {
    /// Its position among all calls, from 0.
    pub seq: u64,
    /// The logical processor that made it.
    pub processor: u32,
    /// Leaf number.
    pub leaf: u16,
    /// Whether it is a TDCALL of a guest, not a SEAMCALL of the host.
    pub guest: bool,
    /// RCX, RDX, R8 and R9 as they were given.
    pub operands: [u64; 4],
    /// RAX as it was returned.
    pub status: u64,
}

/// Whose a physical page is: an entry of the PAMT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageOwner {
    /// Page type: 0 PT_NDA (not assigned), 1 PT_RSVD, 3 PT_REG, 4 PT_TDR, 5 PT_TDCX, 6 PT_TDVPR, 8 PT_EPT.
    pub page_type: u8,
    /// Physical address of the owner's TDR; 0 where there is none.
    pub tdr: u64,
    /// Size of the entry: 0 for 4 KiB, 1 for 2 MiB, 2 for 1 GiB.
    pub size: u8,
}

impl PageOwner {
    /// Whether the page is the host's: no TD has it.
    pub fn is_free(&self) -> bool {
        self.page_type == 0
    }
}

/// Access to the TDX module under a machine. Every call fails with ENODEV when the module is gone.
pub trait TdxModule: Send + Sync {
    /// Plans a fault, behind those already planned. The value names it for [`TdxModule::fault_hits`].
    fn add_fault(&self, fault: &ModuleFault) -> Result<u64, Errno>;

    /// How often a planned fault has struck. ENOENT for a name that is not known.
    fn fault_hits(&self, fault: u64) -> Result<u64, Errno>;

    /// Takes back every planned fault.
    fn clear_faults(&self) -> Result<(), Errno>;

    /// How many calls the module has answered since it was loaded: the `seq` of the next one.
    fn position(&self) -> Result<u64, Errno>;

    /// The calls from `seq` on, oldest first. ERANGE when the first of them is no longer kept.
    fn calls_since(&self, seq: u64) -> Result<Vec<ModuleCall>, Errno>;

    /// Whose the page frame is. ENXIO for a frame outside of the memory that the module was given.
    fn page_owner(&self, frame: u64) -> Result<PageOwner, Errno>;

    /// MRTD of the TD with this TDR. ENOENT for a TDR that is none, ENOSYS where the module does not show it.
    fn measurement(&self, _tdr: u64) -> Result<[u8; 48], Errno> {
        Err(Errno::ENOSYS)
    }

    /// What contradicts the module's own invariants, one line each.
    fn violations(&self) -> Result<Vec<String>, Errno>;
}
