// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The handshake of an incoming migration: accepting connections until a source fits.
//!
//! 1. Sources connect, and send a hello on each stream.
//! 2. When all streams of one session are there, the agent checks whether the guest fits this VMM.
//! 3. The first session that fits becomes the migration. All others are refused.
//!
//! Everybody who can reach the address may connect. [`super::gate`] says who has to leave when
//! there are many. A connection never fails the job: one without a proper hello, or whose guest
//! does not fit, is refused, and the agent waits for the next. A refused source learns which field
//! differs, and only its own value of it. The value of this side goes to the log and to the status
//! of the waiting job ([`super::refusals`]).
//!
//! A postcopy that lost its connections waits here again. It accepts only its own source, which it
//! recognises by the random number of the session and, over TLS, by who it has proved to be.
//!
//! A socket that the VMM handed over is a single connection. If it is refused, the job fails.

use super::gate::{Gate, HELLO_TIME, Limits, Origin, Stage};
use super::handshake::{ExpectedSource, Handshake, KnownSource, Rejected};
use super::job::IncomingJob;
use super::offer::{Accepted, check_primary, check_session, establish, is_complete};
use super::refusals::Refusals;
use crate::job::JobError;
use crate::reactor::Reactor;
use crate::transport::backoff::{Backoff, PAUSE, is_momentary};
use crate::transport::unix_socket::check_peer;
use crate::transport::{Listener, StreamError, TransportError};
use pageferry_protocol::control::reply::{ErrorCode, RemoteError};
use pageferry_protocol::stream::answer::encode_error;
use pageferry_protocol::stream::{Kind, RecordHeader};
use rustix::event::PollFlags;
use rustix::net::sockopt;
use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

/// How long a refused connection stays open so that the source can read the reason.
const REJECT_READ_TIME: Duration = Duration::from_millis(50);
/// Most refused connections that stay open. More than the streams of one source.
const MAX_LEAVING: usize = 128;
/// Longest single wait for a source. There is no limit in total: an operator cancels the job.
const LONGEST_WAIT: Duration = Duration::from_secs(3600);
/// Most connections that are accepted before their bytes are looked at.
const ACCEPTS: usize = 128;
/// How long bytes are looked at before the next look at the listener: the kernel drops connections
/// that find no place in its queue.
const LOOK_TIME: Duration = Duration::from_millis(5);
/// Almost every hello fits into a buffer of this size, which every stranger may have.
const MOST_HELLOS: usize = 4 << 10;
/// Time between two looks at how long connections have been here.
const SWEEP: Duration = Duration::from_millis(100);
/// Most memory for the hellos of strangers, all together. Each gets 4 KiB, and more only as it
/// sends more.
const MAX_HELD: usize = 16 << 20;

/// What fails if the kernel refuses.
const WAIT: &str = "wait for connections";

/// Tokens of the reactor. Those of connections are their numbers in the gate.
const CANCELLED: u64 = 0;
const ASKED: u64 = 1;
const LISTENERS: u64 = 2;
const CONNECTIONS: u64 = 1 << 32;

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
    let (accepted, listener) = match source {
        Source::Listener(listener) => {
            (wait(job, &[&listener], ExpectedSource::Guest, None, None)?, Some(listener))
        }
        Source::Socket(fd) => {
            let reactor = watch(job, &[], None).map_err(JobError::from_io(WAIT))?;
            let connection = Handshake::new(fd, job.options.peer_timeout, false)?;
            let mut pending = PendingHandshakes::new(job, &[], ExpectedSource::Guest, reactor);
            pending.add(connection, Origin::Local).map_err(JobError::from_io(WAIT))?;
            (pending.wait(None, None)?, None)
        }
    };
    // Without `asked` and `until` it returns only with a session.
    Ok((accepted.ok_or(JobError::Cancelled)?, listener))
}

/// Waits for the `source` of a paused postcopy to connect again. Returns `None` if `asked` becomes
/// readable or `until` is reached first.
pub fn accept_again(
    job: &IncomingJob, listeners: &[&Listener], source: KnownSource, asked: Option<BorrowedFd<'_>>,
    until: Option<Instant>,
) -> Result<Option<Accepted>, JobError> {
    wait(job, listeners, ExpectedSource::Session(source), asked, until)
}

