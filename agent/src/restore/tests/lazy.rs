// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

use super::*;
use crate::job::CancelledBy;
use std::sync::OnceLock;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::{Receiver, channel};

const PAGES: [u64; 2] = [1500, 600];

fn lazy_options() -> RestoreOptions {
    RestoreOptions { mode: RestoreMode::Lazy, workers: 2, ..RestoreOptions::default() }
}

fn sparse(id: u32, page: u64) -> Page {
    match (page / 7 + u64::from(id)) % 5 {
        0 | 1 => Page::Content,
        2 => Page::Discarded,
        _ => Page::Zero,
    }
}

/// The pages with content, in an order that read-around does not help.
fn scattered(at: usize) -> impl Iterator<Item = u64> {
    let pages = PAGES[at];
    (0..pages)
        .map(move |index| index * 733 % pages)
        .filter(move |page| sparse(at as u32, *page) == Page::Content)
}

#[test]
fn faults_are_answered_from_the_state_load_on() {
    if !has_userfaultfd() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let (full, one) = (folder.path().join("full"), folder.path().join("one"));
    let geometries = geometries(&PAGES);
    let base = write_image(&full, &geometries, &Base::default(), 0, sparse);
    let newer = |id: u32, page: u64| {
        if page.is_multiple_of(4) && sparse(id, page) == Page::Content {
            Page::Content
        } else {
            Page::Unchanged
        }
    };
    write_image(&one, &geometries, &base, 5, newer);
    let version = |page: u64| if page.is_multiple_of(4) { 5 } else { 0 };
    let ram = Arc::new(Ram::new(&geometries));
    ram.block(0).backing.write(3 * PAGE_SIZE, &[7; 100 * PAGE]).unwrap();
    let expect = move |ram: &Ram, at: usize, page: u64| {
        assert_eq!(
            ram.touch(at, page),
            word_of(at as u32, page).wrapping_add(version(page)),
            "page {page} of {at}"
        );
    };
    let vmm = Vmm::new(&ram, move |ram, hook| {
        if matches!(hook, Hook::LoadState { .. }) {
            scattered(1).take(40).for_each(|page| expect(ram, 1, page));
        }
        Ok(())
    });
    // The limit is low enough that the guest waits for most pages that it touches.
    let job = new_job(&ram, &vmm, 1 << 20);
    let order = plan(one, lazy_options());
    std::thread::scope(|scope| {
        let restoring = scope.spawn(|| run(&job, &order));
        while job.status().phase < Phase::Prefetching {
            std::thread::yield_now();
        }
        std::thread::scope(|scope| {
            for at in [0, 1] {
                let ram = &ram;
                scope.spawn(move || scattered(at).take(300).for_each(|page| expect(ram, at, page)));
            }
        });
        job.limiter.set_rate(0);
        restoring.join().unwrap();
    });
    let status = job.status();
    assert_eq!((status.phase, status.error_text()), (Phase::Completed, ""));
    ram.check(|id, page| (sparse(id, page), version(page)));
    assert_eq!(vmm.asked(), ["register faults", "load state", "resume", "unregister faults"]);
    let content: u64 = (0..2).map(|at| scattered(at).count() as u64).sum();
    let counters = status.counters;
    assert_eq!((counters.pages_restored, counters.remaining_pages), (content, 0));
    assert!(
        counters.faults > 0 && counters.pushed_pages > 0 && counters.time_to_run_us > 0,
        "{counters:?}"
    );
    assert!(counters.time_to_run_us < counters.total_us);
}

#[test]
fn one_worker_prefetches_untouched_pages() {
    if !has_userfaultfd() {
        return;
    }
    let Saved { folder: _folder, path, ram } = Saved::new(&PAGES, sparse);
    let vmm = Vmm::willing(&ram);
    let job = new_job(&ram, &vmm, 0);
    let order = plan(path, RestoreOptions { workers: 1, ..lazy_options() });
    let restored = job.clone();
    // Detached: if the restore never ends, the test must still end.
    std::thread::spawn(move || run(&restored, &order));
    assert!(job.wait_until_final(Duration::from_secs(60)), "{:?}", job.status().counters);
    assert_eq!(job.status().phase, Phase::Completed);
    ram.check(|id, page| (sparse(id, page), 0));
}

