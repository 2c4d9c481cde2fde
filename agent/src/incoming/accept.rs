//! Waiting for the source's streams, and the handshake.
//!
//! Whoever can reach the address may connect. A stranger costs a descriptor and a small buffer
//! until its time is up, and never the job: what does not say a proper hello, or does not fit the
//! memory here, is refused, and the waiting goes on. A source that is refused is told which field
//! differs and its own value. What this side has goes to the log and to the status of the waiting
//! job.
//!
//! The job is the first session whose streams are all there and which fits. A postcopy that lost
//! its connections waits again, for nobody but its own source, which knows the session's random
//! number.
//!
//! A socket that the VMM handed over is one connection: the job ends with it.

use crate::job::{Job, JobError, add};
use crate::memory::backing::BackingKind;
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

/// Most connections that have not become a session yet.
const MAX_PENDING: usize = 256;
/// How long a connection that was refused may take to read why.
const REJECT_READ_TIME: Duration = Duration::from_millis(50);
/// How long the job waits for a source at a stretch; it is cancelled rather than timed out.
const LONG: Duration = Duration::from_secs(3600);
/// The largest host page that postcopy places at once, in bytes.
const MAX_HOST_PAGE: u64 = 2 << 20;

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
    /// One per stream that is not urgent, in order.
    pub readers: Vec<RecordReader>,
    /// One per urgent stream.
    pub urgent: Vec<RecordReader>,
    /// The return path, on the primary.
    pub writer: RecordWriter,
    /// What the source offered and this side knows.
    pub features: u64,
    /// What the source calls the migration.
    pub session: [u8; 16],
    /// The source wants to know what is placed in postcopy.
    pub acknowledge: bool,
}

impl Accepted {
    /// True if the guest may run before its memory is here.
    pub fn may_postcopy(&self) -> bool {
        self.features & FEATURE_POSTCOPY != 0
    }

    /// Accepts the guest.
    pub fn send_accept(&self, job: &Job) -> Result<(), TransportError> {
        let size = |id: u32| job.memory.find(id).map(|(_, block)| block.backing.host_page_size());
        let sizes =
            || job.memory.table().blocks().iter().filter_map(|block| size(block.id)).collect();
        let host_pages = if self.may_postcopy() { sizes() } else { Vec::new() };
        let payload =
            Accept { version: STREAM_VERSION, features: self.features, host_pages }.encode();
        self.writer.write(RecordHeader::plain(Kind::Accept, 0, payload.len()), &payload)?;
        Ok(())
    }

    /// All connections.
    pub fn sockets(&self) -> Vec<StreamSocket> {
        self.readers.iter().chain(&self.urgent).map(|reader| reader.socket().clone()).collect()
    }
}

/// A connection that has not said hello, or whose siblings are not there yet.
struct Handshake {
    reader: RecordReader,
    since: Instant,
    hello: Option<Hello>,
}

/// Who is waited for.
#[derive(Debug, Clone, Copy)]
enum ExpectedSource {
    /// A guest.
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
            // Without it there would be nobody to ask.
            Self::Session(_) if hello.features & FEATURE_POSTCOPY == 0 => Err(JobError::State(
                "a postcopy is paused here, and its source does not offer that any more".into(),
            )),
            _ => Ok(()),
        }
    }
}

