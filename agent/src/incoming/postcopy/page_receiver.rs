//! Receiving and placing, on all streams at once, until all is here or the connections break.
//!
//! Each stream has a thread that reads records and places their pages. The job's own thread tells
//! the source what the guest discarded, and what was placed if it wants to know, and sees the end:
//! every stream that is not urgent has ended, and nothing is missing. If one stream fails, all do.

use super::super::accept::Accepted;
use super::super::decompress::Decompressor;
use super::assembly::{Assembly, Whole};
use crate::job::{Job, JobError, add};
use crate::memory::Block;
use crate::memory::missing_pages::MissingPages;
use crate::outgoing::connect::unexpected;
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

/// Time between two tellings of what was placed.
const ACKNOWLEDGE: Duration = Duration::from_millis(20);
/// How long the job's thread waits at a stretch.
const LONG: Duration = Duration::from_secs(3600);

/// What comes over one set of connections.
pub struct PageReceiver<'a> {
    job: &'a Job,
    missing_pages: &'a MissingPages,
    readers: &'a mut [RecordReader],
    urgent: &'a mut [RecordReader],
    writer: &'a RecordWriter,
    features: u64,
    acknowledge: bool,
    sockets: Vec<StreamSocket>,
}

/// What all threads of it share.
struct StreamGroup<'a> {
    job: &'a Job,
    missing_pages: &'a MissingPages,
    features: u64,
    /// The source wants to know what was placed. Whoever comes after it may not.
    acknowledge: bool,
    sockets: Vec<StreamSocket>,
    /// Why it broke. The first to fail says, but for the peer's own words, which tell more.
    failure: Mutex<Option<JobError>>,
    failed: AtomicBool,
    over: AtomicBool,
    /// Streams that are not urgent and have ended.
    ended: AtomicUsize,
}

impl StreamGroup<'_> {
    fn fail(&self, error: JobError) {
        if self.over.load(Ordering::Acquire) {
            return;
        }
        let mute =
            matches!(error, JobError::Transport(_) | JobError::Peer(_) | JobError::Cancelled);
        let is_first = !self.failed.swap(true, Ordering::AcqRel);
        self.note(error);
        if !is_first {
            // Most often what the first one did to this stream. It must not end the primary, on
            // which the source is to be told of the first.
            return;
        }
        // The source is told why on the primary, when nobody else writes there any more.
        let (primary, others) =
            self.sockets.split_first().map_or((None, &[][..]), |(one, rest)| (Some(one), rest));
        others.iter().for_each(StreamSocket::shut);
        if let Some(primary) = primary {
            if mute { primary.shut() } else { primary.stop_reading() }
        }
        self.missing_pages.release_waiters();
        self.missing_pages.notify();
    }

    fn note(&self, error: JobError) {
        let mut failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
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
    /// Over the streams of `accepted`.
    pub fn new(job: &'a Job, missing_pages: &'a MissingPages, accepted: &'a mut Accepted) -> Self {
        let sockets = accepted.sockets();
        let Accepted { readers, urgent, writer, features, acknowledge, .. } = accepted;
        let (features, acknowledge) = (*features, *acknowledge);
        Self { job, missing_pages, readers, urgent, writer, features, acknowledge, sockets }
    }

    /// Receives what is asked for, runs `before` with the primary, and then receives the rest.
    ///
    /// # Errors
    /// What `before` says, or why the connections broke, which are all ended then.
    pub fn run(
        self, before: impl FnOnce(&mut RecordReader, &RecordWriter) -> Result<(), JobError>,
    ) -> Result<(), JobError> {
        let Self { job, missing_pages, readers, urgent, writer, features, acknowledge, sockets } =
            self;
        let urgent_sockets: Vec<StreamSocket> =
            urgent.iter().map(|reader| reader.socket().clone()).collect();
        let line = StreamGroup {
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
            let line = &line;
            for (index, reader) in urgent.iter_mut().enumerate() {
                scope.spawn(move || {
                    // Nothing comes unless it is asked for.
                    reader.set_no_timeout();
                    line.check(Stream::new(line, count + index, true).run(reader));
                });
            }
            let outcome = before(&mut readers[0], writer);
            if let Err(error) = outcome {
                // The streams are left as they are: the source is told why.
                line.note(error);
                // A VMM that is late with its state may wait for memory.
                missing_pages.release_waiters();
            } else {
                for (index, reader) in readers.iter_mut().enumerate() {
                    scope.spawn(move || {
                        crate::priority::lower();
                        limit_receive_queue(reader.socket().as_fd());
                        reader.set_timeout(line.job.options().peer_timeout);
                        line.check(Stream::new(line, index, false).run(reader));
                    });
                }
                line.check(report_until_complete(line, writer, count));
            }
            line.over.store(true, Ordering::Release);
            // Nothing more comes on these. The source is not to see an end before it is told that
            // all is here.
            urgent_sockets.iter().for_each(StreamSocket::stop_reading);
        });
        let failure = line.failure.into_inner().unwrap_or_else(PoisonError::into_inner);
        failure.map_or(Ok(()), Err)
    }
}

