// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Agents that are killed, or hang and wake up, at any moment of any job. Every write of the guests
//! is in a ledger, which is part of the VMM's state.
//!
//! After each round exactly one VMM may run the guest, its memory is what the ledger says
//! (`same-memory`), and no other VMM ran it (`one-owner`). There is a complete image or none. The
//! next agent can migrate, save or restore the guest at once, while the old one may wake up.
//!
//! `PAGEFERRY_KILL_ROUNDS` is the number of rounds. Without it there is one round of each job.
//! `PAGEFERRY_KILL_KIND`, such as `Source(Postcopy)`, runs only jobs whose names contain it.
//! `PAGEFERRY_SEED` repeats a run. A soak:
//!
//! ```text
//! PAGEFERRY_KILL_ROUNDS=5000 cargo test -p pageferry-tests --test fencing matrix -- --nocapture
//! ```

use crate::is_dead;
use pageferry_client::{
    Config, IncomingOptions, Mode, OutgoingOptions, Ownership, Phase, RestoreOptions, SnapshotMode,
    SnapshotOptions,
};
use pageferry_tests::deadline::{wait_for, wait_until};
use pageferry_tests::random::Random;
use pageferry_tests::require;
use pageferry_tests::scenario::Host;
use pageferry_tests::scenario::moments::{
    BANDWIDTH, Moment, Running, check_content, check_image, waiting,
};
use pageferry_tests::verify::same_memory;
use pageferry_tests::vmm::{MockVmm, PATIENCE};
use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

/// A job, and which of its agents is hit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Source(Mode),
    Destination(Mode),
    Snapshot(SnapshotMode),
    Restore,
}

/// How the agent is hit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Hit {
    /// SIGKILL.
    Killed,
    /// SIGSTOP. Its VMM attaches another agent at once.
    Replaced,
    /// SIGSTOP. Its VMM notices that in a request, and then attaches another agent.
    GivenUp,
    /// SIGSTOP, and SIGCONT before any timeout: nothing is lost.
    Woken,
}

/// The agents of one round, by their names.
struct Agents {
    hit: Host,
    other: Host,
    next: Host,
}

impl Agents {
    fn new() -> Self {
        Self { hit: Host::start(), other: Host::start(), next: Host::start() }
    }
}

impl Drop for Agents {
    /// If a round fails, prints the output of its agents.
    fn drop(&mut self) {
        if std::thread::panicking() {
            let hosts =
                [("hit", &mut self.hit), ("other", &mut self.other), ("next", &mut self.next)];
            for (name, host) in hosts {
                eprintln!("the agent \"{name}\":\n{}", host.agent.process().lines().join("\n"));
            }
        }
    }
}

/// All timeouts for an agent that hangs. They are long enough for a slow agent, because a round in
/// which the agent is woken must complete.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Longest time until a job notices that its peer hangs: its hand-over may take `peer_timeout` and
/// two `hook_timeout`.
const SETTLED: Duration = Duration::from_secs(90);

fn patient() -> Config {
    Config { request_timeout: TIMEOUT, ..Config::default() }
}

fn migration(mode: Mode, random: &mut Random) -> OutgoingOptions {
    OutgoingOptions {
        mode,
        streams: 2,
        switch_after: u32::from(mode == Mode::Hybrid),
        bandwidth: if random.one_in(4) { 0 } else { BANDWIDTH },
        peer_timeout: TIMEOUT,
        hook_timeout: TIMEOUT,
        ..OutgoingOptions::default()
    }
}

fn waits() -> IncomingOptions {
    IncomingOptions { peer_timeout: TIMEOUT, hook_timeout: TIMEOUT, ..IncomingOptions::default() }
}

fn address(folder: &Path, name: &str) -> String {
    format!("unix:{}", folder.join(name).display())
}

/// Hits the agent of `vmm`, which continues with `next`. True unless the agent is only woken.
fn hit(how: Hit, vmm: &mut MockVmm, agents: &mut Agents, random: &mut Random) -> bool {
    let victim = agents.hit.agent.process();
    match how {
        Hit::Killed => victim.kill().unwrap(),
        Hit::Replaced | Hit::GivenUp => victim.freeze().unwrap(),
        Hit::Woken => {
            victim.freeze().unwrap();
            std::thread::sleep(Duration::from_micros(random.below(20_000)));
            victim.thaw().unwrap();
            return false;
        }
    }
    if how != Hit::Replaced {
        vmm.client().status().unwrap_err();
    }
    vmm.reattach(agents.next.agent.socket()).unwrap();
    // The old agent is dead before the next one gets anything.
    assert!(is_dead(agents.hit.agent.process().id()));
    // Like an operator who does not know better.
    let _ = agents.hit.agent.process().thaw();
    true
}

