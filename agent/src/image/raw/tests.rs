// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

use super::named::NamedLayout;
use super::*;
use crate::error::chain as sentence;
use crate::image::new_file::{FileKind, write_new};
use crate::image::test_support::key;
use crate::image::verify::verify_with;
use crate::image::{Chain, ImageFault};
use pageferry_protocol::memory::{BlockGeometry, PAGE_SIZE, PageRange};
use proptest::prelude::*;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};

const PAGE: usize = PAGE_SIZE as usize;

fn quiet(_: u64, _: u64) {}

/// An output without progress.
fn to(path: &Path) -> Output<'_> {
    Output { path, replace: false, threads: 2, show: &quiet }
}

/// A page of a raw file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Page {
    Hole,
    /// Zeroes that were written.
    Zero,
    /// Filled with this byte.
    Content(u8),
}

/// A block of the model: its pages, and how many pages of the file lie before it that belong to no
/// block.
#[derive(Debug, Clone)]
struct ModelBlock {
    pages: Vec<Page>,
    before: usize,
}

/// Blocks with runs of pages of the same kind, as in real memory.
fn model() -> impl Strategy<Value = Vec<ModelBlock>> {
    let page = |(kind, byte): (u8, u8)| match kind {
        0 | 1 => Page::Hole,
        2 => Page::Zero,
        _ => Page::Content(byte.max(1)),
    };
    let runs = prop::collection::vec(((0u8..5, any::<u8>()), 1usize..400), 1..6);
    let block = (runs, 0usize..3).prop_map(move |(runs, before)| {
        let pages = runs.into_iter().flat_map(|(kind, count)| vec![page(kind); count]).collect();
        ModelBlock { pages, before }
    });
    prop::collection::vec(block, 1..4)
}

/// The layout of the model. The blocks are in the file in the opposite order of their addresses.
fn layout_of(model: &[ModelBlock]) -> RawLayout {
    let mut offset = 0;
    let blocks = (0..).zip(model).map(|(id, block)| {
        offset += block.before as u64 * PAGE_SIZE;
        let length = block.pages.len() as u64 * PAGE_SIZE;
        let geometry = BlockGeometry {
            id,
            name: format!("ram{id}"),
            gpa: u64::from(100 - id) << 30,
            length,
            granularity: PAGE_SIZE,
        };
        let block = RawBlock { block: geometry, offset };
        offset += length;
        block
    });
    RawLayout::new(blocks.collect::<Vec<_>>()).unwrap()
}

/// The bytes of the raw file of the model; with `between` where no block is.
fn bytes_of(model: &[ModelBlock], between: u8) -> Vec<u8> {
    let mut bytes = Vec::new();
    for block in model {
        bytes.resize(bytes.len() + block.before * PAGE, between);
        for page in &block.pages {
            let byte = if let Page::Content(byte) = page { *byte } else { 0 };
            bytes.resize(bytes.len() + PAGE, byte);
        }
    }
    bytes
}

/// Writes the raw file of the model, with its holes.
fn write_raw(path: &Path, model: &[ModelBlock]) {
    let (file, bytes) = (File::create(path).unwrap(), bytes_of(model, 0xee));
    file.set_len(bytes.len() as u64).unwrap();
    let between = |count| std::iter::repeat_n(Page::Content(0xee), count);
    let pages = model.iter().flat_map(|block| between(block.before).chain(block.pages.clone()));
    for (at, _) in pages.enumerate().filter(|(_, page)| *page != Page::Hole) {
        file.write_all_at(&bytes[at * PAGE..][..PAGE], (at * PAGE) as u64).unwrap();
    }
}

/// A raw file of `pages` pages at `path`, each filled with its number, and its layout.
fn numbered(path: &Path, pages: u8) -> RawLayout {
    let bytes: Vec<u8> = (1..=pages).flat_map(|page| vec![page; PAGE]).collect();
    std::fs::write(path, &bytes).unwrap();
    NamedLayout::Raw.layout(bytes.len() as u64, PAGE_SIZE).unwrap()
}

