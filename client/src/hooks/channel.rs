// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The hook channel: reads the requests of the agent, calls the VMM, and answers.
//!
//! An agent may be broken or lie (`vmm-survives`). A hook that is unknown, malformed or not allowed
//! now is answered by an error. If the channel cannot be read any more, or the connection ends, the
//! agent is lost: the guest is resumed if it was paused through this channel and is still ours. A
//! guest that its operator had paused stays paused.
//!
//! An agent that hangs keeps its sockets open. So while the guest is paused for the agent, a
//! [heartbeat](crate::heartbeat) watches the agent and cuts the link if it hangs, which ends this
//! channel. The heartbeat stops when the guest is relinquished (`one-owner`). After that nothing is
//! gained by giving the agent up, since it may still say that no commit was sent.

use super::api::Hooks;
use super::catch_panics::CatchPanics;
use super::context::{HookContext, failed, forbidden};
use super::end::{Loss, check_alive, end, is_answered_after_end};
use super::{guest, memory, trackers};
use crate::error::Error;
use crate::heartbeat::Heartbeat;
use crate::link::Link;
use crate::ownership::{Migration, SharedOwnership};
use crate::threads::{catch_panic, join, spawn_thread};
use pageferry_protocol::control::frame::FLAG_REPLY;
use pageferry_protocol::control::hook::{self, Hook};
use pageferry_protocol::control::hook_reply::{
    encode_hook_reply, encode_state_reply, reply_sequence,
};
use pageferry_protocol::control::reply::{ErrorCode, RemoteError, Reply};
use pageferry_protocol::control::socket::wait;
use pageferry_protocol::control::{Frame, FrameSocket, SocketError};
use pageferry_protocol::error::chain;
use rustix::event::PollFlags;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// The sequence number in an answer to a hook that has none. No agent counts this far.
const NO_SEQUENCE: u64 = u64::MAX;

/// What became of a hook channel in [`HookChannel::dispatch`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dispatch {
    /// All that was pending is answered; more may come.
    Open,
    /// The agent is lost. [`Hooks::agent_lost`] was called. Do not poll the channel any more.
    Closed,
}

/// The VMM's end of the hook channel. Either [`spawn`](HookChannel::spawn) a thread for it, or poll
/// it ([`AsFd`], level-triggered, for reading) in an event loop and
/// [`dispatch`](HookChannel::dispatch).
///
/// Dropping it leaves the agent without hooks: no migration can succeed then.
#[derive(Debug)]
pub struct HookChannel {
    socket: FrameSocket,
    context: HookContext,
    /// How long the agent may take to make room for an answer.
    timeout: Duration,
    closed: bool,
    /// Watches the agent while the guest is paused, or may be, and is not relinquished.
    paused: Option<Heartbeat>,
}

impl AsFd for HookChannel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for HookChannel {
    fn drop(&mut self) {
        let HookContext { link, writes, tracking, .. } = &self.context;
        // The link keeps a duplicate, so closing alone would leave the agent waiting for its
        // deadline.
        link.shut_down_hooks();
        writes.agent_lost(link.id);
        tracking.stop_scanning(link.id);
    }
}

impl HookChannel {
    pub(crate) fn new(socket: OwnedFd, context: HookContext, timeout: Duration) -> Self {
        Self { socket: socket.into(), context, timeout, closed: false, paused: None }
    }

    /// The connection of its agent.
    pub(crate) fn link(&self) -> Arc<Link> {
        Arc::clone(&self.context.link)
    }

    /// The ownership, which outlives the client.
    pub(crate) fn ownership(&self) -> Arc<SharedOwnership> {
        Arc::clone(&self.context.ownership)
    }

    /// What is missing if the agent of this channel is lost.
    pub(crate) fn loss(&self) -> Loss {
        Loss::of(&self.context)
    }

    /// Answers every hook that is pending, without waiting for more. A hook that panics fails; see
    /// [`Hooks::hook_panicked`].
    ///
    /// # Errors
    /// If the agent broke the protocol; it is lost then, as if it had closed the channel. Only
    /// reported once.
    pub fn dispatch(&mut self, hooks: &mut dyn Hooks) -> Result<Dispatch, Error> {
        let hooks = &mut CatchPanics(hooks);
        match catch_panic(|| self.dispatch_pending(hooks)) {
            Ok(dispatched) => dispatched,
            // Not of a hook, but a defect here. Whatever it was, the guest is not to stay paused.
            Err(message) => {
                self.end(hooks);
                Err(Error::Panicked { message })
            }
        }
    }

