//! Reading what the guest waits for, and asking the source.
//!
//! One thread reads the faults, as many at once as there are, and waits for nothing but faults, and pages that are being placed: what it can answer it answers, and for the rest it asks. The
//! threads of the streams place what comes. It goes on while the connections are lost: what is asked for then is noted, and asked for when they are back.

use crate::job::{Job, JobError};
use crate::memory::arriving::{Answer, Arriving, ArrivingError};
use crate::transport::{RecordReader, StreamSocket};
use pageferry_protocol::memory::PageRange;
use pageferry_protocol::stream::{Kind, RECORD_SIZE, RecordHeader};
use pageferry_protocol::userfault::MAX_FAULTS;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::{Errno, IoSlice};
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long a fault that cannot be answered for want of memory waits until it is looked at again.
const RETRY: Duration = Duration::from_millis(10);

/// The urgent streams, on which the source is asked. Clones are the same.
///
/// A page is marked as requested and asked for under one lock, and so is asking again after a lost connection: so a page is asked for once on each connection that could
/// carry it, and never twice.
#[derive(Debug, Clone, Default)]
pub struct Requests(Arc<Mutex<Vec<StreamSocket>>>);

impl Requests {
    fn lock(&self) -> MutexGuard<'_, Vec<StreamSocket>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The source is asked on these streams from now on, and first for all that is waited for already.
    pub fn connect(&self, job: &Job, arriving: &Arriving, urgent: &[RecordReader]) {
        let mut streams = self.lock();
        *streams = urgent.iter().map(|reader| reader.socket().clone()).collect();
        let mut batch = Batch::default();
        for at in 0..job.memory.blocks().len() {
            for host_page in arriving.waited_for(at) {
                batch.add(&streams, name(job, arriving, at, host_page), host_page);
            }
        }
        batch.send(&streams);
    }

    /// There is nobody to ask.
    pub fn disconnect(&self) {
        self.lock().clear();
    }
}

/// Requests that go out together, by stream. Kept from one batch to the next: nothing is allocated while somebody waits.
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
        let record = RecordHeader::new(Kind::Request, 0, id, pages, 0).sealed(&[]).to_wire();
        self.records[(host_page % streams.len() as u64) as usize].extend_from_slice(&record);
    }

    fn send(&mut self, streams: &[StreamSocket]) {
        for (stream, records) in streams.iter().zip(&mut self.records) {
            if records.is_empty() {
                continue;
            }
            if let Err(error) = stream.write_all(&mut [IoSlice::new(records)]) {
                log::debug!("a request was not sent: {}", crate::error::chain(&error));
                // Part of it may have been. Whoever reads this stream sees that it broke, and all is asked for again on the next.
                stream.shut();
            }
            records.clear();
        }
    }
}

/// A host page as the source knows it.
fn name(job: &Job, arriving: &Arriving, at: usize, host_page: u64) -> (u32, PageRange) {
    let pages = arriving.owed().block(at).pages(PageRange::new(host_page, 1));
    (job.memory.blocks()[at].geometry.id, pages)
}

/// Answers faults until `stop` is readable, or the VMM is gone.
pub fn answer(job: &Job, arriving: Arc<Arriving>, requests: Requests, stop: BorrowedFd<'_>) {
    let mut unanswered = Unanswered { job, over: false };
    match answer_all(job, &arriving, &requests, stop) {
        Ok(()) => unanswered.over = true,
        Err(error) => {
            log::error!("job {}: faults are not answered any more: {}", job.id, crate::error::chain(&error));
        }
    }
}

/// A guest whose faults nobody answers hangs. On drop, also by a panic, the VMM is told that its memory is lost, unless all is over.
struct Unanswered<'a> {
    job: &'a Job,
    over: bool,
}

impl Drop for Unanswered<'_> {
    fn drop(&mut self) {
        if !self.over {
            self.job.cancel.force();
        }
    }
}

fn answer_all(job: &Job, arriving: &Arriving, requests: &Requests, stop: BorrowedFd<'_>) -> Result<(), JobError> {
    let mut faults = [0; MAX_FAULTS];
    let mut batch = Batch::default();
    let mut failed = Vec::new();
    loop {
        let mut polled = [PollFd::new(arriving.uffd(), PollFlags::IN), PollFd::from_borrowed_fd(stop, PollFlags::IN)];
        match poll(&mut polled, None) {
            Ok(_) => {}
            Err(Errno::INTR) => continue,
            Err(errno) => return Err(JobError::from_io("poll")(errno.into())),
        }
        if !polled[1].revents().is_empty() {
            return Ok(());
        }
        let since = Instant::now();
        let streams = requests.lock();
        let answering = arriving.answering();
        let count = arriving.uffd().read_faults(&mut faults).map_err(ArrivingError::Read)?;
        for address in &faults[..count] {
            let Some(page) = arriving.locate(*address) else { continue };
            match arriving.fault(&job.memory.readers, page, since) {
                Ok(Answer::Ask) => batch.add(&streams, name(job, arriving, page.0, page.1), page.1),
                Ok(Answer::Here | Answer::Wait) => {}
                Err(error) if is_gone(&error) => return Err(error.into()),
                Err(error) => {
                    log::warn!("{}", crate::error::chain(&error));
                    failed.push(page);
                }
            }
        }
        drop(answering);
        batch.send(&streams);
        drop(streams);
        if !failed.is_empty() {
            // No memory, most likely. Whoever waits tries again.
            std::thread::sleep(RETRY);
            failed.drain(..).for_each(|page| arriving.retry(page));
        }
    }
}

/// True if there is nobody any more who could wait.
pub fn is_gone(error: &ArrivingError) -> bool {
    matches!(error, ArrivingError::Place { source: Errno::SRCH, .. })
}
