//! Sending what the destination is missing.
//!
//! Every stream that is not urgent has a thread that pushes. Every urgent stream has one that
//! answers what is asked for on it, and nothing else goes there: so an answer never queues behind
//! what nobody waits for. The job's own thread reads the return path. Who sends a host page takes
//! it first ([`HostPageSet::take`]), so none is pushed twice; what is taken and lost with a
//! connection comes back with the next one, when the destination says what it has.
//!
//! What is asked for although it was taken is on its way: held back by the limit, or behind
//! megabytes in the buffers of a connection that the destination empties no faster than it places
//! pages. It is sent again, and overtakes itself; the destination drops what comes second. So no
//! fault waits for the push.
//!
//! If one stream fails, all do: connections are lost and made together.

use super::super::connect::{LAST_WORDS, Primary, SessionId, Streams, Urgent, unexpected};
use super::super::sender::{PageSender, PassView};
use crate::job::{Job, JobError, add};
use crate::memory::Block;
use crate::memory::cursor::Cursor;
use crate::memory::host_page_set::{HostPageSet, words_of};
use crate::transport::socket_queue::limit_send_queue;
use crate::transport::{Address, Limiter, StreamSocket, TransportError};
use pageferry_protocol::control::job::OutgoingOptions;
use pageferry_protocol::memory::PageRange;
use pageferry_protocol::shm::bitmap::{WORD_BITS, runs_of_word};
use pageferry_protocol::stream::payload::{Totals, decode_runs};
use pageferry_protocol::stream::{Kind, RecordHeader};
use rustix::event::{EventfdFlags, PollFlags};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Longest time between two looks at what an operator changed.
const LOOK: Duration = Duration::from_millis(200);

/// A guest that runs elsewhere, or is about to, and what it is missing.
#[derive(Debug)]
pub struct PostcopySource {
    pub(super) job: Arc<Job>,
    pub(super) session: SessionId,
    /// Where the destination listens.
    pub(super) address: Option<Address>,
    pub(super) missing: Arc<HostPageSet>,
    /// What the destination may still lack: all that was ever missing and is not released. An agent
    /// that did not begin the migration learns it from the destination.
    pub(super) kept: Option<HostPageSet>,
    limiter: Limiter,
    unlimited: Limiter,
}

/// What all threads of one connection share.
struct StreamGroup<'a> {
    cursor: Cursor,
    sockets: Vec<StreamSocket>,
    /// Why it broke. The first to fail says, but for the peer's own words, which tell more.
    failure: Mutex<Option<JobError>>,
    /// All is over, for better or worse: that a connection ends is no failure any more.
    over: AtomicBool,
    /// The return path is read for what the destination says, also once a stream failed: it may say
    /// why.
    following: AtomicBool,
    /// Streams that still push.
    pushing: AtomicUsize,
    /// Readable when none does.
    pushed: OwnedFd,
    bulk: PassView<'a>,
    urgent: PassView<'a>,
}

impl StreamGroup<'_> {
    fn fail(&self, error: JobError) {
        if self.over.load(Ordering::Acquire) {
            return;
        }
        let mut failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
        if failure.is_none() || matches!(error, JobError::Peer(_)) {
            *failure = Some(error);
        }
        drop(failure);
        if !self.following.load(Ordering::Acquire) {
            return self.shut();
        }
        self.bulk.limiter.set_rate(0);
        let (primary, others) =
            self.sockets.split_first().map_or((None, &[][..]), |(one, rest)| (Some(one), rest));
        others.iter().for_each(StreamSocket::shut);
        // What it said before is still read.
        primary.into_iter().for_each(StreamSocket::end);
    }

    fn failed(&self) -> bool {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    fn shut(&self) {
        // Nobody waits for his turn to send on what is shut.
        self.bulk.limiter.set_rate(0);
        self.sockets.iter().for_each(StreamSocket::shut);
    }

    fn check(&self, outcome: Result<(), JobError>) {
        if let Err(error) = outcome {
            self.fail(error);
        }
    }
}

impl PostcopySource {
    /// The destination is missing `missing`; `kept` is what it may still lack later, as far as that
    /// is known.
    pub fn new(
        job: &Arc<Job>, session: SessionId, address: Option<Address>, missing: HostPageSet,
        kept: Option<HostPageSet>,
    ) -> Self {
        let missing = Arc::new(missing);
        job.set_missing(&missing);
        Self {
            job: job.clone(),
            session,
            address,
            missing,
            kept,
            limiter: Limiter::new(job.options().bandwidth),
            unlimited: Limiter::new(0),
        }
    }

