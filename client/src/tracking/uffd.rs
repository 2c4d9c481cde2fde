// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Write protection of the mappings of the VMM: a tracker that needs no code in the VMM and no KVM.
//!
//! A client does this by itself for `Trackers::WRITE_PROTECT`. [`WriteProtect`] is for programs
//! that scan without a client.
//!
//! The mapping is registered with a userfaultfd in asynchronous write-protect mode. The first write
//! to a protected page removes the protection inside the kernel. No thread is woken, and the page
//! counts as written until it is protected again. The agent reads and protects with `PAGEMAP_SCAN`
//! on the `/proc/self/pagemap` that the client hands over.
//!
//! This sees the writes of vCPUs and of the VMM through this mapping. It does not see `write()` to
//! the file, or other mappings of the file. Such writers mark the shared log.

use super::active::SCAN_FEATURES;
use pageferry_protocol::userfault::{AddressRange, RegisterMode, Userfaultfd};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

pub use pageferry_protocol::userfault::UserfaultError;

/// Why a mapping cannot be tracked by write protection.
#[derive(Debug, thiserror::Error)]
pub enum UffdError {
    /// There is no userfaultfd, or the mapping cannot be registered.
    #[error(transparent)]
    Userfault(#[from] UserfaultError),
    /// /proc is not mounted, or not readable.
    #[error("cannot open /proc/self/pagemap")]
    Pagemap {
        /// What the kernel said.
        #[source]
        source: Errno,
    },
}

/// The pagemap of this process.
pub(crate) fn open_pagemap() -> rustix::io::Result<OwnedFd> {
    rustix::fs::open("/proc/self/pagemap", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
}

/// Mappings of this process whose first writes are tracked. Dropping it unregisters them, which
/// removes the protection.
#[derive(Debug)]
pub struct WriteProtect {
    uffd: Userfaultfd,
    pagemap: OwnedFd,
    registered: Vec<AddressRange>,
}

impl WriteProtect {
    /// Registers mappings, each given by its address and length in bytes. This protects nothing
    /// yet; the first scan does.
    ///
    /// # Errors
    /// If userfaultfd is not allowed or too old, or a mapping cannot be registered. Then no mapping
    /// stays registered.
    pub fn register(ranges: &[(u64, u64)]) -> Result<Self, UffdError> {
        let uffd = Userfaultfd::open(SCAN_FEATURES)?;
        let pagemap = open_pagemap().map_err(|source| UffdError::Pagemap { source })?;
        let mut this = Self { uffd, pagemap, registered: Vec::with_capacity(ranges.len()) };
        for &(start, length) in ranges {
            let range = AddressRange { start, length };
            this.uffd.register(range, RegisterMode::WriteProtect)?;
            this.registered.push(range);
        }
        Ok(this)
    }

    /// The pagemap of this process, for the agent. A process that holds it can see which pages of
    /// this process exist, and can protect the registered ones. It gives no access to their
    /// content.
    pub fn pagemap(&self) -> BorrowedFd<'_> {
        self.pagemap.as_fd()
    }
}

impl Drop for WriteProtect {
    fn drop(&mut self) {
        // Closing the descriptor is not enough if a forked child still holds a copy.
        for range in &self.registered {
            if let Err(error) = self.uffd.unregister(*range) {
                log::debug!(
                    "cannot unregister {:#x} + {:#x}, perhaps unmapped: {error}",
                    range.start,
                    range.length
                );
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_mapped_is_refused_with_its_numbers() {
        match WriteProtect::register(&[(0x1000, 0x3000)]).unwrap_err() {
            UffdError::Userfault(error @ UserfaultError::Register { .. }) => {
                assert_eq!(
                    error.to_string(),
                    "cannot register 0x1000 + 0x3000 for write protection"
                );
            }
            other => eprintln!("skipped: {other}"),
        }
    }
}
