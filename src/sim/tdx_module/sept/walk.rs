//! The walk from the root of a Secure EPT to an entry (TDX module spec 4.6).

use super::super::memory::PhysicalMemory;
use super::{SeptEntry, span};

/// An entry and where it is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct At {
    pub entry_pa: u64,
    pub level: u8,
    pub entry: SeptEntry,
}

#[inline]
fn entry_at(memory: &dyn PhysicalMemory, table: u64, gpa: u64, level: u8) -> At {
    let entry_pa = table + ((gpa / span(level)) & 511) * 8;
    At { entry_pa, level, entry: SeptEntry(memory.read_u64(entry_pa)) }
}

/// Walks to the entry of `level`, whatever it is; `Err` with the entry that has no permissions or is a leaf above.
#[inline]
pub(crate) fn walk(memory: &dyn PhysicalMemory, root: u64, root_level: u8, gpa: u64, level: u8) -> Result<At, At> {
    let mut at = entry_at(memory, root, gpa, root_level);
    while at.level > level {
        if at.entry.rwx() == 0 || at.entry.is_leaf() {
            return Err(at);
        }
        at = entry_at(memory, at.entry.hpa(at.level), gpa, at.level - 1);
    }
    Ok(at)
}

/// Walks to the first leaf; `Err` with an entry that is no leaf or has no permissions.
pub(crate) fn walk_to_leaf(memory: &dyn PhysicalMemory, root: u64, root_level: u8, gpa: u64) -> Result<At, At> {
    let at = match walk(memory, root, root_level, gpa, 0) {
        Ok(at) | Err(at) => at,
    };
    if at.entry.is_leaf() && at.entry.rwx() != 0 { Ok(at) } else { Err(at) }
}
