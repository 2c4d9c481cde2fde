// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

use super::test_support::{
    BLOCKS, Page, bitmaps, check, content, merged, pages, table, write, zero,
};
use super::writer::{Base, ImageMetadata};
use super::*;
use crate::error::chain as sentence;
use crate::memory::PageBuffer;
use pageferry_protocol::control::job::RunState;
use pageferry_protocol::control::state_pieces::PieceSize;
use pageferry_protocol::image::{Header, ImageId};
use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use pageferry_protocol::shm::MappedBitmap;
use proptest::prelude::*;
use rustix::io::Errno;
use std::os::fd::AsFd;
use std::path::Path;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn a_chain_is_read_as_it_was_written(full in pages(false), one in pages(true), two in pages(true), step in 1usize..200) {
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
    fn a_changed_byte_is_found_before_it_is_used(full in pages(false), at in any::<prop::sample::Index>(), change in 1u8..) {
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
            }
            chain.newest().state().map(drop)
        };
        match Chain::open(&path).and_then(|chain| read(&chain).map(|()| chain)) {
            // The changed byte is in a hole, which is never read.
            Ok(chain) => check(&chain, &full),
            Err(error) => prop_assert!(sentence(&error).contains("damaged") || sentence(&error).contains("not an image"), "{}", sentence(&error)),
        }
    }
}

#[test]
fn an_extent_without_content_has_the_checksum_of_zero_checksums() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image");
    let mut model = zero();
    model[1][600] = Page::Content(1);
    write(&path, &model, &Base::default(), 64);
    let report = verify::verify(&path, 1, 1, &|_, _| ());
    assert!(report.errors.is_empty(), "{:?}", report.errors);
}

#[test]
fn damaged_states_are_reported_as_damaged() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image");
    let model =
        vec![vec![Page::Discarded; BLOCKS[0] as usize], vec![Page::Zero; BLOCKS[1] as usize]];
    write(&path, &model, &Base::default(), 64);
    let at = Image::open(&path).unwrap().layout().states() as usize;
    let mut bytes = std::fs::read(&path).unwrap();
    // The first change makes page 0 as in a base, but there is no base. The second changes the
    // state of a page after the end of the block.
    for at in [at, at + 31] {
        bytes[at] ^= 1;
        std::fs::write(&path, &bytes).unwrap();
        let error = sentence(&Image::open(&path).unwrap_err());
        assert!(
            error.contains("section states of pages") && error.ends_with("the image is damaged"),
            "{error}"
        );
        bytes[at] ^= 1;
    }
}

/// Changes the id of the base in the header of the image at `path`. Zeroes mean no base.
fn rebase(path: &Path, base: ImageId) {
    let file = std::fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
    let mut bytes = [0; 4096];
    bytes::read_at(file.as_fd(), &mut bytes, 0).unwrap();
    let header = Header { base, ..Header::from_bytes(&bytes).unwrap() };
    bytes::write_at(file.as_fd(), &header.to_bytes(), 0).unwrap();
}

#[test]
fn a_state_that_is_not_allowed_is_reported_with_its_page() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image");
    // The states of this block are read in two parts.
    let (pages, odd) = ((1 << 22) + 64, (1 << 22) + 3);
    let writer = ImageWriter::create(&path, &table(&[pages]), false, true).unwrap();
    let bitmap = || MappedBitmap::private(pages).unwrap();
    let (discarded, changed) = ([bitmap()], [bitmap()]);
    changed[0].set(PageRange::new(0, odd));
    changed[0].set(PageRange::new(odd + 1, pages - odd - 1));
    let rest =
        ImageMetadata { guest: RunState::Running, discarded: &discarded, changed: Some(&changed) };
    writer.finish(rest, &Base { id: [7; 16], name: String::new() }, Vec::new(), None).unwrap();
    rebase(&path, [0; 16]);
    let error = sentence(&Image::open(&path).unwrap_err());
    assert!(error.contains(&format!("page that is as in the base is {odd:#x}")), "{error}");
}

#[test]
fn a_base_has_a_name_and_an_id_or_neither() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image");
    for (name, id, shown) in [("full", [0; 16], "\"full\""), ("", [7; 16], "\"\"")] {
        write(&path, &zero(), &Base { id, name: name.into() }, 64);
        let error = sentence(&Image::open_contents(&path, None).unwrap_err());
        assert!(error.contains(&format!("base name is {shown} and base id is ")), "{error}");
        std::fs::remove_file(&path).unwrap();
    }
}

#[test]
fn an_image_that_builds_on_itself_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let zero = zero();
    let id = write(&path("one"), &zero, &Base { id: [7; 16], name: "two".into() }, 64);
    let id = write(&path("two"), &zero, &Base { id, name: "one".into() }, 64);
    rebase(&path("one"), id);
    let error = Chain::open(&path("two")).unwrap_err();
    assert!(
        matches!(error.fault, ImageFault::ChainLoop { id: found } if found == id),
        "{}",
        sentence(&error)
    );
}

