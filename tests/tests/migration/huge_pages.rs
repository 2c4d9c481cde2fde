// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Guests whose memory is in huge pages, and mapped by entries for 2 MiB, while their writes are
//! found by write-protect scanning.

use super::scene::Scene;
use pageferry_client::{OutgoingOptions, Trackers};
use pageferry_protocol::memory::PAGE_SIZE;
use pageferry_tests::huge_pages::HUGE_PAGE;
use pageferry_tests::require;
use pageferry_tests::scenario::{At, Ram, Side, Wire, assert_same};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

const HUGE: u64 = HUGE_PAGE / PAGE_SIZE;

/// A scene whose source has this memory. Its guest has written to each huge page.
fn scene(first: u64, pages: u64) -> Option<Scene> {
    if !require::uffd() {
        return None;
    }
    let ram = Ram::huge(first, pages)?;
    (0..pages).step_by(HUGE as usize).for_each(|page| ram.store(page, 1000 + page));
    let source = Side::new(ram);
    source.client.set_trackers(Trackers::WRITE_PROTECT).unwrap();
    let destination = Side::new(Ram::new(3, Ram::ODD_GPA, pages, first * PAGE_SIZE));
    Some(Scene::between(Wire::Unix, source, destination))
}

/// What a guest writes during the first pass is sent again, and not all of its huge pages.
#[test]
fn single_writes_send_single_pages() {
    // The second block begins and ends in the middle of a huge page.
    for (first, pages) in [(0, 8 * HUGE), (HUGE / 2 + 5, 7 * HUGE)] {
        let Some(mut scene) = scene(first, pages) else { return };
        scene.start(&OutgoingOptions::default());
        scene.after_pass(0, |source| {
            for page in (0..pages).step_by(HUGE as usize / 2) {
                source.ram.store(page, 7_000_000 + page);
            }
        });
        let status = scene.finish();
        assert_same(&scene.source.ram, &scene.destination().ram);
        assert_eq!(status.counters.pages_sent, pages + pages / (HUGE / 2), "{:?}", status.counters);
    }
}

/// The guest touches memory for the first time while it moves. Where the kernel maps a whole huge
/// page then (Linux 6.18 does not), the first report finds it, and the second one splits it.
#[test]
fn memory_that_is_touched_later_is_sent_by_page_in_the_end() {
    let pages = 6 * HUGE;
    if !require::uffd() {
        return;
    }
    let Some(ram) = Ram::huge(0, pages) else { return };
    let source = Side::new(ram);
    source.client.set_trackers(Trackers::WRITE_PROTECT).unwrap();
    let destination = Side::new(Ram::new(3, Ram::ODD_GPA, pages, 0));
    let mut scene = Scene::between(Wire::Unix, source, destination);
    // So that there are more passes than two.
    let downtime_limit = Duration::ZERO;
    scene.start(&OutgoingOptions { downtime_limit, ..OutgoingOptions::default() });
    for pass in 0..3 {
        scene.after_pass(pass, |source| source.ram.store(HUGE + pass, 7_000_000 + pass));
    }
    let status = scene.finish();
    assert_same(&scene.source.ram, &scene.destination().ram);
    let sent = status.counters.pages_sent - pages;
    assert!(sent == 3 || sent == 2 * HUGE + 1, "{:?}", status.counters);
}

/// No write is lost, whether it comes before, between or after the steps that split a huge page.
#[test]
fn a_guest_that_writes_all_the_time_arrives_as_it_is() {
    for first in [0, 300] {
        let pages = 5 * HUGE;
        let Some(mut scene) = scene(first, pages) else { return };
        let (ram, ends) = (scene.source.ram.clone(), Arc::new(AtomicBool::new(false)));
        let guest = std::thread::spawn({
            let ends = ends.clone();
            move || {
                let mut written = 0u64;
                while !ends.load(Ordering::Relaxed) {
                    // All pages, in an order that visits all huge pages again and again.
                    let page = written.wrapping_mul(331) % pages;
                    ram.store(page, 9_000_000 + written);
                    written += 1;
                }
            }
        });
        let mut guest = Some(guest);
        scene.source.vmm.on(At::Pause, move || {
            ends.store(true, Ordering::Relaxed);
            guest.take().map(JoinHandle::join);
            Ok(())
        });
        scene.start(&OutgoingOptions { max_passes: 6, ..OutgoingOptions::default() });
        scene.finish();
        assert_same(&scene.source.ram, &scene.destination().ram);
    }
}
