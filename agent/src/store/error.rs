// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Why something with a store failed, as it is said to an operator and as it travels.

use std::fmt;

/// What kind of failure it is: what whoever asked can do about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StoreErrorKind {
    /// There is no such object.
    Missing = 1,
    /// There is one already.
    Exists = 2,
    /// The store does not answer, or answers that it cannot now. It may later.
    Unreachable = 3,
    /// What the store has is not what was put there.
    Damaged = 4,
    /// The store, or this agent, does not allow it; or the name or the credentials are wrong.
    Refused = 5,
    /// The cache on this machine cannot be used.
    Cache = 6,
    /// Whoever asked does not wait any more.
    Cancelled = 7,
}

impl StoreErrorKind {
    /// The kind with this number.
    pub(super) fn from_wire(number: u32) -> Self {
        let all = [
            Self::Missing,
            Self::Exists,
            Self::Unreachable,
            Self::Damaged,
            Self::Refused,
            Self::Cache,
            Self::Cancelled,
        ];
        // A service of a later version may know more.
        all.into_iter().find(|kind| *kind as u32 == number).unwrap_or(Self::Refused)
    }
}

/// Why something with a store failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoreError {
    /// What kind of failure it is.
    pub kind: StoreErrorKind,
    /// What is wrong, in words.
    pub sentence: String,
}

impl std::error::Error for StoreError {}

impl fmt::Display for StoreError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.sentence)
    }
}

impl StoreError {
    /// An error of this kind.
    pub(super) fn new(kind: StoreErrorKind, sentence: impl Into<String>) -> Self {
        Self { kind, sentence: sentence.into() }
    }

    /// The store has something else than was put there.
    pub(super) fn damaged(sentence: impl Into<String>) -> Self {
        Self::new(StoreErrorKind::Damaged, sentence)
    }

    /// The cache cannot be used.
    pub(super) fn cache(what: &str, error: impl fmt::Display) -> Self {
        Self::new(StoreErrorKind::Cache, format!("cannot {what}: {error}"))
    }

    /// An error of the library, about an object.
    pub(super) fn of(object: &dyn fmt::Display, error: &object_store::Error) -> Self {
        use object_store::Error;
        let (kind, what) = match error {
            Error::NotFound { .. } => (StoreErrorKind::Missing, "there is no such object".into()),
            Error::AlreadyExists { .. } | Error::Precondition { .. } => {
                (StoreErrorKind::Exists, "it exists already".into())
            }
            Error::PermissionDenied { .. } | Error::Unauthenticated { .. } => {
                (StoreErrorKind::Refused, format!("the store refuses: {}", innermost(error)))
            }
            Error::NotSupported { .. }
            | Error::NotImplemented { .. }
            | Error::InvalidPath { .. }
            | Error::UnknownConfigurationKey { .. } => {
                (StoreErrorKind::Refused, innermost(error).to_string())
            }
            _ => (StoreErrorKind::Unreachable, innermost(error).to_string()),
        };
        Self::new(kind, format!("{object}: {what}"))
    }

    /// The same without this name at its start: whoever has asked says it.
    pub(super) fn without(mut self, name: &str) -> Self {
        let rest = self.sentence.strip_prefix(name).and_then(|rest| rest.strip_prefix(": "));
        if let Some(rest) = rest {
            self.sentence = rest.to_owned();
        }
        self
    }

    /// True if the store has not answered: it may have done what it was asked.
    pub(super) fn is_unreachable(&self) -> bool {
        self.kind == StoreErrorKind::Unreachable
    }

    /// True if it may go better later: the store may answer, somebody may renew credentials or make
    /// room, and put back what is missing.
    pub fn may_pass(&self) -> bool {
        !matches!(self.kind, StoreErrorKind::Damaged | StoreErrorKind::Cancelled)
    }
}

/// The cause of all causes, which says what happened: the others only say where.
fn innermost<'a>(
    error: &'a (dyn std::error::Error + 'static),
) -> &'a (dyn std::error::Error + 'static) {
    let mut cause = error;
    while let Some(next) = cause.source() {
        cause = next;
    }
    cause
}
