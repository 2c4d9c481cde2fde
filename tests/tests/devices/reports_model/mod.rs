// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Reports that come as fast as the driver can put them, while the guest's memory is on its way: a
//! page that was written keeps its content, and a page that was reported and not written again has
//! its old content or zeroes (`never-read`, `never-populate` and `same-memory` of
//! docs/invariants.md).
//!
//! - [`guest`]: a guest that writes, checks and reports the pages of a pool;
//! - this file: the jobs.

mod guest;

use guest::{Pool, Running, Word};
use pageferry_agent::image::Chain;
use pageferry_client::{
    Mode, OutgoingOptions, Parameters, Phase, RestoreMode, RestoreOptions, SnapshotOptions,
};
use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use pageferry_tests::front_end::DeviceHost;
use pageferry_tests::front_end::host::FIRST_FREE_PAGE;
use pageferry_tests::memory::TestMemory;
use pageferry_tests::random::Random;
use pageferry_tests::require;
use pageferry_tests::scenario::SOON;
use pageferry_tests::vmm::Tracker;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

const PAGES: u64 = 8192;
/// Bytes per second, so that a job takes a second or two.
const BANDWIDTH: u64 = 16 << 20;

fn host(tracker: Tracker) -> DeviceHost {
    DeviceHost::with_tracker(Arc::new(TestMemory::ram(PAGES * PAGE_SIZE).unwrap()), tracker)
}

/// The pages behind those of the queues, each with a word of its own.
fn full(host: &DeviceHost) -> Arc<Pool> {
    let pages = PageRange::new(FIRST_FREE_PAGE, PAGES - FIRST_FREE_PAGE);
    host.block(0).fill(pages, 1).unwrap();
    let pool = Pool::new(host.memory(), pages);
    for page in pages.first..pages.end() {
        host.block(0).write(page * PAGE_SIZE, &page.to_le_bytes()).unwrap();
    }
    pool
}

#[track_caller]
fn completes(host: &DeviceHost, job: u64) {
    let status = host.vmm.wait_job(job, SOON).unwrap();
    assert_eq!(status.phase, Phase::Completed, "{}", status.error_text());
}

#[test]
fn during_a_postcopy() {
    if !require::uffd() {
        return;
    }
    let (source, destination) = (host(Tracker::Log), host(Tracker::Log));
    let pool = full(&source).moved_to(destination.memory());
    destination.vmm.set_guest(pool.guest());
    let options = OutgoingOptions {
        mode: Mode::Postcopy,
        bandwidth: BANDWIDTH,
        ..OutgoingOptions::default()
    };
    let jobs = source.start_move(&destination, &options);
    destination.vmm.wait_phase(Phase::Postcopy, SOON).unwrap();
    let running = Running::start(&pool, destination.balloon());
    source.arrives_at(&destination, jobs);
    running.end("postcopy");
    pool.check_all();
}

/// Saves a guest that reports. Returns the image, and what it must have.
fn save(host: &DeviceHost, pool: &Arc<Pool>) -> (PathBuf, BTreeMap<u64, Word>) {
    host.vmm.set_guest(pool.guest());
    host.vmm.start().unwrap();
    let running = Running::start(pool, host.balloon());
    running.wait_for_reports(50);
    let image = host.folder().join("image");
    let options = SnapshotOptions { bandwidth: BANDWIDTH, ..SnapshotOptions::default() };
    let job = host.vmm.start_snapshot(&image, &options).unwrap();
    completes(host, job);
    let instant = pool.instant();
    running.end("background snapshot");
    pool.check_all();
    (image, instant)
}

#[test]
fn during_a_background_snapshot_and_a_lazy_restore() {
    if !require::uffd() {
        return;
    }
    let saved = host(Tracker::WriteProtect);
    let pool = full(&saved);
    let (image, instant) = save(&saved, &pool);
    let chain = Chain::open(&image).unwrap();
    let mut word = vec![0; PAGE_SIZE as usize];
    for (page, wanted) in &instant {
        chain.read(0, PageRange::new(*page, 1), &mut word).unwrap();
        let found = u64::from_le_bytes(word[..8].try_into().unwrap());
        assert!(wanted.may_read(found), "page {page:#x} of the image has {found:#x}: {wanted:?}");
    }

    let restored = host(Tracker::WriteProtect);
    let pool = pool.as_of(&instant, restored.memory());
    restored.vmm.set_guest(pool.guest());
    let options = RestoreOptions {
        mode: RestoreMode::Lazy,
        bandwidth: BANDWIDTH,
        ..RestoreOptions::default()
    };
    let job = restored.vmm.start_restore(&image, &options).unwrap();
    restored.vmm.wait_phase(Phase::Prefetching, SOON).unwrap();
    let running = Running::start(&pool, restored.balloon());
    completes(&restored, job);
    running.end("lazy restore");
    pool.check_all();
}

#[test]
fn during_the_passes_of_a_migration() {
    let (source, destination) = (host(Tracker::Log), host(Tracker::Log));
    let pool = full(&source);
    source.vmm.set_guest(pool.guest());
    source.vmm.start().unwrap();
    let running = Running::start(&pool, source.balloon());
    let options = OutgoingOptions { bandwidth: 4 * BANDWIDTH, ..OutgoingOptions::default() };
    let jobs = source.start_move(&destination, &options);
    running.wait_for_reports(300);
    source.vmm.client().set_parameters(&Parameters::bandwidth(0)).unwrap();
    source.arrives_at(&destination, jobs);
    // The guest is paused for good here, and its last report may wait in its queue.
    running.end("passes");
    let there = pool.as_of(&pool.instant(), destination.memory());
    there.check_all();
}

#[test]
fn while_agents_are_killed_and_hang() {
    let mut host = host(Tracker::Log);
    let pool = full(&host);
    host.vmm.set_guest(pool.guest());
    host.vmm.start().unwrap();
    let running = Running::start_writer(&pool);
    let mut random = Random::new(3);
    let mut balloon = host.balloon();
    let queue = balloon.report_queue();
    for round in 0..10 {
        // As many as the queue holds, and then the agent ends in the middle of them.
        let reports: Vec<_> = (0..3).map(|_| pool.put_report(&mut balloon, &mut random)).collect();
        balloon.driver.queue(queue).kick();
        std::thread::sleep(Duration::from_micros(random.below(3000)));
        if round % 2 == 0 {
            host.replace_agent();
        } else {
            host.replace_hanging_agent();
        }
        balloon = balloon.moved_to(&host.balloon_socket(), host.memory());
        for report in &reports {
            balloon.driver.queue(queue).wait_used();
            pool.returned(report);
        }
    }
    running.end("agents that are killed");
    pool.check_all();
}
