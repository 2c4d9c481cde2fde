// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! One connection of a source until it belongs to a migration, or is refused.

use super::gate::Stage;
use super::job::IncomingJob;
use crate::job::JobError;
use crate::transport::{Proof, RecordReader, RecordWriter, StreamSocket, TransportError};
use crate::trust::{Peer, TrustError};
use pageferry_protocol::stream::Hello;
use pageferry_protocol::stream::hello::{FEATURE_POSTCOPY, HELLO_RECOVER};
use rustix::event::PollFlags;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

/// The first byte of TLS: the content type "handshake" (RFC 8446, 5.1).
const TLS_HANDSHAKE: u8 = 22;

/// Which source the agent waits for.
#[derive(Debug, Clone, Copy)]
pub enum ExpectedSource {
    /// Any source that brings a guest.
    Guest,
    /// The source of a session that lost its connections.
    Session(KnownSource),
}

/// A source whose migration has begun, as the agent knows it again.
#[derive(Debug, Clone, Copy)]
pub struct KnownSource {
    /// The random number that it gave the session.
    pub session: [u8; 16],
    /// Who it has proved to be. `None` if it did not have to prove that.
    pub peer: Option<Peer>,
}

impl KnownSource {
    /// Checks that a peer is this source: its random number is not enough if it has proved more.
    fn check(&self, session: [u8; 16], peer: Option<Peer>) -> Result<(), JobError> {
        let is_same = |known: Peer| peer.is_some_and(|peer| known.is(&peer));
        if session != self.session {
            let why = "a migration is paused here, and this is not its source";
            return Err(JobError::Protocol(why.into()));
        }
        if self.peer.is_some() && peer.is_none() {
            let why = "a migration is paused here that began over TLS, and goes on only there: \
                       recover both sides with tls: addresses";
            return Err(JobError::Protocol(why.into()));
        }
        if !self.peer.is_none_or(is_same) {
            let why = "a migration is paused here that began over TLS with another peer: its \
                       source has the same token, or a certificate with the same key or the same \
                       DNS names";
            return Err(JobError::Protocol(why.into()));
        }
        Ok(())
    }
}

impl ExpectedSource {
    fn check(self, hello: &Hello, peer: Option<Peer>) -> Result<(), JobError> {
        let recovers = hello.flags & HELLO_RECOVER != 0;
        match self {
            Self::Guest if recovers => Err(JobError::Protocol(
                "no migration is paused here that could be recovered".into(),
            )),
            Self::Session(_) if !recovers => Err(JobError::Protocol(
                "a migration is paused here, and this is not its source".into(),
            )),
            Self::Session(source) => {
                source.check(hello.session, peer)?;
                // Without postcopy the source would not answer requests for missing pages.
                if hello.features & FEATURE_POSTCOPY == 0 {
                    return Err(JobError::Protocol(
                        "a postcopy is paused here, and its source does not offer that any more"
                            .into(),
                    ));
                }
                Ok(())
            }
            Self::Guest => Ok(()),
        }
    }
}

/// A connection that has not sent its hello yet, or waits for the other streams of its session.
pub struct Handshake {
    /// Reads the connection.
    pub reader: RecordReader,
    /// When it was accepted.
    pub since: Instant,
    /// The hello, once it has arrived.
    pub hello: Option<Hello>,
    /// It comes over TLS, and has sent nothing. Until then it costs no more than a descriptor.
    awaits_tls: bool,
    has_sent: bool,
}

impl Handshake {
    /// A connection that was accepted just now; over TLS, if it `is_secured`.
    ///
    /// # Errors
    /// If the kernel refuses an option of the socket.
    pub fn new(fd: OwnedFd, timeout: Duration, is_secured: bool) -> Result<Self, JobError> {
        Ok(Self {
            reader: RecordReader::new(StreamSocket::new(fd, timeout)?),
            since: Instant::now(),
            hello: None,
            awaits_tls: is_secured,
            has_sent: false,
        })
    }

    /// Reads as much of the hello as has arrived. The connection is readable, or was closed.
    ///
    /// # Errors
    /// If the connection is of no use: it was closed, or is not `wanted`. Or if the certificates of
    /// this side cannot be read.
    pub fn advance(&mut self, job: &IncomingJob, wanted: ExpectedSource) -> Result<(), JobError> {
        if self.awaits_tls {
            // Whoever does not speak TLS is not worth the state of a connection.
            match self.reader.socket().first_byte()? {
                None => return Ok(()),
                Some(TLS_HANDSHAKE) => {}
                Some(_) => return Err(TransportError::from(TrustError::NoTls).into()),
            }
            let secured = job.trust.accept().map_err(TransportError::from)?;
            let socket = self.reader.socket().clone().secured(Some(secured));
            self.reader = RecordReader::new(socket);
            self.awaits_tls = false;
        }
        if self.hello.is_none()
            && let Some(payload) = self.reader.try_read_hello()?
        {
            let hello = Hello::decode(payload)?;
            wanted.check(&hello, self.reader.socket().peer())?;
            self.hello = Some(hello);
        }
        self.has_sent = true;
        if self.hello.is_some() {
            // Look also if the hello was read just now: the source may have closed long ago.
            let gone = job
                .cancel
                .wait(&[(self.reader.socket().as_fd(), PollFlags::RDHUP)], Instant::now())?[0];
            return if gone { Err(TransportError::Closed.into()) } else { Ok(()) };
        }
        Ok(())
    }

