// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Write faults of a background snapshot: the guest keeps running while its memory is saved.
//!
//! When the guest writes to a page that is not saved yet, the write fault arrives here. Two threads
//! handle it:
//!
//! - The *fault thread* copies the page into a free buffer and removes the write protection. The
//!   guest continues; it does not wait for the disk.
//! - The *writer thread* puts filled buffers into the image and returns them to the pool.
//!
//! The number of buffers is fixed. If the guest writes faster than the disk, the fault thread waits
//! for a buffer, and the guest waits with it. After the hook timeout without a free buffer the
//! snapshot fails, and all writes continue: a disk that hangs costs the snapshot, never the guest.

use super::watch_state::{WatchState, WriteFaultAction};
use crate::event::Event;
use crate::job::{Job, JobError};
use crate::memory::PageBuffer;
use crate::memory::copy_before_write::CaptureError;
use crate::memory::copy_before_write::CopyBeforeWrite;
use crate::memory::guest_memory::DiscardObserver;
use crate::missing_faults::wait;
use pageferry_protocol::memory::PageRange;
use pageferry_protocol::shm::MappingError;
use pageferry_protocol::userfault::{AddressRange, Events};
use std::collections::BTreeSet;
use std::os::fd::AsFd;
use std::panic::resume_unwind;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

/// The bytes of all buffers for host pages of one size. There are always a few buffers.
const BUFFER_BYTES: u64 = 32 << 20;
/// The largest number of buffers for host pages of one size: 8 MiB of buffers for small pages.
const MAX_BUFFERS: u64 = 2048;
/// The interval at which a wait for a buffer checks whether it is still needed.
const CHECK_INTERVAL: Duration = Duration::from_millis(20);

/// A captured page that must be put into the image.
struct Captured {
    copier: Arc<CopyBeforeWrite>,
    at: usize,
    pages: PageRange,
    bytes: PageBuffer,
    pool: usize,
}

/// The buffers that go back and forth between the two threads.
struct Buffers {
    pools: Vec<BufferPool>,
    /// The index of the pool for each block.
    of_block: Vec<usize>,
    captured: Sender<Captured>,
    /// The longest wait for a buffer.
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
        for _ in 0..(BUFFER_BYTES / host_page).clamp(4, MAX_BUFFERS) {
            // Cannot fail: this function holds the receiver.
            let _ = to_free.send(PageBuffer::try_new(host_page as usize)?);
        }
        Ok(Self { free, to_free })
    }
}

/// Starts both threads. They handle faults until `stop` is readable, and end when all captured
/// pages are in the image.
///
/// # Errors
/// If a thread cannot be started, or there is no memory for the buffers.
pub fn start(
    job: &Arc<Job>, shared: &Arc<WatchState>, stop: Event,
) -> Result<JoinHandle<()>, JobError> {
    let (job, shared) = (job.clone(), shared.clone());
    let host_pages = || job.memory.blocks().iter().map(|block| block.backing.host_page_size());
    let sizes: BTreeSet<u64> = host_pages().collect();
    let pools = sizes.iter().map(|size| BufferPool::new(*size)).collect::<Result<Vec<_>, _>>()?;
    let of_block = host_pages().map(|size| sizes.range(..size).count()).collect();
    let give_back: Vec<_> = pools.iter().map(|pool| pool.to_free.clone()).collect();
    let (captured, to_put) = channel();
    let builder = |name| Builder::new().name(format!("{name}-{}", job.id));
    let (fault_thread, writer_thread) = (builder("faults"), builder("captured"));
    let writer = writer_thread
        .spawn(move || run_writer(to_put, &give_back))
        .map_err(JobError::from_io("start a thread"))?;
    let buffers = Buffers { pools, of_block, captured, limit: job.hook_timeout };
    let fault_thread = fault_thread.spawn(move || {
        run_faults(&job, &shared, &stop, &buffers);
        drop(buffers);
        if let Err(panic) = writer.join() {
            resume_unwind(panic);
        }
    });
    fault_thread.map_err(JobError::from_io("start a thread"))
}

fn run_faults(job: &Job, shared: &WatchState, stop: &Event, buffers: &Buffers) {
    let mut guard = FailUnlessOver { shared, over: false };
    match handle_faults(job, shared, stop, buffers) {
        Ok(()) => guard.over = true,
        Err(error) => fail(&shared.mode(), error),
    }
}

/// On drop, also after a panic, prevents the instant, unless the fault thread has ended normally.
struct FailUnlessOver<'a> {
    shared: &'a WatchState,
    over: bool,
}

