// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A supervisor replaces lost agents, unless somebody may still need the lost one.

use pageferry_client::{
    BlockRange, Client, Config, Error, IncomingOptions, Mode, OutgoingOptions, Ownership,
    Parameters, Phase, Punch, RestoreMode, RestoreOptions, SnapshotMode, SnapshotOptions,
    Supervisor, Target, Trackers,
};
use pageferry_protocol::memory::PAGE_SIZE;
use pageferry_tests::deadline::wait_until;
use pageferry_tests::process::{AgentProcess, program};
use pageferry_tests::require;
use pageferry_tests::scenario::{
    At, Attached, Ram, SOON, ScriptedHooks, ScriptedVmm, Side, config, lock, moves_to,
};
use rustix::process::{Pid, Signal, kill_process, test_kill_process};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

pub const PAGES: u64 = 100;

/// A bandwidth at which no job here ends by itself.
pub const SLOW: u64 = 64 << 10;

/// A VMM whose agents are supervised. Fields drop in order.
pub struct Supervised {
    pub attached: Attached,
    supervisor: Supervisor<ScriptedHooks>,
}

fn agent() -> Command {
    let mut command = Command::new(program());
    command.args(["agent", "--stdin"]);
    command
}

impl Supervised {
    fn new(ram: Ram) -> Self {
        Self::with(ram, agent)
    }

    fn with(ram: Ram, command: impl FnMut() -> Command + Send + 'static) -> Self {
        Self::configured(ram, config(), command)
    }

    fn configured(
        ram: Ram, config: Config, command: impl FnMut() -> Command + Send + 'static,
    ) -> Self {
        let vmm = ScriptedVmm::new();
        let hooks = ScriptedHooks(Arc::clone(&vmm));
        Self::of(ram, vmm, Supervisor::spawn(command, config, hooks).unwrap())
    }

    /// The agent listens at this path.
    pub fn connected(ram: Ram, path: &Path) -> Self {
        let vmm = ScriptedVmm::new();
        let hooks = ScriptedHooks(Arc::clone(&vmm));
        Self::of(ram, vmm, Supervisor::connect(path, config(), hooks).unwrap())
    }

    fn of(
        ram: Ram, vmm: Arc<ScriptedVmm>, (client, supervisor): (Client, Supervisor<ScriptedHooks>),
    ) -> Self {
        ram.add_to(&client);
        client.set_trackers(Trackers::LOG_IS_COMPLETE).unwrap();
        Self { attached: Attached { client, vmm, ram: Arc::new(ram) }, supervisor }
    }

    /// Kills the agent. Returns its process id.
    fn kill(&self) -> u32 {
        let killed = self.attached.client.agent_pid();
        kill_process(pid(killed), Signal::KILL).unwrap();
        killed
    }

    pub fn agents_attached(&self) -> u64 {
        lock(&self.attached.vmm.asked).attached
    }

    /// Waits until this many agents were attached after the first, and the last one answers.
    pub fn wait_for_agent(&self, attached: u64) {
        wait_until("the next agent", SOON, || self.agents_attached() == attached).unwrap();
        self.attached.client.status().unwrap();
    }

    /// Checks that no agent is started by itself.
    fn assert_stays_alone(&self) {
        wait_until("the loss of the agent", SOON, || self.attached.client.status().is_err())
            .unwrap();
        // Nothing tells that nothing comes. The first attempt would come after 100 ms; a machine
        // that is slower than this misses a failure, and finds none that is not there.
        std::thread::sleep(Duration::from_millis(600));
        assert!(matches!(self.attached.client.status(), Err(Error::AgentLost { .. })));
        assert_eq!(self.agents_attached(), 0);
    }

    /// Drops the client and waits for the end of the hooks.
    pub fn end(self) {
        let vmm = Arc::clone(&self.attached.vmm);
        drop(self.attached);
        let hooks = self.supervisor.join();
        assert!(Arc::ptr_eq(&hooks.0, &vmm));
    }
}

pub fn pid(process: u32) -> Pid {
    Pid::from_raw(process as i32).unwrap()
}

