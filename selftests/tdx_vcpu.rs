//! vCPUs of a TD: when they can be made, initialised and run.

use gmemtest::harness::{Context, Td, TestResult, command_on, set_cpuid};
use gmemtest::machine::{Errno, Exit, TdxAnswer, TdxCommand, TdxCpuid, TdxData, Vcpu};
use gmemtest::uapi::kvm_x86::{
    KVM_TDX_CAPABILITIES, KVM_TDX_FINALIZE_VM, KVM_TDX_GET_CPUID, KVM_TDX_INIT_MEM_REGION, KVM_TDX_INIT_VCPU,
    KVM_TDX_INIT_VM,
};
use gmemtest::{claim, claim_eq, claim_err, claim_matches, fail};

gmemtest::suite! {
    /// vCPUs of a TD (6.16): KVM_CREATE_VCPU in each state, KVM_TDX_INIT_VCPU, KVM_TDX_GET_CPUID and KVM_RUN, with each
    /// errno of arch/x86/kvm/vmx/tdx.c in the order of its checks.
    pub static SUITE: tdx_vcpu needs [Vm, Tdx] {
        /// KVM_CREATE_VCPU is EIO unless the TD is exactly initialised: not before KVM_TDX_INIT_VM and not after
        /// KVM_TDX_FINALIZE_VM (tdx_vcpu_create()). A failure makes a vCPU that the measurement does not know of.
        vcpu_is_made_between_initialization_and_finalization;

        /// KVM_CREATE_VCPU of an id that is there is EEXIST (kvm_vm_ioctl_create_vcpu()), after the vCPU was made. A failure, or
        /// a kernel that complains, means that a vCPU which is refused leaves something behind.
        id_is_taken_once;

        /// Without a split irqchip KVM_CREATE_VCPU is EINVAL, and EIO comes before that (tdx_vcpu_create()). A failure
        /// means a TD without a local APIC.
        vcpu_needs_a_split_irqchip;

        /// An argument that cannot be read is EFAULT, hw_error other than 0 is EINVAL (tdx_get_cmd()), and neither needs
        /// the TD to be in a certain state; until 6.18 that comes first. A failure means that a command is made of garbage.
        malformed_command_is_refused;

        /// An id that is unknown, or belongs to the VM, is EINVAL (tdx_vcpu_ioctl()). A failure means that future commands
        /// cannot be told from those that do nothing.
        command_that_is_not_a_vcpus_is_refused[NOT_OF_VCPU];

        /// KVM_TDX_INIT_VCPU with flags is EINVAL, and can be made good (tdx_vcpu_init()). A failure means that flags of
        /// the future are ignored.
        initialization_takes_no_flags;

        /// A vCPU is initialised once: EINVAL from then on (tdx_vcpu_init()). A failure lets the host reset a vCPU.
        second_initialization_is_refused;

        /// KVM_TDX_INIT_VCPU is EINVAL until CPUID says that the guest has x2APIC: KVM_SET_CPUID2 comes first, though the
        /// documentation lists it after (tdx_vcpu_init(), kvm_apic_set_base()). A failure means a guest whose APIC KVM and
        /// the module see differently.
        initialization_needs_x2apic;

        /// After KVM_TDX_FINALIZE_VM every sub-command on a vCPU is EINVAL, KVM_TDX_GET_CPUID too
        /// (tdx_vcpu_unlocked_ioctl(), tdx_vcpu_ioctl()). A failure lets the host change a TD that has been measured.
        nothing_is_taken_after_finalization[OF_VCPU];

        /// KVM_TDX_GET_CPUID with too short a list is E2BIG and tells how many entries there are, unlike
        /// KVM_TDX_CAPABILITIES (tdx_vcpu_get_cpuid()). A failure breaks the loop of every VMM.
        cpuid_tells_how_many_entries_there_are;

        /// KVM_TDX_GET_CPUID looks at no flags as of 7.3, and an unreadable list is EFAULT. A failure means that this has
        /// changed: the documentation, which wants them 0, is right now.
        cpuid_looks_at_no_flags;

        /// KVM_RUN of the first vCPU is EINVAL before KVM_TDX_INIT_VCPU and before KVM_TDX_FINALIZE_VM
        /// (tdx_vcpu_pre_run()). A failure enters a guest that is not complete.
        vcpu_does_not_run_before_finalization;
    }
}