#[test]
fn discards_and_frees_of_missing_pages_stay_holes() {
    if !has_userfaultfd() {
        return;
    }
    let Saved { folder: _folder, path, ram } = Saved::new(&[8 * 512], |_, _| Page::Content);
    let vmm = Vmm::willing(&ram);
    let job = new_job(&ram, &vmm, 1 << 20);
    let order = plan(path, lazy_options());
    let gone = |page: u64| (100..200).contains(&page) || (3000..3100).contains(&page);
    let freed = |page: u64| (300..400).contains(&page) || (3200..3300).contains(&page);
    std::thread::scope(|scope| {
        let restoring = scope.spawn(|| run(&job, &order));
        while job.status().phase < Phase::Prefetching {
            std::thread::yield_now();
        }
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                // All pages except those that are given back.
                for page in (0..)
                    .map(|index| index * 61 % 4096)
                    .filter(|page| !gone(*page) && !freed(*page))
                {
                    assert_eq!(ram.touch(0, page), word_of(0, page));
                    if stop.load(Ordering::Relaxed) {
                        return;
                    }
                }
            });
            for first in (100..200).step_by(10).chain((3000..3100).step_by(10)) {
                let range =
                    BlockRange { block: 0, offset: first * PAGE_SIZE, length: 10 * PAGE_SIZE };
                assert_eq!(ram.memory.discard(&[range], true).unwrap(), 10);
                let range = BlockRange { offset: (first + 200) * PAGE_SIZE, ..range };
                assert_eq!(ram.memory.free(&[range]).unwrap(), 10);
            }
            stop.store(true, Ordering::Relaxed);
        });
        // The guest does not wait for such a page, and it can be given back again.
        assert_eq!(ram.touch(0, 150), 0);
        let range = BlockRange { block: 0, offset: 150 * PAGE_SIZE, length: PAGE_SIZE };
        ram.memory.discard(&[range], true).unwrap();
        assert_eq!(ram.touch(0, 350), 0);
        let range = BlockRange { offset: 350 * PAGE_SIZE, ..range };
        ram.memory.free(&[range]).unwrap();
        job.limiter.set_rate(0);
        restoring.join().unwrap();
    });
    assert_eq!(job.status().phase, Phase::Completed);
    assert!(job.status().counters.dropped_pages > 0);
    let kind = |page: u64| match page {
        _ if gone(page) => Page::Discarded,
        _ if freed(page) => Page::Zero,
        _ => Page::Content,
    };
    ram.check(|_, page| (kind(page), 0));
}

#[test]
fn pages_touched_before_the_registration_are_restored() {
    if !has_userfaultfd() {
        return;
    }
    let Saved { folder: _folder, path, ram } = Saved::new(&PAGES, sparse);
    let vmm = Vmm::new(&ram, |ram, hook| {
        match hook {
            // The memory is not registered yet, so each touch allocates a page of zeroes.
            Hook::RegisterFaults => {
                scattered(0).take(40).for_each(|page| assert_eq!(ram.touch(0, page), 0))
            }
            Hook::LoadState { .. } => {
                scattered(0)
                    .take(20)
                    .for_each(|page| assert_eq!(ram.touch(0, page), word_of(0, page)));
            }
            _ => {}
        }
        Ok(())
    });
    let status = restore_from(&path, &ram, &vmm, lazy_options());
    assert_eq!((status.phase, status.error_text()), (Phase::Completed, ""));
    ram.check(|id, page| (sparse(id, page), 0));
}

/// Writes an image whose only block has a damaged page. Returns its path and the place of the page.
fn damaged(folder: &Path, geometries: &[BlockGeometry], page: u64) -> (PathBuf, u64) {
    let path = folder.join("image");
    write_image(&path, geometries, &Base::default(), 0, |_, _| Page::Content);
    let place = Image::open(&path).unwrap().layout().page(0, page);
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    rustix::io::pwrite(&file, b"!", place + 9).unwrap();
    (path, place)
}