fn is_gone(process: u32) -> bool {
    test_kill_process(pid(process)).is_err()
}

fn save_to(image: &Path, mode: SnapshotMode, bandwidth: u64) -> (&Path, SnapshotOptions) {
    (image, SnapshotOptions { mode, bandwidth, replace: true, ..SnapshotOptions::default() })
}

/// A restore whose guest runs before its memory is there, for as long as the limit holds.
pub fn lazily_and_slowly() -> RestoreOptions {
    RestoreOptions {
        mode: RestoreMode::Lazy,
        bandwidth: SLOW,
        hook_timeout: SOON,
        ..RestoreOptions::default()
    }
}

/// A guest and its image, in a folder.
pub fn saved() -> (tempfile::TempDir, PathBuf, Side) {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("image");
    let source = Side::new(Ram::odd(PAGES).stamped());
    let (path, options) = save_to(&image, SnapshotMode::Paused, 0);
    let job = source.client.start_snapshot(path, &options).unwrap().job;
    assert_eq!(source.wait(job).phase, Phase::Completed);
    (folder, image, source)
}

#[test]
fn an_idle_agent_that_is_killed_is_replaced_and_the_next_one_works() {
    let source = Supervised::new(Ram::odd(PAGES).stamped());
    let mut killed = Vec::new();
    for attached in 1..3 {
        killed.push(source.kill());
        source.wait_for_agent(attached);
    }
    // Its blocks, its trackers and its discarded pages came with the client.
    let range = BlockRange { block: 3, offset: 0, length: PAGE_SIZE };
    source.attached.client.discard(&[range], Punch::Yes).unwrap();
    assert_eq!(source.attached.client.trackers(), Trackers::LOG_IS_COMPLETE);
    let destination = Side::new(Ram::odd(PAGES));
    moves_to(&source.attached, &destination);
    wait_until("the dead agents to be reaped", SOON, || killed.iter().copied().all(is_gone))
        .unwrap();
    killed.push(source.attached.client.agent_pid());
    source.end();
    wait_until("the last agent to end", SOON, || killed.iter().copied().all(is_gone)).unwrap();
}

/// A service manager starts the agents, and the VMM connects to the path again.
#[test]
fn an_agent_at_a_path_that_dies_or_is_restarted_is_connected_again() {
    let folder = tempfile::tempdir().unwrap();
    let agent = || AgentProcess::spawn(program(), folder.path(), "agent").unwrap();
    let mut service = agent();
    let source = Supervised::connected(Ram::odd(PAGES).stamped(), service.socket());
    let range = BlockRange { block: 3, offset: 0, length: PAGE_SIZE };
    for (attached, kills) in [(1, true), (2, false), (3, true)] {
        if kills {
            service.process().kill().unwrap();
        } else {
            service.process().terminate().unwrap();
        }
        wait_until("the loss of the agent", SOON, || source.attached.client.status().is_err())
            .unwrap();
        // The guest gives memory back meanwhile.
        source.attached.client.discard(&[range], Punch::Yes).unwrap();
        // An attempt finds somebody at the path who is no agent.
        let path = service.socket().to_owned();
        let _ = std::fs::remove_file(&path);
        let stranger = UnixListener::bind(&path).unwrap();
        drop(stranger.accept().unwrap());
        drop(stranger);
        std::fs::remove_file(&path).unwrap();
        service = agent();
        source.wait_for_agent(attached);
    }
    let destination = Side::new(Ram::odd(PAGES));
    moves_to(&source.attached, &destination);
    let there = destination.client.discarded(3).unwrap();
    assert!(there.contains(0) && !there.contains(1));
    source.end();
    // The agent was not the VMM's child, and serves others.
    assert!(!service.process().has_ended());
}

