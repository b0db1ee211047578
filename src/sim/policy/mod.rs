//! What happens when a private page cannot be unmapped: one file per answer.
//!
//! Every answer that was weighed when Linux dropped the pinning of S-EPT pages is an [`UnmapPolicy`] here: [`bug_vm`] is
//! what 6.19 and later do, [`pin_mapped`] what 6.16 to 6.18 did, [`hold_on_error`], [`gfn_count`] and [`poison`] were
//! prototyped or proposed, [`fail_unmap`] returns the error to the caller. [`Costs`] counts what each of them does on the
//! way, so that they can be compared.

pub mod bug_vm;
pub mod fail_unmap;
pub mod gfn_count;
pub mod hold_on_error;
pub mod pin_mapped;
pub mod poison;
#[cfg(test)]
mod tests;

use super::World;
use super::gmem::InodeId;
use super::host::{Order, Pfn};
use super::mmu::VmId;
use super::mmu::tdx::UnmapError;
use super::mmu::tdx::unmap::ZapContext;

/// An answer to a failed unmap of a private page: the option `policy=`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum PolicyKind {
    /// The VM is bugged, the page is freed like any other.
    BugVm,
    /// A reference for every page while it is mapped.
    PinMapped,
    /// References taken only when the unmap fails.
    HoldOnError,
    /// guest_memfd counts mappings per GFN and raises real references before it lets a page go.
    GfnCount,
    /// The page is marked poisoned.
    Poison,
    /// The error goes up to the caller, with the offset.
    FailUnmap,
}

impl PolicyKind {
    /// Every policy, in the order in which they were weighed.
    pub const ALL: [PolicyKind; 6] = [
        PolicyKind::BugVm,
        PolicyKind::PinMapped,
        PolicyKind::HoldOnError,
        PolicyKind::GfnCount,
        PolicyKind::Poison,
        PolicyKind::FailUnmap,
    ];

    /// The value of `policy=`.
    pub fn name(self) -> &'static str {
        match self {
            PolicyKind::BugVm => "bug-vm",
            PolicyKind::PinMapped => "pin-mapped",
            PolicyKind::HoldOnError => "hold-on-error",
            PolicyKind::GfnCount => "gfn-count",
            PolicyKind::Poison => "poison",
            PolicyKind::FailUnmap => "fail-unmap",
        }
    }

    /// The policy itself.
    pub fn policy(self) -> &'static dyn UnmapPolicy {
        match self {
            PolicyKind::BugVm => &bug_vm::BugVm,
            PolicyKind::PinMapped => &pin_mapped::PinMapped,
            PolicyKind::HoldOnError => &hold_on_error::HoldOnError,
            PolicyKind::GfnCount => &gfn_count::GfnCount,
            PolicyKind::Poison => &poison::Poison,
            PolicyKind::FailUnmap => &fail_unmap::FailUnmap,
        }
    }

    /// Whether the policy writes to a struct page, and so cannot work with bare PFN ranges.
    pub fn needs_struct_page(self) -> bool {
        matches!(self, PolicyKind::PinMapped | PolicyKind::HoldOnError | PolicyKind::Poison)
    }

    /// The policies that work with bare PFN ranges.
    pub fn without_struct_page() -> Vec<PolicyKind> {
        PolicyKind::ALL.into_iter().filter(|policy| !policy.needs_struct_page()).collect()
    }
}

/// What a policy does besides unmapping.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Costs {
    /// Changes of a folio's reference count.
    pub reference_updates: u64,
    /// Looks at a folio's reference count.
    pub reference_checks: u64,
    /// Changes of a count that guest_memfd keeps.
    pub counter_updates: u64,
    /// Looks at a count that guest_memfd keeps.
    pub counter_checks: u64,
    /// lru_add_drain_all(): every CPU is interrupted.
    pub lru_drains: u64,
    /// Looks at a folio's reference count that a conversion to private makes under every policy.
    pub safety_checks: u64,
}

