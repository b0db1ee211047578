//! VM types and what a capability says at system scope and at VM scope.

use gmemtest::harness::{Context, TestResult};
use gmemtest::machine::{Errno, Facility, MemoryAttributes, PAGE_SIZE, VmConfig, VmType};
use gmemtest::uapi::kvm::{
    GUEST_MEMFD_FLAG_INIT_SHARED, GUEST_MEMFD_FLAG_MMAP, KVM_CAP_GUEST_MEMFD_FLAGS,
    KVM_CAP_GUEST_MEMFD_MEMORY_ATTRIBUTES_RFC_V5, KVM_CAP_PRE_FAULT_MEMORY, KVM_MEMORY_ATTRIBUTE_PRIVATE,
};
use gmemtest::uapi::kvm_para::KVM_HC_MAP_GPA_RANGE;
use gmemtest::{claim, claim_eq, claim_err, claim_ok, skip};
use kvm_bindings::{
    KVM_CAP_EXIT_HYPERCALL, KVM_CAP_GUEST_MEMFD, KVM_CAP_MEMORY_ATTRIBUTES, KVM_CAP_MEMORY_FAULT_INFO,
    KVM_CAP_MULTI_ADDRESS_SPACE, KVM_CAP_NR_MEMSLOTS, KVM_CAP_USER_MEMORY2, KVM_CAP_VM_TYPES,
};

gmemtest::suite! {
    /// KVM_CREATE_VM and the capabilities of guest_memfd: which VM types there are, and what each of them offers.
    pub static SUITE: vm_types needs [Vm] {
        /// A type whose bit is set in KVM_CAP_VM_TYPES makes a VM, every other is EINVAL (kvm_arch_init_vm();
        /// vm_types_test). A failure means that user space cannot tell which VMs it may ask for.
        type_is_created_exactly_when_advertised[TYPES] needs [VmTypes];

        /// A type number beyond 31 has no bit and is EINVAL, whatever its low bits are. A failure means that the number is
        /// cut off.
        large_type_is_refused[LARGE];

        /// KVM_X86_DEFAULT_VM is always offered. A failure means that ordinary VMs cannot be made.
        default_type_is_always_there needs [VmTypes];

        /// KVM_CAP_VM_TYPES says the same at system and VM scope (kvm_vm_ioctl_check_extension()). A failure means that the
        /// scopes disagree about what is the same question.
        types_are_the_same_at_both_scopes needs [VmTypes];

        /// KVM_CAP_GUEST_MEMFD is 1 at both scopes. A failure means that user space that asks the VM misses guest_memfd.
        guest_memfd_is_the_same_at_both_scopes needs [GuestMemfd];

        /// At system scope KVM_CAP_GUEST_MEMFD_FLAGS is the union over VM types: MMAP and INIT_SHARED. A failure means that
        /// a flag appeared or went.
        all_flags_are_offered_at_system_scope needs [GmemMmap];

        /// At VM scope KVM_CAP_GUEST_MEMFD_FLAGS has INIT_SHARED only for a VM without private memory
        /// (kvm_arch_supports_gmem_init_shared()), or where the file itself converts between the two (in-place conversion
        /// series). A failure offers host-readable memory to confidential VMs that cannot convert it.
        flags_of_the_vm_follow_its_private_memory needs [GmemMmap];

        /// KVM_CAP_MEMORY_ATTRIBUTES at VM scope is PRIVATE for a VM with private memory and 0 otherwise, whatever the
        /// system scope says (kvm_supported_mem_attributes()); PRIVATE is no attribute of a VM where it is one of the file.
        /// A failure means that a default VM seems to be convertible, or that a page has two attributes.
        attributes_of_the_vm_follow_its_private_memory;

        /// A VM without private memory refuses PRIVATE and accepts attributes 0 as a call with nothing to do, where the
        /// ioctl is there at all (kvm_vm_ioctl_set_mem_attributes()). A failure means that a VM takes attributes that it
        /// does not have.
        default_vm_takes_no_attributes;

        /// KVM_CAP_MULTI_ADDRESS_SPACE at VM scope never offers a VM with private memory a second address space. A failure
        /// means that SMM is offered where it cannot be protected.
        private_vm_has_one_address_space needs [PrivateMemory];

        /// Capabilities that come with guest_memfd are at least what the ABI says. A failure means that user space that
        /// checks them will not use guest_memfd.
        capability_is_advertised[ADVERTISED];
    }
}

