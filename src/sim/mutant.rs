//! Switchable defects of the model: what the selftests must notice.

/// Machines on which a mutant can show, the most telling one first: values of [`Mutant::machines`].
mod on {
    /// What every VM does.
    pub const ANY: &[&str] = &["sim:default", "sim:sw-protected"];
    /// Files that the host maps: those of VMs without private memory, and those that are converted in place.
    pub const MAPPED: &[&str] = &["sim:default", "sim:sw-protected,kernel=in-place"];
    /// Private memory whose attribute is the VM's.
    pub const PRIVATE: &[&str] = &["sim:sw-protected", "sim:tdx"];
    /// Conversion on the file.
    pub const IN_PLACE: &[&str] = &["sim:sw-protected,kernel=in-place", "sim:tdx,kernel=in-place"];
    /// Huge folios, split and merged.
    pub const HUGE: &[&str] = &["sim:sw-protected,kernel=huge", "sim:tdx,kernel=huge"];
    /// The S-EPT.
    pub const TDX: &[&str] = &["sim:tdx", "sim:tdx,kernel=in-place"];
    /// Conversion asked of a VM without private memory.
    pub const DEFAULT_IN_PLACE: &[&str] = &["sim:default,kernel=in-place"];
    /// A TD of each way to convert: what is unmapped without need is lost.
    pub const TD_CONTENTS: &[&str] = &["sim:tdx", "sim:tdx,kernel=in-place"];
    /// The answers to a failed unmap that do more than bug the VM.
    pub const UNMAP_FAILURE: &[&str] = &[
        "sim:tdx,kernel=in-place,policy=fail-unmap",
        "sim:tdx,policy=hold-on-error",
        "sim:tdx,policy=poison",
        "sim:tdx",
    ];
    /// The error goes up to the caller.
    pub const FAIL_UNMAP: &[&str] = &["sim:tdx,kernel=in-place,policy=fail-unmap", "sim:tdx,policy=fail-unmap"];
    /// Every mapped page has a reference.
    pub const PINNED: &[&str] = &["sim:tdx,kernel=6.18", "sim:tdx,kernel=6.16"];
    /// Huge mappings of a TD.
    pub const TDX_HUGE: &[&str] = &["sim:tdx,kernel=huge"];
}

macro_rules! mutants {
    ($($(#[doc = $doc:literal])+ $variant:ident = $name:literal $(on $machines:ident)?,)+) => {
        /// A defect that can be switched on in the model, by the machine option `mutant=`.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum Mutant {
            $($(#[doc = $doc])+ $variant,)+
        }

        impl Mutant {
            /// Every mutant.
            pub const ALL: &'static [Mutant] = &[$(Mutant::$variant,)+];

            /// The value of `mutant=`.
            pub fn name(self) -> &'static str {
                match self {
                    $(Mutant::$variant => $name,)+
                }
            }

            /// One line on what is broken.
            pub fn description(self) -> &'static str {
                match self {
                    $(Mutant::$variant => concat!($($doc,)+).trim_ascii(),)+
                }
            }

            /// Specs of the machines on which the defect can show; it survives when no claim fails on any of them.
            pub fn machines(self) -> &'static [&'static str] {
                match self {
                    $(Mutant::$variant => mutants!(@on $($machines)?),)+
                }
            }

            /// The mutant of a name.
            pub fn from_name(name: &str) -> Option<Mutant> {
                Mutant::ALL.iter().copied().find(|mutant| mutant.name() == name)
            }
        }
    };
    (@on) => { on::ANY };
    (@on $machines:ident) => { on::$machines };
}

