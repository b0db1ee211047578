//! One VM that stays, under an emulator.
//!
//! The first VM and the end of the last one switch a static key in the scheduler (preempt_notifier_inc() in
//! kvm_create_vm()), which rewrites __schedule() under the other CPUs' feet. Hardware and the kernel agree on how that is
//! done; QEMU's TCG with a thread for each CPU may execute a stale breakpoint afterwards ("Oops: int3 .. RIP:
//! __schedule"), about once in a hundred VMs on a busy host. A VM that stays keeps the key as it is.

use kvm_ioctls::{Kvm, VmFd};

/// Creates the VM; `None` where there is no KVM to test.
pub fn hold() -> Option<VmFd> {
    Kvm::new().and_then(|kvm| kvm.create_vm()).ok()
}
