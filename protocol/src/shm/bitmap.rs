// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! One bit per page, in words that many threads and two processes change at once.
//!
//! # Memory order
//!
//! Every change is one atomic read-modify-write per word, so no bit is ever lost. If one thread
//! sets a bit while another takes the word, the bit is either in the taken word or still in the
//! bitmap.
//!
//! - [`Bitmap::take_word`] is sequentially consistent:
//!   [`clear-then-read`](crate::invariants#clear-then-read) needs the take before the read of the
//!   page that follows.
//! - A thread that sets a bit releases what it wrote before.
//! - A scan skips words that it loads as zero. A thread that must see a bit has to be ordered after
//!   its setter by other means: the pause of the guest, or the next pass.
//!
//! The process that shares the memory may set bits after the last page. They are never reported.

use super::PageRange;
use super::sync::{AtomicU64, Ordering};
use std::ops::{Deref, Range};

/// Bits in a word, and thereby pages: one word covers 256 KiB of guest memory.
pub const WORD_BITS: u64 = 64;

/// Memory that holds the words of a bitmap. It may know which of them were never set.
pub trait Words: Deref<Target = [AtomicU64]> {
    /// The first run of words in `span` that may be other than zero; `None` if there is none.
    fn next_touched(&self, span: Range<u64>) -> Option<Range<u64>> {
        (!span.is_empty()).then_some(span)
    }

    /// A bit in word `index` was set.
    fn touched(&self, index: u64) {
        let _ = index;
    }
}

impl Words for Vec<AtomicU64> {}

/// A bitmap of `pages` bits over the words of `W`.
#[derive(Debug)]
pub struct Bitmap<W> {
    words: W,
    pages: u64,
}

/// The bits of `range` that fall into word `index`.
fn mask_of(range: &PageRange, index: u64) -> u64 {
    let start = range.first.max(index * WORD_BITS) - index * WORD_BITS;
    let end = range.end().min((index + 1) * WORD_BITS) - index * WORD_BITS;
    word_mask(start, end)
}

/// A word with the bits from `start` to before `end` set.
pub const fn word_mask(start: u64, end: u64) -> u64 {
    low_bits(end) & !low_bits(start)
}

/// A word with its `count` lowest bits set; `count` is at most 64.
const fn low_bits(count: u64) -> u64 {
    if count >= WORD_BITS { u64::MAX } else { (1 << count) - 1 }
}

impl<W: Words> Bitmap<W> {
    /// A bitmap of `pages` bits over `words`; limited to the size of the words.
    pub fn new(words: W, pages: u64) -> Self {
        let pages = pages.min(words.len() as u64 * WORD_BITS);
        Self { words, pages }
    }

    /// Number of pages the bitmap covers.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// All pages of the bitmap as one range.
    pub fn all(&self) -> PageRange {
        PageRange::new(0, self.pages)
    }

    /// The memory under the bitmap.
    pub fn storage(&self) -> &W {
        &self.words
    }

    /// Indexes of the words that `range` touches, cut to the bitmap.
    fn word_span(&self, range: &PageRange) -> Range<u64> {
        let end = range.end().min(self.pages);
        if range.first >= end { 0..0 } else { range.first / WORD_BITS..end.div_ceil(WORD_BITS) }
    }

    /// The bits of word `index` that stand for a page of the bitmap.
    fn valid(&self, index: u64) -> u64 {
        low_bits(self.pages.saturating_sub(index * WORD_BITS))
    }

    fn word_ref(&self, index: u64) -> Option<&AtomicU64> {
        self.words.get(usize::try_from(index).ok()?)
    }

    /// The word that covers pages `64 * index ..`, without changing it; zero outside the bitmap.
    pub fn word(&self, index: u64) -> u64 {
        self.word_ref(index).map_or(0, |word| word.load(Ordering::Acquire) & self.valid(index))
    }

    /// Takes and clears the word that covers pages `64 * index ..`. A word that is zero is only
    /// loaded.
    pub fn take_word(&self, index: u64) -> u64 {
        self.take_bits(index, u64::MAX)
    }