macro_rules! types {
    ($($number:literal)*) => { &[$((concat!("type_", $number), $number)),*] };
}

const TYPES: &[(&str, u64)] = types! {
    0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31
    32 33 34 35 36 37 38 39 40 41 42 43 44 45 46 47 48 49 50 51 52 53 54 55 56 57 58 59 60 61 62 63
};

fn type_is_created_exactly_when_advertised(cx: &Context, &number: &u64) -> TestResult {
    let types = claim_ok!(cx.machine().capability(KVM_CAP_VM_TYPES)) as u32;
    let advertised = number < 32 && types >> number & 1 == 1;
    let expected = if advertised { Ok(()) } else { Err(Errno::EINVAL) };
    claim_eq!(cx.machine().try_vm_type(number), expected, "KVM_CREATE_VM({number}) with KVM_CAP_VM_TYPES {types:#x}");
    Ok(())
}

const LARGE: &[(&str, u64)] = &[
    ("bit_8", 1 << 8),
    ("bit_31", 1 << 31),
    ("bit_31_and_sw_protected", 1 << 31 | 1),
    ("bit_32", 1 << 32),
    ("bit_32_and_sw_protected", 1 << 32 | 1),
    ("all_bits", u64::MAX),
];

fn large_type_is_refused(cx: &Context, &number: &u64) -> TestResult {
    claim_err!(cx.machine().try_vm_type(number), Errno::EINVAL, "KVM_CREATE_VM({number:#x})");
    Ok(())
}

fn default_type_is_always_there(cx: &Context) -> TestResult {
    if cx.machine().spec().has_simulated_module() {
        skip!(NoHardware, "the CPU on which the simulated TDX module stands in has no VMX, which default VMs need");
    }
    claim_eq!(claim_ok!(cx.machine().capability(KVM_CAP_VM_TYPES)) & 1, 1, "bit 0 of KVM_CAP_VM_TYPES");
    Ok(())
}

/// A capability at system and at VM scope.
fn scopes(cx: &Context, capability: u32) -> TestResult<(i32, i32)> {
    let vm = claim_ok!(cx.machine().create_vm(VmConfig::Bare));
    Ok((claim_ok!(cx.machine().capability(capability)), claim_ok!(vm.capability(capability))))
}

fn types_are_the_same_at_both_scopes(cx: &Context) -> TestResult {
    let (system, vm) = scopes(cx, KVM_CAP_VM_TYPES)?;
    claim_eq!(vm, system, "KVM_CAP_VM_TYPES of the VM and of the system");
    Ok(())
}

fn guest_memfd_is_the_same_at_both_scopes(cx: &Context) -> TestResult {
    claim_eq!(scopes(cx, KVM_CAP_GUEST_MEMFD)?, (1, 1), "KVM_CAP_GUEST_MEMFD of the system and of the VM");
    Ok(())
}

const BOTH_FLAGS: u64 = GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED;

fn all_flags_are_offered_at_system_scope(cx: &Context) -> TestResult {
    let flags = claim_ok!(cx.machine().capability(KVM_CAP_GUEST_MEMFD_FLAGS)) as u64;
    claim_eq!(flags, BOTH_FLAGS, "KVM_CAP_GUEST_MEMFD_FLAGS of the system");
    Ok(())
}

fn flags_of_the_vm_follow_its_private_memory(cx: &Context) -> TestResult {
    let (_, vm) = scopes(cx, KVM_CAP_GUEST_MEMFD_FLAGS)?;
    let private = cx.machine().spec().vm_type.has_private_memory();
    let expected = if private && !cx.has(Facility::InPlaceConversion) { GUEST_MEMFD_FLAG_MMAP } else { BOTH_FLAGS };
    claim_eq!(vm as u64, expected, "KVM_CAP_GUEST_MEMFD_FLAGS of the VM");
    Ok(())
}

