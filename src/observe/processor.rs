//! The processor that this program runs on.

use std::arch::x86_64::__cpuid;

/// Whether it is QEMU's TCG, by CPUID: the hypervisor bit of leaf 1, and the vendor in leaf 0x40000000.
pub fn emulated_by_tcg() -> bool {
    const HYPERVISOR_PRESENT: u32 = 1 << 31;
    if __cpuid(1).ecx & HYPERVISOR_PRESENT == 0 {
        return false;
    }
    let vendor = __cpuid(0x4000_0000);
    [vendor.ebx, vendor.ecx, vendor.edx].map(u32::to_le_bytes) == [*b"TCGT", *b"CGTC", *b"GTCG"]
}
