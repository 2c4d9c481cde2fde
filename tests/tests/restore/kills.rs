// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Agents and VMMs that are killed at any moment of a restore, and agents that hang.

use pageferry_agent::image::Chain;
use pageferry_client::{MIN_BANDWIDTH, Ownership, Phase, RestoreMode, RestoreOptions};
use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use pageferry_tests::deadline::wait_until;
use pageferry_tests::process::{Process, program};
use pageferry_tests::random::Random;
use pageferry_tests::require;
use pageferry_tests::scenario::image_guest::{assert_completed, eager, lazy, slow};
use pageferry_tests::scenario::images::paused;
use pageferry_tests::scenario::moments::{
    BANDWIDTH, Hits, Moment, PAGES, Running, check_content, waiting,
};
use pageferry_tests::scenario::{Guest, Host, SOON, VmmProcess, image_guest, lock};
use pageferry_tests::vmm::{Fault, HookName, MockVmm, PATIENCE};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// Request timeout of the VMM. It also limits a handshake, so it is long enough for a busy machine
/// on which nothing hangs.
const TIMEOUT: Duration = Duration::from_secs(10);

/// An image of a guest that writes.
fn image(host: &Host) -> PathBuf {
    let running = Running::new(host);
    let path = host.images.path("source");
    let job = running.vmm.start_snapshot(&path, &paused()).unwrap();
    assert_completed(&running.vmm.wait_job(job, PATIENCE).unwrap());
    path
}

/// Restores a guest, and checks that it is the one that was saved.
#[track_caller]
fn assert_restores(vmm: &MockVmm, path: &Path, options: &RestoreOptions) {
    let job = vmm.start_restore(path, options).unwrap();
    assert_completed(&vmm.wait_job(job, PATIENCE).unwrap());
    assert!(vmm.record().runs);
    assert!(vmm.usage().check().unwrap() > 0);
    check_content(vmm.usage());
}

#[test]
fn after_an_agent_killed_in_an_eager_restore_the_next_completes() {
    let mut host = Host::start();
    let path = image(&host);
    let (mut random, mut hits) = (Random::new(5), Hits::default());
    let mut vmm = waiting(&host);
    for index in 0..8 {
        let moment = Moment::any(&mut random);
        vmm.clear_record();
        let options = RestoreOptions { bandwidth: BANDWIDTH, ..eager() };
        vmm.start_restore(&path, &options).unwrap();
        hits.wait_for(&moment, format_args!("seed 5, {index}"), vmm.client());
        host.replace_agent();
        wait_until("the agent to be lost", PATIENCE, || vmm.record().agent_lost.is_some()).unwrap();
        let record = vmm.record();
        assert_eq!(record.agent_lost == Some(Ownership::Ours), record.runs, "{record:?}");
        assert!(record.memory_lost.is_none());
        vmm.stop().unwrap();
        vmm.reattach(host.agent.socket()).unwrap();
        assert_restores(&vmm, &path, &eager());
        vmm.stop().unwrap();
    }
    hits.check();
}

#[test]
fn an_agent_killed_before_a_lazy_guest_runs_leaves_none() {
    if !require::uffd() {
        return;
    }
    let mut host = Host::start();
    let path = image(&host);
    let mut vmm = waiting(&host);
    for next in [eager(), lazy(), lazy()] {
        vmm.clear_record();
        // The hook is called, and does not answer.
        vmm.inject(HookName::LoadState, Some(Fault::Never));
        vmm.start_restore(&path, &lazy()).unwrap();
        wait_until("the state to be loaded", PATIENCE, || {
            vmm.record().calls.contains(&HookName::LoadState)
        })
        .unwrap();
        assert!(vmm.record().memory_pending);
        host.replace_agent();
        vmm.inject(HookName::LoadState, None);
        wait_until("the agent to be lost", PATIENCE, || vmm.record().agent_lost.is_some()).unwrap();
        let record = vmm.record();
        assert_eq!((record.agent_lost, record.runs), (Some(Ownership::Awaiting), false));
        assert!(record.memory_lost.is_none() && !record.memory_pending, "{record:?}");
        vmm.reattach(host.agent.socket()).unwrap();
        assert_restores(&vmm, &path, &next);
        vmm.stop().unwrap();
    }
}

#[test]
fn an_agent_killed_in_a_lazy_restore_loses_the_running_guest() {
    if !require::uffd() {
        return;
    }
    let mut host = Host::start();
    let path = image(&host);
    let saved = Chain::open(&path).unwrap();
    let (mut random, mut hits) = (Random::new(6), Hits::default());
    for index in 0..5 {
        let pages = random.below(2000);
        let vmm = waiting(&host);
        let bandwidth = if index == 0 { MIN_BANDWIDTH } else { BANDWIDTH / 4 };
        vmm.start_restore(&path, &RestoreOptions { bandwidth, ..lazy() }).unwrap();
        let runs = |phase| phase == Phase::Prefetching || phase == Phase::Completed;
        wait_until("the guest to run", PATIENCE, || runs(vmm.client().status().unwrap().phase))
            .unwrap();
        if index > 0 {
            Moment::Pages(pages).wait(|| vmm.client().status().unwrap());
        }
        let phase = vmm.client().status().unwrap().phase;
        let whole = phase == Phase::Completed;
        eprintln!("seed 6, {index}: {pages} pages, in phase {}", phase.name());
        hits.count(phase);
        host.replace_agent();
        wait_until("the agent to be lost", PATIENCE, || vmm.record().agent_lost.is_some()).unwrap();
        let record = vmm.record();
        assert_eq!(record.agent_lost, Some(Ownership::Ours));
        // The memory may have become complete between the query and the kill.
        assert_eq!(record.memory_lost.is_some(), !record.memory_complete, "{record:?}");
        assert!(!whole || record.memory_complete);
        // Pages that are here have the right content.
        let (block, mut right) = (vmm.memory().block(0).unwrap(), vec![0; PAGE_SIZE as usize]);
        for page in 0..PAGES {
            let here = block.read_page(page).unwrap();
            saved.read(0, PageRange::new(page, 1), &mut right).unwrap();
            assert!(
                here[..] == right || here.iter().all(|byte| *byte == 0),
                "page {page:#x} is wrong"
            );
        }
        drop(vmm);
        assert_restores(&waiting(&host), &path, &lazy());
    }
    hits.check();
}

