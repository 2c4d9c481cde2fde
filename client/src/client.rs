//! The handle of an agent: connecting, and a new agent after a lost one.
//!
//! What the guest's memory needs to survive the agent ([`Memory`]) is made here and handed to each
//! agent in turn.

use crate::agent_process::AgentProcess;
use crate::blocks::send_block;
use crate::control::{Control, Link};
use crate::error::Error;
use crate::faults::Faults;
use crate::heartbeat::{Ends, Heartbeat};
use crate::hooks::{HookChannel, Parts};
use crate::memory::Memory;
use crate::ownership::{Ownership, SharedOwnership};
use crate::patience::{self, Patience, deadline};
use crate::shared::Fence;
use crate::tracking::active::Tracking;
use crate::tracking::declared::Declared;
use crate::writes::Writes;
use pageferry_protocol::control::job::JobStatus;
use pageferry_protocol::control::request::Request;
use pageferry_protocol::control::unix_path::connect_unix;
use pageferry_protocol::shm::{DirtyLog, MappedBitmap};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError, Weak};
use std::time::{Duration, Instant};

/// How a client is set up.
#[derive(Debug, Clone)]
pub struct Config {
    /// Bytes of guest physical address space that the dirty log covers, from address zero. The
    /// default of 4 TiB takes a memfd of 128 MiB, which is sparse: it costs memory only where guest
    /// pages are dirty. No block can lie outside.
    pub log_covers: u64,
    /// How long the agent may take to answer a request, and to take an answer. It is lost if it
    /// takes longer. While it takes a snapshot it answers a discard when it has saved what that
    /// covers: large ones are cut into requests with which a disk that saves 13 MiB in a second is
    /// in time, if this and `stall_timeout` are at least 80 milliseconds. To listen at a name it
    /// looks that up for up to 5 seconds, so leave it more than those.
    pub request_timeout: Duration,
    /// The same, while the agent holds up a guest that can go on without it: a background snapshot
    /// watches its writes, or it is paused by a hook and not given up. `request_timeout` if that is
    /// shorter. An agent that hangs is found within this time and half a second then, and the guest
    /// goes on. The agent answers at any time, however busy its jobs are; what this has to cover is
    /// a machine that gives the agent no processor for a while. A false alarm costs the job.
    ///
    /// A guest whose memory is still to come (postcopy, lazy restore) cannot go on without its
    /// agent, and a false alarm would cost the guest. So there `request_timeout` counts.
    pub stall_timeout: Duration,
    /// Time between two signs of life of the agent while nothing waits for it. An idle agent that
    /// hangs is found within this time and `request_timeout`, and
    /// [`Hooks::agent_lost`](crate::Hooks::agent_lost) is called.
    pub heartbeat: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            log_covers: 4 << 40,
            request_timeout: Duration::from_secs(10),
            stall_timeout: Duration::from_secs(3),
            heartbeat: Duration::from_secs(5),
        }
    }
}

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
    faults: Arc<Faults>,
    writes: Arc<Writes>,
    tracking: Arc<Tracking>,
    patience: Patience,
    session: Mutex<Session>,
    /// Who is next to have the session. The session's own lock goes to whoever is there when it is
    /// given back, which is the one who gave it back and wants it again.
    turn: Mutex<()>,
}

/// How long an agent that closed the connection may take to end.
const GOOD_END: Duration = Duration::from_secs(2);

/// What became of an agent that is lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Lost {
    /// It has ended: no process but the VMM's has the guest's memory from here.
    Ended,
    /// The guest may run elsewhere, and depend on it. It may still read the memory here.
    Spared,
}

/// A client that does not keep the connection.
#[derive(Debug, Clone)]
pub(crate) struct WeakClient(Weak<Inner>);

impl WeakClient {
    pub(crate) fn upgrade(&self) -> Option<Client> {
        Some(Client { inner: self.0.upgrade()? })
    }
}