/// Imports the raw file `raw` of the folder as the image `image`.
fn import_file(folder: &Path, layout: &RawLayout, image: &str) -> Result<Imported, RawError> {
    let memory = RawFile::open(&folder.join("raw"))?;
    import(&memory, layout, &[], None, to(&folder.join(image)))
}

/// The error of an import or export, as a sentence.
fn said<T: fmt::Debug>(outcome: Result<T, RawError>) -> String {
    sentence(&outcome.unwrap_err())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn an_exported_file_is_the_imported_one_without_what_no_block_has(
        model in model(), sealed in any::<bool>(), threads in 1usize..4,
    ) {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let layout = layout_of(&model);
        write_raw(&path("raw"), &model);
        let key = sealed.then(|| key(7));
        let memory = RawFile::open(&path("raw")).unwrap();
        let image = path("image");
        let output = Output { threads, ..to(&image) };
        let imported = import(&memory, &layout, &[], key.as_ref(), output).unwrap();

        let pages = || model.iter().flat_map(|block| &block.pages);
        let content = pages().filter(|page| matches!(page, Page::Content(_))).count();
        prop_assert_eq!(imported.totals.present, content as u64);
        prop_assert_eq!(imported.totals.zero, (pages().count() - content) as u64);
        prop_assert_eq!(imported.totals.discarded, 0);
        prop_assert!(verify_with(&image, key.as_ref(), 2, 9, &quiet).errors.is_empty());

        let chain = Chain::open_with(&image, key.as_ref()).unwrap();
        prop_assert_eq!(chain.newest().header().id, imported.id);
        let raw = path("back");
        let output = Output { threads, ..to(&raw) };
        let exported = export(&chain, &layout, false, &[], output).unwrap();
        prop_assert_eq!((exported.present, exported.length), (content as u64, layout.length()));
        prop_assert!(std::fs::read(&raw).unwrap() == bytes_of(&model, 0));
        let disk = raw.metadata().unwrap().blocks() * 512;
        prop_assert!(disk <= (content * PAGE) as u64 + (64 << 10), "{disk} bytes for {content} pages");
    }
}

#[test]
fn holes_of_a_large_firecracker_file_are_not_read_and_each_page_has_its_address() {
    const LOW: u64 = 3 << 30;
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let file = File::create(path("raw")).unwrap();
    file.set_len(LOW + 5 * PAGE_SIZE).unwrap();
    for (offset, byte) in [(0, 1), (LOW - PAGE_SIZE, 2), (LOW, 3), (LOW + 4 * PAGE_SIZE, 4)] {
        file.write_all_at(&[byte; PAGE], offset).unwrap();
    }
    let memory = RawFile::open(&path("raw")).unwrap();
    let layout = NamedLayout::Firecracker.layout(memory.length(), PAGE_SIZE).unwrap();
    let most = AtomicU64::new(0);
    let show = |_, all| {
        most.fetch_max(all, Ordering::Relaxed);
    };
    let image = path("image");
    let output = Output { path: &image, replace: false, threads: 1, show: &show };
    import(&memory, &layout, &[], None, output).unwrap();
    assert!(most.into_inner() <= 64, "holes are not data");

    let chain = Chain::open(&image).unwrap();
    let places: Vec<_> =
        chain.table().blocks().iter().map(|block| (block.gpa, block.length)).collect();
    assert_eq!(places, [(0, LOW), (4 << 30, 5 * PAGE_SIZE)]);
    for (at, page, byte) in [(0, 0, 1), (0, LOW / PAGE_SIZE - 1, 2), (1, 0, 3), (1, 4, 4)] {
        let mut bytes = vec![0; PAGE];
        chain.read(at, PageRange::new(page, 1), &mut bytes).unwrap();
        assert!(bytes == [byte; PAGE], "page {page} of block {at}");
    }
    export(&chain, &layout, false, &[], to(&path("back"))).unwrap();
    let back = File::open(path("back")).unwrap();
    let mut ends = [vec![9; 2 * PAGE], vec![9; 6 * PAGE]];
    back.read_exact_at(&mut ends[0], 0).unwrap();
    back.read_exact_at(&mut ends[1], LOW - PAGE_SIZE).unwrap();
    let expected = |pages: &[u8]| pages.iter().flat_map(|byte| [*byte; PAGE]).collect::<Vec<_>>();
    assert!(ends == [expected(&[1, 0]), expected(&[2, 3, 0, 0, 0, 4])]);
    assert_eq!(back.metadata().unwrap().len(), LOW + 5 * PAGE_SIZE);
}

