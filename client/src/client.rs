//! The handle of an agent: connecting, blocks, trackers, and a new agent after a lost one.
//!
//! What the guest's memory needs to survive the agent ([`Memory`]) is made here and handed to each agent in turn.

use crate::agent_process::AgentProcess;
use crate::block::{Block, BlockAdded, BlockSpec, errno};
use crate::control::{Control, Link};
use crate::error::Error;
use crate::faults::Faults;
use crate::hooks::{HookChannel, Parts};
use crate::memory::Memory;
use crate::ownership::{Ownership, SharedOwnership};
use crate::shared::Fence;
use crate::writes::Writes;
use pageferry_protocol::control::job::JobStatus;
use pageferry_protocol::control::request::{
    AddBlockReply, BLOCK_DISCARDED, Request, TRACKER_HOOKS, TRACKER_WRITE_PROTECT,
};
use pageferry_protocol::control::unix_path::connect_unix;
use pageferry_protocol::memory::BlockGeometry;
use pageferry_protocol::shm::{DirtyLog, MappedBitmap};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError, Weak};
use std::time::{Duration, Instant};

/// How a client is set up.
#[derive(Debug, Clone)]
pub struct Config {
    /// Bytes of guest physical address space that the dirty log covers, from address zero. The default of 4 TiB takes a memfd of 128 MiB,
    /// which is sparse: it costs memory only where guest pages are dirty. No block can lie outside.
    pub log_covers: u64,
    /// How long the agent may take to answer a request, and to take an answer. It is lost if it takes longer. While it takes a background snapshot it
    /// answers a discard when it has saved what that covers: large ones are cut into requests with which a disk that saves 13 MiB in a second is in time, if this is at
    /// least 80 milliseconds. To listen at a name it looks that up for up to 5 seconds, so leave it more than those.
    pub request_timeout: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self { log_covers: 4 << 40, request_timeout: Duration::from_secs(10) }
    }
}

/// Which trackers report the guest's writes, beside the shared log.
#[derive(Debug, Clone, Copy, Default)]
pub struct Trackers<'a> {
    /// The VMM answers the sync and clear hooks: KVM's dirty log.
    pub hooks: bool,
    /// Write-protect scanning through this `/proc/self/pagemap` of the VMM. Duplicated.
    pub pagemap: Option<BorrowedFd<'a>>,
}

/// The VMM's side of an agent. Clones are the same client; any thread may use any of them.
///
/// Requests go one at a time. When the last clone is dropped, the connection ends, and with it the hook channel.
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
    session: Mutex<Session>,
    /// Who is next to have the session. The session's own lock goes to whoever is there when it is given back, which is the one who gave it back and wants it again.
    turn: Mutex<()>,
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
    trackers: KeptTrackers,
    /// Processes that were handed the guest's memory, and are not known to have ended.
    processes: Vec<Arc<AgentProcess>>,
}

#[derive(Debug, Default)]
struct KeptTrackers {
    hooks: bool,
    pagemap: Option<OwnedFd>,
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

