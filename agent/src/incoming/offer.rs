// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a source offers, once all streams of its session are there: whether its guest fits this
//! VMM, and the streams of the migration that it becomes.

use super::error::IncomingError;
use super::handshake::{ExpectedSource, Handshake, KnownSource};
use super::job::IncomingJob;
use crate::job::{Job, JobError, add};
use crate::memory::backing::BackingKind;
use crate::memory::host_page_set::MAX_POSTCOPY_HOST_PAGE;
use crate::memory::placement::HugePageUse;
use crate::transport::{RecordReader, RecordWriter, StreamSocket, TransportError};
use pageferry_protocol::control::hook::Hook;
use pageferry_protocol::control::job::HugePages;
use pageferry_protocol::stream::answer::Accept;
use pageferry_protocol::stream::hello::{
    FEATURE_POSTCOPY, FEATURE_WHOLE, FEATURES, HELLO_ACKNOWLEDGE,
};
use pageferry_protocol::stream::table::compare_tables;
use pageferry_protocol::stream::{Hello, Kind, RECORD_SIZE, RecordHeader, STREAM_VERSION};
use std::os::fd::AsFd;

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

    /// Whether the guest gets huge pages, if this side's operator chose `choice`.
    pub fn huge_pages(&self, choice: HugePages) -> HugePageUse {
        if choice == HugePages::Auto && self.may_postcopy() {
            return HugePageUse::NotKnown("postcopy asks for single pages");
        }
        if choice == HugePages::Auto && self.features & FEATURE_WHOLE == 0 {
            return HugePageUse::NotKnown(
                "no huge pages: the source was told so, or is too old to say where all of 2 MiB \
                 comes",
            );
        }
        HugePageUse::chosen(choice)
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

    /// How to know this source again after a lost connection.
    pub fn source(&self) -> KnownSource {
        KnownSource { session: self.session, peer: self.writer.socket().peer() }
    }

    /// The sockets of all streams.
    pub fn sockets(&self) -> Vec<StreamSocket> {
        self.readers.iter().chain(&self.urgent).map(|reader| reader.socket().clone()).collect()
    }
}

/// True if all streams of a session are there. `hellos` are those of one session.
pub fn is_complete<'a>(hellos: impl Iterator<Item = &'a Hello>) -> bool {
    // The decoder of the hello has checked that no number is beyond `MAX_STREAMS`, which is 64.
    let (mut here, mut wanted) = (0u64, u64::MAX);
    for hello in hellos {
        here |= 1 << hello.stream;
        wanted = u64::MAX >> (64 - u32::from(hello.streams));
    }
    here & wanted == wanted
}

/// What a source offers.
pub struct Offer {
    /// The hello on the primary.
    pub primary: Hello,
    /// The features that all streams offer.
    pub features: u64,
}

/// Checks the block table of a source whose other streams may not be here yet: of a guest that does
/// not fit no stream waits.
///
/// # Errors
/// Why the guest does not fit.
pub fn check_primary(job: &Job, primary: &Handshake) -> Result<(), JobError> {
    let hello = primary.hello.as_ref();
    Ok(hello.map_or(Ok(()), |hello| compare_tables(&hello.blocks, job.memory.table()))?)
}

/// Checks whether the guest of a source fits this VMM. All streams of the source are there.
///
/// # Errors
/// Why the guest does not fit.
pub fn check_session(
    job: &Job, wanted: ExpectedSource, streams: &[Handshake],
) -> Result<Offer, JobError> {
    let hellos = || streams.iter().filter_map(|one| one.hello.as_ref());
    let features = hellos().fold(u64::MAX, |all, hello| all & hello.features);
    let primary = hellos().min_by_key(|hello| hello.stream);
    let Some(primary) = primary.cloned() else {
        return Err(JobError::Protocol("no stream".into()));
    };
    let peer = |stream: &Handshake| stream.reader.socket().peer();
    let first = streams.first().and_then(peer);
    let is_first = |stream: &Handshake| match (first, peer(stream)) {
        (Some(first), Some(peer)) => first.is(&peer),
        (first, peer) => first.is_none() && peer.is_none(),
    };
    if !streams.iter().all(is_first) {
        let why = "the streams come from different peers: their certificates differ";
        return Err(JobError::Protocol(why.into()));
    }
    compare_tables(&primary.blocks, job.memory.table())?;
    job.memory.check_writable()?;
    check_postcopy(job, features, wanted)?;
    Ok(Offer { primary, features })
}

/// Puts the streams in order, and registers them so that a cancel wakes their readers.
///
/// # Errors
/// If the job was cancelled.
pub fn establish(
    job: &Job, offer: Offer, mut streams: Vec<Handshake>,
) -> Result<Accepted, JobError> {
    let Offer { primary, features: offered } = offer;
    streams.sort_by_key(|one| one.hello.as_ref().map(|hello| hello.stream));
    let mut readers = Vec::with_capacity(streams.len());
    for stream in streams {
        job.cancel.add_socket(stream.reader.socket().as_fd())?;
        let hello_bytes = stream.hello.as_ref().map_or(0, |hello| hello.encode().len());
        add(&job.live.wire_bytes, (RECORD_SIZE + hello_bytes) as u64);
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
    use crate::memory::test_support::gigantic;
    use pageferry_protocol::memory::BlockTable;

    #[test]
    fn a_session_is_complete_with_its_last_stream() {
        for streams in [1, 2, 63, 64] {
            let hello = |stream| Hello {
                version_min: STREAM_VERSION,
                version_max: STREAM_VERSION,
                features: 0,
                session: [7; 16],
                stream,
                streams,
                urgent: 0,
                flags: 0,
                blocks: BlockTable::new(),
            };
            let hellos: Vec<_> = (0..streams).rev().map(hello).collect();
            assert!(is_complete(hellos.iter()));
            assert!(!is_complete(hellos[1..].iter()) && !is_complete(hellos[..1].iter().skip(1)));
            assert!(!is_complete([].iter()));
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
