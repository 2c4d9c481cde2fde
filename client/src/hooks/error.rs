// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Why a hook failed.

/// Why a hook failed. The sentence travels to the agent and into its report; any error turns into
/// one with `?`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HookError {
    sentence: String,
    panic: bool,
}

impl HookError {
    /// A failure with this sentence.
    pub fn new(sentence: impl std::fmt::Display) -> Self {
        Self { sentence: sentence.to_string(), panic: false }
    }

    /// The failure of a hook that panicked with this message.
    pub(crate) fn panicked(message: String) -> Self {
        Self { sentence: message, panic: true }
    }

    pub(crate) fn is_panic(&self) -> bool {
        self.panic
    }

    /// The sentence.
    pub fn sentence(&self) -> &str {
        &self.sentence
    }
}

impl std::fmt::Display for HookError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.sentence)
    }
}

/// The error's text and those of its sources. `HookError` is no `std::error::Error` itself, since
/// it could not have this then.
impl<E: std::error::Error> From<E> for HookError {
    fn from(error: E) -> Self {
        Self { sentence: pageferry_protocol::error::chain(&error), panic: false }
    }
}
