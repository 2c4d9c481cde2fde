// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Changed bytes in an image, and images of another length. A restore either fails with an error
//! that names the place, or restores the right memory. It never restores wrong memory.

use pageferry_agent::image::{Chain, Image};
use pageferry_client::{Config, JobStatus, Phase, Punch, RestoreMode, RestoreOptions};
use pageferry_protocol::image::SectionKind;
use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use pageferry_tests::memory::BlockLayout;
use pageferry_tests::random::Random;
use pageferry_tests::scenario::image_guest::{assert_completed, eager, lazy, restore_modes};
use pageferry_tests::scenario::images::{self, flip, on, paused, tracked};
use pageferry_tests::scenario::{Guest, Host};
use std::fs::File;
use std::path::{Path, PathBuf};

const PAGES: u64 = 1100;
const MORE: u64 = 300;
const EXTENT: u64 = 512;

fn layouts() -> Vec<BlockLayout> {
    let high = BlockLayout {
        id: 7,
        name: "high".into(),
        gpa: 1 << 30,
        ..BlockLayout::ram(MORE * PAGE_SIZE)
    };
    // The blocks are added in another order than that of their addresses.
    vec![high, BlockLayout::ram(PAGES * PAGE_SIZE)]
}

fn guest(host: &Host) -> Guest {
    Guest::of(host, layouts(), Config::default())
}

/// Bytes and discarded pages of each block.
type Content = Vec<(Vec<u8>, Vec<PageRange>)>;

fn content(guest: &Guest) -> Content {
    let of_block = |block: &pageferry_tests::memory::TestBlock| {
        let discarded = guest.client.discarded(block.id()).unwrap();
        (images::bytes_of(block), discarded.runs(discarded.all()).collect())
    };
    guest.memory.blocks().iter().map(of_block).collect()
}

/// Checks that all content that is here is right.
#[track_caller]
fn assert_right_or_missing(guest: &Guest, right: &Content, what: &str) {
    for (block, (right, _)) in guest.memory.blocks().iter().zip(right) {
        images::assert_right_or_missing(block, right, what);
    }
}

/// A guest with zero in every third page, with an extent that was never used, and with some
/// discarded pages, and an increment to its image.
struct Images {
    host: Host,
    whole: PathBuf,
    increment: PathBuf,
    right: [Content; 2],
}

impl Images {
    fn new() -> Self {
        let host = Host::start();
        let guest = guest(&host);
        for block in guest.memory.blocks() {
            let used = (0..block.pages()).filter(|page| !(EXTENT..2 * EXTENT).contains(page));
            for page in used.filter(|page| page % 3 != 0) {
                block.fill(PageRange::new(page, 1), u64::from(block.id())).unwrap();
            }
        }
        guest.client.discard(&[guest.range(100, 50)], Punch::Yes).unwrap();
        guest.saved(&host, "whole", &tracked(paused()));
        let whole = host.images.path("whole");
        let before = content(&guest);
        // Only pages that are not discarded.
        for page in (0..MORE).step_by(7).filter(|page| !(100..150).contains(page)) {
            guest.fill(page..page + 1, 5);
        }
        guest.saved(&host, "increment", &on(&whole, paused()));
        let right = [before, content(&guest)];
        let increment = host.images.path("increment");
        Self { host, whole, increment, right }
    }
}

/// The effect of a changed byte.
#[derive(Debug, PartialEq, Eq)]
enum Expected {
    /// The byte is not read.
    Nothing,
    /// The change is found before any memory is touched.
    Refused(String),
    /// The change is found when a page is placed.
    Found(String),
}