/// A private mapping of a guest.
#[derive(Clone, Copy, Debug)]
pub struct PrivatePage {
    /// The VM.
    pub vm: VmId,
    /// First gfn.
    pub gfn: u64,
    /// First frame.
    pub pfn: Pfn,
    /// Size.
    pub order: Order,
}

/// A private mapping that could not be removed.
#[derive(Clone, Copy, Debug)]
pub struct Stuck {
    /// The VM.
    pub vm: VmId,
    /// First gfn.
    pub gfn: u64,
    /// First frame.
    pub pfn: Pfn,
    /// Size.
    pub order: Order,
    /// What failed.
    pub error: UnmapError,
    /// Whether the caller can take an error.
    pub context: ZapContext,
}

/// What to do with the pages of the S-EPT, above all when one cannot be taken out of it.
pub trait UnmapPolicy: Sync {
    /// A page was mapped.
    fn mapped(&self, _world: &mut World, _page: &PrivatePage) {}

    /// A page was unmapped.
    fn unmapped(&self, _world: &mut World, _page: &PrivatePage) {}

    /// A page could not be unmapped.
    ///
    /// # Errors
    /// The error to report; the mapping stays then.
    fn failed(&self, world: &mut World, stuck: &Stuck) -> Result<(), UnmapError>;

    /// guest_memfd is about to drop its references to the folio at a page index. A policy that has something to do here says
    /// so in [`UnmapPolicy::ignores_release`].
    fn before_release(&self, _world: &mut World, _inode: InodeId, _index: u64, _pfn: Pfn) {}

    /// Whether [`UnmapPolicy::before_release`] does nothing for `pages` pages from `index` on.
    fn ignores_release(&self, _world: &World, _inode: InodeId, _index: u64, _pages: u64) -> bool {
        true
    }

    /// First page index in a range, just unmapped for a conversion to shared, that is still in use for private memory.
    fn still_in_use(&self, _world: &mut World, _inode: InodeId, _first: u64, _last: u64) -> Option<u64> {
        None
    }

    /// Whether a failed unmap is no bug, so that it may be tried again on a page that is blocked, or removed, already.
    fn tries_again(&self) -> bool {
        false
    }
}

impl World {
    fn policy(&self) -> &'static dyn UnmapPolicy {
        self.profile.policy.policy()
    }

    /// Tells the policy of a new private mapping.
    pub fn policy_mapped(&mut self, vm: VmId, gfn: u64, pfn: Pfn, order: Order) {
        self.policy().mapped(self, &PrivatePage { vm, gfn, pfn, order });
    }

    /// Tells the policy of a private mapping that is gone.
    pub fn policy_unmapped(&mut self, vm: VmId, gfn: u64, pfn: Pfn, order: Order) {
        self.policy().unmapped(self, &PrivatePage { vm, gfn, pfn, order });
    }

    /// Asks the policy what to do with a page that cannot be unmapped.
    ///
    /// # Errors
    /// The error that the policy reports.
    pub fn policy_failed(&mut self, stuck: &Stuck) -> Result<(), UnmapError> {
        self.policy().failed(self, stuck)
    }

    /// Tells the policy that a folio leaves its file.
    pub fn policy_before_release(&mut self, inode: InodeId, index: u64, pfn: Pfn) {
        self.policy().before_release(self, inode, index, pfn);
    }

    /// Whether the policy need not be told that pages leave their file.
    pub fn policy_ignores_release(&self, inode: InodeId, index: u64, pages: u64) -> bool {
        self.policy().ignores_release(self, inode, index, pages)
    }

    /// Asks the policy for a page that cannot become shared.
    pub fn policy_still_in_use(&mut self, inode: InodeId, first: u64, last: u64) -> Option<u64> {
        self.policy().still_in_use(self, inode, first, last)
    }

    /// Whether the policy lets an unmap be tried again.
    pub fn policy_retries(&self) -> bool {
        self.policy().tries_again()
    }
}
