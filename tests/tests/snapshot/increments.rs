// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Increments: which image can be the base of another one, and that no change is missing.

use super::scene::{Scene, on, paused, tracked};
use pageferry_agent::image::Chain;
use pageferry_client::{
    BlockRange, ClearPages, DirtyLog, HookError, JobStatus, Phase, Punch, SnapshotOptions,
};
use pageferry_protocol::memory::PAGE_SIZE;
use pageferry_tests::memory::{BlockLayout, TestMemory};
use pageferry_tests::require;
use pageferry_tests::vmm::{Fault, HookName, PATIENCE, Tracker};

fn range(first: u64, count: u64) -> [BlockRange; 1] {
    [BlockRange { block: 0, offset: first * PAGE_SIZE, length: count * PAGE_SIZE }]
}

#[test]
fn an_increment_holds_what_changed_and_no_more() {
    let scene = Scene::full(1000);
    let (_, full) = scene.saved("full", &tracked(paused()));
    scene.check(&full);
    scene.write(7, 70);
    scene.write(700, 71);
    scene.client().discard(&range(100, 50), Punch::Yes).unwrap();
    scene.client().discard(&range(300, 50), Punch::Yes).unwrap();
    scene.client().populate(&range(320, 10)).unwrap();
    let (status, one) = scene.saved("one", &on(&scene.path("full"), tracked(paused())));
    scene.check(&one);
    let counters = status.counters;
    assert_eq!(
        (counters.pages_saved, counters.discarded_pages, counters.unchanged_pages),
        (2, 90, 898)
    );
    // Nothing happened since then.
    let (status, two) = scene.saved("two", &on(&scene.path("one"), tracked(paused())));
    scene.check(&two);
    assert_eq!((status.counters.pages_saved, status.counters.unchanged_pages), (0, 910));
    // The base is unchanged.
    scene.write(8, 80);
    let states = &one.newest().states()[0];
    assert_eq!(
        (
            states.present.count(states.present.all()),
            states.unchanged.count(states.unchanged.all())
        ),
        (2, 898)
    );
}

#[test]
fn what_was_freed_since_the_base_is_zero_and_not_as_there() {
    let scene = Scene::full(400);
    scene.saved("full", &tracked(paused()));
    scene.client().free(&range(100, 50)).unwrap();
    scene.write(120, 7);
    scene.write(200, 1);
    scene.client().free(&range(200, 1)).unwrap();
    let (status, one) = scene.saved("one", &on(&scene.path("full"), tracked(paused())));
    scene.check(&one);
    let counters = status.counters;
    assert_eq!(
        (counters.pages_saved, counters.discarded_pages, counters.unchanged_pages),
        (1, 0, 349)
    );
    let states = &one.newest().states()[0];
    assert!(
        !states.unchanged.contains(100)
            && !states.present.contains(200)
            && states.present.contains(120)
    );
    // Only once. Then it is ordinary memory again.
    scene.write(101, 8);
    let (status, two) = scene.saved("two", &on(&scene.path("one"), tracked(paused())));
    scene.check(&two);
    assert_eq!((status.counters.pages_saved, status.counters.unchanged_pages), (1, 399));
}

#[test]
fn an_untracked_snapshot_keeps_the_base_of_the_next() {
    let scene = Scene::full(200);
    scene.saved("full", &tracked(paused()));
    scene.write(1, 10);
    let differential = on(&scene.path("full"), paused());
    let (_, first) = scene.saved("first", &differential);
    scene.check(&first);
    scene.write(2, 20);
    scene.saved("aside", &paused());
    let (status, second) = scene.saved("second", &differential);
    scene.check(&second);
    assert_eq!(
        status.counters.pages_saved, 2,
        "the second increment has the pages of the first, too"
    );
}

