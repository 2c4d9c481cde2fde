// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Write-protect scanning: the agent asks the kernel which pages of the VMM's mapping were written.
//!
//! The VMM registers its mapping for asynchronous write protection and passes its
//! `/proc/self/pagemap`. One `PAGEMAP_SCAN` reports the pages that were written since they were
//! last protected, and protects them again. The kernel does both for each page in one step, so a
//! write is reported by this scan or by the next one
//! ([`clear-then-read`](crate::invariants#clear-then-read)). A scan allocates page tables in the
//! VMM, and never a page ([`never-populate`](crate::invariants#never-populate)).
//!
//! For the kernel, a page is "written" if it is not protected. So a scan may report pages that were
//! not written, and these are at worst sent once more:
//!
//! - The first scan reports every page of the VMM's mapping.
//! - Pages that were never touched are reported once if they share a page table (2 MiB of
//!   addresses) with a page that was. The scan protects them, too.
//! - A page whose entry the kernel has dropped to reclaim the page counts as written, if it was
//!   written when the entry was dropped.
//!
//! Numbers and layouts: `linux/fs.h`. Semantics: `Documentation/admin-guide/mm/pagemap.rst`. Linux
//! 6.7.
#![allow(unsafe_code)]

use pageferry_protocol::memory::{HUGE_PAGE, PAGE_SIZE};
use rustix::io::Errno;
use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, ioctl, opcode};
use std::cell::Cell;
use std::ffi::c_void;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// The most runs of written pages that one call can report, in 96 KiB. A run costs 24 bytes,
/// whatever its length.
const REGIONS: u64 = 4096;

thread_local! {
    /// The buffer of the last walk of this thread: a sync makes many.
    static BUFFER: Cell<Vec<PageRegion>> = const { Cell::new(Vec::new()) };
}

/// `PAGE_IS_WPALLOWED`: the mapping is registered. So it is true for each page of it.
const PAGE_IS_WPALLOWED: u64 = 1 << 0;

/// `PAGE_IS_WRITTEN`. A scan for this category alone takes the kernel's fast path.
const PAGE_IS_WRITTEN: u64 = 1 << 1;

/// `PAGE_IS_HUGE`: mapped by one page table entry for 2 MiB.
const PAGE_IS_HUGE: u64 = 1 << 6;

/// `PAGE_IS_PFNZERO`: the entry leads to the kernel's page of zeroes.
const PAGE_IS_PFNZERO: u64 = 1 << 5;

/// `PM_SCAN_WP_MATCHING`: write-protect the reported pages.
const SCAN_WP_MATCHING: u64 = 1 << 0;

/// `PM_SCAN_CHECK_WPASYNC`: fail on a mapping that is not registered, instead of skipping it.
const SCAN_CHECK_WPASYNC: u64 = 1 << 1;

/// Entries for 2 MiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Huge {
    /// All of them.
    All,
    /// Those of which a part was written since the last [`Pagemap::scan`].
    Written,
}

/// Pages of a private mapping.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pages {
    /// Those whose entry leads to the kernel's page of zeroes.
    Zero,
    /// All others, with and without an entry.
    NotZero,
}

impl Pages {
    fn target(self) -> Target {
        let inverted = if self == Self::NotZero { PAGE_IS_PFNZERO } else { 0 };
        Target { category: PAGE_IS_PFNZERO, inverted, flags: 0, most: 0 }
    }
}

/// The pages that a scan looks for, and what it does with them.
#[derive(Debug, Clone, Copy)]
struct Target {
    category: u64,
    /// Those of the categories that a page must not have.
    inverted: u64,
    flags: u64,
    /// The most pages to report; 0 for all.
    most: u64,
}

impl Target {
    const fn new(category: u64, flags: u64) -> Self {
        Self { category, inverted: 0, flags, most: 0 }
    }
}

/// Written pages, which are protected again.
const WRITTEN: Target = Target::new(PAGE_IS_WRITTEN, SCAN_WP_MATCHING | SCAN_CHECK_WPASYNC);

/// All pages, which are protected, also those that nobody has touched.
const ALL: Target = Target::new(PAGE_IS_WPALLOWED, SCAN_WP_MATCHING | SCAN_CHECK_WPASYNC);

/// `PROC_SUPER_MAGIC` of `linux/magic.h`.
const PROC_SUPER_MAGIC: u64 = 0x9fa0;

