//! Where the payload lies in guest-physical address space. Bytes throughout.

/// First byte of the payload's memory.
pub const BASE: u64 = 0xfff0_0000;
/// Bytes of the payload's memory: up to 4 GiB.
pub const SIZE: u64 = 1 << 20;
/// How many vCPUs have an area.
pub const MAX_VCPUS: u32 = 16;

/// Bytes of the area of one vCPU.
pub const AREA_SIZE: u64 = 0x8000;
/// Offset of the mailbox in an area: one page, the only one that the host looks at.
pub const MAILBOX: u64 = 0;
/// Offset of the PML4 in an area.
pub const PML4: u64 = 0x1000;
/// Offset of the page-directory-pointer table in an area.
pub const PDPT: u64 = 0x2000;
/// Offset of the page directory in an area; it maps 3 GiB to 4 GiB of virtual address space.
pub const DIRECTORY: u64 = 0x3000;
/// Offset of the TSS and the payload's variables in an area.
pub const PRIVATE: u64 = 0x4000;
/// Offset of the end of the kernel stack in an area.
pub const KERNEL_STACK_END: u64 = 0x6000;
/// Offset of the end of the user stack in an area.
pub const USER_STACK_END: u64 = 0x7000;

/// Offset of the I/O permission bitmap in the TSS, which lets CPL 3 use the ports below 0x100. (IOPL 3 would do on
/// hardware, but kvm_pvm keeps no IOPL for code that it runs natively.)
pub const IO_BITMAP: u64 = 0x68;
/// Limit of the TSS: the bitmap of 0x100 ports, and the byte after it that the CPU reads with the last of them.
pub const TSS_LIMIT: u64 = IO_BITMAP + 0x100 / 8;

/// Offset of the boot parameter in an area.
pub const PARAMETER: u64 = PRIVATE + 0x100;
/// Offset of the shared bit of a TD in an area, 0 on other VMs.
pub const SHARED_BIT: u64 = PRIVATE + 0x108;
/// Offset in an area of the guest-physical address that the window shows.
pub const WINDOW_GPA: u64 = PRIVATE + 0x110;

/// First byte of tables and code.
pub const CODE: u64 = 0xffff_c000;
/// Bytes of tables and code.
pub const CODE_SIZE: u64 = BASE + SIZE - CODE;
/// Limit of the GDT, which is at [`CODE`]: six descriptors, and a TSS for each vCPU.
pub const GDT_LIMIT: u16 = (6 * 8 + MAX_VCPUS * 16 - 1) as u16;
/// Offset of the IDT from [`CODE`].
pub const IDT: u64 = 0x200;
/// Offset of the GDTR's value from [`CODE`].
pub const GDTR: u64 = 0x1e0;
/// Offset of the IDTR's value from [`CODE`].
pub const IDTR: u64 = 0x1f0;
/// Offset of the first exception stub from [`CODE`]; one every 16 bytes.
pub const STUBS: u64 = 0x1000;
/// Vector with which code at CPL 3 calls code at CPL 0: #BP, because kvm_pvm delivers exceptions but gives #UD for INT n.
pub const CALL_VECTOR: u64 = 3;
/// Offset of the 64-bit entry from [`CODE`].
pub const LONG_MODE_ENTRY: u64 = 0x1400;
/// Offset of the reset vector from [`CODE`].
pub const RESET_VECTOR: u64 = CODE_SIZE - 16;

/// Where a vCPU starts.
pub const RESET_ADDRESS: u64 = 0xffff_fff0;

/// Virtual address of the window: two entries of 2 MiB.
pub const WINDOW: u64 = 0xc000_0000;
/// Virtual address at which the 2 MiB that hold the payload are mapped once more, in a TD with the shared bit: through it
/// the payload reaches its mailbox.
pub const ALIAS: u64 = 0xc040_0000;
/// Offset in the page directory of the entry for [`ALIAS`].
pub const ALIAS_ENTRY: u64 = (ALIAS >> 21 & 511) * 8;
/// What to subtract from an address in the payload's memory to get to its alias.
pub const TO_ALIAS: u64 = (BASE & !(HUGE - 1)) - ALIAS;

/// Bytes of a page-directory entry's page.
pub const HUGE: u64 = 2 << 20;

/// The I/O port of the report: one OUT of a byte. Below 0x100 for [`IO_BITMAP`].
pub const REPORT_PORT: u16 = 0xf4;

/// First byte of the area of a vCPU.
pub const fn area(vcpu: u32) -> u64 {
    BASE + vcpu as u64 * AREA_SIZE
}

const _: () = {
    assert!(BASE + MAX_VCPUS as u64 * AREA_SIZE <= CODE);
    assert!(CODE + RESET_VECTOR == RESET_ADDRESS);
    // The handlers find a vCPU's area by rounding the stack pointer down.
    assert!(BASE.is_multiple_of(AREA_SIZE) && AREA_SIZE.is_power_of_two());
    // One 2 MiB mapping covers everything.
    assert!(BASE / HUGE == (BASE + SIZE - 1) / HUGE);
};
