// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The memory file of a block.
//!
//! The agent never maps guest memory here. It reads with `pread`: a hole reads as zero and is not
//! allocated ([`never-populate`](crate::invariants#never-populate)), a truncated file is a short
//! read instead of SIGBUS ([`vmm-survives`](crate::invariants#vmm-survives)), and there is no page
//! fault.

use super::clone_view::CloneView;
use super::extents::DataRuns;
use crate::pagemap::PagemapError;
use pageferry_protocol::control::clones::GiveBackTo;
use pageferry_protocol::memory::file::{MemoryFile, MemoryFileError};
use pageferry_protocol::memory::{PAGE_SIZE, PageRange};

pub use pageferry_protocol::memory::file::BackingKind;
use pageferry_protocol::userfault::UserfaultError;
use rustix::fs::{FallocateFlags, SeekFrom};
use rustix::io::Errno;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// The checked part of a file that is the memory of a block.
#[derive(Debug)]
pub struct Backing {
    fd: OwnedFd,
    offset: u64,
    length: u64,
    file: MemoryFile,
    /// The private mapping of the file that is the memory of a clone. The file itself is the base.
    clone: Option<CloneView>,
}

/// Why a file cannot be the memory of a block, or cannot be read or changed.
#[derive(Debug, thiserror::Error)]
pub enum BackingError {
    /// The file is not suitable.
    #[error(transparent)]
    File(#[from] MemoryFileError),
    /// A read or write reached the end of the file.
    #[error("file was truncated: it ends before byte {end:#x} of the block")]
    Truncated {
        /// The end of the access, in bytes from the start of the block.
        end: u64,
    },
    /// A write through a mapping raised SIGBUS.
    #[error(
        "the memory went away while byte {at:#x} of the block was written: the file was \
         truncated, its file system is full, or the memory has failed"
    )]
    Lost {
        /// Where the write began, in bytes from the start of the block.
        at: u64,
    },
    /// The pool has no huge page left.
    #[error("no huge page of {} kB is free for byte {at:#x} of the block: raise {pool}/nr_hugepages", size >> 10)]
    NoHugePage {
        /// Where it is needed, in bytes from the start of the block.
        at: u64,
        /// Size of a huge page in bytes.
        size: u64,
        /// The folder in which the kernel shows the pool.
        pool: String,
    },
    /// A userfaultfd cannot place pages into it.
    #[error("cannot place single pages")]
    Userfault {
        /// The cause.
        #[source]
        source: UserfaultError,
    },
    /// The pages of a clone cannot be looked at.
    #[error("cannot look for holes at byte {at:#x} of the block")]
    Pagemap {
        /// Where, in bytes from the start of the block.
        at: u64,
        /// The cause.
        #[source]
        source: PagemapError,
    },
    /// The kernel refused.
    #[error("cannot {what} at byte {at:#x} of the block")]
    Kernel {
        /// What was tried.
        what: &'static str,
        /// Where, in bytes from the start of the block.
        at: u64,
        /// The kernel's error.
        #[source]
        source: Errno,
    },
}

impl Backing {
    /// Checks that `length` bytes of `fd` from `offset` can be the memory of a block.
    ///
    /// # Errors
    /// What is wrong with the file.
    pub fn new(fd: OwnedFd, offset: u64, length: u64) -> Result<Self, BackingError> {
        let file = MemoryFile::check(fd.as_fd(), offset, length)?;
        Ok(Self { fd, offset, length, file, clone: None })
    }

    /// Checks that `length` bytes of `fd` from `offset` can be the base of a clone's block, whose
    /// memory is `view`.
    ///
    /// # Errors
    /// What is wrong with the file.
    pub fn of_clone(
        fd: OwnedFd, offset: u64, length: u64, view: CloneView,
    ) -> Result<Self, BackingError> {
        let file = MemoryFile::check_base(fd.as_fd(), offset, length)?;
        Ok(Self { fd, offset, length, file, clone: Some(view) })
    }

