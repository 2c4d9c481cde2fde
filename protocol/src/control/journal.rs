// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The journal of a job that brings the memory of a guest which runs already.
//!
//! If the agent is lost, the next one continues the job. What it needs for that lies with the VMM:
//! the bitmaps of the pages that are owed, the userfaultfd, and this journal. The agent writes it
//! before the guest runs, and it never changes. The VMM keeps it as bytes and does not look into
//! it, so that agents of another version can have another one.

use super::codec::{DecodeError, Decoder, Encoder};
use super::job::{IncomingOptions, MAX_ADDRESS, RestoreOptions};

/// Most bytes of a journal.
pub const MAX_JOURNAL: usize = 16 << 10;
/// The version that this crate writes, and the only one that it reads.
pub const JOURNAL_VERSION: u16 = 1;

const RESTORE: u16 = 1;
const INCOMING: u16 = 2;
/// As [`INCOMING`], with the peer. An agent that does not know it must not accept another peer.
const INCOMING_FROM: u16 = 3;

/// Most bytes by which a journal knows the source.
const MAX_PEER: usize = 256;

/// A job that can be continued.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Journal {
    /// A lazy restore.
    Restore {
        /// Absolute path of the image.
        path: String,
        /// Identifies the image.
        image: [u8; 16],
        /// The options of the job.
        options: RestoreOptions,
    },
    /// The destination of a postcopy.
    Incoming {
        /// The random number of the migration, by which its source is recognised.
        session: [u8; 16],
        /// Who the source has proved to be, as the agent encodes it. Empty if it did not have to
        /// prove that. At most 256 bytes.
        peer: Vec<u8>,
        /// Where the source connects again.
        address: String,
        /// The source wants to be told which pages are placed.
        acknowledge: bool,
        /// The options of the job.
        options: IncomingOptions,
    },
}

impl Journal {
    /// The bytes that the VMM keeps.
    pub fn encode(&self) -> Vec<u8> {
        let encoder = Encoder::new().u16(JOURNAL_VERSION);
        match self {
            Self::Restore { path, image, options } => {
                options.encode(encoder.u16(RESTORE).bytes(image).text(path)).finish()
            }
            Self::Incoming { session, peer, address, acknowledge, options } => {
                let encoder = if peer.is_empty() {
                    encoder.u16(INCOMING).bytes(session)
                } else {
                    let encoder = encoder.u16(INCOMING_FROM).bytes(session);
                    encoder.u32(peer.len() as u32).bytes(peer)
                };
                let encoder = encoder.text(address);
                options.encode(encoder.u32(u32::from(*acknowledge))).finish()
            }
        }
    }

    /// Reads what [`Journal::encode`] has made.
    ///
    /// # Errors
    /// The field that is wrong, or a version or a kind of job that this crate does not know.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut decoder = Decoder::new(bytes);
        let wrong = |field, value: u16, allowed| {
            Err(DecodeError::InvalidValue { field, value: value.into(), allowed })
        };
        match decoder.u16("journal version")? {
            JOURNAL_VERSION => {}
            version => return wrong("journal version", version, "1"),
        }
        let journal = match decoder.u16("journal kind")? {
            RESTORE => {
                let image = decoder.array("image")?;
                let path = decoder.text("path", MAX_ADDRESS)?.to_owned();
                Self::Restore { path, image, options: RestoreOptions::decode(&mut decoder)? }
            }
            kind @ (INCOMING | INCOMING_FROM) => {
                let session = decoder.array("session")?;
                let peer = if kind == INCOMING { Vec::new() } else { decode_peer(&mut decoder)? };
                let address = decoder.text("address", MAX_ADDRESS)?.to_owned();
                let acknowledge = decoder.flags("acknowledge", 1, "0 or 1")? == 1;
                let options = IncomingOptions::decode(&mut decoder)?;
                Self::Incoming { session, peer, address, acknowledge, options }
            }
            kind => return wrong("journal kind", kind, "1 restore, 2 and 3 incoming"),
        };
        decoder.finish().map(|()| journal)
    }
}

fn decode_peer(decoder: &mut Decoder<'_>) -> Result<Vec<u8>, DecodeError> {
    let (field, length) = ("peer length", decoder.u32("peer length")?);
    if length == 0 || length as usize > MAX_PEER {
        let value = length.into();
        return Err(DecodeError::InvalidValue { field, value, allowed: "1 to 256" });
    }
    decoder.bytes("peer", length as usize).map(<[u8]>::to_vec)
}

