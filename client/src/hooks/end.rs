// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The end of an agent, seen from its hook channel: what is undone, and what is still answered.
//!
//! An agent that dies, hangs or breaks the protocol may leave behind a guest that is paused,
//! throttled or tracked for it, and memory that is still missing. [`end`] undoes all of that.
//!
//! The VMM may have attached the next agent by then. So each thing is undone only if it still
//! belongs to the agent that ended: [`ownership`](crate::ownership),
//! [`tracking::active`](crate::tracking::active) and [`writes`](crate::watched_writes) know the
//! agent.
//!
//! The channel may also read requests after the end that the agent sent before it. Requests that
//! begin something are refused ([`check_alive`]). Requests that end something, or say whether the
//! guest is ours, are answered ([`is_answered_after_end`]).

use super::api::Hooks;
use super::catch_panics::CatchPanics;
use super::context::HookContext;
use super::guest::restore_run_state;
use super::memory::{give_up_missing_pages, tell_loss};
use super::trackers::stop_tracker;
use crate::link::Link;
use crate::missing_pages::MissingPages;
use crate::ownership::SharedOwnership;
use pageferry_protocol::control::hook::Hook;
use pageferry_protocol::control::reply::{ErrorCode, RemoteError, Reply};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::sync::Arc;

/// Undoes what the agent has begun, and tells the VMM that the agent is lost.
///
/// Waits for nothing but the hooks of the VMM. The process of the agent may live for a moment yet;
/// the callers that need its end wait for that.
pub(super) fn end(context: &HookContext, hooks: &mut dyn Hooks) {
    // Whatever the reason was, an agent without hooks must not work on our memory.
    context.link.shut_down();
    // Before any hook is called: the hook may write.
    context.writes.agent_lost(context.link.id);
    // Before the guest is resumed: then everything may write again.
    context.writes.withdraw(context.link.id, || hooks.writes_unwatched());
    resume_guest(context, hooks);
    stop_tracking(context, hooks);
    // Another thread attaches the next agent, which brings the rest of the memory.
    if !context.missing.is_continued_without(context.link.id) {
        give_up_missing_pages(context, hooks);
    }
    let ownership = context.ownership.lock().ownership();
    hooks.agent_lost(ownership);
}

/// Memory that the agent of an ended channel has left missing, and that no other agent has brought.
#[derive(Debug)]
pub(crate) struct Loss {
    link: Arc<Link>,
    ownership: Arc<SharedOwnership>,
    missing: Arc<MissingPages>,
}

impl Loss {
    pub(super) fn of(context: &HookContext) -> Self {
        let HookContext { link, ownership, missing, .. } = context;
        Self {
            link: Arc::clone(link),
            ownership: Arc::clone(ownership),
            missing: Arc::clone(missing),
        }
    }

    /// Tells the VMM that the memory is lost, if nobody tries to bring it any more.
    pub(crate) fn tell(&self, hooks: &mut dyn Hooks) {
        if !self.missing.is_continued_without(self.link.id) {
            let hooks = &mut CatchPanics(hooks);
            tell_loss(&self.link, &self.ownership, &self.missing, hooks);
        }
    }
}

/// Brings a guest that the agent had paused back into the run state that it had before.
fn resume_guest(context: &HookContext, hooks: &mut dyn Hooks) {
    let turn = context.ownership.lock_guest_hooks();
    let before = context.ownership.lock().run_state_after_loss(context.link.id);
    let Some(run_state) = before else { return };
    let done = restore_run_state(context, run_state, hooks);
    // The logger may be slow, and other channels wait for the turn.
    drop(turn);
    match done {
        Ok(()) => {
            let name = run_state.name();
            log::warn!("the agent is lost while it had the guest paused: it is {name} again");
        }
        Err(error) => {
            log::error!("the agent is lost, and the guest cannot be resumed: {error}")
        }
    }
}

/// Stops the VMM's tracker and the throttle that this agent has started. Nobody else would.
fn stop_tracking(context: &HookContext, hooks: &mut dyn Hooks) {
    let (tracking, link) = (&context.tracking, context.link.id);
    if let Err(error) = tracking.agent_lost(link, || stop_tracker(hooks)) {
        log::warn!("the agent is lost, and the VMM's tracker stays on: {error}");
    }
    if let Err(error) = tracking.lift_throttle(link, || hooks.throttle(0)) {
        log::warn!("the agent is lost, and the guest stays throttled: {error}");
    }
}

/// Refuses a request of an agent that was given up or has closed a channel: nobody would end what
/// the request begins.
///
/// The agent may be given up right after this check. What it has begun by then ends with the
/// channel, and the [ownership](crate::ownership) keeps it apart from what the next agent begins.
pub(super) fn check_alive(link: &Link) -> Reply<()> {
    let mut ends = link.sockets().map(|end| PollFd::from_borrowed_fd(end, PollFlags::RDHUP));
    match poll(&mut ends, Some(&Timespec::default())) {
        // Nothing is known to have ended.
        Ok(0) | Err(_) => Ok(()),
        Ok(_) => Err(RemoteError::new(
            ErrorCode::State,
            "this agent was given up: nothing more begins for it",
        )),
    }
}

/// True for requests that are answered even if the agent is lost: those that say whether the guest
/// is ours, and those that end what the agent began. All others go through [`check_alive`].
pub(super) fn is_answered_after_end(hook: &Hook) -> bool {
    matches!(
        hook,
        Hook::Resume { .. }
            | Hook::Event { .. }
            | Hook::MemoryArrived
            | Hook::StopTracking { .. }
            | Hook::UnwatchWrites
            | Hook::UnregisterFaults { .. }
            | Hook::Throttle { percent: 0 }
    )
}