/// Checks that the guest runs only here, and that a migration with the next agent moves all of it
/// to another host.
fn owner_moves_on(owner: &MockVmm, folder: &Path) {
    wait_until("the guest to run", PATIENCE, || owner.record().runs).unwrap();
    let host = Host::start();
    let destination = waiting(&host);
    let to = address(folder, "next");
    let (incoming, _) = destination.start_incoming(&to, &waits()).unwrap();
    let outgoing = owner.start_outgoing(&to, &OutgoingOptions::default()).unwrap();
    let status = owner.wait_job(outgoing, PATIENCE).unwrap();
    assert_eq!(status.phase, Phase::Completed, "{}", status.error_text());
    assert_eq!(destination.wait_job(incoming, PATIENCE).unwrap().phase, Phase::Completed);
    assert_moved(owner, &destination);
}

/// Checks that the guest is complete at the destination, and runs nowhere else.
fn assert_moved(source: &MockVmm, destination: &MockVmm) {
    assert!(destination.record().runs && !source.record().runs);
    assert_ne!(source.client().ownership(), Ownership::Ours);
    assert_eq!(destination.client().ownership(), Ownership::Ours);
    same_memory(source.memory(), source.client(), destination.memory()).unwrap();
    assert!(destination.usage().check().unwrap() > 0);
    check_content(destination.usage());
}

/// Resumes the guest by force: the operator looked at both sides, and it does not run at the
/// destination.
fn force(source: &mut MockVmm, agent: &Path) {
    source.client().take_by_force().unwrap();
    assert_eq!(source.client().ownership(), Ownership::Ours);
    // The job has ended, and another agent does not know of it.
    source.reattach(agent).unwrap();
    source.start().unwrap();
}

/// The source's agent is hit.
fn hit_source(mode: Mode, how: Hit, random: &mut Random) -> Phase {
    let folder = tempfile::tempdir().unwrap();
    let mut agents = Agents::new();
    let mut source = Running::with(&agents.hit, patient()).vmm;
    let destination = waiting(&agents.other);
    let to = address(folder.path(), "first");
    let (incoming, _) = destination.start_incoming(&to, &waits()).unwrap();
    let options = migration(mode, random);
    let outgoing = source.start_outgoing(&to, &options).unwrap();
    Moment::any(random).wait(|| source.client().status().unwrap());
    let seen = source.client().status().unwrap().phase;
    if !hit(how, &mut source, &mut agents, random) {
        let status = source.wait_job(outgoing, PATIENCE).unwrap();
        assert_eq!(status.phase, Phase::Completed, "{}", status.error_text());
        assert_eq!(destination.wait_job(incoming, PATIENCE).unwrap().phase, Phase::Completed);
        assert_moved(&source, &destination);
        return seen;
    }
    if source.client().ownership() == Ownership::Ours {
        // The destination may wait for a source that never came. Its job may also have ended
        // already.
        let _ = destination.client().cancel();
    }
    // The agent is dead, so the source sends nothing more. Now the operator looks at the
    // destination.
    let settled = |phase: Phase| phase.is_final() || phase == Phase::PostcopyPaused;
    let look =
        || Some(destination.client().status().unwrap()).filter(|status| settled(status.phase));
    let there = wait_for("the destination to settle", SETTLED, look).unwrap();
    match (source.client().ownership(), there.phase) {
        (Ownership::Ours, phase) => {
            assert_ne!(phase, Phase::Completed);
            assert!(!destination.record().runs, "two guests run");
            drop(destination);
            owner_moves_on(&source, folder.path());
        }
        (Ownership::Relinquished | Ownership::Gone, Phase::Completed) => {
            assert_moved(&source, &destination)
        }
        (Ownership::Relinquished, Phase::PostcopyPaused) => {
            let recovered = source.client().recover(Some(&to), &options).unwrap().job;
            let ended = source.wait_job(recovered, PATIENCE);
            let (here, there) = (source.client().status(), destination.client().status());
            let ended = ended.unwrap_or_else(|error| panic!("{error}:\n{here:?}\n{there:?}"));
            assert_eq!(ended.phase, Phase::Completed, "{here:?}\n{there:?}");
            assert_eq!(destination.wait_job(incoming, PATIENCE).unwrap().phase, Phase::Completed);
            assert_moved(&source, &destination);
        }
        (Ownership::Relinquished, _) => {
            assert_eq!(
                destination.client().ownership(),
                Ownership::Awaiting,
                "it arrived: {there:?}"
            );
            assert!(!there.arrived, "{there:?}");
            assert!(!destination.record().runs && !source.record().runs);
            drop(destination);
            force(&mut source, agents.next.agent.socket());
            owner_moves_on(&source, folder.path());
        }
        (ownership, phase) => panic!("{ownership:?} at the source, {phase:?} at the destination"),
    }
    seen
}

