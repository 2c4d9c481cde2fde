// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Errors as sentences: for logs, for people, and for answers, which carry no causes.

use std::error::Error;
use std::fmt::Write;
use std::time::Duration;

/// An error and its causes in one sentence: `what failed: why: why`. Control characters are
/// escaped.
pub fn chain(error: &dyn Error) -> String {
    let mut sentence = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        // Writing to a string does not fail.
        let _ = write!(sentence, ": {error}");
        cause = error.source();
    }
    printable(&sentence)
}

/// The text with control characters escaped, which a terminal would obey. Names come from files and
/// peers.
pub fn printable(text: &str) -> String {
    let escaped = |letter: char| match letter {
        letter if letter.is_control() => letter.escape_default().collect::<String>(),
        letter => letter.to_string(),
    };
    text.chars().map(escaped).collect()
}

/// A duration as people say it: `10 s`, `2.5 s`, `200 ms`.
pub fn rounded(time: Duration) -> String {
    let tenths = (time.as_millis() + 50) / 100;
    match (tenths / 10, tenths % 10) {
        _ if time < Duration::from_millis(950) => format!("{} ms", time.as_millis()),
        (seconds, 0) => format!("{seconds} s"),
        (seconds, _) if seconds >= 10 => format!("{} s", (tenths + 5) / 10),
        (seconds, tenth) => format!("{seconds}.{tenth} s"),
    }
}

/// A number of bytes in the largest unit that divides it, so that nothing is lost: `512 MiB`,
/// `4 KiB`, `5000 bytes`.
pub fn size(bytes: u64) -> String {
    const UNITS: [(&str, u32); 4] = [("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)];
    let unit = UNITS.iter().find(|(_, shift)| bytes != 0 && bytes.trailing_zeros() >= *shift);
    match unit {
        Some((name, shift)) => format!("{} {name}", bytes >> shift),
        None => format!("{bytes} bytes"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_the_largest_unit_that_is_exact() {
        for (bytes, said) in [
            (0, "0 bytes"),
            (4097, "4097 bytes"),
            (4096, "4 KiB"),
            (512 << 20, "512 MiB"),
            ((512 << 20) + 4096, "524292 KiB"),
            (3 << 40, "3 TiB"),
        ] {
            assert_eq!(size(bytes), said);
        }
    }

    #[test]
    fn durations_are_rounded_to_what_matters() {
        for (millis, said) in [
            (0, "0 ms"),
            (200, "200 ms"),
            (949, "949 ms"),
            (960, "1 s"),
            (2549, "2.5 s"),
            (3021, "3 s"),
            (9960, "10 s"),
            (10_020, "10 s"),
            (59_600, "60 s"),
        ] {
            assert_eq!(rounded(Duration::from_millis(millis)), said);
        }
    }

    #[derive(Debug, thiserror::Error)]
    #[error("cannot open it")]
    struct Cannot(#[source] std::io::Error);

    #[test]
    fn causes_follow_and_what_a_terminal_would_obey_is_spelled_out() {
        let error = Cannot(std::io::Error::other("no \u{1b}]0;name\u{7} \"here\""));
        assert_eq!(chain(&error), "cannot open it: no \\u{1b}]0;name\\u{7} \"here\"");
    }
}
