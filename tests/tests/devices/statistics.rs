// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the guest says about its memory: it has one buffer for that, which the device keeps until
//! somebody asks.

use pageferry_tests::deadline::wait_until;
use pageferry_tests::front_end::{BalloonDriver, DeviceHost, PATIENCE};

use serde_json::Value;

/// `VIRTIO_BALLOON_S_MEMFREE`.
const FREE: u16 = 4;

/// An operator asks, and the driver answers with `bytes` of free memory.
fn asked(host: &DeviceHost, balloon: &mut BalloonDriver, bytes: u64) -> Value {
    let asking = host.operator.start("balloon", &["--stats"]).unwrap();
    let queue = balloon.stats_queue();
    balloon.driver.queue(queue).wait_used();
    balloon.send_stats(&[(FREE, bytes)]);
    asking.end().unwrap()
}

fn wait_for_free(host: &DeviceHost, bytes: u64) {
    let mut last = Vec::new();
    let is_here = || {
        last = host.balloon_now().stats;
        last == [(FREE, bytes)]
    };
    wait_until("statistics", PATIENCE, is_here).unwrap_or_else(|error| panic!("{error}: {last:?}"));
}

#[test]
fn every_question_is_answered_by_the_driver() {
    let host = DeviceHost::ram(512);
    let mut balloon = host.balloon();
    balloon.send_stats(&[(FREE, 1000)]);
    wait_for_free(&host, 1000);
    for bytes in [2000, 3000] {
        assert_eq!(asked(&host, &mut balloon, bytes)["stats"]["free_memory"], bytes);
    }
    let queue = balloon.stats_queue();
    assert!(balloon.driver.queue(queue).used().is_none(), "nobody has asked");
}

#[test]
fn statistics_are_there_after_the_vm_was_paused() {
    let host = DeviceHost::ram(512);
    let mut balloon = host.balloon();
    balloon.send_stats(&[(FREE, 1000)]);
    wait_for_free(&host, 1000);
    let bases = balloon.driver.stop();
    let queue = balloon.stats_queue();
    balloon.driver.start_again(&bases);
    // The driver has no buffer, so either the device has it still, or it has returned it.
    if let Some(used) = balloon.driver.queue(queue).used() {
        panic!("returned {used:?}, and nobody has asked");
    }
    assert_eq!(asked(&host, &mut balloon, 2000)["stats"]["free_memory"], 2000);
    assert_eq!(asked(&host, &mut balloon, 3000)["stats"]["free_memory"], 3000);
}

#[test]
fn second_buffer_is_not_lost() {
    let host = DeviceHost::ram(512);
    let mut balloon = host.balloon();
    let first = balloon.send_stats(&[(FREE, 1000)]);
    wait_for_free(&host, 1000);
    let second = balloon.send_stats(&[(FREE, 2000)]);
    wait_for_free(&host, 2000);
    let queue = balloon.stats_queue();
    let returned = balloon.driver.queue(queue).wait_used().head;
    assert!(returned == first || returned == second);
    // The other one is for the next question.
    let asking = host.operator.start("balloon", &["--stats"]).unwrap();
    let other = balloon.driver.queue(queue).wait_used().head;
    assert_eq!(returned ^ other, first ^ second);
    balloon.send_stats(&[(FREE, 3000)]);
    assert_eq!(asking.end().unwrap()["stats"]["free_memory"], 3000);
}

#[test]
fn silent_driver_delays_an_operator_only_a_little() {
    let host = DeviceHost::ram(512);
    let mut balloon = host.balloon();
    balloon.send_stats(&[(FREE, 1000)]);
    wait_for_free(&host, 1000);
    let old = host.balloon_status(&["--stats"]);
    assert_eq!(old["stats"]["free_memory"], 1000, "the last ones: {old}");
}

#[test]
fn reset_driver_has_no_statistics_and_begins_anew() {
    let host = DeviceHost::ram(512);
    let mut balloon = host.balloon();
    balloon.send_stats(&[(FREE, 1000)]);
    wait_for_free(&host, 1000);
    balloon.driver.reset();
    assert_eq!(host.balloon_status(&["--stats"])["stats"].get("free_memory"), None);
    balloon.send_stats(&[(FREE, 2000)]);
    wait_for_free(&host, 2000);
    assert_eq!(asked(&host, &mut balloon, 3000)["stats"]["free_memory"], 3000);
}
