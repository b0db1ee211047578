//! A TD's guest: TDVMCALL MapGPA, TDG.MEM.PAGE.ACCEPT, and what is left of a TD that is dead.

use gmemtest::harness::{Context, GmemVm, Td, TdMemory, TestResult};
use gmemtest::machine::{
    Errno, Exit, Facility, GuestOp, MemoryRegion, PAGE_SIZE, Reply, TdxAnswer, TdxCommand, TdxData, Vcpu,
};
use gmemtest::uapi::kvm::{KVM_CAP_EXIT_HYPERCALL, KVM_MEMORY_ATTRIBUTE_PRIVATE};
use gmemtest::uapi::kvm_para::{
    KVM_EXIT_HYPERCALL_LONG_MODE, KVM_HC_MAP_GPA_RANGE, KVM_MAP_GPA_RANGE_DECRYPTED, KVM_MAP_GPA_RANGE_ENCRYPTED,
};
use gmemtest::uapi::kvm_x86::KVM_TDX_FINALIZE_VM;
use gmemtest::uapi::tdvmcall::{
    STATUS_ALIGN_ERROR, STATUS_INVALID_OPERAND, STATUS_RETRY, STATUS_SUBFUNC_UNSUPPORTED, STATUS_SUCCESS,
};
use gmemtest::{claim, claim_eq, claim_err, claim_matches, claim_ok};

gmemtest::suite! {
    /// What the guest of a TD (6.16) asks of KVM and of the module: MapGPA, acceptance, and accesses that end it.
    pub static SUITE: tdx_guest needs [Vm, Guest, Tdx, GuestMemfd] {
        /// Without KVM_CAP_EXIT_HYPERCALL the guest's MapGPA is SUBFUNC_UNSUPPORTED (tdx_map_gpa()). A failure tells the
        /// guest that a conversion was done of which nobody knows.
        map_gpa_has_to_be_enabled needs [ExitHypercall];

        /// A range that MapGPA cannot mean is refused by KVM itself, with ALIGN_ERROR or INVALID_OPERAND (tdx_map_gpa()).
        /// A failure hands nonsense to user space.
        map_gpa_is_refused[RANGES] needs [ExitHypercall];

        /// MapGPA is KVM_HC_MAP_GPA_RANGE: the address without the SHARED bit, the pages, and whether they are to be private,
        /// which the bit says (__tdx_map_gpa()). A failure converts in the wrong direction.
        map_gpa_is_an_exit[DIRECTIONS] needs [ExitHypercall];

        /// MapGPA of a long range comes in chunks of 2 MiB, counted from its start (TDX_MAP_GPA_MAX_LEN). A failure keeps
        /// KVM busy without end, or leaves out a part.
        map_gpa_comes_in_chunks needs [ExitHypercall];

        /// What user space answers decides how it goes on: 0 success, EAGAIN RETRY to the guest, EINVAL INVALID_OPERAND
        /// (tdx_complete_vmcall_map_gpa()). A failure loses user space's no.
        answer_of_user_space_reaches_the_guest[ANSWERS] needs [ExitHypercall];

        /// Any other answer is EINVAL of KVM_RUN, and until 6.18 an invalid operand to the guest. A failure makes something up for the guest.
        other_answer_is_einval needs [ExitHypercall];

        /// A page that was converted to shared and back is empty, and has to be accepted again: its contents went with its
        /// mapping. A failure gives the guest its old data without its knowledge.
        page_that_comes_back_is_empty needs [MemoryAttributes];

        /// A page is accepted once: TDX_PAGE_ALREADY_ACCEPTED from then on, and keeps its contents. A failure lets a
        /// second acceptance erase the guest's data.
        page_is_accepted_once;

        /// TDG.MEM.PAGE.ACCEPT of 2 MiB over pages that are mapped one by one is TDX_PAGE_SIZE_MISMATCH (7.3 maps nothing
        /// larger). A failure accepts memory that is not there.
        acceptance_of_another_size_is_refused;

        /// Shared and private are two memories: the guest's store to a shared page is in the memory that `userspace_addr`
        /// names, and the host's store there is what the guest reads. A failure means that they are mixed up.
        shared_page_is_the_hosts_memory needs [MemoryAttributes];

        /// An access to a private page that was not accepted ends the TD with SEPT_VE_DISABLE: KVM_RUN is EIO and the VM is
        /// dead, though no bug is reported (tdx_handle_ept_violation()). A failure lets the host replace a page unnoticed.
        access_before_acceptance_ends_the_td;

        /// Of a dead VM every ioctl is EIO, those of its vCPUs too (kvm_vm_ioctl(), kvm_vcpu_ioctl()). A failure works on a
        /// VM whose state is not known.
        every_ioctl_of_a_dead_vm_is_eio;

        /// The guest_memfd of a dead VM is a file still: it can be allocated, punched and looked at, and it can be closed. A
        /// failure makes a crash of the guest one of the VMM.
        file_outlives_its_vm;
    }
}

