// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Whether a guest runs, and whether it is resumed where it arrives.

use crate::control::codec::DecodeError;

/// Whether a guest runs, from the view of its operator. The pause of a job does not count: the run
/// state says what the guest returns to after that pause.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(u32)]
pub enum RunState {
    /// It runs, or would run without the pause of a job.
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
    /// As before: a guest that ran is resumed, and a paused one stays paused.
    #[default]
    Auto = 0,
    /// It stays paused in any case.
    Never = 1,
}

impl ResumePolicy {
    /// All policies with the names that users write.
    pub const NAMES: [(&'static str, ResumePolicy); 2] =
        [("auto", Self::Auto), ("never", Self::Never)];

    /// The run state that a guest gets where it arrives, if it was `before`.
    pub fn apply(self, before: RunState) -> RunState {
        match self {
            Self::Auto => before,
            Self::Never => RunState::Paused,
        }
    }

    pub(super) fn from_wire(value: u16) -> Result<Self, DecodeError> {
        Self::NAMES.iter().map(|(_, policy)| *policy).find(|policy| *policy as u16 == value).ok_or(
            DecodeError::InvalidValue {
                field: "resume",
                value: value.into(),
                allowed: "0 auto, 1 never",
            },
        )
    }
}
