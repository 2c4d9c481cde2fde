//! Declaring the trackers: who reports the guest's writes.

use crate::client::Client;
use crate::error::Error;
use crate::tracking::active::SCAN_FEATURES;
use crate::tracking::declared::DeclaredTrackers;
use crate::tracking::uffd::open_pagemap;
use pageferry_protocol::control::Trackers;
use pageferry_protocol::userfault::Userfaultfd;

impl Client {
    /// Declares who reports the guest's writes, such as `Trackers::HOOKS` for KVM's dirty log, or
    /// [`Trackers::LOG_IS_COMPLETE`] if every writer marks the [dirty log](Client::log).
    ///
    /// Without a declaration no job starts that relies on dirty pages: precopy, hybrid, snapshots
    /// with `track` and increments. The client cannot know who writes the guest's memory, and a
    /// wrong guess would lose writes. Postcopy from the start and other snapshots need none.
    ///
    /// For [`Trackers::WRITE_PROTECT`] the client registers the mappings of all blocks
    /// ([`BlockSpec::vmm_address`](crate::BlockSpec::vmm_address)) with a userfaultfd while the
    /// agent scans, and takes the registration back for the time of a background snapshot.
    ///
    /// The declaration is kept for every later agent. Without an agent it is only kept.
    ///
    /// # Errors
    /// If `trackers` is empty, the kernel lacks what write-protect scanning needs, or the agent
    /// refuses, as it does while a job runs. The declaration before is in force then.
    pub fn set_trackers(&self, trackers: Trackers) -> Result<(), Error> {
        if !trackers.is_declared() {
            return Err(Error::NoTracker);
        }
        let pagemap = if trackers.contains(Trackers::WRITE_PROTECT) {
            // Now, and not in the middle of a job.
            Userfaultfd::open(SCAN_FEATURES)?;
            Some(open_pagemap().map_err(Error::kernel("open /proc/self/pagemap"))?)
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

    /// The trackers that were declared; the empty set if none were.
    pub fn trackers(&self) -> Trackers {
        self.session().trackers.sources()
    }
}