    /// How far the connection has got.
    pub fn stage(&self) -> Stage {
        match self.reader.socket().proof() {
            Some(Proof::Given) => Stage::Known,
            Some(Proof::Answered) => Stage::Answered,
            None if self.hello.is_some() => Stage::Known,
            _ if self.has_sent => Stage::Begun,
            _ => Stage::Silent,
        }
    }

    /// True if the hello has arrived, and belongs to `session`.
    pub fn is_of(&self, session: [u8; 16]) -> bool {
        self.hello.as_ref().is_some_and(|hello| hello.session == session)
    }

    /// Where the other end can be told why it is refused. `None` if it would be told in plain text
    /// over TLS.
    pub fn writer(&self) -> Option<RecordWriter> {
        // Whoever does not read is not waited for.
        let socket = self.reader.socket().with_deadline(Duration::ZERO);
        (!self.awaits_tls).then(|| RecordWriter::new(socket))
    }
}

/// A refused connection. It is read until the end: the kernel would reset a connection that is
/// closed with unread bytes, and the source might not get the refusal.
pub struct Rejected {
    /// Reads the connection.
    pub reader: RecordReader,
    /// When it is closed.
    pub until: Instant,
}

impl Rejected {
    /// Reads what has arrived and throws it away. Returns false if the connection can be closed.
    pub fn may_read(&mut self) -> bool {
        Instant::now() < self.until && self.reader.discard_some()
    }

    /// Reads and throws away all that arrives until the time is over.
    pub fn wait(&mut self) {
        self.reader.drain(self.until.saturating_duration_since(Instant::now()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::GuestMemory;
    use crate::memory::test_support::job_of;
    use pageferry_protocol::control::job::{IncomingOptions, JobKind};
    use pageferry_protocol::memory::BlockTable;
    use pageferry_protocol::stream::{Kind, RecordHeader, STREAM_VERSION};
    use std::io::Write;
    use std::os::unix::net::UnixStream;
    use std::sync::Arc;

    fn job() -> IncomingJob {
        let job = job_of(JobKind::Incoming, Arc::new(GuestMemory::default()));
        IncomingJob::new(job, IncomingOptions::default()).unwrap()
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
        let of = |session| ExpectedSource::Session(KnownSource { session, peer: None });
        let (own, other) = (of([7; 16]), of([8; 16]));
        for (wanted, features, flags, refused) in [
            (ExpectedSource::Guest, 0, 0, ""),
            (ExpectedSource::Guest, FEATURE_POSTCOPY, HELLO_RECOVER, "no migration is paused here"),
            (own, FEATURE_POSTCOPY, HELLO_RECOVER, ""),
            (own, FEATURE_POSTCOPY, 0, "this is not its source"),
            (other, FEATURE_POSTCOPY, HELLO_RECOVER, "this is not its source"),
            (own, 0, HELLO_RECOVER, "does not offer that any more"),
        ] {
            let checked = wanted.check(&hello(features, flags), None);
            let error = checked.err().map_or_else(String::new, |error| error.to_string());
            assert_eq!(error.is_empty(), refused.is_empty(), "{wanted:?}: {error}");
            assert!(error.contains(refused), "{wanted:?}: {error}");
        }
    }

    #[test]
    fn a_source_that_has_proved_who_it_is_must_prove_it_again() {
        let certificate = |key| Peer::Certificate { key: [key; 32], names: None };
        let hello = hello(FEATURE_POSTCOPY, HELLO_RECOVER);
        for (began, comes, allowed) in [
            (None, None, true),
            (None, Some(Peer::Token), true),
            (Some(Peer::Token), Some(Peer::Token), true),
            (Some(Peer::Token), None, false),
            (Some(certificate(1)), Some(certificate(1)), true),
            (Some(certificate(1)), Some(certificate(2)), false),
            (Some(certificate(1)), Some(Peer::Token), false),
            (Some(certificate(1)), None, false),
        ] {
            let known = KnownSource { session: hello.session, peer: began };
            let checked = ExpectedSource::Session(known).check(&hello, comes);
            assert_eq!(checked.is_ok(), allowed, "{began:?}, {comes:?}: {checked:?}");
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
            let mut pending = Handshake::new(ours.into(), Duration::from_secs(60), false).unwrap();
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
}
