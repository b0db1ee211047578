//! Tests and suites, requirements, isolation, time limits, journal, seeds.
//!
//! A test is a function with a claim for a name ([`Test`]); a [`Suite`] is an explicit table of tests. A test gets a
//! [`Context`] and returns a [`TestResult`]; how it may end early is a [`Stop`].
//!
//! A run is a [`plan::Plan`] that [`runner::run`] carries out. For every claim it starts a process in a group of its own
//! ([`running`]): a fork of itself, or this program again (`/proc/self/exe`); that process opens the machine, checks what the test needs, runs it, and
//! sends its verdict over a pipe ([`child`], [`wire`]). What came of the process, of its descendants and of the kernel
//! meanwhile ([`watch`]) is judged ([`judge`]) and becomes a [`Record`]. Reporters hear of it as [`event::Event`]s.

pub mod blame;
pub mod capture;
pub mod child;
mod claim;
mod context;
pub mod descendants;
pub mod event;
pub mod exit;
mod fork;
mod gmem_vm;
mod guest_writer;
mod in_place;
pub mod interrupt;
pub mod journal;
pub mod judge;
pub mod known;
mod memcg;
pub mod mutation;
mod needs;
mod one_cpu;
pub mod outcome;
pub mod plan;
pub mod private_td;
pub mod runner;
pub mod running;
mod seed;
pub mod select;
pub mod sides;
mod start;
mod stop;
mod td;
pub mod test;
pub mod unmap_failure;
pub mod watch;
pub mod wire;

pub use context::{Context, Notes, by_release};
pub use fork::{ChildEnd, in_child};
pub use gmem_vm::{GmemVm, Side};
pub use guest_writer::{AtFault, GuestWriter};
pub use in_place::{FolioSize, InPlaceVm};
pub use memcg::MemoryGroup;
pub use one_cpu::OneCpu;
pub use outcome::{Outcome, Record, Summary};
pub use seed::{Rng, Seed};
pub use stop::{Failure, Stop, TestResult};
pub use td::{Td, TdMemory, command_on, init_mem_region, set_cpuid};
pub use test::{Body, Sharing, Suite, Test, row_names};
