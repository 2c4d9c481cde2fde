//! Errors as sentences.

use std::error::Error;
use std::fmt::Write;

/// An error with its causes, in one sentence.
pub fn chain(error: &dyn Error) -> String {
    let mut sentence = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        // Writing to a string does not fail.
        let _ = write!(sentence, ": {error}");
        cause = error.source();
    }
    sentence
}
