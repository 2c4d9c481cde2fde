// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The handshake of an outgoing migration.
//!
//! 1. The source connects all streams, the primary first (`reach`).
//! 2. It sends a hello on each. The hello on the primary has the block table.
//! 3. The destination answers on the primary when all streams are there: it accepts the guest, or
//!    rejects it with a reason.
//! 4. If the destination lacks a feature that the source needs, the source ends the attempt with an
//!    error.
//!
//! Every step must be done within `peer_timeout`.

use super::compress::Compressor;
use super::job::OutgoingJob;
use super::reach::{Reached, reach, reach_on};
use super::sender::PageSender;
use crate::job::{Job, JobError};
use crate::outgoing::OutgoingError;
use crate::transport::StreamError;
use crate::transport::{Address, RecordReader, RecordWriter, StreamSocket, TransportError};
use crate::trust::Peer;
use pageferry_protocol::control::job::{Compression, HugePages, OutgoingOptions, Phase};
use pageferry_protocol::control::reply::RemoteError;
use pageferry_protocol::memory::BlockTable;
use pageferry_protocol::stream::answer::{decode_error, encode_error};
use pageferry_protocol::stream::hello::{
    FEATURE_POSTCOPY, FEATURE_WHOLE, HELLO_ACKNOWLEDGE, HELLO_RECOVER, feature_of,
};
use pageferry_protocol::stream::{Hello, Kind, RecordHeader, STREAM_VERSION};
use rustix::rand::{GetRandomFlags, getrandom};
use std::os::fd::OwnedFd;
use std::time::Duration;

/// How long the peer has to accept our last error, and to send its own.
pub const ERROR_EXCHANGE_TIMEOUT: Duration = Duration::from_millis(500);

/// The destination.
#[derive(Debug)]
pub enum Target {
    /// The address at which an agent listens.
    Address(Address),
    /// A connected socket that the VMM handed over.
    Socket(OwnedFd),
}

/// Random bytes that identify a migration.
pub type SessionId = [u8; 16];

/// The streams of a migration whose handshake is done.
#[derive(Debug)]
pub struct Streams {
    /// The primary, for records that are not pages.
    pub primary: Primary,
    /// The streams that are not urgent. The first is the primary.
    pub senders: Vec<PageSender>,
    /// The urgent streams, for the pages that the guest waits for in postcopy.
    pub urgent: Vec<Urgent>,
    /// The destination's host page sizes in bytes, in the order of the memory's blocks. Empty
    /// without postcopy.
    pub host_pages: Vec<u64>,
}

/// The first stream, for records that are not pages.
#[derive(Debug)]
pub struct Primary {
    /// Writes records that are not pages.
    pub writer: RecordWriter,
    /// The return path.
    pub reader: RecordReader,
}

/// An urgent stream.
#[derive(Debug)]
pub struct Urgent {
    /// Reads requests.
    pub reader: RecordReader,
    /// Sends the requested pages.
    pub sender: PageSender,
}

/// Returns random bytes that identify a migration and that nobody can guess.
pub fn new_session() -> Result<SessionId, JobError> {
    let mut session = [0; 16];
    let random =
        |errno: rustix::io::Errno| JobError::Io { what: "get random bytes", source: errno.into() };
    getrandom(&mut session, GetRandomFlags::empty()).map_err(random)?;
    // All zeroes mean that there is no session.
    session[0] |= 1;
    Ok(session)
}

/// Connects all streams, and has the destination accept the guest.
pub fn connect(job: &OutgoingJob, target: Target, session: SessionId) -> Result<Streams, JobError> {
    job.enter(Phase::Connecting);
    let options = job.options();
    let hello = |stream| hello(job, &options, stream, session, 0);
    let reached = match target {
        Target::Socket(fd) => reach_on(job, fd, &hello(0)),
        Target::Address(address) => reach(job, &address, None, hello),
    };
    streams(job, &options, reached?)
}

/// Connects all streams again, to a destination whose guest runs and whose memory is not complete.
/// If the destination has proved who it is, it must do so again: `known` is who it was.
pub fn reconnect(
    job: &OutgoingJob, address: &Address, session: SessionId, known: Option<Peer>,
) -> Result<Streams, JobError> {
    job.cancel.clear_sockets();
    let options = job.options();
    let hello = |stream| hello(job, &options, stream, session, HELLO_RECOVER);
    streams(job, &options, reach(job, address, known, hello)?)
}