#[test]
fn the_vmm_learns_how_its_agent_ended() {
    let reason = |error| match error {
        Error::AgentLost { reason } => reason,
        other => panic!("{other:?}"),
    };
    let (client, _channel, mut child) = Client::spawn(&mut agent(), config()).unwrap();
    let pid = child.id();
    child.kill().unwrap();
    let told = reason(client.status().unwrap_err());
    let expected =
        format!("its process {pid} was killed by signal 9 and has not answered QUERY_STATUS");
    assert_eq!(told, expected);
    child.wait().unwrap();

    let (client, _channel, mut child) = Client::spawn(&mut agent(), config()).unwrap();
    client.end_agent().unwrap();
    assert_eq!(reason(client.status().unwrap_err()), "the VMM ended it");
    child.wait().unwrap();
}

#[test]
fn an_agent_killed_in_passes_costs_the_migration_only() {
    let folder = tempfile::tempdir().unwrap();
    let source = Supervised::new(Ram::odd(PAGES).stamped());
    let listener = UnixListener::bind(folder.path().join("nobody")).unwrap();
    let nobody = Target::Address(format!("unix:{}", folder.path().join("nobody").display()));
    source.attached.client.start_outgoing(nobody, &OutgoingOptions::default()).unwrap();
    let _peer = listener.accept().unwrap();
    source.kill();
    source.wait_for_agent(1);
    assert_eq!(source.attached.client.status().unwrap().phase, Phase::Idle);
    assert_eq!(source.attached.client.ownership(), Ownership::Ours);
    assert!(!source.attached.vmm.is_paused());

    // In the middle of its passes, with a peer that receives.
    let destination = Side::new(Ram::odd(PAGES));
    let path = folder.path().join("first");
    let incoming = destination.listen(&path, &IncomingOptions::default());
    source.attached.send(&path, &OutgoingOptions { bandwidth: SLOW, ..OutgoingOptions::default() });
    wait_until("the passes", SOON, || {
        source.attached.client.status().unwrap().counters.wire_bytes > 0
    })
    .unwrap();
    source.kill();
    source.wait_for_agent(2);
    assert_eq!(destination.wait(incoming).phase, Phase::Failed);
    source.attached.write(1, 11);
    moves_to(&source.attached, &destination);
    source.end();
}

#[test]
fn an_agent_killed_in_a_background_snapshot_costs_the_snapshot_only() {
    if !require::uffd() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("image");
    // The first piece of an image is not held up, so there must be more than one.
    let guest = Supervised::new(Ram::odd(20 * PAGES).mapped().stamped());
    let client = &guest.attached.client;
    let (path, options) = save_to(&image, SnapshotMode::Background, SLOW);
    client.start_snapshot(path, &options).unwrap();
    wait_until("the save", SOON, || client.status().unwrap().phase == Phase::Saving).unwrap();
    guest.kill();
    guest.wait_for_agent(1);
    assert!(!guest.attached.vmm.is_paused());
    assert!(!image.exists());
    // Nothing is protected any more.
    assert_eq!(guest.attached.ram.touch(5).found().unwrap(), 1005);
    let (path, options) = save_to(&image, SnapshotMode::Background, 0);
    let job = client.start_snapshot(path, &options).unwrap().job;
    let status = guest.attached.wait(job);
    assert_eq!(status.phase, Phase::Completed, "{}", status.error_text());
    guest.end();
}

#[test]
fn a_command_that_fails_once_is_tried_again() {
    let calls = Arc::new(AtomicU32::new(0));
    let counted = Arc::clone(&calls);
    let command = move || match counted.fetch_add(1, Ordering::Relaxed) {
        1 => Command::new("/nonexistent/pageferry"),
        2 => panic!("the VMM finds no command"),
        // Exits at once.
        3 => Command::new("true"),
        _ => agent(),
    };
    let guest = Supervised::with(Ram::odd(PAGES), command);
    guest.kill();
    guest.wait_for_agent(1);
    assert_eq!(calls.load(Ordering::Relaxed), 5);
    guest.end();
}

