// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The process that has the guest's memory mapped, and whose accesses become faults.
//!
//! It is this process if the VMM links the client. A client may also stand for a VMM that knows
//! nothing of it: then it is the process of that VMM ([`Config::mapped_by`](crate::Config)), and
//! userfaultfds for its mappings come from a [`MappingProcess`].

use crate::error::Error;
use pageferry_protocol::userfault::{
    AddressRange, RegisterMode, UserfaultError, UserfaultSource, Userfaultfd, feature,
};
use rustix::fs::{Mode, OFlags};
use std::fmt::Debug;
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// What a userfaultfd is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UserfaultPurpose {
    /// The guest waits for pages that are missing: postcopy and lazy restore. When the last
    /// descriptor is closed, a missing page reads as zero. So the process itself has to keep one
    /// until [`MappingProcess::memory_complete`].
    MissingPages,
    /// The guest waits before it writes to pages that are not saved yet: background snapshots. When
    /// the last descriptor is closed, no write waits any more.
    WatchedWrites,
    /// The kernel records the writes, and nobody waits: `Trackers::WRITE_PROTECT`. So it needs no
    /// right to handle faults of the kernel.
    WriteTracking,
}

impl UserfaultPurpose {
    /// The features of the userfaultfd (`UFFD_FEATURE_*`).
    pub fn features(self) -> u64 {
        match self {
            Self::MissingPages => {
                feature::MISSING_SHMEM
                    | feature::MISSING_HUGETLBFS
                    | feature::MINOR_SHMEM
                    | feature::POISON
            }
            Self::WatchedWrites => feature::WP_HUGETLBFS_SHMEM,
            Self::WriteTracking => {
                feature::WP_HUGETLBFS_SHMEM | feature::WP_UNPOPULATED | feature::WP_ASYNC
            }
        }
    }

    /// What the mappings are registered for.
    pub(crate) fn mode(self) -> RegisterMode {
        match self {
            Self::MissingPages => RegisterMode::Missing,
            Self::WatchedWrites | Self::WriteTracking => RegisterMode::WriteProtect,
        }
    }
}

/// Why something cannot be done in the process that maps the guest's memory.
pub type MappingProcessError = Box<dyn std::error::Error + Send + Sync>;

/// A process that has the guest's memory mapped, at the addresses of
/// [`BlockSpec::vmm_address`](crate::BlockSpec::vmm_address), and is not the process of the client.
///
/// Calls may come from any thread. One that takes long delays a job, and never the guest.
pub trait MappingProcess: Debug + Send + Sync {
    /// Opens a userfaultfd for the mappings of the process. The handshake is made, with
    /// [`UserfaultPurpose::features`] and more if the process needs them
    /// ([`Userfaultfd::of_another_process`]).
    ///
    /// # Errors
    /// If the process has exited, or it is not allowed.
    fn open_userfaultfd(
        &self, purpose: UserfaultPurpose,
    ) -> Result<Userfaultfd, MappingProcessError>;

    /// True if all of the range is mapped.
    ///
    /// # Errors
    /// If the process has exited, or its mappings cannot be read.
    fn is_mapped(&self, range: AddressRange) -> Result<bool, MappingProcessError>;

    /// Opens the pagemap of the process (`/proc/PID/pagemap`).
    ///
    /// # Errors
    /// If the process has exited, or it is not allowed.
    fn open_pagemap(&self) -> Result<OwnedFd, MappingProcessError>;

    /// No page is missing any more: the process may close the userfaultfd that it has kept. The
    /// mappings are not registered any more.
    fn memory_complete(&self);
}

/// Where userfaultfds come from: this process or another one.
#[derive(Debug)]
pub(crate) enum Userfaults {
    Own(UserfaultSource),
    Of(Arc<dyn MappingProcess>),
}

impl Userfaults {
    pub(crate) fn open(&self, purpose: UserfaultPurpose) -> Result<Userfaultfd, Error> {
        match self {
            Self::Own(source) => Ok(source.open(purpose.features())?),
            Self::Of(process) => process.open_userfaultfd(purpose).map_err(refused),
        }
    }

    /// Finds out whether [`Userfaults::open`] would work for each of these purposes.
    pub(crate) fn check(&self, purposes: &[UserfaultPurpose]) -> Result<(), Error> {
        match self {
            Self::Own(source) => Ok(source.check(features(purposes))?),
            Self::Of(_) => purposes.iter().try_for_each(|purpose| {
                self.open(*purpose)?;
                self.closed(*purpose);
                Ok(())
            }),
        }
    }

    /// Why there is no userfaultfd for these purposes, as far as that is known at the start.
    pub(crate) fn known_failure(&self, purposes: &[UserfaultPurpose]) -> Option<UserfaultError> {
        match self {
            Self::Own(source) => source.known_failure(features(purposes)),
            Self::Of(_) => None,
        }
    }

    /// Refuses a range that has a hole. For this process the registration itself does that.
    pub(crate) fn check_mapped(&self, range: AddressRange) -> Result<(), Error> {
        let Self::Of(process) = self else { return Ok(()) };
        if process.is_mapped(range).map_err(refused)? {
            return Ok(());
        }
        let AddressRange { start, length } = range;
        Err(refused(format!("a part of {start:#x} + {length:#x} is not mapped there").into()))
    }

    pub(crate) fn open_pagemap(&self) -> Result<OwnedFd, Error> {
        match self {
            Self::Own(_) => open_own_pagemap().map_err(Error::kernel("open /proc/self/pagemap")),
            Self::Of(process) => process.open_pagemap().map_err(refused),
        }
    }

    /// A userfaultfd for this purpose is not used any more.
    pub(crate) fn closed(&self, purpose: UserfaultPurpose) {
        if let Self::Of(process) = self
            && purpose == UserfaultPurpose::MissingPages
        {
            process.memory_complete();
        }
    }
}

fn features(purposes: &[UserfaultPurpose]) -> u64 {
    purposes.iter().fold(0, |all, purpose| all | purpose.features())
}

fn refused(source: MappingProcessError) -> Error {
    Error::MappingProcess { source }
}

/// The pagemap of this process.
pub(crate) fn open_own_pagemap() -> rustix::io::Result<OwnedFd> {
    rustix::fs::open("/proc/self/pagemap", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
}
