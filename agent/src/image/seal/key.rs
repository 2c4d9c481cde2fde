// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The operator's key for images.

use super::source::KeyError;
use std::fmt;
use std::sync::Arc;
use zeroize::Zeroizing;

/// Bytes of a key.
pub const KEY_SIZE: usize = 32;
/// Hexadecimal digits of a key.
const DIGITS: usize = 2 * KEY_SIZE;
/// What the digits are called in errors.
pub(super) const DIGITS_TEXT: &str = "64 hexadecimal digits with or without a newline";
/// Most bytes of a key's file: the digits and a newline.
pub const MAX_FILE: usize = DIGITS + 1;

/// The operator's key. Clones share its bytes, which are zeroed when the last clone is dropped.
#[derive(Clone)]
pub struct ImageKey(Arc<Zeroizing<[u8; KEY_SIZE]>>);

impl fmt::Debug for ImageKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ImageKey(..)")
    }
}

impl ImageKey {
    /// The key in the content of a file: 32 bytes, or 64 hexadecimal digits with or without a
    /// newline.
    ///
    /// # Errors
    /// If it is something else. The error has no byte of the content.
    pub fn parse(content: &[u8]) -> Result<Self, KeyError> {
        let mut key = Zeroizing::new([0; KEY_SIZE]);
        let digits = content.strip_suffix(b"\n").unwrap_or(content);
        if content.len() == KEY_SIZE {
            key.copy_from_slice(content);
        } else if digits.len() == DIGITS {
            for (at, (byte, pair)) in key.iter_mut().zip(digits.as_chunks::<2>().0).enumerate() {
                let digit = |place: usize| {
                    let value = char::from(pair[place]).to_digit(16);
                    value.ok_or(KeyError::NotHex { at: 2 * at + place })
                };
                *byte = (digit(0)? * 16 + digit(1)?) as u8;
            }
        } else {
            return Err(KeyError::Length { found: content.len() });
        }
        if key.iter().all(|byte| *byte == 0) {
            return Err(KeyError::Zero);
        }
        Ok(Self(Arc::new(key)))
    }

    /// Its secret bytes.
    pub(super) fn bytes(&self) -> &[u8; KEY_SIZE] {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_32_bytes_or_64_digits() {
        let bytes: [u8; 32] = std::array::from_fn(|at| at as u8 + 0xa0);
        let digits: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        let forms = [
            bytes.to_vec(),
            digits.clone().into_bytes(),
            format!("{digits}\n").into_bytes(),
            digits.to_uppercase().into_bytes(),
        ];
        for form in forms {
            assert_eq!(ImageKey::parse(&form).unwrap().bytes(), &bytes);
        }
        // A raw key may end in the byte of a newline.
        let raw = [&bytes[..31], b"\n"].concat();
        assert_eq!(ImageKey::parse(&raw).unwrap().bytes()[31], b'\n');
    }

    #[test]
    fn anything_else_is_refused_without_showing_it() {
        let refused = |content: &[u8]| ImageKey::parse(content).unwrap_err().to_string();
        for length in [0, 31, 33, 63] {
            let said = refused(&vec![b'a'; length]);
            assert!(
                said.starts_with(&format!("it has {length} bytes, but a key is 32 ")),
                "{said}"
            );
        }
        assert!(refused(&[b'a'; 66]).starts_with("it has more than 65 bytes, but a key is 32 "));
        let mut digits = [b'a'; 64];
        digits[41] = b'z';
        assert_eq!(refused(&digits), "digit 41 is none of 0 to 9 and a to f, counted from 0");
        assert!(refused(&[0; 32]).contains("all of its bytes are zero"));
        assert!(refused(&[b'0'; 64]).contains("all of its bytes are zero"));
    }

    #[test]
    fn a_key_is_not_shown() {
        let key = ImageKey::parse(&[b'k'; 32]).unwrap();
        assert_eq!(format!("{key:?}"), "ImageKey(..)");
    }
}
