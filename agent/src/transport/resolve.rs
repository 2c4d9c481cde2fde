// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Name look-ups with a deadline.
//!
//! The system's look-up (`getaddrinfo`) has no deadline and cannot be cancelled. If the name server
//! does not answer, it takes 10 seconds or more. So each look-up runs on its own thread, and the
//! caller waits for the result until its deadline or until its job is cancelled.
//!
//! A thread whose caller gave up ends when the system's look-up ends. At most `MAX_LOOKUPS` such
//! threads exist; further look-ups are refused.

use crate::cancel::{Cancel, CancelError};
use crate::opener;
use crate::waiting::may_wait;
use pageferry_protocol::control::socket::wait;
use rustix::event::PollFlags;
use rustix::pipe::{PipeFlags, pipe_with};
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

/// Most look-ups at once, including those whose caller gave up.
const MAX_LOOKUPS: usize = 16;

static LOOKUPS: AtomicUsize = AtomicUsize::new(0);

/// The socket addresses of `HOST:PORT`, after at most `timeout`.
///
/// # Errors
/// If the look-up fails or takes longer than `timeout`.
pub fn resolve(name: &str, timeout: Duration) -> io::Result<Vec<SocketAddr>> {
    resolve_by(opener::look_up, name, timeout)
}

fn resolve_by(look_up: LookUp, name: &str, timeout: Duration) -> io::Result<Vec<SocketAddr>> {
    let mut under_way = match Found::start(look_up, name)? {
        Found::Now(addresses) => return Ok(addresses),
        Found::Later(under_way) => under_way,
    };
    may_wait("look up a name");
    let ready = wait(under_way.ready.as_fd(), PollFlags::IN, Instant::now() + timeout)?;
    under_way.addresses(name, ready, timeout)
}

/// As [`resolve`], but also ends when the job is cancelled. The inner error is that of the look-up.
///
/// # Errors
/// If the job is cancelled meanwhile, or `poll` fails.
pub fn resolve_for(
    cancel: &Cancel, name: &str, timeout: Duration,
) -> Result<io::Result<Vec<SocketAddr>>, CancelError> {
    resolve_for_by(opener::look_up, cancel, name, timeout)
}

fn resolve_for_by(
    look_up: LookUp, cancel: &Cancel, name: &str, timeout: Duration,
) -> Result<io::Result<Vec<SocketAddr>>, CancelError> {
    let mut under_way = match Found::start(look_up, name) {
        Ok(Found::Now(addresses)) => return Ok(Ok(addresses)),
        Ok(Found::Later(under_way)) => under_way,
        Err(error) => return Ok(Err(error)),
    };
    let ready =
        cancel.wait(&[(under_way.ready.as_fd(), PollFlags::IN)], Instant::now() + timeout)?;
    Ok(under_way.addresses(name, ready == [true], timeout))
}

/// A function that looks a name up. Tests use one that does not answer.
type LookUp = fn(&str) -> io::Result<Vec<SocketAddr>>;

/// A look-up that was started.
enum Found {
    /// The name was a socket address.
    Now(Vec<SocketAddr>),
    /// A thread looks the name up.
    Later(UnderWay),
}

/// A look-up that runs on its own thread.
struct UnderWay {
    /// The read end of a pipe. The thread closes the write end after it has sent the result.
    ready: OwnedFd,
    result: Receiver<io::Result<Vec<SocketAddr>>>,
}

/// Counts one look-up until its thread ends.
struct Counted;

impl Counted {
    fn new() -> Option<Self> {
        let more = |count| (count < MAX_LOOKUPS).then_some(count + 1);
        LOOKUPS.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).is_ok().then_some(Self)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        LOOKUPS.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Found {
    fn start(look_up: LookUp, name: &str) -> io::Result<Self> {
        // A numeric address needs no name server.
        if let Ok(address) = name.parse() {
            return Ok(Self::Now(vec![address]));
        }
        let Some(counted) = Counted::new() else {
            return Err(io::Error::other(format!(
                "{MAX_LOOKUPS} names are being looked up already"
            )));
        };
        let (ready, ended) = pipe_with(PipeFlags::CLOEXEC)?;
        let (send, result) = channel();
        let name = name.to_owned();
        let run = move || {
            let _counted = counted;
            // Fails only if the caller gave up.
            let _ = send.send(look_up(&name));
            drop(ended);
        };
        std::thread::Builder::new().name("look-up".into()).spawn(run)?;
        Ok(Self::Later(UnderWay { ready, result }))
    }
}

impl UnderWay {
    /// The result. `ready` is false if the caller's deadline came first.
    fn addresses(
        &mut self, name: &str, ready: bool, timeout: Duration,
    ) -> io::Result<Vec<SocketAddr>> {
        if !ready {
            let sentence = format!("no answer from the name server within {timeout:?}");
            return Err(io::Error::new(io::ErrorKind::TimedOut, sentence));
        }
        let ended = || io::Error::other(format!("the look-up of {name} ended without a result"));
        match self.result.try_recv().map_err(|_| ended())?? {
            addresses if addresses.is_empty() => Err(io::Error::other("the name has no address")),
            addresses => Ok(addresses),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cancel::CancelledBy;
    use std::sync::Mutex;

    /// The test holds this lock to keep the name server from answering.
    static SERVER: Mutex<()> = Mutex::new(());

    fn silent_server(_: &str) -> io::Result<Vec<SocketAddr>> {
        let _answer = SERVER.lock();
        Ok(Vec::new())
    }

    /// This is one test and not several, because all look-ups of a process share one counter.
    #[test]
    fn a_look_up_ends_at_its_deadline_or_on_cancel() {
        for number in ["127.0.0.1:7", "[::1]:7"] {
            let unused: LookUp = |_| Err(io::Error::other("looked up"));
            assert_eq!(
                resolve_by(unused, number, Duration::ZERO).unwrap(),
                [number.parse().unwrap()]
            );
        }
        assert!(
            resolve("localhost:7", Duration::from_secs(60))
                .unwrap()
                .iter()
                .all(|found| found.port() == 7)
        );

        // A name server that does not answer.
        let silent = SERVER.lock().unwrap();
        let error = resolve_by(silent_server, "name:7", Duration::from_millis(20)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        let cancel = Cancel::new().unwrap();
        std::thread::scope(|scope| {
            let job = scope.spawn(|| {
                resolve_for_by(silent_server, &cancel, "name:7", Duration::from_secs(3600))
            });
            cancel.cancel(CancelledBy::Operator).unwrap();
            assert!(matches!(job.join().unwrap(), Err(CancelError::Cancelled)));
        });
        // The number of look-ups that still run is bounded.
        let few = Duration::from_millis(1);
        let refused = |_| {
            resolve_by(silent_server, "name:7", few).unwrap_err().to_string().contains("already")
        };
        assert!((0..=MAX_LOOKUPS).any(refused));
        drop(silent);
    }
}
