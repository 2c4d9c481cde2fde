// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! An agent opens what was named to it, and nothing else.

use pageferry_client::{OutgoingOptions, RestoreOptions, SnapshotOptions};
use pageferry_protocol::control::Grants;
use pageferry_protocol::control::reply::ErrorCode;
use pageferry_protocol::control::request::Request;
use pageferry_tests::deadline::wait_until;
use pageferry_tests::on_drop::OnDrop;
use pageferry_tests::process::{AgentProcess, Process, program, state};
use pageferry_tests::scenario::{RawClient, SOON};
use rustix::process::{Pid, Signal, kill_process};
use std::fs::Permissions;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// An agent in a sandbox, and a folder that has nothing to do with it.
struct Scene {
    agent: AgentProcess,
    elsewhere: tempfile::TempDir,
    _home: tempfile::TempDir,
}

impl Scene {
    fn with(options: &[&str]) -> Self {
        let (home, elsewhere) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let command = &mut Command::new(program());
        let agent = AgentProcess::start_with(command, home.path(), "agent", options).unwrap();
        Self { agent, elsewhere, _home: home }
    }

    fn opener(&self) -> Pid {
        let agent = self.agent.id();
        let children = format!("/proc/{agent}/task/{agent}/children");
        let opener = std::fs::read_to_string(children).unwrap().trim().parse().unwrap();
        Pid::from_raw(opener).unwrap()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.elsewhere.path().join(name)
    }

    /// The refusal of a restore from this file.
    fn restore(&self, client: &mut RawClient, path: &Path) -> (ErrorCode, String) {
        let path = path.to_str().unwrap().to_owned();
        let request = Request::StartRestore { path, options: RestoreOptions::default() };
        let refused = client.ask(&request, Vec::new()).unwrap_err();
        (refused.code, refused.sentence)
    }
}

fn grant(client: &mut RawClient, grants: Grants) {
    client.ask(&Request::Grant, grants.into_fds()).unwrap();
}

#[test]
fn a_file_is_opened_only_in_a_folder_that_somebody_has_named() {
    let scene = Scene::with(&[]);
    let mut client = RawClient::connect(scene.agent.socket());
    let image = scene.path("guest.img");
    std::fs::write(&image, "no image").unwrap();
    let (code, sentence) = scene.restore(&mut client, &image);
    assert_eq!(code, ErrorCode::Denied);
    assert!(sentence.contains("nobody has named the folder"), "{sentence}");
    // A link from a folder that is named leads to the same refusal.
    let named = tempfile::tempdir().unwrap();
    let link = named.path().join("link.img");
    std::os::unix::fs::symlink(&image, &link).unwrap();
    grant(&mut client, Grants::default().folder(named.path()));
    assert_eq!(scene.restore(&mut client, &link).0, ErrorCode::Denied);

    grant(&mut client, Grants::default().read(&image));
    let (code, sentence) = scene.restore(&mut client, &image);
    assert_ne!(code, ErrorCode::Denied, "{sentence}");
    // Reading is not writing.
    let path = scene.path("new.img").to_str().unwrap().to_owned();
    let snapshot = Request::StartSnapshot { path, options: SnapshotOptions::default() };
    let refused = client.ask(&snapshot, Vec::new()).unwrap_err();
    assert_eq!(refused.code, ErrorCode::Denied, "{refused}");
    grant(&mut client, Grants::default().write(&scene.path("new.img")));
    let refused = client.ask(&snapshot, Vec::new()).unwrap_err();
    assert_ne!(refused.code, ErrorCode::Denied, "{refused}");
}

#[test]
fn folders_of_the_command_line_are_named_for_good() {
    let images = tempfile::tempdir().unwrap();
    std::fs::create_dir(images.path().join("today")).unwrap();
    let image = images.path().join("today/guest.img");
    std::fs::write(&image, "no image").unwrap();
    let scene = Scene::with(&["--folder", images.path().to_str().unwrap()]);
    let mut client = RawClient::connect(scene.agent.socket());
    let (code, sentence) = scene.restore(&mut client, &image);
    assert_ne!(code, ErrorCode::Denied, "{sentence}");
}