/// Waits for all streams of a session, and checks that its blocks are ours. Returns the listener,
/// too: a postcopy needs it again if it loses its connections.
pub fn accept(job: &Job, source: Source) -> Result<(Accepted, Option<Listener>), JobError> {
    let timeout = job.options().peer_timeout;
    match source {
        Source::Listener(listener) => {
            let accepted =
                PendingHandshakes::new(job, &[&listener], ExpectedSource::Guest, Vec::new())
                    .wait(None, None)?;
            // Without a descriptor to look at it ends with a session only.
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

/// Waits for the source of `session` to connect again; `None` if `asked` became readable, or it was
/// `until`, before.
pub fn accept_again(
    job: &Job, listeners: &[&Listener], session: [u8; 16], asked: Option<BorrowedFd<'_>>,
    until: Option<Instant>,
) -> Result<Option<Accepted>, JobError> {
    PendingHandshakes::new(job, listeners, ExpectedSource::Session(session), Vec::new())
        .wait(asked, until)
}

/// Where connections wait until they are a session.
struct PendingHandshakes<'a> {
    job: &'a Job,
    listeners: &'a [&'a Listener],
    wanted: ExpectedSource,
    pending: Vec<Handshake>,
    /// Those that were refused, while they may still read why. Nobody waits for them.
    leaving: Vec<Rejected>,
}

impl<'a> PendingHandshakes<'a> {
    fn new(
        job: &'a Job, listeners: &'a [&'a Listener], wanted: ExpectedSource,
        pending: Vec<Handshake>,
    ) -> Self {
        Self { job, listeners, wanted, pending, leaving: Vec::new() }
    }

    fn wait(
        &mut self, asked: Option<BorrowedFd<'_>>, until: Option<Instant>,
    ) -> Result<Option<Accepted>, JobError> {
        let timeout = self.job.options().peer_timeout;
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
                        if matches!(error, JobError::Hello(_)) {
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
                        let busy = JobError::State("another source was faster".into());
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

    /// Tells a connection why it is refused. It may be gone, or speak another language.
    fn reject(&mut self, refused: Handshake, error: &JobError) {
        let remote = error.to_remote();
        let code =
            if matches!(error, JobError::Hello(_)) { ErrorCode::Unsupported } else { remote.code };
        let payload = encode_error(&RemoteError::new(code, remote.sentence));
        let writer = RecordWriter::new(refused.reader.socket().clone());
        if writer.write(RecordHeader::plain(Kind::Reject, 0, payload.len()), &payload).is_ok() {
            writer.socket().end();
            // All of one source, at least.
            if self.leaving.len() >= MAX_PENDING {
                self.leaving.remove(0);
            }
            self.leaving.push(Rejected {
                reader: refused.reader,
                until: Instant::now() + REJECT_READ_TIME,
            });
        }
    }

    /// Tells the operator of the waiting job why a source was refused. In a paused postcopy the
    /// reason of the pause stays.
    fn note(&self, error: &JobError) {
        if matches!(self.wanted, ExpectedSource::Guest) {
            self.job.note(&format!(
                "a source was refused, the waiting goes on: {}",
                crate::error::chain(error)
            ));
        }
    }

    /// Drops the connections of a source that has connected anew since: of an attempt the primary
    /// is the first to connect. Or what is left of an attempt that failed would be taken for a part
    /// of the next.
    fn drop_stale(&mut self) {
        let mut later: Vec<[u8; 16]> = Vec::new();
        let mut kept = Vec::new();
        for one in std::mem::take(&mut self.pending).into_iter().rev() {
            if let Some(hello) = &one.hello {
                if later.contains(&hello.session) {
                    log::info!(
                        "stream {} of an attempt to connect that is over was dropped",
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

    /// Waits until someone connects or says something, or the time of the oldest connection is up;
    /// true if it was asked for something else.
    fn poll(
        &self, asked: Option<BorrowedFd<'_>>, until: Option<Instant>,
    ) -> Result<bool, JobError> {
        let timeout = self.job.options().peer_timeout;
        let leaving = self.leaving.iter().map(|one| one.until);
        let oldest =
            self.pending.iter().map(|one| one.since + timeout).chain(leaving).chain(until).min();
        let mut fds: Vec<(BorrowedFd<'_>, PollFlags)> = Vec::new();
        fds.extend(asked.map(|fd| (fd, PollFlags::IN)));
        fds.extend(self.listeners.iter().map(|listener| (listener.as_fd(), PollFlags::IN)));
        // Those that said hello have nothing more to say, but may go away.
        let events =
            |one: &Handshake| if one.hello.is_none() { PollFlags::IN } else { PollFlags::RDHUP };
        fds.extend(self.pending.iter().map(|one| (one.reader.socket().as_fd(), events(one))));
        let ready = self.job.cancel.wait(&fds, oldest.unwrap_or_else(|| Instant::now() + LONG))?;
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
            // It went away again, or we are out of descriptors and may have one in a moment.
            Err(error) => {
                backoff.failed(&error, Instant::now());
                return self.job.cancel.sleep(PAUSE);
            }
        };
        if self.pending.len() >= MAX_PENDING {
            log::warn!(
                "more than {MAX_PENDING} connections without a session: the oldest is dropped"
            );
            self.pending.remove(0);
        }
        match Handshake::new(fd, timeout) {
            Ok(new) => self.pending.push(new),
            // It went away again.
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

    /// Reads the hello as far as it is here.
    fn advance(&mut self, job: &Job, wanted: ExpectedSource) -> Result<(), JobError> {
        let timeout = job.options().peer_timeout;
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
            // Also one whose hello was read just now: it may have given up long ago.
            let gone = job
                .cancel
                .wait(&[(self.reader.socket().as_fd(), PollFlags::RDHUP)], Instant::now())?[0];
            return if gone { Err(TransportError::Closed.into()) } else { Ok(()) };
        }
        Ok(())
    }
}

/// A connection that was refused. If it were closed with something unread the kernel would reset
/// it, and the refusal might be lost.
struct Rejected {
    reader: RecordReader,
    until: Instant,
}

impl Rejected {
    /// Throws away what came; false if there is no need to wait for more.
    fn may_read(&mut self) -> bool {
        Instant::now() < self.until && self.reader.discard_some()
    }

    /// The same for all that comes.
    fn wait(&mut self) {
        self.reader.drain(self.until.saturating_duration_since(Instant::now()));
    }
}

/// The session of which all streams are there.
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
    /// The hello of its primary.
    primary: Hello,
    /// What is offered on one stream alone is not offered.
    features: u64,
}

/// Checks what a source wants, whose streams are all there.
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

/// Puts the streams in order, and lets a cancel reach them.
fn establish(job: &Job, offer: Offer, mut streams: Vec<Handshake>) -> Result<Accepted, JobError> {
    let Offer { primary, features: offered } = offer;
    streams.sort_by_key(|one| one.hello.as_ref().map(|hello| hello.stream));
    streams.dedup_by_key(|one| one.hello.as_ref().map(|hello| hello.stream));
    let mut readers = Vec::with_capacity(streams.len());
    for stream in streams {
        job.cancel.watch(stream.reader.socket().as_fd())?;
        let hello_bytes = stream.hello.as_ref().map_or(0, |hello| hello.encode().len());
        add(&job.live.wire_bytes, (pageferry_protocol::stream::RECORD_SIZE + hello_bytes) as u64);
        readers.push(stream.reader);
    }
    // Less than all are urgent, says its decoder.
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

/// What a guest needs of the files here, whatever it moves by.
fn check_writable(job: &Job) -> Result<(), JobError> {
    match job.memory.blocks().iter().find(|block| !block.backing.is_writable()) {
        Some(block) => Err(JobError::Sealed { id: block.geometry.id }),
        None => Ok(()),
    }
}

/// What postcopy needs of the blocks here, if it is wanted: checked before anything is sent, since
/// a guest that is to run before its memory is here would be refused only after all passes. A table
/// of all backings and modes is in docs/postcopy.md.
fn check_postcopy(job: &Job, features: u64, wanted: ExpectedSource) -> Result<(), JobError> {
    if features & FEATURE_POSTCOPY == 0 {
        return Ok(());
    }
    for block in job.memory.blocks() {
        let (id, size) = (block.geometry.id, block.backing.host_page_size());
        if block.backing.kind() == BackingKind::File {
            return Err(JobError::DiskPostcopy { id });
        }
        if size > MAX_HOST_PAGE {
            return Err(JobError::HostPage { id, size, limit: MAX_HOST_PAGE });
        }
        if block.vmm_address == 0 {
            return Err(JobError::NotMapped { id });
        }
    }
    // A guest that is here has its mappings registered.
    if matches!(wanted, ExpectedSource::Guest) {
        job.hooks.ask(&Hook::ProbeFaults, job.options().hook_timeout)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hooks::Hooks;
    use crate::memory::GuestMemory;
    use crate::memory::test_support::gigantic;
    use pageferry_protocol::control::job::{JobKind, OutgoingOptions};
    use pageferry_protocol::memory::BlockTable;
    use std::io::Write;
    use std::os::unix::net::UnixStream;
    use std::sync::Arc;

    fn job() -> Job {
        let memory = Arc::new(GuestMemory::new(Vec::new(), BlockTable::new(), None));
        let (hooks, notify) = (Arc::new(Hooks::new(None)), crate::job::notifier().unwrap());
        Job::new(1, JobKind::Incoming, memory, hooks, OutgoingOptions::default(), notify).unwrap()
    }

    /// Of a source that has one stream and no memory.
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
    fn a_paused_postcopy_takes_its_own_source_and_whoever_waits_for_a_guest_a_new_one() {
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
    fn an_operator_hears_of_a_source_that_was_refused_unless_a_postcopy_is_paused() {
        let refused = JobError::State("it has other blocks".into());
        for (wanted, told) in
            [(ExpectedSource::Guest, true), (ExpectedSource::Session([7; 16]), false)]
        {
            let job = job();
            PendingHandshakes::new(&job, &[], wanted, Vec::new()).note(&refused);
            assert_eq!(job.status().error.contains("it has other blocks"), told, "{wanted:?}");
        }
    }

    /// With something unread the kernel would reset the connection, and the refusal be lost.
    #[test]
    fn all_that_a_refused_source_still_sends_is_read_before_its_connection_is_closed() {
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

    /// Its streams are all there, and would be taken for a session that ends the whole job.
    #[test]
    fn a_source_that_said_hello_and_went_away_is_no_source() {
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
    fn host_pages_that_cannot_be_placed_at_once_take_precopy_alone() {
        let job = gigantic();
        check_postcopy(&job, 0, ExpectedSource::Guest).unwrap();
        let error = check_postcopy(&job, FEATURE_POSTCOPY, ExpectedSource::Guest).unwrap_err();
        assert!(
            matches!(error, JobError::HostPage { id: 0, size: 0x4000_0000, limit: 0x20_0000 }),
            "{error}"
        );
    }
}
