// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Ranges that are given back later, many in one request.
//!
//! A discard or free of its own costs a round trip to the agent. A balloon and free page reporting
//! give back thousands of small ranges. So [`Client::free_later`] and [`Client::discard_later`]
//! only remember a range here, and [`Client::flush`] sends all of them.
//!
//! # Order
//!
//! Queued ranges may be sent in any order. Whether a page is freed and then discarded, or the other
//! way round, or each several times: in the end it is discarded if one of them was a discard, and a
//! hole if one of them punches. So the queue sorts its ranges and merges what touches, also to
//! whole units where a single range is less than a unit.
//!
//! Only a populate does not commute. It flushes while it holds the lock of the session, so no
//! earlier discard is done after it.
//!
//! # What is not lost
//!
//! A range leaves the queue for good when the agent has answered, or the client has done it without
//! an agent. What could not be done ([`Error::AgentStillRunning`]) is queued again, and the next
//! agent gets it when it is attached.
//!
//! A range of a block that was removed is dropped when the queue is flushed. Adding a block flushes
//! first. So no range reaches another block with the same id.
//!
//! # Locks
//!
//! The lock of the session, if it is needed, comes first, then the lock of the queue, then the lock
//! of the blocks. The last two are held for instructions only, without a system call. So a thread
//! that queues never waits for the agent, except the one that finds the queue full.

use crate::client::Client;
use crate::discards::{DiscardKind, Punch};
use crate::error::Error;
use crate::session::Session;
use crate::sync::lock;
use pageferry_protocol::control::request::BlockRange;
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

/// Most ranges in the queue, which fit into one request of each kind.
const MAX_QUEUED: usize = 4096;

/// How long a hook waits for other calls of the client before it goes on without a flush.
const HOOK_PATIENCE: Duration = Duration::from_millis(100);

impl Client {
    /// Frees these ranges at the next [`Client::flush`] or earlier, and otherwise as
    /// [`Client::free`] does. This is for many small ranges, such as those of a balloon: it takes a
    /// fraction of a microsecond, and ranges that touch become one. It makes no system call and
    /// does not wait for the agent, unless the queue is full: it holds 4096 ranges, and as many
    /// bytes as one request frees. Then this call flushes first.
    ///
    /// **Tell the guest that its request is done only when [`Client::flush`] has returned
    /// success.** What the guest writes before may be lost. Flush also before a page that is queued
    /// goes back to the guest, as when a balloon deflates. And flush before the state of the device
    /// is saved, or save the request as one that is still to be done.
    ///
    /// Every call that must not overtake the queue flushes by itself: a populate, a free or discard
    /// that is not queued, adding and removing blocks, and starting a job. So does a job that an
    /// operator has started, before it asks trackers or pauses the guest. So queued pages are not
    /// sent or saved for nothing.
    ///
    /// The queue belongs to the guest that has the memory. [`Client::start_incoming`],
    /// [`Client::start_restore`] and [`Hooks::accept_guest`](crate::Hooks::accept_guest) empty it;
    /// nothing of the earlier guest may be queued after that.
    ///
    /// # Errors
    /// If a range is not part of a block, or the queue is full and cannot be flushed (see
    /// [`Client::flush`]). None of these ranges is queued then.
    pub fn free_later(&self, ranges: &[BlockRange]) -> Result<(), Error> {
        self.queue(ranges, DiscardKind::Free)
    }

    /// Discards these ranges at the next [`Client::flush`] or earlier, and otherwise as
    /// [`Client::discard`] does. All that [`Client::free_later`] says about the queue holds here,
    /// too. What a VMM does after a discard, such as to free the memory of [`Punch::No`], it does
    /// after the flush.
    ///
    /// # Errors
    /// Only if a range is not part of a block; then none is queued.
    pub fn discard_later(&self, ranges: &[BlockRange], punch: Punch) -> Result<(), Error> {
        self.queue(ranges, DiscardKind::Discard(punch))
    }

    /// Frees and discards all that is queued. When this returns success, all ranges that were
    /// queued before the call are done, by whichever thread.
    ///
    /// Returns the number of pages that queued ranges have changed since the last call, as
    /// [`Client::free`] and [`Client::discard`] count them. A page that was queued for both may
    /// count twice.
    ///
    /// # Errors
    /// [`Error::AgentStillRunning`] as for [`Client::free`]. Discards are done then, and frees stay
    /// queued: a later call tries again, and so does [`Client::reattach`].
    pub fn flush(&self) -> Result<u64, Error> {
        // Also if the queue is empty: another thread may be sending what was in it.
        self.flush_queued(&mut self.session())?;
        Ok(self.discard_queue().take_changed_pages())
    }

