// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Sizes as people write them.

/// Reads a number of bytes, with K, M, G or T for powers of 1024.
///
/// # Errors
/// If the text is malformed. The error says what is allowed.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.char_indices().last() {
        Some((at, 'k' | 'K')) => (&text[..at], 10),
        Some((at, 'm' | 'M')) => (&text[..at], 20),
        Some((at, 'g' | 'G')) => (&text[..at], 30),
        Some((at, 't' | 'T')) => (&text[..at], 40),
        _ => (text, 0),
    };
    let number = match digits.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16),
        None => digits.parse(),
    };
    let number = number.map_err(|_| {
        format!("\"{text}\": write a whole number of bytes, or of K, M, G or T, as 512M or 2G")
    })?;
    number.checked_mul(1 << shift).ok_or_else(|| format!("\"{text}\" does not fit in 64 bits"))
}
