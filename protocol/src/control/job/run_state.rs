//! Whether a guest runs, and whether it is to run where it arrives.

use crate::control::codec::DecodeError;

/// Whether a guest runs, as far as its operator is concerned. A pause that a job asks for does not
/// count: the run state says what the guest goes back to after it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(u32)]
pub enum RunState {
    /// It runs, or would if no job had paused it.
    #[default]
    Running = 0,
    /// Its operator has paused it, or has not started it yet.
    Paused = 1,
}

impl RunState {
    /// The name that users see.
    pub fn name(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Paused => "paused",
        }
    }

    /// True if it is paused.
    pub fn is_paused(self) -> bool {
        self == Self::Paused
    }

    /// The run state with this number; `None` if there is none.
    pub fn from_wire(value: u32) -> Option<Self> {
        [Self::Running, Self::Paused].into_iter().find(|state| *state as u32 == value)
    }
}

/// Whether a guest that a job brings is resumed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(u16)]
pub enum ResumePolicy {
    /// As it was: a guest that ran is resumed, a paused one stays paused.
    #[default]
    Auto = 0,
    /// It stays paused, whatever it was.
    Never = 1,
}

impl ResumePolicy {
    /// All policies with the names that users write.
    pub const NAMES: [(&'static str, ResumePolicy); 2] =
        [("auto", Self::Auto), ("never", Self::Never)];

    /// What a guest whose run state was `before` is to be where it arrives.
    pub fn apply(self, before: RunState) -> RunState {
        match self {
            Self::Auto => before,
            Self::Never => RunState::Paused,
        }
    }

    pub(super) fn from_wire(value: u16) -> Result<Self, DecodeError> {
        Self::NAMES.iter().map(|(_, policy)| *policy).find(|policy| *policy as u16 == value).ok_or(
            DecodeError::Value { field: "resume", value: value.into(), allowed: "0 auto, 1 never" },
        )
    }
}
