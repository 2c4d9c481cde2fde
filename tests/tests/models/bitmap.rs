// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The shared bitmap against an obvious model: a set of page numbers.

use pageferry_protocol::memory::PageRange;
use pageferry_protocol::shm::bitmap::{Bitmap, WORD_BITS, runs_of_word};
use proptest::prelude::*;
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering};

/// Largest number of pages of a bitmap in these tests: a few words.
const MOST_PAGES: u64 = 300;

type Bits = Bitmap<Vec<AtomicU64>>;

/// A step on both. Ranges may reach past the end of the bitmap, like those of a lying peer.
#[derive(Debug, Clone)]
enum Step {
    Set(PageRange),
    Clear(PageRange),
    TakeWord(u64),
    TakeBits(u64, u64),
    OrWord(u64, u64),
    OrAt(u64, u64),
}

fn any_range() -> impl Strategy<Value = PageRange> {
    let first = prop_oneof![8 => 0..MOST_PAGES + 70, 1 => Just(u64::MAX), 1 => (0..MOST_PAGES / 64).prop_map(|w| w * 64)];
    let count = prop_oneof![8 => 0u64..200, 1 => Just(u64::MAX), 1 => (0u64..4).prop_map(|words| words * 64)];
    (first, count).prop_map(|(first, count)| PageRange::new(first, count))
}

fn any_word() -> impl Strategy<Value = u64> {
    prop_oneof![4 => 0u64..7, 1 => Just(u64::MAX / 64), 1 => Just(u64::MAX / 64 - 1)]
}

fn any_step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => any_range().prop_map(Step::Set),
        2 => any_range().prop_map(Step::Clear),
        1 => any_word().prop_map(Step::TakeWord),
        1 => (any_word(), any::<u64>()).prop_map(|(word, bits)| Step::TakeBits(word, bits)),
        1 => (any_word(), any::<u64>()).prop_map(|(word, bits)| Step::OrWord(word, bits)),
        1 => (0..MOST_PAGES + 70, any::<u64>()).prop_map(|(first, bits)| Step::OrAt(first, bits)),
    ]
}

/// The pages from `first` whose bits are set in `bits`, and that lie in a bitmap of `pages` pages.
fn pages_of(first: u64, bits: u64, pages: u64) -> BTreeSet<u64> {
    (0..64)
        .filter(|bit| bits >> bit & 1 == 1)
        .map(|bit| first.saturating_add(bit))
        .filter(|page| *page < pages)
        .collect()
}

/// The pages of `range` that lie in a bitmap of `pages` pages.
fn pages_in(range: PageRange, pages: u64) -> BTreeSet<u64> {
    (0..pages).filter(|page| range.first <= *page && *page < range.end()).collect()
}

/// The bits of word `index` that are in `model`.
fn word_of(model: &BTreeSet<u64>, index: u64) -> u64 {
    let pages = model.iter().filter(|page| **page / WORD_BITS == index);
    pages.fold(0, |bits, page| bits | 1 << (page % WORD_BITS))
}

/// Does `step` on the model. Returns the expected result of the bitmap, if the step has one.
fn apply_to_model(model: &mut BTreeSet<u64>, pages: u64, step: &Step) -> Option<u64> {
    match *step {
        Step::Set(range) => {
            let before = model.len();
            model.extend(pages_in(range, pages));
            Some((model.len() - before) as u64)
        }
        Step::Clear(range) => {
            let before = model.len();
            model.retain(|page| !pages_in(range, pages).contains(page));
            Some((before - model.len()) as u64)
        }
        Step::TakeWord(index) => apply_to_model(model, pages, &Step::TakeBits(index, u64::MAX)),
        Step::TakeBits(index, mask) => {
            let taken = word_of(model, index) & mask;
            model
                .retain(|page| !(page / WORD_BITS == index && mask >> (page % WORD_BITS) & 1 == 1));
            Some(taken)
        }
        Step::OrWord(index, bits) => {
            let newly: BTreeSet<u64> =
                pages_of(index * WORD_BITS, bits, pages).difference(model).copied().collect();
            model.extend(&newly);
            Some(word_of(&newly, index))
        }
        Step::OrAt(first, bits) => {
            model.extend(pages_of(first, bits, pages));
            None
        }
    }
}

fn apply(bitmap: &Bits, step: &Step) -> Option<u64> {
    match *step {
        Step::Set(range) => Some(bitmap.set(range)),
        Step::Clear(range) => Some(bitmap.clear(range)),
        Step::TakeWord(index) => Some(bitmap.take_word(index)),
        Step::TakeBits(index, mask) => Some(bitmap.take_bits(index, mask)),
        Step::OrWord(index, bits) => Some(bitmap.or_word(index, bits)),
        Step::OrAt(first, bits) => {
            bitmap.or_at(first, bits);
            None
        }
    }
}

