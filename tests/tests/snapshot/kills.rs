//! Agents and VMMs that are killed at any moment, and agents that hang at any.

use pageferry_agent::image::Chain;
use pageferry_client::{Config, MIN_BANDWIDTH, Ownership, Phase, RestoreOptions, SnapshotOptions};
use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use pageferry_tests::deadline::wait_until;
use pageferry_tests::process::{Process, program};
use pageferry_tests::random::Random;
use pageferry_tests::require;
use pageferry_tests::scenario::image_guest::{
    assert_completed, assert_failed, background, eager, endless, lazy, slow,
};
use pageferry_tests::scenario::images::{on, paused, tracked};
use pageferry_tests::scenario::moments::{
    BANDWIDTH, Moment, PAGES, Running, check_content, check_image, waiting,
};
use pageferry_tests::scenario::{Guest, Host, image_guest, lock};
use pageferry_tests::vmm::{Fault, HookName, MockVmm, PATIENCE};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// There is a whole image or none, and nothing else that was not there before. Takes the image
/// away.
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

/// What happens at so many moments hits jobs that are under way, and not only such as are over:
/// else nothing was tried.
#[derive(Debug, Default)]
struct Hits {
    moments: u64,
    under_way: u64,
}

impl Hits {
    /// At one of the moments the job was in this phase.
    fn count(&mut self, phase: Phase) {
        self.count_if(!phase.is_final());
    }

    fn count_if(&mut self, under_way: bool) {
        self.moments += 1;
        self.under_way += u64::from(under_way);
    }

    #[track_caller]
    fn check(&self) {
        assert!(self.under_way * 3 >= self.moments, "nearly all came too late: {self:?}");
    }
}

/// Kills the agent at `count` moments of a snapshot.
fn kill_agent_in_snapshots(seed: u64, count: u64, increment: bool, options: &SnapshotOptions) {
    let mut host = Host::new();
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
            // As much as a whole image.
            running.vmm.memory().block(0).unwrap().mark(PageRange::new(0, PAGES));
            options = on(&base, tracked(options));
        }
        let moment = Moment::any(&mut random);
        running.vmm.start_snapshot(&host.images.path("image"), &options).unwrap();
        moment.wait(|| running.vmm.client().status().unwrap());
        let phase = running.vmm.client().status().unwrap().phase;
        eprintln!("seed {seed}, {index}: {moment:?}, in phase {}", phase.name());
        hits.count(phase);
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
fn an_agent_that_is_killed_in_a_background_snapshot_leaves_a_whole_image_or_none() {
    if require::uffd() {
        kill_agent_in_snapshots(1, 12, false, &background());
    }
}

#[test]
fn an_agent_that_is_killed_in_a_paused_snapshot_leaves_a_whole_image_or_none() {
    kill_agent_in_snapshots(2, 10, false, &paused());
}

#[test]
fn an_agent_that_is_killed_in_an_increment_leaves_a_whole_image_or_none() {
    let mode = if require::uffd() { background() } else { paused() };
    kill_agent_in_snapshots(3, 10, true, &mode);
}

