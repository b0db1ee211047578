//! The descriptor: exec, fork, dup, SCM_RIGHTS, and every order in which file, VM, vCPU and mapping can be closed.

use std::fs;
use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::process::ExitCode;
use std::sync::Arc;

use gmemtest::harness::{Context, Side, Stop, TestResult, in_child};
use gmemtest::kvm::KvmGuestMemfd;
use gmemtest::kvm::gmem::create_as_the_kernel_does;
use gmemtest::machine::{
    Errno, Exit, FileOp, GuestMemfd, GuestOp, MemoryAttributes, MemoryRegion, PAGE_SIZE, Protection, Reply, Vm,
    VmConfig,
};
use gmemtest::uapi::kvm::{GUEST_MEMFD_FLAG_INIT_SHARED, GUEST_MEMFD_FLAG_MMAP, KVM_CAP_GUEST_MEMFD};
use gmemtest::{claim_eq, claim_err, claim_ok};
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg, sendmsg, socketpair,
};

gmemtest::suite! {
    /// A guest_memfd is a file like others as far as descriptors go, with a reference on its VM. Nothing of it depends
    /// on the VM's or the vCPUs' descriptors being open; what depends on the file is the guest's access to it.
    pub static SUITE: gmem_fd needs [Vm, GuestMemfd] {
        /// KVM_CREATE_GUEST_MEMFD hands out a descriptor that is not close-on-exec, unlike KVM_CREATE_VM. A failure
        /// means that the kernel changed its default, on which programs that exec a helper rely.
        kernel_hands_out_a_descriptor_that_survives_exec needs [RealFiles];

        /// A descriptor stays open across execve(2) unless it is close-on-exec. A failure means that a VMM that execs a
        /// helper loses the guest's memory, or hands it out.
        exec_keeps_the_descriptor_unless_told_otherwise[EXEC] needs [RealFiles];

        /// A duplicate is the same file: inode, size, pages. A failure means that a helper process sees other memory
        /// than the VMM.
        duplicate_is_the_same_file needs [Cachestat];

        /// Closing one of two descriptors leaves the file as it is. A failure means that guest memory goes while
        /// somebody holds it.
        file_lives_until_its_last_descriptor_closes needs [Cachestat];

        /// A slot that was bound through a duplicate stays bound when that one closes: the binding belongs to the file
        /// (fdget() in kvm_gmem_bind()), so that the same range cannot be bound again. A failure means that closing a
        /// duplicate takes memory from the guest, or that a page is bound twice.
        binding_belongs_to_the_file_not_to_the_descriptor needs [UserMemory2];

        /// A forked child may use the file that it inherited: it allocates, punches, maps and touches, and the parent
        /// sees what it did. A failure means that memory cannot be managed from another process.
        child_uses_the_inherited_file[CHILD_FILE] needs [RealFiles, Cachestat];

        /// A forked child reads and writes shared memory through a mapping of its own. A failure means that a device
        /// process cannot reach shared memory.
        child_maps_the_inherited_file needs [GmemInitShared, RealFiles];

        /// Every ioctl of a forked child on the inherited VM is EIO: a VM belongs to the address space that made it
        /// (kvm_vm_ioctl()). A failure means that KVM works on one address space with the memory slots of another.
        child_gets_eio_from_the_vm[CHILD_VM] needs [RealFiles];

        /// The same for a vCPU (kvm_vcpu_ioctl()). A failure means that a process runs a vCPU on an address space that
        /// is not its VM's.
        child_gets_eio_from_the_vcpu needs [PreFault, RealFiles];

        /// A descriptor received through SCM_RIGHTS is the same file. A failure means that memory cannot be handed to a
        /// device process.
        descriptor_received_through_a_socket_is_the_same_file needs [RealFiles, Cachestat];

        /// A file in flight keeps its contents although no process has a descriptor of it. A failure means that guest
        /// memory is lost while it is handed over.
        file_in_flight_keeps_its_contents needs [RealFiles, GmemInitShared];

        /// Another process that receives the descriptor may use the file, but not create another: it has no VM. A
        /// failure means that a receiver can do less, or more, than the file allows.
        another_process_uses_the_received_file needs [RealFiles, Cachestat];

        /// The file works as before once its VM's descriptor is closed: it holds a reference on the VM, and asks
        /// nothing of it. A failure means that the file uses a VM that is gone.
        file_works_after_the_vm_is_closed[AFTER_VM] needs [Cachestat];

        /// Shared memory can be mapped and touched once the VM is closed. A failure means that a mapping needs the VM,
        /// which need not be there any more.
        file_can_be_mapped_after_the_vm_is_closed needs [GmemInitShared];

        /// In every order of closing file, VM, vCPU and mapping, what is still open works as before, and the guest
        /// reaches the memory while a descriptor or a mapping keeps the file. After that it gets KVM_EXIT_MEMORY_FAULT
        /// (kvm_gmem_release()). A failure means a use after free, or a guest cut off from memory that is still there.
        close_order_leaves_the_rest_working[ORDERS] needs [GmemInitShared, Guest];
    }
}