    fn dispatch_pending(&mut self, hooks: &mut dyn Hooks) -> Result<Dispatch, Error> {
        while !self.closed {
            let handled = match self.socket.try_recv() {
                Ok(Some(frame)) => self.handle(frame, hooks),
                Ok(None) => return Ok(Dispatch::Open),
                Err(error) => Err(error),
            };
            match handled {
                Ok(()) => {}
                Err(SocketError::Closed | SocketError::ClosedInFrame { .. }) => self.end(hooks),
                Err(source) => {
                    // It breaks the protocol.
                    self.context.link.give_up();
                    self.end(hooks);
                    return Err(Error::HookChannel { source });
                }
            }
        }
        Ok(Dispatch::Closed)
    }

    /// Answers hooks until the agent is lost, or the last clone of the client is dropped.
    ///
    /// # Errors
    /// If the agent broke the protocol; the guest is as safe as after any other end.
    pub fn run(mut self, hooks: &mut dyn Hooks) -> Result<(), Error> {
        const A_WHILE: Duration = Duration::from_secs(3600);
        while self.dispatch(hooks)? == Dispatch::Open {
            if let Err(errno) = wait(self.socket.as_fd(), PollFlags::IN, Instant::now() + A_WHILE) {
                self.end(&mut CatchPanics(hooks));
                return Err(Error::HookChannel { source: errno.into() });
            }
        }
        Ok(())
    }

