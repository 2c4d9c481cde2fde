// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Discard, free and populate, with an agent and without.
//!
//! A guest gives memory back in two ways:
//!
//! | call | for | until |
//! | --- | --- | --- |
//! | [`Client::discard`] | virtio-mem, memory that the VMM unplugs | a [`Client::populate`] |
//! | [`Client::free`] | a balloon whose guest deflates by touching, free page reporting | the guest writes into it |
//!
//! With an agent, the agent does all of it: only the agent knows which worker reads the range at
//! the moment.
//!
//! [`discard_queue`](crate::discard_queue) collects small ranges of both kinds.
//!
//! Without an agent, or if it is lost during the call, the client does it (`discard-cannot-fail`).
//! First the client kills the process and waits for its exit. Then nothing reads guest memory any
//! more, and no discard of that agent is pending. The client marks the shared bitmap and frees the
//! memory, and the next agent finds the marks. If the process cannot be killed, it may still carry
//! out a discard. As long as it lives, the guest must not use the memory, so populate and free
//! return an error.
//!
//! # Request size
//!
//! During a background snapshot the agent answers a discard only when it has saved the pages, at
//! the speed of its disk. So one request covers no more than can be saved before the request times
//! out.
//!
//! # Locks
//!
//! The session stays locked while no new agent may be attached: for a populate, which is all or
//! nothing, to its end; for a discard during one request, since each request is complete in itself.
//! So no thread waits for the whole of a large discard.

use crate::block::Block;
use crate::client::Client;
use crate::error::Error;
use crate::ownership::Ownership;
use crate::retry::retry_while_busy;
use crate::session::Session;
use pageferry_protocol::control::reply::{ErrorCode, RangesReply};
use pageferry_protocol::control::request::{BlockRange, DISCARD_PUNCH, Request};
use pageferry_protocol::memory::PageRange;
use std::sync::Arc;
use std::time::Duration;

/// Who frees the memory of a discarded range.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub enum Punch {
    /// The agent, by `FALLOC_FL_PUNCH_HOLE`; the client if there is no agent. When the discard
    /// returns, the range is a hole.
    #[default]
    Yes,
    /// The VMM, after the discard returned. Until it does, what the guest wrote before cannot be
    /// told from what it writes after.
    No,
}

/// Bytes that a busy disk saves in a second.
const SNAPSHOT_BYTES_PER_SECOND: u128 = 13 << 20;

/// Largest number of bytes that one request discards, for blocks whose unit is not larger: what can
/// be saved within `timeout`. A power of two.
fn max_discard_bytes(timeout: Duration) -> u64 {
    const LEAST: u128 = 1 << 20;
    // Bounds how long other requests wait for this one.
    const MOST: u128 = 128 << 20;
    let saved = (SNAPSHOT_BYTES_PER_SECOND * timeout.as_millis() / 1000).clamp(LEAST, MOST);
    1 << saved.ilog2()
}

/// How the guest gives memory back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum DiscardKind {
    Discard(Punch),
    Free,
}

impl DiscardKind {
    fn request(self, ranges: Vec<BlockRange>) -> Request {
        match self {
            Self::Discard(Punch::Yes) => Request::Discard { flags: DISCARD_PUNCH, ranges },
            Self::Discard(Punch::No) => Request::Discard { flags: 0, ranges },
            Self::Free => Request::Free { ranges },
        }
    }
}

/// A range with its block, checked and rounded.
pub(crate) struct CheckedRange {
    pub(crate) range: BlockRange,
    block: Arc<Block>,
    pages: PageRange,
}

impl Client {
    /// Says that the content of these ranges is stale: it is not read, sent or populated until it
    /// is populated again. Rounds inward to the granularity of the block. Call it after the guest
    /// gave the ranges back, and free the memory only when it has returned.
    ///
    /// This is for memory that the VMM unplugs, and plugs again by [`Client::populate`]. What the
    /// guest writes into it before that has no guarantee and is lost by a migration or a snapshot.
    /// For memory that the guest may use again without telling the VMM, use [`Client::free`].
    ///
    /// Returns the number of pages that were not discarded before. If a block is removed meanwhile,
    /// the rest of its ranges is ignored.
    ///
    /// # Errors
    /// Only if a range is not part of a block; then nothing is discarded.
    pub fn discard(&self, ranges: &[BlockRange], punch: Punch) -> Result<u64, Error> {
        self.discard_ranges(ranges, DiscardKind::Discard(punch))
    }

