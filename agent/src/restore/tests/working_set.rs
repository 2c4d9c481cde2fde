// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

use super::*;
use crate::image::merge::{MergeKeys, merge_with};
use crate::restore::source::Source;
use crate::restore::working_set::WorkingSetPlan;
use pageferry_protocol::image::WorkingSet;
use std::time::{Duration, Instant};

const PAGES: u64 = 16 * 512;

fn options_with(set: &Path) -> RestoreOptions {
    let working_set = set.to_str().unwrap().to_owned();
    RestoreOptions { mode: RestoreMode::Lazy, workers: 2, working_set, ..RestoreOptions::default() }
}

/// The pages that the guest touches before it is idle, the first half while its state is loaded.
const TOUCHED: [u64; 6] = [7000, 7001, 40, 4000, 3, 5100];

/// A VMM whose guest touches [`TOUCHED`] before it confirms the resume.
fn touching(ram: &Arc<Ram>) -> Vmm {
    Vmm::new(ram, |ram, hook| {
        let pages = match hook {
            Hook::LoadState { .. } => &TOUCHED[..3],
            Hook::Resume { .. } => &TOUCHED[3..],
            _ => &[],
        };
        pages.iter().for_each(|page| assert_eq!(ram.touch(0, *page), word_of(0, *page)));
        Ok(())
    })
}

/// A VMM whose guest touches nothing. Its state is loaded once the pages [`TOUCHED`] have come
/// although nobody waits for them. Before that, no other page is prefetched, and none of them is
/// read as one of those.
fn waiting(ram: &Arc<Ram>) -> Vmm {
    Vmm::new(ram, |ram, hook| {
        if matches!(hook, Hook::LoadState { .. }) {
            let is_here = |page: &u64| {
                ram.block(0).backing.first_data(PageRange::new(*page, 1)).unwrap().is_some()
            };
            let until = Instant::now() + Duration::from_secs(60);
            while !TOUCHED.iter().all(is_here) {
                assert!(Instant::now() < until, "the working set does not come");
                std::thread::yield_now();
            }
        }
        Ok(())
    })
}

#[test]
fn the_working_set_is_prefetched_by_the_next_restore() {
    if !has_userfaultfd() {
        return;
    }
    let Saved { folder, path, ram } = Saved::new(&[PAGES], |_, _| Page::Content);
    let set = folder.path().join("set");
    let status = restore_from(&path, &ram, &touching(&ram), options_with(&set));
    assert_eq!((status.phase, status.error_text()), (Phase::Completed, ""));
    ram.check(|_, _| (Page::Content, 0));
    assert_eq!(status.counters.working_set_pages, 0);
    let bytes = std::fs::read(&set).unwrap();
    let written = WorkingSet::decode(&bytes).unwrap();
    let run = |first, count| (0, PageRange::new(first, count));
    assert_eq!(written.runs, [run(7000, 2), run(40, 1), run(4000, 1), run(3, 1), run(5100, 1)]);
    assert_eq!(written.image, Image::open(&path).unwrap().header().id);
    let vmm = waiting(&ram);
    let status = restore_from(&path, &ram, &vmm, options_with(&set));
    assert_eq!((status.phase, status.error_text()), (Phase::Completed, ""));
    assert_eq!((status.counters.working_set_pages, status.counters.faults), (6, 0));
    ram.check(|_, _| (Page::Content, 0));
    assert_eq!(std::fs::read(&set).unwrap(), bytes, "it is not written again");
}

