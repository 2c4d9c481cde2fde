//! Memory that a disk reads from and writes to without the page cache.
#![allow(unsafe_code)]

use pageferry_protocol::shm::MappingError;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};
use std::ops::{Deref, DerefMut};

/// What the kernel may give in one piece.
const HUGE: usize = 2 << 20;

/// Bytes that begin at a multiple of the page size, as writing past the page cache needs them;
/// those of 2 MiB and more at a multiple of that, and in huge pages, if the kernel has any. A disk
/// then gets them in few pieces: of single pages a request holds no more than some 254, whatever it
/// may hold in bytes.
#[derive(Debug)]
pub struct PageBuffer {
    mapping: *mut u8,
    mapped: usize,
    start: usize,
    length: usize,
}

// SAFETY: the mapping belongs to the buffer alone, and is reached through borrows of it.
unsafe impl Send for PageBuffer {}
// SAFETY: as above; through `&self` it is only read.
unsafe impl Sync for PageBuffer {}

impl PageBuffer {
    /// `length` zero bytes.
    ///
    /// # Panics
    /// If the kernel has no memory for it.
    #[expect(
        clippy::expect_used,
        reason = "as any other allocation; but it ends a thread, and not all jobs of all VMMs"
    )]
    pub fn new(length: usize) -> Self {
        Self::try_new(length).expect("memory for a buffer")
    }

    /// The same, for those who must not panic.
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
            // SAFETY: the range lies in the mapping, and only how the kernel provides it changes.
            // Where it does not know the advice all is as before.
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
        // SAFETY: the bytes are mapped and readable until drop, and nobody writes them while `self`
        // is borrowed.
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
        // SAFETY: the mapping is ours, and no borrow of it outlives `self`.
        let unmapped = unsafe { munmap(self.mapping.cast(), self.mapped) };
        debug_assert!(unmapped.is_ok(), "munmap of our own mapping");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pageferry_protocol::memory::PAGE_SIZE;

    #[test]
    fn a_buffer_is_zero_and_aligned_and_keeps_what_it_is_given() {
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