/// What each stream is for.
fn streams(
    job: &OutgoingJob, options: &OutgoingOptions, reached: Reached,
) -> Result<Streams, JobError> {
    let Reached { sockets, reader, accept } = reached;
    let primary = Primary { writer: RecordWriter::new(sockets[0].clone()), reader };
    let host_pages = in_order(job, &accept.host_pages);
    let mut streams = Streams { primary, senders: Vec::new(), urgent: Vec::new(), host_pages };
    for (index, socket) in sockets.into_iter().enumerate() {
        if index < usize::from(options.streams) {
            let compressor = Compressor::new(options.compression)
                .map_err(JobError::from_io("create a compressor"))?;
            let sender = PageSender::new(index, socket, compressor);
            streams.senders.push(sender.marking_whole(accept.features & FEATURE_WHOLE != 0));
        } else {
            // The guest waits for these pages, and compressing them would take longer than it
            // saves.
            let sender = PageSender::new(index, socket.clone(), None);
            streams.urgent.push(Urgent { reader: RecordReader::new(socket), sender });
        }
    }
    match missing_feature(job, options, accept.features, &streams.host_pages) {
        Some(error) => {
            streams.send_error(&error.to_remote());
            Err(error)
        }
        None => Ok(streams),
    }
}

/// Puts the host page sizes, which come in the order of the table, into the order of the memory's
/// blocks. Returns an empty list if there is not one size for each block.
fn in_order(job: &Job, host_pages: &[u64]) -> Vec<u64> {
    let table = job.memory.table().blocks();
    if host_pages.len() != table.len() {
        return Vec::new();
    }
    let size = |id: u32| table.iter().position(|block| block.id == id).map(|at| host_pages[at]);
    job.memory.blocks().iter().filter_map(|block| size(block.geometry.id)).collect()
}

/// The features that a source with these options offers.
fn offered_features(options: &OutgoingOptions) -> u64 {
    // Postcopy asks for single pages, so it has no use for large ones.
    let never = options.mode.may_postcopy() || options.huge_pages == HugePages::Never;
    let whole = if never { 0 } else { FEATURE_WHOLE };
    wanted_features(options) | whole
}

/// The features that a source with these options cannot do without.
fn wanted_features(options: &OutgoingOptions) -> u64 {
    let postcopy = if options.mode.may_postcopy() { FEATURE_POSTCOPY } else { 0 };
    feature_of(options.compression) | postcopy
}

/// The error if the source needs a feature that the destination does not have.
fn missing_feature(
    job: &Job, options: &OutgoingOptions, accepted: u64, host_pages: &[u64],
) -> Option<JobError> {
    let lacks = wanted_features(options) & !accepted;
    if options.compression != Compression::None && lacks & feature_of(options.compression) != 0 {
        return Some(OutgoingError::CompressionUnsupported(options.compression.name()).into());
    }
    let postcopy = options.mode.may_postcopy();
    let complete = host_pages.len() == if postcopy { job.memory.blocks().len() } else { 0 };
    (lacks != 0 || !complete).then(|| OutgoingError::ModeUnsupported(options.mode.name()).into())
}

/// The hello on the stream with this number.
fn hello(
    job: &Job, options: &OutgoingOptions, stream: u16, session: SessionId, flags: u16,
) -> Hello {
    let postcopy = options.mode.may_postcopy();
    let acknowledge = if postcopy && options.release { HELLO_ACKNOWLEDGE } else { 0 };
    Hello {
        version_min: STREAM_VERSION,
        version_max: STREAM_VERSION,
        features: offered_features(options),
        session,
        stream,
        streams: options.connections(),
        urgent: if postcopy { options.urgent_streams } else { 0 },
        flags: flags | acknowledge,
        blocks: if stream == 0 { job.memory.table().clone() } else { BlockTable::new() },
    }
}

impl Primary {
    /// Waits on the return path for a record of `kind`. Returns its number.
    ///
    /// # Errors
    /// If another record comes, or none.
    pub fn expect(&mut self, kind: Kind, expected: &'static str) -> Result<u64, JobError> {
        let record = self.reader.read()?;
        if record.kind != kind {
            return Err(StreamError::unexpected(record.kind, record.payload, expected).into());
        }
        Ok(record.header.number())
    }

