// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Sending the missing pages of a postcopy, on all streams at once.
//!
//! - Each stream that is not urgent has a thread that pushes missing pages without a request.
//! - Each urgent stream has a thread that answers the requests on it. Nothing else is sent there,
//!   so an answer never waits behind pages that the guest does not wait for.
//! - The job's thread reads the return path.
//!
//! A thread takes a host page before it sends it ([`HostPageSet::take`]), so no page is pushed
//! twice. If a page is taken and then lost with a connection, the destination reports it as missing
//! after the recovery.
//!
//! A requested page that was already taken is on its way. It may wait for the bandwidth limit, or
//! behind megabytes in the buffers of a connection, which the destination empties no faster than it
//! places pages. Such a page is sent again on the urgent stream and overtakes itself. The
//! destination throws away the copy that comes second. So no fault waits for the push.
//!
//! If one stream fails, all end: connections are lost and made again together.

use super::super::connect::{ERROR_EXCHANGE_TIMEOUT, Primary, SessionId, Streams, Urgent};
use super::super::job::OutgoingJob;
use super::super::sender::{PageSender, SendContext};
use crate::error::chain;
use crate::event::Event;
use crate::job::{JobError, add};
use crate::lock::lock;
use crate::memory::Block;
use crate::memory::MemoryError;
use crate::memory::cursor::Cursor;
use crate::memory::host_page_set::{HostPageSet, words_of};
use crate::outgoing::OutgoingError;
use crate::transport::StreamError;
use crate::transport::socket_queue::limit_send_queue;
use crate::transport::{Address, Limiter, StreamSocket, TransportError};
use crate::trust::Peer;
use pageferry_protocol::control::hook::Hook;
use pageferry_protocol::control::job::OutgoingOptions;
use pageferry_protocol::memory::PageRange;
use pageferry_protocol::shm::bitmap::{WORD_BITS, runs_of_word};
use pageferry_protocol::stream::payload::{Totals, decode_runs};
use pageferry_protocol::stream::{Kind, RecordHeader};
use rustix::event::PollFlags;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Longest time between two looks at parameters that an operator may have changed.
const POLL_INTERVAL: Duration = Duration::from_millis(200);

/// The source of a guest that runs at the destination, or is about to.
#[derive(Debug)]
pub struct PostcopySource {
    pub(super) job: Arc<OutgoingJob>,
    pub(super) session: SessionId,
    /// Who the destination has proved to be.
    pub(super) peer: Option<Peer>,
    /// The address of the destination.
    pub(super) address: Option<Address>,
    /// The pages that the destination is missing and that were not sent yet.
    pub(super) missing: Arc<HostPageSet>,
    /// The pages that the destination may still need: all that were ever missing and are not
    /// released. An agent that did not begin the migration gets them from the destination.
    pub(super) kept: Option<HostPageSet>,
    limiter: Limiter,
    unlimited: Limiter,
}

/// What the threads of one set of connections share.
struct StreamGroup<'a> {
    cursor: Cursor,
    sockets: Vec<StreamSocket>,
    /// Why it failed: the first error, unless the peer sent its own reason, which tells more.
    failure: Mutex<Option<JobError>>,
    /// The postcopy has ended, with success or without. A connection that ends now is no failure.
    over: AtomicBool,
    /// The return path is being read. It is read on when a stream has failed, because the
    /// destination may say why.
    following: AtomicBool,
    /// Number of streams that still push.
    pushing: AtomicUsize,
    /// Readable when no stream pushes any more.
    pushed: Event,
    bulk: SendContext<'a>,
    urgent: SendContext<'a>,
}

impl StreamGroup<'_> {
    fn fail(&self, error: JobError) {
        if self.over.load(Ordering::Acquire) {
            return;
        }
        let mut failure = lock(&self.failure);
        if failure.is_none() || matches!(error, JobError::Peer(_)) {
            *failure = Some(error);
        }
        drop(failure);
        if !self.following.load(Ordering::Acquire) {
            return self.shut_down();
        }
        self.bulk.limiter.set_rate(0);
        let (primary, others) =
            self.sockets.split_first().map_or((None, &[][..]), |(one, rest)| (Some(one), rest));
        others.iter().for_each(StreamSocket::shut_down);
        // The primary is still read: the destination may have sent its reason.
        primary.into_iter().for_each(StreamSocket::end_sending);
    }

    fn failed(&self) -> bool {
        lock(&self.failure).is_some()
    }

    fn shut_down(&self) {
        // Without a limit no thread keeps waiting to send on a stream that is shut.
        self.bulk.limiter.set_rate(0);
        self.sockets.iter().for_each(StreamSocket::shut_down);
    }

    fn check(&self, outcome: Result<(), JobError>) {
        if let Err(error) = outcome {
            self.fail(error);
        }
    }
}