#[test]
fn a_client_dropped_in_a_pause_ends_the_supervisor_without_another_attempt() {
    let calls = Arc::new(AtomicU32::new(0));
    let counted = Arc::clone(&calls);
    let command = move || match counted.fetch_add(1, Ordering::Relaxed) {
        0 => agent(),
        _ => Command::new("/nonexistent/pageferry"),
    };
    let guest = Supervised::with(Ram::odd(PAGES), command);
    guest.kill();
    // The pauses before were 100, 200, 400, 800 and 1600 ms. The next one is 3.2 s.
    wait_until("the fifth attempt", SOON, || calls.load(Ordering::Relaxed) == 6).unwrap();
    guest.end();
    assert_eq!(calls.load(Ordering::Relaxed), 6);
}

#[test]
fn an_agent_that_hangs_does_not_keep_the_vmm_from_ending() {
    let config = Config { request_timeout: Duration::from_secs(1), ..config() };
    let vmm = ScriptedVmm::new();
    let (client, supervisor) = Supervisor::spawn(agent, config, ScriptedHooks(vmm)).unwrap();
    let hangs = client.agent_pid();
    pageferry_tests::process::freeze(hangs).unwrap();
    drop(client);
    supervisor.join();
    assert!(is_gone(hangs));
}

#[test]
fn a_guest_that_was_given_up_keeps_its_agent_until_the_vmm_decides() {
    if !require::uffd() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let source = Supervised::new(Ram::odd(PAGES).stamped());
    let destination = Side::new(Ram::odd(PAGES).mapped());
    let path = folder.path().join("guest");
    let incoming = destination.listen(&path, &IncomingOptions::default());
    let options =
        OutgoingOptions { mode: Mode::Postcopy, bandwidth: SLOW, ..OutgoingOptions::default() };
    source.attached.send(&path, &options);
    wait_until("the guest to run there", SOON, || destination.vmm.resumes() == 1).unwrap();
    let killed = source.kill();
    source.assert_stays_alone();
    assert_eq!(source.attached.client.ownership(), Ownership::Relinquished);
    // Also when nobody has asked before the process was reaped.
    let error = source.attached.client.status().unwrap_err().to_string();
    assert!(error.contains(&format!("{killed} was killed by signal 9")), "{error}");

    source.supervisor.replace_agent().unwrap();
    let address = format!("unix:{}", path.display());
    let options = OutgoingOptions { mode: Mode::Postcopy, ..OutgoingOptions::default() };
    source.attached.client.recover(Some(&address), &options).unwrap();
    let status = destination.wait(incoming);
    assert_eq!(status.phase, Phase::Completed, "{}", status.error_text());
    assert_eq!(destination.ram.touch(7).found().unwrap(), 1007);
    wait_until("the guest to be gone", SOON, || {
        source.attached.client.ownership() == Ownership::Gone
    })
    .unwrap();
    assert_eq!(source.agents_attached(), 1);
    source.end();
}

#[test]
fn after_lost_memory_an_agent_comes_when_another_guest_is_awaited() {
    if !require::uffd() {
        return;
    }
    let (folder, image, source) = saved();

    // An agent that cannot be started for a while, longer than the guest is to wait.
    let starts = Arc::new(AtomicBool::new(true));
    let may_start = Arc::clone(&starts);
    let command = move || match may_start.load(Ordering::SeqCst) {
        true => agent(),
        false => Command::new("/nowhere"),
    };
    let config = Config { continue_within: Duration::from_millis(50), ..config() };
    let guest = Supervised::configured(Ram::odd(PAGES).mapped(), config, command);
    let stream = folder.path().join("guest");
    guest.attached.listen(&stream, &IncomingOptions::default());
    let options =
        OutgoingOptions { mode: Mode::Postcopy, bandwidth: SLOW, ..OutgoingOptions::default() };
    source.send(&stream, &options);
    wait_until("the guest to run", SOON, || guest.attached.vmm.resumes() == 1).unwrap();
    starts.store(false, Ordering::SeqCst);
    guest.kill();
    wait_until("the memory to be lost", SOON, || lock(&guest.attached.vmm.asked).lost == 1)
        .unwrap();
    starts.store(true, Ordering::SeqCst);
    guest.assert_stays_alone();
    assert_eq!(lock(&guest.attached.vmm.asked).losses, ["agent", "memory"]);
    assert_eq!(lock(&guest.attached.vmm.asked).complete, 0);

    guest.supervisor.replace_agent().unwrap();
    let job = guest.attached.client.start_restore(&image, &RestoreOptions::default()).unwrap().job;
    assert_eq!(guest.attached.wait(job).phase, Phase::Completed);
    assert_eq!(guest.attached.ram.touch(9).found().unwrap(), 1009);
    guest.end();
}