    /// Tells the destination why this side failed. No other thread may be writing a record on this
    /// stream.
    pub fn send_error(&self, error: &RemoteError) {
        let payload = encode_error(error);
        // A short deadline, because the guest may be paused until this returns. If the peer does
        // not read, it is not told.
        let writer = RecordWriter::new(self.writer.socket().with_deadline(ERROR_EXCHANGE_TIMEOUT));
        let sent = writer.write(RecordHeader::plain(Kind::Error, 0, payload.len()), &payload);
        if let Err(TransportError::Kernel(error)) = sent {
            log::debug!("error not sent to the peer: {error}");
        }
        self.writer.socket().end_sending();
    }

    /// Reads the error that the destination sent before the connection broke, if it arrived.
    pub fn read_error(&mut self) -> Option<RemoteError> {
        self.reader.set_timeout(ERROR_EXCHANGE_TIMEOUT);
        // Only answers to the last passes can come before it.
        for _ in 0..8 {
            let record = self.reader.read().ok()?;
            if record.kind == Kind::Error {
                return decode_error(record.payload).ok();
            }
        }
        None
    }
}

impl Streams {
    /// Who the destination has proved to be. `None` without TLS.
    pub fn peer(&self) -> Option<Peer> {
        self.primary.writer.socket().peer()
    }

    /// Tells the destination why this side failed, unless a record was sent in part.
    pub fn send_error(&self, error: &RemoteError) {
        if self.senders.iter().any(PageSender::is_broken) {
            return;
        }
        self.primary.send_error(error);
    }

    /// The sockets of all streams.
    pub fn sockets(&self) -> Vec<StreamSocket> {
        let senders = self.senders.iter().chain(self.urgent.iter().map(|urgent| &urgent.sender));
        senders.map(|sender| sender.socket().clone()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::test_support::{job, memory};
    use pageferry_protocol::control::job::Mode;
    use pageferry_protocol::control::reply::ErrorCode;
    use pageferry_protocol::memory::PAGE_SIZE;
    use std::os::unix::net::UnixStream;

    #[test]
    fn a_feature_that_the_destination_lacks_is_named() {
        let job = job(memory(&[64]));
        let (none, zstd) = (Compression::None, Compression::Zstd(1));
        let knows_zstd = feature_of(zstd);
        for (mode, compression, accepted, host_pages, lacks) in [
            (Mode::Precopy, none, 0, &[][..], None),
            (Mode::Precopy, zstd, knows_zstd, &[], None),
            (Mode::Precopy, zstd, 0, &[], Some("zstd")),
            (Mode::Precopy, none, 0, &[PAGE_SIZE], Some("precopy")),
            (Mode::Hybrid, none, FEATURE_POSTCOPY, &[PAGE_SIZE], None),
            (Mode::Hybrid, none, FEATURE_POSTCOPY, &[], Some("hybrid")),
            (Mode::Hybrid, none, 0, &[PAGE_SIZE], Some("hybrid")),
            (Mode::Hybrid, zstd, FEATURE_POSTCOPY, &[PAGE_SIZE], Some("zstd")),
        ] {
            let options = OutgoingOptions { mode, compression, ..OutgoingOptions::default() };
            let missing = missing_feature(&job, &options, accepted, host_pages);
            let named = match &missing {
                Some(JobError::Outgoing(
                    OutgoingError::CompressionUnsupported(name)
                    | OutgoingError::ModeUnsupported(name),
                )) => Some(*name),
                Some(other) => panic!("{other}"),
                None => None,
            };
            assert_eq!(named, lacks, "{mode:?}, {compression:?}, {accepted:#x}, {host_pages:?}");
        }
    }

    #[test]
    fn the_destination_is_told_why_the_source_failed() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let socket =
            |end: UnixStream| StreamSocket::new(end.into(), Duration::from_secs(60)).unwrap();
        let ours = socket(ours);
        let primary =
            Primary { writer: RecordWriter::new(ours.clone()), reader: RecordReader::new(ours) };
        let (senders, urgent, host_pages) = (Vec::new(), Vec::new(), Vec::new());
        let streams = Streams { primary, senders, urgent, host_pages };
        streams.send_error(&RemoteError::new(ErrorCode::System, "no memory left"));
        let mut peer = RecordReader::new(socket(theirs));
        let record = peer.read().unwrap();
        assert_eq!(record.kind, Kind::Error);
        assert_eq!(decode_error(record.payload).unwrap().sentence, "no memory left");
    }
}
