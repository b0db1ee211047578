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
    /// vCPUs are not kicked out of the guest after TRACK.
    UnmapSkipsKick = "unmap-skips-kick" on TDX,
    /// A busy module is not asked a second time.
    UnmapNeverRetries = "unmap-never-retries" on TDX,
    /// Conversion to private leaves a huge folio split.
    ConvertSkipsMerge = "convert-skips-merge" on HUGE,
    /// Base pages are merged although somebody holds one of them.
    MergeDespiteReferences = "merge-despite-references" on HUGE,
    /// Splitting a huge mapping forgets all pages but the first.
    SplitMapsOnePage = "split-maps-one-page" on TDX_HUGE,
    /// cachestat counts one page more.
    CachestatOffByOne = "cachestat-off-by-one",
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