#[test]
fn what_names_nothing_is_refused() {
    let scene = Scene::with(&[]);
    let mut client = RawClient::connect(scene.agent.socket());
    let (one, other) = std::os::unix::net::UnixStream::pair().unwrap();
    let file = std::fs::File::open("/dev/null").unwrap();
    let many = (0..17).map(|_| file.try_clone().unwrap().into()).collect();
    for fds in [Vec::new(), vec![OwnedFd::from(one)], vec![file.into()], many] {
        let refused = client.ask(&Request::Grant, fds).unwrap_err();
        assert_eq!(refused.code, ErrorCode::Invalid, "{refused}");
    }
    drop(other);
    // The connection goes on.
    client.status();
}

#[test]
fn without_a_sandbox_nothing_need_be_named() {
    for mode in ["off", "log"] {
        let mut scene = Scene::with(&["--sandbox", mode]);
        let mut client = RawClient::connect(scene.agent.socket());
        let image = scene.path("guest.img");
        std::fs::write(&image, "no image").unwrap();
        let (code, sentence) = scene.restore(&mut client, &image);
        assert_ne!(code, ErrorCode::Denied, "{sentence}");
        if mode == "log" {
            let said = "the sandbox would refuse";
            let patience = std::time::Duration::from_secs(30);
            scene.agent.process().wait_for_line(said, patience).unwrap();
        }
    }
}

#[test]
fn an_agent_goes_on_when_its_opener_is_gone() {
    let scene = Scene::with(&[]);
    let mut client = RawClient::connect(scene.agent.socket());
    let image = scene.path("guest.img");
    std::fs::write(&image, "no image").unwrap();
    grant(&mut client, Grants::default().read(&image));
    kill_process(scene.opener(), Signal::KILL).unwrap();
    let (_, sentence) = scene.restore(&mut client, &image);
    assert!(sentence.contains("Broken pipe"), "{sentence}");
    client.status();
    let outgoing = Request::StartOutgoing {
        target: "tcp:127.0.0.1:1".into(),
        options: OutgoingOptions::default(),
    };
    client.ask(&outgoing, Vec::new()).unwrap_err();
    // The reason is not what was granted.
    let folder = Grants::default().read(&image).into_fds();
    let refused = client.ask(&Request::Grant, folder).unwrap_err();
    assert!(refused.sentence.contains("the opener of this agent"), "{}", refused.sentence);
}

#[test]
fn an_agent_ends_although_its_opener_is_stopped() {
    let mut scene = Scene::with(&[]);
    let opener = scene.opener();
    kill_process(opener, Signal::STOP).unwrap();
    let _goes_on = OnDrop(|| kill_process(opener, Signal::CONT).unwrap());
    scene.agent.process().terminate().unwrap();
    // Its opener still has its standard error.
    let stat = PathBuf::from(format!("/proc/{}/stat", scene.agent.id()));
    wait_until("the end", SOON, || matches!(state(&stat), None | Some('Z'))).unwrap();
    scene.agent.process().wait_for_line("has not answered in time", SOON).unwrap();
}

#[test]
fn paths_of_options_may_be_relative() {
    let home = tempfile::tempdir().unwrap();
    std::fs::create_dir(home.path().join("run")).unwrap();
    let key = home.path().join("key");
    std::fs::write(&key, [3, 1, 4, 1, 5, 9, 2, 6].repeat(4)).unwrap();
    std::fs::set_permissions(&key, Permissions::from_mode(0o600)).unwrap();
    let mut command = Command::new(program());
    command.current_dir(home.path()).args(["agent", "--socket", "run/agent", "--folder", "run"]);
    command.args(["--image-key", "key", "--metrics", "unix:metrics", "--balloon", "run/balloon"]);
    let mut agent = Process::spawn("agent", &mut command).unwrap();
    agent.wait_for_line("balloon on run/balloon", SOON).unwrap();
    for name in ["run/agent", "run/balloon", "metrics"] {
        assert!(home.path().join(name).exists(), "{name}");
    }
    agent.terminate().unwrap();
    assert!(agent.wait(SOON).unwrap().success());
    assert!(!home.path().join("run/agent").exists());
}
