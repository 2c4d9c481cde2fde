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

use super::job::IncomingJob;
use crate::incoming::IncomingError;
use crate::job::{Job, JobError, add};
use crate::memory::MemoryError;
use crate::memory::backing::BackingKind;
use crate::memory::host_page_set::MAX_POSTCOPY_HOST_PAGE;
use crate::transport::StreamError;
use crate::transport::backoff::{Backoff, PAUSE};
use crate::transport::{Listener, RecordReader, RecordWriter, StreamSocket, TransportError};
use pageferry_protocol::control::hook::Hook;
use pageferry_protocol::control::reply::{ErrorCode, RemoteError};
use pageferry_protocol::stream::answer::{Accept, encode_error};
use pageferry_protocol::stream::hello::{
    FEATURE_POSTCOPY, FEATURES, HELLO_ACKNOWLEDGE, HELLO_RECOVER,
};
use pageferry_protocol::stream::table::compare_tables;
use pageferry_protocol::stream::{Hello, Kind, RecordHeader, STREAM_VERSION};
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

/// The streams of an accepted migration.
#[derive(Debug)]
pub struct Accepted {
    /// The streams that are not urgent, in order.
    pub readers: Vec<RecordReader>,
    /// The urgent streams.
    pub urgent: Vec<RecordReader>,
    /// Writes to the return path, on the primary.
    pub writer: RecordWriter,
    /// The features that the source offered and this side supports.
    pub features: u64,
    /// The random number that the source gave the session.
    pub session: [u8; 16],
    /// The source wants to be told which pages are placed in postcopy.
    pub acknowledge: bool,
}

impl Accepted {
    /// True if postcopy was negotiated: the guest may run before its memory is here.
    pub fn may_postcopy(&self) -> bool {
        self.features & FEATURE_POSTCOPY != 0
    }

    /// Sends the ACCEPT record.
    pub fn send_accept(&self, job: &IncomingJob) -> Result<(), TransportError> {
        let size = |id: u32| job.memory.find(id).map(|(_, block)| block.backing.host_page_size());
        let sizes =
            || job.memory.table().blocks().iter().filter_map(|block| size(block.id)).collect();
        let host_pages = if self.may_postcopy() { sizes() } else { Vec::new() };
        let payload =
            Accept { version: STREAM_VERSION, features: self.features, host_pages }.encode();
        self.writer.write(RecordHeader::plain(Kind::Accept, 0, payload.len()), &payload)?;
        Ok(())
    }

    /// The sockets of all streams.
    pub fn sockets(&self) -> Vec<StreamSocket> {
        self.readers.iter().chain(&self.urgent).map(|reader| reader.socket().clone()).collect()
    }
}

/// A connection that has not sent its hello yet, or waits for the other streams of its session.
struct Handshake {
    reader: RecordReader,
    since: Instant,
    hello: Option<Hello>,
}

/// Which source the agent waits for.
#[derive(Debug, Clone, Copy)]
enum ExpectedSource {
    /// Any source that brings a guest.
    Guest,
    /// The source of this session, which lost its connections.
    Session([u8; 16]),
}

impl ExpectedSource {
    fn check(self, hello: &Hello) -> Result<(), JobError> {
        let recovers = hello.flags & HELLO_RECOVER != 0;
        match self {
            Self::Guest if recovers => {
                Err(JobError::State("no migration is paused here that could be recovered".into()))
            }
            Self::Session(session) if !recovers || hello.session != session => Err(
                JobError::State("a migration is paused here, and this is not its source".into()),
            ),
            // Without postcopy the source would not answer requests for missing pages.
            Self::Session(_) if hello.features & FEATURE_POSTCOPY == 0 => Err(JobError::State(
                "a postcopy is paused here, and its source does not offer that any more".into(),
            )),
            _ => Ok(()),
        }
    }
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
            let pending = vec![Handshake::new(fd, timeout)?];
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
                        if matches!(error, JobError::Stream(StreamError::Hello(_))) {
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
                        let busy = JobError::State("another source connected first".into());
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
        if writer.write(RecordHeader::plain(Kind::Reject, 0, payload.len()), &payload).is_ok() {
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
        match Handshake::new(fd, timeout) {
            Ok(new) => self.pending.push(new),
            // The connection closed again.
            Err(error) => log::warn!("a connection was dropped: {}", crate::error::chain(&error)),
        }
        Ok(())
    }
}

impl Handshake {
    fn new(fd: OwnedFd, timeout: Duration) -> Result<Self, JobError> {
        Ok(Self {
            reader: RecordReader::new(StreamSocket::new(fd, timeout)?),
            since: Instant::now(),
            hello: None,
        })
    }

