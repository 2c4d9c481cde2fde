//! Reading what the guest waits for, and asking the source.
//!
//! One thread reads the faults, as many at once as there are, and never waits for anything but faults: what it can answer it answers, and for the rest it asks. The
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
        let mut batch = Batch::new(job, &streams);
        for at in 0..job.memory.blocks().len() {
            arriving.waited_for(at).for_each(|host_page| batch.add(arriving, at, host_page));
        }
        batch.send();
    }

    /// There is nobody to ask.
    pub fn disconnect(&self) {
        self.lock().clear();
    }
}

/// Requests that go out together.
struct Batch<'a> {
    job: &'a Job,
    streams: &'a [StreamSocket],
    /// By stream.
    records: Vec<Vec<[u8; RECORD_SIZE]>>,
}

impl<'a> Batch<'a> {
    fn new(job: &'a Job, streams: &'a [StreamSocket]) -> Self {
        Self { job, streams, records: vec![Vec::new(); streams.len()] }
    }

    fn add(&mut self, arriving: &Arriving, at: usize, host_page: u64) {
        if self.streams.is_empty() {
            return;
        }
        let id = self.job.memory.blocks()[at].geometry.id;
        let pages = arriving.owed().block(at).pages(PageRange::new(host_page, 1));
        let record = RecordHeader::new(Kind::Request, 0, id, pages, 0).sealed(&[]).to_wire();
        self.records[(host_page % self.streams.len() as u64) as usize].push(record);
    }

    fn send(&mut self) {
        for (stream, records) in self.streams.iter().zip(&mut self.records) {
            if records.is_empty() {
                continue;
            }
            let mut parts: Vec<IoSlice<'_>> = records.iter().map(|record| IoSlice::new(record)).collect();
            // Whoever reads this stream sees that it broke, and all is asked for again on the next.
            if let Err(error) = stream.write_all(&mut parts) {
                log::debug!("a request was not sent: {}", crate::error::chain(&error));
            }
            records.clear();
        }
    }
}

/// Answers faults until `stop` is readable, or the VMM is gone.
pub fn answer(job: &Job, arriving: Arc<Arriving>, requests: Requests, stop: BorrowedFd<'_>) {
    if let Err(error) = answer_all(job, &arriving, &requests, stop) {
        log::error!("job {}: faults are not answered any more: {}", job.id, crate::error::chain(&error));
    }
}

fn answer_all(job: &Job, arriving: &Arriving, requests: &Requests, stop: BorrowedFd<'_>) -> Result<(), JobError> {
    let mut faults = [0; MAX_FAULTS];
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
        let count = arriving.uffd().read_faults(&mut faults).map_err(ArrivingError::Read)?;
        let streams = requests.lock();
        let mut batch = Batch::new(job, &streams);
        for address in &faults[..count] {
            let Some(page) = arriving.locate(*address) else { continue };
            match arriving.fault(&job.memory.readers, page, since) {
                Ok(Answer::Ask) => batch.add(arriving, page.0, page.1),
                Ok(Answer::Here | Answer::Wait) => {}
                Err(error) if is_gone(&error) => return Err(error.into()),
                Err(error) => {
                    // No memory, most likely. Whoever waits tries again.
                    log::warn!("{}", crate::error::chain(&error));
                    std::thread::sleep(RETRY);
                    arriving.retry(page);
                }
            }
        }
        batch.send();
    }
}

/// True if there is nobody any more who could wait.
pub fn is_gone(error: &ArrivingError) -> bool {
    matches!(error, ArrivingError::Place { source: Errno::SRCH, .. })
}