impl Drop for FailUnlessOver<'_> {
    fn drop(&mut self) {
        if !self.over {
            self.shared.fail();
        }
    }
}

fn run_writer(captured: Receiver<Captured>, free: &[Sender<PageBuffer>]) {
    for Captured { copier, at, pages, bytes, pool } in captured {
        if let Err(error) = copier.put_run(at, pages, &bytes[..pages.bytes() as usize]) {
            copier.fail(error);
        }
        // Fails only at the end, when nobody needs the buffer any more.
        let _ = free[pool].send(bytes);
    }
}

/// Before the instant there is no snapshot to fail, so the error is only logged. The job meets the
/// same problem when it protects the next page, and reports it.
fn fail(mode: &WriteFaultAction, error: CaptureError) {
    match mode {
        WriteFaultAction::Ahead => {
            log::warn!("cannot handle a write fault: {}", crate::error::chain(&error))
        }
        WriteFaultAction::CopyBeforeWrite(copier) => copier.fail(error),
    }
}

fn handle_faults(
    job: &Job, shared: &WatchState, stop: &Event, buffers: &Buffers,
) -> Result<(), CaptureError> {
    let uffd = &shared.protection.uffd;
    let mut events = Events::default();
    while wait(uffd, stop.as_fd()).map_err(CaptureError::ReadFaults)? {
        let since = Instant::now();
        // Locked before the faults are read: a thread that gets the lock after this one finds that
        // all faults that were read are handled.
        let mode = shared.mode();
        uffd.read_events(&mut events).map_err(CaptureError::ReadFaults)?;
        for removed in events.removed() {
            handle_removal(job, shared, &mode, *removed);
        }
        for address in events.faults() {
            let Some(page) = shared.protection.mappings.locate(*address) else { continue };
            // After an error the other faults are still handled.
            if let Err(error) = handle_fault(job, shared, &mode, page, buffers) {
                fail(&mode, error);
            }
            // Faults are counted and timed only from the instant on.
            if let WriteFaultAction::CopyBeforeWrite(_) = *mode {
                job.live.latency.record(since.elapsed());
            }
        }
    }
    Ok(())
}

/// The VMM has freed memory without a request, and may let the guest use it from now on.
fn handle_removal(job: &Job, shared: &WatchState, mode: &WriteFaultAction, removed: AddressRange) {
    for (at, host_pages) in shared.protection.mappings.locate_range(removed) {
        match mode {
            WriteFaultAction::Ahead => {
                let pages = shared.ahead[at].pages(host_pages);
                job.memory.blocks()[at].hint_freed(pages);
                shared.on_freed(at, pages);
            }
            WriteFaultAction::CopyBeforeWrite(copier) => copier.freed_unannounced(at, host_pages),
        }
    }
}

fn handle_fault(
    job: &Job, shared: &WatchState, mode: &WriteFaultAction, page: (usize, u64), buffers: &Buffers,
) -> Result<(), CaptureError> {
    let copier = match mode {
        WriteFaultAction::Ahead => return shared.allow_write(page),
        WriteFaultAction::CopyBeforeWrite(copier) => copier,
    };
    let pool = buffers.of_block[page.0];
    let BufferPool { free, to_free } = &buffers.pools[pool];
    // A page that is not pending now never becomes pending again.
    let is_pending = || copier.pending().block(page.0).bits().contains(page.1);
    let is_lost = || job.cancel.is_cancelled() || copier.has_failed();
    let bytes = wait_for_buffer(free, buffers.limit, is_pending, is_lost).unwrap_or_else(|error| {
        copier.fail(error);
        copier.stop_faults();
        None
    });
    let Some(mut bytes) = bytes else {
        // Without a buffer nothing is taken: the page is not pending, or the snapshot takes nothing
        // any more.
        return copier.write_fault(&job.memory.readers, page, &mut []).map(|_| ());
    };
    let captured = copier.write_fault(&job.memory.readers, page, &mut bytes);
    if let Ok(Some(pages)) = captured {
        let captured = Captured { copier: copier.clone(), at: page.0, pages, bytes, pool };
        return buffers.captured.send(captured).map_err(|_| CaptureError::Panicked);
    }
    // The buffer is also returned after an error. Otherwise later faults would wait for it forever.
    to_free.send(bytes).map_err(|_| CaptureError::Panicked)?;
    captured.map(|_| ())
}

