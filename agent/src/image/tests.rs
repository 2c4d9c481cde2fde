use super::test_support::{BLOCKS, Page, bitmaps, check, content, merged, pages, table, write, zero};
use super::writer::{Base, Rest};
use super::*;
use crate::error::chain as sentence;
use pageferry_protocol::control::hook::PieceSize;
use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use proptest::prelude::*;
use rustix::io::Errno;
use std::os::fd::AsFd;

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
    let mut model = zero();
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
    let zero = zero();
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
    assert!(matches!(Chain::open(folder.path()).unwrap_err().fault, Fault::Kind));
}

/// Whether the page at `offset` of the file is in the page cache, if the file system tells.
fn is_cached(file: &std::fs::File, offset: u64) -> Option<bool> {
    let mut page = vec![0; PAGE_SIZE as usize];
    let into = &mut [std::io::IoSliceMut::new(&mut page)];
    match rustix::io::preadv2(file, into, offset, rustix::io::ReadWriteFlags::NOWAIT) {
        Ok(count) => Some(count > 0),
        Err(errno) => (errno == Errno::AGAIN).then_some(false),
    }
}

/// Writes a large run and a small one of the second block, out of a buffer that begins `skewed` bytes after a page. Returns which of them are in the page cache after; or nothing
/// if the file system keeps all of it there, as tmpfs does, or does not tell.
fn cached(skewed: usize, cached: bool) -> Option<[bool; 2]> {
    const LARGE: PageRange = PageRange { first: 600, count: 200 };
    const SMALL: PageRange = PageRange { first: 100, count: 8 };
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image");
    let mut model = zero();
    [LARGE, SMALL].iter().for_each(|run| model[1][run.first as usize..run.end() as usize].fill(Page::Content(7)));
    let writer = ImageWriter::create(&path, &table(), false, cached).unwrap();
    let possible = {
        let flags = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::DIRECT | rustix::fs::OFlags::CREATE;
        rustix::fs::open(folder.path().join("other"), flags, rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR).is_ok()
    };
    assert_eq!(writer.is_direct(), possible && !cached);
    let mut buffer = PageBuffer::new((LARGE.bytes() + PAGE_SIZE) as usize);
    let bytes = &mut buffer[skewed..];
    bytes.chunks_exact_mut(PAGE_SIZE as usize).for_each(|page| page.copy_from_slice(&content(7)));
    for run in [LARGE, SMALL] {
        assert_eq!(writer.put(1, run, &bytes[..run.bytes() as usize]).unwrap(), run.count);
    }
    let discarded = bitmaps(&model, |_| false);
    let state = rustix::fs::memfd_create("state", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::io::write(&state, b"devices!").unwrap();
    let pieces = vec![PieceSize { name: "a".into(), length: 8 }];
    let rest = Rest { discarded: &discarded, changed: None };
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
fn large_runs_go_past_the_page_cache_where_they_can() {
    for (skewed, through, expected) in [
        (0, false, [false, true]),
        (0, true, [true, true]),
        // A disk takes no such buffer: it is copied after all.
        (1, false, [true, true]),
    ] {
        match cached(skewed, through) {
            Some(found) => assert_eq!(found, expected, "buffer at {skewed}, cached {through}"),
            None => eprintln!("skipped: the folder for temporary files is on no disk, or on one that does not tell"),
        }
    }
}