const NOT_OF_VCPU: &[(&str, u32)] = &[
    ("capabilities", KVM_TDX_CAPABILITIES),
    ("init_vm", KVM_TDX_INIT_VM),
    ("finalize_vm", KVM_TDX_FINALIZE_VM),
    ("first_free", 6),
    ("highest", u32::MAX),
];

const OF_VCPU: &[(&str, u32)] = &[
    ("init_vcpu", KVM_TDX_INIT_VCPU),
    ("init_mem_region", KVM_TDX_INIT_MEM_REGION),
    ("get_cpuid", KVM_TDX_GET_CPUID),
    ("unknown", 99),
];

/// The result of a sub-command with a number for data.
fn result(vcpu: &mut dyn Vcpu, id: u32, flags: u32, value: u64) -> TestResult<Result<(), Errno>> {
    let command = TdxCommand::new(id, TdxData::Value(value)).with_flags(flags);
    Ok(command_on(vcpu, command)?.result)
}

const EINVAL: Result<(), Errno> = Err(Errno::EINVAL);

fn vcpu_is_made_between_initialization_and_finalization(cx: &Context) -> TestResult {
    let td = Td::bare(cx)?;
    td.split_irqchip()?;
    claim_err!(td.vm.create_vcpu(0), Errno::EIO, "KVM_CREATE_VCPU before KVM_TDX_INIT_VM");
    let init = td.configuration()?;
    claim_eq!(td.init_vm(&init)?, TdxAnswer::OK, "KVM_TDX_INIT_VM");
    let _vcpu = td.ready_vcpu(0)?;
    claim_eq!(td.finalize()?, TdxAnswer::OK, "KVM_TDX_FINALIZE_VM");
    claim_err!(td.vm.create_vcpu(1), Errno::EIO, "KVM_CREATE_VCPU after KVM_TDX_FINALIZE_VM");
    Ok(())
}

fn id_is_taken_once(cx: &Context) -> TestResult {
    if cx.by_release(&[((6, 16), true), ((6, 19), false)])? {
        // Measured on 6.18.15: "list_add corruption" at every vcpu_load() from then on, in this VM and in others.
        gmemtest::skip!(
            Declined,
            "the vCPU that is refused stays in KVM's list of TD vCPUs of the CPU (associated_tdvcpus) when it is freed, until 6.18"
        );
    }
    let td = Td::initialized(cx)?;
    let _vcpu = td.ready_vcpu(0)?;
    claim_err!(td.vm.create_vcpu(0), Errno::EEXIST, "KVM_CREATE_VCPU of the same id");
    td.ready_vcpu(1)?;
    claim_eq!(td.finalize()?, TdxAnswer::OK, "KVM_TDX_FINALIZE_VM");
    Ok(())
}

fn vcpu_needs_a_split_irqchip(cx: &Context) -> TestResult {
    let td = Td::bare(cx)?;
    claim_err!(td.vm.create_vcpu(0), Errno::EIO, "before KVM_TDX_INIT_VM, without a split irqchip");
    let init = td.configuration()?;
    claim_eq!(td.init_vm(&init)?, TdxAnswer::OK, "KVM_TDX_INIT_VM without a split irqchip");
    claim_err!(td.vm.create_vcpu(0), Errno::EINVAL, "KVM_CREATE_VCPU without a split irqchip");
    td.split_irqchip()?;
    td.ready_vcpu(0)?;
    Ok(())
}

