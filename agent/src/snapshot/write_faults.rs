//! Writes of the guest that runs on.
//!
//! One thread reads the faults, and answers them at once: it captures the page into a buffer of its
//! own, and lets the writer go on. A second one puts what was captured into the image: whoever
//! waits to write does not wait for a disk. Between them go a fixed number of buffers; a guest that
//! writes faster than the disk waits for one, but no longer than its VMM has patience: a disk that
//! hangs loses the snapshot, and not the guest.

use super::protect::{Mode, WatchState};
use crate::image::PageBuffer;
use crate::job::{Job, JobError};
use crate::memory::copy_before_write::CopyBeforeWrite;
use crate::missing_faults::wait;
use pageferry_protocol::memory::PageRange;
use pageferry_protocol::shm::MappingError;
use pageferry_protocol::userfault::MAX_FAULTS;
use std::collections::BTreeSet;
use std::os::fd::{AsFd, OwnedFd};
use std::panic::resume_unwind;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

/// Most bytes of the buffers for host pages of one size; at least a few of them.
const BUFFERS: u64 = 32 << 20;
/// Most buffers for host pages of one size: 8 MiB of small ones.
const MAX_BUFFER_BYTES: u64 = 2048;
/// How long a buffer is waited for at a stretch.
const CHECK_INTERVAL: Duration = Duration::from_millis(20);

/// A page that was captured and is to be put.
struct Captured {
    copier: Arc<CopyBeforeWrite>,
    at: usize,
    pages: PageRange,
    bytes: PageBuffer,
    pool: usize,
}

/// Buffers that go round between the two threads.
struct Buffers {
    pools: Vec<BufferPool>,
    /// The pool for each block.
    of_block: Vec<usize>,
    captured: Sender<Captured>,
    /// How long one is waited for at most.
    limit: Duration,
}

/// Buffers for host pages of one size.
struct BufferPool {
    free: Receiver<PageBuffer>,
    to_free: Sender<PageBuffer>,
}

impl BufferPool {
    fn new(host_page: u64) -> Result<Self, MappingError> {
        let (to_free, free) = channel();
        for _ in 0..(BUFFERS / host_page).clamp(4, MAX_BUFFER_BYTES) {
            // The other end is here.
            let _ = to_free.send(PageBuffer::try_new(host_page as usize)?);
        }
        Ok(Self { free, to_free })
    }
}

/// Starts both threads. They answer faults until `stop` is readable, and end when all that was
/// captured is put.
///
/// # Errors
/// If there is no thread to be had, or no memory for the buffers.
pub fn start(
    job: &Arc<Job>, shared: &Arc<WatchState>, stop: OwnedFd,
) -> Result<JoinHandle<()>, JobError> {
    let (job, shared) = (job.clone(), shared.clone());
    let host_pages = || job.memory.blocks().iter().map(|block| block.backing.host_page_size());
    let sizes: BTreeSet<u64> = host_pages().collect();
    let pools = sizes.iter().map(|size| BufferPool::new(*size)).collect::<Result<Vec<_>, _>>()?;
    let of_block = host_pages().map(|size| sizes.range(..size).count()).collect();
    let give_back: Vec<_> = pools.iter().map(|pool| pool.to_free.clone()).collect();
    let (captured, to_put) = channel();
    let builder = |name| Builder::new().name(format!("{name}-{}", job.id));
    let (answering, putting) = (builder("faults"), builder("captured"));
    let writer = putting
        .spawn(move || put(to_put, &give_back))
        .map_err(JobError::from_io("start a thread"))?;
    let buffers = Buffers { pools, of_block, captured, limit: job.options().hook_timeout };
    let answering = answering.spawn(move || {
        answer(&job, &shared, &stop, &buffers);
        drop(buffers);
        if let Err(panic) = writer.join() {
            resume_unwind(panic);
        }
    });
    answering.map_err(JobError::from_io("start a thread"))
}