#[test]
fn a_failed_increment_puts_back_what_it_took() {
    let scene = Scene::full(200);
    scene.saved("full", &tracked(paused()));
    scene.write(1, 10);
    let error =
        scene.save("no/such/folder", &on(&scene.path("full"), tracked(paused()))).error.unwrap();
    assert!(error.contains("cannot create a file in its folder"), "{error}");
    scene.fail_to_resume(&on(&scene.path("full"), tracked(paused())));
    assert_eq!(scene.files(), ["full"]);
    scene.write(2, 20);
    let (status, one) = scene.saved("one", &on(&scene.path("full"), tracked(paused())));
    scene.check(&one);
    assert_eq!(status.counters.pages_saved, 2);
}

#[test]
fn write_protection_tells_what_changed() {
    if !require::uffd() {
        return;
    }
    let scene = Scene::full(600);
    scene.vmm.set_tracker(Tracker::WriteProtect).unwrap();
    scene.saved("full", &tracked(paused()));
    // Not marked, because the kernel tracks the write.
    [5, 99, 500].into_iter().for_each(|page| scene.block().store(page * PAGE_SIZE, page).unwrap());
    let (status, one) = scene.saved("one", &on(&scene.path("full"), tracked(paused())));
    scene.check(&one);
    assert_eq!(status.counters.pages_saved, 3);
}

#[test]
fn an_increment_after_a_protected_snapshot_holds_every_write() {
    if !require::uffd() {
        return;
    }
    let background = SnapshotOptions::default();
    let scene = Scene::full(600);
    scene.vmm.set_tracker(Tracker::WriteProtect).unwrap();
    // Not marked. The kernel tracks writes, except while the snapshot has the mappings.
    let write = |page: u64, value: u64| scene.block().store(page * PAGE_SIZE, value).unwrap();
    let warns = |status: &JobStatus, which: &str| {
        let warning = status.error_text();
        assert!(warning.starts_with(which) && warning.contains("mode paused"), "{warning}");
    };
    let (status, _) = scene.saved("full", &tracked(background.clone()));
    warns(&status, "the next increment will have all allocated pages");
    write(5, 50);
    let (status, _) = scene.saved("aside", &background);
    warns(&status, "the next increment will have");
    write(99, 51);
    let (status, one) = scene.saved("one", &on(&scene.path("full"), tracked(background.clone())));
    scene.check(&one);
    assert_eq!(status.counters.pages_saved, 600, "the writes meanwhile are not known");
    warns(&status, "this increment and the next one have");
    write(7, 52);
    scene.fail_to_resume(&on(&scene.path("one"), tracked(background)));
    write(8, 53);
    let (status, two) = scene.saved("two", &on(&scene.path("one"), tracked(paused())));
    scene.check(&two);
    warns(&status, "this increment has all allocated pages");
    // From here on writes are known again.
    write(500, 54);
    let (status, three) = scene.saved("three", &on(&scene.path("two"), tracked(paused())));
    scene.check(&three);
    assert_eq!((status.counters.pages_saved, status.error_text()), (1, ""));
}

#[test]
fn a_base_named_by_a_symlink_is_found_after_it_moved() {
    let scene = Scene::full(200);
    let link = scene.path("latest");
    scene.saved("first", &tracked(paused()));
    std::os::unix::fs::symlink("first", &link).unwrap();
    scene.write(3, 30);
    scene.saved("second", &on(&link, tracked(paused())));
    std::fs::remove_file(&link).unwrap();
    std::os::unix::fs::symlink("second", &link).unwrap();
    scene.check(&Chain::open(&link).unwrap());
}

#[test]
fn what_no_increment_can_be_built_on_is_refused_with_why() {
    let scene = Scene::full(200);
    let refused = |base: &str, expected: &str| {
        let status = scene.save("increment", &on(&scene.path(base), tracked(paused())));
        assert_eq!(status.phase, Phase::Failed);
        assert!(status.error_text().contains(expected), "{}", status.error_text());
        assert!(!scene.path("increment").exists());
    };
    refused("nothing", "nothing: cannot open it: No such file");
    scene.saved("untracked", &paused());
    refused("untracked", "no image was made here with track on: save all of it");
    scene.saved("first", &tracked(paused()));
    scene.saved("second", &tracked(paused()));
    refused("first", "and what changed is known since image");
    std::fs::write(scene.path("text"), vec![b'x'; 5000]).unwrap();
    refused("text", "not an image of pageferry");
    let other = Scene::full(300);
    other.saved("other", &tracked(paused()));
    std::fs::copy(other.path("other"), scene.path("other")).unwrap();
    refused("other", "has other blocks");
    // The chain is still good.
    scene.write(3, 30);
    let (status, chain) = scene.saved("third", &on(&scene.path("second"), tracked(paused())));
    scene.check(&chain);
    assert_eq!(status.counters.pages_saved, 1);
    let over = SnapshotOptions { replace: true, ..on(&scene.path("third"), tracked(paused())) };
    let error = scene.save("second", &over).error.unwrap();
    assert!(error.contains("which the increment builds on: choose another name"), "{error}");
}

