// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The consent of the VMM to a guest that an operator wants to bring here.

use super::{Job, JobError};
use crate::hooks::HookError;
use pageferry_protocol::control::hook::{GuestOrigin, Hook};

/// How far the VMM has agreed to give its own guest up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Consent {
    /// It was not asked, or it refused.
    #[default]
    None,
    /// It was asked, and has not answered.
    Asked,
    /// It has given its guest up.
    Given,
}

impl Consent {
    /// What an operator has to know if the other guest does not come.
    pub(super) fn loss(self) -> &'static str {
        match self {
            Self::None => "",
            Self::Asked => "; the VMM was asked to give up its own guest, and may have done so",
            Self::Given => "; the VMM has given up its own guest for this one",
        }
    }
}

impl Job {
    /// Asks the VMM whether another guest may fill its memory. It may have a guest that it wants to
    /// keep, and gives that guest up when it agrees. So this comes after all checks that can be
    /// made without changing memory.
    ///
    /// # Errors
    /// If the VMM refuses or does not answer, or the job is cancelled meanwhile.
    pub fn ask_consent(&self, origin: GuestOrigin) -> Result<(), JobError> {
        self.set_consent(Consent::Asked);
        self.note("the VMM is asked whether it takes the guest, and gives up its own");
        let hook = Hook::AcceptGuest { origin };
        let is_over = || self.cancel.is_cancelled();
        let asked = self.hooks.ask_until(&hook, self.hook_timeout, is_over);
        match &asked {
            Ok(()) => self.set_consent(Consent::Given),
            Err(HookError::Refused { .. }) => self.set_consent(Consent::None),
            Err(_) => {}
        }
        self.note("");
        self.cancel.check()?;
        asked?;
        // The VMM has given up its guest. It must not populate memory that is about to be replaced.
        self.refuse_populates();
        Ok(())
    }
}
