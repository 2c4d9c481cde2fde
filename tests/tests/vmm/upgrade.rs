// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Agents that are upgraded: the process executes its program again, and the guest does not notice.

use super::supervisor::{PAGES, SLOW, Supervised, lazily_and_slowly, pid, saved};
use pageferry_agent::image::merge::{MergeKeys, merge_with};
use pageferry_agent::image::{Chain, ImageKey};
use pageferry_client::{
    Client, IncomingOptions, OutgoingOptions, Ownership, Parameters, Phase, Punch, SnapshotMode,
    SnapshotOptions, Supervisor, Target,
};
use pageferry_tests::deadline::wait_until;
use pageferry_tests::process::{AgentProcess, Process, program};
use pageferry_tests::require;
use pageferry_tests::scenario::{
    Listening, Ram, SOON, ScriptedHooks, ScriptedVmm, Side, config, lock, moves_to,
};
use rustix::process::{Signal, kill_process};
use std::fs::Permissions;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::{Command, Output};
use std::sync::atomic::{AtomicBool, Ordering};

fn agent(folder: &tempfile::TempDir) -> AgentProcess {
    AgentProcess::spawn(program(), folder.path(), "agent").unwrap()
}

fn request(agent: &mut AgentProcess) {
    kill_process(pid(agent.process().id()), Signal::USR2).unwrap();
}

fn upgrade(agent: &AgentProcess) -> Command {
    let mut command = Command::new(program());
    command.args(["upgrade", "--json", "--socket"]).arg(agent.socket());
    command
}

/// A VMM that has connected to this agent.
fn served(service: AgentProcess) -> (AgentProcess, Supervised) {
    let source = Supervised::connected(Ram::odd(PAGES).stamped(), service.socket());
    (service, source)
}

