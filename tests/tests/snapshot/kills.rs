// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Agents and VMMs that are killed at any moment of a snapshot, and agents that hang at any moment.

use pageferry_agent::image::Chain;
use pageferry_client::{Config, Phase, SnapshotOptions};
use pageferry_protocol::memory::PageRange;
use pageferry_tests::deadline::wait_until;
use pageferry_tests::random::Random;
use pageferry_tests::require;
use pageferry_tests::scenario::image_guest::{
    assert_completed, assert_failed, background, endless, snapshot_modes,
};
use pageferry_tests::scenario::images::{on, paused, tracked};
use pageferry_tests::scenario::moments::{
    BANDWIDTH, Hits, Moment, PAGES, Running, check_content, check_image,
};
use pageferry_tests::scenario::vmm_process::SIZE;
use pageferry_tests::scenario::{Guest, Host, VmmProcess, image_guest, lock};
use pageferry_tests::vmm::PATIENCE;
use std::time::Duration;

/// Checks that there is a complete image or none, and no other new file. Removes the image.
#[track_caller]
fn assert_whole_or_none(host: &Host, before: &[&str]) {
    let files = host.images.files();
    let others: Vec<&String> =
        files.iter().filter(|name| !before.contains(&name.as_str()) && *name != "image").collect();
    assert!(others.is_empty(), "left behind: {others:?}");
    if files.iter().any(|name| name == "image") {
        check_image(&host.images.path("image"));
        std::fs::remove_file(host.images.path("image")).unwrap();
    }
}

/// Kills the agent at `count` moments of a snapshot.
fn kill_agent_in_snapshots(seed: u64, count: u64, increment: bool, options: &SnapshotOptions) {
    let mut host = Host::start();
    let mut running = Running::new(&host);
    let (mut random, mut hits) = (Random::new(seed), Hits::default());
    for index in 0..count {
        let mut options = SnapshotOptions { bandwidth: BANDWIDTH, ..options.clone() };
        let base = host.images.path("base");
        let before: &[&str] = if increment { &["base"] } else { &[] };
        if increment {
            let job = running
                .vmm
                .start_snapshot(&base, &tracked(SnapshotOptions { replace: true, ..paused() }))
                .unwrap();
            assert_completed(&running.vmm.wait_job(job, PATIENCE).unwrap());
            // Now the increment has as much as a full image.
            running.vmm.memory().block(0).unwrap().mark(PageRange::new(0, PAGES));
            options = on(&base, tracked(options));
        }
        let moment = Moment::any(&mut random);
        running.vmm.start_snapshot(&host.images.path("image"), &options).unwrap();
        hits.wait_for(&moment, format_args!("seed {seed}, {index}"), running.vmm.client());
        host.replace_agent();
        running.assert_runs_without_agent();
        assert_whole_or_none(&host, before);
        running.vmm.clear_record();
        running.vmm.reattach(host.agent.socket()).unwrap();
        if increment {
            // The next agent does not know what changed.
            let job = running.vmm.start_snapshot(&host.images.path("next"), &options).unwrap();
            let status = running.vmm.wait_job(job, PATIENCE).unwrap();
            assert_failed(&status, &["no image was made here with track on"]);
        }
        let next = SnapshotOptions { base: String::new(), bandwidth: 0, ..options };
        let job = running.vmm.start_snapshot(&host.images.path("next"), &next).unwrap();
        assert_completed(&running.vmm.wait_job(job, PATIENCE).unwrap());
        check_image(&host.images.path("next"));
        std::fs::remove_file(host.images.path("next")).unwrap();
        running.assert_runs();
    }
    hits.check();
    running.vmm.stop().unwrap();
    assert!(running.vmm.usage().check().unwrap() > 0);
    check_content(running.vmm.usage());
}

#[test]
fn an_agent_killed_in_a_background_snapshot_saves_all_or_none() {
    if require::uffd() {
        kill_agent_in_snapshots(1, 12, false, &background());
    }
}

#[test]
fn an_agent_killed_in_a_paused_snapshot_saves_all_or_none() {
    kill_agent_in_snapshots(2, 10, false, &paused());
}

#[test]
fn an_agent_killed_in_an_increment_saves_all_or_none() {
    let mode = if require::uffd() { background() } else { paused() };
    kill_agent_in_snapshots(3, 10, true, &mode);
}

