// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! An agent for a QEMU: hands the memory over, answers hooks, and follows hotplug.

use super::guard::{Duty, Guard};
use super::guest_memory::{self, GuestMemoryError};
use super::hooks::{QemuHooks, has_left};
use super::machine::{Guest, Machine};
use super::monitor::{Monitor, MonitorError};
use super::suitability::{self, Unsuitable};
use crate::process::injection::Seccomp;
use crate::process::target::{ProcessError, TargetProcess};
use crate::process::vmm_process::VmmProcess;
use pageferry_client::error::chain;
use pageferry_client::{
    Client, Config, ErrorCode, IncomingOptions, JobKind, JobStatus, Ownership, Phase, Supervisor,
    Target, Trackers,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use std::cell::RefCell;
use std::ffi::OsString;
use std::os::fd::BorrowedFd;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Interval at which QEMU is asked for memory that was plugged in or out.
const LOOK: Duration = Duration::from_secs(1);

/// How long a job may take to report that its guest could not be loaded.
const REPORT_TIMEOUT: Duration = Duration::from_secs(5);

/// Why a QEMU cannot be attached.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// The monitor.
    #[error(transparent)]
    Monitor(#[from] MonitorError),
    /// The process.
    #[error(transparent)]
    Process(#[from] ProcessError),
    /// QEMU cannot be served.
    #[error(transparent)]
    Unsuitable(#[from] Unsuitable),
    /// The memory.
    #[error(transparent)]
    GuestMemory(#[from] GuestMemoryError),
    /// The agent.
    #[error(transparent)]
    Client(#[from] pageferry_client::Error),
    /// The kernel refuses a descriptor or a process.
    #[error("cannot watch QEMU")]
    Watch(#[from] std::io::Error),
}

/// How an attachment ended.
#[derive(Debug)]
pub enum End {
    /// QEMU has exited.
    Exited,
    /// The guest has moved away. Its QEMU is paused and of no more use.
    Moved(Box<JobStatus>),
    /// There is no guest in this QEMU, and it takes no other.
    Useless(String),
    /// The caller wants an end.
    Stopped,
}

/// The processes that are started for a QEMU.
#[derive(Debug, Clone)]
pub struct Helpers {
    /// The agent, and its arguments: `pageferry agent --socket PATH --stdin`.
    pub agent: Vec<OsString>,
    /// The guard, and its arguments: a program that calls [`guard::run`](super::guard::run).
    pub guard: Vec<OsString>,
    /// Name of the VM, for people. May be empty.
    pub vm_name: String,
}

impl Helpers {
    fn agent_command(&self) -> Command {
        let mut words = self.agent.iter();
        let mut command = Command::new(words.next().cloned().unwrap_or_default());
        // Ctrl-C on the terminal is for QEMU.
        command.args(words).process_group(0);
        // The terminal is QEMU's, too: no line for each phase of a job.
        if std::env::var_os("RUST_LOG").is_none() {
            command.env("RUST_LOG", "warn");
        }
        command
    }
}

/// A QEMU with its agent.
#[derive(Debug)]
pub struct Attachment {
    machine: Arc<Machine>,
    vmm: Arc<VmmProcess>,
    client: Client,
    supervisor: Supervisor<QemuHooks>,
    listens: AtomicBool,
    /// Why the memory cannot be followed, as it was logged last.
    last_error: RefCell<Option<String>>,
}

impl Attachment {
    /// Starts an agent for the QEMU that `monitor` controls, and hands it the memory.
    /// `awaits_guest`: QEMU was started for a guest that comes from elsewhere.
    ///
    /// # Errors
    /// If QEMU cannot be served, or an agent cannot be started. QEMU goes on as before.
    pub fn new(
        mut monitor: Monitor, process: TargetProcess, helpers: Helpers, awaits_guest: bool,
    ) -> Result<Self, AttachError> {
        suitability::check(&mut monitor)?;
        // Found before an agent is started: most of what can be wrong is wrong here.
        guest_memory::find(&mut monitor, &process)?;
        let vmm = Arc::new(VmmProcess::new(process.try_clone()?, Seccomp::Harmless));
        let config = Config {
            name: helpers.vm_name.clone(),
            mapped_by: Some(vmm.clone()),
            ..Config::default()
        };
        let guest = if awaits_guest { Guest::Awaited } else { Guest::Here };
        let machine = Machine::new(monitor, process, guest)?;
        let mut guard = Guard::new(helpers.guard.clone());
        // Now, and not in the pause of a guest.
        guard.set(Duty::Nothing)?;
        let hooks = QemuHooks::new(Arc::clone(&machine), guard);
        let (client, supervisor) =
            Supervisor::spawn(move || helpers.agent_command(), config, hooks)?;
        let listens = AtomicBool::new(false);
        let last_error = RefCell::default();
        let this = Self { machine, vmm, client, supervisor, listens, last_error };
        // QEMU punches what the guest gives back, and tells nobody. Declared before the memory: who
        // waits for the memory (`pageferry status --wait`) may start any job.
        this.client.set_trackers(Trackers::WRITE_PROTECT | Trackers::UNANNOUNCED_FREES)?;
        this.follow_memory()?;
        Ok(this)
    }

    /// Waits for a guest at `address`. Returns the address with the port that the kernel chose, if
    /// `address` has port 0.
    ///
    /// # Errors
    /// If the agent refuses.
    pub fn listen(&self, address: &str, options: &IncomingOptions) -> Result<String, AttachError> {
        let target = Target::Address(address.to_owned());
        let job = self.client.start_incoming(target, options)?;
        self.listens.store(true, Ordering::Relaxed);
        Ok(job.address)
    }

    /// True if QEMU was started for the guest that [`Attachment::listen`] waits for.
    fn listens(&self, guest: Guest) -> bool {
        guest == Guest::Awaited && self.listens.load(Ordering::Relaxed)
    }

    /// The longest time that QEMU's main thread was stopped to create userfaultfds.
    pub fn longest_stop(&self) -> Duration {
        self.vmm.longest_stop()
    }

    /// What the agent serves, for people.
    pub fn summary(&self) -> String {
        let state = self.machine.state();
        let bytes: u64 = state.known.iter().map(|block| block.spec().length).sum();
        let blocks = match state.known.len() {
            1 => "1 block".to_owned(),
            count => format!("{count} blocks"),
        };
        let pid = self.machine.process.pid();
        format!("QEMU {pid} has {} MiB of guest memory in {blocks}", bytes >> 20)
    }

    /// Serves until QEMU exits, its guest leaves, or `stop` is readable.
    ///
    /// # Errors
    /// If the kernel refuses to wait.
    pub fn serve(&self, stop: BorrowedFd<'_>) -> Result<End, AttachError> {
        loop {
            if self.machine.process.has_exited()? {
                return Ok(End::Exited);
            }
            if let Some(end) = self.end_of_guest() {
                return Ok(end);
            }
            if let Err(error) = self.follow_memory() {
                let error = chain(&error);
                if self.last_error.replace(Some(error.clone())) != Some(error.clone()) {
                    log::warn!("no job can pause this guest: QEMU's memory: {error}");
                }
            }
            let mut polled = [
                PollFd::from_borrowed_fd(stop, PollFlags::IN),
                PollFd::from_borrowed_fd(self.machine.process.pidfd(), PollFlags::IN),
                PollFd::from_borrowed_fd(self.machine.news(), PollFlags::IN),
            ];
            let timeout = Timespec::try_from(LOOK).ok();
            match poll(&mut polled, timeout.as_ref()) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => return Err(AttachError::Watch(errno.into())),
            }
            if !polled[0].revents().is_empty() {
                return Ok(End::Stopped);
            }
            self.machine.clear_news();
        }
    }

    /// What the jobs that have ended since mean for the guest.
    fn end_of_guest(&self) -> Option<End> {
        let (ended, is_useless, guest) = {
            let mut state = self.machine.state();
            (std::mem::take(&mut state.ended), state.is_useless.clone(), state.guest)
        };
        if let Some(status) = ended.iter().find(|status| has_left(status)) {
            return Some(End::Moved(Box::new(status.clone())));
        }
        let failed = ended.iter().find(|status| {
            matches!(status.kind, JobKind::Incoming | JobKind::Restore)
                && status.phase != Phase::Completed
        });
        match (is_useless, failed) {
            (Some((why, _)), Some(failed)) => {
                let text = Some(failed.error_text()).filter(|text| !text.is_empty());
                Some(End::Useless(text.map_or(why, str::to_owned)))
            }
            // The agent has yet to tell the source why.
            (Some((why, since)), None) => {
                (since.elapsed() > REPORT_TIMEOUT).then_some(End::Useless(why))
            }
            // An operator may try again, unless QEMU has loaded what is of no use.
            (None, Some(failed)) if guest == Guest::Loaded || self.listens(guest) => {
                Some(End::Useless(failed.error_text().to_owned()))
            }
            (None, _) => None,
        }
    }

    /// Adds the blocks of memory that was plugged in, and removes those of memory that is gone.
    fn follow_memory(&self) -> Result<(), AttachError> {
        // A guest that has left, or is on its way, has its memory.
        if self.client.ownership() == Ownership::Relinquished {
            return Ok(());
        }
        let Some(mut monitor) = self.machine.free_monitor() else { return Ok(()) };
        let account = guest_memory::account(&mut monitor)?;
        if self.machine.state().account == account {
            return Ok(());
        }
        let found = guest_memory::find(&mut monitor, &self.machine.process)?;
        // Removing a block may wait for hooks.
        drop(monitor);
        let known: Vec<_> = self
            .machine
            .state()
            .known
            .iter()
            .map(|block| (block.id(), block.ram.clone()))
            .collect();
        let is_among =
            |id, ram: &_| found.iter().any(|block| block.id() == id && block.ram == *ram);
        for (id, _) in known.iter().filter(|(id, ram)| !is_among(*id, ram)) {
            self.client.remove_block(*id)?;
            self.machine.state().known.retain(|block| block.id() != *id);
        }
        for block in found {
            if self.machine.state().known.iter().any(|known| known.id() == block.id()) {
                continue;
            }
            match self.client.add_block(block.spec()) {
                Ok(_) => self.machine.state().known.push(block),
                // Added after the job. A job that needs it finds out when it pauses the guest.
                Err(pageferry_client::Error::Refused { code: ErrorCode::Busy, .. }) => {
                    return Ok(());
                }
                Err(error) => return Err(error.into()),
            }
        }
        self.machine.state().account = account;
        Ok(())
    }

    /// Ends the agent. QEMU and its guest go on.
    pub fn detach(self) {
        drop(self.client);
        drop(self.supervisor.join());
    }

    /// Asks QEMU to end.
    ///
    /// # Errors
    /// If QEMU does not answer.
    pub fn quit_qemu(&self) -> Result<(), AttachError> {
        match self.machine.monitor().command("quit", serde_json::Value::Null) {
            Ok(_) | Err(MonitorError::Broken { .. }) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}
