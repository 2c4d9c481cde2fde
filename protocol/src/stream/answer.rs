// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The answer of the destination to a hello, and errors of both sides.

use super::hello::STREAM_VERSION;
use crate::control::codec::{DecodeError, Decoder, Encoder, truncate_text};
use crate::control::job::MAX_SENTENCE;
use crate::control::reply::{ErrorCode, RemoteError};
use crate::memory::{MAX_BLOCKS, PAGE_SIZE};

/// The answer of a destination that accepts the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Accept {
    /// The version to use.
    pub version: u16,
    /// The features to use: those offered that the destination knows.
    pub features: u64,
    /// The destination's host page size in bytes for each block, in the order of the table: in
    /// postcopy whole host pages remain. Empty without postcopy.
    pub host_pages: Vec<u64>,
}

impl Accept {
    /// The payload.
    pub fn encode(&self) -> Vec<u8> {
        let encoder =
            Encoder::new().u16(self.version).u64(self.features).u32(self.host_pages.len() as u32);
        self.host_pages.iter().fold(encoder, |encoder, size| encoder.u64(*size)).finish()
    }

    /// Reads the payload.
    ///
    /// # Errors
    /// The field that is wrong.
    pub fn decode(payload: &[u8]) -> Result<Self, DecodeError> {
        let mut decoder = Decoder::new(payload);
        let version = decoder.u16("version")?;
        if version != STREAM_VERSION {
            return Err(DecodeError::InvalidValue {
                field: "version",
                value: version.into(),
                allowed: "1",
            });
        }
        let features = decoder.u64("features")?;
        let count = decoder.u32("host_pages")?;
        if count as usize > MAX_BLOCKS {
            return Err(DecodeError::InvalidValue {
                field: "host_pages",
                value: count.into(),
                allowed: "at most 512",
            });
        }
        let host_page = |_| match decoder.u64("host page")? {
            size if size.is_power_of_two() && size >= PAGE_SIZE => Ok(size),
            value => Err(DecodeError::InvalidValue {
                field: "host page",
                value,
                allowed: "powers of two from 4096",
            }),
        };
        let host_pages = (0..count).map(host_page).collect::<Result<_, _>>()?;
        decoder.finish()?;
        Ok(Self { version, features, host_pages })
    }
}

/// The payload of a reject or error record.
pub fn encode_error(error: &RemoteError) -> Vec<u8> {
    Encoder::new()
        .u32(error.code as u32)
        .text(truncate_text(&error.sentence, MAX_SENTENCE))
        .finish()
}

/// Reads the payload of a reject or error record.
///
/// # Errors
/// The field that is wrong.
pub fn decode_error(payload: &[u8]) -> Result<RemoteError, DecodeError> {
    let mut decoder = Decoder::new(payload);
    let code = ErrorCode::from_wire(decoder.u32("code")?);
    let error = RemoteError::new(code, decoder.text("sentence", MAX_SENTENCE)?);
    decoder.finish()?;
    Ok(error)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn an_accept_survives_the_wire_and_odd_host_pages_do_not() {
        let accept = Accept { version: 1, features: 4, host_pages: vec![4096, 2 << 20] };
        assert_eq!(Accept::decode(&accept.encode()), Ok(accept.clone()));
        for size in [0, 1, 2048, 4097, u64::MAX] {
            let refused =
                Accept::decode(&Accept { host_pages: vec![4096, size], ..accept.clone() }.encode());
            assert!(
                matches!(refused, Err(DecodeError::InvalidValue { field: "host page", .. })),
                "{size}"
            );
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_decoders_panic(payload in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = Accept::decode(&payload);
            let _ = decode_error(&payload);
        }
    }
}