/// The bytes of a journal: their number, and then the bytes.
pub(super) fn encode_journal(encoder: Encoder, journal: &[u8]) -> Encoder {
    encoder.u32(journal.len() as u32).bytes(journal)
}

pub(super) fn decode_journal(decoder: &mut Decoder<'_>) -> Result<Vec<u8>, DecodeError> {
    let (field, length) = ("length", decoder.u32("length")?);
    if length as usize > MAX_JOURNAL {
        let value = length.into();
        return Err(DecodeError::InvalidValue { field, value, allowed: "0 to 16384" });
    }
    decoder.bytes("journal", length as usize).map(<[u8]>::to_vec)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn journal_of_this_version_is_read_and_another_is_refused_by_name() {
        let (path, image) = ("/images/guest".to_owned(), *b"0123456789abcdef");
        let journal = Journal::Restore { path, image, options: RestoreOptions::default() };
        let bytes = journal.encode();
        assert_eq!(Journal::decode(&bytes), Ok(journal));
        for (at, field) in [(0, "journal version"), (2, "journal kind")] {
            let mut other = bytes.clone();
            other[at] = 9;
            let error = Journal::decode(&other).unwrap_err().to_string();
            assert!(error.starts_with(field), "{error}");
        }
        assert!(Journal::decode(&bytes[..bytes.len() - 1]).is_err());
    }

    /// What version 1 has written stays readable.
    #[test]
    fn recorded_bytes_of_a_restore_are_read() {
        let mut recorded = vec![1, 0, 1, 0];
        recorded.extend([7; 16]);
        recorded.extend(b"\x02\0\0\0/i");
        // Mode lazy, 3 workers, resume auto, no limit, 30 s, huge pages never, no working set.
        recorded.extend([1, 0, 3, 0, 0, 0]);
        recorded.extend(0u64.to_le_bytes());
        recorded.extend(30_000_000u64.to_le_bytes());
        recorded.extend([1, 0, 0, 0, 0, 0]);
        let journal = Journal::decode(&recorded).unwrap();
        let Journal::Restore { path, image, options } = &journal else { panic!("{journal:?}") };
        assert_eq!((path.as_str(), *image, options.workers), ("/i", [7; 16], 3));
        assert_eq!(journal.encode(), recorded);
    }

    #[test]
    fn recorded_bytes_of_a_postcopy_are_read() {
        let mut recorded = vec![1, 0, 2, 0];
        recorded.extend([9; 16]);
        recorded.extend(b"\x06\0\0\0unix:/");
        recorded.extend(1u32.to_le_bytes());
        // 5 s for the peer, 30 s for hooks, resume never, huge pages auto.
        recorded.extend(5_000_000u64.to_le_bytes());
        recorded.extend(30_000_000u64.to_le_bytes());
        recorded.extend([1, 0, 0, 0]);
        let journal = Journal::decode(&recorded).unwrap();
        let Journal::Incoming { session, peer, address, acknowledge, options } = &journal else {
            panic!("{journal:?}")
        };
        assert_eq!((*session, address.as_str(), *acknowledge), ([9; 16], "unix:/", true));
        assert!(peer.is_empty());
        assert_eq!(options.hook_timeout.as_secs(), 30);
        assert_eq!(journal.encode(), recorded);
    }

    #[test]
    fn recorded_bytes_of_a_postcopy_over_tls_are_read() {
        let mut recorded = vec![1, 0, 3, 0];
        recorded.extend([9; 16]);
        recorded.extend(b"\x03\0\0\0abc\x06\0\0\0unix:/");
        recorded.extend(1u32.to_le_bytes());
        recorded.extend(5_000_000u64.to_le_bytes());
        recorded.extend(30_000_000u64.to_le_bytes());
        recorded.extend([1, 0, 0, 0]);
        let journal = Journal::decode(&recorded).unwrap();
        let Journal::Incoming { peer, .. } = &journal else { panic!("{journal:?}") };
        assert_eq!(peer, b"abc");
        assert_eq!(journal.encode(), recorded);
        for (length, allowed) in [(0u32, false), (3, true), (257, false)] {
            recorded[20..24].copy_from_slice(&length.to_le_bytes());
            assert_eq!(Journal::decode(&recorded).is_ok(), allowed, "{length}");
        }
    }
}
