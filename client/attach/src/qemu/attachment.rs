// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! An agent for a QEMU: hands the memory over, answers hooks, and follows hotplug.

use super::guard::{Duty, Guard};
use super::guest_memory::{self, FoundBlock, GuestMemoryError};
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
use std::ffi::OsString;
use std::os::fd::BorrowedFd;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::Arc;
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
        let this = Self { machine, vmm, client, supervisor };
        // QEMU punches what the guest gives back, and tells nobody. Declared before the memory: who
        // waits for the memory (`pageferry status --wait`) may start any job.
        this.client.set_trackers(Trackers::WRITE_PROTECT | Trackers::UNANNOUNCED_FREES)?;
        // Not before: a QEMU whose writes cannot be tracked has other jobs that it can do.
        let machine = Arc::downgrade(&this.machine);
        this.vmm.check_tracking(move || match machine.upgrade() {
            Some(machine) => Ok(suitability::check_tracking(&mut machine.monitor())?),
            None => Ok(()),
        });
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
        self.machine.state().listens = true;
        Ok(job.address)
    }

    /// The longest time that QEMU's main thread was stopped to create userfaultfds.
    pub fn longest_stop(&self) -> Duration {
        self.vmm.longest_stop()
    }

    /// True if the guest was given up to a destination, or may have been.
    pub fn gave_guest_up(&self) -> bool {
        matches!(self.client.ownership(), Ownership::Relinquished | Ownership::Gone)
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
            self.look_at_memory();
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
        let (ended, is_useless, guest, listens) = {
            let mut state = self.machine.state();
            let ended = std::mem::take(&mut state.ended);
            (ended, state.is_useless.clone(), state.guest, state.listens)
        };
        if let Some(status) = ended.iter().find(|status| has_left(status)) {
            return Some(End::Moved(Box::new(status.clone())));
        }
        let brings =
            |status: &&JobStatus| matches!(status.kind, JobKind::Incoming | JobKind::Restore);
        if let Some(status) = ended.iter().filter(brings).find(|status| status.arrived) {
            // Also if it was not resumed, or answered too late: its source has given it up.
            self.machine.guest_arrived();
            if status.phase != Phase::Completed {
                log::warn!(
                    "the guest had arrived when its job failed: look at its QEMU, and have it \
                     resumed (pageferry resume) if it is paused"
                );
            }
            return None;
        }
        let failed = ended.iter().filter(brings).find(|status| status.phase != Phase::Completed);
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
            (None, Some(failed))
                if guest == Guest::Loaded || (guest == Guest::Awaited && listens) =>
            {
                Some(End::Useless(failed.error_text().to_owned()))
            }
            (None, _) => None,
        }
    }

    /// Follows memory and devices. If QEMU cannot be served any more, no job can pause its guest.
    fn look_at_memory(&self) {
        let why = match self.follow_memory() {
            Ok(true) => None,
            Ok(false) => return,
            Err(error) => Some(chain(&error)),
        };
        let before = std::mem::replace(&mut self.machine.state().cannot_serve, why.clone());
        if let Some(why) = why.filter(|why| before.as_ref() != Some(why)) {
            // A QEMU that ends closes its monitor before: what fails then is of no interest.
            if matches!(self.machine.process.wait(Some(LOOK)), Ok(true)) {
                return;
            }
            log::warn!("no job can pause this guest: {why}");
        }
    }

    /// Adds the blocks of memory that was plugged in, and removes those of memory that is gone.
    /// False if that has to wait.
    fn follow_memory(&self) -> Result<bool, AttachError> {
        // A hook may use the monitor for long.
        let Some(mut monitor) = self.machine.free_monitor() else { return Ok(false) };
        if self.machine.has_known_memory(&mut monitor)? {
            return Ok(true);
        }
        // A job keeps its blocks. One that needs others finds out when it pauses the guest. And a
        // guest that has left, or is on its way, has its memory.
        let is_idle = self.client.status().is_ok_and(|status| status.phase.is_final());
        if !is_idle || self.client.ownership() == Ownership::Relinquished {
            return Ok(false);
        }
        let account = guest_memory::account(&mut monitor)?;
        suitability::check(&mut monitor)?;
        let found = guest_memory::find(&mut monitor, &self.machine.process)?;
        // Removing a block may wait for hooks.
        drop(monitor);
        self.machine.claims().follow(&found)?;
        let is_among = |known: &FoundBlock| found.iter().any(|block| block.is_same(known));
        let gone: Vec<u32> = {
            let state = self.machine.state();
            state.known.iter().filter(|known| !is_among(known)).map(FoundBlock::id).collect()
        };
        for id in gone {
            self.client.remove_block(id)?;
            self.machine.state().known.retain(|block| block.id() != id);
        }
        for block in found {
            if self.machine.state().known.iter().any(|known| known.id() == block.id()) {
                continue;
            }
            match self.client.add_block(block.spec()) {
                Ok(_) => self.machine.state().known.push(block),
                // A job has begun since.
                Err(pageferry_client::Error::Refused { code: ErrorCode::Busy, .. }) => {
                    return Ok(false);
                }
                Err(error) => return Err(error.into()),
            }
        }
        self.machine.state().account = account;
        Ok(true)
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
