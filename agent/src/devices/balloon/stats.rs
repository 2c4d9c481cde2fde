// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the guest says about its memory. The device keeps the driver's buffer, and returns it to
//! ask for new values.

/// Bytes of one value: a tag of 16 bits, and 64 bits.
const ENTRY: usize = 10;

/// The statistics, and the driver's buffer.
#[derive(Debug, Default)]
pub struct Stats {
    all: Vec<(u16, u64)>,
    /// The driver's buffer.
    buffer: Option<u16>,
    /// An operator has asked.
    asked: bool,
    count: u64,
}

impl Stats {
    /// The driver has sent `bytes` in the buffer `head`.
    pub fn set(&mut self, bytes: &[u8], head: u16) {
        self.all = bytes.chunks_exact(ENTRY).map(entry).collect();
        self.count += 1;
        self.keep(head);
    }

    /// The device has this buffer.
    pub fn keep(&mut self, head: u16) {
        self.buffer = Some(head);
    }

    /// Asks for new values. False if the driver has sent no buffer by which to ask.
    pub fn ask(&mut self) -> bool {
        self.asked = self.buffer.is_some();
        self.asked
    }

    /// The buffer, if it is to be returned.
    pub fn take_buffer(&mut self) -> Option<u16> {
        self.buffer.take_if(|_| std::mem::take(&mut self.asked))
    }

    /// The driver begins anew, and so does its queue.
    pub fn forget_buffer(&mut self) {
        (self.buffer, self.asked) = (None, false);
    }

    /// The values.
    pub fn all(&self) -> &[(u16, u64)] {
        &self.all
    }

    /// How often the driver has sent values.
    pub fn count(&self) -> u64 {
        self.count
    }
}

fn entry(bytes: &[u8]) -> (u16, u64) {
    let number = |bytes: &[u8]| bytes.iter().rev().fold(0, |all, byte| all << 8 | u64::from(*byte));
    (number(&bytes[..2]) as u16, number(&bytes[2..]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffer_is_returned_when_somebody_asks() {
        let mut stats = Stats::default();
        assert!(!stats.ask() && stats.take_buffer().is_none());
        let bytes = [&[4, 0], &0x1_0000_0000u64.to_le_bytes()[..], &[5, 0, 1]].concat();
        stats.set(&bytes, 3);
        assert_eq!(stats.all(), [(4, 0x1_0000_0000)], "a part of a value is left out");
        assert_eq!(stats.take_buffer(), None, "nobody has asked");
        assert!(stats.ask());
        assert_eq!(stats.take_buffer(), Some(3));
        assert!(!stats.ask(), "the driver has its buffer");
    }
}
