// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The messages between an agent and its service of stores.
//!
//! Both are frames, as between an agent and its opener: a request is a frame whose first descriptor
//! is a socket for the answer, and the others belong to the request. The answer is a frame with the
//! same code: the kind of the error, 0 for success, its sentence, and numbers.
//!
//! The service can be of another version of the program than the agent. So a code keeps its meaning
//! and its fields, and a service drops descriptors that it does not know.

use super::error::{StoreError, StoreErrorKind};
use pageferry_protocol::control::codec::{DecodeError, Decoder, Encoder, truncate_text};

/// Longest name of an object in bytes.
const MAX_NAME: usize = 4096;
/// Longest sentence in bytes.
const MAX_SENTENCE: usize = 4096;
/// The code of an upload, and of frames with its progress.
pub(super) const UPLOAD: u32 = 4;

/// What the service is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Ask {
    /// Open an image. Answered with the length of the file, the size of a piece and the hash of the
    /// index in two numbers, and with descriptors of the cache: `data` and `present`.
    Open { name: String },
    /// Have these pieces of the image with this index in the cache.
    Fetch { name: String, hash: [u8; 16], first: u64, count: u64, speed: Speed },
    /// Check whether an object can be made. Answered with a file for it.
    Create { name: String, replace: bool, kind: Kind },
    /// Put the image in the file of the descriptor into the store, but for its index. Answered with
    /// the id of the upload in two numbers, and the bytes of its packs. A second descriptor may
    /// come along: a socket on which the service says how far it is ([`encode_progress`]).
    Upload { name: String },
    /// Put the index of an upload.
    Commit { upload: [u8; 16], replace: bool },
    /// Remove what an upload has put.
    Abandon { upload: [u8; 16] },
    /// Put the file of the descriptor as one object.
    Put { name: String, replace: bool, kind: Kind },
    /// Read an object of at most `limit` bytes. Answered with a file.
    Get { name: String, limit: u64 },
    /// Say whether the name may be used.
    Check { name: String },
}

/// How soon somebody needs pieces.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Speed {
    /// Nobody waits for them yet. The answer comes before they are there.
    Later = 0,
    /// Somebody reads in long ranges.
    Soon = 1,
    /// A guest waits.
    Now = 2,
}

/// What an object begins with, and what it is called.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Kind {
    pub(super) magic: Vec<u8>,
    pub(super) name: String,
}

impl Kind {
    fn put(&self, body: Encoder) -> Encoder {
        body.u32(self.magic.len() as u32).bytes(&self.magic).text(&self.name)
    }

    fn take(body: &mut Decoder<'_>) -> Result<Self, DecodeError> {
        let length = body.u32("magic")?;
        if length > 64 {
            let (field, value) = ("magic", length.into());
            return Err(DecodeError::InvalidValue { field, value, allowed: "at most 64 bytes" });
        }
        let magic = body.bytes("magic", length as usize)?.to_vec();
        Ok(Self { magic, name: body.text("kind", 64)?.to_owned() })
    }
}

impl Ask {
    /// The name of the object; empty if it has none.
    pub(super) fn name(&self) -> &str {
        match self {
            Self::Open { name }
            | Self::Fetch { name, .. }
            | Self::Create { name, .. }
            | Self::Upload { name }
            | Self::Put { name, .. }
            | Self::Get { name, .. }
            | Self::Check { name } => name,
            Self::Commit { .. } | Self::Abandon { .. } => "",
        }
    }

    /// True if whoever asks may leave before the answer. It must know what became of an index that
    /// it has had put, and what was uploaded must be removed.
    pub(super) fn may_be_given_up(&self) -> bool {
        !matches!(self, Self::Commit { .. } | Self::Abandon { .. } | Self::Put { .. })
    }

    /// The code of its frame.
    pub(super) fn code(&self) -> u32 {
        match self {
            Self::Open { .. } => 1,
            Self::Fetch { .. } => 2,
            Self::Create { .. } => 3,
            Self::Upload { .. } => UPLOAD,
            Self::Commit { .. } => 5,
            Self::Put { .. } => 6,
            Self::Get { .. } => 7,
            Self::Check { .. } => 8,
            Self::Abandon { .. } => 9,
        }
    }

    /// The body of its frame.
    pub(super) fn encode(&self) -> Vec<u8> {
        let body = Encoder::new();
        match self {
            Self::Open { name } | Self::Upload { name } | Self::Check { name } => body.text(name),
            Self::Fetch { name, hash, first, count, speed } => {
                body.text(name).bytes(hash).u64(*first).u64(*count).u8(*speed as u8)
            }
            Self::Create { name, replace, kind } | Self::Put { name, replace, kind } => {
                kind.put(body.text(name).u8(u8::from(*replace)))
            }
            Self::Commit { upload, replace } => body.bytes(upload).u8(u8::from(*replace)),
            Self::Get { name, limit } => body.text(name).u64(*limit),
            Self::Abandon { upload } => body.bytes(upload),
        }
        .finish()
    }