/// What one agent after the other is asked through. Its lock comes before the one of the blocks.
#[derive(Debug)]
pub(crate) struct Session {
    pub(crate) control: Control,
    /// What a new agent has to be told about trackers.
    pub(crate) trackers: Declared,
    /// Processes that were handed the guest's memory, and are not known to have ended.
    processes: Vec<Arc<AgentProcess>>,
    /// Nothing that cannot fail waits for the end of these any more.
    is_waited_for: bool,
    /// Watches over the agent while nothing else does. None only while a client is made.
    _heartbeat: Option<Heartbeat>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        let session = self.session.get_mut().unwrap_or_else(PoisonError::into_inner);
        // The agent is not killed: it ends its job by itself, or serves the next VMM.
        session.control.link().cut();
    }
}

impl Session {
    /// True if the agent is there, and says that it has no job, or none that runs.
    fn has_ended_its_job(&mut self) -> bool {
        let status = self.control.request(&Request::QueryStatus, &[], JobStatus::decode);
        status.is_ok_and(|status| status.phase.is_final())
    }

    /// Before something is done as if there were no agent, which is lost: kills its process, unless
    /// the guest may depend on it elsewhere, and waits for its end, which takes milliseconds. One
    /// that closed the connection is about to end by itself, and has a moment for that.
    ///
    /// # Errors
    /// [`Error::AgentRuns`] if it lives on: the VMM may not kill it, or the kernel keeps it. Calls
    /// after the first do not wait again.
    pub(crate) fn settle(&mut self) -> Result<Lost, Error> {
        self.processes.retain(|process| !process.has_ended());
        if self.processes.is_empty() {
            return Ok(Lost::Ended);
        }
        if self.control.link().is_spared() {
            return Ok(Lost::Spared);
        }
        if self.is_waited_for {
            return self.end_processes(None, Duration::ZERO).map(|()| Lost::Ended);
        }
        self.is_waited_for = true;
        let timeout = self.control.longest_patience();
        let good_end = deadline(GOOD_END.min(timeout));
        self.processes.retain(|process| !process.wait_for_end(good_end));
        let ended = self.end_processes(None, timeout);
        // Once: there may be many discards.
        ended.inspect_err(|error| log::warn!("{error}"))?;
        Ok(Lost::Ended)
    }

    /// The error that says that an agent that was given up lives on.
    pub(crate) fn runs(&self, why: &str) -> Error {
        let pid = self.processes.first().map_or(0, |process| process.pid());
        Error::AgentRuns { pid, why: why.to_owned() }
    }

    /// Sees to it that no process but that of `next` has the guest's memory from here any more.
    fn end_processes(
        &mut self, next: Option<&AgentProcess>, timeout: Duration,
    ) -> Result<(), Error> {
        let deadline = deadline(timeout);
        let mut outcome = Ok(());
        let mut processes = Vec::new();
        for process in std::mem::take(&mut self.processes) {
            if next.is_some_and(|next| !process.has_ended() && next.is(&process)) {
                processes.push(process);
            } else if let Err(why) = process.end(deadline.saturating_duration_since(Instant::now()))
            {
                outcome = Err(Error::AgentRuns { pid: process.pid(), why });
                processes.push(process);
            }
        }
        self.processes = processes;
        outcome
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
        patience::check(&config)?;
        let (memory, fence) = (Arc::new(Memory::new(config.log_covers)?), Arc::new(Fence::new()?));
        let ownership = Arc::new(SharedOwnership::new());
        let (faults, writes, tracking) = (Arc::default(), Arc::default(), Arc::default());
        let patience = Patience::new(&config, &ownership, &writes);
        let (mut control, hooks) = Control::open(socket, &fence, &ownership, patience.clone())?;
        control.hand_over(memory.log_fd.as_fd(), memory.log_bytes(), &hooks.agents)?;
        control.use_it();
        let link = Arc::clone(control.link());
        let processes = link.process().into_iter().cloned().collect();
        let session = Session {
            control,
            trackers: Declared::default(),
            processes,
            is_waited_for: false,
            _heartbeat: None,
        };
        let (session, turn) = (Mutex::new(session), Mutex::default());
        let inner = Inner {
            config,
            memory,
            fence,
            ownership,
            faults,
            writes,
            tracking,
            patience,
            session,
            turn,
        };
        let client = Self { inner: Arc::new(inner) };
        client.session()._heartbeat = Some(client.watch_idle(&link)?);
        let channel = client.channel(hooks.ours, link);
        Ok((client, channel))
    }

