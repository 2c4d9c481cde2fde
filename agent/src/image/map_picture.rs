//! What is where in the memory of a guest: its pages counted, cell by cell, and painted.

use super::{Chain, Image};
use pageferry_protocol::memory::{BlockGeometry, BlockTable, PageRange};
use png::{BitDepth, ColorType, Encoder, EncodingError};

/// Most pixels of a picture, from side to side.
pub const MAX_WIDTH: u32 = 4096;
/// Most pixels of a picture, from top to bottom.
pub const MAX_HEIGHT: u32 = 8192;
/// Pixels of a picture from side to side, however small the guest is, unless fewer are wanted.
const MIN_WIDTH: u32 = 16;
/// Pixels between two blocks.
const GAP: u64 = 4;

/// A colour: red, green and blue.
pub type Colour = [u8; 3];

/// Of what is no page.
const BACKGROUND: Colour = [0xff; 3];

/// What is looked at.
#[derive(Debug, Clone, Copy)]
pub enum View<'a> {
    /// What one image says.
    Image(&'a Image),
    /// The guest that an image and all that it builds on are of.
    Guest(&'a Chain),
}

/// How a page is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// It has content.
    Content,
    /// It has content, which the base has not.
    Changed,
    /// It is zero.
    Zero,
    /// It is discarded.
    Discarded,
    /// It is as in the base.
    Unchanged,
}

impl Kind {
    /// For people.
    pub fn name(self) -> &'static str {
        match self {
            Self::Content => "content",
            Self::Changed => "changed",
            Self::Zero => "zero",
            Self::Discarded => "discarded",
            Self::Unchanged => "as in the base",
        }
    }

    /// How it is painted. No two differ in the hue alone.
    pub fn colour(self) -> Colour {
        match self {
            Self::Content => [0x1f, 0x5f, 0xbf],
            Self::Changed => [0xd9, 0x4f, 0x04],
            Self::Zero => [0xdd, 0xdd, 0xdd],
            Self::Discarded => [0x33, 0x33, 0x33],
            Self::Unchanged => [0x8c, 0xb8, 0xa6],
        }
    }
}

/// Pages, counted by how they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Tally {
    /// With content.
    pub present: u64,
    /// Zero.
    pub zero: u64,
    /// Discarded.
    pub discarded: u64,
    /// As in the base.
    pub unchanged: u64,
}

impl Tally {
    /// All of them.
    pub fn pages(&self) -> u64 {
        self.present + self.zero + self.discarded + self.unchanged
    }

    /// The same by kind; of an increment or not.
    pub fn kinds(&self, increment: bool) -> impl Iterator<Item = (Kind, u64)> + use<> {
        let content = if increment { Kind::Changed } else { Kind::Content };
        let unchanged = increment.then_some((Kind::Unchanged, self.unchanged));
        [(content, self.present), (Kind::Zero, self.zero), (Kind::Discarded, self.discarded)]
            .into_iter()
            .chain(unchanged)
    }

    /// The colours of the pages, mixed as there are many of each.
    pub fn colour(&self, increment: bool) -> Colour {
        let pages = self.pages().max(1);
        let mixed = |channel: usize| {
            let sum: u64 = self
                .kinds(increment)
                .map(|(kind, count)| u64::from(kind.colour()[channel]) * count)
                .sum();
            // A mean of bytes is one.
            ((sum + pages / 2) / pages) as u8
        };
        [mixed(0), mixed(1), mixed(2)]
    }
}

impl std::ops::AddAssign for Tally {
    fn add_assign(&mut self, other: Self) {
        self.present += other.present;
        self.zero += other.zero;
        self.discarded += other.discarded;
        self.unchanged += other.unchanged;
    }
}

