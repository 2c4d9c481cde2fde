// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Answers to requests: the result, or an error with a code and a sentence.
//!
//! The body of an answer begins with a result code. 0 is success; the fields that the request
//! returns follow. Any other code is an [`ErrorCode`]; a sentence follows that names the field and
//! its value.

use super::codec::{DecodeError, Decoder, Encoder, truncate_text};
use super::job::{MAX_ADDRESS, MAX_SENTENCE};

/// Why the agent, or a hook of the VMM, did not carry out a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum ErrorCode {
    /// A field of the request is wrong.
    Invalid = 1,
    /// The request is not allowed in this state.
    State = 2,
    /// A job is in the way. Try again when it has ended.
    Busy = 3,
    /// The request names something that does not exist.
    NotFound = 4,
    /// The request is unknown or not supported here.
    Unsupported = 5,
    /// The kernel refused.
    System = 6,
    /// The sender may not send this request.
    Denied = 7,
    /// The other side failed in a way it has no code for.
    Other = 8,
    /// The guest was handed over. Trying again does not help.
    Gone = 9,
    /// The code of the VMM panicked in a hook.
    Panicked = 10,
}

impl ErrorCode {
    /// The code with this number; [`ErrorCode::Other`] if there is none.
    pub fn from_wire(value: u32) -> Self {
        const CODES: [ErrorCode; 10] = [
            ErrorCode::Invalid,
            ErrorCode::State,
            ErrorCode::Busy,
            ErrorCode::NotFound,
            ErrorCode::Unsupported,
            ErrorCode::System,
            ErrorCode::Denied,
            ErrorCode::Other,
            ErrorCode::Gone,
            ErrorCode::Panicked,
        ];
        CODES.into_iter().find(|code| *code as u32 == value).unwrap_or(Self::Other)
    }
}

/// An error as it travels: a code, and a sentence for people.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{sentence}")]
pub struct RemoteError {
    /// For programs.
    pub code: ErrorCode,
    /// For people: the field, its value, and what was allowed.
    pub sentence: String,
}

impl RemoteError {
    /// An error with this code and sentence.
    pub fn new(code: ErrorCode, sentence: impl ToString) -> Self {
        Self { code, sentence: sentence.to_string() }
    }
}

/// The answer to one of our requests.
pub type Reply<T> = Result<T, RemoteError>;

/// The body of an answer. `fields` adds the fields of a success.
pub fn encode_reply<T>(reply: &Reply<T>, fields: impl FnOnce(&T, Encoder) -> Encoder) -> Vec<u8> {
    match reply {
        Ok(value) => fields(value, Encoder::new().u32(0)).finish(),
        Err(error) => Encoder::new()
            .u32(error.code as u32)
            .text(truncate_text(&error.sentence, MAX_SENTENCE))
            .finish(),
    }
}

/// Decodes an answer.
///
/// # Errors
/// If the body is malformed. The error that it carries is the inner result.
pub fn decode_reply<T>(
    body: &[u8], fields: impl FnOnce(&mut Decoder<'_>) -> Result<T, DecodeError>,
) -> Result<Reply<T>, DecodeError> {
    let mut decoder = Decoder::new(body);
    let reply = match decoder.u32("result")? {
        0 => Ok(fields(&mut decoder)?),
        code => Err(RemoteError::new(
            ErrorCode::from_wire(code),
            decoder.text("sentence", MAX_SENTENCE)?,
        )),
    };
    decoder.finish()?;
    Ok(reply)
}

macro_rules! reply_fields {
    ($($(#[$doc:meta])* $name:ident { $($(#[$field_doc:meta])* $field:ident: $type:ident,)* })*) => {$(
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq)]
        pub struct $name { $($(#[$field_doc])* pub $field: $type,)* }

        impl $name {
            /// Adds the fields to a body.
            pub fn encode(&self, encoder: Encoder) -> Encoder {
                encoder$(.$type(self.$field))*
            }

            /// Reads the fields from a body.
            ///
            /// # Errors
            /// The field that is wrong.
            pub fn decode(decoder: &mut Decoder<'_>) -> Result<Self, DecodeError> {
                Ok(Self { $($field: decoder.$type(stringify!($field))?,)* })
            }
        }
    )*};
}

reply_fields! {
    /// Answer to [`Request::Hello`](super::request::Request::Hello).
    HelloReply {
        /// The version that both speak.
        version: u16,
        /// Features that both have.
        features: u64,
        /// Largest body that the agent accepts, in bytes.
        max_body: u32,
        /// Most ranges in one discard, free or populate.
        max_ranges: u32,
        /// Process id of the agent.
        pid: u32,
    }
    /// Answer to [`Request::AddBlock`](super::request::Request::AddBlock).
    AddBlockReply {
        /// The backing's allocation unit in bytes.
        host_page_size: u64,
        /// 1 if the file cannot shrink under the agent (`F_SEAL_SHRINK`).
        sealed: u32,
    }
    /// Answer to [`Request::Discard`](super::request::Request::Discard),
    /// [`Request::Free`](super::request::Request::Free) and
    /// [`Request::Populate`](super::request::Request::Populate).
    RangesReply {
        /// Pages whose state changed.
        changed_pages: u64,
    }
}

/// Answer to the requests that start a job, or recover one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JobStarted {
    /// Number of the job.
    pub job: u64,
    /// Incoming: the address it listens at, with the port that the kernel chose. Outgoing: the
    /// target. Snapshot and restore: the image.
    pub address: String,
}

impl JobStarted {
    /// Adds the fields to a body.
    pub fn encode(&self, encoder: Encoder) -> Encoder {
        encoder.u64(self.job).text(truncate_text(&self.address, MAX_ADDRESS))
    }

    /// Reads the fields from a body.
    ///
    /// # Errors
    /// The field that is wrong.
    pub fn decode(decoder: &mut Decoder<'_>) -> Result<Self, DecodeError> {
        Ok(Self {
            job: decoder.u64("job")?,
            address: decoder.text("address", MAX_ADDRESS)?.to_owned(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replies_carry_a_result_or_a_sentence() {
        let good: Reply<RangesReply> = Ok(RangesReply { changed_pages: 9 });
        let body = encode_reply(&good, RangesReply::encode);
        assert_eq!(decode_reply(&body, RangesReply::decode).unwrap(), good);
        let bad: Reply<RangesReply> = Err(RemoteError::new(ErrorCode::Busy, "block 3 is in use"));
        let body = encode_reply(&bad, RangesReply::encode);
        assert_eq!(decode_reply(&body, RangesReply::decode).unwrap(), bad);
    }
}