#[track_caller]
fn done(output: &Output) -> serde_json::Value {
    assert!(output.status.success(), "{output:?}");
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn the_process_and_the_socket_stay_and_the_guest_moves_on() {
    let folder = tempfile::tempdir().unwrap();
    let (mut service, source) = served(agent(&folder));
    let (process, socket) = (service.process().id(), std::fs::metadata(service.socket()).unwrap());
    for attached in 1..4 {
        let said = done(&upgrade(&service).output().unwrap());
        assert_eq!(said["pid"], process);
        assert_eq!(said["version"], said["version_before"]);
        source.wait_for_agent(attached);
        source
            .attached
            .client
            .discard(&[source.attached.ram.range(attached, 1)], Punch::Yes)
            .unwrap();
    }
    assert_eq!(std::fs::metadata(service.socket()).unwrap().ino(), socket.ino());
    let destination = Side::new(Ram::odd(PAGES));
    moves_to(&source.attached, &destination);
    let there = destination.client.discarded(3).unwrap();
    assert_eq!((0..5).filter(|page| there.contains(*page)).collect::<Vec<_>>(), [1, 2, 3]);
    source.end();
    // It removes its path at its end, as one that was never upgraded.
    let path = service.socket().to_owned();
    service.process().terminate().unwrap();
    assert!(service.process().wait(SOON).unwrap().success());
    assert!(!path.exists());
}

#[test]
fn a_job_ends_first_and_no_other_begins() {
    let folder = tempfile::tempdir().unwrap();
    let (service, source) = served(agent(&folder));
    let destination = Side::new(Ram::odd(PAGES));
    let path = folder.path().join("guest");
    destination.listen(&path, &IncomingOptions::default());
    let options = OutgoingOptions { bandwidth: SLOW, ..OutgoingOptions::default() };
    let job = source.attached.send(&path, &options);
    let mut upgrading = Process::spawn("upgrade", &mut upgrade(&service)).unwrap();
    upgrading.wait_for_line("is upgraded when job 1 (outgoing) has ended", SOON).unwrap();
    // The first request holds.
    let said = refused(upgrade(&service).args(["--to", "/bin/true"]));
    assert!(said.contains("another upgrade is under way, to /"), "{said}");
    let refused = || {
        let started = source.attached.client.start_snapshot(folder.path(), &Default::default());
        started.unwrap_err().to_string()
    };
    wait_until("jobs to be refused", SOON, || refused().contains("is to be upgraded")).unwrap();
    assert!(!upgrading.has_ended());
    assert_eq!(source.agents_attached(), 0);
    source.attached.client.cancel().unwrap();
    // The VMM hears how the job has ended, or only that its agent is gone.
    let ended = source.attached.client.wait(job, SOON);
    assert!(ended.is_err() || ended.is_ok_and(|status| status.phase == Phase::Cancelled));
    assert!(upgrading.wait(SOON).unwrap().success());
    source.wait_for_agent(1);
    // How it ended, the next program knows, too.
    let status = source.attached.client.status().unwrap();
    assert_eq!((status.job, status.phase), (job, Phase::Cancelled));
    let destination = Side::new(Ram::odd(PAGES));
    moves_to(&source.attached, &destination);
    source.end();
}

#[test]
fn an_agent_whose_program_is_gone_goes_on() {
    // Another name of the same file: the kernel executes no file that somebody has open to write
    // it, and a process that another test starts meanwhile may have such a descriptor of a copy.
    let program = program();
    let folder = tempfile::tempdir_in(program.parent().unwrap()).unwrap();
    let copy = folder.path().join("program");
    std::fs::hard_link(program, &copy).unwrap();
    let options = ["--programs", "/usr/bin"];
    let service =
        AgentProcess::start_with(&mut Command::new(&copy), folder.path(), "agent", &options);
    let (mut service, source) = served(service.unwrap());
    // No program, and one that is no agent and would end at once.
    for (count, wrong) in [(1, None), (2, Some("/bin/true"))] {
        let _ = std::fs::remove_file(&copy);
        wrong.into_iter().for_each(|wrong| symlink(wrong, &copy).unwrap());
        request(&mut service);
        wait_until("the refusal", SOON, || {
            let lines = service.process().lines();
            lines.iter().filter(|line| line.contains("the agent is not upgraded")).count() == count
        })
        .unwrap();
        let said = refused(&mut upgrade(&service));
        assert!(said.contains(wrong.map_or("No such file", |_| "is no pageferry")), "{said}");
        // Its VMM does not notice.
        source.attached.client.status().unwrap();
        assert_eq!(source.agents_attached(), 0);
    }
    // An operator can put a program there, and try again.
    std::fs::remove_file(&copy).unwrap();
    std::fs::hard_link(program, &copy).unwrap();
    request(&mut service);
    source.wait_for_agent(1);
    let destination = Side::new(Ram::odd(PAGES));
    moves_to(&source.attached, &destination);
    source.end();
}

#[test]
fn however_many_requests_come_the_agent_lives() {
    let folder = tempfile::tempdir().unwrap();
    let (mut service, source) = served(agent(&folder));
    let upgrades = |service: &mut AgentProcess| {
        let lines = service.process().lines();
        lines.iter().filter(|line| line.contains("upgraded to version")).count()
    };
    for _ in 0..3 {
        let (before, attached) = (upgrades(&mut service), source.agents_attached());
        // As many as fit while it ends, executes and starts.
        while upgrades(&mut service) == before {
            request(&mut service);
        }
        wait_until("the next agent", SOON, || source.agents_attached() > attached).unwrap();
    }
    let destination = Side::new(Ram::odd(PAGES));
    let path = folder.path().join("guest");
    destination.listen(&path, &IncomingOptions::default());
    // The last of them may still be under way. A job that has begun ends first.
    wait_until("the guest to leave", SOON, || {
        let target = Target::Address(format!("unix:{}", path.display()));
        let started = source.attached.client.start_outgoing(target, &OutgoingOptions::default());
        let _ = started.and_then(|started| source.attached.client.wait(started.job, SOON));
        source.attached.client.ownership() == Ownership::Gone
    })
    .unwrap();
    assert!(!service.process().has_ended());
    source.end();
}

/// What `pageferry upgrade` says as it fails.
#[track_caller]
fn refused(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    String::from_utf8(output.stderr).unwrap()
}

#[test]
fn another_program_is_executed_if_nobody_else_may_write_it() {
    let program = program();
    let folder = tempfile::tempdir_in(program.parent().unwrap()).unwrap();
    let options = ["--programs", "/usr/bin"];
    let service =
        AgentProcess::start_with(&mut Command::new(program), folder.path(), "agent", &options);
    let (service, source) = served(service.unwrap());
    let to = |path: &Path| {
        let mut command = upgrade(&service);
        command.arg("--to").arg(path).current_dir(folder.path());
        command
    };
    let said = refused(&mut to(Path::new("nothing")));
    let nothing = folder.path().join("nothing");
    assert!(said.contains(&format!("cannot open program {nothing:?}: No such file")), "{said}");
    let said = refused(&mut to(Path::new("/usr/bin/true")));
    assert!(said.contains("is no pageferry, or a script"), "{said}");
    let elsewhere = tempfile::tempdir().unwrap();
    std::fs::copy(program, elsewhere.path().join("newer")).unwrap();
    let said = refused(&mut to(&elsewhere.path().join("newer")));
    assert!(said.contains("is in none of the folders from which this agent"), "{said}");
    let copy = folder.path().join("newer");
    std::fs::copy(program, &copy).unwrap();
    std::fs::set_permissions(&copy, Permissions::from_mode(0o775)).unwrap();
    let said = refused(&mut to(&copy));
    assert!(said.contains("has mode 775, but only its owner may write to it"), "{said}");
    // All that has changed nothing.
    source.attached.client.status().unwrap();
    assert_eq!(source.agents_attached(), 0);

    // Another name of the same file, as above.
    std::fs::remove_file(&copy).unwrap();
    std::fs::hard_link(program, &copy).unwrap();
    let executed =
        |pid: &serde_json::Value| std::fs::read_link(format!("/proc/{pid}/exe")).unwrap();
    let said = done(&to(Path::new("newer")).output().unwrap());
    assert_eq!(executed(&said["pid"]), copy);
    source.wait_for_agent(1);
    // It is the agent's own from now on.
    let said = done(&upgrade(&service).output().unwrap());
    assert_eq!(executed(&said["pid"]), copy);
    source.wait_for_agent(2);
    source.end();
}

#[test]
fn what_cannot_be_upgraded_says_so() {
    let refused =
        |path: &Path| refused(Command::new(program()).args(["upgrade", "--socket"]).arg(path));
    let folder = tempfile::tempdir().unwrap();
    let said = refused(&folder.path().join("nobody"));
    assert!(said.contains("no agent answers on"), "{said}");
    // An agent on a thread of this process.
    let said = refused(&Listening::start().path);
    assert!(said.contains("cannot be upgraded"), "{said}");
    // An agent that ends with its VMM, and listens for operators, too.
    let path = folder.path().join("agent");
    let command = {
        let path = path.clone();
        move || {
            let mut command = Command::new(program());
            command.args(["agent", "--stdin", "--socket"]).arg(&path);
            command
        }
    };
    let hooks = ScriptedHooks(ScriptedVmm::new());
    let (client, supervisor) = Supervisor::spawn(command, config(), hooks).unwrap();
    let process = client.agent_pid();
    let said = refused(&path);
    assert!(said.contains("a part of its VMM (--stdin), which starts the next"), "{said}");
    // Nor does the signal end it.
    for _ in 0..3 {
        kill_process(pid(process), Signal::USR2).unwrap();
        client.status().unwrap();
    }
    assert_eq!(client.agent_pid(), process);
    drop(client);
    supervisor.join();
}

/// The next program brings the rest of the memory, whoever is waiting for it.
#[test]
fn a_lazy_restore_continues_in_the_next_program() {
    if !require::uffd() {
        return;
    }
    let (_images, image, _) = saved();
    let folder = tempfile::tempdir().unwrap();
    let mut service = agent(&folder);
    let guest = Supervised::connected(Ram::odd(PAGES).mapped(), service.socket());
    guest.attached.client.start_restore(&image, &lazily_and_slowly()).unwrap();
    wait_until("the guest to run", SOON, || guest.attached.vmm.resumes() == 1).unwrap();
    let open_files = |service: &mut AgentProcess| {
        std::fs::read_dir(format!("/proc/{}/fd", service.process().id())).unwrap().count()
    };
    let mut counts = Vec::new();
    for attached in 1..5 {
        let process = service.process().id();
        let said = done(&upgrade(&service).output().unwrap());
        assert_eq!(said["pid"], process);
        assert_eq!(guest.attached.ram.touch(90 + attached).found().unwrap(), 1090 + attached);
        guest.wait_for_agent(attached);
        counts.push(open_files(&mut service));
    }
    // Nothing stays open from one program to the next.
    assert!(counts.iter().all(|count| count.abs_diff(counts[0]) < 8), "{counts:?}");
    guest.attached.client.set_parameters(&Parameters::bandwidth(0)).unwrap();
    let complete = || lock(&guest.attached.vmm.asked).complete == 1;
    wait_until("the memory to be complete", SOON, complete).unwrap();
    assert_eq!(guest.attached.ram.touch(9).found().unwrap(), 1009);
    guest.end();
}

/// The next program has the key of the old one, also if its file is gone.
#[test]
fn a_lazy_restore_of_a_sealed_image_continues_in_the_next_program() {
    if !require::uffd() {
        return;
    }
    let (images, plain, _) = saved();
    let (sealed, file) = (images.path().join("sealed"), images.path().join("key"));
    let key = ImageKey::parse(&[7; 32]).unwrap();
    let keys = MergeKeys { old: None, new: Some(&key) };
    merge_with(&plain, keys, &sealed, false, 1, &|_, _| ()).unwrap();
    std::fs::write(&file, [7; 32]).unwrap();
    std::fs::set_permissions(&file, Permissions::from_mode(0o600)).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let (mut command, arguments) =
        (Command::new(program()), ["--image-key", file.to_str().unwrap()]);
    let started = AgentProcess::start_with(&mut command, folder.path(), "agent", &arguments);
    let service = started.unwrap();
    std::fs::remove_file(&file).unwrap();
    let guest = Supervised::connected(Ram::odd(PAGES).mapped(), service.socket());
    guest.attached.client.start_restore(&sealed, &lazily_and_slowly()).unwrap();
    wait_until("the guest to run", SOON, || guest.attached.vmm.resumes() == 1).unwrap();
    for attached in 1..3 {
        done(&upgrade(&service).output().unwrap());
        assert_eq!(guest.attached.ram.touch(90 + attached).found().unwrap(), 1090 + attached);
        guest.wait_for_agent(attached);
    }
    guest.attached.client.set_parameters(&Parameters::bandwidth(0)).unwrap();
    let complete = || lock(&guest.attached.vmm.asked).complete == 1;
    wait_until("the memory to be complete", SOON, complete).unwrap();
    assert_eq!(guest.attached.ram.touch(9).found().unwrap(), 1009);
    // What it saves now is sealed, too.
    let next = images.path().join("next");
    let options = SnapshotOptions { mode: SnapshotMode::Paused, ..SnapshotOptions::default() };
    let job = guest.attached.client.start_snapshot(&next, &options).unwrap().job;
    assert_eq!(guest.attached.client.wait(job, SOON).unwrap().phase, Phase::Completed);
    Chain::open_with(&next, Some(&key)).unwrap();
    guest.end();
}

/// Memory that the guest gives back meanwhile waits for the old program, not for its process, and
/// nobody kills the new one.
#[test]
fn a_guest_that_gives_back_memory_meanwhile_keeps_its_agent() {
    let folder = tempfile::tempdir().unwrap();
    let (mut service, source) = served(agent(&folder));
    let ended = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut page = 0;
            while !ended.load(Ordering::SeqCst) {
                page = (page + 1) % 30;
                let range = [source.attached.ram.range(page, 1)];
                source.attached.client.discard(&range, Punch::Yes).unwrap();
            }
        });
        for attached in 1..5 {
            done(&upgrade(&service).output().unwrap());
            source.wait_for_agent(attached);
        }
        ended.store(true, Ordering::SeqCst);
    });
    assert!(!service.process().has_ended());
    let destination = Side::new(Ram::odd(PAGES));
    moves_to(&source.attached, &destination);
    source.end();
}

