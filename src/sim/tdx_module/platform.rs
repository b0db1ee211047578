//! The machine the module runs on: processors, memory, key ids.

use super::lp::LpId;

/// First address a physical address may not reach.
pub const MAX_PA: u64 = 1 << 52;

/// What the model is told of the hardware.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Platform {
    /// Package of each logical processor; `lp0` is the first.
    pub lp_packages: Vec<u8>,
    /// Convertible memory ranges: address and bytes.
    pub cmrs: Vec<(u64, u64)>,
    /// Width of a physical address, key id included; at most 52.
    pub address_bits: u8,
    /// How many of its top bits carry the key id.
    pub keyid_bits: u8,
    /// Key ids below are the host's, from here on private.
    pub first_private_hkid: u16,
    /// Where the module itself lies: address and bytes. No shared operand may point there.
    pub seamrr: (u64, u64),
    /// CPUID(1).EAX, in RDX of a new vCPU.
    pub cpuid_1_eax: u32,
    /// Configurable CPUID leaves: leaf, subleaf (`u32::MAX` for none), and the mask of configurable bits in EAX, EBX, ECX, EDX.
    pub cpuid_configs: Vec<(u32, u32, [u32; 4])>,
}

impl Platform {
    /// One package with `lps` processors, `memory` bytes of convertible memory from 1 MiB on, 32 private key ids from 32 on.
    pub fn new(lps: u32, memory: u64) -> Platform {
        Platform::with_packages(vec![0; lps as usize], memory)
    }

    /// As [`Platform::new`], with the package of every processor given.
    pub fn with_packages(lp_packages: Vec<u8>, memory: u64) -> Platform {
        Platform {
            lp_packages,
            cmrs: vec![(1 << 20, memory - (1 << 20))],
            address_bits: 52,
            keyid_bits: 6,
            first_private_hkid: 32,
            seamrr: (0, 0),
            cpuid_1_eax: 0x000C_06F2,
            cpuid_configs: vec![
                (0x7, 0, [0, 0xD19F_27EB, 0x0041_5FFE, 0xA000_CC10]),
                (0xD, 1, [0x1F, 0, 0, 0]),
                (0x8000_0008, u32::MAX, [0x00FF_0000, 0x0000_0200, 0, 0]),
            ],
        }
    }

    /// All processors.
    pub fn lps(&self) -> impl Iterator<Item = LpId> + use<> {
        (0..self.lp_packages.len() as u32).map(LpId)
    }

    /// One bit for every package.
    pub fn all_packages(&self) -> u64 {
        self.lp_packages.iter().fold(0, |mask, package| mask | 1 << package)
    }

    /// The bits of a physical address that are not key id.
    pub fn address_mask(&self) -> u64 {
        (1 << (self.address_bits - self.keyid_bits)) - 1
    }

    /// The key id in the upper bits of a physical address.
    pub fn hkid_of(&self, pa: u64) -> u16 {
        ((pa & ((1 << self.address_bits) - 1)) >> (self.address_bits - self.keyid_bits)) as u16
    }

    /// Number of key ids.
    pub fn keys(&self) -> usize {
        1 << self.keyid_bits
    }

    /// Whether a key id is private and exists.
    pub fn is_private_hkid(&self, hkid: u64) -> bool {
        hkid >= self.first_private_hkid as u64 && hkid < self.keys() as u64
    }

    /// Whether the whole range is convertible memory.
    pub fn in_cmrs(&self, pa: u64, len: u64) -> bool {
        let end = pa + len;
        let mut at = pa;
        while at < end {
            let Some((base, size)) = self.cmrs.iter().find(|(base, size)| at.wrapping_sub(*base) < *size) else {
                return false;
            };
            at = base + size;
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_key_id_is_the_top_of_the_address_whatever_its_width() {
        let mut platform = Platform::new(1, 8 << 30);
        assert_eq!((platform.address_mask(), platform.hkid_of(33 << 46 | 0x1000)), ((1 << 46) - 1, 33));
        platform.address_bits = 40;
        assert_eq!((platform.address_mask(), platform.hkid_of(33 << 34 | 0x1000)), ((1 << 34) - 1, 33));
    }

    #[test]
    fn a_range_may_lie_across_ranges_that_touch() {
        let mut platform = Platform::new(1, 8 << 30);
        platform.cmrs = vec![(0x1000, 0x1000), (0x2000, 0x3000), (0x8000, 0x1000)];
        assert!(platform.in_cmrs(0x1000, 0x4000) && platform.in_cmrs(0x8000, 0x1000));
        assert!(!platform.in_cmrs(0x4000, 0x2000) && !platform.in_cmrs(0, 0x2000));
    }
}