fn attributes_of_the_vm_follow_its_private_memory(cx: &Context) -> TestResult {
    let (system, vm) = scopes(cx, KVM_CAP_MEMORY_ATTRIBUTES)?;
    let of_the_vm = cx.machine().spec().vm_type.has_private_memory() && !cx.has(Facility::InPlaceConversion);
    let expected = if of_the_vm { KVM_MEMORY_ATTRIBUTE_PRIVATE as i32 } else { 0 };
    claim_eq!(vm, expected, "KVM_CAP_MEMORY_ATTRIBUTES of the VM");
    claim!(vm & !system == 0, "KVM_CAP_MEMORY_ATTRIBUTES of the VM is within that of the system, {system:#x}");
    Ok(())
}

fn default_vm_takes_no_attributes(cx: &Context) -> TestResult {
    if cx.machine().spec().vm_type != VmType::Default {
        gmemtest::skip!(Declined, "about the default VM type");
    }
    let offered = claim_ok!(cx.machine().capability(KVM_CAP_MEMORY_ATTRIBUTES)) != 0;
    let vm = claim_ok!(cx.machine().create_vm(VmConfig::Bare));
    let range = |attributes| MemoryAttributes { address: 1 << 32, size: PAGE_SIZE, attributes, flags: 0 };
    let result = vm.set_memory_attributes(&range(KVM_MEMORY_ATTRIBUTE_PRIVATE));
    // Without CONFIG_KVM_GENERIC_MEMORY_ATTRIBUTES there is no such ioctl. Where PRIVATE has moved to the file, the ioctl
    // may be left, with no attribute to set.
    let moved = claim_ok!(cx.machine().capability(KVM_CAP_GUEST_MEMFD_MEMORY_ATTRIBUTES_RFC_V5)) != 0;
    let there = offered || moved && result != Err(Errno::ENOTTY);
    let (private, none) = if there { (Errno::EINVAL, Ok(())) } else { (Errno::ENOTTY, Err(Errno::ENOTTY)) };
    claim_err!(result, private, "PRIVATE on a default VM");
    claim_eq!(vm.set_memory_attributes(&range(0)), none, "attributes 0 on a default VM");
    Ok(())
}

fn private_vm_has_one_address_space(cx: &Context) -> TestResult {
    let (_, vm) = scopes(cx, KVM_CAP_MULTI_ADDRESS_SPACE)?;
    claim!(vm <= 1, "KVM_CAP_MULTI_ADDRESS_SPACE of a VM with private memory is {vm}");
    claim!(!cx.has(Facility::SecondAddressSpace), "the facility agrees");
    Ok(())
}

/// A capability, the least value at VM scope, and the release from which it is promised.
type Promise = (u32, i32, (u32, u32));

const ADVERTISED: &[(&str, Promise)] = &[
    ("user_memory2", (KVM_CAP_USER_MEMORY2, 1, (6, 8))),
    ("memory_fault_info", (KVM_CAP_MEMORY_FAULT_INFO, 1, (6, 8))),
    ("nr_memslots", (KVM_CAP_NR_MEMSLOTS, 32764, (5, 12))),
    ("exit_hypercall", (KVM_CAP_EXIT_HYPERCALL, 1 << KVM_HC_MAP_GPA_RANGE, (5, 14))),
    ("pre_fault_memory_is_a_boolean", (KVM_CAP_PRE_FAULT_MEMORY, 0, (6, 11))),
];

fn capability_is_advertised(cx: &Context, &(capability, least, since): &Promise) -> TestResult {
    let least = cx.by_release(&[(since, least)])?;
    let (system, vm) = scopes(cx, capability)?;
    claim!(vm >= least, "capability {capability} of the VM is {vm}, promised {least}");
    claim!(system >= least, "capability {capability} of the system is {system}, promised {least}");
    if capability == KVM_CAP_PRE_FAULT_MEMORY {
        claim!((0..=1).contains(&vm), "KVM_CAP_PRE_FAULT_MEMORY is {vm}");
    }
    Ok(())
}

/// The stand-alone binary.
pub fn main() -> std::process::ExitCode {
    gmemtest::cli::selftest_main(&[&SUITE])
}