    /// Frees these ranges. The guest gave them back and may write into them again at any time: free
    /// page reporting, and every balloon whose guest deflates by touching. When this returns, the
    /// ranges are holes, which read as zero. They are not read, sent or allocated until the guest
    /// writes. What it writes then is ordinary memory: no [`Client::populate`] is needed, and one
    /// does no harm. Rounds inward to the granularity of the block.
    ///
    /// Call it after the guest gave the ranges back, and tell the guest that it is done only when
    /// this has returned: a write before that may be lost. Discarded ranges stay discarded.
    ///
    /// Returns the number of pages that were freed, which are those that are not discarded. If the
    /// file system cannot free them, they keep their content.
    ///
    /// # Errors
    /// If a range is not part of a block; then nothing is freed. Or [`Error::AgentStillRunning`] if
    /// the agent is lost and its process still lives: it may free the ranges later, under the
    /// guest. Then do not tell the guest that it is done before another call has succeeded.
    pub fn free(&self, ranges: &[BlockRange]) -> Result<u64, Error> {
        self.discard_ranges(ranges, DiscardKind::Free)
    }

    pub(crate) fn discard_ranges(
        &self, ranges: &[BlockRange], kind: DiscardKind,
    ) -> Result<u64, Error> {
        let pieces = self.pieces(ranges)?;
        if !self.discard_queue().is_empty() {
            drop(self.flushed_session());
        }
        let mut changed = 0;
        let mut rest = pieces.as_slice();
        while !rest.is_empty() {
            let (done, after) = self.discard_next_batch(&mut self.session(), rest, kind)?;
            changed += done;
            rest = after;
        }
        Ok(changed)
    }

    /// Largest number of bytes that one request discards now; see [`max_discard_bytes`].
    pub(crate) fn max_discard_bytes(&self) -> u64 {
        max_discard_bytes(self.timeouts().shortest())
    }

    /// The ranges in pieces, each of which fits into one request.
    fn pieces(&self, ranges: &[BlockRange]) -> Result<Vec<CheckedRange>, Error> {
        let most = self.max_discard_bytes();
        let mut pieces = Vec::new();
        for range in ranges {
            split_range(self.check_range(range)?, most, &mut pieces)?;
        }
        Ok(pieces)
    }

    /// The same without ranges of blocks that were removed meanwhile, and without pieces that hold
    /// no whole unit.
    pub(crate) fn pieces_still_there(
        &self, ranges: impl Iterator<Item = BlockRange>,
    ) -> Vec<CheckedRange> {
        let most = self.max_discard_bytes();
        let mut pieces = Vec::new();
        for range in ranges {
            let split =
                self.check_range(&range).and_then(|entry| split_range(entry, most, &mut pieces));
            if let Err(error) = split {
                log::debug!("a queued range is dropped: {error}");
            }
        }
        pieces.retain(|piece| !piece.pages.is_empty());
        pieces
    }

    /// Finds the block of a range that is to be discarded, and rounds the range.
    pub(crate) fn check_range(&self, range: &BlockRange) -> Result<CheckedRange, Error> {
        self.check_one(range, Block::inward)
    }

