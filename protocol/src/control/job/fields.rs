// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Fields that several kinds of jobs have in their options.

use super::{HugePages, MAX_STREAMS, MIN_BANDWIDTH, MIN_CAPTURE_MEMORY, ResumePolicy};
use crate::control::codec::{DecodeError, Decoder};
use std::time::Duration;

pub(super) fn workers(decoder: &mut Decoder<'_>) -> Result<u16, DecodeError> {
    match decoder.u16("workers")? {
        value @ 1..=MAX_STREAMS => Ok(value),
        value => Err(DecodeError::InvalidValue {
            field: "workers",
            value: value.into(),
            allowed: "1 to 64",
        }),
    }
}

pub(super) fn bandwidth(decoder: &mut Decoder<'_>) -> Result<u64, DecodeError> {
    bandwidth_value(decoder.u64("bandwidth")?)
}

pub(super) fn bandwidth_value(value: u64) -> Result<u64, DecodeError> {
    match value {
        0 | MIN_BANDWIDTH.. => Ok(value),
        _ => {
            let allowed = "0 for no limit, or at least 0x10000 (64 KiB) bytes per second";
            Err(DecodeError::InvalidValue { field: "bandwidth", value, allowed })
        }
    }
}

pub(super) fn capture_memory(decoder: &mut Decoder<'_>) -> Result<u64, DecodeError> {
    match decoder.u64("capture_memory")? {
        value @ MIN_CAPTURE_MEMORY.. => Ok(value),
        value => {
            let allowed = "at least 0x400000 (4 MiB) bytes";
            Err(DecodeError::InvalidValue { field: "capture_memory", value, allowed })
        }
    }
}

pub(super) fn flag(decoder: &mut Decoder<'_>, field: &'static str) -> Result<bool, DecodeError> {
    match decoder.u16(field)? {
        value @ 0..=1 => Ok(value == 1),
        value => Err(DecodeError::InvalidValue { field, value: value.into(), allowed: "0 or 1" }),
    }
}

pub(super) fn resume(decoder: &mut Decoder<'_>) -> Result<ResumePolicy, DecodeError> {
    ResumePolicy::from_wire(decoder.u16("resume")?)
}

pub(super) fn huge_pages(decoder: &mut Decoder<'_>) -> Result<HugePages, DecodeError> {
    HugePages::from_wire(decoder.u16("huge_pages")?)
}

pub(super) fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

pub(super) fn timeout(
    decoder: &mut Decoder<'_>, field: &'static str,
) -> Result<Duration, DecodeError> {
    const LONGEST: u64 = 24 * 3600 * 1_000_000;
    match decoder.u64(field)? {
        value @ 1..=LONGEST => Ok(Duration::from_micros(value)),
        micros => Err(DecodeError::InvalidDuration {
            field,
            micros,
            allowed: "1 microsecond to 24 hours",
        }),
    }
}
