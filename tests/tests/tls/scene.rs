// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Hosts with an agent that has certificates or a token, and guests that move between them.

use pageferry_client::{
    Config, IncomingOptions, JobStatus, OutgoingOptions, Ownership, Phase, Supervisor, Target,
    Trackers,
};
use pageferry_tests::deadline::wait_for;
use pageferry_tests::process::{AgentProcess, program};
use pageferry_tests::scenario::{Attached, Ram, SOON, ScriptedHooks, ScriptedVmm, config};
use rustix::process::{Pid, Signal, kill_process};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

pub const PAGES: u64 = 300;

/// A VMM with an agent that has certificates or a token.
pub struct Host {
    // Dropped first, so that the agent can end.
    pub attached: Attached,
    agent: Option<(AgentProcess, tempfile::TempDir)>,
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
        let folder = tempfile::tempdir().unwrap();
        let mut command = Command::new(program());
        let agent = AgentProcess::start_with(&mut command, folder.path(), "agent", arguments);
        let agent = agent.unwrap();
        let attached = Attached::new(agent.socket(), ram);
        Self { attached, agent: Some((agent, folder)) }
    }

    /// Its agent, if the VMM has not started it.
    pub fn agent(&mut self) -> &mut AgentProcess {
        &mut self.agent.as_mut().unwrap().0
    }

    /// A VMM with a supervisor, which starts the next agent when one is lost.
    pub fn supervised(ram: Ram, certificates: &Path) -> Self {
        let certificates = certificates.to_owned();
        let command = move || {
            let mut command = Command::new(program());
            command.args(["agent", "--stdin", "--tls"]).arg(&certificates);
            command
        };
        let vmm = ScriptedVmm::new();
        let config = Config { continue_within: SOON, ..config() };
        let (client, _) = Supervisor::spawn(command, config, ScriptedHooks(vmm.clone())).unwrap();
        ram.add_to(&client);
        client.set_trackers(Trackers::LOG_IS_COMPLETE).unwrap();
        Self { attached: Attached { client, vmm, ram: Arc::new(ram) }, agent: None }
    }

    /// Kills the agent.
    pub fn kill_agent(&self) {
        let pid = i32::try_from(self.attached.client.agent_pid()).unwrap();
        kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL).unwrap();
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
