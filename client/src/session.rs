// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The session: the agent that requests go to, and the exit of the agents before it.

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

/// Time that an agent which closed the connection gets to exit by itself.
const EXIT_TIMEOUT: Duration = Duration::from_secs(2);

/// What became of a lost agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum LostAgent {
    /// It has exited: no process but the VMM has the guest memory from here.
    Ended,
    /// The guest may run elsewhere and depend on it. It may still read the memory here.
    KeptAlive,
}

/// The current agent. The lock of the session comes before the lock of the blocks.
#[derive(Debug)]
pub(crate) struct Session {
    pub(crate) control: Control,
    /// The trackers to declare to the next agent.
    pub(crate) trackers: DeclaredTrackers,
    /// Processes that got the guest memory and are not known to have exited.
    processes: Vec<Arc<AgentProcess>>,
    /// The VMM has ended the agent, and wants no other until it says so.
    was_ended: bool,
    /// A caller has waited for their exit already. Later callers do not wait again.
    has_waited: bool,
    /// Watches the agent while nothing else does. `None` only while the client is made.
    _heartbeat: Option<Heartbeat>,
}

impl Session {
    /// The session with the first agent. No heartbeat watches it yet.
    pub(crate) fn new(control: Control) -> Self {
        let processes = control.link().process().into_iter().cloned().collect();
        let trackers = DeclaredTrackers::default();
        Self { control, trackers, processes, was_ended: false, has_waited: false, _heartbeat: None }
    }

    /// Starts to watch the agent with this heartbeat.
    pub(crate) fn watch(&mut self, heartbeat: Heartbeat) {
        self._heartbeat = Some(heartbeat);
    }

    /// Makes this agent the current one, after [`Session::end_predecessors`].
    pub(crate) fn replace(&mut self, control: Control, heartbeat: Heartbeat) {
        self.watch(heartbeat);
        self.control = control;
        self.was_ended = false;
    }

    /// True if the VMM has ended the agent ([`Client::end_agent`](crate::Client::end_agent)) and
    /// has neither attached another nor taken the guest by force since then.
    pub(crate) fn was_ended(&self) -> bool {
        self.was_ended
    }

    /// Remembers that the VMM wants to do without an agent, or not any more.
    pub(crate) fn set_ended(&mut self, was_ended: bool) {
        self.was_ended = was_ended;
    }

    /// True if the agent answers that it has no job, or none that runs.
    pub(crate) fn has_no_running_job(&mut self) -> bool {
        let status = self.control.request(&Request::QueryStatus, &[], JobStatus::decode);
        status.is_ok_and(|status| status.phase.is_final())
    }

    /// Makes sure that a lost agent has exited, before the client does something as if there were
    /// no agent. Kills the process, unless the guest may depend on it elsewhere, and waits for its
    /// exit, which takes milliseconds. An agent that closed the connection first gets
    /// [`EXIT_TIMEOUT`] to exit by itself.
    ///
    /// # Errors
    /// [`Error::AgentStillRunning`] if it still lives: the VMM may not kill it, or the kernel does
    /// not end it yet. Calls after the first do not wait again.
    pub(crate) fn end_lost_agent(&mut self) -> Result<LostAgent, Error> {
        self.processes.retain(|process| !process.is_gone());
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
        self.processes.retain(|process| !process.wait_until_gone(good_end));
        let ended = self.end_processes(None, timeout);
        // Logged once: there may be many discards.
        ended.inspect_err(|error| log::warn!("{error}"))?;
        Ok(LostAgent::Ended)
    }

    /// The error for an agent that was given up and still lives.
    pub(crate) fn agent_runs(&self, why: &str) -> Error {
        let pid = self.processes.first().map_or(0, |process| process.pid());
        Error::AgentStillRunning { pid, why: why.to_owned() }
    }

    /// Gives the agent up by the VMM's own decision, and waits for its exit.
    ///
    /// # Errors
    /// [`Error::AgentStillRunning`] if it has not exited in time.
    pub(crate) fn end(&mut self, reason: &str) -> Result<(), Error> {
        self.control.retire(reason);
        self.end_processes(None, self.control.longest_timeout())
    }

    /// Makes sure that all earlier agents have exited. `next`, the process of the next agent, may
    /// be one of them and stays. From now on it is the only process that has the guest memory from
    /// here.
    ///
    /// # Errors
    /// [`Error::AgentStillRunning`] if one has not exited in time.
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

    /// Ends all processes but `next`, and waits for their exit.
    fn end_processes(
        &mut self, next: Option<&AgentProcess>, timeout: Duration,
    ) -> Result<(), Error> {
        let deadline = deadline(timeout);
        let mut outcome = Ok(());
        let mut processes = Vec::new();
        for process in std::mem::take(&mut self.processes) {
            if next.is_some_and(|next| !process.is_gone() && next.is_same(&process)) {
                processes.push(process);
            } else if let Err(why) =
                process.kill_and_wait(deadline.saturating_duration_since(Instant::now()))
            {
                outcome = Err(Error::AgentStillRunning { pid: process.pid(), why });
                processes.push(process);
            }
        }
        self.processes = processes;
        outcome
    }
}
