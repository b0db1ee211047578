//! A trust domain: TDR and TDCS fields (TDX module spec 1.2, 1.3).

use sha2::{Digest, Sha384};

use super::lock::LockWord;
use super::state::{Lifecycle, OpState};

/// Pages of a TDCS before MNG.INIT may be called.
pub const TDCS_PAGES: usize = 6;
/// Pages a TDCS can have.
pub const MAX_TDCS_PAGES: usize = 9;
/// Index of the TDCS page that is the root of the Secure EPT.
pub const SEPT_ROOT_PAGE: usize = 3;
/// Default of the host-priority timeout in nanoseconds (TDX module spec 9.7).
pub const DEFAULT_HP_TIMEOUT_NS: u64 = 1_000_000_000;

/// Guest physical address width.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Gpaw {
    /// 48 bits, SHARED is bit 47.
    #[default]
    Bits48,
    /// 52 bits, SHARED is bit 51.
    Bits52,
}

impl Gpaw {
    /// The SHARED bit.
    pub fn shared_bit(self) -> u64 {
        match self {
            Gpaw::Bits48 => 1 << 47,
            Gpaw::Bits52 => 1 << 51,
        }
    }

    /// 48 or 52.
    pub fn bits(self) -> u64 {
        match self {
            Gpaw::Bits48 => 48,
            Gpaw::Bits52 => 52,
        }
    }

    /// Whether `gpa` is a private address of this width.
    #[inline]
    pub fn is_private(self, gpa: u64) -> bool {
        gpa < self.shared_bit()
    }
}

/// Attribute bit DEBUG.
pub const ATTR_DEBUG: u64 = 1;
/// Attribute bit SEPT_VE_DISABLE.
pub const ATTR_SEPT_VE_DISABLE: u64 = 1 << 28;
/// CONFIG_FLAGS bit GPAW.
pub const CONFIG_GPAW: u64 = 1;
/// CONFIG_FLAGS bit FLEXIBLE_PENDING_VE.
pub const CONFIG_FLEXIBLE_PENDING_VE: u64 = 2;
/// CONFIG_FLAGS bit NO_RBP_MOD.
pub const CONFIG_NO_RBP_MOD: u64 = 4;
/// CONFIG_FLAGS bit PAGE_RELEASE.
pub const CONFIG_PAGE_RELEASE: u64 = 1 << 6;

/// A trust domain.
#[derive(Clone)]
pub struct Td {
    /// Physical address of the TDR page.
    pub tdr_pa: u64,
    /// Unusable after a fatal exit; can only be torn down.
    pub fatal: bool,
    /// Life-cycle state.
    pub lifecycle: Lifecycle,
    /// Private key id.
    pub hkid: u16,
    /// One bit a package whose key is configured.
    pub pkg_config_bitmap: u64,
    /// TDCS pages in the order they were added.
    pub tdcx_pa: Vec<u64>,
    /// 4K units owned, without the TDR.
    pub chldcnt: u64,

    /// Operation state.
    pub op_state: OpState,
    pub(crate) op_state_lock: LockWord,
    /// vCPUs initialised so far.
    pub num_vcpus: u32,
    /// vCPUs associated with a logical processor.
    pub num_assoc_vcpus: u32,
    /// L2 partitions asked for; more than 0 is refused here.
    pub num_l2_vms: u8,
    pub(crate) tree_lock: LockWord,
    /// Level of the root's entries: 3 or 4.
    pub root_level: u8,
    /// Physical address of the root page.
    pub root_pa: u64,
    /// Guest physical address width.
    pub gpaw: Gpaw,
    /// ATTRIBUTES.
    pub attributes: u64,
    /// XFAM.
    pub xfam: u64,
    /// MAX_VCPUS.
    pub max_vcpus: u32,
    /// Bit 0: an access to a PENDING page exits instead of raising #VE.
    pub td_ctls: u64,
    /// CONFIG_FLAGS.
    pub config_flags: u64,
    /// Bit 0: tell the guest of zero-step suspicion.
    pub notify_enables: u64,
    /// EPTP_CONTROLS.
    pub eptp_controls: u64,
    /// TSC frequency in units of 25 MHz.
    pub tsc_frequency: u16,
    /// MRCONFIGID, MROWNER, MROWNERCONFIG.
    pub mr_config: [[u8; 48]; 3],
    /// CPUID configuration values as given.
    pub cpuid_config: Vec<[u32; 4]>,

    /// TLB epoch.
    pub epoch: u64,
    /// Running vCPUs by parity of their epoch.
    pub refcount: [u16; 2],
    pub(crate) epoch_lock: LockWord,

    pub(crate) measurement: Sha384,
    /// Blocks of 128 bytes measured so far.
    pub measured_blocks: u64,
    /// MRTD, all zero before MR.FINALIZE.
    pub mrtd: [u8; 48],
    /// Run-time measurement registers.
    pub rtmr: [[u8; 48]; 4],
    /// Host-priority timeout in nanoseconds of the module's clock.
    pub hp_lock_timeout_ns: u64,
    /// Addresses of the TDVPR pages, in order of creation.
    pub vcpus: Vec<u64>,
}

impl Td {
    pub(crate) fn new(tdr_pa: u64, hkid: u16) -> Td {
        Td {
            tdr_pa,
            fatal: false,
            lifecycle: Lifecycle::HkidAssigned,
            hkid,
            pkg_config_bitmap: 0,
            tdcx_pa: Vec::new(),
            chldcnt: 0,
            op_state: OpState::Uninitialized,
            op_state_lock: LockWord::default(),
            num_vcpus: 0,
            num_assoc_vcpus: 0,
            num_l2_vms: 0,
            tree_lock: LockWord::default(),
            root_level: 3,
            root_pa: 0,
            gpaw: Gpaw::Bits48,
            attributes: 0,
            xfam: 0,
            max_vcpus: 0,
            td_ctls: 0,
            config_flags: 0,
            notify_enables: 0,
            eptp_controls: 0,
            tsc_frequency: 0,
            mr_config: [[0; 48]; 3],
            cpuid_config: Vec::new(),
            epoch: 0,
            refcount: [0; 2],
            epoch_lock: LockWord::default(),
            measurement: Sha384::new(),
            measured_blocks: 0,
            mrtd: [0; 48],
            rtmr: [[0; 48]; 4],
            hp_lock_timeout_ns: DEFAULT_HP_TIMEOUT_NS,
            vcpus: Vec::new(),
        }
    }

    /// Whether the TLB entries of a page blocked at `bepoch` are gone (TDX module spec 6.2).
    #[inline]
    pub fn tracked(&self, bepoch: u64) -> bool {
        if bepoch >> 63 != 0 || bepoch >= self.epoch {
            return false;
        }
        bepoch + 1 < self.epoch || self.refcount[(bepoch & 1) as usize] == 0
    }

    /// Whether the guest's access to a PENDING page exits to the host.
    pub fn pending_ve_disabled(&self) -> bool {
        self.td_ctls & 1 != 0
    }
}