/// Tells the source what happens here, until all is here or the connections broke.
fn report_until_complete(
    line: &StreamGroup<'_>, writer: &RecordWriter, streams: usize,
) -> Result<(), JobError> {
    let timeout = line.job.options().peer_timeout;
    let mut due: Option<Instant> = None;
    loop {
        let mut count = [0; 8];
        // Only resets the descriptor.
        let _ = rustix::io::read(line.missing_pages.event(), &mut count);
        if line.failed.load(Ordering::Acquire) {
            return Ok(());
        }
        report(line, writer)?;
        let ended = line.ended.load(Ordering::Acquire) == streams;
        let left = line.missing_pages.missing().remaining_pages();
        if ended && left == 0 {
            // Whoever took the last of it may still be placing it, and would have to give it back
            // if that failed.
            line.job.memory.readers.wait(|_, _| true);
            if line.missing_pages.missing().remaining_pages() == 0 {
                // What was discarded or placed last.
                return report(line, writer);
            }
        }
        if ended {
            // What was asked for may still be on its way.
            let due = *due.get_or_insert_with(|| Instant::now() + timeout);
            if Instant::now() >= due {
                let message = format!(
                    "the source says that it sent everything, and {left} pages have not come"
                );
                return Err(JobError::State(message));
            }
        }
        let moment = if line.acknowledge { ACKNOWLEDGE } else { LONG };
        let until = due.unwrap_or_else(|| Instant::now() + moment).min(Instant::now() + moment);
        line.job.cancel.wait(&[(line.missing_pages.event(), PollFlags::IN)], until)?;
    }
}

fn report(line: &StreamGroup<'_>, writer: &RecordWriter) -> Result<(), JobError> {
    for (at, block) in line.job.memory.blocks().iter().enumerate() {
        send_runs(line, writer, Kind::Discard, block, &line.missing_pages.take_dropped(at))?;
        if line.acknowledge {
            send_runs(line, writer, Kind::Placed, block, &line.missing_pages.take_placed(at))?;
        }
    }
    Ok(())
}

fn send_runs(
    line: &StreamGroup<'_>, writer: &RecordWriter, kind: Kind, block: &Block, runs: &[PageRange],
) -> Result<(), JobError> {
    for part in runs.chunks(MAX_RUNS) {
        let payload = encode_runs(part);
        let pages = part.iter().map(|run| run.count).sum();
        let header =
            RecordHeader::new(kind, 0, block.geometry.id, PageRange::new(0, pages), payload.len());
        add(&line.job.live.wire_bytes, writer.write(header, &payload)?);
    }
    Ok(())
}

/// One stream's reader.
struct Stream<'a> {
    line: &'a StreamGroup<'a>,
    /// Its number among all, which is that of its place in the fence.
    index: usize,
    urgent: bool,
    decompressor: Decompressor,
    assembly: Assembly,
    counted: Totals,
}

