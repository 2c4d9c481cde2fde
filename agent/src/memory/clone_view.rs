// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The memory of a clone's block, as the agent sees it: a private mapping of the VMM.
//!
//! What the guest has written is anonymous memory of the VMM. So the agent reads all of the block
//! by the `/proc/self/mem` that the VMM has passed, finds holes by its pagemap, and has the client
//! give pages back.
//!
//! Once a guest runs with all its memory, a page is a hole exactly if the entry of the page table
//! leads to the kernel's page of zeroes: the restore has made such entries for the pages that the
//! image does not have, and so does whatever gives pages back. A page without an entry is as in the
//! base. To read a hole would make a page of it in the base
//! ([`never-populate`](crate::invariants#never-populate)), so holes are looked for first.

use super::backing::BackingError;
use crate::lock::lock;
use crate::pagemap::{Pagemap, PagemapError, Pages};
use pageferry_protocol::control::clones::{GiveBack, GiveBackTo};
use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use rustix::io::{Errno, retry_on_intr};
use rustix::net::{SendFlags, send};
use std::os::fd::OwnedFd;
use std::sync::Mutex;

/// A private mapping in the VMM.
#[derive(Debug)]
pub struct CloneView {
    memory: OwnedFd,
    pagemap: Pagemap,
    /// To the client, which gives pages back. Locked for one request.
    service: Mutex<OwnedFd>,
    /// Where the block begins in the VMM.
    address: u64,
}

impl CloneView {
    /// The mapping at `address`. `memory` is `/proc/self/mem` of the VMM, `service` the socket of
    /// the client.
    pub fn new(memory: OwnedFd, pagemap: Pagemap, service: OwnedFd, address: u64) -> Self {
        Self { memory, pagemap, service: Mutex::new(service), address }
    }

    /// Fills `buffer` from byte `at` of the block.
    ///
    /// # Errors
    /// If the VMM is gone, or the kernel refuses.
    pub(super) fn read(&self, at: u64, buffer: &mut [u8]) -> Result<(), BackingError> {
        let end = at + buffer.len() as u64;
        let first = at / PAGE_SIZE;
        let pages = PageRange::new(first, end.div_ceil(PAGE_SIZE) - first);
        let (mut done, mut failed) = (at, None);
        self.runs(Pages::NotZero, pages, |run| {
            let (start, stop) = (run.offset().max(at), (run.end() * PAGE_SIZE).min(end));
            buffer[(done - at) as usize..(start - at) as usize].fill(0);
            done = stop;
            if failed.is_none() {
                let part = &mut buffer[(start - at) as usize..(stop - at) as usize];
                failed = self.read_exact(start, part).err();
            }
        })?;
        buffer[(done - at) as usize..].fill(0);
        failed.map_or(Ok(()), Err)
    }

    fn read_exact(&self, at: u64, buffer: &mut [u8]) -> Result<(), BackingError> {
        let end = at + buffer.len() as u64;
        let mut done = 0;
        while done < buffer.len() {
            let place = self.address + at + done as u64;
            match rustix::io::pread(&self.memory, &mut buffer[done..], place) {
                // The VMM has exited.
                Ok(0) => return Err(BackingError::Truncated { end }),
                Ok(count) => done += count,
                Err(Errno::INTR) => {}
                Err(source) => return Err(BackingError::Kernel { what: "read", at, source }),
            }
        }
        Ok(())
    }

    /// The first page of `range` that is no hole.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub(super) fn first_data(&self, range: PageRange) -> Result<Option<u64>, BackingError> {
        self.first(Pages::NotZero, range)
    }

    /// The first page of `range` that is a hole, or its end.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub(super) fn first_hole(&self, range: PageRange) -> Result<u64, BackingError> {
        Ok(self.first(Pages::Zero, range)?.unwrap_or(range.end()))
    }

    fn first(&self, pages: Pages, range: PageRange) -> Result<Option<u64>, BackingError> {
        let found = self.pagemap.first(pages, self.address + range.offset(), range.bytes());
        let found = found.map_err(|source| failed(range, source))?;
        Ok(found.map(|address| (address - self.address) / PAGE_SIZE))
    }

    /// The number of pages of `range` that are no holes.
    pub(super) fn allocated_pages(&self, range: PageRange) -> u64 {
        let mut pages = 0;
        let counted = self.runs(Pages::NotZero, range, |run| pages += run.count);
        counted.map_or(range.count, |()| pages)
    }

    fn runs(
        &self, pages: Pages, range: PageRange, mut found: impl FnMut(PageRange),
    ) -> Result<(), BackingError> {
        let start = self.address + range.offset();
        let walked = self.pagemap.runs(pages, start, range.bytes(), |from, to| {
            let (first, end) = ((from - self.address) / PAGE_SIZE, (to - self.address) / PAGE_SIZE);
            found(PageRange::new(first, end - first));
        });
        walked.map_err(|source| failed(range, source))
    }

    /// Has the client give pages back.
    ///
    /// # Errors
    /// If the client is gone, or the kernel refuses.
    pub(super) fn give_back(&self, to: GiveBackTo, pages: PageRange) -> Result<(), BackingError> {
        let refused = |source| {
            let (what, at) = ("give pages of a clone back", pages.offset());
            BackingError::Kernel { what, at, source }
        };
        let service = lock(&self.service);
        let request = GiveBack { to, pages }.encode();
        // The VMM may have ended the service: that raises no SIGPIPE.
        let sent = retry_on_intr(|| send(&*service, &request, SendFlags::NOSIGNAL));
        // The socket has room for the only request that is under way.
        if sent.map_err(refused)? != request.len() {
            return Err(refused(Errno::PIPE));
        }
        let mut answer = [0; 4];
        let mut done = 0;
        while done < answer.len() {
            let part = &mut answer[done..];
            match retry_on_intr(|| rustix::io::read(&*service, &mut *part)) {
                Ok(0) => return Err(refused(Errno::PIPE)),
                Ok(count) => done += count,
                Err(errno) => return Err(refused(errno)),
            }
        }
        match i32::from_le_bytes(answer) {
            0 => Ok(()),
            errno => Err(refused(Errno::from_raw_os_error(errno))),
        }
    }
}

fn failed(range: PageRange, source: PagemapError) -> BackingError {
    BackingError::Pagemap { at: range.offset(), source }
}
