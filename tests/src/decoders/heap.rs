// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A decoder's peak memory use, which must not exceed what its input accounts for (`vmm-survives`).
//!
//! It is counted only if [`CountingHeap`] is the program's allocator, as in the test and in the
//! fuzz targets.
#![allow(unsafe_code)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

/// The system's allocator, which also counts what each thread holds.
#[derive(Debug)]
pub struct CountingHeap;

thread_local! {
    // Thread-local and without a destructor, so that the allocator itself may use it.
    static HELD: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
}

fn took(bytes: usize) {
    let held = HELD.get() + bytes as isize;
    HELD.set(held);
    PEAK.set(PEAK.get().max(held));
}

fn gave(bytes: usize) {
    HELD.set(HELD.get() - bytes as isize);
}

// SAFETY: each call goes to the system's allocator as it came; the counting allocates nothing.
unsafe impl GlobalAlloc for CountingHeap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        took(layout.size());
        // SAFETY: as the caller promised.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        took(layout.size());
        // SAFETY: as the caller promised.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        gave(layout.size());
        // SAFETY: as the caller promised.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // The old and the new allocation may exist at the same time.
        took(size);
        gave(layout.size());
        // SAFETY: as the caller promised.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

/// True if the program uses [`CountingHeap`].
pub fn counts() -> bool {
    let before = HELD.get();
    let held = std::hint::black_box(Box::new([0u8; 64]));
    let counted = HELD.get() - before;
    drop(held);
    counted >= 64
}

/// Runs `decode`, which may hold no more than `limit` bytes of the heap at any moment.
///
/// # Panics
/// If it holds more.
#[track_caller]
pub fn within<T>(limit: usize, decode: impl FnOnce() -> T) -> T {
    let before = HELD.get();
    PEAK.set(before);
    let decoded = decode();
    let peak = usize::try_from(PEAK.get() - before).unwrap_or(0);
    assert!(peak <= limit, "decoding took {peak:#x} bytes of memory, allowed are {limit:#x}");
    decoded
}

/// Bytes that decoding `input` may take. A value is a few times larger than its fields on the wire,
/// and a growing vector exists twice for a moment.
pub fn fair(input: &[u8]) -> usize {
    4096 + 16 * input.len()
}
