// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The thread that answers scrapes.
//!
//! One thread, `metrics`, has the listener and all connections. None of its sockets block, and it
//! has a low priority: a scraper costs a job nothing, however it behaves. What bounds it:
//!
//! - There are at most `MAX_EXCHANGES` connections. One more closes the oldest.
//! - An exchange takes at most [`DEADLINE`](super::exchange::DEADLINE).
//! - A connection holds at most a request's head and one answer in memory.
//!
//! A connection that is accepted is read at once, before the next one is accepted. So a scraper
//! that sends its request gets its answer, also while many others connect and send nothing.

use super::discarded::DiscardedBytes;
use super::exchange::Exchange;
use super::exposition::Exposition;
use super::request::Request;
use super::sample::Sample;
use crate::event::Event;
use crate::priority;
use crate::sandbox::{ThreadKind, enter_thread};
use crate::transport::Listener;
use crate::transport::backoff::{self, Backoff, is_momentary};
use crate::waiting::may_wait;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use std::io;
use std::os::fd::AsFd;
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

/// Most connections at once.
const MAX_EXCHANGES: usize = 8;

/// Answers scrapes until it is dropped.
#[derive(Debug)]
pub struct MetricsServer {
    end: Event,
    thread: Option<JoinHandle<()>>,
}

impl MetricsServer {
    /// Answers scrapes on `listener` with what `sample` returns.
    ///
    /// # Errors
    /// If the kernel refuses a thread or a descriptor.
    pub fn start(
        listener: Listener, sample: impl Fn() -> Sample + Send + 'static,
    ) -> io::Result<Self> {
        listener.set_nonblocking()?;
        let end = Event::new()?;
        let service = Service {
            end: end.try_clone()?,
            listener,
            backoff: Backoff::default(),
            accept_again: None,
            exchanges: Vec::new(),
            source: Source {
                sample,
                discarded: DiscardedBytes::default(),
                started: SystemTime::now(),
            },
        };
        let thread = std::thread::Builder::new().name("metrics".into());
        let thread = thread.spawn(move || {
            enter_thread(ThreadKind::Metrics);
            service.run();
        })?;
        Ok(Self { end, thread: Some(thread) })
    }
}

impl Drop for MetricsServer {
    fn drop(&mut self) {
        may_wait("wait for the thread of the metrics");
        self.end.signal();
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            log::error!("the thread of the metrics panicked");
        }
    }
}

/// Makes the text of the metrics.
struct Source<F> {
    sample: F,
    discarded: DiscardedBytes,
    started: SystemTime,
}

impl<F: Fn() -> Sample> Source<F> {
    fn encode(&mut self, request: Request) -> String {
        let sample = (self.sample)();
        let discarded_bytes = self.discarded.of(&sample.session.memory, Instant::now());
        let exposition = Exposition { sample, discarded_bytes, started: self.started };
        exposition.encode(request.format).unwrap_or_else(|error| {
            log::error!("the metrics cannot be encoded: {error}");
            String::new()
        })
    }
}

/// What the thread has.
struct Service<F> {
    end: Event,
    listener: Listener,
    backoff: Backoff,
    /// The time before which no connection is accepted; `None` while connections are accepted.
    accept_again: Option<Instant>,
    /// The oldest comes first.
    exchanges: Vec<Exchange>,
    source: Source<F>,
}

impl<F: Fn() -> Sample> Service<F> {
    fn run(mut self) {
        priority::lower();
        loop {
            match self.wait() {
                Ok(ready) if ready.end => return,
                Ok(ready) => self.advance(&ready),
                Err(errno) => {
                    log::error!("no metrics any more: poll failed: {errno}");
                    return;
                }
            }
        }
    }

    /// Waits until something is ready.
    fn wait(&self) -> Result<Ready, Errno> {
        let listened = match self.accept_again {
            None => PollFlags::IN,
            Some(_) => PollFlags::empty(),
        };
        let mut polled = vec![
            PollFd::from_borrowed_fd(self.end.as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(self.listener.as_fd(), listened),
        ];
        let exchanges = self.exchanges.iter();
        polled.extend(
            exchanges
                .map(|exchange| PollFd::from_borrowed_fd(exchange.as_fd(), exchange.waits_for())),
        );
        match poll(&mut polled, self.timeout().as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
        let mut ready = polled.iter().map(|polled| !polled.revents().is_empty());
        Ok(Ready {
            end: ready.next().unwrap_or_default(),
            listener: ready.next().unwrap_or_default(),
            exchanges: ready.collect(),
        })
    }

    /// The time until the next deadline; `None` if there is none.
    fn timeout(&self) -> Option<Timespec> {
        let deadlines = self.exchanges.iter().map(Exchange::deadline).chain(self.accept_again);
        let left = deadlines.min()?.saturating_duration_since(Instant::now());
        // Rounded up, so that the deadline has passed afterwards.
        let left = left + Duration::from_millis(1);
        // At most a few seconds.
        Timespec::try_from(left).ok()
    }

    /// Continues the exchanges that are ready, removes those that are over, and accepts a
    /// connection.
    fn advance(&mut self, ready: &Ready) {
        for (exchange, _) in
            self.exchanges.iter_mut().zip(&ready.exchanges).filter(|(_, ready)| **ready)
        {
            exchange.advance(|request| self.source.encode(request));
        }
        let now = Instant::now();
        self.exchanges.retain(|exchange| !exchange.is_over(now));
        self.accept_again = self.accept_again.filter(|due| *due > now);
        if ready.listener {
            self.accept(now);
        }
    }

    fn accept(&mut self, now: Instant) {
        let accepted = match self.listener.accept() {
            Ok(socket) => Exchange::new(socket, now),
            Err(error) => Err(error),
        };
        let mut exchange = match accepted {
            Ok(exchange) => exchange,
            Err(error) if is_momentary(&error) => return,
            Err(error) => {
                self.backoff.failed(&error, now);
                self.accept_again = Some(now + backoff::PAUSE);
                return;
            }
        };
        // Most scrapers have sent their request already.
        exchange.advance(|request| self.source.encode(request));
        if exchange.is_over(now) {
            return;
        }
        if self.exchanges.len() == MAX_EXCHANGES {
            self.exchanges.remove(0);
        }
        self.exchanges.push(exchange);
    }
}

/// What [`Service::wait`] found ready.
struct Ready {
    end: bool,
    listener: bool,
    exchanges: Vec<bool>,
}