/// Without a supervisor nobody attaches the next program: the job ends first.
#[test]
fn a_lazy_restore_that_nobody_continues_ends_first() {
    if !require::uffd() {
        return;
    }
    let (_images, image, _) = saved();
    let folder = tempfile::tempdir().unwrap();
    let service = agent(&folder);
    let hooks = ScriptedVmm::new();
    let (client, channel) = Client::connect(service.socket(), config()).unwrap();
    channel.spawn(ScriptedHooks(hooks.clone())).unwrap();
    let ram = Ram::odd(PAGES).mapped();
    ram.add_to(&client);
    client.start_restore(&image, &lazily_and_slowly()).unwrap();
    wait_until("the guest to run", SOON, || hooks.resumes() == 1).unwrap();
    let mut upgrading = Process::spawn("upgrade", &mut upgrade(&service)).unwrap();
    upgrading.wait_for_line("is upgraded when job 1 (restore) has ended", SOON).unwrap();
    assert_eq!(ram.touch(77).found().unwrap(), 1077);
    assert_eq!(lock(&hooks.asked).complete, 0);
    client.set_parameters(&Parameters::bandwidth(0)).unwrap();
    wait_until("the memory to be complete", SOON, || lock(&hooks.asked).complete == 1).unwrap();
    assert!(upgrading.wait(SOON).unwrap().success());
    assert_eq!(ram.touch(9).found().unwrap(), 1009);
    assert_eq!(lock(&hooks.asked).lost, 0);
}
