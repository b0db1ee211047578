//! The small enumerations of the module's state (TDX module spec 1.7).

macro_rules! numbered {
    ($(#[$doc:meta])* $ident:ident { $($(#[$vdoc:meta])* $variant:ident = $number:literal $name:literal,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[repr(u8)]
        pub enum $ident {
            $($(#[$vdoc])* $variant = $number,)*
        }

        impl $ident {
            /// The state with this number.
            pub fn from_number(number: u32) -> Option<$ident> {
                match number {
                    $($number => Some($ident::$variant),)*
                    _ => None,
                }
            }

            /// The name the module's headers use.
            pub fn name(self) -> &'static str {
                match self {
                    $($ident::$variant => $name,)*
                }
            }
        }
    };
}

numbered! {
    /// How far the module as a whole has come.
    SysState {
        /// Nothing called yet.
        InitPending = 0 "SYSINIT_PENDING",
        /// SYS.INIT done.
        InitDone = 1 "SYSINIT_DONE",
        /// SYS.CONFIG done.
        ConfigDone = 2 "SYSCONFIG_DONE",
        /// SYS.KEY.CONFIG done on every package.
        Ready = 3 "SYS_READY",
        /// Shut down: only SYS.LP.SHUTDOWN answers.
        Shutdown = 4 "SYS_SHUTDOWN",
    }
}

numbered! {
    /// State of an HKID in the key ownership table.
    HkidState {
        /// May be given to a TD.
        Free = 0 "HKID_FREE",
        /// Belongs to a TD.
        Assigned = 1 "HKID_ASSIGNED",
        /// VPFLUSHDONE done, caches still to be written back.
        Flushed = 2 "HKID_FLUSHED",
        /// The module's own.
        Reserved = 3 "HKID_RESERVED",
    }
}

numbered! {
    /// A TD's life-cycle state (TDX module spec 8.1).
    Lifecycle {
        /// MNG.CREATE done.
        HkidAssigned = 0 "TD_HKID_ASSIGNED",
        /// KEY.CONFIG done on every package.
        KeysConfigured = 1 "TD_KEYS_CONFIGURED",
        /// VPFLUSHDONE done.
        Blocked = 2 "TD_BLOCKED",
        /// KEY.FREEID done: pages may be reclaimed.
        Teardown = 3 "TD_TEARDOWN",
    }
}

numbered! {
    /// A TD's operation state (TDX module spec 8.3); the migration states exist for the tables only.
    OpState {
        /// Before MNG.INIT.
        Uninitialized = 0 "UNINITIALIZED",
        /// Before MR.FINALIZE.
        Initialized = 1 "INITIALIZED",
        /// May run.
        Runnable = 2 "RUNNABLE",
        /// Migration source, guest running.
        LiveExport = 3 "LIVE_EXPORT",
        /// Migration source, guest paused.
        PausedExport = 4 "PAUSED_EXPORT",
        /// Migration source, done.
        PostExport = 5 "POST_EXPORT",
        /// Migration destination, memory.
        MemoryImport = 6 "MEMORY_IMPORT",
        /// Migration destination, TD state.
        StateImport = 7 "STATE_IMPORT",
        /// Migration destination, done.
        PostImport = 8 "POST_IMPORT",
        /// Migration destination, guest running.
        LiveImport = 9 "LIVE_IMPORT",
        /// Migration destination, failed.
        FailedImport = 10 "FAILED_IMPORT",
    }
}

numbered! {
    /// A vCPU's state (TDX module spec 8.4).
    VcpuState {
        /// Before VP.INIT.
        Uninitialized = 0 "VCPU_UNINITIALIZED",
        /// May be entered.
        Ready = 2 "VCPU_READY",
        /// In the guest.
        Active = 4 "VCPU_ACTIVE",
        /// After a non-recoverable exit.
        Disabled = 8 "VCPU_DISABLED",
    }
}

impl OpState {
    /// Whether unmapping needs the TLB tracking protocol in this state (TDX module spec 6.3).
    pub fn needs_tracking(self) -> bool {
        matches!(self, OpState::Runnable | OpState::LiveExport | OpState::LiveImport)
    }

    /// Whether an import is in progress, where removal leaves REMOVED rather than FREE (TDX module spec 4.7).
    pub fn importing(self) -> bool {
        matches!(self, OpState::MemoryImport | OpState::StateImport | OpState::PostImport | OpState::LiveImport)
    }
}
