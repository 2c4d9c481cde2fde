// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The options and the status of a job.
//!
//! - [`migration`]: options of a migration;
//! - [`image`]: options of a snapshot and of a restore;
//! - [`parameters`]: changes of the options of a job that runs;
//! - [`placing`]: how pages come into the guest's memory;
//! - [`run_state`]: whether a guest runs, and whether it is resumed where it arrives;
//! - [`status`]: the kind, the phase and the status of a job;
//! - [`counters`]: the counters of a job.

pub mod counters;
// What the options have in common on the wire.
mod fields;
pub mod image;
pub mod migration;
pub mod parameters;
pub mod placing;
pub mod run_state;
pub mod status;

pub use counters::Counters;
pub use image::{NotUtf8, RestoreMode, RestoreOptions, SnapshotMode, SnapshotOptions};
pub use migration::{Compression, IncomingOptions, Mode, NonConvergence, OutgoingOptions};
pub use parameters::Parameters;
pub use placing::{HugePages, Placing};
pub use run_state::{ResumePolicy, RunState};
pub use status::{JobKind, JobStatus, Phase};

/// Largest number of streams of one migration, and of threads of a snapshot or a restore.
pub const MAX_STREAMS: u16 = 64;
/// Lowest bandwidth limit in bytes per second. With less, a peer would wait so long for a page that
/// it takes the other side for dead.
pub const MIN_BANDWIDTH: u64 = 64 << 10;
/// Least memory in bytes for pages that a snapshot has captured before the guest wrote to them: two
/// of the largest host pages.
pub const MIN_CAPTURE_MEMORY: u64 = 4 << 20;
/// Longest address of a peer, and longest path, in bytes.
pub const MAX_ADDRESS: usize = 4096;
/// Longest sentence of an error in bytes.
pub const MAX_SENTENCE: usize = 4096;
