// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The handle of an agent: connecting, and attaching a new agent after a lost one.
//!
//! The memory of the guest must survive the agent. So the client makes what that takes ([`Memory`])
//! and hands it to one agent after the other.

use crate::config::Config;
use crate::control::Control;
use crate::deadline::deadline;
use crate::discard_queue::DiscardQueue;
use crate::error::Error;
use crate::heartbeat::{Heartbeat, Probe, WatchedSockets};
use crate::hooks::{HookChannel, HookContext};
use crate::link::Link;
use crate::memfd::Fence;
use crate::memory::Memory;
use crate::missing_pages::MissingPages;
use crate::ownership::{Ownership, SharedOwnership};
use crate::session::Session;
use crate::sync::lock;
use crate::timeouts::Timeouts;
use crate::tracking::active::ActiveTrackers;
use crate::wakeup::Wakeup;
use crate::watched_writes::WatchedWrites;
use pageferry_protocol::control::job::JobStatus;
use pageferry_protocol::control::request::Request;
use pageferry_protocol::control::unix_path::connect_unix;
use pageferry_protocol::shm::{DirtyLog, MappedBitmap};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError, Weak};
use std::time::{Duration, Instant};

/// The VMM's side of an agent. Clones are the same client; any thread may use any of them.
///
/// The client sends one request at a time. When the last clone is dropped, the connection and the
/// hook channel end, and an agent that the VMM has [spawned](Client::spawn) exits. So what is to
/// end with the agent, such as the VMM's [`Hooks`](crate::Hooks), keeps a [`WeakClient`] instead.
#[derive(Debug, Clone)]
pub struct Client {
    inner: Arc<Inner>,
}

/// A client that does not keep the connection: see [`Client::downgrade`].
#[derive(Debug, Clone)]
pub struct WeakClient {
    inner: Weak<Inner>,
}

impl WeakClient {
    /// The client; `None` if its last clone was dropped.
    pub fn upgrade(&self) -> Option<Client> {
        Some(Client { inner: self.inner.upgrade()? })
    }

    /// True if [`WeakClient::upgrade`] would return a client at this moment.
    pub(crate) fn is_alive(&self) -> bool {
        self.inner.strong_count() > 0
    }
}

#[derive(Debug)]
struct Inner {
    config: Config,
    memory: Arc<Memory>,
    fence: Arc<Fence>,
    ownership: Arc<SharedOwnership>,
    missing: Arc<MissingPages>,
    writes: Arc<WatchedWrites>,
    tracking: Arc<ActiveTrackers>,
    wakeup: Arc<Wakeup>,
    discard_queue: DiscardQueue,
    timeouts: Timeouts,
    session: Mutex<Session>,
    /// Held while a thread waits for `session`. Without it, a thread that unlocks the session and
    /// wants it again would overtake the threads that wait.
    session_queue: Mutex<()>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        let session = self.session.get_mut().unwrap_or_else(PoisonError::into_inner);
        // The agent is not killed: it ends its job, or serves the next VMM.
        session.control.link().shut_down();
        self.wakeup.wake();
    }
}

impl Client {
    /// Connects to the agent that listens at `path`.
    ///
    /// # Errors
    /// If the path has more than 107 bytes, nobody listens there, the listener does not accept
    /// within [`Config::request_timeout`], or the agent refuses the handshake or breaks it.
    pub fn connect(path: &Path, config: Config) -> Result<(Self, HookChannel), Error> {
        Self::from_socket(connect(path, config.request_timeout)?, config)
    }