/// The thread of the hooks is busy with the loss of the first agent, and does not come to the
/// second one, which is lost, too.
#[test]
fn a_hook_that_waits_for_a_page_outlives_several_agents() {
    if !require::uffd() {
        return;
    }
    let (_folder, image, _) = saved();
    let guest = Supervised::new(Ram::odd(PAGES).mapped());
    let (client, ram) = (guest.attached.client.downgrade(), Arc::clone(&guest.attached.ram));
    let agent = move || client.upgrade().unwrap().agent_pid();
    let kills = agent.clone();
    guest.attached.vmm.on(At::AgentLost, move || {
        for _ in 0..3 {
            let lost = kills();
            let is_next = || (kills() != lost).then_some(());
            pageferry_tests::deadline::wait_for("the next agent", SOON, is_next).unwrap();
            kill_process(pid(kills()), Signal::KILL).unwrap();
        }
        assert_eq!(ram.touch(77).found().unwrap(), 1077);
        Ok(())
    });
    guest.attached.client.start_restore(&image, &lazily_and_slowly()).unwrap();
    wait_until("the guest to run", SOON, || guest.attached.vmm.resumes() == 1).unwrap();
    kill_process(pid(agent()), Signal::KILL).unwrap();
    wait_until("the next agent", SOON, || guest.agents_attached() >= 1).unwrap();
    guest.attached.client.set_parameters(&Parameters::bandwidth(0)).unwrap();
    let complete = || lock(&guest.attached.vmm.asked).complete == 1;
    wait_until("the memory to be complete", SOON, complete).unwrap();
    assert_eq!(lock(&guest.attached.vmm.asked).lost, 0);
    guest.end();
}

/// The thread of the hooks cannot attach the next agent: it waits for a page that only that one
/// brings.
#[test]
fn a_hook_that_waits_for_a_page_gets_it_from_the_next_agent() {
    if !require::uffd() {
        return;
    }
    let (_folder, image, _) = saved();

    let guest = Supervised::new(Ram::odd(PAGES).mapped());
    let (client, ram) = (guest.attached.client.downgrade(), Arc::clone(&guest.attached.ram));
    guest.attached.vmm.on(At::Resume, move || {
        kill_process(pid(client.upgrade().unwrap().agent_pid()), Signal::KILL).unwrap();
        assert_eq!(ram.touch(77).found().unwrap(), 1077);
        Ok(())
    });
    guest.attached.client.start_restore(&image, &lazily_and_slowly()).unwrap();
    guest.wait_for_agent(1);
    guest.attached.client.set_parameters(&Parameters::bandwidth(0)).unwrap();
    let complete = || lock(&guest.attached.vmm.asked).complete == 1;
    wait_until("the memory to be complete", SOON, complete).unwrap();
    assert_eq!(guest.attached.ram.touch(9).found().unwrap(), 1009);
    assert_eq!(lock(&guest.attached.vmm.asked).losses, ["agent"]);
    guest.end();
}

#[test]
fn an_agent_that_the_vmm_has_ended_is_not_replaced_until_it_says_so() {
    let guest = Supervised::new(Ram::odd(PAGES));
    let client = &guest.attached.client;
    client.end_agent().unwrap();
    guest.assert_stays_alone();
    client.take_by_force().unwrap();
    guest.wait_for_agent(1);
    // One that works is replaced, too.
    let before = client.agent_pid();
    guest.supervisor.replace_agent().unwrap();
    assert_ne!(client.agent_pid(), before);
    guest.wait_for_agent(2);
    guest.end();
}
