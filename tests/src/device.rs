// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! An emulated device: a thread of the VMM that writes into guest memory through vm-memory.
//!
//! KVM's dirty log does not see such writes. The bitmap type of the memory,
//! [`pageferry_client::LogBitmap`], marks them in the shared dirty log.

use crate::Error;
use crate::guest::Guest;
use crate::guest::threads::{ThreadGuest, ThreadGuestOptions};
use crate::usage::{Path, Usage};
use std::sync::Arc;

/// A device that writes to random pages at a set rate. It is paused and resumed with the guest, and
/// keeps its own ledger.
#[derive(Debug)]
pub struct Device {
    thread: ThreadGuest,
}

impl Device {
    /// A device that does not run yet. `name` is its name in the VMM's state.
    ///
    /// # Errors
    /// If there is no memory for its ledger.
    pub fn new(
        usage: &Arc<Usage>, name: &str, writes_per_second: u64, seed: u64,
    ) -> Result<Self, Error> {
        let options = ThreadGuestOptions {
            threads: 1,
            rate: Some(writes_per_second),
            seed,
            path: Path::VmMemory,
            ..ThreadGuestOptions::default()
        };
        Ok(Self { thread: ThreadGuest::named(usage, &format!("device {name}"), options)? })
    }

    /// Lets it write.
    ///
    /// # Errors
    /// If its thread cannot be started.
    pub fn resume(&mut self) -> Result<(), Error> {
        self.thread.resume()
    }

    /// Stops it. When this returns it writes nothing any more.
    ///
    /// # Errors
    /// None at present.
    pub fn pause(&mut self) -> Result<(), Error> {
        self.thread.pause()
    }

    /// Writes since it was made.
    pub fn writes(&self) -> u64 {
        self.thread.writes()
    }
}