    /// Opens the protocol on a connected UNIX stream socket.
    ///
    /// # Errors
    /// If a duration in the configuration is shorter than a millisecond, or the agent refuses the
    /// handshake or breaks it.
    pub fn from_socket(socket: OwnedFd, config: Config) -> Result<(Self, HookChannel), Error> {
        config.check()?;
        let memory = Arc::new(Memory::new(config.log_covers, config.mapped_by.clone())?);
        let fence = Arc::new(Fence::new()?);
        let ownership = Arc::new(SharedOwnership::new());
        let (missing, writes, tracking) = (Arc::default(), Arc::default(), Arc::default());
        let timeouts = Timeouts::new(&config, &ownership, &writes, &missing);
        let (mut control, hooks) =
            Control::open(socket, &config.name, &fence, &ownership, timeouts.clone())?;
        control.hand_over(memory.log_fd.as_fd(), memory.log_bytes(), &hooks.agents)?;
        control.set_attached();
        let link = Arc::clone(control.link());
        let (session, session_queue) = (Mutex::new(Session::new(control)), Mutex::default());
        let inner = Inner {
            config,
            memory,
            fence,
            ownership,
            missing,
            writes,
            tracking,
            wakeup: Arc::default(),
            discard_queue: DiscardQueue::default(),
            timeouts,
            session,
            session_queue,
        };
        let client = Self { inner: Arc::new(inner) };
        client.log_missing_userfaultfd();
        client.session().watch(client.watch_idle(&link)?);
        let channel = client.channel(hooks.ours, link);
        Ok((client, channel))
    }

    /// A handle that does not keep the connection, for code that is to end with it.
    pub fn downgrade(&self) -> WeakClient {
        WeakClient { inner: Arc::downgrade(&self.inner) }
    }

    /// Process id of the current agent, or of the last one if it is lost. As the agent says, if the
    /// kernel cannot tell: then the agent runs where this VMM does not see its processes.
    pub fn agent_pid(&self) -> u32 {
        self.session().control.link().process().map_or(0, |process| process.pid())
    }

    /// Wakes the supervisor, if there is one.
    pub(crate) fn wakeup(&self) -> &Arc<Wakeup> {
        &self.inner.wakeup
    }

    /// Finds an agent that hangs while no request is sent. The hook channel then tells the VMM.
    fn watch_idle(&self, link: &Arc<Link>) -> Result<Heartbeat, Error> {
        let ended = Arc::clone(link);
        let (link, interval) = (Arc::clone(link), self.inner.config.heartbeat);
        let lost = move |_| ended.shut_down();
        Heartbeat::start(self.probe(), link, interval, WatchedSockets::Control, |_| false, lost)
    }

    /// A probe that works for as long as there is a client. It does not keep the client alive.
    fn probe(&self) -> Probe {
        let weak = self.downgrade();
        Probe::new(move || weak.upgrade()?.probe_agent())
    }

    fn channel(&self, hooks: OwnedFd, link: Arc<Link>) -> HookChannel {
        let Inner { config, memory, ownership, missing, writes, tracking, .. } = &*self.inner;
        let context = HookContext {
            link,
            memory: Arc::clone(memory),
            ownership: Arc::clone(ownership),
            missing: Arc::clone(missing),
            writes: Arc::clone(writes),
            tracking: Arc::clone(tracking),
            probe: self.probe(),
            client: self.downgrade(),
        };
        HookChannel::new(hooks, context, config.request_timeout)
    }

    /// Attaches a new agent that listens at `path`; see [`Client::reattach_socket`].
    ///
    /// # Errors
    /// As [`Client::connect`], and if the new agent refuses a block.
    pub fn reattach(&self, path: &Path) -> Result<HookChannel, Error> {
        self.reattach_socket(connect(path, self.inner.config.request_timeout)?)
    }

