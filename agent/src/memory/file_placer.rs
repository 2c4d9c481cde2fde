// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Placing pages into shared memory through a mapping of the agent's own, by `UFFDIO_COPY`.
//!
//! A `write` to shared memory holds the lock of the file for the whole call. So all threads
//! together place at the rate of one, and those that wait burn their processors. `UFFDIO_COPY`
//! takes no such lock. It also allocates single pages on all shared memory, which a `write` does
//! not: see [`super::small_pages`].
//!
//! The agent maps the block, and registers the mapping with a userfaultfd of its own, which takes
//! no privilege. It registers for minor faults, none of which can occur: a mapping that is
//! registered for missing faults would keep the kernel from making large pages (see
//! [`super::large_pages`]). Nobody touches the mapping: no page fault occurs, and a file that
//! shrinks is an error of the call instead of SIGBUS.

use super::backing::{Backing, BackingError};
use super::mapped_areas::{MappedArea, MappedAreas, Maps};
use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use pageferry_protocol::userfault::{AddressRange, FillError, RegisterMode, Userfaultfd};
use rustix::io::Errno;
use std::sync::Arc;

/// A mapping of a block's file that is only used to place pages.
#[derive(Debug)]
pub struct FilePlacer {
    uffd: Userfaultfd,
    area: Arc<MappedArea>,
}

impl FilePlacer {
    /// Maps a file of shared memory, as one of the areas of a job.
    ///
    /// # Errors
    /// If the kernel has no userfaultfd for this process, or no room for the mapping.
    pub fn new(backing: &Backing, areas: &Arc<MappedAreas>) -> Result<Self, BackingError> {
        let kernel =
            |source| BackingError::Kernel { what: "map the file for placing", at: 0, source };
        let uffd =
            Userfaultfd::open_for_placing().map_err(|source| BackingError::Userfault { source })?;
        let area = areas.map(backing, Maps::Pages).map_err(kernel)?;
        let placer = Self { uffd, area };
        let range = AddressRange { start: placer.address(0), length: backing.length() };
        let registered = placer.uffd.register(range, RegisterMode::Minor);
        registered.map_err(|source| BackingError::Userfault { source })?;
        Ok(placer)
    }

    fn address(&self, byte: u64) -> u64 {
        self.area.start().expose_provenance() as u64 + byte
    }

    /// Places `bytes`, whole pages, at byte `at` of the block. Best for pages that do not exist:
    /// those that do are written, and found one run at a time.
    ///
    /// # Errors
    /// If the file was truncated, or the kernel refuses.
    pub fn place(&self, backing: &Backing, at: u64, bytes: &[u8]) -> Result<(), BackingError> {
        let placed = self.place_or_write(backing, at, bytes);
        self.area.note(at, bytes.len() as u64);
        placed
    }

    /// Places `bytes`, whole pages, none of which may exist.
    ///
    /// # Errors
    /// The first byte that could not be placed, and the kernel's error: EEXIST if the page exists.
    pub fn place_new(&self, at: u64, bytes: &[u8]) -> Result<(), (u64, Errno)> {
        let placed = self.uffd.copy(self.address(at), bytes);
        self.area.note(at, bytes.len() as u64);
        placed.map_err(|FillError { done, errno }| (at + done, errno))
    }

    fn place_or_write(&self, backing: &Backing, at: u64, bytes: &[u8]) -> Result<(), BackingError> {
        let mut done = 0;
        while done < bytes.len() {
            let placed = self.uffd.copy(self.address(at + done as u64), &bytes[done..]);
            let Err(FillError { done: more, errno }) = placed else { return Ok(()) };
            done += more as usize;
            let byte = at + done as u64;
            match errno {
                Errno::EXIST => {
                    let rest =
                        PageRange::new(byte / PAGE_SIZE, (bytes.len() - done) as u64 / PAGE_SIZE);
                    // At least one: reserved pages are reported as holes, but they exist.
                    let present = backing.first_hole(rest)?.saturating_sub(rest.first).max(1);
                    let part = &bytes[done..done + (present * PAGE_SIZE) as usize];
                    backing.write(byte, part)?;
                    done += part.len();
                }
                // The kernel also says so if a tmpfs is full. A write says what it is.
                Errno::NOMEM => {
                    backing.write(byte, &bytes[done..done + PAGE_SIZE as usize])?;
                    done += PAGE_SIZE as usize;
                }
                Errno::FAULT => {
                    return Err(BackingError::Truncated { end: at + bytes.len() as u64 });
                }
                source => {
                    return Err(BackingError::Kernel { what: "place pages", at: byte, source });
                }
            }
        }
        Ok(())
    }
}
