// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Sizes as QEMU reads them.
//!
//! The syntax is that of `qemu_strtosz()`: a decimal number, optionally with a fraction and with
//! one suffix of `bkMGTPE` in either case, or a hexadecimal number of bytes without suffix.

/// Parses a size of which a plain number means bytes. `None` if QEMU would refuse it.
pub(super) fn parse(text: &str) -> Option<u64> {
    if let Some(digits) = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        // from_str_radix takes a sign; QEMU does not.
        return digits
            .bytes()
            .all(|byte| byte.is_ascii_hexdigit())
            .then(|| u64::from_str_radix(digits, 16).ok())?;
    }
    let (number, unit) = match text.char_indices().next_back() {
        Some((at, suffix)) if suffix.is_ascii_alphabetic() => (&text[..at], unit(suffix)?),
        _ => (text, 1),
    };
    let (whole, fraction) = match number.split_once('.') {
        Some((whole, fraction)) => (whole, fraction),
        None => (number, ""),
    };
    let digits_only = |part: &str| part.bytes().all(|byte| byte.is_ascii_digit());
    if whole.is_empty() && fraction.is_empty() || !digits_only(whole) || !digits_only(fraction) {
        return None;
    }
    let whole = match whole {
        "" => 0,
        digits => digits.parse::<u64>().ok()?,
    };
    let fraction = match fraction {
        "" => 0.0,
        digits => format!("0.{digits}").parse::<f64>().ok()?,
    };
    if unit == 1 && fraction > 0.0 {
        return None;
    }
    // QEMU computes the fraction in double precision and rounds it to the nearest byte. The value
    // is at most one exbibyte.
    let fraction = (fraction * unit as f64 + 0.5) as u64;
    whole.checked_mul(unit)?.checked_add(fraction)
}

/// Parses a size of which a plain number means mebibytes, as `-m` does.
pub(super) fn parse_mebibytes(text: &str) -> Option<u64> {
    if text.ends_with(|last: char| last.is_ascii_digit()) {
        parse(&format!("{text}M"))
    } else {
        parse(text)
    }
}

/// Bytes that a suffix stands for.
fn unit(suffix: char) -> Option<u64> {
    let exponent = match suffix.to_ascii_uppercase() {
        'B' => 0,
        'K' => 10,
        'M' => 20,
        'G' => 30,
        'T' => 40,
        'P' => 50,
        'E' => 60,
        _ => return None,
    };
    Some(1 << exponent)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{parse, parse_mebibytes};

    #[test]
    fn sizes_are_what_qemu_makes_of_them() {
        // Each was given to QEMU 10.0 and 11.1.
        for (text, bytes) in [
            ("512", Some(512)),
            ("512m", Some(512 << 20)),
            ("1.5G", Some(3 << 29)),
            (".5G", Some(1 << 29)),
            ("1.0b", Some(1)),
            ("128.00001M", Some(134_217_738)),
            ("0x100000", Some(1 << 20)),
            ("0x100M", None),
            ("0.3b", None),
            ("1.5", None),
            ("1e2", None),
            ("512MB", None),
            ("", None),
            (".", None),
            ("M", None),
            ("-1", None),
            ("0x", None),
            ("0x+1", None),
            ("16E", None),
            ("18446744073709551616", None),
        ] {
            assert_eq!(parse(text), bytes, "{text}");
        }
    }

    #[test]
    fn a_plain_number_of_m_is_in_mebibytes() {
        assert_eq!(parse_mebibytes("512"), Some(512 << 20));
        assert_eq!(parse_mebibytes("512k"), Some(512 << 10));
        assert_eq!(parse_mebibytes("1.5"), Some(3 << 19));
        assert_eq!(parse_mebibytes("0x200"), None);
    }

    proptest! {
        #[test]
        fn a_printed_number_is_read_back(bytes: u64) {
            prop_assert_eq!(parse(&bytes.to_string()), Some(bytes));
            prop_assert_eq!(parse(&format!("{bytes:#x}")), Some(bytes));
        }

        #[test]
        fn any_text_is_read_or_refused(text in ".{0,12}") {
            let _ = parse(&text);
            let _ = parse_mebibytes(&text);
        }
    }
}