/// `struct pm_scan_arg`.
#[repr(C)]
#[derive(Debug, Default, Clone, Copy)]
struct ScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// `struct page_region`: a run of pages as addresses. The end is exclusive.
#[repr(C)]
#[derive(Debug, Default, Clone, Copy)]
struct PageRegion {
    start: u64,
    end: u64,
    categories: u64,
}

const PAGEMAP_SCAN: Opcode = opcode::read_write::<ScanArg>(b'f', 16);

/// Why a pagemap, or a range of it, cannot be scanned.
#[derive(Debug, thiserror::Error)]
pub enum PagemapError {
    /// The fd belongs to a file that is not in /proc.
    #[error(
        "not a pagemap: the fd belongs to a file system of type {kind:#x}, not of /proc ({PROC_SUPER_MAGIC:#x})"
    )]
    NotProc {
        /// `f_type` of the file system.
        kind: u64,
    },
    /// The fd does not answer `PAGEMAP_SCAN`.
    #[error("not a pagemap, or this kernel has no PAGEMAP_SCAN (Linux 6.7 has it)")]
    NoScan {
        /// The kernel's error.
        #[source]
        source: Errno,
    },
    /// A process cannot have these addresses.
    #[error("range {address:#x} + {length:#x} is not a range of page-aligned user addresses")]
    Range {
        /// First address.
        address: u64,
        /// Length in bytes.
        length: u64,
    },
    /// A mapping in the range is not registered for asynchronous write protection.
    #[error(
        "the mapping in {start:#x}..{end:#x} is not registered with a userfaultfd for WP_ASYNC"
    )]
    NotRegistered {
        /// Start of the scan.
        start: u64,
        /// End of the scan.
        end: u64,
    },
    /// The kernel refused for another reason.
    #[error("cannot scan {start:#x}..{end:#x}")]
    Scan {
        /// Start of the scan.
        start: u64,
        /// End of the scan.
        end: u64,
        /// The kernel's error.
        #[source]
        source: Errno,
    },
    /// The kernel reported no progress, so the scan would never end.
    #[error("the scan of {start:#x}..{end:#x} makes no progress at {walk_end:#x}")]
    Stalled {
        /// Start of the scan.
        start: u64,
        /// End of the scan.
        end: u64,
        /// The address that the scan has reached.
        walk_end: u64,
    },
}

/// The pagemap of a VMM. Several threads may scan it at once: the kernel locks the VMM's address
/// space for reading, and a table of pages (2 MiB) at a time.
#[derive(Debug)]
pub struct Pagemap {
    fd: OwnedFd,
}

impl Pagemap {
    /// Checks the pagemap that a VMM passed.
    ///
    /// # Errors
    /// If the fd is of another kind, or the kernel cannot scan. This cannot find out whose pagemap
    /// it is.
    pub fn new(fd: OwnedFd) -> Result<Self, PagemapError> {
        let statfs = rustix::fs::fstatfs(&fd).map_err(|source| PagemapError::NoScan { source })?;
        // The type of the field differs between architectures.
        #[allow(clippy::unnecessary_cast)]
        let kind = statfs.f_type as u64;
        if kind != PROC_SUPER_MAGIC {
            return Err(PagemapError::NotProc { kind });
        }
        // An empty range: the kernel checks the arguments, and scans nothing.
        scan_once(fd.as_fd(), 0, 0, WRITTEN, &mut [PageRegion::default()])
            .map_err(|source| PagemapError::NoScan { source })?;
        Ok(Self { fd })
    }

    /// Reports and protects the pages that were written in `length` bytes from `address` of the
    /// VMM. `found` gets the runs in ascending order: the first address, and the address after the
    /// last. Addresses where the VMM has no mapping are skipped without an error. After the VMM has
    /// exited, so are all addresses.
    ///
    /// # Errors
    /// If a mapping in the range is not registered, or an address is not a user address. After an
    /// error, pages may have been protected without being reported. A caller that continues must
    /// treat the whole range as written.
    pub fn scan(
        &self, address: u64, length: u64, found: impl FnMut(u64, u64),
    ) -> Result<(), PagemapError> {
        self.walk(address, length, WRITTEN, found)
    }

