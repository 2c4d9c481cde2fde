//! Asking the source for what the guest waits for.
//!
//! The threads of the streams place what comes. The faults are read while the connections are lost,
//! too: what is asked for then is noted, and asked for when they are back.

use crate::job::{Job, JobError};
use crate::memory::missing_pages::MissingPages;
use crate::missing_faults::{HostPage, PageRequester};
use crate::transport::{RecordReader, StreamSocket};
use pageferry_protocol::memory::PageRange;
use pageferry_protocol::stream::{Kind, RECORD_SIZE, RecordHeader};
use pageferry_protocol::userfault::MAX_FAULTS;
use rustix::io::IoSlice;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The urgent streams, on which the source is asked. Clones are the same.
///
/// A page is marked as requested and asked for under one lock, and so is asking again after a lost
/// connection: so a page is asked for once on each connection that could carry it, and never twice.
#[derive(Debug, Clone, Default)]
pub struct RequestStreams(Arc<Mutex<Vec<StreamSocket>>>);

impl RequestStreams {
    fn lock(&self) -> MutexGuard<'_, Vec<StreamSocket>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The source is asked on these streams from now on, and first for all that is waited for
    /// already.
    pub fn connect(&self, job: &Job, missing_pages: &MissingPages, urgent: &[RecordReader]) {
        let mut streams = self.lock();
        *streams = urgent.iter().map(|reader| reader.socket().clone()).collect();
        let mut batch = Batch::default();
        for at in 0..job.memory.blocks().len() {
            for host_page in missing_pages.awaited_pages(at) {
                batch.add(&streams, pages_of(job, missing_pages, at, host_page), host_page);
            }
        }
        batch.send(&streams);
    }

    /// There is nobody to ask.
    pub fn disconnect(&self) {
        self.lock().clear();
    }
}

/// Asks the source.
pub struct FaultForwarder<'a> {
    job: &'a Job,
    missing_pages: &'a MissingPages,
    requests: RequestStreams,
    pages: Vec<HostPage>,
    batch: Batch,
}

impl<'a> FaultForwarder<'a> {
    /// By `requests`.
    pub fn new(job: &'a Job, missing_pages: &'a MissingPages, requests: RequestStreams) -> Self {
        Self {
            job,
            missing_pages,
            requests,
            pages: Vec::with_capacity(MAX_FAULTS),
            batch: Batch::default(),
        }
    }
}

impl PageRequester for FaultForwarder<'_> {
    fn request_pages(
        &mut self, read: impl FnOnce(&mut Vec<HostPage>) -> Result<(), JobError>,
    ) -> Result<(), JobError> {
        let streams = self.requests.lock();
        read(&mut self.pages)?;
        for (at, host_page) in self.pages.drain(..) {
            self.batch.add(
                &streams,
                pages_of(self.job, self.missing_pages, at, host_page),
                host_page,
            );
        }
        self.batch.send(&streams);
        Ok(())
    }
}

/// Requests that go out together, by stream. Kept from one batch to the next: nothing is allocated
/// while somebody waits.
#[derive(Default)]
struct Batch {
    records: Vec<Vec<u8>>,
}

impl Batch {
    fn add(&mut self, streams: &[StreamSocket], (id, pages): (u32, PageRange), host_page: u64) {
        if streams.is_empty() {
            return;
        }
        self.records.resize_with(streams.len(), || Vec::with_capacity(MAX_FAULTS * RECORD_SIZE));
        let record = RecordHeader::new(Kind::Request, 0, id, pages, 0).with_checksum(&[]).to_wire();
        self.records[(host_page % streams.len() as u64) as usize].extend_from_slice(&record);
    }

    fn send(&mut self, streams: &[StreamSocket]) {
        for (stream, records) in streams.iter().zip(&mut self.records) {
            if records.is_empty() {
                continue;
            }
            if let Err(error) = stream.write_all(&mut [IoSlice::new(records)]) {
                log::debug!("a request was not sent: {}", crate::error::chain(&error));
                // Part of it may have been. Whoever reads this stream sees that it broke, and all
                // is asked for again on the next.
                stream.shut();
            }
            records.clear();
        }
    }
}

/// A host page as the source knows it.
fn pages_of(
    job: &Job, missing_pages: &MissingPages, at: usize, host_page: u64,
) -> (u32, PageRange) {
    let pages = missing_pages.missing().block(at).pages(PageRange::new(host_page, 1));
    (job.memory.blocks()[at].geometry.id, pages)
}
