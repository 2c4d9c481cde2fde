// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Images for tests, and the model that they are compared with: a list with the state of each page.

use super::writer::{Base, ImageMetadata};
use super::{Chain, ImageKey, ImageWriter};
use crate::memory::PageBuffer;
use pageferry_protocol::control::job::RunState;
use pageferry_protocol::control::state_pieces::PieceSize;
use pageferry_protocol::image::ImageId;
use pageferry_protocol::memory::{BlockGeometry, BlockTable, PAGE_SIZE, PageRange};
use pageferry_protocol::shm::MappedBitmap;
use proptest::prelude::*;
use std::os::fd::AsFd;
use std::path::Path;

/// State of a page in the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Page {
    Zero,
    Discarded,
    /// Filled with this byte.
    Content(u8),
    /// As in the base.
    Unchanged,
}

/// The state of each page of each block.
pub(crate) type Model = Vec<Vec<Page>>;

/// Number of pages of each block.
pub(crate) const BLOCKS: [u64; 2] = [70, 1100];

pub(crate) fn table(blocks: &[u64]) -> BlockTable {
    let mut table = BlockTable::new();
    for (id, pages) in (5..).zip(blocks) {
        let gpa = u64::from(id) << 30;
        let block = BlockGeometry {
            id,
            name: format!("ram{id}"),
            gpa,
            length: pages * PAGE_SIZE,
            granularity: PAGE_SIZE,
        };
        table.insert(block, 512).unwrap();
    }
    table
}

/// The content of the page `Page::Content(byte)`: filled with `byte`, except for one byte.
pub(crate) fn content(byte: u8) -> Vec<u8> {
    let mut page = vec![byte; PAGE_SIZE as usize];
    page[7] = page[7].wrapping_add(1);
    page
}

/// For each block, the pages of which `which` is true.
pub(crate) fn bitmaps(model: &[Vec<Page>], which: impl Fn(Page) -> bool) -> Vec<MappedBitmap> {
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

/// A key for tests: 32 times this byte.
pub(crate) fn key(byte: u8) -> ImageKey {
    ImageKey::parse(&[byte; 32]).unwrap()
}

/// Writes an image of the model, in runs of `step` pages, on two threads.
pub(crate) fn write(path: &Path, model: &[Vec<Page>], base: &Base, step: usize) -> ImageId {
    write_with(path, model, base, step, None)
}

/// The same, sealed if there is a key.
pub(crate) fn write_with(
    path: &Path, model: &[Vec<Page>], base: &Base, step: usize, key: Option<&ImageKey>,
) -> ImageId {
    let cached = step.is_multiple_of(2);
    let writer = ImageWriter::create_with(path, &table(&BLOCKS), false, cached, key).unwrap();
    let put = |at: usize, odd: usize| {
        for (index, pages) in
            model[at].chunks(step).enumerate().filter(|(index, _)| index % 2 == odd)
        {
            let mut bytes = PageBuffer::new(pages.len() * PAGE_SIZE as usize);
            for (page, into) in pages.iter().zip(bytes.chunks_mut(PAGE_SIZE as usize)) {
                if let Page::Content(byte) = page {
                    into.copy_from_slice(&content(*byte));
                }
            }
            writer
                .put(at, PageRange::new((index * step) as u64, pages.len() as u64), &mut bytes)
                .unwrap();
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
    let pieces =
        vec![PieceSize { name: "a".into(), length: 3 }, PieceSize { name: "b".into(), length: 5 }];
    let rest = ImageMetadata { guest: RunState::Running, discarded: &discarded, changed };
    writer.finish(rest, base, pieces, Some(state.as_fd())).unwrap();
    id
}

/// Checks that the chain shows the same guest as the model.
pub(crate) fn check(chain: &Chain, model: &[Vec<Page>]) {
    for (at, pages) in model.iter().enumerate() {
        let mut bytes = vec![9; pages.len() * PAGE_SIZE as usize];
        chain.read(at, PageRange::new(0, pages.len() as u64), &mut bytes).unwrap();
        for ((page, model), bytes) in (0..).zip(pages).zip(bytes.chunks(PAGE_SIZE as usize)) {
            assert_eq!(
                chain.discarded(at).contains(page),
                *model == Page::Discarded,
                "page {page}"
            );
            assert_eq!(
                chain.present(at).contains(page),
                matches!(model, Page::Content(_)),
                "page {page}"
            );
            let expected =
                if let Page::Content(byte) = model { content(*byte) } else { vec![0; bytes.len()] };
            assert!(bytes == expected, "page {page} of block {at}");
        }
    }
    assert_eq!(chain.newest().state().unwrap(), b"devices!");
}

/// Any model; with `base`, any model of an increment.
pub(crate) fn pages(base: bool) -> impl Strategy<Value = Model> {
    let page = move |byte: u8, kind: u8| match kind {
        0 | 1 => Page::Zero,
        2 => Page::Discarded,
        3 | 4 if base => Page::Unchanged,
        _ => Page::Content(byte.max(1)),
    };
    // Pages come in runs of the same state, as in real memory.
    let block = move |pages: u64| {
        prop::collection::vec((any::<u8>(), 0u8..8, 1usize..90), 40).prop_map(move |runs| {
            let runs =
                runs.into_iter().flat_map(|(byte, kind, count)| vec![page(byte, kind); count]);
            runs.chain(std::iter::repeat(Page::Zero)).take(pages as usize).collect::<Vec<_>>()
        })
    };
    BLOCKS.map(block).to_vec()
}

/// The model of the guest of an increment: unchanged pages come from the base.
pub(crate) fn merged(newer: &[Vec<Page>], older: &[Vec<Page>]) -> Model {
    let page =
        |(newer, older): (&Page, &Page)| if *newer == Page::Unchanged { *older } else { *newer };
    newer
        .iter()
        .zip(older)
        .map(|(newer, older)| newer.iter().zip(older).map(page).collect())
        .collect()
}

/// The model of a guest whose pages are all zero.
pub(crate) fn zero() -> Model {
    BLOCKS.map(|pages| vec![Page::Zero; pages as usize]).to_vec()
}
