// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The answers of the VMM to hooks.
//!
//! Each begins with the sequence number of its hook.

use super::codec::{DecodeError, Decoder};
use super::job::RunState;
use super::reply::{Reply, decode_reply, encode_reply};
use super::state_pieces::{PieceSize, decode_pieces, encode_pieces};

#[cfg(doc)]
use super::hook::Hook;

/// The body of an answer without a result.
pub fn encode_hook_reply(sequence: u64, reply: &Reply<()>) -> Vec<u8> {
    let mut body = sequence.to_le_bytes().to_vec();
    body.extend(encode_reply(reply, |(), encoder| encoder));
    body
}

/// The answer to [`Hook::SaveState`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SavedState {
    /// The run state of the guest, apart from the pause of a job.
    pub guest: RunState,
    /// The pieces in the file that comes with the answer.
    pub pieces: Vec<PieceSize>,
}

/// The body of an answer to [`Hook::SaveState`].
pub fn encode_state_reply(sequence: u64, reply: &Reply<SavedState>) -> Vec<u8> {
    let mut body = sequence.to_le_bytes().to_vec();
    body.extend(encode_reply(reply, |saved, encoder| {
        encode_pieces(&saved.pieces, encoder.u32(saved.guest as u32))
    }));
    body
}

/// The sequence number of an answer.
///
/// # Errors
/// If there is none.
pub fn reply_sequence(body: &[u8]) -> Result<u64, DecodeError> {
    Decoder::new(body).u64("sequence")
}

/// Reads the answer to any hook but [`Hook::SaveState`].
///
/// # Errors
/// If it is malformed; the VMM's error is in the inner result.
pub fn decode_hook_reply(body: &[u8]) -> Result<Reply<()>, DecodeError> {
    decode_reply(after_sequence(body)?, |_| Ok(()))
}

/// Reads the answer to [`Hook::SaveState`].
///
/// # Errors
/// If it is malformed; the VMM's error is in the inner result.
pub fn decode_state_reply(body: &[u8]) -> Result<Reply<SavedState>, DecodeError> {
    decode_reply(after_sequence(body)?, |decoder| {
        let value = decoder.u32("guest")?;
        let allowed = "0 running, 1 paused";
        let unknown = DecodeError::InvalidValue { field: "guest", value: value.into(), allowed };
        let guest = RunState::from_wire(value).ok_or(unknown)?;
        Ok(SavedState { guest, pieces: decode_pieces(decoder)? })
    })
}

fn after_sequence(body: &[u8]) -> Result<&[u8], DecodeError> {
    let mut decoder = Decoder::new(body);
    decoder.u64("sequence")?;
    Ok(decoder.remainder())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::reply::{ErrorCode, RemoteError};

    #[test]
    fn answers_carry_the_number_of_their_hook() {
        let pieces = vec![
            PieceSize { name: "vcpu".into(), length: 5 },
            PieceSize { name: String::new(), length: 0 },
        ];
        for guest in [RunState::Running, RunState::Paused] {
            let saved = SavedState { guest, pieces: pieces.clone() };
            let reply = encode_state_reply(9, &Ok(saved.clone()));
            assert_eq!(reply_sequence(&reply), Ok(9));
            assert_eq!(decode_state_reply(&reply), Ok(Ok(saved)));
        }
        let error = RemoteError::new(ErrorCode::Other, "no");
        assert_eq!(decode_hook_reply(&encode_hook_reply(9, &Err(error.clone()))), Ok(Err(error)));
    }

    #[test]
    fn two_pieces_of_one_name_are_refused_by_it() {
        let pieces = ["cpu", "disk", "cpu"].map(|name| PieceSize { name: name.into(), length: 1 });
        let saved = SavedState { guest: RunState::Running, pieces: pieces.to_vec() };
        let error = decode_state_reply(&encode_state_reply(1, &Ok(saved))).unwrap_err();
        assert_eq!(
            error.to_string(),
            "name of a piece is \"cpu\" twice, and all must be different"
        );
    }
}
