// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The dirty log as a [`vm_memory::bitmap::Bitmap`]. A VMM built on `GuestMemoryMmap<LogBitmap>`
//! marks every write of its devices by that type parameter.
//!
//! A [`LogBitmap`] is created with its region and has no log until
//! [`Client::add_guest_memory`](crate::Client::add_guest_memory) attaches one. Writes before that
//! are not marked. They need no mark, since pass 0 of a migration sends everything.

use pageferry_protocol::memory::{PAGE_SIZE, PageRange, pages_in};
use pageferry_protocol::shm::DirtyLog;
use std::sync::{Arc, OnceLock};
use vm_memory::bitmap::{Bitmap, BitmapSlice, NewBitmap, WithBitmapSlice};

/// A region's position in the dirty log.
#[derive(Debug)]
struct LogPosition {
    log: Arc<DirtyLog>,
    /// Page number in the guest of the region's first page.
    first: u64,
}

/// The part of the dirty log that belongs to one region of guest memory.
#[derive(Debug, Default)]
pub struct LogBitmap {
    position: OnceLock<LogPosition>,
    /// Length of the region in bytes. Marks after it would be another region's.
    length: usize,
}

/// A part of a [`LogBitmap`], from some offset.
#[derive(Debug, Clone, Copy)]
pub struct LogSlice<'a> {
    bitmap: &'a LogBitmap,
    /// Offset of the slice in the region in bytes.
    base: usize,
}

impl LogBitmap {
    /// The pages of the guest that `length` bytes from `offset` of the region touch.
    fn pages(&self, position: &LogPosition, offset: usize, length: usize) -> PageRange {
        let end = offset.saturating_add(length).min(self.length) as u64;
        let offset = offset as u64;
        if offset >= end {
            return PageRange::default();
        }
        let first = pages_in(offset);
        PageRange::new(position.first + first, end.div_ceil(PAGE_SIZE) - first)
    }
}

impl<'a> WithBitmapSlice<'a> for LogBitmap {
    type S = LogSlice<'a>;
}

impl Bitmap for LogBitmap {
    fn mark_dirty(&self, offset: usize, len: usize) {
        if let Some(position) = self.position.get() {
            position.log.mark(self.pages(position, offset, len));
        }
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.position.get().is_some_and(|position| {
            let pages = self.pages(position, offset, 1);
            position.log.bits().count(pages) != 0
        })
    }

    fn slice_at(&self, offset: usize) -> LogSlice<'_> {
        LogSlice { bitmap: self, base: offset }
    }
}

impl NewBitmap for LogBitmap {
    fn with_len(length: usize) -> Self {
        Self { position: OnceLock::new(), length }
    }
}

impl<'a> WithBitmapSlice<'_> for LogSlice<'a> {
    type S = LogSlice<'a>;
}

impl BitmapSlice for LogSlice<'_> {}

impl Bitmap for LogSlice<'_> {
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.bitmap.mark_dirty(self.base.saturating_add(offset), len);
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.bitmap.dirty_at(self.base.saturating_add(offset))
    }

    fn slice_at(&self, offset: usize) -> Self {
        Self { bitmap: self.bitmap, base: self.base.saturating_add(offset) }
    }
}

/// A region's bitmap that may have a position in the dirty log: [`LogBitmap`], which marks it, or
/// `()`, which tracks nothing. A VMM may implement it for a bitmap of its own, which then has to
/// mark the log.
#[diagnostic::on_unimplemented(
    message = "`{Self}` cannot mark the dirty log of pageferry",
    label = "the writes of devices to memory with this bitmap would be lost by a migration",
    note = "use `GuestMemoryMmap<LogBitmap>`: every write of an emulated device then marks the log",
    note = "or `GuestMemoryMmap<()>`, if `Trackers::WRITE_PROTECT` or another tracker sees these writes"
)]
pub trait AttachLog {
    /// Gives it its position: `first` is the page number in the guest of the region's first page.
    /// False if it has another.
    #[must_use]
    fn attach_log(&self, log: &Arc<DirtyLog>, first: u64) -> bool;
}

impl AttachLog for LogBitmap {
    fn attach_log(&self, log: &Arc<DirtyLog>, first: u64) -> bool {
        let position = self.position.get_or_init(|| LogPosition { log: Arc::clone(log), first });
        Arc::ptr_eq(&position.log, log) && position.first == first
    }
}

/// A VMM that does not track its own writes, or does so elsewhere.
impl AttachLog for () {
    fn attach_log(&self, _log: &Arc<DirtyLog>, _first: u64) -> bool {
        true
    }
}
