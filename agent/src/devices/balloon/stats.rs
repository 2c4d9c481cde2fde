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
    /// Buffers that the driver is to get back: an operator has asked, or a newer one has come.
    due: Vec<u16>,
    count: u64,
}

impl Stats {
    /// The driver has sent `bytes` in the buffer `head`.
    pub fn set(&mut self, bytes: &[u8], head: u16) {
        self.all = bytes.chunks_exact(ENTRY).map(entry).collect();
        self.count += 1;
        self.due.extend(self.buffer.replace(head));
    }

    /// Asks for new values. False if the driver has sent no buffer by which to ask.
    pub fn ask(&mut self) -> bool {
        self.due.extend(self.buffer.take());
        !self.due.is_empty()
    }

    /// A buffer that is to be returned.
    pub fn take_due(&mut self) -> Option<u16> {
        self.due.pop()
    }

    /// A buffer from [`Stats::take_due`] could not be returned.
    pub fn keep_due(&mut self, head: u16) {
        self.due.push(head);
    }

    /// The device has no buffer any more. Returns how many there were.
    pub fn forget_buffers(&mut self) -> u16 {
        let count = usize::from(self.buffer.take().is_some()) + self.due.len();
        self.due.clear();
        // A queue has fewer.
        count as u16
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
        assert!(!stats.ask() && stats.take_due().is_none());
        let bytes = [&[4, 0], &0x1_0000_0000u64.to_le_bytes()[..], &[5, 0, 1]].concat();
        stats.set(&bytes, 3);
        assert_eq!(stats.all(), [(4, 0x1_0000_0000)], "a part of a value is left out");
        assert_eq!(stats.take_due(), None, "nobody has asked");
        assert!(stats.ask());
        assert_eq!(stats.take_due(), Some(3));
        assert!(!stats.ask(), "the driver has its buffer");
        stats.set(&bytes, 4);
        stats.set(&bytes, 5);
        assert_eq!(stats.take_due(), Some(4), "a newer one has come");
        stats.keep_due(4);
        assert_eq!(stats.forget_buffers(), 2);
        assert_eq!((stats.take_due(), stats.ask()), (None, false));
    }
}
