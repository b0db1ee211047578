//! What makes an emulated CPU right and fast.

use std::fs;

use kvm_ioctls::{Kvm, VmFd};

use crate::machine::VmType;

/// Sets the guest up for QEMU's TCG; what is returned must be kept.
///
/// * A VM that stays. The first VM and the end of the last one switch a static key in the scheduler
///   (preempt_notifier_inc() in kvm_create_vm()), which rewrites __schedule() under the other CPUs' feet. Hardware and the
///   kernel agree on how that is done; TCG with a thread for each CPU may execute a stale breakpoint afterwards
///   ("Oops: int3 .. RIP: __schedule"), about once in a hundred VMs on a busy host. A VM that stays keeps the key as it is.
/// * No address space randomisation. TCG finds translated code by its virtual address: with a new one for every process, it
///   translates this program for every test anew, which doubles the time that starting a test takes.
pub fn ease() -> Option<VmFd> {
    // Without CONFIG_SYSCTL it stays as it is, and tests take longer to start.
    let _ = fs::write("/proc/sys/kernel/randomize_va_space", "0");
    // Where there is no KVM, there is nothing to hold.
    let kvm = Kvm::new().ok()?;
    // Where KVM has no VMX, TDs are all that it creates.
    kvm.create_vm().or_else(|_| kvm.create_vm_with_type(VmType::Tdx.number())).ok()
}
