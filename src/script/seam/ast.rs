//! A parsed script.

use super::expect::Expectation;
use super::expr::Expr;
use crate::sim::tdx_module::fault::Preset;
use crate::sim::tdx_module::{AnyLeaf, Reg};

/// A script: statements in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Script {
    /// The file as named by the caller.
    pub file: String,
    /// Its statements.
    pub statements: Vec<Statement>,
}

/// A statement and where it stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Statement {
    /// Line, counted from 1.
    pub line: usize,
    /// As written, without comment.
    pub text: String,
    /// What it does.
    pub action: Action,
    /// What stands after `->`.
    pub expectation: Option<Expectation>,
}

/// What a statement does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// `test T62`: a fresh machine, and a name for mismatches.
    Test(String),
    /// `setup S2 vcpus=2`: a fresh machine brought to a known state.
    Setup(Setup),
    /// `page p n`: a free page for each name.
    Page(Vec<String>, PageKind),
    /// `td B setup=S2`: a further TD, brought as far as the given fixture or as the setup's own.
    Td(String, Option<Fixture>),
    /// `vcpu W td=B`: a further vCPU.
    Vcpu(String, Option<Expr>),
    /// `let n = 4K`.
    Let(String, Expr),
    /// `call LEAF reg=value`.
    Call(Call),
    /// `hold LEAF by=lp1 at=POINT reg=value`: a call that stops half-way.
    Hold(Call, HoldPoint),
    /// `hold LEAF by=lp1 at=POINT`: the next call of the leaf stops half-way.
    HoldNext(u16, Option<Lp>, HoldPoint),
    /// `hold V accept gpa=0`: a guest's call that stops half-way.
    HoldGuest(Guest, HoldPoint),
    /// `release lp1`: a held call goes on to its end.
    Release(Option<Lp>),
    /// `guest V OPERATION`.
    Guest(Guest),
    /// `enter V`.
    Enter(Expr, Option<Lp>),
    /// `exit V REASON`.
    Exit(Expr, ExitCause),
    /// `interrupt on lp=lp1`.
    Interrupt(Interrupt),
    /// `lock OBJECT exclusive by=lp1`.
    Lock(Lock),
    /// `unlock OBJECT by=lp1`.
    Unlock(Lock),
    /// `fault PLAN`.
    Fault(Fault),
    /// `fault off`: all plans are forgotten.
    FaultOff,
    /// `switch NAME on`.
    Switch(String, Position),
    /// `expect-invariants`.
    ExpectInvariants,
    /// `invariants off`: not checked after every statement until `invariants on`.
    Invariants(Position),
    /// `rdmd`, `sept` and `look`.
    Look(Look),
    /// `host write PAGE partial`.
    Host(HostAccess),
    /// `advance 1s`: time passes, in nanoseconds.
    Advance(u64),
    /// `repeat 512 i STATEMENT`: the rest of the line, again and again.
    Repeat(Expr, Option<String>, Vec<Statement>),
}

/// On or off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Position {
    On,
    Off,
}

/// A logical processor by number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Lp(pub u32);

/// How far a machine or a TD is brought before the script takes over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fixture {
    /// Power on: no leaf called.
    None,
    /// SYS_READY, TDMRs initialised, no TD.
    Ready,
    /// MNG.CREATE done.
    Created,
    /// KEY.CONFIG done on every package.
    Keyed,
    /// All TDCS pages added.
    Tdcs,
    /// INITIALIZED, GPAW 0, 4 levels, empty root.
    S1,
    /// S1, tables for gpa 0, one READY vCPU.
    Built,
    /// The same, finalised.
    S2,
}

/// A fixture and its options.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Setup {
    /// How far to go.
    pub fixture: Fixture,
    /// `name=value` options: `packages`, `lps`, `vcpus`, `gpaw`, `attributes`, `max_vcpus`.
    pub options: Vec<(String, Expr)>,
    /// Switches named as options, `dpamt=on`.
    pub switches: Vec<(String, Position)>,
}

/// What kind of page a name is given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageKind {
    /// 4 KiB, free, in a TDMR.
    Free,
    /// 2 MiB, 2M-aligned, free, in a TDMR.
    Range2M,
    /// 1 GiB, 1G-aligned, free, in a TDMR.
    Range1G,
    /// 4 KiB of the host's, outside every TDMR.
    Shared,
}

/// A SEAMCALL.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Call {
    /// Leaf number, RAX bits 15:0.
    pub leaf: u16,
    /// RAX bits 23:16.
    pub version: Option<Expr>,
    /// The whole of RAX, instead of leaf and version.
    pub rax: Option<Expr>,
    /// Input registers.
    pub regs: Vec<(Reg, Expr)>,
    /// Where it is called.
    pub lp: Option<Lp>,
}

/// Where a held call stops: a name the module knows.
pub type HoldPoint = Option<String>;

