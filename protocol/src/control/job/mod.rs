//! What a job is started with, and how it stands.
//!
//! - [`migration`]: what a migration is started with;
//! - [`image`]: what a snapshot and a restore are;
//! - `fields`: what these have in common on the wire;
//! - [`run_state`]: whether a guest runs, and is to run where it arrives;
//! - [`status`]: what a job is, and how it stands.

mod fields;
pub mod image;
pub mod migration;
pub mod run_state;
pub mod status;

pub use image::{NotUtf8, RestoreMode, RestoreOptions, SnapshotMode, SnapshotOptions};
pub use migration::{Compression, IncomingOptions, Mode, NonConvergence, OutgoingOptions};
pub use run_state::{ResumePolicy, RunState};
pub use status::{Counters, JobKind, JobStatus, Phase};

/// Most streams of one migration, and most threads of a snapshot or a restore.
pub const MAX_STREAMS: u16 = 64;
/// Least limit of a bandwidth in bytes per second, if there is one. Under less a peer would wait
/// for a page for so long that it takes the other side for dead.
pub const MIN_BANDWIDTH: u64 = 64 << 10;
/// Longest address of a peer, and longest path, in bytes.
pub const MAX_ADDRESS: usize = 4096;
/// Longest sentence of an error in bytes.
pub const MAX_SENTENCE: usize = 4096;
