// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Changes of the options of a job that runs.

use super::NonConvergence;
use super::fields::{bandwidth_value, micros};
use crate::control::codec::{DecodeError, Decoder, Encoder};
use std::time::Duration;

/// Highest throttle in percent of the guest's time.
pub const MAX_THROTTLE: u32 = 99;

/// Bits of the fields that are set.
mod field {
    pub(super) const BANDWIDTH: u32 = 1 << 0;
    pub(super) const DOWNTIME_LIMIT: u32 = 1 << 1;
    pub(super) const MAX_PASSES: u32 = 1 << 2;
    pub(super) const POLICY: u32 = 1 << 3;
    pub(super) const SWITCH_AFTER: u32 = 1 << 4;
    pub(super) const THROTTLE: u32 = 1 << 5;
    pub(super) const ALL: u32 = (1 << 6) - 1;
}

/// What to change in the job that runs. A field that is `None` stays as it is. A snapshot and a
/// restore have only the bandwidth.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Parameters {
    /// As [`OutgoingOptions::bandwidth`](super::OutgoingOptions::bandwidth).
    pub bandwidth: Option<u64>,
    /// As [`OutgoingOptions::downtime_limit`](super::OutgoingOptions::downtime_limit).
    pub downtime_limit: Option<Duration>,
    /// As [`OutgoingOptions::max_passes`](super::OutgoingOptions::max_passes).
    pub max_passes: Option<u32>,
    /// As [`OutgoingOptions::policy`](super::OutgoingOptions::policy).
    pub policy: Option<NonConvergence>,
    /// As [`OutgoingOptions::switch_after`](super::OutgoingOptions::switch_after).
    pub switch_after: Option<u32>,
    /// Least throttle of the guest from the next pass on, in percent of its time, 0 to
    /// [`MAX_THROTTLE`]. The policy may throttle more.
    pub throttle: Option<u32>,
}

impl Parameters {
    /// Changes the bandwidth only, in bytes per second; 0 for no limit.
    pub fn bandwidth(rate: u64) -> Self {
        Self { bandwidth: Some(rate), ..Self::default() }
    }

    /// True if there is no change in it.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// The names of the fields that are set, as users write them, besides the bandwidth.
    pub fn only_for_migrations(&self) -> impl Iterator<Item = &'static str> {
        [
            ("downtime limit", self.downtime_limit.is_some()),
            ("passes", self.max_passes.is_some()),
            ("policy", self.policy.is_some()),
            ("switch to postcopy", self.switch_after.is_some()),
            ("throttle", self.throttle.is_some()),
        ]
        .into_iter()
        .filter_map(|(name, is_set)| is_set.then_some(name))
    }

    pub(in crate::control) fn encode(&self, encoder: Encoder) -> Encoder {
        let bit = |is_set: bool, bit| if is_set { bit } else { 0 };
        let fields = bit(self.bandwidth.is_some(), field::BANDWIDTH)
            | bit(self.downtime_limit.is_some(), field::DOWNTIME_LIMIT)
            | bit(self.max_passes.is_some(), field::MAX_PASSES)
            | bit(self.policy.is_some(), field::POLICY)
            | bit(self.switch_after.is_some(), field::SWITCH_AFTER)
            | bit(self.throttle.is_some(), field::THROTTLE);
        encoder
            .u32(fields)
            .u32(self.max_passes.unwrap_or_default())
            .u64(self.downtime_limit.map(micros).unwrap_or_default())
            .u64(self.bandwidth.unwrap_or_default())
            .u32(self.policy.map_or(0, |policy| policy as u32))
            .u32(self.switch_after.unwrap_or_default())
            .u32(self.throttle.unwrap_or_default())
    }

    pub(in crate::control) fn decode(decoder: &mut Decoder<'_>) -> Result<Self, DecodeError> {
        let allowed = "bits 0 to 5: bandwidth, downtime_limit, max_passes, policy, switch_after, \
                       throttle";
        let fields = decoder.flags("fields", field::ALL, allowed)?;
        let set = |bit: u32| fields & bit != 0;
        let max_passes = decoder.u32("max_passes")?;
        let downtime_limit = decoder.u64("downtime_limit")?;
        let bandwidth = decoder.u64("bandwidth")?;
        let policy = decoder.u32("policy")?;
        let switch_after = decoder.u32("switch_after")?;
        let throttle = decoder.u32("throttle")?;
        if set(field::THROTTLE) && throttle > MAX_THROTTLE {
            let (field, value, allowed) = ("throttle", throttle.into(), "0 to 99 percent");
            return Err(DecodeError::InvalidValue { field, value, allowed });
        }
        Ok(Self {
            bandwidth: set(field::BANDWIDTH).then(|| bandwidth_value(bandwidth)).transpose()?,
            downtime_limit: set(field::DOWNTIME_LIMIT)
                .then(|| Duration::from_micros(downtime_limit)),
            max_passes: set(field::MAX_PASSES).then_some(max_passes),
            policy: set(field::POLICY).then(|| NonConvergence::from_wire(policy)).transpose()?,
            switch_after: set(field::SWITCH_AFTER).then_some(switch_after),
            throttle: set(field::THROTTLE).then_some(throttle),
        })
    }
}
