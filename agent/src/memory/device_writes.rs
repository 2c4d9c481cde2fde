// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Writes to the guest's memory by a device of this agent: rings, and answers to the guest.
//!
//! Nothing else sees these writes: they do not go through the mappings of the VMM, whose protection
//! and trackers watch the guest and the VMM. So the write takes the steps itself:
//!
//! - The pages that a snapshot has not saved yet are saved first. The instant cannot come between
//!   that and the write: the marks' lock is held, as for the marks of a discard.
//! - The pages are marked in the dirty log after the write, so the next sync reports them.
//!
//! A write must not come after the last sync of a migration. The session sees to that, as for a
//! populate ([`SessionMemory`](crate::devices::access::SessionMemory)).

use super::guest_memory::GuestMemory;
use crate::waiting::may_wait;
use pageferry_protocol::memory::PageRange;

impl GuestMemory {
    /// Runs `write`, which writes to these pages: indexes of blocks, and pages. Returns its result.
    pub fn write_by_device<R>(&self, pages: &[(usize, PageRange)], write: impl FnOnce() -> R) -> R {
        may_wait("write by a device: the instant of a snapshot, its readers and its disk");
        let _giving_back = self.giving_back();
        let marking = self.marking.lock();
        if let Some(copier) = self.marking.snapshot() {
            for (at, range) in pages {
                copier.copy_before_discard(&self.readers, *at, *range);
            }
            self.readers.wait(|at, word| {
                let read = copier.published_pages(at, word);
                pages.iter().any(|(other, range)| *other == at && range.overlaps(&read))
            });
        }
        let written = write();
        if let Some(log) = &self.log {
            for (at, range) in pages {
                let first = self.blocks()[*at].geometry.first_log_page();
                log.log.mark(PageRange::new(first + range.first, range.count));
            }
        }
        drop(marking);
        written
    }
}
