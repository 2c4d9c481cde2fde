// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! How a guest's pages come into its memory: what an operator may choose, and what a job does.

use crate::control::codec::DecodeError;

/// Whether a job makes huge pages (2 MiB) where all of their small pages arrive.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(u16)]
pub enum HugePages {
    /// It does, if the kernel lets it and memory is not short.
    #[default]
    Auto = 0,
    /// It does not.
    Never = 1,
}

impl HugePages {
    /// All values with the names that users write.
    pub const NAMES: [(&'static str, HugePages); 2] =
        [("auto", Self::Auto), ("never", Self::Never)];

    pub(super) fn from_wire(value: u16) -> Result<Self, DecodeError> {
        Self::NAMES.iter().map(|(_, choice)| *choice).find(|choice| *choice as u16 == value).ok_or(
            DecodeError::InvalidValue {
                field: "huge_pages",
                value: value.into(),
                allowed: "0 auto, 1 never",
            },
        )
    }
}

/// How a job places pages that are new. If its blocks differ, that of the block with the best way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
#[repr(u16)]
pub enum Placing {
    /// The job places none, or none yet.
    #[default]
    None = 0,
    /// Each of them by a call that writes to the file, which lets one thread at a time in.
    Write = 1,
    /// Each of them through a mapping of the agent's own.
    Pages = 2,
    /// As before, and as huge pages where all of a huge page comes.
    HugePages = 3,
}

impl Placing {
    /// All ways with the names that users see.
    pub const NAMES: [(&'static str, Placing); 4] = [
        ("none", Self::None),
        ("write", Self::Write),
        ("pages", Self::Pages),
        ("huge-pages", Self::HugePages),
    ];

    /// The name that users see.
    pub fn name(self) -> &'static str {
        Self::NAMES.iter().find(|(_, placing)| *placing == self).map_or("", |(name, _)| name)
    }

    pub(super) fn from_wire(value: u16) -> Result<Self, DecodeError> {
        let mut all = Self::NAMES.iter().map(|(_, placing)| *placing);
        all.find(|placing| *placing as u16 == value).ok_or(DecodeError::InvalidValue {
            field: "placing",
            value: value.into(),
            allowed: "0 none, 1 write, 2 pages, 3 huge pages",
        })
    }
}
