// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Bodies, field by field: little-endian numbers without padding, and texts.

/// A body that grows.
#[derive(Debug, Clone, Default)]
pub struct Body(pub Vec<u8>);

impl Body {
    pub fn new() -> Self {
        Self::default()
    }

    pub fn u16(self, value: u16) -> Self {
        self.raw(&value.to_le_bytes())
    }

    pub fn u32(self, value: u32) -> Self {
        self.raw(&value.to_le_bytes())
    }

    pub fn u64(self, value: u64) -> Self {
        self.raw(&value.to_le_bytes())
    }

    pub fn raw(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }

    /// Its length in bytes, and the bytes.
    pub fn text(self, text: &str) -> Self {
        self.u32(text.len() as u32).raw(text.as_bytes())
    }

    /// The same with other bytes from `offset` on.
    pub fn with(mut self, offset: usize, bytes: &[u8]) -> Self {
        self.0[offset..offset + bytes.len()].copy_from_slice(bytes);
        self
    }
}

pub fn u16_at(body: &[u8], offset: usize) -> u16 {
    u16::from_le_bytes(body[offset..offset + 2].try_into().unwrap())
}

pub fn u32_at(body: &[u8], offset: usize) -> u32 {
    u32::from_le_bytes(body[offset..offset + 4].try_into().unwrap())
}

pub fn u64_at(body: &[u8], offset: usize) -> u64 {
    u64::from_le_bytes(body[offset..offset + 8].try_into().unwrap())
}

/// The text at `offset`, which must be the last field.
pub fn last_text_at(body: &[u8], offset: usize) -> String {
    let length = u32_at(body, offset) as usize;
    assert_eq!(body.len(), offset + 4 + length, "something follows the text");
    text_at(body, offset)
}

pub fn text_at(body: &[u8], offset: usize) -> String {
    let length = u32_at(body, offset) as usize;
    String::from_utf8(body[offset + 4..][..length].to_vec()).unwrap()
}
