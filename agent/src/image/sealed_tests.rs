// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Sealed images, and what somebody can do to them who has the files and not the key.

use super::merge::{MergeKeys, merge_with};
use super::seal::ImageKey;
use super::test_support::{
    BLOCKS, Model, Page, check, content, key, merged, pages, table, write, write_with, zero,
};
use super::verify::verify_with;
use super::writer::{Base, ImageMetadata};
use super::*;
use crate::error::chain as sentence;
use pageferry_protocol::control::job::RunState;
use pageferry_protocol::image::header::HEADER_SIZE;
use pageferry_protocol::image::sealing::SEAL_SIZE;
use pageferry_protocol::image::{EXTENT_SIZE, Header, ImageId, SectionKind, checksum};
use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use proptest::prelude::*;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

fn quiet(_: u64, _: u64) {}

fn base(id: ImageId, name: &str) -> Base {
    Base { id, name: name.into() }
}

/// Reads all that the chain has, as a restore does.
fn read(path: &Path, key: &ImageKey) -> Result<Chain, ImageError> {
    let chain = Chain::open_with(path, Some(key))?;
    for (at, pages) in BLOCKS.into_iter().enumerate() {
        let mut bytes = vec![0; (pages * PAGE_SIZE) as usize];
        chain.read(at, PageRange::new(0, pages), &mut bytes)?;
    }
    chain.newest().state()?;
    Ok(chain)
}

fn errors(path: &Path, key: Option<&ImageKey>) -> Vec<String> {
    let report = verify_with(path, key, 2, 100, &quiet);
    report.errors.iter().map(|error| sentence(error)).collect()
}

/// A model with content in each extent of both blocks, one discarded page, and zero pages.
fn model(byte: u8) -> Model {
    let mut model = zero();
    model[0][3] = Page::Discarded;
    model[0][5..9].fill(Page::Content(byte));
    model[1][0..100].fill(Page::Content(byte + 1));
    model[1][700] = Page::Content(byte + 2);
    model[1][1099] = Page::Content(byte + 3);
    model
}

fn flip(path: &Path, at: u64, change: u8) {
    let file = std::fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ change], at).unwrap();
}

/// Corrects the checksum of a header, which needs no key.
fn correct(header: &mut [u8]) {
    let sum = checksum(&header[..HEADER_SIZE - 4]);
    header[HEADER_SIZE - 4..HEADER_SIZE].copy_from_slice(&sum.to_le_bytes());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    #[test]
    fn a_sealed_chain_is_read_as_it_was_written_and_can_be_merged_for_another_key(
        full in pages(false), one in pages(true), two in pages(true), step in 1usize..200,
    ) {
        let (folder, old, new) = (tempfile::tempdir().unwrap(), key(1), key(2));
        let path = |name: &str| folder.path().join(name);
        let id = write_with(&path("full"), &full, &Base::default(), step, Some(&old));
        check(&Chain::open_with(&path("full"), Some(&old)).unwrap(), &full);
        let id = write_with(&path("one"), &one, &base(id, "full"), step, Some(&old));
        write_with(&path("two"), &two, &base(id, "one"), step, Some(&old));
        let expected = merged(&two, &merged(&one, &full));
        check(&Chain::open_with(&path("two"), Some(&old)).unwrap(), &expected);
        prop_assert_eq!(errors(&path("two"), Some(&old)), Vec::<String>::new());

        let keys = MergeKeys { old: Some(&old), new: Some(&new) };
        merge_with(&path("two"), keys, &path("merged"), false, 2, &quiet).unwrap();
        check(&Chain::open_with(&path("merged"), Some(&new)).unwrap(), &expected);
        prop_assert_eq!(errors(&path("merged"), Some(&new)), Vec::<String>::new());
        let refused = Chain::open_with(&path("merged"), Some(&old)).unwrap_err();
        prop_assert!(matches!(refused.fault, ImageFault::WrongKey));
    }

    #[test]
    fn a_changed_byte_is_found_before_it_is_used_and_by_verify(
        model in pages(false), at in any::<prop::sample::Index>(), change in 1u8..,
    ) {
        let (folder, key) = (tempfile::tempdir().unwrap(), key(1));
        let path = folder.path().join("image");
        write_with(&path, &model, &Base::default(), 64, Some(&key));
        let at = at.index(path.metadata().unwrap().len() as usize) as u64;
        flip(&path, at, change);
        match read(&path, &key) {
            // The changed byte is in a hole, which is never read.
            Ok(chain) => check(&chain, &model),
            Err(error) => {
                let said = sentence(&error);
                prop_assert!(said.contains("damaged") || said.contains("not an image"), "{}", said);
            }
        }
        prop_assert!(!errors(&path, Some(&key)).is_empty(), "byte {:#x}", at);
        flip(&path, at, change);
        prop_assert_eq!(errors(&path, Some(&key)), Vec::<String>::new());
    }
}

