//! The kernel's user-space ABI that `kvm-bindings` 0.14 (generated from Linux 6.15) lacks: numbers and `repr(C)` layouts.
//!
//! One file per header of the kernel. Nothing here does anything: the calls are in [`crate::kvm`]. Layouts are asserted
//! when this is compiled; `tests/uapi_headers.rs` compares every number, size and offset with the headers that the C
//! compiler finds, or with those that `scripts/fetch-uapi-headers` has fetched.
//!
//! | header | file |
//! |---|---|
//! | `linux/kvm.h` | [`kvm`] |
//! | `linux/kvm_para.h`, `asm/kvm_para.h` | [`kvm_para`] |
//! | `asm/kvm.h` | [`kvm_x86`] |
//! | `linux/magic.h` | [`magic`] |
//! | `mm/gup_test.h` (not installed) | [`gup_test`] |
//! | `asm/shared/tdx.h` and Intel's GHCI (not installed) | [`tdvmcall`] |
//! | `asm/shared/tdx_errno.h` (not installed) | [`tdx_status`] |

pub mod gup_test;
pub mod kvm;
pub mod kvm_para;
pub mod kvm_x86;
pub mod magic;
pub mod tdvmcall;
pub mod tdx_status;

pub use kvm_bindings as bindings;
