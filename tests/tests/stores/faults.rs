// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A store that delays, refuses, cuts and damages: the content is right, or the error says why.

use super::scene::Scene;
use pageferry_client::Phase;
use pageferry_tests::deadline::wait_for;
use pageferry_tests::require;
use pageferry_tests::scenario::SOON;
use pageferry_tests::scenario::image_guest::{
    Guest, PAGES, assert_completed, assert_failed, background, eager, lazy, restore_modes, slow,
};
use pageferry_tests::stores::StoreKind;
use pageferry_tests::stores::faults::{Fault, Faults};
use std::time::Duration;

#[test]
fn what_is_refused_cut_or_damaged_is_asked_for_again() {
    let Some(tools) = require::stores() else { return };
    for kind in StoreKind::ALL {
        let mut scene = Scene::served(&tools, kind);
        for fault in Fault::ALL {
            let faults = Faults { latency: Duration::from_millis(2), ..Faults::default() };
            let stall = Duration::from_secs(3);
            let faults = Faults { at_most: Some(3), stall, ..faults }.with(fault, 400);
            let name = scene.name(&format!("{fault:?}"));
            let host = scene.host();
            let guest = Guest::full(&host, PAGES);
            let set = |scene: &Scene| scene.proxy.as_ref().unwrap().set(faults.clone());
            set(&scene);
            assert_completed(&guest.wait(guest.snapshot(&name, &background())));
            scene.other_machine();
            for options in restore_modes() {
                set(&scene);
                let host = scene.host();
                let restored = Guest::new(&host, PAGES);
                assert_completed(&restored.restored(&name, &options));
                assert!(restored.bytes() == guest.bytes(), "{kind:?} {fault:?}");
                scene.other_machine();
            }
            let injected = scene.proxy.as_ref().unwrap().counts().injected(fault);
            assert!(injected > 0, "{kind:?} {fault:?}");
            scene.proxy.as_ref().unwrap().set(Faults::default());
        }
    }
}

#[test]
fn a_store_that_lies_fails_a_restore_and_never_gives_a_wrong_page() {
    let Some(tools) = require::stores() else { return };
    let (mut scene, name, bytes) = Scene::with_image(&tools, PAGES);
    for fault in [Fault::Flip, Fault::Truncate] {
        scene.proxy.as_ref().unwrap().set(Faults::default().with(fault, 1000));
        let host = scene.host();
        let restored = Guest::new(&host, PAGES);
        let job = restored.client.start_restore(&name, &eager()).unwrap().job;
        assert_failed(&restored.wait(job), &[name.to_str().unwrap()]);
        assert!(restored.is_hole());
        scene.proxy.as_ref().unwrap().set(Faults::default());
        // The cache has nothing of it.
        assert_completed(&restored.restored(&name, &eager()));
        assert!(restored.bytes() == bytes);
        scene.other_machine();
    }
}

#[test]
fn a_guest_waits_for_a_store_that_is_gone_and_goes_on_when_it_is_back() {
    let Some(tools) = require::stores() else { return };
    if !require::uffd() {
        return;
    }
    let (mut scene, name, bytes) = Scene::with_image(&tools, 8 * PAGES);
    let host = scene.host();
    let restored = Guest::new(&host, 8 * PAGES);
    let job = restored.restore(&name, &slow(lazy()));
    restored.reaches(Phase::Prefetching);
    scene.proxy.as_mut().unwrap().take_down();
    let memory = restored.memory.clone();
    // A page that nobody has read ahead.
    let touch = std::thread::spawn(move || memory.blocks()[0].load(0x2ff_0000).unwrap());
    let waits = || {
        let status = restored.client.status().unwrap();
        status.error_text().contains("waits for the store").then_some(())
    };
    wait_for("the status to say it", SOON, waits).unwrap();
    assert!(!touch.is_finished() && restored.losses() == 0);
    scene.proxy.as_mut().unwrap().bring_up().unwrap();
    restored.hurry();
    assert_completed(&restored.wait(job));
    touch.join().unwrap();
    assert!(restored.bytes() == bytes);
}