    /// Takes and clears those bits of a word that are in `mask`.
    pub fn take_bits(&self, index: u64, mask: u64) -> u64 {
        let Some(word) = self.word_ref(index) else { return 0 };
        let mask = mask & self.valid(index);
        if word.load(Ordering::Relaxed) & mask == 0 {
            return 0;
        }
        if mask == u64::MAX {
            word.swap(0, Ordering::SeqCst)
        } else {
            word.fetch_and(!mask, Ordering::SeqCst) & mask
        }
    }

    /// Sets the bits of `bits` in the word that covers pages `64 * index ..`; returns those that
    /// were clear before.
    pub fn or_word(&self, index: u64, bits: u64) -> u64 {
        let bits = bits & self.valid(index);
        match self.word_ref(index) {
            Some(word) if bits != 0 => self.set_bits(index, word, bits),
            _ => 0,
        }
    }

    #[inline]
    fn set_bits(&self, index: u64, word: &AtomicU64, bits: u64) -> u64 {
        // An exchange is one instruction, where a fetch-or whose result is wanted is a loop.
        let before = if bits == u64::MAX {
            word.swap(bits, Ordering::AcqRel)
        } else {
            word.fetch_or(bits, Ordering::AcqRel)
        };
        // After the bit: a reader that learns that the word was touched finds the bit.
        self.words.touched(index);
        bits & !before
    }

    /// Sets 64 pages from page `first`, which may be any page, by the bits of `bits`.
    pub fn or_at(&self, first: u64, bits: u64) {
        let (index, shift) = (first / WORD_BITS, first % WORD_BITS);
        self.or_word(index, bits << shift);
        if shift != 0 {
            self.or_word(index + 1, bits >> (WORD_BITS - shift));
        }
    }

    /// Sets all pages of `range` that are in the bitmap; returns how many were clear before.
    pub fn set(&self, range: PageRange) -> u64 {
        let span = self.word_span(&range);
        let range = range.intersection(&self.all());
        let Some(words) = self.words.get(span.start as usize..span.end as usize) else { return 0 };
        let each = (span.start..).zip(words);
        each.map(|(index, word)| {
            u64::from(self.set_bits(index, word, mask_of(&range, index)).count_ones())
        })
        .sum()
    }

    /// Clears all pages of `range`; returns how many were set before. Words without such a page are
    /// only loaded.
    pub fn clear(&self, range: PageRange) -> u64 {
        let mut cleared = 0;
        self.take(range, |_, bits| cleared += u64::from(bits.count_ones()));
        cleared
    }

    /// Takes and clears all pages of `range`; hands out each word that had any: its index and the
    /// bits taken.
    pub fn take(&self, range: PageRange, mut found: impl FnMut(u64, u64)) {
        for (index, _) in self.nonzero_words(range) {
            let bits = self.take_bits(index, mask_of(&range, index));
            if bits != 0 {
                found(index, bits);
            }
        }
    }

    /// True if `page` is set; false outside the bitmap.
    pub fn contains(&self, page: u64) -> bool {
        self.word(page / WORD_BITS) & (1 << (page % WORD_BITS)) != 0
    }

    /// Number of pages of `range` that are set.
    pub fn count(&self, range: PageRange) -> u64 {
        self.nonzero_words(range).map(|(_, bits)| u64::from(bits.count_ones())).sum()
    }

    /// The first set page in `range`.
    pub fn next_set(&self, range: PageRange) -> Option<u64> {
        let (index, bits) = self.nonzero_words(range).next()?;
        Some(index * WORD_BITS + u64::from(bits.trailing_zeros()))
    }

    /// The first clear page in `range`.
    pub fn next_clear(&self, range: PageRange) -> Option<u64> {
        self.word_span(&range).find_map(|index| {
            let bits = !self.word(index) & mask_of(&range, index) & self.valid(index);
            (bits != 0).then(|| index * WORD_BITS + u64::from(bits.trailing_zeros()))
        })
    }

