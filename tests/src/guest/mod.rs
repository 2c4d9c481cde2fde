// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Guests, which a VMM pauses, resumes and moves.
//!
//! - [`Guest`]: what a mock VMM needs of a guest;
//! - [`kvm`]: a vCPU under KVM that increments a counter in every page, sweep after sweep;
//! - [`threads`]: guests made of threads that write at a set rate and in a set pattern.

pub mod kvm;
pub mod threads;

use crate::Error;
use pageferry_client::StatePiece;

/// A guest. Its state does not include its memory.
pub trait Guest: Send {
    /// Starts for the first time: from the beginning, or from the state that was loaded.
    ///
    /// # Errors
    /// If it cannot run.
    fn start(&mut self) -> Result<(), Error>;

    /// Pauses it. When this returns it writes nothing any more.
    ///
    /// # Errors
    /// If it does not stop.
    fn pause(&mut self) -> Result<(), Error>;

    /// Resumes it, or starts it if it never ran. Does nothing if it runs.
    ///
    /// # Errors
    /// If it cannot run.
    fn resume(&mut self) -> Result<(), Error>;

    /// Its state while it is paused.
    ///
    /// # Errors
    /// If the state cannot be read.
    fn save_state(&mut self) -> Result<Vec<StatePiece>, Error>;

    /// Loads the state of another guest of its kind, before it starts. Ignores pieces that are not
    /// its own.
    ///
    /// # Errors
    /// If a piece is missing or malformed.
    fn load_state(&mut self, state: &[StatePiece]) -> Result<(), Error>;

    /// Throttles it: it does not run for `percent` of the time.
    ///
    /// # Errors
    /// If it cannot.
    fn throttle(&mut self, percent: u32) -> Result<(), Error> {
        let _ = percent;
        Ok(())
    }
}

/// A guest that does nothing at all.
#[derive(Debug, Default, Clone, Copy)]
pub struct IdleGuest;

impl Guest for IdleGuest {
    fn start(&mut self) -> Result<(), Error> {
        Ok(())
    }

    fn pause(&mut self) -> Result<(), Error> {
        Ok(())
    }

    fn resume(&mut self) -> Result<(), Error> {
        Ok(())
    }

    fn save_state(&mut self) -> Result<Vec<StatePiece>, Error> {
        Ok(Vec::new())
    }

    fn load_state(&mut self, _state: &[StatePiece]) -> Result<(), Error> {
        Ok(())
    }
}
