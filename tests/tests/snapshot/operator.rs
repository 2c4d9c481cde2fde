// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Snapshots and restores by an operator on the command line, and the requests that only the VMM
//! may make.

use super::scene::Scene;
use pageferry_agent::image::Chain;
use pageferry_client::{Parameters, Phase, SnapshotMode, SnapshotOptions, StatePiece};
use pageferry_protocol::control::reply::ErrorCode;
use pageferry_protocol::control::request::Request;
use pageferry_protocol::image::WorkingSet;
use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use pageferry_tests::Error;
use pageferry_tests::deadline::wait_until;
use pageferry_tests::guest::{Guest, IdleGuest};
use pageferry_tests::memory::{BlockLayout, TestMemory};
use pageferry_tests::process::{AgentProcess, Process, program};
use pageferry_tests::require;
use pageferry_tests::scenario::{RawClient, images};
use pageferry_tests::usage::Usage;
use pageferry_tests::vmm::{HookName, MockVmm, PATIENCE, Tracker};
use serde_json::Value;
use std::process::{Command, Output, Stdio};
use std::sync::Arc;

const PAGES: u64 = 4096;

/// Runs the command in the folder of images, so that the names are relative. The agent runs in
/// another folder.
fn run(scene: &Scene, command: &str, more: &[&str]) -> Output {
    let mut program = Command::new(program());
    program.arg(command).arg("--socket").arg(scene.socket()).args(more).stdin(Stdio::null());
    program.current_dir(scene.folder.path()).output().unwrap()
}

/// The result of the job.
#[track_caller]
fn last_object(output: &Output) -> Value {
    let text = String::from_utf8(output.stdout.clone()).unwrap();
    serde_json::from_str(
        text.lines().last().unwrap_or_else(|| panic!("nothing printed: {output:?}")),
    )
    .unwrap()
}

/// The same for a job that completes.
#[track_caller]
fn completes(scene: &Scene, command: &str, more: &[&str]) -> Value {
    let output = run(scene, command, &[more, &["--json"]].concat());
    assert!(output.status.success(), "{output:?}");
    let job = last_object(&output);
    assert_eq!((&job["status"], &job["kind"]), (&"completed".into(), &command.into()), "{job}");
    job
}

