// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The handshake of an incoming migration: accepting connections until a source fits.
//!
//! 1. Sources connect, and send a hello on each stream.
//! 2. When all streams of one session are there, the agent checks whether the guest fits this VMM.
//! 3. The first session that fits becomes the migration. All others are refused.
//!
//! Everybody who can reach the address may connect. Such a connection costs a descriptor and a
//! small buffer until `peer_timeout` is over, and there are at most `MAX_PENDING` of them. It never
//! fails the job: a connection without a proper hello, or whose guest does not fit, is refused, and
//! the agent waits for the next. A refused source learns which field differs, and only its own
//! value of it. The value of this side goes to the log and to the status of the waiting job.
//!
//! A postcopy that lost its connections waits here again. It accepts only its own source, which it
//! recognises by the random number of the session.
//!
//! A socket that the VMM handed over is a single connection. If it is refused, the job fails.

use super::handshake::{ExpectedSource, Handshake, Rejected};
use super::job::IncomingJob;
use super::offer::{Accepted, check_session, complete_session, establish};
use crate::job::JobError;
use crate::transport::backoff::{Backoff, PAUSE};
use crate::transport::{Listener, RecordWriter, StreamError, TransportError};
use pageferry_protocol::control::reply::{ErrorCode, RemoteError};
use pageferry_protocol::stream::answer::encode_error;
use pageferry_protocol::stream::{Kind, RecordHeader};
use rustix::event::PollFlags;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

/// Most connections that are not part of a migration yet.
const MAX_PENDING: usize = 256;
/// How long a refused connection stays open so that the source can read the reason.
const REJECT_READ_TIME: Duration = Duration::from_millis(50);
/// Longest single wait for a source. There is no limit in total: an operator cancels the job.
const LONGEST_WAIT: Duration = Duration::from_secs(3600);

/// Where the guest comes from.
#[derive(Debug)]
pub enum Source {
    /// Any source that connects to this address.
    Listener(Listener),
    /// A connected socket that the VMM handed over.
    Socket(OwnedFd),
}

/// Waits until all streams of a session are there and its blocks fit. Also returns the listener: a
/// postcopy needs it if it loses its connections.
pub fn accept(job: &IncomingJob, source: Source) -> Result<(Accepted, Option<Listener>), JobError> {
    let timeout = job.options.peer_timeout;
    match source {
        Source::Listener(listener) => {
            let accepted =
                PendingHandshakes::new(job, &[&listener], ExpectedSource::Guest, Vec::new())
                    .wait(None, None)?;
            // Without `asked` and `until` it returns only with a session.
            accepted.map_or(Err(JobError::Cancelled), |accepted| Ok((accepted, Some(listener))))
        }
        Source::Socket(fd) => {
            let pending = vec![Handshake::new(fd, timeout, None)?];
            let accepted = PendingHandshakes::new(job, &[], ExpectedSource::Guest, pending)
                .wait(None, None)?;
            accepted.map_or(Err(JobError::Cancelled), |accepted| Ok((accepted, None)))
        }
    }
}

/// Waits for the source of `session` to connect again. Returns `None` if `asked` becomes readable
/// or `until` is reached first.
pub fn accept_again(
    job: &IncomingJob, listeners: &[&Listener], session: [u8; 16], asked: Option<BorrowedFd<'_>>,
    until: Option<Instant>,
) -> Result<Option<Accepted>, JobError> {
    PendingHandshakes::new(job, listeners, ExpectedSource::Session(session), Vec::new())
        .wait(asked, until)
}

/// The connections that are not part of a migration yet.
struct PendingHandshakes<'a> {
    job: &'a IncomingJob,
    listeners: &'a [&'a Listener],
    wanted: ExpectedSource,
    pending: Vec<Handshake>,
    /// Refused connections that are still open, so that the source can read why.
    leaving: Vec<Rejected>,
}

