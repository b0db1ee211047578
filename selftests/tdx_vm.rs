//! The sub-commands of KVM_MEMORY_ENCRYPT_OP on the descriptor of a TD.

use gmemtest::harness::{Context, Td, TestResult};
use gmemtest::machine::{CpuidEntry, Errno, TdxAnswer, TdxCapabilities, TdxCommand, TdxData, TdxInitVm};
use gmemtest::uapi::kvm_x86::{
    KVM_TDX_CAPABILITIES, KVM_TDX_FINALIZE_VM, KVM_TDX_GET_CPUID, KVM_TDX_INIT_MEM_REGION, KVM_TDX_INIT_VCPU,
    KVM_TDX_INIT_VM,
};
use gmemtest::{claim, claim_eq, claim_err, fail};

gmemtest::suite! {
    /// KVM_MEMORY_ENCRYPT_OP on a TD's VM (6.16): KVM_TDX_CAPABILITIES, KVM_TDX_INIT_VM and KVM_TDX_FINALIZE_VM, with each
    /// errno of arch/x86/kvm/vmx/tdx.c in the order of its checks.
    pub static SUITE: tdx_vm needs [Vm, Tdx] {
        /// An argument that cannot be read is EFAULT (tdx_get_cmd()). A failure means that a command is made of garbage.
        unreadable_command_is_efault;

        /// A command with hw_error other than 0 is EINVAL, before anything of it is looked at, and is handed back as it was
        /// (tdx_get_cmd()). A failure means that user space's leftovers pass for the module's answer.
        command_with_a_status_is_refused[COMMANDS];

        /// An id that is unknown, or belongs to a vCPU, is EINVAL (tdx_vm_ioctl()). A failure means that future commands
        /// cannot be told from those that do nothing.
        command_that_is_not_the_vms_is_refused[NOT_OF_VM];

        /// KVM_TDX_CAPABILITIES: flags are EINVAL, an unreadable list is EFAULT, too short a list is E2BIG and keeps its
        /// count, so that user space has to try (tdx_get_capabilities()). A failure breaks the loop of every VMM.
        capabilities_are_refused;

        /// What is offered: of the attributes no more than SEPT_VE_DISABLE, XFAM with x87 and SSE, the width of guest
        /// addresses as a configurable leaf, and neither HLE, RTM nor WAITPKG (init_kvm_tdx_caps()). A failure means that a
        /// VMM configures what KVM then refuses, or what KVM cannot virtualise.
        capabilities_are_those_of_kvm;

        /// KVM_TDX_CAPABILITIES may be asked in every state (tdx_vm_ioctl() takes no lock for it). A failure keeps
        /// management tools from looking.
        capabilities_can_be_asked_at_any_time;

        /// KVM_TDX_INIT_VM with a wrong argument is refused with the errno of the first check that fails (tdx_td_init(),
        /// setup_tdparams()), and can be made good afterwards. A failure means that a TD has other properties than its
        /// measurements say, or that a mistake cannot be corrected.
        configuration_is_refused[CONFIGURATIONS];

        /// The checks come in the order of tdx_td_init(): of two mistakes the first one is reported. A failure sends
        /// people to the wrong end of their argument.
        first_mistake_is_reported[PAIRS];

        /// A TD is initialised once: EINVAL from then on, whatever the argument (tdx_td_init()). A failure lets the host
        /// change a TD under its guest.
        second_initialization_is_refused;

        /// KVM_TDX_FINALIZE_VM before KVM_TDX_INIT_VM, and a second time, is EINVAL (tdx_td_finalize()). A failure makes
        /// calls to the module for a TD that is not there.
        finalization_happens_once_after_initialization;

        /// KVM_TDX_FINALIZE_VM looks at neither flags nor data as of 7.3, though the documentation wants them 0. A failure
        /// means that this has changed: the documentation is right now.
        finalization_looks_at_no_argument;
    }
}

/// A command, well formed but for what the test does to it.
const COMMANDS: &[(&str, u32)] = &[
    ("capabilities", KVM_TDX_CAPABILITIES),
    ("init_vm", KVM_TDX_INIT_VM),
    ("finalize_vm", KVM_TDX_FINALIZE_VM),
    ("unknown", 99),
];

const NOT_OF_VM: &[(&str, u32)] = &[
    ("init_vcpu", KVM_TDX_INIT_VCPU),
    ("init_mem_region", KVM_TDX_INIT_MEM_REGION),
    ("get_cpuid", KVM_TDX_GET_CPUID),
    ("first_free", 6),
    ("highest", u32::MAX),
];

