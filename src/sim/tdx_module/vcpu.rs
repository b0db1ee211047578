//! A virtual processor: TDVPS fields and the guest's registers (TDX module spec 1.4, 10.1).

use std::collections::BTreeMap;

use super::lp::LpId;
use super::regs::Regs;
use super::state::VcpuState;

/// Pages of a TDVPS: the TDVPR and five TDCX.
pub const TDVPS_PAGES: usize = 6;
/// Pages a TDVPS can have.
pub const MAX_TDVPS_PAGES: usize = 15;
/// GPAs the zero-step list holds.
pub const EPF_LIST_SIZE: usize = 32;
/// EPT violations at one RIP before the list fills.
pub const EPF_THRESHOLD: u32 = 6;

/// How the vCPU left the guest last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum LastExit {
    /// Not entered yet.
    #[default]
    None,
    /// Asynchronous, the instruction is repeated.
    AsyncFault,
    /// Asynchronous, the instruction is over.
    AsyncTrap,
    /// TDG.VP.VMCALL.
    Tdvmcall,
}

/// What TDG.VP.VEINFO.GET returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct VeInfo {
    /// Not read yet.
    pub valid: bool,
    /// VMX exit reason.
    pub exit_reason: u32,
    /// Exit qualification.
    pub qualification: u64,
    /// Guest linear address.
    pub gla: u64,
    /// Guest physical address.
    pub gpa: u64,
    /// Instruction length.
    pub instruction_length: u32,
    /// Instruction information.
    pub instruction_info: u32,
}

/// A segment register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Selector.
    pub selector: u16,
    /// Base address.
    pub base: u64,
    /// Limit in bytes.
    pub limit: u32,
    /// VMX access rights.
    pub access: u32,
}

/// Architectural state beyond the general-purpose registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct ArchState {
    pub cr0: u64,
    pub cr2: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub efer: u64,
    pub rflags: u64,
    pub dr6: u64,
    pub dr7: u64,
    pub xcr0: u64,
    pub pat: u64,
    pub fmask: u64,
    pub cs: Segment,
    /// DS, ES, FS, GS and SS.
    pub data: Segment,
    pub ldtr: Segment,
    pub tr: Segment,
    pub gdtr: Segment,
    pub idtr: Segment,
}

impl ArchState {
    /// The state VP.INIT leaves.
    pub const INITIAL: ArchState = ArchState {
        cr0: 0x21,
        cr2: 0,
        cr3: 0,
        cr4: 0x2040,
        efer: 0x901,
        rflags: 2,
        dr6: 0xFFFF_0FF0,
        dr7: 0x400,
        xcr0: 1,
        pat: 0x0007_0406_0007_0406,
        fmask: 0x20200,
        cs: Segment { selector: 0, base: 0, limit: 0xFFFF_FFFF, access: 0xC09B },
        data: Segment { selector: 0, base: 0, limit: 0xFFFF_FFFF, access: 0xC093 },
        ldtr: Segment { selector: 0, base: 0, limit: 0xFFFF, access: 0x10082 },
        tr: Segment { selector: 0, base: 0, limit: 0xFFFF, access: 0x8B },
        gdtr: Segment { selector: 0, base: 0, limit: 0xFFFF, access: 0 },
        idtr: Segment { selector: 0, base: 0, limit: 0, access: 0 },
    };
}

/// RIP at the reset vector.
pub const RESET_RIP: u64 = 0xFFFF_FFF0;

/// A virtual processor.
#[derive(Clone)]
pub struct Vcpu {
    /// Physical address of the TDVPR page.
    pub tdvpr_pa: u64,
    /// Physical address of the TD's TDR page.
    pub tdr_pa: u64,
    /// State.
    pub state: VcpuState,
    /// TDVPS pages added after the TDVPR.
    pub tdcx_pa: Vec<u64>,
    /// TD_EPOCH at the last entry.
    pub epoch: u64,
    /// The logical processor that holds its VMCS.
    pub assoc: Option<LpId>,
    /// How it left the guest.
    pub last_exit: LastExit,
    /// Position in VP.INIT order.
    pub index: u32,
    /// x2APIC id given to VP.INIT version 1.
    pub x2apic_id: Option<u32>,
    /// #VE information.
    pub ve_info: VeInfo,
    /// Guest general-purpose registers.
    pub gpr: Regs,
    /// Guest instruction pointer; the model advances it by one an instruction.
    pub rip: u64,
    /// The rest of the initial state.
    pub arch: ArchState,
    /// Guest registers the last TDVMCALL shared with the host.
    pub vmcall_mask: u64,
    /// Zero-step list.
    pub epf_list: Vec<u64>,
    /// EPT violations at one RIP so far.
    pub epf_count: u32,
    /// RIP at the last TD entry.
    pub entry_rip: u64,
    /// TSC at the last exit, in nanoseconds of the module's clock.
    pub last_exit_tsc: u64,
    /// When host priority first turned a TDCALL away.
    pub hp_busy_since: Option<u64>,
    /// VMCS and management fields written by VP.WR.
    pub fields: BTreeMap<u64, u64>,
}

impl Vcpu {
    pub(crate) fn new(tdvpr_pa: u64, tdr_pa: u64) -> Vcpu {
        Vcpu {
            tdvpr_pa,
            tdr_pa,
            state: VcpuState::Uninitialized,
            tdcx_pa: Vec::new(),
            epoch: 0,
            assoc: None,
            last_exit: LastExit::None,
            index: 0,
            x2apic_id: None,
            ve_info: VeInfo::default(),
            gpr: Regs::default(),
            rip: RESET_RIP,
            arch: ArchState::INITIAL,
            vmcall_mask: 0,
            epf_list: Vec::new(),
            epf_count: 0,
            entry_rip: RESET_RIP,
            last_exit_tsc: 0,
            hp_busy_since: None,
            fields: BTreeMap::new(),
        }
    }

    /// Pages of the TDVPS, the TDVPR among them.
    pub fn pages(&self) -> usize {
        1 + self.tdcx_pa.len()
    }
}
