//! TDVMCALL: leaf numbers and statuses of Intel's Guest-Host Communication Interface, as `asm/shared/tdx.h` has them.

/// `TDVMCALL_GET_TD_VM_CALL_INFO`.
pub const GET_TD_VM_CALL_INFO: u64 = 0x10000;
/// `TDVMCALL_MAP_GPA`.
pub const MAP_GPA: u64 = 0x10001;
/// `TDVMCALL_GET_QUOTE`.
pub const GET_QUOTE: u64 = 0x10002;
/// `TDVMCALL_REPORT_FATAL_ERROR`.
pub const REPORT_FATAL_ERROR: u64 = 0x10003;
/// `TDVMCALL_SETUP_EVENT_NOTIFY_INTERRUPT`.
pub const SETUP_EVENT_NOTIFY_INTERRUPT: u64 = 0x10004;

/// `TDVMCALL_STATUS_SUCCESS`, in R10 of the guest.
pub const STATUS_SUCCESS: u64 = 0;
/// `TDVMCALL_STATUS_RETRY`: go on at the address in R11.
pub const STATUS_RETRY: u64 = 1;
/// `TDVMCALL_STATUS_INVALID_OPERAND`.
pub const STATUS_INVALID_OPERAND: u64 = 1 << 63;
/// `TDVMCALL_STATUS_ALIGN_ERROR`.
pub const STATUS_ALIGN_ERROR: u64 = (1 << 63) | 2;
/// `TDVMCALL_STATUS_SUBFUNC_UNSUPPORTED`.
pub const STATUS_SUBFUNC_UNSUPPORTED: u64 = (1 << 63) | 3;