const ENABLE: [u64; 4] = [1 << KVM_HC_MAP_GPA_RANGE, 0, 0, 0];
const TO_PRIVATE: u64 = KVM_MAP_GPA_RANGE_ENCRYPTED;
const TO_SHARED: u64 = KVM_MAP_GPA_RANGE_DECRYPTED;
/// Pages of 2 MiB.
const CHUNK: u64 = 512;
/// TDX_PAGE_ALREADY_ACCEPTED at 4 KiB.
const ALREADY_ACCEPTED: u64 = 0xb0a << 32;
/// TDX_PAGE_SIZE_MISMATCH, without its level.
const SIZE_MISMATCH: u64 = 0xc000_0b0b;

/// A TD with one vCPU, MapGPA enabled.
fn converting(cx: &Context, pages: u64) -> TestResult<(Box<dyn Vcpu>, GmemVm)> {
    let vm = GmemVm::new(cx, pages)?;
    claim_ok!(vm.vm.enable_capability(KVM_CAP_EXIT_HYPERCALL, ENABLE));
    Ok((vm.vcpu(0)?, vm))
}

fn map_gpa_has_to_be_enabled(cx: &Context) -> TestResult {
    let vm = GmemVm::new(cx, 1)?;
    let mut vcpu = vm.vcpu(0)?;
    let op = GuestOp::MapGpa { gpa: vm.gpa(0), pages: 1, attributes: TO_SHARED };
    claim_eq!(vcpu.execute(op), Exit::Done(STATUS_SUBFUNC_UNSUPPORTED), "MapGPA without the capability");
    claim_ok!(vm.vm.enable_capability(KVM_CAP_EXIT_HYPERCALL, ENABLE));
    claim_matches!(vcpu.execute(op), Exit::Hypercall { .. }, "MapGPA with it");
    Ok(())
}

/// A range: address from the slot and the SHARED bit, pages, direction, and the status it gets.
type Range = (fn(u64, u64) -> u64, u64, u64, u64);

const RANGES: &[(&str, Range)] = &[
    ("off_a_page", (|gpa, _| gpa + 8, 1, TO_PRIVATE, STATUS_ALIGN_ERROR)),
    ("shared_off_a_page", (|gpa, _| gpa + 0x800, 1, TO_SHARED, STATUS_ALIGN_ERROR)),
    ("no_pages", (|gpa, _| gpa, 0, TO_PRIVATE, STATUS_INVALID_OPERAND)),
    ("into_the_shared_half", (|_, shared| shared - PAGE_SIZE, 2, TO_PRIVATE, STATUS_INVALID_OPERAND)),
    ("out_of_the_shared_half", (|_, shared| shared - PAGE_SIZE, 2, TO_SHARED, STATUS_INVALID_OPERAND)),
    ("wraps", (|gpa, _| gpa, (1 << 52) - 1, TO_PRIVATE, STATUS_INVALID_OPERAND)),
];

fn map_gpa_is_refused(cx: &Context, &(address, pages, attributes, status): &Range) -> TestResult {
    let (mut vcpu, vm) = converting(cx, 1)?;
    let gpa = address(vm.gpa(0), vm.vm.shared_bit());
    let exit = vcpu.execute(GuestOp::MapGpa { gpa, pages, attributes });
    claim_eq!(exit, Exit::Done(status), "MapGPA of {pages:#x} pages at {gpa:#x}, attributes {attributes:#x}");
    Ok(())
}

const DIRECTIONS: &[(&str, u64)] = &[("to_private", TO_PRIVATE), ("to_shared", TO_SHARED)];

/// The exit of MapGPA.
fn request(gpa: u64, pages: u64, attributes: u64) -> Exit {
    let args = [gpa, pages, attributes, 0, 0, 0];
    Exit::Hypercall { nr: KVM_HC_MAP_GPA_RANGE, args, flags: KVM_EXIT_HYPERCALL_LONG_MODE }
}

