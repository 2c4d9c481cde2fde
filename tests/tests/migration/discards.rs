//! What discards do at every moment of a migration, and what dirty bits older than a discard do not
//! do.

use pageferry_client::{
    BlockRange, Counters, IncomingOptions, JobStatus, OutgoingOptions, Phase, Punch, Trackers,
};
use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use pageferry_protocol::stream::Kind;
use pageferry_protocol::stream::record::FLAG_STRAY;
use pageferry_tests::deadline::wait_until;
use pageferry_tests::scenario::{Passing, Ram, Relay, SOON, Side, assert_same, lock, passes};
use std::sync::{Arc, Mutex};
use std::time::Duration;

const PAGES: u64 = 200;

/// A source whose page `n` holds the stamp `1000 + n`, a destination, and what stands between them.
struct Scene {
    relay: Relay,
    source: Side,
    destination: Side,
    jobs: Option<(u64, u64)>,
}

impl Scene {
    fn new() -> Self {
        let scene = Self::empty(PAGES);
        for page in 0..PAGES {
            scene.source.ram.write(page, 1000 + page);
        }
        scene
    }

    /// Nothing is allocated.
    fn empty(pages: u64) -> Self {
        let (source, destination) = (Side::new(Ram::odd(pages)), Side::new(Ram::odd(pages)));
        Self { relay: Relay::new(), source, destination, jobs: None }
    }

    fn start(&mut self, options: &OutgoingOptions) {
        let incoming = self.relay.listen(&self.destination.client, &IncomingOptions::default());
        let outgoing = self.relay.send(&self.source.client, options);
        self.jobs = Some((outgoing, incoming));
    }

    /// Runs until `pass` has arrived at the destination and the source does not know yet; then does
    /// `what`.
    fn after_pass(&mut self, pass: u64, what: impl FnOnce(&Side)) {
        let record = self.relay.until(|record| record.is(Kind::PassDone, pass));
        what(&self.source);
        self.relay.pass(record);
    }

    /// The migration succeeds; returns how the source's job ended.
    fn finish(&mut self) -> JobStatus {
        let (outgoing, incoming) = self.jobs.unwrap();
        let status = self.relay.finish(&self.source.client, outgoing);
        assert_eq!(status.phase, Phase::Completed, "{}", status.error);
        let there = self.destination.wait(incoming);
        assert_eq!(there.phase, Phase::Completed, "{}", there.error);
        status
    }

    fn discard(&self, first: u64, count: u64, punch: Punch) {
        discard(&self.source, first, count, punch);
    }

    fn carried(&self, page: u64) -> Vec<&Passing> {
        self.relay.seen.iter().filter(|record| record.carries(page)).collect()
    }

    /// The page is a discarded hole at the destination.
    #[track_caller]
    fn assert_discarded(&self, pages: std::ops::Range<u64>) {
        let bitmap = self.destination.client.discarded(self.destination.ram.id).unwrap();
        for page in pages {
            assert!(bitmap.contains(page), "page {page} is not discarded at the destination");
            assert!(
                self.destination.ram.is_hole(page),
                "page {page} is no hole at the destination"
            );
        }
    }

    /// The pages hold what they held from the start, and are in use.
    #[track_caller]
    fn assert_untouched(&self, pages: impl Iterator<Item = u64>) {
        let bitmap = self.destination.client.discarded(self.destination.ram.id).unwrap();
        for page in pages {
            assert_eq!(self.destination.ram.stamp(page), 1000 + page, "page {page}");
            assert!(!bitmap.contains(page), "page {page} is discarded at the destination");
        }
    }
}

fn discard(side: &Side, first: u64, count: u64, punch: Punch) {
    side.client.discard(&[side.ram.range(first, count)], punch).unwrap();
}

fn populate(side: &Side, first: u64, count: u64) {
    side.client.populate(&[side.ram.range(first, count)]).unwrap();
}

/// True if the payload of the record has this stamp at the start of a page.
fn has_stamp(record: &Passing, stamp: u64) -> bool {
    record.kind == Kind::Data
        && record.payload.chunks(PAGE_SIZE as usize).any(|page| page[..8] == stamp.to_le_bytes())
}

