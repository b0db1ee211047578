//! What happens when a private page cannot be unmapped: one file per answer.

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

    /// Whether the policy writes to a struct page, and so cannot work with bare PFN ranges.
    pub fn needs_struct_page(self) -> bool {
        matches!(self, PolicyKind::PinMapped | PolicyKind::HoldOnError | PolicyKind::Poison)
    }

    /// The policies that work with bare PFN ranges.
    pub fn without_struct_page() -> Vec<PolicyKind> {
        PolicyKind::ALL.into_iter().filter(|policy| !policy.needs_struct_page()).collect()
    }
}