const P: u64 = PAGE_SIZE;
const SHARED: u64 = GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED;

fn file(cx: &Context, flags: u64) -> TestResult<(Arc<dyn Vm>, Arc<dyn GuestMemfd>)> {
    let vm = cx.machine().create_vm(VmConfig::Bare)?;
    let gmem = vm.create_guest_memfd(4 * P, flags)?;
    Ok((vm, gmem))
}

/// The raw descriptor of something on a machine with real files.
fn descriptor(raw: Option<RawFd>) -> TestResult<RawFd> {
    raw.ok_or_else(|| Stop::fail("a machine with real files has no descriptor"))
}

fn kernel_hands_out_a_descriptor_that_survives_exec(cx: &Context) -> TestResult {
    let vm = cx.machine().create_vm(VmConfig::Bare)?;
    let vm_fd = descriptor(vm.raw_fd())?;
    let gmem = create_as_the_kernel_does(&vm_fd, P, 0, [0; 6])?;
    // SAFETY: F_GETFD takes and gives numbers.
    let flags = |fd: RawFd| Errno::result(unsafe { libc::fcntl(fd, libc::F_GETFD) });
    claim_eq!(flags(gmem.as_raw_fd()), Ok(0), "descriptor flags of a new guest_memfd");
    claim_eq!(flags(vm_fd), Ok(libc::FD_CLOEXEC), "descriptor flags of its VM");
    Ok(())
}

/// The FD_CLOEXEC flag before the exec.
const EXEC: &[(&str, i32)] = &[("without_cloexec", 0), ("with_cloexec", libc::FD_CLOEXEC)];

/// Runs this program in a child that is stopped before its first instruction, and gives what `fd` is there.
fn link_after_exec(fd: RawFd) -> TestResult<Option<String>> {
    let program = c"/proc/self/exe";
    let argv = [program.as_ptr(), c"--list".as_ptr(), std::ptr::null()];
    // SAFETY: the child does nothing but three system calls on what was made before the fork.
    let child = Errno::result(unsafe { libc::fork() })?;
    if child == 0 {
        // SAFETY: PTRACE_TRACEME takes no argument; the vector ends in a null pointer; _exit ends the process.
        unsafe {
            libc::ptrace(libc::PTRACE_TRACEME);
            libc::execv(program.as_ptr(), argv.as_ptr());
            libc::_exit(127);
        }
    }
    let wait = || {
        let mut status = 0;
        // SAFETY: `status` has room for what the call writes, and nobody else reaps this child.
        Errno::result(unsafe { libc::waitpid(child, &mut status, 0) }).map(|_| status)
    };
    let status = wait()?;
    if !libc::WIFSTOPPED(status) {
        gmemtest::skip!(NoPrivilege, "a child cannot be traced (ptrace(2) is restricted), wait status {status:#x}");
    }
    let link = fs::read_link(format!("/proc/{child}/fd/{fd}"));
    // SAFETY: the child is this process's own and not yet reaped.
    unsafe { libc::kill(child, libc::SIGKILL) };
    wait()?;
    Ok(link.ok().map(|target| target.to_string_lossy().into_owned()))
}

fn exec_keeps_the_descriptor_unless_told_otherwise(cx: &Context, &flags: &i32) -> TestResult {
    let (_vm, gmem) = file(cx, 0)?;
    let fd = descriptor(gmem.raw_fd())?;
    let here = fs::read_link(format!("/proc/self/fd/{fd}"))?.to_string_lossy().into_owned();
    // SAFETY: F_SETFD takes a number.
    Errno::result(unsafe { libc::fcntl(fd, libc::F_SETFD, flags) })?;
    let there = link_after_exec(fd)?;
    let expected = (flags & libc::FD_CLOEXEC == 0).then_some(here);
    claim_eq!(there, expected, "descriptor {fd} after execve, made with descriptor flags {flags}");
    Ok(())
}

