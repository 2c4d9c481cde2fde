// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A peer that dies, and connections that break.

use super::scene::{MOMENTS, at_every_moment};
use crate::scene::Scene;
use pageferry_client::{OutgoingOptions, Phase};
use pageferry_protocol::stream::Kind;
use pageferry_tests::scenario::{WIRES, migrates_next_time, passes};

#[test]
fn a_dead_destination_leaves_the_guest_able_to_migrate() {
    at_every_moment("destination dies", |wire, (_, is_there)| {
        let mut scene = Scene::started(wire, &passes(2));
        let _record = scene.relay.until(is_there);
        scene.source.write(7, 77);
        scene.kill_destination();
        scene.assert_source_failed();
        scene.source.write(8, 88);
        migrates_next_time(&scene.source);
    });
}

#[test]
fn a_link_cut_within_a_record_fails_both_sides() {
    at_every_moment("cut", |wire, (moment, is_there)| {
        let mut scene = Scene::started(wire, &passes(2));
        let record = scene.relay.until(is_there);
        // In the middle of the record.
        let part = record.bytes().len() / 2;
        scene.relay.cut_in(&record, part);
        scene.assert_source_failed();
        if moment == MOMENTS[0].0 {
            // A connection without a hello does not end the job: the destination waits for another
            // one.
            assert_eq!(scene.destination().client.status().unwrap().phase, Phase::Connecting);
            scene.destination().client.cancel().unwrap();
            assert_eq!(scene.destination().wait(scene.incoming).phase, Phase::Cancelled);
        } else {
            scene.assert_destination_failed();
        }
        scene.assert_both_migrate_next_time();
    });
}

#[test]
fn one_cut_stream_of_several_fails_both_sides() {
    for wire in WIRES {
        for (pass, part) in [(0, 0), (0, 16), (1, 0), (1, 16), (2, 0), (2, 16)] {
            let mut scene = Scene::started(wire, &OutgoingOptions { streams: 4, ..passes(2) });
            // The second stream to end the pass. One has ended it before, and the others have not.
            let mut ended = 0;
            let record = scene.relay.until(|record| {
                ended += u32::from(record.is(Kind::PassEnd, pass));
                ended == 2
            });
            scene.relay.cut_one(&record, part);
            let status = scene.end();
            assert_eq!(status.phase, Phase::Failed, "{}", status.error_text());
            scene.assert_source_failed();
            scene.assert_destination_failed();
            scene.assert_both_migrate_next_time();
        }
    }
}
