// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Processes that are killed while they use a store.

use super::scene::Scene;
use pageferry_client::Phase;
use pageferry_tests::deadline::wait_for;
use pageferry_tests::random::Random;
use pageferry_tests::require;
use pageferry_tests::scenario::SOON;
use pageferry_tests::scenario::image_guest::{
    Guest, PAGES, assert_completed, background, eager, lazy, slow,
};
use pageferry_tests::stores::StoreKind;
use pageferry_tests::stores::faults::Faults;
use std::time::Duration;

#[test]
fn a_service_that_is_killed_is_replaced() {
    let Some(tools) = require::stores() else { return };
    if !require::uffd() {
        return;
    }
    let mut scene = Scene::served(&tools, StoreKind::S3);
    let name = scene.name("guest");
    let host = scene.host();
    let guest = Guest::full(&host, 4 * PAGES);
    let slowly = Faults { bandwidth: Some(1 << 20), ..Faults::default() };
    scene.proxy.as_ref().unwrap().set(slowly);
    let job = guest.snapshot(&name, &background());
    let puts = || (scene.proxy.as_ref().unwrap().counts().requests("PUT") > 1).then_some(());
    wait_for("the upload to begin", SOON, puts).unwrap();
    scene.kill_service();
    scene.proxy.as_ref().unwrap().set(Faults::default());
    assert_completed(&guest.wait(job));
    drop(host);
    scene.other_machine();
    let host = scene.host();
    let restored = Guest::new(&host, 4 * PAGES);
    let job = restored.restore(&name, &slow(lazy()));
    restored.reaches(Phase::Prefetching);
    scene.kill_service();
    restored.hurry();
    assert_completed(&restored.wait(job));
    assert!(restored.bytes() == guest.bytes());
}

#[test]
fn no_death_of_an_uploader_a_reader_or_a_prune_harms_an_image() {
    let mut scene = Scene::folder();
    let mut random = Random::new(11);
    let name = scene.name("guest");
    let host = scene.host();
    let guest = Guest::full(&host, 2 * PAGES);
    assert_completed(&guest.wait(guest.snapshot(&name, &background())));
    for round in 0..12 {
        scene.other_machine();
        // One that uploads, one that restores, and one that prunes; each dies at some moment.
        let mut uploader = scene.host();
        let source = Guest::full(&uploader, PAGES);
        source.snapshot(&scene.name(&format!("vm/{round}")), &background());
        let mut reader = scene.host();
        let restored = Guest::new(&reader, 2 * PAGES);
        restored.restore(&name, &eager());
        std::thread::sleep(Duration::from_micros(random.below(60_000)));
        match round % 3 {
            0 => uploader.agent.process().kill().unwrap(),
            1 => reader.agent.process().kill().unwrap(),
            _ => scene.kill_service(),
        }
        scene.prune();
        drop((uploader, reader));
        // The cache is good for the next one, whoever died.
        let host = scene.host();
        let again = Guest::new(&host, 2 * PAGES);
        assert_completed(&again.restored(&name, &eager()));
        assert!(again.bytes() == guest.bytes(), "round {round}");
        for listed in scene.listed() {
            let verified = scene.said(&["verify"], listed.as_ref());
            assert_eq!(verified["status"], "good", "{listed}");
        }
    }
}
