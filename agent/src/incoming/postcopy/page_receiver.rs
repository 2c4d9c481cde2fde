// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Receiving and placing pages on all streams, until none is missing or a connection breaks.
//!
//! One thread for each stream reads records and places their pages. The job's thread reports to the
//! source which missing pages the guest discarded, and which pages were placed if the source wants
//! to know. It also detects the end: all streams that are not urgent have ended, and no page is
//! missing.
//!
//! If one stream fails, all end. The source is told why on the primary, unless that is broken, too.

use super::super::decompress::Decompressor;
use super::super::job::IncomingJob;
use super::super::offer::Accepted;
use super::assembly::{Assembly, CompleteHostPage};
use crate::incoming::IncomingError;
use crate::job::{JobError, add};
use crate::lock::lock;
use crate::memory::Block;
use crate::memory::MemoryError;
use crate::memory::missing_pages::MissingPages;
use crate::sandbox::{ThreadKind, enter_thread};
use crate::transport::StreamError;
use crate::transport::socket_queue::limit_receive_queue;
use crate::transport::{RecordReader, RecordWriter, StreamSocket};
use pageferry_protocol::memory::PageRange;
use pageferry_protocol::stream::payload::{MAX_RUNS, Totals, encode_runs};
use pageferry_protocol::stream::record::{FLAG_STRAY, FLAGS_COMPRESSED};
use pageferry_protocol::stream::{Kind, RecordHeader};
use rustix::event::PollFlags;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Interval between two reports of placed pages.
const ACKNOWLEDGE: Duration = Duration::from_millis(20);
/// Longest single wait of the job's thread.
const LONGEST_WAIT: Duration = Duration::from_secs(3600);

/// Receives pages on one set of connections.
pub struct PageReceiver<'a> {
    job: &'a IncomingJob,
    missing_pages: &'a MissingPages,
    readers: &'a mut [RecordReader],
    urgent: &'a mut [RecordReader],
    writer: &'a RecordWriter,
    features: u64,
    acknowledge: bool,
    sockets: Vec<StreamSocket>,
}

/// What the threads of one set of connections share.
struct StreamGroup<'a> {
    job: &'a IncomingJob,
    missing_pages: &'a MissingPages,
    features: u64,
    /// The source wants to know what was placed. A recovered source may want another answer.
    acknowledge: bool,
    sockets: Vec<StreamSocket>,
    /// Why it failed: the first error, unless the peer sent its own reason, which tells more.
    failure: Mutex<Option<JobError>>,
    failed: AtomicBool,
    over: AtomicBool,
    /// Number of streams that are not urgent and have ended.
    ended: AtomicUsize,
}

impl StreamGroup<'_> {
    fn fail(&self, error: JobError) {
        if self.over.load(Ordering::Acquire) {
            return;
        }
        let nothing_to_tell =
            matches!(error, JobError::Transport(_) | JobError::Peer(_) | JobError::Cancelled);
        let is_first = !self.failed.swap(true, Ordering::AcqRel);
        self.note(error);
        if !is_first {
            // Most often a consequence of the first failure. The primary must stay open: the source
            // will be told of the first failure on it.
            return;
        }
        // The source is told why on the primary, after all other threads have stopped writing
        // there.
        let (primary, others) =
            self.sockets.split_first().map_or((None, &[][..]), |(one, rest)| (Some(one), rest));
        others.iter().for_each(StreamSocket::shut_down);
        if let Some(primary) = primary {
            if nothing_to_tell { primary.shut_down() } else { primary.end_receiving() }
        }
        self.missing_pages.release_waiters();
        self.missing_pages.notify();
    }

    fn note(&self, error: JobError) {
        let mut failure = lock(&self.failure);
        if failure.is_none() || matches!(error, JobError::Peer(_)) {
            *failure = Some(error);
        }
    }

    fn check(&self, outcome: Result<(), JobError>) {
        if let Err(error) = outcome {
            self.fail(error);
        }
    }
}

impl<'a> PageReceiver<'a> {
    /// Receives on the streams of `accepted`.
    pub fn new(
        job: &'a IncomingJob, missing_pages: &'a MissingPages, accepted: &'a mut Accepted,
    ) -> Self {
        let sockets = accepted.sockets();
        let Accepted { readers, urgent, writer, features, acknowledge, .. } = accepted;
        let (features, acknowledge) = (*features, *acknowledge);
        Self { job, missing_pages, readers, urgent, writer, features, acknowledge, sockets }
    }

