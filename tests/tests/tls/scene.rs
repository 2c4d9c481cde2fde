// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Hosts with an agent that has certificates or a token, and guests that move between them.

use pageferry_client::{
    Client, Config, IncomingOptions, JobStatus, OutgoingOptions, Ownership, Phase, Target,
};
use pageferry_tests::deadline::wait_for;
use pageferry_tests::process::{AgentProcess, program};
use pageferry_tests::scenario::{Attached, Ram, SOON, config};
use std::path::Path;
use std::process::Command;

pub const PAGES: u64 = 300;

/// A VMM with an agent that has certificates or a token.
pub struct Host {
    // Dropped first, so that the agent can end.
    pub attached: Attached,
    pub agent: AgentProcess,
    arguments: Vec<String>,
    _folder: tempfile::TempDir,
}

impl Host {
    pub fn new(ram: Ram, certificates: &Path, more: &[&str]) -> Self {
        Self::with_arguments(ram, &[&["--tls", certificates.to_str().unwrap()], more].concat())
    }

    /// A VMM with an agent that has a token.
    pub fn with_token(ram: Ram, token: &Path) -> Self {
        Self::with_arguments(ram, &["--token-file", token.to_str().unwrap()])
    }

    fn with_arguments(ram: Ram, arguments: &[&str]) -> Self {
        let (agent, folder) = start(arguments);
        // Long enough for the next agent to be there.
        let config = Config { continue_within: SOON, ..config() };
        let (client, channel) = Client::connect(agent.socket(), config).unwrap();
        let attached = Attached::over(client, channel, ram);
        let arguments = arguments.iter().map(|&argument| argument.to_owned()).collect();
        Self { attached, agent, arguments, _folder: folder }
    }

    /// Kills the agent, and lets the next one continue.
    pub fn replace_agent(&mut self) {
        self.agent.process().kill().unwrap();
        let arguments: Vec<&str> = self.arguments.iter().map(String::as_str).collect();
        let (agent, folder) = start(&arguments);
        self.attached.reattach(agent.socket());
        (self.agent, self._folder) = (agent, folder);
    }

    pub fn source(certificates: &Path) -> Self {
        Self::new(Ram::odd(PAGES).stamped(), certificates, &[])
    }

    pub fn destination(certificates: &Path) -> Self {
        Self::new(Ram::odd(PAGES), certificates, &[])
    }

    /// Waits for a guest. Returns the job and the port.
    pub fn listen(&self) -> (u64, u16) {
        self.listen_over("tls")
    }

    /// The same, over `tls` or `tcp`.
    pub fn listen_over(&self, kind: &str) -> (u64, u16) {
        let listen = Target::Address(format!("{kind}:127.0.0.1:0"));
        let started =
            self.attached.client.start_incoming(listen, &IncomingOptions::default()).unwrap();
        assert!(started.address.starts_with(&format!("{kind}:127.0.0.1:")), "{}", started.address);
        (started.job, started.address.rsplit_once(':').unwrap().1.parse().unwrap())
    }

    /// Waits until its job is in this phase.
    #[track_caller]
    pub fn reaches(&self, phase: Phase) -> JobStatus {
        let client = &self.attached.client;
        let seen = || {
            let status = client.status().ok();
            status.filter(|status| status.phase == phase || status.phase.is_final())
        };
        let status = wait_for(phase.name(), SOON, seen);
        let status = status.unwrap_or_else(|error| panic!("{error}: {:?}", client.status()));
        assert_eq!(status.phase, phase, "{}", status.error_text());
        status
    }

    /// Checks that its job ends well.
    #[track_caller]
    pub fn completes(&self, job: u64) {
        let status = self.attached.client.wait(job, SOON).unwrap();
        assert_eq!(status.phase, Phase::Completed, "{}", status.error_text());
    }

    /// Sends the guest there, and returns how that ended.
    pub fn send(&self, address: &str, options: &OutgoingOptions) -> JobStatus {
        let target = Target::Address(address.to_owned());
        let job = self.attached.client.start_outgoing(target, options).unwrap().job;
        self.attached.client.wait(job, SOON).unwrap()
    }

    /// Checks that the guest is still here, and runs.
    #[track_caller]
    pub fn assert_keeps_guest(&self) {
        assert_eq!(self.attached.client.ownership(), Ownership::Ours);
        assert!(!self.attached.vmm.is_paused());
    }
}

fn start(arguments: &[&str]) -> (AgentProcess, tempfile::TempDir) {
    let folder = tempfile::tempdir().unwrap();
    let mut command = Command::new(program());
    let agent = AgentProcess::start_with(&mut command, folder.path(), "agent", arguments);
    (agent.unwrap(), folder)
}

/// Checks that the guest moves from one to the other.
#[track_caller]
pub fn moves(
    source: &Host, destination: &Host, (job, port): (u64, u16), options: &OutgoingOptions,
) {
    moves_to(source, destination, job, &format!("tls:localhost:{port}"), options);
}

/// The same, to this address.
#[track_caller]
pub fn moves_to(
    source: &Host, destination: &Host, job: u64, address: &str, options: &OutgoingOptions,
) {
    let status = source.send(address, options);
    assert_eq!(status.phase, Phase::Completed, "{}", status.error_text());
    destination.completes(job);
    assert_eq!(destination.attached.vmm.resumes(), 1);
    pageferry_tests::scenario::assert_same(&source.attached.ram, &destination.attached.ram);
}
