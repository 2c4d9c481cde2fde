// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A mapping of guest memory as QEMU and others make it: at an address that fits huge pages.
//!
//! [`TestMemory`](crate::memory::TestMemory) maps anywhere, so the kernel maps its huge pages in
//! single pages.
#![allow(unsafe_code)]

use crate::Error;
use rustix::mm::{MapFlags, MlockFlags, ProtFlags, mlock_with, mmap, mmap_anonymous, munmap};
use std::ffi::c_void;
use std::fs::File;
use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes of a huge page.
const HUGE_PAGE: usize = 2 << 20;

/// A shared mapping of a file.
#[derive(Debug)]
pub struct GuestMapping {
    /// All of the address space that was taken.
    taken: *mut c_void,
    start: *mut c_void,
    length: usize,
}

// SAFETY: the memory is only accessed by atomic operations.
unsafe impl Send for GuestMapping {}
// SAFETY: as above.
unsafe impl Sync for GuestMapping {}

impl GuestMapping {
    /// Maps the first `length` bytes of `file`, which must not shrink.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn new(file: &File, length: usize) -> Result<Self, Error> {
        let (access, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED);
        let (nothing, all) = (MapFlags::PRIVATE | MapFlags::NORESERVE, length + HUGE_PAGE);
        // SAFETY: a new mapping at an address of the kernel's choosing touches nothing that exists.
        let taken =
            unsafe { mmap_anonymous(std::ptr::null_mut(), all, ProtFlags::empty(), nothing) };
        let taken = taken.map_err(Error::kernel("find room for guest memory"))?;
        let skip = taken.addr().next_multiple_of(HUGE_PAGE) - taken.addr();
        let start = taken.wrapping_byte_add(skip);
        let mapping = Self { taken, start, length };
        // SAFETY: the range lies in what was taken above, and nothing else uses that.
        let mapped = unsafe { mmap(start, length, access, flags | MapFlags::FIXED, file, 0) };
        mapped.map_err(Error::kernel("map guest memory"))?;
        Ok(mapping)
    }

    /// The address of the first byte.
    pub fn address(&self) -> u64 {
        self.start.expose_provenance() as u64
    }

    /// The word at this byte.
    ///
    /// # Panics
    /// If the word is not aligned, or not in the mapping.
    pub fn word(&self, byte: usize) -> &AtomicU64 {
        assert!(byte.is_multiple_of(8) && byte + 8 <= self.length, "a word at {byte:#x}");
        // SAFETY: as just checked, the word is aligned and lies in the mapping, which lives as long
        // as this. Atomic integers have no invalid values.
        unsafe { AtomicU64::from_ptr(self.start.wrapping_byte_add(byte).cast()) }
    }

    /// Adds 1 to the word at this byte.
    ///
    /// # Panics
    /// If the word is not aligned, or not in the mapping.
    pub fn count(&self, byte: usize) {
        self.word(byte).fetch_add(1, Ordering::Relaxed);
    }
}

/// Locks memory that is mapped in this process, so that it is never swapped out. Pages that are not
/// there are not made.
///
/// # Errors
/// If the kernel refuses.
pub fn lock_memory(address: u64, length: u64) -> Result<(), Error> {
    let start = std::ptr::with_exposed_provenance_mut(address as usize);
    // SAFETY: the kernel neither reads nor writes the memory, and nobody can tell a difference.
    let locked = unsafe { mlock_with(start, length as usize, MlockFlags::ONFAULT) };
    locked.map_err(Error::kernel("lock memory"))
}

impl Drop for GuestMapping {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and nobody has a reference into it.
        let unmapped = unsafe { munmap(self.taken, self.length + HUGE_PAGE) };
        if let Err(errno) = unmapped {
            log::warn!("guest memory stays mapped: {errno}");
        }
    }
}
