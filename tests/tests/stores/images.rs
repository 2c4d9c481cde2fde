// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a store is for: images go there and come back.

use super::scene::Scene;
use pageferry_agent::image::Chain;
use pageferry_agent::snapshot::upload_progress;
use pageferry_client::{Punch, RestoreOptions};
use pageferry_tests::deadline::wait_for;
use pageferry_tests::require;
use pageferry_tests::scenario::image_guest::{
    Guest, PAGES, assert_completed, assert_failed, background, cloning, eager, lazy, restore_modes,
    slow,
};
use pageferry_tests::scenario::images::{on, paused, tracked};
use pageferry_tests::scenario::{Host, SOON};
use pageferry_tests::stores::StoreKind;
use pageferry_tests::stores::faults::{Faults, Request};
use std::path::Path;
use std::time::Duration;

/// A store of each kind.
fn scenes() -> Vec<Scene> {
    let Some(tools) = require::stores() else { return vec![Scene::folder()] };
    let served = StoreKind::ALL.map(|kind| Scene::served(&tools, kind));
    served.into_iter().chain([Scene::folder()]).collect()
}

#[track_caller]
fn save(guest: &Guest, name: &Path) {
    assert_completed(&guest.wait(guest.snapshot(name, &background())));
}

#[test]
fn an_image_goes_to_a_store_and_comes_back() {
    for mut scene in scenes() {
        let name = scene.name("vm/guest");
        let host = scene.host();
        let guest = Guest::full(&host, PAGES);
        guest.client.discard(&[guest.range(100, 700)], Punch::Yes).unwrap();
        save(&guest, &name);
        for above in [&scene.name("vm"), &name] {
            assert_eq!(scene.listed_at(above), [name.to_str().unwrap()]);
        }
        for other in ["vm/gues", "vm/guest2", "other"] {
            assert_eq!(scene.listed_at(&scene.name(other)), [""; 0], "{other}");
        }
        let info = scene.said(&["info"], &name);
        assert_eq!(info["discarded_pages"], 700, "{info}");
        // Another machine.
        scene.other_machine();
        for options in restore_modes() {
            let host = scene.host();
            let restored = Guest::new(&host, PAGES);
            assert_completed(&restored.restored(&name, &options));
            assert!(restored.bytes() == guest.bytes());
            // From now on the cache has it.
            if options.mode == eager().mode {
                scene.proxy.iter().for_each(|proxy| proxy.forget());
            }
        }
        let reads = scene.proxy.as_ref().map(|_| scene.reads().len());
        assert!(reads.is_none_or(|reads| reads == 0), "{:?}", scene.reads());
        // It reads what the store has, and not the cache.
        let verified = scene.said(&["verify"], &name);
        assert_eq!((&verified["status"], &verified["pages"]), (&"good".into(), &1348.into()));
    }
}

#[test]
fn an_increment_in_a_store_finds_its_base_there() {
    for mut scene in scenes() {
        let host = scene.host();
        let guest = Guest::full(&host, PAGES);
        let [sunday, monday] = ["sunday", "monday"].map(|name| scene.name(name));
        assert_completed(&guest.wait(guest.snapshot(&sunday, &tracked(background()))));
        (0..PAGES).step_by(7).for_each(|page| guest.write(page, page));
        assert_completed(&guest.wait(guest.snapshot(&monday, &on(&sunday, paused()))));
        scene.other_machine();
        let info = scene.said(&["info"], &monday);
        assert_eq!(info["base"]["name"], "sunday", "{info}");
        let host = scene.host();
        let restored = Guest::new(&host, PAGES);
        assert_completed(&restored.restored(&monday, &eager()));
        assert!(restored.bytes() == guest.bytes());
        // Merged, copied to a file, and copied back.
        let whole = scene.name("whole");
        let merge = scene.image(&["merge", "--into", whole.to_str().unwrap()], &monday);
        assert!(merge.status.success(), "{merge:?}");
        let file = scene.cache.path().join("copy.img");
        let copied = scene.image(&["copy", whole.to_str().unwrap()], &file);
        assert!(copied.status.success(), "{copied:?}");
        let chain = Chain::open(&file).unwrap();
        guest.check(&chain);
        let back = scene.name("back");
        assert!(scene.image(&["copy", file.to_str().unwrap()], &back).status.success());
        assert_eq!(scene.said(&["verify"], &back)["status"], "good");
        assert_eq!(scene.listed().len(), 4);
    }
}