fn wait(
    job: &IncomingJob, listeners: &[&Listener], wanted: ExpectedSource,
    asked: Option<BorrowedFd<'_>>, until: Option<Instant>,
) -> Result<Option<Accepted>, JobError> {
    let mut backoff = Backoff::default();
    loop {
        match watch(job, listeners, asked) {
            Ok(reactor) => {
                let mut pending = PendingHandshakes::new(job, listeners, wanted, reactor);
                return pending.wait(asked, until);
            }
            // This process has no free descriptor for the moment. A guest that runs here must not
            // be lost by that.
            Err(error) => {
                let now = Instant::now();
                backoff.failed(&error, now);
                let asked: Vec<_> = asked.into_iter().map(|fd| (fd, PollFlags::IN)).collect();
                let is_asked = job.cancel.wait(&asked, now + PAUSE)?.contains(&true);
                if is_asked || until.is_some_and(|until| Instant::now() >= until) {
                    return Ok(None);
                }
            }
        }
    }
}

/// A reactor that hears of a cancel, of `asked`, and of new connections.
fn watch(
    job: &IncomingJob, listeners: &[&Listener], asked: Option<BorrowedFd<'_>>,
) -> std::io::Result<Reactor> {
    let mut reactor = Reactor::new()?;
    reactor.add(job.cancel.fd(), CANCELLED)?;
    if let Some(asked) = asked {
        reactor.add(asked, ASKED)?;
    }
    for (token, listener) in (LISTENERS..).zip(listeners) {
        listener.set_nonblocking()?;
        reactor.add(listener.as_fd(), token)?;
    }
    Ok(reactor)
}

/// The connections that are not part of a migration yet.
struct PendingHandshakes<'a> {
    job: &'a IncomingJob,
    listeners: &'a [&'a Listener],
    wanted: ExpectedSource,
    gate: Gate<Handshake>,
    /// Refused connections that are still open, so that the source can read why.
    leaving: BTreeMap<u64, Rejected>,
    reactor: Reactor,
    refusals: Refusals,
    backoff: Backoff,
    /// When the last look was at how long connections have been here.
    swept: Instant,
    /// When connections are accepted again, if there was no descriptor for one.
    accept_again: Option<Instant>,
}