impl<'a> Stream<'a> {
    fn new(line: &'a StreamGroup<'a>, index: usize, urgent: bool) -> Self {
        let decompressor = Decompressor::new(line.features);
        Self {
            line,
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
            add(&self.line.job.live.wire_bytes, record.wire_bytes());
            match record.kind {
                Kind::Data => self.data(&record.header, record.payload)?,
                Kind::Zero => self.zero(&record.header)?,
                Kind::End if !self.urgent => return self.end(record.payload),
                kind => return Err(unexpected(kind, record.payload, "pages, or the end")),
            }
        }
    }

    fn block_of(&self, header: &RecordHeader) -> Result<(usize, &'a Block), JobError> {
        let (id, range) = (header.block(), header.range());
        let (at, block) = self.line.job.memory.find(id).ok_or(JobError::NoBlock { id })?;
        let pages = block.geometry.pages();
        if !range.fits(pages) {
            return Err(JobError::Outside { id, first: range.first, count: range.count, pages });
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
        let StreamGroup { job, missing_pages, .. } = self.line;
        let (readers, unit) = (&job.memory.readers, missing_pages.missing().block(at).unit());
        if unit == 1 {
            let placed = missing_pages.place_pages(readers, self.index, at, range, pages);
            placed.map_err(|error| JobError::not_placed(&job.memory, at, error))?;
        } else {
            let place = placer(self.line, self.index, at);
            self.assembly.add((at, block.geometry.id), unit, range, Some(pages), place)?;
        }
        add(&job.live.pages_sent, range.count);
        self.counted.data_pages += range.count;
        self.count_stray(header);
        Ok(())
    }

    fn zero(&mut self, header: &RecordHeader) -> Result<(), JobError> {
        let (at, block) = self.block_of(header)?;
        let range = header.range();
        let StreamGroup { job, missing_pages, .. } = self.line;
        let unit = missing_pages.missing().block(at).unit();
        if unit == 1 {
            let placed = missing_pages.place_zeroes(&job.memory.readers, self.index, at, range);
            placed.map_err(|error| JobError::not_placed(&job.memory, at, error))?;
        } else {
            let place = placer(self.line, self.index, at);
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
            add(&self.line.job.live.stray_pages, header.range().count);
        }
    }

    fn end(&mut self, payload: &[u8]) -> Result<(), JobError> {
        let claimed =
            Totals::decode(payload).map_err(|source| JobError::Payload { kind: "end", source })?;
        super::super::compare(&claimed, &self.counted)?;
        if let Some((at, open)) = self.assembly.open() {
            let id = self.line.job.memory.blocks()[at].geometry.id;
            return Err(JobError::Torn { id, first: 0, count: 0, open });
        }
        self.line.ended.fetch_add(1, Ordering::AcqRel);
        self.line.missing_pages.notify();
        Ok(())
    }
}

/// Places host pages that are whole.
fn placer<'a>(
    line: &'a StreamGroup<'_>, worker: usize, at: usize,
) -> impl FnMut(Whole<'_>) -> Result<(), JobError> + 'a {
    let (missing_pages, readers) = (line.missing_pages, &line.job.memory.readers);
    move |whole| {
        let placed = match whole {
            Whole::Zeroes(range) => missing_pages.place_zeroes(readers, worker, at, range),
            Whole::Content(host_page, bytes) => {
                missing_pages.place_host_page(readers, worker, at, host_page, bytes)
            }
        };
        placed.map(drop).map_err(|error| JobError::not_placed(&line.job.memory, at, error))
    }
}

/// The last words of both sides.
///
/// # Errors
/// If the source may not know that all is here.
pub fn send_complete(job: &Job, accepted: &mut Accepted) -> Result<(), JobError> {
    accepted.writer.write_plain(Kind::Complete, 0)?;
    let primary = &mut accepted.readers[0];
    primary.set_timeout(job.options().peer_timeout);
    let record = primary.read()?;
    match record.kind {
        Kind::Complete => Ok(()),
        kind => Err(unexpected(kind, record.payload, "that the source knows that all is here")),
    }
}
