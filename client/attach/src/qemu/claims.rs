// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Claims on the files of guest memory: each file has one guest.
//!
//! A destination begins by making holes of all its memory. If its QEMU was given the file of the
//! source by mistake, that would destroy the guest. So whoever serves a file keeps a lock on it
//! (`flock`). The lock belongs to a descriptor that no other process gets, so it ends with this
//! process.

use super::guest_memory::{FoundBlock, GuestMemoryError};
use rustix::fs::{Dev, FlockOperation, Mode, OFlags, flock, open};
use rustix::io::Errno;
use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

/// The claimed files, by device and inode.
#[derive(Debug, Default)]
pub(super) struct Claims(BTreeMap<(Dev, u64), OwnedFd>);

impl Claims {
    /// Claims the files of these blocks, and gives up those of others.
    ///
    /// # Errors
    /// If another process has claimed one. The other claims stay as they are.
    pub(super) fn follow(&mut self, blocks: &[FoundBlock]) -> Result<(), GuestMemoryError> {
        for block in blocks {
            if self.0.contains_key(&block.file_id()) {
                continue;
            }
            let claimed = claim(block.file()).map_err(|source| {
                let block = block.ram.block.clone();
                match source {
                    Errno::WOULDBLOCK => GuestMemoryError::ServedAlready { block },
                    source => GuestMemoryError::NotClaimed { block, source },
                }
            })?;
            self.0.insert(block.file_id(), claimed);
        }
        self.0.retain(|file, _| blocks.iter().any(|block| block.file_id() == *file));
        Ok(())
    }
}

/// Locks a file by a descriptor of its own: `file` is one that QEMU and an agent have, too.
fn claim(file: BorrowedFd<'_>) -> Result<OwnedFd, Errno> {
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let own = open(path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
    flock(&own, FlockOperation::NonBlockingLockExclusive)?;
    Ok(own)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{MemfdFlags, memfd_create};
    use std::os::fd::AsFd;

    #[test]
    fn file_is_claimed_once() {
        let file = memfd_create("guest", MemfdFlags::CLOEXEC).unwrap();
        let other = file.try_clone().unwrap();
        let claimed = claim(file.as_fd()).unwrap();
        assert_eq!(claim(other.as_fd()).unwrap_err(), Errno::WOULDBLOCK);
        drop(claimed);
        claim(other.as_fd()).unwrap();
    }
}
