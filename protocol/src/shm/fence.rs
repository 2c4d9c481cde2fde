// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The fence word: which agent of a VMM is the current one.
//!
//! The client of the VMM numbers its agents from 1. It keeps one 64-bit word in a memfd that all of
//! them map. The word holds the number of the agent that may act for the guest now, or 0 if there
//! is none. Only the client writes it: the file is sealed so that an agent can only read it.
//!
//! Whenever the client gives an agent up, it does this in order:
//!
//! 1. it withdraws the number from the word ([`FenceWord::revoke`]);
//! 2. it shuts the connection down;
//! 3. it kills the process of the agent and waits for its exit;
//! 4. only then it hands the guest memory to the next agent and writes its number
//!    ([`FenceWord::admit`]).
//!
//! An agent that hung meanwhile finds that out when it next checks the word, and stops. The check
//! alone is not enough, since the agent may hang between the check and what it does next. Step 3
//! makes step 4 safe. The word covers the time until the agent is dead, and agents that the client
//! may not kill.

use super::{MappedWords, MappingError, ReadOnlyWord};
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicU64, Ordering};

/// Length of the file of the word in bytes: one page.
pub const FENCE_BYTES: u64 = crate::memory::PAGE_SIZE;

/// The value while no agent is current.
pub const NO_AGENT: u64 = 0;

/// The word, as the client holds it.
#[derive(Debug)]
pub struct FenceWord(MappedWords);

impl FenceWord {
    /// Maps the word at byte 0 of `fd`. Call it before the file is sealed against writing.
    ///
    /// # Errors
    /// If the file is too short or cannot be mapped.
    pub fn map(fd: BorrowedFd<'_>) -> Result<Self, MappingError> {
        MappedWords::shared(fd, 0, 8).map(Self)
    }

    fn word(&self) -> &AtomicU64 {
        &self.0[0]
    }

    /// Makes the agent with this number the current one.
    pub fn admit(&self, number: u64) {
        self.word().store(number, Ordering::SeqCst);
    }

    /// Withdraws this number. Changes nothing if another agent is current. True if this one was.
    pub fn revoke(&self, number: u64) -> bool {
        self.word().compare_exchange(number, NO_AGENT, Ordering::SeqCst, Ordering::SeqCst).is_ok()
    }

    /// The number of the current agent, or [`NO_AGENT`].
    pub fn current(&self) -> u64 {
        self.word().load(Ordering::SeqCst)
    }
}

/// The word, as an agent sees it.
#[derive(Debug)]
pub struct FenceView {
    word: ReadOnlyWord,
    number: u64,
}

/// This agent is no longer the current one of the VMM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "this agent was replaced: it is number {number} of its VMM, which {}",
    match current { 0 => "has given it up".to_owned(), next => format!("has number {next} now") }
)]
pub struct Replaced {
    /// This agent's number.
    pub number: u64,
    /// The number of the current agent, or [`NO_AGENT`].
    pub current: u64,
}

impl FenceView {
    /// Maps the word at byte 0 of `fd`, for the agent with this number.
    ///
    /// # Errors
    /// If the file is too short or cannot be mapped.
    pub fn map(fd: BorrowedFd<'_>, number: u64) -> Result<Self, MappingError> {
        Ok(Self { word: ReadOnlyWord::map(fd)?, number })
    }

    /// Checks that this agent is still the current one.
    ///
    /// # Errors
    /// If it is not.
    #[inline]
    pub fn check(&self) -> Result<(), Replaced> {
        match self.word.load() {
            current if current == self.number => Ok(()),
            current => Err(Replaced { number: self.number, current }),
        }
    }

    /// The addresses of the mapping, for a guard against truncation.
    pub fn address_range(&self) -> std::ops::Range<usize> {
        self.word.address_range()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
    use std::os::fd::AsFd;

    #[test]
    fn an_agent_is_current_from_its_admission_until_it_is_revoked() {
        let fd = memfd_create("fence", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&fd, FENCE_BYTES).unwrap();
        let word = FenceWord::map(fd.as_fd()).unwrap();
        let [first, second] = [1, 2].map(|number| FenceView::map(fd.as_fd(), number).unwrap());
        assert_eq!(first.check(), Err(Replaced { number: 1, current: NO_AGENT }));
        word.admit(1);
        assert_eq!(first.check(), Ok(()));
        assert!(word.revoke(1) && !word.revoke(1));
        let error = first.check().unwrap_err();
        assert_eq!(
            error.to_string(),
            "this agent was replaced: it is number 1 of its VMM, which has given it up"
        );
        word.admit(2);
        // A late word about the first does not touch the second.
        assert!(!word.revoke(1));
        assert_eq!((word.current(), second.check()), (2, Ok(())));
        let error = first.check().unwrap_err();
        assert_eq!(
            error.to_string(),
            "this agent was replaced: it is number 1 of its VMM, which has number 2 now"
        );
    }

    #[test]
    fn a_file_that_is_too_short_is_refused() {
        let fd = memfd_create("fence", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&fd, 7).unwrap();
        assert!(matches!(
            FenceView::map(fd.as_fd(), 1),
            Err(MappingError::TooShort { size: 7, .. })
        ));
    }
}
