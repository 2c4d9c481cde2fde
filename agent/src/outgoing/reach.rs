// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Connects the streams of an outgoing migration, until the destination answers.
//!
//! The primary comes first. Each stream is connected, makes the handshake of TLS if the address
//! says so, and sends its hello at once: the destination does not wait for a byte, and cannot take
//! a source for a stranger that stays silent.
//!
//! Where many strangers connect to the destination, it may turn a connection away before it knows
//! whose it is (`incoming/gate.rs`). Over `tcp:` and `unix:` it says that it is busy. Over `tls:`
//! it says nothing to a stranger, and just closes the connection. So such a stream is connected
//! again, and all of them if it is the primary, until [`PATIENCE`] is over. So is a stream whose
//! handshake is not answered for [`ANSWER`]: a destination that cannot answer all answers the
//! newest first. No other end of a connection, and no other refusal, is tried again.

use super::OutgoingError;
use super::job::OutgoingJob;
use crate::job::JobError;
use crate::transport::stream_error::decode_remote;
use crate::transport::{
    Address, RecordReader, RecordWriter, StreamError, StreamSocket, TransportError,
};
use crate::trust::Peer;
use pageferry_protocol::control::job::Phase;
use pageferry_protocol::control::reply::ErrorCode;
use pageferry_protocol::stream::answer::Accept;
use pageferry_protocol::stream::{Hello, Kind, RecordHeader};
use rustix::event::PollFlags;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

/// How long streams that are turned away are connected again.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long a destination may take to answer a handshake, beside four times what it took to
/// connect, before the source connects again. After [`PATIENCE`] it may take `peer_timeout`.
const ANSWER: Duration = Duration::from_millis(300);
/// Time before the first further attempt. It doubles with each one.
const FIRST_PAUSE: Duration = Duration::from_millis(5);
/// Longest time before a further attempt.
const LONGEST_PAUSE: Duration = Duration::from_millis(50);

/// The connections to a destination that has accepted the guest.
pub(super) struct Reached {
    /// All streams, in order.
    pub(super) sockets: Vec<StreamSocket>,
    /// Reads the primary.
    pub(super) reader: RecordReader,
    /// The answer.
    pub(super) accept: Accept,
}

/// Connects all streams to `address`, and waits for the answer. `hello` makes the hello of a
/// stream. If the destination has proved before that it is `known`, it must do so again.
///
/// # Errors
/// If nothing answers there in time, the destination cannot be trusted, or it refuses the guest.
pub(super) fn reach(
    job: &OutgoingJob, address: &Address, known: Option<Peer>, hello: impl Fn(u16) -> Hello + Sync,
) -> Result<Reached, JobError> {
    let mut streams: Vec<Option<StreamSocket>> = Vec::new();
    streams.resize_with(job.options().connections().into(), || None);
    let mut again = Again::to(address);
    loop {
        let connected = connect(job, (address, known), &mut streams, again.is_hasty(), &hello);
        let answered = connected.and_then(|()| {
            // A recovery has a phase of its own.
            if job.phase() == Phase::Connecting {
                job.enter(Phase::Preparing);
            }
            answer(job, streams.iter().flatten())
        });
        let (index, error) = match answered {
            Ok((reader, accept)) => {
                let sockets = streams.into_iter().flatten().collect();
                return Ok(Reached { sockets, reader, accept });
            }
            Err(Failed { stream, error }) => (stream, again.check(job, *error)?),
        };
        log::debug!("stream {index} was turned away: {error}");
        // The destination takes streams that are older than the primary for those of an earlier
        // attempt.
        let lost = if index == 0 { 0..streams.len() } else { index..index + 1 };
        streams[lost].fill_with(|| None);
        watch(job, streams.iter().flatten())?;
        job.cancel.sleep(again.pause)?;
    }
}

/// Sends the hello on a socket that the VMM handed over, and waits for the answer.
///
/// # Errors
/// As [`reach`].
pub(super) fn reach_on(
    job: &OutgoingJob, socket: OwnedFd, hello: &Hello,
) -> Result<Reached, JobError> {
    let socket = StreamSocket::with_stop(socket, job.options().peer_timeout, &job.stop)?;
    watch(job, [&socket])?;
    job.enter(Phase::Preparing);
    send_hello(job, &socket, hello)?;
    let answered = answer(job, [&socket]);
    let (reader, accept) = answered.map_err(|failed| no_destination(*failed.error))?;
    Ok(Reached { sockets: vec![socket], reader, accept })
}

