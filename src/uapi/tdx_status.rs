//! Completion statuses of the TDX module by name, as `asm/shared/tdx_errno.h` and the module's own headers have them: what
//! `hw_error` of KVM_MEMORY_ENCRYPT_OP and the lines of the kernel log carry.

use std::fmt;

/// A completion status: bits 63:32 say what happened, bits 31:0 to which operand.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct TdxStatus(pub u64);

/// Bits 63:32 by name, without the `TDX_` in front.
const CODES: &[(u32, &str)] = &[
    (0x0000_0000, "SUCCESS"),
    (0x4000_0001, "NON_RECOVERABLE_VCPU"),
    (0x6000_0002, "NON_RECOVERABLE_TD"),
    (0x8000_0003, "INTERRUPTED_RESUMABLE"),
    (0x6000_0005, "NON_RECOVERABLE_TD_NON_ACCESSIBLE"),
    (0xe000_0007, "NON_RECOVERABLE_TD_WRONG_APIC_MODE"),
    (0xc000_0100, "OPERAND_INVALID"),
    (0x8000_0200, "OPERAND_BUSY"),
    (0x8000_0201, "PREVIOUS_TLB_EPOCH_BUSY"),
    (0x8000_0202, "SYS_BUSY"),
    (0x8000_0203, "RND_NO_ENTROPY"),
    (0xc000_0300, "PAGE_METADATA_INCORRECT"),
    (0xc000_0400, "TD_ASSOCIATED_PAGES_EXIST"),
    (0xe000_0604, "TD_FATAL"),
    (0xc000_0606, "TDCS_NOT_ALLOCATED"),
    (0xc000_0607, "LIFECYCLE_STATE_INCORRECT"),
    (0xc000_0608, "OP_STATE_INCORRECT"),
    (0xc000_0609, "NO_VCPUS"),
    (0xc000_0621, "X2APIC_ID_NOT_UNIQUE"),
    (0xc000_0700, "VCPU_STATE_INCORRECT"),
    (0x8000_0702, "VCPU_NOT_ASSOCIATED"),
    (0xc000_0705, "MAX_VCPUS_EXCEEDED"),
    (0x8000_0800, "KEY_GENERATION_FAILED"),
    (0x8000_0810, "TD_KEYS_NOT_CONFIGURED"),
    (0xc000_0811, "KEY_STATE_INCORRECT"),
    (0x0000_0815, "KEY_CONFIGURED"),
    (0xc000_0820, "HKID_NOT_FREE"),
    (0x0000_0821, "NO_HKID_READY_TO_WBCACHE"),
    (0x8000_0824, "FLUSHVP_NOT_DONE"),
    (0xc000_0b00, "EPT_WALK_FAILED"),
    (0xc000_0b01, "EPT_ENTRY_FREE"),
    (0xc000_0b03, "EPT_ENTRY_NOT_PRESENT"),
    (0xc000_0b06, "GPA_RANGE_NOT_BLOCKED"),
    (0x0000_0b07, "GPA_RANGE_ALREADY_BLOCKED"),
    (0xc000_0b08, "TLB_TRACKING_NOT_DONE"),
    (0x0000_0b0a, "PAGE_ALREADY_ACCEPTED"),
    (0xc000_0b0b, "PAGE_SIZE_MISMATCH"),
    (0xc000_0b0d, "EPT_ENTRY_STATE_INCORRECT"),
    (0xc000_0c00, "METADATA_FIELD_ID_INCORRECT"),
    (0xc000_0c01, "METADATA_FIELD_NOT_WRITABLE"),
    (0xc000_0c02, "METADATA_FIELD_NOT_READABLE"),
];

/// Bits 31:0 by name, where they are an operand or an object.
const OPERANDS: &[(u32, &str)] = &[
    (0, "RAX"),
    (1, "RCX"),
    (2, "RDX"),
    (8, "R8"),
    (9, "R9"),
    (64, "ATTRIBUTES"),
    (65, "XFAM"),
    (66, "CONFIG_FLAGS"),
    (67, "EPTP_CONTROLS"),
    (68, "MAX_VCPUS"),
    (69, "CPUID_CONFIG"),
    (70, "TSC_FREQUENCY"),
    (128, "TDR"),
    (129, "TDCX"),
    (130, "TDVPR"),
    (144, "TDCS"),
    (145, "TDVPS"),
    (146, "SEPT_TREE"),
    (147, "SEPT_ENTRY"),
    (168, "RTMR"),
    (169, "TD_EPOCH"),
    (172, "OP_STATE"),
    (186, "KOT"),
];

/// The codes whose lower half names an operand.
const WITH_OPERAND: &[u32] =
    &[0xc000_0100, 0x8000_0200, 0xc000_0300, 0xc000_0400, 0xc000_0b00, 0xc000_0b01, 0xc000_0b03, 0xc000_0b0d];

impl TdxStatus {
    /// What happened, by name; `None` for a code that this table lacks.
    pub fn name(self) -> Option<&'static str> {
        lookup(CODES, (self.0 >> 32) as u32)
    }
}

fn lookup(table: &[(u32, &'static str)], number: u32) -> Option<&'static str> {
    table.iter().find(|(known, _)| *known == number).map(|(_, name)| *name)
}

impl fmt::Display for TdxStatus {
    /// `0x8000020000000092 (TDX_OPERAND_BUSY, SEPT_TREE)`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#018x}", self.0)?;
        let Some(name) = self.name() else { return Ok(()) };
        let operand = lookup(OPERANDS, self.0 as u32).filter(|_| WITH_OPERAND.contains(&((self.0 >> 32) as u32)));
        match operand {
            Some(operand) => write!(f, " (TDX_{name}, {operand})"),
            None => write!(f, " (TDX_{name})"),
        }
    }
}

impl fmt::Debug for TdxStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statuses_are_shown_with_their_names() {
        let shown = |status| TdxStatus(status).to_string();
        assert_eq!(shown(0x8000_0200_0000_0092), "0x8000020000000092 (TDX_OPERAND_BUSY, SEPT_TREE)");
        assert_eq!(shown(0xc000_0b08_0000_0000), "0xc0000b0800000000 (TDX_TLB_TRACKING_NOT_DONE)");
        assert_eq!(shown(0xc000_0100_0000_0041), "0xc000010000000041 (TDX_OPERAND_INVALID, XFAM)");
        assert_eq!(shown(0xdead_beef_0000_0001), "0xdeadbeef00000001");
        assert_eq!(TdxStatus(0).name(), Some("SUCCESS"));
    }
}