#[test]
fn every_byte_of_the_header_and_of_each_section_counts() {
    let (folder, key) = (tempfile::tempdir().unwrap(), key(1));
    let path = folder.path().join("image");
    write_with(&path, &model(1), &Base::default(), 64, Some(&key));
    let image = Image::open_with(&path, Some(&key)).unwrap();
    let section = |kind| image.header().section(kind);
    let file = std::fs::OpenOptions::new().read(true).write(true).open(&path).unwrap();
    let mut header = [0; HEADER_SIZE];
    file.read_exact_at(&mut header, 0).unwrap();
    // Whoever changes the header corrects its checksum.
    for at in 0..HEADER_SIZE - 4 {
        let mut changed = header;
        changed[at] ^= 0x11;
        correct(&mut changed);
        file.write_all_at(&changed, 0).unwrap();
        Image::open_contents(&path, Some(&key)).expect_err("a header that was changed");
    }
    file.write_all_at(&header, 0).unwrap();
    for kind in [SectionKind::Contents, SectionKind::States, SectionKind::VmmState] {
        let section = section(kind);
        for at in section.offset..section.offset + section.length {
            flip(&path, at, 0x40);
            let said = sentence(&read(&path, &key).unwrap_err());
            let expected = format!("section {}, from byte {:#x} on", kind.name(), section.offset);
            assert!(said.contains(&expected), "byte {at:#x}: {said}");
            flip(&path, at, 0x40);
        }
    }
    // The seals of a page with content, and of one without.
    for (page, is_read) in [(700, true), (701, false)] {
        let first = image.layout().page_sum(1, page);
        for at in first..first + SEAL_SIZE {
            flip(&path, at, 2);
            if is_read {
                let said = sentence(&read(&path, &key).unwrap_err());
                assert!(said.contains("block 6: page 0x2bc,"), "byte {at:#x}: {said}");
            }
            assert_eq!(errors(&path, Some(&key)).len(), 1, "byte {at:#x}");
            flip(&path, at, 2);
        }
    }
    check(&read(&path, &key).unwrap(), &model(1));
}

/// Two images with the same blocks and the same key, of different guests.
struct Two {
    folder: tempfile::TempDir,
    key: ImageKey,
    layout: pageferry_protocol::image::Layout,
    /// The bytes of both.
    bytes: [Vec<u8>; 2],
    headers: [Header; 2],
}

impl Two {
    fn new() -> Self {
        let (folder, key) = (tempfile::tempdir().unwrap(), key(1));
        let paths = ["one", "other"].map(|name| folder.path().join(name));
        write_with(&paths[0], &model(1), &Base::default(), 64, Some(&key));
        write_with(&paths[1], &model(101), &Base::default(), 64, Some(&key));
        let bytes = [&paths[0], &paths[1]].map(|path| std::fs::read(path).unwrap());
        let images = [&paths[0], &paths[1]].map(|path| Image::open_with(path, Some(&key)).unwrap());
        let layout = images[0].layout().clone();
        Self { folder, key, layout, bytes, headers: images.map(|image| image.header().clone()) }
    }

    /// Refused if the first image has these parts of the other one.
    fn refused_with(&self, parts: &[Range<u64>]) -> String {
        let mut forged = self.bytes[0].clone();
        for part in parts {
            let part = part.start as usize..part.end as usize;
            assert_ne!(self.bytes[0][part.clone()], self.bytes[1][part.clone()]);
            forged[part.clone()].copy_from_slice(&self.bytes[1][part]);
        }
        self.refused(&forged)
    }

    fn refused(&self, forged: &[u8]) -> String {
        let path: PathBuf = self.folder.path().join("forged");
        std::fs::write(&path, forged).unwrap();
        assert!(!errors(&path, Some(&self.key)).is_empty());
        sentence(&read(&path, &self.key).unwrap_err())
    }

    fn page(&self, at: usize, page: u64) -> [Range<u64>; 2] {
        let (page, seal) = (self.layout.page(at, page), self.layout.page_sum(at, page));
        [page..page + PAGE_SIZE, seal..seal + SEAL_SIZE]
    }
}