    /// Attaches a new agent. Gives up the current agent, unless it is lost already, and hands the
    /// same dirty log, blocks, bitmaps of discarded pages and trackers to the new one. The old hook
    /// channel ends, which resumes a guest that was paused through it and is still ours. Ownership
    /// does not change.
    ///
    /// The new agent gets nothing before the process of the old one has exited. The client kills
    /// that process with SIGKILL, even if it still sends the memory of a guest that has left;
    /// [`Client::recover`] then continues that migration. If the VMM may not kill the process,
    /// since it belongs to another user, the client waits for its exit.
    ///
    /// The new connection may lead to the same process. Then the client does not kill it. The
    /// process ends all work of the old connection before it starts a job for the new one.
    ///
    /// An agent on threads of the VMM's own process cannot be killed: make sure that its threads
    /// have ended.
    ///
    /// # Errors
    /// If the new agent refuses the handshake or a block, or breaks the handshake; or
    /// [`Error::AgentStillRunning`] if the old process has not exited within
    /// [`Config::request_timeout`]. The client then has no agent.
    pub fn reattach_socket(&self, socket: OwnedFd) -> Result<HookChannel, Error> {
        let Inner { config, memory, fence, ownership, timeouts, .. } = &*self.inner;
        let mut session = self.session();
        session.control.retire("the VMM replaced it");
        let (mut control, hooks) =
            Control::open(socket, &config.name, fence, ownership, timeouts.clone())?;
        let link = Arc::clone(control.link());
        if let Err(error) = session.end_predecessors(link.process()) {
            control.retire("the agent before has not ended");
            return Err(error);
        }
        let handed_over = control
            .hand_over(memory.log_fd.as_fd(), memory.log_bytes(), &hooks.agents)
            .and_then(|()| {
                memory.all().iter().try_for_each(|block| control.add_block(block, 0).map(drop))
            })
            .and_then(|()| session.trackers.send(&mut control))
            .and_then(|()| self.continue_missing(&mut control))
            .and_then(|()| self.watch_idle(&link));
        let heartbeat = handed_over.inspect_err(|_| {
            control.retire("it refused what it was handed");
        })?;
        control.set_attached();
        session.replace(control, heartbeat);
        // What no agent could be asked for, and the client could not do alone.
        let _ = self.flush_queued(&mut session);
        Ok(self.channel(hooks.ours, link))
    }

    /// Has the next agent continue to bring the memory that is missing, if there is any and it can.
    fn continue_missing(&self, control: &mut Control) -> Result<(), Error> {
        let Inner { missing, ownership, .. } = &*self.inner;
        if self.ownership() != Ownership::Ours {
            return Ok(());
        }
        let Some((kept, uffd)) = missing.to_continue()? else { return Ok(()) };
        control.continue_job(kept, uffd.as_fd())?;
        missing.continued_by(Arc::clone(control.link()), ownership, self.probe())
    }

    /// How long a guest whose memory is missing waits for the next agent.
    pub(crate) fn continue_within(&self) -> Duration {
        self.inner.config.continue_within
    }

    /// The dirty log. A thread that writes guest memory marks the pages here *after* the write.
    /// Its pages count from guest physical address 0, over all blocks.
    pub fn log(&self) -> &Arc<DirtyLog> {
        &self.memory().log
    }