    /// Reads as much of the hello as has arrived.
    fn advance(&mut self, job: &IncomingJob, wanted: ExpectedSource) -> Result<(), JobError> {
        let timeout = job.options.peer_timeout;
        if self.since.elapsed() >= timeout {
            return Err(TransportError::Silent(timeout).into());
        }
        if self.hello.is_none()
            && let Some(payload) = self.reader.try_read_hello()?
        {
            let hello = Hello::decode(payload)?;
            wanted.check(&hello)?;
            self.hello = Some(hello);
        }
        if self.hello.is_some() {
            // Look also if the hello was read just now: the source may have closed long ago.
            let gone = job
                .cancel
                .wait(&[(self.reader.socket().as_fd(), PollFlags::RDHUP)], Instant::now())?[0];
            return if gone { Err(TransportError::Closed.into()) } else { Ok(()) };
        }
        Ok(())
    }
}

/// A refused connection. It is read until the end: the kernel would reset a connection that is
/// closed with unread bytes, and the source might not get the refusal.
struct Rejected {
    reader: RecordReader,
    until: Instant,
}

impl Rejected {
    /// Reads what has arrived and throws it away. Returns false if the connection can be closed.
    fn may_read(&mut self) -> bool {
        Instant::now() < self.until && self.reader.discard_some()
    }

