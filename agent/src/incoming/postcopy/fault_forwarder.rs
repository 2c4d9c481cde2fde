// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Requesting the pages that the guest waits for from the source.
//!
//! The thread that reads faults sends a request for each missing page on an urgent stream. The
//! threads of the streams place the pages that come back. While the connections are lost, faults
//! are still read: their pages are marked as requested, and requested when there are connections
//! again.

use crate::job::{Job, JobError};
use crate::lock::lock;
use crate::memory::missing_pages::MissingPages;
use crate::missing_faults::{HostPage, PageRequester};
use crate::transport::{RecordReader, StreamSocket};
use pageferry_protocol::memory::PageRange;
use pageferry_protocol::stream::{Kind, RECORD_SIZE, RecordHeader};
use pageferry_protocol::userfault::MAX_FAULTS;
use rustix::io::IoSlice;
use std::sync::{Arc, Mutex, MutexGuard};

/// The urgent streams, on which pages are requested. Clones share them.
///
/// A page is marked as requested and its request is sent under one lock. After a lost connection,
/// the pages that the guest waits for are requested again under the same lock. So on each set of
/// connections a page is requested at most once, and no page is forgotten.
#[derive(Debug, Clone, Default)]
pub struct RequestStreams(Arc<Mutex<Vec<StreamSocket>>>);

impl RequestStreams {
    fn lock(&self) -> MutexGuard<'_, Vec<StreamSocket>> {
        lock(&self.0)
    }

    /// Sends requests on these streams from now on, first for all pages that the guest already
    /// waits for.
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

    /// Stops sending requests: there is no connection.
    pub fn disconnect(&self) {
        self.lock().clear();
    }
}

/// Forwards faults to the source.
pub struct FaultForwarder<'a> {
    job: &'a Job,
    missing_pages: &'a MissingPages,
    requests: RequestStreams,
    pages: Vec<HostPage>,
    batch: Batch,
}

impl<'a> FaultForwarder<'a> {
    /// Forwards faults on the streams of `requests`.
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

/// Requests that are sent together, for each stream. The buffers are reused, so that nothing is
/// allocated while the guest waits.
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
                // A part of it may have been sent. Shutting the stream makes its reader fail, and
                // the pages are requested again after the recovery.
                stream.shut_down();
            }
            records.clear();
        }
    }
}

/// The pages of a host page, as the source numbers them.
fn pages_of(
    job: &Job, missing_pages: &MissingPages, at: usize, host_page: u64,
) -> (u32, PageRange) {
    let pages = missing_pages.missing().block(at).pages(PageRange::new(host_page, 1));
    (job.memory.blocks()[at].geometry.id, pages)
}
