//! Writes of the guest that runs on.
//!
//! One thread reads the faults, and answers them at once: it captures the page into a buffer of its own, and lets the writer go on. A second one puts what was captured into the image:
//! whoever waits to write does not wait for a disk. Between them go a fixed number of buffers; a guest that writes faster than the disk waits for one.

use super::protect::{Mode, Shared};
use crate::faults::wait;
use crate::job::{Job, JobError};
use crate::memory::capturing::Capturing;
use pageferry_protocol::memory::PageRange;
use pageferry_protocol::userfault::MAX_FAULTS;
use std::os::fd::{AsFd, OwnedFd};
use std::panic::resume_unwind;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

/// Most bytes of all buffers together; at least a few of them.
const BUFFERS: u64 = 32 << 20;
/// Most buffers: 8 MiB of small pages.
const MOST: u64 = 2048;
/// How long a buffer is waited for at a stretch.
const LOOK: Duration = Duration::from_millis(20);

/// A page that was captured and is to be put.
struct Captured {
    capturing: Arc<Capturing>,
    at: usize,
    pages: PageRange,
    bytes: Vec<u8>,
}

/// Buffers that go round between the two threads.
struct Buffers {
    free: Receiver<Vec<u8>>,
    to_free: Sender<Vec<u8>>,
    captured: Sender<Captured>,
}

/// Starts both threads. They answer faults until `stop` is readable, and end when all that was captured is put.
///
/// # Errors
/// If there is no thread to be had.
pub fn start(job: &Arc<Job>, shared: &Arc<Shared>, stop: OwnedFd) -> Result<JoinHandle<()>, JobError> {
    let (job, shared) = (job.clone(), shared.clone());
    let (to_free, free) = channel();
    let (captured, to_put) = channel();
    let largest = job.memory.blocks().iter().map(|block| block.backing.host_page_size()).max().unwrap_or(1);
    for _ in 0..(BUFFERS / largest).clamp(4, MOST) {
        // The other end is here.
        let _ = to_free.send(vec![0; largest as usize]);
    }
    let builder = |name| Builder::new().name(format!("{name}-{}", job.id));
    let (answering, putting) = (builder("faults"), builder("captured"));
    let give_back = to_free.clone();
    let writer = putting.spawn(move || put(to_put, &give_back)).map_err(JobError::from_io("start a thread"))?;
    let buffers = Buffers { free, to_free, captured };
    let answering = answering.spawn(move || {
        answer(&job, &shared, &stop, &buffers);
        drop(buffers);
        if let Err(panic) = writer.join() {
            resume_unwind(panic);
        }
    });
    answering.map_err(JobError::from_io("start a thread"))
}

fn answer(job: &Job, shared: &Shared, stop: &OwnedFd, buffers: &Buffers) {
    let mut unanswered = Unanswered { shared, over: false };
    match answer_all(job, shared, stop, buffers) {
        Ok(()) => unanswered.over = true,
        Err(error) => fail(&shared.mode(), error),
    }
}

/// On drop, also by a panic, there is no instant any more, unless all is over.
struct Unanswered<'a> {
    shared: &'a Shared,
    over: bool,
}

impl Drop for Unanswered<'_> {
    fn drop(&mut self) {
        if !self.over {
            self.shared.fail();
        }
    }
}

fn put(captured: Receiver<Captured>, free: &Sender<Vec<u8>>) {
    for Captured { capturing, at, pages, bytes } in captured {
        if let Err(error) = capturing.put_run(at, pages, &bytes[..pages.bytes() as usize]) {
            capturing.fail(error);
        }
        // Nobody wants it any more at the end.
        let _ = free.send(bytes);
    }
}

/// Before the instant there is nothing to fail: what goes on cannot protect, and says so.
fn fail(mode: &Mode, error: JobError) {
    match mode {
        Mode::Ahead => log::warn!("a fault cannot be answered: {}", crate::error::chain(&error)),
        Mode::Capturing(capturing) => capturing.fail(error),
    }
}

fn answer_all(job: &Job, shared: &Shared, stop: &OwnedFd, buffers: &Buffers) -> Result<(), JobError> {
    let uffd = &shared.protection.uffd;
    let mut faults = [0; MAX_FAULTS];
    while wait(uffd, stop.as_fd())? {
        let since = Instant::now();
        // Before they are read: what is read is answered before anyone who waits for the lock goes on.
        let mode = shared.mode();
        let read = uffd.read_faults(&mut faults);
        let count = read.map_err(|errno| JobError::from_io("read faults")(errno.into()))?;
        for address in &faults[..count] {
            let Some(page) = shared.protection.mappings.locate(*address) else { continue };
            // Go on with the others: whoever waits for them waits for nothing else.
            if let Err(error) = answer_one(job, shared, &mode, page, buffers) {
                fail(&mode, error);
            }
            job.live.latency.record(since.elapsed());
        }
    }
    Ok(())
}

fn answer_one(job: &Job, shared: &Shared, mode: &Mode, page: (usize, u64), buffers: &Buffers) -> Result<(), JobError> {
    let capturing = match mode {
        Mode::Ahead => return shared.let_through(page),
        Mode::Capturing(capturing) => capturing,
    };
    let Some(mut bytes) = buffer(job, capturing, page, buffers) else {
        // Nothing is taken then.
        return capturing.fault(&job.memory, page, &mut []).map(|_| ());
    };
    let captured = capturing.fault(&job.memory, page, &mut bytes);
    if let Ok(Some(pages)) = captured {
        let captured = Captured { capturing: capturing.clone(), at: page.0, pages, bytes };
        return buffers.captured.send(captured).map_err(|_| JobError::Panicked);
    }
    // Also if it cannot be captured: those who come after it would wait for a buffer for ever.
    buffers.to_free.send(bytes).map_err(|_| JobError::Panicked)?;
    captured.map(|_| ())
}

/// A buffer for a page that is pending. Whoever waits to write waits for it, if the disk is slower than the writes; but not for a snapshot that is lost anyway.
fn buffer(job: &Job, capturing: &Capturing, (at, host_page): (usize, u64), buffers: &Buffers) -> Option<Vec<u8>> {
    // What is not pending now never is again.
    while capturing.pending().block(at).bits().contains(host_page) {
        match buffers.free.recv_timeout(LOOK) {
            Ok(bytes) => return Some(bytes),
            Err(_) if job.cancel.is_cancelled() || capturing.has_failed() => {
                capturing.fail(JobError::Cancelled);
                capturing.end();
                return None;
            }
            Err(_) => {}
        }
    }
    None
}