/// The exit with the words that MapGPA does not use left out: KVM need not write them.
fn without_rest(exit: Exit) -> Exit {
    match exit {
        Exit::Hypercall { nr, args: [gpa, pages, attributes, ..], flags } => {
            Exit::Hypercall { nr, args: [gpa, pages, attributes, 0, 0, 0], flags }
        }
        other => other,
    }
}

fn map_gpa_is_an_exit(cx: &Context, &attributes: &u64) -> TestResult {
    let (mut vcpu, vm) = converting(cx, 4)?;
    let exit = vcpu.execute(GuestOp::MapGpa { gpa: vm.gpa(PAGE_SIZE), pages: 2, attributes });
    claim_eq!(without_rest(exit), request(vm.gpa(PAGE_SIZE), 2, attributes), "what user space is asked");
    claim_eq!(vcpu.resume(Reply::Hypercall(0)), Exit::Done(STATUS_SUCCESS), "what the guest is told");
    Ok(())
}

fn map_gpa_comes_in_chunks(cx: &Context) -> TestResult {
    let (mut vcpu, vm) = converting(cx, 1)?;
    // Off a boundary of 2 MiB, so that chunks from the start differ from aligned ones.
    let start = vm.gpa(3 * PAGE_SIZE);
    let mut exit = vcpu.execute(GuestOp::MapGpa { gpa: start, pages: 2 * CHUNK + 7, attributes: TO_SHARED });
    for (done, pages) in [(0, CHUNK), (CHUNK, CHUNK), (2 * CHUNK, 7)] {
        let expected = request(start + done * PAGE_SIZE, pages, TO_SHARED);
        claim_eq!(without_rest(exit), expected, "the chunk after {done} pages");
        exit = vcpu.resume(Reply::Hypercall(0));
    }
    claim_eq!(exit, Exit::Done(STATUS_SUCCESS), "what the guest is told at the end");
    Ok(())
}

/// What user space answers to the second chunk, and the guest's status.
const ANSWERS: &[(&str, (u64, u64))] = &[
    ("success", (0, STATUS_SUCCESS)),
    ("eagain", (libc::EAGAIN as u64, STATUS_RETRY)),
    ("einval", (libc::EINVAL as u64, STATUS_INVALID_OPERAND)),
];

fn answer_of_user_space_reaches_the_guest(cx: &Context, &(answer, status): &(u64, u64)) -> TestResult {
    let (mut vcpu, vm) = converting(cx, 1)?;
    let op = GuestOp::MapGpa { gpa: vm.gpa(0), pages: 2 * CHUNK, attributes: TO_SHARED };
    claim_eq!(without_rest(vcpu.execute(op)), request(vm.gpa(0), CHUNK, TO_SHARED), "the first chunk");
    let second = vcpu.resume(Reply::Hypercall(0));
    claim_eq!(without_rest(second), request(vm.gpa(CHUNK * PAGE_SIZE), CHUNK, TO_SHARED), "the second chunk");
    // Until 6.18 there is one status for whatever user space answers.
    let status = match answer {
        0 => status,
        _ => cx.by_release(&[((6, 16), STATUS_INVALID_OPERAND), ((6, 19), status)])?,
    };
    claim_eq!(vcpu.resume(Reply::Hypercall(answer)), Exit::Done(status), "what the guest is told");
    claim_matches!(vcpu.execute(op), Exit::Hypercall { .. }, "MapGPA once more");
    Ok(())
}

fn other_answer_is_einval(cx: &Context) -> TestResult {
    let (mut vcpu, vm) = converting(cx, 1)?;
    let op = GuestOp::MapGpa { gpa: vm.gpa(0), pages: 1, attributes: TO_SHARED };
    claim_matches!(vcpu.execute(op), Exit::Hypercall { .. }, "MapGPA");
    let exit = vcpu.resume(Reply::Hypercall(libc::EPERM as u64));
    // Until 6.18 there is one status for whatever user space answers.
    if cx.by_release(&[((6, 16), true), ((6, 19), false)])? {
        claim_eq!(exit, Exit::Done(STATUS_INVALID_OPERAND), "what the guest is told");
        return Ok(());
    }
    claim_matches!(exit, Exit::Failed { errno: Errno::EINVAL, .. }, "KVM_RUN after an answer that means nothing");
    Ok(())
}