fn malformed_command_is_refused(cx: &Context) -> TestResult {
    let td = Td::initialized(cx)?;
    let mut vcpu = td.vcpu(0)?;
    let Some(tdx) = vcpu.tdx() else { fail!("the machine's vCPUs have no KVM_MEMORY_ENCRYPT_OP") };
    claim_err!(tdx.unreadable_command(), Errno::EFAULT, "with an argument that is not mapped");
    for id in [KVM_TDX_INIT_VCPU, KVM_TDX_INIT_MEM_REGION, KVM_TDX_GET_CPUID, 99] {
        let command = TdxCommand::new(id, TdxData::Value(0)).with_hw_error(1);
        let answer = command_on(&mut *vcpu, command)?;
        claim_eq!((answer.result, answer.hw_error.0), (EINVAL, 1), "command {id} with a status in it");
    }
    let cpuid = td.vcpu_cpuid(&mut *vcpu)?;
    set_cpuid(&mut *vcpu, &cpuid)?;
    claim_eq!(result(&mut *vcpu, KVM_TDX_INIT_VCPU, 0, 0)?, Ok(()), "KVM_TDX_INIT_VCPU afterwards");
    claim_eq!(td.finalize()?, TdxAnswer::OK, "KVM_TDX_FINALIZE_VM");
    let Some(tdx) = vcpu.tdx() else { fail!("the machine's vCPUs have no KVM_MEMORY_ENCRYPT_OP") };
    // Until 6.18 the state of the TD is looked at first.
    let errno = cx.by_release(&[((6, 16), Errno::EINVAL), ((6, 19), Errno::EFAULT)])?;
    claim_err!(tdx.unreadable_command(), errno, "with an argument that is not mapped, after finalisation");
    Ok(())
}

fn command_that_is_not_a_vcpus_is_refused(cx: &Context, &id: &u32) -> TestResult {
    let td = Td::initialized(cx)?;
    let mut vcpu = td.vcpu(0)?;
    claim_eq!(result(&mut *vcpu, id, 0, 0)?, EINVAL, "command {id} on a vCPU");
    let mut ready = td.ready_vcpu(1)?;
    claim_eq!(result(&mut *ready, id, 0, 0)?, EINVAL, "command {id} on a vCPU that is initialised");
    Ok(())
}

fn initialization_takes_no_flags(cx: &Context) -> TestResult {
    let td = Td::initialized(cx)?;
    let mut vcpu = td.vcpu(0)?;
    let cpuid = td.vcpu_cpuid(&mut *vcpu)?;
    set_cpuid(&mut *vcpu, &cpuid)?;
    for flags in [1, 1 << 31] {
        claim_eq!(result(&mut *vcpu, KVM_TDX_INIT_VCPU, flags, 0)?, EINVAL, "flags {flags:#x}");
    }
    claim_eq!(result(&mut *vcpu, KVM_TDX_INIT_VCPU, 0, 0)?, Ok(()), "without flags");
    Ok(())
}

fn second_initialization_is_refused(cx: &Context) -> TestResult {
    let td = Td::initialized(cx)?;
    let mut vcpu = td.ready_vcpu(0)?;
    claim_eq!(result(&mut *vcpu, KVM_TDX_INIT_VCPU, 0, 0)?, EINVAL, "KVM_TDX_INIT_VCPU again");
    let mut other = td.ready_vcpu(1)?;
    claim_eq!(result(&mut *other, KVM_TDX_INIT_VCPU, 0, 0x1000)?, EINVAL, "of another vCPU, with another RCX");
    Ok(())
}

fn initialization_needs_x2apic(cx: &Context) -> TestResult {
    const X2APIC: u32 = 1 << 21;
    let td = Td::initialized(cx)?;
    let mut vcpu = td.vcpu(0)?;
    claim_eq!(result(&mut *vcpu, KVM_TDX_INIT_VCPU, 0, 0)?, EINVAL, "before KVM_SET_CPUID2");
    let cpuid = td.vcpu_cpuid(&mut *vcpu)?;
    claim!(cpuid.iter().any(|entry| entry.function == 1), "leaf 1 is there to be changed");
    let mut without = cpuid.clone();
    for entry in without.iter_mut().filter(|entry| entry.function == 1) {
        entry.ecx &= !X2APIC;
    }
    set_cpuid(&mut *vcpu, &without)?;
    claim_eq!(result(&mut *vcpu, KVM_TDX_INIT_VCPU, 0, 0)?, EINVAL, "with a CPUID that has no x2APIC");
    set_cpuid(&mut *vcpu, &cpuid)?;
    claim_eq!(result(&mut *vcpu, KVM_TDX_INIT_VCPU, 0, 0)?, Ok(()), "with one that has");
    Ok(())
}

