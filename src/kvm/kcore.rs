//! Reference counts of page frames, out of the kernel's memory map: `struct page` as /proc/kcore shows it.
//!
//! The VMCOREINFO note of /proc/kcore (4.19) says how large `struct page` is and where `_refcount` lies in it; the memory map begins
//! at `vmemmap_base`, whose address /proc/kallsyms has where it is not constant.

use super::mapping::errno_of;
use crate::machine::Errno;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;

/// Where the memory map begins on x86-64 with 4-level page tables, without CONFIG_RANDOMIZE_MEMORY
/// (Documentation/arch/x86/x86_64/mm.rst).
const VMEMMAP: u64 = 0xffff_ea00_0000_0000;
/// PT_LOAD and PT_NOTE.
const LOAD: u32 = 1;
const NOTE: u32 = 4;

/// `_refcount` of a frame's folio or page: 0 for one that is free.
///
/// # Errors
/// ENOSYS where the kernel does not describe itself well enough, or the errno of opening and reading /proc/kcore.
pub(super) fn references(frame: u64) -> Result<u32, Errno> {
    let core = Core::open()?;
    let at = core.memory_map()? + frame * core.size + core.refcount;
    Ok((core.read_u64(at & !7)? >> (8 * (at % 8))) as u32)
}

struct Core {
    file: File,
    /// Virtual address, offset in the file, bytes.
    loads: Vec<(u64, u64, u64)>,
    /// Bytes of `struct page`.
    size: u64,
    /// Offset of `_refcount` in it.
    refcount: u64,
}

impl Core {
    fn open() -> Result<Core, Errno> {
        let file = File::open("/proc/kcore").map_err(errno_of)?;
        let mut head = [0; 64];
        file.read_exact_at(&mut head, 0).map_err(errno_of)?;
        let (table, count) = (word(&head, 32), usize::from(u16::from_le_bytes([head[56], head[57]])));
        let mut headers = vec![0; count * 56];
        file.read_exact_at(&mut headers, table).map_err(errno_of)?;
        let (mut loads, mut notes) = (Vec::new(), Vec::new());
        for header in headers.chunks_exact(56) {
            let (offset, address, bytes) = (word(header, 8), word(header, 16), word(header, 32));
            match u32::from_le_bytes([header[0], header[1], header[2], header[3]]) {
                LOAD => loads.push((address, offset, bytes)),
                NOTE => {
                    notes = vec![0; bytes as usize];
                    file.read_exact_at(&mut notes, offset).map_err(errno_of)?;
                }
                _ => {}
            }
        }
        let notes = String::from_utf8_lossy(&notes);
        let size = number(&notes, "SIZE(page)=").ok_or(Errno::ENOSYS)?;
        let refcount = number(&notes, "OFFSET(page._refcount)=").ok_or(Errno::ENOSYS)?;
        Ok(Core { file, loads, size, refcount })
    }

    fn memory_map(&self) -> Result<u64, Errno> {
        // The symbols are long to read: only where the memory map is not where it is without CONFIG_RANDOMIZE_MEMORY.
        if self.loads.iter().any(|&(start, ..)| start == VMEMMAP) {
            return Ok(VMEMMAP);
        }
        let symbols = fs::read_to_string("/proc/kallsyms").unwrap_or_default();
        let line = symbols.lines().find(|line| line.split_ascii_whitespace().nth(2) == Some("vmemmap_base"));
        let address = line.and_then(|line| u64::from_str_radix(line.split_ascii_whitespace().next()?, 16).ok());
        match address {
            // An address of 0 is one that this process may not see.
            Some(address) if address != 0 => self.read_u64(address),
            _ => Ok(VMEMMAP),
        }
    }

    fn read_u64(&self, address: u64) -> Result<u64, Errno> {
        let inside = |&&(start, _, bytes): &&(u64, u64, u64)| address >= start && address - start < bytes;
        let (start, offset, _) = self.loads.iter().find(inside).ok_or(Errno::ENOSYS)?;
        let mut bytes = [0; 8];
        self.file.read_exact_at(&mut bytes, offset + (address - start)).map_err(errno_of)?;
        Ok(u64::from_le_bytes(bytes))
    }
}

fn word(bytes: &[u8], at: usize) -> u64 {
    bytes[at..at + 8].iter().rev().fold(0, |value, &byte| value << 8 | u64::from(byte))
}

/// The decimal number behind `name` in the text of VMCOREINFO.
fn number(notes: &str, name: &str) -> Option<u64> {
    let rest = &notes[notes.find(name)? + name.len()..];
    rest[..rest.find(|char: char| !char.is_ascii_digit())?].parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_found_in_the_text() {
        let notes = "OSRELEASE=7.3.4\nSIZE(page)=64\nOFFSET(page._refcount)=52\n";
        assert_eq!((number(notes, "SIZE(page)="), number(notes, "OFFSET(page._refcount)=")), (Some(64), Some(52)));
        assert_eq!(number(notes, "SIZE(folio)="), None);
        assert_eq!(word(&[0, 1, 2, 0, 0, 0, 0, 0, 0x80, 9], 1), 0x8000_0000_0000_0201);
    }
}
