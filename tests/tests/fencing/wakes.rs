// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Agents that hang at the critical moments, and wake up again.

use crate::is_dead;
use pageferry_client::{
    Client, Config, Error, IncomingOptions, Ownership, Phase, SnapshotMode, SnapshotOptions, Target,
};
use pageferry_protocol::memory::PAGE_SIZE;
use pageferry_protocol::stream::Kind;
use pageferry_tests::deadline::wait_until;
use pageferry_tests::process;
use pageferry_tests::scenario::{
    Agent, At, Attached, Ram, Relay, SOON, Side, assert_same, config, lock, passes,
};
use std::path::PathBuf;
use std::time::Duration;

const PAGES: u64 = 200;
/// Request timeout of a VMM. It also limits a handshake, so it is long enough for a busy machine on
/// which nothing hangs.
const TIMEOUT: Duration = Duration::from_secs(10);

fn stamped() -> Ram {
    Ram::odd(PAGES).stamped()
}

fn empty() -> Side {
    Side::new(Ram::odd(PAGES))
}

fn hasty(agent: &Agent, ram: Ram) -> Attached {
    let config = Config { request_timeout: TIMEOUT, ..config() };
    let (client, channel) = Client::connect(agent.socket(), config).unwrap();
    Attached::over(client, channel, ram)
}

fn is_logged(source: &Attached, page: u64) -> bool {
    source.client.log().bits().contains(source.ram.gpa / PAGE_SIZE + page)
}

/// Waits until the thread of the agent's job has called the hook and polls for the reply. Between
/// the event and that moment it polls for nothing else. For a lock or a log message it would wait
/// at another place in the kernel.
fn wait_for_the_question(pid: u32) {
    let tasks = || {
        std::fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten().map(|task| task.path())
    };
    let is_job = |task: &PathBuf| {
        std::fs::read_to_string(task.join("comm")).is_ok_and(|name| name.starts_with("job-"))
    };
    let polls = |task: PathBuf| {
        std::fs::read_to_string(task.join("wchan")).is_ok_and(|at| at.contains("poll"))
    };
    wait_until("the job to ask", SOON, || tasks().filter(is_job).any(polls)).unwrap();
}

/// The agent waits for its peer, hangs and is replaced. Then it wakes up, and its peer answers,
/// while the next agent sends the guest.
#[test]
fn a_late_agent_takes_no_dirty_page_from_the_next() {
    // This test looks for a race, which showed in half of the rounds.
    for round in 0..8 {
        let mut first = Agent::spawn();
        let source = Attached::new(first.socket(), stamped());
        let (elsewhere, mut first_relay) = (empty(), Relay::unix());
        let waits_in_vain = first_relay.listen(&elsewhere.client, &IncomingOptions::default());
        first_relay.send(&source.client, &passes(1));
        let accept = first_relay.until(|record| record.kind == Kind::Accept);
        first.freeze();

        let second = Agent::spawn();
        source.reattach(second.socket());
        let (destination, mut relay) = (empty(), Relay::unix());
        let incoming = relay.listen(&destination.client, &IncomingOptions::default());
        let outgoing = relay.send(&source.client, &passes(2));
        let pass_done = relay.until(|record| record.is(Kind::PassDone, 0));
        (10..20).for_each(|page| source.write(page, 5000 + page));
        first_relay.pass(accept);
        first.thaw();
        let is_taken = || !(10..20).all(|page| is_logged(&source, page));
        let over = || elsewhere.client.status().unwrap().phase.is_final();
        first_relay.pump("the first agent to take what it can", || {
            is_taken() || is_dead(first.id()) || over()
        });

        relay.pass(pass_done);
        let status = relay.finish(&source.client, outgoing);
        assert_eq!(status.phase, Phase::Completed, "round {round}: {}", status.error_text());
        assert_eq!(destination.wait(incoming).phase, Phase::Completed);
        assert_same(&source.ram, &destination.ram);
        (10..20).for_each(|page| {
            assert_eq!(destination.ram.stamp(page), 5000 + page, "round {round}, page {page}")
        });
        // The first agent was dead before the second one got anything.
        assert!(is_dead(first.id()), "round {round}");
        first_relay.cut();
        assert_eq!(elsewhere.wait(waits_in_vain).phase, Phase::Failed);
        assert_eq!(elsewhere.vmm.resumes(), 0);
    }
}

/// The agent hangs after its VMM allowed the commit, and before it sends it.
fn hangs_before_the_commit(then: impl FnOnce(&Attached, &mut Agent)) {
    let mut agent = Agent::spawn();
    let pid = agent.id();
    let source = hasty(&agent, stamped());
    // Right after this event the agent calls the relinquish hook (`one-owner`) and waits for the
    // reply. It is frozen when the reply comes.
    source.vmm.on(At::phase(Phase::Committing), move || {
        wait_for_the_question(pid);
        process::freeze(pid).unwrap();
        Ok(())
    });
    let (destination, mut relay) = (empty(), Relay::unix());
    let incoming = relay.listen(&destination.client, &IncomingOptions::default());
    relay.send(&source.client, &passes(1));
    relay.pump("the line", || source.client.ownership() == Ownership::Relinquished);
    then(&source, &mut agent);
    // Anything that it sent would arrive before the end of its connection.
    let commit = |relay: &Relay| relay.seen.iter().any(|record| record.kind == Kind::Commit);
    let over = || destination.client.status().unwrap().phase.is_final();
    relay.pump("the destination's end", over);
    assert!(!commit(&relay), "a commit was sent");
    assert_eq!(destination.wait(incoming).phase, Phase::Failed);
    assert_eq!(destination.vmm.resumes(), 0, "two guests run");
    assert_eq!(destination.client.ownership(), Ownership::Awaiting);
}