    /// The same file, treated as hugetlbfs with host pages of `size` bytes: the machine that runs
    /// the test may have no huge pages.
    #[cfg(test)]
    pub(crate) fn with_huge_pages(self, size: u64) -> Self {
        let file = MemoryFile { kind: BackingKind::Hugetlb, host_page_size: size, ..self.file };
        Self { file, ..self }
    }

    /// The kind of file.
    pub fn kind(&self) -> BackingKind {
        self.file.kind
    }

    /// The size of a host page: the unit in which the file allocates, in bytes.
    pub fn host_page_size(&self) -> u64 {
        self.file.host_page_size
    }

    /// How many bytes a write into a hole allocates at present. It is more than a page where tmpfs
    /// hands out huge pages, which it reports as `st_blksize`. A remount can change that, and for
    /// memfds a setting of the kernel.
    pub fn write_unit(&self) -> u64 {
        match self.file.kind {
            BackingKind::Shmem => {
                rustix::fs::fstat(&self.fd).map_or(PAGE_SIZE, |stat| stat.st_blksize as u64)
            }
            BackingKind::Hugetlb | BackingKind::File | BackingKind::Clone => {
                self.file.host_page_size
            }
        }
    }

    /// True if the file cannot shrink.
    pub fn is_sealed(&self) -> bool {
        self.file.sealed
    }

    /// True unless the file is sealed against writing (`F_SEAL_WRITE`, `F_SEAL_FUTURE_WRITE`). A
    /// guest cannot be placed into a sealed file: nothing can be written or freed in it.
    pub fn is_writable(&self) -> bool {
        self.file.writable
    }

    /// The number of pages of the block that are allocated. Known only for a memfd or a file on
    /// tmpfs, and only if the block is the whole file.
    pub fn exactly_allocated_pages(&self) -> Option<u64> {
        let stat = rustix::fs::fstat(&self.fd).ok()?;
        let is_all = self.offset == 0 && u64::try_from(stat.st_size) == Ok(self.length);
        // On every file system, the kernel counts in units of 512 bytes.
        (self.kind() == BackingKind::Shmem && is_all)
            .then_some(stat.st_blocks as u64 * 512 / PAGE_SIZE)
    }

    /// True if [`Backing::first_data`] reports holes page by page.
    pub fn tells_holes(&self) -> bool {
        matches!(self.file.kind, BackingKind::Shmem | BackingKind::Clone)
    }

    /// The file.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// The place of `byte` of the block in the file.
    pub fn file_offset(&self, byte: u64) -> u64 {
        self.offset + byte
    }

    /// Fills `buffer` from byte `at` of the block.
    ///
    /// # Errors
    /// If the file was truncated, or the kernel refuses.
    pub fn read(&self, at: u64, buffer: &mut [u8]) -> Result<(), BackingError> {
        if let Some(clone) = &self.clone {
            return clone.read(at, buffer);
        }
        let end = at + buffer.len() as u64;
        let mut done = 0;
        while done < buffer.len() {
            match rustix::io::pread(&self.fd, &mut buffer[done..], self.offset + at + done as u64) {
                Ok(0) => return Err(BackingError::Truncated { end }),
                Ok(count) => done += count,
                Err(Errno::INTR) => {}
                Err(source) => return Err(BackingError::Kernel { what: "read", at, source }),
            }
        }
        Ok(())
    }

    /// Writes `bytes` to byte `at` of the block. Not for hugetlbfs, which has no `write`, and not
    /// for a clone, whose base is not its own.
    ///
    /// # Errors
    /// If the file was truncated, or the kernel refuses.
    pub fn write(&self, at: u64, bytes: &[u8]) -> Result<(), BackingError> {
        let end = at + bytes.len() as u64;
        self.check_size(end)?;
        let mut done = 0;
        while done < bytes.len() {
            match rustix::io::pwrite(&self.fd, &bytes[done..], self.offset + at + done as u64) {
                Ok(0) => return Err(BackingError::Truncated { end }),
                Ok(count) => done += count,
                Err(Errno::INTR) => {}
                Err(source) => return Err(BackingError::Kernel { what: "write", at, source }),
            }
        }
        Ok(())
    }

