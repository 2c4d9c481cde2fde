// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

use super::*;
use crate::job::CancelledBy;
use pageferry_protocol::control::reply::{ErrorCode, RemoteError};

const PAGES: [u64; 2] = [1500, 600];

fn sparse(id: u32, page: u64) -> Page {
    match (page / 7 + u64::from(id)) % 5 {
        0 | 1 => Page::Content,
        2 => Page::Discarded,
        _ => Page::Zero,
    }
}

fn dirty(ram: &Ram) {
    for block in ram.memory.blocks() {
        block.backing.write(3 * PAGE_SIZE, &[7; 100 * PAGE]).unwrap();
        block.discarded.set(PageRange::new(0, 10));
    }
}

#[test]
fn an_eager_restore_replaces_all_memory() {
    let Saved { folder: _folder, path, ram } = Saved::new(&PAGES, sparse);
    dirty(&ram);
    let vmm = Vmm::new(&ram, |ram, hook| {
        if matches!(hook, Hook::LoadState { .. }) {
            assert_eq!(ram.touch(0, 0), word_of(0, 0));
        }
        Ok(())
    });
    let options = RestoreOptions { workers: 3, ..RestoreOptions::default() };
    let status = restore_from(&path, &ram, &vmm, options);
    assert_eq!((status.phase, status.error_text()), (Phase::Completed, ""));
    ram.check(|id, page| (sparse(id, page), 0));
    assert_eq!(vmm.asked(), ["load state", "resume"]);
    let all = || (0..2).flat_map(|id| (0..PAGES[id as usize]).map(move |page| sparse(id, page)));
    let count = |kind: Page| all().filter(|page| *page == kind).count() as u64;
    let counters = status.counters;
    let found = (
        counters.pages_restored,
        counters.zero_pages,
        counters.discarded_pages,
        counters.remaining_pages,
    );
    assert_eq!(found, (count(Page::Content), count(Page::Zero), count(Page::Discarded), 0));
    assert_eq!(counters.image_bytes, count(Page::Content) * PAGE_SIZE);
    assert!(counters.time_to_run_us > 0);
}

#[test]
fn an_increment_is_restored_with_its_base() {
    let folder = tempfile::tempdir().unwrap();
    let (full, one) = (folder.path().join("full"), folder.path().join("one"));
    let geometries = geometries(&PAGES);
    let base = write_image(&full, &geometries, &Base::default(), 0, sparse);
    let newer = |id: u32, page: u64| match page % 4 {
        0 => sparse(id + 1, page),
        _ => Page::Unchanged,
    };
    write_image(&one, &geometries, &base, 5, newer);
    let ram = Arc::new(Ram::new(&geometries));
    let status = restore_from(&one, &ram, &Vmm::willing(&ram), RestoreOptions::default());
    assert_eq!((status.phase, status.error_text()), (Phase::Completed, ""));
    ram.check(|id, page| match newer(id, page) {
        Page::Unchanged => (sparse(id, page), 0),
        kind => (kind, 5),
    });
}

#[test]
fn a_block_mismatch_is_refused_before_memory_changes() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image");
    write_image(&path, &geometries(&PAGES), &Base::default(), 0, sparse);
    let ram = Arc::new(Ram::new(&geometries(&[1500, 700])));
    dirty(&ram);
    let before = ram.allocated(0);
    let vmm = Vmm::willing(&ram);
    let status = restore_from(&path, &ram, &vmm, RestoreOptions::default());
    assert_eq!(status.phase, Phase::Failed);
    assert_eq!(
        status.error_text(),
        "block 1: length is 2800 KiB in this VMM, and 2400 KiB in the image"
    );
    assert_eq!((ram.allocated(0), vmm.asked().len()), (before, 0));
    assert!(ram.block(0).discarded.contains(3));
    let status = restore_from(&folder.path().join("none"), &ram, &vmm, RestoreOptions::default());
    assert!(status.error_text().contains("none: cannot open it"), "{}", status.error_text());
}

