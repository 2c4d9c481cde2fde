// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A thread that watches whether the agent lives.
//!
//! No other thread can be relied on for that. While memory of the guest is missing or protected,
//! any of them may wait for the agent at a page, also the thread of the hook channel. While the
//! guest is paused, or idle, no thread may have a reason to ask.
//!
//! - An agent that dies is found at once, by the end of the connection.
//! - An agent that hangs is found by a [probe](Probe): in every interval the thread asks how the
//!   last job stands. If the answer does not come in time, the client gives the agent up as for any
//!   other request, which ends the connection.
//!
//! The interval is [`BUSY_INTERVAL`] while memory is protected or missing, or the guest is paused
//! for the agent; otherwise it is [`Config::heartbeat`]. [`crate::timeouts`] says how long the
//! answer may take.
//!
//! # What this thread may wait for
//!
//! For the agent, until the deadline of the probe, and for nothing else. In particular not for the
//! lock of the session, which a thread of the VMM may hold while it waits. The probe only tries
//! that lock and skips a beat if the lock is held.
//!
//! A skipped beat loses nothing: the thread that holds the lock is sending a request, with the same
//! timeout, and finds out the same. That request needs no guest memory to complete: its body is on
//! the heap, the bitmaps and the log are files of their own, and freeing guest memory faults at
//! none of its pages.
//!
//! [`Config::heartbeat`]: crate::Config::heartbeat

use crate::error::Error;
use crate::link::Link;
use crate::stop::{StopSource, StopToken, stop_pair};
use crate::threads::{catch_panic, spawn_thread};
use pageferry_protocol::control::job::JobStatus;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Duration;

/// Interval between two probes while a thread or the guest may wait for the agent.
pub(crate) const BUSY_INTERVAL: Duration = Duration::from_millis(500);

/// The thread. Dropping this ends it.
#[derive(Debug)]
pub(crate) struct Heartbeat {
    _stop: StopSource,
}

/// Asks the agent for a sign of life: how its last job stands.
///
/// `None` if nobody has to ask, or if there was no answer; then the connection has ended, which the
/// heartbeat sees by itself.
#[derive(Clone)]
pub(crate) struct Probe(Arc<dyn Fn() -> Option<JobStatus> + Send + Sync>);

impl Probe {
    pub(crate) fn new(ask: impl Fn() -> Option<JobStatus> + Send + Sync + 'static) -> Self {
        Self(Arc::new(ask))
    }
}

impl std::fmt::Debug for Probe {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Probe")
    }
}

/// The sockets whose end counts as the end of the agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum WatchedSockets {
    /// The control channel. A VMM without a hook channel may still have an agent.
    Control,
    /// The control channel and the hook channel.
    Both,
}

impl Heartbeat {
    /// Starts the thread. It calls `lost` once: when the connection ends, when `is_lost` says so of
    /// the status that a probe returned, or when the thread itself panics. After a panic it first
    /// shuts the connection down. `is_lost` and `lost` may be called before this returns.
    ///
    /// # Errors
    /// If the thread cannot be started.
    pub(crate) fn start(
        probe: Probe, link: Arc<Link>, interval: Duration, watched: WatchedSockets,
        is_lost: impl Fn(&JobStatus) -> bool + Send + 'static,
        lost: impl FnOnce(StopToken) + Send + 'static,
    ) -> Result<Self, Error> {
        let (stop, stopped) = stop_pair()?;
        let look = move || probe.0().is_some_and(|status| is_lost(&status));
        let run = move || {
            let outcome = catch_panic(|| {
                let sockets = link.sockets();
                let sockets = &sockets[..if watched == WatchedSockets::Both { 2 } else { 1 }];
                while let Some(alive) = next_beat(&stopped, sockets, interval) {
                    if !alive || look() {
                        return true;
                    }
                }
                false
            });
            let is_lost = outcome.unwrap_or_else(|panic| {
                log::error!("the heartbeat panicked, so the agent is given up: {panic}");
                link.shut_down();
                true
            });
            if is_lost && let Err(panic) = catch_panic(|| lost(stopped)) {
                log::error!("the end of the heartbeat panicked: {panic}");
                link.shut_down();
            }
        };
        spawn_thread("pageferry-watch", run).map(|_| Self { _stop: stop })
    }
}

/// Waits for the next beat. Returns true then, false if one of these sockets has ended, and `None`
/// if the thread is to end.
fn next_beat(stopped: &StopToken, ends: &[BorrowedFd<'_>], interval: Duration) -> Option<bool> {
    let mut polled = vec![PollFd::new(stopped, PollFlags::IN)];
    // Not for reading: the thread that sent a request reads its answer.
    polled.extend(ends.iter().map(|end| PollFd::from_borrowed_fd(*end, PollFlags::RDHUP)));
    // Fails only above 292 billion years, which is as good as no timeout.
    let interval = Timespec::try_from(interval).ok();
    match poll(&mut polled, interval.as_ref()) {
        Ok(0) | Err(Errno::INTR) => Some(true),
        Ok(_) if !polled[0].revents().is_empty() => None,
        // Without poll nothing can be seen any more, so a failure counts as the end.
        Ok(_) | Err(_) => Some(false),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::channel;

    #[test]
    fn a_watch_that_panics_gives_the_agent_up_and_says_so() {
        let (link, far) = Link::for_test();
        let (say, heard) = channel();
        let watch = Heartbeat::start(
            Probe::new(|| panic!("a defect")),
            Arc::new(link),
            Duration::from_millis(1),
            WatchedSockets::Both,
            |_| false,
            move |_| say.send(()).unwrap(),
        )
        .unwrap();
        heard.recv_timeout(Duration::from_secs(60)).expect("that it is heard of");
        // Both channels have ended for the agent, too.
        for socket in &far {
            let mut polled = [PollFd::new(socket, PollFlags::RDHUP)];
            assert_eq!(poll(&mut polled, Some(&Timespec { tv_sec: 60, tv_nsec: 0 })), Ok(1));
        }
        drop(watch);
    }
}