    /// Checks that a write does not go past the end of the file. Such a write would make a
    /// truncated file grow again, while the guest has lost its mapping. A sealed file needs no
    /// check.
    fn check_size(&self, end: u64) -> Result<(), BackingError> {
        if self.file.sealed {
            return Ok(());
        }
        let stat = rustix::fs::fstat(&self.fd).map_err(|source| BackingError::Kernel {
            what: "fstat",
            at: end,
            source,
        })?;
        if (stat.st_size as u64) < self.offset + end {
            return Err(BackingError::Truncated { end });
        }
        Ok(())
    }

    /// Punches the host pages that lie completely in `range`. Returns the freed range, which may be
    /// smaller than `range` on large host pages.
    ///
    /// # Errors
    /// If the kernel or the file system refuses.
    pub fn punch(&self, range: PageRange) -> Result<PageRange, BackingError> {
        let unit = self.file.host_page_size / PAGE_SIZE;
        let first = range.first.next_multiple_of(unit);
        let inner = PageRange::new(first, (range.end() / unit * unit).saturating_sub(first));
        if inner.is_empty() {
            return Ok(inner);
        }
        if let Some(clone) = &self.clone {
            return clone.give_back(GiveBackTo::Zero, inner).map(|()| inner);
        }
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        loop {
            match rustix::fs::fallocate(
                &self.fd,
                flags,
                self.offset + inner.offset(),
                inner.bytes(),
            ) {
                Ok(()) => return Ok(inner),
                Err(Errno::INTR) => {}
                Err(source) => {
                    return Err(BackingError::Kernel {
                        what: "punch a hole",
                        at: inner.offset(),
                        source,
                    });
                }
            }
        }
    }

    /// Makes all of the block a hole; a clone becomes what its base is. The kernel is asked also
    /// for what looks like a hole: pages that were reserved (`fallocate`) and never written are
    /// reported as holes, but they exist, so a touch of one would not be a missing fault.
    ///
    /// # Errors
    /// If the kernel or the file system refuses.
    pub fn empty(&self) -> Result<(), BackingError> {
        let all = PageRange::new(0, self.length / PAGE_SIZE);
        match &self.clone {
            Some(clone) => clone.give_back(GiveBackTo::Base, all),
            None => self.punch(all).map(|_| ()),
        }
    }