impl<'a> PendingHandshakes<'a> {
    fn new(
        job: &'a IncomingJob, listeners: &'a [&'a Listener], wanted: ExpectedSource,
        pending: Vec<Handshake>,
    ) -> Self {
        Self { job, listeners, wanted, pending, leaving: Vec::new() }
    }

    fn wait(
        &mut self, asked: Option<BorrowedFd<'_>>, until: Option<Instant>,
    ) -> Result<Option<Accepted>, JobError> {
        let timeout = self.job.options.peer_timeout;
        let only_one = matches!(self.wanted, ExpectedSource::Guest) && self.listeners.is_empty();
        let mut backoff = Backoff::default();
        loop {
            if self.poll(asked, until)? || until.is_some_and(|until| Instant::now() >= until) {
                return Ok(None);
            }
            for listener in self.listeners {
                self.accept_connection(listener, timeout, &mut backoff)?;
            }
            let mut kept = Vec::new();
            for mut connection in std::mem::take(&mut self.pending) {
                match connection.advance(self.job, self.wanted) {
                    Ok(()) => kept.push(connection),
                    Err(error) if only_one => return Err(error),
                    Err(error) => {
                        log::warn!("a connection was dropped: {}", crate::error::chain(&error));
                        let is_told = matches!(
                            error,
                            JobError::Stream(StreamError::Hello(_))
                                | JobError::Transport(TransportError::Trust(_))
                        );
                        if is_told {
                            self.note(&error);
                        }
                        self.reject(connection, &error);
                    }
                }
            }
            self.pending = kept;
            self.leaving.retain_mut(Rejected::may_read);
            self.drop_stale();
            while let Some(session) = complete_session(&self.pending) {
                let belongs = |one: &Handshake| {
                    one.hello.as_ref().is_some_and(|hello| hello.session == session)
                };
                let (mine, others): (Vec<_>, Vec<_>) =
                    std::mem::take(&mut self.pending).into_iter().partition(belongs);
                match check_session(self.job, self.wanted, &mine) {
                    Ok(offer) => {
                        let accepted = establish(self.job, offer, mine)?;
                        let busy = JobError::Protocol("another source connected first".into());
                        others.into_iter().for_each(|other| self.reject(other, &busy));
                        return Ok(Some(accepted));
                    }
                    Err(error) => {
                        mine.into_iter().for_each(|stream| self.reject(stream, &error));
                        if only_one {
                            self.leaving.iter_mut().for_each(Rejected::wait);
                            return Err(error);
                        }
                        log::warn!("a source was refused: {}", crate::error::chain(&error));
                        self.note(&error);
                        self.pending = others;
                    }
                }
            }
        }
    }

    /// Tells a connection why it is refused. The other end may be gone, or not speak this protocol.
    fn reject(&mut self, refused: Handshake, error: &JobError) {
        let remote = error.to_remote();
        let code = if matches!(error, JobError::Stream(StreamError::Hello(_))) {
            ErrorCode::Unsupported
        } else {
            remote.code
        };
        let payload = encode_error(&RemoteError::new(code, remote.sentence));
        let writer = RecordWriter::new(refused.reader.socket().clone());
        let told = writer.write(RecordHeader::plain(Kind::Reject, 0, payload.len()), &payload);
        // A peer that has not proved who it is was told by an alert of TLS.
        if matches!(told, Ok(_) | Err(TransportError::Trust(_))) {
            writer.socket().end_sending();
            // The limit is more than the number of streams of one source.
            if self.leaving.len() >= MAX_PENDING {
                self.leaving.remove(0);
            }
            self.leaving.push(Rejected {
                reader: refused.reader,
                until: Instant::now() + REJECT_READ_TIME,
            });
        }
    }

    /// Tells the operator of the waiting job why a source was refused. The status of a paused
    /// postcopy stays as it is, because it shows the reason of the pause.
    fn note(&self, error: &JobError) {
        if matches!(self.wanted, ExpectedSource::Guest) {
            self.job.note(&format!(
                "a source was refused, and the agent waits for the next: {}",
                crate::error::chain(error)
            ));
        }
    }

    /// Drops connections of a source's earlier attempt. A source that connects anew connects its
    /// primary first, so its streams that are older than its newest primary are left over from an
    /// attempt that failed. Without this they would be taken for streams of the new attempt.
    fn drop_stale(&mut self) {
        let mut later: Vec<[u8; 16]> = Vec::new();
        let mut kept = Vec::new();
        for one in std::mem::take(&mut self.pending).into_iter().rev() {
            if let Some(hello) = &one.hello {
                if later.contains(&hello.session) {
                    log::info!(
                        "stream {} of an earlier attempt to connect was dropped",
                        hello.stream
                    );
                    continue;
                }
                if hello.stream == 0 {
                    later.push(hello.session);
                }
            }
            kept.push(one);
        }
        kept.reverse();
        self.pending = kept;
    }

    /// Waits until a connection comes or sends something, or the time of the oldest one is over.
    /// Returns true if `asked` is readable.
    fn poll(
        &self, asked: Option<BorrowedFd<'_>>, until: Option<Instant>,
    ) -> Result<bool, JobError> {
        let timeout = self.job.options.peer_timeout;
        let leaving = self.leaving.iter().map(|one| one.until);
        let oldest =
            self.pending.iter().map(|one| one.since + timeout).chain(leaving).chain(until).min();
        let mut fds: Vec<(BorrowedFd<'_>, PollFlags)> = Vec::new();
        fds.extend(asked.map(|fd| (fd, PollFlags::IN)));
        fds.extend(self.listeners.iter().map(|listener| (listener.as_fd(), PollFlags::IN)));
        // A connection that has sent its hello sends nothing more, but it may close.
        let events =
            |one: &Handshake| if one.hello.is_none() { PollFlags::IN } else { PollFlags::RDHUP };
        fds.extend(self.pending.iter().map(|one| (one.reader.socket().as_fd(), events(one))));
        let ready =
            self.job.cancel.wait(&fds, oldest.unwrap_or_else(|| Instant::now() + LONGEST_WAIT))?;
        Ok(asked.is_some() && ready[0])
    }

    fn accept_connection(
        &mut self, listener: &Listener, timeout: Duration, backoff: &mut Backoff,
    ) -> Result<(), JobError> {
        if !self.job.cancel.wait(&[(listener.as_fd(), PollFlags::IN)], Instant::now())?[0] {
            return Ok(());
        }
        let fd = match listener.accept() {
            Ok(fd) => fd,
            // The connection closed again, or this process has no free descriptor for the moment.
            Err(error) => {
                backoff.failed(&error, Instant::now());
                return Ok(self.job.cancel.sleep(PAUSE)?);
            }
        };
        if self.pending.len() >= MAX_PENDING {
            log::warn!(
                "more than {MAX_PENDING} connections without a session: the oldest was dropped"
            );
            self.pending.remove(0);
        }
        // The connection may have closed again. The certificates may be just being renewed, and the
        // source may try again: a guest that runs here must not be lost by that.
        let secured = listener.is_secured().then(|| self.job.trust.accept()).transpose();
        let new = secured.map_err(|error| JobError::from(TransportError::from(error)));
        match new.and_then(|secured| Handshake::new(fd, timeout, secured)) {
            Ok(new) => self.pending.push(new),
            Err(error) => {
                log::warn!("a connection was dropped: {}", crate::error::chain(&error));
                if matches!(error, JobError::Transport(TransportError::Trust(_))) {
                    self.note(&error);
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::GuestMemory;
    use crate::memory::test_support::job_of;
    use pageferry_protocol::control::job::{IncomingOptions, JobKind};
    use std::sync::Arc;

    fn job() -> IncomingJob {
        let job = job_of(JobKind::Incoming, Arc::new(GuestMemory::default()));
        IncomingJob::new(job, IncomingOptions::default()).unwrap()
    }

    #[test]
    fn the_status_names_a_refused_source_unless_a_postcopy_is_paused() {
        let refused = JobError::Protocol("it has other blocks".into());
        for (wanted, told) in
            [(ExpectedSource::Guest, true), (ExpectedSource::Session([7; 16]), false)]
        {
            let job = job();
            PendingHandshakes::new(&job, &[], wanted, Vec::new()).note(&refused);
            assert_eq!(
                job.status().error_text().contains("it has other blocks"),
                told,
                "{wanted:?}"
            );
        }
    }
}