#[test]
fn what_changes_the_memory_or_the_trackers_ends_the_chain() {
    let scene = Scene::full(200);
    let ended = |why: &str| {
        let status = scene.save("increment", &on(&scene.path("full"), tracked(paused())));
        assert!(status.error_text().contains(why), "{}", status.error_text());
        std::fs::remove_file(scene.path("full")).unwrap();
    };
    scene.saved("full", &tracked(paused()));
    scene.vmm.set_tracker(Tracker::Log).unwrap();
    // A snapshot that fails meanwhile does not change that.
    scene.fail_to_resume(&tracked(paused()));
    ended("the trackers were changed");
    scene.saved("full", &tracked(paused()));
    let more =
        BlockLayout { id: 1, name: "more".into(), gpa: 1 << 30, ..BlockLayout::ram(PAGE_SIZE) };
    let more = TestMemory::new(vec![more]).unwrap();
    more.block(1).unwrap().add_to(scene.client()).unwrap();
    scene.client().remove_block(1).unwrap();
    ended("blocks were added or removed");
    scene.saved("full", &tracked(paused()));
    let nowhere = scene.path("nobody");
    let job = scene
        .vmm
        .start_outgoing(&format!("unix:{}", nowhere.display()), &Default::default())
        .unwrap();
    assert_eq!(scene.vmm.wait_job(job, PATIENCE).unwrap().phase, Phase::Failed);
    ended("a migration asked the trackers");
}

/// A tracker that only fails.
struct Failing;

impl pageferry_client::Tracker for Failing {
    fn start(&mut self) -> Result<(), HookError> {
        Ok(())
    }

    fn stop(&mut self) -> Result<(), HookError> {
        Ok(())
    }

    fn sync(&mut self, _: &DirtyLog) -> Result<(), HookError> {
        Ok(())
    }

    fn clear(&mut self, _: ClearPages<'_>) -> Result<(), HookError> {
        Ok(())
    }
}

#[test]
fn a_failed_tracker_ends_the_chain() {
    for hook in [HookName::SyncTracker, HookName::ClearTracker] {
        let scene = Scene::full(200);
        scene.vmm.set_tracker(Tracker::Hooks(Box::new(Failing))).unwrap();
        scene.saved("full", &tracked(paused()));
        // The agent clears exactly the pages that the tracker reported.
        scene.write(1, 10);
        scene.vmm.inject(hook, Some(Fault::Fail("it is raining".into())));
        scene.vmm.clear_record();
        let status = scene.save("one", &on(&scene.path("full"), tracked(paused())));
        assert!(status.error_text().contains("it is raining"), "{hook:?}: {}", status.error_text());
        assert!(
            scene.vmm.record().calls.contains(&HookName::StopTracking),
            "{hook:?}: it is of no use any more"
        );
        scene.vmm.inject(hook, None);
        let status = scene.save("one", &on(&scene.path("full"), tracked(paused())));
        assert_eq!(status.phase, Phase::Failed);
        assert!(
            status.error_text().contains("what changed since is not known: a tracker failed"),
            "{}",
            status.error_text()
        );
        assert_eq!(scene.files(), ["full"]);
        // A full image starts a new chain.
        scene.saved("whole", &tracked(paused()));
        scene.write(2, 20);
        let (status, chain) = scene.saved("two", &on(&scene.path("whole"), tracked(paused())));
        scene.check(&chain);
        assert_eq!(status.counters.pages_saved, 1);
    }
}