    /// Reads a request. `None` if the code is not known.
    ///
    /// # Errors
    /// The field that is wrong.
    pub(super) fn decode(code: u32, body: &[u8]) -> Result<Option<Self>, DecodeError> {
        let mut decoder = Decoder::new(body);
        let body = &mut decoder;
        let name = |body: &mut Decoder<'_>| Ok(body.text("name", MAX_NAME)?.to_owned());
        let ask = match code {
            1 => Self::Open { name: name(body)? },
            2 => {
                let (name, hash) = (name(body)?, body.array("hash")?);
                let (first, count) = (body.u64("first")?, body.u64("count")?);
                let speed = match body.u8("speed")? {
                    0 => Speed::Later,
                    1 => Speed::Soon,
                    _ => Speed::Now,
                };
                Self::Fetch { name, hash, first, count, speed }
            }
            3 | 6 => {
                let (name, replace) = (name(body)?, body.u8("replace")? != 0);
                let kind = Kind::take(body)?;
                if code == 3 {
                    Self::Create { name, replace, kind }
                } else {
                    Self::Put { name, replace, kind }
                }
            }
            UPLOAD => Self::Upload { name: name(body)? },
            5 => Self::Commit { upload: body.array("upload")?, replace: body.u8("replace")? != 0 },
            7 => Self::Get { name: name(body)?, limit: body.u64("limit")? },
            8 => Self::Check { name: name(body)? },
            9 => Self::Abandon { upload: body.array("upload")? },
            _ => return Ok(None),
        };
        decoder.finish()?;
        Ok(Some(ask))
    }
}

/// The numbers of an answer.
pub(super) type Numbers = [u64; 4];

/// The body of an answer.
pub(super) fn encode_answer(answer: &Result<Numbers, StoreError>) -> Vec<u8> {
    let (kind, sentence, numbers) = match answer {
        Ok(numbers) => (0, "", *numbers),
        Err(error) => (error.kind as u32, truncate_text(&error.sentence, MAX_SENTENCE), [0; 4]),
    };
    let body = Encoder::new().u32(kind).text(sentence);
    numbers.iter().fold(body, |body, number| body.u64(*number)).finish()
}

/// Reads an answer.
///
/// # Errors
/// The field that is wrong.
pub(super) fn decode_answer(body: &[u8]) -> Result<Result<Numbers, StoreError>, DecodeError> {
    let mut body = Decoder::new(body);
    let kind = body.u32("kind")?;
    let sentence = body.text("sentence", MAX_SENTENCE)?.to_owned();
    let mut numbers = [0; 4];
    for number in &mut numbers {
        *number = body.u64("number")?;
    }
    body.finish()?;
    Ok(match kind {
        0 => Ok(numbers),
        kind => Err(StoreError::new(StoreErrorKind::from_wire(kind), sentence)),
    })
}

/// The body of a frame that says how far an upload is: bytes that are in the store, and all bytes.
pub(super) fn encode_progress(done: u64, all: u64) -> Vec<u8> {
    Encoder::new().u64(done).u64(all).finish()
}

/// Reads such a body.
///
/// # Errors
/// The field that is wrong.
pub(super) fn decode_progress(body: &[u8]) -> Result<(u64, u64), DecodeError> {
    let mut body = Decoder::new(body);
    let progress = (body.u64("done")?, body.u64("all")?);
    body.finish()?;
    Ok(progress)
}

/// Sixteen bytes as two numbers.
pub(super) fn split(bytes: [u8; 16]) -> [u64; 2] {
    let number = u128::from_le_bytes(bytes);
    [number as u64, (number >> 64) as u64]
}

/// Two numbers as sixteen bytes.
pub(super) fn join([low, high]: [u64; 2]) -> [u8; 16] {
    (u128::from(low) | u128::from(high) << 64).to_le_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn asks() -> impl Strategy<Value = Ask> {
        let name = || "[a-z:/]{1,40}";
        let speed = || prop_oneof![Just(Speed::Later), Just(Speed::Soon), Just(Speed::Now)];
        let kind = || {
            (proptest::collection::vec(any::<u8>(), 0..64), "[a-z ]{0,40}")
                .prop_map(|(magic, name)| Kind { magic, name })
        };
        prop_oneof![
            name().prop_map(|name| Ask::Open { name }),
            (name(), any::<([u8; 16], u64, u64)>(), speed()).prop_map(
                |(name, (hash, first, count), speed)| Ask::Fetch {
                    name,
                    hash,
                    first,
                    count,
                    speed
                }
            ),
            (name(), any::<bool>(), kind()).prop_map(|(name, replace, kind)| Ask::Create {
                name,
                replace,
                kind
            }),
            name().prop_map(|name| Ask::Upload { name }),
            any::<([u8; 16], bool)>().prop_map(|(upload, replace)| Ask::Commit { upload, replace }),
            (name(), any::<bool>(), kind()).prop_map(|(name, replace, kind)| Ask::Put {
                name,
                replace,
                kind
            }),
            (name(), any::<u64>()).prop_map(|(name, limit)| Ask::Get { name, limit }),
            name().prop_map(|name| Ask::Check { name }),
            any::<[u8; 16]>().prop_map(|upload| Ask::Abandon { upload }),
        ]
    }

    proptest! {
        #[test]
        fn every_request_survives_the_wire(ask in asks()) {
            prop_assert_eq!(Ask::decode(ask.code(), &ask.encode()).unwrap(), Some(ask));
        }

        #[test]
        fn any_bytes_are_read_or_refused(code in 0..10u32, body in any::<Vec<u8>>()) {
            let _ = Ask::decode(code, &body);
            let _ = decode_answer(&body);
            let _ = decode_progress(&body);
        }

        #[test]
        fn progress_survives_the_wire(done in any::<u64>(), all in any::<u64>()) {
            prop_assert_eq!(decode_progress(&encode_progress(done, all)).unwrap(), (done, all));
        }

        #[test]
        fn sixteen_bytes_are_two_numbers(bytes in any::<[u8; 16]>()) {
            prop_assert_eq!(join(split(bytes)), bytes);
        }
    }

    #[test]
    fn an_answer_survives_the_wire() {
        let refused = StoreError::new(StoreErrorKind::Missing, "s3://a/b: there is no such object");
        for answer in [Ok([1, 2, 3, u64::MAX]), Err(refused)] {
            assert_eq!(decode_answer(&encode_answer(&answer)).unwrap(), answer);
        }
    }
}
