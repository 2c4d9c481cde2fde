// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A process that is out of descriptors.

use pageferry_tests::process::{AgentProcess, program};
use pageferry_tests::scenario::{Attached, Ram, RawClient, SOON};
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// Processor time that the process has used, in clock ticks.
fn ticks(pid: u32) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
    // utime and stime are fields 14 and 15. The first field here is the third.
    fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
}

#[test]
fn an_agent_without_descriptors_does_not_spin_or_flood_the_log() {
    let folder = tempfile::tempdir().unwrap();
    let mut agent = AgentProcess::spawn(program(), folder.path(), "agent").unwrap();
    let vmm = Attached::new(agent.socket(), Ram::odd(16));
    let mut operator = RawClient::connect(agent.socket());
    operator.status();
    let pid = agent.process().id();
    let used = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count() as u64;
    agent.process().limit_descriptors(used).unwrap();

    let waiting: Vec<_> = (0..20).map(|_| UnixStream::connect(agent.socket()).unwrap()).collect();
    agent.process().wait_for_line("cannot accept a connection", SOON).unwrap();
    let failures = |agent: &mut AgentProcess| {
        agent
            .process()
            .lines()
            .iter()
            .filter(|line| line.contains("cannot accept a connection"))
            .count()
    };
    let (lines, before) = (failures(&mut agent), ticks(pid));
    std::thread::sleep(Duration::from_secs(3));
    // At most one line per second. Before the fix there were about 300,000.
    assert!(failures(&mut agent) - lines <= 10, "{}", failures(&mut agent));
    // A tick is 10 ms, so 100 ticks are a third of a processor.
    assert!(ticks(pid) - before < 100, "{} ticks", ticks(pid) - before);
    vmm.client.status().unwrap();
    operator.status();

    agent.process().limit_descriptors(1024).unwrap();
    drop(waiting);
    RawClient::connect(agent.socket()).status();
    vmm.client.status().unwrap();
}