impl PostcopySource {
    /// A source for a destination that has proved to be `peer` and is missing `missing`. `kept` has
    /// the pages that the destination may need again after a lost connection, if that is known.
    pub fn new(
        job: &Arc<OutgoingJob>, (session, peer): (SessionId, Option<Peer>),
        address: Option<Address>, missing: HostPageSet, kept: Option<HostPageSet>,
    ) -> Self {
        let missing = Arc::new(missing);
        job.set_remaining(&missing);
        Self {
            job: job.clone(),
            session,
            peer,
            address,
            missing,
            kept,
            limiter: Limiter::new(job.options().bandwidth),
            unlimited: Limiter::new(0),
        }
    }

    /// Answers requests, runs `before`, and then pushes the rest until the destination has all.
    ///
    /// # Errors
    /// The error of `before`, or the reason why a stream failed. All streams have ended then.
    pub fn serve(
        &self, streams: &mut Streams, before: impl FnOnce(&mut Primary) -> Result<(), JobError>,
    ) -> Result<(), JobError> {
        let view = |limiter| SendContext { job: &self.job, limiter, send_zeros: true, sent: None };
        self.limiter.set_rate(self.job.options().bandwidth);
        let sockets = streams.sockets();
        let Streams { primary, senders, urgent, .. } = streams;
        let group = StreamGroup {
            cursor: Cursor::new(self.job.memory.blocks()),
            sockets,
            failure: Mutex::default(),
            over: AtomicBool::new(false),
            following: AtomicBool::new(false),
            pushing: AtomicUsize::new(senders.len()),
            pushed: Event::new().map_err(JobError::from_io("create an event descriptor"))?,
            bulk: view(&self.limiter),
            urgent: view(&self.unlimited),
        };
        std::thread::scope(|scope| {
            let group = &group;
            for stream in urgent {
                scope.spawn(move || match self.answer_requests(group, stream) {
                    // All pages are sent, so no request will come, and the destination closes this
                    // stream before it says that it has all. If the connection was lost instead,
                    // the destination sees that, too, and the primary fails.
                    Err(JobError::Transport(error)) if self.missing.remaining_pages() == 0 => {
                        log::debug!("an urgent stream ended: {}", chain(&error));
                    }
                    outcome => group.check(outcome),
                });
            }
            let outcome = before(primary);
            if outcome.is_ok() {
                group.following.store(true, Ordering::Release);
                for sender in senders {
                    scope.spawn(move || group.check(self.push(group, sender)));
                }
                group.check(self.read_return_path(group, primary));
            } else if let Err(error) = outcome {
                // No other thread has sent on the primary until now.
                if !matches!(error, JobError::Transport(_) | JobError::Peer(_)) {
                    primary.send_error(&error.to_remote());
                }
                group.fail(error);
            }
            group.over.store(true, Ordering::Release);
            group.shut_down();
        });
        let failure = group.failure.into_inner().unwrap_or_else(PoisonError::into_inner);
        failure.map_or(Ok(()), Err)
    }

    /// Answers the requests that come on an urgent stream.
    fn answer_requests(
        &self, group: &StreamGroup<'_>, stream: &mut Urgent,
    ) -> Result<(), JobError> {
        // A request comes only when the guest touches a missing page, so there is no deadline.
        stream.reader.set_no_timeout();
        let mut taken = Vec::new();
        loop {
            let record = stream.reader.read()?;
            if record.kind != Kind::Request {
                return Err(
                    StreamError::unexpected(record.kind, record.payload, "a request").into()
                );
            }
            let (id, range) = (record.header.block(), record.header.range());
            let (at, block) = self.job.memory.find(id).ok_or(StreamError::NoBlock { id })?;
            let pages = block.geometry.pages();
            if !range.fits(pages) {
                return Err(StreamError::Outside {
                    id,
                    first: range.first,
                    count: range.count,
                    pages,
                }
                .into());
            }
            group.cursor.fault(at, range.end());
            let asked = self.missing.block(at).covering(range);
            self.missing.take_range(at, asked, |word, bits| taken.push((word, bits)));
            let sent = self.send(&group.urgent, &mut stream.sender, (at, block), &mut taken)?;
            add(&self.job.live.requested_pages, sent);
            if sent == 0
                && let Some(kept) = &self.kept
            {
                taken.extend(kept.block(at).bits().nonzero_words(asked));
                self.send(&group.urgent, &mut stream.sender, (at, block), &mut taken)?;
            }
            if !stream.reader.has_more() {
                stream.sender.flush(&group.urgent)?;
            }
        }
    }

