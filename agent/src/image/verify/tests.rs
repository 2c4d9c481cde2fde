// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

use super::*;
use crate::error::chain as sentence;
use crate::image::bytes::read_at;
use crate::image::bytes::write_at;
use crate::image::test_support::{BLOCKS, Model, Page, pages, write, zero};
use crate::image::writer::Base;
use pageferry_protocol::image::{Header, checksum};
use proptest::prelude::*;
use std::fs::{File, OpenOptions};
use std::os::fd::AsFd;
use std::path::PathBuf;

fn check(path: &Path, most: usize) -> (u64, Vec<String>, bool) {
    let Report { pages, errors, error_limit_reached: cut, .. } =
        verify(path, 3, most, &|done, total| assert!(done <= total));
    (pages, errors.iter().map(|error| sentence(error)).collect(), cut)
}

/// A model with content in the first and the last extent of the second block, one discarded page,
/// and nothing else.
fn model() -> Model {
    let mut model = zero();
    model[0][3] = Page::Discarded;
    model[1][0..100].fill(Page::Content(1));
    model[1][1099] = Page::Content(2);
    model
}

fn open(path: &Path) -> File {
    OpenOptions::new().read(true).write(true).open(path).unwrap()
}

fn flip(path: &Path, at: u64) {
    let file = open(path);
    let mut byte = [0];
    read_at(file.as_fd(), &mut byte, at).unwrap();
    write_at(file.as_fd(), &[byte[0] ^ 0x10], at).unwrap();
}

fn image(folder: &tempfile::TempDir) -> PathBuf {
    let path = folder.path().join("image");
    write(&path, &model(), &Base::default(), 64);
    path
}

#[test]
fn a_good_chain_has_no_errors() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let id = write(&path("full"), &model(), &Base::default(), 64);
    let mut increment = zero();
    increment[0].fill(Page::Unchanged);
    increment[1][50..52].fill(Page::Content(9));
    write(&path("increment"), &increment, &Base { id, name: "full".into() }, 64);
    assert_eq!(check(&path("increment"), 1), (103, vec![], false));
    assert_eq!(check(&path("full"), 1), (101, vec![], false));
}

#[test]
fn a_changed_byte_is_reported_with_its_place() {
    let folder = tempfile::tempdir().unwrap();
    let path = image(&folder);
    let layout = Image::open(&path).unwrap().layout().clone();
    let state = Image::open(&path).unwrap().header().section(SectionKind::VmmState).offset;
    let page = |at, page| layout.page(at, page);
    let sum = |page| {
        format!("checksums of pages {page:#x} + 0x200, at byte {:#x}", layout.page_sum(1, page))
    };
    let stuffed =
        |id, number, at| format!("block {id}: page {number:#x}, at byte {at:#x}, must be a hole");
    let stray = |at: u64, place: &str| format!("byte {at:#x}, {place}, must be zero");
    let places = [
        (100, "header: checksum is".into()),
        (8000, stray(8000, "between the header and the pages")),
        (page(1, 7) + 5, format!("block 6: page 0x7, at byte {:#x}: checksum is", page(1, 7))),
        (page(1, 1099), format!("block 6: page 0x44b, at byte {:#x}: checksum is", page(1, 1099))),
        (page(0, 3) + 1, stuffed(5, 3, page(0, 3))),
        (page(1, 100), stuffed(6, 100, page(1, 100))),
        (page(1, 600) + 4095, stuffed(6, 600, page(1, 600))),
        // Pages after the end of a block.
        (page(0, 70), stuffed(5, 70, page(0, 70))),
        (page(1, 1535) + 4095, stuffed(6, 1535, page(1, 1535))),
        (layout.page_sum(1, 7), sum(0)),
        (layout.page_sum(1, 200), sum(0)),
        (layout.page_sum(1, 600) + 3, sum(512)),
        (layout.page_sum(1, 1099), sum(1024)),
        (layout.states() + 2, "section states of pages, bytes".into()),
        (
            layout.states() + layout.states_size(),
            stray(layout.states() + layout.states_size(), "after the states of pages"),
        ),
        (layout.extent_sums() + 4, "section checksums of extents, bytes".into()),
        (layout.contents() + 30, "section contents, bytes".into()),
        (state - 1, stray(state - 1, "after the contents")),
        (state + 7, "section state of the VMM, bytes".into()),
    ];
    for (at, expected) in places {
        flip(&path, at);
        let (_, errors, cut) = check(&path, 1);
        assert!(
            cut && errors.len() == 1 && errors[0].contains(&expected),
            "byte {at:#x}: {errors:?}, not {expected}"
        );
        assert!(errors[0].contains("damaged"), "{errors:?}");
        flip(&path, at);
    }
    assert_eq!(check(&path, 1), (101, vec![], false));
}

/// The checksum or seal of a page without content must be zero, also if the checksum of the extent
/// and that of the section fit it.
#[test]
fn a_checksum_of_a_page_without_content_is_found() {
    let folder = tempfile::tempdir().unwrap();
    let path = image(&folder);
    let image = Image::open(&path).unwrap();
    let (layout, file) = (image.layout(), open(&path));
    flip(&path, layout.page_sum(1, 600));
    let mut sums = [0; EXTENT_PAGES as usize * 4];
    read_at(file.as_fd(), &mut sums, layout.page_sum(1, 512)).unwrap();
    write_at(
        file.as_fd(),
        &checksum(&sums).to_le_bytes(),
        layout.extent_sums() + layout.extent(1, 1) * 4,
    )
    .unwrap();
    let mut sums = vec![0; layout.extent_sums_size() as usize];
    read_at(file.as_fd(), &mut sums, layout.extent_sums()).unwrap();
    let mut header = image.header().clone();
    header.sections[SectionKind::ExtentSums as usize].checksum = checksum(&sums);
    write_at(file.as_fd(), &header.to_bytes(), 0).unwrap();
    let (_, errors, _) = check(&path, 9);
    let expected =
        format!("byte {:#x}, checksum or seal of a page without content", layout.page_sum(1, 600));
    assert!(errors.len() == 1 && errors[0].contains(&expected), "{errors:?}");
}