/// The destination's agent is hit.
fn hit_destination(mode: Mode, how: Hit, random: &mut Random) -> Phase {
    let folder = tempfile::tempdir().unwrap();
    let mut agents = Agents::new();
    let mut source = Running::new(&agents.other).vmm;
    let mut destination = waiting_patiently(&agents.hit);
    let to = address(folder.path(), "first");
    let (incoming, _) = destination.start_incoming(&to, &waits()).unwrap();
    let outgoing = source.start_outgoing(&to, &migration(mode, random)).unwrap();
    Moment::any(random).wait(|| source.client().status().unwrap());
    let seen = source.client().status().unwrap().phase;
    if !hit(how, &mut destination, &mut agents, random) {
        let status = source.wait_job(outgoing, PATIENCE).unwrap();
        assert_eq!(status.phase, Phase::Completed, "{}", status.error_text());
        assert_eq!(destination.wait_job(incoming, PATIENCE).unwrap().phase, Phase::Completed);
        assert_moved(&source, &destination);
        return seen;
    }
    let settled = |phase: Phase| phase.is_final() || phase == Phase::PostcopyPaused;
    let look = || Some(source.client().status().unwrap()).filter(|status| settled(status.phase));
    let here = wait_for("the source to settle", SETTLED, look).unwrap();
    let (ownership, there) = (source.client().ownership(), destination.client().ownership());
    let lost = || destination.record().memory_lost.is_some();
    match (ownership, there) {
        (Ownership::Ours, Ownership::Awaiting) => {
            assert!(!destination.record().runs, "two guests run");
            drop(destination);
            owner_moves_on(&source, folder.path());
        }
        // Either the guest ran there and is complete there, or the operator resumes it here.
        (Ownership::Gone | Ownership::Relinquished, Ownership::Ours)
            if !is_lost(&destination, lost) =>
        {
            assert_moved(&source, &destination);
        }
        (Ownership::Relinquished, Ownership::Ours | Ownership::Awaiting) => {
            assert!(!source.record().runs);
            destination.stop().unwrap();
            drop(destination);
            let next = Host::start();
            force(&mut source, next.agent.socket());
            owner_moves_on(&source, folder.path());
        }
        (ownership, there) => {
            panic!("{ownership:?} at the source ({:?}), {there:?} at the destination", here.phase)
        }
    }
    seen
}

/// Waits until it is known whether the guest lost memory. True if it did.
fn is_lost(vmm: &MockVmm, lost: impl Fn() -> bool) -> bool {
    wait_until("the VMM to hear of its agent's end", PATIENCE, || {
        vmm.record().agent_lost.is_some()
    })
    .unwrap();
    lost()
}

fn waiting_patiently(host: &Host) -> MockVmm {
    pageferry_tests::scenario::moments::waiting_with(host, patient())
}

/// The agent is hit while it saves the guest.
fn hit_snapshot(mode: SnapshotMode, how: Hit, random: &mut Random) -> Phase {
    let mut agents = Agents::new();
    let mut running = Running::with(&agents.hit, patient());
    let options = SnapshotOptions { mode, bandwidth: BANDWIDTH, ..SnapshotOptions::default() };
    if mode == SnapshotMode::Stopped {
        running.vmm.stop().unwrap();
    }
    let image = agents.hit.images.path("image");
    let job = running.vmm.start_snapshot(&image, &options).unwrap();
    Moment::any(random).wait(|| running.vmm.client().status().unwrap());
    let seen = running.vmm.client().status().unwrap().phase;
    let for_good = hit(how, &mut running.vmm, &mut agents, random);
    if !for_good {
        let status = running.vmm.wait_job(job, PATIENCE).unwrap();
        assert_eq!(status.phase, Phase::Completed, "{}", status.error_text());
        check_image(&image);
    }
    if mode == SnapshotMode::Stopped {
        // The VMM keeps its guest running, with or without the image.
        running.vmm.start().unwrap();
    }
    running.assert_runs();
    if !for_good {
        return seen;
    }
    let files = agents.hit.images.files();
    match files.as_slice() {
        [] => {}
        [name] if name == "image" => check_image(&image),
        // An agent that was killed between two names cannot remove the temporary name.
        names => assert!(
            names.iter().all(|name| name == "image" || name.ends_with(".part")),
            "{names:?}"
        ),
    }
    let next = agents.next.images.path("next");
    let mode = if mode == SnapshotMode::Stopped { SnapshotMode::Paused } else { mode };
    let job = running
        .vmm
        .start_snapshot(&next, &SnapshotOptions { mode, ..SnapshotOptions::default() })
        .unwrap();
    let status = running.vmm.wait_job(job, PATIENCE).unwrap();
    assert_eq!(status.phase, Phase::Completed, "{}", status.error_text());
    check_image(&next);
    running.assert_runs();
    seen
}

