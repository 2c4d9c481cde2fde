//! Waiting for the source's streams, and the handshake.
//!
//! Whoever can reach the address may connect. A stranger costs a descriptor and a small buffer until its time is up, and never the job: what
//! does not say a proper hello is dropped, and the waiting goes on. The job is the first session whose streams are all there.

use crate::job::{Job, JobError, add};
use crate::transport::{Listener, RecordReader, RecordWriter, StreamSocket, TransportError};
use pageferry_protocol::control::request::{ErrorCode, RemoteError};
use pageferry_protocol::stream::hello::{Accept, FEATURES, compare, encode_error};
use pageferry_protocol::stream::{Hello, Kind, RecordHeader, STREAM_VERSION};
use rustix::event::PollFlags;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

/// Most connections that have not become a session yet.
const MAX_PENDING: usize = 256;
/// How long the job waits for a source at a stretch; it is cancelled rather than timed out.
const LONG: Duration = Duration::from_secs(3600);

/// Time between two attempts to accept a connection that waits and cannot be accepted.
const RETRY: Duration = Duration::from_millis(100);

/// Where the guest comes from.
#[derive(Debug)]
pub enum Source {
    /// Whoever connects.
    Listener(Listener),
    /// A connected socket that the VMM handed over.
    Socket(OwnedFd),
}

/// The streams of one session.
#[derive(Debug)]
pub struct Accepted {
    /// One per stream, in order.
    pub readers: Vec<RecordReader>,
    /// The return path, on the primary.
    pub writer: RecordWriter,
    /// What the source offered and this side knows.
    pub features: u64,
}

impl Accepted {
    /// Accepts the guest.
    pub fn say_accept(&self) -> Result<(), TransportError> {
        let payload = Accept { version: STREAM_VERSION, features: self.features }.encode();
        self.writer.write(RecordHeader::plain(Kind::Accept, 0, payload.len()), &payload)?;
        Ok(())
    }
}

/// A connection that has not said hello, or whose siblings are not there yet.
struct Pending {
    reader: RecordReader,
    since: Instant,
    hello: Option<Hello>,
}

/// Waits for all streams of a session, and checks that its blocks are ours.
pub fn accept(job: &Job, source: Source) -> Result<Accepted, JobError> {
    let timeout = job.options().peer_timeout;
    let (listener, mut pending) = match source {
        Source::Listener(listener) => (Some(listener), Vec::new()),
        Source::Socket(fd) => (None, vec![Pending::new(fd, timeout)?]),
    };
    loop {
        wait(job, listener.as_ref(), &pending)?;
        if let Some(listener) = &listener
            && let Some(new) = take_connection(job, listener, &mut pending, timeout)?
        {
            pending.push(new);
        }
        let only_one = listener.is_none();
        let mut kept = Vec::new();
        for mut connection in pending {
            match connection.advance(timeout) {
                Ok(()) => kept.push(connection),
                Err(error) if only_one => return Err(error),
                Err(error) => {
                    log::warn!("a connection was dropped: {}", crate::error::chain(&error));
                    connection.reject(&error);
                }
            }
        }
        pending = kept;
        if let Some(session) = complete_session(&pending) {
            let (mine, others): (Vec<_>, Vec<_>) =
                pending.into_iter().partition(|one| one.hello.as_ref().is_some_and(|hello| hello.session == session));
            let busy = JobError::State("another source was faster".into());
            others.into_iter().for_each(|other| other.reject(&busy));
            return establish(job, mine);
        }
    }
}

/// Waits until someone connects or says something, or the time of the oldest connection is up.
fn wait(job: &Job, listener: Option<&Listener>, pending: &[Pending]) -> Result<(), JobError> {
    let timeout = job.options().peer_timeout;
    let oldest = pending.iter().map(|one| one.since + timeout).min();
    let mut fds = Vec::new();
    fds.extend(listener.map(|listener| (listener.as_fd(), PollFlags::IN)));
    // Those that said hello have nothing more to say.
    let waiting = pending.iter().filter(|one| one.hello.is_none());
    fds.extend(waiting.map(|one| (one.reader.socket().as_fd(), PollFlags::IN)));
    job.cancel.wait(&fds, oldest.unwrap_or_else(|| Instant::now() + LONG))?;
    Ok(())
}