    /// The runs of set pages in `range`, in order. Each word is read when the walk comes to it.
    pub fn runs(&self, range: PageRange) -> Runs<'_, W> {
        Runs { words: self.nonzero_words(range), first: 0, bits: 0 }
    }

    /// The non-zero words that touch `range` with their indexes, cut to `range`, in order.
    pub fn nonzero_words(&self, range: PageRange) -> NonzeroWords<'_, W> {
        let span = self.word_span(&range);
        // Asking costs more than reading a few words.
        let until = if span.end - span.start < FEW_WORDS { span.end } else { span.start };
        NonzeroWords {
            bitmap: self,
            range: range.intersection(&self.all()),
            next: span.start,
            until,
            end: span.end,
        }
    }
}

/// A walk over fewer words (4 KiB) does not ask which were touched.
const FEW_WORDS: u64 = 512;
/// Words that are tested together for zero: a cache line.
const GROUP: usize = 8;

/// Iterator over the words of a bitmap that are not zero.
#[derive(Debug)]
pub struct NonzeroWords<'a, W> {
    bitmap: &'a Bitmap<W>,
    range: PageRange,
    /// The next word to look at.
    next: u64,
    /// Words below this one may have been touched.
    until: u64,
    end: u64,
}

impl<W: Words> Iterator for NonzeroWords<'_, W> {
    type Item = (u64, u64);

    fn next(&mut self) -> Option<(u64, u64)> {
        while self.next < self.end {
            if self.next >= self.until {
                let touched = self.bitmap.words.next_touched(self.next..self.end);
                (self.next, self.until) =
                    touched.map_or((self.end, self.end), |words| (words.start, words.end));
                continue;
            }
            let rest =
                self.bitmap.words.get(self.next as usize..self.until as usize).unwrap_or_default();
            let Some(skipped) = zero_words(rest) else {
                self.next = self.until;
                continue;
            };
            let index = self.next + skipped as u64;
            self.next = index + 1;
            let bits = self.bitmap.word(index) & mask_of(&self.range, index);
            if bits != 0 {
                return Some((index, bits));
            }
        }
        None
    }
}

/// How many words are zero before the first that is not; `None` if all are.
fn zero_words(words: &[AtomicU64]) -> Option<usize> {
    let (groups, _) = words.as_chunks::<GROUP>();
    let any = |group: &[AtomicU64; GROUP]| {
        group.iter().fold(0, |any, word| any | word.load(Ordering::Relaxed)) != 0
    };
    let skipped = groups.iter().position(any).unwrap_or(groups.len()) * GROUP;
    let rest = words[skipped..].iter().position(|word| word.load(Ordering::Relaxed) != 0)?;
    Some(skipped + rest)
}

/// Iterator over the runs of set pages of a bitmap.
#[derive(Debug)]
pub struct Runs<'a, W> {
    words: NonzeroWords<'a, W>,
    /// First page of the current word.
    first: u64,
    /// Its bits that were not returned yet.
    bits: u64,
}

impl<W: Words> Runs<'_, W> {
    /// The next word, if there is one.
    fn advance(&mut self) -> Option<()> {
        let (index, bits) = self.words.next()?;
        (self.first, self.bits) = (index * WORD_BITS, bits);
        Some(())
    }
}

impl<W: Words> Iterator for Runs<'_, W> {
    type Item = PageRange;

    fn next(&mut self) -> Option<PageRange> {
        if self.bits == 0 {
            self.advance()?;
        }
        let mut run = take_run(self.first, &mut self.bits)?;
        // A run that reaches the end of its word may continue in the next.
        while self.bits == 0 && run.end() == self.first + WORD_BITS {
            if self.advance().is_none() || self.first != run.end() || self.bits & 1 == 0 {
                break;
            }
            run.count += take_run(self.first, &mut self.bits)?.count;
        }
        Some(run)
    }
}

/// The runs of set bits in one word whose first page is `first`: for a word that was already taken.
pub fn runs_of_word(first: u64, mut bits: u64) -> impl Iterator<Item = PageRange> {
    std::iter::from_fn(move || take_run(first, &mut bits))
}

/// Takes the lowest run out of `bits`, the word whose first page is `first`.
fn take_run(first: u64, bits: &mut u64) -> Option<PageRange> {
    if *bits == 0 {
        return None;
    }
    let start = bits.trailing_zeros();
    let count = (*bits >> start).trailing_ones();
    *bits &= !(low_bits(u64::from(count)) << start);
    Some(PageRange::new(first + u64::from(start), u64::from(count)))
}
