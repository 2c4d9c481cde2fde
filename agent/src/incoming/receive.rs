// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Receiving the passes of a migration, with a barrier after each pass.
//!
//! One thread for each stream reads records and places their pages. A stream that has ended a pass
//! waits at the barrier until all streams have ended it. So no page of the next pass is placed
//! earlier, and the last record about a page is also the last one placed, whatever stream each of
//! them came on. When all streams are at the barrier, the source gets PASS_DONE, and they continue.
//!
//! If one stream fails, the barrier opens for all others with an error.

use super::decompress::Decompressor;
use super::offer::Accepted;
use super::place::Placer;
use crate::job::{Job, JobError};
use crate::lock::lock;
use crate::sandbox::{ThreadKind, enter_thread};
use crate::stats::worker::WorkerCounters;
use crate::transport::StreamError;
use crate::transport::{RecordReader, RecordWriter, StreamSocket};
use pageferry_protocol::control::job::RunState;
use pageferry_protocol::control::state_pieces::{MAX_PIECES, MAX_STATE};
use pageferry_protocol::memory::PageRange;
use pageferry_protocol::stream::hello::FEATURE_POSTCOPY;
use pageferry_protocol::stream::payload::{StatePart, Totals, decode_runs};
use pageferry_protocol::stream::record::{FLAG_PAUSED, FLAG_STRAY, FLAGS_COMPRESSED};
use pageferry_protocol::stream::{Kind, RecordHeader};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// What all streams received.
#[derive(Debug)]
pub struct Received {
    /// The totals that the source says it sent.
    pub claimed: Totals,
    /// The totals that were counted here.
    pub counted: Totals,
    /// The pieces of the VMM's state, each with its name.
    pub state: Vec<(String, Vec<u8>)>,
    /// Postcopy follows: the guest runs before the rest of its memory comes.
    pub postcopy: bool,
    /// The run state that the guest will have here, as the source says.
    pub guest: RunState,
}

/// What a stream has counted is published when it has received this many bytes, or waits for more.
const BATCH: u64 = 256 << 10;

