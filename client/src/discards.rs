//! Discard, free and populate, with an agent and without.
//!
//! There are two kinds of memory that a guest gives back:
//!
//! | call | for | until when |
//! | --- | --- | --- |
//! | [`Client::discard`] | virtio-mem, memory that the VMM unplugs | a [`Client::populate`] |
//! | [`Client::free`] | a balloon whose guest deflates by touching, free page reporting | the guest writes into it |
//!
//! A discard cannot fail (`discard-cannot-fail`). The agent does all of it, if there is one: only
//! it knows which worker is reading the range right now. If there is none, or it is lost during the
//! call, the client waits for the end of its process, which is killed: then nobody reads guest
//! memory any more, or has a discard left to do, so the client marks the shared bitmap and frees
//! the backing by itself. The next agent finds the marks. A process that cannot be killed may have
//! a discard left to do. So as long as it lives nothing is given to the guest to be used:
//! populating and freeing fail by name.
//!
//! An agent that takes a background snapshot answers a discard only when it has saved what is
//! discarded, at the speed of its disk. So one request covers no more than can be saved within the
//! time that an answer may take.
//!
//! Both hold the session's lock for as long as it matters that no new agent is attached in the
//! middle of what is done without one: a populate, which is all or nothing, to its end; a discard
//! for one request, each of which is complete in itself. So nobody waits for the whole of a large
//! one.

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

/// Who frees the memory under a range that is discarded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Punch {
    /// The agent, by `FALLOC_FL_PUNCH_HOLE`; the client if there is no agent. When the discard
    /// returns, the range is a hole.
    #[default]
    Yes,
    /// The VMM, after the discard returned. Until it does, what the guest wrote before cannot be
    /// told from what it writes after.
    No,
}

/// Bytes that a disk saves in a second, if it is busy with other things.
const SNAPSHOT_BYTES_PER_SECOND: u128 = 13 << 20;

/// Most bytes that one request discards, but for blocks whose unit is larger: what can be saved
/// before the agent counts as lost. A power of two.
fn max_discard_bytes(timeout: Duration) -> u64 {
    const LEAST: u128 = 1 << 20;
    // Nor does anybody else who wants to ask something wait for more.
    const MOST: u128 = 128 << 20;
    let saved = (SNAPSHOT_BYTES_PER_SECOND * timeout.as_millis() / 1000).clamp(LEAST, MOST);
    1 << saved.ilog2()
}

/// How memory is given back.
#[derive(Debug, Clone, Copy)]
enum DiscardKind {
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
struct CheckedRange {
    range: BlockRange,
    block: Arc<Block>,
    pages: PageRange,
}

impl Client {
    /// Says that the content of these ranges is stale: it is not read, sent or populated until it
    /// is populated again. Rounds inward to the block's granularity. Call it after the guest gave
    /// the ranges back, and free them only when it returned.
    ///
    /// For memory that the VMM unplugs, and plugs again by [`Client::populate`]. What the guest
    /// writes into it before that has no guarantee, and is lost when it is moved or saved. Memory
    /// that the guest may use again without a word of the VMM is for [`Client::free`].
    ///
    /// Returns the number of pages that were not discarded before. Of a block that is removed
    /// meanwhile, what is left of the ranges is left alone.
    ///
    /// # Errors
    /// Only if a range is no part of a block; nothing is discarded then.
    pub fn discard(&self, ranges: &[BlockRange], punch: Punch) -> Result<u64, Error> {
        self.discard_ranges(ranges, DiscardKind::Discard(punch))
    }

    /// Frees these ranges, which the guest gave back and may write into again at any time: free
    /// page reporting, and every balloon whose guest deflates by touching. When it returns they are
    /// holes, which read as zero; they are not read, sent or allocated until the guest writes. What
    /// it writes then is ordinary memory: no [`Client::populate`] is needed, and one does no harm.
    /// Rounds inward to the block's granularity.
    ///
    /// Call it after the guest gave the ranges back, and tell the guest that it is done only when
    /// it returned: what is written before that may be lost. Ranges that are discarded stay
    /// discarded.
    ///
    /// Returns the number of pages that were freed: those that are not discarded. If the file
    /// system cannot free them they are as they were.
    ///
    /// # Errors
    /// If a range is no part of a block; nothing is freed then. Or [`Error::AgentRuns`] if the
    /// agent is lost, and its process lives on: it may free the ranges later, under the guest. So
    /// do not tell the guest that it is done before this was called again with success.
    pub fn free(&self, ranges: &[BlockRange]) -> Result<u64, Error> {
        self.discard_ranges(ranges, DiscardKind::Free)
    }

    fn discard_ranges(&self, ranges: &[BlockRange], kind: DiscardKind) -> Result<u64, Error> {
        let pieces = self.pieces(ranges)?;
        let mut changed = 0;
        let mut rest = pieces.as_slice();
        while !rest.is_empty() {
            let (done, after) = self.discard_next_batch(&mut self.session(), rest, kind)?;
            changed += done;
            rest = after;
        }
        Ok(changed)
    }