    /// Pushes pages until none is missing.
    fn push(&self, group: &StreamGroup<'_>, sender: &mut PageSender) -> Result<(), JobError> {
        crate::priority::lower();
        sender.totals = Totals::default();
        limit_send_queue(sender.socket().as_fd());
        let mut taken = Vec::new();
        while let Some((at, range)) = group.cursor.claim(&self.missing) {
            self.job.cancel.check()?;
            let block: &Block = &self.job.memory.blocks()[at];
            self.missing.take_range(at, range, |word, bits| taken.push((word, bits)));
            let sent = self.send(&group.bulk, sender, (at, block), &mut taken)?;
            sender.flush(&group.bulk)?;
            add(&self.job.live.pushed_pages, sent);
        }
        let payload = sender.totals.encode();
        sender.write(&self.job, RecordHeader::plain(Kind::End, 0, payload.len()), &payload)?;
        if group.pushing.fetch_sub(1, Ordering::AcqRel) == 1 {
            group.pushed.signal();
        }
        Ok(())
    }

    /// Queues host pages, given as words and their bits. Returns the number of pages.
    fn send(
        &self, view: &SendContext<'_>, sender: &mut PageSender, (at, block): (usize, &Block),
        taken: &mut Vec<(u64, u64)>,
    ) -> Result<u64, JobError> {
        let host_pages = self.missing.block(at);
        let mut pages = 0;
        for (word, bits) in taken.drain(..) {
            pages += u64::from(bits.count_ones()) * host_pages.unit();
            if host_pages.unit() == 1 {
                sender.queue_missing_pages(view, (at, block), word, bits)?;
                continue;
            }
            for host_page in
                runs_of_word(word * WORD_BITS, bits).flat_map(|run| run.first..run.end())
            {
                send_host_page(
                    view,
                    sender,
                    (at, block),
                    host_pages.pages(PageRange::new(host_page, 1)),
                )?;
            }
        }
        Ok(pages)
    }

    /// All memory is at the destination. The VMM hears it before the destination does, which then
    /// answers no recovery any more: if this agent is lost in between, the next one has nothing to
    /// recover.
    ///
    /// If the VMM cannot hear it, the destination gets no answer. It waits for another agent of the
    /// VMM, which asks, and ends when none has come. So it also does if the answer is lost.
    fn complete(&self, primary: &Primary) {
        let OutgoingOptions { peer_timeout, hook_timeout, .. } = self.job.options();
        // The destination waits for the answer, but not longer than `peer_timeout`.
        let timeout = hook_timeout.min(peer_timeout / 2);
        if let Err(error) = self.job.hooks.ask(&Hook::MemoryArrived, timeout) {
            log::warn!("job {}: all has arrived: {}", self.job.id, chain(&error));
            if !error.reached_vmm() {
                return;
            }
        }
        if let Err(error) = primary.writer.write_plain(Kind::Complete, 0) {
            log::warn!("job {}: the destination was not answered: {}", self.job.id, chain(&error));
        }
    }

    /// Reads the return path until the destination has all pages.
    fn read_return_path(
        &self, group: &StreamGroup<'_>, primary: &mut Primary,
    ) -> Result<(), JobError> {
        let OutgoingOptions { peer_timeout, hook_timeout, .. } = self.job.options();
        primary.reader.set_timeout(peer_timeout);
        // When all pages are sent, the destination must answer in this time: it places the last
        // pages and unregisters its memory before that.
        let timeout = peer_timeout + 2 * hook_timeout;
        let mut due: Option<Instant> = None;
        let mut read_until: Option<Instant> = None;
        loop {
            while let Some(record) = primary.reader.try_read()? {
                due = due.map(|_| Instant::now() + timeout);
                match record.kind {
                    Kind::Complete => {
                        self.check_all_sent()?;
                        // Set before the answer: the destination closes its streams when it has it.
                        group.over.store(true, Ordering::Release);
                        self.complete(primary);
                        return Ok(());
                    }
                    Kind::Discard => self.drop_runs(&record.header, record.payload)?,
                    Kind::Placed if self.job.options().release => {
                        self.release(&record.header, record.payload)?
                    }
                    kind => {
                        return Err(StreamError::unexpected(
                            kind,
                            record.payload,
                            "that the destination has everything",
                        )
                        .into());
                    }
                }
            }
            if due.is_some_and(|due| Instant::now() >= due) {
                return Err(TransportError::Silent(timeout).into());
            }
            let mut look = Instant::now() + POLL_INTERVAL;
            if group.failed() {
                // Another stream failed. The destination may be about to say why.
                let until =
                    *read_until.get_or_insert_with(|| Instant::now() + ERROR_EXCHANGE_TIMEOUT);
                if Instant::now() >= until {
                    return Ok(());
                }
                look = look.min(until);
            } else {
                self.limiter.set_rate(self.job.options().bandwidth);
            }
            let socket = (primary.reader.socket().as_fd(), PollFlags::IN);
            if due.is_none() {
                let ready =
                    self.job.cancel.wait(&[socket, (group.pushed.as_fd(), PollFlags::IN)], look)?;
                due = ready[1].then(|| Instant::now() + timeout);
            } else {
                self.job.cancel.wait(&[socket], look)?;
            }
        }
    }

