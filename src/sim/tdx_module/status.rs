//! Completion status: the value a leaf leaves in RAX (TDX module spec 2).

use std::fmt;
use std::str::FromStr;

use super::operand::Operand;
use super::state::OpState;

/// What stands in bits 31:0 of a status with a given code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DetailKind {
    /// An operand or object id.
    Operand,
    /// A level of the Secure EPT.
    Level,
    /// The TD's operation state.
    OpState,
    /// An MSR index.
    Msr,
    /// A VMX exit reason.
    ExitReason,
    /// A plain number, zero when there is nothing to say.
    Number,
}

macro_rules! codes {
    ($($upper:literal $ident:ident $name:literal $kind:ident;)*) => {
        /// The upper 32 bits of a completion status, by name (TDX module spec 2.3).
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[repr(u32)]
        pub enum Code {
            $(#[doc = concat!("`", $name, "`, upper half `", stringify!($upper), "`.")] $ident = $upper,)*
        }

        impl Code {
            /// Every code the module knows, in the order of their numbers' classes.
            pub const ALL: &'static [Code] = &[$(Code::$ident,)*];

            /// The code with these upper 32 bits, if the module has one.
            pub fn from_upper(upper: u32) -> Option<Code> {
                match upper {
                    $($upper => Some(Code::$ident),)*
                    _ => None,
                }
            }

            /// The name used by the module's own headers and by Linux.
            pub fn name(self) -> &'static str {
                match self {
                    $(Code::$ident => $name,)*
                }
            }

            /// What bits 31:0 mean next to this code.
            pub fn detail_kind(self) -> DetailKind {
                match self {
                    $(Code::$ident => DetailKind::$kind,)*
                }
            }
        }
    };
}

