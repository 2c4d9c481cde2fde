// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

use super::*;
use crate::error::chain as sentence;
use crate::image::bytes::write_at;
use crate::image::test_support::{Model, Page, check, merged, pages, write, zero};
use crate::image::verify::verify;
use crate::image::{Image, ImageFault};
use pageferry_protocol::image::Header;
use pageferry_protocol::memory::PAGE_SIZE;
use proptest::prelude::*;
use std::fs::OpenOptions;
use std::os::unix::fs::MetadataExt;

fn quiet(_: u64, _: u64) {}

fn base(id: ImageId, name: &str) -> Base {
    Base { id, name: name.into() }
}

/// Changes the time of the image.
fn age(path: &Path, taken: u64) {
    let header = Header { taken, ..Image::open(path).unwrap().header().clone() };
    let file = OpenOptions::new().write(true).open(path).unwrap();
    write_at(file.as_fd(), &header.to_bytes(), 0).unwrap();
}

/// A model whose second block begins with `pages` times `page`; all other pages are zero.
fn some(pages: usize, page: Page) -> Model {
    let mut model = zero();
    model[1][..pages].fill(page);
    model
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn a_merged_image_shows_the_same_guest_as_its_chain(
        full in pages(false), one in pages(true), two in pages(true), step in 1usize..200, threads in 1usize..4,
    ) {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let id = write(&path("full"), &full, &Base::default(), step);
        let id = write(&path("one"), &one, &base(id, "full"), step);
        let id = write(&path("two"), &two, &base(id, "one"), step);
        let outcome = merge(&path("two"), &path("merged"), false, threads, &quiet).unwrap();
        prop_assert_eq!((outcome.id, outcome.images), (id, 3));
        let model = merged(&two, &merged(&one, &full));
        let image = Chain::open(&path("merged")).unwrap();
        check(&image, &model);
        prop_assert_eq!((image.layers().len(), image.newest().header().is_increment()), (1, false));
        prop_assert!(verify(&path("merged"), 2, 9, &quiet).errors.is_empty());
        let count = |kind: fn(&Page) -> bool| model.iter().flatten().filter(|page| kind(page)).count() as u64;
        let content = count(|page| matches!(page, Page::Content(_)));
        let totals = (content, count(|page| *page == Page::Zero), count(|page| *page == Page::Discarded), 0);
        prop_assert_eq!((outcome.totals.present, outcome.totals.zero, outcome.totals.discarded, outcome.totals.unchanged), totals);
        // Pages without content take no space.
        let bytes = path("merged").metadata().unwrap().blocks() * 512;
        prop_assert!(bytes <= content * PAGE_SIZE + (128 << 10), "{bytes} bytes for {content} pages");
    }
}

#[test]
fn a_merged_image_can_replace_the_newest_of_its_chain() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let full = some(5, Page::Content(1));
    let id = write(&path("full"), &full, &Base::default(), 64);
    let one = some(3, Page::Unchanged);
    let id = write(&path("one"), &one, &base(id, "full"), 64);
    age(&path("one"), 1_000_000_007);
    let two = some(2, Page::Unchanged);
    write(&path("two"), &two, &base(id, "one"), 64);
    let before = Image::open(&path("one")).unwrap();

    let error = merge(&path("one"), &path("one"), false, 2, &quiet).unwrap_err();
    assert!(matches!(error.fault, ImageFault::Exists), "{}", sentence(&error));
    let error = merge(&path("one"), &path("full"), false, 2, &quiet).unwrap_err();
    assert!(matches!(error.fault, ImageFault::Exists), "{}", sentence(&error));
    merge(&path("one"), &path("one"), true, 2, &quiet).unwrap();
    std::fs::remove_file(path("full")).unwrap();

    let after = Chain::open(&path("one")).unwrap();
    let (before, header) = (before.header(), after.newest().header());
    assert_eq!(
        (header.id, header.taken, header.base),
        (before.id, 1_000_000_007, ImageId::default())
    );
    check(&after, &merged(&one, &full));
    check(&Chain::open(&path("two")).unwrap(), &merged(&two, &merged(&one, &full)));
}

#[test]
fn a_merge_of_a_damaged_chain_writes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let id = write(&path("full"), &some(700, Page::Content(1)), &Base::default(), 64);
    write(&path("one"), &some(700, Page::Unchanged), &base(id, "full"), 64);
    std::fs::write(path("there"), "PFimage\0as it was").unwrap();
    let image = Image::open(&path("full")).unwrap();
    let state = Image::open(&path("one")).unwrap();
    let state = state.header().section(pageferry_protocol::image::SectionKind::VmmState).offset;
    for (name, at, expected) in [
        ("full", image.layout().page(1, 650) + 9, "full: block 6: page 0x28a,"),
        ("full", image.layout().page_sum(1, 511), "full: block 6: checksums of pages 0x0"),
        ("one", state, "one: section state of the VMM"),
    ] {
        let file = OpenOptions::new().read(true).write(true).open(path(name)).unwrap();
        let mut byte = [0];
        crate::image::bytes::read_at(file.as_fd(), &mut byte, at).unwrap();
        write_at(file.as_fd(), &[!byte[0]], at).unwrap();
        for (into, replace) in [("new", false), ("there", true)] {
            let error =
                sentence(&merge(&path("one"), &path(into), replace, 2, &quiet).unwrap_err());
            assert!(error.contains(expected), "{error}");
        }
        write_at(file.as_fd(), &byte, at).unwrap();
    }
    let names = std::fs::read_dir(folder.path()).unwrap().count();
    assert_eq!((names, std::fs::read(path("there")).unwrap()), (3, b"PFimage\0as it was".to_vec()));
    let damage = merge(&path("one"), &path("new"), false, 2, &quiet);
    assert_eq!(damage.unwrap().totals.present, 700, "the chain is repaired");
}