#[test]
fn the_path_of_a_base_is_relative_to_the_file_and_not_to_a_link() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let zero = zero();
    std::fs::create_dir(path("images")).unwrap();
    std::fs::create_dir(path("links")).unwrap();
    let id = write(&path("images/full"), &zero, &Base::default(), 64);
    std::os::unix::fs::symlink(path("images/full"), path("links/base")).unwrap();
    std::os::unix::fs::symlink(path("images"), path("same")).unwrap();
    for (of, base, expected) in [
        ("images/one", "links/base", "full"),
        ("images/one", "same/full", "full"),
        ("same/one", "images/full", "full"),
        ("links/one", "same/full", path("images/full").canonicalize().unwrap().to_str().unwrap()),
    ] {
        assert_eq!(chain::name_of_base(&path(base), &path(of)), expected, "{base} of {of}");
    }
    write(&path("images/one"), &zero, &Base { id, name: "full".into() }, 64);
    std::os::unix::fs::symlink(path("images/one"), path("links/one")).unwrap();
    check(&Chain::open(&path("links/one")).unwrap(), &zero);
}

#[test]
fn a_chain_with_a_wrong_image_is_refused_with_the_reason() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let zero = zero();
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
    assert!(matches!(Chain::open(folder.path()).unwrap_err().fault, ImageFault::NotARegularFile));
}

#[test]
fn an_image_truncated_during_a_read_is_reported_with_its_end() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let mut pages = zero();
    pages[1][0..600].fill(Page::Content(5));
    let id = write(&path("full"), &pages, &Base::default(), 64);
    let unchanged: Vec<_> = pages.iter().map(|block| vec![Page::Unchanged; block.len()]).collect();
    write(&path("next"), &unchanged, &Base { id, name: "full".into() }, 64);
    // Once the truncated file is opened itself, and once it is the base of the opened image.
    for name in ["full", "next"] {
        let chain = Chain::open(&path(name)).unwrap();
        let (image, at) = (chain.layers().last().unwrap(), 1);
        let (layout, block) = (image.image.layout(), image.image.contents().table.blocks()[at].id);
        let file = std::fs::OpenOptions::new().write(true).open(path("full")).unwrap();
        let length = file.metadata().unwrap().len();
        let bytes = std::fs::read(path("full")).unwrap();
        let mut into = vec![0; 512 * PAGE_SIZE as usize];
        let mut cut_to = |end: u64, first: u64| {
            file.set_len(end).unwrap();
            let error = chain.read_extent(at, PageRange::new(first, 88), &mut into).unwrap_err();
            std::fs::write(path("full"), &bytes).unwrap();
            sentence(&error)
        };
        let (file_name, page) = (path("full").display().to_string(), |page| layout.page(at, page));
        // The file ends in the middle of a page of the read, or long before the first page.
        for (end, missing) in [(page(540) + 70, 540), (page(3), 512), (4097, 512), (0, 512)] {
            let expected = format!(
                "image {file_name}: block {block}: page {missing:#x}, at byte {:#x}: the file ends at byte {end:#x}, ",
                page(missing)
            );
            let error = cut_to(end, 512);
            assert!(error.starts_with(&expected) && error.ends_with("it is truncated"), "{error}");
        }
        let sums = layout.page_sum(at, 512);
        for end in [layout.page_sums(), sums + 9] {
            let expected = format!(
                "image {file_name}: block {block}: checksums of pages 0x200 + 0x200, at byte {sums:#x}: \
                 the file ends at byte {end:#x}, "
            );
            let error = cut_to(end, 512);
            assert!(error.starts_with(&expected), "{error}");
        }
        assert_eq!(std::fs::metadata(path("full")).unwrap().len(), length);
    }
}

#[test]
fn blocks_are_compared_before_states_are_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let pages = BLOCKS[0] * 2;
    let writer = ImageWriter::create(&path("base"), &table(&[pages]), false, true).unwrap();
    let discarded = [MappedBitmap::private(pages).unwrap()];
    let rest = ImageMetadata { guest: RunState::Running, discarded: &discarded, changed: None };
    writer.finish(rest, &Base::default(), Vec::new(), None).unwrap();
    let states = Image::open(&path("base")).unwrap().layout().states();
    // The states are damaged. A program that reads them gets this error first.
    let file = std::fs::OpenOptions::new().write(true).open(path("base")).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &[7], states).unwrap();
    let error = sentence(&Image::open(&path("base")).unwrap_err());
    assert!(error.contains("section states of pages"), "{error}");
    write(&path("next"), &zero(), &Base { id: writer.id(), name: "base".into() }, 64);

    let blocks_differ = |error: &ImageError| {
        let error = sentence(error);
        assert!(error.contains("has other blocks"), "{error}");
    };
    blocks_differ(&Chain::open(&path("next")).unwrap_err());
    blocks_differ(&chain::lineage(&path("next"), None).unwrap_err());
    blocks_differ(&merge::merge(&path("next"), &path("merged"), false, 1, &|_, _| ()).unwrap_err());
    let report = verify::verify(&path("next"), 1, 9, &|_, _| ());
    assert_eq!(
        (report.images.len(), report.errors.len()),
        (1, 1),
        "the increment itself is looked at"
    );
    blocks_differ(&report.errors[0]);
    // With the right blocks, the base is refused for its states.
    std::fs::remove_file(path("next")).unwrap();
    let writer = ImageWriter::create(&path("next"), &table(&[pages]), false, true).unwrap();
    let base = Base {
        id: Image::open_contents(&path("base"), None).unwrap().header().id,
        name: "base".into(),
    };
    let rest = ImageMetadata {
        guest: RunState::Running,
        discarded: &discarded,
        changed: Some(&discarded),
    };
    writer.finish(rest, &base, Vec::new(), None).unwrap();
    let error = sentence(&Chain::open(&path("next")).unwrap_err());
    assert!(
        error.contains("its base cannot be used") && error.contains("section states of pages"),
        "{error}"
    );
}

