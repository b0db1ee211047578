//! What the model behaves like: module generation, optional features, platform errata (TDX module spec 14 and 7.6).

/// Which public source the behaviour follows where they differ (TDX module spec 14).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Generation {
    /// 1.5.01.
    #[default]
    V1_5_01,
    /// The 2.0 generation: op state in the details of `OP_STATE_INCORRECT`, PROMOTE under the exclusive tree lock, VP.INIT version 1,
    /// RDMD with a level, a host-priority tree lock.
    Newer,
}

/// How memory integrity answers a read with the wrong key (TDX module spec 7.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Integrity {
    /// Cryptographic: a MAC failure, hence a machine check.
    #[default]
    Ci,
    /// Logical: wrong plaintext, no error.
    Li,
}

/// Switchable behaviour. `Default` is 1.5.01 without options on a part without errata.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Switches {
    /// Module generation.
    pub generation: Generation,
    /// Integrity mode of the platform.
    pub integrity: Integrity,
    /// Dynamic PAMT offered (FEATURES0 bit 36); in use once SYS.CONFIG R8 bit 16 asks for it (TDX module spec 7.5).
    pub dpamt: bool,
    /// DEMOTE of a TD without L2 partitions is never interrupted (FEATURES0 bit 51).
    pub enhanced_demote: bool,
    /// TDCALL 30 exists and CONFIG_FLAGS bit 6 is legal.
    pub page_release: bool,
    /// VP.INIT has version 1, with the x2APIC id, as the 1.5 modules that Linux accepts have; the newer generation always does.
    pub topology_enum: bool,
    /// Erratum: a partial host write to a TD's line poisons it silently.
    pub partial_write_erratum: bool,
    /// Host and guest writes linger in the cache under their key id until flushed or evicted, so that a missing flush shows.
    pub cache_aliasing: bool,
    /// Zero-step mitigation in VP.ENTER (TDX module spec 9.8). On in every real module.
    pub no_zero_step: bool,
}

impl Switches {
    /// The switch names [`Switches::set`] knows.
    pub const NAMES: &'static [&'static str] = &[
        "newer",
        "li-integrity",
        "dpamt",
        "enhanced-demote",
        "page-release",
        "topology-enum",
        "partial-write-erratum",
        "cache-aliasing",
        "zero-step",
    ];

    /// Turns the switch called `name` on or off; `false` if there is none of that name.
    pub fn set(&mut self, name: &str, on: bool) -> bool {
        match name {
            "newer" => self.generation = if on { Generation::Newer } else { Generation::V1_5_01 },
            "li-integrity" => self.integrity = if on { Integrity::Li } else { Integrity::Ci },
            "dpamt" => self.dpamt = on,
            "enhanced-demote" => self.enhanced_demote = on,
            "page-release" => self.page_release = on,
            "topology-enum" => self.topology_enum = on,
            "partial-write-erratum" => self.partial_write_erratum = on,
            "cache-aliasing" => self.cache_aliasing = on,
            "zero-step" => self.no_zero_step = !on,
            _ => return false,
        }
        true
    }

    /// Whether the model follows the newer generation.
    pub(crate) fn newer(&self) -> bool {
        self.generation == Generation::Newer
    }
}
