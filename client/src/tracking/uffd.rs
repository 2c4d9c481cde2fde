// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Write protection of the mappings of the VMM: a tracker that needs no code in the VMM and no KVM.
//!
//! A client does this by itself for `Trackers::WRITE_PROTECT`. [`WriteProtect`] is for programs
//! that scan without a client. Its mappings can be [added](WriteProtect::add) and
//! [removed](WriteProtect::remove) while it lives, as memory is plugged in and out.
//!
//! The mapping is registered with a userfaultfd in asynchronous write-protect mode. The first write
//! to a protected page removes the protection inside the kernel. No thread is woken, and the page
//! counts as written until it is protected again. The agent reads and protects with `PAGEMAP_SCAN`
//! on the `/proc/self/pagemap` that the client hands over.
//!
//! This sees the writes of vCPUs and of the VMM through this mapping. It does not see `write()` to
//! the file, or other mappings of the file. Such writers mark the shared log.

use crate::mapping_process::{UserfaultPurpose, open_own_pagemap};
use pageferry_protocol::userfault::{AddressRange, RegisterMode, Userfaultfd};
use rustix::io::Errno;
use std::collections::BTreeMap;
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
    /// A part of the range is registered here already.
    #[error(
        "{start:#x} + {length:#x} overlaps {other:#x} + {other_length:#x}, which is registered already"
    )]
    Overlap {
        /// Address of the range.
        start: u64,
        /// Its length in bytes.
        length: u64,
        /// Address of the registered mapping.
        other: u64,
        /// Its length in bytes.
        other_length: u64,
    },
    /// The range is none of those that were registered here.
    #[error(
        "{start:#x} + {length:#x} was not registered; a mapping is removed as it was registered"
    )]
    NotRegistered {
        /// Address of the range.
        start: u64,
        /// Its length in bytes.
        length: u64,
    },
    /// The kernel did not unregister a mapping.
    #[error("cannot unregister {start:#x} + {length:#x}")]
    Unregister {
        /// Address of the mapping.
        start: u64,
        /// Its length in bytes.
        length: u64,
        /// What the kernel said.
        #[source]
        source: Errno,
    },
}

/// Mappings of this process whose first writes are tracked. Dropping it unregisters them, which
/// removes the protection.
#[derive(Debug)]
pub struct WriteProtect {
    uffd: Userfaultfd,
    pagemap: OwnedFd,
    /// Lengths in bytes by their addresses. They do not overlap.
    registered: BTreeMap<u64, u64>,
}

impl WriteProtect {
    /// Registers mappings, each given by its address and length in bytes. This protects nothing
    /// yet; the first scan does.
    ///
    /// # Errors
    /// If userfaultfd is not allowed or too old, or for the reasons of [`WriteProtect::add`]. Then
    /// no mapping stays registered.
    pub fn register(ranges: &[(u64, u64)]) -> Result<Self, UffdError> {
        let uffd = Userfaultfd::open(UserfaultPurpose::WriteTracking.features())?;
        let pagemap = open_own_pagemap().map_err(|source| UffdError::Pagemap { source })?;
        let mut this = Self { uffd, pagemap, registered: BTreeMap::new() };
        for &(start, length) in ranges {
            this.add(start, length)?;
        }
        Ok(this)
    }

    /// Registers one more mapping, such as memory that is plugged in: all of it, or nothing. Until
    /// the first scan protects them, its pages count as written.
    ///
    /// # Errors
    /// If the range overlaps one that is registered here, a part of it is not mapped, or the kernel
    /// refuses, for example since the mapping is registered with another userfaultfd. The other
    /// mappings stay as they are.
    pub fn add(&mut self, start: u64, length: u64) -> Result<(), UffdError> {
        // What does not fit into the address space, the kernel refuses.
        let before = self.registered.range(..start.saturating_add(length)).next_back();
        if let Some((&other, &other_length)) = before.filter(|(at, length)| start < *at + *length) {
            return Err(UffdError::Overlap { start, length, other, other_length });
        }
        self.uffd.register(AddressRange { start, length }, RegisterMode::WriteProtect)?;
        self.registered.insert(start, length);
        Ok(())
    }

    /// Unregisters a mapping that was given to [`WriteProtect::register`] or [`WriteProtect::add`],
    /// such as memory that is unplugged: all of it, or nothing. That removes its protection. Call
    /// it before the memory is unmapped: later, another mapping may have the same address.
    ///
    /// # Errors
    /// If no mapping was registered with this address and length, or the kernel has no memory left
    /// to split a mapping. All mappings stay as they are, and pages of this one that were protected
    /// may count as written.
    pub fn remove(&mut self, start: u64, length: u64) -> Result<(), UffdError> {
        if self.registered.get(&start) != Some(&length) {
            return Err(UffdError::NotRegistered { start, length });
        }
        let range = AddressRange { start, length };
        match self.uffd.unregister(range) {
            Ok(()) => {}
            // It is unmapped already, which has unregistered it.
            Err(Errno::INVAL) => log::debug!("{start:#x} + {length:#x} is not mapped any more"),
            Err(source) => {
                // A part may be unregistered.
                let _ = self.uffd.register(range, RegisterMode::WriteProtect);
                return Err(UffdError::Unregister { start, length, source });
            }
        }
        self.registered.remove(&start);
        Ok(())
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
        for (&start, &length) in &self.registered {
            if let Err(error) = self.uffd.unregister(AddressRange { start, length }) {
                log::debug!(
                    "cannot unregister {start:#x} + {length:#x}, perhaps unmapped: {error}"
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