#[test]
fn the_working_set_of_a_sealed_image_is_sealed_and_used_by_the_next_restore() {
    if !has_userfaultfd() {
        return;
    }
    let Saved { folder, path, ram } = Saved::new(&[PAGES], |_, _| Page::Content);
    let (sealed, set) = (folder.path().join("sealed"), folder.path().join("set"));
    let key = ImageKey::parse(&[7; 32]).unwrap();
    let keys = MergeKeys { old: None, new: Some(&key) };
    merge_with(&path, keys, &sealed, false, 2, &|_, _| ()).unwrap();
    let status = restore_sealed(&sealed, &ram, &touching(&ram), options_with(&set), &key);
    assert_eq!((status.phase, status.error_text()), (Phase::Completed, ""));
    ram.check(|_, _| (Page::Content, 0));
    let bytes = std::fs::read(&set).unwrap();
    assert!(WorkingSet::decode(&bytes).is_err());
    let id = Image::open_with(&sealed, Some(&key)).unwrap().header().id;
    assert!(!bytes.windows(16).any(|part| part == id), "not even the image is shown");
    let vmm = waiting(&ram);
    let status = restore_sealed(&sealed, &ram, &vmm, options_with(&set), &key);
    assert_eq!((status.phase, status.counters.working_set_pages), (Phase::Completed, 6));
    assert_eq!(std::fs::read(&set).unwrap(), bytes, "it is not written again");
    // Another key opens neither the image nor the working set.
    let other = ImageKey::parse(&[8; 32]).unwrap();
    let status = restore_sealed(&sealed, &ram, &vmm, options_with(&set), &other);
    assert!(status.error_text().contains("the key does not fit"), "{}", status.error_text());
    ram.check(|_, _| (Page::Content, 0));
}

#[test]
fn a_useless_set_is_replaced_and_another_file_is_kept() {
    if !has_userfaultfd() {
        return;
    }
    let Saved { folder, path, ram } = Saved::new(&[PAGES], |_, _| Page::Content);
    let set = folder.path().join("set");
    let image = Image::open(&path).unwrap().header().id;
    let of_other = WorkingSet { image: [9; 16], runs: vec![(0, PageRange::new(0, 100))] };
    let outside = WorkingSet { image, runs: vec![(0, PageRange::new(PAGES - 1, 2))] };
    let damaged = of_other.encode()[..50].to_vec();
    for useless in [of_other.encode(), outside.encode(), damaged] {
        std::fs::write(&set, useless).unwrap();
        let status = restore_from(&path, &ram, &touching(&ram), options_with(&set));
        assert_eq!((status.phase, status.counters.working_set_pages), (Phase::Completed, 0));
        let written = WorkingSet::decode(&std::fs::read(&set).unwrap()).unwrap();
        assert_eq!((written.image, written.runs.len()), (image, 5));
    }
    for other in [&b"root:x:0:0"[..], b"key"] {
        std::fs::write(&set, other).unwrap();
        let vmm = touching(&ram);
        let status = restore_from(&path, &ram, &vmm, options_with(&set));
        assert_eq!(status.phase, Phase::Failed);
        assert!(
            status.error_text().contains("working_set is")
                && status.error_text().contains("not to be overwritten"),
            "{}",
            status.error_text()
        );
        assert_eq!((vmm.asked().len(), std::fs::read(&set).unwrap().as_slice()), (0, other));
    }
    let status = restore_from(&path, &ram, &touching(&ram), options_with(folder.path()));
    assert!(status.error_text().contains("it is no working set"), "{}", status.error_text());
}

#[test]
fn a_set_behind_a_link_is_replaced_there() {
    if !has_userfaultfd() {
        return;
    }
    let Saved { folder, path, ram } = Saved::new(&[PAGES], |_, _| Page::Content);
    let (set, link) = (folder.path().join("set"), folder.path().join("link"));
    std::fs::write(&set, WorkingSet { image: [9; 16], runs: Vec::new() }.encode()).unwrap();
    std::os::unix::fs::symlink("set", &link).unwrap();
    let status = restore_from(&path, &ram, &touching(&ram), options_with(&link));
    assert_eq!(status.phase, Phase::Completed);
    assert_eq!(WorkingSet::decode(&std::fs::read(&set).unwrap()).unwrap().runs.len(), 5);
    assert!(link.is_symlink());
}

