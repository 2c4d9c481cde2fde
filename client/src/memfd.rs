// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Shared memory that survives the agent: memfds that the client makes, maps, and hands to one
//! agent after the other.
//!
//! They are sealed at their size, so that neither side can make the other fault with SIGBUS by
//! truncating the file.

use crate::error::Error;
use pageferry_protocol::shm::FenceWord;
use pageferry_protocol::shm::fence::FENCE_BYTES;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use std::os::fd::{AsFd, OwnedFd};

/// A memfd of `length` bytes, all holes, that can neither grow nor shrink.
///
/// # Errors
/// If the kernel refuses.
pub(crate) fn sealed_memfd(name: &str, length: u64) -> Result<OwnedFd, Error> {
    let fd = sized_memfd(name, length)?;
    fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)
        .map_err(Error::kernel("seal a memfd"))?;
    Ok(fd)
}

fn sized_memfd(name: &str, length: u64) -> Result<OwnedFd, Error> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let fd = memfd_create(name, flags).map_err(Error::kernel("create a memfd"))?;
    ftruncate(&fd, length).map_err(Error::kernel("size a memfd"))?;
    Ok(fd)
}

/// The fence word and its memfd for the agents; see [`pageferry_protocol::shm::fence`].
#[derive(Debug)]
pub(crate) struct Fence {
    pub(crate) word: FenceWord,
    pub(crate) fd: OwnedFd,
}

impl Fence {
    /// A word that names no agent yet. An agent that gets the file can only read it.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub(crate) fn new() -> Result<Self, Error> {
        let fd = sized_memfd("pageferry-fence", FENCE_BYTES)?;
        let word = FenceWord::map(fd.as_fd())
            .map_err(|source| Error::Mapping { what: "fence word", source })?;
        // After the mapping, which stays writable.
        let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::FUTURE_WRITE | SealFlags::SEAL;
        fcntl_add_seals(&fd, seals).map_err(Error::kernel("seal a memfd"))?;
        Ok(Self { word, fd })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pageferry_protocol::shm::fence::FenceView;

    #[test]
    fn an_agent_can_read_the_fence_word_and_cannot_write_it() {
        let fence = Fence::new().unwrap();
        let view = FenceView::map(fence.fd.as_fd(), 5).unwrap();
        fence.word.admit(5);
        view.check().unwrap();
        assert!(FenceWord::map(fence.fd.as_fd()).is_err());
        assert!(rustix::io::pwrite(&fence.fd, &[1], 0).is_err());
        assert!(ftruncate(&fence.fd, 0).is_err());
        view.check().unwrap();
    }
}