#[test]
fn a_damaged_page_ends_a_running_guest() {
    if !has_userfaultfd() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let geometries = geometries(&[4 * 512]);
    let (path, place) = damaged(folder.path(), &geometries, 1900);
    let ram = Arc::new(Ram::new(&geometries));
    let vmm = Vmm::new(&ram, |ram, hook| {
        match hook {
            Hook::LoadState { .. } => assert_eq!(ram.touch(0, 5), word_of(0, 5)),
            Hook::UnregisterFaults { complete } => assert!(!complete),
            _ => {}
        }
        Ok(())
    });
    let status = restore_from(&path, &ram, &vmm, lazy_options());
    assert_eq!(status.phase, Phase::Failed);
    let expected = format!("image: block 0: page {:#x}, at byte {place:#x}: checksum", 1900);
    assert!(status.error_text().contains(&expected), "{}", status.error_text());
    assert_eq!(vmm.asked(), ["register faults", "load state", "resume", "unregister faults"]);
    // The lost guest keeps the pages that were placed, and the damaged page was not.
    assert!(!ram.allocated(0).is_empty());
    let mut bytes = [0; PAGE];
    ram.block(0).backing.read(1900 * PAGE_SIZE, &mut bytes).unwrap();
    assert_eq!(bytes, [0; PAGE]);
}

#[test]
fn a_damaged_page_in_the_state_load_leaves_the_memory_empty() {
    if !has_userfaultfd() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let geometries = geometries(&[4 * 512]);
    let (path, _) = damaged(folder.path(), &geometries, 1900);
    let ram = Arc::new(Ram::new(&geometries));
    let vmm = Vmm::new(&ram, |ram, hook| {
        if matches!(hook, Hook::LoadState { .. }) {
            // The touch returns. No guest will ever run with what it read.
            ram.touch(0, 1900);
        }
        Ok(())
    });
    let status = restore_from(&path, &ram, &vmm, lazy_options());
    assert_eq!(status.phase, Phase::Failed);
    assert!(status.error_text().contains("page 0x76c"), "{}", status.error_text());
    assert_eq!(vmm.asked(), ["register faults", "load state", "unregister faults"]);
    ram.check_empty(|_, _| false);
}

#[test]
fn a_cancel_is_accepted_only_before_the_guest_runs() {
    if !has_userfaultfd() {
        return;
    }
    let Saved { folder: _folder, path, ram } = Saved::new(&[4 * 512], |_, _| Page::Content);
    let cancelled: Arc<Mutex<Option<Arc<Job>>>> = Arc::default();
    let its_job = cancelled.clone();
    let vmm = Vmm::new(&ram, move |_, hook| {
        if let (Hook::LoadState { .. }, Some(job)) = (hook, &*its_job.lock().unwrap()) {
            job.cancel.cancel(CancelledBy::Operator).unwrap();
        }
        Ok(())
    });
    let order = plan(path, lazy_options());
    let job = new_job(&ram, &vmm, 0);
    *cancelled.lock().unwrap() = Some(job.clone());
    run(&job, &order);
    assert_eq!(job.status().phase, Phase::Cancelled);
    assert_eq!(vmm.asked(), ["register faults", "load state", "unregister faults"]);
    ram.check_empty(|_, _| false);
    *cancelled.lock().unwrap() = None;
    let job = new_job(&ram, &vmm, 1 << 20);
    std::thread::scope(|scope| {
        let restoring = scope.spawn(|| run(&job, &order));
        while job.status().phase < Phase::Prefetching {
            std::thread::yield_now();
        }
        assert!(job.cancel.cancel(CancelledBy::Operator).is_err());
        // The guest may populate memory.
        job.populate_if_allowed(|| ()).unwrap();
        job.limiter.set_rate(0);
        restoring.join().unwrap();
    });
    assert_eq!(job.status().phase, Phase::Completed);
    ram.check(|_, _| (Page::Content, 0));
}

/// The error of a restore whose guest the VMM did not resume, or not in time. The guest belongs to
/// the VMM, so it must have all of its memory.
fn assert_not_resumed(job: &Job, ram: &Ram, complete: &Receiver<bool>, reason: &str) {
    let status = job.status();
    assert_eq!(status.phase, Phase::Failed);
    let expected = format!("resuming it failed: {reason}");
    assert!(status.error_text().contains("the guest is here"), "{}", status.error_text());
    assert!(status.error_text().contains(&expected), "{}", status.error_text());
    ram.check(|_, _| (Page::Content, 0));
    assert_eq!(status.counters.remaining_pages, 0);
    // The job may end before a VMM that is late gets to this hook.
    assert_eq!(complete.recv_timeout(Duration::from_secs(60)), Ok(true), "no memory is lost");
}

