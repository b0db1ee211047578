//! What a test may need of a machine, and the answer to whether it is there.

use std::fmt;

/// Why a test was not run; printed with the skip, and the same word everywhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum SkipKind {
    /// The kernel is too old, or the code is not merged.
    UnsupportedKernel,
    /// The kernel was built, booted or loaded without it.
    ConfigOff,
    /// The hardware, or its number, is not there.
    NoHardware,
    /// The hardware is there, and nothing that could make it fail on purpose.
    NoHardwareInjection,
    /// The caller may not.
    NoPrivilege,
    /// Asked not to, or not meaningful on this machine.
    Declined,
}

impl SkipKind {
    /// Every kind.
    pub const ALL: [SkipKind; 6] = [
        SkipKind::UnsupportedKernel,
        SkipKind::ConfigOff,
        SkipKind::NoHardware,
        SkipKind::NoHardwareInjection,
        SkipKind::NoPrivilege,
        SkipKind::Declined,
    ];

    /// The machine-readable word.
    pub fn word(self) -> &'static str {
        match self {
            SkipKind::UnsupportedKernel => "unsupported-kernel",
            SkipKind::ConfigOff => "config-off",
            SkipKind::NoHardware => "no-hardware",
            SkipKind::NoHardwareInjection => "no-hardware-injection",
            SkipKind::NoPrivilege => "no-privilege",
            SkipKind::Declined => "declined",
        }
    }
}

impl fmt::Display for SkipKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

/// Whether a facility is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Availability {
    /// It is; `detail` is its value or version, empty where there is none.
    Present {
        /// What was found, `flags 0x3` for example.
        detail: String,
    },
    /// It is not.
    Absent {
        /// The kind of the skip.
        kind: SkipKind,
        /// What was asked and what was answered.
        why: String,
        /// What would provide it: a kernel release, a config symbol, a module parameter, a privilege, hardware.
        mend: String,
    },
}

impl Availability {
    /// Present, with nothing to add.
    pub fn present() -> Availability {
        Availability::Present { detail: String::new() }
    }

    /// Present, with a value.
    pub fn with(detail: impl Into<String>) -> Availability {
        Availability::Present { detail: detail.into() }
    }

    /// Absent.
    pub fn absent(kind: SkipKind, why: impl Into<String>, mend: impl Into<String>) -> Availability {
        Availability::Absent { kind, why: why.into(), mend: mend.into() }
    }

    /// Whether it is there.
    pub fn is_present(&self) -> bool {
        matches!(self, Availability::Present { .. })
    }
}