#[test]
fn a_discard_of_a_page_that_was_sent_leaves_a_hole() {
    for (punch, pass) in [(Punch::Yes, 0), (Punch::No, 0), (Punch::Yes, 1), (Punch::No, 1)] {
        let mut scene = Scene::new();
        scene.start(&passes(2));
        scene.after_pass(pass, |source| discard(source, 30, 70, punch));
        let status = scene.finish();
        assert_eq!(scene.carried(30).len(), 1, "sent in pass 0");
        scene.assert_discarded(30..100);
        scene.assert_untouched((0..30).chain(100..PAGES));
        assert_eq!(status.counters.discarded_pages, 70);
        assert_eq!(status.counters.stray_pages, 0);
    }
}

#[test]
fn discarded_populated_and_written_again_arrives_with_what_was_written_last() {
    let mut scene = Scene::new();
    scene.discard(10, 5, Punch::Yes);
    scene.start(&passes(3));
    scene.after_pass(0, |source| {
        populate(source, 10, 5);
        source.write(11, 1);
        discard(source, 20, 5, Punch::Yes);
        discard(source, 40, 5, Punch::No);
    });
    scene.after_pass(1, |source| {
        populate(source, 20, 5);
        source.write(21, 2);
        populate(source, 40, 5);
        source.write(41, 3);
    });
    scene.finish();
    let there = &scene.destination.ram;
    assert_same(&scene.source.ram, there);
    assert_eq!((there.stamp(11), there.stamp(21), there.stamp(41)), (1, 2, 3));
    assert_eq!((there.stamp(10), there.stamp(20)), (0, 0), "what was punched reads as zero");
    scene.assert_untouched((0..10).chain(50..PAGES));
    let bitmap = scene.destination.client.discarded(there.id).unwrap();
    assert_eq!(bitmap.count(bitmap.all()), 0);
}

#[test]
fn all_within_one_pass_arrives_with_what_was_written_last() {
    let mut scene = Scene::new();
    scene.start(&passes(1));
    scene.after_pass(0, |source| {
        discard(source, 10, 5, Punch::Yes);
        populate(source, 10, 5);
        source.write(12, 77);
    });
    scene.finish();
    assert_same(&scene.source.ram, &scene.destination.ram);
    assert_eq!(scene.destination.ram.stamp(12), 77);
    assert_eq!(scene.destination.ram.stamp(11), 0);
}

#[test]
fn a_stray_write_is_sent_counted_and_flagged_and_its_page_stays_discarded() {
    let mut scene = Scene::new();
    scene.discard(60, 20, Punch::Yes);
    scene.start(&passes(2));
    scene.after_pass(0, |source| {
        for page in [61, 62, 79] {
            source.write(page, 5000 + page);
        }
    });
    let status = scene.finish();
    assert_eq!(status.counters.stray_pages, 3);
    let there = &scene.destination;
    assert_eq!(there.client.status().unwrap().counters.stray_pages, 3);
    let bitmap = there.client.discarded(there.ram.id).unwrap();
    for page in [61, 62, 79] {
        assert_eq!(there.ram.stamp(page), 5000 + page);
        assert!(bitmap.contains(page), "a stray page stays discarded");
        let carried = scene.carried(page);
        assert_eq!(carried.len(), 1);
        assert_eq!(carried[0].header.flags(), FLAG_STRAY);
    }
    scene.assert_discarded(63..79);
    scene.assert_untouched((0..60).chain(80..PAGES));
    let flagged = scene.relay.seen.iter().filter(|record| record.header.flags() & FLAG_STRAY != 0);
    assert_eq!(flagged.map(|record| record.header.range().count).sum::<u64>(), 3);
}