fn take_connection(
    job: &Job, listener: &Listener, pending: &mut Vec<Pending>, timeout: Duration,
) -> Result<Option<Pending>, JobError> {
    if !job.cancel.wait(&[(listener.as_fd(), PollFlags::IN)], Instant::now())?[0] {
        return Ok(None);
    }
    let fd = match listener.accept() {
        Ok(fd) => fd,
        // It went away again, or we are out of descriptors and may have one in a moment.
        Err(error) => {
            log::warn!("cannot accept a connection: {error}");
            job.cancel.sleep(RETRY)?;
            return Ok(None);
        }
    };
    if pending.len() >= MAX_PENDING {
        log::warn!("more than {MAX_PENDING} connections without a session: the oldest is dropped");
        pending.remove(0);
    }
    match Pending::new(fd, timeout) {
        Ok(new) => Ok(Some(new)),
        // It went away again.
        Err(error) => {
            log::warn!("a connection was dropped: {}", crate::error::chain(&error));
            Ok(None)
        }
    }
}

impl Pending {
    fn new(fd: OwnedFd, timeout: Duration) -> Result<Self, JobError> {
        Ok(Self { reader: RecordReader::new(StreamSocket::new(fd, timeout)?), since: Instant::now(), hello: None })
    }

    /// Reads the hello as far as it is here.
    fn advance(&mut self, timeout: Duration) -> Result<(), JobError> {
        if self.since.elapsed() >= timeout {
            return Err(TransportError::Silent(timeout).into());
        }
        if self.hello.is_some() {
            return Ok(());
        }
        if let Some(payload) = self.reader.try_read_hello()? {
            self.hello = Some(Hello::decode(payload)?);
        }
        Ok(())
    }

    fn reject(self, error: &JobError) {
        let remote = error.to_remote();
        let code = if matches!(error, JobError::Hello(_)) { ErrorCode::Unsupported } else { remote.code };
        send_reject(self.reader, &RemoteError::new(code, remote.sentence));
    }
}

fn send_reject(mut reader: RecordReader, error: &RemoteError) {
    let payload = encode_error(error);
    let writer = RecordWriter::new(reader.socket().clone());
    // It may be gone, or speak another language.
    if writer.write(RecordHeader::plain(Kind::Reject, 0, payload.len()), &payload).is_ok() {
        writer.socket().end();
        reader.drain(Duration::from_millis(50));
    }
}

/// The session of which all streams are there.
fn complete_session(pending: &[Pending]) -> Option<[u8; 16]> {
    let hellos = || pending.iter().filter_map(|one| one.hello.as_ref());
    hellos()
        .find(|hello| {
            let have = |stream| hellos().any(|other| other.session == hello.session && other.stream == stream);
            (0..hello.streams).all(have)
        })
        .map(|hello| hello.session)
}

/// Puts the streams in order, checks the block table, and lets a cancel reach them.
fn establish(job: &Job, mut streams: Vec<Pending>) -> Result<Accepted, JobError> {
    streams.sort_by_key(|one| one.hello.as_ref().map(|hello| hello.stream));
    streams.dedup_by_key(|one| one.hello.as_ref().map(|hello| hello.stream));
    for stream in &streams {
        job.cancel.watch(stream.reader.socket().as_fd())?;
        let hello_bytes = stream.hello.as_ref().map_or(0, |hello| hello.encode().len());
        add(&job.live.wire_bytes, (pageferry_protocol::stream::RECORD_SIZE + hello_bytes) as u64);
    }
    // What is offered on one stream alone is not offered.
    let offered = streams.iter().filter_map(|one| one.hello.as_ref()).fold(u64::MAX, |all, hello| all & hello.features);
    let table = streams[0].hello.as_ref().map(|hello| hello.blocks.clone()).unwrap_or_default();
    let readers: Vec<RecordReader> = streams.into_iter().map(|one| one.reader).collect();
    let writer = RecordWriter::new(readers[0].socket().clone());
    if let Err(mismatch) = compare(&table, job.memory.table()) {
        let error = JobError::from(mismatch);
        for reader in readers {
            send_reject(reader, &error.to_remote());
        }
        return Err(error);
    }
    Ok(Accepted { readers, writer, features: offered & FEATURES })
}
