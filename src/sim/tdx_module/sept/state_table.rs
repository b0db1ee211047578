//! Entry states, their codes, and which leaf accepts which (TDX module spec 4.2 to 4.4).

use super::SeptEntry;

macro_rules! states {
    ($($(#[$doc:meta])* $variant:ident = $index:literal $code:literal $public:literal $rwx:literal $name:literal;)*) => {
        /// State of an entry of the Secure EPT. MMIO and L2 states are out of scope.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[repr(u8)]
        pub enum SeptState {
            $($(#[$doc])* $variant = $index,)*
        }

        impl SeptState {
            /// All states.
            pub const ALL: &'static [SeptState] = &[$(SeptState::$variant,)*];

            /// The state with this 7-bit code.
            #[inline]
            pub fn from_code(code: u8) -> Option<SeptState> {
                match code {
                    $($code => Some(SeptState::$variant),)*
                    _ => None,
                }
            }

            /// The 7-bit code.
            pub fn code(self) -> u8 {
                match self { $(SeptState::$variant => $code,)* }
            }

            /// The number the leaves return in RDX bits 15:8.
            pub fn public(self) -> u8 {
                match self { $(SeptState::$variant => $public,)* }
            }

            /// Hardware permissions of an entry in this state.
            #[inline]
            pub fn rwx(self) -> u64 {
                match self { $(SeptState::$variant => $rwx,)* }
            }

            /// The name in the module's specification.
            pub fn name(self) -> &'static str {
                match self { $(SeptState::$variant => $name,)* }
            }
        }
    };
}

states! {
    /// Nothing here.
    Free = 0 0x0E 0 0 "FREE";
    /// Removed during an import.
    Removed = 1 0x0C 5 0 "REMOVED";
    /// Points to a table.
    NlMapped = 2 0x00 132 7 "NL_MAPPED";
    /// Points to a table, blocked.
    NlBlocked = 3 0x08 129 0 "NL_BLOCKED";
    /// Maps a page.
    Mapped = 4 0x60 4 7 "MAPPED";
    /// Maps a page, blocked.
    Blocked = 5 0x68 1 0 "BLOCKED";
    /// Maps a page, blocked for writing.
    BlockedW = 6 0x64 8 5 "BLOCKEDW";
    /// Migration.
    ExportedBlockedW = 7 0x66 9 5 "EXPORTED_BLOCKEDW";
    /// Migration.
    ExportedDirty = 8 0x63 11 7 "EXPORTED_DIRTY";
    /// Migration.
    ExportedDirtyBlockedW = 9 0x67 12 5 "EXPORTED_DIRTY_BLOCKEDW";
    /// Given, not accepted.
    Pending = 10 0x70 2 0 "PENDING";
    /// Given, not accepted, blocked.
    PendingBlocked = 11 0x78 3 0 "PENDING_BLOCKED";
    /// Given, not accepted, blocked for writing.
    PendingBlockedW = 12 0x74 16 0 "PENDING_BLOCKEDW";
    /// Migration.
    PendingExportedBlockedW = 13 0x76 17 0 "PENDING_EXPORTED_BLOCKEDW";
    /// Migration.
    PendingExportedDirty = 14 0x73 19 0 "PENDING_EXPORTED_DIRTY";
    /// Migration.
    PendingExportedDirtyBlockedW = 15 0x77 20 0 "PENDING_EXPORTED_DIRTY_BLOCKEDW";
}

/// A leaf or TDCALL that the state table has a row for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum SeptOp {
    PageAdd,
    PageAug,
    SeptAdd,
    RangeBlock,
    RangeUnblock,
    PageRemove,
    PageRelocate,
    PagePromote,
    PageDemote,
    SeptRemove,
    SeptRd,
    MrExtend,
    MemRd,
    MemWr,
    Accept,
    AttrRd,
    AttrWr,
    Release,
}

impl SeptState {
    /// The entry of this state with no page.
    pub fn raw(self) -> u64 {
        let code = self.code() as u64;
        let kind = (code & 1) << 9 | ((code >> 1) & 0xF) << 53 | ((code >> 5) & 3) << 6;
        let mt = if self.is_leaf() { SeptEntry::MT_WB } else { 0 };
        SeptEntry::SVE | kind | mt | self.rwx()
    }

    /// Whether an entry in this state is a leaf.
    pub fn is_leaf(self) -> bool {
        !matches!(self, SeptState::Free | SeptState::Removed | SeptState::NlMapped | SeptState::NlBlocked)
    }

    /// Blocked for reading and writing.
    pub fn any_blocked(self) -> bool {
        matches!(self, SeptState::NlBlocked | SeptState::Blocked | SeptState::PendingBlocked)
    }

    /// Not accepted yet, in any variant.
    pub fn any_pending(self) -> bool {
        self as u8 >= SeptState::Pending as u8
    }

    /// The guest may accept it.
    pub fn acceptable(self) -> bool {
        matches!(self, SeptState::Pending | SeptState::PendingExportedDirty)
    }

    /// A leaf the guest can at least read.
    pub fn guest_accessible(self) -> bool {
        self.is_leaf() && self.rwx() != 0
    }

    /// Unmapping an entry in this state needs TLB tracking (in an op state that does).
    pub fn tracking_required(self) -> bool {
        !matches!(
            self,
            SeptState::Free | SeptState::Removed | SeptState::ExportedBlockedW | SeptState::PendingExportedBlockedW
        )
    }

    /// The state after BLOCK, for the states BLOCK takes.
    pub fn blocked(self) -> Option<SeptState> {
        match self {
            SeptState::NlMapped => Some(SeptState::NlBlocked),
            SeptState::Mapped | SeptState::BlockedW => Some(SeptState::Blocked),
            SeptState::Pending | SeptState::PendingBlockedW => Some(SeptState::PendingBlocked),
            _ => None,
        }
    }

    /// The state after UNBLOCK, RELOCATE or DEMOTE: blocked states go back, write-blocked ones too.
    pub fn unblocked(self) -> SeptState {
        match self {
            SeptState::NlBlocked => SeptState::NlMapped,
            SeptState::Blocked | SeptState::BlockedW => SeptState::Mapped,
            SeptState::PendingBlocked | SeptState::PendingBlockedW => SeptState::Pending,
            other => other,
        }
    }

    /// Whether `op` takes an entry in this state (TDX module spec 4.4).
    pub fn allows(self, op: SeptOp) -> bool {
        use SeptState::*;
        let exported = matches!(
            self,
            ExportedBlockedW
                | ExportedDirty
                | ExportedDirtyBlockedW
                | PendingExportedBlockedW
                | PendingExportedDirty
                | PendingExportedDirtyBlockedW
        );
        match op {
            SeptOp::PageAdd => self == Free,
            SeptOp::PageAug => matches!(self, Free | Removed),
            SeptOp::SeptAdd => matches!(self, Free | NlMapped),
            SeptOp::RangeBlock => matches!(self, NlMapped | Mapped | BlockedW | Pending | PendingBlockedW),
            SeptOp::RangeUnblock => self.any_blocked(),
            SeptOp::PageRemove => {
                matches!(self, Mapped | Blocked | BlockedW | Pending | PendingBlocked | PendingBlockedW)
            }
            SeptOp::PageRelocate => {
                exported || matches!(self, Mapped | Blocked | BlockedW | Pending | PendingBlocked | PendingBlockedW)
            }
            SeptOp::PagePromote | SeptOp::SeptRemove => matches!(self, NlMapped | NlBlocked),
            SeptOp::PageDemote => matches!(self, Mapped | Blocked | Pending | PendingBlocked),
            SeptOp::SeptRd => true,
            SeptOp::MrExtend => self == Mapped,
            SeptOp::MemRd => {
                matches!(self, Mapped | BlockedW | ExportedBlockedW | ExportedDirty | ExportedDirtyBlockedW)
            }
            SeptOp::MemWr | SeptOp::Release => matches!(self, Mapped | ExportedDirty),
            SeptOp::Accept => self.acceptable(),
            SeptOp::AttrRd => matches!(self, Mapped | BlockedW | Pending | PendingBlockedW) || exported,
            SeptOp::AttrWr => matches!(self, Mapped | Pending | ExportedDirty | PendingExportedDirty),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn raw_values_of_spec_4_2_come_out_of_the_state_codes() {
        let cases = [
            (SeptState::Free, 0x80E0_0000_0000_0000),
            (SeptState::Removed, 0x80C0_0000_0000_0000),
            (SeptState::NlMapped, 0x8000_0000_0000_0007),
            (SeptState::NlBlocked, 0x8080_0000_0000_0000),
            (SeptState::Mapped, 0x8000_0000_0000_00F7),
            (SeptState::Blocked, 0x8080_0000_0000_00F0),
            (SeptState::BlockedW, 0x8040_0000_0000_00F5),
            (SeptState::Pending, 0x8100_0000_0000_00F0),
            (SeptState::PendingBlocked, 0x8180_0000_0000_00F0),
            (SeptState::PendingBlockedW, 0x8140_0000_0000_00F0),
        ];
        for (state, raw) in cases {
            assert_eq!(state.raw(), raw, "{}", state.name());
        }
        for &state in SeptState::ALL {
            assert_eq!(SeptEntry(state.raw() | 0x1234_5000).state(), Some(state));
            assert_eq!(SeptState::from_code(state.code()), Some(state));
        }
        assert_eq!(SeptEntry::FREE.0, SeptState::Free.raw());
    }

    #[test]
    fn architectural_entries_show_what_spec_4_5_lets_out() {
        let hpa = 0x1_2345_6000;
        let lock = SeptEntry::TDEL | SeptEntry::TDHP;
        let shown = |state: SeptState| SeptEntry(state.raw() | hpa | lock).architectural();
        assert_eq!(shown(SeptState::Mapped), 0x8000_0000_0000_00F7 | hpa);
        for state in [SeptState::Blocked, SeptState::Pending, SeptState::PendingBlocked] {
            assert_eq!(shown(state), 0x8000_0000_0000_00F0 | hpa);
        }
        assert_eq!((shown(SeptState::NlMapped), shown(SeptState::NlBlocked)), (7, 0));
        assert_eq!(SeptEntry::FREE.architectural(), 0x8000_0000_0000_0000);
        assert_eq!(SeptEntry(SeptState::Pending.raw()).info(1), 0x201);
    }
}