/// The runs of consecutive numbers in `set`.
fn runs_in(set: impl Iterator<Item = u64>) -> Vec<PageRange> {
    let mut runs: Vec<PageRange> = Vec::new();
    for page in set {
        match runs.last_mut() {
            Some(run) if run.end() == page => run.count += 1,
            _ => runs.push(PageRange::new(page, 1)),
        }
    }
    runs
}

/// Compares every query over `range`.
fn check_questions(
    bitmap: &Bits, model: &BTreeSet<u64>, range: PageRange,
) -> Result<(), TestCaseError> {
    let asked = pages_in(range, bitmap.pages());
    let set: BTreeSet<u64> = asked.intersection(model).copied().collect();
    prop_assert_eq!(bitmap.count(range), set.len() as u64);
    prop_assert_eq!(bitmap.next_set(range), set.first().copied());
    prop_assert_eq!(bitmap.next_clear(range), asked.difference(model).next().copied());
    prop_assert_eq!(bitmap.runs(range).collect::<Vec<_>>(), runs_in(set.iter().copied()));
    let words: Vec<(u64, u64)> = (0..MOST_PAGES.div_ceil(64))
        .map(|index| (index, word_of(&set, index)))
        .filter(|(_, bits)| *bits != 0)
        .collect();
    prop_assert_eq!(bitmap.nonzero_words(range).collect::<Vec<_>>(), words);
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, ..ProptestConfig::default() })]

    #[test]
    fn a_bitmap_is_a_set_of_pages(
        pages in 0..MOST_PAGES,
        garbage in any::<u64>(),
        steps in prop::collection::vec(any_step(), 0..30),
        ranges in prop::collection::vec(any_range(), 1..6),
    ) {
        // The last word, and one more that the bitmap does not use, hold bits that another process
        // wrote past the end.
        let used = pages.div_ceil(64);
        let past_the_end = if pages.is_multiple_of(64) { 0 } else { garbage << (pages % 64) };
        let word = |index| AtomicU64::new(if index == used { garbage } else if index + 1 == used { past_the_end } else { 0 });
        let bitmap = Bits::new((0..=used).map(word).collect(), pages);
        let mut model = BTreeSet::new();

        prop_assert_eq!(bitmap.pages(), pages);
        prop_assert_eq!(bitmap.count(bitmap.all()), 0, "garbage past the end is not reported");
        for step in steps {
            let expected = apply_to_model(&mut model, pages, &step);
            prop_assert_eq!(apply(&bitmap, &step), expected, "{:?}", step);
        }
        for page in 0..MOST_PAGES + 70 {
            prop_assert_eq!(bitmap.contains(page), model.contains(&page), "page {}", page);
        }
        for index in 0..7 {
            prop_assert_eq!(bitmap.word(index), word_of(&model, index));
        }
        check_questions(&bitmap, &model, bitmap.all())?;
        for range in ranges {
            check_questions(&bitmap, &model, range)?;
        }
        // The bits past the end are unchanged.
        prop_assert_eq!(bitmap.storage().last().map(|word| word.load(Ordering::Relaxed)), Some(garbage));
        if used > 0 && pages % 64 != 0 {
            let last = bitmap.storage().get(used as usize - 1).map_or(0, |word| word.load(Ordering::Relaxed));
            prop_assert_eq!(last >> (pages % 64) << (pages % 64), past_the_end);
        }
    }

    #[test]
    fn a_bitmap_is_cut_to_its_words(words in 0usize..4, pages in 0..MOST_PAGES) {
        let bitmap = Bits::new((0..words).map(|_| AtomicU64::new(u64::MAX)).collect(), pages);
        let expected = pages.min(words as u64 * 64);
        prop_assert_eq!(bitmap.pages(), expected);
        prop_assert_eq!(bitmap.count(PageRange::new(0, u64::MAX)), expected);
        prop_assert_eq!(bitmap.set(PageRange::new(0, u64::MAX)), 0);
        prop_assert_eq!(bitmap.clear(PageRange::new(0, u64::MAX)), expected);
        prop_assert_eq!(bitmap.next_set(PageRange::new(0, u64::MAX)), None);
    }

    #[test]
    fn a_taken_word_falls_into_its_runs(first in 0u64..1 << 40, bits in prop_oneof![any::<u64>(), Just(0), Just(u64::MAX)]) {
        let expected = runs_in((0..64).filter(|bit| bits >> bit & 1 == 1).map(|bit| first + bit));
        prop_assert_eq!(runs_of_word(first, bits).collect::<Vec<_>>(), expected);
    }
}