#[test]
fn a_name_is_given_once_and_replaced_only_if_that_is_wanted() {
    for scene in scenes() {
        let name = scene.name("guest");
        let host = scene.host();
        let guest = Guest::full(&host, 64);
        save(&guest, &name);
        let id = scene.said(&["info"], &name)["id"].clone();
        let refused = guest.wait(guest.snapshot(&name, &background()));
        assert_failed(&refused, &["it exists already: use --replace"]);
        assert_eq!(scene.said(&["info"], &name)["id"], id);
        let replace = pageferry_client::SnapshotOptions { replace: true, ..background() };
        assert_completed(&guest.wait(guest.snapshot(&name, &replace)));
        assert_ne!(scene.said(&["info"], &name)["id"], id);
        // What the first one had is not needed any more.
        let pruned = scene.prune();
        assert_eq!(pruned["uploads"].as_array().unwrap().len(), 1, "{pruned}");
        assert_eq!(scene.prune()["uploads"].as_array().unwrap().len(), 0);
        assert_eq!(scene.said(&["verify"], &name)["status"], "good");
        // What is no image is not replaced.
        let file = scene.cache.path().join("poem");
        std::fs::write(&file, "a poem").unwrap();
        let copied = scene.image(&["copy", file.to_str().unwrap()], &scene.name("poem"));
        assert_eq!(copied.status.code(), Some(1));
        let missing = scene.image(&["verify"], &scene.name("none"));
        let said = String::from_utf8_lossy(&missing.stderr).into_owned();
        assert!(said.contains("there is no such object"), "{said}");
    }
}

#[test]
fn an_agent_uses_only_the_stores_that_its_options_name() {
    let scene = Scene::folder();
    let host = scene.host();
    let guest = Guest::full(&host, 64);
    save(&guest, &scene.name("guest"));
    let elsewhere = scene.name("other");
    let other = scene.host_with(&["--store", elsewhere.to_str().unwrap()]);
    let none = scene.host_with(&[]);
    for host in [other, none] {
        let guest = Guest::full(&host, 64);
        for refused in [
            guest.client.start_snapshot(&scene.name("x"), &background()).map(drop),
            guest.client.start_restore(&scene.name("guest"), &eager()).map(drop),
            guest.client.start_restore(&scene.name("other/../guest"), &eager()).map(drop),
        ] {
            let error = refused.unwrap_err().to_string();
            assert!(error.contains("nobody has named this store"), "{error}");
        }
    }
}

#[test]
fn agents_of_one_machine_read_each_piece_once() {
    let Some(tools) = require::stores() else { return };
    if !require::uffd() {
        return;
    }
    let (scene, name, bytes) = Scene::with_image(&tools, 8 * PAGES);
    scene.proxy.as_ref().unwrap().forget();
    let stored = scene.stored_bytes();
    let hosts: Vec<Host> = (0..3).map(|_| scene.host()).collect();
    let guests: Vec<Guest> = hosts.iter().map(|host| Guest::new(host, 8 * PAGES)).collect();
    let jobs: Vec<u64> = guests.iter().map(|guest| guest.restore(&name, &eager())).collect();
    for (restored, job) in guests.iter().zip(jobs) {
        assert_completed(&restored.wait(job));
        assert!(restored.bytes() == bytes);
    }
    let read: u64 = scene.reads().iter().map(|request| request.downloaded).sum();
    assert!(read <= stored, "{read} of {stored} bytes");
}

