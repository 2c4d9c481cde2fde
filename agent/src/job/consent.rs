// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A guest that its VMM gives up for another one, which an operator wants to bring.
//!
//! The VMM is asked after all checks that can be made without changing memory. It stops its guest
//! and agrees, but its guest is lost only when the job changes memory: [`GivenUpGuest::replace`].
//! If the job ends before that, the drop tells the VMM, and its guest goes on. That includes a VMM
//! that agrees after its deadline, or after the job was cancelled: the resume hook is in its socket
//! behind the question.

use super::pause::return_guest;
use super::{Job, JobError};
use crate::hooks::HookError;
use pageferry_protocol::control::hook::{GuestOrigin, Hook};
use std::sync::Arc;

/// What becomes of the VMM's own guest if the one of the job does not come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum OwnGuest {
    /// The VMM was not asked: it has none, or has started the job itself.
    #[default]
    Unasked,
    /// It goes on.
    Kept,
    /// It is lost: its memory was changed.
    Replaced,
}

impl OwnGuest {
    /// What an operator has to know, to be added to the error of the job.
    pub(super) fn in_words(self) -> &'static str {
        match self {
            Self::Unasked => "",
            // A VMM that was started for this guest has had none.
            Self::Kept => "; a guest that this VMM had before goes on",
            Self::Replaced => {
                "; the memory here was cleared for it, so a guest that this VMM had before, if \
                 any, is lost"
            }
        }
    }
}

/// A guest whose VMM was asked to give it up. The drop returns it.
pub struct GivenUpGuest {
    job: Arc<Job>,
    /// True if the drop has nothing to return: the VMM refused, or the memory is another guest's.
    settled: bool,
}

impl GivenUpGuest {
    /// Asks the VMM whether another guest may fill its memory. A cancel ends the wait.
    ///
    /// # Errors
    /// If the VMM refuses or does not answer, or the job is cancelled meanwhile.
    pub fn ask(job: &Arc<Job>, origin: GuestOrigin) -> Result<Self, JobError> {
        // This exists before the VMM answers, which may be late and agree all the same.
        let mut asked = Self { job: job.clone(), settled: false };
        job.set_own_guest(OwnGuest::Kept);
        job.note("the VMM is asked whether it takes this guest, and gives up one that it has");
        let hook = Hook::AcceptGuest { origin };
        let answer = job.hooks.ask_until(&hook, job.hook_timeout, || job.cancel.is_cancelled());
        job.note("");
        asked.settled = matches!(answer, Err(HookError::Refused { .. }));
        job.cancel.check()?;
        answer?;
        // The VMM must not populate memory that is about to be replaced.
        job.refuse_populates();
        Ok(asked)
    }

    /// The memory is about to be replaced. From now on the guest is lost.
    pub fn replace(mut self) {
        self.settled = true;
        self.job.set_own_guest(OwnGuest::Replaced);
    }
}

impl Drop for GivenUpGuest {
    fn drop(&mut self) {
        if !self.settled {
            return_guest(&self.job, "the VMM keeps its own guest");
        }
    }
}