#[test]
fn nothing_of_another_image_fits_although_it_has_the_same_key() {
    let two = Two::new();
    let broken = |said: String| assert!(said.contains("seal is broken"), "{said}");
    let with_one = |part: Range<u64>| two.refused_with(&[part]);
    let page = two.page(1, 50);
    broken(two.refused_with(&page[..1]));
    broken(two.refused_with(&page[1..]));
    broken(two.refused_with(&page));
    // All pages of an extent with all of their seals.
    let (pages, seals) = (two.layout.page(1, 0), two.layout.page_sum(1, 0));
    broken(two.refused_with(&[pages..pages + EXTENT_SIZE, seals..seals + 512 * SEAL_SIZE]));
    for kind in [SectionKind::Contents, SectionKind::States, SectionKind::VmmState] {
        let section = two.headers[0].section(kind);
        broken(with_one(section.offset..section.offset + section.length));
    }
    broken(with_one(0..4096));
    // All but the pages is of the other image.
    broken(two.refused_with(&[0..4096, two.layout.page_sums()..two.bytes[0].len() as u64]));
    // The salt, with a checksum that is right.
    let mut forged = two.bytes[0].clone();
    forged[192..224].copy_from_slice(&two.bytes[1][192..224]);
    correct(&mut forged);
    let said = two.refused(&forged);
    assert!(said.contains("the key does not fit this image"), "{said}");
}

#[test]
fn nothing_can_be_moved_within_an_image() {
    let two = Two::new();
    // The content of these pages is the same.
    let mut forged = two.bytes[0].clone();
    for (from, to) in two.page(1, 50).into_iter().zip(two.page(1, 51)) {
        let from = two.bytes[0][from.start as usize..from.end as usize].to_vec();
        forged[to.start as usize..to.end as usize].copy_from_slice(&from);
    }
    let said = two.refused(&forged);
    assert!(said.contains("block 6: page 0x33,") && said.contains("seal is broken"), "{said}");
}

#[test]
fn a_header_cannot_hide_that_an_image_is_sealed() {
    let two = Two::new();
    let mut forged = two.bytes[0].clone();
    forged[16] = 0;
    correct(&mut forged);
    let said = two.refused(&forged);
    assert!(said.contains("it is not sealed, so anybody may have made it"), "{said}");
    // Nor does an agent without a key take it for an image in plain text.
    Image::open(&two.folder.path().join("forged")).unwrap_err();
}

#[test]
fn a_key_that_is_wrong_missing_or_too_much_is_told_from_damage() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    write_with(&path("sealed"), &model(1), &Base::default(), 64, Some(&key(1)));
    write(&path("plain"), &model(1), &Base::default(), 64);
    let fault = |name, key: Option<&ImageKey>| {
        let report = verify_with(&path(name), key, 1, 9, &quiet);
        assert!(report.errors.iter().all(|error| error.fault.is_unreadable()));
        Chain::open_with(&path(name), key).unwrap_err().fault
    };
    assert!(matches!(fault("sealed", Some(&key(2))), ImageFault::WrongKey));
    assert!(matches!(fault("sealed", None), ImageFault::NeedsKey));
    assert!(matches!(fault("plain", Some(&key(1))), ImageFault::NotSealed));
    flip(&path("sealed"), 30, 1);
    let damaged = Chain::open_with(&path("sealed"), Some(&key(2))).unwrap_err().fault;
    assert!(matches!(damaged, ImageFault::Header(_)) && !damaged.is_unreadable());
}

#[test]
fn all_images_of_a_chain_are_sealed_with_the_same_key_or_none_is() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let (one, other) = (key(1), key(2));
    let mut unchanged = zero();
    unchanged[0].fill(Page::Unchanged);
    let keys = [("plain", None), ("one", Some(&one)), ("other", Some(&other))];
    for (full, of_full) in keys {
        let id = write_with(&path(full), &model(1), &Base::default(), 64, of_full);
        for (increment, of_increment) in keys {
            let name = format!("{increment}-on-{full}");
            write_with(&path(&name), &unchanged, &base(id, full), 64, of_increment);
            let opened = Chain::open_with(&path(&name), of_increment);
            assert_eq!(opened.is_ok(), full == increment, "{name}");
            if let Err(error) = opened {
                assert!(matches!(error.fault, ImageFault::UnusableBase(_)), "{name}");
            }
        }
    }
}