#[test]
fn a_stray_page_that_the_vmm_punched_by_itself_becomes_a_hole_at_the_destination_too() {
    // Behind so many zero pages the source asks for the next data instead of reading on.
    const STRAY: u64 = 64 * 9 + 17;
    for zeros_before in [0, 64 * 8] {
        let mut scene = Scene::empty(64 * 10);
        scene.discard(STRAY, 2, Punch::Yes);
        scene.start(&passes(3));
        scene.after_pass(0, |source| source.write(STRAY, 4711));
        scene.after_pass(1, |source| {
            source.ram.punch(STRAY, 1);
            let log_page = |page| source.ram.gpa / PAGE_SIZE + page;
            source.client.log().mark(PageRange::new(log_page(0), zeros_before));
            source.client.log().mark(PageRange::new(log_page(STRAY), 1));
        });
        let status = scene.finish();
        let carried: Vec<_> = scene
            .carried(STRAY)
            .iter()
            .map(|record| (record.kind, record.header.flags()))
            .collect();
        assert_eq!(carried, [(Kind::Data, FLAG_STRAY), (Kind::Zero, FLAG_STRAY)]);
        scene.assert_discarded(STRAY..STRAY + 2);
        assert_eq!(status.counters.stray_pages, 2);
        assert_eq!(scene.destination.client.status().unwrap().counters.stray_pages, 2);
        assert_same(&scene.source.ram, &scene.destination.ram);
    }
}

#[test]
fn a_discard_at_an_offset_rounds_inward_and_the_pages_it_covers_in_part_migrate() {
    let mut scene = Scene::new();
    let id = scene.source.ram.id;
    // From the middle of page 50 to the middle of page 90.
    let ragged = BlockRange { block: id, offset: 50 * PAGE_SIZE + 1234, length: 40 * PAGE_SIZE };
    assert_eq!(scene.source.client.discard(&[ragged], Punch::Yes).unwrap(), 39);
    scene.start(&passes(2));
    // From the start of page 120 to one byte before the end of page 129; and less than a page.
    let ends_early = BlockRange { block: id, offset: 120 * PAGE_SIZE, length: 10 * PAGE_SIZE - 1 };
    let tiny = BlockRange { block: id, offset: 140 * PAGE_SIZE + 1, length: PAGE_SIZE };
    scene.after_pass(0, |source| {
        assert_eq!(source.client.discard(&[ends_early, tiny], Punch::Yes).unwrap(), 9)
    });
    let status = scene.finish();
    scene.assert_discarded(51..90);
    scene.assert_discarded(120..129);
    scene.assert_untouched((0..51).chain(90..120).chain(129..PAGES));
    assert_eq!(status.counters.discarded_pages, 39 + 9);
    assert!(
        (51..90).all(|page| scene.carried(page).is_empty()),
        "a page discarded before the start is never sent"
    );
}

#[test]
fn dirty_bits_older_than_the_start_do_not_bring_discarded_pages_back() {
    const STALE: u64 = 0xdead_0000_beef;
    let mut scene = Scene::new();
    for page in 80..120 {
        scene.source.write(page, STALE);
    }
    scene.discard(80, 20, Punch::No);
    scene.discard(100, 20, Punch::Yes);
    // Written behind the tracker's back by nobody: the bits of the log are all older than the
    // discards.
    scene.start(&passes(3));
    scene.after_pass(0, |_| {});
    scene.after_pass(1, |_| {});
    let status = scene.finish();
    assert!(
        !scene.relay.seen.iter().any(|record| has_stamp(record, STALE)),
        "stale content was sent"
    );
    assert!((80..120).all(|page| scene.carried(page).is_empty()));
    scene.assert_discarded(80..120);
    scene.assert_untouched((0..80).chain(120..PAGES));
    assert_eq!(status.counters.stray_pages, 0);
    assert!(
        (80..100).all(|page| scene.source.ram.stamp(page) == STALE),
        "the source's pages were not touched"
    );
}

#[test]
fn dirty_bits_older_than_a_discard_during_the_migration_do_not_bring_its_pages_back() {
    const STALE: u64 = 0xdead_0000_beef;
    let mut scene = Scene::new();
    scene.start(&passes(3));
    scene.after_pass(0, |source| {
        for page in 80..120 {
            source.write(page, STALE);
        }
        discard(source, 80, 20, Punch::No);
        discard(source, 100, 20, Punch::Yes);
    });
    let status = scene.finish();
    assert!(
        !scene.relay.seen.iter().any(|record| has_stamp(record, STALE)),
        "stale content was sent"
    );
    scene.assert_discarded(80..120);
    scene.assert_untouched((0..80).chain(120..PAGES));
    assert_eq!(status.counters.stray_pages, 0);
}

