//! Faults on plan: which call of which leaf shall return what, instead of its effect or after it.

use super::call::AnyLeaf;
use super::leaf::Leaf;
use super::operand::Operand;
use super::regs::Regs;
use super::status::{Code, Status, busy};

/// Which of the matching calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    /// The n-th, from 1.
    Nth(u64),
    /// The first n.
    First(u64),
    /// The n-th, from 1, and every one after it.
    From(u64),
    /// The n-th, the 2n-th and so on; none for 0.
    Every(u64),
    /// Every one.
    Always,
    /// Each with this chance in 2^32, drawn from a generator started with `seed`.
    Probability {
        /// Chance times 2^32.
        chance: u32,
        /// Start of the generator.
        seed: u64,
    },
}

/// Whether the leaf does its work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// It does nothing; the status is all there is.
    InsteadOf,
    /// It runs, and if it succeeds the status is returned in place of success.
    After,
}

/// Narrows a rule to calls with certain operands; what is `None` matches all.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Filter {
    /// Guest physical address, any within this page.
    pub gpa: Option<u64>,
    /// Level of the page-info operand.
    pub level: Option<u8>,
    /// Address of the TDR.
    pub tdr: Option<u64>,
    /// A physical page given to, named by, or mapped at the call's GPA (`REMOVE` of this page).
    pub page: Option<u64>,
}

/// One rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FaultRule {
    /// The leaf.
    pub leaf: AnyLeaf,
    /// Its operands.
    pub filter: Filter,
    /// Which calls.
    pub when: When,
    /// With or without effect.
    pub effect: Effect,
    /// What they return.
    pub status: Status,
    seen: u64,
    random: u64,
    hits: u64,
}

impl FaultRule {
    /// A rule for every matching call, effect suppressed, that returns `status`.
    pub fn new(leaf: AnyLeaf, status: Status) -> FaultRule {
        let filter = Filter::default();
        FaultRule { leaf, filter, when: When::Always, effect: Effect::InsteadOf, status, seen: 0, random: 0, hits: 0 }
    }

    /// The same rule for the calls `when` says.
    pub fn when(mut self, when: When) -> FaultRule {
        self.when = when;
        if let When::Probability { seed, .. } = when {
            self.random = seed;
        }
        self
    }

    /// The same rule for calls with these operands.
    pub fn filter(mut self, filter: Filter) -> FaultRule {
        self.filter = filter;
        self
    }

    /// The same rule with or without the leaf's effect.
    pub fn effect(mut self, effect: Effect) -> FaultRule {
        self.effect = effect;
        self
    }

    /// How often it has struck.
    pub fn hits(&self) -> u64 {
        self.hits
    }

    fn strikes(&mut self) -> bool {
        self.seen += 1;
        let strikes = match self.when {
            When::Nth(n) => self.seen == n,
            When::First(n) => self.seen <= n,
            When::From(n) => self.seen >= n,
            When::Every(n) => n > 0 && self.seen.is_multiple_of(n),
            When::Always => true,
            When::Probability { chance, .. } => {
                self.random = self.random.wrapping_add(0x9E37_79B9_7F4A_7C15);
                ((mix(self.random) >> 32) as u32) < chance
            }
        };
        self.hits += u64::from(strikes);
        strikes
    }
}

/// The finalizer of splitmix64.
pub(crate) fn mix(value: u64) -> u64 {
    let value = (value ^ value >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let value = (value ^ value >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
    value ^ value >> 31
}

/// A fault with a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Preset {
    /// The next call finds the TD's Secure EPT tree (or the leaf's object) busy.
    BusyOnce,
    /// The next two calls do: KVM's retry fails too.
    BusyTwice,
    /// The next call's walk fails.
    WalkFailed,
    /// The next call finds the page's metadata incorrect.
    MetadataIncorrect,
    /// The next call is interrupted and wants to be called again.
    InterruptedRestartable,
    /// Every call from now on finds the entry busy.
    Stuck,
}

impl Preset {
    /// All presets.
    pub const ALL: [Preset; 6] = [
        Preset::BusyOnce,
        Preset::BusyTwice,
        Preset::WalkFailed,
        Preset::MetadataIncorrect,
        Preset::InterruptedRestartable,
        Preset::Stuck,
    ];

    /// `busy-once`, `busy-twice`, `walk-failed`, `metadata-incorrect`, `interrupted-restartable` or `stuck`.
    pub fn name(self) -> &'static str {
        match self {
            Preset::BusyOnce => "busy-once",
            Preset::BusyTwice => "busy-twice",
            Preset::WalkFailed => "walk-failed",
            Preset::MetadataIncorrect => "metadata-incorrect",
            Preset::InterruptedRestartable => "interrupted-restartable",
            Preset::Stuck => "stuck",
        }
    }

    /// The preset called `name`.
    pub fn from_name(name: &str) -> Option<Preset> {
        Preset::ALL.into_iter().find(|preset| preset.name() == name)
    }

    /// The rule of this preset for `leaf`.
    pub fn rule(self, leaf: AnyLeaf) -> FaultRule {
        let object = match leaf {
            AnyLeaf::Seamcall(Leaf::MemTrack) => Operand::TD_EPOCH,
            AnyLeaf::Seamcall(Leaf::VpEnter) => Operand::OP_STATE,
            AnyLeaf::Tdcall(_) | AnyLeaf::Seamcall(Leaf::PhymemPageReclaim | Leaf::PhymemPageWbinvd) => Operand::RCX,
            _ => Operand::SEPT_TREE,
        };
        let (status, when) = match self {
            Preset::BusyOnce => (busy(object), When::First(1)),
            Preset::BusyTwice => (busy(object), When::First(2)),
            Preset::WalkFailed => (Status::on(Code::EptWalkFailed, Operand::RCX), When::First(1)),
            Preset::MetadataIncorrect => (Status::on(Code::PageMetadataIncorrect, Operand::RCX), When::First(1)),
            Preset::InterruptedRestartable => (Code::InterruptedRestartable.into(), When::First(1)),
            Preset::Stuck => (busy(Operand::RCX), When::Always),
        };
        FaultRule::new(leaf, status).when(when)
    }
}