#[test]
fn an_image_in_plain_text_is_sealed_by_a_merge_and_none_is_opened_by_one() {
    let (folder, key) = (tempfile::tempdir().unwrap(), key(1));
    let path = |name: &str| folder.path().join(name);
    let id = write(&path("plain"), &model(1), &Base::default(), 64);
    let keys = MergeKeys { old: None, new: Some(&key) };
    let outcome = merge_with(&path("plain"), keys, &path("sealed"), false, 2, &quiet).unwrap();
    assert_eq!(outcome.id, id);
    check(&Chain::open_with(&path("sealed"), Some(&key)).unwrap(), &model(1));
    // Without a new key, that of the chain is kept.
    let keys = MergeKeys { old: Some(&key), new: None };
    merge_with(&path("sealed"), keys, &path("sealed"), true, 2, &quiet).unwrap();
    check(&Chain::open_with(&path("sealed"), Some(&key)).unwrap(), &model(1));
    let refused = merge_with(&path("sealed"), MergeKeys::default(), &path("no"), false, 1, &quiet);
    assert!(matches!(refused.unwrap_err().fault, ImageFault::NeedsKey));
    assert!(!path("no").exists());
}

#[test]
fn the_file_shows_nothing_of_the_guest_and_keeps_its_holes() {
    let (folder, key) = (tempfile::tempdir().unwrap(), key(1));
    let path = |name: &str| folder.path().join(name);
    let id = write_with(&path("one"), &model(1), &base([7; 16], "secret"), 64, Some(&key));
    write_with(&path("again"), &model(1), &base([7; 16], "secret"), 64, Some(&key));
    let (one, again) = (std::fs::read(path("one")).unwrap(), std::fs::read(path("again")).unwrap());
    let has = |bytes: &[u8], what: &[u8]| bytes.windows(what.len()).any(|part| part == what);
    for secret in [&content(2)[100..116], b"ram5", b"devices!", b"secret"] {
        assert!(!has(&one, secret), "{}", secret.escape_ascii());
    }
    assert!(has(&one, &id));
    // The same pages are others in each image.
    let page = Image::open_contents(&path("one"), Some(&key)).unwrap().layout().page(1, 7) as usize;
    assert_ne!(one[page..page + 4096], again[page..page + 4096]);
    let content = 4 + 100 + 2;
    let bytes = path("one").metadata().unwrap().blocks() * 512;
    assert!(bytes <= content * PAGE_SIZE + (64 << 10), "{bytes} bytes");
}

#[test]
fn a_state_of_several_pieces_and_states_of_several_blocks_are_sealed() {
    let (folder, key) = (tempfile::tempdir().unwrap(), key(1));
    let path = folder.path().join("image");
    // The states of the second block take a piece and a half.
    let blocks = [70, 6 << 20];
    let table = table(&blocks);
    let writer = ImageWriter::create_with(&path, &table, false, true, Some(&key)).unwrap();
    let empty =
        || blocks.map(|pages| pageferry_protocol::shm::MappedBitmap::private(pages).unwrap());
    let discarded = empty();
    let found = [(0, 0), (0, 69), (1, 3), (1, (4 << 20) - 129), (1, 4 << 20), (1, (6 << 20) - 1)];
    for (at, page) in found {
        discarded[at].set(PageRange::new(page, 1));
    }
    let state: Vec<u8> = (0..(5 << 20) / 2).map(|at: u32| (at / 7) as u8).collect();
    let file = crate::hooks::state_file_of([state.as_slice()]).unwrap();
    let length = state.len() as u64;
    let piece = pageferry_protocol::control::state_pieces::PieceSize { name: "a".into(), length };
    let rest = ImageMetadata { guest: RunState::Running, discarded: &discarded, changed: None };
    let state_file = Some(std::os::fd::AsFd::as_fd(&file));
    let totals = writer.finish(rest, &Base::default(), vec![piece], state_file).unwrap();
    assert_eq!((totals.discarded, totals.present), (6, 0));
    let image = Image::open_with(&path, Some(&key)).unwrap();
    assert!(image.state().unwrap() == state);
    for (at, states) in image.states().iter().enumerate() {
        let all = states.discarded.all();
        let runs = states.discarded.runs(all).flat_map(|run| run.first..run.end());
        let expected = found.iter().filter(|(of, _)| *of == at).map(|(_, page)| *page);
        assert!(runs.eq(expected), "block {at}");
    }
}
