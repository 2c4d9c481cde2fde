// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A cancel by the user at any moment before the commit point.

use super::scene::MOMENTS;
use crate::scene::Scene;
use pageferry_client::Phase;
use pageferry_tests::scenario::{Wire, migrates_next_time, passes};

#[test]
fn a_cancel_before_the_commit_leaves_the_guest_running() {
    for (moment, is_there) in MOMENTS {
        eprintln!("cancelled {moment}");
        let mut scene = Scene::started(Wire::Unix, &passes(2));
        let record = scene.relay.until(is_there);
        scene.source.client.cancel().unwrap();
        scene.relay.pass(record);
        let status = scene.end();
        assert_eq!(status.phase, Phase::Cancelled, "{}", status.error_text());
        assert!(!scene.source.vmm.is_paused());
        migrates_next_time(&scene.source);
    }
}