    /// Sees to it that no process but that of `next` has the guest's memory from here any more.
    fn end_processes(&mut self, next: Option<&AgentProcess>, timeout: Duration) -> Result<(), Error> {
        let deadline = Instant::now() + timeout;
        let mut outcome = Ok(());
        let mut processes = Vec::new();
        for process in std::mem::take(&mut self.processes) {
            if next.is_some_and(|next| !process.has_ended() && next.is(&process)) {
                processes.push(process);
            } else if let Err(why) = process.end(deadline.saturating_duration_since(Instant::now())) {
                outcome = Err(Error::AgentRuns { pid: process.pid(), waited: timeout, why });
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
    /// If the path has more than 107 bytes, nobody listens there, an agent that hangs takes no connection
    /// within [`Config::request_timeout`], or the agent refuses or breaks the handshake.
    pub fn connect(path: &Path, config: Config) -> Result<(Self, HookChannel), Error> {
        Self::from_socket(connect(path, config.request_timeout)?, config)
    }

    /// Opens the protocol on a connected UNIX stream socket.
    ///
    /// # Errors
    /// If the agent refuses or breaks the handshake.
    pub fn from_socket(socket: OwnedFd, config: Config) -> Result<(Self, HookChannel), Error> {
        let (memory, fence) = (Arc::new(Memory::new(config.log_covers)?), Arc::new(Fence::new()?));
        let (ownership, faults, writes) = (Arc::new(SharedOwnership::new()), Arc::default(), Arc::default());
        let (mut control, hooks) = Control::open(socket, &fence, &ownership, config.request_timeout)?;
        control.hand_over(memory.log_fd.as_fd(), memory.log_bytes(), &hooks.agents)?;
        let link = Arc::clone(control.link());
        let processes = link.process().into_iter().cloned().collect();
        let session = Mutex::new(Session { control, trackers: KeptTrackers::default(), processes });
        let client = Self {
            inner: Arc::new(Inner {
                config,
                memory,
                fence,
                ownership,
                faults,
                writes,
                session,
                turn: Mutex::default(),
            }),
        };
        let channel = client.channel(hooks.ours, link);
        Ok((client, channel))
    }

    fn channel(&self, hooks: OwnedFd, link: Arc<Link>) -> HookChannel {
        let Inner { config, memory, ownership, faults, writes, .. } = &*self.inner;
        HookChannel::new(
            hooks,
            link,
            Parts {
                memory: Arc::clone(memory),
                ownership: Arc::clone(ownership),
                faults: Arc::clone(faults),
                writes: Arc::clone(writes),
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
        self.reattach_socket(connect(path, self.request_timeout())?)
    }

    /// Gives up the agent, if it is not lost already, and hands the same dirty log, blocks, bitmaps of discarded pages and trackers to a
    /// new one. The old hook channel ends, which resumes a guest that was paused through it and is ours. Ownership stays as it is.
    ///
    /// Before the new agent gets anything, the process of the old one has ended: it is killed (SIGKILL), also if it still sends the memory
    /// of a guest that has left, which [`Client::recover`] then goes on with. Where the VMM may not kill it, since it belongs to another
    /// user, its end is waited for. The new agent may be the process of the old one, which takes a new connection: then it is left
    /// alive, and has ended all that it did for the old connection before it starts a job for the new one.
    ///
    /// An agent on threads of the VMM's own process cannot be killed: see to it that its threads have ended.
    ///
    /// # Errors
    /// If the new agent refuses or breaks the handshake, or refuses a block; or [`Error::AgentRuns`] if the process of the old one has not
    /// ended within [`Config::request_timeout`]. The client has no agent then.
    pub fn reattach_socket(&self, socket: OwnedFd) -> Result<HookChannel, Error> {
        let Inner { config, memory, fence, ownership, .. } = &*self.inner;
        let mut session = self.session();
        session.control.retire("the VMM attached another");
        let (mut control, hooks) = Control::open(socket, fence, ownership, config.request_timeout)?;
        let link = Arc::clone(control.link());
        let process = link.process().cloned();
        if let Err(error) = session.end_processes(process.as_deref(), config.request_timeout) {
            control.retire("the agent before has not ended");
            return Err(error);
        }
        session.processes.extend(process);
        let handed_over = control
            .hand_over(memory.log_fd.as_fd(), memory.log_bytes(), &hooks.agents)
            .and_then(|()| memory.all().iter().try_for_each(|block| send_block(&mut control, block, 0).map(drop)))
            .and_then(|()| match session.trackers.sources() {
                0 => Ok(()),
                _ => session.trackers.send(&mut control),
            });
        if let Err(error) = handed_over {
            control.retire("it refused what it was handed");
            return Err(error);
        }
        session.control = control;
        Ok(self.channel(hooks.ours, link))
    }

    /// Adds a block of guest memory.
    ///
    /// # Errors
    /// If the block is not valid, overlaps another, lies outside the dirty log, or the agent refuses it or is lost.
    pub fn add_block(&self, spec: BlockSpec<'_>) -> Result<BlockAdded, Error> {
        let geometry = BlockGeometry {
            id: spec.id,
            name: spec.name.to_owned(),
            gpa: spec.gpa,
            length: spec.length,
            granularity: spec.granularity,
        };
        let mut session = self.session();
        if let Some(lost) = session.control.lost() {
            return Err(lost);
        }
        self.memory().reserve(&geometry)?;
        let flags = if spec.discarded { BLOCK_DISCARDED } else { 0 };
        let added = Block::new(geometry, &spec).and_then(|block| {
            let added = send_block(&mut session.control, &block, flags)?;
            self.memory().insert(Arc::new(block));
            Ok(added)
        });
        if added.is_err() {
            self.memory().forget(spec.id);
        }
        added
    }

    /// Removes a block. Without an agent it is only forgotten here, so that no later agent is handed it.
    ///
    /// # Errors
    /// If there is no such block, or the agent refuses because a job needs it.
    pub fn remove_block(&self, id: u32) -> Result<(), Error> {
        let mut session = self.session();
        if self.memory().block(id).is_none() {
            return Err(Error::UnknownBlock { id });
        }
        match session.control.request(&Request::RemoveBlock { id }, &[], |_| Ok(())) {
            Err(refused @ Error::Refused { .. }) => Err(refused),
            Ok(()) | Err(_) => {
                self.memory().forget(id);
                Ok(())
            }
        }
    }

    /// Says which trackers report the guest's writes. The shared log always does.
    ///
    /// # Errors
    /// If the agent refuses, as it does while a job runs, or is lost.
    pub fn set_trackers(&self, trackers: Trackers<'_>) -> Result<(), Error> {
        let pagemap = trackers
            .pagemap
            .map(|fd| fd.try_clone_to_owned())
            .transpose()
            .map_err(|source| Error::Kernel { what: "duplicate the pagemap", source: errno(&source) })?;
        let kept = KeptTrackers { hooks: trackers.hooks, pagemap };
        let mut session = self.session();
        kept.send(&mut session.control)?;
        session.trackers = kept;
        Ok(())
    }

    /// The dirty log. Whoever writes guest memory marks it *after* the write.
    pub fn log(&self) -> &Arc<DirtyLog> {
        &self.memory().log
    }

    /// The dirty log's memfd, in vhost's layout from byte 0, for `VHOST_USER_SET_LOG_BASE` of the VMM's other back-ends.
    pub fn log_fd(&self) -> BorrowedFd<'_> {
        self.memory().log_fd.as_fd()
    }

    /// A block's bitmap of discarded pages, to look at: it is what the agent sees, too.
    pub fn discarded(&self, id: u32) -> Option<Arc<MappedBitmap>> {
        self.memory().block(id).map(|block| Arc::clone(&block.discarded))
    }

    /// Whether the guest is this VMM's to run (law 9).
    pub fn ownership(&self) -> Ownership {
        self.inner.ownership.lock().ownership()
    }

    /// Takes the guest by force: an operator's decision, who looked at both sides and knows that the destination does not run. Calls no
    /// hook: the VMM then resumes the guest by itself. In a postcopy with
    /// [`release`](crate::OutgoingOptions::release) the memory here may not be whole any more: the agent's
    /// [`released_pages`](pageferry_protocol::control::job::Counters::released_pages) says so, and it refuses `resume --force`; this call does not.
    ///
    /// An agent that may still send the commit, or bring another guest into this memory, is given up and killed first, as by
    /// [`Client::reattach_socket`]. Look at the destination *after* that, since a commit may be on its way until then: if in doubt, call
    /// [`Client::end_agent`], look, and then call this; `docs/postcopy.md` has the order.
    ///
    /// # Errors
    /// [`Error::AgentRuns`] if that agent has not ended within [`Config::request_timeout`]. Ownership is as it was then.
    pub fn take_by_force(&self) -> Result<(), Error> {
        let mut session = self.session();
        let (ownership, under_way) = {
            let machine = self.inner.ownership.lock();
            (machine.ownership(), machine.is_under_way())
        };
        // Unless it says that its job is over.
        if under_way && !session.has_ended_its_job() {
            session.control.retire("the guest is taken by force");
            session.end_processes(None, self.inner.config.request_timeout)?;
        }
        log::warn!("the guest is taken by force; ownership was {ownership:?}");
        self.inner.ownership.lock().take_by_force();
        Ok(())
    }

    /// Gives the agent up and sees to its end, as [`Client::reattach_socket`] does, without another in its place. After it nothing that the
    /// agent has not sent is sent any more, and nobody but the VMM changes the guest's memory.
    ///
    /// # Errors
    /// [`Error::AgentRuns`] if its process has not ended within [`Config::request_timeout`].
    pub fn end_agent(&self) -> Result<(), Error> {
        let mut session = self.session();
        session.control.retire("the VMM ended it");
        session.end_processes(None, self.inner.config.request_timeout)
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

    /// Asks the agent for a sign of life, unless somebody is asking it something already: how its last job stands. If it owes one, the connection is cut.
    pub(crate) fn ask_for_life(&self) -> Option<JobStatus> {
        let mut session = match self.inner.session.try_lock() {
            Ok(session) => session,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return None,
        };
        // Also a refusal is one.
        session.control.request(&Request::QueryStatus, &[], JobStatus::decode).ok()
    }

    pub(crate) fn request_timeout(&self) -> Duration {
        self.inner.config.request_timeout
    }

    /// What the agent is asked through. Whoever gives it back and wants it again comes after those who wait for it.
    pub(crate) fn session(&self) -> MutexGuard<'_, Session> {
        let _turn = self.inner.turn.lock().unwrap_or_else(PoisonError::into_inner);
        self.inner.session.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An agent that hangs takes no connection, and is waited for no longer than for an answer.
fn connect(path: &Path, timeout: Duration) -> Result<OwnedFd, Error> {
    connect_unix(path, Instant::now() + timeout).map_err(|source| Error::Connect { path: path.to_owned(), source })
}

fn send_block(control: &mut Control, block: &Block, flags: u32) -> Result<BlockAdded, Error> {
    let request = Request::AddBlock {
        geometry: block.geometry.clone(),
        fd_offset: block.fd_offset,
        vmm_address: block.vmm_address,
        flags,
    };
    let reply =
        control.request(&request, &[block.memory.as_fd(), block.discarded_fd.as_fd()], AddBlockReply::decode)?;
    Ok(BlockAdded { host_page_size: reply.host_page_size, sealed: reply.sealed != 0 })
}

impl KeptTrackers {
    fn sources(&self) -> u32 {
        let hooks = if self.hooks { TRACKER_HOOKS } else { 0 };
        let scanning = if self.pagemap.is_some() { TRACKER_WRITE_PROTECT } else { 0 };
        hooks | scanning
    }

    fn send(&self, control: &mut Control) -> Result<(), Error> {
        let fds: Vec<BorrowedFd<'_>> = self.pagemap.iter().map(AsFd::as_fd).collect();
        control.request(&Request::SetTrackers { sources: self.sources() }, &fds, |_| Ok(()))
    }
}