    /// What is to be given back, in pieces each of which fits into one request.
    fn pieces(&self, ranges: &[BlockRange]) -> Result<Vec<CheckedRange>, Error> {
        let most = max_discard_bytes(self.timeouts().shortest());
        let mut pieces = Vec::new();
        for entry in self.check(ranges, Block::inward)? {
            split_range(entry, most, &mut pieces)?;
        }
        Ok(pieces)
    }

    /// Gives back as many of the pieces as fit into one request. Returns how many pages that
    /// changed, and the other pieces.
    fn discard_next_batch<'a>(
        &self, session: &mut Session, pieces: &'a [CheckedRange], kind: DiscardKind,
    ) -> Result<(u64, &'a [CheckedRange]), Error> {
        let most = max_discard_bytes(self.timeouts().shortest());
        let (batch, after) = pieces.split_at(batch_length(session, pieces, most));
        Ok((self.discard_batch(session, batch, kind)?, after))
    }

    /// Gives back what fits into one request.
    fn discard_batch(
        &self, session: &mut Session, batch: &[CheckedRange], kind: DiscardKind,
    ) -> Result<u64, Error> {
        // Another block may have the id by now.
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
        match session.control.request(&kind.request(ranges), &[], RangesReply::decode) {
            Ok(reply) => return Ok(reply.changed_pages),
            // It has no right to. It will see the marks, and finds holes where it still reads.
            Err(Error::Refused { sentence, .. }) if !session.control.link().is_shut_down() => {
                log::warn!("the agent refused a discard, the client does it: {sentence}");
            }
            // It was given up, or is now. It may be reading here (`never-read`), or about to do
            // what it was asked. A discard goes on even if it lives: that no page is used again
            // before it has ended is seen to by whoever populates. Nobody populates what is freed.
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

    /// Says that the guest is about to use these ranges. Rounds outward to the block's granularity.
    /// The guest may use them when it returned with success.
    ///
    /// Returns the number of pages that were discarded before.
    ///
    /// # Errors
    /// - [`Error::GuestGone`] if the guest has left by a migration: its memory here is not in use
    ///   any more, and trying again does not help;
    /// - [`Error::Refused`] with the code `Busy` if a job is in the way for a while: the last pass
    ///   of a migration, or a guest that is on its way here ([`Client::populate_within`] waits for
    ///   that);
    /// - [`Error::AgentRuns`] if the agent is lost, and its process lives on, since the VMM may not
    ///   kill it or the kernel keeps it: it may still carry out a discard that it was asked for;
    /// - if a range is no part of a block, or the agent refuses for another reason.
    ///
    /// Nothing is populated then. A lost agent that has ended is no error: the client does it.
    pub fn populate(&self, ranges: &[BlockRange]) -> Result<u64, Error> {
        let checked = self.check(ranges, Block::outward)?;
        let mut session = self.session();
        let ownership = self.shared_ownership().lock();
        if ownership.has_left(session.control.link().id) {
            let sentence = format!("ownership is {:?}", ownership.ownership());
            return Err(Error::GuestGone { sentence });
        }
        drop(ownership);
        let mut changed = 0;
        // Runs that this call populated. One batch is all or nothing by itself, so only more than
        // one needs them.
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
                    // They were stale a moment ago, and nobody was told that they are not. Still
                    // under the lock: nobody else has populated any of them.
                    if let Err(undone) = self.undo_populate(&mut session, &undo) {
                        log::error!("what a populate that failed had populated stays so: {undone}");
                    }
                    return Err(error);
                }
            };
            undo.extend(discarded);
        }
        Ok(changed)
    }

    /// Discards what a populate that failed had populated.
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
                // It may be about to discard what the guest uses again from now on.
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

    /// As [`Client::populate`], and waits for at most `timeout` while a job is in the way.
    ///
    /// Nothing else of the client is held up meanwhile. Do not call it on a thread that a hook
    /// waits for: the job that is in the way may need that hook.
    ///
    /// # Errors
    /// As [`Client::populate`]; the code is `Busy` only if the job was in the way for all of that
    /// time.
    pub fn populate_within(&self, ranges: &[BlockRange], timeout: Duration) -> Result<u64, Error> {
        retry_while_busy(timeout, || self.populate(ranges))
    }

    /// True if the guest was given up, and perhaps has left.
    fn is_relinquished(&self) -> bool {
        matches!(self.ownership(), Ownership::Relinquished | Ownership::Gone)
    }

    /// Finds the blocks and rounds all ranges, before anything is changed.
    fn check(
        &self, ranges: &[BlockRange],
        round: impl Fn(&Block, &BlockRange) -> Result<PageRange, Error>,
    ) -> Result<Vec<CheckedRange>, Error> {
        let check = |range: &BlockRange| {
            let block =
                self.memory().block(range.block).ok_or(Error::UnknownBlock { id: range.block })?;
            let pages = round(&block, range)?;
            Ok(CheckedRange { range: *range, block, pages })
        };
        ranges.iter().map(check).collect()
    }
}

fn batches<'a>(
    session: &Session, checked: &'a [CheckedRange],
) -> std::slice::Chunks<'a, CheckedRange> {
    checked.chunks(session.control.max_ranges)
}

/// Cuts a range that is too large for one request, where no unit is cut: so the pieces round inward
/// to what the whole does.
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

/// How many of these ranges fit into one request that covers no more than `most`, or is one range.
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