/// Waits for a buffer for a pending page, and the guest waits with it if it writes faster than the
/// disk. The wait ends with `None` if the page is not pending any more, and with an error if the
/// snapshot is lost, or if no buffer was returned for `limit`.
fn wait_for_buffer(
    free: &Receiver<PageBuffer>, limit: Duration, is_pending: impl Fn() -> bool,
    is_lost: impl Fn() -> bool,
) -> Result<Option<PageBuffer>, CaptureError> {
    let since = Instant::now();
    while is_pending() {
        match free.recv_timeout(CHECK_INTERVAL) {
            Ok(bytes) => return Ok(Some(bytes)),
            Err(_) if is_lost() => return Err(CaptureError::GivenUp),
            Err(_) if since.elapsed() >= limit => return Err(CaptureError::SinkTimeout { limit }),
            Err(_) => {}
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::CancelledBy;
    use crate::memory::copy_before_write::SinkError;
    use crate::memory::copy_before_write::{Protection, Sink};
    use crate::memory::host_page_set::HostPageSet;
    use crate::memory::mappings::Mappings;
    use crate::memory::test_support::{job, memfd, memory};
    use pageferry_protocol::memory::PAGE_SIZE;

    /// A sink that must not get any page.
    #[derive(Debug)]
    struct Nowhere;

    impl Sink for Nowhere {
        fn put(&self, _: usize, range: PageRange, _: &[u8]) -> Result<u64, SinkError> {
            panic!("{range:?}")
        }
    }

    /// The disk has returned no buffer.
    #[test]
    fn wait_for_a_buffer_ends_with_the_job_or_the_snapshot() {
        for is_cancelled in [false, true] {
            let job = job(memory(&[64]));
            let pending = HostPageSet::empty(job.memory.blocks(), &[PAGE_SIZE]).unwrap();
            pending.add(0, 0, 1 << 3);
            let (pending, sink) = (Arc::new(pending), Arc::new(Nowhere));
            let copier =
                CopyBeforeWrite::new(job.memory.blocks(), pending, None, sink, Arc::default());
            let copier = Arc::new(copier);
            let (uffd, mappings) = (memfd(0).into(), Mappings::of(job.memory.blocks()));
            let shared = WatchState::new(
                Arc::new(Protection { uffd, mappings, unannounced_frees: false }),
                Vec::new(),
            );
            let ((to_free, free), (captured, _to_put)) = (channel(), channel());
            let pools = vec![BufferPool { free, to_free }];
            let buffers = Buffers { pools, of_block: vec![0], captured, limit: CHECK_INTERVAL * 3 };
            if is_cancelled {
                job.cancel.cancel(CancelledBy::Operator).unwrap();
            } else {
                copier.fail(CaptureError::Panicked);
            }
            let mode = WriteFaultAction::CopyBeforeWrite(copier.clone());
            handle_fault(&job, &shared, &mode, (0, 3), &buffers).unwrap();
            // The reason must not be that the disk is too slow.
            let why = copier.check().unwrap_err();
            assert_eq!(matches!(why, CaptureError::GivenUp), is_cancelled, "{why}");
            assert_eq!(matches!(why, CaptureError::Panicked), !is_cancelled, "{why}");
            assert_eq!(copier.pending().remaining_pages(), 1, "nothing is taken");
        }
    }

    #[test]
    fn wait_for_a_buffer_ends_when_pointless_or_too_long() {
        let pool = BufferPool::new(8 << 20).unwrap();
        let (long, short) = (Duration::from_secs(3600), CHECK_INTERVAL * 3);
        let taken: Vec<_> = (0..4)
            .map(|_| wait_for_buffer(&pool.free, short, || true, || true).unwrap().unwrap())
            .collect();
        assert!(taken.iter().all(|bytes| bytes.len() == 8 << 20));
        assert!(wait_for_buffer(&pool.free, long, || false, || true).unwrap().is_none());
        assert!(matches!(
            wait_for_buffer(&pool.free, long, || true, || true),
            Err(CaptureError::GivenUp)
        ));
        let error = wait_for_buffer(&pool.free, short, || true, || false).unwrap_err().to_string();
        assert!(
            error.contains("nothing was written to the image for 60ms")
                && error.contains("hook_timeout"),
            "{error}"
        );
        let BufferPool { free, to_free } = pool;
        let waiting = std::thread::spawn(move || wait_for_buffer(&free, long, || true, || false));
        taken.into_iter().for_each(|bytes| to_free.send(bytes).unwrap());
        assert!(waiting.join().unwrap().unwrap().is_some());
    }
}
