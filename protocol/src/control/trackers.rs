// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The trackers that a VMM declares: what reports the writes of the guest.
//!
//! The declaration is not optional. An agent that sees only the shared log cannot tell a VMM whose
//! writers all mark that log from a VMM that forgot its tracker, and the second one would lose
//! writes. So an empty set means "never declared", and [`Trackers::LOG_IS_COMPLETE`] is a bit of
//! its own.

use super::codec::DecodeError;
use std::fmt;
use std::ops::BitOr;

/// A set of trackers besides the shared log, which is always read. Combine them with `|`.
///
/// `Trackers::default()` is the empty set: nothing was declared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Trackers(u32);

impl Trackers {
    /// The VMM's own tracker, typically KVM's dirty log. The agent starts, syncs, clears and stops
    /// it by hooks.
    pub const HOOKS: Self = Self(1 << 0);
    /// Write-protect scanning of the mappings of the VMM, which the agent does from its own process
    /// with `PAGEMAP_SCAN`. It sees the writes of vCPUs and of threads of the VMM through these
    /// mappings.
    pub const WRITE_PROTECT: Self = Self(1 << 1);
    /// Every writer marks the shared log: vCPUs, emulated devices, other processes. No other
    /// tracker is needed.
    pub const LOG_IS_COMPLETE: Self = Self(1 << 2);
    /// The VMM frees memory without a request, as one does that knows nothing of its agent: it
    /// punches its file. No tracker, but it goes with [`Trackers::WRITE_PROTECT`].
    pub const UNANNOUNCED_FREES: Self = Self(1 << 3);

    /// All of them with the names that users see.
    const NAMES: [(Self, &'static str); 4] = [
        (Self::HOOKS, "hooks"),
        (Self::WRITE_PROTECT, "write-protect"),
        (Self::LOG_IS_COMPLETE, "log-is-complete"),
        (Self::UNANNOUNCED_FREES, "unannounced-frees"),
    ];

    /// The set as it travels.
    pub const fn bits(self) -> u32 {
        self.0
    }

    /// True if the VMM has declared what reports the writes of the guest.
    pub const fn is_declared(self) -> bool {
        self.0 & !Self::UNANNOUNCED_FREES.0 != 0
    }

    /// True if all of `other` are in this set.
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// The names of the trackers in this set.
    pub fn names(self) -> impl Iterator<Item = &'static str> {
        Self::NAMES.into_iter().filter(move |(one, _)| self.contains(*one)).map(|(_, name)| name)
    }

    /// The set with these bits; the empty set among them.
    ///
    /// # Errors
    /// If a bit is unknown. `field` is its name for the error.
    pub fn from_wire(field: &'static str, value: u32) -> Result<Self, DecodeError> {
        let known = Self::NAMES.iter().fold(0, |known, (one, _)| known | one.0);
        let set = Self(value);
        let is_alone = set.contains(Self::UNANNOUNCED_FREES) && !set.contains(Self::WRITE_PROTECT);
        if value & !known == 0 && !is_alone {
            return Ok(set);
        }
        let allowed = "bit 0, hooks, bit 1, write-protect, bit 2, log-is-complete, and with bit 1 \
                       bit 3, unannounced-frees";
        Err(DecodeError::InvalidValue { field, value: value.into(), allowed })
    }
}

impl BitOr for Trackers {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// The names, or `not declared`.
impl fmt::Display for Trackers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.is_declared() {
            return f.write_str("not declared");
        }
        f.write_str(&self.names().collect::<Vec<_>>().join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sets_have_names_and_the_empty_one_is_no_declaration() {
        let both = Trackers::WRITE_PROTECT | Trackers::HOOKS;
        assert_eq!(both.to_string(), "hooks, write-protect");
        assert_eq!(Trackers::LOG_IS_COMPLETE.to_string(), "log-is-complete");
        assert_eq!(Trackers::default().to_string(), "not declared");
        assert!(both.is_declared() && !Trackers::default().is_declared());
        assert_eq!(Trackers::from_wire("sources", both.bits()), Ok(both));
        let unannounced = Trackers::WRITE_PROTECT | Trackers::UNANNOUNCED_FREES;
        assert_eq!(Trackers::from_wire("sources", unannounced.bits()), Ok(unannounced));
        for wrong in [Trackers::UNANNOUNCED_FREES.bits(), 1 << 4] {
            let refused = Trackers::from_wire("sources", wrong).unwrap_err();
            assert!(refused.to_string().contains("sources"), "{refused}");
        }
    }
}