#[test]
fn a_late_agent_does_not_send_the_commit() {
    hangs_before_the_commit(|source, agent| {
        let lost = source.client.status().unwrap_err();
        assert!(matches!(lost, Error::AgentLost { .. }), "{lost}");
        // The VMM cannot know whether the commit was sent. The destination may need this agent, so
        // it is not killed.
        assert_eq!(source.client.ownership(), Ownership::Relinquished);
        agent.thaw();
        let status = agent.ended();
        assert_eq!(status.phase, Phase::Failed);
        assert!(status.error_text().contains("this agent was replaced"), "{}", status.error_text());
        assert!(source.vmm.is_paused());
        // The agent has no job any more. An operator first looks at its status.
        source.client.take_by_force().unwrap();
        assert_eq!(source.client.ownership(), Ownership::Ours);
        assert_eq!(source.vmm.resumes(), 0, "only the VMM resumes the guest");
    });
}

#[test]
fn a_guest_is_taken_by_force_only_from_an_agent_that_is_dead() {
    for ends_first in [false, true] {
        hangs_before_the_commit(|source, agent| {
            if ends_first {
                source.client.end_agent().unwrap();
                assert!(is_dead(agent.id()));
                assert_eq!(source.client.ownership(), Ownership::Relinquished);
            }
            source.client.take_by_force().unwrap();
            assert_eq!(source.client.ownership(), Ownership::Ours);
            assert!(is_dead(agent.id()));
        });
    }
}

#[test]
fn a_new_agent_attaches_only_when_the_old_one_is_dead() {
    hangs_before_the_commit(|source, agent| {
        let next = Agent::spawn();
        source.reattach(next.socket());
        assert!(is_dead(agent.id()));
        assert_eq!(source.client.ownership(), Ownership::Relinquished);
        // The next agent knows nothing of a commit, and cannot decide.
        let nowhere = Target::Address("unix:/nowhere".into());
        assert!(matches!(
            source.client.start_outgoing(nowhere, &passes(1)),
            Err(Error::NotOurs { .. })
        ));
        drop(next);
    });
}

/// The VMM stopped its guest, and resumes it when the agent is lost. Writes after that must not get
/// into an image.
#[test]
fn an_agent_that_was_given_up_gives_no_image_its_name() {
    for mode in [SnapshotMode::Stopped, SnapshotMode::Paused] {
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("image");
        let mut agent = Agent::spawn();
        // The agent saves pieces of 1 MiB, and waits for the limit after each but the last. So the
        // whole snapshot takes seconds, and the agent hangs in the middle.
        let (pages, bandwidth) = (2048, 1 << 20);
        let guest = hasty(&agent, Ram::odd(pages).stamped());
        let options = SnapshotOptions { mode, bandwidth, ..SnapshotOptions::default() };
        guest.client.start_snapshot(&image, &options).unwrap();
        wait_until("the memory to be saved", SOON, || {
            guest.client.status().unwrap().phase == Phase::Saving
        })
        .unwrap();
        agent.freeze();
        guest.client.status().unwrap_err();
        wait_until("the agent to be lost", SOON, || !lock(&guest.vmm.asked).losses.is_empty())
            .unwrap();
        assert!(!guest.vmm.is_paused());
        (0..pages).for_each(|page| guest.write(page, 7));
        agent.thaw();
        assert!(!agent.ends_well(), "the agent was killed when it was lost");
        let left: Vec<_> = std::fs::read_dir(folder.path())
            .unwrap()
            .flatten()
            .map(|entry| entry.file_name())
            .collect();
        assert!(left.is_empty(), "{left:?}");
        let next = Agent::spawn();
        guest.reattach(next.socket());
        let job = guest
            .client
            .start_snapshot(&image, &SnapshotOptions { bandwidth: 0, ..options })
            .unwrap()
            .job;
        let status = guest.wait(job);
        assert_eq!(status.phase, Phase::Completed, "{}", status.error_text());
    }
}

/// The process of a lost agent accepts a new connection of its VMM: it is not killed, and the job
/// of the old connection ends before one of the new connection begins.
#[test]
fn a_vmm_may_come_back_to_the_process_of_its_agent() {
    let mut agent = Agent::spawn();
    let source = Attached::new(agent.socket(), stamped());
    let (elsewhere, mut relay) = (empty(), Relay::unix());
    relay.listen(&elsewhere.client, &IncomingOptions::default());
    relay.send(&source.client, &passes(1));
    let _accept = relay.until(|record| record.kind == Kind::Accept);
    source.reattach(agent.socket());
    assert!(!is_dead(agent.id()));
    pageferry_tests::scenario::moves_to(&source, &empty());
    source.client.end_agent().unwrap();
    assert!(is_dead(agent.id()));
}

/// An agent that shuts down by itself is not killed meanwhile.
#[test]
fn an_agent_ends_in_good_order_while_its_vmm_discards() {
    let mut agent = Agent::spawn();
    let guest = Attached::new(agent.socket(), stamped());
    agent.terminate();
    let lost = || {
        guest.client.discard(&[guest.ram.range(3, 1)], Default::default()).unwrap();
        guest.client.status().is_err()
    };
    wait_until("the agent to be lost", SOON, lost).unwrap();
    assert!(agent.ends_well());
}