/// Operands of a call as rules see them.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct CallOperands {
    pub gpa: Option<u64>,
    pub level: Option<u8>,
    pub tdr: Option<u64>,
    pub pages: [Option<u64>; 2],
}

impl CallOperands {
    /// Reads them from the registers; the page mapped at the GPA is the caller's to add.
    pub fn of(leaf: AnyLeaf, regs: &Regs) -> CallOperands {
        use Leaf::*;
        let page_info = |rcx: u64| (Some(rcx & 0x000F_FFFF_FFFF_F000), Some((rcx & 7) as u8));
        let page = |pa: u64| Some(pa & !0xFFF);
        let mut operands = CallOperands::default();
        match leaf {
            AnyLeaf::Tdcall(_) => (operands.gpa, operands.level) = page_info(regs.rcx),
            AnyLeaf::Seamcall(leaf) => match leaf {
                MemPageAdd | MemPageAug | MemPageRemove | MemPageRelocate | MemPageDemote | MemPagePromote
                | MemSeptAdd | MemSeptRemove | MemSeptRd | MemRangeBlock | MemRangeUnblock | MemRd | MemWr
                | MrExtend => {
                    (operands.gpa, operands.level) = page_info(regs.rcx);
                    operands.tdr = page(regs.rdx);
                    if matches!(leaf, MemPageAdd | MemPageAug | MemPageRelocate | MemPageDemote | MemSeptAdd) {
                        operands.pages[0] = page(regs.r8);
                    }
                }
                MngAddcx | VpCreate => (operands.pages[0], operands.tdr) = (page(regs.rcx), page(regs.rdx)),
                VpAddcx => operands.pages = [page(regs.rcx), page(regs.rdx)],
                MngKeyConfig | MngInit | MngRd | MngVpflushdone | MngKeyFreeid | MemTrack | MrFinalize => {
                    operands.tdr = page(regs.rcx);
                }
                _ => operands.pages[0] = page(regs.rcx),
            },
        }
        operands
    }
}

/// All rules in force. The first that strikes decides.
#[derive(Clone, Debug, Default)]
pub struct FaultPlan {
    rules: Vec<FaultRule>,
}

impl FaultPlan {
    /// Adds a rule; it stands behind those already there.
    pub fn add(&mut self, rule: FaultRule) {
        self.rules.push(rule);
    }

    /// Removes every rule.
    pub fn clear(&mut self) {
        self.rules.clear();
    }

    /// The rules and how often each has struck.
    pub fn rules(&self) -> &[FaultRule] {
        &self.rules
    }

    #[inline]
    pub(crate) fn is_empty(&self) -> bool {
        self.rules.is_empty()
    }

    pub(crate) fn strike(&mut self, leaf: AnyLeaf, operands: &CallOperands) -> Option<(Effect, Status)> {
        let same = |wanted: Option<u64>, is: Option<u64>| wanted.is_none_or(|wanted| is == Some(wanted & !0xFFF));
        let rule = self.rules.iter_mut().find_map(|rule| {
            let page = |wanted: u64| operands.pages.contains(&Some(wanted & !0xFFF));
            let matches = rule.leaf == leaf
                && same(rule.filter.gpa, operands.gpa)
                && same(rule.filter.tdr, operands.tdr)
                && rule.filter.level.is_none_or(|level| operands.level == Some(level))
                && rule.filter.page.is_none_or(page);
            (matches && rule.strikes()).then_some((rule.effect, rule.status))
        })?;
        Some(rule)
    }
}
