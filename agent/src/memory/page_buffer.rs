// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Page-aligned buffers for direct I/O, which does not use the page cache.
#![allow(unsafe_code)]

use pageferry_protocol::shm::MappingError;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};
use std::ops::{Deref, DerefMut};

/// Size of a huge page.
const HUGE: usize = 2 << 20;

/// A buffer that begins at a multiple of the page size, as direct I/O requires.
///
/// A buffer of 2 MiB or more begins at a multiple of 2 MiB and uses huge pages, if the kernel has
/// any. A disk request holds a limited number of separate pieces of memory, about 254, however many
/// bytes it may hold. With huge pages the buffer has few pieces, so the requests are larger.
#[derive(Debug)]
pub struct PageBuffer {
    mapping: *mut u8,
    mapped: usize,
    start: usize,
    length: usize,
}

// SAFETY: the mapping belongs to the buffer alone, and is accessed only through borrows of it.
unsafe impl Send for PageBuffer {}
// SAFETY: as above; through `&self` the mapping is only read.
unsafe impl Sync for PageBuffer {}

impl PageBuffer {
    /// `length` zero bytes.
    ///
    /// # Panics
    /// If the kernel has no memory for it.
    #[expect(
        clippy::expect_used,
        reason = "as for any other allocation; the panic ends one thread and not the process"
    )]
    pub fn new(length: usize) -> Self {
        Self::try_new(length).expect("memory for a buffer")
    }

    /// As [`PageBuffer::new`], but returns an error instead of a panic.
    ///
    /// # Errors
    /// If the kernel has no memory for it.
    pub fn try_new(length: usize) -> Result<Self, MappingError> {
        let mapped =
            if length >= HUGE { length.next_multiple_of(HUGE) + HUGE } else { length.max(1) };
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address of the kernel's choosing touches nothing that exists.
        let mapping =
            unsafe { mmap_anonymous(std::ptr::null_mut(), mapped, protection, MapFlags::PRIVATE) };
        let mapping = mapping
            .map_err(|errno| MappingError::Kernel { length: mapped as u64, source: errno })?;
        let start = if length >= HUGE { mapping.align_offset(HUGE).min(HUGE) } else { 0 };
        if length >= HUGE {
            // SAFETY: the range lies in the mapping, and the advice does not change its content. If
            // the kernel does not know the advice, nothing changes.
            let _ = unsafe {
                madvise(mapping.byte_add(start), length / HUGE * HUGE, Advice::LinuxHugepage)
            };
        }
        Ok(Self { mapping: mapping.cast(), mapped, start, length })
    }
}

impl Deref for PageBuffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: the bytes are mapped and readable until drop, and no thread writes them while
        // `self` is borrowed.
        unsafe { std::slice::from_raw_parts(self.mapping.add(self.start), self.length) }
    }
}

impl DerefMut for PageBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and writable; the borrow is the only one.
        unsafe { std::slice::from_raw_parts_mut(self.mapping.add(self.start), self.length) }
    }
}

impl Drop for PageBuffer {
    fn drop(&mut self) {
        // SAFETY: the mapping belongs to `self`, and no borrow of it outlives `self`.
        let unmapped = unsafe { munmap(self.mapping.cast(), self.mapped) };
        debug_assert!(unmapped.is_ok(), "munmap of the buffer");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pageferry_protocol::memory::PAGE_SIZE;

    #[test]
    fn a_buffer_is_zero_and_aligned_and_keeps_its_bytes() {
        for length in [1, 4096, 70_000, HUGE - 4096, HUGE, HUGE + 4096, 3 * HUGE + 1] {
            let mut buffer = PageBuffer::new(length);
            let unit = if length >= HUGE { HUGE } else { PAGE_SIZE as usize };
            assert_eq!((buffer.len(), buffer.as_ptr() as usize % unit), (length, 0));
            assert!(buffer.iter().all(|byte| *byte == 0));
            buffer.fill(7);
            assert!(buffer.iter().all(|byte| *byte == 7));
        }
    }
}
