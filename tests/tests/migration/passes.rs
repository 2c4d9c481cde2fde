// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The number of passes under a downtime limit of zero.

use super::scene::Scene;
use super::stale_bits::write_under_kvm;
use pageferry_client::{
    Counters, HookError, IncomingOptions, OutgoingOptions, Parameters, Phase, Trackers,
};
use pageferry_protocol::memory::PAGE_SIZE;
use pageferry_tests::deadline::wait_until;
use pageferry_tests::scenario::{At, SOON, assert_same, lock};
use std::time::Duration;

/// Migrates a guest with a downtime limit of zero, the default policy, and no relay.
/// Returns both jobs.
fn start_without_downtime(scene: &Scene) -> (u64, u64) {
    let path = scene.relay.folder.path().join("direct");
    let options = OutgoingOptions { downtime_limit: Duration::ZERO, ..OutgoingOptions::default() };
    let incoming = scene.destination().listen(&path, &IncomingOptions::default());
    let outgoing = scene.source.send(&path, &options);
    (outgoing, incoming)
}

/// A guest that writes a page as often as its tracker is cleared: no pass leaves nothing dirty.
fn never_clean() -> Scene {
    let scene = Scene::new();
    scene.source.client.set_trackers(Trackers::HOOKS).unwrap();
    let busy = scene.source.ram.gpa / PAGE_SIZE + 9;
    write_under_kvm(&scene.source, 9, 9);
    *lock(&scene.source.vmm.on_clear) = Some(Box::new(move |kvm, given| {
        kvm.dirty.retain(|page| !given.contains(page));
        kvm.dirty.insert(busy);
    }));
    scene
}

#[test]
fn an_idle_guest_moves_under_a_downtime_limit_of_zero() {
    let scene = Scene::new();
    let (outgoing, incoming) = start_without_downtime(&scene);
    let status = scene.source.wait(outgoing);
    assert_eq!(status.phase, Phase::Completed, "{}", status.error_text());
    assert_eq!(status.counters.passes, 2, "one while the guest ran, one while it was paused");
    assert_eq!(scene.destination().wait(incoming).phase, Phase::Completed);
    assert_same(&scene.source.ram, &scene.destination().ram);
}

#[test]
fn passes_under_a_limit_of_zero_are_no_busy_loop() {
    let scene = never_clean();
    let (outgoing, incoming) = start_without_downtime(&scene);
    let mut counters = Counters::default();
    wait_until("passes", SOON, || {
        counters = scene.source.client.status().unwrap().counters;
        counters.passes >= 34
    })
    .unwrap();
    // The first 30 follow each other at once, the others 100 ms apart.
    let most = 31 + counters.total_us / 100_000;
    assert!(counters.passes <= most, "{} passes in {} us", counters.passes, counters.total_us);
    let downtime_limit = Some(Duration::from_secs(3600));
    let reached = Parameters { downtime_limit, ..Parameters::default() };
    scene.source.client.set_parameters(&reached).unwrap();
    let status = scene.source.wait(outgoing);
    assert_eq!(status.phase, Phase::Completed, "{}", status.error_text());
    assert_eq!(scene.destination().wait(incoming).phase, Phase::Completed);
    assert_same(&scene.source.ram, &scene.destination().ram);
}

#[test]
fn an_operator_throttles_the_guest_while_it_moves() {
    let scene = never_clean();
    let (outgoing, _) = start_without_downtime(&scene);
    let client = &scene.source.client;
    for percent in [40, 0, 99] {
        let throttle = Parameters { throttle: Some(percent), ..Parameters::default() };
        client.set_parameters(&throttle).unwrap();
        wait_until("the throttle", SOON, || lock(&scene.source.vmm.asked).throttle == percent)
            .unwrap();
        wait_until("its counter", SOON, || {
            client.status().unwrap().counters.throttle_percent == u64::from(percent)
        })
        .unwrap();
    }
    let downtime_limit = Some(Duration::from_secs(3600));
    client.set_parameters(&Parameters { downtime_limit, ..Parameters::default() }).unwrap();
    assert_eq!(scene.source.wait(outgoing).phase, Phase::Completed);
    assert_eq!(lock(&scene.source.vmm.asked).throttle, 0, "the throttle ends with the job");
}

/// The operator learns it while the job runs, and from its end.
#[test]
fn a_vmm_that_cannot_throttle_says_so_in_the_status() {
    let scene = never_clean();
    let cannot = || Err(HookError::new("there is no such knob"));
    scene.source.vmm.on(At::Throttle, cannot);
    let (outgoing, _) = start_without_downtime(&scene);
    let client = &scene.source.client;
    let throttle = Parameters { throttle: Some(40), ..Parameters::default() };
    client.set_parameters(&throttle).unwrap();
    let named = "the guest is not throttled, since its VMM cannot: there is no such knob";
    wait_until("the reason", SOON, || client.status().unwrap().error_text() == named).unwrap();
    assert_eq!(client.status().unwrap().counters.throttle_percent, 0);
    let downtime_limit = Some(Duration::from_secs(3600));
    client.set_parameters(&Parameters { downtime_limit, ..Parameters::default() }).unwrap();
    let ended = scene.source.wait(outgoing);
    assert_eq!((ended.phase, ended.error_text()), (Phase::Completed, named));
}