    /// Receives requested pages on the urgent streams, runs `before` with the primary, and then
    /// receives the rest on all streams.
    ///
    /// # Errors
    /// The error of `before`, or the reason why a stream failed. All streams have ended then.
    pub fn run(
        self, before: impl FnOnce(&mut RecordReader, &RecordWriter) -> Result<(), JobError>,
    ) -> Result<(), JobError> {
        let Self { job, missing_pages, readers, urgent, writer, features, acknowledge, sockets } =
            self;
        let urgent_sockets: Vec<StreamSocket> =
            urgent.iter().map(|reader| reader.socket().clone()).collect();
        let group = StreamGroup {
            job,
            missing_pages,
            features,
            acknowledge,
            sockets,
            failure: Mutex::default(),
            failed: AtomicBool::new(false),
            over: AtomicBool::new(false),
            ended: AtomicUsize::new(0),
        };
        let count = readers.len();
        std::thread::scope(|scope| {
            let group = &group;
            for (index, reader) in urgent.iter_mut().enumerate() {
                scope.spawn(move || {
                    enter_thread(ThreadKind::Pages);
                    // A page comes only if it was requested, so there is no deadline for it.
                    reader.set_no_timeout();
                    group.check(Stream::new(group, count + index, true).run(reader));
                });
            }
            let outcome = before(&mut readers[0], writer);
            if let Err(error) = outcome {
                // The streams stay as they are, so that the source can be told why.
                group.note(error);
                // The VMM may be late with loading its state because it waits for memory.
                missing_pages.release_waiters();
            } else {
                for (index, reader) in readers.iter_mut().enumerate() {
                    scope.spawn(move || {
                        enter_thread(ThreadKind::Pages);
                        crate::priority::lower();
                        limit_receive_queue(reader.socket().as_fd());
                        reader.set_timeout(group.job.options.peer_timeout);
                        group.check(Stream::new(group, index, false).run(reader));
                    });
                }
                group.check(report_until_complete(group, writer, count));
            }
            group.over.store(true, Ordering::Release);
            // Nothing more comes on the urgent streams. Do not close them: the source must not see
            // their end before it is told that all memory is here.
            urgent_sockets.iter().for_each(StreamSocket::end_receiving);
        });
        let failure = group.failure.into_inner().unwrap_or_else(PoisonError::into_inner);
        failure.map_or(Ok(()), Err)
    }
}

/// Reports to the source until no page is missing or a stream has failed.
fn report_until_complete(
    group: &StreamGroup<'_>, writer: &RecordWriter, streams: usize,
) -> Result<(), JobError> {
    let timeout = group.job.options.peer_timeout;
    let mut due: Option<Instant> = None;
    loop {
        group.missing_pages.event().reset();
        if group.failed.load(Ordering::Acquire) {
            return Ok(());
        }
        report(group, writer)?;
        let ended = group.ended.load(Ordering::Acquire) == streams;
        let left = group.missing_pages.missing().remaining_pages();
        if ended && left == 0 {
            // The thread that took the last page may still be placing it. If that fails it makes
            // the page missing again. So wait for it and look again.
            group.job.memory.readers.wait(|_, _| true);
            if group.missing_pages.missing().remaining_pages() == 0 {
                // Report the pages that were discarded or placed last.
                return report(group, writer);
            }
        }
        if ended {
            // Requested pages may still be on their way.
            let due = *due.get_or_insert_with(|| Instant::now() + timeout);
            if Instant::now() >= due {
                let message = format!(
                    "the source says that it sent everything, and {left} pages have not come"
                );
                return Err(JobError::Protocol(message));
            }
        }
        let moment = if group.acknowledge { ACKNOWLEDGE } else { LONGEST_WAIT };
        let until = due.unwrap_or_else(|| Instant::now() + moment).min(Instant::now() + moment);
        group.job.cancel.wait(&[(group.missing_pages.event().as_fd(), PollFlags::IN)], until)?;
    }
}

fn report(group: &StreamGroup<'_>, writer: &RecordWriter) -> Result<(), JobError> {
    for (at, block) in group.job.memory.blocks().iter().enumerate() {
        send_runs(group, writer, Kind::Discard, block, &group.missing_pages.take_dropped(at))?;
        if group.acknowledge {
            send_runs(group, writer, Kind::Placed, block, &group.missing_pages.take_placed(at))?;
        }
    }
    Ok(())
}

fn send_runs(
    group: &StreamGroup<'_>, writer: &RecordWriter, kind: Kind, block: &Block, runs: &[PageRange],
) -> Result<(), JobError> {
    for part in runs.chunks(MAX_RUNS) {
        let payload = encode_runs(part);
        let pages = part.iter().map(|run| run.count).sum();
        let header =
            RecordHeader::new(kind, 0, block.geometry.id, PageRange::new(0, pages), payload.len());
        add(&group.job.live.wire_bytes, writer.write(header, &payload)?);
    }
    Ok(())
}

/// Reads one stream.
struct Stream<'a> {
    group: &'a StreamGroup<'a>,
    /// Its number among all streams, which is also its slot in the fence.
    index: usize,
    urgent: bool,
    decompressor: Decompressor,
    assembly: Assembly,
    counted: Totals,
}

impl<'a> Stream<'a> {
    fn new(group: &'a StreamGroup<'a>, index: usize, urgent: bool) -> Self {
        let decompressor = Decompressor::new(group.features);
        Self {
            group,
            index,
            urgent,
            decompressor,
            assembly: Assembly::default(),
            counted: Totals::default(),
        }
    }

