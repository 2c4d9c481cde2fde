//! Watches whether the agent lives, on a thread of its own.
//!
//! Other threads cannot be relied on to look: while memory of the guest is missing, or protected,
//! each of them may wait for the agent at a page, that of the hook channel among them. While the
//! guest is paused, or nothing happens at all, no thread may have a reason to look.
//!
//! An agent that dies is found at once, by the end of the connection. One that hangs is asked for a
//! sign of life in every interval: how its last job stands. If it owes the answer for too long the
//! client gives it up, as for any other request, which ends the connection.
//!
//! The interval is [`BUSY_INTERVAL`] while memory is protected or missing, or the guest is paused
//! for the agent, and else [`Config::heartbeat`]. How long the answer may take, [`crate::timeouts`]
//! says.
//!
//! # What this thread may wait for
//!
//! For the agent, until that deadline; for nobody else. Above all not for the lock of the session,
//! under which a VMM's thread may wait: it is tried, and a beat is left out where it is held.
//! Nothing is lost by that, since whoever holds it asks the agent something: the answer is a sign
//! of life, and the lack of one is found there, with the same patience. Those requests come to
//! their end without guest memory: what is sent is encoded on the heap, the bitmaps of discarded
//! pages and the log are files of their own, and freeing a range of guest memory faults at none of
//! its pages.
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

/// Time between two signs of life while somebody may wait for the agent.
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

/// Which end of a connection is the end of the agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum WatchedSockets {
    /// That of the control channel. A VMM without a hook channel may still have an agent.
    Control,
    /// That of either channel.
    Both,
}

impl Heartbeat {
    /// Starts the thread, which calls `lost` when the connection ends, or when `is_lost` says so of
    /// how the job of a living agent stands. Also if the thread itself panics: then the connection
    /// is cut first. Both may be called before this returns.
    ///
    /// # Errors
    /// If the thread cannot be started.
    pub(crate) fn start(
        probe: Probe, link: Arc<Link>, interval: Duration, ends: WatchedSockets,
        is_lost: impl Fn(&JobStatus) -> bool + Send + 'static,
        lost: impl FnOnce(StopToken) + Send + 'static,
    ) -> Result<Self, Error> {
        let (stop, stopped) = stop_pair()?;
        let look = move || probe.0().is_some_and(|status| is_lost(&status));
        let run = move || {
            let watched = catch_panic(|| {
                let ends = &link.sockets()[..if ends == WatchedSockets::Both { 2 } else { 1 }];
                while let Some(alive) = next_beat(&stopped, ends, interval) {
                    if !alive || look() {
                        return true;
                    }
                }
                false
            });
            let is_lost = watched.unwrap_or_else(|panic| {
                log::error!("the watch over the agent panicked, so the agent is given up: {panic}");
                link.shut_down();
                true
            });
            if is_lost && let Err(panic) = catch_panic(|| lost(stopped)) {
                log::error!("the end of the watch over the agent panicked: {panic}");
                link.shut_down();
            }
        };
        spawn_thread("pageferry-watch", run).map(|_| Self { _stop: stop })
    }
}

/// Waits for the time between two beats: false if one of these sockets ended, `None` if the thread
/// is to.
fn next_beat(stopped: &StopToken, ends: &[BorrowedFd<'_>], interval: Duration) -> Option<bool> {
    let mut polled = vec![PollFd::new(stopped, PollFlags::IN)];
    // Not for reading: answers are for whoever asked.
    polled.extend(ends.iter().map(|end| PollFd::from_borrowed_fd(*end, PollFlags::RDHUP)));
    // Cannot fail but for intervals of more than 292 billion years, which are as good as none.
    let interval = Timespec::try_from(interval).ok();
    match poll(&mut polled, interval.as_ref()) {
        Ok(0) | Err(Errno::INTR) => Some(true),
        Ok(_) if !polled[0].revents().is_empty() => None,
        // Nothing can be told any more without poll, and it counts as the end.
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