fn duplicate_is_the_same_file(cx: &Context) -> TestResult {
    let (_vm, gmem) = file(cx, 0)?;
    let twin = gmem.duplicate()?;
    claim_eq!(twin.stat()?, gmem.stat()?, "fstat of the duplicate");
    twin.allocate(P, 2 * P)?;
    claim_eq!(gmem.cache_stat(0, 0)?.cached, 2, "pages allocated through the duplicate");
    gmem.punch_hole(P, P)?;
    claim_eq!(twin.cache_stat(0, 0)?.cached, 1, "pages left by a punch through the first");
    Ok(())
}

fn file_lives_until_its_last_descriptor_closes(cx: &Context) -> TestResult {
    let (vm, gmem) = file(cx, 0)?;
    let twin = gmem.duplicate()?;
    gmem.allocate(0, 3 * P)?;
    drop(gmem);
    claim_eq!(twin.cache_stat(0, 0)?.cached, 3, "pages with the first descriptor closed");
    let third = twin.duplicate()?;
    drop(twin);
    drop(vm);
    claim_eq!(third.cache_stat(0, 0)?.cached, 3, "pages with the first, the second and the VM closed");
    claim_ok!(third.allocate(0, 4 * P), "allocation through the last");
    Ok(())
}

fn binding_belongs_to_the_file_not_to_the_descriptor(cx: &Context) -> TestResult {
    let (vm, gmem) = file(cx, 0)?;
    let twin = gmem.duplicate()?;
    claim_ok!(vm.set_memory_region(&MemoryRegion::new(1, 0, 4 * P).bound_to(&*twin, 0)), "binding to a duplicate");
    drop(twin);
    let again = vm.set_memory_region(&MemoryRegion::new(2, 1 << 30, 4 * P).bound_to(&*gmem, 0));
    // "KVM guest_memfd changes for 7.2" gave overlapping bindings an errno of their own.
    let taken = cx.by_release(&[((6, 8), Errno::EINVAL), ((7, 2), Errno::EEXIST)])?;
    claim_err!(again, taken, "the same range bound through the first descriptor");
    claim_ok!(vm.set_memory_region(&MemoryRegion::deletion(1)), "deletion of the slot");
    let again = vm.set_memory_region(&MemoryRegion::new(2, 1 << 30, 4 * P).bound_to(&*gmem, 0));
    claim_ok!(again, "the same range bound after that");
    Ok(())
}

/// What a child does with the file, and how many pages of its four are there afterwards.
type ChildFile = (fn(&dyn GuestMemfd) -> Result<(), Errno>, u64);

const CHILD_FILE: &[(&str, ChildFile)] = &[
    ("allocates", (|gmem| gmem.allocate(0, 4 * P), 4)),
    ("punches", (|gmem| gmem.punch_hole(0, P), 0)),
    ("duplicates", (|gmem| gmem.duplicate()?.allocate(P, P), 2)),
    ("asks_for_its_status", (|gmem| gmem.stat().map(drop), 1)),
    ("asks_for_its_pages", (|gmem| gmem.cache_stat(0, 0).map(drop), 1)),
];

fn child_uses_the_inherited_file(cx: &Context, &(call, pages): &ChildFile) -> TestResult {
    let (_vm, gmem) = file(cx, 0)?;
    gmem.allocate(0, P)?;
    claim_eq!(in_child(|| call(&*gmem).map(|()| 0))?.returned()?, Ok(0), "the child's call");
    claim_eq!(gmem.cache_stat(0, 0)?.cached, pages, "pages, counted by the parent");
    Ok(())
}

fn child_maps_the_inherited_file(cx: &Context) -> TestResult {
    let (_vm, gmem) = file(cx, SHARED)?;
    let mapping = gmem.map(4 * P, 0, Protection::SHARED_RW)?;
    mapping.write_u64(0, 17)?;
    let seen = in_child(|| {
        let own = gmem.map(4 * P, 0, Protection::SHARED_RW)?;
        own.write_u64(P, 18).map_err(|_| Errno::EFAULT)?;
        own.read_u64(0).map_err(|_| Errno::EFAULT)
    })?
    .returned()?;
    claim_eq!(seen, Ok(17), "what the child read");
    claim_eq!(mapping.read_u64(P)?, 18, "what the child wrote");
    Ok(())
}

