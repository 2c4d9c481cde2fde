// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Finding out at the start of the VMM whether there is userfaultfd.

use crate::client::Client;
use crate::error::Error;
use crate::mapping_process::UserfaultPurpose;
use pageferry_protocol::error::chain;

/// All that any job or tracker needs.
const PURPOSES: [UserfaultPurpose; 3] = [
    UserfaultPurpose::MissingPages,
    UserfaultPurpose::WatchedWrites,
    UserfaultPurpose::WriteTracking,
];

impl Client {
    /// Finds out whether the VMM can do what needs userfaultfd: postcopy and hybrid migration in
    /// both directions, lazy restore, background snapshots, and
    /// [`Trackers::WRITE_PROTECT`](crate::Trackers::WRITE_PROTECT). Call it at the start of the VMM
    /// if it needs one of these. The other jobs need none.
    ///
    /// The client opens what it needs when it is made, so that later the VMM may drop its rights
    /// and install a seccomp filter: `/dev/userfaultfd` if the VMM may open it, and otherwise eight
    /// userfaultfds by the system call, of which a job takes one or two. The client makes that
    /// system call again after each, but never under a filter that was installed later. So a VMM
    /// that has such a filter and is to run for long needs the device.
    ///
    /// If a filter was in force when the client was made, and there is no device, the filter has to
    /// allow `userfaultfd`: this call makes it.
    ///
    /// # Errors
    /// [`Error::Userfault`]: which right is missing, or which feature the kernel lacks. The jobs
    /// and trackers above then fail with the same error when they need it.
    pub fn check_userfaultfd(&self) -> Result<(), Error> {
        self.memory().userfaults.check(&PURPOSES)
    }

    /// Logs once that there is no userfaultfd, if that is known. Many VMMs need none.
    pub(crate) fn log_missing_userfaultfd(&self) {
        if let Some(error) = self.memory().userfaults.known_failure(&PURPOSES) {
            log::info!(
                "postcopy, hybrid, lazy restore, background snapshots and Trackers::WRITE_PROTECT are not possible \
                 in this VM: {}",
                chain(&error)
            );
        }
    }
}
