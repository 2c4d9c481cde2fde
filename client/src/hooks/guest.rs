// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The hooks that pause, resume, save and load the guest.
//!
//! [`SharedOwnership`](crate::ownership::SharedOwnership) decides what is allowed; the VMM is then
//! called under its turn, so that two hook channels never decide and act at the same time.

use super::api::Hooks;
use super::context::{HookContext, failed, forbidden};
use super::error::HookError;
use super::state_file::{read_pieces, write_pieces};
use crate::error::Error;
use crate::heartbeat::{BUSY_INTERVAL, Heartbeat, WatchedSockets};
use crate::ownership::ResumeAction;
use pageferry_protocol::control::hook::GuestOrigin;
use pageferry_protocol::control::hook_reply::SavedState;
use pageferry_protocol::control::job::RunState;
use pageferry_protocol::control::reply::{ErrorCode, RemoteError, Reply};
use pageferry_protocol::control::state_pieces::PieceSize;
use pageferry_protocol::error::chain;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

/// Pauses the guest. `watch` gets a heartbeat that cuts the link if the agent hangs meanwhile.
pub(super) fn pause(
    context: &HookContext, watch: &mut Option<Heartbeat>, hooks: &mut dyn Hooks,
) -> Reply<()> {
    let _guest_hooks = context.ownership.lock_guest_hooks();
    let link = context.link.id;
    context.ownership.lock().pause(link).map_err(forbidden)?;
    context.check_memory_complete()?;
    // Before the pause: no guest is paused without it, and none waits while it is started.
    let heartbeat =
        watch_agent(context).map_err(|error| RemoteError::new(ErrorCode::System, chain(&error)))?;
    let before = run_state(context, hooks).map_err(no_run_state)?;
    let paused = hooks.pause();
    context.ownership.lock().paused(link, paused.is_ok(), before);
    // Also if it failed: it may have paused a part of the guest.
    *watch = Some(heartbeat);
    paused.map_err(failed)
}

/// The guest has left for good: nothing of it has to be recovered here.
pub(super) fn memory_arrived(context: &HookContext) -> Reply<()> {
    context.ownership.lock().memory_arrived(context.link.id).map_err(forbidden)
}

/// Cuts the link if the agent hangs, until the result is dropped.
fn watch_agent(context: &HookContext) -> Result<Heartbeat, Error> {
    let link = Arc::clone(&context.link);
    // Only cut, not killed: the request that found that the agent hangs has had it killed.
    let cut = move |_| link.shut_down();
    let (probe, link) = (context.probe.clone(), Arc::clone(&context.link));
    // The hook channel itself sees its own end.
    Heartbeat::start(probe, link, BUSY_INTERVAL, WatchedSockets::Control, |_| false, cut)
}

/// Resumes the guest, or leaves it paused for its operator. The agent is not watched any more then.
pub(super) fn resume(
    context: &HookContext, watch: &mut Option<Heartbeat>, force: bool, paused: bool,
    hooks: &mut dyn Hooks,
) -> Reply<()> {
    let _guest_hooks = context.ownership.lock_guest_hooks();
    let decided = context.ownership.lock().resume(context.link.id, force, paused);
    match decided.map_err(forbidden)? {
        ResumeAction::Nothing => Ok(()),
        ResumeAction::SetRunState(run_state) => {
            restore_run_state(context, run_state, hooks).map_err(failed)?;
            *watch = None;
            Ok(())
        }
    }
}

/// Brings the guest into this run state: the one that it had before it was paused, or the one that
/// it is to have where it arrived. The caller holds the turn.
pub(super) fn restore_run_state(
    context: &HookContext, run_state: RunState, hooks: &mut dyn Hooks,
) -> Result<(), HookError> {
    let done = match run_state {
        RunState::Running => hooks.resume(),
        RunState::Paused => hooks.stay_paused(),
    };
    context.ownership.lock().resumed(context.link.id, done.is_ok());
    done
}

/// The guest's run state. A pause by a hook does not count.
fn run_state(context: &HookContext, hooks: &mut dyn Hooks) -> Result<RunState, HookError> {
    // The VMM is asked without the lock.
    let known = context.ownership.lock().run_state_before_pause();
    known.map_or_else(|| hooks.run_state(), Ok)
}

/// The VMM does not know the run state, which the hook needs.
fn no_run_state(error: HookError) -> RemoteError {
    let code = failed(error.clone()).code;
    RemoteError::new(code, format!("run state: {error}"))
}

/// Saves the state of the VMM into a file.
pub(super) fn save_state(
    context: &HookContext, hooks: &mut dyn Hooks,
) -> Reply<(SavedState, OwnedFd)> {
    // The pause checks the same, but the VMM may have stopped its guest by itself.
    context.check_memory_complete()?;
    let guest = run_state(context, hooks).map_err(no_run_state)?;
    let saved = hooks.save_state().and_then(|pieces| write_pieces(&pieces));
    let (pieces, file) = saved.map_err(failed)?;
    Ok((SavedState { guest, pieces }, file))
}

/// Hands the VMM the state that came in the file `fds`.
pub(super) fn load_state(
    context: &HookContext, pieces: Vec<PieceSize>, fds: &[OwnedFd], hooks: &mut dyn Hooks,
) -> Reply<()> {
    let _guest_hooks = context.ownership.lock_guest_hooks();
    context.ownership.lock().load_state(context.link.id).map_err(forbidden)?;
    let [file] = fds else {
        let sentence = format!("load state came with {} file descriptors, expected 1", fds.len());
        return Err(RemoteError::new(ErrorCode::Invalid, sentence));
    };
    // The answer to the VMM that asked for this guest may still be on its way.
    context.missing.forget_lost();
    read_pieces(pieces, file.as_fd()).and_then(|state| hooks.load_state(state)).map_err(failed)
}

/// Asks the VMM whether it would accept a guest. Nothing changes.
pub(super) fn expect_guest(
    context: &HookContext, origin: &GuestOrigin, hooks: &mut dyn Hooks,
) -> Reply<()> {
    let _guest_hooks = context.ownership.lock_guest_hooks();
    context.ownership.lock().check_may_give_up(context.link.id).map_err(forbidden)?;
    hooks.expect_guest(origin).map_err(failed)
}

/// Asks the VMM whether it has a guest. Nothing changes.
pub(super) fn check_guest(context: &HookContext, hooks: &mut dyn Hooks) -> Reply<()> {
    let _guest_hooks = context.ownership.lock_guest_hooks();
    hooks.check_guest().map_err(failed)
}

/// Asks the VMM whether an operator may bring another guest here. Ownership changes before the
/// answer is sent, as when the VMM itself starts the job.
pub(super) fn accept_guest(
    context: &HookContext, origin: &GuestOrigin, hooks: &mut dyn Hooks,
) -> Reply<()> {
    let _guest_hooks = context.ownership.lock_guest_hooks();
    let link = context.link.id;
    context.ownership.lock().check_may_give_up(link).map_err(forbidden)?;
    // A guest that has lost memory does not go on, whatever happens to the other one.
    let before = match context.missing.is_lost() {
        true => None,
        false => Some(run_state(context, hooks).map_err(no_run_state)?),
    };
    hooks.accept_guest(origin).map_err(failed)?;
    if let Some(client) = context.client.upgrade() {
        client.flush_for_other_guest();
    }
    context.ownership.lock().give_up(link, before).map_err(forbidden)?;
    context.missing.forget_lost();
    Ok(())
}