#[test]
fn a_late_resume_does_not_lose_the_memory() {
    if !has_userfaultfd() {
        return;
    }
    for hook_timeout in [500, 5_000, 25_000].map(Duration::from_millis) {
        let Saved { folder: _folder, path, ram } = Saved::new(&[4 * 512], |_, _| Page::Content);
        let (shared, (ended, complete)) = (Arc::new(OnceLock::<Arc<Job>>::new()), channel());
        let its_job = shared.clone();
        let vmm = Vmm::new(&ram, move |ram, hook| {
            match hook {
                Hook::Resume { .. } => {
                    let job = its_job.wait();
                    assert_eq!(ram.touch(0, 2000), word_of(0, 2000));
                    while job.status().phase < Phase::Prefetching {
                        std::thread::sleep(Duration::from_millis(1));
                    }
                    // The agent does not wait for the answer any more.
                    (1900..1910).for_each(|page| assert_eq!(ram.touch(0, page), word_of(0, page)));
                    job.limiter.set_rate(0);
                }
                Hook::UnregisterFaults { complete } => ended.send(*complete).unwrap(),
                _ => {}
            }
            Ok(())
        });
        let options = CommonOptions { bandwidth: 1 << 20, hook_timeout };
        let job = job_with(&ram, &vmm, options);
        shared.set(job.clone()).unwrap();
        let order = plan(path, lazy_options());
        run(&job, &order);
        // On a busy machine an earlier hook may be late. Then the VMM gets more time.
        if vmm.asked().contains(&"resume") {
            return assert_not_resumed(&job, &ram, &complete, "hook \"resume\"");
        }
    }
    panic!("a hook before the resume was late each time");
}

#[test]
fn a_refused_resume_does_not_lose_the_memory() {
    if !has_userfaultfd() {
        return;
    }
    let Saved { folder: _folder, path, ram } = Saved::new(&[4 * 512], |_, _| Page::Content);
    let (ended, complete) = channel();
    let vmm = Vmm::new(&ram, move |_, hook| match hook {
        Hook::Resume { .. } => Err(RemoteError::new(ErrorCode::Other, "the vCPUs do not start")),
        Hook::UnregisterFaults { complete } => {
            ended.send(*complete).unwrap();
            Ok(())
        }
        _ => Ok(()),
    });
    let job = new_job(&ram, &vmm, 0);
    let order = plan(path, lazy_options());
    run(&job, &order);
    assert_not_resumed(&job, &ram, &complete, "hook \"resume\" failed in the VMM");
}

#[test]
fn a_block_without_vmm_address_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image");
    let geometries = geometries(&[512]);
    write_image(&path, &geometries, &Base::default(), 0, |_, _| Page::Content);
    let fd = rustix::fs::memfd_create("ram", MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&fd, 512 * PAGE_SIZE).unwrap();
    let backing = Backing::new(fd, 0, 512 * PAGE_SIZE).unwrap();
    let block = Arc::new(Block::new(geometries[0].clone(), backing, 0, None).unwrap());
    let memory = Arc::new(GuestMemory::new(vec![block], table(&geometries), None));
    let ram = Arc::new(Ram { memory, mappings: Vec::new() });
    ram.block(0).backing.write(0, &[1]).unwrap();
    let vmm = Vmm::willing(&ram);
    let status = restore_from(&path, &ram, &vmm, lazy_options());
    assert!(status.error_text().contains("block 0 has no vmm_address"), "{}", status.error_text());
    assert_eq!((vmm.asked().len(), ram.allocated(0).len()), (0, 1));
}

#[test]
fn a_vmm_that_cannot_register_faults_keeps_its_memory() {
    let Saved { folder: _folder, path, ram } = Saved::new(&PAGES, sparse);
    let before = ram.allocated(0);
    let vmm = Vmm::new(&ram, |_, hook| match hook {
        Hook::ProbeFaults => Err(RemoteError::new(ErrorCode::Unsupported, "no userfaultfd here")),
        _ => Ok(()),
    });
    let status = restore_from(&path, &ram, &vmm, lazy_options());
    assert_eq!(status.phase, Phase::Failed);
    assert!(status.error_text().contains("no userfaultfd here"), "{}", status.error_text());
    assert_eq!(ram.allocated(0), before);
    assert!(vmm.asked().is_empty(), "{:?}", vmm.asked());
}
