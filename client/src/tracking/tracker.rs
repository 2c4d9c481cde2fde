// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A tracker of the VMM's own, which the agent uses by hooks.

use crate::hooks::HookError;
use pageferry_protocol::shm::DirtyLog;

/// Pages to clear in the VMM's tracker.
#[derive(Debug, Clone, Copy)]
pub struct ClearPages<'a> {
    /// The block.
    pub block: u32,
    /// First page within the block; a multiple of 64.
    pub first: u64,
    /// One bit per page from `first`: the pages to clear. No bit after the end of the block is set.
    pub bitmap: &'a [u64],
    /// The page `first` as a page number in the guest, which is its position in the dirty log.
    pub log_first_page: u64,
}

/// A tracker of the VMM's own: something that knows which pages the guest has written, such as
/// KVM's dirty log ([`KvmDirtyLog`](crate::tracking::kvm), feature `kvm`).
///
/// The VMM returns it from [`Hooks::tracker`](crate::Hooks::tracker), and declares it with
/// [`Trackers::HOOKS`](crate::Trackers::HOOKS). The deadline, the order of the calls, and what
/// happens after a panic are as for every hook ([`Hooks`](crate::Hooks)).
pub trait Tracker {
    /// Starts tracking, with nothing dirty. A tracker that is already on starts anew.
    ///
    /// # Errors
    /// If it does not start. The job fails.
    fn start(&mut self) -> Result<(), HookError>;

    /// Stops tracking. Also called when the agent that started it is lost.
    ///
    /// # Errors
    /// If it does not stop.
    fn stop(&mut self) -> Result<(), HookError>;

    /// Marks in `log` the pages that the tracker reports as dirty.
    ///
    /// # Errors
    /// If the tracker cannot be read. The job fails.
    fn sync(&mut self, log: &DirtyLog) -> Result<(), HookError>;

    /// Clears pages, so that their next write is reported. That must hold when this returns. The
    /// default is for a tracker that each sync clears.
    ///
    /// # Errors
    /// If the tracker cannot be changed. The job fails.
    fn clear(&mut self, pages: ClearPages<'_>) -> Result<(), HookError> {
        let _ = pages;
        Ok(())
    }
}
