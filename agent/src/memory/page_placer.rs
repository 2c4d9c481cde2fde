// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Places host pages through a userfaultfd, and what the kernel's errors mean.

use super::base_placer::BasePlacer;
use super::mappings::Mappings;
use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use pageferry_protocol::shm::MappingError;
use pageferry_protocol::userfault::{AddressRange, FillError, Userfaultfd};
use rustix::io::Errno;
use std::sync::Arc;

/// Why faults cannot be served, or a page was not placed. Such a page is still missing.
#[derive(Debug, thiserror::Error)]
pub enum PlaceError {
    /// The kernel refused.
    #[error("host page {host_page:#x} of block {id} cannot be placed")]
    Place {
        /// The block.
        id: u32,
        /// Index of the host page in the block.
        host_page: u64,
        /// The kernel's error: ENOMEM or ENOSPC if there is no memory, ENOENT if the VMM has
        /// nothing mapped there, ESRCH if the VMM is gone.
        #[source]
        source: Errno,
    },
    /// There is no memory for the bitmaps.
    #[error("bitmap")]
    Bitmap(#[from] MappingError),
    /// The kernel refused an event descriptor.
    #[error("cannot create an event descriptor")]
    Event(#[source] std::io::Error),
    /// The faults cannot be read.
    #[error("cannot read faults")]
    Read(#[source] Errno),
}

/// A host page that could not be placed, and the kernel's error.
pub(super) type Failed = (u64, Errno);

impl PlaceError {
    /// True if the host has no memory for the page now. It may have some later.
    pub fn lacks_memory(&self) -> bool {
        matches!(self, Self::Place { source: Errno::NOMEM | Errno::NOSPC, .. })
    }

    /// True if the VMM is changing its mappings, and its removals have to be read first.
    pub fn is_changing(&self) -> bool {
        matches!(self, Self::Place { source: Errno::AGAIN, .. })
    }

    /// True if the process that would wait for the page is gone.
    pub fn is_gone(&self) -> bool {
        matches!(self, Self::Place { source: Errno::SRCH, .. })
    }
}

/// The VMM's mappings, registered with a userfaultfd.
#[derive(Debug)]
pub struct PagePlacer {
    uffd: Userfaultfd,
    mappings: Mappings,
    /// For each block of a clone the base, into which its pages are placed. Empty without clones.
    bases: Vec<Option<Arc<BasePlacer>>>,
    /// A host page of zeroes for blocks with huge pages: UFFDIO_ZEROPAGE does not work there.
    zeroes: Vec<u8>,
}

impl PagePlacer {
    /// All of `mappings` are registered with `uffd`.
    pub(super) fn new(uffd: Userfaultfd, mappings: Mappings) -> Self {
        let units = mappings.all().iter().map(|mapping| mapping.unit);
        let huge = units.filter(|unit| *unit > PAGE_SIZE).max().unwrap_or(0);
        Self { uffd, mappings, bases: Vec::new(), zeroes: vec![0; huge as usize] }
    }

    /// From now on the pages of these blocks are placed into their bases.
    pub(super) fn set_bases(&mut self, bases: Vec<Option<Arc<BasePlacer>>>) {
        self.bases = bases;
    }

    /// The base of the block at index `at`, if it is a clone's.
    pub(super) fn base(&self, at: usize) -> Option<&Arc<BasePlacer>> {
        self.bases.get(at)?.as_ref()
    }

    /// The userfaultfd. Readable when there are faults.
    pub(super) fn uffd(&self) -> &Userfaultfd {
        &self.uffd
    }

    /// The mappings.
    pub(super) fn mappings(&self) -> &Mappings {
        &self.mappings
    }

    /// The block and host page of an address in the VMM. `None` if it is not guest memory.
    pub(super) fn locate(&self, address: u64) -> Option<(usize, u64)> {
        self.mappings.locate(address)
    }

    fn addresses(&self, at: usize, host_pages: PageRange) -> AddressRange {
        self.mappings.addresses(at, host_pages)
    }

    /// Places host pages that were taken, up to the first that fails.
    pub(super) fn place(
        &self, at: usize, run: PageRange, mut content: &[u8],
    ) -> Result<(), Failed> {
        let unit = self.mappings.all()[at].unit;
        let mut rest = run;
        if let Some(base) = self.base(at) {
            let shared = base.place(run, content)?;
            self.map_base(at, PageRange::new(run.first, shared))?;
            // The clone gets pages of its own for those that the base has no room for.
            rest = PageRange::new(run.first + shared, run.count - shared);
            content = &content[(shared * unit) as usize..];
        }
        while !rest.is_empty() {
            let range = self.addresses(at, rest);
            let Err(FillError { done, errno }) = self.uffd.copy(range.start, content) else {
                return Ok(());
            };
            let placed = done / unit;
            rest = PageRange::new(rest.first + placed, rest.count - placed);
            if errno != Errno::EXIST {
                return Err((rest.first, errno));
            }
            self.check_present(at, rest.first)?;
            // The VMM has written there by the file or another mapping, which pageferry cannot see.
            // Its content is newer than what arrived, so it stays.
            log::warn!(
                "block {}: host page {:#x} was there before it came",
                self.mappings.all()[at].id,
                rest.first
            );
            self.wake(at, PageRange::new(rest.first, 1));
            rest = PageRange::new(rest.first + 1, rest.count - 1);
            content = &content[(done + unit) as usize..];
        }
        Ok(())
    }

    /// Places zero. If there is a page by now, wakes the waiters instead. In a private mapping, the
    /// kernel alone would place zero over a page of the base.
    pub(super) fn place_zero(&self, at: usize, host_page: u64) -> Result<(), Failed> {
        if let Some(base) = self.base(at)
            && base.filled().contains(host_page)
        {
            return self.map_base(at, PageRange::new(host_page, 1));
        }
        let unit = self.mappings.all()[at].unit;
        let range = self.addresses(at, PageRange::new(host_page, 1));
        let placed = if unit == PAGE_SIZE {
            self.uffd.zero(range)
        } else {
            self.uffd.copy(range.start, &self.zeroes[..unit as usize])
        };
        match placed {
            Ok(()) => Ok(()),
            Err(FillError { errno: Errno::EXIST, .. }) => {
                self.check_present(at, host_page)?;
                self.wake(at, PageRange::new(host_page, 1));
                Ok(())
            }
            Err(FillError { errno, .. }) => Err((host_page, errno)),
        }
    }

    /// Maps pages of the base, which are filled, into the clone, and wakes the threads that wait.
    /// What the guest has written or given back stays.
    pub(super) fn map_base(&self, at: usize, run: PageRange) -> Result<(), Failed> {
        let mut rest = run;
        while !rest.is_empty() {
            let Err(FillError { done, errno }) = self.uffd.map_file(self.addresses(at, rest))
            else {
                break;
            };
            let first = rest.first + done / PAGE_SIZE;
            if errno != Errno::EXIST {
                return Err((first, errno));
            }
            rest = PageRange::new(first + 1, rest.end() - first - 1);
        }
        self.wake(at, run);
        Ok(())
    }

    /// Makes zero of pages of a clone that have no entry yet: the image does not have them.
    pub(super) fn fill_zero(&self, at: usize, pages: PageRange) -> Result<(), Failed> {
        let mut rest = pages;
        while !rest.is_empty() {
            let Err(FillError { done, errno }) = self.uffd.zero(self.addresses(at, rest)) else {
                break;
            };
            let first = rest.first + done / PAGE_SIZE;
            if errno != Errno::EXIST {
                return Err((first, errno));
            }
            rest = PageRange::new(first + 1, rest.end() - first - 1);
        }
        Ok(())
    }

    /// Checks the kernel's EEXIST. On hugetlbfs the kernel returns it also when the pool of huge
    /// pages is empty. To believe it would throw the content away, and the guest would read zero
    /// later.
    fn check_present(&self, at: usize, host_page: u64) -> Result<(), Failed> {
        if self.mappings.all()[at].unit == PAGE_SIZE {
            return Ok(());
        }
        match self.uffd.is_populated(self.addresses(at, PageRange::new(host_page, 1))) {
            Ok(true) => Ok(()),
            Ok(false) => Err((host_page, Errno::NOMEM)),
            Err(errno) => Err((host_page, errno)),
        }
    }

    /// Wakes the threads that wait for a host page. They touch the page again.
    pub(super) fn wake(&self, at: usize, host_pages: PageRange) {
        // Fails only if nothing is mapped there any more. Then nobody waits.
        let _ = self.uffd.wake(self.addresses(at, host_pages));
    }

    /// The error of the block at index `at`.
    pub(super) fn failed(&self, at: usize) -> impl Fn(Failed) -> PlaceError {
        let id = self.mappings.all()[at].id;
        move |(host_page, source)| PlaceError::Place { id, host_page, source }
    }

    /// Unregisters all mappings. Waiting threads touch their pages again.
    pub(super) fn unregister(&self) {
        for (at, mapping) in self.mappings.all().iter().enumerate() {
            let all = self.addresses(at, PageRange::new(0, mapping.length / mapping.unit));
            if let Err(errno) = self.uffd.unregister(all) {
                log::warn!(
                    "block {}: cannot unregister {:#x} + {:#x}: {errno}",
                    mapping.id,
                    all.start,
                    all.length
                );
            }
        }
    }
}