    /// The dirty log's memfd, in vhost's layout from byte 0, for `VHOST_USER_SET_LOG_BASE` of the
    /// VMM's other back-ends.
    pub fn log_fd(&self) -> BorrowedFd<'_> {
        self.memory().log_fd.as_fd()
    }

    /// The bitmap of discarded pages of a block, for reading. The agent sees the same bitmap.
    pub fn discarded(&self, id: u32) -> Option<Arc<MappedBitmap>> {
        self.memory().block(id).map(|block| Arc::clone(&block.discarded))
    }

    /// Whether the guest is this VMM's to run ([`one-owner`](crate::invariants#one-owner)).
    pub fn ownership(&self) -> Ownership {
        self.inner.ownership.lock().ownership()
    }

    /// Takes the guest by force. This is the decision of an operator who has looked at both sides
    /// and knows that the guest does not run at the destination. Calls no hook: the VMM resumes the
    /// guest itself. After a postcopy with [`release`](crate::OutgoingOptions::release) the memory
    /// here may be incomplete: the agent's counter
    /// [`released_pages`](pageferry_protocol::control::job::Counters::released_pages) tells. The
    /// agent then refuses `resume --force`; this call does not.
    ///
    /// If the agent may still send the commit, or bring another guest into this memory, the client
    /// first gives it up and kills it, as [`Client::reattach_socket`] does. A commit may be on its
    /// way until then, so look at the destination *after* that. If in doubt, call
    /// [`Client::end_agent`], look, and then call this; `docs/postcopy.md` in the repository
    /// has the order.
    ///
    /// # Errors
    /// [`Error::AgentStillRunning`] if that agent has not exited within
    /// [`Config::request_timeout`]. Ownership does not change then.
    pub fn take_by_force(&self) -> Result<(), Error> {
        let mut session = self.session();
        let ownership = self.ownership();
        // An agent that says that its job is over may stay.
        if ownership != Ownership::Ours && !session.has_no_running_job() {
            session.end("the guest is taken by force")?;
        }
        log::warn!("the guest is taken by force; ownership was {ownership:?}");
        self.inner.ownership.lock().take_by_force();
        session.set_ended(false);
        drop(session);
        self.inner.wakeup.wake();
        Ok(())
    }

    /// Gives the agent up and waits for its exit, as [`Client::reattach_socket`] does, but attaches
    /// no other. Afterwards the agent sends nothing more, and only the VMM changes the memory of
    /// the guest.
    ///
    /// # Errors
    /// [`Error::AgentStillRunning`] if the process has not exited within
    /// [`Config::request_timeout`].
    pub fn end_agent(&self) -> Result<(), Error> {
        let mut session = self.session();
        // Before the hook channel ends: a supervisor then looks at this.
        session.set_ended(true);
        session.end("the VMM ended it")
    }

    pub(crate) fn memory(&self) -> &Memory {
        &self.inner.memory
    }

    pub(crate) fn missing(&self) -> &MissingPages {
        &self.inner.missing
    }

    pub(crate) fn discard_queue(&self) -> &DiscardQueue {
        &self.inner.discard_queue
    }

    pub(crate) fn tracking(&self) -> &ActiveTrackers {
        &self.inner.tracking
    }

    pub(crate) fn shared_ownership(&self) -> &SharedOwnership {
        &self.inner.ownership
    }

    /// Asks the agent how its last job stands, as a sign of life, unless another thread is sending
    /// a request. Cuts the connection if the answer does not come in time.
    fn probe_agent(&self) -> Option<JobStatus> {
        // Such an agent may still say that no commit was sent. Giving it up gains nothing.
        if self.ownership() == Ownership::Relinquished {
            return None;
        }
        let mut session = match self.inner.session.try_lock() {
            Ok(session) => session,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return None,
        };
        // A refusal is a sign of life, too.
        session.control.request(&Request::QueryStatus, &[], JobStatus::decode).ok()
    }

    /// How long the agent may take.
    pub(crate) fn timeouts(&self) -> &Timeouts {
        &self.inner.timeouts
    }

    /// The session with the agent. A thread that unlocks it and locks it again lets the waiting
    /// threads go first.
    pub(crate) fn session(&self) -> MutexGuard<'_, Session> {
        let _queued = lock(&self.inner.session_queue);
        lock(&self.inner.session)
    }

    /// The same, unless other threads keep the session locked for `time`. This tries again and
    /// again, since a lock of the standard library has no timeout.
    pub(crate) fn session_within(&self, time: Duration) -> Option<MutexGuard<'_, Session>> {
        const INTERVAL: Duration = Duration::from_micros(100);
        let deadline = deadline(time);
        loop {
            match self.inner.session.try_lock() {
                Ok(session) => return Some(session),
                Err(TryLockError::Poisoned(poisoned)) => return Some(poisoned.into_inner()),
                Err(TryLockError::WouldBlock) if Instant::now() >= deadline => return None,
                Err(TryLockError::WouldBlock) => std::thread::sleep(INTERVAL),
            }
        }
    }
}

/// Connects; an agent that hangs may take as long to accept as to answer.
fn connect(path: &Path, timeout: Duration) -> Result<OwnedFd, Error> {
    connect_unix(path, deadline(timeout))
        .map_err(|source| Error::Connect { path: path.to_owned(), source })
}