codes! {
    0x0000_0000 Success "TDX_SUCCESS" ExitReason;
    0x4000_0001 NonRecoverableVcpu "TDX_NON_RECOVERABLE_VCPU" ExitReason;
    0x6000_0002 NonRecoverableTd "TDX_NON_RECOVERABLE_TD" ExitReason;
    0x8000_0003 InterruptedResumable "TDX_INTERRUPTED_RESUMABLE" Number;
    0x8000_0004 InterruptedRestartable "TDX_INTERRUPTED_RESTARTABLE" Number;
    0x6000_0005 NonRecoverableTdNonAccessible "TDX_NON_RECOVERABLE_TD_NON_ACCESSIBLE" ExitReason;
    0xC000_0006 InvalidResumption "TDX_INVALID_RESUMPTION" Number;
    0xE000_0007 NonRecoverableTdWrongApicMode "TDX_NON_RECOVERABLE_TD_WRONG_APIC_MODE" Number;
    0x8000_0008 CrossTdFault "TDX_CROSS_TD_FAULT" ExitReason;
    0x9000_0009 CrossTdTrap "TDX_CROSS_TD_TRAP" ExitReason;
    0x6000_000A NonRecoverableTdCorruptedMd "TDX_NON_RECOVERABLE_TD_CORRUPTED_MD" Number;
    0xC000_0100 OperandInvalid "TDX_OPERAND_INVALID" Operand;
    0xC000_0101 OperandAddrRangeError "TDX_OPERAND_ADDR_RANGE_ERROR" Operand;
    0x8000_0200 OperandBusy "TDX_OPERAND_BUSY" Operand;
    0x8000_0201 PreviousTlbEpochBusy "TDX_PREVIOUS_TLB_EPOCH_BUSY" Number;
    0x8000_0202 SysBusy "TDX_SYS_BUSY" Number;
    0x8000_0203 RndNoEntropy "TDX_RND_NO_ENTROPY" Number;
    0x8000_0204 OperandBusyHostPriority "TDX_OPERAND_BUSY_HOST_PRIORITY" Operand;
    0x9000_0205 HostPriorityBusyTimeout "TDX_HOST_PRIORITY_BUSY_TIMEOUT" ExitReason;
    0x8000_0206 InterruptedBusy "TDX_INTERRUPTED_BUSY" Operand;
    0xC000_0300 PageMetadataIncorrect "TDX_PAGE_METADATA_INCORRECT" Operand;
    0x0000_0301 PageAlreadyFree "TDX_PAGE_ALREADY_FREE" Operand;
    0xC000_0302 PageNotOwnedByTd "TDX_PAGE_NOT_OWNED_BY_TD" Operand;
    0xC000_0303 PageNotFree "TDX_PAGE_NOT_FREE" Operand;
    0xC000_0304 HpaRangeNotFree "TDX_HPA_RANGE_NOT_FREE" Operand;
    0xC000_0305 NoPamtPagePair "TDX_NO_PAMT_PAGE_PAIR" Operand;
    0xC000_0306 PamtPageNotEmpty "TDX_PAMT_PAGE_NOT_EMPTY" Number;
    0x8000_0307 InterruptedPamt "TDX_INTERRUPTED_PAMT" Operand;
    0x8000_0308 MissingPamtPagePair "TDX_MISSING_PAMT_PAGE_PAIR" Operand;
    0xC000_0400 TdAssociatedPagesExist "TDX_TD_ASSOCIATED_PAGES_EXIST" Operand;
    0xC000_0500 SysInitNotPending "TDX_SYS_INIT_NOT_PENDING" Number;
    0xC000_0502 SysLpInitNotDone "TDX_SYS_LP_INIT_NOT_DONE" Number;
    0xC000_0503 SysLpInitDone "TDX_SYS_LP_INIT_DONE" Number;
    0xC000_0505 SysNotReady "TDX_SYS_NOT_READY" Number;
    0xC000_0506 SysShutdown "TDX_SYS_SHUTDOWN" Number;
    0xC000_0507 SysKeyConfigNotPending "TDX_SYS_KEY_CONFIG_NOT_PENDING" Number;
    0xC000_0508 SysStateIncorrect "TDX_SYS_STATE_INCORRECT" Number;
    0xC000_050B SysLpInitNotPending "TDX_SYS_LP_INIT_NOT_PENDING" Number;
    0xC000_050C SysConfigNotPending "TDX_SYS_CONFIG_NOT_PENDING" Number;
    0xE000_0604 TdFatal "TDX_TD_FATAL" Number;
    0xC000_0605 TdNonDebug "TDX_TD_NON_DEBUG" Number;
    0xC000_0606 TdcsNotAllocated "TDX_TDCS_NOT_ALLOCATED" Number;
    0xC000_0607 LifecycleStateIncorrect "TDX_LIFECYCLE_STATE_INCORRECT" Number;
    0xC000_0608 OpStateIncorrect "TDX_OP_STATE_INCORRECT" OpState;
    0xC000_0609 NoVcpus "TDX_NO_VCPUS" Number;
    0xC000_0610 TdcxNumIncorrect "TDX_TDCX_NUM_INCORRECT" Number;
    0xC000_0621 X2apicIdNotUnique "TDX_X2APIC_ID_NOT_UNIQUE" Number;
    0xC000_0700 VcpuStateIncorrect "TDX_VCPU_STATE_INCORRECT" Number;
    0x8000_0701 VcpuAssociated "TDX_VCPU_ASSOCIATED" Number;
    0x8000_0702 VcpuNotAssociated "TDX_VCPU_NOT_ASSOCIATED" Number;
    0xC000_0704 NoValidVeInfo "TDX_NO_VALID_VE_INFO" Number;
    0xC000_0705 MaxVcpusExceeded "TDX_MAX_VCPUS_EXCEEDED" Number;
    0xC000_0706 TscRollback "TDX_TSC_ROLLBACK" Number;
    0x8000_0800 KeyGenerationFailed "TDX_KEY_GENERATION_FAILED" Number;
    0x8000_0810 TdKeysNotConfigured "TDX_TD_KEYS_NOT_CONFIGURED" Number;
    0xC000_0811 KeyStateIncorrect "TDX_KEY_STATE_INCORRECT" Number;
    0x0000_0815 KeyConfigured "TDX_KEY_CONFIGURED" Number;
    0x8000_0817 WbcacheNotComplete "TDX_WBCACHE_NOT_COMPLETE" Number;
    0xC000_0820 HkidNotFree "TDX_HKID_NOT_FREE" Number;
    0x0000_0821 NoHkidReadyToWbcache "TDX_NO_HKID_READY_TO_WBCACHE" Number;
    0xC000_0823 WbcacheResumeError "TDX_WBCACHE_RESUME_ERROR" Number;
    0x8000_0824 FlushvpNotDone "TDX_FLUSHVP_NOT_DONE" Number;
    0xC000_0825 NumActivatedHkidsNotSupported "TDX_NUM_ACTIVATED_HKIDS_NOT_SUPPORTED" Number;
    0xC000_0901 LimitCpuidMaxvalSet "TDX_LIMIT_CPUID_MAXVAL_SET" Number;
    0xC000_0920 InconsistentMsr "TDX_INCONSISTENT_MSR" Msr;
    0xC000_0921 IncorrectMsrValue "TDX_INCORRECT_MSR_VALUE" Msr;
    0xC000_0A00 InvalidTdmr "TDX_INVALID_TDMR" Number;
    0xC000_0A01 NonOrderedTdmr "TDX_NON_ORDERED_TDMR" Number;
    0xC000_0A02 TdmrOutsideCmrs "TDX_TDMR_OUTSIDE_CMRS" Number;
    0x0000_0A03 TdmrAlreadyInitialized "TDX_TDMR_ALREADY_INITIALIZED" Number;
    0xC000_0A10 InvalidPamt "TDX_INVALID_PAMT" Number;
    0xC000_0A11 PamtOutsideCmrs "TDX_PAMT_OUTSIDE_CMRS" Number;
    0xC000_0A12 PamtOverlap "TDX_PAMT_OVERLAP" Number;
    0xC000_0A20 InvalidReservedInTdmr "TDX_INVALID_RESERVED_IN_TDMR" Number;
    0xC000_0A21 NonOrderedReservedInTdmr "TDX_NON_ORDERED_RESERVED_IN_TDMR" Number;
    0xC000_0A22 CmrListInvalid "TDX_CMR_LIST_INVALID" Number;
    0xC000_0B00 EptWalkFailed "TDX_EPT_WALK_FAILED" Operand;
    0xC000_0B01 EptEntryFree "TDX_EPT_ENTRY_FREE" Operand;
    0xC000_0B02 EptEntryNotFree "TDX_EPT_ENTRY_NOT_FREE" Operand;
    0xC000_0B03 EptEntryNotPresent "TDX_EPT_ENTRY_NOT_PRESENT" Operand;
    0xC000_0B04 EptEntryNotLeaf "TDX_EPT_ENTRY_NOT_LEAF" Operand;
    0xC000_0B05 EptEntryLeaf "TDX_EPT_ENTRY_LEAF" Operand;
    0xC000_0B06 GpaRangeNotBlocked "TDX_GPA_RANGE_NOT_BLOCKED" Operand;
    0x0000_0B07 GpaRangeAlreadyBlocked "TDX_GPA_RANGE_ALREADY_BLOCKED" Operand;
    0xC000_0B08 TlbTrackingNotDone "TDX_TLB_TRACKING_NOT_DONE" Operand;
    0xC000_0B09 EptInvalidPromoteConditions "TDX_EPT_INVALID_PROMOTE_CONDITIONS" Operand;
    0x0000_0B0A PageAlreadyAccepted "TDX_PAGE_ALREADY_ACCEPTED" Level;
    0xC000_0B0B PageSizeMismatch "TDX_PAGE_SIZE_MISMATCH" Level;
    0xC000_0B0C GpaRangeBlocked "TDX_GPA_RANGE_BLOCKED" Operand;
    0xC000_0B0D EptEntryStateIncorrect "TDX_EPT_ENTRY_STATE_INCORRECT" Operand;
    0xC000_0B0E EptPageNotFree "TDX_EPT_PAGE_NOT_FREE" Operand;
    0xC000_0B0F L2SeptWalkFailed "TDX_L2_SEPT_WALK_FAILED" Number;
    0xC000_0B10 L2SeptEntryNotFree "TDX_L2_SEPT_ENTRY_NOT_FREE" Number;
    0xC000_0B11 PageAttrInvalid "TDX_PAGE_ATTR_INVALID" Number;
    0xC000_0B12 L2SeptPageNotProvided "TDX_L2_SEPT_PAGE_NOT_PROVIDED" Operand;
    0xC000_0C00 MetadataFieldIdIncorrect "TDX_METADATA_FIELD_ID_INCORRECT" Operand;
    0xC000_0C01 MetadataFieldNotWritable "TDX_METADATA_FIELD_NOT_WRITABLE" Operand;
    0xC000_0C02 MetadataFieldNotReadable "TDX_METADATA_FIELD_NOT_READABLE" Operand;
    0xC000_0C03 MetadataFieldValueNotValid "TDX_METADATA_FIELD_VALUE_NOT_VALID" Operand;
    0x0000_0C0B MetadataFirstFieldIdInContext "TDX_METADATA_FIRST_FIELD_ID_IN_CONTEXT" Operand;
    0xC000_0F03 IommuIotlbTrackingNotDone "TDX_IOMMU_IOTLB_TRACKING_NOT_DONE" Operand;
}

