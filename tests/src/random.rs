// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Repeatable random numbers: a seed gives the same numbers on every machine.

use pageferry_protocol::memory::PAGE_SIZE;

/// A generator of pseudo-random numbers (splitmix64: Steele, Lea, Flood 2014). Not for secrets.
#[derive(Debug, Clone)]
pub struct Random {
    state: u64,
}

impl Random {
    /// A generator that starts from `seed`.
    pub fn new(seed: u64) -> Self {
        Self { state: seed }
    }

    /// A separate generator for one part of a test, such as one thread or one page.
    pub fn derive(seed: u64, of: u64) -> Self {
        Self::new(Self::new(seed ^ of.wrapping_mul(0xd6e8_feb8_6659_fd93)).next())
    }

    /// The next number.
    #[expect(
        clippy::should_implement_trait,
        reason = "it never ends, so it is no iterator worth having"
    )]
    pub fn next(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = self.state;
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        word ^ (word >> 31)
    }

    /// A number below `limit`; 0 if that is 0.
    pub fn below(&mut self, limit: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(limit)) >> 64) as u64
    }

    /// True in `percent` of all cases.
    pub fn percent(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    /// True once in `count` cases.
    pub fn one_in(&mut self, count: u64) -> bool {
        self.below(count) == 0
    }

    /// Fills `bytes`.
    pub fn fill(&mut self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(8) {
            let word = self.next().to_le_bytes();
            chunk.copy_from_slice(&word[..chunk.len()]);
        }
    }
}

/// Text of repeating words with varying numbers, different for each `page`. It resembles what
/// guests hold: compression shrinks it to about a quarter.
pub fn page_text(page: u64) -> [u8; PAGE_SIZE as usize] {
    const WORDS: [&str; 8] = [
        "kernel: ",
        "connection from ",
        " accepted, session ",
        " closed after ",
        " ms\n",
        "user ",
        " request=",
        " status=",
    ];
    let mut random = Random::derive(0x7e87, page);
    let mut text = String::with_capacity(PAGE_SIZE as usize + 64);
    while text.len() < PAGE_SIZE as usize {
        text.push_str(WORDS[random.below(WORDS.len() as u64) as usize]);
        text.push_str(&random.below(100_000).to_string());
    }
    let mut content = [0; PAGE_SIZE as usize];
    content.copy_from_slice(&text.as_bytes()[..PAGE_SIZE as usize]);
    content
}

/// The content of page `page` for this `seed`. It differs in every page, and is never zero.
pub fn page_content(seed: u64, page: u64) -> [u8; PAGE_SIZE as usize] {
    let mut content = [0; PAGE_SIZE as usize];
    Random::derive(seed, page).fill(&mut content);
    content[0] |= 1;
    content
}
