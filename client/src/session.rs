//! What the client asks one agent after the other through, and seeing to the end of those before.

use crate::agent_process::AgentProcess;
use crate::control::Control;
use crate::deadline::deadline;
use crate::error::Error;
use crate::heartbeat::Heartbeat;
use crate::tracking::declared::DeclaredTrackers;
use pageferry_protocol::control::job::JobStatus;
use pageferry_protocol::control::request::Request;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long an agent that closed the connection may take to end.
const EXIT_TIMEOUT: Duration = Duration::from_secs(2);

/// What became of an agent that is lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum LostAgent {
    /// It has ended: no process but the VMM's has the guest's memory from here.
    Ended,
    /// The guest may run elsewhere, and depend on it. It may still read the memory here.
    KeptAlive,
}

/// What one agent after the other is asked through. Its lock comes before the one of the blocks.
#[derive(Debug)]
pub(crate) struct Session {
    pub(crate) control: Control,
    /// What a new agent has to be told about trackers.
    pub(crate) trackers: DeclaredTrackers,
    /// Processes that were handed the guest's memory, and are not known to have ended.
    processes: Vec<Arc<AgentProcess>>,
    /// Nothing that cannot fail waits for the end of these any more.
    has_waited: bool,
    /// Watches over the agent while nothing else does. None only while a client is made.
    _heartbeat: Option<Heartbeat>,
}

impl Session {
    /// The session with the first agent, which nothing watches over yet.
    pub(crate) fn new(control: Control) -> Self {
        let processes = control.link().process().into_iter().cloned().collect();
        let trackers = DeclaredTrackers::default();
        Self { control, trackers, processes, has_waited: false, _heartbeat: None }
    }

    /// Watches over the agent with this heartbeat from now on.
    pub(crate) fn watch(&mut self, heartbeat: Heartbeat) {
        self._heartbeat = Some(heartbeat);
    }

    /// Goes on with the next agent. [`Session::end_predecessors`] has come before.
    pub(crate) fn replace(&mut self, control: Control, heartbeat: Heartbeat) {
        self.watch(heartbeat);
        self.control = control;
    }

    /// True if the agent is there, and says that it has no job, or none that runs.
    pub(crate) fn has_no_running_job(&mut self) -> bool {
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
    pub(crate) fn end_lost_agent(&mut self) -> Result<LostAgent, Error> {
        self.processes.retain(|process| !process.has_exited());
        if self.processes.is_empty() {
            return Ok(LostAgent::Ended);
        }
        if self.control.link().is_kept_alive() {
            return Ok(LostAgent::KeptAlive);
        }
        if self.has_waited {
            return self.end_processes(None, Duration::ZERO).map(|()| LostAgent::Ended);
        }
        self.has_waited = true;
        let timeout = self.control.longest_timeout();
        let good_end = deadline(EXIT_TIMEOUT.min(timeout));
        self.processes.retain(|process| !process.wait_for_exit(good_end));
        let ended = self.end_processes(None, timeout);
        // Once: there may be many discards.
        ended.inspect_err(|error| log::warn!("{error}"))?;
        Ok(LostAgent::Ended)
    }

    /// The error that says that an agent that was given up lives on.
    pub(crate) fn agent_runs(&self, why: &str) -> Error {
        let pid = self.processes.first().map_or(0, |process| process.pid());
        Error::AgentRuns { pid, why: why.to_owned() }
    }

    /// Gives the agent up by the VMM's own decision, and sees to the end of its process.
    ///
    /// # Errors
    /// [`Error::AgentRuns`] if it has not ended in time.
    pub(crate) fn end(&mut self, reason: &str) -> Result<(), Error> {
        self.control.retire(reason);
        self.end_processes(None, self.control.longest_timeout())
    }

    /// Sees to the end of all agents before the one whose process is `next`, which may be one of
    /// them. From now on `next` is the only process that has the guest's memory from here.
    ///
    /// # Errors
    /// [`Error::AgentRuns`] if one has not ended in time.
    pub(crate) fn end_predecessors(
        &mut self, next: Option<&Arc<AgentProcess>>,
    ) -> Result<(), Error> {
        self.end_processes(next.map(AsRef::as_ref), self.control.longest_timeout())?;
        if let Some(next) = next {
            self.processes.retain(|other| !other.is_same(next));
            self.processes.push(Arc::clone(next));
        }
        self.has_waited = false;
        Ok(())
    }

    /// Sees to it that no process but that of `next` has the guest's memory from here any more.
    fn end_processes(
        &mut self, next: Option<&AgentProcess>, timeout: Duration,
    ) -> Result<(), Error> {
        let deadline = deadline(timeout);
        let mut outcome = Ok(());
        let mut processes = Vec::new();
        for process in std::mem::take(&mut self.processes) {
            if next.is_some_and(|next| !process.has_exited() && next.is_same(&process)) {
                processes.push(process);
            } else if let Err(why) =
                process.kill_and_wait(deadline.saturating_duration_since(Instant::now()))
            {
                outcome = Err(Error::AgentRuns { pid: process.pid(), why });
                processes.push(process);
            }
        }
        self.processes = processes;
        outcome
    }
}