    /// Starts a thread that answers hooks until the agent is lost, or the last clone of the client
    /// is dropped.
    ///
    /// # Errors
    /// If the thread cannot be started.
    pub fn spawn<H: Hooks + 'static>(self, mut hooks: H) -> Result<HookThread<H>, Error> {
        let run = move || {
            if let Err(error) = self.run(&mut hooks) {
                log::error!("{}", chain(&error));
            }
            hooks
        };
        Ok(HookThread { thread: spawn_thread("pageferry-hooks", run)? })
    }

    /// The end of the agent, or of its right to be answered.
    fn end(&mut self, hooks: &mut dyn Hooks) {
        self.closed = true;
        self.paused = None;
        end(&self.context, hooks);
    }

    /// Handles one frame. An error means that the answer could not be sent.
    fn handle(&mut self, frame: Frame, hooks: &mut dyn Hooks) -> Result<(), SocketError> {
        if frame.is_reply() {
            log::warn!("the agent answered {:#x}, which nobody asked", frame.request);
            return Ok(());
        }
        let sequence = reply_sequence(&frame.body).unwrap_or(NO_SEQUENCE);
        match self.decode(&frame) {
            Ok(Hook::Relinquish { session, release }) => {
                self.relinquish(sequence, Migration { session, release }, hooks)
            }
            Ok(hook) => self.call(hook, sequence, &frame.fds, hooks),
            Err(error) => {
                log::warn!("hook {:#x} refused: {error}", frame.request);
                // Nobody waits for the answer to an event.
                if frame.request == hook::code::EVENT {
                    return Ok(());
                }
                self.answer(frame.request, &encode_hook_reply(sequence, &Err(error)), &[])
            }
        }
    }

    /// The hook in a frame, if the agent may still call it.
    fn decode(&self, frame: &Frame) -> Reply<Hook> {
        let hook = match Hook::decode(frame.request, &frame.body) {
            Some(Ok((_, hook))) => hook,
            Some(Err(error)) => return Err(RemoteError::new(ErrorCode::Invalid, error)),
            None => {
                let sentence = format!("hook {:#x} is unknown", frame.request);
                return Err(RemoteError::new(ErrorCode::Unsupported, sentence));
            }
        };
        if !is_answered_after_end(&hook) {
            check_alive(&self.context.link)?;
        }
        Ok(hook)
    }

    /// Calls the VMM, and answers with what the hook returns.
    fn call(
        &mut self, hook: Hook, sequence: u64, fds: &[OwnedFd], hooks: &mut dyn Hooks,
    ) -> Result<(), SocketError> {
        let (name, code) = (hook.name(), hook.code());
        let context = &self.context;
        // A guest that is paused does not wait for it: the pause has flushed before.
        if self.paused.is_none() {
            memory::flush_queued(context, &hook);
        }
        let reply = match hook {
            Hook::Event { status } => {
                context.ownership.lock().event(context.link.id, &status);
                hooks.event(&status);
                return Ok(());
            }
            Hook::SaveState => {
                let saved = guest::save_state(context, hooks);
                let (reply, file) = split(name, saved);
                return self.answer_with(code, &encode_state_reply(sequence, &reply), file);
            }
            Hook::RegisterFaults => {
                let registered = memory::register_faults(context, hooks);
                return self.answer_userfaultfd(name, code, sequence, registered);
            }
            Hook::WatchWrites => {
                let watched = memory::watch_writes(context, hooks);
                return self.answer_userfaultfd(name, code, sequence, watched);
            }
            Hook::Pause => guest::pause(context, &mut self.paused, hooks),
            Hook::Resume { force, paused } => {
                guest::resume(context, &mut self.paused, force, paused, hooks)
            }
            Hook::LoadState { pieces } => guest::load_state(context, pieces, fds, hooks),
            Hook::ExpectGuest { origin } => guest::expect_guest(context, &origin, hooks),
            Hook::CheckGuest => guest::check_guest(context, hooks),
            Hook::AcceptGuest { origin } => guest::accept_guest(context, &origin, hooks),
            Hook::StartTracking { sources } => trackers::start(context, sources, hooks),
            Hook::StopTracking { sources } => trackers::stop(context, sources, hooks),
            Hook::SyncTracker => trackers::sync(context, hooks),
            Hook::ClearTracker { block, first, bitmap } => {
                trackers::clear(context, block, first, bitmap, hooks)
            }
            Hook::Throttle { percent } => trackers::throttle(context, percent, hooks),
            Hook::MemoryArrived => guest::memory_arrived(context),
            Hook::ProbeFaults => memory::probe_faults(context),
            Hook::KeepJournal { journal } => memory::keep_journal(context, journal, fds),
            Hook::UnregisterFaults { complete } => {
                memory::unregister_faults(context, complete, hooks);
                Ok(())
            }
            Hook::UnwatchWrites => {
                memory::unwatch_writes(context, hooks);
                Ok(())
            }
            // `handle` has answered it.
            Hook::Relinquish { .. } => return Ok(()),
        };
        if let Err(error) = &reply {
            log::warn!("hook {name}: {error}");
        }
        self.answer(code, &encode_hook_reply(sequence, &reply), &[])
    }

    /// Gives the guest up (`one-owner`). Ownership changes before the answer is sent, and changes
    /// back only if the agent cannot have received the answer.
    fn relinquish(
        &mut self, sequence: u64, migration: Migration, hooks: &mut dyn Hooks,
    ) -> Result<(), SocketError> {
        let HookContext { ownership, link, .. } = &self.context;
        let checked = hooks.check_saved_guest().map_err(failed);
        let give_up = |()| ownership.lock().relinquish(link.id, migration).map_err(forbidden);
        let reply = checked.and_then(give_up);
        match &reply {
            Ok(()) => {
                self.paused = None;
                hooks.guest_given_up();
            }
            Err(error) => log::warn!("hook relinquish: {error}"),
        }
        let sent = self.answer(hook::code::RELINQUISH, &encode_hook_reply(sequence, &reply), &[]);
        if sent.is_err() && reply.is_ok() {
            ownership.lock().relinquish_unanswered(link.id);
        }
        sent
    }

    fn answer_userfaultfd(
        &self, name: &str, code: u32, sequence: u64, uffd: Reply<OwnedFd>,
    ) -> Result<(), SocketError> {
        let (reply, uffd) = split(name, uffd.map(|uffd| ((), uffd)));
        self.answer_with(code, &encode_hook_reply(sequence, &reply), uffd)
    }

    fn answer_with(
        &self, code: u32, body: &[u8], file: Option<OwnedFd>,
    ) -> Result<(), SocketError> {
        let fds: Vec<BorrowedFd<'_>> = file.iter().map(AsFd::as_fd).collect();
        self.answer(code, body, &fds)
    }

    fn answer(&self, request: u32, body: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), SocketError> {
        self.socket.send_parts(request, FLAG_REPLY, body, fds, Instant::now() + self.timeout)
    }
}

/// A reply and the file that goes with it. A failure has none, and is logged.
fn split<T>(name: &str, reply: Reply<(T, OwnedFd)>) -> (Reply<T>, Option<OwnedFd>) {
    match reply {
        Ok((value, file)) => (Ok(value), Some(file)),
        Err(error) => {
            log::warn!("hook {name}: {error}");
            (Err(error), None)
        }
    }
}

/// A thread that answers hooks.
#[derive(Debug)]
pub struct HookThread<H> {
    thread: JoinHandle<H>,
}

impl<H> HookThread<H> {
    /// True if the agent is lost and the thread ended.
    pub fn is_finished(&self) -> bool {
        self.thread.is_finished()
    }

    /// Waits for the end of the agent, and returns the hooks. Drop the client first, or this waits
    /// for the agent to die.
    pub fn join(self) -> H {
        join(self.thread)
    }
}