#[test]
fn errors_are_listed_in_the_order_of_the_file_up_to_the_limit() {
    let folder = tempfile::tempdir().unwrap();
    let path = image(&folder);
    let layout = Image::open(&path).unwrap().layout().clone();
    let places = [
        5000,
        layout.page(0, 9),
        layout.page(0, 11),
        layout.page(1, 40),
        layout.page(1, 41),
        layout.page(1, 1099),
    ];
    places.into_iter().rev().for_each(|at| flip(&path, at));
    let (pages, errors, cut) = check(&path, 100);
    assert_eq!((pages, cut, errors.len()), (101, false, places.len()), "{errors:?}");
    for (error, at) in errors.iter().zip(places) {
        assert!(error.contains(&format!("byte {at:#x}")), "{error}: not {at:#x}");
    }
    let (_, errors, cut) = check(&path, 3);
    assert_eq!((errors.len(), cut), (3, true));
}

#[test]
fn a_base_that_is_damaged_or_gone_is_an_error_of_the_chain() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let id = write(&path("full"), &model(), &Base::default(), 64);
    // The increment uses no page of the base, but the base is verified all the same.
    write(&path("increment"), &zero(), &Base { id, name: "full".into() }, 64);
    let place = Image::open(&path("full")).unwrap().layout().page(1, 2);
    flip(&path("full"), place);
    let (_, errors, _) = check(&path("increment"), 1);
    assert!(errors[0].contains("full: block 6: page 0x2,"), "{errors:?}");
    std::fs::rename(path("full"), path("gone")).unwrap();
    flip(&path("increment"), place);
    let (_, errors, _) = check(&path("increment"), 1);
    assert!(errors.len() == 1 && errors[0].contains("full: cannot open it"), "{errors:?}");
    let (_, errors, _) = check(&path("increment"), 9);
    assert!(errors.len() == 2 && errors[0].contains("increment: block 6: page 0x2,"), "{errors:?}");
}

#[test]
fn a_file_of_another_length_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = image(&folder);
    let length = path.metadata().unwrap().len();
    for (length, expected) in
        [(length + 9, "damaged"), (length - 1, "truncated"), (100, "truncated"), (0, "truncated")]
    {
        open(&path).set_len(length).unwrap();
        let (_, errors, _) = check(&path, 9);
        assert!(errors.len() == 1 && errors[0].contains(expected), "{errors:?}");
    }
}

#[test]
fn a_file_truncated_during_the_check_is_reported_with_its_end() {
    let folder = tempfile::tempdir().unwrap();
    let path = image(&folder);
    let layout = Image::open(&path).unwrap().layout().clone();
    let end = layout.page(1, 1099) + 9;
    // At that time the pages of the first extent are done, and those of the last are not.
    let cut = |done: u64, _: u64| {
        if done > 0 && path.metadata().unwrap().len() > end {
            open(&path).set_len(end).unwrap();
        }
    };
    let report = verify(&path, 1, 9, &cut);
    let errors: Vec<String> = report.errors.iter().map(|error| sentence(error)).collect();
    let ends = format!("the file ends at byte {end:#x}, ");
    assert!(!errors.is_empty() && errors.iter().all(|error| error.contains(&ends)), "{errors:?}");
    let sums = format!(
        "block 6: checksums of pages 0x400 + 0x200, at byte {:#x}: ",
        layout.page_sum(1, 1024)
    );
    assert!(errors.iter().any(|error| error.contains(&sums)), "{errors:?}");
}

#[test]
fn data_after_the_last_section_is_found_if_the_header_includes_it() {
    let folder = tempfile::tempdir().unwrap();
    let path = image(&folder);
    let (header, file) = (Image::open(&path).unwrap().header().clone(), open(&path));
    let length = header.file_length + (5 << 20);
    write_at(file.as_fd(), &Header { file_length: length, ..header }.to_bytes(), 0).unwrap();
    file.set_len(length).unwrap();
    assert_eq!(check(&path, 9).1, Vec::<String>::new(), "zeroes do no harm");
    flip(&path, length - 1);
    let (_, errors, _) = check(&path, 9);
    assert!(
        errors.len() == 1
            && errors[0].contains(&format!("byte {:#x}, after the state of the VMM", length - 1))
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn every_changed_byte_is_found(model in pages(false), at in any::<prop::sample::Index>(), step in 1usize..100) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image");
        write(&path, &model, &Base::default(), step);
        let content = model.iter().flatten().filter(|page| matches!(page, Page::Content(_))).count() as u64;
        prop_assert_eq!(check(&path, 1), (content, vec![], false));
        flip(&path, at.index(path.metadata().unwrap().len() as usize) as u64);
        let (_, errors, _) = check(&path, 100);
        prop_assert!(!errors.is_empty());
    }
}

#[test]
fn gaps_are_the_pages_between_the_runs() {
    let set = MappedBitmap::private(BLOCKS[0]).unwrap();
    set.set(PageRange::new(2, 3));
    set.set(PageRange::new(69, 1));
    let found: Vec<_> =
        gaps(&set, PageRange::new(1, 80)).map(|gap| (gap.first, gap.count)).collect();
    assert_eq!(found, [(1, 1), (5, 64), (70, 11)]);
    assert_eq!(gaps(&set, PageRange::new(2, 3)).count(), 0);
}
