// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Two agent processes, with a VMM whose guest is idle.

use super::image::Image;
use pageferry_client::{
    BlockRange, Client, Config, IncomingOptions, JobStatus, OutgoingOptions, Phase, Punch, Target,
};
use pageferry_tests::files::Still;
use pageferry_tests::process::{AgentProcess, program};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

const LIMIT: Duration = Duration::from_secs(600);

/// The cost of a migration.
#[derive(Debug, Clone)]
pub struct Moved {
    /// From the start to the confirmation.
    pub time: Duration,
    /// The status of the source's agent.
    pub status: JobStatus,
    /// Peak resident bytes of the source's agent.
    pub source_peak: u64,
    /// Peak resident bytes of the destination's agent.
    pub destination_peak: u64,
    /// Processor time of both agents, in seconds.
    pub processor: f64,
}

/// An agent and the client that owns its guest.
pub struct Side {
    /// The client. Before the agent, so that it is dropped first.
    pub client: Client,
    /// The agent.
    pub agent: AgentProcess,
    _folder: tempfile::TempDir,
}

impl Side {
    /// Hands all of `image` to an agent.
    pub fn new(image: &Image) -> Self {
        Self::with_arguments(image, &[])
    }

    /// Hands all of `image` to an agent that was started with more arguments.
    pub fn with_arguments(image: &Image, more: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let agent =
            AgentProcess::start_with(&mut Command::new(program()), folder.path(), "agent", more);
        let agent = agent.unwrap();
        let (client, channel) = Client::connect(agent.socket(), Config::default()).unwrap();
        Still::hand_over(&client, channel, &image.file, image.size).unwrap();
        Self { client, agent, _folder: folder }
    }

    /// Discards without freeing.
    pub fn discard(&self, ranges: &[(u64, u64)]) {
        let ranges: Vec<_> = ranges
            .iter()
            .map(|&(offset, length)| BlockRange { block: 0, offset, length })
            .collect();
        self.client.discard(&ranges, Punch::No).unwrap();
    }

    /// Processor time that the agent has used, in milliseconds.
    pub fn processor_time(&mut self) -> f64 {
        let path = format!("/proc/{}/schedstat", self.agent.process().id());
        let text = std::fs::read_to_string(path).unwrap();
        text.split_whitespace().next().unwrap().parse::<f64>().unwrap() / 1e6
    }

    /// Processor time that all threads of the agent have used, also those that have ended, in
    /// seconds.
    fn all_processor_time(&mut self) -> f64 {
        let path = format!("/proc/{}/stat", self.agent.process().id());
        let text = std::fs::read_to_string(path).unwrap();
        // After the name in parentheses: state is field 3, utime 14, and stime 15.
        let fields: Vec<&str> = text.rsplit_once(')').unwrap().1.split_whitespace().collect();
        let ticks: u64 = fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
        ticks as f64 / rustix::param::clock_ticks_per_second() as f64
    }

    fn peak(&mut self) -> u64 {
        peak_of(Path::new(&format!("/proc/{}/status", self.agent.process().id())))
    }
}

fn peak_of(status: &Path) -> u64 {
    let text = std::fs::read_to_string(status).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").trim().parse::<u64>().unwrap() * 1024
}

/// Migrates the guest.
pub fn migrate(from: Side, to: Side, options: &OutgoingOptions) -> Moved {
    migrate_with(from, to, options, &IncomingOptions::default())
}

/// Migrates the guest, with options of both ends.
pub fn migrate_with(
    from: Side, to: Side, options: &OutgoingOptions, incoming: &IncomingOptions,
) -> Moved {
    migrate_over("tcp:127.0.0.1:0", from, to, options, incoming)
}

/// Migrates the guest to a destination that listens at this address.
pub fn migrate_over(
    listen: &str, mut from: Side, mut to: Side, options: &OutgoingOptions,
    incoming: &IncomingOptions,
) -> Moved {
    let listen = Target::Address(listen.to_owned());
    let incoming = to.client.start_incoming(listen, incoming).unwrap();
    let started = Instant::now();
    let job = from.client.start_outgoing(Target::Address(incoming.address), options).unwrap().job;
    let status = from.client.wait(job, LIMIT).unwrap();
    let time = started.elapsed();
    assert_eq!(status.phase, Phase::Completed, "{}", status.error_text());
    let processor = from.all_processor_time() + to.all_processor_time();
    Moved { time, status, source_peak: from.peak(), destination_peak: to.peak(), processor }
}