/// Makes the agent hang at `count` moments of a snapshot. It is killed when it is given up.
fn hang_in_snapshots(seed: u64, count: u64, options: &SnapshotOptions) {
    let mut host = Host::start();
    let config = Config { request_timeout: Duration::from_secs(5), ..Config::default() };
    let mut running = Running::with(&host, config);
    let (mut random, mut hits) = (Random::new(seed), Hits::default());
    let options = SnapshotOptions { bandwidth: BANDWIDTH, ..options.clone() };
    for index in 0..count {
        let moment = Moment::any(&mut random);
        running.vmm.start_snapshot(&host.images.path("image"), &options).unwrap();
        hits.wait_for(&moment, format_args!("seed {seed}, {index}"), running.vmm.client());
        host.agent.process().freeze().unwrap();
        // The guest does not wait for the agent, wherever it hangs.
        running.assert_runs();
        running.vmm.client().status().unwrap_err();
        running.assert_runs_without_agent();
        assert!(!host.agent.process().wait(PATIENCE).unwrap().success());
        assert_whole_or_none(&host, &[]);
        running.assert_runs();
        running.vmm.clear_record();
        host.replace_agent();
        running.vmm.reattach(host.agent.socket()).unwrap();
        let job = running.vmm.start_snapshot(&host.images.path("next"), &options).unwrap();
        assert_completed(&running.vmm.wait_job(job, PATIENCE).unwrap());
        check_image(&host.images.path("next"));
        std::fs::remove_file(host.images.path("next")).unwrap();
    }
    hits.check();
}

#[test]
fn an_agent_hanging_in_a_background_snapshot_holds_no_guest() {
    if require::uffd() {
        hang_in_snapshots(9, 6, &background());
    }
}

#[test]
fn an_agent_hanging_in_a_paused_snapshot_holds_no_guest() {
    hang_in_snapshots(10, 4, &paused());
}

#[test]
fn an_agent_killed_replacing_an_image_leaves_one_of_the_two() {
    kill_agent_in_replacement(4, 10);
}

fn kill_agent_in_replacement(seed: u64, count: u64) {
    let mut host = Host::start();
    let mut running = Running::new(&host);
    let (mut random, mut hits) = (Random::new(seed), Hits::default());
    let options = SnapshotOptions { replace: true, ..paused() };
    for index in 0..count {
        let job = running.vmm.start_snapshot(&host.images.path("image"), &options).unwrap();
        assert_completed(&running.vmm.wait_job(job, PATIENCE).unwrap());
        let moment = Moment::any(&mut random);
        let slow = SnapshotOptions { bandwidth: BANDWIDTH, ..options.clone() };
        running.vmm.start_snapshot(&host.images.path("image"), &slow).unwrap();
        hits.wait_for(&moment, format_args!("seed {seed}, {index}"), running.vmm.client());
        host.replace_agent();
        running.assert_runs_without_agent();
        check_image(&host.images.path("image"));
        // For an instant the new image has a name of its own, and a killed agent cannot remove it.
        let whole = |name: &String| name == "image" || name.ends_with(".part");
        assert!(host.images.files().iter().all(whole), "{:?}", host.images.files());
        running.vmm.clear_record();
        running.vmm.reattach(host.agent.socket()).unwrap();
    }
    hits.check();
}

#[test]
fn a_vmm_killed_while_saved_leaves_a_whole_image_or_none() {
    let host = Host::start();
    let vmm = VmmProcess::new(&host);
    vmm.fill(1);
    let image = host.images.path("image");
    let to = image.to_str().unwrap();
    let (mut random, mut hits) = (Random::new(7), Hits::default());
    for index in 0..8 {
        let moment = Moment::any(&mut random);
        let mut more = vec!["--snapshot-to", to, "--bandwidth", "128M", "--write-rate", "2000"];
        if index % 2 == 0 || !require::uffd() {
            more.push("--paused");
        }
        let last = host.status().job;
        let phase = vmm.kill(vmm.start("source", &more), &moment, last);
        eprintln!("seed 7, {index}: {moment:?}: {}", phase.name());
        hits.count_if(phase != Phase::Completed);
        let expected: &[&str] = if phase == Phase::Completed { &["image"] } else { &[] };
        assert_eq!(host.images.files(), expected);
        if phase == Phase::Completed {
            let mut saved = vec![0; SIZE as usize];
            Chain::open(&image).unwrap().read(0, PageRange::new(0, PAGES), &mut saved).unwrap();
        }
        vmm.saves_to(to);
        vmm.is_saved_in(&image);
        std::fs::remove_file(&image).unwrap();
    }
    hits.check();
}

#[test]
fn a_vmm_replaces_an_image_only_with_the_option() {
    let host = Host::start();
    let vmm = VmmProcess::new(&host);
    let image = host.images.path("image");
    std::fs::write(&image, "something").unwrap();
    let mut process = vmm.start("source", &["--snapshot-to", image.to_str().unwrap(), "--paused"]);
    assert!(!process.wait(PATIENCE).unwrap().success());
    assert_eq!(host.images.bytes(), [("image".to_owned(), b"something".to_vec())]);
}

#[test]
fn an_agent_that_is_shut_down_leaves_no_image_or_protection() {
    for options in snapshot_modes() {
        let mut host = Host::start();
        let guest = Guest::full(&host, image_guest::PAGES);
        guest.snapshot(&host.images.path("image"), &endless(options));
        guest.reaches(Phase::Saving);
        host.agent.process().terminate().unwrap();
        assert!(host.agent.process().wait(PATIENCE).unwrap().success());
        wait_until("the agent to be lost", PATIENCE, || !lock(&guest.vmm.asked).losses.is_empty())
            .unwrap();
        guest.assert_free();
        assert!(host.images.files().is_empty());
    }
}
