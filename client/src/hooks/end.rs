//! The end of an agent, seen from its hook channel: what is undone, and what is still heard.
//!
//! An agent that dies, hangs or breaks the protocol leaves a guest that may be paused, throttled or
//! tracked for it, and memory that waits for it. [`HookChannel::end`] undoes all of that.
//!
//! The next agent may be attached by then. So each thing is undone only if it is still this
//! agent's: [`ownership`](crate::ownership), [`tracking::active`](crate::tracking::active) and
//! [`writes`](crate::writes) know whose it is.
//!
//! Requests that an agent sent before its end can be read after it. Those that begin something are
//! refused ([`HookChannel::check_alive`]); those that end something, or say whose the guest is, are
//! heard ([`is_last_word`]).

use super::Hooks;
use super::channel::HookChannel;
use crate::ownership::Ownership;
use pageferry_protocol::control::hook::Hook;
use pageferry_protocol::control::request::{ErrorCode, RemoteError, Reply};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

impl HookChannel {
    /// The end of the agent, or of its right to be heard. Waits for nothing but the VMM's own
    /// hooks: the agent's process may live for a moment yet, and whoever needs its end waits for
    /// that.
    pub(super) fn end(&mut self, hooks: &mut dyn Hooks) {
        self.closed = true;
        self.paused = None;
        // Whatever the reason was, an agent without hooks has no business with our memory.
        self.link.cut();
        // Before anything is called: it may write.
        self.parts.writes.lost(self.link.id);
        // Before the guest is resumed: then all of it may be.
        self.parts.writes.withdraw(self.link.id, || hooks.writes_unwatched());
        self.let_guest_go(hooks);
        self.stop_what_it_started(hooks);
        self.give_memory_up(hooks);
        let ownership = self.parts.ownership.lock().ownership();
        hooks.agent_lost(ownership);
    }

    /// A guest that the lost agent had paused goes back to what it was.
    fn let_guest_go(&self, hooks: &mut dyn Hooks) {
        let turn = self.parts.ownership.turn();
        let goes_back = self.parts.ownership.lock().closed(self.link.id);
        let Some(run_state) = goes_back else { return };
        let done = self.go_back(run_state, hooks);
        // The logger may be slow, and others wait for the turn.
        drop(turn);
        match done {
            Ok(()) => {
                log::warn!(
                    "the agent is lost while it had the guest paused: it is {} again",
                    run_state.name()
                );
            }
            Err(error) => {
                log::error!("the agent is lost, and the guest cannot be resumed: {error}")
            }
        }
    }

    /// The VMM's tracker, and what holds its guest back: nobody else would undo them.
    fn stop_what_it_started(&self, hooks: &mut dyn Hooks) {
        let (tracking, link) = (&self.parts.tracking, self.link.id);
        if let Err(error) = tracking.lost(link, || hooks.stop_tracking()) {
            log::warn!("the agent is lost, and the VMM's tracker stays on: {error}");
        }
        if let Err(error) = tracking.lost_throttle(link, || hooks.throttle(0)) {
            log::warn!("the agent is lost, and the guest stays throttled: {error}");
        }
    }

    /// If memory is missing, it never comes.
    pub(super) fn give_memory_up(&self, hooks: &mut dyn Hooks) {
        let turn = self.parts.ownership.turn();
        if !self.parts.faults.is_news(self.link.id) {
            return;
        }
        if self.parts.ownership.lock().ownership() == Ownership::Ours {
            // The VMM stops its guest, and others need not wait for that.
            drop(turn);
            hooks.memory_lost();
            self.parts.faults.give_up(self.link.id, true);
        } else {
            // The guest never ran here.
            self.parts.faults.unregister();
            hooks.memory_complete();
        }
    }

    /// Refuses what an agent asks that was given up, or is gone: nobody would end what begins now.
    /// Requests of such an agent can still be read after its end.
    ///
    /// It may be given up right after this. What it has begun by then ends with this channel, and
    /// the [ownership](crate::ownership) keeps it apart from what the next agent begins.
    pub(super) fn check_alive(&self) -> Reply<()> {
        let mut ends = self.link.ends().map(|end| PollFd::from_borrowed_fd(end, PollFlags::RDHUP));
        match poll(&mut ends, Some(&Timespec::default())) {
            // Nothing is known to have ended.
            Ok(0) | Err(_) => Ok(()),
            Ok(_) => Err(RemoteError::new(
                ErrorCode::State,
                "this agent was given up: nothing more begins for it",
            )),
        }
    }
}

/// True for what is heard from an agent that is lost, too: what it says about a guest that it had,
/// and what ends something that it began. [`HookChannel::check_alive`] is for all the others.
pub(super) fn is_last_word(hook: &Hook) -> bool {
    matches!(
        hook,
        Hook::Resume { .. }
            | Hook::Event { .. }
            | Hook::StopTracking { .. }
            | Hook::UnwatchWrites
            | Hook::UnregisterFaults { .. }
            | Hook::Throttle { percent: 0 }
    )
}
