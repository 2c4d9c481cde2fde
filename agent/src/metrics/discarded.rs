// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The size of the discarded memory.
//!
//! To count it, each block's bitmap is read: 32 MiB for a guest of 1 TiB. So the number is counted
//! at most once in `KEEP`, however often it is asked for, and never under the session's lock.

use crate::memory::GuestMemory;
use pageferry_protocol::memory::PAGE_SIZE;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

/// How long a count is used.
const KEEP: Duration = Duration::from_secs(1);

/// The last count.
#[derive(Debug, Default)]
pub struct DiscardedBytes {
    last: Option<Count>,
}

#[derive(Debug)]
struct Count {
    memory: Weak<GuestMemory>,
    at: Instant,
    bytes: u64,
}

impl DiscardedBytes {
    /// The discarded bytes of `memory` at `now`, or at most `KEEP` before.
    pub fn of(&mut self, memory: &Arc<GuestMemory>, now: Instant) -> u64 {
        if let Some(last) = &self.last
            && std::ptr::eq(last.memory.as_ptr(), Arc::as_ptr(memory))
            && now.saturating_duration_since(last.at) < KEEP
        {
            return last.bytes;
        }
        let pages: u64 =
            memory.blocks().iter().map(|block| block.discarded.count(block.all())).sum();
        let bytes = pages * PAGE_SIZE;
        self.last = Some(Count { memory: Arc::downgrade(memory), at: now, bytes });
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::test_support::memory as memory_of;
    use pageferry_protocol::memory::PageRange;

    #[test]
    fn discarded_memory_is_counted_at_most_once_a_second() {
        let memory = Arc::new(memory_of(&[16]));
        let (mut discarded, start) = (DiscardedBytes::default(), Instant::now());
        assert_eq!(discarded.of(&memory, start), 0);
        memory.blocks()[0].discarded.set(PageRange::new(3, 5));
        assert_eq!(discarded.of(&memory, start + KEEP / 2), 0);
        assert_eq!(discarded.of(&memory, start + KEEP), 5 * PAGE_SIZE);
        let other = Arc::new(memory_of(&[16]));
        assert_eq!(discarded.of(&other, start + KEEP), 0, "another memory is counted at once");
    }
}