fn answer(job: &Job, shared: &WatchState, stop: &OwnedFd, buffers: &Buffers) {
    let mut unanswered = FailOnDrop { shared, over: false };
    match answer_all(job, shared, stop, buffers) {
        Ok(()) => unanswered.over = true,
        Err(error) => fail(&shared.mode(), error),
    }
}

/// On drop, also by a panic, there is no instant any more, unless all is over.
struct FailOnDrop<'a> {
    shared: &'a WatchState,
    over: bool,
}

impl Drop for FailOnDrop<'_> {
    fn drop(&mut self) {
        if !self.over {
            self.shared.fail();
        }
    }
}

fn put(captured: Receiver<Captured>, free: &[Sender<PageBuffer>]) {
    for Captured { copier, at, pages, bytes, pool } in captured {
        if let Err(error) = copier.put_run(at, pages, &bytes[..pages.bytes() as usize]) {
            copier.fail(error);
        }
        // Nobody wants it any more at the end.
        let _ = free[pool].send(bytes);
    }
}

/// Before the instant there is nothing to fail: what goes on cannot protect, and says so.
fn fail(mode: &Mode, error: JobError) {
    match mode {
        Mode::Ahead => log::warn!("a fault cannot be answered: {}", crate::error::chain(&error)),
        Mode::CopyBeforeWrite(copier) => copier.fail(error),
    }
}

fn answer_all(
    job: &Job, shared: &WatchState, stop: &OwnedFd, buffers: &Buffers,
) -> Result<(), JobError> {
    let uffd = &shared.protection.uffd;
    let mut faults = [0; MAX_FAULTS];
    while wait(uffd, stop.as_fd())? {
        let since = Instant::now();
        // Before they are read: what is read is answered before anyone who waits for the lock goes
        // on.
        let mode = shared.mode();
        let read = uffd.read_faults(&mut faults);
        let count = read.map_err(|errno| JobError::from_io("read faults")(errno.into()))?;
        for address in &faults[..count] {
            let Some(page) = shared.protection.mappings.locate(*address) else { continue };
            // Go on with the others.
            if let Err(error) = answer_one(job, shared, &mode, page, buffers) {
                fail(&mode, error);
            }
            // As the count of faults: those of the snapshot.
            if let Mode::CopyBeforeWrite(_) = *mode {
                job.live.latency.record(since.elapsed());
            }
        }
    }
    Ok(())
}

fn answer_one(
    job: &Job, shared: &WatchState, mode: &Mode, page: (usize, u64), buffers: &Buffers,
) -> Result<(), JobError> {
    let copier = match mode {
        Mode::Ahead => return shared.allow_write(page),
        Mode::CopyBeforeWrite(copier) => copier,
    };
    let pool = buffers.of_block[page.0];
    let BufferPool { free, to_free } = &buffers.pools[pool];
    // What is not pending now never is again.
    let is_pending = || copier.pending().block(page.0).bits().contains(page.1);
    let is_lost = || job.cancel.is_cancelled() || copier.has_failed();
    let bytes = buffer(free, buffers.limit, is_pending, is_lost).unwrap_or_else(|error| {
        copier.fail(error);
        copier.stop_faults();
        None
    });
    let Some(mut bytes) = bytes else {
        // Nothing is taken then.
        return copier.write_fault(&job.memory, page, &mut []).map(|_| ());
    };
    let captured = copier.write_fault(&job.memory, page, &mut bytes);
    if let Ok(Some(pages)) = captured {
        let captured = Captured { copier: copier.clone(), at: page.0, pages, bytes, pool };
        return buffers.captured.send(captured).map_err(|_| JobError::Panicked);
    }
    // Also if it cannot be captured: those who come after it would wait for a buffer for ever.
    to_free.send(bytes).map_err(|_| JobError::Panicked)?;
    captured.map(|_| ())
}

