//! The simulated TDX module: SEAMCALLs in, completion status out.
//!
//! An executable model of the module's memory management, precise to the status code, the operand id, the registers and the order of the
//! checks. It knows nothing of KVM and imports nothing of the project.
//!
//! The parts, from the bottom up:
//! * [`memory`]: physical memory, who wrote each line, caches and encryption;
//! * [`pamt`], [`kot`], [`td`], [`vcpu`], [`lp`], [`sept`]: the state;
//! * [`lock`]: try-locks, whose conflicts are BUSY statuses;
//! * `dispatch`, `check`, `leaves`, `enter`: the SEAMCALL leaves;
//! * [`guest`]: what a vCPU does between VP.ENTER and the TD exit;
//! * [`fault`], [`trace`], [`invariants`]: faults on plan, a record of calls, and what must always hold;
//! * [`fixture`]: a module brought up and TDs built, by SEAMCALLs, for tests and benchmarks.
//!
//! A [`Module`] is one value without globals. It is `Send`; behind a mutex it serves any number of threads. Concurrency between logical
//! processors is explicit: a processor runs a guest from [`Outcome::Entered`] to its [`guest::TdExit`], and a leaf can be held half-way
//! ([`Module::hold_next`], [`HoldPoint`]) with its locks, while other processors call.
//!
//! ```
//! use gmemtest::sim::tdx_module::{Leaf, LpId, Outcome, Status, fixture::Fixture};
//!
//! let mut f = Fixture::s2();
//! let page = f.page();
//! let (outcome, _) = f.call(Leaf::MemPageAug, &[("rcx", 0), ("rdx", f.tdr), ("r8", page)]);
//! assert_eq!(outcome, Outcome::Done(Status::SUCCESS));
//! let (outcome, _) = f.call(Leaf::MemPageAug, &[("rcx", 0), ("rdx", f.tdr), ("r8", page)]);
//! assert_eq!(outcome.status().unwrap().to_string(), "TDX_EPT_ENTRY_STATE_INCORRECT | RCX");
//! assert!(f.module.check().is_empty());
//! # let _ = LpId(0);
//! ```
//!
//! Out of scope: L2 partitions, migration, service TDs, TDX-IO. Their leaves, and the few others that are not modelled, answer as an
//! unknown leaf does; [`leaf::SEAMCALL_LEAVES`] and [`leaf::TDCALL_LEAVES`] list every number with its standing.

mod call;
mod check;
mod dispatch;
pub mod fault;
mod fingerprint;
pub mod fixture;
mod forget;
pub mod guest;
pub mod invariants;
pub mod kot;
pub mod leaf;
mod leaves;
pub mod lock;
pub mod lp;
pub mod memory;
mod module;
mod operand;
pub mod pamt;
mod platform;
mod regs;
pub mod sept;
mod state;
mod status;
mod switches;
pub mod td;
#[cfg(test)]
mod tests;
pub mod trace;
pub mod vcpu;

pub use call::{AnyLeaf, LpError, Outcome};
pub use dispatch::Released;
pub use invariants::Violation;
pub use leaf::{Leaf, TdcallLeaf};
pub use lp::{Disorder, HoldPoint, Interrupt, LpId};
pub use memory::PhysicalMemory;
pub use module::Module;
pub use operand::Operand;
pub use platform::{MAX_PA, Platform};
pub use regs::{Reg, Regs};
pub use state::{HkidState, Lifecycle, OpState, SysState, VcpuState};
pub use status::{Code, DetailKind, ParseStatusError, Status};
pub use switches::{Generation, Integrity, Switches};
