// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Whether this agent is still the current one of its VMM.
//!
//! The VMM says so in the fence word (see [`pageferry_protocol::shm::fence`]). A thread checks the
//! word right before it takes bits of the dirty log, protects pages, changes guest memory for a job
//! or at the VMM's request, sends the commit, or gives an image its name. A check is one load from
//! memory.
//!
//! A VMM without a fence word, such as a stock vhost-user front-end, has only one agent, which is
//! always the current one.

use super::bus_guard::GuardedRange;
use pageferry_protocol::shm::MappingError;
use pageferry_protocol::shm::fence::{FenceView, Replaced};
use std::os::fd::BorrowedFd;

/// The fence word of the VMM that this agent serves, if it has one. The default has none.
#[derive(Debug, Default)]
pub struct CurrentAgent(Option<Fence>);

#[derive(Debug)]
struct Fence {
    // Before the mapping, so that the guard is dropped first. A truncated file reads as zero, and
    // then no agent is the current one.
    _guard: GuardedRange,
    view: FenceView,
}

impl CurrentAgent {
    /// The fence word is in `fd`, and this agent has the number `number`.
    ///
    /// # Errors
    /// If the file is too short or cannot be mapped.
    pub fn fenced(fd: BorrowedFd<'_>, number: u64) -> Result<Self, MappingError> {
        let view = FenceView::map(fd, number)?;
        Ok(Self(Some(Fence { _guard: GuardedRange::new(view.address_range()), view })))
    }

    /// True if the VMM has a fence word.
    pub fn is_fenced(&self) -> bool {
        self.0.is_some()
    }

    /// Checks that the VMM has not given this agent up.
    ///
    /// # Errors
    /// If the VMM has given it up.
    #[inline]
    pub fn check(&self) -> Result<(), Replaced> {
        self.0.as_ref().map_or(Ok(()), |fence| fence.view.check())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pageferry_protocol::shm::FenceWord;
    use pageferry_protocol::shm::fence::FENCE_BYTES;
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
    use std::os::fd::AsFd;

    #[test]
    fn agent_is_current_without_a_word_or_while_the_word_says_so() {
        assert_eq!(CurrentAgent::default().check(), Ok(()));
        let fd = memfd_create("fence", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&fd, FENCE_BYTES).unwrap();
        let word = FenceWord::map(fd.as_fd()).unwrap();
        let agent = CurrentAgent::fenced(fd.as_fd(), 3).unwrap();
        assert!(agent.is_fenced() && agent.check().is_err());
        word.admit(3);
        assert_eq!(agent.check(), Ok(()));
        ftruncate(&fd, 0).unwrap();
        assert_eq!(agent.check(), Err(Replaced { number: 3, current: 0 }));
    }
}
