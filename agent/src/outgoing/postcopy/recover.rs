// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Recovery of a postcopy at the source: connecting again, and finding out what is missing.
//!
//! After a lost connection the job is paused until somebody asks for the recovery. The source then
//! connects all streams again. The destination sends a bitmap for each block with the pages that it
//! does not need: it has them, was never missing them, or the guest discarded them. All other pages
//! are missing, whatever was sent before, because pages that were on their way are lost. An agent
//! that did not begin the migration needs to know no more than that.
//!
//! The bitmaps are checked. They must cover the blocks exactly, and a page may be missing only if
//! it was missing before and is not released. If the bitmaps are refused or anything else fails,
//! the job is paused again.

use super::super::connect::{SessionId, Streams, reconnect};
use super::super::job::OutgoingJob;
use super::page_sender::PostcopySource;
use crate::job::{JobError, RecoveryRequest};
use crate::memory::host_page_set::HostPageSet;
use crate::outgoing::OutgoingError;
use crate::transport::Address;
use crate::transport::StreamError;
use pageferry_protocol::control::job::Phase;
use pageferry_protocol::memory::PAGE_SIZE;
use pageferry_protocol::shm::bitmap::WORD_BITS;
use pageferry_protocol::stream::Kind;
use pageferry_protocol::stream::payload::decode_bitmap;
use rustix::event::PollFlags;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Longest single wait for a request to recover. The job waits as often as needed.
const LONGEST_WAIT: Duration = Duration::from_secs(3600);

/// Continues a migration that another agent began, and ends the job.
pub fn run(job: &Arc<OutgoingJob>, session: SessionId, address: Address) {
    let outcome = adopt(job, session, address);
    job.finish(outcome);
}

fn adopt(job: &Arc<OutgoingJob>, session: SessionId, address: Address) -> Result<(), JobError> {
    // The guest was handed over before this job began.
    job.refuse_populates();
    job.cancel.commit_point()?;
    let host_pages: Vec<u64> =
        job.memory.blocks().iter().map(|block| block.backing.host_page_size()).collect();
    let mut source = PostcopySource::new(
        job,
        (session, None),
        Some(address),
        HostPageSet::empty(job.memory.blocks(), &host_pages)?,
        None,
    );
    match source.reconnect_and_send(None) {
        Ok(()) => Ok(()),
        Err(error) => source.recover(error),
    }
}

impl PostcopySource {
    /// Waits for a request to recover, connects again, and sends the rest. Repeats this as often as
    /// the connections break.
    ///
    /// # Errors
    /// If the job is given up.
    pub fn recover(&mut self, mut why: JobError) -> Result<(), JobError> {
        loop {
            // Close the connections, so that the destination sees their end.
            self.job.cancel.clear_sockets();
            self.job.recovery.pause();
            self.job.suspend_postcopy(&why);
            let given = match self.wait() {
                Ok(address) => address,
                // Report the failure that led here, not that the job was given up.
                Err(_) => return Err(JobError::Stranded { source: Box::new(why) }),
            };
            match self.reconnect_and_send(given) {
                Ok(()) => return Ok(()),
                Err(error) => why = error,
            }
        }
    }

    fn wait(&self) -> Result<Option<Address>, JobError> {
        loop {
            self.job
                .cancel
                .wait(&[(self.job.recovery.fd(), PollFlags::IN)], Instant::now() + LONGEST_WAIT)?;
            match self.job.recovery.take() {
                Some(RecoveryRequest::Connect(address)) => return Ok(address),
                Some(RecoveryRequest::Abandon) => return Err(JobError::Abandoned),
                Some(RecoveryRequest::Listen(_)) | None => {}
            }
        }
    }

    /// Connects to `given`, or else to the address of the last connection, and sends what the
    /// destination is missing. An address is kept once the destination has answered there, so a
    /// wrong one does not stick.
    fn reconnect_and_send(&mut self, given: Option<Address>) -> Result<(), JobError> {
        self.job.enter(Phase::Recovering);
        let Some(address) = given.or(self.address.clone()) else {
            return Err(JobError::Stuck(
                "the destination's address is not known: recover with one".into(),
            ));
        };
        let mut streams = reconnect(&self.job, &address, self.session, self.peer)?;
        match self.read_received(&mut streams) {
            Ok(missing) => {
                if self.kept.is_none() {
                    self.kept = Some(missing.try_clone()?);
                }
                self.missing = Arc::new(missing);
                self.address = Some(address);
                self.peer = self.peer.or(streams.peer());
            }
            Err(error) => {
                streams.send_error(&error.to_remote());
                return Err(error);
            }
        }
        self.release_received()?;
        self.job.set_remaining(&self.missing);
        self.job.continue_postcopy();
        self.serve(&mut streams, |_| Ok(()))
    }

    /// Reads the bitmaps of the destination. Returns the pages that it is missing.
    fn read_received(&self, streams: &mut Streams) -> Result<HostPageSet, JobError> {
        let memory = &self.job.memory;
        self.check_host_pages(&streams.host_pages)?;
        let missing = HostPageSet::empty(memory.blocks(), &streams.host_pages)?;
        for geometry in memory.table().blocks() {
            let (id, pages) = (geometry.id, geometry.pages());
            let (at, _) = memory.find(id).ok_or(StreamError::NoBlock { id })?;
            let mut next = 0;
            while next < pages {
                let record = streams.primary.reader.read()?;
                if record.kind != Kind::Received {
                    return Err(StreamError::unexpected(
                        record.kind,
                        record.payload,
                        "what the destination has",
                    )
                    .into());
                }
                let range = record.header.range();
                if record.header.block() != id || range.first != next {
                    let (found, expected) = (range.first, next);
                    return Err(OutgoingError::BitmapOutOfOrder {
                        id: record.header.block(),
                        found,
                        expected_id: id,
                        expected,
                    }
                    .into());
                }
                let words = decode_bitmap(record.payload, range, pages);
                for (word, received) in
                    words.map_err(|source| StreamError::Payload { kind: "received", source })?
                {
                    let valid = range.end() - word * WORD_BITS;
                    let used = pageferry_protocol::shm::bitmap::word_mask(0, valid.min(WORD_BITS));
                    missing.add_pages(at, word, !received & used);
                }
                next = range.end();
            }
            self.check(&missing, at, id, pages)?;
        }
        Ok(missing)
    }

    /// Refuses host page sizes that differ from those before: `kept` counts in host pages.
    fn check_host_pages(&self, sizes: &[u64]) -> Result<(), JobError> {
        let Some(kept) = &self.kept else { return Ok(()) };
        for (at, (block, size)) in self.job.memory.blocks().iter().zip(sizes).enumerate() {
            let expected = kept.block(at).unit() * PAGE_SIZE;
            if *size != expected {
                return Err(OutgoingError::HostPageSizeChanged {
                    id: block.geometry.id,
                    size: *size,
                    expected,
                }
                .into());
            }
        }
        Ok(())
    }

    /// Refuses pages that were never missing, or that are released.
    fn check(&self, missing: &HostPageSet, at: usize, id: u32, pages: u64) -> Result<(), JobError> {
        let Some(kept) = &self.kept else { return Ok(()) };
        for word in 0..pages.div_ceil(WORD_BITS) {
            let unknown = missing.block(at).page_word(word) & !kept.block(at).page_word(word);
            if unknown != 0 {
                let first = word * WORD_BITS + u64::from(unknown.trailing_zeros());
                return Err(OutgoingError::RequestedNotMissing {
                    id,
                    first,
                    pages: unknown.count_ones().into(),
                }
                .into());
            }
        }
        Ok(())
    }
}
