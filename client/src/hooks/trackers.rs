// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The hooks for dirty tracking: the VMM's own tracker, write-protect scanning, throttling.

use super::api::Hooks;
use super::context::{HookContext, failed};
use super::error::HookError;
use crate::tracking::{ClearPages, Tracker};
use pageferry_protocol::control::Trackers;
use pageferry_protocol::control::reply::{ErrorCode, RemoteError, Reply};
use pageferry_protocol::shm::words_for;

/// Starts the trackers of `sources` that the VMM has a part in.
pub(super) fn start(context: &HookContext, sources: Trackers, hooks: &mut dyn Hooks) -> Reply<()> {
    let (tracking, link) = (&context.tracking, context.link.id);
    if sources.contains(Trackers::HOOKS) {
        tracking.start_hooks(link, || tracker(hooks).and_then(Tracker::start).map_err(failed))?;
    }
    if sources.contains(Trackers::WRITE_PROTECT) {
        tracking.start_scanning(link, &context.memory)?;
    }
    Ok(())
}

/// Stops the trackers of `sources` that the VMM has a part in.
pub(super) fn stop(context: &HookContext, sources: Trackers, hooks: &mut dyn Hooks) -> Reply<()> {
    let (tracking, link) = (&context.tracking, context.link.id);
    if sources.contains(Trackers::WRITE_PROTECT) {
        tracking.stop_scanning(link);
    }
    if sources.contains(Trackers::HOOKS) {
        tracking.stop_hooks(link, || stop_tracker(hooks)).map_err(failed)?;
    }
    Ok(())
}

/// Has the VMM mark in the dirty log what its tracker reports.
pub(super) fn sync(context: &HookContext, hooks: &mut dyn Hooks) -> Reply<()> {
    let log = &context.memory.log;
    let sync = || tracker(hooks).and_then(|tracker| tracker.sync(log)).map_err(failed);
    context.tracking.use_hooks(context.link.id, sync)
}

/// Has the VMM clear pages of a block in its tracker: those whose bit is set in `bitmap`, which
/// begins at page `first`.
pub(super) fn clear(
    context: &HookContext, id: u32, first: u64, mut bitmap: Vec<u64>, hooks: &mut dyn Hooks,
) -> Reply<()> {
    let Some(block) = context.memory.block(id) else {
        let sentence = format!("block {id} does not exist");
        return Err(RemoteError::new(ErrorCode::NotFound, sentence));
    };
    let pages = block.geometry.pages();
    let words = words_for(pages);
    let end = (first / 64).saturating_add(bitmap.len() as u64);
    if end > words {
        let count = bitmap.len();
        let sentence =
            format!("block {id}: {count} words from page {first:#x} for {pages:#x} pages");
        return Err(RemoteError::new(ErrorCode::Invalid, sentence));
    }
    if let Some(last) = bitmap.last_mut()
        && end == words
        && pages % 64 != 0
    {
        *last &= (1 << (pages % 64)) - 1;
    }
    let log_first_page = block.geometry.first_log_page() + first;
    let pages = ClearPages { block: id, first, bitmap: &bitmap, log_first_page };
    let clear = || tracker(hooks).and_then(|tracker| tracker.clear(pages)).map_err(failed);
    context.tracking.use_hooks(context.link.id, clear)
}

/// Has the VMM throttle its guest.
pub(super) fn throttle(context: &HookContext, percent: u32, hooks: &mut dyn Hooks) -> Reply<()> {
    let throttle = || hooks.throttle(percent).map_err(failed);
    context.tracking.throttle(context.link.id, percent, throttle)
}

/// The VMM's own tracker.
///
/// # Errors
/// If there is none: every write of the guest would be lost.
pub(super) fn tracker(hooks: &mut dyn Hooks) -> Result<&mut dyn Tracker, HookError> {
    hooks.tracker().ok_or_else(|| {
        HookError::new(
            "this VMM declared Trackers::HOOKS, a tracker of its own, and its Hooks::tracker returns None",
        )
    })
}

/// Stops the VMM's own tracker. There is nothing to stop if it has none.
pub(super) fn stop_tracker(hooks: &mut dyn Hooks) -> Result<(), HookError> {
    hooks.tracker().map_or(Ok(()), Tracker::stop)
}
