//! Leaf numbers of SEAMCALL and TDCALL, their names, and which of them this module models (TDX module spec 3.2 and 3.7).

/// What this module does when a leaf is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// Behaves as the specification says.
    Modelled,
    /// Exists in the real module, here it answers as an unknown leaf does: `TDX_OPERAND_INVALID | RAX`.
    AnswersAsUnknown,
    /// Belongs to migration, L2 partitions, service TDs or TDX-IO, which are out of scope; answers as an unknown leaf does.
    OutOfScope,
    /// Has a number but no function in the real module either.
    Reserved,
}

/// A SEAMCALL leaf by number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LeafInfo {
    /// RAX bits 15:0.
    pub number: u16,
    /// The name in the module's specification.
    pub name: &'static str,
    /// What this module does with it.
    pub standing: Standing,
}

macro_rules! leaves {
    ($info:ident $all:ident $ident:ident, $doc:literal, { $($variant:ident = $number:literal $name:literal;)* } others { $($onumber:literal $oname:literal $standing:ident;)* }) => {
        #[doc = $doc]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[repr(u16)]
        pub enum $ident {
            $(#[doc = concat!("`", $name, "`, leaf ", stringify!($number), ".")] $variant = $number,)*
        }

        impl $ident {
            /// Every modelled leaf.
            pub const ALL: &'static [$ident] = &[$($ident::$variant,)*];

            /// The modelled leaf with this number.
            pub fn from_number(number: u16) -> Option<$ident> {
                match number {
                    $($number => Some($ident::$variant),)*
                    _ => None,
                }
            }

            /// RAX bits 15:0.
            pub fn number(self) -> u16 {
                self as u16
            }

            /// The name in the module's specification.
            pub fn name(self) -> &'static str {
                match self {
                    $($ident::$variant => $name,)*
                }
            }

            /// The modelled leaf called `name`, with or without its `TDH.` or `TDG.` prefix, in either case.
            pub fn from_name(name: &str) -> Option<$ident> {
                $ident::ALL.iter().copied().find(|leaf| {
                    leaf.name().eq_ignore_ascii_case(name) || leaf.name()[4..].eq_ignore_ascii_case(name)
                })
            }
        }

        #[doc = concat!("Every leaf number of `", stringify!($ident), "` that has a name, modelled or not, ascending within each kind.")]
        pub const $all: &[LeafInfo] = &[
            $(LeafInfo { number: $number, name: $name, standing: Standing::Modelled },)*
            $(LeafInfo { number: $onumber, name: $oname, standing: Standing::$standing },)*
        ];

        /// What is known of a leaf number, modelled or not; `None` for a number nobody has given a meaning.
        pub fn $info(number: u16) -> Option<&'static LeafInfo> {
            $all.iter().find(|info| info.number == number)
        }
    };
}

