//! The hook channel: reads the agent's requests, turns the line of `one-owner` where they say so,
//! calls the VMM, answers.
//!
//! An agent may be broken or lie (`vmm-survives`): an unknown hook, a malformed one, or one that is
//! not allowed now gets an error as its answer. What cannot be followed any more, and the end of
//! the connection, are the end of the agent: the guest is resumed if it was paused through this
//! channel and is ours; if its operator had paused it before, it stays paused.
//!
//! An agent that hangs keeps its sockets open. So while the guest stands still for it, a
//! [heartbeat](crate::heartbeat) finds that out and cuts the link, which is the end here. Only
//! before the line of `one-owner`: after it nothing is gained by giving an agent up, which may
//! still say that no commit left.

use super::end::is_last_word;
use super::guarded::Guarded;
use super::state::{read_pieces, write_pieces};
use super::{ClearPages, HookError, Hooks};
use crate::error::Error;
use crate::faults::Faults;
use crate::heartbeat::{BUSY, Ends, Heartbeat, Probe};
use crate::link::Link;
use crate::memory::Memory;
use crate::ownership::{Forbidden, Migration, Resume, SharedOwnership};
use crate::threads::{caught, start};
use crate::tracking::active::Tracking;
use crate::writes::Writes;
use pageferry_protocol::control::Trackers;
use pageferry_protocol::control::hook::{self, Hook, PieceSize, SavedState};
use pageferry_protocol::control::hook::{encode_hook_reply, encode_state_reply, reply_sequence};
use pageferry_protocol::control::job::{JobStatus, RunState};
use pageferry_protocol::control::request::{ErrorCode, RemoteError, Reply};
use pageferry_protocol::control::socket::wait;
use pageferry_protocol::control::{Frame, FrameSocket, SocketError};
use pageferry_protocol::error::chain;
use pageferry_protocol::shm::words_for;
use rustix::event::PollFlags;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
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
    pub(super) link: Arc<Link>,
    pub(super) parts: Parts,
    /// How long the agent may take to make room for an answer.
    timeout: Duration,
    pub(super) closed: bool,
    /// While the guest is paused, or may be, and the agent has not asked for the line of
    /// `one-owner`.
    pub(super) paused: Option<Heartbeat>,
}

/// What a channel shares with its client.
#[derive(Debug)]
pub(crate) struct Parts {
    pub(crate) memory: Arc<Memory>,
    pub(crate) ownership: Arc<SharedOwnership>,
    pub(crate) faults: Arc<Faults>,
    pub(crate) writes: Arc<Writes>,
    pub(crate) tracking: Arc<Tracking>,
    pub(crate) probe: Probe,
}

impl AsFd for HookChannel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for HookChannel {
    fn drop(&mut self) {
        // The link keeps a duplicate, so closing alone would leave the agent waiting for its
        // deadline.
        self.link.cut_hooks();
        self.parts.writes.lost(self.link.id);
        self.parts.tracking.stop_scanning(self.link.id);
    }
}

impl HookChannel {
    pub(crate) fn new(socket: OwnedFd, link: Arc<Link>, parts: Parts, timeout: Duration) -> Self {
        Self { socket: socket.into(), link, parts, timeout, closed: false, paused: None }
    }

