//! `struct page` of the running kernel, read through /proc/kcore: the only place where a reference count can be seen.
//!
//! Offsets and the place of the array are those that the kernel exports for crash dumps (VMCOREINFO, in a note of
//! /proc/kcore). Reading disturbs nothing, and is no snapshot: a count is believed when it is found twice.

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;

use object::elf::{FileHeader64, PT_LOAD, PT_NOTE};
use object::read::ReadCache;
use object::read::elf::{FileHeader, ProgramHeader};
use object::{Endianness, read};

use super::mapping::errno_of;
use super::page;
use crate::machine::{Errno, PageAccount};

const KCORE: &str = "/proc/kcore";
/// How often a count is read that does not stay the same.
const ATTEMPTS: usize = 8;

/// The references to a frame; `None` for one that nobody holds.
///
/// # Errors
/// ENXIO for a frame beyond the memory of the machine; ENOSYS where the kernel does not say where its `struct page`s are (no
/// CONFIG_VMCORE_INFO, or a release without SYMBOL(vmemmap)); what opening and reading /proc/kcore and /proc/kpageflags
/// return.
pub(super) fn account(frame: u64) -> Result<Option<PageAccount>, Errno> {
    let flags = page::flags(frame)?;
    let mut kcore = File::open(KCORE).map_err(errno_of)?;
    let layout = Layout::read(&mut kcore)?;
    let mut before = layout.counts(&kcore, frame)?;
    for _ in 0..ATTEMPTS {
        let now = layout.counts(&kcore, frame)?;
        if now == before {
            break;
        }
        before = now;
    }
    let (refs, map_count) = before;
    Ok((refs > 0).then_some(PageAccount { frame, refs, map_count, flags, holders: None }))
}

/// Where the kernel keeps what.
#[derive(Debug, PartialEq, Eq)]
struct Layout {
    /// Address of the `struct page` of frame 0.
    vmemmap: u64,
    /// sizeof(struct page).
    size: u64,
    /// offsetof(struct page, _refcount).
    refcount: u64,
    /// offsetof(struct page, _mapcount).
    mapcount: u64,
    /// What can be read.
    segments: Vec<Segment>,
}

/// A range of the kernel's memory in /proc/kcore.
#[derive(Debug, PartialEq, Eq)]
struct Segment {
    address: u64,
    len: u64,
    /// Where it begins in the file.
    place: u64,
}

impl Layout {
    fn read(kcore: &mut File) -> Result<Layout, Errno> {
        let cache = ReadCache::new(kcore);
        let parse = || -> read::Result<(String, Vec<Segment>)> {
            let header = FileHeader64::<Endianness>::parse(&cache)?;
            let endian = header.endian()?;
            let (mut info, mut segments) = (String::new(), Vec::new());
            for segment in header.program_headers(endian, &cache)? {
                match segment.p_type(endian) {
                    PT_NOTE => {
                        let Some(mut notes) = segment.notes(endian, &cache)? else { continue };
                        while let Some(note) = notes.next()? {
                            if note.name() == b"VMCOREINFO" {
                                info = String::from_utf8_lossy(note.desc()).into_owned();
                            }
                        }
                    }
                    PT_LOAD => segments.push(Segment {
                        address: segment.p_vaddr(endian),
                        len: segment.p_filesz(endian),
                        place: segment.p_offset(endian),
                    }),
                    _ => {}
                }
            }
            Ok((info, segments))
        };
        let (info, segments) = parse().map_err(|_| Errno::ENOSYS)?;
        Layout::of(&info, segments).ok_or(Errno::ENOSYS)
    }

    /// Of the lines of VMCOREINFO.
    fn of(info: &str, segments: Vec<Segment>) -> Option<Layout> {
        let lines: HashMap<&str, &str> = info.lines().filter_map(|line| line.split_once('=')).collect();
        let number = |key: &str| lines.get(key)?.parse::<u64>().ok();
        let symbol = u64::from_str_radix(lines.get("SYMBOL(vmemmap)")?, 16).ok()?;
        Some(Layout {
            vmemmap: symbol,
            size: number("SIZE(page)")?,
            refcount: number("OFFSET(page._refcount)")?,
            mapcount: number("OFFSET(page._mapcount)")?,
            segments,
        })
    }

    /// `_refcount` and `_mapcount` of a frame.
    fn counts(&self, kcore: &File, frame: u64) -> Result<(u32, u32), Errno> {
        let page = frame.checked_mul(self.size).and_then(|offset| self.vmemmap.checked_add(offset));
        let page = page.ok_or(Errno::ENXIO)?;
        let word = |offset: u64| -> Result<i32, Errno> {
            let address = page + offset;
            let holds = |segment: &&Segment| address >= segment.address && address - segment.address < segment.len;
            let segment = self.segments.iter().find(holds).ok_or(Errno::ENXIO)?;
            let mut bytes = [0; 4];
            kcore.read_exact_at(&mut bytes, segment.place + (address - segment.address)).map_err(errno_of)?;
            Ok(i32::from_ne_bytes(bytes))
        };
        // -1 stands for no mapping; a page of some other use has a type in its place, which is no count either.
        let map_count = u32::try_from(word(self.mapcount)?.wrapping_add(1)).unwrap_or(0);
        Ok((u32::try_from(word(self.refcount)?).unwrap_or(0), map_count))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_says_where_its_pages_are() {
        let info = "OSRELEASE=7.3.4\nPAGESIZE=4096\nSYMBOL(vmemmap)=ffffea0000000000\nSIZE(page)=64\n\
                    OFFSET(page.flags)=0\nOFFSET(page._refcount)=52\nOFFSET(page._mapcount)=48\n";
        let layout = Layout::of(info, Vec::new()).unwrap();
        assert_eq!((layout.vmemmap, layout.size), (0xffff_ea00_0000_0000, 64));
        assert_eq!((layout.refcount, layout.mapcount), (52, 48));
        assert_eq!(Layout::of(&info.replace("SYMBOL(vmemmap)", "SYMBOL(mem_section)"), Vec::new()), None);
    }

    #[test]
    fn a_frame_whose_page_cannot_be_read_is_beyond_the_memory() {
        let layout = Layout {
            vmemmap: 1 << 40,
            size: 64,
            refcount: 52,
            mapcount: 48,
            segments: vec![Segment { address: 1 << 40, len: 64, place: 0 }],
        };
        let file = tempfile::tempfile().unwrap();
        let mut page = [0u8; 64];
        page[48..52].copy_from_slice(&0i32.to_ne_bytes());
        page[52..56].copy_from_slice(&3i32.to_ne_bytes());
        file.write_all_at(&page, 0).unwrap();
        assert_eq!(layout.counts(&file, 0), Ok((3, 1)));
        assert_eq!(layout.counts(&file, 1), Err(Errno::ENXIO));
        assert_eq!(layout.counts(&file, u64::MAX), Err(Errno::ENXIO));
    }
}
