//! Encryption and caches: what a read or write with a key id does to a line (TDX module spec 7.6).

use std::collections::{BTreeMap, VecDeque};

use super::super::fault::mix;
use super::super::module::Module;
use super::super::pamt::PageType;
use super::super::state::Lifecycle;
use super::super::switches::Integrity;
use super::{LINE_SIZE, LineTag, PAGE_SIZE};

/// Dirty lines the caches hold before the oldest is written back.
pub const CACHE_CAPACITY: usize = 4096;

/// A read that ends in a machine check: the line is poisoned, or not what the key says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MachineCheck {
    /// Physical address of the line.
    pub pa: u64,
}

impl std::fmt::Display for MachineCheck {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "machine check at physical address {:#x}", self.pa)
    }
}

impl std::error::Error for MachineCheck {}

/// Dirty copies of lines, by line and key id: the same line can lie in the cache under two key ids, and the last write-back wins.
#[derive(Default)]
pub(crate) struct Caches {
    dirty: BTreeMap<(u64, u16), [u64; 8]>,
    order: VecDeque<(u64, u16)>,
    pub leak_attempts: u64,
}

/// Bytes of a 2M page.
const LARGE: u64 = 2 << 20;

impl Caches {
    fn take(&mut self, key: (u64, u16)) -> Option<[u64; 8]> {
        let line = self.dirty.remove(&key)?;
        self.order.retain(|other| *other != key);
        Some(line)
    }
}

impl Module {
    fn tag_of(&self, hkid: u16) -> LineTag {
        let td = hkid >= self.platform.first_private_hkid;
        LineTag { hkid, td, poison: false }
    }

    pub(crate) fn write_back(&mut self, key: (u64, u16)) {
        if let Some(line) = self.caches.take(key) {
            let tag = self.tag_of(key.1);
            self.memory.write_line(key.0, &line, tag);
        }
    }

    fn put_dirty(&mut self, pa: u64, hkid: u16, line: [u64; 8]) {
        let key = (pa, hkid);
        if self.caches.dirty.insert(key, line).is_none() {
            self.caches.order.push_back(key);
        }
        while self.caches.order.len() > CACHE_CAPACITY {
            let oldest = self.caches.order[0];
            self.write_back(oldest);
        }
    }

    /// The line at `pa` as `hkid` sees it.
    fn read_line_as(&mut self, pa: u64, hkid: u16) -> Result<[u64; 8], MachineCheck> {
        let pa = pa & !(LINE_SIZE - 1);
        if self.switches.cache_aliasing
            && let Some(line) = self.caches.dirty.get(&(pa, hkid))
        {
            return Ok(*line);
        }
        let tag = self.memory.tag(pa);
        let private = hkid >= self.platform.first_private_hkid;
        if tag.poison || private && !tag.td {
            return Err(MachineCheck { pa });
        }
        if tag.hkid == hkid || !private && !self.memory.sees_host_writes() {
            return Ok(self.memory.read_line(pa));
        }
        if !private && tag.td {
            self.caches.leak_attempts += 1;
            return Ok([0; 8]);
        }
        if private && self.switches.integrity == Integrity::Ci {
            return Err(MachineCheck { pa });
        }
        let keys = mix((tag.hkid as u64) << 16 | hkid as u64);
        let line = self.memory.read_line(pa);
        Ok(std::array::from_fn(|i| line[i] ^ mix(keys ^ pa ^ i as u64)))
    }

    /// Reads the 8 bytes at `pa`, 8-aligned, with a key id.
    pub(crate) fn read_as(&mut self, pa: u64, hkid: u16) -> Result<u64, MachineCheck> {
        Ok(self.read_line_as(pa, hkid)?[(pa / 8) as usize % 8])
    }

    /// A private write of 8 bytes: the line is read first, as any store below line size does.
    pub(crate) fn write_private(&mut self, pa: u64, hkid: u16, value: u64) -> Result<(), MachineCheck> {
        let mut line = self.read_line_as(pa, hkid)?;
        line[(pa / 8) as usize % 8] = value;
        let at = pa & !(LINE_SIZE - 1);
        if self.switches.cache_aliasing {
            self.put_dirty(at, hkid, line);
        } else if self.memory.tag(at) == self.tag_of(hkid) {
            self.memory.write_u64(pa, value);
        } else {
            let tag = self.tag_of(hkid);
            self.memory.write_line(at, &line, tag);
        }
        Ok(())
    }

    /// The module uses the first line of a page through the cache: a dirty copy stays behind under `hkid`.
    pub(crate) fn touch_private(&mut self, pa: u64, hkid: u16) {
        if self.switches.cache_aliasing {
            let line = self.memory.read_line(pa);
            self.put_dirty(pa, hkid, line);
        }
    }

    /// Direct full-line writes of one repeated word by the module (MOVDIR64B): cached copies under the same key id are gone.
    pub(crate) fn fill_direct(&mut self, pa: u64, len: u64, hkid: u16, pattern: u64) {
        self.drop_dirty(pa, len, hkid);
        let tag = self.tag_of(hkid);
        self.memory.fill(pa, len, pattern, tag);
    }

    /// Copies a page by direct writes.
    pub(crate) fn copy_direct(&mut self, from: u64, to: u64, hkid: u16) {
        self.drop_dirty(to, PAGE_SIZE, hkid);
        let tag = self.tag_of(hkid);
        self.memory.copy_page(from, to, tag);
    }

    fn drop_dirty(&mut self, pa: u64, len: u64, hkid: u16) {
        for line in self.dirty_lines(pa, len, Some(hkid)) {
            self.caches.take(line);
        }
    }