#[test]
fn a_file_of_another_length_is_refused_with_both_lengths() {
    let folder = tempfile::tempdir().unwrap();
    let layout = numbered(&folder.path().join("raw"), 4);
    for length in [0, 3 * PAGE_SIZE, 4 * PAGE_SIZE + 1, 5 * PAGE_SIZE] {
        let file = OpenOptions::new().write(true).open(folder.path().join("raw")).unwrap();
        file.set_len(length).unwrap();
        let error = said(import_file(folder.path(), &layout, "image"));
        let expected =
            format!("the file has {length:#x} bytes, but this layout needs exactly 0x4000");
        assert!(error.ends_with(&expected) && error.contains("/raw: "), "{error}");
    }
    std::fs::remove_file(folder.path().join("raw")).unwrap();
    let error = said(import_file(folder.path(), &layout, "image"));
    assert!(error.contains("/raw: cannot open it: No such file"), "{error}");
    std::fs::create_dir(folder.path().join("raw")).unwrap();
    let error = said(import_file(folder.path(), &layout, "image"));
    assert!(error.ends_with("it is not a regular file"), "{error}");
    assert!(!folder.path().join("image").exists());
}

#[test]
fn a_file_that_is_truncated_meanwhile_makes_no_image() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let bytes = vec![5; 6 << 20];
    for remaining in [0, 4 << 20] {
        std::fs::write(path("raw"), &bytes).unwrap();
        let memory = RawFile::open(&path("raw")).unwrap();
        let layout = NamedLayout::Raw.layout(memory.length(), PAGE_SIZE).unwrap();
        let file = OpenOptions::new().write(true).open(path("raw")).unwrap();
        let truncate = |_, _| file.set_len(remaining).unwrap();
        let image = path("image");
        let output = Output { path: &image, replace: false, threads: 1, show: &truncate };
        let error = said(import(&memory, &layout, &[], None, output));
        assert!(
            error.contains("/raw: the file ends at byte") && error.contains("truncated"),
            "{error}"
        );
        assert!(!image.exists());
    }
    // Truncated before its data is looked for: the end would read as a hole.
    std::fs::write(path("raw"), &bytes).unwrap();
    let memory = RawFile::open(&path("raw")).unwrap();
    let layout = NamedLayout::Raw.layout(memory.length(), PAGE_SIZE).unwrap();
    OpenOptions::new().write(true).open(path("raw")).unwrap().set_len(2 << 20).unwrap();
    let error = said(import(&memory, &layout, &[], None, to(&path("image"))));
    assert!(error.contains("/raw: the file was changed while it was read"), "{error}");
    assert!(!path("image").exists());
}

