//! `asm/kvm.h` of x86: VM types, quirks and the TDX sub-commands of KVM_MEMORY_ENCRYPT_OP. 6.16 unless said otherwise.

use std::mem::{offset_of, size_of};

/// `KVM_X86_DEFAULT_VM`.
pub const KVM_X86_DEFAULT_VM: u64 = 0;
/// `KVM_X86_SW_PROTECTED_VM`. 6.8.
pub const KVM_X86_SW_PROTECTED_VM: u64 = 1;
/// `KVM_X86_SEV_VM`. 6.10.
pub const KVM_X86_SEV_VM: u64 = 2;
/// `KVM_X86_SEV_ES_VM`. 6.10.
pub const KVM_X86_SEV_ES_VM: u64 = 3;
/// `KVM_X86_SNP_VM`. 6.11.
pub const KVM_X86_SNP_VM: u64 = 4;
/// `KVM_X86_TDX_VM`.
pub const KVM_X86_TDX_VM: u64 = 5;

/// `KVM_X86_QUIRK_SLOT_ZAP_ALL`: deleting a slot zaps everything. 6.12.
pub const KVM_X86_QUIRK_SLOT_ZAP_ALL: u64 = 1 << 7;

/// `KVM_TDX_CAPABILITIES`, VM scope.
pub const KVM_TDX_CAPABILITIES: u32 = 0;
/// `KVM_TDX_INIT_VM`, VM scope.
pub const KVM_TDX_INIT_VM: u32 = 1;
/// `KVM_TDX_INIT_VCPU`, vCPU scope.
pub const KVM_TDX_INIT_VCPU: u32 = 2;
/// `KVM_TDX_INIT_MEM_REGION`, vCPU scope.
pub const KVM_TDX_INIT_MEM_REGION: u32 = 3;
/// `KVM_TDX_FINALIZE_VM`, VM scope.
pub const KVM_TDX_FINALIZE_VM: u32 = 4;
/// `KVM_TDX_GET_CPUID`, vCPU scope.
pub const KVM_TDX_GET_CPUID: u32 = 5;

/// `KVM_TDX_MEASURE_MEMORY_REGION`, in `flags` of a [`KVM_TDX_INIT_MEM_REGION`] command.
pub const KVM_TDX_MEASURE_MEMORY_REGION: u32 = 1 << 0;

/// `struct kvm_tdx_cmd`: the argument of KVM_MEMORY_ENCRYPT_OP.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KvmTdxCmd {
    /// The sub-command.
    pub id: u32,
    /// The sub-command's flags.
    pub flags: u32,
    /// The sub-command's argument, a pointer or an immediate.
    pub data: u64,
    /// Must be 0; the kernel never writes it.
    pub hw_error: u64,
}

/// The head of `struct kvm_cpuid2`; `nent` entries follow it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KvmCpuid2Head {
    /// How many entries follow.
    pub nent: u32,
    /// Padding.
    pub padding: u32,
}

/// `struct kvm_tdx_capabilities` without the entries after `cpuid`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct KvmTdxCapabilities {
    /// TD ATTRIBUTES that KVM and the module support.
    pub supported_attrs: u64,
    /// XFAM bits that KVM and the module support.
    pub supported_xfam: u64,
    /// GetTdVmCallInfo leaf 1, R11: what the kernel handles.
    pub kernel_tdvmcallinfo_1_r11: u64,
    /// GetTdVmCallInfo leaf 1, R11: what user space may handle.
    pub user_tdvmcallinfo_1_r11: u64,
    /// GetTdVmCallInfo leaf 1, R12: what the kernel handles.
    pub kernel_tdvmcallinfo_1_r12: u64,
    /// GetTdVmCallInfo leaf 1, R12: what user space may handle.
    pub user_tdvmcallinfo_1_r12: u64,
    /// Zero.
    pub reserved: [u64; 250],
    /// The CPUID bits that may be configured.
    pub cpuid: KvmCpuid2Head,
}

/// `struct kvm_tdx_init_vm` without the entries after `cpuid`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KvmTdxInitVm {
    /// TD ATTRIBUTES.
    pub attributes: u64,
    /// XFAM.
    pub xfam: u64,
    /// MRCONFIGID.
    pub mrconfigid: [u64; 6],
    /// MROWNER.
    pub mrowner: [u64; 6],
    /// MROWNERCONFIG.
    pub mrownerconfig: [u64; 6],
    /// Must be 0.
    pub reserved: [u64; 12],
    /// The CPUID configuration.
    pub cpuid: KvmCpuid2Head,
}

/// `struct kvm_tdx_init_mem_region`: read and written by [`KVM_TDX_INIT_MEM_REGION`], also where it fails.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KvmTdxInitMemRegion {
    /// Address of the pages to copy in.
    pub source_addr: u64,
    /// Guest-physical address.
    pub gpa: u64,
    /// Pages of 4 KiB.
    pub nr_pages: u64,
}

const _: () = {
    assert!(size_of::<KvmTdxCmd>() == 24);
    assert!(offset_of!(KvmTdxCmd, data) == 8);
    assert!(offset_of!(KvmTdxCmd, hw_error) == 16);
    assert!(size_of::<KvmTdxCapabilities>() == 2056);
    assert!(offset_of!(KvmTdxCapabilities, reserved) == 48);
    assert!(offset_of!(KvmTdxCapabilities, cpuid) == 2048);
    assert!(size_of::<KvmTdxInitVm>() == 264);
    assert!(offset_of!(KvmTdxInitVm, mrowner) == 64);
    assert!(offset_of!(KvmTdxInitVm, reserved) == 160);
    assert!(offset_of!(KvmTdxInitVm, cpuid) == 256);
    assert!(size_of::<KvmTdxInitMemRegion>() == 24);
    assert!(size_of::<KvmCpuid2Head>() == 8);
};
