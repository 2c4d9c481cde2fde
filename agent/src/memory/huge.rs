//! Writing to hugetlbfs, which has no `write`: one host page is mapped at a time. And reserving
//! huge pages, which only a mapping does.
#![allow(unsafe_code)]

use super::backing::{Backing, BackingError};
use super::bus_guard::GuardedRange;
use pageferry_protocol::memory::PageRange;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

/// One host page of a file, mapped.
#[derive(Debug)]
pub struct HugeWindow {
    guard: GuardedRange,
    start: *mut u8,
    length: usize,
    /// Byte of the block at which the window starts.
    at: u64,
}

// SAFETY: the mapping belongs to the window alone and is only written through `&mut self`.
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
                ProtFlags::READ | ProtFlags::WRITE,
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

/// Writes `bytes` to byte `at` of a block on hugetlbfs, or zeroes as many as `None` stands for,
/// keeping the last host page mapped in `window`.
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
        // SAFETY: `offset + count` lies within the mapping, whose pages the guard replaces if the
        // file lost them; the guest's memory is shared with other processes, but a copy of bytes
        // has no invalid values, and the guest does not run while it is placed.
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

/// Has the kernel reserve the huge pages of `range`, whole host pages, that are neither allocated
/// nor reserved. Nothing is allocated. See [`super::pool`].
///
/// # Errors
/// ENOMEM if the pool does not have so many.
pub fn reserve(backing: &Backing, range: PageRange) -> Result<(), BackingError> {
    let kernel =
        |source| BackingError::Kernel { what: "reserve huge pages", at: range.offset(), source };
    let length = usize::try_from(range.bytes()).map_err(|_| kernel(rustix::io::Errno::INVAL))?;
    // SAFETY: a new mapping at an address of the kernel's choosing touches nothing that exists, and
    // nobody can touch this one.
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

/// What is written.
#[derive(Debug, Clone, Copy)]
pub enum Fill<'a> {
    /// These bytes.
    Bytes(&'a [u8]),
    /// So many zeroes.
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