#[test]
fn a_vmm_killed_while_restored_leaves_a_free_agent() {
    let host = Host::start();
    let image = host.images.path("image");
    let path = image.to_str().unwrap();
    let source = VmmProcess::new(&host);
    source.fill(2);
    source.saves_to(path);
    source.is_saved_in(&image);
    let vmm = VmmProcess::new(&host);
    let (mut random, mut hits) = (Random::new(8), Hits::default());
    for index in 0..8 {
        let lazy = index % 2 == 0 && require::uffd();
        vmm.fill(3);
        let mut process = vmm.start("destination", &[]);
        process.wait_for_line("waiting for a guest", PATIENCE).unwrap();
        let last = host.status().job;
        let mut operator = Command::new(program());
        operator.arg("restore").arg("--socket").arg(host.agent.socket()).args([
            path,
            "--bandwidth",
            "128M",
        ]);
        operator.args(Some("--lazy").filter(|_| lazy));
        let mut operator = Process::spawn("operator", &mut operator).unwrap();
        let moment = Moment::any(&mut random);
        let phase = vmm.kill(process, &moment, last);
        eprintln!("seed 8, {index}: {moment:?}: {}", phase.name());
        hits.count_if(phase != Phase::Completed);
        let told = operator.wait(PATIENCE).unwrap().success();
        assert_eq!(told, phase == Phase::Completed);
        let more: &[&str] =
            if lazy { &["--restore-from", path, "--lazy"] } else { &["--restore-from", path] };
        vmm.completes("destination", more);
        vmm.is_saved_in(&image);
    }
    hits.check();
}

#[test]
fn an_agent_that_is_shut_down_undoes_or_finishes_a_restore() {
    let mut host = Host::start();
    let guest = Guest::full(&host, image_guest::PAGES);
    let (path, right) = (host.images.path("image"), guest.bytes());
    guest.saved(&host, "image", &paused());
    guest.restore(&path, &slow(eager()));
    guest.reaches(Phase::Restoring);
    host.agent.process().terminate().unwrap();
    assert!(host.agent.process().wait(PATIENCE).unwrap().success());
    wait_until("the agent to be lost", PATIENCE, || !lock(&guest.vmm.asked).losses.is_empty())
        .unwrap();
    assert!(guest.is_hole());
    if !require::uffd() {
        return;
    }
    host.replace_agent();
    guest.reattach(&host);
    let job = guest.restore(&path, &slow(lazy()));
    guest.reaches(Phase::Prefetching);
    host.agent.process().terminate().unwrap();
    // The agent serves its guest until all memory is here.
    let page = guest.block().load(9 * PAGE_SIZE).unwrap();
    assert_eq!(page.to_le_bytes(), right[9 * PAGE_SIZE as usize..][..8]);
    assert_eq!(guest.client.status().unwrap().job, job);
    guest.hurry();
    assert!(host.agent.process().wait(PATIENCE).unwrap().success());
    wait_until("the agent to be lost", PATIENCE, || lock(&guest.vmm.asked).losses.len() == 2)
        .unwrap();
    assert_eq!(lock(&guest.vmm.asked).losses, ["agent", "agent"]);
    assert!(guest.bytes() == right);
    guest.assert_free();
}

#[test]
fn after_an_agent_hangs_in_a_restore_the_next_completes() {
    let modes = if require::uffd() { vec![eager(), lazy()] } else { vec![eager()] };
    for options in modes {
        let mut host = Host::start();
        let source = Guest::full(&host, image_guest::PAGES);
        source.saved(&host, "source", &paused());
        drop(source);
        let (path, before) = (host.images.path("source"), host.images.bytes());
        let guest = Guest::hasty(&host, image_guest::PAGES, TIMEOUT);
        let runs = options.mode == RestoreMode::Lazy;
        guest.restore(&path, &slow(options.clone()));
        guest.reaches(if runs { Phase::Prefetching } else { Phase::Restoring });
        host.agent.process().freeze().unwrap();
        if !runs {
            // The VMM's next request finds the hang.
            guest.client.status().unwrap_err();
        }
        wait_until("the agent to be lost", SOON, || {
            lock(&guest.vmm.asked).losses.last() == Some(&"agent")
        })
        .unwrap();
        assert_eq!((guest.losses(), guest.vmm.resumes()), if runs { (1, 1) } else { (0, 0) });
        let ownership = if runs { Ownership::Ours } else { Ownership::Awaiting };
        assert_eq!(guest.client.ownership(), ownership);
        assert!(!host.agent.process().wait(SOON).unwrap().success(), "the agent was not killed");
        assert!(host.images.bytes() == before, "{:?}", host.images.files());
        host.replace_agent();
        let guest = if runs {
            drop(guest);
            Guest::new(&host, image_guest::PAGES)
        } else {
            guest.reattach(&host);
            guest
        };
        assert_completed(&guest.restored(&path, &options));
        guest.assert_holds(1);
    }
}
