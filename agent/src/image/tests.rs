use super::writer::{Base, Rest};
use super::*;
use crate::error::chain as sentence;
use pageferry_protocol::control::hook::PieceSize;
use pageferry_protocol::image::ImageId;
use pageferry_protocol::memory::{BlockGeometry, BlockTable, PAGE_SIZE, PageRange};
use pageferry_protocol::shm::MappedBitmap;
use proptest::prelude::*;
use std::os::fd::AsFd;

/// What a page of the model is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Page {
    Zero,
    Discarded,
    /// Filled with this byte.
    Content(u8),
    /// As in the base.
    Unchanged,
}

const BLOCKS: [u64; 2] = [70, 1100];

fn table() -> BlockTable {
    let mut table = BlockTable::new();
    for (id, pages) in (5..).zip(BLOCKS) {
        let gpa = u64::from(id) << 30;
        let block =
            BlockGeometry { id, name: format!("ram{id}"), gpa, length: pages * PAGE_SIZE, granularity: PAGE_SIZE };
        table.insert(block, 512).unwrap();
    }
    table
}

fn content(byte: u8) -> Vec<u8> {
    let mut page = vec![byte; PAGE_SIZE as usize];
    page[7] = page[7].wrapping_add(1);
    page
}

fn bitmaps(model: &[Vec<Page>], which: impl Fn(Page) -> bool) -> Vec<MappedBitmap> {
    let of_block = |pages: &Vec<Page>| {
        let bitmap = MappedBitmap::private(pages.len() as u64).unwrap();
        let found = (0..).zip(pages).filter(|(_, page)| which(**page));
        for (page, _) in found {
            bitmap.set(PageRange::new(page, 1));
        }
        bitmap
    };
    model.iter().map(of_block).collect()
}

/// Writes what the model says, in runs of `step` pages, from two threads.
fn write(path: &Path, model: &[Vec<Page>], base: &Base, step: usize) -> ImageId {
    let writer = ImageWriter::create(path, &table(), false, step.is_multiple_of(2)).unwrap();
    let put = |at: usize, odd: usize| {
        for (index, pages) in model[at].chunks(step).enumerate().filter(|(index, _)| index % 2 == odd) {
            let mut bytes = PageBuffer::new(pages.len() * PAGE_SIZE as usize);
            for (page, into) in pages.iter().zip(bytes.chunks_mut(PAGE_SIZE as usize)) {
                if let Page::Content(byte) = page {
                    into.copy_from_slice(&content(*byte));
                }
            }
            writer.put(at, PageRange::new((index * step) as u64, pages.len() as u64), &bytes).unwrap();
        }
    };
    std::thread::scope(|scope| {
        scope.spawn(|| (0..2).for_each(|at| put(at, 1)));
        put(1, 0);
        put(0, 0);
    });
    let (id, discarded) = (writer.id(), bitmaps(model, |page| page == Page::Discarded));
    let changed = bitmaps(model, |page| page != Page::Unchanged);
    let changed = (base.id != ImageId::default()).then_some(changed.as_slice());
    let state = rustix::fs::memfd_create("state", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::io::write(&state, b"devices!").unwrap();
    let pieces = vec![PieceSize { name: "a".into(), length: 3 }, PieceSize { name: "b".into(), length: 5 }];
    let rest = Rest { discarded: &discarded, changed };
    writer.finish(rest, base, pieces, Some(state.as_fd())).unwrap();
    id
}

/// The image says what the model does.
fn check(chain: &Chain, model: &[Vec<Page>]) {
    for (at, pages) in model.iter().enumerate() {
        let mut bytes = vec![9; pages.len() * PAGE_SIZE as usize];
        chain.read(at, PageRange::new(0, pages.len() as u64), &mut bytes).unwrap();
        for ((page, model), bytes) in (0..).zip(pages).zip(bytes.chunks(PAGE_SIZE as usize)) {
            assert_eq!(chain.discarded(at).contains(page), *model == Page::Discarded, "page {page}");
            assert_eq!(chain.present(at).contains(page), matches!(model, Page::Content(_)), "page {page}");
            let expected = if let Page::Content(byte) = model { content(*byte) } else { vec![0; bytes.len()] };
            assert!(bytes == expected, "page {page} of block {at}");
        }
        (0..chain.newest().layout().extents(at)).for_each(|extent| chain.check_sums(at, extent).unwrap());
    }
    assert_eq!(chain.newest().state().unwrap(), b"devices!");
}

fn pages(base: bool) -> impl Strategy<Value = Vec<Vec<Page>>> {
    let page = move |byte: u8, kind: u8| match kind {
        0 | 1 => Page::Zero,
        2 => Page::Discarded,
        3 | 4 if base => Page::Unchanged,
        _ => Page::Content(byte.max(1)),
    };
    // Runs, as memory has them.
    let block = move |pages: u64| {
        prop::collection::vec((any::<u8>(), 0u8..8, 1usize..90), 40).prop_map(move |runs| {
            let runs = runs.into_iter().flat_map(|(byte, kind, count)| vec![page(byte, kind); count]);
            runs.chain(std::iter::repeat(Page::Zero)).take(pages as usize).collect::<Vec<_>>()
        })
    };
    BLOCKS.map(block).to_vec()
}

fn merged(newer: &[Vec<Page>], older: &[Vec<Page>]) -> Vec<Vec<Page>> {
    let page = |(newer, older): (&Page, &Page)| if *newer == Page::Unchanged { *older } else { *newer };
    newer.iter().zip(older).map(|(newer, older)| newer.iter().zip(older).map(page).collect()).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn a_chain_of_images_says_what_was_written(full in pages(false), one in pages(true), two in pages(true), step in 1usize..200) {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let id = write(&path("full"), &full, &Base::default(), step);
        check(&Chain::open(&path("full")).unwrap(), &full);
        let id = write(&path("one"), &one, &Base { id, name: "full".into() }, step);
        let model = merged(&one, &full);
        check(&Chain::open(&path("one")).unwrap(), &model);
        write(&path("two"), &two, &Base { id, name: path("one").to_str().unwrap().into() }, step);
        check(&Chain::open(&path("two")).unwrap(), &merged(&two, &model));
    }

    #[test]
    fn a_byte_that_is_changed_is_found_before_it_is_believed(full in pages(false), at in any::<prop::sample::Index>(), change in 1u8..) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image");
        write(&path, &full, &Base::default(), 64);
        let mut bytes = std::fs::read(&path).unwrap();
        let at = at.index(bytes.len());
        bytes[at] ^= change;
        std::fs::write(&path, &bytes).unwrap();
        let read = |chain: &Chain| {
            for (at, pages) in BLOCKS.into_iter().enumerate() {
                let mut bytes = vec![0; (pages * PAGE_SIZE) as usize];
                chain.read(at, PageRange::new(0, pages), &mut bytes)?;
                (0..chain.newest().layout().extents(at)).try_for_each(|extent| chain.check_sums(at, extent))?;
            }
            chain.newest().state().map(drop)
        };
        match Chain::open(&path).and_then(|chain| read(&chain).map(|()| chain)) {
            // In a hole, from which nothing is ever read.
            Ok(chain) => check(&chain, &full),
            Err(error) => prop_assert!(sentence(&error).contains("damaged") || sentence(&error).contains("not an image"), "{}", sentence(&error)),
        }
    }
}