leaves! { seamcall_info SEAMCALL_LEAVES Leaf, "A SEAMCALL leaf this module models.", {
    VpEnter = 0 "TDH.VP.ENTER";
    MngAddcx = 1 "TDH.MNG.ADDCX";
    MemPageAdd = 2 "TDH.MEM.PAGE.ADD";
    MemSeptAdd = 3 "TDH.MEM.SEPT.ADD";
    VpAddcx = 4 "TDH.VP.ADDCX";
    MemPageRelocate = 5 "TDH.MEM.PAGE.RELOCATE";
    MemPageAug = 6 "TDH.MEM.PAGE.AUG";
    MemRangeBlock = 7 "TDH.MEM.RANGE.BLOCK";
    MngKeyConfig = 8 "TDH.MNG.KEY.CONFIG";
    MngCreate = 9 "TDH.MNG.CREATE";
    VpCreate = 10 "TDH.VP.CREATE";
    MngRd = 11 "TDH.MNG.RD";
    MemRd = 12 "TDH.MEM.RD";
    MemWr = 14 "TDH.MEM.WR";
    MemPageDemote = 15 "TDH.MEM.PAGE.DEMOTE";
    MrExtend = 16 "TDH.MR.EXTEND";
    MrFinalize = 17 "TDH.MR.FINALIZE";
    VpFlush = 18 "TDH.VP.FLUSH";
    MngVpflushdone = 19 "TDH.MNG.VPFLUSHDONE";
    MngKeyFreeid = 20 "TDH.MNG.KEY.FREEID";
    MngInit = 21 "TDH.MNG.INIT";
    VpInit = 22 "TDH.VP.INIT";
    MemPagePromote = 23 "TDH.MEM.PAGE.PROMOTE";
    PhymemPageRdmd = 24 "TDH.PHYMEM.PAGE.RDMD";
    MemSeptRd = 25 "TDH.MEM.SEPT.RD";
    VpRd = 26 "TDH.VP.RD";
    MngKeyReclaimid = 27 "TDH.MNG.KEY.RECLAIMID";
    PhymemPageReclaim = 28 "TDH.PHYMEM.PAGE.RECLAIM";
    MemPageRemove = 29 "TDH.MEM.PAGE.REMOVE";
    MemSeptRemove = 30 "TDH.MEM.SEPT.REMOVE";
    SysKeyConfig = 31 "TDH.SYS.KEY.CONFIG";
    SysInit = 33 "TDH.SYS.INIT";
    SysRd = 34 "TDH.SYS.RD";
    SysLpInit = 35 "TDH.SYS.LP.INIT";
    SysTdmrInit = 36 "TDH.SYS.TDMR.INIT";
    MemTrack = 38 "TDH.MEM.TRACK";
    MemRangeUnblock = 39 "TDH.MEM.RANGE.UNBLOCK";
    PhymemCacheWb = 40 "TDH.PHYMEM.CACHE.WB";
    PhymemPageWbinvd = 41 "TDH.PHYMEM.PAGE.WBINVD";
    VpWr = 43 "TDH.VP.WR";
    SysLpShutdown = 44 "TDH.SYS.LP.SHUTDOWN";
    SysConfig = 45 "TDH.SYS.CONFIG";
    SysShutdown = 52 "TDH.SYS.SHUTDOWN";
    PhymemPamtAdd = 58 "TDH.PHYMEM.PAMT.ADD";
    PhymemPamtRemove = 59 "TDH.PHYMEM.PAMT.REMOVE";
} others {
    13 "TDH.MNG.WR" AnswersAsUnknown;
    32 "TDH.SYS.INFO" AnswersAsUnknown;
    37 "TDH.SYS.RDALL" AnswersAsUnknown;
    42 "TDH.MEM.SEPT.WR" Reserved;
    48 "TDH.SERVTD.BIND" OutOfScope;
    49 "TDH.SERVTD.PREBIND" OutOfScope;
    53 "TDH.SYS.UPDATE" OutOfScope;
    64 "TDH.EXPORT.ABORT" OutOfScope;
    65 "TDH.EXPORT.BLOCKW" OutOfScope;
    66 "TDH.EXPORT.RESTORE" OutOfScope;
    68 "TDH.EXPORT.MEM" OutOfScope;
    69 "TDH.SYS.DISABLE" AnswersAsUnknown;
    70 "TDH.EXPORT.PAUSE" OutOfScope;
    71 "TDH.EXPORT.TRACK" OutOfScope;
    72 "TDH.EXPORT.STATE.IMMUTABLE" OutOfScope;
    73 "TDH.EXPORT.STATE.TD" OutOfScope;
    74 "TDH.EXPORT.STATE.VP" OutOfScope;
    75 "TDH.EXPORT.UNBLOCKW" OutOfScope;
    80 "TDH.IMPORT.ABORT" OutOfScope;
    81 "TDH.IMPORT.END" OutOfScope;
    82 "TDH.IMPORT.COMMIT" OutOfScope;
    83 "TDH.IMPORT.MEM" OutOfScope;
    84 "TDH.IMPORT.TRACK" OutOfScope;
    85 "TDH.IMPORT.STATE.IMMUTABLE" OutOfScope;
    86 "TDH.IMPORT.STATE.TD" OutOfScope;
    87 "TDH.IMPORT.STATE.VP" OutOfScope;
    96 "TDH.MIG.STREAM.CREATE" OutOfScope;
} }

