//! Operand and object ids, the details of most failures (TDX module spec 2.4).

/// Bits 31:0 of a status that names an operand: a register, a TD_PARAMS field or an object reached implicitly.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Operand(pub u32);

macro_rules! operands {
    ($($name:ident $number:literal)*) => {
        impl Operand {
            $(#[doc = concat!("Operand id ", stringify!($number), ".")] pub const $name: Operand = Operand($number);)*

            const NAMED: &'static [(&'static str, u32)] = &[$((stringify!($name), $number),)*];
        }
    };
}

operands! {
    RAX 0 RCX 1 RDX 2 RBX 3 RBP 5 RSI 6 RDI 7
    R8 8 R9 9 R10 10 R11 11 R12 12 R13 13 R14 14 R15 15
    ATTRIBUTES 64 XFAM 65 CONFIG_FLAGS 66 EPTP_CONTROLS 67 MAX_VCPUS 68 CPUID_CONFIG 69 TSC_FREQUENCY 70
    NUM_L2_VMS 71 IA32_ARCH_CAPABILITIES_CONFIG 72
    PAGE 95 TDMR_INFO_PA 96 GPA_LIST_ENTRY 97 MIG_BUFF_LIST_ENTRY 98 NEW_PAGE_LIST_ENTRY 99
    TDR 128 TDCX 129 TDVPR 130 REG_PAGE 132 TDCS 144 TDVPS 145 SEPT_TREE 146 SEPT_ENTRY 147 RTMR 168 TD_EPOCH 169
    L2_VAPIC_GPA 170 MIGSC 171 OP_STATE 172 MIG 173 SERVTD_BINDINGS 174 METADATA_FIELD 176
    SYS 184 TDMR 185 KOT 186 KET 187 WBCACHE 188
}

impl Operand {
    /// The operand's name in the module's headers, or `None` for an id that has none.
    pub fn name(self) -> Option<&'static str> {
        Self::NAMED.iter().find(|(_, number)| *number == self.0).map(|(name, _)| *name)
    }

    /// The operand called `name`.
    pub fn from_name(name: &str) -> Option<Operand> {
        Self::NAMED.iter().find(|(known, _)| known.eq_ignore_ascii_case(name)).map(|(_, number)| Operand(*number))
    }
}