type VmCall = fn(&dyn Vm) -> Result<(), Errno>;

const CHILD_VM: &[(&str, VmCall)] = &[
    ("check_extension", |vm| vm.capability(KVM_CAP_GUEST_MEMFD).map(drop)),
    ("create_guest_memfd", |vm| vm.create_guest_memfd(P, 0).map(drop)),
    ("set_memory_region", |vm| vm.set_memory_region(&MemoryRegion::new(1, 0, P))),
    ("delete_memory_region", |vm| vm.set_memory_region(&MemoryRegion::deletion(0))),
    ("set_memory_region_v1", |vm| vm.set_memory_region_v1(&MemoryRegion::new(1, 0, P))),
    ("set_memory_attributes", |vm| {
        vm.set_memory_attributes(&MemoryAttributes { address: 0, size: P, attributes: 0, flags: 0 })
    }),
    ("get_dirty_log", |vm| vm.dirty_log(0, 1).map(drop)),
    ("create_vcpu", |vm| vm.create_vcpu(0).map(drop)),
];

fn child_gets_eio_from_the_vm(cx: &Context, call: &VmCall) -> TestResult {
    let (vm, _gmem) = file(cx, 0)?;
    claim_err!(in_child(|| call(&*vm).map(|()| 0))?.returned()?, Errno::EIO, "the child's ioctl");
    claim_eq!(vm.capability(KVM_CAP_GUEST_MEMFD), Ok(1), "the parent's ioctl afterwards");
    Ok(())
}

fn child_gets_eio_from_the_vcpu(cx: &Context) -> TestResult {
    // With the payload: a vCPU of a TD cannot be made otherwise.
    let vm = cx.machine().create_vm(VmConfig::Payload { vcpus: 1 })?;
    let mut vcpu = vm.create_vcpu(0)?;
    let result = in_child(|| vcpu.pre_fault(0, P, 0).result.map(|()| 0))?.returned()?;
    claim_err!(result, Errno::EIO, "KVM_PRE_FAULT_MEMORY of the child");
    claim_err!(vcpu.pre_fault(0, P, 0).result, Errno::ENOENT, "the parent's, where no memory is");
    Ok(())
}

/// Two connected sockets.
fn sockets() -> TestResult<(OwnedFd, OwnedFd)> {
    Ok(socketpair(AddressFamily::Unix, SockType::Stream, None, SockFlag::SOCK_CLOEXEC)?)
}

fn send(socket: &OwnedFd, fd: RawFd) -> Result<(), Errno> {
    let fds = [fd];
    let control = [ControlMessage::ScmRights(&fds)];
    sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(b"f")], &control, MsgFlags::empty(), None).map(drop)
}

fn receive(socket: &OwnedFd) -> Result<KvmGuestMemfd, Errno> {
    let mut byte = [0];
    let mut data = [IoSliceMut::new(&mut byte)];
    let mut space = nix::cmsg_space!(RawFd);
    let message = recvmsg::<()>(socket.as_raw_fd(), &mut data, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC)?;
    let received = message.cmsgs()?.find_map(|control| match control {
        ControlMessageOwned::ScmRights(fds) => fds.first().copied(),
        _ => None,
    });
    // SAFETY: the kernel made this descriptor for the message; nothing else owns it.
    let fd = received.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) });
    fd.map(KvmGuestMemfd::from).ok_or(Errno::EBADMSG)
}

fn descriptor_received_through_a_socket_is_the_same_file(cx: &Context) -> TestResult {
    let (_vm, gmem) = file(cx, 0)?;
    let (near, far) = sockets()?;
    send(&near, descriptor(gmem.raw_fd())?)?;
    let received = receive(&far)?;
    claim_eq!(received.stat()?, gmem.stat()?, "fstat of what was received");
    received.allocate(0, 2 * P)?;
    claim_eq!(gmem.cache_stat(0, 0)?.cached, 2, "pages allocated through it");
    Ok(())
}