#[test]
fn a_store_that_is_gone_fails_a_snapshot_and_delays_no_discard() {
    let Some(tools) = require::stores() else { return };
    let mut scene = Scene::served(&tools, StoreKind::S3);
    let host = scene.host();
    let guest = Guest::full(&host, PAGES);
    let slow = Faults { bandwidth: Some(256 << 10), ..Faults::default() };
    scene.proxy.as_ref().unwrap().set(slow);
    let job = guest.snapshot(&scene.name("guest"), &background());
    guest.reaches(Phase::Saving);
    wait_for("the upload to begin", SOON, || {
        (scene.proxy.as_ref().unwrap().counts().requests("PUT") > 0).then_some(())
    })
    .unwrap();
    // The guest goes on while the store is slow.
    guest.client.discard(&[guest.range(5, 50)], pageferry_client::Punch::Yes).unwrap();
    guest.assert_free();
    scene.proxy.as_mut().unwrap().take_down();
    assert_failed(&guest.wait(job), &["guest"]);
    scene.proxy.as_mut().unwrap().bring_up().unwrap();
    scene.proxy.as_ref().unwrap().set(Faults::default());
    assert_eq!(scene.listed(), [""; 0]);
    assert_completed(&guest.wait(guest.snapshot(&scene.name("guest"), &background())));
}

#[test]
fn an_upload_that_is_cancelled_leaves_nothing() {
    let Some(tools) = require::stores() else { return };
    let scene = Scene::served(&tools, StoreKind::S3);
    let host = scene.host();
    let guest = Guest::full(&host, PAGES);
    let slow = Faults { bandwidth: Some(64 << 10), ..Faults::default() };
    scene.proxy.as_ref().unwrap().set(slow);
    let job = guest.snapshot(&scene.name("guest"), &background());
    wait_for("the upload to begin", SOON, || {
        (scene.proxy.as_ref().unwrap().counts().requests("PUT") > 0).then_some(())
    })
    .unwrap();
    guest.client.cancel().unwrap();
    assert_eq!(guest.wait(job).phase, Phase::Cancelled);
    scene.proxy.as_ref().unwrap().set(Faults::default());
    assert_eq!(scene.listed(), [""; 0]);
}

/// Cancels a job that waits for the store, which does not answer for longer than the job is waited
/// for.
#[track_caller]
fn cancel_at_once(scene: &Scene, guest: &Guest, job: u64) {
    let proxy = scene.proxy.as_ref().unwrap();
    let stalls = || (proxy.counts().injected(Fault::Stall) > 0).then_some(());
    wait_for("the store to stall", SOON, stalls).unwrap();
    guest.client.cancel().unwrap();
    assert_eq!(guest.wait(job).phase, Phase::Cancelled);
    proxy.set(Faults::default());
    proxy.forget();
}

#[test]
fn a_job_that_waits_for_a_store_is_cancelled_at_once() {
    let Some(tools) = require::stores() else { return };
    let mut scene = Scene::served(&tools, StoreKind::S3).patient();
    let name = scene.name("guest");
    let host = scene.host();
    let guest = Guest::full(&host, 8 * PAGES);
    let stall = 10 * SOON;
    let stalled = Faults { stall, ..Faults::default() }.with(Fault::Stall, 1000);
    // As it looks whether the name is free, and as it puts packs.
    let puts = Faults { only: Some("PUT".into()), ..stalled.clone() };
    for faults in [stalled.clone(), puts] {
        scene.proxy.as_ref().unwrap().set(faults);
        cancel_at_once(&scene, &guest, guest.snapshot(&name, &background()));
    }
    assert_completed(&guest.wait(guest.snapshot(&name, &background())));
    scene.other_machine();
    let host = scene.host();
    let restored = Guest::new(&host, 8 * PAGES);
    // As it opens the image.
    scene.proxy.as_ref().unwrap().set(stalled.clone());
    cancel_at_once(&scene, &restored, restored.restore(&name, &eager()));
    // As its threads read the memory.
    let job = restored.restore(&name, &slow(eager()));
    restored.reaches(Phase::Restoring);
    scene.proxy.as_ref().unwrap().set(stalled);
    restored.hurry();
    cancel_at_once(&scene, &restored, job);
    // The store is asked for nothing of the cancelled ones any more.
    assert_completed(&restored.restored(&name, &eager()));
    assert!(restored.bytes() == guest.bytes());
}