macro_rules! facilities {
    ($($(#[doc = $doc:literal])+ $variant:ident = $name:literal,)+) => {
        /// Something that a machine may offer and a test may need.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum Facility {
            $($(#[doc = $doc])+ $variant,)+
        }

        impl Facility {
            /// Every facility, in the order in which `probe` prints them.
            pub const ALL: &'static [Facility] = &[$(Facility::$variant,)+];

            /// The name in `probe` and in skip reasons.
            pub fn name(self) -> &'static str {
                match self {
                    $(Facility::$variant => $name,)+
                }
            }

            /// One line on what it is.
            pub fn description(self) -> &'static str {
                match self {
                    $(Facility::$variant => concat!($($doc,)+).trim_ascii(),)+
                }
            }
        }
    };
}

facilities! {
    /// A VM of the machine's type can be created (KVM_CREATE_VM).
    Vm = "vm",
    /// vCPUs execute the payload's guest operations.
    Guest = "guest",
    /// KVM_CAP_GUEST_MEMFD (234) at VM scope.
    GuestMemfd = "guest-memfd",
    /// GUEST_MEMFD_FLAG_MMAP in KVM_CAP_GUEST_MEMFD_FLAGS (244) at VM scope.
    GmemMmap = "gmem-mmap",
    /// GUEST_MEMFD_FLAG_INIT_SHARED in KVM_CAP_GUEST_MEMFD_FLAGS (244) at VM scope.
    GmemInitShared = "gmem-init-shared",
    /// KVM_CAP_USER_MEMORY2 (231): KVM_SET_USER_MEMORY_REGION2.
    UserMemory2 = "user-memory2",
    /// KVM_CAP_MEMORY_FAULT_INFO (232): KVM_EXIT_MEMORY_FAULT.
    MemoryFaultInfo = "memory-fault-info",
    /// KVM_CAP_MEMORY_ATTRIBUTES (233) with PRIVATE at VM scope.
    MemoryAttributes = "memory-attributes",
    /// KVM_CAP_PRE_FAULT_MEMORY (236).
    PreFault = "pre-fault",
    /// KVM_CAP_EXIT_HYPERCALL (201) with KVM_HC_MAP_GPA_RANGE.
    ExitHypercall = "exit-hypercall",
    /// KVM_CAP_VM_TYPES (235).
    VmTypes = "vm-types",
    /// KVM_CAP_DISABLE_QUIRKS2 (213) with KVM_X86_QUIRK_SLOT_ZAP_ALL.
    SlotZapAllQuirk = "slot-zap-all-quirk",
    /// KVM_CAP_MULTI_ADDRESS_SPACE (118) above 1 at VM scope: a second address space for SMM.
    SecondAddressSpace = "second-address-space",
    /// KVM_CAP_BINARY_STATS_FD (203): KVM_GET_STATS_FD.
    KvmStats = "kvm-stats",
    /// KVM_SET_MEMORY_ATTRIBUTES2 on the guest_memfd: in-place conversion.
    InPlaceConversion = "in-place-conversion",
    /// Memory that is private to the guest: the VM type has private memory.
    PrivateMemory = "private-memory",
    /// The VM is a TD: KVM_MEMORY_ENCRYPT_OP takes the KVM_TDX_* sub-commands.
    Tdx = "tdx",
    /// The guest takes private memory into use by touching it: nothing has to be accepted, or the payload accepts at a #VE.
    LazyAccept = "lazy-accept",
    /// A folio that a guest has mapped can be split: the mapping of its other pages holds no reference to it.
    SplitMappedFolio = "split-mapped-folio",
    /// Handles are file descriptors of the running kernel: dup, fork, exec, SCM_RIGHTS mean something.
    RealFiles = "real-files",
    /// cachestat(2), CONFIG_CACHESTAT_SYSCALL, 6.5.
    Cachestat = "cachestat",
    /// userfaultfd(2), CONFIG_USERFAULTFD.
    Userfaultfd = "userfaultfd",
    /// MADV_HUGEPAGE is accepted, CONFIG_TRANSPARENT_HUGEPAGE.
    TransparentHugePages = "transparent-huge-pages",
    /// At least two NUMA nodes with memory.
    NumaNodes = "numa-nodes",
    /// Page frame numbers in /proc/self/pagemap, CONFIG_PROC_PAGE_MONITOR and CAP_SYS_ADMIN.
    Pagemap = "pagemap",
    /// /proc/kpageflags, CONFIG_PROC_PAGE_MONITOR and CAP_SYS_ADMIN.
    PageFlags = "page-flags",
    /// /proc/kpagecount, CONFIG_PROC_PAGE_MONITOR and CAP_SYS_ADMIN.
    PageMapCount = "page-map-count",
    /// Reference counts through /proc/kcore, CONFIG_PROC_KCORE and CAP_SYS_RAWIO.
    Kcore = "kcore",
    /// Per-CPU LRU batches can be drained: move_pages(2), which drains them, or a writable /proc/sys/vm/drop_caches.
    DropCaches = "drop-caches",
    /// MADV_HWPOISON, CONFIG_MEMORY_FAILURE and CAP_SYS_ADMIN.
    HwPoison = "hwpoison",
    /// vmsplice(2): a plain reference to a page of a mapping.
    HoldGet = "hold-get",
    /// io_uring registered buffers: a long-term pin of a page of a mapping.
    HoldPin = "hold-pin",
    /// debugfs gup_test, CONFIG_GUP_TEST.
    GupTest = "gup-test",
    /// A memory cgroup can be made, CONFIG_MEMCG.
    MemoryCgroup = "memory-cgroup",
    /// tracefs with the kvmmmu events.
    Tracefs = "tracefs",
    /// debugfs fail_function, CONFIG_FAIL_FUNCTION.
    FailFunction = "fail-function",
    /// /dev/kmsg is readable: splats can be laid at a test's door.
    KernelLog = "kernel-log",
    /// References to a page of a guest_memfd can be counted, also of a page that the host cannot map.
    PageAccount = "page-account",
    /// The TDX module under the machine can be made to fail, and shows its calls and the owners of pages.
    ModuleInjection = "module-injection",
}

impl fmt::Display for Facility {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_described() {
        for (i, facility) in Facility::ALL.iter().enumerate() {
            assert!(!facility.description().is_empty());
            assert!(Facility::ALL[..i].iter().all(|other| other.name() != facility.name()), "{facility}");
        }
    }
}
