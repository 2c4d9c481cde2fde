//! Write-protect scanning: which pages of the VMM's mapping were written, asked of the kernel from
//! the agent's process.
//!
//! The VMM registers its mapping for asynchronous write protection and passes its
//! `/proc/self/pagemap`. One `PAGEMAP_SCAN` both reports the pages that were written since they
//! were last protected and protects them again, each page in one step: a write is in this scan or
//! in the next (`clear-then-read`). It allocates page tables in the VMM, and never a page
//! (`never-populate`).
//!
//! "Written" is to the kernel whatever is not protected. So the first scan reports every page that
//! the VMM's mapping has, and pages that have never been touched may come with them where they
//! share a page table (2 MiB of addresses) with one that has: once, since the scan protects them,
//! too. An entry that the kernel dropped, to reclaim its page, counts as written as well, if it
//! was. All of these err on the side of sending a page once more.
//!
//! Numbers and layouts: `linux/fs.h`; semantics: `Documentation/admin-guide/mm/pagemap.rst`. Linux
//! 6.7.
#![allow(unsafe_code)]

use rustix::io::Errno;
use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, ioctl, opcode};
use std::ffi::c_void;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, PoisonError};

/// Runs of written pages that one call of the kernel can report: 96 KiB. A run costs 24 bytes,
/// however long it is.
const REGIONS: usize = 4096;

/// `PAGE_IS_WRITTEN`. Asked for alone, it is the kernel's fast path.
const PAGE_IS_WRITTEN: u64 = 1 << 1;

/// `PAGE_IS_HUGE`: mapped by one entry for 2 MiB.
const PAGE_IS_HUGE: u64 = 1 << 6;

/// `PM_SCAN_WP_MATCHING`: protect what is reported.
const SCAN_WP_MATCHING: u64 = 1 << 0;

/// `PM_SCAN_CHECK_WPASYNC`: fail on a mapping that is not registered, instead of passing over it.
const SCAN_CHECK_WPASYNC: u64 = 1 << 1;

/// What a walk looks for, and does about it.
#[derive(Debug, Clone, Copy)]
struct What {
    category: u64,
    flags: u64,
}

/// Written pages, which are protected again.
const WRITTEN: What =
    What { category: PAGE_IS_WRITTEN, flags: SCAN_WP_MATCHING | SCAN_CHECK_WPASYNC };
/// Pages that share an entry with others.
const HUGE: What = What { category: PAGE_IS_HUGE, flags: 0 };

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

/// `struct page_region`: a run of pages by its addresses, the end exclusive.
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
    /// The fd is of a file that is not in /proc.
    #[error(
        "not a pagemap: the fd is of a file system of type {kind:#x}, not of /proc ({PROC_SUPER_MAGIC:#x})"
    )]
    NotProc {
        /// `f_type` of the file system.
        kind: u64,
    },
    /// The fd does not answer `PAGEMAP_SCAN`.
    #[error("not a pagemap, or no PAGEMAP_SCAN in this kernel (Linux 6.7 has it)")]
    NoScan {
        /// What the kernel said.
        #[source]
        source: Errno,
    },
    /// The addresses are none that a process can have.
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
        /// Where the scan began.
        start: u64,
        /// Where it was to end.
        end: u64,
    },
    /// The kernel refused for another reason.
    #[error("cannot scan {start:#x}..{end:#x}")]
    Scan {
        /// Where the scan began.
        start: u64,
        /// Where it was to end.
        end: u64,
        /// What the kernel said.
        #[source]
        source: Errno,
    },
    /// The kernel reported no progress; going on would never end.
    #[error("the scan of {start:#x}..{end:#x} stands still at {walk_end:#x}")]
    Stalled {
        /// Where the scan began.
        start: u64,
        /// Where it was to end.
        end: u64,
        /// Where the kernel says it is.
        walk_end: u64,
    },
}

/// The pagemap of a VMM. Any thread may scan; scans take turns.
#[derive(Debug)]
pub struct Pagemap {
    fd: OwnedFd,
    regions: Mutex<Vec<PageRegion>>,
}

impl Pagemap {
    /// Takes the pagemap that a VMM passed.
    ///
    /// # Errors
    /// If the fd is of anything else, or the kernel cannot scan. Whose pagemap it is cannot be
    /// told.
    pub fn new(fd: OwnedFd) -> Result<Self, PagemapError> {
        let statfs = rustix::fs::fstatfs(&fd).map_err(|source| PagemapError::NoScan { source })?;
        // The type of the field differs between architectures.
        #[allow(clippy::unnecessary_cast)]
        let kind = statfs.f_type as u64;
        if kind != PROC_SUPER_MAGIC {
            return Err(PagemapError::NotProc { kind });
        }
        // An empty range: the kernel checks the arguments, and walks nothing.
        let mut regions = vec![PageRegion::default(); REGIONS];
        scan_once(fd.as_fd(), 0, 0, WRITTEN, &mut regions)
            .map_err(|source| PagemapError::NoScan { source })?;
        Ok(Self { fd, regions: Mutex::new(regions) })
    }