#[test]
fn an_operator_saves_a_guest_and_what_changed_since() {
    let scene = Scene::full(PAGES);
    scene.vmm.start().unwrap();
    let full = completes(&scene, "snapshot", &["a", "--mode", "paused", "--track"]);
    assert_eq!((&full["pages_saved"], &full["unchanged_pages"]), (&PAGES.into(), &0.into()));
    // The offset of the first page. On tmpfs the whole file is in the page cache.
    let past_the_cache = images::is_cached(&scene.path("a"), 2 << 20) == Some(false);
    scene.write(7, 70);
    let one = completes(&scene, "snapshot", &["b", "--base", "a", "--mode", "paused"]);
    assert_eq!((&one["pages_saved"], &one["unchanged_pages"]), (&1.into(), &(PAGES - 1).into()));
    let chain = Chain::open(&scene.path("b")).unwrap();
    scene.check(&chain);
    assert_eq!(chain.newest().contents().base_name, "a");

    // The image exists already, and the changes are not saved under another name.
    scene.write(8, 80);
    let output = run(&scene, "snapshot", &["b", "--mode", "paused", "--json"]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let error = last_object(&output)["error"].as_str().unwrap().to_owned();
    assert!(error.contains("the file exists: choose another name"), "{error}");
    // Without --track the base is still the first image.
    let two = completes(&scene, "snapshot", &["b", "--base", "a", "--mode", "paused", "--replace"]);
    assert_eq!(two["pages_saved"], 2);
    scene.check(&Chain::open(&scene.path("b")).unwrap());
    assert_eq!(scene.files(), ["a", "b"]);
    assert!(scene.vmm.record().runs);

    if require::uffd() {
        let said = run(&scene, "snapshot", &["c", "--cached"]);
        let said = (said.status.success(), String::from_utf8(said.stdout).unwrap());
        assert!(said.0 && said.1.contains("pages saved        4096 (16.0 MiB)"), "{said:?}");
        assert!(!past_the_cache || images::is_cached(&scene.path("c"), 2 << 20) == Some(true));
        scene.check(&Chain::open(&scene.path("c")).unwrap());
    }
}

/// The operator hears of it where he looks: scripts in the JSON, people on standard error.
#[test]
fn an_operator_is_warned_of_increments_that_are_full() {
    if !require::uffd() {
        return;
    }
    let scene = Scene::full(PAGES);
    scene.vmm.set_tracker(Tracker::WriteProtect).unwrap();
    let saved = run(&scene, "snapshot", &["a", "--track", "--json"]);
    assert!(saved.status.success(), "{saved:?}");
    let next = "the next increment will have all allocated pages";
    let warning = last_object(&saved)["warning"].as_str().unwrap().to_owned();
    assert!(warning.starts_with(next), "{warning}");
    let said = String::from_utf8(saved.stderr).unwrap();
    assert!(said.contains(next), "{said}");
    let saved = run(&scene, "snapshot", &["b", "--base", "a", "--mode", "paused"]);
    let said = String::from_utf8(saved.stderr).unwrap();
    assert!(saved.status.success() && said.contains("this increment has all"), "{said}");
}

/// A guest that does not touch memory until it runs, and then touches these pages first.
struct Touching(Arc<TestMemory>);

const TOUCHED: [u64; 3] = [700, 40, 3000];

impl Guest for Touching {
    fn start(&mut self) -> Result<(), Error> {
        Ok(())
    }

    fn pause(&mut self) -> Result<(), Error> {
        Ok(())
    }

    fn resume(&mut self) -> Result<(), Error> {
        TOUCHED.iter().try_for_each(|page| self.0.block(0)?.load(page * PAGE_SIZE).map(drop))
    }

    fn save_state(&mut self) -> Result<Vec<StatePiece>, Error> {
        Ok(Vec::new())
    }

    fn load_state(&mut self, _: &[StatePiece]) -> Result<(), Error> {
        Ok(())
    }
}

#[test]
fn an_operator_restores_and_records_the_working_set() {
    if !require::uffd() {
        return;
    }
    let scene = Scene::full(PAGES);
    completes(&scene, "snapshot", &["image"]);
    let chain = Chain::open(&scene.path("image")).unwrap();
    scene.block().fill(PageRange::new(0, PAGES), 9).unwrap();
    // The VMM does not allow a restore yet.
    let output = run(&scene, "restore", &["image", "--json"]);
    assert_eq!(
        (output.status.code(), &last_object(&output)["status"]),
        (Some(1), &"failed".into())
    );

    scene.vmm.take_guests();
    let eager = completes(&scene, "restore", &["image"]);
    assert_eq!((&eager["pages_restored"], &eager["faults"]), (&PAGES.into(), &0.into()));
    scene.check(&chain);

    scene.vmm.set_guest(Touching(scene.vmm.memory().clone()));
    let lazy = completes(&scene, "restore", &["image", "--lazy", "--working-set", "touched"]);
    assert_eq!((&lazy["pages_restored"], &lazy["working_set_pages"]), (&PAGES.into(), &0.into()));
    assert!(lazy["faults"].as_u64().unwrap() > 0, "{lazy}");
    scene.check(&chain);
    let set = WorkingSet::decode(&std::fs::read(scene.path("touched")).unwrap()).unwrap();
    assert_eq!(set.runs, TOUCHED.map(|page| (0, PageRange::new(page, 1))));
    // In the next restore these pages come before the rest, even if the guest does not touch them.
    scene.vmm.set_guest(IdleGuest);
    let more = ["image", "--lazy", "--working-set", "touched", "--workers", "1"];
    assert_eq!(completes(&scene, "restore", &more)["working_set_pages"], TOUCHED.len());
    scene.check(&chain);
}

#[test]
fn threads_and_the_limit_are_those_of_the_command_line() {
    if !require::uffd() {
        return;
    }
    /// Blocks of 64 MiB, one for each thread, with one page in each extent.
    const PIECES: u64 = 9;
    const EXTENT: u64 = 512;
    let home = tempfile::tempdir().unwrap();
    let mut agent = AgentProcess::spawn(program(), home.path(), "agent").unwrap();
    let usage =
        Usage::new(Arc::new(TestMemory::new(vec![BlockLayout::ram(PIECES << 26)]).unwrap()))
            .unwrap();
    let pages = (0..(PIECES << 26) / PAGE_SIZE).step_by(EXTENT as usize);
    pages.for_each(|page| {
        usage.memory().block(0).unwrap().write(page * PAGE_SIZE, b"something").unwrap()
    });
    let vmm = MockVmm::connect(agent.socket(), usage, Tracker::Log).unwrap();
    vmm.start().unwrap();
    vmm.take_guests();
    let socket = agent.socket().to_owned();
    let command = |line: &[&str]| {
        let mut command = Command::new(program());
        command.arg(line[0]).arg("--socket").arg(&socket).args(&line[1..]).current_dir(home.path());
        Process::spawn("operator", &mut command).unwrap()
    };
    let threads = format!("/proc/{}/task", agent.process().id());
    let threads = || std::fs::read_dir(&threads).unwrap().count();
    let idle = threads();
    assert!(command(&["snapshot", "image"]).wait(PATIENCE).unwrap().success());
    for (line, phase, runs) in [
        (vec!["snapshot", "other", "--mode", "paused"], Phase::Saving, false),
        (vec!["snapshot", "other", "--mode", "background"], Phase::Saving, true),
        (vec!["snapshot", "other"], Phase::Saving, true),
        (vec!["restore", "image"], Phase::Restoring, false),
        (vec!["restore", "image", "--lazy"], Phase::Prefetching, true),
    ] {
        eprintln!("{line:?}");
        let last = vmm.client().status().unwrap().job;
        // With two workers the agent has more threads than all the others together. It has at most
        // as many as there are pieces of work.
        let mut operator =
            command(&[&line[..], &["--workers", "9", "--bandwidth", "64K"]].concat());
        let here =
            || vmm.client().status().is_ok_and(|status| status.job > last && status.phase >= phase);
        wait_until("the job to be at work", PATIENCE, here).unwrap();
        assert_eq!((vmm.client().status().unwrap().phase, vmm.record().runs), (phase, runs));
        wait_until("its threads", PATIENCE, || threads() >= idle + 9).unwrap();
        vmm.client().set_parameters(&Parameters::bandwidth(0)).unwrap();
        assert!(operator.wait(PATIENCE).unwrap().success(), "{:?}", operator.lines());
        wait_until("its threads to end", PATIENCE, || threads() == idle).unwrap();
        // A restore has none.
        let _ = std::fs::remove_file(home.path().join("other"));
    }
}

#[test]
fn a_stopped_guest_is_saved_for_its_vmm_only_and_stays_stopped() {
    let scene = Scene::full(PAGES);
    scene.vmm.start().unwrap();
    let output = run(&scene, "snapshot", &["image", "--mode", "stopped"]);
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("\"stopped\": write background or paused"), "{said}");
    let stopped =
        SnapshotOptions { mode: SnapshotMode::Stopped, track: true, ..SnapshotOptions::default() };
    let path = scene.path("image").to_str().unwrap().to_owned();
    let request = Request::StartSnapshot { path, options: stopped.clone() };
    let refused = RawClient::connect(scene.socket()).ask(&request, Vec::new()).unwrap_err();
    assert_eq!(refused.code, ErrorCode::Denied);
    assert!(
        refused.sentence.starts_with("mode is stopped, which only the VMM can ask for"),
        "{}",
        refused.sentence
    );
    assert_eq!(scene.files(), Vec::<String>::new());

    scene.vmm.stop().unwrap();
    scene.vmm.clear_record();
    let (status, chain) = scene.saved("image", &stopped);
    scene.check(&chain);
    assert_eq!(status.counters.pages_saved, PAGES);
    scene.write(3, 3);
    let base =
        SnapshotOptions { base: scene.path("image").to_str().unwrap().to_owned(), ..stopped };
    let (status, chain) = scene.saved("next", &base);
    scene.check(&chain);
    assert_eq!(status.counters.pages_saved, 1);
    let record = scene.vmm.record();
    let asked = |hook: HookName| record.calls.contains(&hook);
    assert!(
        asked(HookName::SaveState) && !asked(HookName::Pause) && !asked(HookName::Resume),
        "{:?}",
        record.calls
    );
    assert!(!record.runs, "only the VMM may resume it");
}