    fn queue(&self, ranges: &[BlockRange], kind: DiscardKind) -> Result<(), Error> {
        let most = self.max_discard_bytes();
        if ranges.len() > MAX_QUEUED || total_bytes(ranges) > most {
            return self.do_at_once(ranges, kind);
        }
        let check = |range: &BlockRange| self.check_range(range).map(drop);
        while self.discard_queue().push(ranges, kind, most, check)? == Pushed::Nothing {
            match (self.flush_queued(&mut self.session()), kind) {
                (Ok(()), _) => {}
                // Frees that cannot be done now fill the queue. A discard cannot fail.
                (Err(_), DiscardKind::Discard(_)) => return self.do_at_once(ranges, kind),
                (Err(error), DiscardKind::Free) => return Err(error),
            }
        }
        Ok(())
    }

    fn do_at_once(&self, ranges: &[BlockRange], kind: DiscardKind) -> Result<(), Error> {
        let changed = self.discard_ranges(ranges, kind)?;
        self.discard_queue().add_changed_pages(changed);
        Ok(())
    }

    /// Sends all that is queued.
    ///
    /// # Errors
    /// [`Error::AgentStillRunning`]. What was not done is queued again.
    pub(crate) fn flush_queued(&self, session: &mut Session) -> Result<(), Error> {
        let queue = self.discard_queue();
        let entries = queue.take();
        let mut groups = entries.chunk_by(|one, next| one.kind == next.kind);
        while let Some(group) = groups.next() {
            let kind = group[0].kind;
            let pieces = self.pieces_still_there(group.iter().map(Entry::range));
            let mut rest = pieces.as_slice();
            while !rest.is_empty() {
                match self.discard_next_batch(session, rest, kind) {
                    Ok((changed, after)) => {
                        queue.add_changed_pages(changed);
                        rest = after;
                    }
                    Err(error) => {
                        queue.put_back(rest.iter().map(|piece| Entry::new(kind, &piece.range)));
                        queue.put_back(groups.flatten().copied());
                        return Err(error);
                    }
                }
            }
        }
        Ok(())
    }

    /// Locks the session and sends all that is queued, for a request that must not overtake it.
    pub(crate) fn flushed_session(&self) -> MutexGuard<'_, Session> {
        let mut session = self.session();
        // What fails stays queued. The agent is lost then, as the request is about to find.
        let _ = self.flush_queued(&mut session);
        session
    }

    /// Sends all that is queued, for a hook after which a job reads memory. This only saves work:
    /// a page that is read before its free or discard is done is sent for nothing. So the job does
    /// not wait long for it.
    pub(crate) fn flush_for_job(&self) {
        if self.discard_queue().is_empty() {
            return;
        }
        if let Some(mut session) = self.session_within(HOOK_PATIENCE)
            && let Err(error) = self.flush_queued(&mut session)
        {
            log::debug!("a job starts before what is queued is freed: {error}");
        }
    }

    /// Empties the queue, for a hook after which the memory belongs to another guest.
    pub(crate) fn flush_for_other_guest(&self) {
        if let Err(error) = self.flush_queued(&mut self.session()) {
            log::warn!("frees of the guest that was here before are dropped: {error}");
            self.discard_queue().take();
        }
    }
}

/// The queue of a client.
#[derive(Debug)]
pub(crate) struct DiscardQueue(Mutex<Queued>);

#[derive(Debug)]
struct Queued {
    entries: Vec<Entry>,
    /// The lengths of all entries together.
    bytes: u64,
    /// Pages that queued ranges have changed since the VMM last asked.
    changed_pages: u64,
}

/// A range that is part of its block, if the block is still there. Discards come before frees.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Entry {
    kind: DiscardKind,
    block: u32,
    offset: u64,
    length: u64,
}

/// What became of ranges that were to be queued.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Pushed {
    All,
    /// The queue is full.
    Nothing,
}

impl Default for DiscardQueue {
    fn default() -> Self {
        let entries = Vec::with_capacity(MAX_QUEUED);
        Self(Mutex::new(Queued { entries, bytes: 0, changed_pages: 0 }))
    }
}