    /// Answers every hook that is pending, without waiting for more. A hook that panics fails; see
    /// [`Hooks::hook_panicked`].
    ///
    /// # Errors
    /// If the agent broke the protocol; it is lost then, as if it had closed the channel. Only
    /// reported once.
    pub fn dispatch(&mut self, hooks: &mut dyn Hooks) -> Result<Dispatch, Error> {
        let hooks = &mut Guarded(hooks);
        match caught(|| self.dispatch_pending(hooks)) {
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
                Err(SocketError::Closed | SocketError::Cut { .. }) => self.end(hooks),
                Err(source) => {
                    // It breaks the protocol.
                    self.link.give_up();
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
                self.end(&mut Guarded(hooks));
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
        Ok(HookThread { thread: start("pageferry-hooks", run)? })
    }

    /// The guest is as it was before it was paused, or as it is to be where it arrived. The caller
    /// has the turn.
    pub(super) fn go_back(
        &self, run_state: RunState, hooks: &mut dyn Hooks,
    ) -> Result<(), HookError> {
        let done = match run_state {
            RunState::Running => hooks.resume(),
            RunState::Paused => hooks.stay_paused(),
        };
        self.parts.ownership.lock().resumed(self.link.id, done.is_ok());
        done
    }

    /// The guest's run state, apart from a pause of ours.
    fn run_state(&self, hooks: &mut dyn Hooks) -> Result<RunState, HookError> {
        // The VMM is asked without the lock.
        let known = self.parts.ownership.lock().run_state_before_pause();
        known.map_or_else(|| hooks.run_state(), Ok)
    }

    /// Handles one frame. An error means that the answer could not be sent.
    fn handle(&mut self, frame: Frame, hooks: &mut dyn Hooks) -> Result<(), SocketError> {
        if frame.is_reply() {
            log::warn!("the agent answered {:#x}, which nobody asked", frame.request);
            return Ok(());
        }
        let sequence = reply_sequence(&frame.body).unwrap_or(NO_SEQUENCE);
        let decoded = match Hook::decode(frame.request, &frame.body) {
            Some(Ok((_, hook))) => Ok(hook),
            Some(Err(error)) => Err(RemoteError::new(ErrorCode::Invalid, error)),
            None => {
                let sentence = format!("hook {:#x} is unknown", frame.request);
                Err(RemoteError::new(ErrorCode::Unsupported, sentence))
            }
        };
        let decoded = decoded.and_then(|hook| {
            if !is_last_word(&hook) {
                self.check_alive()?;
            }
            Ok(hook)
        });
        match decoded {
            Ok(Hook::Event { status }) => {
                self.event(&status, hooks);
                Ok(())
            }
            Ok(Hook::SaveState) => self.save_state(sequence, hooks),
            Ok(Hook::Relinquish { session, release }) => {
                self.relinquish(sequence, Migration { session, release })
            }
            Ok(Hook::RegisterFaults) => self.register_faults(sequence, hooks),
            Ok(Hook::WatchWrites) => self.watch_writes(sequence, hooks),
            Ok(other) => {
                let name = other.name();
                let reply = self.call(other, &frame.fds, hooks);
                if let Err(error) = &reply {
                    log::warn!("hook {name}: {error}");
                }
                self.answer(frame.request, &encode_hook_reply(sequence, &reply), &[])
            }
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

    fn answer(&self, request: u32, body: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), SocketError> {
        use pageferry_protocol::control::frame::FLAG_REPLY;
        self.socket.send_parts(request, FLAG_REPLY, body, fds, Instant::now() + self.timeout)
    }

    fn event(&self, status: &JobStatus, hooks: &mut dyn Hooks) {
        self.parts.ownership.lock().event(self.link.id, status);
        hooks.event(status);
    }

    /// The line of `one-owner`: turned before the answer leaves, turned back only if the agent
    /// cannot have the answer.
    fn relinquish(&mut self, sequence: u64, migration: Migration) -> Result<(), SocketError> {
        let reply =
            self.parts.ownership.lock().relinquish(self.link.id, migration).map_err(forbidden);
        if let Err(error) = &reply {
            log::warn!("hook relinquish: {error}");
        }
        if reply.is_ok() {
            self.paused = None;
        }
        let sent = self.answer(hook::code::RELINQUISH, &encode_hook_reply(sequence, &reply), &[]);
        if sent.is_err() && reply.is_ok() {
            self.parts.ownership.lock().relinquish_unanswered(self.link.id);
        }
        sent
    }

    fn register_faults(&self, sequence: u64, hooks: &mut dyn Hooks) -> Result<(), SocketError> {
        let turn = self.parts.ownership.turn();
        // As for the state: nobody else's guest is to come into our memory.
        let allowed = self.parts.ownership.lock().load_state(self.link.id).map_err(forbidden);
        let registered = allowed.and_then(|()| {
            if self.parts.faults.pending() {
                return Err(RemoteError::new(
                    ErrorCode::State,
                    "the mappings are registered already",
                ));
            }
            hooks.memory_pending().map_err(failed)?;
            let registered = self.parts.faults.register(
                &self.parts.memory,
                Arc::clone(&self.link),
                &self.parts.ownership,
                self.parts.probe.clone(),
            );
            registered.map_err(|error| {
                // Announced, and not to be: nothing is missing after all.
                hooks.memory_complete();
                RemoteError::new(ErrorCode::System, chain(&error))
            })
        });
        drop(turn);
        self.answer_with_userfaultfd(&Hook::RegisterFaults, sequence, registered)
    }

    fn watch_writes(&self, sequence: u64, hooks: &mut dyn Hooks) -> Result<(), SocketError> {
        let watched = self.watched(hooks);
        self.answer_with_userfaultfd(&Hook::WatchWrites, sequence, watched)
    }

    fn watched(&self, hooks: &mut dyn Hooks) -> Reply<OwnedFd> {
        let Parts { memory, probe, ownership, writes, tracking, .. } = &self.parts;
        let link = self.link.id;
        ownership.lock().watch_writes(link).map_err(forbidden)?;
        self.check_whole()?;
        let already = || RemoteError::new(ErrorCode::State, "writes are watched already");
        if !writes.announce(link, || hooks.writes_watched()).map_err(failed)? {
            return Err(already());
        }
        let watched = tracking.suspend(link).map_err(RemoteError::from).and_then(|()| match writes
            .watch(memory, Arc::clone(&self.link), probe.clone())
        {
            Ok(Some(for_agent)) => Ok(for_agent),
            Ok(None) => Err(already()),
            Err(error) => Err(RemoteError::new(ErrorCode::System, chain(&error))),
        });
        if watched.is_err() {
            if !writes.are_watched() {
                tracking.resume(memory);
            }
            // Announced, and not to be.
            writes.withdraw(link, || hooks.writes_unwatched());
        }
        watched
    }

    fn answer_with_userfaultfd(
        &self, hook: &Hook, sequence: u64, made: Reply<OwnedFd>,
    ) -> Result<(), SocketError> {
        let (reply, fd) = match made {
            Ok(fd) => (Ok(()), Some(fd)),
            Err(error) => {
                log::warn!("hook {}: {error}", hook.name());
                (Err(error), None)
            }
        };
        let fds: Vec<BorrowedFd<'_>> = fd.iter().map(AsFd::as_fd).collect();
        self.answer(hook.code(), &encode_hook_reply(sequence, &reply), &fds)
    }

    fn unregister_faults(&self, complete: bool, hooks: &mut dyn Hooks) {
        let turn = self.parts.ownership.turn();
        if complete && self.parts.faults.pending_by(self.link.id) {
            self.parts.faults.unregister();
            hooks.memory_complete();
        } else {
            drop(turn);
            self.give_memory_up(hooks);
        }
    }

    fn save_state(&self, sequence: u64, hooks: &mut dyn Hooks) -> Result<(), SocketError> {
        // Also here: a guest that the VMM stopped by itself is paused by no hook.
        let saved = self.check_whole().and_then(|()| {
            let guest = self.run_state(hooks).map_err(no_run_state)?;
            let (pieces, file) =
                hooks.save_state().and_then(|pieces| write_pieces(&pieces)).map_err(failed)?;
            Ok((guest, pieces, file))
        });
        match saved {
            Ok((guest, pieces, file)) => {
                let saved = Ok(SavedState { guest, pieces });
                self.answer(
                    hook::code::SAVE_STATE,
                    &encode_state_reply(sequence, &saved),
                    &[file.as_fd()],
                )
            }
            Err(error) => {
                log::warn!("hook save state: {error}");
                self.answer(hook::code::SAVE_STATE, &encode_state_reply(sequence, &Err(error)), &[])
            }
        }
    }

    /// Nobody takes what is missing for zero: it is neither sent nor saved.
    fn check_whole(&self) -> Reply<()> {
        if self.parts.faults.is_whole() {
            Ok(())
        } else {
            Err(RemoteError::new(ErrorCode::State, Error::MemoryLost))
        }
    }

    /// The hooks whose answer is success or an error.
    fn call(&mut self, hook: Hook, fds: &[OwnedFd], hooks: &mut dyn Hooks) -> Reply<()> {
        match hook {
            Hook::Pause => self.pause(hooks),
            Hook::Resume { force, paused } => self.resume(force, paused, hooks),
            Hook::StartTracking { sources } => self.start_tracking(sources, hooks),
            Hook::StopTracking { sources } => self.stop_tracking(sources, hooks),
            Hook::SyncTracker => {
                let log = &self.parts.memory.log;
                self.parts
                    .tracking
                    .use_hooks(self.link.id, || hooks.sync_tracker(log).map_err(failed))
            }
            Hook::ClearTracker { block, first, bitmap } => {
                self.clear_tracker(block, first, bitmap, hooks)
            }
            Hook::Throttle { percent } => {
                let throttle = || hooks.throttle(percent).map_err(failed);
                self.parts.tracking.throttle(self.link.id, percent, throttle)
            }
            Hook::LoadState { pieces } => self.load_state(pieces, fds, hooks),
            Hook::UnregisterFaults { complete } => {
                self.unregister_faults(complete, hooks);
                Ok(())
            }
            Hook::UnwatchWrites => {
                if self.parts.writes.unwatch(self.link.id) {
                    self.parts.tracking.resume(&self.parts.memory);
                }
                self.parts.writes.withdraw(self.link.id, || hooks.writes_unwatched());
                Ok(())
            }
            Hook::PrepareRestore { path } => self.prepare_restore(Path::new(&path), hooks),
            Hook::ProbeFaults => {
                let probed = self.parts.faults.probe(&self.parts.memory);
                probed.map_err(|error| RemoteError::new(ErrorCode::Unsupported, chain(&error)))
            }
            // Answered before it comes here.
            Hook::SaveState
            | Hook::Relinquish { .. }
            | Hook::RegisterFaults
            | Hook::WatchWrites
            | Hook::Event { .. } => Ok(()),
        }
    }

    fn start_tracking(&self, sources: Trackers, hooks: &mut dyn Hooks) -> Reply<()> {
        let (tracking, link) = (&self.parts.tracking, self.link.id);
        if sources.contains(Trackers::HOOKS) {
            tracking.start_hooks(link, || hooks.start_tracking().map_err(failed))?;
        }
        if sources.contains(Trackers::WRITE_PROTECT) {
            tracking.start_scanning(link, &self.parts.memory)?;
        }
        Ok(())
    }

    fn stop_tracking(&self, sources: Trackers, hooks: &mut dyn Hooks) -> Reply<()> {
        let (tracking, link) = (&self.parts.tracking, self.link.id);
        if sources.contains(Trackers::WRITE_PROTECT) {
            tracking.stop_scanning(link);
        }
        if sources.contains(Trackers::HOOKS) {
            tracking.stop_hooks(link, || hooks.stop_tracking()).map_err(failed)?;
        }
        Ok(())
    }

    fn pause(&mut self, hooks: &mut dyn Hooks) -> Reply<()> {
        let _turn = self.parts.ownership.turn();
        self.parts.ownership.lock().pause(self.link.id).map_err(forbidden)?;
        self.check_whole()?;
        // First: no guest stands still without it, and none for the time that it takes.
        let heartbeat =
            self.watch().map_err(|error| RemoteError::new(ErrorCode::System, chain(&error)))?;
        let before = self.run_state(hooks).map_err(no_run_state)?;
        let paused = hooks.pause();
        self.parts.ownership.lock().paused(self.link.id, paused.is_ok(), before);
        // Also if it failed: it may have stopped a part of the guest.
        self.paused = Some(heartbeat);
        paused.map_err(failed)
    }

    /// Has the link cut if the agent hangs, until what is returned is dropped.
    fn watch(&self) -> Result<Heartbeat, Error> {
        let link = Arc::clone(&self.link);
        // The end of the hook channel is seen here anyway.
        // Whoever found that it hangs has it killed.
        let cut = move |_| {
            link.cut();
        };
        let probe = self.parts.probe.clone();
        Heartbeat::start(probe, Arc::clone(&self.link), BUSY, Ends::Control, |_| false, cut)
    }

    fn resume(&mut self, force: bool, paused: bool, hooks: &mut dyn Hooks) -> Reply<()> {
        let _turn = self.parts.ownership.turn();
        let decided =
            self.parts.ownership.lock().resume(self.link.id, force, paused).map_err(forbidden)?;
        match decided {
            Resume::Already => Ok(()),
            Resume::To(run_state) => {
                let resumed = self.go_back(run_state, hooks);
                if resumed.is_ok() {
                    self.paused = None;
                }
                resumed.map_err(failed)
            }
        }
    }

    /// Ownership turns before the answer leaves, as when the VMM itself starts a restore.
    fn prepare_restore(&self, image: &Path, hooks: &mut dyn Hooks) -> Reply<()> {
        let _turn = self.parts.ownership.turn();
        self.parts.ownership.lock().prepare_restore(self.link.id).map_err(forbidden)?;
        hooks.prepare_restore(image).map_err(failed)?;
        self.parts.ownership.lock().await_guest(self.link.id).map_err(forbidden)?;
        self.parts.faults.forget();
        Ok(())
    }

    fn load_state(
        &self, pieces: Vec<PieceSize>, fds: &[OwnedFd], hooks: &mut dyn Hooks,
    ) -> Reply<()> {
        let _turn = self.parts.ownership.turn();
        self.parts.ownership.lock().load_state(self.link.id).map_err(forbidden)?;
        let [file] = fds else {
            let sentence =
                format!("load state came with {} file descriptors, expected 1", fds.len());
            return Err(RemoteError::new(ErrorCode::Invalid, sentence));
        };
        // The answer to the VMM that asked for this guest may still be on its way.
        self.parts.faults.forget();
        read_pieces(pieces, file.as_fd()).and_then(|state| hooks.load_state(state)).map_err(failed)
    }

    fn clear_tracker(
        &self, id: u32, first: u64, mut bitmap: Vec<u64>, hooks: &mut dyn Hooks,
    ) -> Reply<()> {
        let Some(block) = self.parts.memory.block(id) else {
            return Err(RemoteError::new(
                ErrorCode::NotFound,
                format!("block {id} does not exist"),
            ));
        };
        let pages = block.geometry.pages();
        let words = words_for(pages);
        let end = (first / 64).saturating_add(bitmap.len() as u64);
        if end > words {
            let sentence = format!(
                "block {id}: {} words from page {first:#x} for {pages:#x} pages",
                bitmap.len()
            );
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
        self.parts.tracking.use_hooks(self.link.id, || hooks.clear_tracker(pages).map_err(failed))
    }
}

/// A hook that needs the guest's run state, which the VMM does not know.
fn no_run_state(error: HookError) -> RemoteError {
    let code = failed(error.clone()).code;
    RemoteError::new(code, format!("run state: {error}"))
}

fn failed(error: HookError) -> RemoteError {
    let code = if error.is_panic() { ErrorCode::Panicked } else { ErrorCode::Other };
    RemoteError::new(code, error)
}

fn forbidden(error: Forbidden) -> RemoteError {
    RemoteError::new(ErrorCode::State, error)
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
        match self.thread.join() {
            Ok(hooks) => hooks,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }
}