/// Why a stream failed.
struct Failed {
    stream: usize,
    error: Box<JobError>,
}

impl Failed {
    fn on<E: Into<JobError>>(stream: usize) -> impl Fn(E) -> Self {
        move |error| Self { stream, error: Box::new(error.into()) }
    }

    /// True if the other end has closed the connection.
    fn is_closed(&self) -> bool {
        use TransportError::{Closed, ClosedInRecord};
        matches!(*self.error, JobError::Transport(Closed | ClosedInRecord { .. }))
    }
}

/// Whether streams are connected again.
struct Again {
    is_secured: bool,
    until: Option<Instant>,
    pause: Duration,
}

impl Again {
    fn to(address: &Address) -> Self {
        let is_secured = address.secured_host().is_some();
        Self { is_secured, until: None, pause: FIRST_PAUSE / 2 }
    }

    /// True if a handshake that is not answered soon is tried again.
    fn is_hasty(&self) -> bool {
        self.is_secured && self.until.is_none_or(|until| Instant::now() < until)
    }

    /// Returns the error if another attempt may help, and there is time for it.
    fn check(&mut self, job: &OutgoingJob, error: JobError) -> Result<JobError, JobError> {
        let until = *self.until.get_or_insert_with(|| Instant::now() + PATIENCE);
        let is_turned_away = match &error {
            JobError::Transport(TransportError::Closed | TransportError::ClosedInRecord { .. }) => {
                self.is_secured
            }
            JobError::Transport(TransportError::Silent(limit)) => {
                // Otherwise there was time enough.
                self.is_secured && *limit < job.options().peer_timeout
            }
            JobError::Outgoing(OutgoingError::Rejected(why)) => why.code == ErrorCode::Busy,
            _ => false,
        };
        // A handshake that was tried in haste gets its full time once.
        let is_over = Instant::now() >= until
            && !matches!(error, JobError::Transport(TransportError::Silent(_)));
        if !is_turned_away || is_over {
            return Err(no_destination(error));
        }
        self.pause = (2 * self.pause).min(LONGEST_PAUSE);
        Ok(error)
    }
}

/// The error for a connection that ended before the hello was answered. Every waiting destination
/// would answer in the end, so the other end is something else.
fn no_destination(error: JobError) -> JobError {
    match error {
        JobError::Transport(
            source @ (TransportError::Closed | TransportError::ClosedInRecord { .. }),
        ) => OutgoingError::NoDestination { source }.into(),
        error => error,
    }
}

/// Makes a cancel shut these sockets down, and no others.
fn watch<'a>(
    job: &OutgoingJob, streams: impl IntoIterator<Item = &'a StreamSocket>,
) -> Result<(), JobError> {
    job.cancel.clear_sockets();
    Ok(streams.into_iter().try_for_each(|stream| job.cancel.add_socket(stream.as_fd()))?)
}

/// Connects the streams that are missing, and sends the hello on each. Over TLS the others are
/// connected at once after the primary, because each handshake takes a while.
fn connect(
    job: &OutgoingJob, (address, known): (&Address, Option<Peer>),
    streams: &mut [Option<StreamSocket>], is_hasty: bool, hello: impl Fn(u16) -> Hello + Sync,
) -> Result<(), Failed> {
    let open = |index: usize, primary: Option<&StreamSocket>| {
        let socket = open(job, address, is_hasty).map_err(Failed::on(index))?;
        let is_peer = |known: Peer| socket.peer().is_some_and(|peer| known.is(&peer));
        let primary = primary.and_then(StreamSocket::peer);
        let why = if !primary.is_none_or(is_peer) {
            Some("the connections lead to different peers: their certificates differ")
        } else if known.is_some() && socket.peer().is_none() {
            Some("the migration began over TLS, and goes on only there: give a tls: address")
        } else if !known.is_none_or(is_peer) {
            Some(
                "the migration began over TLS with another peer: its destination has the same \
                 token, or a certificate with the same key or the same DNS names",
            )
        } else {
            None
        };
        if let Some(why) = why {
            return Err(Failed::on(index)(JobError::Protocol(why.into())));
        }
        match send_hello(job, &socket, &hello(index as u16)) {
            // It was closed, and the answer may say why.
            Ok(()) | Err(TransportError::Closed) => Ok(socket),
            Err(error) => Err(Failed::on(index)(error)),
        }
    };
    let [primary, others @ ..] = streams else { return Ok(()) };
    let primary = match primary {
        Some(primary) => &*primary,
        None => primary.insert(open(0, None)?),
    };
    let missing = others.iter_mut().zip(1..).filter(|(stream, _)| stream.is_none());
    if address.secured_host().is_none() {
        for (stream, index) in missing {
            *stream = Some(open(index, Some(primary))?);
        }
        return Ok(());
    }
    std::thread::scope(|scope| {
        let open = &open;
        let opened = missing.map(|(stream, index)| {
            let run = move || open(index, Some(primary)).map(|socket| *stream = Some(socket));
            let thread = std::thread::Builder::new().spawn_scoped(scope, run);
            (index, thread.map_err(JobError::from_io("start a thread")))
        });
        let mut outcome = Ok(());
        for (index, thread) in opened.collect::<Vec<_>>() {
            let joined = thread.map(|thread| thread.join());
            let opened = match joined.map_err(Failed::on(index)) {
                Ok(Ok(opened)) => opened,
                Ok(Err(_)) => Err(Failed::on(index)(JobError::Panicked)),
                Err(failed) => Err(failed),
            };
            // An error that ends the job counts for more than one that is tried again.
            if outcome.is_ok() || opened.as_ref().is_err_and(|failed| !failed.is_closed()) {
                outcome = opened;
            }
        }
        outcome
    })
}