/// A completion status: bits 63:32 a [`Code`], bits 31:0 its details.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Status(pub u64);

impl Status {
    /// The leaf did what was asked; no details.
    pub const SUCCESS: Status = Status(0);

    /// A status of `code` with `details` in bits 31:0.
    pub const fn new(code: Code, details: u32) -> Status {
        Status(((code as u32 as u64) << 32) | details as u64)
    }

    /// A status of `code` that names an operand or object.
    pub const fn on(code: Code, operand: Operand) -> Status {
        Status::new(code, operand.0)
    }

    /// Bits 63:32.
    pub const fn upper(self) -> u32 {
        (self.0 >> 32) as u32
    }

    /// Bits 31:0.
    pub const fn details(self) -> u32 {
        self.0 as u32
    }

    /// The code of bits 63:32, or `None` for a value the module never returns.
    pub fn code(self) -> Option<Code> {
        Code::from_upper(self.upper())
    }

    /// Whether bits 63:32 are `code`.
    pub fn is(self, code: Code) -> bool {
        self.upper() == code as u32
    }

    /// Bit 63: the leaf failed. Informational statuses such as `TDX_GPA_RANGE_ALREADY_BLOCKED` are nonzero with this bit clear.
    pub const fn is_error(self) -> bool {
        self.0 >> 63 == 1
    }