#[test]
fn the_sum_of_an_extent_without_content_is_that_of_its_checksums_too() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image");
    let mut model = vec![vec![Page::Zero; BLOCKS[0] as usize], vec![Page::Zero; BLOCKS[1] as usize]];
    model[1][600] = Page::Content(1);
    write(&path, &model, &Base::default(), 64);
    let image = Image::open(&path).unwrap();
    for (at, extents) in [1, 3].into_iter().enumerate() {
        (0..extents).for_each(|extent| image.check_sums(at, extent).unwrap());
    }
}

#[test]
fn states_that_are_damaged_are_called_so_whatever_they_came_to_say() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image");
    let model = vec![vec![Page::Discarded; BLOCKS[0] as usize], vec![Page::Zero; BLOCKS[1] as usize]];
    write(&path, &model, &Base::default(), 64);
    let at = Image::open(&path).unwrap().layout().states() as usize;
    let mut bytes = std::fs::read(&path).unwrap();
    // Page 0 is as in a base that there is none of; and a page after the last is zero no more.
    for at in [at, at + 31] {
        bytes[at] ^= 1;
        std::fs::write(&path, &bytes).unwrap();
        let error = sentence(&Image::open(&path).unwrap_err());
        assert!(error.contains("section states of pages") && error.ends_with("the image is damaged"), "{error}");
        bytes[at] ^= 1;
    }
}

#[test]
fn an_image_that_builds_on_itself_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let zero = vec![vec![Page::Zero; BLOCKS[0] as usize], vec![Page::Zero; BLOCKS[1] as usize]];
    let id = write(&path("one"), &zero, &Base { id: [7; 16], name: "two".into() }, 64);
    let id = write(&path("two"), &zero, &Base { id, name: "one".into() }, 64);
    let header = pageferry_protocol::image::Header { base: id, ..Image::open(&path("one")).unwrap().header().clone() };
    let file = std::fs::OpenOptions::new().write(true).open(path("one")).unwrap();
    bytes::write_at(file.as_fd(), &header.to_bytes(), 0).unwrap();
    let error = Chain::open(&path("two")).unwrap_err();
    assert!(matches!(error.fault, Fault::Circle { id: found } if found == id), "{}", sentence(&error));
}

#[test]
fn a_chain_that_was_tampered_with_is_refused_with_what_is_wrong() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let zero = vec![vec![Page::Zero; BLOCKS[0] as usize], vec![Page::Zero; BLOCKS[1] as usize]];
    let id = write(&path("full"), &zero, &Base::default(), 64);
    write(&path("one"), &zero, &Base { id, name: "full".into() }, 64);
    std::fs::rename(path("full"), path("gone")).unwrap();
    let error = sentence(&Chain::open(&path("one")).unwrap_err());
    assert!(error.contains("full: cannot open it"), "{error}");
    write(&path("full"), &zero, &Base::default(), 64);
    let error = sentence(&Chain::open(&path("one")).unwrap_err());
    assert!(error.contains("the file was replaced by another"), "{error}");
    let file = std::fs::OpenOptions::new().write(true).open(path("gone")).unwrap();
    file.set_len(5 << 20).unwrap();
    let error = sentence(&Chain::open(&path("gone")).unwrap_err());
    assert!(error.contains("it is truncated"), "{error}");
    for (bytes, expected) in [(&b"x"[..], "truncated"), (&[7; 5000], "not an image")] {
        std::fs::write(path("other"), bytes).unwrap();
        let error = sentence(&Chain::open(&path("other")).unwrap_err());
        assert!(error.contains(expected), "{error}");
    }
    assert!(matches!(Chain::open(folder.path()).unwrap_err().fault, Fault::Path));
}
