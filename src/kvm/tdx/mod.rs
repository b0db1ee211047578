//! TDs: the life cycle of a TDX VM, and the payload in one.
//!
//! A TD is built by the sub-commands of KVM_MEMORY_ENCRYPT_OP ([`command`]), with a CPUID that is the common part of what
//! KVM supports and the module lets be configured ([`crate::machine::tdx_cpuid`]). A VM with the payload is built in one go ([`build`]): its
//! vCPUs have to exist before the TD is finalised, and the payload's memory has to be added before that, so that both wait
//! for the test to ask for them.
//!
//! Nothing of a TD's registers can be set from outside. A vCPU that is to give up an operation is made to take an NMI,
//! which the payload reports like any exception before it looks for the next command.

mod build;
mod command;

pub(super) use build::{Pending, build};
pub(super) use command::{issue, issue_unreadable};
