// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

use super::*;
use crate::image::chain::images;
use crate::image::test_support::{Model, Page, merged, pages, write, zero};
use crate::image::writer::Base;
use pageferry_protocol::control::job::RunState;
use proptest::prelude::*;

/// The pages of a cell, counted one by one.
fn naive(pages: &[Page]) -> Tally {
    let count = |kind: fn(&Page) -> bool| pages.iter().filter(|page| kind(page)).count() as u64;
    Tally {
        present: count(|page| matches!(page, Page::Content(_))),
        zero: count(|page| *page == Page::Zero),
        discarded: count(|page| *page == Page::Discarded),
        unchanged: count(|page| *page == Page::Unchanged),
    }
}

fn compare(view: &View<'_>, model: &Model, per_cell: u64) {
    for (at, pages) in model.iter().enumerate() {
        let expected: Vec<Tally> = pages.chunks(per_cell as usize).map(naive).collect();
        assert_eq!(view.cells(at, per_cell).collect::<Vec<_>>(), expected);
        assert_eq!(view.block(at), naive(pages));
    }
    assert_eq!(view.all(), naive(&model.concat()));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn cells_are_counted_as_by_hand(full in pages(false), one in pages(true), per_cell in 1u64..300) {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let id = write(&path("full"), &full, &Base::default(), 64);
        write(&path("one"), &one, &Base { id, name: "full".into() }, 64);
        let (images, opened) = images(&path("one"), None);
        opened.unwrap();
        compare(&View::Image(&images[0]), &one, per_cell);
        compare(&View::Image(&images[1]), &full, per_cell);
        compare(&View::Guest(&Chain::open(&path("one")).unwrap()), &merged(&one, &full), per_cell);
    }

    #[test]
    fn cells_are_as_small_as_possible(pages in 1u64..1 << 38, cells in 1u64..1 << 20) {
        let per_cell = pages_per_cell(pages, cells);
        prop_assert!(per_cell.is_power_of_two() && pages.div_ceil(per_cell) <= cells);
        prop_assert!(per_cell == 1 || pages.div_ceil(per_cell / 2) > cells);
    }
}

#[test]
fn a_cell_has_the_mean_colour_of_its_pages() {
    let half = Tally { present: 2, zero: 1, discarded: 1, unchanged: 0 };
    let [content, zero, discarded] =
        [Kind::Content, Kind::Zero, Kind::Discarded].map(|kind| kind.colour()[0] as f64);
    let expected = (content * 2.0 + zero + discarded) / 4.0;
    assert!((f64::from(half.colour(false)[0]) - expected).abs() <= 0.5);
    let one = Tally { unchanged: 9, ..Tally::default() };
    assert_eq!(one.colour(true), Kind::Unchanged.colour());
    assert_eq!(Tally { present: 9, ..Tally::default() }.colour(true), Kind::Changed.colour());
}

#[test]
fn a_picture_is_decoded_as_it_was_drawn() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image");
    let mut model = zero();
    model[0][69] = Page::Discarded;
    model[1][0] = Page::Content(1);
    write(&path, &model, &Base::default(), 64);
    let image = Image::open(&path).unwrap();
    let picture = Picture::paint(&View::Image(&image), 1024);
    // 1170 pages give a square of width 64: 2 rows, a gap of 4, and 18 rows.
    assert_eq!((picture.width, picture.height, picture.pages_per_pixel), (64, 2 + 4 + 18, 1));
    let colour = |kind: Kind| Some(kind.colour());
    assert_eq!(
        (picture.pixel(0, 0), picture.pixel(5, 1)),
        (colour(Kind::Zero), colour(Kind::Discarded))
    );
    assert_eq!((picture.pixel(6, 1), picture.pixel(0, 5)), (Some(BACKGROUND), Some(BACKGROUND)));
    assert_eq!(
        (picture.pixel(0, 6), picture.pixel(1, 6)),
        (colour(Kind::Content), colour(Kind::Zero))
    );
    assert_eq!(
        (picture.pixel(11, 23), picture.pixel(12, 23)),
        (colour(Kind::Zero), Some(BACKGROUND))
    );
    assert_eq!((picture.pixel(64, 0), picture.pixel(0, 24)), (None, None));

    let bytes = picture.png().unwrap();
    let mut reader = png::Decoder::new(std::io::Cursor::new(bytes)).read_info().unwrap();
    let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
    let frame = reader.next_frame(&mut pixels).unwrap();
    assert_eq!((frame.width, frame.height, frame.color_type), (64, 24, ColorType::Rgb));
    assert!(pixels == picture.pixels);
}

#[test]
fn a_picture_keeps_its_largest_size() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image");
    let mut table = BlockTable::new();
    let terabyte = 1u64 << 40;
    for (id, length) in (0..).zip([terabyte, 4096, 5 * terabyte]) {
        let block = BlockGeometry {
            id,
            name: format!("{id}"),
            gpa: u64::from(id) << 43,
            length,
            granularity: 4096,
        };
        table.insert(block, 512).unwrap();
    }
    let writer = crate::image::ImageWriter::create(&path, &table, false, true).unwrap();
    writer.put(2, PageRange::new(0, 1), &mut [1; 4096]).unwrap();
    let bitmaps = table
        .blocks()
        .iter()
        .map(|block| pageferry_protocol::shm::MappedBitmap::private(block.pages()));
    let discarded: Vec<_> = bitmaps.map(Result::unwrap).collect();
    let rest = crate::image::writer::ImageMetadata {
        guest: RunState::Running,
        discarded: &discarded,
        changed: None,
    };
    writer.finish(rest, &Base::default(), vec![], None).unwrap();
    let image = Image::open(&path).unwrap();
    for width in [0, 1, 1024, u32::MAX] {
        let picture = Picture::paint(&View::Image(&image), width);
        assert!(
            picture.width <= MAX_WIDTH
                && picture.height <= MAX_HEIGHT
                && picture.width == width.clamp(1, 4096)
        );
        assert_eq!(picture.pixels.len(), picture.width as usize * picture.height as usize * 3);
        assert!(picture.png().unwrap().len() < picture.pixels.len() / 10);
    }
}
