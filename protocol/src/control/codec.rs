// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Bodies as sequences of little-endian fields.
//!
//! A [`Decoder`] allocates nothing by a length before it has compared the length with the bytes at
//! hand. [`Decoder::finish`] refuses a body that is longer than its type, so that no reader ignores
//! a field of a newer peer.

/// Why a body is not valid.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// The body ends inside a field.
    #[error("body ends in field {field}: {needed} bytes needed, {left} left")]
    TooShort {
        /// The field.
        field: &'static str,
        /// Bytes that the field takes.
        needed: usize,
        /// Bytes that are left.
        left: usize,
    },
    /// The body continues after the last field.
    #[error("body is {extra} bytes longer than its type")]
    TrailingBytes {
        /// Bytes after the last field.
        extra: usize,
    },
    /// The value is not allowed.
    #[error("{field} is {value:#x}, allowed: {allowed}")]
    InvalidValue {
        /// The field.
        field: &'static str,
        /// Its value.
        value: u64,
        /// What is allowed, in words.
        allowed: &'static str,
    },
    /// The duration is not allowed.
    #[error("{field} is {}, allowed: {allowed}", format_micros(*micros))]
    InvalidDuration {
        /// The field.
        field: &'static str,
        /// Its value in microseconds.
        micros: u64,
        /// What is allowed, in words.
        allowed: &'static str,
    },
    /// The text is too long.
    #[error("{field} has {length} bytes, allowed are {limit}")]
    TextTooLong {
        /// The field.
        field: &'static str,
        /// Bytes of the text.
        length: u32,
        /// Most bytes that it may have.
        limit: usize,
    },
    /// A value occurs twice, and all must be different.
    #[error("{field} is {value:?} twice, and all must be different")]
    Duplicate {
        /// The field.
        field: &'static str,
        /// Its value.
        value: String,
    },
    /// The text cannot be printed in one line.
    #[error("{field} is {value:?}, allowed: a text without control characters")]
    ControlCharacter {
        /// The field.
        field: &'static str,
        /// Its value.
        value: String,
    },
    /// The text is not UTF-8.
    #[error("{field} is not UTF-8")]
    NotUtf8 {
        /// The field.
        field: &'static str,
    },
}

/// A duration in the largest unit in which it is a whole number.
fn format_micros(micros: u64) -> String {
    match micros {
        0 => "0 s".to_owned(),
        _ if micros.is_multiple_of(1_000_000) => format!("{} s", micros / 1_000_000),
        _ if micros.is_multiple_of(1000) => format!("{} ms", micros / 1000),
        _ => format!("{micros} µs"),
    }
}

/// Reads the fields of a body from front to back.
#[derive(Debug)]
pub struct Decoder<'a> {
    rest: &'a [u8],
}

impl<'a> Decoder<'a> {
    /// A reader of `body`.
    pub fn new(body: &'a [u8]) -> Self {
        Self { rest: body }
    }

    /// Number of bytes that are not read yet.
    pub fn remaining(&self) -> usize {
        self.rest.len()
    }

    /// The next `length` bytes.
    ///
    /// # Errors
    /// If fewer are left.
    pub fn bytes(&mut self, field: &'static str, length: usize) -> Result<&'a [u8], DecodeError> {
        match self.rest.split_at_checked(length) {
            Some((head, rest)) => {
                self.rest = rest;
                Ok(head)
            }
            None => Err(DecodeError::TooShort { field, needed: length, left: self.rest.len() }),
        }
    }

    /// The next `N` bytes.
    ///
    /// # Errors
    /// If fewer are left.
    pub fn array<const N: usize>(&mut self, field: &'static str) -> Result<[u8; N], DecodeError> {
        let mut array = [0; N];
        array.copy_from_slice(self.bytes(field, N)?);
        Ok(array)
    }

    /// The next byte.
    ///
    /// # Errors
    /// If the body ends first.
    pub fn u8(&mut self, field: &'static str) -> Result<u8, DecodeError> {
        Ok(self.array::<1>(field)?[0])
    }

    /// The next 16-bit number.
    ///
    /// # Errors
    /// If the body ends first.
    pub fn u16(&mut self, field: &'static str) -> Result<u16, DecodeError> {
        Ok(u16::from_le_bytes(self.array(field)?))
    }

    /// The next 32-bit number.
    ///
    /// # Errors
    /// If the body ends first.
    pub fn u32(&mut self, field: &'static str) -> Result<u32, DecodeError> {
        Ok(u32::from_le_bytes(self.array(field)?))
    }

    /// The next 64-bit number.
    ///
    /// # Errors
    /// If the body ends first.
    pub fn u64(&mut self, field: &'static str) -> Result<u64, DecodeError> {
        Ok(u64::from_le_bytes(self.array(field)?))
    }

    /// The next 32-bit number, in which only the bits of `known` may be set. `allowed` says in
    /// words which these are.
    ///
    /// # Errors
    /// If the body ends first, or another bit is set.
    pub(super) fn flags(
        &mut self, field: &'static str, known: u32, allowed: &'static str,
    ) -> Result<u32, DecodeError> {
        match self.u32(field)? {
            value if value & !known == 0 => Ok(value),
            value => Err(DecodeError::InvalidValue { field, value: value.into(), allowed }),
        }
    }

    /// A text: its length as a 32-bit number, at most `limit`, then as many bytes of UTF-8.
    ///
    /// # Errors
    /// If the length is over the limit or over what is left, or the bytes are not UTF-8.
    pub fn text(&mut self, field: &'static str, limit: usize) -> Result<&'a str, DecodeError> {
        let length = self.u32(field)?;
        if length as usize > limit {
            return Err(DecodeError::TextTooLong { field, length, limit });
        }
        let bytes = self.bytes(field, length as usize)?;
        std::str::from_utf8(bytes).map_err(|_| DecodeError::NotUtf8 { field })
    }

    /// All bytes that are left.
    pub fn remainder(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.rest)
    }

    /// Ends reading.
    ///
    /// # Errors
    /// If bytes are left.
    pub fn finish(self) -> Result<(), DecodeError> {
        match self.rest.len() {
            0 => Ok(()),
            extra => Err(DecodeError::TrailingBytes { extra }),
        }
    }
}

/// Prints the fields of a body from front to back.
#[derive(Debug, Default)]
pub struct Encoder {
    body: Vec<u8>,
}

impl Encoder {
    /// An empty body.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a byte.
    #[must_use]
    pub fn u8(mut self, value: u8) -> Self {
        self.body.push(value);
        self
    }