#[test]
fn a_file_that_appears_during_the_restore_is_kept() {
    if !has_userfaultfd() {
        return;
    }
    let Saved { folder, path, ram } = Saved::new(&[PAGES], |_, _| Page::Content);
    let set = folder.path().join("set");
    let its_set = set.clone();
    let vmm = Vmm::new(&ram, move |ram, hook| {
        if matches!(hook, Hook::LoadState { .. }) {
            assert_eq!(ram.touch(0, 40), word_of(0, 40));
            std::fs::write(&its_set, "somebody's").unwrap();
        }
        Ok(())
    });
    let status = restore_from(&path, &ram, &vmm, options_with(&set));
    assert_eq!(status.phase, Phase::Completed);
    assert!(
        status.error_text().contains("is not written: the file exists"),
        "{}",
        status.error_text()
    );
    assert_eq!(std::fs::read(&set).unwrap(), b"somebody's");
}

#[test]
fn a_path_that_cannot_be_written_is_refused() {
    if !has_userfaultfd() {
        return;
    }
    let Saved { folder, path, ram } = Saved::new(&[PAGES], |_, _| Page::Content);
    let (nowhere, empty) = (folder.path().join("nowhere"), folder.path().join("empty"));
    std::os::unix::fs::symlink("none", &nowhere).unwrap();
    std::fs::write(&empty, "").unwrap();
    for (set, why) in [
        (
            folder.path().join("no/such/folder"),
            "it could not be written: cannot create a file in its folder: No such",
        ),
        (nowhere, "it could not be written: it is not a regular file"),
        (empty, "it is empty, which is no working set"),
    ] {
        let vmm = touching(&ram);
        let status = restore_from(&path, &ram, &vmm, options_with(&set));
        assert_eq!((status.phase, vmm.asked().len()), (Phase::Failed, 0));
        let expected = format!("working_set is {}: {why}", set.display());
        assert!(status.error_text().contains(&expected), "{}", status.error_text());
    }
}

#[test]
fn a_set_of_no_pages_is_not_written() {
    if !has_userfaultfd() {
        return;
    }
    let Saved { folder, path, ram } = Saved::new(&[PAGES], |_, _| Page::Content);
    let set = folder.path().join("set");
    let status = restore_from(&path, &ram, &Vmm::new(&ram, |_, _| Ok(())), options_with(&set));
    let expected =
        format!("working_set {} is not written: the guest waited for no page", set.display());
    assert_eq!((status.phase, status.error_text()), (Phase::Completed, expected.as_str()));
    assert!(!set.exists());
}

#[test]
fn a_set_is_read_in_the_order_of_the_image() {
    let Saved { folder, path, ram } = Saved::new(&[2000, 300], |_, _| Page::Content);
    let set = folder.path().join("set");
    let image = Image::open(&path).unwrap().header().id;
    let run = PageRange::new;
    // In the order of the touches: single pages near each other, one far away, pages of another
    // block in between, and a run across the end of an extent.
    let touched = [(0, 80), (0, 71), (1, 7), (0, 1900), (0, 75), (0, 70), (1, 9)]
        .map(|(id, page)| (id, run(page, 1)));
    let runs = [&touched[..], &[(0, run(505, 10))]].concat();
    std::fs::write(&set, WorkingSet { image, runs }.encode()).unwrap();
    let source = Source::open(&path, &ram.memory, None).unwrap();
    let WorkingSetPlan::Read(pieces) =
        WorkingSetPlan::of(set.to_str().unwrap(), &source, &ram.memory, None).unwrap()
    else {
        panic!()
    };
    let expected =
        [(0, run(70, 11)), (0, run(505, 7)), (0, run(512, 3)), (0, run(1900, 1)), (1, run(7, 3))];
    let at = |id: u32| ram.memory.find(id).unwrap().0;
    let mut expected = expected.map(|(id, run)| (at(id), run));
    expected.sort_unstable();
    assert_eq!(pieces, expected);
}
