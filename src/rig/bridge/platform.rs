//! The machine as the module is told of it: what QEMU's arguments and the kernel's patch make the kernel see.

use super::ram::Ram;
use crate::sim::tdx_module::Platform;

/// CPUID(1).EAX of the CPU: family 6, model 173, stepping 1.
const CPUID_1_EAX: u32 = 0x000A_06D1;

/// The platform of a machine with this many CPUs, each a package of its own.
pub fn platform(cpus: u32, ram: &Ram) -> Platform {
    Platform {
        cmrs: ram.convertible(),
        // The kernel sees no TME, so that it takes all 52 bits for address and puts the key id above them.
        address_bits: 58,
        keyid_bits: 6,
        cpuid_1_eax: CPUID_1_EAX,
        ..Platform::with_packages((0..cpus).map(|cpu| cpu as u8).collect(), 1 << 30)
    }
}