/// The agent is hit while it restores a guest.
fn hit_restore(how: Hit, random: &mut Random) -> Phase {
    let mut agents = Agents::new();
    let image = agents.other.images.path("image");
    {
        let running = Running::new(&agents.other);
        let paused = SnapshotOptions { mode: SnapshotMode::Paused, ..SnapshotOptions::default() };
        let job = running.vmm.start_snapshot(&image, &paused).unwrap();
        assert_eq!(running.vmm.wait_job(job, PATIENCE).unwrap().phase, Phase::Completed);
    }
    let mut vmm = waiting_patiently(&agents.hit);
    let job = vmm
        .start_restore(
            &image,
            &RestoreOptions { bandwidth: BANDWIDTH, ..RestoreOptions::default() },
        )
        .unwrap();
    Moment::any(random).wait(|| vmm.client().status().unwrap());
    let seen = vmm.client().status().unwrap().phase;
    if hit(how, &mut vmm, &mut agents, random) {
        wait_until("the agent to be lost", PATIENCE, || vmm.record().agent_lost.is_some()).unwrap();
        let record = vmm.record();
        assert_eq!(record.agent_lost == Some(Ownership::Ours), record.runs, "{record:?}");
        vmm.stop().unwrap();
        let again = vmm.start_restore(&image, &RestoreOptions::default()).unwrap();
        assert_eq!(vmm.wait_job(again, PATIENCE).unwrap().phase, Phase::Completed);
    } else {
        let status = vmm.wait_job(job, PATIENCE).unwrap();
        assert_eq!(status.phase, Phase::Completed, "{}", status.error_text());
    }
    assert!(vmm.record().runs);
    assert!(vmm.usage().check().unwrap() > 0);
    check_content(vmm.usage());
    seen
}

/// One round. Returns the phase of the job shortly before its agent was hit.
fn round(kind: Kind, how: Hit, random: &mut Random) -> Phase {
    match kind {
        Kind::Source(mode) => hit_source(mode, how, random),
        Kind::Destination(mode) => hit_destination(mode, how, random),
        Kind::Snapshot(mode) => hit_snapshot(mode, how, random),
        Kind::Restore => hit_restore(how, random),
    }
}

fn kinds() -> Vec<Kind> {
    let mut kinds = vec![
        Kind::Source(Mode::Precopy),
        Kind::Destination(Mode::Precopy),
        Kind::Snapshot(SnapshotMode::Paused),
        Kind::Snapshot(SnapshotMode::Stopped),
        Kind::Restore,
    ];
    if require::uffd() {
        kinds.push(Kind::Snapshot(SnapshotMode::Background));
        for mode in [Mode::Hybrid, Mode::Postcopy] {
            kinds.extend([Kind::Source(mode), Kind::Destination(mode)]);
        }
    }
    kinds
}

/// The jobs that the environment selects.
fn wanted() -> Vec<Kind> {
    let only = std::env::var("PAGEFERRY_KILL_KIND").unwrap_or_default();
    kinds().into_iter().filter(|kind| format!("{kind:?}").contains(&only)).collect()
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().and_then(|value| value.parse().ok())
}

#[test]
fn an_agent_killed_at_any_moment_leaves_one_whole_guest() {
    let seed = number("PAGEFERRY_SEED").unwrap_or_else(|| u64::from(std::process::id()));
    let kinds = wanted();
    let rounds = number("PAGEFERRY_KILL_ROUNDS").unwrap_or(kinds.len() as u64);
    eprintln!("PAGEFERRY_SEED={seed} PAGEFERRY_KILL_ROUNDS={rounds}");
    let mut random = Random::new(seed);
    let mut done: BTreeMap<String, [u64; 2]> = BTreeMap::new();
    for index in 0..rounds {
        let kind = kinds[(index % kinds.len() as u64) as usize];
        let how = match random.below(10) {
            0..3 => Hit::Killed,
            3..7 => Hit::Replaced,
            7 => Hit::GivenUp,
            _ => Hit::Woken,
        };
        // Each round has its own seed, so that it can be repeated alone.
        let own = random.next();
        eprintln!("{index}: {kind:?}, {how:?}, seed {own}");
        let seen = round(kind, how, &mut Random::new(own));
        let counted = done.entry(format!("{kind:?}, {how:?}")).or_default();
        counted[0] += 1;
        counted[1] += u64::from(!seen.is_final());
    }
    for (what, [rounds, under_way]) in &done {
        eprintln!("{what}: {rounds} rounds, {under_way} of them while the job ran");
    }
    let under_way: u64 = done.values().map(|[_, under_way]| under_way).sum();
    // In few rounds, all hits may come too late.
    assert!(
        rounds < 50 || under_way * 3 >= rounds,
        "nearly all came too late: {under_way} of {rounds}"
    );
}