    /// Reports and protects the pages that were written in `length` bytes from `address` of the
    /// VMM: `found` gets the runs in ascending order, as first address and address after the last.
    /// AddressRange where the VMM has no mapping are passed over in silence; so is everything once
    /// the VMM has exited.
    ///
    /// # Errors
    /// If something in the range is not registered, or not a user address. After an error pages may
    /// have been protected without being reported: whoever goes on has to take the whole range as
    /// written.
    pub fn scan(
        &self, address: u64, length: u64, found: impl FnMut(u64, u64),
    ) -> Result<(), PagemapError> {
        self.walk(address, length, WRITTEN, found)
    }

    /// Finds the pages that the VMM has mapped by an entry for 2 MiB: [`Pagemap::scan`] cannot tell
    /// one such page from its neighbours. Changes nothing.
    ///
    /// # Errors
    /// As [`Pagemap::scan`].
    pub fn huge(
        &self, address: u64, length: u64, found: impl FnMut(u64, u64),
    ) -> Result<(), PagemapError> {
        self.walk(address, length, HUGE, found)
    }

    fn walk(
        &self, address: u64, length: u64, what: What, mut found: impl FnMut(u64, u64),
    ) -> Result<(), PagemapError> {
        let end = address.checked_add(length).ok_or(PagemapError::Range { address, length })?;
        let mut regions = self.regions.lock().unwrap_or_else(PoisonError::into_inner);
        let mut start = address;
        while start < end {
            let (count, walk_end) = match scan_once(self.fd.as_fd(), start, end, what, &mut regions)
            {
                Ok(scanned) => scanned,
                // The VMM has exited: some kernels say so, others walk over the nothing that it
                // left.
                Err(Errno::SRCH) => return Ok(()),
                Err(Errno::FAULT | Errno::INVAL) => {
                    return Err(PagemapError::Range { address, length });
                }
                Err(Errno::PERM) => return Err(PagemapError::NotRegistered { start, end }),
                // EINTR comes to a thread that is being killed, and to no other: nothing to be
                // tried again.
                Err(source) => return Err(PagemapError::Scan { start, end, source }),
            };
            for region in &regions[..count] {
                found(region.start, region.end);
            }
            // A full buffer ends the walk early; the next call goes on where it stopped.
            if walk_end <= start {
                return Err(PagemapError::Stalled { start, end, walk_end });
            }
            start = walk_end;
        }
        Ok(())
    }
}

/// One call: the number of regions found, and the address where the walk stopped.
fn scan_once(
    pagemap: BorrowedFd<'_>, start: u64, end: u64, what: What, regions: &mut [PageRegion],
) -> Result<(usize, u64), Errno> {
    let mut arg = ScanArg {
        size: size_of::<ScanArg>() as u64,
        flags: what.flags,
        start,
        end,
        vec: regions.as_mut_ptr().expose_provenance() as u64,
        vec_len: regions.len() as u64,
        category_mask: what.category,
        return_mask: what.category,
        ..ScanArg::default()
    };
    // SAFETY: the struct is the one of this number; the kernel writes it, and at most `vec_len`
    // regions at `vec`, which both live through the call. Protection is changed in the VMM, where
    // it changes no access's outcome.
    let count = unsafe { ioctl(pagemap, Scan(&mut arg)) }?;
    // Never more than there is room for; the slice is not to depend on that.
    Ok((usize::try_from(count).unwrap_or(0).min(regions.len()), arg.walk_end))
}

/// `PAGEMAP_SCAN`: the struct is updated, and the return value is the number of regions.
struct Scan<'a>(&'a mut ScanArg);

// SAFETY: the number takes a pointer to the struct, and writes nothing but that and what its `vec`
// points to.
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
        /// That of this process, unless the kernel is older than the scan.
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
    fn an_fd_of_something_else_is_refused() {
        let memfd =
            rustix::fs::memfd_create("not a pagemap", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        assert!(matches!(Pagemap::new(memfd), Err(PagemapError::NotProc { .. })));
        assert!(matches!(Pagemap::new(open("/dev/null")), Err(PagemapError::NotProc { .. })));
        assert!(matches!(Pagemap::new(open("/proc/self/maps")), Err(PagemapError::NoScan { .. })));
        let (pipe, _writer) = rustix::pipe::pipe().unwrap();
        assert!(matches!(Pagemap::new(pipe), Err(PagemapError::NotProc { .. })));
    }

    #[test]
    fn addresses_that_no_process_has_are_refused() {
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
    fn what_is_not_registered_is_refused() {
        let Some(pagemap) = Pagemap::own() else { return };
        let page = Box::new([0u8; 8192]);
        let address = page.as_ptr() as u64 & !0xfff;
        let error = pagemap.scan(address, 4096, |_, _| ()).unwrap_err();
        assert!(matches!(error, PagemapError::NotRegistered { .. }), "{error}");
    }

    #[test]
    fn an_empty_range_and_unmapped_addresses_have_nothing_to_report() {
        let Some(pagemap) = Pagemap::own() else { return };
        pagemap.scan(0x1000, 0, |start, end| panic!("{start:#x}..{end:#x}")).unwrap();
        pagemap.scan(0x1000, 0x2000, |start, end| panic!("{start:#x}..{end:#x}")).unwrap();
    }
}