/// The effect of a change of byte `at` of `image`, layer `layer` of `chain`, on a restore from
/// `chain`.
fn expected(chain: &Chain, layer: usize, at: u64) -> Expected {
    let layer = &chain.layers()[layer];
    let (image, layout) = (&layer.image, layer.image.layout());
    if at < 4096 {
        return Expected::Refused(String::new());
    }
    for kind in SectionKind::ALL {
        let section = image.header().section(kind);
        let range = section.offset..section.offset + section.length;
        if kind != SectionKind::PageSums && range.contains(&at) {
            // Only the state of the newest image is read.
            if kind == SectionKind::VmmState && !std::ptr::eq(image, chain.newest()) {
                return Expected::Nothing;
            }
            return Expected::Refused(format!(
                "section {}, bytes {:#x}",
                kind.name(),
                section.offset
            ));
        }
    }
    for (index, block) in chain.table().blocks().iter().enumerate() {
        let (id, pages) = (block.id, &layer.pages[index]);
        for extent in 0..layout.extents(index) {
            let first = extent * EXTENT;
            let sums = layout.page_sum(index, first);
            if (sums..sums + 4 * EXTENT).contains(&at) {
                let read = pages.next_set(PageRange::new(first, EXTENT)).is_some();
                let found =
                    format!("block {id}: checksums of pages {first:#x} + 0x200, at byte {sums:#x}");
                return if read { Expected::Found(found) } else { Expected::Nothing };
            }
        }
        let start = layout.page(index, 0);
        if (start..start + block.length).contains(&at) {
            let page = (at - start) / PAGE_SIZE;
            let found = format!(
                "block {id}: page {page:#x}, at byte {:#x}: checksum",
                layout.page(index, page)
            );
            return if pages.contains(page) { Expected::Found(found) } else { Expected::Nothing };
        }
    }
    Expected::Nothing
}

/// Offsets in each part of an image, and random ones.
fn places(image: &Image, random: &mut Random) -> Vec<u64> {
    let mut places = vec![0, 8, 24, 40, 64, 72, 4092, 4095];
    for kind in SectionKind::ALL {
        let section = image.header().section(kind);
        if section.length > 0 {
            let middle = section.offset + random.below(section.length);
            places.extend([section.offset, middle, section.offset + section.length - 1]);
            // After its end, if the file continues there.
            let after = section.offset + section.length;
            places.extend(
                Some(after)
                    .filter(|after| after % PAGE_SIZE != 0 && *after < image.header().file_length),
            );
        }
    }
    let layout = image.layout();
    for (index, states) in image.states().iter().enumerate() {
        for run in states.present.runs(states.present.all()).step_by(40) {
            places.extend([
                layout.page(index, run.first) + random.below(PAGE_SIZE),
                layout.page_sum(index, run.first),
            ]);
        }
        // Content, a hole, and an extent that was never used.
        places.extend((0..4).map(|_| {
            layout.page(index, random.below(states.present.pages())) + random.below(PAGE_SIZE)
        }));
    }
    places.extend((0..10).map(|_| random.below(image.header().file_length)));
    places
}

struct Restoring<'a> {
    host: &'a Host,
    options: RestoreOptions,
    /// A guest that is used again as long as its memory is not lost.
    guest: Option<Guest>,
}

impl<'a> Restoring<'a> {
    fn new(host: &'a Host, options: RestoreOptions) -> Self {
        Self { host, options, guest: None }
    }

    /// Restores from the image at `path`, after the file `damaged` was changed.
    #[track_caller]
    fn check(
        &mut self, path: &Path, damaged: &Path, expected: &Expected, right: &Content, what: &str,
    ) {
        let lazy = self.options.mode == RestoreMode::Lazy;
        let guest = self.guest.take().unwrap_or_else(|| guest(self.host));
        // Memory that must stay as it is if the restore is refused.
        guest.fill(0..20, 77);
        let before = content(&guest);
        let resumes = guest.vmm.resumes();
        let status = guest.restored(path, &self.options);
        let resumed = guest.vmm.resumes() - resumes;
        let named = |status: &JobStatus, place: &str| {
            let file = format!("image {}", damaged.display());
            let good = status.phase == Phase::Failed
                && status.error_text().contains(&file)
                && status.error_text().contains(place);
            assert!(
                good,
                "{what}: {:?}: {}; expected is {place}",
                status.phase,
                status.error_text()
            );
        };
        match expected {
            Expected::Nothing => {
                assert_eq!((status.phase, status.error_text()), (Phase::Completed, ""), "{what}");
                assert!(content(&guest) == *right, "{what}: the memory differs from the image");
                assert_eq!(resumed, 1);
            }
            Expected::Refused(place) => {
                named(&status, place);
                assert_eq!((resumed, guest.losses()), (0, 0), "{what}");
                assert!(content(&guest) == before, "{what}: the memory was touched");
            }
            Expected::Found(place) => {
                named(&status, place);
                assert_eq!((resumed, guest.losses()), if lazy { (1, 1) } else { (0, 0) }, "{what}");
                if lazy {
                    // This guest cannot be used any more.
                    return assert_right_or_missing(&guest, right, what);
                }
                assert!(guest.is_hole(), "{what}");
            }
        }
        self.guest = Some(guest);
    }
}