/// An operation of a guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Guest {
    /// The vCPU: its TDVPR page.
    pub vcpu: Expr,
    /// What it does.
    pub operation: GuestOperation,
}

/// What a guest does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GuestOperation {
    /// Touches memory.
    Access {
        /// How.
        kind: AccessKind,
        /// Guest physical address.
        gpa: Expr,
        /// What is written.
        value: Option<Expr>,
    },
    /// Executes TDCALL.
    Tdcall {
        /// Leaf number.
        leaf: u16,
        /// The whole of RAX instead.
        rax: Option<Expr>,
        /// Input registers.
        regs: Vec<(Reg, Expr)>,
    },
    /// Executes instructions that touch nothing, so that RIP moves.
    Step,
}

/// How memory is touched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum AccessKind {
    /// A read whose value does not matter.
    Touch,
    Read,
    Write,
    Fetch,
}

/// Why a vCPU leaves the guest on a word of the script.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExitCause {
    /// External interrupt, exit reason 1.
    Interrupt,
    /// Triple fault, exit reason 2.
    TripleFault,
    /// Machine check.
    MachineCheck,
    /// HLT, exit reason 12.
    Hlt,
    /// Another VMX exit reason.
    Other(u32),
}

/// A host interrupt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interrupt {
    /// Pending or not.
    pub position: Position,
    /// At which processor; every one if not said.
    pub lp: Option<Lp>,
    /// Pending only after this many points at which it is looked for.
    pub after: Option<Expr>,
}

/// A lock a script takes in the name of a processor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lock {
    /// Which.
    pub object: LockObject,
    /// How.
    pub mode: LockMode,
    /// Whose, the first TD if not said.
    pub td: Option<Expr>,
    /// In whose name.
    pub lp: Lp,
    /// Taken as a guest takes it, or as a host does.
    pub side: Side,
}

/// What can be locked.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum LockObject {
    SeptTree,
    SeptEntry { gpa: Expr, level: Expr },
    TdEpoch,
    OpState,
    Kot,
    Ket,
    Wbcache,
    Sys,
    Pamt { page: Expr, level: Expr },
}

/// Shared or exclusive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum LockMode {
    Shared,
    Exclusive,
}

/// Who takes a lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Side {
    Host,
    Guest,
}

/// A plan of faults.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Fault {
    /// A named preset to start from.
    pub preset: Option<Preset>,
    /// The leaf it meets.
    pub leaf: Option<AnyLeaf>,
    /// The n-th matching call, counted from 1.
    pub nth: Option<Expr>,
    /// Every call.
    pub every: bool,
    /// How often at most.
    pub times: Option<Expr>,
    /// With this probability in percent.
    pub percent: Option<u8>,
    /// Seed of the probability.
    pub seed: Option<Expr>,
    /// Only for this guest physical address.
    pub gpa: Option<Expr>,
    /// Only for this level.
    pub level: Option<Expr>,
    /// Only for this TD.
    pub td: Option<Expr>,
    /// Only for this physical page.
    pub page: Option<Expr>,
    /// The status returned.
    pub status: Option<Expr>,
    /// Instead of the effect, or after it.
    pub when: FaultMoment,
}

/// When a fault strikes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum FaultMoment {
    /// Nothing is done.
    #[default]
    InsteadOfEffect,
    /// All is done, and the status is returned nevertheless.
    AfterEffect,
}

/// What to look at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Look {
    /// `rdmd PAGE`: PAMT entry, through PHYMEM.PAGE.RDMD.
    Rdmd(Expr, Option<Expr>),
    /// `sept gpa=0 level=0 td=tdr`: Secure EPT entry.
    Sept {
        /// Guest physical address.
        gpa: Expr,
        /// Level, 0 for 4K.
        level: Expr,
        /// TD, the first if not said.
        td: Option<Expr>,
    },
    /// `look td B`.
    Td(Option<Expr>),
    /// `look vcpu V`.
    Vcpu(Expr),
    /// `look hkid 1`.
    Hkid(Expr),
    /// `look sys`.
    Sys,
    /// `look line PAGE offset=64`: who wrote the line last.
    Line(Expr),
}

/// The host's hand in memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostAccess {
    /// What it does.
    pub kind: HostAccessKind,
    /// Physical address.
    pub pa: Expr,
    /// What is written.
    pub value: Option<Expr>,
}

/// What the host does to memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HostAccessKind {
    /// Reads 8 bytes.
    Read,
    /// Stores 8 bytes: a partial write of the line.
    WritePartial,
    /// Stores the whole 64-byte line, as MOVDIR64B does.
    WriteLine,
    /// Stores every line of the 4 KiB page, as MOVDIR64B in a loop does.
    WritePage,
    /// Stores byte i = i mod 256 over the page.
    Pattern,
    /// Writes the page's host-dirty lines back, as CLFLUSH does.
    Flush,
    /// Evicts the page's dirty lines, whoever wrote them.
    Evict,
}