#[test]
fn a_damaged_page_leaves_the_memory_empty() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image");
    let geometries = geometries(&PAGES);
    write_image(&path, &geometries, &Base::default(), 0, sparse);
    let image = Image::open(&path).unwrap();
    // Block 1 is first in the guest and in the image.
    let place = image.layout().page(1, 1400);
    assert_eq!(sparse(0, 1400), Page::Content);
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    rustix::io::pwrite(&file, b"!", place + 9).unwrap();
    let ram = Arc::new(Ram::new(&geometries));
    dirty(&ram);
    let vmm = Vmm::willing(&ram);
    let status = restore_from(&path, &ram, &vmm, RestoreOptions::default());
    assert_eq!(status.phase, Phase::Failed);
    let expected = format!("image: block 0: page {:#x}, at byte {place:#x}: checksum", 1400);
    assert!(status.error_text().contains(&expected), "{}", status.error_text());
    assert_eq!(vmm.asked(), Vec::<&str>::new());
    ram.check_empty(|_, page| page < 10);
}

#[test]
fn a_failed_state_load_leaves_the_memory_empty() {
    let Saved { folder: _folder, path, ram } = Saved::new(&PAGES, sparse);
    let vmm = Vmm::new(&ram, |_, hook| match hook {
        Hook::LoadState { .. } => Err(RemoteError::new(ErrorCode::Other, "no such device")),
        _ => Ok(()),
    });
    let status = restore_from(&path, &ram, &vmm, RestoreOptions::default());
    assert!(status.error_text().contains("no such device"), "{}", status.error_text());
    assert_eq!(vmm.asked(), ["load state"]);
    ram.check_empty(|_, _| false);
}

/// Discards pages before the request. After it, discards some of them again and some others for the
/// first time. Returns the plan of the restore.
fn discarded_twice(ram: &Arc<Ram>, path: &Path) -> RestorePlan {
    dirty(ram);
    let before = RecordDiscards::SinceRequest(DiscardsSinceRequest::start(&ram.memory).unwrap());
    // In block 0 the image has content in pages 0 to 13 and 35 to 48.
    ram.discard(0, PageRange::new(2, 3));
    ram.discard(0, PageRange::new(35, 2));
    RestorePlan { record_discards: before, ..plan(path, RestoreOptions::default()) }
}

fn since(id: u32, page: u64) -> bool {
    id == 0 && ((2..5).contains(&page) || (35..37).contains(&page))
}

#[test]
fn discards_since_the_request_stay_discarded() {
    let Saved { folder: _folder, path, ram } = Saved::new(&PAGES, sparse);
    let order = discarded_twice(&ram, &path);
    let job = new_job(&ram, &Vmm::willing(&ram), 0);
    run(&job, &order);
    assert_eq!(job.status().phase, Phase::Completed);
    ram.check(|id, page| (if since(id, page) { Page::Discarded } else { sparse(id, page) }, 0));
}

#[test]
fn discards_since_the_request_survive_a_failed_restore() {
    let Saved { folder: _folder, path, ram } = Saved::new(&PAGES, sparse);
    // These pages are discarded in the image, too.
    let of_both = PageRange::new(14, 5);
    let order = discarded_twice(&ram, &path);
    let vmm = Vmm::new(&ram, move |ram, hook| match hook {
        Hook::LoadState { .. } => {
            ram.discard(0, of_both);
            Err(RemoteError::new(ErrorCode::Other, "no such device"))
        }
        _ => Ok(()),
    });
    let job = new_job(&ram, &vmm, 0);
    run(&job, &order);
    assert_eq!(job.status().phase, Phase::Failed);
    ram.check_empty(|id, page| page < 10 || since(id, page) || id == 0 && (14..19).contains(&page));
}

#[test]
fn discards_survive_a_cancel_before_the_reset() {
    let Saved { folder: _folder, path, ram } = Saved::new(&PAGES, sparse);
    let order = discarded_twice(&ram, &path);
    ram.discard(0, PageRange::new(14, 5));
    let job = new_job(&ram, &Vmm::willing(&ram), 0);
    let error = job.populate_if_allowed(|| ()).unwrap_err().to_string();
    assert_eq!(
        error,
        "job 1 restores the memory: populate again once the guest runs, or the restore has failed"
    );
    job.cancel.cancel(CancelledBy::Operator).unwrap();
    run(&job, &order);
    assert_eq!(job.status().phase, Phase::Cancelled);
    job.populate_if_allowed(|| ()).unwrap();
    ram.check_empty(|id, page| page < 10 || since(id, page) || id == 0 && (14..19).contains(&page));
}

