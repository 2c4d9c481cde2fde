// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Errors for accesses to pages that never arrive.
//!
//! After the loss of an agent, missing pages stay missing. A thread reads the faults of the
//! userfaultfd and marks each page that is accessed with `UFFDIO_POISON`: the access gets SIGBUS,
//! or EFAULT from the kernel, instead of waiting for ever. Pages that nobody accesses stay
//! unmarked.

use crate::error::Error;
use crate::registration::Registration;
use crate::stop::{StopSource, StopToken, stop_pair};
use crate::threads::{catch_panic, spawn_thread};
use pageferry_protocol::userfault::{Events, Poisoned};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Interval at which all waiting accesses are woken. A lost agent that still lives may read faults
/// and never answer them; a thread that is woken raises its fault again.
const WAKE_INTERVAL: Duration = Duration::from_millis(250);

/// The thread. Dropping this ends it.
#[derive(Debug)]
pub(crate) struct Poisoner {
    stop: StopSource,
    thread: JoinHandle<Vec<Poisoned>>,
}

impl Poisoner {
    /// Starts the thread. It ends by itself when the registration is dropped.
    pub(crate) fn start(registered: &Arc<Registration>) -> Result<Self, Error> {
        let (stop, stopped) = stop_pair()?;
        let weak = Arc::downgrade(registered);
        let run = move || {
            let mut events = Events::default();
            let mut marked = Vec::new();
            while let Some(registered) = weak.upgrade() {
                // The agent has read the faults of the accesses that wait already. They have to
                // fault again. Fails for mappings that are gone, where nobody waits.
                for range in &registered.ranges {
                    let _ = registered.uffd.wake(*range);
                }
                match catch_panic(|| poison_faults(&registered, &stopped, &mut events, &mut marked))
                {
                    Ok(true) => {}
                    Ok(false) => break,
                    // No other thread answers these faults, so this one continues.
                    Err(panic) => log::error!("poisoning missing pages panicked: {panic}"),
                }
            }
            marked
        };
        Ok(Self { stop, thread: spawn_thread("pageferry-poison", run)? })
    }

    /// Ends the thread. Returns the pages that it marked.
    pub(crate) fn end(self) -> Vec<Poisoned> {
        drop(self.stop);
        self.thread.join().unwrap_or_default()
    }
}

/// Poisons the pages of the faults that arrive within [`WAKE_INTERVAL`] and adds them to `marked`.
/// False if the thread is to end.
fn poison_faults(
    registered: &Registration, stopped: &StopToken, events: &mut Events, marked: &mut Vec<Poisoned>,
) -> bool {
    let until = Instant::now() + WAKE_INTERVAL;
    while Instant::now() < until {
        let mut polled =
            [PollFd::new(&registered.uffd, PollFlags::IN), PollFd::new(stopped, PollFlags::IN)];
        let wake = Timespec { tv_sec: 0, tv_nsec: i64::from(WAKE_INTERVAL.subsec_nanos()) };
        match poll(&mut polled, Some(&wake)) {
            Ok(0) | Err(Errno::INTR) => continue,
            Ok(_) => {}
            Err(_) => return false,
        }
        if !polled[1].revents().is_empty() {
            return false;
        }
        if registered.uffd.read_events(events).is_err() {
            return false;
        }
        for address in events.faults() {
            let Some(page) = registered.page_of(*address) else { continue };
            // The page may be there by now, or marked already.
            match registered.uffd.poison(page) {
                Ok(page) => marked.push(page),
                Err(_) => {
                    let _ = registered.uffd.wake(page);
                }
            }
        }
    }
    true
}