/// The guest writes under KVM: the page is dirty in the VMM's tracker, and nowhere else.
fn write_under_kvm(side: &Side, page: u64, stamp: u64) {
    let mut kvm = lock(&side.vmm.kvm);
    side.ram.write(page, stamp);
    kvm.dirty.insert(side.ram.gpa / PAGE_SIZE + page);
}

#[test]
fn stale_bits_in_kvms_log_do_not_bring_discarded_pages_back() {
    const STALE: u64 = 0xdead_0000_beef;
    let mut scene = Scene::new();
    scene.source.client.set_trackers(Trackers::HOOKS).unwrap();
    for page in 0..PAGES {
        write_under_kvm(
            &scene.source,
            page,
            if (70..130).contains(&page) { STALE } else { 1000 + page },
        );
    }
    scene.discard(70, 30, Punch::No);
    scene.discard(100, 30, Punch::Yes);
    scene.start(&passes(3));
    scene.after_pass(0, |source| {
        // Into the words of the discarded range, on both sides of it.
        write_under_kvm(source, 69, 1069);
        write_under_kvm(source, 130, 1130);
    });
    let status = scene.finish();
    assert!(
        !scene.relay.seen.iter().any(|record| has_stamp(record, STALE)),
        "stale content was sent"
    );
    assert!((70..130).all(|page| scene.carried(page).is_empty()));
    scene.assert_discarded(70..130);
    scene.assert_untouched((0..70).chain(130..PAGES));
    assert_eq!(status.counters.stray_pages, 0);
}

#[test]
fn a_clear_that_straddles_a_discarded_range_loses_no_write_of_its_neighbours() {
    let mut scene = Scene::new();
    scene.source.client.set_trackers(Trackers::HOOKS).unwrap();
    let (ram, first) = (scene.source.ram.clone(), scene.source.ram.gpa / PAGE_SIZE);
    let clears = Arc::new(Mutex::new(0u64));
    let (counted, vmm) = (clears.clone(), Arc::downgrade(&scene.source.vmm));
    *lock(&scene.source.vmm.on_clear) = Some(Box::new(move |kvm, given| {
        let mut count = lock(&counted);
        *count += 1;
        let runs = vmm.upgrade().is_some_and(|vmm| !vmm.is_paused());
        // Right before the clear takes hold, and right after, both neighbours of the discarded
        // range are written, and more.
        let write = |page: u64, stamp: u64, kvm: &mut pageferry_tests::scenario::KvmLog| {
            ram.write(page, stamp);
            kvm.dirty.insert(first + page);
        };
        if runs {
            for page in [69, 130, 10] {
                write(page, 10_000 * *count + page, kvm);
            }
        }
        kvm.dirty.retain(|page| !given.contains(page));
        if runs {
            for page in [68, 131, 11, 69 + *count % 2 * 61] {
                write(page, 20_000 * *count + page, kvm);
            }
        }
    }));
    for page in 0..PAGES {
        write_under_kvm(&scene.source, page, 1000 + page);
    }
    scene.discard(70, 60, Punch::Yes);
    scene.start(&passes(6));
    for pass in 0..6 {
        scene.after_pass(pass, |source| {
            write_under_kvm(source, 64, 500 + pass);
            write_under_kvm(source, 127 + 5, 600 + pass);
            populate(source, 90 + pass, 1);
            write_under_kvm(source, 90 + pass, 700 + pass);
        });
    }
    scene.finish();
    assert!(*lock(&clears) > 6, "chunks were cleared");
    assert_same(&scene.source.ram, &scene.destination.ram);
    scene.assert_discarded(70..90);
    scene.assert_discarded(96..130);
    assert_eq!(scene.destination.ram.stamp(95), 705);
}

