// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Writes to hugetlbfs, and reservations of huge pages. hugetlbfs has no `write`, so the agent maps
//! one host page at a time. A reservation also needs a mapping.
#![allow(unsafe_code)]

use super::backing::{Backing, BackingError};
use super::bus_guard::GuardedRange;
use pageferry_protocol::memory::PageRange;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

/// A mapping of one host page of a file.
#[derive(Debug)]
pub struct HugeWindow {
    guard: GuardedRange,
    start: *mut u8,
    length: usize,
    /// The byte of the block at which the mapping starts.
    at: u64,
}

// SAFETY: the mapping belongs to this value alone, and is only written through `&mut self`.
unsafe impl Send for HugeWindow {}

impl HugeWindow {
    /// Maps the host page that holds `byte` of the block.
    ///
    /// # Errors
    /// If the kernel has no huge page left, or refuses otherwise.
    fn map(backing: &Backing, byte: u64) -> Result<Self, BackingError> {
        let unit = backing.host_page_size();
        let at = byte / unit * unit;
        let kernel = |source| match source {
            rustix::io::Errno::NOMEM => {
                BackingError::NoHugePage { at, size: unit, pool: super::pool::folder(unit) }
            }
            source => BackingError::Kernel { what: "map a host page", at, source },
        };
        let length = usize::try_from(unit).map_err(|_| kernel(rustix::io::Errno::INVAL))?;
        // SAFETY: a new mapping at an address of the kernel's choosing touches nothing that exists.
        let start = unsafe {
            mmap(
                std::ptr::null_mut(),
                length,
                ProtFlags::WRITE,
                MapFlags::SHARED,
                backing.fd(),
                backing.file_offset(at),
            )
        };
        let start: *mut u8 = start.map_err(kernel)?.cast();
        Ok(Self {
            guard: GuardedRange::new(start as usize..start as usize + length),
            start,
            length,
            at,
        })
    }

    fn covers(&self, byte: u64) -> bool {
        (self.at..self.at + self.length as u64).contains(&byte)
    }
}

impl Drop for HugeWindow {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and no borrow of it outlives `self`.
        let unmapped = unsafe { munmap(self.start.cast(), self.length) };
        debug_assert!(unmapped.is_ok(), "munmap of our own mapping");
    }
}

/// Writes to byte `at` of a block on hugetlbfs: the bytes, or the zeroes, of `bytes`. Keeps the
/// last host page mapped in `window`.
///
/// # Errors
/// If a host page cannot be mapped, or the file was truncated.
pub fn write(
    backing: &Backing, window: &mut Option<HugeWindow>, at: u64, bytes: Fill<'_>,
) -> Result<(), BackingError> {
    let mut done = 0;
    while done < bytes.len() {
        let byte = at + done as u64;
        if !window.as_ref().is_some_and(|window| window.covers(byte)) {
            *window = None;
            *window = Some(HugeWindow::map(backing, byte)?);
        }
        let Some(window) = window else { continue };
        let offset = (byte - window.at) as usize;
        let count = (bytes.len() - done).min(window.length - offset);
        // SAFETY: `offset + count` lies within the mapping. If the file loses its pages, the guard
        // replaces them. Other processes share this memory, but a copy of bytes has no invalid
        // values, and the guest does not run while it is placed.
        unsafe {
            let target = window.start.add(offset);
            match bytes {
                Fill::Bytes(bytes) => {
                    std::ptr::copy_nonoverlapping(bytes[done..].as_ptr(), target, count)
                }
                Fill::Zero(_) => std::ptr::write_bytes(target, 0, count),
            }
        }
        if window.guard.was_lost() {
            return Err(BackingError::Truncated { end: byte + count as u64 });
        }
        done += count;
    }
    Ok(())
}

/// Has the kernel reserve those huge pages of `range` that are neither allocated nor reserved.
/// `range` must be whole host pages. Nothing is allocated. See [`super::pool`].
///
/// # Errors
/// ENOMEM if the pool does not have enough huge pages.
pub fn reserve(backing: &Backing, range: PageRange) -> Result<(), BackingError> {
    let kernel =
        |source| BackingError::Kernel { what: "reserve huge pages", at: range.offset(), source };
    let length = usize::try_from(range.bytes()).map_err(|_| kernel(rustix::io::Errno::INVAL))?;
    // SAFETY: a new mapping at an address of the kernel's choosing touches nothing that exists, and
    // no access to this one is possible.
    let start = unsafe {
        mmap(
            std::ptr::null_mut(),
            length,
            ProtFlags::empty(),
            MapFlags::SHARED,
            backing.fd(),
            backing.file_offset(range.offset()),
        )
    };
    let start = start.map_err(kernel)?;
    // SAFETY: the mapping is ours, and nothing borrows from it.
    let unmapped = unsafe { munmap(start, length) };
    debug_assert!(unmapped.is_ok(), "munmap of our own mapping");
    Ok(())
}

/// The content to write.
#[derive(Debug, Clone, Copy)]
pub enum Fill<'a> {
    /// These bytes.
    Bytes(&'a [u8]),
    /// This number of zeroes.
    Zero(usize),
}

impl Fill<'_> {
    fn len(&self) -> usize {
        match self {
            Self::Bytes(bytes) => bytes.len(),
            Self::Zero(count) => *count,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::test_support::memfd;
    use pageferry_protocol::memory::PAGE_SIZE;
    use rustix::fs::ftruncate;

    const UNIT: u64 = 8 * PAGE_SIZE;

    /// Four host pages, and a second descriptor of their file.
    fn backing() -> (Backing, std::os::fd::OwnedFd) {
        let fd = memfd(4 * UNIT);
        let copy = fd.try_clone().unwrap();
        (Backing::new(fd, 0, 4 * UNIT).unwrap().with_huge_pages(UNIT), copy)
    }

    #[test]
    fn write_continues_in_the_next_host_page() {
        let (backing, _) = backing();
        let mut window = None;
        let bytes: Vec<u8> = (1..=3 * PAGE_SIZE).map(|byte| byte as u8).collect();
        let at = 2 * UNIT - 2 * PAGE_SIZE;
        write(&backing, &mut window, at, Fill::Bytes(&bytes)).unwrap();
        write(&backing, &mut window, at + PAGE_SIZE, Fill::Zero(PAGE_SIZE as usize)).unwrap();
        let mut expected = bytes.clone();
        expected[PAGE_SIZE as usize..2 * PAGE_SIZE as usize].fill(0);
        let mut found = vec![0; 5 * PAGE_SIZE as usize];
        backing.read(at - PAGE_SIZE, &mut found).unwrap();
        assert!(found[PAGE_SIZE as usize..4 * PAGE_SIZE as usize] == expected);
        assert!(found[..PAGE_SIZE as usize].iter().all(|byte| *byte == 0));
        assert!(found[4 * PAGE_SIZE as usize..].iter().all(|byte| *byte == 0));
    }

    #[test]
    fn truncated_file_is_an_error_with_its_place() {
        let (backing, file) = backing();
        ftruncate(&file, UNIT).unwrap();
        let at = 2 * UNIT + PAGE_SIZE;
        let error = write(&backing, &mut None, at, Fill::Bytes(&[1; 16])).unwrap_err();
        assert!(matches!(error, BackingError::Truncated { end } if end == at + 16), "{error}");
    }
}
