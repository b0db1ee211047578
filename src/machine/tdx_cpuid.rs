//! CPUID of a TD: what INIT_VM configures, and what KVM is told that the vCPU has.

use super::CpuidEntry;

/// Guest-physical address bits of a TD with four levels of S-EPT.
pub const GPAW_48: u32 = 48;

/// Leaf of the address widths; EAX\[23:16\] is the width of guest-physical addresses, 48 or 52.
const ADDRESS_SIZES: u32 = 0x8000_0008;
const GUEST_WIDTH: u32 = 0xff << 16;
/// x2APIC in ECX of leaf 1.
const X2APIC: u32 = 1 << 21;

/// The CPUID configuration of KVM_TDX_INIT_VM: of each configurable leaf the bits that KVM supports, and 48 bits of
/// guest-physical addresses. The kernel refuses entries that are not configurable.
pub fn configured(configurable: &[CpuidEntry], supported: &[CpuidEntry]) -> Vec<CpuidEntry> {
    let common = |allowed: &CpuidEntry| {
        let has = find(supported, allowed).copied().unwrap_or_default();
        let mut entry = *allowed;
        entry.eax &= has.eax;
        entry.ebx &= has.ebx;
        entry.ecx &= has.ecx;
        entry.edx &= has.edx;
        if entry.function == ADDRESS_SIZES {
            entry.eax = entry.eax & !GUEST_WIDTH | GPAW_48 << 16;
        }
        entry
    };
    configurable.iter().map(common).collect()
}

/// The argument of KVM_SET_CPUID2: what KVM_TDX_GET_CPUID says that the guest sees, and what KVM supports for leaves of
/// which the module says nothing. KVM looks at it for the APIC mode, which has to be x2APIC before KVM_TDX_INIT_VCPU, and
/// for the legal guest-physical addresses of hypercalls.
pub fn of_vcpu(seen: &[CpuidEntry], supported: &[CpuidEntry]) -> Vec<CpuidEntry> {
    let mut entries = supported.to_vec();
    for entry in seen.iter().filter(|entry| entry.eax | entry.ebx | entry.ecx | entry.edx != 0) {
        match entries.iter_mut().find(|known| same_leaf(known, entry)) {
            Some(known) => *known = *entry,
            None => entries.push(*entry),
        }
    }
    for entry in &mut entries {
        match entry.function {
            1 => entry.ecx |= X2APIC,
            ADDRESS_SIZES => entry.eax = entry.eax & !GUEST_WIDTH | GPAW_48 << 16,
            _ => {}
        }
    }
    entries
}

fn find<'a>(entries: &'a [CpuidEntry], wanted: &CpuidEntry) -> Option<&'a CpuidEntry> {
    entries.iter().find(|entry| same_leaf(entry, wanted))
}

/// Whether two entries are about the same leaf; the index counts where both say that it does.
fn same_leaf(one: &CpuidEntry, other: &CpuidEntry) -> bool {
    const SIGNIFICANT_INDEX: u32 = 1;
    let indexed = one.flags & other.flags & SIGNIFICANT_INDEX != 0;
    one.function == other.function && (!indexed || one.index == other.index)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, index: Option<u32>, registers: [u32; 4]) -> CpuidEntry {
        let [eax, ebx, ecx, edx] = registers;
        let flags = u32::from(index.is_some());
        CpuidEntry { function, index: index.unwrap_or(0), flags, eax, ebx, ecx, edx, ..Default::default() }
    }

    #[test]
    fn what_is_configured_is_supported_and_configurable() {
        let configurable = [
            leaf(7, Some(0), [0, 0xff, 0xf0, 0]),
            leaf(7, Some(1), [0xf, 0, 0, 0]),
            leaf(ADDRESS_SIZES, None, [GUEST_WIDTH, 0x200, 0, 0]),
        ];
        let supported = [
            leaf(1, None, [1, 2, 3, 4]),
            leaf(7, Some(0), [9, 0x0f, 0xff, 0xff]),
            leaf(ADDRESS_SIZES, None, [0x3934, 0x1200, 7, 7]),
        ];
        let entries = configured(&configurable, &supported);
        let registers: Vec<_> = entries.iter().map(|entry| [entry.eax, entry.ebx, entry.ecx, entry.edx]).collect();
        assert_eq!(registers, [[0, 0x0f, 0xf0, 0], [0, 0, 0, 0], [48 << 16, 0x200, 0, 0]]);
    }

    #[test]
    fn a_vcpu_has_x2apic_and_what_the_module_says_of_it() {
        let seen = [leaf(0, None, [0; 4]), leaf(7, Some(0), [0, 5, 0, 0]), leaf(0x21, None, [1, 0, 0, 0])];
        let supported =
            [leaf(0, None, [0x1f, 1, 2, 3]), leaf(1, None, [6; 4]), leaf(7, Some(0), [0, 9, 9, 9])];
        let entries = of_vcpu(&seen, &supported);
        assert_eq!(entries[0].eax, 0x1f, "a leaf of zeros says nothing");
        assert_eq!(entries[1].ecx, 6 | X2APIC);
        assert_eq!((entries[2].ebx, entries[2].ecx), (5, 0));
        assert_eq!(entries[3].function, 0x21);
    }
}
