// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Connects the streams of an outgoing migration, until the destination answers.
//!
//! Each stream is connected, makes the handshake of TLS if the address says so, and sends its hello
//! before the next one is connected: the destination does not wait for a byte, and cannot take a
//! source for a stranger that stays silent.
//!
//! Where many strangers connect to the destination, it may turn a connection away before it knows
//! whose it is (`incoming/gate.rs`). Over `tcp:` and `unix:` it says that it is busy. Over `tls:` it
//! says nothing to a stranger, and just closes the connection. So such a stream is connected again,
//! and all of them if it is the primary, until [`PATIENCE`] is over. No other end of a connection,
//! and no other refusal, is tried again.

use super::OutgoingError;
use super::job::OutgoingJob;
use crate::job::JobError;
use crate::transport::stream_error::decode_remote;
use crate::transport::{
    Address, RecordReader, RecordWriter, StreamError, StreamSocket, TransportError,
};
use pageferry_protocol::control::job::Phase;
use pageferry_protocol::control::reply::ErrorCode;
use pageferry_protocol::stream::answer::Accept;
use pageferry_protocol::stream::{Hello, Kind, RecordHeader};
use rustix::event::PollFlags;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

/// How long streams that are turned away are connected again.
const PATIENCE: Duration = Duration::from_secs(5);
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
/// stream.
///
/// # Errors
/// If nothing answers there in time, the destination cannot be trusted, or it refuses the guest.
pub(super) fn reach(
    job: &OutgoingJob, address: &Address, hello: impl Fn(u16) -> Hello,
) -> Result<Reached, JobError> {
    let mut streams: Vec<Option<StreamSocket>> = Vec::new();
    streams.resize_with(job.options().connections().into(), || None);
    let mut again = Again::to(address);
    loop {
        let connected = connect(job, address, &mut streams, &hello);
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
            Err(Failed { stream, error }) => (stream, again.check(*error)?),
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

    /// Returns the error if another attempt may help, and there is time for it.
    fn check(&mut self, error: JobError) -> Result<JobError, JobError> {
        let until = *self.until.get_or_insert_with(|| Instant::now() + PATIENCE);
        let is_turned_away = match &error {
            JobError::Transport(TransportError::Closed | TransportError::ClosedInRecord { .. }) => {
                self.is_secured
            }
            JobError::Outgoing(OutgoingError::Rejected(why)) => why.code == ErrorCode::Busy,
            _ => false,
        };
        if !is_turned_away || Instant::now() >= until {
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

/// Connects the streams that are missing, and sends the hello on each.
fn connect(
    job: &OutgoingJob, address: &Address, streams: &mut [Option<StreamSocket>],
    hello: impl Fn(u16) -> Hello,
) -> Result<(), Failed> {
    let options = job.options();
    for index in 0..streams.len() {
        if streams[index].is_some() {
            continue;
        }
        let failed = Failed::on::<TransportError>(index);
        let fd = address.connect(options.peer_timeout, &job.cancel, job.plain).map_err(&failed)?;
        job.cancel.add_socket(fd.as_fd()).map_err(Failed::on(index))?;
        let socket =
            StreamSocket::with_stop(fd, options.peer_timeout, &job.stop).map_err(&failed)?;
        let socket = secure(job, address, socket).map_err(failed)?;
        let peer = |socket: &StreamSocket| socket.peer();
        if streams[0].as_ref().is_some_and(|primary| peer(primary) != peer(&socket)) {
            let why = "the connections lead to different peers: their certificates differ";
            return Err(Failed::on(index)(JobError::Protocol(why.into())));
        }
        match send_hello(job, &socket, &hello(index as u16)) {
            // It was closed, and the answer may say why.
            Ok(()) | Err(TransportError::Closed) => {}
            Err(error) => return Err(Failed::on(index)(error)),
        }
        streams[index] = Some(socket);
    }
    Ok(())
}

/// Makes the handshake of TLS, if the address says so.
fn secure(
    job: &OutgoingJob, address: &Address, socket: StreamSocket,
) -> Result<StreamSocket, TransportError> {
    let Some(host) = address.secured_host() else { return Ok(socket) };
    let socket = socket.secured(Some(job.trust.connect(host)?));
    socket.shake_hands()?;
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
