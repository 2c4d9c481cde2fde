// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A file that shrinks under the agent.

use super::scene::{MOMENTS, stamp};
use crate::scene::{PAGES, Scene, empty};
use pageferry_client::Punch;
use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use pageferry_tests::scenario::{Ram, Side, Wire, migrates_next_time, passes};

#[test]
fn a_truncated_file_fails_the_job_and_not_the_session() {
    for (moment, is_there) in [MOMENTS[0], MOMENTS[5]] {
        eprintln!("truncated {moment}");
        let source = Side::new(Ram::unsealed(PAGES));
        stamp(&source.ram);
        let mut scene = Scene::started_between(Wire::Unix, source, empty(), &passes(2));
        let record = scene.relay.until(is_there);
        let ram = scene.source.ram.clone();
        let whole = ram.fd_offset + PAGES * PAGE_SIZE;
        rustix::fs::ftruncate(&ram.fd, whole - 10 * PAGE_SIZE).unwrap();
        scene.source.client.log().mark(PageRange::new(ram.gpa / PAGE_SIZE + PAGES - 5, 1));
        scene.relay.pass(record);
        let status = scene.end();
        assert!(
            status.error_text().contains("block 3") && status.error_text().contains("truncated"),
            "{}",
            status.error_text()
        );
        scene.assert_source_failed();
        let there = scene.assert_destination_failed();
        assert!(
            there.error_text().contains("truncated"),
            "the destination learns the reason: {}",
            there.error_text()
        );
        // A discard of pages that the file no longer has succeeds, too.
        assert_eq!(scene.source.client.discard(&[ram.range(PAGES - 5, 5)], Punch::Yes).unwrap(), 5);
        rustix::fs::ftruncate(&ram.fd, whole).unwrap();
        migrates_next_time(&scene.source);
    }
}
