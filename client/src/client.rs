//! The handle of an agent: connecting, and a new agent after a lost one.
//!
//! What the guest's memory needs to survive the agent ([`Memory`]) is made here and handed to each
//! agent in turn.

use crate::config::Config;
use crate::control::Control;
use crate::deadline::deadline;
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
use crate::watched_writes::WatchedWrites;
use pageferry_protocol::control::job::JobStatus;
use pageferry_protocol::control::request::Request;
use pageferry_protocol::control::unix_path::connect_unix;
use pageferry_protocol::shm::{DirtyLog, MappedBitmap};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::Duration;

/// The VMM's side of an agent. Clones are the same client; any thread may use any of them.
///
/// Requests go one at a time. When the last clone is dropped, the connection ends, and with it the
/// hook channel.
#[derive(Debug, Clone)]
pub struct Client {
    inner: Arc<Inner>,
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
    timeouts: Timeouts,
    session: Mutex<Session>,
    /// Who is next to have the session. The session's own lock goes to whoever is there when it is
    /// given back, which is the one who gave it back and wants it again.
    session_queue: Mutex<()>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        let session = self.session.get_mut().unwrap_or_else(PoisonError::into_inner);
        // The agent is not killed: it ends its job by itself, or serves the next VMM.
        session.control.link().shut_down();
    }
}

impl Client {
    /// Connects to the agent that listens at `path`.
    ///
    /// # Errors
    /// If the path has more than 107 bytes, nobody listens there, an agent that hangs takes no
    /// connection within [`Config::request_timeout`], or the agent refuses or breaks the handshake.
    pub fn connect(path: &Path, config: Config) -> Result<(Self, HookChannel), Error> {
        Self::from_socket(connect(path, config.request_timeout)?, config)
    }

