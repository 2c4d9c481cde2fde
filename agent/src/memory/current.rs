//! Whether this agent still acts for its VMM.
//!
//! The VMM says so in the fence word (see [`pageferry_protocol::shm::fence`]). Who looks at it, and
//! when: whoever takes bits of the dirty log, protects pages, changes guest memory for a job or at
//! the VMM's request, sends the commit, or gives an image its name, right before it does. A look
//! is one load from memory.
//!
//! A VMM without a fence word, such as a stock vhost-user front-end, has one agent, which is
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
    // Before the mapping, so that it is dropped before it. A file that is cut off reads as zero:
    // then no agent is the current one.
    _guard: GuardedRange,
    view: FenceView,
}

impl CurrentAgent {
    /// This agent has this number in the word that lies in `fd`.
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

    /// Goes on if the VMM has not given this agent up.
    ///
    /// # Errors
    /// If it has.
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
    fn without_a_word_the_agent_is_always_current_and_with_one_until_its_file_is_cut_off() {
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
