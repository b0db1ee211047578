//! Memory in this process: three levels of tables, uniform pages and uniform 2M regions without a byte of content.

use std::mem::size_of;

use super::{LINE_SIZE, LineTag, PAGE_SIZE, PhysicalMemory};

const REGION: u64 = 2 << 20;
const WORDS: usize = (PAGE_SIZE / 8) as usize;
const LINES: usize = (PAGE_SIZE / LINE_SIZE) as usize;

enum Tags {
    Same(LineTag),
    Lines(Box<[LineTag; LINES]>),
}

struct PageData {
    words: [u64; WORDS],
    tags: Tags,
}

enum Page {
    Uniform { pattern: u64, tag: LineTag },
    Data(Box<PageData>),
}

enum Region {
    Uniform { pattern: u64, tag: LineTag },
    Pages(Box<[Page; 512]>),
}

type Gib = Box<[Region; 512]>;

/// Sparse physical memory.
pub struct SparseMemory {
    gibs: Vec<Option<Gib>>,
    data_pages: u64,
    line_tables: u64,
    page_tables: u64,
}

impl SparseMemory {
    /// All zeros, last written by the host. Addresses above `limit` bytes read as zero and ignore writes.
    pub fn new(limit: u64) -> SparseMemory {
        let gibs = limit.div_ceil(1 << 30) as usize;
        SparseMemory {
            gibs: std::iter::repeat_with(|| None).take(gibs).collect(),
            data_pages: 0,
            line_tables: 0,
            page_tables: 0,
        }
    }

    fn region(&self, pa: u64) -> Option<&Region> {
        let gib = self.gibs.get((pa >> 30) as usize)?.as_ref()?;
        Some(&gib[(pa >> 21) as usize & 511])
    }

    fn region_mut(&mut self, pa: u64) -> Option<&mut Region> {
        let gib = self.gibs.get_mut((pa >> 30) as usize)?;
        let gib = gib.get_or_insert_with(|| boxed(|| Region::Uniform { pattern: 0, tag: LineTag::HOST }));
        Some(&mut gib[(pa >> 21) as usize & 511])
    }

    fn page(&self, pa: u64) -> Option<&Page> {
        match self.region(pa)? {
            Region::Uniform { .. } => None,
            Region::Pages(pages) => Some(&pages[(pa >> 12) as usize & 511]),
        }
    }

    fn page_mut(&mut self, pa: u64) -> Option<&mut Page> {
        let mut split = false;
        let region = self.region_mut(pa)?;
        if let Region::Uniform { pattern, tag } = *region {
            *region = Region::Pages(boxed(|| Page::Uniform { pattern, tag }));
            split = true;
        }
        if split {
            self.page_tables += 1;
        }
        match self.region_mut(pa)? {
            Region::Pages(pages) => Some(&mut pages[(pa >> 12) as usize & 511]),
            Region::Uniform { .. } => None,
        }
    }

    fn data_mut(&mut self, pa: u64) -> Option<&mut PageData> {
        let mut grown = false;
        let page = self.page_mut(pa)?;
        if let Page::Uniform { pattern, tag } = *page {
            *page = Page::Data(Box::new(PageData { words: [pattern; WORDS], tags: Tags::Same(tag) }));
            grown = true;
        }
        if grown {
            self.data_pages += 1;
        }
        match self.page_mut(pa)? {
            Page::Data(data) => Some(data),
            Page::Uniform { .. } => None,
        }
    }

    fn set_page(&mut self, pa: u64, new: Page) {
        let was = match self.page(pa) {
            Some(Page::Data(data)) => Some(matches!(data.tags, Tags::Lines(_))),
            _ => None,
        };
        if let Some(lines) = was {
            self.data_pages -= 1;
            self.line_tables -= u64::from(lines);
        }
        if matches!(new, Page::Data(_)) {
            self.data_pages += 1;
        }
        if let Some(page) = self.page_mut(pa) {
            *page = new;
        }
    }

    fn fill_region(&mut self, pa: u64, pattern: u64, tag: LineTag) {
        if let Some(Region::Pages(pages)) = self.region(pa) {
            let (mut data, mut lines) = (0, 0);
            for page in pages.iter() {
                if let Page::Data(page) = page {
                    data += 1;
                    lines += u64::from(matches!(page.tags, Tags::Lines(_)));
                }
            }
            self.data_pages -= data;
            self.line_tables -= lines;
            self.page_tables -= 1;
        }
        if let Some(region) = self.region_mut(pa) {
            *region = Region::Uniform { pattern, tag };
        }
    }

    fn uniform(&self, pa: u64) -> Option<(u64, LineTag)> {
        match self.region(pa) {
            None => Some((0, LineTag::HOST)),
            Some(Region::Uniform { pattern, tag }) => Some((*pattern, *tag)),
            Some(Region::Pages(pages)) => match &pages[(pa >> 12) as usize & 511] {
                Page::Uniform { pattern, tag } => Some((*pattern, *tag)),
                Page::Data(_) => None,
            },
        }
    }
}

fn boxed<T>(mut make: impl FnMut() -> T) -> Box<[T; 512]> {
    let items: Box<[T]> = (0..512).map(|_| make()).collect();
    match items.try_into() {
        Ok(array) => array,
        Err(_) => unreachable!("512 items were collected"),
    }
}

impl PhysicalMemory for SparseMemory {
    #[inline]
    fn read_u64(&self, pa: u64) -> u64 {
        match self.region(pa) {
            None => 0,
            Some(Region::Uniform { pattern, .. }) => *pattern,
            Some(Region::Pages(pages)) => match &pages[(pa >> 12) as usize & 511] {
                Page::Uniform { pattern, .. } => *pattern,
                Page::Data(data) => data.words[(pa >> 3) as usize & (WORDS - 1)],
            },
        }
    }