impl DiscardQueue {
    fn lock(&self) -> MutexGuard<'_, Queued> {
        lock(&self.0)
    }

    /// True if nothing is queued. Another thread may still be sending what was queued before.
    pub(crate) fn is_empty(&self) -> bool {
        self.lock().entries.is_empty()
    }

    /// Queues ranges of at most `most` bytes, all or none. `check` is called under the lock, so
    /// that a flush that follows the removal of a block finds all ranges that were checked before.
    fn push(
        &self, ranges: &[BlockRange], kind: DiscardKind, most: u64,
        check: impl Fn(&BlockRange) -> Result<(), Error>,
    ) -> Result<Pushed, Error> {
        let mut queued = self.lock();
        ranges.iter().try_for_each(check)?;
        let bytes = total_bytes(ranges);
        if !queued.has_room(ranges.len(), bytes, most) {
            // Merging costs as much as a request, so it must win more than a few ranges.
            queued.merge();
            if queued.entries.len() > MAX_QUEUED / 2 || !queued.has_room(ranges.len(), bytes, most)
            {
                return Ok(Pushed::Nothing);
            }
        }
        ranges.iter().filter(|range| range.length > 0).for_each(|range| {
            queued.push(Entry::new(kind, range));
        });
        Ok(Pushed::All)
    }

    /// Takes all entries, merged and sorted.
    fn take(&self) -> Vec<Entry> {
        if self.is_empty() {
            return Vec::new();
        }
        // Allocated without the lock.
        let mut queued =
            Queued { entries: Vec::with_capacity(MAX_QUEUED), bytes: 0, changed_pages: 0 };
        {
            let mut current = self.lock();
            std::mem::swap(&mut current.entries, &mut queued.entries);
            current.bytes = 0;
        }
        queued.merge();
        queued.entries
    }

    /// Queues entries again. There may be more than [`MAX_QUEUED`] then, which lets no other in.
    fn put_back(&self, entries: impl Iterator<Item = Entry>) {
        let mut queued = self.lock();
        entries.for_each(|entry| queued.push(entry));
    }

    fn add_changed_pages(&self, pages: u64) {
        self.lock().changed_pages += pages;
    }

    fn take_changed_pages(&self) -> u64 {
        std::mem::take(&mut self.lock().changed_pages)
    }
}

impl Queued {
    fn has_room(&self, ranges: usize, bytes: u64, most: u64) -> bool {
        self.entries.len() + ranges <= MAX_QUEUED && self.bytes.saturating_add(bytes) <= most
    }

    /// Adds an entry. One that touches the last becomes a part of it: devices often give back
    /// pages in order, up or down.
    fn push(&mut self, entry: Entry) {
        if let Some(last) = self.entries.last_mut()
            && let Some(union) = last.union(&entry)
        {
            self.bytes += union.length - last.length;
            *last = union;
        } else {
            self.bytes += entry.length;
            self.entries.push(entry);
        }
    }

    /// Sorts all entries and merges those that touch.
    fn merge(&mut self) {
        // Does not allocate.
        self.entries.sort_unstable();
        self.entries.dedup_by(|next, entry| match entry.union(next) {
            Some(union) => {
                *entry = union;
                true
            }
            None => false,
        });
        self.bytes = self.entries.iter().map(|entry| entry.length).sum();
    }
}

impl Entry {
    fn new(kind: DiscardKind, range: &BlockRange) -> Self {
        let BlockRange { block, offset, length } = *range;
        Self { kind, block, offset, length }
    }

    fn range(&self) -> BlockRange {
        BlockRange { block: self.block, offset: self.offset, length: self.length }
    }

    /// Both as one range, if they are of one kind and one block, and touch or overlap.
    fn union(&self, other: &Self) -> Option<Self> {
        let (end, other_end) = (self.offset + self.length, other.offset + other.length);
        let touch = self.offset <= other_end && other.offset <= end;
        if (self.kind, self.block) != (other.kind, other.block) || !touch {
            return None;
        }
        let offset = self.offset.min(other.offset);
        Some(Self { offset, length: end.max(other_end) - offset, ..*self })
    }
}

fn total_bytes(ranges: &[BlockRange]) -> u64 {
    ranges.iter().fold(0, |bytes, range| bytes.saturating_add(range.length))
}

#[cfg(test)]
mod tests;
