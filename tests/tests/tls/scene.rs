// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Hosts with an agent that has certificates.

use pageferry_client::{IncomingOptions, JobStatus, OutgoingOptions, Ownership, Phase, Target};
use pageferry_tests::process::{AgentProcess, program};
use pageferry_tests::scenario::{Attached, Ram, SOON};
use std::path::Path;
use std::process::Command;

pub const PAGES: u64 = 300;

/// A VMM with an agent that has a folder of certificates.
pub struct Host {
    // Dropped first, so that the agent can end.
    pub attached: Attached,
    _agent: AgentProcess,
    _folder: tempfile::TempDir,
}

impl Host {
    pub fn new(ram: Ram, certificates: &Path, more: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let arguments = [&["--tls", certificates.to_str().unwrap()], more].concat();
        let agent = AgentProcess::start_with(
            &mut Command::new(program()),
            folder.path(),
            "agent",
            &arguments,
        );
        let agent = agent.unwrap();
        let attached = Attached::new(agent.socket(), ram);
        Self { attached, _agent: agent, _folder: folder }
    }

    pub fn source(certificates: &Path) -> Self {
        Self::new(Ram::odd(PAGES).stamped(), certificates, &[])
    }

    pub fn destination(certificates: &Path) -> Self {
        Self::new(Ram::odd(PAGES), certificates, &[])
    }

    /// Waits for a guest. Returns the job and the port.
    pub fn listen(&self) -> (u64, u16) {
        let listen = Target::Address("tls:127.0.0.1:0".into());
        let started =
            self.attached.client.start_incoming(listen, &IncomingOptions::default()).unwrap();
        assert!(started.address.starts_with("tls:127.0.0.1:"), "{}", started.address);
        (started.job, started.address.rsplit_once(':').unwrap().1.parse().unwrap())
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
    let status = source.send(&format!("tls:localhost:{port}"), options);
    assert_eq!(status.phase, Phase::Completed, "{}", status.error_text());
    let status = destination.attached.client.wait(job, SOON).unwrap();
    assert_eq!(status.phase, Phase::Completed, "{}", status.error_text());
    assert_eq!(destination.attached.vmm.resumes(), 1);
    pageferry_tests::scenario::assert_same(&source.attached.ram, &destination.attached.ram);
}
