//! `linux/kvm.h`: capabilities, guest_memfd, memory attributes, pre-fault, the TDX exit.
//!
//! Numbers that `kvm-bindings` has are re-exported with the type that the ABI gives them, so that a test reads
//! everything from one place.

use libc::Ioctl;
use std::mem::{offset_of, size_of};

/// The type character of KVM's ioctls.
const KVMIO: u32 = 0xae;

/// `KVM_CHECK_EXTENSION`, on /dev/kvm or a VM.
pub const KVM_CHECK_EXTENSION: Ioctl = libc::_IO(KVMIO, 0x03);
/// `KVM_CREATE_VM`, on /dev/kvm; the argument is the VM type.
pub const KVM_CREATE_VM: Ioctl = libc::_IO(KVMIO, 0x01);
/// `KVM_RUN`, on a vCPU.
pub const KVM_RUN: Ioctl = libc::_IO(KVMIO, 0x80);
/// `KVM_SET_USER_MEMORY_REGION`, on a VM.
pub const KVM_SET_USER_MEMORY_REGION: Ioctl = libc::_IOW::<kvm_bindings::kvm_userspace_memory_region>(KVMIO, 0x46);
/// `KVM_SET_USER_MEMORY_REGION2`, on a VM. 6.8.
pub const KVM_SET_USER_MEMORY_REGION2: Ioctl = libc::_IOW::<kvm_bindings::kvm_userspace_memory_region2>(KVMIO, 0x49);
/// `KVM_MEMORY_ENCRYPT_OP`, on a VM or a vCPU; the argument of a TD is [`super::kvm_x86::KvmTdxCmd`].
pub const KVM_MEMORY_ENCRYPT_OP: Ioctl = libc::_IOWR::<libc::c_ulong>(KVMIO, 0xba);
/// `KVM_GET_STATS_FD`, on a VM or a vCPU. 5.14.
pub const KVM_GET_STATS_FD: Ioctl = libc::_IO(KVMIO, 0xce);
/// `KVM_SET_MEMORY_ATTRIBUTES`, on a VM. 6.8.
pub const KVM_SET_MEMORY_ATTRIBUTES: Ioctl = libc::_IOW::<kvm_bindings::kvm_memory_attributes>(KVMIO, 0xd2);
/// `KVM_SET_MEMORY_ATTRIBUTES2`, on a guest_memfd. Posted ("guest_memfd in-place conversion", v8 of 2026-06-18), not merged in 7.3.
pub const KVM_SET_MEMORY_ATTRIBUTES2: Ioctl = libc::_IOWR::<KvmMemoryAttributes2>(KVMIO, 0xd2);
/// `KVM_CREATE_GUEST_MEMFD`, on a VM. 6.8.
pub const KVM_CREATE_GUEST_MEMFD: Ioctl = libc::_IOWR::<kvm_bindings::kvm_create_guest_memfd>(KVMIO, 0xd4);
/// `KVM_PRE_FAULT_MEMORY`, on a vCPU. 6.11.
pub const KVM_PRE_FAULT_MEMORY: Ioctl = libc::_IOWR::<KvmPreFaultMemory>(KVMIO, 0xd5);

/// `KVM_CAP_NR_MEMSLOTS`.
pub const KVM_CAP_NR_MEMSLOTS: u32 = 10;
/// `KVM_CAP_MAX_VCPUS`.
pub const KVM_CAP_MAX_VCPUS: u32 = 66;
/// `KVM_CAP_READONLY_MEM`.
pub const KVM_CAP_READONLY_MEM: u32 = 81;
/// `KVM_CAP_MULTI_ADDRESS_SPACE`.
pub const KVM_CAP_MULTI_ADDRESS_SPACE: u32 = 118;
/// `KVM_CAP_SPLIT_IRQCHIP`.
pub const KVM_CAP_SPLIT_IRQCHIP: u32 = 121;
/// `KVM_CAP_EXIT_HYPERCALL`: a mask of hypercalls that may exit to user space. 5.14.
pub const KVM_CAP_EXIT_HYPERCALL: u32 = 201;
/// `KVM_CAP_BINARY_STATS_FD`. 5.14.
pub const KVM_CAP_BINARY_STATS_FD: u32 = 203;
/// `KVM_CAP_DISABLE_QUIRKS2`: the mask of quirks that can be disabled. 5.18.
pub const KVM_CAP_DISABLE_QUIRKS2: u32 = 213;
/// `KVM_CAP_USER_MEMORY2`. 6.8.
pub const KVM_CAP_USER_MEMORY2: u32 = 231;
/// `KVM_CAP_MEMORY_FAULT_INFO`. 6.8.
pub const KVM_CAP_MEMORY_FAULT_INFO: u32 = 232;
/// `KVM_CAP_MEMORY_ATTRIBUTES`: the mask of supported attributes. 6.8.
pub const KVM_CAP_MEMORY_ATTRIBUTES: u32 = 233;
/// `KVM_CAP_GUEST_MEMFD`. 6.8.
pub const KVM_CAP_GUEST_MEMFD: u32 = 234;
/// `KVM_CAP_VM_TYPES`: a mask of VM types. 6.8.
pub const KVM_CAP_VM_TYPES: u32 = 235;
/// `KVM_CAP_PRE_FAULT_MEMORY`. 6.11.
pub const KVM_CAP_PRE_FAULT_MEMORY: u32 = 236;
/// `KVM_CAP_GUEST_MEMFD_FLAGS`: the mask of flags that KVM_CREATE_GUEST_MEMFD takes. 6.18.
pub const KVM_CAP_GUEST_MEMFD_FLAGS: u32 = 244;
/// `KVM_CAP_GUEST_MEMFD_MEMORY_ATTRIBUTES` as posted in RFC v5 of the in-place conversion series (2026-04-28). Not stable:
/// other postings used 248 and 250, and in 7.3 the number 249 is `KVM_CAP_S390_HPAGE_2G`. Whether a kernel has the
/// feature is found out by issuing [`KVM_SET_MEMORY_ATTRIBUTES2`] on a guest_memfd: ENOTTY where it does not.
pub const KVM_CAP_GUEST_MEMFD_MEMORY_ATTRIBUTES_RFC_V5: u32 = 249;

