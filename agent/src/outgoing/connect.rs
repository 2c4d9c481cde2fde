//! Connections and the handshake.

use super::compress::Compressor;
use super::sender::PageSender;
use crate::job::{Job, JobError};
use crate::transport::{Address, RecordReader, RecordWriter, StreamSocket, TransportError};
use pageferry_protocol::control::job::Phase;
use pageferry_protocol::control::request::RemoteError;
use pageferry_protocol::memory::BlockTable;
use pageferry_protocol::stream::hello::{Accept, decode_error, encode_error, feature_of};
use pageferry_protocol::stream::{Hello, Kind, RecordHeader, STREAM_VERSION};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

/// Where the guest goes.
#[derive(Debug)]
pub enum Target {
    /// An agent that listens.
    Address(Address),
    /// A connected socket that the VMM handed over.
    Socket(OwnedFd),
}

/// The streams of a migration whose handshake is done.
#[derive(Debug)]
pub struct Streams {
    /// One per stream; the first is the primary's.
    pub senders: Vec<PageSender>,
    /// For what is not pages, on the primary.
    pub writer: RecordWriter,
    /// The return path.
    pub reader: RecordReader,
}

/// Connects all streams and has the destination accept the guest.
pub fn connect(job: &Job, target: Target) -> Result<Streams, JobError> {
    job.enter(Phase::Connecting);
    let options = job.options();
    let sockets = match target {
        Target::Socket(fd) => vec![fd],
        Target::Address(address) => {
            let connect = |_| address.connect(options.peer_timeout, &job.cancel);
            (0..options.streams).map(connect).collect::<Result<Vec<_>, JobError>>()?
        }
    };
    let mut streams = Vec::new();
    for fd in sockets {
        job.cancel.watch(fd.as_fd())?;
        streams.push(StreamSocket::new(fd, options.peer_timeout)?);
    }
    job.enter(Phase::Preparing);
    say_hello(job, &streams)?;
    let mut reader = RecordReader::new(streams[0].clone());
    let accept = wait_accept(&mut reader)?;
    let writer = RecordWriter::new(streams[0].clone());
    let mut senders = Vec::new();
    for (index, socket) in streams.into_iter().enumerate() {
        let compressor = Compressor::new(options.compression).map_err(JobError::from_io("make a compressor"))?;
        senders.push(PageSender::new(index, socket, compressor));
    }
    let streams = Streams { writer, reader, senders };
    let wanted = feature_of(options.compression);
    if accept.features & wanted != wanted {
        let error = JobError::Compression(options.compression.name());
        streams.say_error(&error.to_remote());
        return Err(error);
    }
    Ok(streams)
}

fn say_hello(job: &Job, streams: &[StreamSocket]) -> Result<(), JobError> {
    let mut session = [0; 16];
    let random = |errno: rustix::io::Errno| JobError::Io { what: "get random bytes", source: errno.into() };
    let file =
        rustix::fs::open("/dev/urandom", rustix::fs::OFlags::CLOEXEC, rustix::fs::Mode::empty()).map_err(random)?;
    rustix::io::read(file, &mut session).map_err(random)?;
    for (index, socket) in streams.iter().enumerate() {
        let hello = Hello {
            version_min: STREAM_VERSION,
            version_max: STREAM_VERSION,
            features: feature_of(job.options().compression),
            session,
            stream: index as u16,
            streams: streams.len() as u16,
            blocks: if index == 0 { job.memory.table().clone() } else { BlockTable::new() },
        };
        let payload = hello.encode();
        let header = RecordHeader::plain(Kind::Hello, 0, payload.len());
        let bytes = RecordWriter::new(socket.clone()).write(header, &payload)?;
        crate::job::add(&job.live.wire_bytes, bytes);
    }
    Ok(())
}

fn wait_accept(reader: &mut RecordReader) -> Result<Accept, JobError> {
    let record = reader.read()?;
    match record.kind {
        Kind::Accept => Accept::decode(record.payload).map_err(|source| JobError::Payload { kind: "accept", source }),
        Kind::Reject => Err(JobError::Rejected(decode_remote(record.payload)?)),
        _ => Err(unexpected(record.kind, record.payload, "an accept or reject")),
    }
}

/// The error for a record that has no place, which is the peer's own if it sent one.
pub fn unexpected(kind: Kind, payload: &[u8], expected: &'static str) -> JobError {
    match kind {
        Kind::Error => decode_remote(payload).map_or_else(|error| error, JobError::Peer),
        _ => JobError::Unexpected { found: format!("{kind:?}"), expected },
    }
}

fn decode_remote(payload: &[u8]) -> Result<RemoteError, JobError> {
    decode_error(payload).map_err(|source| JobError::Payload { kind: "error", source })
}

impl Streams {
    /// Waits on the return path for `kind`; returns its number.
    ///
    /// # Errors
    /// If anything else comes, or nothing.
    pub fn expect(&mut self, kind: Kind, expected: &'static str) -> Result<u64, JobError> {
        let record = self.reader.read()?;
        if record.kind != kind {
            return Err(unexpected(record.kind, record.payload, expected));
        }
        Ok(record.header.number())
    }

    /// What the destination said before the connection broke, if it came through.
    pub fn last_words(&mut self) -> Option<RemoteError> {
        self.reader.socket().set_recv_timeout(Duration::from_millis(500)).ok()?;
        // At most the answers to the passes that are under way come before it.
        for _ in 0..8 {
            let record = self.reader.read().ok()?;
            if record.kind == Kind::Error {
                return decode_error(record.payload).ok();
            }
        }
        None
    }

    /// Tells the destination why this side fails, if no record on the primary was left half sent.
    pub fn say_error(&self, error: &RemoteError) {
        if self.senders.iter().any(PageSender::is_broken) {
            return;
        }
        let payload = encode_error(error);
        let sent = self.writer.write(RecordHeader::plain(Kind::Error, 0, payload.len()), &payload);
        if let Err(TransportError::Kernel(error)) = sent {
            log::debug!("error not sent to the peer: {error}");
        }
        self.writer.socket().end();
    }
}