#[test]
fn blocks_that_are_not_possible_are_refused_with_their_numbers() {
    let layout = |blocks: &[(u64, u64, u64)]| {
        let block = |(id, &(gpa, length, offset)): (u32, &(u64, u64, u64))| {
            let (name, granularity) = (format!("ram{id}"), PAGE_SIZE);
            RawBlock { block: BlockGeometry { id, name, gpa, length, granularity }, offset }
        };
        RawLayout::new((0..).zip(blocks).map(block)).unwrap_err().to_string()
    };
    assert!(layout(&[]).contains("no memory"));
    assert!(layout(&[(0x10, 0x1000, 0)]).contains("gpa 0x10 is not a multiple"));
    assert!(layout(&[(0, 0x1001, 0)]).contains("length 0x1001 is not a multiple"));
    assert!(layout(&[(0, 0x1000, 0x800)]).contains("0x0 + 0x1000 at byte 0x800"));
    assert!(layout(&[(0, 0x1000, !0xfff)]).contains("ends after the largest number"));
    assert!(layout(&[(0, 0x2000, 0), (0x1000, 0x1000, 0x2000)]).contains("overlaps block 0"));
    let shared = layout(&[(0, 0x2000, 0), (0x5000, 0x1000, 0x1000)]);
    assert_eq!(shared, "memory 0x0 + 0x2000 and 0x5000 + 0x1000 share bytes of the file");
    let table = numbered(&tempfile::NamedTempFile::new().unwrap().into_temp_path(), 2);
    let twice = RawLayout::of_ranges(table.table().clone(), [(0, 0x1000), (0, 0x1000)]);
    assert!(twice.unwrap_err().to_string().ends_with("share guest memory"));
    let outside = RawLayout::of_ranges(table.table().clone(), [(0x1000, 0x2000)]);
    assert!(outside.unwrap_err().to_string().ends_with("but the blocks are 0x0 + 0x2000"));
}

#[test]
fn an_export_loses_no_content() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let whole = numbered(&path("raw"), 4);
    import_file(folder.path(), &whole, "image").unwrap();
    let chain = Chain::open(&path("image")).unwrap();
    let part = RawLayout::of_ranges(whole.table().clone(), [(0, 3 * PAGE_SIZE)]).unwrap();
    for partial in [false, true] {
        let error = said(export(&chain, &part, partial, &[], to(&path("back"))));
        assert!(
            error.ends_with(
                "the layout has no place for 1 of the pages with content of block 0 \"ram0\""
            ),
            "{error}"
        );
    }
    let other = NamedLayout::FirecrackerAarch64.layout(4 * PAGE_SIZE, PAGE_SIZE).unwrap();
    let error = said(export(&chain, &other, true, &[], to(&path("back"))));
    assert!(error.contains("0x80000000 + 0x4000 does not lie in one block"), "{error}");
    assert!(!path("back").exists());
}

#[test]
fn one_block_of_several_is_exported_alone_if_asked_for() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let block = |id: u32, gpa, offset| {
        let (name, length, granularity) = (format!("ram{id}"), 2 * PAGE_SIZE, PAGE_SIZE);
        RawBlock { block: BlockGeometry { id, name, gpa, length, granularity }, offset }
    };
    numbered(&path("raw"), 4);
    let both = RawLayout::new([block(0, 0, 0), block(1, 1 << 20, 2 * PAGE_SIZE)]).unwrap();
    import_file(folder.path(), &both, "image").unwrap();
    let chain = Chain::open(&path("image")).unwrap();
    let second = RawLayout::new([block(1, 1 << 20, PAGE_SIZE)]).unwrap();
    let error = said(export(&chain, &second, false, &[], to(&path("back"))));
    assert!(error.contains("no place for 2 of the pages with content"), "{error}");
    export(&chain, &second, true, &[], to(&path("back"))).unwrap();
    let expected = [vec![0; PAGE], vec![3; PAGE], vec![4; PAGE]].concat();
    assert!(std::fs::read(path("back")).unwrap() == expected);
}