/// A buffer for a page that is pending. Whoever waits to write waits for it, if the disk is slower
/// than the writes; but not for a snapshot that is lost anyway, nor for a disk that takes nothing
/// for `limit`.
fn buffer(
    free: &Receiver<PageBuffer>, limit: Duration, is_pending: impl Fn() -> bool,
    is_lost: impl Fn() -> bool,
) -> Result<Option<PageBuffer>, JobError> {
    let since = Instant::now();
    while is_pending() {
        match free.recv_timeout(CHECK_INTERVAL) {
            Ok(bytes) => return Ok(Some(bytes)),
            Err(_) if is_lost() => return Err(JobError::Cancelled),
            Err(_) if since.elapsed() >= limit => return Err(JobError::SlowImage { limit }),
            Err(_) => {}
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::ImageError;
    use crate::memory::copy_before_write::{Protection, Sink};
    use crate::memory::host_page_set::HostPageSet;
    use crate::memory::mappings::Mappings;
    use crate::memory::test_support::{job, memfd, memory};
    use pageferry_protocol::memory::PAGE_SIZE;

    /// Nothing comes here.
    #[derive(Debug)]
    struct Nowhere;

    impl Sink for Nowhere {
        fn put(&self, _: usize, range: PageRange, _: &[u8]) -> Result<u64, ImageError> {
            panic!("{range:?}")
        }
    }

    /// The disk has given no buffer back.
    #[test]
    fn who_waits_for_a_buffer_goes_on_if_the_job_is_cancelled_or_the_snapshot_is_lost() {
        for is_cancelled in [false, true] {
            let job = job(memory(&[64]));
            let pending = HostPageSet::empty(&job.memory, &[PAGE_SIZE]).unwrap();
            pending.add(0, 0, 1 << 3);
            let (pending, sink) = (Arc::new(pending), Arc::new(Nowhere));
            let copier = CopyBeforeWrite::new(&job.memory, pending, None, sink, Arc::default());
            let copier = Arc::new(copier);
            let (uffd, mappings) = (memfd(0).into(), Mappings::of(&job.memory));
            let shared = WatchState::new(Arc::new(Protection { uffd, mappings }), Vec::new());
            let ((to_free, free), (captured, _to_put)) = (channel(), channel());
            let pools = vec![BufferPool { free, to_free }];
            let buffers = Buffers { pools, of_block: vec![0], captured, limit: CHECK_INTERVAL * 3 };
            if is_cancelled {
                job.cancel.cancel().unwrap();
            } else {
                copier.fail(JobError::VmmGone);
            }
            let mode = Mode::CopyBeforeWrite(copier.clone());
            answer_one(&job, &shared, &mode, (0, 3), &buffers).unwrap();
            // And not that the disk is too slow.
            let why = copier.check().unwrap_err();
            assert_eq!(matches!(why, JobError::Cancelled), is_cancelled, "{why}");
            assert_eq!(matches!(why, JobError::VmmGone), !is_cancelled, "{why}");
            assert_eq!(copier.pending().remaining_pages(), 1, "nothing is taken");
        }
    }

    #[test]
    fn a_buffer_is_waited_for_while_the_page_is_wanted_and_the_vmm_has_patience() {
        let pool = BufferPool::new(8 << 20).unwrap();
        let (long, short) = (Duration::from_secs(3600), CHECK_INTERVAL * 3);
        let taken: Vec<_> =
            (0..4).map(|_| buffer(&pool.free, short, || true, || true).unwrap().unwrap()).collect();
        assert!(taken.iter().all(|bytes| bytes.len() == 8 << 20));
        assert!(buffer(&pool.free, long, || false, || true).unwrap().is_none());
        assert!(matches!(buffer(&pool.free, long, || true, || true), Err(JobError::Cancelled)));
        let error = buffer(&pool.free, short, || true, || false).unwrap_err().to_string();
        assert!(
            error.contains("nothing was written to the image for 60ms")
                && error.contains("hook_timeout"),
            "{error}"
        );
        let BufferPool { free, to_free } = pool;
        let waiting = std::thread::spawn(move || buffer(&free, long, || true, || false));
        taken.into_iter().for_each(|bytes| to_free.send(bytes).unwrap());
        assert!(waiting.join().unwrap().unwrap().is_some());
    }
}