/// Accepts pages of the slot.
fn accept(vcpu: &mut dyn Vcpu, vm: &GmemVm, page: u64, pages: u64) -> TestResult {
    let op = GuestOp::Accept { gpa: vm.gpa(page * PAGE_SIZE), len: pages * PAGE_SIZE, level: 0 };
    claim_eq!(vcpu.execute(op), Exit::Done(0), "the status of accepting {pages} pages from {page}");
    Ok(())
}

fn page_that_comes_back_is_empty(cx: &Context) -> TestResult {
    let vm = GmemVm::private(cx, 2)?;
    let mut vcpu = vm.vcpu(0)?;
    accept(&mut *vcpu, &vm, 0, 2)?;
    let fill = GuestOp::Fill { gpa: vm.gpa(0), len: 2 * PAGE_SIZE, byte: 0x5a };
    claim_eq!(vcpu.execute(fill), Exit::Done(0), "the guest's stores");
    vm.set_attributes(0, PAGE_SIZE, 0)?;
    vm.set_attributes(0, PAGE_SIZE, KVM_MEMORY_ATTRIBUTE_PRIVATE)?;
    let check = |page: u64, byte| GuestOp::Check { gpa: vm.gpa(page * PAGE_SIZE), len: PAGE_SIZE, byte };
    claim_eq!(vcpu.execute(check(1, 0x5a)), Exit::Done(0), "the page beside it");
    accept(&mut *vcpu, &vm, 0, 1)?;
    claim_eq!(vcpu.execute(check(0, 0)), Exit::Done(0), "the page that came back");
    Ok(())
}

fn page_is_accepted_once(cx: &Context) -> TestResult {
    let vm = GmemVm::new(cx, 1)?;
    let mut vcpu = vm.vcpu(0)?;
    accept(&mut *vcpu, &vm, 0, 1)?;
    claim_eq!(vcpu.execute(GuestOp::write_u64(vm.gpa(0), 0x77)), Exit::Done(0), "the guest's store");
    let again = GuestOp::Accept { gpa: vm.gpa(0), len: PAGE_SIZE, level: 0 };
    claim_eq!(vcpu.execute(again), Exit::Done(ALREADY_ACCEPTED), "the status of accepting it again");
    claim_eq!(vcpu.execute(GuestOp::read_u64(vm.gpa(0))), Exit::Done(0x77), "what is in it");
    Ok(())
}

fn acceptance_of_another_size_is_refused(cx: &Context) -> TestResult {
    if cx.machine().spec().to_string().contains("kernel=huge") {
        gmemtest::skip!(Declined, "this kernel maps 2 MiB at once");
    }
    let vm = GmemVm::new(cx, CHUNK)?;
    let mut vcpu = vm.vcpu(0)?;
    let op = GuestOp::Accept { gpa: vm.gpa(0), len: CHUNK * PAGE_SIZE, level: 1 };
    let exit = vcpu.execute(op);
    claim!(matches!(exit, Exit::Done(status) if status >> 32 == SIZE_MISMATCH), "accepting 2 MiB at once: {exit:x?}");
    accept(&mut *vcpu, &vm, 0, 2)
}

fn shared_page_is_the_hosts_memory(cx: &Context) -> TestResult {
    let vm = GmemVm::private(cx, 2)?;
    let mut vcpu = vm.vcpu(0)?;
    accept(&mut *vcpu, &vm, 0, 1)?;
    claim_eq!(vcpu.execute(GuestOp::write_u64(vm.gpa(0), 1)), Exit::Done(0), "a store to private memory");
    vm.set_attributes(PAGE_SIZE, PAGE_SIZE, 0)?;
    let shared = vm.gpa(PAGE_SIZE) | vm.vm.shared_bit();
    claim_eq!(vcpu.execute(GuestOp::write_u64(shared, 2)), Exit::Done(0), "a store to shared memory");
    claim_eq!(claim_ok!(vm.shared.read_u64(PAGE_SIZE)), 2, "what the host finds there");
    claim_eq!(claim_ok!(vm.shared.read_u64(0)), 0, "what it finds where the private page would be");
    claim_ok!(vm.shared.write_u64(PAGE_SIZE + 8, 3));
    claim_eq!(vcpu.execute(GuestOp::read_u64(shared + 8)), Exit::Done(3), "what the guest finds of the host's store");
    claim_eq!(vcpu.execute(GuestOp::read_u64(vm.gpa(0))), Exit::Done(1), "what is in the private page");
    Ok(())
}

/// A TD that its guest has ended, with a second vCPU and four private pages.
struct Dead {
    vcpu: Box<dyn Vcpu>,
    other: Box<dyn Vcpu>,
    td: Td,
    memory: TdMemory,
}

