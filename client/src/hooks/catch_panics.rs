// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Calls the hooks of the VMM and turns a panic into an error.
//!
//! The thread of the hook channel resumes a paused guest when the agent is lost. If a panic of a
//! hook ended that thread, the guest would stay paused for ever. So each call is caught here. A
//! hook that returns a result fails with [`ErrorCode::Panicked`] and the message. That fails the
//! job, and the agent then has the guest resumed. The VMM is told by [`Hooks::hook_panicked`].

use super::api::{Hooks, StatePiece};
use super::error::HookError;
use super::trackers::{stop_tracker, tracker};
use crate::ownership::Ownership;
use crate::threads::catch_panic;
use crate::tracking::{ClearPages, Tracker};
use pageferry_protocol::control::hook::GuestOrigin;
use pageferry_protocol::control::job::{JobStatus, RunState};
use pageferry_protocol::shm::DirtyLog;

#[cfg(doc)]
use pageferry_protocol::control::reply::ErrorCode;

/// Tells the VMM that another agent is attached.
pub(crate) fn tell_attached(hooks: &mut dyn Hooks) {
    CatchPanics(hooks).agent_attached();
}

/// Hooks whose panics are errors.
pub(super) struct CatchPanics<'a>(pub(super) &'a mut dyn Hooks);

impl CatchPanics<'_> {
    fn call<T>(
        &mut self, hook: &'static str, call: impl FnOnce(&mut dyn Hooks) -> Result<T, HookError>,
    ) -> Result<T, HookError> {
        catch_panic(|| call(self.0)).unwrap_or_else(|message| {
            self.report(hook, &message);
            Err(HookError::panicked(message))
        })
    }

    /// A hook that cannot fail.
    fn notify(&mut self, hook: &'static str, notify: impl FnOnce(&mut dyn Hooks)) {
        if let Err(message) = catch_panic(|| notify(self.0)) {
            self.report(hook, &message);
        }
    }

    fn report(&mut self, hook: &'static str, message: &str) {
        log::error!("hook \"{hook}\" panicked in the VMM: {message}");
        if let Err(again) = catch_panic(|| self.0.hook_panicked(hook, message)) {
            log::error!("hook \"hook panicked\" panicked, too: {again}");
        }
    }
}

impl Hooks for CatchPanics<'_> {
    fn run_state(&mut self) -> Result<RunState, HookError> {
        self.call("run state", |hooks| hooks.run_state())
    }

    fn stay_paused(&mut self) -> Result<(), HookError> {
        self.call("stay paused", |hooks| hooks.stay_paused())
    }

    fn pause(&mut self) -> Result<(), HookError> {
        self.call("pause", |hooks| hooks.pause())
    }

    fn resume(&mut self) -> Result<(), HookError> {
        self.call("resume", |hooks| hooks.resume())
    }

    /// Panics of `Hooks::tracker` itself are caught with those of the tracker.
    fn tracker(&mut self) -> Option<&mut dyn Tracker> {
        Some(self)
    }

    fn throttle(&mut self, percent: u32) -> Result<(), HookError> {
        self.call("throttle", |hooks| hooks.throttle(percent))
    }

    fn save_state(&mut self) -> Result<Vec<StatePiece>, HookError> {
        self.call("save state", |hooks| hooks.save_state())
    }

    fn load_state(&mut self, state: Vec<StatePiece>) -> Result<(), HookError> {
        self.call("load state", |hooks| hooks.load_state(state))
    }

    fn expect_guest(&mut self, origin: &GuestOrigin) -> Result<(), HookError> {
        self.call("expect guest", |hooks| hooks.expect_guest(origin))
    }

    fn check_guest(&mut self) -> Result<(), HookError> {
        self.call("check guest", |hooks| hooks.check_guest())
    }

    fn accept_guest(&mut self, origin: &GuestOrigin) -> Result<(), HookError> {
        self.call("accept guest", |hooks| hooks.accept_guest(origin))
    }

    fn memory_pending(&mut self) -> Result<(), HookError> {
        self.call("memory pending", |hooks| hooks.memory_pending())
    }

    fn memory_complete(&mut self) {
        self.notify("memory complete", |hooks| hooks.memory_complete());
    }

    fn memory_lost(&mut self) {
        self.notify("memory lost", |hooks| hooks.memory_lost());
    }

    fn writes_watched(&mut self) -> Result<(), HookError> {
        self.call("writes watched", |hooks| hooks.writes_watched())
    }

    fn writes_unwatched(&mut self) {
        self.notify("writes unwatched", |hooks| hooks.writes_unwatched());
    }

    fn check_saved_guest(&mut self) -> Result<(), HookError> {
        self.call("check saved guest", |hooks| hooks.check_saved_guest())
    }

    fn guest_given_up(&mut self) {
        self.notify("guest given up", |hooks| hooks.guest_given_up());
    }

    fn event(&mut self, status: &JobStatus) {
        self.notify("event", |hooks| hooks.event(status));
    }

    fn agent_lost(&mut self, ownership: Ownership) {
        self.notify("agent lost", |hooks| hooks.agent_lost(ownership));
    }

    fn agent_attached(&mut self) {
        self.notify("agent attached", |hooks| hooks.agent_attached());
    }
}

impl Tracker for CatchPanics<'_> {
    fn start(&mut self) -> Result<(), HookError> {
        self.call("start tracking", |hooks| tracker(hooks)?.start())
    }

    fn stop(&mut self) -> Result<(), HookError> {
        self.call("stop tracking", stop_tracker)
    }

    fn sync(&mut self, log: &DirtyLog) -> Result<(), HookError> {
        self.call("sync tracker", |hooks| tracker(hooks)?.sync(log))
    }

    fn clear(&mut self, pages: ClearPages<'_>) -> Result<(), HookError> {
        self.call("clear tracker", |hooks| tracker(hooks)?.clear(pages))
    }
}

#[cfg(test)]
mod tests {
    /// The names of the hooks in a source file, in order.
    fn hooks(source: &str) -> Vec<&str> {
        let names = source
            .lines()
            .filter_map(|line| line.strip_prefix("    fn ")?.split_once("(&mut self"));
        let mut names: Vec<_> = names.map(|(name, _)| name).collect();
        names.sort_unstable();
        names
    }

    /// One that is forgotten here would be its default, and never reach the VMM.
    #[test]
    fn every_hook_is_passed_on() {
        let guarded = hooks(include_str!("catch_panics.rs"));
        let sources = [include_str!("api.rs"), include_str!("../tracking/tracker.rs")];
        // That one is how the VMM hears of a panic, and nobody else calls it.
        let all = sources.into_iter().flat_map(hooks).filter(|name| *name != "hook_panicked");
        let missing: Vec<_> = all.filter(|name| !guarded.contains(name)).collect();
        assert!(missing.is_empty(), "not passed on to the VMM: {missing:?}");
    }
}
