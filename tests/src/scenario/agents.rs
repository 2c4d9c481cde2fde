// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Agents that listen at a socket: a thread of the test, or a process that can be killed.

use super::{RawClient, SOON};
use crate::deadline::wait_for;
use crate::process::{AgentProcess, Process, program};
use pageferry_client::JobStatus;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;

/// An agent on a thread of this process. It listens until this is dropped.
#[derive(Debug)]
pub struct Listening {
    /// Where it listens.
    pub path: PathBuf,
    stop: OwnedFd,
    thread: Option<JoinHandle<()>>,
    _folder: tempfile::TempDir,
}

impl Listening {
    /// Starts it in a folder of its own.
    pub fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("agent");
        let mut server =
            pageferry_agent::server::Server::new(pageferry_agent::vm_name::VmName::default())
                .unwrap();
        server.listen(&path).unwrap();
        let (stopped, stop) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
        server.stop_on(stopped).unwrap();
        let thread = std::thread::spawn(move || drop(server.run().unwrap()));
        Self { path, stop, thread: Some(thread), _folder: folder }
    }

    /// A connection. It counts as an operator's until it hands memory over.
    pub fn connect(&self) -> RawClient {
        RawClient::connect(&self.path)
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        rustix::io::write(&self.stop, &[1]).unwrap();
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

/// An agent that is shut down or killed.
#[derive(Debug)]
pub enum Agent {
    /// On a thread of this process.
    Stopped(Listening),
    /// A process, and the folder of its socket.
    Killed(AgentProcess, tempfile::TempDir),
}

impl Agent {
    /// Starts a process.
    pub fn spawn() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let agent = AgentProcess::spawn(program(), folder.path(), "agent").unwrap();
        Self::Killed(agent, folder)
    }

    /// Where it listens.
    pub fn socket(&self) -> &Path {
        match self {
            Self::Stopped(agent) => &agent.path,
            Self::Killed(agent, _) => agent.socket(),
        }
    }

    fn process(&mut self) -> &mut Process {
        match self {
            Self::Stopped(_) => panic!("not a process"),
            Self::Killed(agent, _) => agent.process(),
        }
    }

    /// Its process id. Panics if the agent is a thread.
    pub fn id(&mut self) -> u32 {
        self.process().id()
    }

    /// The final status of its last job, as an operator sees it.
    pub fn ended(&self) -> JobStatus {
        let mut operator = RawClient::connect(self.socket());
        wait_for("the job's end", SOON, || {
            Some(operator.status()).filter(|status| status.phase.is_final())
        })
        .unwrap()
    }

    /// Makes the process hang. Panics if the agent is a thread.
    pub fn freeze(&mut self) {
        self.process().freeze().unwrap();
    }

    /// Lets the process continue after [`Agent::freeze`].
    pub fn thaw(&mut self) {
        self.process().thaw().unwrap();
    }

    /// Asks the process to shut down.
    pub fn terminate(&mut self) {
        self.process().terminate().unwrap();
    }

    /// Waits for the end of the process. True if it succeeded.
    pub fn ends_well(&mut self) -> bool {
        self.process().wait(SOON).unwrap().success()
    }

    /// Kills the process. Panics if the agent is a thread.
    pub fn kill(&mut self) {
        self.process().kill().unwrap();
    }

    /// Ends the agent: kills the process, or waits for the thread.
    pub fn end(mut self) {
        if matches!(self, Self::Killed(..)) {
            self.kill();
        }
    }
}