    /// Answers what is asked for, runs `before`, and then pushes the rest until the destination has
    /// it.
    ///
    /// # Errors
    /// What `before` says, or why the connection broke. All streams are ended then.
    pub fn serve(
        &self, streams: &mut Streams, before: impl FnOnce(&mut Primary) -> Result<(), JobError>,
    ) -> Result<(), JobError> {
        let pushed = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let view = |limiter| PassView { job: &self.job, limiter, send_zeros: true };
        self.limiter.set_rate(self.job.options().bandwidth);
        let sockets = streams.sockets();
        let Streams { primary, senders, urgent, .. } = streams;
        let line = StreamGroup {
            cursor: Cursor::new(&self.job.memory),
            sockets,
            failure: Mutex::default(),
            over: AtomicBool::new(false),
            following: AtomicBool::new(false),
            pushing: AtomicUsize::new(senders.len()),
            pushed: pushed.map_err(|errno| JobError::Io {
                what: "make an event descriptor",
                source: errno.into(),
            })?,
            bulk: view(&self.limiter),
            urgent: view(&self.unlimited),
        };
        std::thread::scope(|scope| {
            let line = &line;
            for stream in urgent {
                scope.spawn(move || match self.answer_requests(line, stream) {
                    // Nothing is asked for any more, and the destination lets go of this stream
                    // before it says that it has everything. If it was lost instead, the primary
                    // hears of that, since the destination sees it, too.
                    Err(JobError::Transport(error)) if self.missing.remaining_pages() == 0 => {
                        log::debug!("an urgent stream ended: {}", crate::error::chain(&error));
                    }
                    outcome => line.check(outcome),
                });
            }
            let outcome = before(primary);
            if outcome.is_ok() {
                line.following.store(true, Ordering::Release);
                for sender in senders {
                    scope.spawn(move || line.check(self.push(line, sender)));
                }
                line.check(self.read_return_path(line, primary));
            } else if let Err(error) = outcome {
                // Nothing else was sent on the primary meanwhile.
                if !matches!(error, JobError::Transport(_) | JobError::Peer(_)) {
                    primary.say_error(&error.to_remote());
                }
                line.fail(error);
            }
            line.over.store(true, Ordering::Release);
            line.shut();
        });
        let failure = line.failure.into_inner().unwrap_or_else(PoisonError::into_inner);
        failure.map_or(Ok(()), Err)
    }

    /// Answers what is asked for on an urgent stream.
    fn answer_requests(&self, line: &StreamGroup<'_>, stream: &mut Urgent) -> Result<(), JobError> {
        // Nothing comes while the guest finds what it needs.
        stream.reader.set_no_timeout();
        let mut taken = Vec::new();
        loop {
            let record = stream.reader.read()?;
            if record.kind != Kind::Request {
                return Err(unexpected(record.kind, record.payload, "a request"));
            }
            let (id, range) = (record.header.block(), record.header.range());
            let (at, block) = self.job.memory.find(id).ok_or(JobError::NoBlock { id })?;
            let pages = block.geometry.pages();
            if !range.fits(pages) {
                return Err(JobError::Outside {
                    id,
                    first: range.first,
                    count: range.count,
                    pages,
                });
            }
            line.cursor.fault(at, range.end());
            let asked = self.missing.block(at).covering(range);
            self.missing.take_range(at, asked, |word, bits| taken.push((word, bits)));
            let sent = self.send(&line.urgent, &mut stream.sender, (at, block), &mut taken)?;
            add(&self.job.live.requested_pages, sent);
            if sent == 0
                && let Some(kept) = &self.kept
            {
                taken.extend(kept.block(at).bits().nonzero_words(asked));
                self.send(&line.urgent, &mut stream.sender, (at, block), &mut taken)?;
            }
            if !stream.reader.has_more() {
                stream.sender.flush(&line.urgent)?;
            }
        }
    }

    /// Pushes until nothing is missing.
    fn push(&self, line: &StreamGroup<'_>, sender: &mut PageSender) -> Result<(), JobError> {
        crate::priority::lower();
        sender.totals = Totals::default();
        limit_send_queue(sender.socket().as_fd());
        let mut taken = Vec::new();
        while let Some((at, range)) = line.cursor.claim(&self.missing) {
            self.job.cancel.check()?;
            let block: &Block = &self.job.memory.blocks()[at];
            self.missing.take_range(at, range, |word, bits| taken.push((word, bits)));
            let sent = self.send(&line.bulk, sender, (at, block), &mut taken)?;
            sender.flush(&line.bulk)?;
            add(&self.job.live.pushed_pages, sent);
        }
        let payload = sender.totals.encode();
        sender.write(&self.job, RecordHeader::plain(Kind::End, 0, payload.len()), &payload)?;
        if line.pushing.fetch_sub(1, Ordering::AcqRel) == 1 {
            // A full eventfd is readable already.
            let _ = rustix::io::write(&line.pushed, &1u64.to_ne_bytes());
        }
        Ok(())
    }

