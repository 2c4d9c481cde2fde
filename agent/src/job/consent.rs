// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The consent of the VMM to a guest that an operator wants to bring here.

use super::{Job, JobError};
use pageferry_protocol::control::hook::{GuestOrigin, Hook};

impl Job {
    /// Asks the VMM whether another guest may fill its memory. It may have a guest that it wants to
    /// keep, and gives that guest up when it agrees. So this comes after all checks that can be
    /// made without changing memory.
    ///
    /// # Errors
    /// If the VMM refuses or does not answer, or the job was cancelled meanwhile.
    pub fn ask_consent(&self, origin: GuestOrigin) -> Result<(), JobError> {
        self.hooks.ask(&Hook::AcceptGuest { origin }, self.hook_timeout)?;
        self.cancel.check()?;
        // The VMM has given up its guest. It must not populate memory that is about to be replaced.
        self.refuse_populates();
        Ok(())
    }
}