fn dead(cx: &Context) -> TestResult<Dead> {
    let td = Td::with_payload(cx, 2)?;
    let (mut vcpu, other) = (td.vcpu(0)?, td.vcpu(1)?);
    let memory = td.memory(cx, 4)?;
    claim_eq!(td.finalize()?, TdxAnswer::OK, "KVM_TDX_FINALIZE_VM");
    let exit = vcpu.execute(GuestOp::read_u64(memory.gpa(0)));
    claim_matches!(exit, Exit::Failed { errno: Errno::EIO, .. }, "the load from a page that was not accepted");
    Ok(Dead { vcpu, other, td, memory })
}

fn access_before_acceptance_ends_the_td(cx: &Context) -> TestResult {
    let Dead { mut vcpu, mut other, td, memory } = dead(cx)?;
    for (name, vcpu) in [("that vCPU", &mut vcpu), ("the other vCPU", &mut other)] {
        let exit = vcpu.execute(GuestOp::read_u64(memory.gpa(1)));
        claim_matches!(exit, Exit::Failed { errno: Errno::EIO, .. }, "KVM_RUN of {name}");
    }
    claim_err!(td.vm.capability(0), Errno::EIO, "KVM_CHECK_EXTENSION");
    Ok(())
}

fn every_ioctl_of_a_dead_vm_is_eio(cx: &Context) -> TestResult {
    let Dead { mut vcpu, other: _other, td, memory } = dead(cx)?;
    let vm = &td.vm;
    claim_err!(vm.capability(0), Errno::EIO, "KVM_CHECK_EXTENSION");
    claim_err!(vm.enable_capability(KVM_CAP_EXIT_HYPERCALL, ENABLE), Errno::EIO, "KVM_ENABLE_CAP");
    claim_err!(vm.create_guest_memfd(PAGE_SIZE, 0), Errno::EIO, "KVM_CREATE_GUEST_MEMFD");
    claim_err!(vm.set_memory_region(&MemoryRegion::deletion(Td::SLOT)), Errno::EIO, "deleting the slot");
    claim_err!(vm.create_vcpu(7), Errno::EIO, "KVM_CREATE_VCPU");
    if cx.has(Facility::KvmStats) {
        claim_err!(vm.statistic("pages_4k"), Errno::EIO, "KVM_GET_STATS_FD");
    }
    let Some(tdx) = vm.tdx() else { gmemtest::fail!("the machine's VMs have no KVM_MEMORY_ENCRYPT_OP") };
    let finalize = tdx.command(TdxCommand::new(KVM_TDX_FINALIZE_VM, TdxData::Value(0)));
    claim_eq!(finalize, TdxAnswer::failed(Errno::EIO), "KVM_TDX_FINALIZE_VM");
    claim_err!(tdx.unreadable_command(), Errno::EIO, "KVM_MEMORY_ENCRYPT_OP with an argument that is not mapped");
    let prefault = vcpu.pre_fault(memory.gpa(0), PAGE_SIZE, 0);
    claim_eq!((prefault.result, prefault.size), (Err(Errno::EIO), PAGE_SIZE), "KVM_PRE_FAULT_MEMORY");
    Ok(())
}

fn file_outlives_its_vm(cx: &Context) -> TestResult {
    let Dead { vcpu, other, td, memory } = dead(cx)?;
    let TdMemory { gmem, shared, source, .. } = memory;
    claim_ok!(gmem.fallocate(libc::FALLOC_FL_KEEP_SIZE, 0, 4 * PAGE_SIZE as i64), "allocating");
    let punch = libc::FALLOC_FL_KEEP_SIZE | libc::FALLOC_FL_PUNCH_HOLE;
    claim_ok!(gmem.fallocate(punch, 0, 4 * PAGE_SIZE as i64), "punching a hole");
    claim_eq!(claim_ok!(gmem.stat()).size, 4 * PAGE_SIZE as i64, "the size");
    drop((vcpu, other, td));
    claim_ok!(gmem.fallocate(libc::FALLOC_FL_KEEP_SIZE, 0, PAGE_SIZE as i64), "allocating, with only the file open");
    drop((gmem, shared, source));
    GmemVm::new(cx, 1).map(drop)
}

/// The stand-alone binary.
pub fn main() -> std::process::ExitCode {
    gmemtest::cli::selftest_main(&[&SUITE])
}
