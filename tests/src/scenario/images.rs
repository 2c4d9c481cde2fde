// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Images: options of snapshots, checks of images, and damage to images.

use crate::memory::{TestBlock, TestMemory};
use pageferry_agent::image::Chain;
use pageferry_client::{Client, SnapshotMode, SnapshotOptions};
use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use rustix::io::{Errno, ReadWriteFlags};
use std::fs::File;
use std::io::IoSliceMut;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Offset in an image at which its pages begin.
pub const FIRST: u64 = 2 << 20;

/// Options of a snapshot of a paused guest.
pub fn paused() -> SnapshotOptions {
    SnapshotOptions { mode: SnapshotMode::Paused, ..SnapshotOptions::default() }
}

/// These options for an image on which an increment can be built.
pub fn tracked(options: SnapshotOptions) -> SnapshotOptions {
    SnapshotOptions { track: true, ..options }
}

/// These options for an increment to the image at `base`.
pub fn on(base: &Path, options: SnapshotOptions) -> SnapshotOptions {
    SnapshotOptions { base: base.to_str().unwrap().to_owned(), ..options }
}

/// Checks that the memory and the image are the same, byte for byte.
#[track_caller]
pub fn assert_saved(memory: &TestMemory, client: &Client, chain: &Chain) {
    for (at, geometry) in chain.table().blocks().iter().enumerate() {
        let block = memory.block(geometry.id).unwrap();
        let discarded = client.discarded(geometry.id).unwrap();
        let mut saved = vec![0; PAGE_SIZE as usize];
        for page in 0..geometry.pages() {
            let (here, there) = (discarded.contains(page), chain.discarded(at).contains(page));
            assert_eq!(here, there, "page {page:#x} of block {}: discarded", geometry.id);
            chain.read(at, PageRange::new(page, 1), &mut saved).unwrap();
            let same = here || saved == block.read_page(page).unwrap();
            assert!(same, "page {page:#x} of block {}", geometry.id);
        }
    }
}

/// All bytes of the block.
pub fn bytes_of(block: &TestBlock) -> Vec<u8> {
    let mut bytes = vec![0; block.layout().length as usize];
    block.read(0, &mut bytes).unwrap();
    bytes
}

/// Checks that each page of the block that holds something is equal to that of `right`.
#[track_caller]
pub fn assert_right_or_missing(block: &TestBlock, right: &[u8], what: &str) {
    let here = bytes_of(block);
    let pages = here.chunks(PAGE_SIZE as usize).zip(right.chunks(PAGE_SIZE as usize));
    for (page, (here, right)) in pages.enumerate() {
        let missing = here.iter().all(|byte| *byte == 0);
        assert!(
            missing || here == right,
            "{what}: page {page:#x} of block {} is wrong",
            block.id()
        );
    }
}

/// Whether the byte at `at` of the file is in the page cache. `None` if the file system does not
/// report that.
pub fn is_cached(path: &Path, at: u64) -> Option<bool> {
    let (file, mut byte) = (File::open(path).unwrap(), [0]);
    match rustix::io::preadv2(&file, &mut [IoSliceMut::new(&mut byte)], at, ReadWriteFlags::NOWAIT)
    {
        Ok(count) => Some(count > 0),
        Err(errno) => (errno == Errno::AGAIN).then_some(false),
    }
}

/// Inverts the bits of a byte that are set in `bits`.
pub fn flip(path: &Path, at: u64, bits: u8) {
    let file = File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ bits], at).unwrap();
}