/// `KVM_MEM_LOG_DIRTY_PAGES`.
pub const KVM_MEM_LOG_DIRTY_PAGES: u32 = 1 << 0;
/// `KVM_MEM_READONLY`.
pub const KVM_MEM_READONLY: u32 = 1 << 1;
/// `KVM_MEM_GUEST_MEMFD`. 6.8.
pub const KVM_MEM_GUEST_MEMFD: u32 = 1 << 2;

/// `GUEST_MEMFD_FLAG_MMAP`: the file can be mapped, and slots bound to it take every guest access to it. 6.18.
pub const GUEST_MEMFD_FLAG_MMAP: u64 = 1 << 0;
/// `GUEST_MEMFD_FLAG_INIT_SHARED`: every page starts shared, host faults are allowed. 6.18.
pub const GUEST_MEMFD_FLAG_INIT_SHARED: u64 = 1 << 1;

/// `KVM_MEMORY_ATTRIBUTE_PRIVATE`.
pub const KVM_MEMORY_ATTRIBUTE_PRIVATE: u64 = 1 << 3;
/// `KVM_MEMORY_EXIT_FLAG_PRIVATE`, in `flags` of [`KVM_EXIT_MEMORY_FAULT`].
pub const KVM_MEMORY_EXIT_FLAG_PRIVATE: u64 = 1 << 3;

/// `KVM_EXIT_UNKNOWN`.
pub const KVM_EXIT_UNKNOWN: u32 = 0;
/// `KVM_EXIT_IO`.
pub const KVM_EXIT_IO: u32 = 2;
/// `KVM_EXIT_HYPERCALL`.
pub const KVM_EXIT_HYPERCALL: u32 = 3;
/// `KVM_EXIT_HLT`.
pub const KVM_EXIT_HLT: u32 = 5;
/// `KVM_EXIT_MMIO`.
pub const KVM_EXIT_MMIO: u32 = 6;
/// `KVM_EXIT_SHUTDOWN`.
pub const KVM_EXIT_SHUTDOWN: u32 = 8;
/// `KVM_EXIT_FAIL_ENTRY`.
pub const KVM_EXIT_FAIL_ENTRY: u32 = 9;
/// `KVM_EXIT_INTERNAL_ERROR`.
pub const KVM_EXIT_INTERNAL_ERROR: u32 = 17;
/// `KVM_EXIT_SYSTEM_EVENT`.
pub const KVM_EXIT_SYSTEM_EVENT: u32 = 24;
/// `KVM_EXIT_MEMORY_FAULT`. 6.8.
pub const KVM_EXIT_MEMORY_FAULT: u32 = 39;
/// `KVM_EXIT_TDX`. 6.16.
pub const KVM_EXIT_TDX: u32 = 40;

/// `KVM_EXIT_IO_OUT`, in `direction` of [`KVM_EXIT_IO`].
pub const KVM_EXIT_IO_OUT: u8 = 1;
/// `KVM_SYSTEM_EVENT_TDX_FATAL`: a TD reported a fatal error (TDVMCALL ReportFatalError). 6.16.
pub const KVM_SYSTEM_EVENT_TDX_FATAL: u32 = 7;
/// `KVM_INTERNAL_ERROR_EMULATION`.
pub const KVM_INTERNAL_ERROR_EMULATION: u32 = 1;