    /// Whether the whole value is zero, which is what KVM tests for.
    pub const fn is_zero(self) -> bool {
        self.0 == 0
    }
}

/// `BUSY` of an operand or object, the most common failure.
pub(crate) const fn busy(operand: Operand) -> Status {
    Status::on(Code::OperandBusy, operand)
}

/// `OPERAND_INVALID` of an operand.
pub(crate) const fn invalid(operand: Operand) -> Status {
    Status::on(Code::OperandInvalid, operand)
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(code) = self.code() else {
            return write!(f, "{:#018x}", self.0);
        };
        f.write_str(code.name())?;
        let details = self.details();
        match code.detail_kind() {
            DetailKind::Operand => match Operand(details).name() {
                Some(name) => write!(f, " | {name}"),
                None => write!(f, " | operand {details}"),
            },
            DetailKind::Level => write!(f, " | level {details}"),
            DetailKind::OpState if details == 0 => Ok(()),
            DetailKind::OpState => match OpState::from_number(details) {
                Some(state) => write!(f, " | {}", state.name()),
                None => write!(f, " | op state {details}"),
            },
            DetailKind::Msr => write!(f, " | MSR {details:#x}"),
            DetailKind::ExitReason if details == 0 => Ok(()),
            DetailKind::ExitReason => write!(f, " | exit reason {details}"),
            DetailKind::Number if details == 0 => Ok(()),
            DetailKind::Number => write!(f, " | {details}"),
        }
    }
}

