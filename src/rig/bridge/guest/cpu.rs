//! The instructions of a guest on a logical processor of the module.

use crate::guest::layout;
use crate::sim::tdx_module::guest::{GuestException, GuestOutcome, TdExit};
use crate::sim::tdx_module::{Code, LpError, LpId, Module, Regs, Status, TdcallLeaf};

/// #DF.
const VECTOR_DF: u64 = 8;
/// #PF.
const VECTOR_PF: u64 = 14;
/// #VE.
pub const VECTOR_VE: u64 = 20;
/// NMI.
pub const VECTOR_NMI: u64 = 2;
/// VMX exit reason of an EPT violation.
const EPT_VIOLATION: u64 = 48;
/// Bytes of a page.
const PAGE: u64 = 4096;
/// Error code of #PF: present, by CPL 3, a reserved bit.
const RESERVED_BIT: u64 = 0xd;

/// An exception as the payload's handler sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exception {
    /// Vector.
    pub vector: u64,
    /// Error code, 0 where there is none.
    pub error: u64,
    /// CR2.
    pub cr2: u64,
}

/// Why an instruction is not over.
#[derive(Clone, Debug)]
pub enum Stop {
    /// The host has the processor. The instruction is executed again, or goes on, after the next entry.
    Exit(Box<TdExit>),
    /// An exception.
    Exception(Exception),
    /// The module has no guest on this processor: a defect of this program.
    Lost(LpError),
}

impl From<LpError> for Stop {
    fn from(error: LpError) -> Stop {
        Stop::Lost(error)
    }
}

/// What the payload's handler of #VE comes to.
#[derive(Clone, Debug)]
pub enum Handled {
    /// The access is to be tried again.
    Again,
    /// The access is done by this TDVMCALL.
    Mmio(Box<Regs>),
    /// The exception is reported.
    No,
}

/// A load or a store.
#[derive(Clone, Copy, Debug, Default)]
struct Access {
    gpa: u64,
    size: u64,
    /// The value stored.
    store: Option<u64>,
}

/// What an instruction comes to.
pub type Done<T> = Result<T, Stop>;

/// A processor with a guest on it.
pub struct Cpu<'m> {
    module: &'m mut Module,
    lp: LpId,
    tdvpr: u64,
    shared_bit: u64,
    /// The access under way.
    access: Access,
    /// What the next access finds, which a TDVMCALL has done.
    answer: Option<u64>,
}

/// The bytes `from..from + len` of a word, as a mask.
fn mask(from: u64, len: u64) -> u64 {
    let bits = if len >= 8 { u64::MAX } else { (1 << (8 * len)) - 1 };
    bits << (8 * from)
}