    /// Finds the pages that the VMM has mapped by an entry for 2 MiB. For such a page,
    /// [`Pagemap::scan`] cannot tell which part of the entry was written. Changes nothing.
    ///
    /// # Errors
    /// As [`Pagemap::scan`].
    pub fn huge(
        &self, which: Huge, address: u64, length: u64, found: impl FnMut(u64, u64),
    ) -> Result<(), PagemapError> {
        let category = match which {
            Huge::All => PAGE_IS_HUGE,
            Huge::Written => PAGE_IS_HUGE | PAGE_IS_WRITTEN,
        };
        self.walk(address, length, Target::new(category, 0), found)
    }

    /// Makes single pages of the entry for 2 MiB at `address`, and protects them. What was written
    /// since the last [`Pagemap::scan`] is not reported any more. If nothing was, the entry stays.
    ///
    /// # Errors
    /// As [`Pagemap::scan`].
    pub fn split(&self, address: u64) -> Result<(), PagemapError> {
        // The kernel protects an entry as it is if it is asked for all of it.
        let half = HUGE_PAGE / 2;
        self.protect_all(address, half)?;
        self.protect_all(address + half, half)
    }

    /// Protects all pages, also those that nobody has touched. What was written since the last
    /// [`Pagemap::scan`] is not reported any more. An entry for 2 MiB that was written, and of
    /// which the range has only a part, becomes single pages. Where there is no entry, none comes
    /// later.
    ///
    /// # Errors
    /// As [`Pagemap::scan`].
    pub fn protect_all(&self, address: u64, length: u64) -> Result<(), PagemapError> {
        self.walk(address, length, ALL, |_, _| ())
    }

    /// Finds pages of a private mapping, as [`Pagemap::scan`] does. Changes nothing.
    ///
    /// # Errors
    /// As [`Pagemap::scan`].
    pub fn runs(
        &self, pages: Pages, address: u64, length: u64, found: impl FnMut(u64, u64),
    ) -> Result<(), PagemapError> {
        self.walk(address, length, pages.target(), found)
    }

    /// The address of the first such page. Looks no further.
    ///
    /// # Errors
    /// As [`Pagemap::scan`].
    pub fn first(
        &self, pages: Pages, address: u64, length: u64,
    ) -> Result<Option<u64>, PagemapError> {
        let end = address.checked_add(length).ok_or(PagemapError::Range { address, length })?;
        let target = Target { most: 1, ..pages.target() };
        let mut region = [PageRegion::default()];
        match scan_once(self.fd.as_fd(), address, end, target, &mut region) {
            Ok((count, _)) => Ok((count > 0).then_some(region[0].start)),
            Err(Errno::SRCH) => Ok(None),
            Err(Errno::FAULT | Errno::INVAL) => Err(PagemapError::Range { address, length }),
            Err(source) => Err(PagemapError::Scan { start: address, end, source }),
        }
    }

    fn walk(
        &self, address: u64, length: u64, wanted: Target, mut found: impl FnMut(u64, u64),
    ) -> Result<(), PagemapError> {
        let end = address.checked_add(length).ok_or(PagemapError::Range { address, length })?;
        // As many runs as there can be at most. After an error the buffer is not kept.
        let most = (length / PAGE_SIZE).clamp(1, REGIONS) as usize;
        let mut buffer = BUFFER.take();
        buffer.resize(buffer.len().max(most), PageRegion::default());
        let regions = &mut buffer[..most];
        let mut start = address;
        while start < end {
            let (count, walk_end) = match scan_once(self.fd.as_fd(), start, end, wanted, regions) {
                Ok(scanned) => scanned,
                // The VMM has exited. Some kernels return this error, others find no mappings.
                Err(Errno::SRCH) => return Ok(()),
                Err(Errno::FAULT | Errno::INVAL) => {
                    return Err(PagemapError::Range { address, length });
                }
                Err(Errno::PERM) => return Err(PagemapError::NotRegistered { start, end }),
                // Only a thread that is being killed gets EINTR, so there is no point in trying
                // again.
                Err(source) => return Err(PagemapError::Scan { start, end, source }),
            };
            for region in &regions[..count] {
                found(region.start, region.end);
            }
            // A full buffer ends the walk early. The next call continues where it stopped.
            if walk_end <= start {
                return Err(PagemapError::Stalled { start, end, walk_end });
            }
            start = walk_end;
        }
        BUFFER.set(buffer);
        Ok(())
    }
}

