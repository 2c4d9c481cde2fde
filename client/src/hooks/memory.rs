// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The hooks that register the guest's mappings with a userfaultfd: for pages that are missing in
//! postcopy or a lazy restore, and for writes that a background snapshot watches.

use super::api::Hooks;
use super::context::{HookContext, failed, forbidden};
use crate::continuation::Kept;
use crate::link::Link;
use crate::missing_pages::MissingPages;
use crate::ownership::{Ownership, SharedOwnership};
use pageferry_protocol::control::hook::Hook;
use pageferry_protocol::control::reply::{ErrorCode, RemoteError, Reply};
use pageferry_protocol::error::chain;
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// Sends the discards and frees that the VMM has queued, if a job may read memory after this hook.
pub(super) fn flush_queued(context: &HookContext, hook: &Hook) {
    let reads = matches!(
        hook,
        Hook::StartTracking { .. }
            | Hook::SyncTracker
            | Hook::WatchWrites
            | Hook::Pause
            | Hook::SaveState
    );
    if reads && let Some(client) = context.client.upgrade() {
        client.flush_for_job();
    }
}

/// Finds out whether [`register_faults`] would work.
pub(super) fn probe_faults(context: &HookContext) -> Reply<()> {
    let probed = context.missing.probe(&context.memory, &context.tracking);
    probed.map_err(|error| RemoteError::new(ErrorCode::Unsupported, chain(&error)))
}

/// Registers the mappings for missing pages. Returns the userfaultfd for the agent.
pub(super) fn register_faults(context: &HookContext, hooks: &mut dyn Hooks) -> Reply<OwnedFd> {
    let HookContext { link, memory, ownership, missing, probe, .. } = context;
    let _guest_hooks = ownership.lock_guest_hooks();
    // As for the state: only the guest that was asked for may come into this memory.
    ownership.lock().load_state(link.id).map_err(forbidden)?;
    if missing.is_pending() {
        let sentence = "the mappings are registered already";
        return Err(RemoteError::new(ErrorCode::State, sentence));
    }
    hooks.memory_pending().map_err(failed)?;
    let registered = missing.register(memory, Arc::clone(link), ownership, probe.clone());
    registered.map_err(|error| {
        // The VMM was told that memory is pending, and none is.
        hooks.memory_complete();
        RemoteError::new(ErrorCode::System, chain(&error))
    })
}

/// Keeps the journal for the next agent.
pub(super) fn keep_journal(
    context: &HookContext, journal: Vec<u8>, grants: &[OwnedFd],
) -> Reply<()> {
    let kept = Kept::new(journal, grants)
        .map_err(|error| RemoteError::new(ErrorCode::System, format!("a descriptor: {error}")))?;
    context
        .missing
        .keep_journal(context.link.id, kept)
        .map_err(|why| RemoteError::new(ErrorCode::State, why))
}

/// Takes the registration for missing pages back: all memory is here, or the rest never comes.
pub(super) fn unregister_faults(context: &HookContext, complete: bool, hooks: &mut dyn Hooks) {
    let turn = context.ownership.lock_guest_hooks();
    if complete && context.missing.is_pending_for(context.link.id) {
        context.missing.unregister();
        hooks.memory_complete();
    } else {
        drop(turn);
        give_up_missing_pages(context, hooks);
    }
}

/// If memory is missing for which this agent was responsible, it never comes.
pub(super) fn give_up_missing_pages(context: &HookContext, hooks: &mut dyn Hooks) {
    let HookContext { link, ownership, missing, .. } = context;
    tell_loss(link, ownership, missing, hooks);
}

/// The same, for the agent of this connection.
pub(super) fn tell_loss(
    link: &Link, ownership: &SharedOwnership, missing: &MissingPages, hooks: &mut dyn Hooks,
) {
    let turn = ownership.lock_guest_hooks();
    // The agent may have brought the last page, and was lost before it could say so.
    if missing.complete_without(link.id) || missing.take_complete_untold() {
        hooks.memory_complete();
        return;
    }
    if !missing.is_lost_unreported(link.id) {
        return;
    }
    if ownership.lock().ownership() == Ownership::Ours {
        // The VMM stops its guest. Other hook channels need not wait for that.
        drop(turn);
        hooks.memory_lost();
        missing.set_lost(link.id, true);
    } else {
        // The guest never ran here.
        missing.unregister();
        hooks.memory_complete();
    }
}

/// Registers the mappings for writes. Returns the userfaultfd for the agent.
pub(super) fn watch_writes(context: &HookContext, hooks: &mut dyn Hooks) -> Reply<OwnedFd> {
    let HookContext { link, memory, ownership, writes, tracking, probe, .. } = context;
    let id = link.id;
    ownership.lock().watch_writes(id).map_err(forbidden)?;
    context.check_memory_complete()?;
    let already = || RemoteError::new(ErrorCode::State, "writes are watched already");
    if !writes.announce(id, || hooks.writes_watched()).map_err(failed)? {
        return Err(already());
    }
    let watched = tracking.suspend(id).map_err(RemoteError::from).and_then(|()| {
        match writes.watch(memory, Arc::clone(link), probe.clone()) {
            Ok(Some(for_agent)) => Ok(for_agent),
            Ok(None) => Err(already()),
            Err(error) => Err(RemoteError::new(ErrorCode::System, chain(&error))),
        }
    });
    if watched.is_err() {
        if !writes.are_watched() {
            tracking.resume(memory);
        }
        // The VMM was told that writes are watched, and they are not.
        writes.withdraw(id, || hooks.writes_unwatched());
    }
    watched
}

/// Takes the registration for writes back.
pub(super) fn unwatch_writes(context: &HookContext, hooks: &mut dyn Hooks) {
    let HookContext { link, memory, writes, tracking, .. } = context;
    if writes.unwatch(link.id) {
        tracking.resume(memory);
    }
    writes.withdraw(link.id, || hooks.writes_unwatched());
}