/// CPUID leaf of the address widths.
const ADDRESS_SIZES: u32 = 0x8000_0008;
/// HLE and RTM in EBX of leaf 7.
const TSX: u32 = 1 << 4 | 1 << 11;
/// WAITPKG in ECX of leaf 7.
const WAITPKG: u32 = 1 << 5;

/// What is done to an argument that is right, and what comes of it.
struct Mistake {
    apply: fn(&mut TdxInitVm),
    errno: Errno,
}

macro_rules! mistakes {
    ($($name:literal $errno:ident $apply:expr;)+) => {
        &[$(($name, Mistake { apply: $apply, errno: Errno::$errno })),+]
    };
}

const CONFIGURATIONS: &[(&str, Mistake)] = mistakes! {
    "257_entries" E2BIG |init| init.fixed.cpuid.nent = 257;
    "4g_entries" E2BIG |init| init.fixed.cpuid.nent = u32::MAX;
    "first_reserved_word" EINVAL |init| init.fixed.reserved[0] = 1;
    "last_reserved_word" EINVAL |init| init.fixed.reserved[11] = 1 << 63;
    "padding" EINVAL |init| init.fixed.cpuid.padding = 1;
    "attribute_debug" EINVAL |init| init.fixed.attributes |= 1;
    "attribute_migratable" EINVAL |init| init.fixed.attributes |= 1 << 29;
    "attribute_perfmon" EINVAL |init| init.fixed.attributes |= 1 << 63;
    "xfam_of_the_future" EINVAL |init| init.fixed.xfam |= 1 << 62;
    "no_cpuid" EINVAL |init| { init.entries.clear(); init.fixed.cpuid.nent = 0; };
    "no_guest_width" EINVAL |init| { init.entries.retain(|e| e.function != ADDRESS_SIZES); init.fixed.cpuid.nent -= 1; };
    "guest_width_0" EINVAL |init| set_width(init, 0);
    "guest_width_47" EINVAL |init| set_width(init, 47);
    "guest_width_57" EINVAL |init| set_width(init, 57);
    "hle" EINVAL |init| leaf_7(init).ebx |= TSX & 1 << 4;
    "rtm" EINVAL |init| leaf_7(init).ebx |= TSX & 1 << 11;
    "waitpkg" EINVAL |init| leaf_7(init).ecx |= WAITPKG;
    "leaf_that_is_not_configurable" EINVAL |init| add(init, 0x4000_0001);
    "leaf_given_twice" EINVAL |init| add(init, ADDRESS_SIZES);
};

/// Two mistakes each; the errno is that of the earlier check.
const PAIRS: &[(&str, Mistake)] = mistakes! {
    "too_many_entries_before_reserved" E2BIG |init| { init.fixed.cpuid.nent = 300; init.fixed.reserved[3] = 1; };
    "too_many_entries_before_attributes" E2BIG |init| { init.fixed.cpuid.nent = 300; init.fixed.attributes = u64::MAX; };
};

fn set_width(init: &mut TdxInitVm, bits: u32) {
    for entry in init.entries.iter_mut().filter(|entry| entry.function == ADDRESS_SIZES) {
        entry.eax = entry.eax & !(0xff << 16) | bits << 16;
    }
}

/// Leaf 7, added where the module lets nothing of it be configured: then it is wrong by itself.
fn leaf_7(init: &mut TdxInitVm) -> &mut CpuidEntry {
    if let Some(at) = init.entries.iter().position(|entry| entry.function == 7 && entry.index == 0) {
        return &mut init.entries[at];
    }
    add(init, 7);
    init.entries.last_mut().expect("one was just added")
}

fn add(init: &mut TdxInitVm, function: u32) {
    init.entries.push(CpuidEntry { function, eax: 48 << 16, ..Default::default() });
    init.fixed.cpuid.nent += 1;
}

fn unreadable_command_is_efault(cx: &Context) -> TestResult {
    let td = Td::bare(cx)?;
    let Some(tdx) = td.vm.tdx() else { fail!("the machine's VMs have no KVM_MEMORY_ENCRYPT_OP") };
    claim_err!(tdx.unreadable_command(), Errno::EFAULT, "KVM_MEMORY_ENCRYPT_OP with an argument that is not mapped");
    Ok(())
}