    /// Finds out that the agent hangs while nobody asks it anything. The hook channel tells the
    /// VMM.
    fn watch_idle(&self, link: &Arc<Link>) -> Result<Heartbeat, Error> {
        let (weak, ended) = (WeakClient(Arc::downgrade(&self.inner)), Arc::clone(link));
        let interval = self.inner.config.heartbeat;
        Heartbeat::start(
            weak,
            Arc::clone(link),
            interval,
            Ends::Control,
            |_| false,
            move |_| {
                ended.cut();
            },
        )
    }

    fn channel(&self, hooks: OwnedFd, link: Arc<Link>) -> HookChannel {
        let Inner { config, memory, ownership, faults, writes, tracking, .. } = &*self.inner;
        HookChannel::new(
            hooks,
            link,
            Parts {
                memory: Arc::clone(memory),
                ownership: Arc::clone(ownership),
                faults: Arc::clone(faults),
                writes: Arc::clone(writes),
                tracking: Arc::clone(tracking),
                client: WeakClient(Arc::downgrade(&self.inner)),
            },
            config.request_timeout,
        )
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
        let Inner { memory, fence, ownership, patience, .. } = &*self.inner;
        let mut session = self.session();
        session.control.retire("the VMM attached another");
        let (mut control, hooks) = Control::open(socket, fence, ownership, patience.clone())?;
        let link = Arc::clone(control.link());
        let process = link.process().cloned();
        let timeout = session.control.longest_patience();
        if let Err(error) = session.end_processes(process.as_deref(), timeout) {
            control.retire("the agent before has not ended");
            return Err(error);
        }
        if let Some(process) = process {
            session.processes.retain(|other| !other.is(&process));
            session.processes.push(process);
        }
        session.is_waited_for = false;
        let handed_over = control
            .hand_over(memory.log_fd.as_fd(), memory.log_bytes(), &hooks.agents)
            .and_then(|()| {
                memory
                    .all()
                    .iter()
                    .try_for_each(|block| send_block(&mut control, block, 0).map(drop))
            })
            .and_then(|()| session.trackers.send(&mut control))
            .and_then(|()| self.watch_idle(&link));
        match handed_over {
            Ok(heartbeat) => session._heartbeat = Some(heartbeat),
            Err(error) => {
                control.retire("it refused what it was handed");
                return Err(error);
            }
        }
        control.use_it();
        session.control = control;
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
        if ownership != Ownership::Ours && !session.has_ended_its_job() {
            session.control.retire("the guest is taken by force");
            let timeout = session.control.longest_patience();
            session.end_processes(None, timeout)?;
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
        let mut session = self.session();
        session.control.retire("the VMM ended it");
        let timeout = session.control.longest_patience();
        session.end_processes(None, timeout)
    }

    pub(crate) fn memory(&self) -> &Memory {
        &self.inner.memory
    }

    pub(crate) fn faults(&self) -> &Faults {
        &self.inner.faults
    }

    pub(crate) fn shared_ownership(&self) -> &SharedOwnership {
        &self.inner.ownership
    }

    /// Asks the agent for a sign of life, unless somebody is asking it something already: how its
    /// last job stands. If it owes one, the connection is cut.
    pub(crate) fn ask_for_life(&self) -> Option<JobStatus> {
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
    pub(crate) fn patience(&self) -> &Patience {
        &self.inner.patience
    }

    /// What the agent is asked through. Whoever gives it back and wants it again comes after those
    /// who wait for it.
    pub(crate) fn session(&self) -> MutexGuard<'_, Session> {
        let _turn = self.inner.turn.lock().unwrap_or_else(PoisonError::into_inner);
        self.inner.session.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An agent that hangs takes no connection, and is waited for no longer than for an answer.
fn connect(path: &Path, timeout: Duration) -> Result<OwnedFd, Error> {
    connect_unix(path, deadline(timeout))
        .map_err(|source| Error::Connect { path: path.to_owned(), source })
}