/// Moves a guest under a downtime limit of zero, with the default policy, and without a relay.
fn start_without_downtime(scene: &Scene) -> (OutgoingOptions, u64, u64) {
    let path = scene.relay.folder.path().join("direct");
    let options = OutgoingOptions { downtime_limit: Duration::ZERO, ..OutgoingOptions::default() };
    let incoming = scene.destination.listen(&path, &IncomingOptions::default());
    let outgoing = scene.source.send(&path, &options);
    (options, outgoing, incoming)
}

#[test]
fn an_idle_guest_moves_under_a_downtime_limit_of_zero() {
    let scene = Scene::new();
    let (_, outgoing, incoming) = start_without_downtime(&scene);
    let status = scene.source.wait(outgoing);
    assert_eq!(status.phase, Phase::Completed, "{}", status.error);
    assert_eq!(status.counters.passes, 2, "one while it ran, one while it was paused");
    assert_eq!(scene.destination.wait(incoming).phase, Phase::Completed);
    assert_same(&scene.source.ram, &scene.destination.ram);
}

#[test]
fn passes_that_a_limit_of_zero_keeps_going_are_no_busy_loop() {
    let scene = Scene::new();
    scene.source.client.set_trackers(Trackers::HOOKS).unwrap();
    let busy = scene.source.ram.gpa / PAGE_SIZE + 9;
    write_under_kvm(&scene.source, 9, 9);
    *lock(&scene.source.vmm.on_clear) = Some(Box::new(move |kvm, given| {
        kvm.dirty.retain(|page| !given.contains(page));
        kvm.dirty.insert(busy);
    }));
    let (options, outgoing, incoming) = start_without_downtime(&scene);
    let mut counters = Counters::default();
    wait_until("passes", SOON, || {
        counters = scene.source.client.status().unwrap().counters;
        counters.passes >= 34
    })
    .unwrap();
    // The first 30 follow each other at once, the others 100 ms apart.
    let most = 31 + counters.total_us / 100_000;
    assert!(counters.passes <= most, "{} passes in {} us", counters.passes, counters.total_us);
    let reached = OutgoingOptions { downtime_limit: Duration::from_secs(3600), ..options };
    scene.source.client.set_parameters(&reached).unwrap();
    let status = scene.source.wait(outgoing);
    assert_eq!(status.phase, Phase::Completed, "{}", status.error);
    assert_eq!(scene.destination.wait(incoming).phase, Phase::Completed);
    assert_same(&scene.source.ram, &scene.destination.ram);
}

fn free(side: &Side, first: u64, count: u64) {
    assert_eq!(side.client.free(&[side.ram.range(first, count)]).unwrap(), count);
}

/// What was freed and not written since was never sent, and is a hole there, in use.
#[track_caller]
fn assert_freed(scene: &Scene, pages: std::ops::Range<u64>) {
    let bitmap = scene.destination.client.discarded(scene.destination.ram.id).unwrap();
    for page in pages {
        assert!(
            scene.destination.ram.is_hole(page) && scene.source.ram.is_hole(page),
            "page {page} is no hole"
        );
        assert!(!bitmap.contains(page), "page {page} is discarded at the destination");
    }
}

#[test]
fn what_was_freed_before_the_start_is_never_sent_and_what_was_written_since_arrives() {
    let mut scene = Scene::new();
    free(&scene.source, 30, 70);
    // Without a populate, and without a mark: it was before the start.
    scene.source.ram.write(50, 4711);
    scene.start(&passes(2));
    scene.after_pass(0, |_| {});
    let status = scene.finish();
    assert!((30..100).filter(|page| *page != 50).all(|page| scene.carried(page).is_empty()));
    assert_eq!(scene.destination.ram.stamp(50), 4711);
    assert_freed(&scene, 30..50);
    assert_freed(&scene, 51..100);
    scene.assert_untouched((0..30).chain(100..PAGES));
    let counters = status.counters;
    assert_eq!(
        (counters.zero_pages, counters.freed_pages, counters.discarded_pages, counters.stray_pages),
        (0, 0, 0, 0)
    );
}

