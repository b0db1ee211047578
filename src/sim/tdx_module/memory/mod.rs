//! Physical memory below the module.
//!
//! [`PhysicalMemory`] is what the module needs of it: words, lines, pages, and for every 64-byte line who wrote it last ([`LineTag`]).
//! [`SparseMemory`] keeps it in this process, where a page never written or filled with one repeated word costs 16 bytes at most;
//! [`MappedMemory`] is a file mapped into the process, so that a kernel under emulation and the module see the same bytes.
//! [`lines`] puts the encryption engine and the caches on top: what a host access to a TD's line does, what poison is, what a
//! forgotten flush leaves behind (TDX module spec 7.6).

pub mod lines;
mod mapped;
mod sparse;

pub use mapped::{MappedMemory, Window};
pub use sparse::SparseMemory;

/// Bytes of a page.
pub const PAGE_SIZE: u64 = 4096;
/// Bytes of a cache line.
pub const LINE_SIZE: u64 = 64;

/// Who wrote a 64-byte line last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Hash)]
pub struct LineTag {
    /// Key id of the last write; 0 is the host's.
    pub hkid: u16,
    /// The TD-owner bit: the last write used a private key id.
    pub td: bool,
    /// The line is poisoned: the next read is a machine check.
    pub poison: bool,
}

impl LineTag {
    /// Last written by the host.
    pub const HOST: LineTag = LineTag { hkid: 0, td: false, poison: false };

    /// Last written with the private key id `hkid`.
    pub const fn private(hkid: u16) -> LineTag {
        LineTag { hkid, td: true, poison: false }
    }
}

/// Physical memory by physical address, key id bits stripped.
///
/// Addresses outside the memory read as zero and ignore writes: the module checks addresses against its TDMRs, and the host's
/// own mistakes are the host's.
pub trait PhysicalMemory: Send {
    /// The 8 bytes at `pa`, which is 8-aligned, little-endian.
    fn read_u64(&self, pa: u64) -> u64;

    /// Replaces the 8 bytes at `pa`, which is 8-aligned. Leaves the line's tag alone.
    fn write_u64(&mut self, pa: u64, value: u64);

    /// Replaces the bits in `mask` of the 8 bytes at `pa`, which is 8-aligned, in one step as the other party sees it. Leaves the line's
    /// tag alone.
    fn update_u64(&mut self, pa: u64, mask: u64, value: u64) {
        let word = self.read_u64(pa);
        self.write_u64(pa, word & !mask | value & mask);
    }

    /// Sets `len` bytes from `pa` to the repeated word `pattern` and their lines to `tag`; both 64-aligned.
    fn fill(&mut self, pa: u64, len: u64, pattern: u64, tag: LineTag);

    /// Copies the 4 KiB page at `from` to `to` and sets its lines to `tag`.
    fn copy_page(&mut self, from: u64, to: u64, tag: LineTag);

    /// The tag of the line at `pa`.
    fn tag(&self, pa: u64) -> LineTag;

    /// Sets the tag of the line at `pa`.
    fn set_tag(&mut self, pa: u64, tag: LineTag);

    /// Whether every host write comes by here. If not, the tags of host lines say nothing.
    fn sees_host_writes(&self) -> bool {
        true
    }

    /// Bytes of this process the memory holds at present, for the size targets.
    fn resident_bytes(&self) -> u64;

    /// The 64 bytes of the line at `pa`.
    fn read_line(&self, pa: u64) -> [u64; 8] {
        let pa = pa & !(LINE_SIZE - 1);
        std::array::from_fn(|i| self.read_u64(pa + 8 * i as u64))
    }

    /// Replaces the 64 bytes of the line at `pa` and its tag.
    fn write_line(&mut self, pa: u64, line: &[u64; 8], tag: LineTag) {
        let pa = pa & !(LINE_SIZE - 1);
        for (i, word) in line.iter().enumerate() {
            self.write_u64(pa + 8 * i as u64, *word);
        }
        self.set_tag(pa, tag);
    }
}