fn file_in_flight_keeps_its_contents(cx: &Context) -> TestResult {
    let (vm, gmem) = file(cx, SHARED)?;
    gmem.map(4 * P, 0, Protection::SHARED_RW)?.fill(0, 4 * P, 0x29)?;
    let (near, far) = sockets()?;
    send(&near, descriptor(gmem.raw_fd())?)?;
    drop(gmem);
    drop(vm);
    let received = receive(&far)?;
    let mapping = received.map(4 * P, 0, Protection::SHARED_RW)?;
    claim_eq!(mapping.find_mismatch(0, 4 * P, 0x29)?, None, "contents of what was received");
    Ok(())
}

fn another_process_uses_the_received_file(cx: &Context) -> TestResult {
    let (vm, gmem) = file(cx, 0)?;
    let (near, far) = sockets()?;
    send(&near, descriptor(gmem.raw_fd())?)?;
    let result = in_child(|| {
        let received = receive(&far)?;
        received.allocate(0, 3 * P)?;
        match vm.create_guest_memfd(P, 0) {
            Err(Errno::EIO) => received.cache_stat(0, 0).map(|stat| stat.cached),
            other => Err(other.err().unwrap_or(Errno::EEXIST)),
        }
    })?
    .returned()?;
    claim_eq!(result, Ok(3), "pages counted by the child, which cannot use the VM");
    claim_eq!(gmem.cache_stat(0, 0)?.cached, 3, "pages counted by the parent");
    Ok(())
}

/// A call on a file of four pages of which the first is allocated, and what it returns once the VM is closed.
type AfterVm = (fn(&dyn GuestMemfd) -> Result<i64, Errno>, Result<i64, Errno>);

const AFTER_VM: &[(&str, AfterVm)] = &[
    ("allocate", (|gmem| gmem.allocate(P, 3 * P).and(gmem.cache_stat(0, 0)).map(|stat| stat.cached as i64), Ok(4))),
    ("punch", (|gmem| gmem.punch_hole(0, P).and(gmem.cache_stat(0, 0)).map(|stat| stat.cached as i64), Ok(0))),
    ("allocate_beyond_the_end", (|gmem| gmem.allocate(4 * P, P).map(|()| 0), Err(Errno::EINVAL))),
    ("fstat", (|gmem| gmem.stat().map(|stat| stat.size), Ok(4 * P as i64))),
    ("cachestat", (|gmem| gmem.cache_stat(0, 0).map(|stat| stat.cached as i64), Ok(1))),
    ("read", (|gmem| gmem.file_op(FileOp::Read(1)), Err(Errno::EINVAL))),
    ("mmap", (|gmem| gmem.map(P, 0, Protection::SHARED_RW).map(|_| 0), Err(Errno::ENODEV))),
];

fn file_works_after_the_vm_is_closed(cx: &Context, (call, expected): &AfterVm) -> TestResult {
    let (vm, gmem) = file(cx, 0)?;
    gmem.allocate(0, P)?;
    drop(vm);
    claim_eq!(call(&*gmem), *expected, "the call with the VM closed");
    Ok(())
}

fn file_can_be_mapped_after_the_vm_is_closed(cx: &Context) -> TestResult {
    let (vm, gmem) = file(cx, SHARED)?;
    drop(vm);
    let mapping = claim_ok!(gmem.map(4 * P, 0, Protection::SHARED_RW), "mmap");
    mapping.fill(0, 4 * P, 0x3e)?;
    gmem.punch_hole(P, P)?;
    claim_eq!(mapping.find_mismatch(P, P, 0)?, None, "a page punched");
    claim_eq!(mapping.find_mismatch(2 * P, 2 * P, 0x3e)?, None, "pages left");
    Ok(())
}

/// What can be closed.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Handle {
    File,
    Vm,
    Vcpu,
    Mapping,
}

use Handle::{File, Mapping, Vcpu, Vm as TheVm};

