// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A scripted VMM with its memory on an agent, and migrations between two of them.

use super::{Ram, SOON, ScriptedHooks, ScriptedVmm, assert_same};
use crate::in_process::InProcessAgent;
use pageferry_client::{
    Client, Config, HookChannel, IncomingOptions, JobStatus, NonConvergence, OutgoingOptions,
    Phase, Target, Trackers,
};
use std::ops::Deref;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// A VMM on an agent that the caller owns.
#[derive(Debug)]
pub struct Attached {
    /// Its connection.
    pub client: Client,
    /// Its hooks.
    pub vmm: Arc<ScriptedVmm>,
    /// Its memory.
    pub ram: Arc<Ram>,
}

impl Attached {
    /// A VMM on the agent that listens at `socket`.
    pub fn new(socket: &Path, ram: Ram) -> Self {
        let (client, channel) = Client::connect(socket, config()).unwrap();
        Self::over(client, channel, ram)
    }

    /// A VMM on an existing connection.
    pub fn over(client: Client, channel: HookChannel, ram: Ram) -> Self {
        let vmm = ScriptedVmm::new();
        channel.spawn(ScriptedHooks(vmm.clone())).unwrap();
        ram.add_to(&client);
        client.set_trackers(Trackers::LOG_IS_COMPLETE).unwrap();
        Self { client, vmm, ram: Arc::new(ram) }
    }

    /// Connects to another agent.
    pub fn reattach(&self, socket: &Path) {
        self.client.reattach(socket).unwrap().spawn(ScriptedHooks(self.vmm.clone())).unwrap();
    }

    /// Starts to wait for a guest at `path`. Returns the job.
    pub fn listen(&self, path: &Path, options: &IncomingOptions) -> u64 {
        let listen = Target::Address(format!("unix:{}", path.display()));
        self.client.start_incoming(listen, options).unwrap().job
    }

    /// Starts to send the guest to `path`. Returns the job.
    pub fn send(&self, path: &Path, options: &OutgoingOptions) -> u64 {
        let target = Target::Address(format!("unix:{}", path.display()));
        self.client.start_outgoing(target, options).unwrap().job
    }

    /// Waits for the end of a job.
    pub fn wait(&self, job: u64) -> JobStatus {
        self.client.wait(job, SOON).unwrap()
    }

    /// Writes a stamp like the guest.
    pub fn write(&self, page: u64, stamp: u64) {
        self.ram.write_and_mark(&self.client, page, stamp);
    }
}

/// A VMM with its own agent. Fields drop in order, so the connection is closed before the drop
/// waits for the agent.
#[derive(Debug)]
pub struct Side {
    /// The VMM.
    pub attached: Attached,
    /// Its agent, a thread of this process.
    pub agent: InProcessAgent,
}

impl Side {
    /// A VMM with this memory on a new agent.
    pub fn new(ram: Ram) -> Self {
        let (agent, socket) = InProcessAgent::start().unwrap();
        let (client, channel) = Client::from_socket(socket, config()).unwrap();
        Self { attached: Attached::over(client, channel, ram), agent }
    }
}

impl Deref for Side {
    type Target = Attached;

    fn deref(&self) -> &Attached {
        &self.attached
    }
}

/// A configuration with a log that is large enough for the small memory of the tests.
pub fn config() -> Config {
    Config { log_covers: 1 << 30, ..Config::default() }
}

/// Options for `running` passes while the guest runs, and one while it is paused. There are fewer
/// if no page is dirty before.
pub fn passes(running: u32) -> OutgoingOptions {
    OutgoingOptions {
        // This limit is never met, so the job makes as many passes as the test wants.
        downtime_limit: Duration::ZERO,
        max_passes: running,
        policy: NonConvergence::StopAnyway,
        ..OutgoingOptions::default()
    }
}

/// Migrates from `source` to `destination` without a relay, and checks that all stamps and holes
/// arrived.
pub fn moves_to(source: &Attached, destination: &Attached) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("next");
    let incoming = destination.listen(&path, &IncomingOptions::default());
    arrives_at(source, &path, destination, incoming);
}

/// The same, to a destination that already waits at `path`.
pub fn arrives_at(source: &Attached, path: &Path, destination: &Attached, incoming: u64) {
    let outgoing = source.send(path, &passes(1));
    let status = source.wait(outgoing);
    assert_eq!(status.phase, Phase::Completed, "{}", status.error_text());
    assert_eq!(destination.wait(incoming).phase, Phase::Completed);
    assert!(source.vmm.is_paused());
    assert_eq!(destination.vmm.resumes(), 1);
    assert_same(&source.ram, &destination.ram);
}

/// Migrates from `source` to a new destination, which is returned.
pub fn migrates_next_time(source: &Attached) -> Side {
    let ram = &source.ram;
    let destination = Side::new(Ram::new(ram.id, ram.gpa, ram.pages, ram.fd_offset));
    moves_to(source, &destination);
    destination
}
