// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The devices of an agent, by which the guest gives memory back, as operators see them.

use super::codec::{DecodeError, Decoder, Encoder};
use crate::memory::PAGE_SIZE;
use crate::memory::geometry::MAX_NAME;

/// The virtio id of the balloon.
pub const BALLOON: u32 = 5;
/// The virtio id of virtio-mem.
pub const MEM: u32 = 24;
/// The unit in which a guest plugs and unplugs by virtio-mem, in bytes, if nothing else is asked
/// for.
pub const USUAL_BLOCK_SIZE: u64 = 2 << 20;

/// A device that an agent can be for a guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DeviceSpec {
    /// virtio-balloon.
    Balloon,
    /// virtio-mem.
    Mem {
        /// The name of the block that is its region.
        block: String,
        /// The unit in which the guest plugs and unplugs, in bytes: a power of two.
        block_size: u64,
    },
}

impl DeviceSpec {
    /// Adds the fields to a body.
    pub fn encode(&self, encoder: Encoder) -> Encoder {
        match self {
            Self::Balloon => encoder.u32(BALLOON).u32(0).u64(0).text(""),
            Self::Mem { block, block_size } => encoder.u32(MEM).u32(0).u64(*block_size).text(block),
        }
    }

    /// Reads the fields from a body.
    ///
    /// # Errors
    /// The field that is wrong.
    pub fn decode(decoder: &mut Decoder<'_>) -> Result<Self, DecodeError> {
        let invalid = |field, value, allowed| DecodeError::InvalidValue { field, value, allowed };
        let device = decoder.u32("device")?;
        decoder.u32("reserved")?;
        let block_size = decoder.u64("block_size")?;
        let block = decoder.text("block", MAX_NAME)?;
        match device {
            BALLOON if block_size != 0 => Err(invalid("block_size", block_size, "0 for a balloon")),
            BALLOON if !block.is_empty() => {
                Err(invalid("block", block.len() as u64, "0 bytes for a balloon"))
            }
            BALLOON => Ok(Self::Balloon),
            MEM if !block_size.is_power_of_two() || block_size < PAGE_SIZE => {
                Err(invalid("block_size", block_size, "powers of two, at least 4096"))
            }
            MEM if block.is_empty() => Err(invalid("block", 0, "at least 1 byte")),
            MEM => Ok(Self::Mem { block: block.to_owned(), block_size }),
            other => Err(invalid("device", other.into(), "5, balloon, or 24, virtio-mem")),
        }
    }
}

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
    /// What the guest said is free when the last migration began.
    pub hinted: u64,
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
            .u64(self.outside)
            .u64(self.hinted);
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
            hinted: decoder.u64("hinted")?,
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

/// Answer to [`Request::PluggedMemory`](super::request::Request::PluggedMemory): sizes are in
/// bytes. All are 0 if the VMM has not handed over the block of the region.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MemStatus {
    /// The guest has a driver for it.
    pub driver: bool,
    /// The unit in which the guest plugs and unplugs.
    pub block_size: u64,
    /// Guest physical address of the region.
    pub addr: u64,
    /// Size of the region.
    pub region_size: u64,
    /// Where the guest may plug, from the start of the region.
    pub usable_size: u64,
    /// What the guest has plugged.
    pub plugged: u64,
    /// What the guest is to have plugged.
    pub requested: u64,
}

impl MemStatus {
    /// Adds the fields to a body.
    pub fn encode(&self, encoder: Encoder) -> Encoder {
        encoder
            .u32(self.driver.into())
            .u32(0)
            .u64(self.block_size)
            .u64(self.addr)
            .u64(self.region_size)
            .u64(self.usable_size)
            .u64(self.plugged)
            .u64(self.requested)
    }

    /// Reads the fields from a body.
    ///
    /// # Errors
    /// The field that is wrong.
    pub fn decode(decoder: &mut Decoder<'_>) -> Result<Self, DecodeError> {
        let driver = decoder.flags("driver", 1, "0 or 1")? == 1;
        decoder.u32("reserved")?;
        Ok(Self {
            driver,
            block_size: decoder.u64("block_size")?,
            addr: decoder.u64("addr")?,
            region_size: decoder.u64("region_size")?,
            usable_size: decoder.u64("usable_size")?,
            plugged: decoder.u64("plugged")?,
            requested: decoder.u64("requested")?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn status_survives_the_wire(
            driver: bool, n: [u64; 5], stats in prop::collection::vec(any::<(u16, u64)>(), 0..100),
        ) {
            let [target, actual, freed, outside, hinted] = n;
            let status = BalloonStatus { driver, target, actual, freed, outside, hinted, stats };
            let body = status.encode(Encoder::new()).finish();
            let mut decoder = Decoder::new(&body);
            prop_assert_eq!(BalloonStatus::decode(&mut decoder), Ok(status));
            prop_assert!(decoder.finish().is_ok());
        }

        #[test]
        fn memory_survives_the_wire(driver: bool, n: [u64; 6]) {
            let [block_size, addr, region_size, usable_size, plugged, requested] = n;
            let status = MemStatus {
                driver, block_size, addr, region_size, usable_size, plugged, requested,
            };
            let body = status.encode(Encoder::new()).finish();
            prop_assert_eq!(MemStatus::decode(&mut Decoder::new(&body)), Ok(status));
        }

        #[test]
        fn no_bytes_do_harm(bytes: Vec<u8>) {
            let _ = BalloonStatus::decode(&mut Decoder::new(&bytes));
            let _ = MemStatus::decode(&mut Decoder::new(&bytes));
        }
    }
}
