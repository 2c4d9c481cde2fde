// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Errors as sentences: for logs, for people, and for answers, which carry no causes.

use std::error::Error;
use std::fmt::Write;

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

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("cannot open it")]
    struct Cannot(#[source] std::io::Error);

    #[test]
    fn causes_follow_and_what_a_terminal_would_obey_is_spelled_out() {
        let error = Cannot(std::io::Error::other("no \u{1b}]0;name\u{7} \"here\""));
        assert_eq!(chain(&error), "cannot open it: no \\u{1b}]0;name\\u{7} \"here\"");
    }
}