    fn run(&mut self, reader: &mut RecordReader) -> Result<(), JobError> {
        loop {
            let record = reader.read()?;
            add(&self.group.job.live.wire_bytes, record.wire_bytes());
            match record.kind {
                Kind::Data => self.data(&record.header, record.payload)?,
                Kind::Zero => self.zero(&record.header)?,
                Kind::End if !self.urgent => return self.end(record.payload),
                kind => {
                    return Err(
                        StreamError::unexpected(kind, record.payload, "pages, or the end").into()
                    );
                }
            }
        }
    }

    fn block_of(&self, header: &RecordHeader) -> Result<(usize, &'a Block), JobError> {
        let (id, range) = (header.block(), header.range());
        let (at, block) = self.group.job.memory.find(id).ok_or(StreamError::NoBlock { id })?;
        let pages = block.geometry.pages();
        if !range.fits(pages) {
            return Err(
                StreamError::Outside { id, first: range.first, count: range.count, pages }.into()
            );
        }
        Ok((at, block))
    }

    fn data(&mut self, header: &RecordHeader, payload: &[u8]) -> Result<(), JobError> {
        let (at, block) = self.block_of(header)?;
        let range = header.range();
        let pages = if header.flags() & FLAGS_COMPRESSED == 0 {
            payload
        } else {
            self.decompressor.unpack(header, payload)?
        };
        let StreamGroup { job, missing_pages, .. } = self.group;
        let (readers, unit) = (&job.memory.readers, missing_pages.missing().block(at).unit());
        if unit == 1 {
            let placed = missing_pages.place_pages(readers, self.index, at, range, pages);
            placed.map_err(|error| MemoryError::not_placed(&job.memory.blocks()[at], error))?;
        } else {
            let place = placer(self.group, self.index, at);
            self.assembly.add((at, block.geometry.id), unit, range, Some(pages), place)?;
        }
        add(&job.live.pages_received, range.count);
        self.counted.data_pages += range.count;
        self.count_stray(header);
        Ok(())
    }

    fn zero(&mut self, header: &RecordHeader) -> Result<(), JobError> {
        let (at, block) = self.block_of(header)?;
        let range = header.range();
        let StreamGroup { job, missing_pages, .. } = self.group;
        let unit = missing_pages.missing().block(at).unit();
        if unit == 1 {
            let placed = missing_pages.place_zeroes(&job.memory.readers, self.index, at, range);
            placed.map_err(|error| MemoryError::not_placed(&job.memory.blocks()[at], error))?;
        } else {
            let place = placer(self.group, self.index, at);
            self.assembly.add((at, block.geometry.id), unit, range, None, place)?;
        }
        add(&job.live.zero_pages, range.count);
        self.counted.zero_pages += range.count;
        self.count_stray(header);
        Ok(())
    }

    fn count_stray(&mut self, header: &RecordHeader) {
        if header.flags() & FLAG_STRAY != 0 {
            self.counted.stray_pages += header.range().count;
            add(&self.group.job.live.stray_pages, header.range().count);
        }
    }

    fn end(&mut self, payload: &[u8]) -> Result<(), JobError> {
        let claimed = Totals::decode(payload)
            .map_err(|source| StreamError::Payload { kind: "end", source })?;
        super::super::compare(&claimed, &self.counted)?;
        if let Some((at, open)) = self.assembly.open() {
            let id = self.group.job.memory.blocks()[at].geometry.id;
            return Err(IncomingError::HostPageInterrupted { id, first: 0, count: 0, open }.into());
        }
        self.group.ended.fetch_add(1, Ordering::AcqRel);
        self.group.missing_pages.notify();
        Ok(())
    }
}

/// Returns a function that places complete host pages.
fn placer<'a>(
    group: &'a StreamGroup<'_>, worker: usize, at: usize,
) -> impl FnMut(CompleteHostPage<'_>) -> Result<(), JobError> + 'a {
    let (missing_pages, readers) = (group.missing_pages, &group.job.memory.readers);
    move |host_page| {
        let placed = match host_page {
            CompleteHostPage::Zeroes(range) => {
                missing_pages.place_zeroes(readers, worker, at, range)
            }
            CompleteHostPage::Content(host_page, bytes) => {
                missing_pages.place_host_page(readers, worker, at, host_page, bytes)
            }
        };
        placed.map_err(|error| MemoryError::not_placed(&group.job.memory.blocks()[at], error))?;
        Ok(())
    }
}

/// Ends the postcopy: sends COMPLETE and waits for the COMPLETE of the source.
///
/// # Errors
/// If the source may not know that all memory is here.
pub fn send_complete(job: &IncomingJob, accepted: &mut Accepted) -> Result<(), JobError> {
    accepted.writer.write_plain(Kind::Complete, 0)?;
    let primary = &mut accepted.readers[0];
    primary.set_timeout(job.options.peer_timeout);
    let record = primary.read()?;
    match record.kind {
        Kind::Complete => Ok(()),
        kind => Err(StreamError::unexpected(
            kind,
            record.payload,
            "that the source knows that all is here",
        )
        .into()),
    }
}
