// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The SIGBUS guard: survives a file that shrinks under a mapping
//! ([`vmm-survives`](crate::invariants#vmm-survives)).
//!
//! The agent maps files that belong to the VMM: the dirty log, discard bitmaps, the fence word, and
//! host pages on hugetlbfs. If the VMM truncates such a file, the next access raises SIGBUS. Then
//! the handler here replaces the guarded mapping by zero pages and notes that it was lost. The
//! users of a mapping ask [`GuardedRange::was_lost`] before they trust what they have read. SIGBUS
//! at any other address ends the process, as it does without the guard.
#![allow(unsafe_code)]

use pageferry_protocol::shm::MappedWords;
use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous};
use std::ops::Range;
use std::sync::Once;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use vmm_sys_util::signal::register_signal_handler;

/// Enough for the log, all blocks twice (for an old and a new session), the windows of all streams,
/// and the tables of two devices twice.
const MAX_RANGES: usize = 4096;
const SIGBUS: i32 = rustix::process::Signal::BUS.as_raw();

/// The entry of a guarded range. `end` is written last, and is 0 while the entry is free.
struct Entry {
    taken: AtomicBool,
    start: AtomicUsize,
    end: AtomicUsize,
    lost: AtomicBool,
}

static ENTRIES: [Entry; MAX_RANGES] = [const {
    Entry {
        taken: AtomicBool::new(false),
        start: AtomicUsize::new(0),
        end: AtomicUsize::new(0),
        lost: AtomicBool::new(false),
    }
}; MAX_RANGES];

/// A mapping that is guarded until drop. Drop it before the mapping.
#[derive(Debug)]
pub struct GuardedRange {
    entry: Option<usize>,
}

/// Installs the handler, if it is not installed yet. For a process whose threads may not do that.
pub fn install() {
    static INSTALL: Once = Once::new();
    INSTALL.call_once(|| {
        if let Err(error) = register_signal_handler(SIGBUS, on_sigbus) {
            log::warn!("no guard against truncated files: {error}");
        }
    });
}

impl GuardedRange {
    /// Guards the memory of a bitmap.
    pub fn of(words: &MappedWords) -> Self {
        Self::new(words.address_range())
    }

    /// Guards the mapping at `addresses`. If all entries are in use, which takes thousands of
    /// mappings, the mapping stays unguarded.
    pub fn new(addresses: Range<usize>) -> Self {
        install();
        let entry = ENTRIES.iter().position(|entry| !entry.taken.swap(true, Ordering::AcqRel));
        match entry {
            Some(index) => {
                ENTRIES[index].lost.store(false, Ordering::Relaxed);
                ENTRIES[index].start.store(addresses.start, Ordering::Relaxed);
                ENTRIES[index].end.store(addresses.end, Ordering::Release);
            }
            None => log::warn!(
                "more than {MAX_RANGES} mappings: one mapping is not guarded against truncation"
            ),
        }
        Self { entry }
    }

    /// True if the file was truncated. Zero pages are in its place then.
    pub fn was_lost(&self) -> bool {
        self.entry.is_some_and(|index| ENTRIES[index].lost.load(Ordering::Acquire))
    }
}

impl Drop for GuardedRange {
    fn drop(&mut self) {
        if let Some(index) = self.entry {
            ENTRIES[index].end.store(0, Ordering::Release);
            ENTRIES[index].taken.store(false, Ordering::Release);
        }
    }
}

/// Runs in a signal handler: atomics and one system call, nothing else.
extern "C" fn on_sigbus(
    _signal: libc::c_int, details: *mut libc::siginfo_t, _context: *mut libc::c_void,
) {
    // SAFETY: the kernel hands a valid siginfo to an SA_SIGINFO handler, and SIGBUS fills its
    // address.
    let address = unsafe { (*details).si_addr() } as usize;
    for entry in &ENTRIES {
        let end = entry.end.load(Ordering::Acquire);
        let start = entry.start.load(Ordering::Relaxed);
        if end == 0 || !(start..end).contains(&address) {
            continue;
        }
        entry.lost.store(true, Ordering::Release);
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED;
        // SAFETY: the range is a mapping of this process, which its owner keeps as long as it is
        // guarded, and its content is lost. Its users access it only by atomics or copies, and zero
        // is a valid value for both.
        let replaced = unsafe {
            mmap_anonymous(start as *mut _, end - start, ProtFlags::READ | ProtFlags::WRITE, flags)
        };
        if replaced.is_ok() {
            return;
        }
    }
    std::process::abort();
}

#[cfg(test)]
mod tests {
    use super::*;
    use pageferry_protocol::shm::MappedBitmap;
    use std::os::fd::AsFd;

    #[test]
    fn truncated_file_reads_as_zero_and_is_reported() {
        let fd = rustix::fs::memfd_create("bitmap", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&fd, 8192).unwrap();
        let bitmap = MappedBitmap::shared(fd.as_fd(), 8192 * 8).unwrap();
        let guard = GuardedRange::of(bitmap.storage());
        bitmap.set(bitmap.all());
        assert!(!guard.was_lost());
        rustix::fs::ftruncate(&fd, 0).unwrap();
        assert_eq!(bitmap.count(bitmap.all()), 0);
        assert!(guard.was_lost());
    }

    /// A walk over a large bitmap asks the file for its holes. A truncated part must not count as a
    /// hole.
    #[test]
    fn truncated_sparse_bitmap_is_reported_by_a_walk() {
        let fd = rustix::fs::memfd_create("bitmap", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&fd, 8192).unwrap();
        let bitmap = MappedBitmap::shared_sparse(fd.try_clone().unwrap(), 8192 * 8).unwrap();
        let guard = GuardedRange::of(bitmap.storage());
        assert_eq!(bitmap.nonzero_words(bitmap.all()).count(), 0);
        assert!(!guard.was_lost());
        rustix::fs::ftruncate(&fd, 4096).unwrap();
        assert_eq!(bitmap.nonzero_words(bitmap.all()).count(), 0);
        assert!(guard.was_lost());
    }
}
