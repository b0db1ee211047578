//! The payload's tables and code.
//!
//! Assembled for [`layout::CODE`] whatever address the linker gives it: jumps and calls are relative, everything absolute
//! is a constant of [`layout`], and what a table points to stands at a fixed offset.
//!
//! Registers of the code at CPL 3: R15 the mailbox, R14 the vCPU's private page; R12 and R13 what is left of a range.

use super::boot::BootParameter;
use super::layout;
use super::mailbox::{command, status, word};
use std::arch::global_asm;

/// What the payload's memory holds from [`layout::CODE`] on.
pub fn bytes() -> &'static [u8] {
    unsafe extern "C" {
        static gmemtest_payload: [u8; layout::CODE_SIZE as usize];
    }
    // SAFETY: the assembly below defines as many bytes, which are never written.
    unsafe { &gmemtest_payload }
}

global_asm!(
    include_str!("kernel.s"),
    include_str!("user.s"),
    area = const layout::BASE,
    area_size = const layout::AREA_SIZE,
    vcpus = const layout::MAX_VCPUS,
    private = const layout::PRIVATE,
    tss_limit = const layout::TSS_LIMIT,
    io_bitmap = const layout::IO_BITMAP,
    code = const layout::CODE,
    gdtr = const layout::GDTR,
    gdt_limit = const layout::GDT_LIMIT,
    idtr = const layout::IDTR,
    idt = const layout::IDT,
    stubs = const layout::STUBS,
    call_vector = const layout::CALL_VECTOR,
    entry64 = const layout::LONG_MODE_ENTRY,
    reset = const layout::RESET_VECTOR,
    parameter = const layout::PARAMETER,
    shared_bit = const layout::SHARED_BIT,
    window_gpa = const layout::WINDOW_GPA,
    pml4 = const layout::PML4,
    pdpt = const layout::PDPT,
    directory = const layout::DIRECTORY,
    alias_entry = const layout::ALIAS_ENTRY,
    huge_base = const layout::BASE & !(layout::HUGE - 1),
    huge = const layout::HUGE,
    window = const layout::WINDOW,
    to_alias = const layout::TO_ALIAS,
    kernel_stack = const layout::KERNEL_STACK_END,
    user_stack = const layout::USER_STACK_END,
    port = const layout::REPORT_PORT,
    td = const BootParameter::Td as u64,
    vmmcall = const BootParameter::Vmmcall as u64,
    map_gpa_range = const crate::uapi::kvm_para::KVM_HC_MAP_GPA_RANGE,
    encrypted = const crate::uapi::kvm_para::KVM_MAP_GPA_RANGE_ENCRYPTED,
    tdvmcall_map_gpa = const crate::uapi::tdvmcall::MAP_GPA,
    commands = const command::COUNT,
    done = const status::DONE,
    mismatch = const status::MISMATCH,
    exception = const status::EXCEPTION,
    bad_command = const status::BAD_COMMAND,
    m_command = const word::COMMAND,
    m_gpa = const word::GPA,
    m_len = const word::LEN,
    m_value = const word::VALUE,
    m_status = const word::STATUS,
    m_result = const word::RESULT,
    m_result2 = const word::RESULT2,
    m_vector = const word::VECTOR,
    m_error = const word::ERROR,
    m_rip = const word::RIP,
    m_cr2 = const word::CR2,
    m_stop = const word::STOP,
    m_iterations = const word::ITERATIONS,
);
