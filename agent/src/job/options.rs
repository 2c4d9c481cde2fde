// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The options that all kinds of jobs have.

use pageferry_protocol::control::job::{
    IncomingOptions, OutgoingOptions, RestoreOptions, SnapshotOptions,
};
use std::time::Duration;

/// The options that all kinds of jobs have.
#[derive(Debug, Clone, Copy)]
pub struct CommonOptions {
    /// Limit of the bandwidth in bytes per second; 0 for no limit.
    pub bandwidth: u64,
    /// How long the VMM may take to answer a hook.
    pub hook_timeout: Duration,
}

impl From<&OutgoingOptions> for CommonOptions {
    fn from(&OutgoingOptions { bandwidth, hook_timeout, .. }: &OutgoingOptions) -> Self {
        Self { bandwidth, hook_timeout }
    }
}

impl From<&IncomingOptions> for CommonOptions {
    /// The source limits the bandwidth of a migration.
    fn from(&IncomingOptions { hook_timeout, .. }: &IncomingOptions) -> Self {
        Self { bandwidth: 0, hook_timeout }
    }
}

impl From<&SnapshotOptions> for CommonOptions {
    fn from(&SnapshotOptions { bandwidth, hook_timeout, .. }: &SnapshotOptions) -> Self {
        Self { bandwidth, hook_timeout }
    }
}

impl From<&RestoreOptions> for CommonOptions {
    fn from(&RestoreOptions { bandwidth, hook_timeout, .. }: &RestoreOptions) -> Self {
        Self { bandwidth, hook_timeout }
    }
}
