// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Giving back pages of a private mapping of a file, as clones have it.
//!
//! Such a page is what was written, or else what the file has. To drop what was written is not
//! enough then: the page would show the file. So the page becomes a page of zeroes, which takes no
//! memory: an entry of the page table that leads to the kernel's only page of zeroes.
#![allow(unsafe_code)]

use super::abi::AddressRange;
use super::descriptor::{FillError, Userfaultfd};
use crate::memory::PAGE_SIZE;
use rustix::io::Errno;
use rustix::mm::{Advice, madvise};

/// How often a page is made zero that the guest touches again and again meanwhile.
const TRIES: u32 = 64;

impl Userfaultfd {
    /// Makes zero of pages of a private mapping of this process, which is registered. A thread that
    /// waits for such a page is woken. Returns the number of bytes that did not become zero, since
    /// other threads touched them all the time.
    ///
    /// # Errors
    /// What the kernel said; ENOENT if the range is not registered. A part may be zero then.
    pub fn make_zero(&self, range: AddressRange) -> Result<u64, Errno> {
        self.check_registered(range)?;
        let end = range.start + range.length;
        let (mut start, mut tries, mut left) = (range.start, 0, 0);
        while start < end {
            let rest = AddressRange { start, length: end - start };
            // What is protected leaves a mark where the page was, and a mark counts as a page. The
            // kernel refuses if nothing can be protected there.
            let _ = self.unprotect(rest);
            drop_written(rest)?;
            let Err(FillError { done, errno }) = self.zero(rest) else { break };
            if errno != Errno::EXIST {
                return Err(errno);
            }
            tries = if done == 0 { tries + 1 } else { 0 };
            start += done;
            if tries == TRIES {
                (start, tries, left) = (start + PAGE_SIZE, 0, left + PAGE_SIZE);
            }
        }
        Ok(left)
    }

    /// Drops what was written to pages of a private mapping of this process, which is registered:
    /// they are what the file has.
    ///
    /// # Errors
    /// As [`Userfaultfd::make_zero`].
    pub fn drop_private(&self, range: AddressRange) -> Result<(), Errno> {
        self.check_registered(range)?;
        let _ = self.unprotect(range);
        drop_written(range)
    }

    /// Refuses what is no registered mapping of this process: it may be somebody's memory. The
    /// first page may become zero by this.
    fn check_registered(&self, range: AddressRange) -> Result<(), Errno> {
        if !self.is_own() {
            return Err(Errno::OPNOTSUPP);
        }
        let first = AddressRange { start: range.start, length: PAGE_SIZE };
        match self.zero(first) {
            Ok(()) | Err(FillError { errno: Errno::EXIST, .. }) => Ok(()),
            Err(FillError { errno, .. }) => Err(errno),
        }
    }
}

fn drop_written(range: AddressRange) -> Result<(), Errno> {
    let (Ok(start), Ok(length)) = (usize::try_from(range.start), usize::try_from(range.length))
    else {
        return Err(Errno::INVAL);
    };
    let start = std::ptr::with_exposed_provenance_mut(start);
    // SAFETY: the range is registered with a userfaultfd of this process, so it is guest memory:
    // whoever reads it expects that it changes at any time, and nobody has a reference into it. The
    // kernel reads and writes none of it; what is dropped is how its pages are mapped.
    // Not the plain advice, which locked mappings refuse.
    unsafe { madvise(start, length, Advice::LinuxDontneedLocked) }
}
