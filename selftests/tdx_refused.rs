//! What a TD refuses that other VMs do, and what other VMs refuse that a TD does.

use gmemtest::harness::{Context, Td, TestResult};
use gmemtest::machine::{
    Errno, Facility, HostMemory, MemoryRegion, PAGE_SIZE, TdxAnswer, TdxCommand, TdxData, VmConfig,
};
use gmemtest::uapi::kvm::{GUEST_MEMFD_FLAG_INIT_SHARED, KVM_MEM_READONLY};
use gmemtest::uapi::kvm_x86::{KVM_TDX_CAPABILITIES, KVM_TDX_FINALIZE_VM, KVM_TDX_INIT_VCPU, KVM_TDX_INIT_VM};
use gmemtest::{claim_eq, claim_err, claim_matches, claim_ok, fail, skip};

gmemtest::suite! {
    /// Calls that a TD does not take (6.16), and KVM_MEMORY_ENCRYPT_OP on VMs that are no TDs.
    pub static SUITE: tdx_refused needs [Vm] {
        /// KVM_MEMORY_ENCRYPT_OP of the KVM_TDX_* kind on a VM of another type is ENOTTY, before the argument is read
        /// (vt_mem_enc_ioctl()). A failure touches TDX state that is not there.
        command_on_another_vm_is_enotty[IDS];

        /// On a vCPU of a VM of another type it is EINVAL where KVM has TDX built in, ENOTTY where it has not
        /// (vt_vcpu_mem_enc_ioctl()). A failure touches TDX state that is not there.
        command_on_another_vcpu_is_refused[IDS];

        /// A slot that reaches into the half with the SHARED bit is EINVAL once the TD is initialised; before that KVM does
        /// not know the bit (kvm_alloc_memslot_metadata(), tdx_td_init()). A failure gives one page two addresses.
        slot_in_the_shared_half_is_refused needs [Tdx];

        /// A read-only slot is EINVAL (kvm_arch_has_readonly_mem()). A failure lets the host trap the guest's stores.
        read_only_slot_is_refused needs [Tdx];

        /// A slot in a second address space is EINVAL: a TD has no SMM. A failure gives the guest memory that it cannot
        /// know of.
        second_address_space_is_refused needs [Tdx];

        /// A guest_memfd with INIT_SHARED is EINVAL where memory attributes are the VM's (kvm_gmem_create()). A failure
        /// lets the host map what the guest takes for private.
        initially_shared_file_is_refused needs [Tdx, GuestMemfd];
    }
}

const IDS: &[(&str, u32)] = &[
    ("capabilities", KVM_TDX_CAPABILITIES),
    ("init_vm", KVM_TDX_INIT_VM),
    ("init_vcpu", KVM_TDX_INIT_VCPU),
    ("finalize_vm", KVM_TDX_FINALIZE_VM),
    ("unknown", 99),
];

fn is_no_td(cx: &Context) -> TestResult {
    if cx.has(Facility::Tdx) {
        skip!(Declined, "the VM is a TD");
    }
    Ok(())
}

fn command_on_another_vm_is_enotty(cx: &Context, &id: &u32) -> TestResult {
    is_no_td(cx)?;
    let vm = claim_ok!(cx.machine().create_vm(VmConfig::Bare));
    let Some(tdx) = vm.tdx() else { fail!("the machine's VMs have no KVM_MEMORY_ENCRYPT_OP") };
    claim_eq!(tdx.command(TdxCommand::new(id, TdxData::Value(0))).result, Err(Errno::ENOTTY), "command {id}");
    claim_err!(tdx.unreadable_command(), Errno::ENOTTY, "with an argument that is not mapped");
    Ok(())
}

fn command_on_another_vcpu_is_refused(cx: &Context, &id: &u32) -> TestResult {
    is_no_td(cx)?;
    let vm = claim_ok!(cx.machine().create_vm(VmConfig::Bare));
    let mut vcpu = claim_ok!(vm.create_vcpu(0));
    let Some(tdx) = vcpu.tdx() else { fail!("the machine's vCPUs have no KVM_MEMORY_ENCRYPT_OP") };
    let answer = tdx.command(TdxCommand::new(id, TdxData::Value(0))).result;
    claim_matches!(answer, Err(Errno::EINVAL | Errno::ENOTTY), "command {id} on a vCPU");
    claim_eq!(tdx.unreadable_command(), answer, "with an argument that is not mapped");
    Ok(())
}

fn slot_in_the_shared_half_is_refused(cx: &Context) -> TestResult {
    let memory = claim_ok!(cx.machine().host_memory(HostMemory::Anonymous, 2 * PAGE_SIZE));
    let td = Td::bare(cx)?;
    let shared = td.vm.shared_bit();
    let at = |gpa, size| MemoryRegion::new(1, gpa, size).at(memory.addr());
    claim_ok!(td.vm.set_memory_region(&at(shared, PAGE_SIZE)), "before KVM_TDX_INIT_VM");
    claim_ok!(td.vm.set_memory_region(&MemoryRegion::deletion(1)));
    let init = td.configuration()?;
    claim_eq!(td.init_vm(&init)?, TdxAnswer::OK, "KVM_TDX_INIT_VM");
    for (what, gpa, size) in [
        ("above the bit", shared, PAGE_SIZE),
        ("far above the bit", shared + (1 << 40), PAGE_SIZE),
        ("across the bit", shared - PAGE_SIZE, 2 * PAGE_SIZE),
    ] {
        claim_err!(td.vm.set_memory_region(&at(gpa, size)), Errno::EINVAL, "a slot {what}");
    }
    claim_ok!(td.vm.set_memory_region(&at(shared - PAGE_SIZE, PAGE_SIZE)), "the last page below the bit");
    Ok(())
}

fn read_only_slot_is_refused(cx: &Context) -> TestResult {
    let memory = claim_ok!(cx.machine().host_memory(HostMemory::Anonymous, PAGE_SIZE));
    let td = Td::initialized(cx)?;
    let slot = MemoryRegion::new(1, Td::GPA, PAGE_SIZE).at(memory.addr());
    claim_err!(td.vm.set_memory_region(&slot.with_flags(KVM_MEM_READONLY)), Errno::EINVAL, "a read-only slot");
    claim_ok!(td.vm.set_memory_region(&slot));
    Ok(())
}

fn second_address_space_is_refused(cx: &Context) -> TestResult {
    let memory = claim_ok!(cx.machine().host_memory(HostMemory::Anonymous, PAGE_SIZE));
    let td = Td::initialized(cx)?;
    let slot = MemoryRegion::new(1 << 16 | 1, Td::GPA, PAGE_SIZE).at(memory.addr());
    claim_err!(td.vm.set_memory_region(&slot), Errno::EINVAL, "a slot in address space 1");
    Ok(())
}

fn initially_shared_file_is_refused(cx: &Context) -> TestResult {
    if cx.has(Facility::InPlaceConversion) {
        skip!(Declined, "with in-place conversion a TD's file may start shared");
    }
    let td = Td::initialized(cx)?;
    let created = td.vm.create_guest_memfd(PAGE_SIZE, GUEST_MEMFD_FLAG_INIT_SHARED);
    claim_err!(created, Errno::EINVAL, "a guest_memfd with INIT_SHARED");
    claim_ok!(td.vm.create_guest_memfd(PAGE_SIZE, 0));
    Ok(())
}

/// The stand-alone binary.
pub fn main() -> std::process::ExitCode {
    gmemtest::cli::selftest_main(&[&SUITE])
}