    /// Opens the protocol on a connected UNIX stream socket.
    ///
    /// # Errors
    /// If a time of the configuration is shorter than a millisecond, or the agent refuses or breaks
    /// the handshake.
    pub fn from_socket(socket: OwnedFd, config: Config) -> Result<(Self, HookChannel), Error> {
        config.check()?;
        let (memory, fence) = (Arc::new(Memory::new(config.log_covers)?), Arc::new(Fence::new()?));
        let ownership = Arc::new(SharedOwnership::new());
        let (missing, writes, tracking) = (Arc::default(), Arc::default(), Arc::default());
        let timeouts = Timeouts::new(&config, &ownership, &writes);
        let (mut control, hooks) = Control::open(socket, &fence, &ownership, timeouts.clone())?;
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
            timeouts,
            session,
            session_queue,
        };
        let client = Self { inner: Arc::new(inner) };
        client.session().watch(client.watch_idle(&link)?);
        let channel = client.channel(hooks.ours, link);
        Ok((client, channel))
    }

    /// Finds out that the agent hangs while nobody asks it anything. The hook channel tells the
    /// VMM.
    fn watch_idle(&self, link: &Arc<Link>) -> Result<Heartbeat, Error> {
        let ended = Arc::clone(link);
        let (link, interval) = (Arc::clone(link), self.inner.config.heartbeat);
        let lost = move |_| ended.shut_down();
        Heartbeat::start(self.probe(), link, interval, WatchedSockets::Control, |_| false, lost)
    }

    /// Asks for a sign of life for as long as there is a client. It keeps no connection: a client
    /// that is dropped ends its connection.
    fn probe(&self) -> Probe {
        let weak = Arc::downgrade(&self.inner);
        Probe::new(move || Self { inner: weak.upgrade()? }.probe_agent())
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
        };
        HookChannel::new(hooks, context, config.request_timeout)
    }

    /// Hands everything to a new agent that listens at `path`; see [`Client::reattach_socket`].
    ///
    /// # Errors
    /// As [`Client::connect`], and if the new agent refuses a block.
    pub fn reattach(&self, path: &Path) -> Result<HookChannel, Error> {
        self.reattach_socket(connect(path, self.inner.config.request_timeout)?)
    }

    /// Gives up the agent, if it is not lost already, and hands the same dirty log, blocks, bitmaps
    /// of discarded pages and trackers to a new one. The old hook channel ends, which resumes a
    /// guest that was paused through it and is ours. Ownership stays as it is.
    ///
    /// Before the new agent gets anything, the process of the old one has ended: it is killed
    /// (SIGKILL), also if it still sends the memory of a guest that has left, which
    /// [`Client::recover`] then goes on with. Where the VMM may not kill it, since it belongs to
    /// another user, its end is waited for. The new agent may be the process of the old one, which
    /// takes a new connection: then it is left alive, and has ended all that it did for the old
    /// connection before it starts a job for the new one.
    ///
    /// An agent on threads of the VMM's own process cannot be killed: see to it that its threads
    /// have ended.
    ///
    /// # Errors
    /// If the new agent refuses or breaks the handshake, or refuses a block; or
    /// [`Error::AgentRuns`] if the process of the old one has not ended within
    /// [`Config::request_timeout`]. The client has no agent then.
    pub fn reattach_socket(&self, socket: OwnedFd) -> Result<HookChannel, Error> {
        let Inner { memory, fence, ownership, timeouts, .. } = &*self.inner;
        let mut session = self.session();
        session.control.retire("the VMM attached another");
        let (mut control, hooks) = Control::open(socket, fence, ownership, timeouts.clone())?;
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
            .and_then(|()| self.watch_idle(&link));
        let heartbeat = handed_over.inspect_err(|_| {
            control.retire("it refused what it was handed");
        })?;
        control.set_attached();
        session.replace(control, heartbeat);
        Ok(self.channel(hooks.ours, link))
    }

    /// The dirty log. Whoever writes guest memory marks it *after* the write.
    pub fn log(&self) -> &Arc<DirtyLog> {
        &self.memory().log
    }

    /// The dirty log's memfd, in vhost's layout from byte 0, for `VHOST_USER_SET_LOG_BASE` of the
    /// VMM's other back-ends.
    pub fn log_fd(&self) -> BorrowedFd<'_> {
        self.memory().log_fd.as_fd()
    }

    /// A block's bitmap of discarded pages, to look at: it is what the agent sees, too.
    pub fn discarded(&self, id: u32) -> Option<Arc<MappedBitmap>> {
        self.memory().block(id).map(|block| Arc::clone(&block.discarded))
    }

    /// Whether the guest is this VMM's to run (`one-owner`).
    pub fn ownership(&self) -> Ownership {
        self.inner.ownership.lock().ownership()
    }

    /// Takes the guest by force: an operator's decision, who looked at both sides and knows that
    /// the destination does not run. Calls no hook: the VMM then resumes the guest by itself. In a
    /// postcopy with [`release`](crate::OutgoingOptions::release) the memory here may not be whole
    /// any more: the agent's
    /// [`released_pages`](pageferry_protocol::control::job::Counters::released_pages) says so, and
    /// it refuses `resume --force`; this call does not.
    ///
    /// An agent that may still send the commit, or bring another guest into this memory, is given
    /// up and killed first, as by [`Client::reattach_socket`]. Look at the destination *after*
    /// that, since a commit may be on its way until then: if in doubt, call [`Client::end_agent`],
    /// look, and then call this; `docs/postcopy.md` has the order.
    ///
    /// # Errors
    /// [`Error::AgentRuns`] if that agent has not ended within [`Config::request_timeout`].
    /// Ownership is as it was then.
    pub fn take_by_force(&self) -> Result<(), Error> {
        let mut session = self.session();
        let ownership = self.ownership();
        // Unless it says that its job is over.
        if ownership != Ownership::Ours && !session.has_no_running_job() {
            session.end("the guest is taken by force")?;
        }
        log::warn!("the guest is taken by force; ownership was {ownership:?}");
        self.inner.ownership.lock().take_by_force();
        Ok(())
    }

    /// Gives the agent up and sees to its end, as [`Client::reattach_socket`] does, without another
    /// in its place. After it nothing that the agent has not sent is sent any more, and nobody but
    /// the VMM changes the guest's memory.
    ///
    /// # Errors
    /// [`Error::AgentRuns`] if its process has not ended within [`Config::request_timeout`].
    pub fn end_agent(&self) -> Result<(), Error> {
        self.session().end("the VMM ended it")
    }

    pub(crate) fn memory(&self) -> &Memory {
        &self.inner.memory
    }

    pub(crate) fn missing(&self) -> &MissingPages {
        &self.inner.missing
    }

    pub(crate) fn shared_ownership(&self) -> &SharedOwnership {
        &self.inner.ownership
    }

    /// Asks the agent for a sign of life, unless somebody is asking it something already: how its
    /// last job stands. If it owes one, the connection is cut.
    fn probe_agent(&self) -> Option<JobStatus> {
        // Nothing is gained by giving an agent up that may still say that no commit left.
        if self.ownership() == Ownership::Relinquished {
            return None;
        }
        let mut session = match self.inner.session.try_lock() {
            Ok(session) => session,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return None,
        };
        // Also a refusal is one.
        session.control.request(&Request::QueryStatus, &[], JobStatus::decode).ok()
    }

    /// How long the agent may take.
    pub(crate) fn timeouts(&self) -> &Timeouts {
        &self.inner.timeouts
    }

    /// What the agent is asked through. Whoever gives it back and wants it again comes after those
    /// who wait for it.
    pub(crate) fn session(&self) -> MutexGuard<'_, Session> {
        let _queued = lock(&self.inner.session_queue);
        lock(&self.inner.session)
    }
}

/// An agent that hangs takes no connection, and is waited for no longer than for an answer.
fn connect(path: &Path, timeout: Duration) -> Result<OwnedFd, Error> {
    connect_unix(path, deadline(timeout))
        .map_err(|source| Error::Connect { path: path.to_owned(), source })
}