    /// Checks the destination's claim that it has all pages: all must have been sent. Pages that
    /// were not sent must not be lost.
    fn check_all_sent(&self) -> Result<(), JobError> {
        match self.missing.next_from(0, 0) {
            None => Ok(()),
            Some((at, host_page)) => {
                let first = self.missing.block(at).pages(PageRange::new(host_page, 1)).first;
                Err(OutgoingError::PlacedButNotSent {
                    id: self.job.memory.blocks()[at].geometry.id,
                    first,
                }
                .into())
            }
        }
    }

    fn runs_of<'a>(
        &self, header: &RecordHeader, payload: &'a [u8], kind: &'static str,
    ) -> Result<(usize, &Block, impl Iterator<Item = PageRange> + 'a), JobError> {
        let id = header.block();
        let (at, block) = self.job.memory.find(id).ok_or(StreamError::NoBlock { id })?;
        let runs = decode_runs(payload, block.geometry.pages());
        Ok((at, block, runs.map_err(|source| StreamError::Payload { kind, source })?))
    }

    /// The guest discarded pages at the destination, so they need not be sent.
    fn drop_runs(&self, header: &RecordHeader, payload: &[u8]) -> Result<(), JobError> {
        let (at, _, runs) = self.runs_of(header, payload, "discard")?;
        for run in runs {
            let host_pages = self.missing.block(at);
            self.missing.take_range(at, host_pages.covering(run), |_, bits| {
                add(&self.job.live.dropped_pages, u64::from(bits.count_ones()) * host_pages.unit());
            });
        }
        Ok(())
    }

    /// The destination has placed pages, so they are freed here.
    fn release(&self, header: &RecordHeader, payload: &[u8]) -> Result<(), JobError> {
        let (at, block, runs) = self.runs_of(header, payload, "placed")?;
        for run in runs {
            let host_pages = self.missing.block(at);
            // The destination cannot have pages that were not sent. They must not be freed.
            if let Some(host_page) = host_pages.bits().next_set(host_pages.covering(run)) {
                let first = host_pages.pages(PageRange::new(host_page, 1)).first;
                return Err(OutgoingError::PlacedButNotSent { id: block.geometry.id, first }.into());
            }
            if let Some(kept) = &self.kept {
                kept.take_range(at, host_pages.covering(run), |_, _| {});
            }
            self.free(block, run)?;
        }
        Ok(())
    }

    fn free(&self, block: &Block, run: PageRange) -> Result<(), JobError> {
        let failed = |source| MemoryError::Backing { id: block.geometry.id, source };
        let freed = block.backing.punch(run).map_err(failed)?;
        add(&self.job.live.released_pages, freed.count);
        Ok(())
    }

    /// Frees the pages that the destination does not need any more. It has just said which pages it
    /// is missing. Earlier reports of placed pages may have been lost with the connection.
    pub(super) fn release_received(&self) -> Result<(), JobError> {
        let Some(kept) = self.kept.as_ref().filter(|_| self.job.options().release) else {
            return Ok(());
        };
        for (at, block) in self.job.memory.blocks().iter().enumerate() {
            let (kept_pages, missing) = (kept.block(at), self.missing.block(at).bits());
            for (word, bits) in kept_pages.bits().nonzero_words(kept_pages.bits().all()) {
                let received = kept.take(at, word, bits & !missing.word(word));
                for host_pages in runs_of_word(word * WORD_BITS, received) {
                    self.free(block, kept_pages.pages(host_pages))?;
                }
            }
        }
        Ok(())
    }
}

/// Queues all pages of a host page one after another on one stream, because the destination places
/// them together.
fn send_host_page(
    view: &SendContext<'_>, sender: &mut PageSender, (at, block): (usize, &Block), pages: PageRange,
) -> Result<(), JobError> {
    for (word, mask) in words_of(pages) {
        sender.queue_missing_pages(view, (at, block), word, mask)?;
    }
    sender.end_zeros();
    Ok(())
}
