//! The state in which a vCPU starts the payload: that of a TD's vCPU after TDH.VP.INIT, on every VM type.

use super::layout::{self, RESET_ADDRESS};

/// What the host tells the payload, in RCX and R8. A TD gets it as the argument of KVM_TDX_INIT_VCPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum BootParameter {
    /// A VM on a CPU that has VMCALL; reports are OUT instructions.
    Vmcall = 0,
    /// A VM on a CPU that has VMMCALL; reports are OUT instructions.
    Vmmcall = 1,
    /// A TD: hypercalls and reports are TDVMCALLs.
    Td = 2,
}

/// A segment register: base 0, limit 4 GiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Selector.
    pub selector: u16,
    /// Base address.
    pub base: u64,
    /// Limit in bytes, expanded.
    pub limit: u32,
    /// Access rights in the VMCS format: type in bits 3:0, S 4, DPL 6:5, P 7, AVL 12, L 13, D/B 14, G 15, unusable 16.
    pub access_rights: u32,
}

impl Segment {
    const fn flat(access_rights: u32) -> Segment {
        Segment { selector: 0, base: 0, limit: 0xffff_ffff, access_rights }
    }

    const fn system(access_rights: u32) -> Segment {
        Segment { selector: 0, base: 0, limit: 0xffff, access_rights }
    }
}

/// Registers of a vCPU at its start. Everything that has no field is 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InitialState {
    /// RIP.
    pub rip: u64,
    /// RFLAGS.
    pub rflags: u64,
    /// RBX: the guest-physical address width that decides where a TD's shared bit is, 48 or 52.
    pub rbx: u64,
    /// RCX and R8: the boot parameter.
    pub rcx: u64,
    /// RDX: CPUID(1).EAX.
    pub rdx: u64,
    /// RSI: the vCPU's index.
    pub rsi: u64,
    /// CR0.
    pub cr0: u64,
    /// CR4 as the guest reads it.
    pub cr4: u64,
    /// IA32_EFER.
    pub efer: u64,
    /// IA32_FMASK.
    pub fmask: u64,
    /// CS.
    pub cs: Segment,
    /// DS, ES, FS, GS and SS.
    pub data: Segment,
    /// LDTR.
    pub ldtr: Segment,
    /// TR.
    pub tr: Segment,
    /// Limit of the GDTR, whose base is 0.
    pub gdt_limit: u16,
    /// Limit of the IDTR, whose base is 0.
    pub idt_limit: u16,
}

impl InitialState {
    /// The state of the vCPU with this index (TDX module spec 10.1).
    pub const fn new(index: u32, parameter: BootParameter, address_width: u8, cpuid_1_eax: u32) -> InitialState {
        InitialState {
            rip: RESET_ADDRESS,
            rflags: 2,
            rbx: address_width as u64,
            rcx: parameter as u64,
            rdx: cpuid_1_eax as u64,
            rsi: index as u64,
            // PE, NE.
            cr0: 0x21,
            // MCE. Internally a TD has VMXE too, which the guest does not see.
            cr4: 0x40,
            // SCE, LME, NXE.
            efer: 0x901,
            fmask: 0x20200,
            cs: Segment::flat(0xc09b),
            data: Segment::flat(0xc093),
            ldtr: Segment::system(0x10082),
            tr: Segment::system(0x8b),
            gdt_limit: 0xffff,
            idt_limit: 0,
        }
    }
}

/// The state and the memory with which a vCPU starts at the payload's 64-bit entry, as if it had come there by itself.
///
/// Only for hosts where a guest without paging cannot be trusted: QEMU's TCG (7.2 seen) leaves nested paging out while a
/// guest's CR0.PG is clear, so that such a guest runs in its host's physical memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LongModeState {
    /// RIP.
    pub rip: u64,
    /// RBP: the vCPU's area.
    pub rbp: u64,
    /// CR0.
    pub cr0: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// IA32_EFER.
    pub efer: u64,
    /// CS.
    pub cs: Segment,
    /// Base of the GDT.
    pub gdt_base: u64,
    /// Guest-physical addresses and what the protected-mode code would have stored there.
    pub stores: [(u64, u64); 6],
}

impl LongModeState {
    /// What [`InitialState`] becomes by the payload's own doing.
    pub const fn after(initial: &InitialState) -> LongModeState {
        let area = layout::area(initial.rsi as u32);
        // Present, writable, user; for the 2 MiB page accessed, dirty and PS too.
        let (table, page) = (0x7, layout::BASE & !(layout::HUGE - 1) | 0xe7);
        LongModeState {
            rip: layout::CODE + layout::LONG_MODE_ENTRY,
            rbp: area,
            cr0: initial.cr0 | 1 << 31,
            cr3: area + layout::PML4,
            cr4: initial.cr4 | 1 << 5,
            efer: initial.efer | 1 << 10,
            cs: Segment { selector: 8, base: 0, limit: 0xffff_ffff, access_rights: 0xa09b },
            gdt_base: layout::CODE,
            stores: [
                (area + layout::PML4, (area + layout::PDPT) | table),
                (area + layout::PDPT + 3 * 8, (area + layout::DIRECTORY) | table),
                (area + layout::DIRECTORY + layout::ALIAS_ENTRY, page),
                (area + layout::DIRECTORY + 511 * 8, page),
                (area + layout::PARAMETER, initial.rcx),
                (area + layout::SHARED_BIT, 0),
            ],
        }
    }
}