#[test]
fn the_vmm_may_refuse_a_restore_that_an_operator_asked_for() {
    let Saved { folder: _folder, path, ram } = Saved::new(&PAGES, sparse);
    dirty(&ram);
    let expected = path.to_str().unwrap().to_owned();
    let mut willing = false;
    let vmm = Vmm::new(&ram, move |_, hook| match hook {
        Hook::AcceptGuest { origin } if !std::mem::replace(&mut willing, true) => {
            assert_eq!(*origin, GuestOrigin::Image { path: expected.clone() });
            Err(RemoteError::new(ErrorCode::Denied, "a guest runs here"))
        }
        _ => Ok(()),
    });
    let order = RestorePlan { needs_vmm_consent: true, ..plan(&path, RestoreOptions::default()) };
    let refused = new_job(&ram, &vmm, 0);
    refused.allow_populates();
    run(&refused, &order);
    assert!(
        refused.status().error_text().contains("a guest runs here"),
        "{}",
        refused.status().error_text()
    );
    assert!(ram.block(0).discarded.contains(3) && !ram.allocated(0).is_empty());
    let job = new_job(&ram, &vmm, 0);
    run(&job, &order);
    assert_eq!(job.status().phase, Phase::Completed);
    ram.check(|id, page| (sparse(id, page), 0));
}

#[test]
fn discards_and_frees_during_an_eager_restore_stay_holes() {
    let Saved { folder: _folder, path, ram } = Saved::new(&[4 * 512], |_, _| Page::Content);
    let vmm = Vmm::willing(&ram);
    // The limit is low enough that the first extent is placed and the others are not.
    let job = new_job(&ram, &vmm, 2 << 20);
    let order = |workers| plan(&path, RestoreOptions { workers, ..Default::default() });
    std::thread::scope(|scope| {
        let restoring = scope.spawn(|| run(&job, &order(1)));
        while job.status().counters.pages_restored < 512 {
            std::thread::yield_now();
        }
        // The counters show the progress.
        while !(1..4 * 512).contains(&job.status().counters.remaining_pages) {
            assert!(!restoring.is_finished());
            std::thread::yield_now();
        }
        // One range was placed already, the others are placed later.
        for first in [100, 1600] {
            let range = BlockRange { block: 0, offset: first * PAGE_SIZE, length: 100 * PAGE_SIZE };
            assert_eq!(ram.memory.discard(&[range], true).unwrap(), 100);
        }
        for first in [300, 1800] {
            let range = BlockRange { block: 0, offset: first * PAGE_SIZE, length: 100 * PAGE_SIZE };
            assert_eq!(ram.memory.free(&[range]).unwrap(), 100);
        }
        job.limiter.set_rate(0);
        restoring.join().unwrap();
    });
    assert_eq!(job.status().phase, Phase::Completed);
    let discarded = |page: u64| (100..200).contains(&page) || (1600..1700).contains(&page);
    let kind = |page: u64| match page {
        _ if discarded(page) => Page::Discarded,
        300..400 | 1800..1900 => Page::Zero,
        _ => Page::Content,
    };
    ram.check(|_, page| (kind(page), 0));

    let job = new_job(&ram, &vmm, 2 << 20);
    std::thread::scope(|scope| {
        let restoring = scope.spawn(|| run(&job, &order(2)));
        while job.status().counters.pages_restored == 0 {
            std::thread::yield_now();
        }
        job.cancel.cancel(CancelledBy::Operator).unwrap();
        restoring.join().unwrap();
    });
    assert_eq!(job.status().phase, Phase::Cancelled);
    // No page is discarded in the image. The VMM's own discards from before stay.
    ram.check_empty(|_, page| discarded(page));
}