/// `struct kvm_pre_fault_memory`, read and written by [`KVM_PRE_FAULT_MEMORY`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KvmPreFaultMemory {
    /// In: first page. Out: the first page not yet mapped.
    pub gpa: u64,
    /// In: bytes. Out: bytes left.
    pub size: u64,
    /// Must be 0.
    pub flags: u64,
    /// Not looked at.
    pub padding: [u64; 5],
}

/// `struct kvm_memory_attributes2` as posted: the argument of [`KVM_SET_MEMORY_ATTRIBUTES2`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KvmMemoryAttributes2 {
    /// Byte offset into the guest_memfd (a guest-physical address, were the call on a VM).
    pub offset: u64,
    /// Bytes.
    pub size: u64,
    /// `KVM_MEMORY_ATTRIBUTE_*`.
    pub attributes: u64,
    /// Must be 0.
    pub flags: u64,
    /// Out, with EAGAIN: byte offset of the page whose reference count was not the expected one.
    pub error_offset: u64,
    /// Must be 0.
    pub reserved: [u64; 11],
}

/// The union of [`KVM_EXIT_TDX`] in `struct kvm_run`, with the two words before it.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct KvmRunTdx {
    /// 0 as of 7.3.
    pub flags: u64,
    /// The TDVMCALL leaf.
    pub nr: u64,
    /// What belongs to the leaf.
    pub leaf: KvmRunTdxLeaf,
}

/// The leaves of [`KvmRunTdx`].
#[repr(C)]
#[derive(Clone, Copy)]
pub union KvmRunTdxLeaf {
    /// Any leaf.
    pub unknown: KvmRunTdxUnknown,
    /// `TDVMCALL_GET_QUOTE`.
    pub get_quote: KvmRunTdxGetQuote,
    /// `TDVMCALL_GET_TD_VM_CALL_INFO`.
    pub get_tdvmcall_info: KvmRunTdxGetTdvmcallInfo,
    /// `TDVMCALL_SETUP_EVENT_NOTIFY_INTERRUPT`.
    pub setup_event_notify: KvmRunTdxSetupEventNotify,
}

/// `tdx.unknown` of `struct kvm_run`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct KvmRunTdxUnknown {
    /// In and out: the TDVMCALL status.
    pub ret: u64,
    /// What the leaf defines.
    pub data: [u64; 5],
}

/// `tdx.get_quote` of `struct kvm_run`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct KvmRunTdxGetQuote {
    /// Out: the TDVMCALL status, preset to SUBFUNC_UNSUPPORTED.
    pub ret: u64,
    /// Guest-physical address of the shared buffer.
    pub gpa: u64,
    /// Bytes of the buffer.
    pub size: u64,
}

/// `tdx.get_tdvmcall_info` of `struct kvm_run`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct KvmRunTdxGetTdvmcallInfo {
    /// Out: the TDVMCALL status, preset to SUCCESS.
    pub ret: u64,
    /// The leaf asked about; user space sees 1 only.
    pub leaf: u64,
    /// Out: R11 of the guest.
    pub r11: u64,
    /// Out: R12 of the guest.
    pub r12: u64,
    /// Out: R13 of the guest.
    pub r13: u64,
    /// Out: R14 of the guest.
    pub r14: u64,
}

/// `tdx.setup_event_notify` of `struct kvm_run`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct KvmRunTdxSetupEventNotify {
    /// Out: the TDVMCALL status, preset to SUBFUNC_UNSUPPORTED.
    pub ret: u64,
    /// 32 to 255.
    pub vector: u64,
}

/// Offset of the union of exit data in `struct kvm_run`.
pub const KVM_RUN_EXIT_OFFSET: usize = 32;

const _: () = {
    assert!(KVM_SET_USER_MEMORY_REGION == 0x4020_ae46);
    assert!(KVM_SET_USER_MEMORY_REGION2 == 0x40a0_ae49);
    assert!(KVM_MEMORY_ENCRYPT_OP == 0xc008_aeba);
    assert!(KVM_SET_MEMORY_ATTRIBUTES == 0x4020_aed2);
    assert!(KVM_SET_MEMORY_ATTRIBUTES2 == 0xc080_aed2);
    assert!(KVM_CREATE_GUEST_MEMFD == 0xc040_aed4);
    assert!(KVM_PRE_FAULT_MEMORY == 0xc040_aed5);
    assert!(size_of::<KvmPreFaultMemory>() == 64);
    assert!(size_of::<KvmMemoryAttributes2>() == 128);
    assert!(offset_of!(KvmMemoryAttributes2, error_offset) == 32);
    assert!(size_of::<KvmRunTdx>() == 64);
    assert!(offset_of!(KvmRunTdx, leaf) == 16);
    assert!(offset_of!(kvm_bindings::kvm_run, __bindgen_anon_1) == KVM_RUN_EXIT_OFFSET);
};