impl<'m> Cpu<'m> {
    /// The processor `lp`, which runs the vCPU `tdvpr`.
    pub fn new(module: &'m mut Module, lp: LpId, tdvpr: u64) -> Cpu<'m> {
        let td = module.vcpu(tdvpr).and_then(|vcpu| module.td(vcpu.tdr_pa));
        let shared_bit = td.map_or(1 << 47, |td| td.gpaw.shared_bit());
        Cpu { module, lp, tdvpr, shared_bit, access: Access::default(), answer: None }
    }

    /// The bit of a guest-physical address that makes it shared.
    pub fn shared_bit(&self) -> u64 {
        self.shared_bit
    }

    /// The vCPU's registers as the last TD entry left them.
    pub fn registers(&self) -> Regs {
        self.module.vcpu(self.tdvpr).map(|vcpu| vcpu.gpr).unwrap_or_default()
    }

    fn value(&mut self, gpa: u64, outcome: GuestOutcome) -> Done<u64> {
        match outcome {
            GuestOutcome::Value(value) => Ok(value),
            GuestOutcome::Done => Ok(0),
            GuestOutcome::Tdcall(status) => Ok(status.0),
            GuestOutcome::Exit(exit) => Err(Stop::Exit(Box::new(exit))),
            GuestOutcome::Held => Err(Stop::Lost(LpError::HoldsLeaf(self.lp))),
            GuestOutcome::Exception(exception) => {
                let (vector, error) = match exception {
                    GuestException::Ve(_) => (VECTOR_VE, 0),
                    GuestException::DoubleFault => (VECTOR_DF, 0),
                    GuestException::ReservedPageFault => (VECTOR_PF, RESERVED_BIT),
                };
                let cr2 = layout::WINDOW + (gpa & (layout::HUGE - 1));
                Err(Stop::Exception(Exception { vector, error, cr2 }))
            }
        }
    }

    fn word(&mut self, gpa: u64) -> Done<u64> {
        let outcome = self.module.guest_read(self.lp, gpa)?;
        self.value(gpa, outcome)
    }

    fn set_word(&mut self, gpa: u64, value: u64, mask: u64) -> Done<()> {
        let outcome = self.module.guest_write_masked(self.lp, gpa, value, mask)?;
        self.value(gpa, outcome).map(drop)
    }

    /// Loads up to 8 bytes.
    pub fn load(&mut self, gpa: u64, size: u64) -> Done<u64> {
        self.access = Access { gpa, size, store: None };
        if let Some(answer) = self.answer.take() {
            return Ok(answer & mask(0, size));
        }
        let (at, from) = (gpa & !7, gpa & 7);
        let low = self.word(at)? >> (8 * from);
        let high = if from + size > 8 { self.word(at + 8)? << (8 * (8 - from)) } else { 0 };
        Ok((low | high) & mask(0, size))
    }

    /// Stores up to 8 bytes.
    pub fn store(&mut self, gpa: u64, size: u64, value: u64) -> Done<()> {
        self.access = Access { gpa, size, store: Some(value) };
        if self.answer.take().is_some() {
            return Ok(());
        }
        let (at, from) = (gpa & !7, gpa & 7);
        let here = size.min(8 - from);
        if size > here {
            // Both pages must be there before either is written.
            self.word(at + 8)?;
        }
        self.set_word(at, value << (8 * from), mask(from, here))?;
        match size - here {
            0 => Ok(()),
            rest => self.set_word(at + 8, value >> (8 * here), mask(0, rest)),
        }
    }

    /// Fetches at an address; nothing is executed.
    pub fn fetch(&mut self, gpa: u64) -> Done<()> {
        let outcome = self.module.guest_fetch(self.lp, gpa)?;
        self.value(gpa, outcome).map(drop)
    }

    /// TDG.MEM.PAGE.ACCEPT; the answer is its status.
    pub fn accept(&mut self, gpa: u64, level: u8) -> Done<u64> {
        let outcome = self.module.guest_accept(self.lp, gpa, level)?;
        self.value(gpa, outcome)
    }

    /// The payload's handler of #VE: it accepts the page that the access needs, or does an access to shared memory that is
    /// not there by TDVMCALL.
    pub fn handle_ve(&mut self) -> Done<Handled> {
        let mut regs = Regs { rax: u64::from(TdcallLeaf::VpVeinfoGet.number()), ..Regs::default() };
        let taken = self.module.tdcall(self.lp, &mut regs)?;
        let known = matches!(taken, GuestOutcome::Tdcall(status) if status.is_zero());
        if !known || regs.rcx != EPT_VIOLATION {
            return Ok(Handled::No);
        }
        if regs.r9 & self.shared_bit != 0 {
            let Access { gpa, size, store } = self.access;
            return Ok(Handled::Mmio(Box::new(Regs {
                rcx: 0xfc00,
                r11: EPT_VIOLATION,
                r12: size,
                r13: u64::from(store.is_some()),
                r14: gpa,
                r15: store.unwrap_or(0),
                ..Regs::default()
            })));
        }
        let accepted = |status: u64| status == 0 || Status(status).is(Code::PageAlreadyAccepted);
        let mut status = self.accept(regs.r9 & !(PAGE - 1), 0)?;
        if Status(status).is(Code::PageSizeMismatch) {
            status = self.accept(regs.r9 & !(layout::HUGE - 1), 1)?;
        }
        // Busy: the access will be a #VE again.
        let again = accepted(status) || Status(status).is(Code::OperandBusy);
        Ok(if again { Handled::Again } else { Handled::No })
    }

    /// The next access, which is the one that was done by TDVMCALL, has this result; R10 is the status of the TDVMCALL.
    pub fn answer_access(&mut self) -> bool {
        let regs = self.registers();
        self.answer = Some(regs.r11);
        regs.r10 == 0
    }

    /// Whether the vCPU takes an NMI now.
    pub fn takes_nmi(&mut self) -> Done<bool> {
        Ok(self.module.guest_takes_nmi(self.lp)?)
    }

    /// TDG.VP.VMCALL; the exit it ends in, or the exception or status where it does not.
    pub fn vmcall(&mut self, regs: Regs) -> Stop {
        let mut regs = regs;
        match self.module.tdcall(self.lp, &mut regs) {
            Ok(GuestOutcome::Exit(exit)) => Stop::Exit(Box::new(exit)),
            Ok(_) => Stop::Exception(Exception { vector: VECTOR_DF, error: 0, cr2: 0 }),
            Err(error) => Stop::Lost(error),
        }
    }

    /// A triple fault: the vCPU is done for.
    pub fn triple_fault(&mut self) -> Stop {
        match self.module.guest_triple_fault(self.lp) {
            Ok(exit) => Stop::Exit(Box::new(exit)),
            Err(error) => Stop::Lost(error),
        }
    }
}