impl View<'_> {
    /// The blocks.
    pub fn table(&self) -> &BlockTable {
        match self {
            Self::Image(image) => &image.contents().table,
            Self::Guest(chain) => chain.table(),
        }
    }

    /// True if pages can be as in a base.
    pub fn is_increment(&self) -> bool {
        matches!(self, Self::Image(image) if image.header().is_increment())
    }

    /// The pages `range` of the block at index `at`, as far as it has them.
    pub fn tally(&self, at: usize, range: PageRange) -> Tally {
        let (present, discarded, unchanged) = match self {
            Self::Image(image) => {
                let states = &image.states()[at];
                (&states.present, &states.discarded, states.unchanged.count(range))
            }
            Self::Guest(chain) => (chain.present(at), chain.discarded(at), 0),
        };
        let pages = range.intersection(&present.all()).count;
        let (present, discarded) = (present.count(range), discarded.count(range));
        Tally { present, zero: pages - present - discarded - unchanged, discarded, unchanged }
    }

    /// All pages of the block at index `at`.
    pub fn block(&self, at: usize) -> Tally {
        self.tally(at, PageRange::new(0, self.table().blocks()[at].pages()))
    }

    /// The pages of all blocks.
    pub fn all(&self) -> Tally {
        let mut all = Tally::default();
        (0..self.table().blocks().len()).for_each(|at| all += self.block(at));
        all
    }

    /// The block at index `at`, `per_cell` pages after the others; the last cell may be of fewer.
    pub fn cells(&self, at: usize, per_cell: u64) -> impl Iterator<Item = Tally> + '_ {
        let (per_cell, pages) = (per_cell.max(1), self.table().blocks()[at].pages());
        (0..pages.div_ceil(per_cell))
            .map(move |cell| self.tally(at, PageRange::new(cell * per_cell, per_cell)))
    }
}

/// The fewest pages of a cell, a power of two, with which `pages` make at most `cells` cells.
pub fn pages_per_cell(pages: u64, cells: u64) -> u64 {
    // Of at most 2^38 pages, so the power exists.
    pages.div_ceil(cells.max(1)).next_power_of_two()
}

/// A picture of all blocks, one below the other, each row of it from left to right.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Picture {
    /// In pixels.
    pub width: u32,
    /// In pixels.
    pub height: u32,
    /// Pages of a pixel.
    pub pages_per_pixel: u64,
    /// Row by row.
    pixels: Vec<u8>,
}

impl Picture {
    /// Paints what is seen, at most `width` pixels wide, but at least one, and [`MAX_HEIGHT`] high.
    pub fn paint(view: &View<'_>, width: u32) -> Self {
        let blocks = view.table().blocks();
        let pages: u64 = blocks.iter().map(BlockGeometry::pages).sum();
        // Not a line where the guest is small.
        let square = u32::try_from(pages.isqrt().next_power_of_two()).unwrap_or(MAX_WIDTH);
        let width = width.min(square.max(MIN_WIDTH)).clamp(1, MAX_WIDTH);
        let rows = |pages: u64, per_pixel: u64| pages.div_ceil(per_pixel).div_ceil(width.into());
        let gaps = GAP * (blocks.len() as u64).saturating_sub(1);
        let height = |per_pixel| {
            gaps + blocks.iter().map(|block| rows(block.pages(), per_pixel)).sum::<u64>()
        };
        // With as many blocks as there can be, of one row each, there is room to spare.
        let mut pages_per_pixel = 1;
        while height(pages_per_pixel) > u64::from(MAX_HEIGHT) {
            pages_per_pixel *= 2;
        }
        let height = height(pages_per_pixel).max(1) as u32;
        let mut pixels = vec![BACKGROUND; width as usize * height as usize];
        let mut next = 0;
        for (at, block) in blocks.iter().enumerate() {
            let cells =
                view.cells(at, pages_per_pixel).map(|cell| cell.colour(view.is_increment()));
            pixels[next..].iter_mut().zip(cells).for_each(|(pixel, colour)| *pixel = colour);
            next += (rows(block.pages(), pages_per_pixel) + GAP) as usize * width as usize;
        }
        Self { width, height, pages_per_pixel, pixels: pixels.into_flattened() }
    }

    /// The bytes of a file in PNG.
    ///
    /// # Errors
    /// If it cannot be encoded.
    pub fn png(&self) -> Result<Vec<u8>, EncodingError> {
        let mut bytes = Vec::new();
        let mut encoder = Encoder::new(&mut bytes, self.width, self.height);
        encoder.set_color(ColorType::Rgb);
        encoder.set_depth(BitDepth::Eight);
        let mut writer = encoder.write_header()?;
        writer.write_image_data(&self.pixels)?;
        writer.finish()?;
        Ok(bytes)
    }

    /// The colour of a pixel; `None` outside.
    pub fn pixel(&self, x: u32, y: u32) -> Option<Colour> {
        let at = (y as usize * self.width as usize + x as usize) * 3;
        let colour = self.pixels.get(at..at + 3).filter(|_| x < self.width)?;
        colour.try_into().ok()
    }
}

#[cfg(test)]
mod tests;
