//! What KVM_TDX_CAPABILITIES and KVM_TDX_GET_CPUID say, and the CPUID part of KVM_TDX_INIT_VM.

use crate::machine::{CpuidEntry, Errno, TdxCpuid};
use crate::sim::tdx_module::Platform;
use crate::sim::tdx_module::td::ATTR_SEPT_VE_DISABLE;
use crate::uapi::kvm_x86::KvmTdxCapabilities;

/// TD attributes that KVM supports.
pub const ATTRIBUTES: u64 = ATTR_SEPT_VE_DISABLE;
/// XFAM bits that KVM supports: x87, SSE, AVX, AVX-512 and PKRU.
pub const XFAM: u64 = 0x2e7;

/// The leaf of the address widths.
const ADDRESS_SIZES: u32 = 0x8000_0008;
const GUEST_WIDTH: u32 = 0xff << 16;
/// KVM_CPUID_FLAG_SIGNIFCANT_INDEX.
const SIGNIFICANT_INDEX: u32 = 1;
/// GetTdVmCallInfo leaf 1, R11: SetupEventNotifyInterrupt, which is left to user space.
const USER_TDVMCALLS: u64 = 1 << 1;

/// HLE and RTM in EBX, WAITPKG in ECX of leaf 7, which KVM does not let a TD have.
const UNSUPPORTED_7_0: (u32, u32) = (1 << 4 | 1 << 11, 1 << 5);

/// The module's configurable leaves as KVM shows them.
pub fn configurable(platform: &Platform) -> Vec<CpuidEntry> {
    let entry = |&(function, subleaf, [eax, ebx, ecx, edx]): &(u32, u32, [u32; 4])| {
        let (index, flags) = if subleaf == u32::MAX { (0, 0) } else { (subleaf, SIGNIFICANT_INDEX) };
        let mut entry = CpuidEntry { function, index, flags, eax, ebx, ecx, edx, ..Default::default() };
        if function == 7 && index == 0 {
            entry.ebx &= !UNSUPPORTED_7_0.0;
            entry.ecx &= !UNSUPPORTED_7_0.1;
        }
        if function == ADDRESS_SIZES {
            entry.eax |= GUEST_WIDTH;
        }
        entry
    };
    platform.cpuid_configs.iter().map(entry).collect()
}

/// The head of the answer of KVM_TDX_CAPABILITIES.
pub fn fill(answer: &mut KvmTdxCapabilities, nent: u32) {
    answer.supported_attrs = ATTRIBUTES;
    answer.supported_xfam = XFAM;
    answer.kernel_tdvmcallinfo_1_r11 = 0;
    answer.user_tdvmcallinfo_1_r11 = USER_TDVMCALLS;
    answer.kernel_tdvmcallinfo_1_r12 = 0;
    answer.user_tdvmcallinfo_1_r12 = 0;
    answer.reserved = [0; 250];
    answer.cpuid.nent = nent;
    answer.cpuid.padding = 0;
}

/// setup_tdparams_eptp_controls() and setup_tdparams_cpuids(): the values for the module, one for each configurable leaf.
///
/// # Errors
/// EINVAL without a width of guest-physical addresses, for one that is not 48, for features that a TD does not get, and
/// for an entry that is not configurable.
pub fn values(platform: &Platform, nent: u32, entries: &[CpuidEntry]) -> Result<Vec<[u32; 4]>, Errno> {
    let entries = &entries[..entries.len().min(nent as usize)];
    let find = |function: u32, index: u32| {
        let same = |entry: &&CpuidEntry| {
            entry.function == function && (entry.flags & SIGNIFICANT_INDEX == 0 || entry.index == index)
        };
        entries.iter().find(same)
    };
    // 52 needs five levels of EPT, which this host lacks.
    if find(ADDRESS_SIZES, 0).is_none_or(|entry| entry.eax >> 16 & 0xff != 48) {
        return Err(Errno::EINVAL);
    }
    let mut used = 0;
    let mut values = Vec::new();
    for &(function, subleaf, _) in &platform.cpuid_configs {
        let Some(entry) = find(function, if subleaf == u32::MAX { 0 } else { subleaf }) else {
            values.push([0; 4]);
            continue;
        };
        let unsupported = entry.ebx & UNSUPPORTED_7_0.0 != 0 || entry.ecx & UNSUPPORTED_7_0.1 != 0;
        if function == 7 && unsupported {
            return Err(Errno::EINVAL);
        }
        used += 1;
        let width = if function == ADDRESS_SIZES { GUEST_WIDTH } else { 0 };
        values.push([entry.eax & !width, entry.ebx, entry.ecx, entry.edx]);
    }
    if used == nent { Ok(values) } else { Err(Errno::EINVAL) }
}

/// KVM_TDX_GET_CPUID: the module shows the highest leaves and nothing else of interest to KVM.
///
/// # Errors
/// E2BIG, with the number of entries.
pub fn seen_by_guest(answer: &mut TdxCpuid) -> Result<(), Errno> {
    let leaf = |function: u32| CpuidEntry { function, ..Default::default() };
    answer.answer(vec![leaf(0), leaf(0x8000_0000)])
}