/// One call. Returns the number of regions found, and the address where the walk stopped.
fn scan_once(
    pagemap: BorrowedFd<'_>, start: u64, end: u64, wanted: Target, regions: &mut [PageRegion],
) -> Result<(usize, u64), Errno> {
    let mut arg = ScanArg {
        size: size_of::<ScanArg>() as u64,
        flags: wanted.flags,
        start,
        end,
        vec: regions.as_mut_ptr().expose_provenance() as u64,
        vec_len: regions.len() as u64,
        max_pages: wanted.most,
        category_inverted: wanted.inverted,
        category_mask: wanted.category,
        return_mask: wanted.category,
        ..ScanArg::default()
    };
    // SAFETY: the struct is the one for this ioctl number. The kernel writes to it, and writes at
    // most `vec_len` regions to `vec`; both live during the call. The call changes the protection
    // of pages in the VMM, which does not change the result of any access.
    let count = unsafe { ioctl(pagemap, Scan(&mut arg)) }?;
    // The kernel never returns more than `vec_len`. The slice does not rely on that.
    Ok((usize::try_from(count).unwrap_or(0).min(regions.len()), arg.walk_end))
}

/// `PAGEMAP_SCAN`: updates the struct, and returns the number of regions.
struct Scan<'a>(&'a mut ScanArg);

// SAFETY: this ioctl takes a pointer to the struct. It writes only to the struct and to what its
// `vec` points to.
unsafe impl Ioctl for Scan<'_> {
    type Output = IoctlOutput;
    const IS_MUTATING: bool = true;

    fn opcode(&self) -> Opcode {
        PAGEMAP_SCAN
    }

    fn as_ptr(&mut self) -> *mut c_void {
        std::ptr::from_mut(self.0).cast()
    }

    unsafe fn output_from_ptr(
        output: IoctlOutput, _: *mut c_void,
    ) -> rustix::io::Result<IoctlOutput> {
        Ok(output)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{Mode, OFlags};

    fn open(path: &str) -> OwnedFd {
        rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).unwrap()
    }

    impl Pagemap {
        /// The pagemap of this process. `None` if the kernel does not have this ioctl.
        pub(crate) fn own() -> Option<Self> {
            Self::new(open("/proc/self/pagemap"))
                .inspect_err(|error| eprintln!("skipped: {error}"))
                .ok()
        }
    }

    #[test]
    fn layout_is_the_kernel_headers() {
        assert_eq!(PAGEMAP_SCAN, 0xc060_6610);
        assert_eq!(size_of::<ScanArg>(), 96);
        assert_eq!(size_of::<PageRegion>(), 24);
    }

    #[test]
    fn fd_of_another_kind_is_refused() {
        let memfd =
            rustix::fs::memfd_create("not a pagemap", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        assert!(matches!(Pagemap::new(memfd), Err(PagemapError::NotProc { .. })));
        assert!(matches!(Pagemap::new(open("/dev/null")), Err(PagemapError::NotProc { .. })));
        assert!(matches!(Pagemap::new(open("/proc/self/maps")), Err(PagemapError::NoScan { .. })));
        let (pipe, _writer) = rustix::pipe::pipe().unwrap();
        assert!(matches!(Pagemap::new(pipe), Err(PagemapError::NotProc { .. })));
    }

    #[test]
    fn impossible_addresses_are_refused() {
        let Some(pagemap) = Pagemap::own() else { return };
        for (address, length) in
            [(0x1001, 0x1000), (u64::MAX - 0xfff, 0x2000), (1 << 63, 0x1000), (0x1000, 1 << 63)]
        {
            let error = pagemap.scan(address, length, |_, _| ()).unwrap_err();
            assert!(
                matches!(error, PagemapError::Range { .. }),
                "{address:#x} + {length:#x}: {error}"
            );
        }
    }

    #[test]
    fn unregistered_mapping_is_refused() {
        let Some(pagemap) = Pagemap::own() else { return };
        let page = Box::new([0u8; 8192]);
        let address = page.as_ptr() as u64 & !0xfff;
        let error = pagemap.scan(address, 4096, |_, _| ()).unwrap_err();
        assert!(matches!(error, PagemapError::NotRegistered { .. }), "{error}");
    }

    #[test]
    fn empty_range_and_unmapped_addresses_report_nothing() {
        let Some(pagemap) = Pagemap::own() else { return };
        pagemap.scan(0x1000, 0, |start, end| panic!("{start:#x}..{end:#x}")).unwrap();
        pagemap.scan(0x1000, 0x2000, |start, end| panic!("{start:#x}..{end:#x}")).unwrap();
    }
}
