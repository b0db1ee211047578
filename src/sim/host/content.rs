//! What is in the frames: real bytes, stored only where they differ from a fill.

use crate::machine::PAGE_SIZE;
use std::collections::{BTreeMap, HashMap};

const CHUNK: u64 = 2 << 20;

#[derive(Debug)]
enum Page {
    Fill(u8),
    Bytes(Box<[u8; PAGE_SIZE as usize]>),
}

/// 2 MiB of memory: a base fill, and the pages that differ from it.
#[derive(Debug, Default)]
struct Chunk {
    base: u8,
    pages: BTreeMap<u16, Page>,
}

/// Contents of physical memory; never-written memory is zero and costs nothing.
#[derive(Debug, Default)]
pub struct Contents {
    chunks: HashMap<u64, Chunk>,
}

/// Splits `pa..pa+len` at multiples of `unit`: (unit number, offset in it, length).
fn pieces(pa: u64, len: u64, unit: u64) -> impl Iterator<Item = (u64, u64, u64)> {
    let mut at = pa;
    let end = pa + len;
    std::iter::from_fn(move || {
        if at >= end {
            return None;
        }
        let piece = (at / unit, at % unit, (unit - at % unit).min(end - at));
        at += piece.2;
        Some(piece)
    })
}

impl Contents {
    /// Reads bytes at a physical address.
    pub fn read(&self, pa: u64, buf: &mut [u8]) {
        let mut done = 0;
        for (number, offset, len) in pieces(pa, buf.len() as u64, PAGE_SIZE) {
            let part = &mut buf[done..done + len as usize];
            done += len as usize;
            let chunk = self.chunks.get(&(number / 512));
            match chunk.and_then(|chunk| chunk.pages.get(&((number % 512) as u16))) {
                Some(Page::Bytes(bytes)) => part.copy_from_slice(&bytes[offset as usize..(offset + len) as usize]),
                Some(Page::Fill(byte)) => part.fill(*byte),
                None => part.fill(chunk.map_or(0, |chunk| chunk.base)),
            }
        }
    }

    /// Writes bytes at a physical address.
    pub fn write(&mut self, pa: u64, data: &[u8]) {
        let mut done = 0;
        for (number, offset, len) in pieces(pa, data.len() as u64, PAGE_SIZE) {
            self.bytes_of(number)[offset as usize..(offset + len) as usize]
                .copy_from_slice(&data[done..done + len as usize]);
            done += len as usize;
        }
    }

    fn bytes_of(&mut self, number: u64) -> &mut [u8; PAGE_SIZE as usize] {
        let chunk = self.chunks.entry(number / 512).or_default();
        let base = chunk.base;
        let page = chunk.pages.entry((number % 512) as u16).or_insert(Page::Fill(base));
        if let Page::Fill(byte) = *page {
            *page = Page::Bytes(Box::new([byte; PAGE_SIZE as usize]));
        }
        match page {
            Page::Bytes(bytes) => bytes,
            Page::Fill(_) => unreachable!("a filled page was just given bytes"),
        }
    }

    /// Writes `len` bytes of `byte` at a physical address.
    pub fn fill(&mut self, pa: u64, len: u64, byte: u8) {
        for (number, offset, part) in pieces(pa, len, CHUNK) {
            if part == CHUNK {
                if byte == 0 {
                    self.chunks.remove(&number);
                } else {
                    self.chunks.insert(number, Chunk { base: byte, pages: BTreeMap::new() });
                }
                continue;
            }
            if byte == 0 && !self.chunks.contains_key(&number) {
                continue;
            }
            for (page, offset, part) in pieces(number * CHUNK + offset, part, PAGE_SIZE) {
                if part < PAGE_SIZE {
                    self.bytes_of(page)[offset as usize..(offset + part) as usize].fill(byte);
                    continue;
                }
                let chunk = self.chunks.entry(number).or_default();
                if byte == chunk.base {
                    chunk.pages.remove(&((page % 512) as u16));
                } else {
                    chunk.pages.insert((page % 512) as u16, Page::Fill(byte));
                }
            }
            if self.chunks.get(&number).is_some_and(|chunk| chunk.base == 0 && chunk.pages.is_empty()) {
                self.chunks.remove(&number);
            }
        }
    }

    /// Offset from `pa` and value of the first byte that is not `byte`.
    pub fn find_mismatch(&self, pa: u64, len: u64, byte: u8) -> Option<(u64, u8)> {
        for (number, offset, part) in pieces(pa, len, PAGE_SIZE) {
            let at = number * PAGE_SIZE + offset - pa;
            let chunk = self.chunks.get(&(number / 512));
            let found = match chunk.and_then(|chunk| chunk.pages.get(&((number % 512) as u16))) {
                Some(Page::Bytes(bytes)) => {
                    let bytes = &bytes[offset as usize..(offset + part) as usize];
                    bytes.iter().position(|found| *found != byte).map(|i| (at + i as u64, bytes[i]))
                }
                Some(Page::Fill(found)) => (*found != byte).then_some((at, *found)),
                None => {
                    let base = chunk.map_or(0, |chunk| chunk.base);
                    (base != byte).then_some((at, base))
                }
            };
            if found.is_some() {
                return found;
            }
        }
        None
    }

    /// Pages whose bytes are stored one by one.
    pub fn stored_pages(&self) -> usize {
        self.chunks.values().map(|chunk| chunk.pages.len()).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_return_what_was_written_across_pages() {
        let mut contents = Contents::default();
        contents.write(0x1ffe, &[1, 2, 3, 4]);
        let mut buf = [9; 6];
        contents.read(0x1ffd, &mut buf);
        assert_eq!(buf, [0, 1, 2, 3, 4, 0]);
    }

    #[test]
    fn fills_cost_nothing_and_mismatches_are_found_in_them() {
        let mut contents = Contents::default();
        contents.fill(0, 8 * CHUNK, 0xaa);
        assert_eq!(contents.stored_pages(), 0);
        contents.fill(CHUNK + 100, 1, 0xbb);
        assert_eq!(contents.find_mismatch(0, 8 * CHUNK, 0xaa), Some((CHUNK + 100, 0xbb)));
        contents.fill(CHUNK, PAGE_SIZE, 0xaa);
        assert_eq!(contents.find_mismatch(0, 8 * CHUNK, 0xaa), None);
        contents.fill(0, 8 * CHUNK, 0);
        assert!(contents.chunks.is_empty());
    }
}