#[test]
fn pieces_of_state_go_into_the_image_and_come_back() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let layout = numbered(&path("raw"), 1);
    std::fs::write(path("config"), "{}").unwrap();
    std::fs::write(path("empty"), "").unwrap();
    let piece = |name: &str, file: &str| Piece { name: name.into(), path: path(file) };
    let pieces = [piece("config", "config"), piece("none", "empty"), piece("again", "config")];
    let memory = RawFile::open(&path("raw")).unwrap();
    import(&memory, &layout, &pieces, None, to(&path("image"))).unwrap();
    let chain = Chain::open(&path("image")).unwrap();
    assert_eq!(chain.newest().state().unwrap(), b"{}{}");

    let wanted = [piece("again", "one"), piece("none", "two")];
    export(&chain, &layout, false, &wanted, to(&path("back"))).unwrap();
    let read = |name: &str| std::fs::read_to_string(path(name)).unwrap();
    assert_eq!((read("one"), read("two")), ("{}".into(), String::new()));

    let import = |pieces: &[Piece]| said(import(&memory, &layout, pieces, None, to(&path("new"))));
    assert!(import(&[piece("a", "config"), piece("a", "empty")]).contains("state \"a\", file"));
    assert!(import(&[piece("a", "gone")]).contains("/gone: cannot read it: No such file"));
    assert!(import(&[piece(&"a".repeat(256), "config")]).contains("its name has 256 bytes"));
    let export = |pieces: &[Piece]| said(export(&chain, &layout, false, pieces, to(&path("new"))));
    let missing = export(&[piece("devices", "three")]);
    assert!(missing.ends_with("no such state, but: \"config\", \"none\", \"again\""), "{missing}");
    assert!(export(&[piece("none", "new")]).contains("another file of this export has the same"));
    assert!(export(&[piece("none", "one")]).contains("/one: the file exists"));
    assert!(!path("new").exists() && !path("three").exists());
}

#[test]
fn an_export_replaces_only_what_may_be_an_export() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let layout = numbered(&path("raw"), 2);
    import_file(folder.path(), &layout, "image").unwrap();
    assert!(said(import_file(folder.path(), &layout, "image")).contains("the file exists"));
    let chain = Chain::open(&path("image")).unwrap();
    let export = |into: PathBuf, replace| {
        export(&chain, &layout, false, &[], Output { replace, ..to(&into) })
    };
    std::fs::write(path("old"), vec![9; 2 * PAGE]).unwrap();
    assert!(said(export(path("old"), false)).contains("the file exists"));
    export(path("old"), true).unwrap();
    assert!(std::fs::read(path("old")).unwrap() == std::fs::read(path("raw")).unwrap());
    for (name, length) in [("shorter", PAGE), ("disk", 3 * PAGE)] {
        std::fs::write(path(name), vec![9; length]).unwrap();
        let error = said(export(path(name), true));
        assert!(error.contains("is not a memory file of the same length"), "{error}");
        assert_eq!(path(name).metadata().unwrap().len(), length as u64);
    }
    assert!(said(export(path("image"), true)).contains("is not a memory file"));
    // A file of the right length that is something else.
    let picture = [&b"\x89PNG\r\n\x1a\n"[..], &[0; 2 * PAGE - 8]].concat();
    std::fs::write(path("picture"), &picture).unwrap();
    assert!(said(export(path("picture"), true)).contains("is not a memory file"));
    assert!(Chain::open(&path("image")).is_ok());
}

#[test]
fn state_never_replaces_an_image() {
    let folder = tempfile::tempdir().unwrap();
    let layout = numbered(&folder.path().join("raw"), 1);
    import_file(folder.path(), &layout, "image").unwrap();
    let replaced = write_new(&folder.path().join("image"), b"", FileKind::STATE, true);
    assert!(matches!(replaced.unwrap_err().fault, ImageFault::OtherKind { .. }));
    std::fs::write(folder.path().join("old"), "anything").unwrap();
    write_new(&folder.path().join("old"), b"new", FileKind::STATE, true).unwrap();
    assert_eq!(std::fs::read(folder.path().join("old")).unwrap(), b"new");
}