impl<'a> PendingHandshakes<'a> {
    fn new(
        job: &'a IncomingJob, listeners: &'a [&'a Listener], wanted: ExpectedSource,
        reactor: Reactor,
    ) -> Self {
        let gate = Gate::new(Limits::of_this_process(), CONNECTIONS);
        let (leaving, refusals, backoff) = Default::default();
        Self {
            job,
            listeners,
            wanted,
            gate,
            leaving,
            reactor,
            refusals,
            backoff,
            swept: Instant::now(),
            accept_again: None,
        }
    }

    /// True if the VMM handed over a socket: there is no other connection.
    fn has_only_one(&self) -> bool {
        self.listeners.is_empty() && matches!(self.wanted, ExpectedSource::Guest)
    }

    fn wait(
        &mut self, asked: Option<BorrowedFd<'_>>, until: Option<Instant>,
    ) -> Result<Option<Accepted>, JobError> {
        loop {
            let now = Instant::now();
            let limit = match self.gate.has_ready() {
                true => Duration::ZERO,
                false => self.next_timer(until).saturating_duration_since(now),
            };
            let ready = self.reactor.wait(Some(limit)).map_err(JobError::from_io(WAIT))?;
            self.job.cancel.check()?;
            let is_asked = asked.is_some() && ready.contains(&ASKED);
            if is_asked || until.is_some_and(|until| Instant::now() >= until) {
                return Ok(None);
            }
            for token in ready {
                if token >= CONNECTIONS {
                    self.gate.set_ready(token);
                    self.read_of_leaving(token);
                } else if let Some(index) = token.checked_sub(LISTENERS) {
                    self.accept_from(index as usize);
                }
            }
            self.keep_time()?;
            let looked = Instant::now();
            while let Some(number) = self.gate.next_ready() {
                if let Some(accepted) = self.look_at(number)? {
                    return Ok(Some(accepted));
                }
                if looked.elapsed() >= LOOK_TIME {
                    break;
                }
            }
        }
    }

    /// When there is something to do without a connection.
    fn next_timer(&self, until: Option<Instant>) -> Instant {
        let connections = (!self.gate.is_empty()).then(|| self.swept + SWEEP);
        let leaving = self.leaving.values().map(|one| one.until);
        let timers = connections.into_iter().chain(leaving).chain(until);
        let timers = timers.chain(self.accept_again).chain(self.refusals.due());
        timers.min().unwrap_or_else(|| Instant::now() + LONGEST_WAIT)
    }

    /// How long a connection may take that has got to `stage`.
    fn limit(&self, stage: Stage) -> Duration {
        let timeout = self.job.options.peer_timeout;
        let is_stranger = stage != Stage::Known && !self.has_only_one();
        if is_stranger { timeout.min(HELLO_TIME) } else { timeout }
    }

    /// Does what is due.
    fn keep_time(&mut self) -> Result<(), JobError> {
        let now = Instant::now();
        if now.saturating_duration_since(self.swept) >= SWEEP {
            self.swept = now;
            self.refuse_late(now)?;
        }
        let gone: Vec<_> = self.leaving.iter().filter(|(_, one)| one.until <= now).collect();
        let gone: Vec<_> = gone.into_iter().map(|(number, _)| *number).collect();
        for mut one in gone.into_iter().filter_map(|number| self.leaving.remove(&number)) {
            one.may_read();
        }
        self.refusals.note(self.job, now);
        if self.accept_again.is_some_and(|due| due <= now) {
            self.accept_again = None;
            for (token, listener) in (LISTENERS..).zip(self.listeners) {
                if let Err(error) = self.reactor.add(listener.as_fd(), token) {
                    self.pause_accepting(&error);
                    break;
                }
            }
        }
        Ok(())
    }

    /// Refuses the connections whose time is over.
    fn refuse_late(&mut self, now: Instant) -> Result<(), JobError> {
        let is_over = |(number, stage, one): (u64, Stage, &Handshake)| {
            let limit = self.limit(stage);
            (now.saturating_duration_since(one.since) >= limit).then_some((number, limit))
        };
        let over: Vec<_> = self.gate.iter().filter_map(is_over).collect();
        for (number, limit) in over {
            self.refuse(number, TransportError::Silent(limit).into())?;
        }
        Ok(())
    }

    /// Accepts no connection for a while: this process has no descriptor for one.
    fn pause_accepting(&mut self, error: &std::io::Error) {
        let now = Instant::now();
        self.backoff.failed(error, now);
        self.accept_again = Some(now + PAUSE);
        self.listeners.iter().for_each(|listener| self.reactor.remove(listener.as_fd()));
    }

    /// Accepts the connections that are there, or as many as one turn allows.
    fn accept_from(&mut self, index: usize) {
        let Some(listener) = self.listeners.get(index).copied() else { return };
        for _ in 0..ACCEPTS {
            let (socket, peer) = match listener.accept_from() {
                Ok(accepted) => accepted,
                Err(error) if is_momentary(&error) => return,
                // A stranger gives way to what this process needs.
                Err(error) => match self.gate.evict_stranger() {
                    Some(stranger) => {
                        turn_away(&stranger);
                        continue;
                    }
                    None => return self.pause_accepting(&error),
                },
            };
            let checked = if peer.is_none() { check_peer(&socket) } else { Ok(()) };
            let timeout = self.job.options.peer_timeout;
            let connection = match Handshake::new(socket, timeout, listener.is_secured()) {
                Ok(connection) => connection,
                // It has closed again.
                Err(error) => {
                    let origin = peer.map_or(Origin::Local, Origin::from);
                    self.refusals.say(self.job, (Stage::Silent, origin), &error, Instant::now());
                    continue;
                }
            };
            let added = self.add(connection, peer.map_or(Origin::Local, Origin::from));
            match (added, checked) {
                (Ok(number), Err(error)) => {
                    // Fails only if there is no other connection.
                    let _ = self.refuse(number, TransportError::from(error).into());
                }
                (Ok(_), Ok(())) => {}
                (Err(error), _) => self.backoff.failed(&error, Instant::now()),
            }
        }
    }

    /// Adds a connection, for which another one may have to leave. Returns its number.
    fn add(&mut self, connection: Handshake, origin: Origin) -> std::io::Result<u64> {
        let (number, leaves) = self.gate.admit(origin, connection);
        leaves.iter().for_each(turn_away);
        // Closed before the next descriptor is opened.
        drop(leaves);
        let Some(added) = self.gate.get_mut(number) else { return Ok(number) };
        let watched = self.reactor.add_once(added.reader.socket().as_fd(), number);
        if watched.is_err() {
            self.gate.remove(number);
        }
        watched.map(|()| number)
    }

    /// Reads what a connection has sent. Returns the migration, if a session is complete by it and
    /// its guest fits.
    fn look_at(&mut self, number: u64) -> Result<Option<Accepted>, JobError> {
        let Some(one) = self.gate.get_mut(number) else { return Ok(None) };
        if let Err(error) = one.advance(self.job, self.wanted) {
            return self.refuse(number, error).map(|()| None);
        }
        let (stage, socket) = (one.stage(), one.reader.socket());
        let watched = match one.hello {
            // A connection that has sent its hello sends nothing more, but it may close.
            Some(_) => self.reactor.until_hangup(socket.as_fd(), number),
            None => self.reactor.again(socket.as_fd(), number),
        };
        let hello = one.hello.as_ref().map(|hello| (hello.session, hello.stream));
        if let Err(error) = watched {
            return self.refuse(number, JobError::from_io(WAIT)(error)).map(|()| None);
        }
        self.gate.reach(number, stage, without_primary).iter().for_each(turn_away);
        self.bound_memory(number);
        let Some((session, stream)) = hello else { return Ok(None) };
        if stream == 0
            && let Some(primary) = self.gate.get_mut(number)
            && let Err(error) = check_primary(self.job, primary)
        {
            return self.refuse(number, error).map(|()| None);
        }
        self.drop_stale(session);
        self.complete(session)
    }

    /// Closes the stranger that has sent most of a hello, if all together hold much memory. The one
    /// with this number may just have got more.
    fn bound_memory(&mut self, number: u64) {
        if self.gate.get_mut(number).is_none_or(|one| one.reader.buffered() <= MOST_HELLOS) {
            return;
        }
        let strangers = || self.gate.iter().filter(|(_, stage, _)| *stage != Stage::Known);
        let held = |(_, _, one): &(u64, Stage, &Handshake)| one.reader.buffered();
        if strangers().map(|one| held(&one)).sum::<usize>() <= MAX_HELD {
            return;
        }
        let largest = strangers().max_by_key(held).map(|(number, _, _)| number);
        largest.and_then(|number| self.gate.remove(number)).iter().for_each(turn_away);
    }

    /// Drops connections of a source's earlier attempt. A source that connects anew connects its
    /// primary first, so its streams that are older than its newest primary are left over from an
    /// attempt that failed. Without this they would be taken for streams of the new attempt. The
    /// same holds for the older one of two connections for one stream.
    fn drop_stale(&mut self, session: [u8; 16]) {
        let (mut newer, mut stale) = (0u64, Vec::new());
        for (number, one) in self.gate.known().rev() {
            let Some(hello) = one.hello.as_ref().filter(|hello| hello.session == session) else {
                continue;
            };
            if newer & (1 | 1 << hello.stream) != 0 {
                stale.push((number, hello.stream));
            }
            newer |= 1 << hello.stream;
        }
        for (number, stream) in stale {
            log::info!("stream {stream} of an earlier attempt to connect was dropped");
            drop(self.gate.remove(number));
        }
    }

    /// Makes the migration, if all streams of a session are there and its guest fits.
    fn complete(&mut self, session: [u8; 16]) -> Result<Option<Accepted>, JobError> {
        let mine = || self.gate.known().filter(|(_, one)| one.is_of(session));
        if !is_complete(mine().filter_map(|(_, one)| one.hello.as_ref())) {
            return Ok(None);
        }
        let numbers: Vec<_> = mine().map(|(number, _)| number).collect();
        let origin = numbers.first().and_then(|number| self.gate.origin(*number));
        let origin = origin.unwrap_or(Origin::Local);
        let streams: Vec<_> =
            numbers.iter().filter_map(|number| self.gate.remove(*number)).collect();
        match check_session(self.job, self.wanted, &streams) {
            Ok(offer) => {
                let accepted = establish(self.job, offer, streams)?;
                let busy = JobError::Protocol("another source connected first".into());
                let others: Vec<_> = self.gate.iter().map(|(number, _, _)| number).collect();
                for number in others {
                    if let Some(other) = self.gate.remove(number) {
                        self.leave(number, other, &busy);
                    }
                }
                Ok(Some(accepted))
            }
            Err(error) => {
                let is_final = self.has_only_one();
                if !is_final {
                    self.refusals.say(self.job, (Stage::Known, origin), &error, Instant::now());
                }
                for (number, stream) in numbers.into_iter().zip(streams) {
                    self.leave(number, stream, &error);
                }
                if is_final {
                    self.leaving.values_mut().for_each(Rejected::wait);
                    return Err(error);
                }
                Ok(None)
            }
        }
    }

    /// Refuses a connection. Its error is that of the job if there can be no other connection.
    fn refuse(&mut self, number: u64, error: JobError) -> Result<(), JobError> {
        let origin = self.gate.origin(number).unwrap_or(Origin::Local);
        let Some(refused) = self.gate.remove(number) else { return Ok(()) };
        if self.has_only_one() {
            self.leave(number, refused, &error);
            self.leaving.values_mut().for_each(Rejected::wait);
            return Err(error);
        }
        // Whoever hears of the refusal may look at the status next.
        self.refusals.say(self.job, (refused.stage(), origin), &error, Instant::now());
        self.leave(number, refused, &error);
        Ok(())
    }

    /// Tells a connection why it is refused. The other end may be gone, or not speak this protocol.
    fn leave(&mut self, number: u64, refused: Handshake, error: &JobError) {
        use TransportError::{Closed, ClosedInRecord};
        if matches!(error, JobError::Transport(Closed | ClosedInRecord { .. })) {
            return;
        }
        let remote = error.to_remote();
        let code = if matches!(error, JobError::Stream(StreamError::Hello(_))) {
            ErrorCode::Unsupported
        } else {
            remote.code
        };
        let Some(writer) = refused.writer() else { return };
        let payload = encode_error(&RemoteError::new(code, remote.sentence));
        let told = writer.write(RecordHeader::plain(Kind::Reject, 0, payload.len()), &payload);
        // A peer that has not proved who it is was told by an alert of TLS.
        if !matches!(told, Ok(_) | Err(TransportError::Trust(_))) {
            return;
        }
        writer.socket().end_sending();
        if self.reactor.again(writer.socket().as_fd(), number).is_err() {
            return;
        }
        if self.leaving.len() >= MAX_LEAVING {
            self.leaving.pop_first();
        }
        let until = Instant::now() + REJECT_READ_TIME;
        self.leaving.insert(number, Rejected { reader: refused.reader, until });
    }

    /// Reads what a refused connection has sent, and closes it if it is at its end.
    fn read_of_leaving(&mut self, number: u64) {
        let Some(one) = self.leaving.get_mut(&number) else { return };
        let stays =
            one.may_read() && self.reactor.again(one.reader.socket().as_fd(), number).is_ok();
        if !stays {
            self.leaving.remove(&number);
        }
    }
}

/// Tells a connection that has to leave that there was no place for it: its source may try again.
/// Strangers over TLS, and those who have said nothing, are told nothing.
fn turn_away(one: &Handshake) {
    let socket = one.reader.socket();
    let is_silent = rustix::io::ioctl_fionread(socket) == Ok(0) && one.reader.buffered() == 0;
    let Some(writer) = one.writer().filter(|_| !is_silent) else {
        // The kernel keeps nothing of a connection that is reset. This is only to save memory.
        let _ = sockopt::set_socket_linger(socket, Some(Duration::ZERO));
        return;
    };
    let busy = RemoteError::new(ErrorCode::Busy, "too many connections: try again");
    let payload = encode_error(&busy);
    // The other end may be gone.
    let _ = writer.write(RecordHeader::plain(Kind::Reject, 0, payload.len()), &payload);
}

/// True for a stream whose primary is not here.
fn without_primary(gate: &Gate<Handshake>, one: &Handshake) -> bool {
    let Some(session) = one.hello.as_ref().map(|hello| hello.session) else { return false };
    let is_primary =
        |hello: &pageferry_protocol::stream::Hello| hello.stream == 0 && hello.session == session;
    !gate.known().any(|(_, other)| other.hello.as_ref().is_some_and(is_primary))
}