/// The first and last leaf numbers newer modules use for TDX-IO, all out of scope.
pub const TDX_IO_LEAVES: (u16, u16) = (128, 166);

leaves! { tdcall_info TDCALL_LEAVES TdcallLeaf, "A TDCALL leaf this module models.", {
    VpVmcall = 0 "TDG.VP.VMCALL";
    VpInfo = 1 "TDG.VP.INFO";
    MrRtmrExtend = 2 "TDG.MR.RTMR.EXTEND";
    VpVeinfoGet = 3 "TDG.VP.VEINFO.GET";
    MemPageAccept = 6 "TDG.MEM.PAGE.ACCEPT";
    MemPageAttrRd = 23 "TDG.MEM.PAGE.ATTR.RD";
    MemPageAttrWr = 24 "TDG.MEM.PAGE.ATTR.WR";
    MemPageRelease = 30 "TDG.MEM.PAGE.RELEASE";
} others {
    4 "TDG.MR.REPORT" AnswersAsUnknown;
    5 "TDG.VP.CPUIDVE.SET" AnswersAsUnknown;
    7 "TDG.VM.RD" AnswersAsUnknown;
    8 "TDG.VM.WR" AnswersAsUnknown;
    9 "TDG.VP.RD" AnswersAsUnknown;
    10 "TDG.VP.WR" AnswersAsUnknown;
    11 "TDG.SYS.RD" AnswersAsUnknown;
    12 "TDG.SYS.RDALL" AnswersAsUnknown;
    18 "TDG.SERVTD.RD" OutOfScope;
    20 "TDG.SERVTD.WR" OutOfScope;
    22 "TDG.MR.VERIFYREPORT" AnswersAsUnknown;
    25 "TDG.VP.ENTER" OutOfScope;
    26 "TDG.VP.INVEPT" OutOfScope;
    27 "TDG.VP.INVVPID" OutOfScope;
} }

impl Leaf {
    /// The highest version of the leaf's interface; `newer` is whether the module behaves as the 2.0 generation.
    pub fn max_version(self, generation: super::switches::Generation) -> u8 {
        match self {
            Leaf::MemPagePromote | Leaf::MemSeptAdd | Leaf::MemSeptRemove | Leaf::MngRd | Leaf::VpRd => 1,
            Leaf::VpInit if generation == super::switches::Generation::Newer => 1,
            _ => 0,
        }
    }
}

/// Whether a leaf number, modelled or not, passes the dispatcher before the module is ready: SYS.INFO, RD, RDALL, INIT, LP.INIT, CONFIG,
/// KEY.CONFIG, LP.SHUTDOWN and UPDATE (TDX module spec 3.1).
pub fn legal_before_ready(number: u16) -> bool {
    matches!(number, 31 | 32 | 33 | 34 | 35 | 37 | 44 | 45 | 53)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_leaf_number_stands_once_and_has_a_standing() {
        for table in [SEAMCALL_LEAVES, TDCALL_LEAVES] {
            let mut numbers: Vec<u16> = table.iter().map(|info| info.number).collect();
            numbers.sort_unstable();
            let before = numbers.len();
            numbers.dedup();
            assert_eq!(before, numbers.len());
        }
        for info in SEAMCALL_LEAVES {
            assert_eq!(Leaf::from_number(info.number).is_some(), info.standing == Standing::Modelled, "{}", info.name);
        }
        for info in TDCALL_LEAVES {
            assert_eq!(
                TdcallLeaf::from_number(info.number).is_some(),
                info.standing == Standing::Modelled,
                "{}",
                info.name
            );
        }
        assert_eq!(Leaf::from_name("MEM.PAGE.AUG"), Some(Leaf::MemPageAug));
        assert_eq!(Leaf::from_name("tdh.mem.page.aug"), Some(Leaf::MemPageAug));
    }
}