#[rustfmt::skip]
const ORDERS: &[(&str, [Handle; 4])] = &[
    ("file_vm_vcpu_mapping", [File, TheVm, Vcpu, Mapping]), ("file_vm_mapping_vcpu", [File, TheVm, Mapping, Vcpu]),
    ("file_vcpu_vm_mapping", [File, Vcpu, TheVm, Mapping]), ("file_vcpu_mapping_vm", [File, Vcpu, Mapping, TheVm]),
    ("file_mapping_vm_vcpu", [File, Mapping, TheVm, Vcpu]), ("file_mapping_vcpu_vm", [File, Mapping, Vcpu, TheVm]),
    ("vm_file_vcpu_mapping", [TheVm, File, Vcpu, Mapping]), ("vm_file_mapping_vcpu", [TheVm, File, Mapping, Vcpu]),
    ("vm_vcpu_file_mapping", [TheVm, Vcpu, File, Mapping]), ("vm_vcpu_mapping_file", [TheVm, Vcpu, Mapping, File]),
    ("vm_mapping_file_vcpu", [TheVm, Mapping, File, Vcpu]), ("vm_mapping_vcpu_file", [TheVm, Mapping, Vcpu, File]),
    ("vcpu_file_vm_mapping", [Vcpu, File, TheVm, Mapping]), ("vcpu_file_mapping_vm", [Vcpu, File, Mapping, TheVm]),
    ("vcpu_vm_file_mapping", [Vcpu, TheVm, File, Mapping]), ("vcpu_vm_mapping_file", [Vcpu, TheVm, Mapping, File]),
    ("vcpu_mapping_file_vm", [Vcpu, Mapping, File, TheVm]), ("vcpu_mapping_vm_file", [Vcpu, Mapping, TheVm, File]),
    ("mapping_file_vm_vcpu", [Mapping, File, TheVm, Vcpu]), ("mapping_file_vcpu_vm", [Mapping, File, Vcpu, TheVm]),
    ("mapping_vm_file_vcpu", [Mapping, TheVm, File, Vcpu]), ("mapping_vm_vcpu_file", [Mapping, TheVm, Vcpu, File]),
    ("mapping_vcpu_file_vm", [Mapping, Vcpu, File, TheVm]), ("mapping_vcpu_vm_file", [Mapping, Vcpu, TheVm, File]),
];

fn close_order_leaves_the_rest_working(cx: &Context, order: &[Handle; 4]) -> TestResult {
    const GPA: u64 = 1 << 32;
    const VALUE: u64 = 0x0123_4567_89ab_cdef;
    let the_vm = cx.machine().create_vm(VmConfig::Payload { vcpus: 1 })?;
    let gmem = the_vm.create_guest_memfd(4 * P, SHARED)?;
    let the_mapping = gmem.map(4 * P, 0, Protection::SHARED_RW)?;
    the_mapping.write_u64(0, VALUE)?;
    the_vm.set_memory_region(&MemoryRegion::new(1, GPA, 4 * P).bound_to(&*gmem, 0))?;
    let the_vcpu = the_vm.create_vcpu(0)?;
    let address = Side::Shared.address(&*the_vm, GPA);
    let (mut vm, mut file, mut mapping, mut vcpu) = (Some(the_vm), Some(gmem), Some(the_mapping), Some(the_vcpu));
    let mut faulted = false;
    for closed in order {
        match closed {
            File => file = None,
            TheVm => vm = None,
            Vcpu => vcpu = None,
            Mapping => mapping = None,
        }
        if let Some(vm) = &vm {
            claim_eq!(vm.capability(KVM_CAP_GUEST_MEMFD), Ok(1), "the VM, after {closed:?} was closed");
        }
        if let Some(file) = &file {
            claim_eq!(file.stat()?.size, 4 * P as i64, "the file, after {closed:?} was closed");
            claim_ok!(file.allocate(P, P), "an allocation, after {closed:?} was closed");
        }
        if let Some(mapping) = &mapping {
            claim_eq!(mapping.read_u64(0)?, VALUE, "the mapping, after {closed:?} was closed");
        }
        if let Some(vcpu) = &mut vcpu {
            let exit = match faulted {
                false => vcpu.execute(GuestOp::Read { gpa: address, size: 8 }),
                true => vcpu.resume(Reply::None),
            };
            let expected = if file.is_some() || mapping.is_some() {
                Exit::Done(VALUE)
            } else {
                faulted = true;
                Exit::MemoryFault { errno: Errno::EFAULT, flags: 0, gpa: GPA, size: P }
            };
            claim_eq!(exit, expected, "a guest read, after {closed:?} was closed");
        }
    }
    Ok(())
}

/// The stand-alone binary.
pub fn main() -> ExitCode {
    gmemtest::cli::selftest_main(&[&SUITE])
}