#[test]
fn a_changed_byte_is_found_or_harmless() {
    let images = Images::new();
    let chain = Chain::open(&images.whole).unwrap();
    let copy = images.host.images.path("copy");
    std::fs::copy(&images.whole, &copy).unwrap();
    for options in restore_modes() {
        let mut random = Random::new(11);
        let mut restoring = Restoring::new(&images.host, options);
        for at in places(chain.newest(), &mut random) {
            let bit = random.below(8);
            flip(&copy, at, 1 << bit);
            let expected = expected(&chain, 0, at);
            let what = format!("byte {at:#x}, bit {bit}");
            restoring.check(&copy, &copy, &expected, &images.right[0], &what);
            flip(&copy, at, 1 << bit);
        }
        restoring.check(
            &copy,
            &copy,
            &Expected::Nothing,
            &images.right[0],
            "the same without damage",
        );
    }
}

#[test]
fn a_changed_byte_in_a_base_is_found_or_harmless() {
    let images = Images::new();
    let chain = Chain::open(&images.increment).unwrap();
    for options in restore_modes() {
        for (layer, path) in [(0, &images.increment), (1, &images.whole)] {
            let mut random = Random::new(12);
            let mut restoring = Restoring::new(&images.host, options.clone());
            for at in places(&chain.layers()[layer].image, &mut random).into_iter().step_by(2) {
                let bit = random.below(8);
                flip(path, at, 1 << bit);
                let what = format!("layer {layer}, byte {at:#x}, bit {bit}");
                let expected = expected(&chain, layer, at);
                restoring.check(&images.increment, path, &expected, &images.right[1], &what);
                flip(path, at, 1 << bit);
            }
            let (path, right) = (&images.increment, &images.right[1]);
            restoring.check(path, path, &Expected::Nothing, right, "the same without damage");
        }
    }
}

#[test]
fn an_image_of_wrong_length_is_refused_untouched() {
    let images = Images::new();
    let length = std::fs::metadata(&images.whole).unwrap().len();
    let copy = images.host.images.path("copy");
    for options in restore_modes() {
        let mut random = Random::new(13);
        let mut restoring = Restoring::new(&images.host, options);
        let some = (0..12).map(|_| random.below(length)).chain([0, 1, 4095, 4096, length - 1]);
        for (length, why) in
            some.map(|length| (length, "truncated")).chain([(length + 1, "damaged")])
        {
            std::fs::copy(&images.whole, &copy).unwrap();
            File::options().write(true).open(&copy).unwrap().set_len(length).unwrap();
            let expected = Expected::Refused(format!("it is {why}"));
            restoring.check(
                &copy,
                &copy,
                &expected,
                &images.right[0],
                &format!("{length:#x} bytes"),
            );
        }
        let (path, right) = (&images.whole, &images.right[0]);
        restoring.check(path, path, &Expected::Nothing, right, "the same as it was");
    }
}

#[test]
fn several_workers_and_a_limit_find_the_same() {
    let images = Images::new();
    let chain = Chain::open(&images.whole).unwrap();
    let place = chain.newest().layout().page(1, MORE - 1) + 5;
    flip(&images.whole, place, 1);
    let expected = expected(&chain, 0, place);
    assert!(matches!(&expected, Expected::Found(place) if place.contains("block 7: page 0x12b")));
    for workers in [1, 2, 8, 64] {
        for bandwidth in [0, 64 << 20] {
            let options = RestoreOptions { workers, bandwidth, ..eager() };
            let modes = restore_modes()
                .into_iter()
                .map(|mode| RestoreOptions { mode: mode.mode, ..options.clone() });
            for options in modes {
                let what = format!("{options:?}");
                let mut restoring = Restoring::new(&images.host, options);
                restoring.check(&images.whole, &images.whole, &expected, &images.right[0], &what);
            }
        }
    }
    flip(&images.whole, place, 1);
    if restore_modes().len() == 2 {
        assert_completed(&guest(&images.host).restored(&images.whole, &lazy()));
    }
}