    pub(crate) fn dirty_lines(&self, pa: u64, len: u64, hkid: Option<u16>) -> Vec<(u64, u16)> {
        if self.caches.dirty.is_empty() {
            return Vec::new();
        }
        let lines = self.caches.dirty.range((pa & !(LINE_SIZE - 1), 0)..(pa + len, 0));
        lines.map(|(key, _)| *key).filter(|key| hkid.is_none_or(|hkid| key.1 == hkid)).collect()
    }

    /// Writes back the dirty lines of a page under one key id (PHYMEM.PAGE.WBINVD).
    pub(crate) fn flush_page(&mut self, pa: u64, hkid: u16) {
        for line in self.dirty_lines(pa, PAGE_SIZE, Some(hkid)) {
            self.write_back(line);
        }
    }

    /// Writes back every dirty line of a key id (PHYMEM.CACHE.WB).
    pub(crate) fn flush_hkid(&mut self, hkid: u16) {
        let lines: Vec<_> = self.caches.dirty.keys().filter(|key| key.1 == hkid).copied().collect();
        for line in lines {
            self.write_back(line);
        }
    }

    /// A host write to a page that holds a TD's control structures or its Secure EPT: the module's next look at it would be an
    /// integrity failure, so the TD is lost at once. The structures themselves stay as they are, only the lines change hands.
    fn host_spoils_control_page(&mut self, pa: u64, len: u64) -> bool {
        let mut spoilt = false;
        let mut next = pa & !(PAGE_SIZE - 1);
        while next < pa + len {
            let page = next;
            next += PAGE_SIZE;
            if page.is_multiple_of(LARGE) && self.pamt.holds_no_small_page(page) {
                next = page + LARGE;
                continue;
            }
            let Some(info) = self.page(page) else { continue };
            let tdr = match info.ty {
                PageType::Tdr => page,
                PageType::Tdcx | PageType::Tdvpr | PageType::Ept => info.owner,
                _ => continue,
            };
            spoilt = true;
            for line in (page.max(pa)..(page + PAGE_SIZE).min(pa + len)).step_by(LINE_SIZE as usize) {
                self.memory.set_tag(line, LineTag::HOST);
            }
            if let Some(td) = self.td_by_tdr_mut(tdr).filter(|td| td.lifecycle == Lifecycle::KeysConfigured) {
                td.fatal = true;
            }
        }
        spoilt
    }

    /// Host read of the 8 bytes at `pa`, 8-aligned. A TD's line reads as zero and counts as a leak attempt.
    ///
    /// # Errors
    /// [`MachineCheck`] for a poisoned line.
    pub fn host_read(&mut self, pa: u64) -> Result<u64, MachineCheck> {
        self.read_as(pa, 0)
    }

    /// Host store of 8 bytes at `pa`, 8-aligned: a partial write of its line. On a TD's line it clears the TD bit, or with the
    /// partial-write erratum poisons the line silently.
    pub fn host_write(&mut self, pa: u64, value: u64) {
        let at = pa & !(LINE_SIZE - 1);
        if self.host_spoils_control_page(at, LINE_SIZE) {
            return;
        }
        let tag = self.memory.tag(at);
        if self.switches.partial_write_erratum && tag.td {
            self.memory.set_tag(at, LineTag { poison: true, ..tag });
            return;
        }
        let clean = if tag.td { [0; 8] } else { self.memory.read_line(at) };
        let mut line = self.caches.dirty.get(&(at, 0)).copied().unwrap_or(clean);
        line[(pa / 8) as usize % 8] = value;
        if self.switches.cache_aliasing {
            self.put_dirty(at, 0, line);
        } else if tag.td {
            self.memory.write_line(at, &line, LineTag::HOST);
        } else {
            self.memory.write_u64(pa, value);
        }
    }

    /// Host MOVDIR64B: replaces the 64-aligned line whole, past the caches; TD bit and poison are gone.
    pub fn host_write_line(&mut self, pa: u64, line: &[u64; 8]) {
        let at = pa & !(LINE_SIZE - 1);
        if self.host_spoils_control_page(at, LINE_SIZE) {
            return;
        }
        self.caches.take((at, 0));
        self.memory.write_line(at, line, LineTag::HOST);
    }

    /// Host MOVDIR64B of zeros over `len` bytes from `pa`, both 64-aligned: what Linux does with a page it takes back.
    pub fn host_reset(&mut self, pa: u64, len: u64) {
        if self.host_spoils_control_page(pa, len) {
            return;
        }
        self.drop_dirty(pa, len, 0);
        self.memory.fill(pa, len, 0, LineTag::HOST);
    }

    /// Host CLFLUSH of `len` bytes from `pa`: the host's own dirty lines reach memory.
    pub fn host_flush(&mut self, pa: u64, len: u64) {
        for line in self.dirty_lines(pa, len, Some(0)) {
            self.write_back(line);
        }
    }

    /// Writes back one dirty line of any key id, chosen by `seed`, as a cache may at any time; `false` if there is none.
    pub fn evict_line(&mut self, seed: u64) -> bool {
        let dirty = self.caches.order.len() as u64;
        if dirty == 0 {
            return false;
        }
        let line = self.caches.order[(seed % dirty) as usize];
        self.write_back(line);
        true
    }

    /// Dirty lines in the caches under a key id.
    pub fn dirty_line_count(&self, hkid: u16) -> usize {
        self.caches.dirty.keys().filter(|key| key.1 == hkid).count()
    }

    /// Host reads of a TD's lines so far.
    pub fn leak_attempts(&self) -> u64 {
        self.caches.leak_attempts
    }

    /// Who wrote the line at `pa` last, as memory knows it.
    pub fn line_tag(&self, pa: u64) -> LineTag {
        self.memory.tag(pa)
    }

    /// The memory below, past encryption and caches.
    pub fn memory(&self) -> &dyn super::PhysicalMemory {
        &*self.memory
    }
}
