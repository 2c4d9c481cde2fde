// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Finds zero pages in a buffer.

use pageferry_protocol::memory::PAGE_SIZE;
use zerocopy::FromBytes;

/// True if all of `page` is zero. It combines whole words with OR, block by block, which runs at
/// the speed of memory; a search for the first byte that is not zero does not. Most pages with data
/// begin with data, so their first block decides.
pub fn is_zero(page: &[u8]) -> bool {
    page.chunks(512).all(|block| match <[u64]>::ref_from_bytes(block) {
        Ok(words) => words.iter().fold(0, |sum, word| sum | word) == 0,
        // Not aligned. The agent's own buffers always are.
        Err(_) => block.iter().fold(0, |sum, byte| sum | byte) == 0,
    })
}

/// A mask with one bit for each page of `pages`, at most 64: set if the page is not zero.
pub fn data_mask(pages: &[u8]) -> u64 {
    let page_bits = pages.chunks_exact(PAGE_SIZE as usize).map(|page| u64::from(!is_zero(page)));
    page_bits.enumerate().fold(0, |mask, (index, bit)| mask | bit << index)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn mask_has_a_bit_for_each_page_with_data(bytes in prop::collection::vec((0usize..16 * 4096, 1u8..), 0..10)) {
            let mut pages = vec![0u8; 16 * 4096 + 3];
            let mut expected = 0u64;
            for (at, byte) in bytes {
                pages[at] = byte;
                expected |= 1 << (at / 4096);
            }
            prop_assert_eq!(data_mask(&pages), expected);
            // The same in memory that is not aligned.
            let mut shifted = vec![0u8; 3];
            shifted.extend_from_slice(&pages);
            prop_assert_eq!(data_mask(&shifted[3..]), expected);
        }
    }
}