mutants! {
    /// Punch hole leaves the guest's mappings of the range in place.
    PunchSkipsZap = "punch-skips-zap",
    /// Punch hole frees one page too few.
    PunchOnePageShort = "punch-one-page-short",
    /// Punch hole frees one page too many.
    PunchOnePageLong = "punch-one-page-long",
    /// Punch hole leaves the host's PTEs in place.
    PunchSkipsHostUnmap = "punch-skips-host-unmap" on MAPPED,
    /// Punch hole at or after the end of the file fails with EINVAL.
    PunchChecksSize = "punch-checks-size",
    /// fallocate does not check offset + len against the size.
    AllocateIgnoresSize = "allocate-ignores-size",
    /// fallocate checks alignment only of the offset.
    FallocateIgnoresLenAlignment = "fallocate-ignores-len-alignment",
    /// fallocate answers EINVAL to an unsupported mode.
    FallocateModeIsEinval = "fallocate-mode-is-einval",
    /// fallocate zeroes the pages and marks them up to date.
    AllocateZeroes = "allocate-zeroes",
    /// Allocating over an allocated page replaces it.
    AllocateReplaces = "allocate-replaces",
    /// A page is not zeroed before its first use.
    SkipZeroing = "skip-zeroing",
    /// A page that is up to date is zeroed again at the next host fault.
    ZeroTwice = "zero-twice" on MAPPED,
    /// A host access beyond the end of the file is let through.
    HostFaultIgnoresSize = "host-fault-ignores-size" on MAPPED,
    /// A host access to a private file is let through.
    HostFaultIgnoresPrivate = "host-fault-ignores-private" on MAPPED,
    /// A second file created on a VM gets the first one's inode number.
    InodeNumberReused = "inode-number-reused",
    /// fstat reports the allocated blocks.
    StatCountsBlocks = "stat-counts-blocks",
    /// A punch does not update the file's times.
    PunchKeepsTimes = "punch-keeps-times",
    /// KVM_CREATE_GUEST_MEMFD checks the size before the flags, with EFBIG for negative sizes.
    CreateSizeIsEfbig = "create-size-is-efbig",
    /// KVM_CREATE_GUEST_MEMFD accepts unaligned sizes.
    CreateAcceptsUnaligned = "create-accepts-unaligned",
    /// KVM_CREATE_GUEST_MEMFD does not check flags.
    CreateIgnoresFlags = "create-ignores-flags",
    /// KVM_CREATE_GUEST_MEMFD refuses non-zero reserved words.
    CreateChecksReserved = "create-checks-reserved",
    /// Binding ignores other bindings of the same range.
    BindIgnoresOverlap = "bind-ignores-overlap",
    /// Binding accepts a guest_memfd of another VM.
    BindIgnoresOwner = "bind-ignores-owner",
    /// Binding does not check the file's size.
    BindIgnoresSize = "bind-ignores-size",
    /// The fd is checked before the GPA overlap.
    BindBeforeOverlap = "bind-before-overlap",
    /// A bound slot can be set again.
    GmemSlotIsMutable = "gmem-slot-is-mutable",
    /// GPA overlap is reported as EINVAL.
    SlotOverlapIsEinval = "slot-overlap-is-einval",
    /// Deleting a slot leaves its SPTEs.
    SlotDeleteSkipsZap = "slot-delete-skips-zap",
    /// Deleting a slot leaves its binding.
    SlotDeleteKeepsBinding = "slot-delete-keeps-binding",
    /// Deleting a slot clears the attributes of its range.
    SlotDeleteClearsAttributes = "slot-delete-clears-attributes" on PRIVATE,
    /// READONLY and GUEST_MEMFD are accepted together.
    SlotAcceptsReadonlyGmem = "slot-accepts-readonly-gmem" on PRIVATE,
    /// Setting attributes leaves the SPTEs of the range.
    AttributesSkipZap = "attributes-skip-zap" on PRIVATE,
    /// Setting attributes stores one page too few.
    AttributesOnePageShort = "attributes-one-page-short" on PRIVATE,
    /// Setting attributes frees the private pages.
    AttributesPunch = "attributes-punch" on PRIVATE,
    /// KVM_SET_MEMORY_ATTRIBUTES does not check its flags.
    AttributesIgnoreFlags = "attributes-ignore-flags" on PRIVATE,
    /// A default VM accepts the PRIVATE attribute.
    AttributesOnDefaultVm = "attributes-on-default-vm",
    /// A memory fault exit does not carry the PRIVATE flag.
    ExitLosesPrivateFlag = "exit-loses-private-flag" on PRIVATE,
    /// A memory fault exit reports the byte, not the page.
    ExitReportsByte = "exit-reports-byte",
    /// A shared access that GUP refuses ends in a memory fault exit.
    SharedEfaultIsMemoryFault = "shared-efault-is-memory-fault",
    /// The pages of a pre-fault before the failing one are not reported.
    PreFaultHidesProgress = "pre-fault-hides-progress",
    /// KVM_PRE_FAULT_MEMORY accepts size 0.
    PreFaultAcceptsNothing = "pre-fault-accepts-nothing",
    /// KVM_PRE_FAULT_MEMORY of a GPA without slot says EFAULT.
    PreFaultMmioIsEfault = "pre-fault-mmio-is-efault",
    /// Closing a guest_memfd leaves the SPTEs to its pages.
    CloseSkipsZap = "close-skips-zap",
    /// A mapping does not keep the file open.
    MappingDropsFile = "mapping-drops-file" on MAPPED,
    /// A punch waits for nobody and frees a page that is still pinned.
    PunchFreesPinned = "punch-frees-pinned" on MAPPED,
    /// A guest mapping takes a reference to the page.
    SpteTakesReference = "spte-takes-reference",
    /// Punch hole leaks a reference to every page.
    PunchLeaksReference = "punch-leaks-reference",
    /// Memory failure does not mark the page.
    PoisonFlagLost = "poison-flag-lost" on MAPPED,
    /// Unpinning drops one reference too many.
    UnpinDropsTwice = "unpin-drops-twice" on MAPPED,
    /// A file without FLAG_MMAP can be mapped.
    MmapIgnoresFlag = "mmap-ignores-flag" on MAPPED,
    /// MAP_PRIVATE of a guest_memfd is accepted.
    MmapAcceptsPrivate = "mmap-accepts-private" on MAPPED,
    /// Private accesses use the shared side.
    PrivateUsesSharedSide = "private-uses-shared-side" on PRIVATE,
    /// A GMEM_ONLY slot's shared accesses use userspace_addr.
    GmemOnlyIgnored = "gmem-only-ignored" on MAPPED,
    /// Poison is forgotten when the guest faults.
    GuestIgnoresPoison = "guest-ignores-poison" on MAPPED,
    /// mincore reports pages that are not up to date.
    MincoreIgnoresUptodate = "mincore-ignores-uptodate" on MAPPED,
    /// MADV_DONTNEED frees the page.
    DontneedFrees = "dontneed-frees" on MAPPED,
    /// Conversion accepts a range beyond the end of the file.
    ConvertIgnoresSize = "convert-ignores-size" on IN_PLACE,
    /// Conversion to private does not look at reference counts.
    ConvertIgnoresReferences = "convert-ignores-references" on IN_PLACE,
    /// Conversion to private does not drain the LRU batches before it calls a page unsafe.
    ConvertSkipsDrain = "convert-skips-drain" on IN_PLACE,
    /// A failed conversion reports the start of the range, not the page.
    ConvertReportsStart = "convert-reports-start" on IN_PLACE,
    /// A page that is held fails the conversion with EBUSY.
    ConvertBusyIsEbusy = "convert-busy-is-ebusy" on IN_PLACE,
    /// Conversion to private stores the attribute before it checks.
    ConvertStoresFirst = "convert-stores-first" on IN_PLACE,
    /// Conversion to private leaves the host's page-table entries.
    ConvertSkipsHostUnmap = "convert-skips-host-unmap" on IN_PLACE,
    /// Conversion leaves the guest's mappings.
    ConvertSkipsZap = "convert-skips-zap" on IN_PLACE,
    /// Conversion stores one page too few.
    ConvertOnePageShort = "convert-one-page-short" on IN_PLACE,
    /// A private page is removed from the S-EPT without being blocked.
    UnmapSkipsBlock = "unmap-skips-block" on TDX,
    /// TDH.MEM.TRACK is not called.
    UnmapSkipsTrack = "unmap-skips-track" on TDX,
    /// TDH.MEM.PAGE.REMOVE is not called.
    UnmapSkipsRemove = "unmap-skips-remove" on TDX,
    /// vCPUs are not kicked out of the guest after TRACK.
    UnmapSkipsKick = "unmap-skips-kick" on TDX,
    /// A busy module is not asked a second time.
    UnmapNeverRetries = "unmap-never-retries" on TDX,
    /// The unmap of a range ends at the first page that fails.
    UnmapStopsAtFailure = "unmap-stops-at-failure" on TDX,
    /// A failed split of a huge mapping is not reported.
    SplitFailureIgnored = "split-failure-ignored" on TDX_HUGE,
    /// An interrupted TDH.MEM.PAGE.DEMOTE is taken for a failure.
    SplitNeverRestarts = "split-never-restarts" on TDX_HUGE,
    /// A bug in one VM is a bug in all of them.
    BugBugsEveryVm = "bug-bugs-every-vm" on TDX,
    /// A dead VM answers ioctls.
    DeadVmAnswers = "dead-vm-answers" on TDX,
    /// fallocate fails with EIO when the file's VM is dead.
    FileChecksDead = "file-checks-dead" on TDX,
    /// S-EPT pages are not reclaimed when a TD is taken down.
    TeardownKeepsTables = "teardown-keeps-tables" on TDX,
    /// Conversion to private leaves a huge folio split.
    ConvertSkipsMerge = "convert-skips-merge" on HUGE,
    /// Base pages are merged although somebody holds one of them.
    MergeDespiteReferences = "merge-despite-references" on HUGE,
    /// Splitting a huge mapping forgets all pages but the first.
    SplitMapsOnePage = "split-maps-one-page" on TDX_HUGE,
    /// cachestat counts one page more.
    CachestatOffByOne = "cachestat-off-by-one",
    /// Conversion does not look at its flags.
    ConvertIgnoresFlags = "convert-ignores-flags" on IN_PLACE,
    /// Conversion does not look at its reserved words.
    ConvertIgnoresReserved = "convert-ignores-reserved" on IN_PLACE,
    /// Conversion writes error_offset whatever it fails with.
    ConvertAlwaysReports = "convert-always-reports" on IN_PLACE,
    /// Conversion does not write error_offset.
    ConvertNeverReports = "convert-never-reports" on IN_PLACE,
    /// Conversion does not check for unknown attributes.
    ConvertIgnoresAttributes = "convert-ignores-attributes" on IN_PLACE,
    /// Conversion rounds an unaligned range.
    ConvertIgnoresAlignment = "convert-ignores-alignment" on IN_PLACE,
    /// Conversion of no bytes succeeds.
    ConvertAcceptsNothing = "convert-accepts-nothing" on IN_PLACE,
    /// A file of a VM without private memory is converted.
    ConvertOnDefaultVm = "convert-on-default-vm" on DEFAULT_IN_PLACE,
    /// Conversion stores one page too many.
    ConvertOnePageLong = "convert-one-page-long" on IN_PLACE,
    /// Conversion leaves the guest's mapping of its last page.
    ConvertZapsOneShort = "convert-zaps-one-short" on IN_PLACE,
    /// Conversion to shared unmaps one private page too many.
    ConvertZapsOneLong = "convert-zaps-one-long" on IN_PLACE,
    /// Conversion to private leaves the host's mapping of its last page.
    ConvertUnmapsOneShort = "convert-unmaps-one-short" on IN_PLACE,
    /// Conversion zeroes the pages.
    ConvertZeroes = "convert-zeroes" on IN_PLACE,
    /// Conversion frees the pages.
    ConvertFrees = "convert-frees" on IN_PLACE,
    /// Conversion drains the LRU batch of its own CPU only.
    ConvertDrainsOneCpu = "convert-drains-one-cpu" on IN_PLACE,
    /// Conversion to shared is refused while a page is held.
    ConvertSharedChecksReferences = "convert-shared-checks-references" on IN_PLACE,
    /// Conversion to private looks at the references of the first folio only.
    ConvertLooksAtFirstOnly = "convert-looks-at-first-only" on IN_PLACE,
    /// Conversion allocates the pages of its range.
    ConvertAllocates = "convert-allocates" on IN_PLACE,
    /// A punch puts its pages back on the side that the file began with.
    PunchResetsSide = "punch-resets-side" on IN_PLACE,
    /// A TD gets memory of the other side than it asked for.
    GuestIgnoresSide = "guest-ignores-side" on IN_PLACE,
    /// A punch unmaps one private page too many.
    PunchZapsOneLong = "punch-zaps-one-long" on TD_CONTENTS,
    /// Setting attributes unmaps one page too many.
    AttributesZapOneLong = "attributes-zap-one-long" on PRIVATE,
    /// Setting attributes leaves the mapping of the last page.
    AttributesZapOneShort = "attributes-zap-one-short" on PRIVATE,
    /// Setting attributes rounds an unaligned range.
    AttributesIgnoreAlignment = "attributes-ignore-alignment" on PRIVATE,
    /// Setting the attributes of no bytes succeeds.
    AttributesAcceptNothing = "attributes-accept-nothing" on PRIVATE,
    /// Setting attributes sets those of every VM.
    AttributesOneVmForAll = "attributes-one-vm-for-all" on PRIVATE,
    /// A punch of a part of a huge folio does not zero it.
    PunchPartKeepsData = "punch-part-keeps-data" on HUGE,
    /// A punch of a part of a huge folio zeroes all of it.
    PunchPartFrees = "punch-part-zeroes-folio" on HUGE,
    /// Splitting a huge folio leaves the dirty flag to its first page.
    SplitLosesDirty = "split-loses-dirty" on HUGE,
    /// Splitting a huge folio loses its uptodate flag.
    SplitLosesUptodate = "split-loses-uptodate" on HUGE,
    /// Merging pages loses their dirty flags.
    MergeLosesDirty = "merge-loses-dirty" on HUGE,
    /// A folio that is allocated for shared memory is not split.
    SharedFolioStaysWhole = "shared-folio-stays-whole" on HUGE,
    /// A block of base pages is mapped as a huge page.
    HugeMappingIgnoresFolio = "huge-mapping-ignores-folio" on HUGE,
    /// A huge folio is mapped by base pages.
    HugeMapsSmall = "huge-maps-small" on HUGE,
    /// A huge mapping is split without being blocked.
    SplitSkipsBlock = "split-skips-block" on TDX_HUGE,
    /// Every huge mapping in a range is split, not the head and the tail.
    SplitAllMappings = "split-all-mappings" on TDX_HUGE,
    /// The huge mapping across the start of a range is not split.
    SplitTailOnly = "split-tail-only" on TDX_HUGE,
    /// The huge mapping across the end of a range is not split.
    SplitHeadOnly = "split-head-only" on TDX_HUGE,
    /// Draining the LRU batches leaves them full.
    DrainDoesNothing = "drain-does-nothing" on MAPPED,
    /// The reference of a host page table entry is not given back.
    HostUnmapLeaksReference = "host-unmap-leaks-reference" on MAPPED,
    /// A long-term pin adds one reference.
    PinCountsOne = "pin-counts-one" on MAPPED,
    /// GUP takes two references.
    GetTakesTwo = "get-takes-two" on MAPPED,
    /// A failed unmap is treated as done: no policy hears of it.
    FailedUnmapIsForgotten = "failed-unmap-is-forgotten" on UNMAP_FAILURE,
    /// A VM that is bugged goes on working.
    BuggedVmLives = "bugged-vm-lives" on TDX,
    /// A hard failure to unmap is reported as EAGAIN.
    FailUnmapSaysEagain = "fail-unmap-says-eagain" on FAIL_UNMAP,
    /// A failure to unmap reports the start of the range.
    FailUnmapReportsStart = "fail-unmap-reports-start" on FAIL_UNMAP,
    /// The attribute changes although the unmap fails.
    FailUnmapStoresAnyway = "fail-unmap-stores-anyway" on FAIL_UNMAP,
    /// A page that cannot be unmapped loses its pin all the same.
    StuckPageIsUnpinned = "stuck-page-is-unpinned" on PINNED,
    /// The cache of a removed page is not written back.
    UnmapSkipsWriteback = "unmap-skips-writeback" on TDX,
    /// A hard error of an unmap is answered by another try.
    UnmapRetriesHardErrors = "unmap-retries-hard-errors" on TDX,
    /// Memory failure leaves the guest's mapping.
    MemoryFailureKeepsGuestMapping = "memory-failure-keeps-guest-mapping" on MAPPED,
    /// A poisoned page can be freed.
    MemoryFailureTakesNoReference = "memory-failure-takes-no-reference" on MAPPED,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_found_again() {
        for mutant in Mutant::ALL {
            assert_eq!(Mutant::from_name(mutant.name()), Some(*mutant));
            assert!(!mutant.description().is_empty());
            for machine in mutant.machines() {
                let spec = format!("{machine},mutant={}", mutant.name());
                let profile = crate::sim::Profile::from_spec(&spec.parse().unwrap()).unwrap();
                assert_eq!(profile.mutant, Some(*mutant));
            }
        }
    }
}