fn nothing_is_taken_after_finalization(cx: &Context, &id: &u32) -> TestResult {
    let td = Td::initialized(cx)?;
    let mut ready = td.ready_vcpu(0)?;
    let mut other = td.vcpu(1)?;
    claim_eq!(td.finalize()?, TdxAnswer::OK, "KVM_TDX_FINALIZE_VM");
    for vcpu in [&mut ready, &mut other] {
        claim_eq!(result(&mut **vcpu, id, 0, 0)?, EINVAL, "command {id} after KVM_TDX_FINALIZE_VM");
        let mut list = TdxCpuid::with_room(256);
        let command = TdxCommand::new(id, TdxData::Cpuid(&mut list));
        claim_eq!(command_on(&mut **vcpu, command)?.result, EINVAL, "command {id} with memory that can be written");
    }
    Ok(())
}

fn cpuid_tells_how_many_entries_there_are(cx: &Context) -> TestResult {
    let td = Td::initialized(cx)?;
    let mut vcpu = td.vcpu(0)?;
    let mut list = TdxCpuid::with_room(1);
    let command = TdxCommand::new(KVM_TDX_GET_CPUID, TdxData::Cpuid(&mut list));
    claim_eq!(command_on(&mut *vcpu, command)?.result, Err(Errno::E2BIG), "with room for one entry");
    let needed = list.head.nent;
    claim!(needed > 1, "the count afterwards is {needed}");
    for (room, expected) in [(needed - 1, Err(Errno::E2BIG)), (needed, Ok(()))] {
        let mut list = TdxCpuid::with_room(room);
        let command = TdxCommand::new(KVM_TDX_GET_CPUID, TdxData::Cpuid(&mut list));
        claim_eq!(command_on(&mut *vcpu, command)?.result, expected, "with room for {room} of {needed} entries");
        claim_eq!(list.head.nent, needed, "the count afterwards, with room for {room}");
    }
    Ok(())
}

fn cpuid_looks_at_no_flags(cx: &Context) -> TestResult {
    let td = Td::initialized(cx)?;
    let mut vcpu = td.vcpu(0)?;
    let mut list = TdxCpuid::with_room(256);
    let command = TdxCommand::new(KVM_TDX_GET_CPUID, TdxData::Cpuid(&mut list)).with_flags(u32::MAX);
    claim_eq!(command_on(&mut *vcpu, command)?.result, Ok(()), "KVM_TDX_GET_CPUID with flags");
    let nowhere = TdxCommand::new(KVM_TDX_GET_CPUID, TdxData::NOWHERE);
    claim_eq!(command_on(&mut *vcpu, nowhere)?.result, Err(Errno::EFAULT), "with a list that is not mapped");
    Ok(())
}

fn vcpu_does_not_run_before_finalization(cx: &Context) -> TestResult {
    let td = Td::initialized(cx)?;
    let mut vcpu = td.vcpu(0)?;
    claim_matches!(vcpu.run(), Exit::Failed { errno: Errno::EINVAL, .. }, "KVM_RUN before KVM_TDX_INIT_VCPU");
    let cpuid = td.vcpu_cpuid(&mut *vcpu)?;
    set_cpuid(&mut *vcpu, &cpuid)?;
    claim_eq!(result(&mut *vcpu, KVM_TDX_INIT_VCPU, 0, 0)?, Ok(()), "KVM_TDX_INIT_VCPU");
    claim_matches!(vcpu.run(), Exit::Failed { errno: Errno::EINVAL, .. }, "KVM_RUN before KVM_TDX_FINALIZE_VM");
    Ok(())
}

/// The stand-alone binary.
pub fn main() -> std::process::ExitCode {
    gmemtest::cli::selftest_main(&[&SUITE])
}