fn command_with_a_status_is_refused(cx: &Context, &id: &u32) -> TestResult {
    const STATUS: u64 = 0x8000_0200_0000_0092;
    let td = Td::bare(cx)?;
    td.split_irqchip()?;
    let init = td.configuration()?;
    let mut capabilities = TdxCapabilities::with_room(256);
    let data = match id {
        KVM_TDX_CAPABILITIES => TdxData::Capabilities(&mut capabilities),
        KVM_TDX_INIT_VM => TdxData::InitVm(&init),
        _ => TdxData::Value(0),
    };
    let answer = td.command(TdxCommand::new(id, data).with_hw_error(STATUS))?;
    claim_eq!(answer.result, Err(Errno::EINVAL), "a command with a status in it");
    claim_eq!(answer.hw_error.0, STATUS, "the status afterwards");
    claim_eq!(td.init_vm(&init)?, TdxAnswer::OK, "KVM_TDX_INIT_VM afterwards");
    Ok(())
}

fn command_that_is_not_the_vms_is_refused(cx: &Context, &id: &u32) -> TestResult {
    let td = Td::bare(cx)?;
    claim_eq!(td.command(TdxCommand::new(id, TdxData::Value(0)))?, refused(), "before KVM_TDX_INIT_VM");
    let td = Td::initialized(cx)?;
    claim_eq!(td.command(TdxCommand::new(id, TdxData::Value(0)))?, refused(), "after it");
    Ok(())
}

fn refused() -> TdxAnswer {
    TdxAnswer::failed(Errno::EINVAL)
}

fn capabilities_are_refused(cx: &Context) -> TestResult {
    let td = Td::bare(cx)?;
    let needed = td.capabilities()?.entries.len() as u32;
    claim!(needed > 0, "the module lets something of CPUID be configured");
    let mut list = TdxCapabilities::with_room(0);
    let with_flags = TdxCommand::new(KVM_TDX_CAPABILITIES, TdxData::Capabilities(&mut list)).with_flags(1);
    claim_eq!(td.command(with_flags)?, refused(), "with flags, before the length of the list");
    let unreadable = TdxCommand::new(KVM_TDX_CAPABILITIES, TdxData::NOWHERE);
    claim_eq!(td.command(unreadable)?, TdxAnswer::failed(Errno::EFAULT), "with a list that is not mapped");
    for room in [0, needed - 1] {
        let mut list = TdxCapabilities::with_room(room);
        let command = TdxCommand::new(KVM_TDX_CAPABILITIES, TdxData::Capabilities(&mut list));
        claim_eq!(td.command(command)?, TdxAnswer::failed(Errno::E2BIG), "with room for {room} of {needed}");
        claim_eq!(list.fixed.cpuid.nent, room, "the count afterwards");
    }
    let mut list = TdxCapabilities::with_room(needed);
    let command = TdxCommand::new(KVM_TDX_CAPABILITIES, TdxData::Capabilities(&mut list));
    claim_eq!(td.command(command)?, TdxAnswer::OK, "with room for {needed}");
    Ok(())
}

fn capabilities_are_those_of_kvm(cx: &Context) -> TestResult {
    const SEPT_VE_DISABLE: u64 = 1 << 28;
    let td = Td::bare(cx)?;
    let capabilities = td.capabilities()?;
    let fixed = &capabilities.fixed;
    claim_eq!(fixed.supported_attrs & !SEPT_VE_DISABLE, 0, "attributes beside SEPT_VE_DISABLE");
    claim_eq!(fixed.supported_xfam & 3, 3, "XFAM of x87 and SSE");
    claim_eq!(fixed.reserved, [0; 250], "what is reserved");
    claim_eq!(fixed.cpuid.nent as usize, capabilities.entries.len(), "the count of entries");
    let leaf = |function: u32| capabilities.entries.iter().filter(move |entry| entry.function == function);
    claim_eq!(leaf(ADDRESS_SIZES).count(), 1, "leaves of the address widths");
    claim!(leaf(ADDRESS_SIZES).all(|entry| entry.eax >> 16 & 0xff == 0xff), "the guest's width is configurable");
    let forbidden = leaf(7).any(|entry| entry.index == 0 && (entry.ebx & TSX != 0 || entry.ecx & WAITPKG != 0));
    claim!(!forbidden, "HLE, RTM and WAITPKG are not configurable");
    Ok(())
}