    /// Discards as many of the pieces as fit into one request. Returns how many pages changed, and
    /// the other pieces.
    pub(crate) fn discard_next_batch<'a>(
        &self, session: &mut Session, pieces: &'a [CheckedRange], kind: DiscardKind,
    ) -> Result<(u64, &'a [CheckedRange]), Error> {
        let most = self.max_discard_bytes();
        let (batch, after) = pieces.split_at(batch_length(session, pieces, most));
        Ok((self.discard_batch(session, batch, kind)?, after))
    }

    /// Discards what fits into one request.
    fn discard_batch(
        &self, session: &mut Session, batch: &[CheckedRange], kind: DiscardKind,
    ) -> Result<u64, Error> {
        // Another block may have the same id by now.
        let is_there = |entry: &&CheckedRange| {
            self.memory()
                .block(entry.range.block)
                .is_some_and(|block| Arc::ptr_eq(&block, &entry.block))
        };
        let (batch, ranges): (Vec<_>, Vec<_>) =
            batch.iter().filter(is_there).map(|entry| (entry, entry.range)).unzip();
        if batch.is_empty() {
            return Ok(0);
        }
        let kind = match kind {
            // Nobody but the client can free the memory of a clone.
            DiscardKind::Discard(_) if batch.iter().any(|entry| entry.block.private.is_some()) => {
                DiscardKind::Discard(Punch::Yes)
            }
            kind => kind,
        };
        match session.control.request(&kind.request(ranges), &[], RangesReply::decode) {
            Ok(reply) => return Ok(reply.changed_pages),
            // It must not refuse. It will see the marks, and finds holes where it still reads.
            Err(Error::Refused { sentence, .. }) if !session.control.link().is_shut_down() => {
                log::warn!("the agent refused a discard, the client does it: {sentence}");
            }
            // The agent is lost. It may be reading here (`never-read`), or about to discard. A
            // discard continues even if the agent lives: a populate waits for its exit before a
            // page is used again. After a free no populate follows, so a free fails.
            Err(_) => {
                let settled = session.end_lost_agent();
                if let DiscardKind::Free = kind {
                    settled?;
                }
            }
        }
        let log = &self.memory().log;
        let alone = |entry: &&CheckedRange| match kind {
            DiscardKind::Discard(punch) => entry.block.discard(entry.pages, punch == Punch::Yes),
            DiscardKind::Free => entry.block.free(entry.pages, log),
        };
        Ok(batch.iter().map(alone).sum())
    }

    /// Says that the guest is about to use these ranges. Rounds outward to the granularity of the
    /// block. The guest may use them when this has returned success.
    ///
    /// Returns the number of pages that were discarded before.
    ///
    /// # Errors
    /// - [`Error::GuestGone`] if the guest has left by a migration: its memory here is no longer in
    ///   use, and trying again does not help;
    /// - [`Error::Refused`] with the code `Busy` if a job is in the way for a while: the last pass
    ///   of a migration, or a guest that is on its way here ([`Client::populate_within`] waits for
    ///   that);
    /// - [`Error::AgentStillRunning`] if the agent is lost and its process still lives, since the
    ///   VMM may not kill it or the kernel does not end it yet: it may still carry out a discard;
    /// - if a range is not part of a block, or the agent refuses for another reason.
    ///
    /// Nothing is populated then. A lost agent that has exited is no error: the client populates by
    /// itself.
    pub fn populate(&self, ranges: &[BlockRange]) -> Result<u64, Error> {
        let outward = |range| self.check_one(range, Block::outward);
        let checked: Vec<_> = ranges.iter().map(outward).collect::<Result<_, _>>()?;
        let mut session = self.session();
        let ownership = self.shared_ownership().lock();
        if ownership.has_left(session.control.link().id) {
            let sentence = format!("ownership is {:?}", ownership.ownership());
            return Err(Error::GuestGone { sentence });
        }
        drop(ownership);
        // No discard from before may come after this. The session stays locked to the end.
        self.flush_queued(&mut session)?;
        let mut changed = 0;
        // Runs that this call populated. A single batch is all or nothing by itself and needs no
        // undo.
        let mut undo: Vec<BlockRange> = Vec::new();
        let batches = batches(&session, &checked);
        let many = batches.len() > 1;
        for batch in batches {
            let discarded = if many { discarded_runs(batch) } else { Vec::new() };
            let request =
                Request::Populate { ranges: batch.iter().map(|entry| entry.range).collect() };
            changed += match self.populate_batch(&mut session, &request, batch) {
                Ok(changed) => changed,
                Err(error) => {
                    // They were stale a moment ago, and the caller was not told otherwise. The
                    // session is still locked, so no other call has populated any of them.
                    if let Err(undone) = self.undo_populate(&mut session, &undo) {
                        log::error!(
                            "cannot undo a failed populate, so its pages stay populated: {undone}"
                        );
                    }
                    return Err(error);
                }
            };
            undo.extend(discarded);
        }
        Ok(changed)
    }

    /// Discards again what a failed populate had populated.
    fn undo_populate(&self, session: &mut Session, ranges: &[BlockRange]) -> Result<(), Error> {
        let pieces = self.pieces(ranges)?;
        let mut rest = pieces.as_slice();
        while !rest.is_empty() {
            rest = self.discard_next_batch(session, rest, DiscardKind::Discard(Punch::No))?.1;
        }
        Ok(())
    }

    /// Populates what is in one request: all of it, or nothing.
    fn populate_batch(
        &self, session: &mut Session, request: &Request, batch: &[CheckedRange],
    ) -> Result<u64, Error> {
        match session.control.request(request, &[], RangesReply::decode) {
            Ok(reply) => Ok(reply.changed_pages),
            Err(Error::AgentLost { .. }) if !self.is_relinquished() => {
                // It may be about to discard pages that the guest is about to use.
                session.end_lost_agent()?;
                Ok(batch
                    .iter()
                    .map(|entry| entry.block.populate(entry.pages, &self.memory().log))
                    .sum())
            }
            Err(Error::AgentLost { reason }) => Err(Error::GuestGone {
                sentence: format!("it was given up, and its agent is lost: {reason}"),
            }),
            Err(Error::Refused { code: ErrorCode::Gone, sentence }) => {
                Err(Error::GuestGone { sentence })
            }
            Err(refused) => Err(refused),
        }
    }

    /// As [`Client::populate`], but waits for at most `timeout` while a job is in the way.
    ///
    /// Holds up no other call of the client meanwhile. Do not call it on a thread that a hook waits
    /// for: the job that is in the way may need that hook.
    ///
    /// # Errors
    /// As [`Client::populate`]. The code is `Busy` only if the job was in the way all the time.
    pub fn populate_within(&self, ranges: &[BlockRange], timeout: Duration) -> Result<u64, Error> {
        retry_while_busy(timeout, || self.populate(ranges))
    }

    /// True if the guest was given up, and may have left.
    fn is_relinquished(&self) -> bool {
        matches!(self.ownership(), Ownership::Relinquished | Ownership::Gone)
    }

    /// Finds the block of a range and rounds the range, before anything is changed.
    fn check_one(
        &self, range: &BlockRange, round: impl Fn(&Block, &BlockRange) -> Result<PageRange, Error>,
    ) -> Result<CheckedRange, Error> {
        let id = range.block;
        let block = self.memory().block(id).ok_or(Error::UnknownBlock { id })?;
        let pages = round(&block, range)?;
        Ok(CheckedRange { range: *range, block, pages })
    }
}

