// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

use super::*;
use crate::memory::MemoryError;
use crate::memory::copy_before_write::CaptureError;
use crate::memory::page_placer::PlaceError;
use pageferry_protocol::control::job::{OutgoingOptions, SnapshotOptions};
use std::sync::Barrier;

#[test]
fn a_process_that_the_kernel_does_not_find_is_called_the_vmm() {
    let ended = |error: JobError| {
        let (memory, hooks) = (Arc::new(GuestMemory::default()), Arc::new(Hooks::new(None)));
        let (options, notify) = ((&SnapshotOptions::default()).into(), notifier().unwrap());
        let job = Job::new(1, JobKind::Snapshot, memory, hooks, options, notify).unwrap();
        job.finish(Err(error));
        job.status().error.unwrap()
    };
    let gone = ended(CaptureError::Protection { id: 3, source: Errno::SRCH }.into());
    assert!(gone.starts_with("the VMM is gone: block 3"), "{gone}");
    let gone = ended(CaptureError::ReadFaults(Errno::SRCH).into());
    assert!(gone.starts_with("the VMM is gone: cannot read write faults"), "{gone}");
    let gone = ended(PlaceError::Read(Errno::SRCH).into());
    assert!(gone.starts_with("the VMM is gone: cannot read faults"), "{gone}");
    let place = PlaceError::Place { id: 3, host_page: 9, source: Errno::SRCH };
    let gone = ended(MemoryError::Place(place).into());
    assert!(gone.starts_with("the VMM is gone: host page 0x9 of block 3"), "{gone}");
    let gone = ended(JobError::Io { what: "read", source: Errno::SRCH.into() });
    assert!(gone.starts_with("the VMM is gone: cannot read"), "{gone}");
    let other = ended(CaptureError::Protection { id: 3, source: Errno::INVAL }.into());
    assert!(other.starts_with("block 3"), "{other}");
}

/// The window is a few instructions wide, so it takes many pauses to meet it.
#[test]
fn a_note_does_not_replace_the_reason_of_a_pause() {
    const PAUSES: u64 = 3_000;
    let (memory, hooks) = (Arc::new(GuestMemory::default()), Arc::new(Hooks::new(None)));
    let (options, notify) = ((&OutgoingOptions::default()).into(), notifier().unwrap());
    let job = Job::new(1, JobKind::Incoming, memory, hooks, options, notify).unwrap();
    let (done, mut lost) = (std::sync::atomic::AtomicBool::new(false), 0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(std::sync::atomic::Ordering::Relaxed) {
                job.note("the guest waits");
                job.note("");
            }
        });
        for _ in 0..PAUSES {
            job.continue_postcopy();
            job.suspend_postcopy(&JobError::Abandoned);
            let reason = job.status().error;
            lost += u64::from(reason.is_none_or(|reason| !reason.contains("given up")));
        }
        done.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    assert_eq!(lost, 0, "pauses without their reason");
}

#[test]
fn an_ended_job_enters_no_other_phase() {
    let (memory, hooks) = (Arc::new(GuestMemory::default()), Arc::new(Hooks::new(None)));
    let (options, notify) = ((&OutgoingOptions::default()).into(), notifier().unwrap());
    let job = Job::new(1, JobKind::Outgoing, memory, hooks, options, notify).unwrap();
    job.finish(Err(JobError::Abandoned));
    job.enter(Phase::Recovering);
    assert_eq!(job.phase(), Phase::Failed);
}

#[test]
fn a_cancel_does_not_hide_that_a_thread_panicked() {
    for error in [JobError::Panicked, CaptureError::Panicked.into()] {
        let (memory, hooks) = (Arc::new(GuestMemory::default()), Arc::new(Hooks::new(None)));
        let (options, notify) = ((&SnapshotOptions::default()).into(), notifier().unwrap());
        let job = Job::new(1, JobKind::Snapshot, memory, hooks, options, notify).unwrap();
        job.cancel.cancel(CancelledBy::Operator).unwrap();
        job.finish(Err(error));
        let status = job.status();
        assert_eq!(
            (status.phase, status.error_text()),
            (Phase::Failed, "a worker of the job panicked")
        );
    }
}

/// The cancel comes just as the job fails. The window is a few instructions wide, so it takes
/// many jobs to meet it.
#[test]
fn a_cancel_that_is_accepted_is_how_the_job_ends() {
    const JOBS: u64 = 5_000;
    let (notify, start) = (notifier().unwrap(), Barrier::new(2));
    let job = |id| {
        let (memory, hooks) = (Arc::new(GuestMemory::default()), Arc::new(Hooks::new(None)));
        let options = (&OutgoingOptions::default()).into();
        Job::new(id, JobKind::Outgoing, memory, hooks, options, notify.clone()).unwrap()
    };
    let next = Mutex::new(Arc::new(job(0)));
    let mut otherwise = Vec::new();
    std::thread::scope(|scope| {
        // A panic in here would leave the other thread waiting.
        let operator = scope.spawn(|| {
            let mut otherwise = Vec::new();
            for _ in 0..JOBS {
                start.wait();
                let job = lock(&next).clone();
                start.wait();
                let accepted = job.cancel.cancel(CancelledBy::Operator);
                start.wait();
                let (expected, phase) =
                    (accepted.map_or(Phase::Failed, |()| Phase::Cancelled), job.status().phase);
                if phase != expected {
                    otherwise.push((accepted, phase));
                }
            }
            otherwise
        });
        for id in 1..=JOBS {
            let job = Arc::new(job(id));
            *lock(&next) = job.clone();
            start.wait();
            start.wait();
            job.finish(Err(JobError::Abandoned));
            start.wait();
        }
        otherwise = operator.join().unwrap();
    });
    assert_eq!(otherwise, [], "what the cancel said, and how the job ended");
}
