// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The write protection of a background snapshot: of all mappings of the VMM, by userfaultfd.

use super::copy_before_write::CaptureError;
use super::mappings::Mappings;
use pageferry_protocol::memory::PageRange;
use pageferry_protocol::userfault::Userfaultfd;
use rustix::io::Errno;
use std::time::Duration;

/// How often a change of the protection is tried again while the VMM frees memory, and the pause
/// between two tries. Seconds in all: the thread that reads the removals may wait for the disk.
const MAX_TRIES: u32 = 10_000;
const PAUSE: Duration = Duration::from_micros(200);

/// The write protection of the VMM's mappings.
#[derive(Debug)]
pub struct Protection {
    /// The userfaultfd that reports the write faults.
    pub uffd: Userfaultfd,
    /// The addresses of the mappings.
    pub mappings: Mappings,
    /// The VMM frees memory without a request. Then a page that reads as zero may be one that was
    /// freed after the instant.
    pub unannounced_frees: bool,
}

impl Protection {
    /// Write-protects host pages.
    ///
    /// # Errors
    /// If they are no longer registered, or the kernel refuses.
    pub fn protect(&self, at: usize, host_pages: PageRange) -> Result<(), CaptureError> {
        let addresses = self.mappings.addresses(at, host_pages);
        self.patiently(at, || self.uffd.protect(addresses))
    }

    /// Removes the protection of host pages, and wakes the threads that wait to write there. Not
    /// for the thread that reads the events.
    ///
    /// # Errors
    /// As for [`Protection::protect`].
    pub fn unprotect(&self, at: usize, host_pages: PageRange) -> Result<(), CaptureError> {
        let addresses = self.mappings.addresses(at, host_pages);
        self.patiently(at, || self.uffd.unprotect(addresses))
    }

    /// Removes the protection of a host page for a thread that waits to write there. For the thread
    /// that reads the events: if it has to read a removal first, the writer is only woken, and
    /// faults again.
    ///
    /// # Errors
    /// As for [`Protection::protect`].
    pub fn allow_write(&self, at: usize, host_page: u64) -> Result<(), CaptureError> {
        let addresses = self.mappings.addresses(at, PageRange::new(host_page, 1));
        let allowed = match self.uffd.unprotect(addresses) {
            Err(Errno::AGAIN) => self.uffd.wake(addresses),
            allowed => allowed,
        };
        allowed.map_err(|source| self.failed(at, source))
    }

    /// Runs `change`, and again while the VMM frees memory and its removals are not read yet.
    fn patiently(
        &self, at: usize, change: impl Fn() -> Result<(), Errno>,
    ) -> Result<(), CaptureError> {
        let mut tries = 0;
        loop {
            match change() {
                Err(Errno::AGAIN) if tries < MAX_TRIES => {
                    tries += 1;
                    std::thread::sleep(PAUSE);
                }
                changed => return changed.map_err(|source| self.failed(at, source)),
            }
        }
    }

    fn failed(&self, at: usize, source: Errno) -> CaptureError {
        CaptureError::Protection { id: self.mappings.all()[at].id, source }
    }
}
