//! What is known of one page of a guest_memfd: its frame, its references, who holds them.

/// The references to the folio at an offset of a guest_memfd.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageAccount {
    /// The page frame.
    pub frame: u64,
    /// `_refcount` of its folio.
    pub refs: u32,
    /// Page-table entries of the host that map it.
    pub map_count: u32,
    /// KPF_* bits.
    pub flags: u64,
    /// Who holds how many of the references, by name (`page-cache`, `pte`, `get`, `pin`, `sept-pin`, ..); `None` where the
    /// machine shows only their sum.
    pub holders: Option<Vec<(&'static str, u32)>>,
}

impl PageAccount {
    /// How many references a holder has; `None` where the machine does not tell.
    pub fn held_by(&self, holder: &str) -> Option<u32> {
        let holders = self.holders.as_ref()?;
        Some(holders.iter().filter(|(name, _)| *name == holder).map(|(_, count)| count).sum())
    }
}