    #[inline]
    fn write_u64(&mut self, pa: u64, value: u64) {
        if let Some(Some(gib)) = self.gibs.get_mut((pa >> 30) as usize)
            && let Region::Pages(pages) = &mut gib[(pa >> 21) as usize & 511]
            && let Page::Data(data) = &mut pages[(pa >> 12) as usize & 511]
        {
            data.words[(pa >> 3) as usize & (WORDS - 1)] = value;
            return;
        }
        if self.uniform(pa).is_some_and(|(pattern, _)| pattern == value) {
            return;
        }
        if let Some(data) = self.data_mut(pa) {
            data.words[(pa >> 3) as usize & (WORDS - 1)] = value;
        }
    }

    fn fill(&mut self, pa: u64, len: u64, pattern: u64, tag: LineTag) {
        let end = pa + len;
        let mut at = pa;
        while at < end {
            if at.is_multiple_of(REGION) && end - at >= REGION {
                self.fill_region(at, pattern, tag);
                at += REGION;
            } else if at.is_multiple_of(PAGE_SIZE) && end - at >= PAGE_SIZE {
                if self.uniform(at) != Some((pattern, tag)) {
                    self.set_page(at, Page::Uniform { pattern, tag });
                }
                at += PAGE_SIZE;
            } else {
                self.write_line(at, &[pattern; 8], tag);
                at += LINE_SIZE;
            }
        }
    }

    fn copy_page(&mut self, from: u64, to: u64, tag: LineTag) {
        let page = match (self.uniform(from), self.page(from)) {
            (Some((pattern, _)), _) => Page::Uniform { pattern, tag },
            (None, Some(Page::Data(data))) => {
                Page::Data(Box::new(PageData { words: data.words, tags: Tags::Same(tag) }))
            }
            (None, _) => return,
        };
        if ((to >> 30) as usize) < self.gibs.len() {
            self.set_page(to, page);
        }
    }

    fn tag(&self, pa: u64) -> LineTag {
        match (self.uniform(pa), self.page(pa)) {
            (Some((_, tag)), _) => tag,
            (None, Some(Page::Data(data))) => match &data.tags {
                Tags::Same(tag) => *tag,
                Tags::Lines(lines) => lines[(pa / LINE_SIZE) as usize % LINES],
            },
            (None, _) => LineTag::HOST,
        }
    }

    fn set_tag(&mut self, pa: u64, tag: LineTag) {
        if self.tag(pa) == tag {
            return;
        }
        let mut tabled = false;
        if let Some(data) = self.data_mut(pa) {
            if let Tags::Same(old) = data.tags {
                data.tags = Tags::Lines(Box::new([old; LINES]));
                tabled = true;
            }
            if let Tags::Lines(lines) = &mut data.tags {
                lines[(pa / LINE_SIZE) as usize % LINES] = tag;
            }
        }
        self.line_tables += u64::from(tabled);
    }

    fn resident_bytes(&self) -> u64 {
        let gibs = self.gibs.iter().flatten().count() as u64;
        self.gibs.len() as u64 * size_of::<Option<Gib>>() as u64
            + gibs * 512 * size_of::<Region>() as u64
            + self.page_tables * 512 * size_of::<Page>() as u64
            + self.data_pages * size_of::<PageData>() as u64
            + self.line_tables * (LINES * size_of::<LineTag>()) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uniform_page_costs_sixteen_bytes_and_a_uniform_region_nothing_more() {
        assert_eq!(size_of::<Page>(), 16);
        assert_eq!(size_of::<Region>(), 16);
        let mut memory = SparseMemory::new(4 << 30);
        memory.fill(1 << 30, 1 << 30, 7, LineTag::private(33));
        let empty = memory.resident_bytes();
        assert_eq!(memory.page_tables, 0);
        assert_eq!(memory.read_u64((1 << 30) + 4096 * 77 + 8), 7);
        memory.fill((1 << 30) + 4096, 4096, 8, LineTag::private(34));
        assert_eq!(memory.resident_bytes() - empty, 512 * 16);
        assert_eq!(memory.read_u64((1 << 30) + 4096), 8);
        assert_eq!(memory.read_u64((1 << 30) + 8192), 7);
        memory.fill(1 << 30, 2 << 20, 0, LineTag::HOST);
        assert_eq!(memory.resident_bytes(), empty);
    }

    #[test]
    fn words_lines_and_tags_are_kept_apart() {
        let mut memory = SparseMemory::new(1 << 30);
        memory.write_u64(0x1008, 5);
        assert_eq!((memory.read_u64(0x1000), memory.read_u64(0x1008), memory.read_u64(0x2008)), (0, 5, 0));
        memory.set_tag(0x1040, LineTag::private(40));
        assert_eq!(
            (memory.tag(0x1000), memory.tag(0x1040), memory.tag(0x1078)),
            (LineTag::HOST, LineTag::private(40), LineTag::private(40))
        );
        memory.copy_page(0x1000, 0x5000, LineTag::private(41));
        assert_eq!((memory.read_u64(0x5008), memory.tag(0x5fc0)), (5, LineTag::private(41)));
        memory.fill(0x1000, 4096, 0, LineTag::HOST);
        assert_eq!((memory.data_pages, memory.line_tables), (1, 0));
        memory.write_u64(2 << 30, 9);
        assert_eq!(memory.read_u64(2 << 30), 0);
    }
}
