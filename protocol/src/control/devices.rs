// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The devices of an agent, by which the guest gives memory back, as operators see them.

use super::codec::{DecodeError, Decoder, Encoder};

/// The most statistics of a balloon.
pub const MAX_STATS: usize = 100;

/// Flag of [`Request::Balloon`](super::request::Request::Balloon): set the target.
pub const BALLOON_SET_TARGET: u32 = 1 << 0;
/// Flag of [`Request::Balloon`](super::request::Request::Balloon): ask the guest for statistics.
pub const BALLOON_ASK_STATS: u32 = 1 << 1;

/// Answer to [`Request::Balloon`](super::request::Request::Balloon): sizes are in bytes.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct BalloonStatus {
    /// The guest has a driver for it.
    pub driver: bool,
    /// What the balloon is to hold.
    pub target: u64,
    /// What the driver says that it holds.
    pub actual: u64,
    /// What the guest has given back by it since the agent started: inflated and reported.
    pub freed: u64,
    /// What the guest has given back that is no memory of this agent.
    pub outside: u64,
    /// What the guest says about its memory: tags (`VIRTIO_BALLOON_S_*`) and values.
    pub stats: Vec<(u16, u64)>,
}

impl BalloonStatus {
    /// Adds the fields to a body.
    pub fn encode(&self, encoder: Encoder) -> Encoder {
        let stats = &self.stats[..self.stats.len().min(MAX_STATS)];
        let encoder = encoder
            .u32(self.driver.into())
            .u32(stats.len() as u32)
            .u64(self.target)
            .u64(self.actual)
            .u64(self.freed)
            .u64(self.outside);
        stats.iter().fold(encoder, |encoder, (tag, value)| encoder.u32(u32::from(*tag)).u64(*value))
    }

    /// Reads the fields from a body.
    ///
    /// # Errors
    /// The field that is wrong.
    pub fn decode(decoder: &mut Decoder<'_>) -> Result<Self, DecodeError> {
        let driver = decoder.flags("driver", 1, "0 or 1")? == 1;
        let count = decoder.u32("stats")?;
        if count as usize > MAX_STATS {
            let (field, value, allowed) = ("stats", count.into(), "at most 100");
            return Err(DecodeError::InvalidValue { field, value, allowed });
        }
        let mut status = Self {
            driver,
            target: decoder.u64("target")?,
            actual: decoder.u64("actual")?,
            freed: decoder.u64("freed")?,
            outside: decoder.u64("outside")?,
            stats: Vec::new(),
        };
        for _ in 0..count {
            let tag = decoder.u32("tag")?;
            let tag = u16::try_from(tag).map_err(|_| DecodeError::InvalidValue {
                field: "tag",
                value: tag.into(),
                allowed: "at most 65535",
            })?;
            status.stats.push((tag, decoder.u64("value")?));
        }
        Ok(status)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn status_survives_the_wire(
            driver: bool, n: [u64; 4], stats in prop::collection::vec(any::<(u16, u64)>(), 0..100),
        ) {
            let [target, actual, freed, outside] = n;
            let status = BalloonStatus { driver, target, actual, freed, outside, stats };
            let body = status.encode(Encoder::new()).finish();
            let mut decoder = Decoder::new(&body);
            prop_assert_eq!(BalloonStatus::decode(&mut decoder), Ok(status));
            prop_assert!(decoder.finish().is_ok());
        }

        #[test]
        fn no_bytes_do_harm(bytes: Vec<u8>) {
            let _ = BalloonStatus::decode(&mut Decoder::new(&bytes));
        }
    }
}