/// The agent hangs at `count` moments of a snapshot, and is killed when it is given up.
fn hang_in_snapshots(seed: u64, count: u64, options: &SnapshotOptions) {
    let mut host = Host::new();
    let config = Config { request_timeout: Duration::from_secs(5), ..Config::default() };
    let mut running = Running::with(&host, config);
    let (mut random, mut hits) = (Random::new(seed), Hits::default());
    let options = SnapshotOptions { bandwidth: BANDWIDTH, ..options.clone() };
    for index in 0..count {
        let moment = Moment::any(&mut random);
        running.vmm.start_snapshot(&host.images.path("image"), &options).unwrap();
        moment.wait(|| running.vmm.client().status().unwrap());
        let phase = running.vmm.client().status().unwrap().phase;
        eprintln!("seed {seed}, {index}: {moment:?}, in phase {}", phase.name());
        hits.count(phase);
        host.agent.process().freeze().unwrap();
        // Whatever it hangs in, the guest does not wait for it.
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
fn an_agent_that_hangs_in_a_background_snapshot_does_not_hold_the_guest() {
    if require::uffd() {
        hang_in_snapshots(9, 6, &background());
    }
}

#[test]
fn an_agent_that_hangs_in_a_paused_snapshot_does_not_hold_the_guest() {
    hang_in_snapshots(10, 4, &paused());
}

#[test]
fn an_agent_that_is_killed_as_it_replaces_an_image_leaves_one_of_the_two() {
    kill_agent_in_replacement(4, 10);
}

fn kill_agent_in_replacement(seed: u64, count: u64) {
    let mut host = Host::new();
    let mut running = Running::new(&host);
    let (mut random, mut hits) = (Random::new(seed), Hits::default());
    let options = SnapshotOptions { replace: true, ..paused() };
    for index in 0..count {
        let job = running.vmm.start_snapshot(&host.images.path("image"), &options).unwrap();
        assert_completed(&running.vmm.wait_job(job, PATIENCE).unwrap());
        let moment = Moment::any(&mut random);
        let slow = SnapshotOptions { bandwidth: BANDWIDTH, ..options.clone() };
        running.vmm.start_snapshot(&host.images.path("image"), &slow).unwrap();
        moment.wait(|| running.vmm.client().status().unwrap());
        let phase = running.vmm.client().status().unwrap().phase;
        eprintln!("seed {seed}, {index}: {moment:?}, in phase {}", phase.name());
        hits.count(phase);
        host.replace_agent();
        running.assert_runs_without_agent();
        check_image(&host.images.path("image"));
        // Between the two it has a name of its own for an instant, which nobody takes away who is
        // dead.
        let whole = |name: &String| name == "image" || name.ends_with(".part");
        assert!(host.images.files().iter().all(whole), "{:?}", host.images.files());
        running.vmm.clear_record();
        running.vmm.reattach(host.agent.socket()).unwrap();
    }
    hits.check();
}

/// An image of a guest that writes.
fn image(host: &Host) -> PathBuf {
    let running = Running::new(host);
    let path = host.images.path("source");
    let job = running.vmm.start_snapshot(&path, &paused()).unwrap();
    assert_completed(&running.vmm.wait_job(job, PATIENCE).unwrap());
    path
}

/// A guest is restored, and is the one that was saved.
#[track_caller]
fn assert_restores(vmm: &MockVmm, path: &Path, options: &RestoreOptions) {
    let job = vmm.start_restore(path, options).unwrap();
    assert_completed(&vmm.wait_job(job, PATIENCE).unwrap());
    assert!(vmm.record().runs);
    assert!(vmm.usage().check().unwrap() > 0);
    check_content(vmm.usage());
}

#[test]
fn an_agent_that_is_killed_in_an_eager_restore_leaves_no_guest_and_the_next_restores_it() {
    let mut host = Host::new();
    let path = image(&host);
    let (mut random, mut hits) = (Random::new(5), Hits::default());
    let mut vmm = waiting(&host);
    for index in 0..8 {
        let moment = Moment::any(&mut random);
        vmm.clear_record();
        let options = RestoreOptions { bandwidth: BANDWIDTH, ..eager() };
        vmm.start_restore(&path, &options).unwrap();
        moment.wait(|| vmm.client().status().unwrap());
        let phase = vmm.client().status().unwrap().phase;
        eprintln!("seed 5, {index}: {moment:?}, in phase {}", phase.name());
        hits.count(phase);
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
fn an_agent_that_is_killed_before_the_guest_runs_that_it_restores_lazily_leaves_none() {
    if !require::uffd() {
        return;
    }
    let mut host = Host::new();
    let path = image(&host);
    let mut vmm = waiting(&host);
    for next in [eager(), lazy(), lazy()] {
        vmm.clear_record();
        // It is asked, and does not answer.
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
fn an_agent_that_is_killed_after_the_guest_runs_that_it_restores_lazily_loses_it() {
    if !require::uffd() {
        return;
    }
    let mut host = Host::new();
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
        // Between the look and the end it may have become whole.
        assert_eq!(record.memory_lost.is_some(), !record.memory_complete, "{record:?}");
        assert!(!whole || record.memory_complete);
        // What is here is right.
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

/// A VMM that is a process, on a memory that is a file.
struct Vmm<'a> {
    host: &'a Host,
    memory: PathBuf,
    _folder: tempfile::TempDir,
}

const SIZE: u64 = PAGES * PAGE_SIZE;

impl<'a> Vmm<'a> {
    fn new(host: &'a Host) -> Self {
        let folder = tempfile::tempdir_in("/dev/shm").unwrap();
        let memory = folder.path().join("memory");
        File::create_new(&memory).unwrap().set_len(SIZE).unwrap();
        Self { host, memory, _folder: folder }
    }

    fn fill(&self, seed: u64) {
        let mut bytes = vec![0; SIZE as usize / 4 * 3];
        Random::new(seed).fill(&mut bytes);
        File::options().write(true).open(&self.memory).unwrap().write_all_at(&bytes, 0).unwrap();
    }

    fn start(&self, side: &str, more: &[&str]) -> Process {
        let mut command = Command::new(program());
        command.args(["mock-vmm", side, "--json", "--size", &SIZE.to_string()]).args(more);
        command.arg("--socket").arg(self.host.agent.socket()).arg("--memory").arg(&self.memory);
        Process::spawn(side, &mut command).unwrap()
    }

    /// Runs it to its end, which is a good one.
    #[track_caller]
    fn completes(&self, side: &str, more: &[&str]) {
        let mut process = self.start(side, more);
        let status = process.wait(PATIENCE).unwrap();
        assert!(status.success(), "{:?}", process.lines());
    }

    fn saves_to(&self, image: &str) {
        let more = ["--replace", "--snapshot-to", image, "--paused"];
        self.completes("source", if require::uffd() { &more[..3] } else { &more });
    }

    /// Kills it at this moment of the job that comes after `last`, which then ends.
    fn kill(&self, mut process: Process, moment: &Moment, last: u64) -> Phase {
        wait_until("the job to start", PATIENCE, || {
            self.host.status().job > last || process.has_ended()
        })
        .unwrap();
        moment.wait(|| self.host.status());
        process.kill().unwrap();
        let status = self.host.ended();
        assert_eq!(status.job, last + 1);
        if status.phase != Phase::Completed {
            let said =
                ["the VMM is gone", "hook \"", "cannot protect", "userfaultfd", "write protect"];
            assert!(
                said.iter().any(|said| status.error.contains(said)),
                "{:?}: {}",
                status.phase,
                status.error
            );
        }
        status.phase
    }

    /// The memory, and what the image says of it.
    fn is_saved_in(&self, image: &Path) {
        let (memory, chain) = (std::fs::read(&self.memory).unwrap(), Chain::open(image).unwrap());
        let mut saved = vec![0; SIZE as usize];
        chain.read(0, PageRange::new(0, PAGES), &mut saved).unwrap();
        assert!(saved == memory);
    }
}

#[test]
fn a_vmm_that_is_killed_while_it_is_saved_leaves_a_whole_image_or_none_and_a_free_agent() {
    let host = Host::new();
    let vmm = Vmm::new(&host);
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
fn a_vmm_that_is_not_told_to_writes_over_no_image() {
    let host = Host::new();
    let vmm = Vmm::new(&host);
    let image = host.images.path("image");
    std::fs::write(&image, "something").unwrap();
    let mut process = vmm.start("source", &["--snapshot-to", image.to_str().unwrap(), "--paused"]);
    assert!(!process.wait(PATIENCE).unwrap().success());
    assert_eq!(host.images.bytes(), [("image".to_owned(), b"something".to_vec())]);
}

#[test]
fn a_vmm_that_is_killed_while_it_is_restored_leaves_a_free_agent_that_restores_the_next() {
    let host = Host::new();
    let image = host.images.path("image");
    let path = image.to_str().unwrap();
    let source = Vmm::new(&host);
    source.fill(2);
    source.saves_to(path);
    source.is_saved_in(&image);
    let vmm = Vmm::new(&host);
    let (mut random, mut hits) = (Random::new(8), Hits::default());
    for index in 0..8 {
        let lazy = index % 2 == 0 && require::uffd();
        vmm.fill(3);
        let mut process = vmm.start("destination", &[]);
        process.wait_for_line("waiting for a restore", PATIENCE).unwrap();
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
fn an_agent_that_is_told_to_end_leaves_no_image_and_no_protection() {
    for options in if require::uffd() { vec![background(), paused()] } else { vec![paused()] } {
        let mut host = Host::new();
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

#[test]
fn an_agent_that_is_told_to_end_undoes_a_restore_or_brings_it_to_its_end() {
    let mut host = Host::new();
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
    // It is there for its guest until that is whole.
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
