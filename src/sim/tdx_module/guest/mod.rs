//! The guest's side: what a vCPU does while a logical processor runs it (TDX module spec 9).
//!
//! After VP.ENTER answered [`super::Outcome::Entered`], the processor belongs to the guest. Each method here executes one instruction of
//! it; [`GuestOutcome::Exit`] gives the processor back to the host, with the registers VP.ENTER returns.

mod accept;
mod access;
mod attr;
mod exit;
mod nmi;
mod shared;
mod tdcall;

use std::fmt;

use super::regs::Regs;
use super::status::Status;
use super::vcpu::VeInfo;

/// VMX exit reasons the model produces.
pub mod exit_reason {
    /// Exception or NMI.
    pub const EXCEPTION: u32 = 0;
    /// External interrupt.
    pub const EXTERNAL_INTERRUPT: u32 = 1;
    /// Triple fault.
    pub const TRIPLE_FAULT: u32 = 2;
    /// An SMI other than an I/O SMI: the host has handled it by the time it has control.
    pub const OTHER_SMI: u32 = 6;
    /// HLT.
    pub const HLT: u32 = 12;
    /// EPT violation.
    pub const EPT_VIOLATION: u32 = 48;
    /// EPT misconfiguration.
    pub const EPT_MISCONFIG: u32 = 49;
    /// TDCALL.
    pub const TDCALL: u32 = 77;
}

/// Kind of a memory access; its value is the exit-qualification bit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Data read.
    Read = 1,
    /// Data write.
    Write = 2,
    /// Instruction fetch.
    Fetch = 4,
}

/// Control is back with the host: what VP.ENTER returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TdExit {
    /// RAX.
    pub status: Status,
    /// All registers as VP.ENTER left them, RAX among them.
    pub regs: Regs,
}

impl TdExit {
    /// Bits 31:0 of the status.
    pub fn reason(&self) -> u32 {
        self.status.details()
    }

    /// Exit qualification, without the VM number.
    pub fn qualification(&self) -> u32 {
        self.regs.rcx as u32
    }

    /// Type of the extended exit qualification.
    pub fn extended_type(&self) -> u8 {
        (self.regs.rdx & 0xF) as u8
    }
}

/// An exception delivered inside the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestException {
    /// #VE, its information to be read with TDG.VP.VEINFO.GET.
    Ve(VeInfo),
    /// #DF: a #VE while the information of the last one is unread.
    DoubleFault,
    /// #PF with the reserved-bit error code: address bits between SHARED and bit 51 are set.
    ReservedPageFault,
}

impl fmt::Display for GuestException {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            GuestException::Ve(info) => write!(f, "#VE exit reason {} gpa {:#x}", info.exit_reason, info.gpa),
            GuestException::DoubleFault => f.write_str("#DF"),
            GuestException::ReservedPageFault => f.write_str("#PF(RSVD)"),
        }
    }
}

/// What one guest instruction came to.
#[expect(
    clippy::large_enum_variant,
    reason = "an outcome lives for one instruction; a box would only cost an allocation an exit"
)]
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GuestOutcome {
    /// Done; a read's value.
    Value(u64),
    /// Done; nothing to show.
    Done,
    /// A TDCALL that came back to the guest with this status in its RAX.
    Tdcall(Status),
    /// An exception in the guest; the instruction is not over.
    Exception(GuestException),
    /// A TD exit: the host has the processor again.
    Exit(TdExit),
    /// The TDCALL is held half-way.
    Held,
}
