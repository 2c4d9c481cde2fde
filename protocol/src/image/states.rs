// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The state of each page in an image.
//!
//! 64 pages take 16 bytes: two words, in which bit n belongs to page n.
//!
//! | first word | second word | page |
//! | --- | --- | --- |
//! | 1 | 0 | the image has its content |
//! | 0 | 1 | discarded |
//! | 0 | 0 | zero |
//! | 1 | 1 | as in the base; only in an increment |
//!
//! Bits after the last page of a block are clear.

use crate::control::codec::DecodeError;
use crate::memory::PageRange;
use crate::shm::bitmap::{WORD_BITS, word_mask};

/// Bytes of 64 pages.
const WORD_SIZE: usize = 16;

/// Length of the states of `pages` pages in bytes.
pub const fn states_size(pages: u64) -> u64 {
    pages.div_ceil(WORD_BITS) * WORD_SIZE as u64
}

/// The states of 64 pages. No page is in two of the sets. A page in none of them is zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct StateWord {
    /// Pages whose content is in the image.
    pub present: u64,
    /// Pages whose content is stale: they are holes and count as discarded.
    pub discarded: u64,
    /// Pages that are as in the base.
    pub unchanged: u64,
}

impl StateWord {
    /// Of the pages `valid`, those that are zero.
    pub fn zero(&self, valid: u64) -> u64 {
        valid & !(self.present | self.discarded | self.unchanged)
    }
}

/// The bytes of a block's states, given word by word.
pub fn encode_states(words: impl IntoIterator<Item = StateWord>, into: &mut Vec<u8>) {
    for StateWord { present, discarded, unchanged } in words {
        into.extend_from_slice(&(present | unchanged).to_le_bytes());
        into.extend_from_slice(&(discarded | unchanged).to_le_bytes());
    }
}

/// Decodes the states of the pages `range` of a block. The range begins with a word, and ends with
/// a word or with the block. Returns the words that are not all zero, each with its index in the
/// block. `increment` says whether the image has a base.
///
/// # Errors
/// If the length does not fit the range, a bit after the last page is set, or a page is as in the
/// base of an image without a base.
pub fn decode_states(
    bytes: &[u8], range: PageRange, increment: bool,
) -> Result<impl Iterator<Item = (u64, StateWord)> + '_, DecodeError> {
    let refused = |field, value, allowed| Err(DecodeError::InvalidValue { field, value, allowed });
    let (words, rest) = bytes.as_chunks::<WORD_SIZE>();
    if !rest.is_empty() || words.len() as u64 != range.count.div_ceil(WORD_BITS) {
        return refused("length of the states", bytes.len() as u64, "16 bytes for each 64 pages");
    }
    let last_valid = match range.count % WORD_BITS {
        0 => u64::MAX,
        bits => word_mask(0, bits),
    };
    let last = words.last().map_or(0, |last| {
        let (first, second) = halves(last);
        (first | second) & !last_valid
    });
    if last != 0 {
        return refused("last word of the states", last, "no bit after the last page");
    }
    if !increment && let Some(at) = words.iter().position(|word| both(word) != 0) {
        let page =
            range.first + at as u64 * WORD_BITS + u64::from(both(&words[at]).trailing_zeros());
        return refused("page that is as in the base", page, "none, since the image has no base");
    }
    let words = (range.first / WORD_BITS..).zip(words).filter(|(_, word)| **word != [0; WORD_SIZE]);
    Ok(words.map(|(index, word)| (index, parse(word))))
}

fn halves(word: &[u8; WORD_SIZE]) -> (u64, u64) {
    let both = u128::from_le_bytes(*word);
    (both as u64, (both >> 64) as u64)
}

fn both(word: &[u8; WORD_SIZE]) -> u64 {
    let (first, second) = halves(word);
    first & second
}

fn parse(word: &[u8; WORD_SIZE]) -> StateWord {
    let (first, second) = halves(word);
    StateWord { present: first & !second, discarded: second & !first, unchanged: first & second }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_is_printed_is_read(words in prop::collection::vec((any::<u64>(), any::<u64>()), 1..20), cut in 0u64..64) {
            let pages = words.len() as u64 * 64 - cut;
            let valid = |index: usize| if index + 1 == words.len() { word_mask(0, 64 - cut) } else { u64::MAX };
            let states: Vec<StateWord> = words.iter().enumerate().map(|(index, (first, second))| {
                let (first, second) = (first & valid(index), second & valid(index));
                StateWord { present: first & !second, discarded: second & !first, unchanged: first & second }
            }).collect();
            let mut bytes = Vec::new();
            encode_states(states.iter().copied(), &mut bytes);
            prop_assert_eq!(bytes.len() as u64, states_size(pages));
            let mut read = vec![StateWord::default(); words.len()];
            decode_states(&bytes, PageRange::new(0, pages), true).unwrap().for_each(|(index, word)| read[index as usize] = word);
            prop_assert_eq!(read, states);
            prop_assert!(decode_states(&bytes, PageRange::new(0, pages + 64), true).is_err());
        }
    }

    #[test]
    fn states_that_no_image_has_are_refused() {
        let mut bytes = Vec::new();
        encode_states([StateWord { unchanged: 4, ..StateWord::default() }], &mut bytes);
        for (first, page) in [(0, "0x2"), (1 << 22, "0x400002")] {
            let error = decode_states(&bytes, PageRange::new(first, 64), false).err().unwrap();
            let expected = format!(
                "page that is as in the base is {page}, allowed: none, since the image has no base"
            );
            assert_eq!(error.to_string(), expected);
        }
        let error = decode_states(&bytes, PageRange::new(0, 2), true).err().unwrap();
        assert_eq!(
            error.to_string(),
            "last word of the states is 0x4, allowed: no bit after the last page"
        );
    }
}
