// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The bodies that more than one test sends, and the status that they read.

use super::bytes::{Body, last_text_at, u16_at, u32_at, u64_at};

pub const PAGE: u64 = 4096;
/// How long a VMM or a peer may take, in microseconds: longer than any test.
const PATIENCE: u64 = 60_000_000;

/// "Options of an outgoing migration", with what is usual.
pub fn outgoing() -> Body {
    let body = Body::new().u16(1).u16(0).u32(0).u16(2).u16(0).u16(0).u32(30).u64(300_000).u64(0);
    body.u32(0).u16(0).u16(0).u64(PATIENCE).u64(PATIENCE).u16(0)
}

/// Offsets in these options.
pub mod outgoing_at {
    pub const MODE: usize = 2;
    pub const SWITCH_AFTER: usize = 4;
    pub const MAX_PASSES: usize = 14;
    pub const DOWNTIME_LIMIT: usize = 18;
    pub const BANDWIDTH: usize = 26;
    pub const POLICY: usize = 34;
    pub const COMPRESSION: usize = 38;
    pub const HOOK_TIMEOUT: usize = 50;
}

/// The body of SET_PARAMETERS that lifts the limit of the bandwidth.
pub fn parameters() -> Body {
    Body::new().u32(1).u32(0).u64(0).u64(0).u32(0).u32(0).u32(0)
}

/// "Options of an incoming migration".
pub fn incoming() -> Body {
    Body::new().u64(PATIENCE).u64(PATIENCE).u16(0).u16(0)
}

/// "Options of a snapshot" without a base.
pub fn snapshot(mode: u16) -> Body {
    let body = Body::new().u16(mode).u16(2).u16(0).u16(1).u16(1);
    body.u64(0).u64(64 << 20).u64(PATIENCE).text("")
}

/// "Options of a restore" without a working set.
pub fn restore(mode: u16) -> Body {
    Body::new().u16(mode).u16(2).u16(0).u64(0).u64(PATIENCE).u16(0).text("")
}

/// A text, and options after it.
pub fn with_options(text: &str, options: &Body) -> Body {
    Body::new().text(text).raw(&options.0)
}

/// The body of ADD_BLOCK.
pub fn block(id: u32, gpa: u64, pages: u64, vmm_address: u64, name: &str) -> Body {
    let body = Body::new().u32(id).u32(0).u64(gpa).u64(pages * PAGE).u64(PAGE);
    body.u64(0).u64(vmm_address).text(name)
}

/// The body of DISCARD, POPULATE and FREE: one range of pages of block 1.
pub fn range(flags: u32, first: u64, pages: u64) -> Body {
    let body = Body::new().u32(flags).u32(1);
    body.u32(1).u32(0).u64(first * PAGE).u64(pages * PAGE)
}

/// The status of a job.
#[derive(Debug, Clone)]
pub struct Status {
    pub job: u64,
    pub kind: u32,
    pub phase: u32,
    pub guest: u32,
    pub arrived: u16,
    pub trackers: u32,
    counters: Vec<u8>,
    pub error: String,
}

/// Phases.
pub mod phase {
    pub const CONNECTING: u32 = 1;
    pub const POSTCOPY: u32 = 8;
    pub const POSTCOPY_PAUSED: u32 = 9;
    pub const COMPLETED: u32 = 15;
    pub const FAILED: u32 = 16;
    pub const CANCELLED: u32 = 17;
}

impl Status {
    pub fn read(body: &[u8]) -> Self {
        Self {
            job: u64_at(body, 0),
            kind: u32_at(body, 8),
            phase: u32_at(body, 12),
            guest: u32_at(body, 16),
            arrived: u16_at(body, 20),
            trackers: u32_at(body, 22),
            counters: body[..330].to_vec(),
            // After the reason of the way of placing.
            error: last_text_at(body, 336 + u32_at(body, 332) as usize),
        }
    }

    /// The counter at this offset of the status.
    pub fn counter(&self, offset: usize) -> u64 {
        u64_at(&self.counters, offset)
    }

    pub fn is_final(&self) -> bool {
        self.phase == 0 || self.phase >= phase::COMPLETED
    }
}
