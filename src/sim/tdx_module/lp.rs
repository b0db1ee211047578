//! Logical processors: what each is doing, which locks it holds, and the translations it has cached (TDX module spec 1.5, 6.4).

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt;

use super::call::Call;
use super::lock::HeldLock;

/// A logical processor by number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LpId(pub u32);

impl fmt::Display for LpId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "lp{}", self.0)
    }
}

/// A point where a leaf can be held half-way. A leaf passes those it has in this order; one that never reaches the point asked for
/// runs to its end.
///
/// Nothing is committed at any of them, except that VP.ENTER has associated the vCPU and, from [`HoldPoint::Epoch`] on, counted it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum HoldPoint {
    /// The explicit TDR or TDVPR operand is locked; op_state not yet.
    Tdr,
    /// The op-state lock is held, or the op state was checked by a leaf that does not take it.
    OpState,
    /// VP.ENTER: the epoch lock is held shared.
    Epoch,
    /// The Secure EPT tree lock is held. VP.ENTER: the zero-step check holds it exclusively.
    Tree,
    /// The entry lock is held, the entry's state not yet checked. ACCEPT, ATTR.RD and ATTR.WR stop here too.
    Entry,
    /// Every check has passed and every lock is held: what follows is the commit.
    Commit,
}

impl HoldPoint {
    /// All points, in order.
    pub const ALL: [HoldPoint; 6] =
        [HoldPoint::Tdr, HoldPoint::OpState, HoldPoint::Epoch, HoldPoint::Tree, HoldPoint::Entry, HoldPoint::Commit];

    /// `tdr`, `op-state`, `epoch`, `tree`, `entry` or `commit`.
    pub fn name(self) -> &'static str {
        match self {
            HoldPoint::Tdr => "tdr",
            HoldPoint::OpState => "op-state",
            HoldPoint::Epoch => "epoch",
            HoldPoint::Tree => "tree",
            HoldPoint::Entry => "entry",
            HoldPoint::Commit => "commit",
        }
    }

    /// The point called `name`.
    pub fn from_name(name: &str) -> Option<HoldPoint> {
        HoldPoint::ALL.into_iter().find(|point| point.name() == name)
    }
}

/// When a leaf that can be interrupted sees a pending interrupt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Interrupt {
    /// Never.
    #[default]
    None,
    /// At every point where it looks, until turned off.
    Pending,
    /// Once, after it has looked this many times in vain.
    After(u64),
}

/// Something of a processor's own state that the module finds wrong when it looks (TDX module spec 5.6, 5.27).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Disorder {
    /// IA32_MISC_ENABLE limits CPUID leaves: VP.ENTER answers `TDX_LIMIT_CPUID_MAXVAL_SET`.
    CpuidMaxvalLimited,
    /// IA32_TSC_ADJUST is not what SYS.INIT sampled: MNG.INIT, VP.INIT and VP.ENTER answer `TDX_INCONSISTENT_MSR | 0x3B`.
    TscAdjustChanged,
    /// IA32_MISC_ENABLE turns MONITOR off: VP.ENTER answers `TDX_INCORRECT_MSR_VALUE | 0x1A0`.
    MonitorOff,
}

/// What a logical processor is doing.
pub(crate) enum Activity {
    Host,
    Guest { tdvpr: u64 },
    Held(Box<Call>),
}

/// A cached translation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Translation {
    /// Level of the leaf it was made from.
    pub level: u8,
    /// First physical address.
    pub hpa: u64,
    /// R, W, X at fill time.
    pub rwx: u64,
}

/// Cached translations of one TD on one logical processor. Bounded; the oldest goes first.
#[derive(Default)]
pub(crate) struct Tlb {
    entries: BTreeMap<(u64, u8), Translation>,
    order: VecDeque<(u64, u8)>,
}

/// Translations one logical processor caches for one TD.
pub const TLB_CAPACITY: usize = 4096;

impl Tlb {
    pub fn find(&self, gpa: u64) -> Option<Translation> {
        (0..3).find_map(|level| self.entries.get(&(gpa & !(super::sept::span(level) - 1), level)).copied())
    }

    pub fn insert(&mut self, gpa: u64, translation: Translation) {
        let key = (gpa & !(super::sept::span(translation.level) - 1), translation.level);
        if self.entries.insert(key, translation).is_none() {
            self.order.push_back(key);
        }
        if self.order.len() > TLB_CAPACITY {
            self.evict(0);
        }
    }

    pub fn remove(&mut self, gpa: u64, level: u8) {
        let key = (gpa & !(super::sept::span(level) - 1), level);
        if self.entries.remove(&key).is_some() {
            self.order.retain(|other| *other != key);
        }
    }

    pub fn evict(&mut self, nth: usize) {
        if let Some(key) = self.order.remove(nth) {
            self.entries.remove(&key);
        }
    }

    pub fn len(&self) -> usize {
        self.order.len()
    }

    pub fn iter(&self) -> impl Iterator<Item = (u64, Translation)> + '_ {
        self.entries.iter().map(|((gpa, _), translation)| (*gpa, *translation))
    }
}

/// A logical processor.
pub(crate) struct Lp {
    pub package: u8,
    pub init_done: bool,
    pub activity: Activity,
    /// TDVPR of the vCPU that ran here last.
    pub last_tdvpr: Option<u64>,
    /// Locks the running guest keeps: TDVPR and TDR.
    pub run_locks: Vec<HeldLock>,
    /// Locks taken by hand.
    pub hand_locks: Vec<HeldLock>,
    /// Where the next leaf is to be held.
    pub hold: Option<HoldPoint>,
    pub interrupt: Interrupt,
    pub disorders: BTreeSet<Disorder>,
    /// By TDR address.
    pub tlbs: BTreeMap<u64, Tlb>,
    /// A lock set kept for the next call.
    pub spare: Vec<HeldLock>,
}

impl Lp {
    pub fn new(package: u8) -> Lp {
        Lp {
            package,
            init_done: false,
            activity: Activity::Host,
            last_tdvpr: None,
            run_locks: Vec::new(),
            hand_locks: Vec::new(),
            hold: None,
            interrupt: Interrupt::None,
            disorders: BTreeSet::new(),
            tlbs: BTreeMap::new(),
            spare: Vec::new(),
        }
    }
}
