//! `linux/kvm_para.h` and `asm/kvm_para.h`: hypercalls of the guest.

/// `KVM_HC_MAP_GPA_RANGE`: the guest asks for a range to be private or shared. 5.14.
pub const KVM_HC_MAP_GPA_RANGE: u64 = 12;

/// `KVM_MAP_GPA_RANGE_PAGE_SZ_4K`.
pub const KVM_MAP_GPA_RANGE_PAGE_SZ_4K: u64 = 0;
/// `KVM_MAP_GPA_RANGE_PAGE_SZ_2M`.
pub const KVM_MAP_GPA_RANGE_PAGE_SZ_2M: u64 = 1 << 0;
/// `KVM_MAP_GPA_RANGE_PAGE_SZ_1G`.
pub const KVM_MAP_GPA_RANGE_PAGE_SZ_1G: u64 = 1 << 1;
/// `KVM_MAP_GPA_RANGE_ENCRYPTED`: to private.
pub const KVM_MAP_GPA_RANGE_ENCRYPTED: u64 = 1 << 4;
/// `KVM_MAP_GPA_RANGE_DECRYPTED`: to shared.
pub const KVM_MAP_GPA_RANGE_DECRYPTED: u64 = 0;

/// `KVM_EPERM`; a hypercall from CPL 3 returns its negative in RAX.
pub const KVM_EPERM: u64 = 1;
/// `KVM_ENOSYS`; a hypercall that user space has not enabled returns its negative in RAX.
pub const KVM_ENOSYS: u64 = 1000;

/// `KVM_EXIT_HYPERCALL_LONG_MODE` of `linux/kvm.h`, in `flags` of the hypercall exit.
pub const KVM_EXIT_HYPERCALL_LONG_MODE: u64 = 1 << 0;