fn capabilities_can_be_asked_at_any_time(cx: &Context) -> TestResult {
    let td = Td::bare(cx)?;
    let before = td.capabilities()?;
    let td = Td::initialized(cx)?;
    let _vcpu = td.ready_vcpu(0)?;
    td.capabilities()?;
    claim_eq!(td.finalize()?, TdxAnswer::OK, "KVM_TDX_FINALIZE_VM");
    let after = td.capabilities()?;
    claim_eq!(after.fixed.supported_xfam, before.fixed.supported_xfam, "XFAM of a TD that is finalised");
    claim_eq!(after.entries.len(), before.entries.len(), "configurable leaves of a TD that is finalised");
    Ok(())
}

fn configuration_is_refused(cx: &Context, mistake: &Mistake) -> TestResult {
    let td = Td::bare(cx)?;
    td.split_irqchip()?;
    let right = td.configuration()?;
    let mut wrong = right.clone();
    (mistake.apply)(&mut wrong);
    claim_eq!(td.init_vm(&wrong)?, TdxAnswer::failed(mistake.errno), "KVM_TDX_INIT_VM with the mistake");
    let flags = TdxCommand::new(KVM_TDX_INIT_VM, TdxData::InitVm(&right)).with_flags(1);
    claim_eq!(td.command(flags)?, refused(), "KVM_TDX_INIT_VM with flags");
    let unreadable = TdxCommand::new(KVM_TDX_INIT_VM, TdxData::NOWHERE);
    claim_eq!(td.command(unreadable)?, TdxAnswer::failed(Errno::EFAULT), "KVM_TDX_INIT_VM of nothing");
    claim_eq!(td.init_vm(&right)?, TdxAnswer::OK, "KVM_TDX_INIT_VM without the mistake");
    Ok(())
}

fn first_mistake_is_reported(cx: &Context, mistake: &Mistake) -> TestResult {
    let td = Td::bare(cx)?;
    let mut wrong = td.configuration()?;
    (mistake.apply)(&mut wrong);
    claim_eq!(td.init_vm(&wrong)?, TdxAnswer::failed(mistake.errno), "of two mistakes");
    let flags = TdxCommand::new(KVM_TDX_INIT_VM, TdxData::InitVm(&wrong)).with_flags(1);
    claim_eq!(td.command(flags)?, refused(), "flags come before both");
    let unreadable = TdxCommand::new(KVM_TDX_INIT_VM, TdxData::NOWHERE).with_flags(1);
    claim_eq!(td.command(unreadable)?, refused(), "flags come before the argument is read");
    Ok(())
}

fn second_initialization_is_refused(cx: &Context) -> TestResult {
    let td = Td::initialized(cx)?;
    let init = td.configuration()?;
    claim_eq!(td.init_vm(&init)?, refused(), "the same again");
    let unreadable = TdxCommand::new(KVM_TDX_INIT_VM, TdxData::NOWHERE);
    claim_eq!(td.command(unreadable)?, refused(), "an argument that is not mapped");
    let _vcpu = td.ready_vcpu(0)?;
    claim_eq!(td.finalize()?, TdxAnswer::OK, "KVM_TDX_FINALIZE_VM");
    claim_eq!(td.init_vm(&init)?, refused(), "after KVM_TDX_FINALIZE_VM");
    Ok(())
}

fn finalization_happens_once_after_initialization(cx: &Context) -> TestResult {
    let td = Td::bare(cx)?;
    claim_eq!(td.finalize()?, refused(), "before KVM_TDX_INIT_VM");
    let td = Td::initialized(cx)?;
    let _vcpu = td.ready_vcpu(0)?;
    claim_eq!(td.finalize()?, TdxAnswer::OK, "KVM_TDX_FINALIZE_VM");
    claim_eq!(td.finalize()?, refused(), "KVM_TDX_FINALIZE_VM again");
    Ok(())
}

fn finalization_looks_at_no_argument(cx: &Context) -> TestResult {
    let td = Td::initialized(cx)?;
    let _vcpu = td.ready_vcpu(0)?;
    let command = TdxCommand::new(KVM_TDX_FINALIZE_VM, TdxData::Value(u64::MAX)).with_flags(u32::MAX);
    claim_eq!(td.command(command)?, TdxAnswer::OK, "KVM_TDX_FINALIZE_VM with flags and data");
    Ok(())
}

/// The stand-alone binary.
pub fn main() -> std::process::ExitCode {
    gmemtest::cli::selftest_main(&[&SUITE])
}