fn batches<'a>(
    session: &Session, checked: &'a [CheckedRange],
) -> std::slice::Chunks<'a, CheckedRange> {
    checked.chunks(session.control.max_ranges)
}

/// Cuts a range that is too large for one request at multiples of the unit, so that the pieces
/// together round inward to the same pages as the whole.
fn split_range(entry: CheckedRange, most: u64, into: &mut Vec<CheckedRange>) -> Result<(), Error> {
    let BlockRange { block: id, offset, length } = entry.range;
    // Both are powers of two.
    let step = most.max(entry.block.discard_unit());
    if length <= step {
        into.push(entry);
        return Ok(());
    }
    let end = offset + length;
    let mut start = offset;
    while start < end {
        let stop = (start / step * step).saturating_add(step).min(end);
        let range = BlockRange { block: id, offset: start, length: stop - start };
        into.push(CheckedRange {
            range,
            pages: entry.block.inward(&range)?,
            block: Arc::clone(&entry.block),
        });
        start = stop;
    }
    Ok(())
}

/// How many of these ranges fit into one request: no more than `most` bytes, and at least one
/// range.
fn batch_length(session: &Session, ranges: &[CheckedRange], most: u64) -> usize {
    let mut bytes = 0u64;
    let fits = |entry: &&CheckedRange| {
        bytes = bytes.saturating_add(entry.range.length);
        bytes <= most
    };
    ranges.iter().take(session.control.max_ranges).take_while(fits).count().max(1)
}

/// The runs of a batch that are discarded now.
fn discarded_runs(batch: &[CheckedRange]) -> Vec<BlockRange> {
    let runs = |entry: &CheckedRange| {
        let block = entry.range.block;
        let range =
            |run: PageRange| BlockRange { block, offset: run.offset(), length: run.bytes() };
        entry.block.discarded.runs(entry.pages).map(range).collect::<Vec<_>>()
    };
    batch.iter().flat_map(runs).collect()
}
