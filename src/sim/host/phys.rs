//! Bytes of physical memory: on a TDX machine the module's memory, where every line knows the key it was written with.

use super::super::World;
use super::super::tdx_module::Module;
use super::super::tdx_module::memory::{LINE_SIZE, LineTag};
use super::{Holder, Order, Pfn};
use crate::machine::{Errno, PAGE_SIZE};

/// A read of poisoned memory: a machine check.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Poisoned;

/// Splits `pa..pa+len` at multiples of 8: (aligned address, first byte in the word, bytes).
fn words(pa: u64, len: u64) -> impl Iterator<Item = (u64, usize, usize)> {
    let mut at = pa;
    let end = pa + len;
    std::iter::from_fn(move || {
        (at < end).then(|| {
            let word = (at & !7, (at % 8) as usize, (8 - at % 8).min(end - at) as usize);
            at += word.2 as u64;
            word
        })
    })
}

/// Whether any line of a range was written last with a TD's key, or is poisoned.
fn has_private_lines(module: &Module, pa: u64, len: u64) -> bool {
    let first = pa & !(LINE_SIZE - 1);
    (first..pa + len).step_by(LINE_SIZE as usize).any(|line| module.line_tag(line) != LineTag::HOST)
}

fn read_word(module: &mut Module, pa: u64, private: bool) -> Result<[u8; 8], Poisoned> {
    let word = if private { module.host_read(pa).map_err(|_| Poisoned)? } else { module.memory().read_u64(pa) };
    Ok(word.to_le_bytes())
}

impl World {
    /// The host reads physical memory.
    ///
    /// # Errors
    /// [`Poisoned`].
    pub fn read_phys(&mut self, pa: u64, buf: &mut [u8]) -> Result<(), Poisoned> {
        let Some(tdx) = &mut self.tdx else {
            self.host.contents.read(pa, buf);
            return Ok(());
        };
        let private = has_private_lines(&tdx.module, pa, buf.len() as u64);
        let mut done = 0;
        for (at, from, n) in words(pa, buf.len() as u64) {
            let bytes = read_word(&mut tdx.module, at, private)?;
            buf[done..done + n].copy_from_slice(&bytes[from..from + n]);
            done += n;
        }
        Ok(())
    }

    /// The host writes physical memory.
    ///
    /// # Errors
    /// [`Poisoned`] when a store of less than a word has to read first.
    pub fn write_phys(&mut self, pa: u64, data: &[u8]) -> Result<(), Poisoned> {
        let Some(tdx) = &mut self.tdx else {
            self.host.contents.write(pa, data);
            return Ok(());
        };
        let private = has_private_lines(&tdx.module, pa, data.len() as u64);
        let mut done = 0;
        for (at, from, n) in words(pa, data.len() as u64) {
            let mut bytes = [0; 8];
            if n < 8 {
                bytes = read_word(&mut tdx.module, at, private)?;
            }
            bytes[from..from + n].copy_from_slice(&data[done..done + n]);
            tdx.module.host_write(at, u64::from_le_bytes(bytes));
            done += n;
        }
        Ok(())
    }

    /// The host fills physical memory with a byte.
    ///
    /// # Errors
    /// [`Poisoned`] as for [`World::write_phys`].
    pub fn fill_phys(&mut self, pa: u64, len: u64, byte: u8) -> Result<(), Poisoned> {
        let Some(tdx) = &mut self.tdx else {
            self.host.contents.fill(pa, len, byte);
            return Ok(());
        };
        let lines = pa.is_multiple_of(LINE_SIZE) && len.is_multiple_of(LINE_SIZE);
        if lines && !has_private_lines(&tdx.module, pa, len) {
            tdx.module.memory.fill(pa, len, u64::from_le_bytes([byte; 8]), LineTag::HOST);
            return Ok(());
        }
        for (at, _, n) in words(pa, len) {
            let start = at.max(pa);
            self.write_phys(start, &[byte; 8][..n])?;
        }
        Ok(())
    }

    /// Offset from `pa` and value of the first byte that is not `byte`, as the host reads it.
    ///
    /// # Errors
    /// [`Poisoned`].
    pub fn mismatch_phys(&mut self, pa: u64, len: u64, byte: u8) -> Result<Option<(u64, u8)>, Poisoned> {
        let Some(tdx) = &mut self.tdx else { return Ok(self.host.contents.find_mismatch(pa, len, byte)) };
        let private = has_private_lines(&tdx.module, pa, len);
        for (at, from, n) in words(pa, len) {
            let bytes = read_word(&mut tdx.module, at, private)?;
            if let Some(i) = bytes[from..from + n].iter().position(|found| *found != byte) {
                return Ok(Some((at + (from + i) as u64 - pa, bytes[from + i])));
            }
        }
        Ok(None)
    }

    /// Zeroes a folio, as clear_highpage() does.
    pub fn zero_folio(&mut self, pfn: Pfn) {
        let (head, pages) = self.host.frames.extent(pfn);
        let (pa, len) = (head * PAGE_SIZE, pages * PAGE_SIZE);
        match &mut self.tdx {
            None => self.host.contents.fill(pa, len, 0),
            Some(tdx) if tdx.module.switches().partial_write_erratum => {
                for page in head..head + pages {
                    for word in (0..PAGE_SIZE).step_by(8) {
                        tdx.module.host_write(page * PAGE_SIZE + word, 0);
                    }
                }
            }
            Some(tdx) => tdx.module.host_reset(pa, len),
        }
    }

    /// Zeroes one page, whoever wrote it last.
    pub fn zero_page(&mut self, pfn: Pfn) {
        match &mut self.tdx {
            None => self.host.contents.fill(pfn * PAGE_SIZE, PAGE_SIZE, 0),
            Some(tdx) => tdx.module.host_reset(pfn * PAGE_SIZE, PAGE_SIZE),
        }
    }

    /// Allocates a folio, and notes when the TDX module still owns a page of it.
    ///
    /// # Errors
    /// As [`super::HostState::alloc_folio`].
    pub fn alloc_folio(&mut self, order: Order, holder: Holder) -> Result<Pfn, Errno> {
        let pfn = self.host.alloc_folio(order, holder)?;
        if self.is_owned_by_module(pfn) {
            self.reused_while_owned.push(pfn);
        }
        Ok(pfn)
    }

    /// Whether the TDX module owns a frame, or one of the frames of its folio.
    pub fn is_owned_by_module(&self, pfn: Pfn) -> bool {
        let Some(tdx) = &self.tdx else { return false };
        let (head, pages) = self.host.frames.extent(pfn);
        !tdx.module.pamt().all_free(head * PAGE_SIZE, pages * PAGE_SIZE)
    }

    /// Free frames that the TDX module still owns: what the next owner of them will not like.
    pub fn free_frames_owned_by_module(&self) -> Vec<Pfn> {
        let free = self.host.allocator.free_frames();
        free.filter(|pfn| self.is_owned_by_module(*pfn)).collect()
    }
}
