// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The state of a watch of writes, which the fault thread and the job's thread share: what a write
//! means now, and which pages are protected ahead of the instant.

use super::protect_ordering;
use crate::lock::lock;
use crate::memory::copy_before_write::{CaptureError, CopyBeforeWrite};
use crate::memory::guest_memory::DiscardObserver;
use crate::memory::host_page_set::BlockHostPages;
use crate::memory::write_protection::Protection;
use pageferry_protocol::memory::PageRange;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

/// What a write to a protected page means.
#[derive(Debug)]
pub enum WriteFaultAction {
    /// Before the instant: the write may happen, and is noted.
    Ahead,
    /// After the instant: the page is captured before the write.
    CopyBeforeWrite(Arc<CopyBeforeWrite>),
}

/// The state that the fault thread and the job's thread share.
#[derive(Debug)]
pub struct WatchState {
    /// The protection.
    pub protection: Arc<Protection>,
    /// Held while faults are handled.
    mode: Mutex<WriteFaultAction>,
    /// Host pages that are certainly protected, before the instant.
    pub ahead: Vec<BlockHostPages>,
    /// Faults are not handled as they should be, so there must be no instant.
    failed: AtomicBool,
}

impl WatchState {
    /// No page is protected, and the instant has not come.
    pub fn new(protection: Arc<Protection>, ahead: Vec<BlockHostPages>) -> Self {
        let (mode, failed) = (Mutex::new(WriteFaultAction::Ahead), AtomicBool::new(false));
        Self { protection, mode, ahead, failed }
    }

    /// What a fault means now. It does not change while the guard is held.
    pub fn mode(&self) -> MutexGuard<'_, WriteFaultAction> {
        lock(&self.mode)
    }

    /// Notes that faults are not handled as they should be.
    pub fn fail(&self) {
        self.failed.store(true, Ordering::Release);
    }

    /// True if faults are not handled as they should be.
    pub fn has_failed(&self) -> bool {
        self.failed.load(Ordering::Acquire)
    }

    /// Allows a write before the instant.
    ///
    /// # Errors
    /// If the registration is gone, or the kernel refuses.
    pub fn allow_write(&self, (at, host_page): (usize, u64)) -> Result<(), CaptureError> {
        let page = PageRange::new(host_page, 1);
        protect_ordering::unprotect(self.ahead[at].bits(), page, || {
            self.protection.allow_write(at, host_page)
        })
    }
}

/// The kernel may drop the protection of freed pages, and then no fault reports the write that
/// populates them again.
impl DiscardObserver for WatchState {
    fn on_freed(&self, at: usize, range: PageRange) {
        self.ahead[at].bits().clear(self.ahead[at].covering(range));
    }
}