/// Receives all passes on all streams.
pub fn receive(
    job: &Job, accepted: &mut Accepted, placer: &Placer<'_>,
) -> Result<Received, JobError> {
    let barrier = Barrier::new(accepted.readers.len());
    let (writer, features) = (&accepted.writer, accepted.features);
    let secondaries: Vec<StreamSocket> =
        accepted.readers.iter().skip(1).map(|reader| reader.socket().clone()).collect();
    // Wakes the other streams of a job that has failed. The primary stays open for reading: its
    // next record wakes it, and the source gets our error only if its last records are read.
    let wake = || {
        for socket in &secondaries {
            let _ = rustix::net::shutdown(socket, rustix::net::Shutdown::Read);
        }
    };
    let results: Vec<Result<StreamEnd, JobError>> = std::thread::scope(|scope| {
        let threads: Vec<_> = accepted
            .readers
            .iter_mut()
            .enumerate()
            .map(|(index, reader)| {
                let (barrier, wake) = (&barrier, &wake);
                scope.spawn(move || {
                    enter_thread(ThreadKind::Pages);
                    let mut stream = Stream::new(job, placer, barrier, writer, index, features);
                    let outcome = stream.run(reader);
                    if outcome.is_err() {
                        barrier.fail();
                        wake();
                    }
                    outcome
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap_or(Err(JobError::Panicked))).collect()
    });
    combine(results)
}

/// Combines the results of the streams. A stream that failed only because another one failed says
/// so, and then the error of the other one is returned.
fn combine(results: Vec<Result<StreamEnd, JobError>>) -> Result<Received, JobError> {
    let mut received: Option<Received> = None;
    let mut failure: Option<JobError> = None;
    for (index, result) in results.into_iter().enumerate() {
        match result {
            Ok(end) => {
                let received = received.get_or_insert_with(|| Received {
                    claimed: Totals::default(),
                    counted: Totals::default(),
                    state: Vec::new(),
                    postcopy: end.postcopy,
                    guest: end.guest,
                });
                received.counted = sum(&received.counted, &end.counted);
                if index == 0 {
                    received.claimed = end.claimed;
                    received.state = end.state;
                } else if end.postcopy != received.postcopy {
                    failure = Some(JobError::Protocol(
                        "one stream says that postcopy follows, another that it does not".into(),
                    ));
                } else if end.guest != received.guest {
                    failure = Some(JobError::Protocol(
                        "one stream says that the guest stays paused, another that it runs".into(),
                    ));
                } else if let Err(error) = super::compare(&end.claimed, &end.counted) {
                    failure = Some(error);
                }
            }
            Err(error) => {
                let consequence = |error: &JobError| matches!(error, JobError::OtherStreamFailed);
                if failure.as_ref().is_none_or(consequence) {
                    failure = Some(error);
                }
            }
        }
    }
    match (failure, received) {
        (None, Some(received)) => Ok(received),
        (Some(error), _) => Err(error),
        (None, None) => Err(JobError::Protocol("no stream".into())),
    }
}

fn sum(one: &Totals, other: &Totals) -> Totals {
    Totals {
        data_pages: one.data_pages + other.data_pages,
        zero_pages: one.zero_pages + other.zero_pages,
        discarded_pages: one.discarded_pages + other.discarded_pages,
        stray_pages: one.stray_pages + other.stray_pages,
        passes: one.passes.max(other.passes),
        remaining_pages: one.remaining_pages + other.remaining_pages,
    }
}

/// What one stream received.
#[derive(Debug)]
struct StreamEnd {
    claimed: Totals,
    counted: Totals,
    state: Vec<(String, Vec<u8>)>,
    postcopy: bool,
    guest: RunState,
}

/// Reads one stream.
struct Stream<'a> {
    job: &'a Job,
    placer: &'a Placer<'a>,
    barrier: &'a Barrier,
    writer: &'a RecordWriter,
    index: usize,
    decompressor: Decompressor,
    may_postcopy: bool,
    counted: Totals,
    /// What was counted and not published yet.
    counters: WorkerCounters,
    state: StateCollector,
}

impl<'a> Stream<'a> {
    fn new(
        job: &'a Job, placer: &'a Placer<'a>, barrier: &'a Barrier, writer: &'a RecordWriter,
        index: usize, features: u64,
    ) -> Self {
        let (decompressor, may_postcopy) =
            (Decompressor::new(features), features & FEATURE_POSTCOPY != 0);
        Self {
            job,
            placer,
            barrier,
            writer,
            index,
            decompressor,
            may_postcopy,
            counted: Totals::default(),
            counters: WorkerCounters::default(),
            state: StateCollector::default(),
        }
    }

    fn run(&mut self, reader: &mut RecordReader) -> Result<StreamEnd, JobError> {
        let outcome = self.receive(reader);
        self.counters.publish(&self.job.live);
        outcome
    }

    fn receive(&mut self, reader: &mut RecordReader) -> Result<StreamEnd, JobError> {
        loop {
            if self.counters.wire_bytes >= BATCH {
                self.counters.publish(&self.job.live);
            }
            let record = reader.read_after(|| self.counters.publish(&self.job.live))?;
            // An ERROR record says why the source failed. That tells more than `OTHER_FAILED`.
            if record.kind != Kind::Error {
                self.barrier.check()?;
            }
            self.counters.wire_bytes += record.wire_bytes();
            match record.kind {
                Kind::Data => self.data(&record.header, record.payload)?,
                Kind::Zero => {
                    self.placer.place_zero(&record.header)?;
                    self.counted.zero_pages += record.header.range().count;
                    self.counters.zero_pages += record.header.range().count;
                    self.count_stray(&record.header);
                }
                Kind::PassEnd => self.end_pass(record.header.number())?,
                // Records that order the passes, or are not pages, come on the primary only.
                Kind::Discard if self.index == 0 => self.discard(&record.header, record.payload)?,
                Kind::State if self.index == 0 => self.state.add(record.payload)?,
                Kind::Remaining if self.index == 0 && self.may_postcopy => {
                    self.counted.remaining_pages +=
                        self.placer.expect_remaining(&record.header, record.payload)?;
                }
                Kind::End => {
                    let postcopy = match record.header.number() {
                        0 => false,
                        1 if self.may_postcopy => true,
                        number => {
                            return Err(JobError::Protocol(format!(
                                "end with number {number}, allowed: 0, and 1 with postcopy"
                            )));
                        }
                    };
                    let paused = record.header.flags() & FLAG_PAUSED != 0;
                    let guest = if paused { RunState::Paused } else { RunState::Running };
                    let claimed = Totals::decode(record.payload);
                    let claimed =
                        claimed.map_err(|source| StreamError::Payload { kind: "end", source })?;
                    let state = std::mem::take(&mut self.state).finish()?;
                    return Ok(StreamEnd {
                        claimed,
                        counted: self.counted,
                        state,
                        postcopy,
                        guest,
                    });
                }
                kind => {
                    return Err(StreamError::unexpected(
                        kind,
                        record.payload,
                        "pages, the end of a pass, or the end",
                    )
                    .into());
                }
            }
        }
    }

    fn data(&mut self, header: &RecordHeader, payload: &[u8]) -> Result<(), JobError> {
        let pages = if header.flags() & FLAGS_COMPRESSED == 0 {
            payload
        } else {
            self.decompressor.unpack(header, payload)?
        };
        self.placer.place_data(header, pages)?;
        self.counted.data_pages += header.range().count;
        self.counters.pages_received += header.range().count;
        self.count_stray(header);
        Ok(())
    }

    fn count_stray(&mut self, header: &RecordHeader) {
        if header.flags() & FLAG_STRAY != 0 {
            self.counted.stray_pages += header.range().count;
            self.counters.stray_pages += header.range().count;
        }
    }

    fn discard(&mut self, header: &RecordHeader, payload: &[u8]) -> Result<(), JobError> {
        // The header of a DISCARD names the block, and the payload names the pages.
        let (at, block) = self.placer.block_of(header, PageRange::default())?;
        let runs = decode_runs(payload, block.geometry.pages());
        for run in runs.map_err(|source| StreamError::Payload { kind: "discard", source })? {
            self.placer.place_discard(at, block, run)?;
            self.counted.discarded_pages += run.count;
            self.counters.discarded_pages += run.count;
        }
        Ok(())
    }

    fn end_pass(&mut self, number: u64) -> Result<(), JobError> {
        let expected = self.counted.passes;
        if number != expected {
            return Err(
                StreamError::Pass { stream: self.index as u16, found: number, expected }.into()
            );
        }
        self.counted.passes += 1;
        self.counters.publish(&self.job.live);
        self.barrier.arrive(|| {
            self.placer.end_pass()?;
            self.job.count(|counters| counters.passes = number + 1);
            self.job.announce();
            Ok(self.writer.write_plain(Kind::PassDone, number).map(|_| ())?)
        })
    }
}

/// The barrier at which the streams wait at the end of each pass.
#[derive(Debug)]
struct Barrier {
    streams: usize,
    /// Not under the lock, because it is read for every record.
    failed: AtomicBool,
    state: Mutex<BarrierState>,
    opened: Condvar,
}

#[derive(Debug, Default)]
struct BarrierState {
    arrived: usize,
    generation: u64,
}

impl Barrier {
    fn new(streams: usize) -> Self {
        Self {
            streams,
            failed: AtomicBool::new(false),
            state: Mutex::default(),
            opened: Condvar::new(),
        }
    }

    fn state(&self) -> MutexGuard<'_, BarrierState> {
        lock(&self.state)
    }

    /// Waits for all streams. The last one runs `all_here` before any of them continues.
    fn arrive(&self, all_here: impl FnOnce() -> Result<(), JobError>) -> Result<(), JobError> {
        let mut state = self.state();
        state.arrived += 1;
        if state.arrived == self.streams {
            let outcome = all_here();
            state.arrived = 0;
            state.generation += 1;
            self.opened.notify_all();
            return outcome;
        }
        let generation = state.generation;
        while state.generation == generation && !self.failed.load(Ordering::Relaxed) {
            state = self.opened.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        drop(state);
        self.check()
    }

    fn fail(&self) {
        // Set under the lock, so that no stream is between its check and its wait.
        let state = self.state();
        self.failed.store(true, Ordering::Relaxed);
        drop(state);
        self.opened.notify_all();
    }

    fn check(&self) -> Result<(), JobError> {
        if self.failed.load(Ordering::Relaxed) { Err(JobError::OtherStreamFailed) } else { Ok(()) }
    }
}

/// Assembles the pieces of the VMM's state from their parts.
#[derive(Debug, Default)]
struct StateCollector {
    pieces: Vec<(String, Vec<u8>)>,
    /// The length that the last piece will have.
    expected: u64,
    total: u64,
}

impl StateCollector {
    fn add(&mut self, payload: &[u8]) -> Result<(), JobError> {
        let part = StatePart::decode(payload)
            .map_err(|source| StreamError::Payload { kind: "state", source })?;
        self.total += part.bytes.len() as u64;
        if self.total > MAX_STATE {
            return Err(JobError::State(format!("more than {MAX_STATE} bytes came")));
        }
        let count = self.pieces.len();
        match self.pieces.last_mut() {
            Some((name, bytes)) if (bytes.len() as u64) < self.expected => {
                if name != part.name
                    || part.length != self.expected
                    || part.offset != bytes.len() as u64
                {
                    let (found, at) = (part.name, part.offset);
                    let message = format!(
                        "part of \"{found}\" at {at} where {} of \"{name}\" was expected",
                        bytes.len()
                    );
                    return Err(JobError::State(message));
                }
                bytes.extend_from_slice(part.bytes);
            }
            _ if part.offset != 0 || count >= MAX_PIECES => {
                let message = format!("piece {count} \"{}\" begins at {}", part.name, part.offset);
                return Err(JobError::State(message));
            }
            _ => {
                self.expected = part.length;
                self.pieces.push((part.name.to_owned(), part.bytes.to_vec()));
            }
        }
        Ok(())
    }

    fn finish(self) -> Result<Vec<(String, Vec<u8>)>, JobError> {
        match self.pieces.last() {
            Some((name, bytes)) if (bytes.len() as u64) < self.expected => {
                let message =
                    format!("\"{name}\" ends after {} of {} bytes", bytes.len(), self.expected);
                Err(JobError::State(message))
            }
            _ => Ok(self.pieces),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::placement::HugePageUse;
    use crate::memory::test_support::{job, memory};
    use pageferry_protocol::memory::PAGE_SIZE;
    use std::os::unix::net::UnixStream;
    use std::time::Duration;

    fn part<'a>(name: &'a str, length: u64, offset: u64, bytes: &'a [u8]) -> Vec<u8> {
        StatePart { name, length, offset, bytes }.encode()
    }

    /// Receives records on one stream, for a block of 64 pages. Returns the passes that were
    /// answered.
    fn received(
        features: u64, records: &[(RecordHeader, &[u8])],
    ) -> Result<(Received, Vec<u64>), JobError> {
        let job = job(memory(&[64]));
        let placer = Placer::prepare(&job, HugePageUse::WhereWhole).unwrap();
        let (ours, theirs) = UnixStream::pair().unwrap();
        let socket =
            |end: UnixStream| StreamSocket::new(end.into(), Duration::from_secs(60)).unwrap();
        let (ours, theirs) = (socket(ours), socket(theirs));
        let source = RecordWriter::new(theirs.clone());
        records.iter().for_each(|(header, payload)| _ = source.write(*header, payload).unwrap());
        let mut accepted = Accepted {
            readers: vec![RecordReader::new(ours.clone())],
            urgent: Vec::new(),
            writer: RecordWriter::new(ours.clone()),
            features,
            session: [1; 16],
            acknowledge: false,
        };
        let received = receive(&job, &mut accepted, &placer)?;
        ours.end_sending();
        let mut answers = RecordReader::new(theirs);
        let mut passes = Vec::new();
        while let Ok(record) = answers.read() {
            assert_eq!(record.kind, Kind::PassDone);
            passes.push(record.header.number());
        }
        Ok((received, passes))
    }

    #[test]
    fn records_are_counted_and_each_pass_is_answered() {
        let pages = |kind, flags, first, count, bytes| {
            RecordHeader::new(kind, flags, 0, PageRange::new(first, count), bytes)
        };
        let content = vec![7; 2 * PAGE_SIZE as usize];
        let end = Totals { data_pages: 4, ..Totals::default() }.encode();
        for postcopy in [0, 1] {
            let records = [
                (pages(Kind::Data, 0, 3, 2, content.len()), &content[..]),
                (RecordHeader::plain(Kind::PassEnd, 0, 0), &[]),
                (pages(Kind::Data, FLAG_STRAY, 9, 2, content.len()), &content[..]),
                (pages(Kind::Zero, 0, 3, 1, 0), &[]),
                (RecordHeader::plain(Kind::PassEnd, 1, 0), &[]),
                (RecordHeader::plain(Kind::End, postcopy, end.len()), &end[..]),
            ];
            let (received, passes) = received(FEATURE_POSTCOPY, &records).unwrap();
            assert_eq!(passes, [0, 1]);
            let counted = Totals {
                data_pages: 4,
                zero_pages: 1,
                stray_pages: 2,
                passes: 2,
                ..Totals::default()
            };
            assert_eq!((received.counted, received.claimed.data_pages), (counted, 4));
            assert_eq!((received.postcopy, received.guest), (postcopy == 1, RunState::Running));
        }
    }

    #[test]
    fn an_end_with_a_number_that_was_not_negotiated_is_refused() {
        let end = Totals::default().encode();
        for (features, number) in [(0, 1), (FEATURE_POSTCOPY, 2)] {
            let header = RecordHeader::plain(Kind::End, number, end.len());
            let error = received(features, &[(header, &end[..])]).unwrap_err().to_string();
            assert!(error.contains(&format!("end with number {number}")), "{error}");
        }
    }

    #[test]
    fn the_totals_of_the_streams_are_added_except_the_passes() {
        let totals = |by: u64| Totals {
            data_pages: 2 * by,
            zero_pages: 3 * by,
            discarded_pages: 5 * by,
            stray_pages: 7 * by,
            passes: 11,
            remaining_pages: 13 * by,
        };
        assert_eq!(sum(&totals(10), &totals(100)), totals(110));
        assert_eq!(sum(&Totals { passes: 12, ..totals(0) }, &totals(1)).passes, 12);
    }

    #[test]
    fn state_is_assembled_from_its_parts() {
        let mut collector = StateCollector::default();
        for payload in [
            part("a", 3, 0, b"12"),
            part("a", 3, 2, b"3"),
            part("empty", 0, 0, b""),
            part("b", 1, 0, b"4"),
        ] {
            collector.add(&payload).unwrap();
        }
        let expected = [("a", &b"123"[..]), ("empty", b""), ("b", b"4")];
        let expected = expected.map(|(name, bytes)| (name.to_owned(), bytes.to_vec()));
        assert_eq!(collector.finish().unwrap(), expected);
    }

    #[test]
    fn state_with_gaps_or_misplaced_parts_is_refused() {
        let mut collector = StateCollector::default();
        collector.add(&part("a", 3, 0, b"1")).unwrap();
        assert!(collector.add(&part("a", 3, 2, b"3")).is_err(), "a gap");
        assert!(collector.add(&part("b", 3, 1, b"3")).is_err(), "another piece");
        assert!(collector.finish().is_err(), "incomplete");
        assert!(StateCollector::default().add(&part("a", 3, 1, b"1")).is_err(), "no beginning");
    }

    #[test]
    fn a_failing_stream_opens_the_barrier_for_the_others() {
        let barrier = Barrier::new(2);
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| barrier.arrive(|| Ok(())));
            barrier.fail();
            assert!(waiting.join().unwrap().is_err());
        });
    }
}