    /// Queues host pages, words and their bits; returns how many pages that were.
    fn send(
        &self, view: &PassView<'_>, sender: &mut PageSender, (at, block): (usize, &Block),
        taken: &mut Vec<(u64, u64)>,
    ) -> Result<u64, JobError> {
        let host_pages = self.missing.block(at);
        let mut pages = 0;
        for (word, bits) in taken.drain(..) {
            pages += u64::from(bits.count_ones()) * host_pages.unit();
            if host_pages.unit() == 1 {
                sender.send_owed(view, (at, block), word, bits)?;
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

    /// Reads the return path until the destination has everything.
    fn read_return_path(
        &self, line: &StreamGroup<'_>, primary: &mut Primary,
    ) -> Result<(), JobError> {
        let OutgoingOptions { peer_timeout, hook_timeout, .. } = self.job.options();
        primary.reader.set_timeout(peer_timeout);
        // Once all is sent, the destination owes an answer: it places what is on its way, and
        // unregisters, before it gives it.
        let timeout = peer_timeout + 2 * hook_timeout;
        let mut due: Option<Instant> = None;
        let mut last_words: Option<Instant> = None;
        loop {
            while let Some(record) = primary.reader.try_read()? {
                due = due.map(|_| Instant::now() + timeout);
                match record.kind {
                    Kind::Complete => {
                        self.check_all_sent()?;
                        // First: the destination closes what it has when it gets the answer.
                        line.over.store(true, Ordering::Release);
                        primary.writer.write_plain(Kind::Complete, 0)?;
                        return Ok(());
                    }
                    Kind::Discard => self.drop_runs(&record.header, record.payload)?,
                    Kind::Placed if self.job.options().release => {
                        self.release(&record.header, record.payload)?
                    }
                    kind => {
                        return Err(unexpected(
                            kind,
                            record.payload,
                            "that the destination has everything",
                        ));
                    }
                }
            }
            if due.is_some_and(|due| Instant::now() >= due) {
                return Err(TransportError::Silent(timeout).into());
            }
            let mut look = Instant::now() + LOOK;
            if line.failed() {
                // Another stream did. The destination may be about to say why.
                let until = *last_words.get_or_insert_with(|| Instant::now() + LAST_WORDS);
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
                    self.job.cancel.wait(&[socket, (line.pushed.as_fd(), PollFlags::IN)], look)?;
                due = ready[1].then(|| Instant::now() + timeout);
            } else {
                self.job.cancel.wait(&[socket], look)?;
            }
        }
    }

    /// The destination says that it has everything: it cannot have what was not sent, and that is
    /// not to be lost.
    fn check_all_sent(&self) -> Result<(), JobError> {
        match self.missing.next_from(0, 0) {
            None => Ok(()),
            Some((at, host_page)) => {
                let first = self.missing.block(at).pages(PageRange::new(host_page, 1)).first;
                Err(JobError::NotSent { id: self.job.memory.blocks()[at].geometry.id, first })
            }
        }
    }

    fn runs_of<'a>(
        &self, header: &RecordHeader, payload: &'a [u8], kind: &'static str,
    ) -> Result<(usize, &Block, impl Iterator<Item = PageRange> + 'a), JobError> {
        let id = header.block();
        let (at, block) = self.job.memory.find(id).ok_or(JobError::NoBlock { id })?;
        let runs = decode_runs(payload, block.geometry.pages());
        Ok((at, block, runs.map_err(|source| JobError::Payload { kind, source })?))
    }

    /// The guest discarded pages at the destination: they need not be sent.
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

    /// The destination has pages: they are freed here.
    fn release(&self, header: &RecordHeader, payload: &[u8]) -> Result<(), JobError> {
        let (at, block, runs) = self.runs_of(header, payload, "placed")?;
        for run in runs {
            let host_pages = self.missing.block(at);
            // It cannot have what was not sent, and that is not to be lost.
            if let Some(host_page) = host_pages.bits().next_set(host_pages.covering(run)) {
                let first = host_pages.pages(PageRange::new(host_page, 1)).first;
                return Err(JobError::NotSent { id: block.geometry.id, first });
            }
            if let Some(kept) = &self.kept {
                kept.take_range(at, host_pages.covering(run), |_, _| {});
            }
            self.free(block, run)?;
        }
        Ok(())
    }

    fn free(&self, block: &Block, run: PageRange) -> Result<(), JobError> {
        let failed = |source| JobError::Backing { id: block.geometry.id, source };
        let freed = block.backing.punch(run).map_err(failed)?;
        add(&self.job.live.released_pages, freed.count);
        Ok(())
    }

    /// Frees what the destination needs no more, now that it has said what it is missing: what it
    /// said of that before may have been lost with the connection.
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

/// Queues all pages of a host page: the destination places them at once, so they follow each other
/// on one stream.
fn send_host_page(
    view: &PassView<'_>, sender: &mut PageSender, (at, block): (usize, &Block), pages: PageRange,
) -> Result<(), JobError> {
    for (word, mask) in words_of(pages) {
        sender.send_owed(view, (at, block), word, mask)?;
    }
    sender.end_zeros();
    Ok(())
}