    /// The first page in `range` that may be allocated. `None` if all of `range` is a hole. If the
    /// file does not report its holes, this is the first page of `range`.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn first_data(&self, range: PageRange) -> Result<Option<u64>, BackingError> {
        if range.is_empty() {
            return Ok(None);
        }
        if self.file.kind == BackingKind::Hugetlb {
            return Ok(Some(range.first));
        }
        if let Some(clone) = &self.clone {
            return clone.first_data(range);
        }
        let start = self.offset + range.offset();
        match rustix::fs::seek(&self.fd, SeekFrom::Data(start)) {
            Ok(data) if data < start + range.bytes() => Ok(Some((data - self.offset) / PAGE_SIZE)),
            Ok(_) => Ok(None),
            // No data from here to the end of the file. The file must not have become shorter than
            // the range.
            Err(Errno::NXIO) => {
                self.check_size(range.end().min(self.length / PAGE_SIZE) * PAGE_SIZE).map(|()| None)
            }
            Err(Errno::INVAL | Errno::OPNOTSUPP) => Ok(Some(range.first)),
            Err(source) => Err(BackingError::Kernel { what: "seek", at: range.offset(), source }),
        }
    }

    /// The first page of `range` that is a hole, or its end. The kernel looks at all pages until
    /// the next hole, even beyond `range`, so call this only if a hole is near.
    pub(super) fn first_hole(&self, range: PageRange) -> Result<u64, BackingError> {
        if let Some(clone) = &self.clone {
            return clone.first_hole(range);
        }
        match rustix::fs::seek(&self.fd, SeekFrom::Hole(self.offset + range.offset())) {
            Ok(hole) => Ok(((hole - self.offset) / PAGE_SIZE).clamp(range.first, range.end())),
            Err(Errno::NXIO | Errno::INVAL | Errno::OPNOTSUPP) => Ok(range.end()),
            Err(source) => Err(BackingError::Kernel { what: "seek", at: range.offset(), source }),
        }
    }

    /// About how many pages are allocated. Counts the whole file, even if the block is a part of
    /// it.
    pub fn allocated_pages(&self) -> u64 {
        if let Some(clone) = &self.clone {
            return clone.allocated_pages(PageRange::new(0, self.length / PAGE_SIZE));
        }
        let blocks = rustix::fs::fstat(&self.fd)
            .map_or(0, |stat| u64::try_from(stat.st_blocks).unwrap_or(0));
        (blocks * 512).min(self.length) / PAGE_SIZE
    }

    /// Walks over the runs of pages in `range` that may be allocated.
    pub fn data_runs(&self, range: PageRange) -> DataRuns<'_> {
        DataRuns::new(self, range)
    }

    /// Length of the block in bytes.
    pub fn length(&self) -> u64 {
        self.length
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{MemfdFlags, SealFlags, ftruncate, memfd_create};

    fn memfd(pages: u64) -> OwnedFd {
        let fd = memfd_create("ram", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
        ftruncate(&fd, pages * PAGE_SIZE).unwrap();
        fd
    }

    fn blocks(fd: impl AsFd) -> u64 {
        rustix::fs::fstat(fd).unwrap().st_blocks as u64 / 8
    }

    #[test]
    fn holes_stay_holes_and_truncation_is_an_error() {
        let fd = memfd(8);
        let copy = fd.try_clone().unwrap();
        let backing = Backing::new(fd, PAGE_SIZE, 7 * PAGE_SIZE).unwrap();
        assert!(!backing.is_sealed());
        let mut buffer = vec![1; 7 * PAGE_SIZE as usize];
        backing.read(0, &mut buffer).unwrap();
        assert!(buffer.iter().all(|byte| *byte == 0));
        assert_eq!(blocks(&copy), 0);
        ftruncate(&copy, 4 * PAGE_SIZE).unwrap();
        assert!(matches!(backing.read(0, &mut buffer), Err(BackingError::Truncated { .. })));
        assert!(matches!(backing.write(6 * PAGE_SIZE, &[1]), Err(BackingError::Truncated { .. })));
        assert_eq!(
            rustix::fs::fstat(&copy).unwrap().st_size as u64,
            4 * PAGE_SIZE,
            "writing must not make it grow"
        );
    }

    #[test]
    fn extents_and_punches_are_relative_to_the_block() {
        let fd = memfd(64);
        rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK).unwrap();
        let copy = fd.try_clone().unwrap();
        let backing = Backing::new(fd, 16 * PAGE_SIZE, 32 * PAGE_SIZE).unwrap();
        assert!(backing.is_sealed() && backing.tells_holes());
        for page in [15, 18, 19, 25, 48] {
            rustix::io::pwrite(&copy, &[1], page * PAGE_SIZE).unwrap();
        }
        let runs: Vec<PageRange> =
            backing.data_runs(PageRange::new(0, 32)).collect::<Result<_, _>>().unwrap();
        assert_eq!(runs, [PageRange::new(2, 2), PageRange::new(9, 1)]);
        assert_eq!(backing.punch(PageRange::new(3, 10)).unwrap(), PageRange::new(3, 10));
        assert_eq!(backing.first_data(PageRange::new(3, 29)).unwrap(), None);
        assert_eq!(blocks(&copy), 3);
    }
}