    /// Adds a 16-bit number.
    #[must_use]
    pub fn u16(mut self, value: u16) -> Self {
        self.body.extend_from_slice(&value.to_le_bytes());
        self
    }

    /// Adds a 32-bit number.
    #[must_use]
    pub fn u32(mut self, value: u32) -> Self {
        self.body.extend_from_slice(&value.to_le_bytes());
        self
    }

    /// Adds a 64-bit number.
    #[must_use]
    pub fn u64(mut self, value: u64) -> Self {
        self.body.extend_from_slice(&value.to_le_bytes());
        self
    }

    /// Adds bytes as they are.
    #[must_use]
    pub fn bytes(mut self, bytes: &[u8]) -> Self {
        self.body.extend_from_slice(bytes);
        self
    }

    /// Adds a text with its length before it.
    #[must_use]
    pub fn text(self, text: &str) -> Self {
        self.u32(text.len() as u32).bytes(text.as_bytes())
    }

    /// The body.
    pub fn finish(self) -> Vec<u8> {
        self.body
    }
}

/// Cuts a sentence to `limit` bytes at the boundary of a character, so that it fits its field.
pub fn truncate_text(sentence: &str, limit: usize) -> &str {
    let mut end = sentence.len().min(limit);
    while !sentence.is_char_boundary(end) {
        end -= 1;
    }
    &sentence[..end]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_come_back_in_order() {
        let body = Encoder::new().u8(1).u16(2).u32(3).u64(4).text("five").bytes(b"6").finish();
        let mut decoder = Decoder::new(&body);
        assert_eq!(decoder.u8("a").unwrap(), 1);
        assert_eq!(decoder.u16("b").unwrap(), 2);
        assert_eq!(decoder.u32("c").unwrap(), 3);
        assert_eq!(decoder.u64("d").unwrap(), 4);
        assert_eq!(decoder.text("e", 4).unwrap(), "five");
        assert_eq!(decoder.remainder(), b"6");
        decoder.finish().unwrap();
    }

    #[test]
    fn wrong_bodies_name_the_field() {
        assert_eq!(
            Decoder::new(&[0; 3]).u32("length"),
            Err(DecodeError::TooShort { field: "length", needed: 4, left: 3 })
        );
        assert_eq!(Decoder::new(&[0; 3]).finish(), Err(DecodeError::TrailingBytes { extra: 3 }));
        let huge = Encoder::new().u32(u32::MAX).finish();
        let error = Decoder::new(&huge).text("name", 255).unwrap_err().to_string();
        assert_eq!(error, "name has 4294967295 bytes, allowed are 255");
        let lying = Encoder::new().u32(200).finish();
        assert!(matches!(
            Decoder::new(&lying).text("name", 255),
            Err(DecodeError::TooShort { field: "name", .. })
        ));
        let broken = Encoder::new().u32(1).u8(0xff).finish();
        assert_eq!(
            Decoder::new(&broken).text("name", 255),
            Err(DecodeError::NotUtf8 { field: "name" })
        );
    }

    #[test]
    fn a_time_is_named_as_a_user_writes_it() {
        let named = [
            (0, "0 s"),
            (1_000_000_000_000_000, "1000000000 s"),
            (1_500_000, "1500 ms"),
            (86_400_000_001, "86400000001 µs"),
        ];
        for (micros, expected) in named {
            let error =
                DecodeError::InvalidDuration { field: "peer_timeout", micros, allowed: "any" }
                    .to_string();
            assert_eq!(error, format!("peer_timeout is {expected}, allowed: any"));
        }
    }

    #[test]
    fn clip_keeps_characters_whole() {
        assert_eq!(truncate_text("grün", 3), "gr");
        assert_eq!(truncate_text("grün", 4), "grü");
        assert_eq!(truncate_text("grün", 400), "grün");
    }
}
