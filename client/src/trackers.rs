// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Declaring the trackers: what reports the writes of the guest.

use crate::client::Client;
use crate::error::Error;
use crate::mapping_process::UserfaultPurpose;
use crate::tracking::declared::DeclaredTrackers;
use pageferry_protocol::control::Trackers;

impl Client {
    /// Declares what reports the writes of the guest, such as `Trackers::HOOKS` for KVM's dirty
    /// log, or [`Trackers::LOG_IS_COMPLETE`] if every writer marks the [dirty log](Client::log).
    ///
    /// Without a declaration the agent starts no job that relies on dirty pages: no precopy or
    /// hybrid migration, no snapshot with `track`, no increment. The client cannot know what writes
    /// the guest memory, and a wrong guess would lose writes. Postcopy from the start and other
    /// snapshots need no declaration.
    ///
    /// For [`Trackers::WRITE_PROTECT`] the client registers the mappings of all blocks
    /// ([`BlockSpec::vmm_address`](crate::BlockSpec::vmm_address)) with a userfaultfd while the
    /// agent scans. It unregisters them for the time of a background snapshot.
    ///
    /// The declaration holds for every later agent. Without an agent the client only keeps it.
    ///
    /// # Errors
    /// If `trackers` is empty, the kernel lacks what write-protect scanning needs, or the agent
    /// refuses, as it does while a job runs. The previous declaration then stays in force.
    pub fn set_trackers(&self, trackers: Trackers) -> Result<(), Error> {
        if !trackers.is_declared() {
            return Err(Error::EmptyTrackers);
        }
        let pagemap = if trackers.contains(Trackers::WRITE_PROTECT) {
            // Fails now instead of in the middle of a job.
            let userfaults = &self.memory().userfaults;
            userfaults.check(&[UserfaultPurpose::WriteTracking])?;
            Some(userfaults.open_pagemap()?)
        } else {
            None
        };
        let declared = DeclaredTrackers::new(trackers, pagemap);
        let mut session = self.session();
        match declared.send(&mut session.control) {
            Ok(()) | Err(Error::AgentLost { .. }) => {}
            Err(error) => return Err(error),
        }
        session.trackers = declared;
        Ok(())
    }

    /// The declared trackers; the empty set before a declaration.
    pub fn trackers(&self) -> Trackers {
        self.session().trackers.sources()
    }
}
