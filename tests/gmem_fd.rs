//! The descriptor of a guest_memfd: what the kernel hands out, and what this package makes of it.

use gmemtest::kvm::{KvmMachine, gmem};
use gmemtest::machine::{Facility, Machine, PAGE_SIZE, VmConfig, VmType};
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};

fn descriptor_flags(fd: RawFd) -> i32 {
    // SAFETY: F_GETFD takes no argument.
    unsafe { libc::fcntl(fd, libc::F_GETFD) }
}

#[test]
fn the_kernel_makes_it_inheritable_and_the_machine_close_on_exec() {
    let machine = KvmMachine::new(VmType::Default);
    if !machine.facility(Facility::GuestMemfd).is_present() {
        println!("skipped: {:?}", machine.facility(Facility::GuestMemfd));
        return;
    }
    let vm = machine.create_vm(VmConfig::Bare).expect("a VM");
    let fd = vm.raw_fd().expect("a VM of the kernel has a descriptor");
    // SAFETY: `vm` stays open to the end of the test.
    let vm_fd = unsafe { BorrowedFd::borrow_raw(fd) };
    let raw = gmem::create_as_the_kernel_does(&vm_fd, PAGE_SIZE, 0, [0; 6]).expect("a guest_memfd");
    // get_unused_fd_flags(0) in __kvm_gmem_create().
    assert_eq!(descriptor_flags(raw.as_raw_fd()), 0);
    let ours = vm.create_guest_memfd(PAGE_SIZE, 0).expect("a guest_memfd");
    assert_eq!(descriptor_flags(ours.raw_fd().expect("a descriptor")), libc::FD_CLOEXEC);
    let copy = ours.duplicate().expect("a duplicate");
    assert_eq!(descriptor_flags(copy.raw_fd().expect("a descriptor")), libc::FD_CLOEXEC);
}