impl fmt::Debug for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#018x} ({self})", self.0)
    }
}

impl fmt::LowerHex for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::LowerHex::fmt(&self.0, f)
    }
}

impl From<Code> for Status {
    fn from(code: Code) -> Status {
        Status::new(code, 0)
    }
}

/// Why a text is not a status.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParseStatusError {
    text: String,
}

impl fmt::Display for ParseStatusError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "`{}` is not a completion status: write a number such as 0x8000020000000092, or a name such as TDX_OPERAND_BUSY|SEPT_TREE",
            self.text
        )
    }
}

impl std::error::Error for ParseStatusError {}

/// A number in decimal or `0x` hexadecimal with optional underscores.
pub(crate) fn parse_number(text: &str) -> Option<u64> {
    let text = text.replace('_', "");
    match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(hex) => u64::from_str_radix(hex, 16).ok(),
        None => text.parse().ok(),
    }
}

impl FromStr for Status {
    type Err = ParseStatusError;

    /// Reads `0x8000020000000092`, `TDX_OPERAND_BUSY|SEPT_TREE`, `OPERAND_BUSY | 146` or `TDX_SUCCESS`.
    fn from_str(text: &str) -> Result<Status, ParseStatusError> {
        let wrong = || ParseStatusError { text: text.to_string() };
        let (code, details) = match text.split_once('|') {
            Some((code, details)) => (code.trim(), Some(details.trim())),
            None => (text.trim(), None),
        };
        if details.is_none()
            && let Some(number) = parse_number(code)
        {
            return Ok(Status(number));
        }
        let code = Code::ALL
            .iter()
            .copied()
            .find(|c| c.name() == code || c.name().strip_prefix("TDX_") == Some(code))
            .ok_or_else(wrong)?;
        let details = match details {
            None => 0,
            Some(text) => match (Operand::from_name(text), parse_number(text)) {
                (Some(operand), _) => operand.0,
                (None, Some(number)) => u32::try_from(number).map_err(|_| wrong())?,
                (None, None) => return Err(wrong()),
            },
        };
        Ok(Status::new(code, details))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn worked_examples_of_spec_2_4_have_their_values() {
        let cases = [
            (busy(Operand::SEPT_TREE), 0x8000_0200_0000_0092, "TDX_OPERAND_BUSY | SEPT_TREE"),
            (busy(Operand::RCX), 0x8000_0200_0000_0001, "TDX_OPERAND_BUSY | RCX"),
            (busy(Operand::TD_EPOCH), 0x8000_0200_0000_00A9, "TDX_OPERAND_BUSY | TD_EPOCH"),
            (busy(Operand::OP_STATE), 0x8000_0200_0000_00AC, "TDX_OPERAND_BUSY | OP_STATE"),
            (
                Status::on(Code::EptEntryStateIncorrect, Operand::RCX),
                0xC000_0B0D_0000_0001,
                "TDX_EPT_ENTRY_STATE_INCORRECT | RCX",
            ),
            (Status::new(Code::PageAlreadyAccepted, 1), 0x0000_0B0A_0000_0001, "TDX_PAGE_ALREADY_ACCEPTED | level 1"),
            (Status::from(Code::PreviousTlbEpochBusy), 0x8000_0201_0000_0000, "TDX_PREVIOUS_TLB_EPOCH_BUSY"),
        ];
        for (status, value, text) in cases {
            assert_eq!(status.0, value);
            assert_eq!(status.to_string(), text);
        }
    }

    #[test]
    fn every_code_is_found_by_number_and_by_name() {
        for &code in Code::ALL {
            assert_eq!(Code::from_upper(code as u32), Some(code));
            assert_eq!(code.name().parse::<Status>(), Ok(Status::from(code)));
        }
        assert_eq!("OPERAND_BUSY|SEPT_TREE".parse::<Status>(), Ok(busy(Operand::SEPT_TREE)));
        assert_eq!("0x8000_0200_0000_0001".parse::<Status>(), Ok(busy(Operand::RCX)));
        assert!("TDX_OPERAND_BUSY|NOTHING".parse::<Status>().is_err());
    }
}