/// Connects one stream, and makes the handshake.
fn open(job: &OutgoingJob, address: &Address, is_hasty: bool) -> Result<StreamSocket, JobError> {
    let timeout = job.options().peer_timeout;
    let began = Instant::now();
    let fd = address.connect(timeout, &job.cancel, job.plain)?;
    job.cancel.add_socket(fd.as_fd())?;
    let socket = StreamSocket::with_stop(fd, timeout, &job.stop)?;
    let soon = ANSWER + 4 * began.elapsed();
    let limit = if is_hasty { soon.min(timeout) } else { timeout };
    Ok(secure(job, address, socket, limit)?)
}

/// Makes the handshake of TLS, if the address says so, within `limit`.
fn secure(
    job: &OutgoingJob, address: &Address, socket: StreamSocket, limit: Duration,
) -> Result<StreamSocket, TransportError> {
    let Some(host) = address.secured_host() else { return Ok(socket) };
    let socket = socket.secured(Some(job.trust.connect(host)?));
    socket.with_deadline(limit).shake_hands()?;
    Ok(socket)
}

fn send_hello(
    job: &OutgoingJob, socket: &StreamSocket, hello: &Hello,
) -> Result<(), TransportError> {
    let payload = hello.encode();
    let header = RecordHeader::plain(Kind::Hello, 0, payload.len());
    let bytes = RecordWriter::new(socket.clone()).write(header, &payload)?;
    crate::job::add(&job.live.wire_bytes, bytes);
    Ok(())
}

/// Waits for the answer on the primary, or for the end of a stream.
fn answer<'a>(
    job: &OutgoingJob, streams: impl IntoIterator<Item = &'a StreamSocket>,
) -> Result<(RecordReader, Accept), Failed> {
    let streams: Vec<_> = streams.into_iter().collect();
    let timeout = job.options().peer_timeout;
    // Only the primary is read: after the answer the other streams belong to others.
    let events = |index| if index == 0 { PollFlags::IN } else { PollFlags::RDHUP };
    let polled: Vec<_> =
        streams.iter().enumerate().map(|(index, one)| (one.as_fd(), events(index))).collect();
    let ready = job.cancel.wait(&polled, Instant::now() + timeout).map_err(Failed::on(0))?;
    let Some(stream) = ready.iter().position(|ready| *ready) else {
        return Err(Failed::on(0)(TransportError::Silent(timeout)));
    };
    // A stream that was closed may say why.
    let mut reader = RecordReader::new(streams[stream].clone());
    let accept = read_answer(&mut reader).map_err(Failed::on(stream))?;
    Ok((reader, accept))
}

fn read_answer(reader: &mut RecordReader) -> Result<Accept, JobError> {
    let record = reader.read()?;
    match record.kind {
        Kind::Accept => Ok(Accept::decode(record.payload)
            .map_err(|source| StreamError::Payload { kind: "accept", source })?),
        Kind::Reject => Err(OutgoingError::Rejected(decode_remote(record.payload)?).into()),
        _ => {
            Err(StreamError::unexpected(record.kind, record.payload, "an accept or reject").into())
        }
    }
}
