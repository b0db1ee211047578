//! The TDX sub-commands of KVM_MEMORY_ENCRYPT_OP, on a VM and on a vCPU: arguments as user space lays them out, right or
//! wrong, and the whole of the answer.

use super::Errno;
use crate::uapi::kvm_x86::{KvmCpuid2Head, KvmTdxCapabilities, KvmTdxInitMemRegion, KvmTdxInitVm};
use crate::uapi::tdx_status::TdxStatus;
use std::fmt;

pub use crate::uapi::bindings::kvm_cpuid_entry2 as CpuidEntry;

/// The sub-command structure, `struct kvm_tdx_cmd`, with what `data` points to.
#[derive(Debug)]
pub struct TdxCommand<'a> {
    /// KVM_TDX_*.
    pub id: u32,
    /// Its flags.
    pub flags: u32,
    /// `data`.
    pub data: TdxData<'a>,
    /// Must be 0 on input.
    pub hw_error: u64,
}

impl<'a> TdxCommand<'a> {
    /// A sub-command with no flags.
    pub fn new(id: u32, data: TdxData<'a>) -> TdxCommand<'a> {
        TdxCommand { id, flags: 0, data, hw_error: 0 }
    }

    /// The same with flags.
    pub fn with_flags(self, flags: u32) -> TdxCommand<'a> {
        TdxCommand { flags, ..self }
    }

    /// The same with a `hw_error` that user space should have left 0.
    pub fn with_hw_error(self, hw_error: u64) -> TdxCommand<'a> {
        TdxCommand { hw_error, ..self }
    }
}

/// `data` of a sub-command.
#[derive(Debug)]
pub enum TdxData<'a> {
    /// This number: the initial RCX of KVM_TDX_INIT_VCPU, or an address of which nothing may be known.
    Value(u64),
    /// The address of this structure, which the answer is written to.
    Capabilities(&'a mut TdxCapabilities),
    /// The address of this structure.
    InitVm(&'a TdxInitVm),
    /// The address of this structure, in which the kernel reports progress.
    Region(&'a mut KvmTdxInitMemRegion),
    /// The address of this list, which the answer is written to.
    Cpuid(&'a mut TdxCpuid),
}

impl TdxData<'_> {
    /// An address at which nothing is mapped, on any machine.
    pub const NOWHERE: TdxData<'static> = TdxData::Value(8);
}

/// `struct kvm_cpuid2`.
#[derive(Clone, Debug, Default)]
pub struct TdxCpuid {
    /// `nent` says how many entries there are, or how many there is room for; it need not be true.
    pub head: KvmCpuid2Head,
    /// The entries.
    pub entries: Vec<CpuidEntry>,
}

impl TdxCpuid {
    /// An empty list with room for `nent` entries.
    pub fn with_room(nent: u32) -> TdxCpuid {
        TdxCpuid { head: KvmCpuid2Head { nent, padding: 0 }, entries: Vec::new() }
    }
}

/// `struct kvm_tdx_capabilities`.
#[derive(Clone, Debug)]
pub struct TdxCapabilities {
    /// Everything before the entries; in `cpuid.nent` the caller says how many there is room for.
    pub fixed: KvmTdxCapabilities,
    /// The CPUID bits that may be configured: one entry a leaf.
    pub entries: Vec<CpuidEntry>,
}

impl TdxCapabilities {
    /// With room for `nent` entries.
    pub fn with_room(nent: u32) -> TdxCapabilities {
        let fixed = KvmTdxCapabilities {
            supported_attrs: 0,
            supported_xfam: 0,
            kernel_tdvmcallinfo_1_r11: 0,
            user_tdvmcallinfo_1_r11: 0,
            kernel_tdvmcallinfo_1_r12: 0,
            user_tdvmcallinfo_1_r12: 0,
            reserved: [0; 250],
            cpuid: KvmCpuid2Head { nent, padding: 0 },
        };
        TdxCapabilities { fixed, entries: Vec::new() }
    }
}

/// `struct kvm_tdx_init_vm`.
#[derive(Clone, Debug, Default)]
pub struct TdxInitVm {
    /// Everything before the entries. `cpuid.nent` is what the kernel is told, true or not.
    pub fixed: KvmTdxInitVm,
    /// The CPUID configuration.
    pub entries: Vec<CpuidEntry>,
}

impl TdxInitVm {
    /// With these entries, all of them counted.
    pub fn new(attributes: u64, xfam: u64, entries: Vec<CpuidEntry>) -> TdxInitVm {
        let cpuid = KvmCpuid2Head { nent: entries.len() as u32, padding: 0 };
        TdxInitVm { fixed: KvmTdxInitVm { attributes, xfam, cpuid, ..Default::default() }, entries }
    }
}

/// What a sub-command returned.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct TdxAnswer {
    /// The result of the call.
    pub result: Result<(), Errno>,
    /// `hw_error` after it, which the kernel writes on some paths of the VM's sub-commands only.
    pub hw_error: TdxStatus,
}

impl TdxAnswer {
    /// Success without a status.
    pub const OK: TdxAnswer = TdxAnswer { result: Ok(()), hw_error: TdxStatus(0) };

    /// An errno without a status.
    pub const fn failed(errno: Errno) -> TdxAnswer {
        TdxAnswer { result: Err(errno), hw_error: TdxStatus(0) }
    }
}

impl fmt::Debug for TdxAnswer {
    /// `Err(EIO), hw_error 0xc000010000000041 (TDX_OPERAND_INVALID, XFAM)`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.result)?;
        if self.hw_error.0 == 0 { Ok(()) } else { write!(f, ", hw_error {}", self.hw_error) }
    }
}

/// A VM's side of TDX. Every VM of the running kernel has it, whatever its type: the call is there to be refused.
pub trait TdxVm: Send + Sync {
    /// KVM_MEMORY_ENCRYPT_OP.
    fn command(&self, command: TdxCommand<'_>) -> TdxAnswer;

    /// KVM_MEMORY_ENCRYPT_OP with an argument that cannot be read.
    fn unreadable_command(&self) -> Result<(), Errno>;
}

/// A vCPU's side of TDX.
pub trait TdxVcpu {
    /// KVM_MEMORY_ENCRYPT_OP.
    fn command(&mut self, command: TdxCommand<'_>) -> TdxAnswer;

    /// KVM_MEMORY_ENCRYPT_OP with an argument that cannot be read.
    fn unreadable_command(&mut self) -> Result<(), Errno>;

    /// KVM_SET_CPUID2.
    fn set_cpuid(&mut self, entries: &[CpuidEntry]) -> Result<(), Errno>;
}