#[test]
fn a_free_of_what_was_sent_makes_a_hole_and_what_is_written_into_it_later_arrives() {
    let mut scene = Scene::new();
    scene.start(&passes(4));
    // Dirty before it is freed, and not.
    scene.after_pass(0, |source| {
        (30..60).for_each(|page| source.write(page, 1));
        free(source, 30, 70);
        // In the same pass, and again.
        source.write(90, 2);
        free(source, 90, 1);
        source.write(91, 3);
    });
    scene.after_pass(1, |source| {
        source.write(40, 5);
        free(source, 40, 1);
        free(source, 41, 1);
        source.write(41, 6);
    });
    scene.after_pass(2, |source| source.write(42, 7));
    let status = scene.finish();
    assert_same(&scene.source.ram, &scene.destination.ram);
    let there = &scene.destination.ram;
    assert_eq!((there.stamp(91), there.stamp(41), there.stamp(42)), (3, 6, 7));
    assert_freed(&scene, 30..41);
    assert_freed(&scene, 43..91);
    scene.assert_untouched((0..30).chain(100..PAGES));
    assert!(
        !scene
            .relay
            .seen
            .iter()
            .any(|record| [1, 2, 5].iter().any(|stale| has_stamp(record, *stale))),
        "stale"
    );
    // 69 after pass 0; 40 once more.
    assert_eq!((status.counters.freed_pages, status.counters.discarded_pages), (69 + 1, 0));
    // Told once each: of the word that 40 is in only that page.
    assert_eq!(
        scene.carried(35).iter().map(|record| record.kind).collect::<Vec<_>>(),
        [Kind::Data, Kind::Zero]
    );
}

#[test]
fn stale_bits_in_kvms_log_do_not_bring_freed_pages_back_and_a_write_after_the_free_is_not_lost() {
    const STALE: u64 = 0xdead_0000_beef;
    let mut scene = Scene::new();
    scene.source.client.set_trackers(Trackers::HOOKS).unwrap();
    scene.start(&passes(4));
    scene.after_pass(0, |source| {
        (70..130).for_each(|page| write_under_kvm(source, page, STALE));
        free(source, 70, 60);
        // KVM's bits are as they were, and say nothing of when.
        write_under_kvm(source, 100, 4711);
    });
    scene.after_pass(1, |source| write_under_kvm(source, 101, 4712));
    scene.after_pass(2, |_| {});
    let status = scene.finish();
    assert!(
        !scene.relay.seen.iter().any(|record| has_stamp(record, STALE)),
        "stale content was sent"
    );
    assert_same(&scene.source.ram, &scene.destination.ram);
    assert_eq!((scene.destination.ram.stamp(100), scene.destination.ram.stamp(101)), (4711, 4712));
    assert_freed(&scene, 70..100);
    assert_freed(&scene, 102..130);
    scene.assert_untouched((0..70).chain(130..PAGES));
    assert_eq!((status.counters.freed_pages, status.counters.stray_pages), (59, 0));
}

#[test]
fn what_is_freed_while_it_is_discarded_stays_discarded() {
    let mut scene = Scene::new();
    scene.discard(60, 20, Punch::No);
    assert_eq!(scene.source.client.free(&[scene.source.ram.range(50, 40)]).unwrap(), 20);
    scene.start(&passes(2));
    scene.after_pass(0, |source| {
        discard(source, 100, 20, Punch::Yes);
        source.write(105, 1);
        assert_eq!(source.client.free(&[source.ram.range(90, 40)]).unwrap(), 20);
    });
    let status = scene.finish();
    scene.assert_discarded(60..80);
    scene.assert_discarded(100..120);
    assert_freed(&scene, 50..60);
    assert_freed(&scene, 80..100);
    assert_freed(&scene, 120..130);
    assert_eq!((status.counters.discarded_pages, status.counters.stray_pages), (40, 0));
}

#[test]
fn what_the_vmm_frees_when_the_last_pass_was_sent_is_a_hole_there_too() {
    let mut scene = Scene::new();
    scene.start(&passes(1));
    // The guest stands still by then.
    scene.after_pass(1, |source| free(source, 30, 70));
    let status = scene.finish();
    assert_freed(&scene, 30..100);
    scene.assert_untouched((0..30).chain(100..PAGES));
    assert_eq!(status.counters.freed_pages, 70);
}
