// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The commands of an operator: `pageferry migrate`, `snapshot`, `status` and so on.

use super::console::PATIENCE;
use crate::Error;
use crate::deadline::wait_for;
use crate::process::{Process, program};
use serde_json::Value;
use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// Time for a job on a guest under TCG on a busy host.
pub const JOB_PATIENCE: Duration = Duration::from_secs(180);

/// Talks to one agent by the command line.
#[derive(Debug, Clone)]
pub struct Operator {
    socket: PathBuf,
}

impl Operator {
    /// Of the agent that listens at `socket`.
    pub fn new(socket: PathBuf) -> Self {
        Self { socket }
    }

    /// The agent's socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// `pageferry WHAT --socket SOCKET --json MORE`.
    pub fn command(&self, what: &str, more: &[&str]) -> Command {
        let mut command = Command::new(program());
        command.arg(what).arg("--socket").arg(&self.socket).arg("--json").args(more);
        command
    }

    /// Starts a command that starts or continues a job.
    ///
    /// # Errors
    /// If the agent does not answer, or the command cannot be started.
    pub fn start(&self, what: &str, more: &[&str]) -> Result<Running, Error> {
        let jobs_before = self.status()?["job"].as_u64().unwrap_or(0);
        self.spawn(what, more, jobs_before)
    }

    fn spawn(&self, what: &str, more: &[&str], jobs_before: u64) -> Result<Running, Error> {
        let process = Process::spawn(what, &mut self.command(what, more))?;
        let what = format!("{what} {}", more.join(" "));
        Ok(Running { what, process, agent: self.clone(), jobs_before })
    }

    /// Runs a command to its end. Returns the last object that it prints.
    ///
    /// # Errors
    /// If it fails. The error has all that it printed.
    pub fn run(&self, what: &str, more: &[&str]) -> Result<Value, Error> {
        self.spawn(what, more, 0)?.end()
    }

    /// What the agent serves, and its job.
    ///
    /// # Errors
    /// If the agent does not answer.
    pub fn status(&self) -> Result<Value, Error> {
        self.run("status", &[])
    }

    /// Asks for the status until `holds`. An agent that does not answer is asked again: it may be
    /// the successor of one that was killed.
    ///
    /// # Errors
    /// If it did not hold in time. The error has the last status.
    pub fn wait_for_status(
        &self, what: &str, holds: impl Fn(&Value) -> bool,
    ) -> Result<Value, Error> {
        let mut last = String::new();
        let found = wait_for(what, JOB_PATIENCE, || match self.status() {
            Ok(status) if holds(&status) => Some(status),
            Ok(status) => {
                last = status.to_string();
                None
            }
            Err(error) => {
                last = error.sentence();
                None
            }
        });
        found.map_err(|error| Error::Mismatch(format!("{}; last: {last}", error.sentence())))
    }

    /// Waits until the job is in the phase with this name, such as `postcopy`.
    ///
    /// # Errors
    /// If it is not in time.
    pub fn wait_for_phase(&self, phase: &str) -> Result<Value, Error> {
        self.wait_for_status(&format!("phase {phase}"), |status| status["status"] == phase)
    }
}

/// A command that runs.
#[derive(Debug)]
pub struct Running {
    what: String,
    process: Process,
    agent: Operator,
    /// The number of the agent's last job before this one.
    jobs_before: u64,
}

impl Running {
    /// Waits until the new job is in the phase with this name, such as `postcopy`.
    ///
    /// # Errors
    /// If it is not in time. The error has all that the command printed.
    pub fn wait_for_phase(&mut self, phase: &str) -> Result<Value, Error> {
        self.wait_for(&format!("phase {phase}"), |status| status["status"] == phase)
    }

    /// Waits until the new job has sent this number of pages.
    ///
    /// # Errors
    /// As for [`Running::wait_for_phase`].
    pub fn wait_for_pages_sent(&mut self, pages: u64) -> Result<Value, Error> {
        self.wait_for("pages on their way", |status| {
            status["pages_sent"].as_u64().is_some_and(|sent| sent >= pages)
        })
    }

    fn wait_for(&mut self, what: &str, holds: impl Fn(&Value) -> bool) -> Result<Value, Error> {
        let before = self.jobs_before;
        let ended = RefCell::new(&mut self.process);
        let found = self.agent.wait_for_status(what, |status| {
            let is_new = status["job"].as_u64().is_some_and(|job| job > before);
            is_new && holds(status) || ended.borrow_mut().has_ended()
        })?;
        if holds(&found) {
            return Ok(found);
        }
        let said = self.process.lines().join("\n");
        Err(Error::Mismatch(format!("no {what}; {} said {said}; status: {found}", self.what)))
    }

    /// Waits for its end. Returns the last object that it printed.
    ///
    /// # Errors
    /// If it fails or takes too long. The error has all that it printed.
    pub fn end(self) -> Result<Value, Error> {
        let (code, object, said) = self.outcome()?;
        if code == 0 { Ok(object) } else { Err(Error::Mismatch(format!("exit {code}: {said}"))) }
    }

    /// Waits for its end, which must be a failure. Returns all that it printed.
    ///
    /// # Errors
    /// If it does what it was asked to, or takes too long.
    pub fn fail(self) -> Result<String, Error> {
        let what = self.what.clone();
        let (code, _, said) = self.outcome()?;
        if code != 0 { Ok(said) } else { Err(Error::Mismatch(format!("{what} succeeded: {said}"))) }
    }

    /// Waits for its end. Returns its exit code, its last object, and all that it printed.
    ///
    /// # Errors
    /// If it takes too long.
    pub fn outcome(mut self) -> Result<(i32, Value, String), Error> {
        let ended = self.process.wait(JOB_PATIENCE);
        let said = self.process.lines().join("\n");
        let status = ended.map_err(|error| {
            Error::Mismatch(format!("{}: {}; it said {said}", self.what, error.sentence()))
        })?;
        let object = said.lines().rev().find_map(|line| serde_json::from_str(line).ok());
        let object = object.unwrap_or_default();
        Ok((status.code().unwrap_or(-1), object, format!("{}: {said}", self.what)))
    }
}

/// Waits for `holds`, which looks at something that costs the guest or an agent time.
///
/// # Errors
/// If it does not hold in time.
pub fn wait_slowly(
    what: &str, mut holds: impl FnMut() -> Result<bool, Error>,
) -> Result<(), Error> {
    let end = Instant::now() + PATIENCE;
    while !holds()? {
        if Instant::now() >= end {
            return Err(Error::Deadline { what: what.to_owned(), timeout: PATIENCE });
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}