#[test]
fn clones_of_a_stored_image_read_each_piece_once() {
    let Some(tools) = require::stores() else { return };
    if !require::uffd() {
        return;
    }
    let (scene, name, bytes) = Scene::with_image(&tools, 8 * PAGES);
    scene.proxy.as_ref().unwrap().forget();
    let stored = scene.stored_bytes();
    let hosts: Vec<Host> = (0..8).map(|_| scene.host()).collect();
    let clones: Vec<Guest> = hosts.iter().map(|host| Guest::clone_of(host, &name)).collect();
    let jobs: Vec<u64> = clones.iter().map(|clone| clone.restore(&name, &cloning())).collect();
    for (clone, job) in clones.iter().zip(jobs) {
        assert_completed(&clone.wait(job));
        assert!(clone.bytes() == bytes);
    }
    let read: u64 = scene.reads().iter().map(|request| request.downloaded).sum();
    assert!(read <= stored, "{read} of {stored} bytes");
}

#[test]
fn a_working_set_is_kept_in_the_store_beside_its_image() {
    if !require::uffd() {
        return;
    }
    for mut scene in scenes() {
        let (name, set) = (scene.name("guest"), scene.name("guest.ws"));
        let host = scene.host();
        let guest = Guest::full(&host, PAGES);
        save(&guest, &name);
        let options =
            RestoreOptions { working_set: set.to_str().unwrap().to_owned(), ..slow(lazy()) };
        for recorded in [false, true] {
            scene.other_machine();
            let host = scene.host();
            let restored = Guest::new(&host, PAGES);
            let job = restored.restore(&name, &options);
            restored.reaches(pageferry_client::Phase::Prefetching);
            if !recorded {
                [5, 700, 1400].iter().for_each(|page| restored.write(*page, 9));
            }
            restored.hurry();
            let status = restored.wait(job);
            assert_completed(&status);
            assert_eq!(status.counters.working_set_pages > 0, recorded, "{status:?}");
        }
    }
}

#[test]
fn the_status_says_how_far_an_upload_is() {
    let Some(tools) = require::stores() else { return };
    let scene = Scene::served(&tools, StoreKind::S3);
    let host = scene.host();
    // Eight packs, of which four are put at a time.
    let guest = Guest::full(&host, 8 * PAGES);
    let slow = Faults { bandwidth: Some(16 << 20), ..Faults::default() };
    scene.proxy.as_ref().unwrap().set(slow);
    let job = guest.snapshot(&scene.name("guest"), &background());
    let progress = |wanted: fn(u64, u64) -> bool| {
        let look = || {
            let status = guest.client.status().unwrap();
            assert!(!status.phase.is_final(), "{status:?}");
            upload_progress::of_status(&status).filter(|(done, all)| wanted(*done, *all))
        };
        wait_for("the upload to go on", SOON, look).unwrap()
    };
    let (_, all) = progress(|_, _| true);
    assert!(all >= 8 * PAGES * 4096, "{all}");
    progress(|done, all| done > all / 4 && done < all);
    scene.proxy.as_ref().unwrap().set(Faults::default());
    // The status of a job that completed has no such sentence.
    assert_completed(&guest.wait(job));
}

#[test]
fn a_limited_restore_reads_nothing_ahead() {
    let Some(tools) = require::stores() else { return };
    let (mut scene, name, bytes) = Scene::with_image(&tools, 16 * PAGES);
    for options in restore_modes() {
        scene.other_machine();
        // What is read ahead is asked for before the first answer.
        let latency = Duration::from_millis(50);
        scene.proxy.as_ref().unwrap().set(Faults { latency, ..Faults::default() });
        let host = scene.host();
        let restored = Guest::new(&host, 16 * PAGES);
        scene.proxy.as_ref().unwrap().forget();
        let job = restored.restore(&name, &slow(options));
        let first = || {
            let counters = restored.client.status().unwrap().counters;
            (counters.pages_restored > 0).then_some(())
        };
        wait_for("the first pages", SOON, first).unwrap();
        // The first read of each thread, and what is read as an image is opened.
        let asked: u64 = scene.reads().iter().map(asked_for).sum();
        assert!(asked < 16 << 20, "{asked} bytes");
        restored.hurry();
        assert_completed(&restored.wait(job));
        assert!(restored.bytes() == bytes);
    }
}

/// Bytes of a range.
fn asked_for(request: &Request) -> u64 {
    let range = request.range.as_ref().and_then(|range| range.strip_prefix("bytes="));
    let (first, last) = range.and_then(|range| range.split_once('-')).unwrap();
    last.parse::<u64>().unwrap() + 1 - first.parse::<u64>().unwrap()
}