    /// Reads and throws away all that arrives until the time is over.
    fn wait(&mut self) {
        self.reader.drain(self.until.saturating_duration_since(Instant::now()));
    }
}

/// A session of which all streams are there.
fn complete_session(pending: &[Handshake]) -> Option<[u8; 16]> {
    let hellos = || pending.iter().filter_map(|one| one.hello.as_ref());
    hellos()
        .find(|hello| {
            let have = |stream| {
                hellos().any(|other| other.session == hello.session && other.stream == stream)
            };
            (0..hello.streams).all(have)
        })
        .map(|hello| hello.session)
}

/// What a source offers.
struct Offer {
    /// The hello on the primary.
    primary: Hello,
    /// The features that all streams offer.
    features: u64,
}

/// Checks whether the guest of a source fits this VMM. All streams of the source are there.
fn check_session(
    job: &Job, wanted: ExpectedSource, streams: &[Handshake],
) -> Result<Offer, JobError> {
    let hellos = || streams.iter().filter_map(|one| one.hello.as_ref());
    let features = hellos().fold(u64::MAX, |all, hello| all & hello.features);
    let primary = hellos().min_by_key(|hello| hello.stream);
    let Some(primary) = primary.cloned() else { return Err(JobError::State("no stream".into())) };
    compare_tables(&primary.blocks, job.memory.table())?;
    check_writable(job)?;
    check_postcopy(job, features, wanted)?;
    Ok(Offer { primary, features })
}

/// Puts the streams in order, and registers them so that a cancel wakes their readers.
fn establish(job: &Job, offer: Offer, mut streams: Vec<Handshake>) -> Result<Accepted, JobError> {
    let Offer { primary, features: offered } = offer;
    streams.sort_by_key(|one| one.hello.as_ref().map(|hello| hello.stream));
    streams.dedup_by_key(|one| one.hello.as_ref().map(|hello| hello.stream));
    let mut readers = Vec::with_capacity(streams.len());
    for stream in streams {
        job.cancel.add_socket(stream.reader.socket().as_fd())?;
        let hello_bytes = stream.hello.as_ref().map_or(0, |hello| hello.encode().len());
        add(&job.live.wire_bytes, (pageferry_protocol::stream::RECORD_SIZE + hello_bytes) as u64);
        readers.push(stream.reader);
    }
    // The decoder of the hello has checked that not all streams are urgent.
    let urgent =
        readers.split_off(readers.len().saturating_sub(usize::from(primary.urgent)).max(1));
    let writer = RecordWriter::new(readers[0].socket().clone());
    let acknowledge = primary.flags & HELLO_ACKNOWLEDGE != 0;
    Ok(Accepted {
        readers,
        urgent,
        writer,
        features: offered & FEATURES,
        session: primary.session,
        acknowledge,
    })
}

/// Checks what every mode needs: the files can be written.
fn check_writable(job: &Job) -> Result<(), JobError> {
    match job.memory.blocks().iter().find(|block| !block.backing.is_writable()) {
        Some(block) => Err(MemoryError::Sealed { id: block.geometry.id }.into()),
        None => Ok(()),
    }
}

/// Checks what postcopy needs, if the source offers it. This must happen before any page is sent: a
/// guest that switches to postcopy after many passes would otherwise be refused only then.
/// docs/postcopy.md has a table of all kinds of memory and modes.
fn check_postcopy(job: &Job, features: u64, wanted: ExpectedSource) -> Result<(), JobError> {
    if features & FEATURE_POSTCOPY == 0 {
        return Ok(());
    }
    for block in job.memory.blocks() {
        let (id, size) = (block.geometry.id, block.backing.host_page_size());
        if block.backing.kind() == BackingKind::File {
            return Err(IncomingError::OnDisk { id }.into());
        }
        if size > MAX_POSTCOPY_HOST_PAGE {
            return Err(IncomingError::HostPageTooLarge {
                id,
                size,
                limit: MAX_POSTCOPY_HOST_PAGE,
            }
            .into());
        }
        if block.vmm_address == 0 {
            return Err(IncomingError::NotMapped { id }.into());
        }
    }
    // In a recovery the guest is here already, and its mappings are registered.
    if matches!(wanted, ExpectedSource::Guest) {
        job.hooks.ask(&Hook::ProbeFaults, job.hook_timeout)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::GuestMemory;
    use crate::memory::test_support::{gigantic, job_of};
    use pageferry_protocol::control::job::{IncomingOptions, JobKind};
    use pageferry_protocol::memory::BlockTable;
    use std::io::Write;
    use std::os::unix::net::UnixStream;
    use std::sync::Arc;

    fn job() -> IncomingJob {
        let memory = Arc::new(GuestMemory::new(Vec::new(), BlockTable::new(), None));
        IncomingJob::new(job_of(JobKind::Incoming, memory), IncomingOptions::default()).unwrap()
    }

    /// The hello of a source with one stream and no memory.
    fn hello(features: u64, flags: u16) -> Hello {
        Hello {
            version_min: STREAM_VERSION,
            version_max: STREAM_VERSION,
            features,
            session: [7; 16],
            stream: 0,
            streams: 1,
            urgent: 0,
            flags,
            blocks: BlockTable::new(),
        }
    }

    #[test]
    fn a_paused_postcopy_accepts_only_its_own_source() {
        let (own, other) = (ExpectedSource::Session([7; 16]), ExpectedSource::Session([8; 16]));
        for (wanted, features, flags, refused) in [
            (ExpectedSource::Guest, 0, 0, ""),
            (ExpectedSource::Guest, FEATURE_POSTCOPY, HELLO_RECOVER, "no migration is paused here"),
            (own, FEATURE_POSTCOPY, HELLO_RECOVER, ""),
            (own, FEATURE_POSTCOPY, 0, "this is not its source"),
            (other, FEATURE_POSTCOPY, HELLO_RECOVER, "this is not its source"),
            (own, 0, HELLO_RECOVER, "does not offer that any more"),
        ] {
            let checked = wanted.check(&hello(features, flags));
            let error = checked.err().map_or_else(String::new, |error| error.to_string());
            assert_eq!(error.is_empty(), refused.is_empty(), "{wanted:?}: {error}");
            assert!(error.contains(refused), "{wanted:?}: {error}");
        }
    }

    #[test]
    fn the_status_names_a_refused_source_unless_a_postcopy_is_paused() {
        let refused = JobError::State("it has other blocks".into());
        for (wanted, told) in
            [(ExpectedSource::Guest, true), (ExpectedSource::Session([7; 16]), false)]
        {
            let job = job();
            PendingHandshakes::new(&job, &[], wanted, Vec::new()).note(&refused);
            assert_eq!(job.status().error.contains("it has other blocks"), told, "{wanted:?}");
        }
    }

    /// If bytes stayed unread, the kernel would reset the connection, and the refusal could be
    /// lost.
    #[test]
    fn a_refused_connection_is_read_to_the_end() {
        let (mut theirs, ours) = UnixStream::pair().unwrap();
        let far = Duration::from_secs(60);
        let socket = StreamSocket::new(ours.into(), far).unwrap();
        theirs.write_all(&[1; 10_000]).unwrap();
        drop(theirs);
        let reader = RecordReader::new(socket.clone());
        Rejected { reader, until: Instant::now() + far }.wait();
        let flags = rustix::net::RecvFlags::DONTWAIT;
        let (_, left) = rustix::net::recv(&socket, &mut [0; 8][..], flags).unwrap();
        assert_eq!(left, 0);
    }

    /// Otherwise its streams would form a session, and the error of that would end the whole job.
    #[test]
    fn a_source_that_closed_after_its_hello_is_dropped() {
        let job = job();
        for goes in [false, true] {
            let (mut theirs, ours) = UnixStream::pair().unwrap();
            let mut pending = Handshake::new(ours.into(), Duration::from_secs(60)).unwrap();
            let payload = hello(0, 0).encode();
            let header = RecordHeader::plain(Kind::Hello, 0, payload.len()).with_checksum(&payload);
            theirs.write_all(&header.to_wire()).unwrap();
            theirs.write_all(&payload).unwrap();
            let _stays = (!goes).then_some(theirs);
            let advanced = pending.advance(&job, ExpectedSource::Guest);
            assert!(pending.hello.is_some());
            assert_eq!(
                matches!(advanced, Err(JobError::Transport(TransportError::Closed))),
                goes,
                "{advanced:?}"
            );
        }
    }

    #[test]
    fn a_gigantic_host_page_is_refused_for_postcopy_only() {
        let job = gigantic();
        check_postcopy(&job, 0, ExpectedSource::Guest).unwrap();
        let error = check_postcopy(&job, FEATURE_POSTCOPY, ExpectedSource::Guest).unwrap_err();
        assert!(
            matches!(
                error,
                JobError::Incoming(IncomingError::HostPageTooLarge {
                    id: 0,
                    size: 0x4000_0000,
                    limit: 0x20_0000
                })
            ),
            "{error}"
        );
    }
}