/// True if the page at `offset` of the file is in the page cache; `None` if the file system does
/// not say.
fn is_cached(file: &std::fs::File, offset: u64) -> Option<bool> {
    let mut page = vec![0; PAGE_SIZE as usize];
    let into = &mut [std::io::IoSliceMut::new(&mut page)];
    match rustix::io::preadv2(file, into, offset, rustix::io::ReadWriteFlags::NOWAIT) {
        Ok(count) => Some(count > 0),
        Err(errno) => (errno == Errno::AGAIN).then_some(false),
    }
}

/// Writes a large and a small run of the second block from a buffer that begins `skewed` bytes
/// after the start of a page. Returns which of the two are in the page cache afterwards; `None` if
/// the file system keeps everything there, as tmpfs does, or does not say.
fn cached(skewed: usize, cached: bool) -> Option<[bool; 2]> {
    const LARGE: PageRange = PageRange { first: 600, count: 200 };
    const SMALL: PageRange = PageRange { first: 100, count: 8 };
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image");
    let mut model = zero();
    [LARGE, SMALL]
        .iter()
        .for_each(|run| model[1][run.first as usize..run.end() as usize].fill(Page::Content(7)));
    let writer = ImageWriter::create(&path, &table(&BLOCKS), false, cached).unwrap();
    let possible = {
        let flags =
            rustix::fs::OFlags::RDWR | rustix::fs::OFlags::DIRECT | rustix::fs::OFlags::CREATE;
        rustix::fs::open(
            folder.path().join("other"),
            flags,
            rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR,
        )
        .is_ok()
    };
    assert_eq!(writer.is_direct(), possible && !cached);
    let mut buffer = PageBuffer::new((LARGE.bytes() + PAGE_SIZE) as usize);
    let bytes = &mut buffer[skewed..];
    bytes.chunks_exact_mut(PAGE_SIZE as usize).for_each(|page| page.copy_from_slice(&content(7)));
    for run in [LARGE, SMALL] {
        assert_eq!(writer.put(1, run, &mut bytes[..run.bytes() as usize]).unwrap(), run.count);
    }
    let discarded = bitmaps(&model, |_| false);
    let state = rustix::fs::memfd_create("state", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::io::write(&state, b"devices!").unwrap();
    let pieces = vec![PieceSize { name: "a".into(), length: 8 }];
    let rest = ImageMetadata { guest: RunState::Running, discarded: &discarded, changed: None };
    writer.finish(rest, &Base::default(), pieces, Some(state.as_fd())).unwrap();
    let file = std::fs::File::open(&path).unwrap();
    let layout = Image::open(&path).unwrap().layout().clone();
    let found = [LARGE, SMALL].map(|run| is_cached(&file, layout.page(1, run.first)));
    check(&Chain::open(&path).unwrap(), &model);
    const TMPFS: i64 = 0x0102_1994;
    let tells = possible && rustix::fs::fstatfs(&file).unwrap().f_type != TMPFS;
    Some([found[0]?, found[1]?]).filter(|_| tells)
}

#[test]
fn large_runs_are_written_with_direct_io_where_possible() {
    for (skewed, through, expected) in [
        (0, false, [false, true]),
        (0, true, [true, true]),
        // Direct I/O refuses this buffer, so it is written through the page cache.
        (1, false, [true, true]),
    ] {
        // The kernel sometimes writes through the page cache by itself, for example ext4 if it
        // cannot drop the cached pages of the range. So there are several attempts.
        let found = (0..50)
            .map(|_| cached(skewed, through))
            .find(|found| *found != Some([true, true]) || expected[0]);
        match found {
            Some(Some(found)) => {
                assert_eq!(found, expected, "buffer at {skewed}, cached {through}")
            }
            Some(None) => eprintln!(
                "skipped: the folder for temporary files is not on a disk, \
                 or its file system does not say what is cached"
            ),
            None => panic!("in 50 attempts no large run was written with direct I/O"),
        }
    }
}
