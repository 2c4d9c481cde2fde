// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Every decoder on thousands of inputs, the same ones every time. What has to hold of them is in
//! `pageferry_tests::decoders`, which the fuzz targets share.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use pageferry_tests::decoders::heap::{CountingHeap, counts};
use pageferry_tests::decoders::{TARGETS, hammer};
use std::path::Path;

#[global_allocator]
static HEAP: CountingHeap = CountingHeap;

const ROUNDS: u64 = 20_000;
/// Those of one value, which nothing but its last byte ends.
const CUT: [&str; 5] = ["request", "hook", "standard", "image_contents", "working_set"];

#[test]
fn no_bytes_make_a_decoder_panic_or_allocate_too_much() {
    assert!(counts(), "what decoding takes is measured");
    for target in &TARGETS {
        let hammered = hammer(target, ROUNDS);
        assert!(
            hammered.accepted > ROUNDS / 50,
            "{} refuses nearly all: {hammered:?}",
            target.name
        );
        assert!(hammered.refused > ROUNDS / 50, "{} accepts nearly all: {hammered:?}", target.name);
    }
}

#[test]
fn every_decoder_has_a_fuzz_target() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/fuzz_targets");
    let mut files: Vec<_> =
        std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    let mut names: Vec<_> = TARGETS.iter().map(|target| target.name).collect();
    files.sort();
    names.sort_unstable();
    assert!(files.iter().map(|path| path.file_stem().unwrap()).eq(names));
}

#[test]
fn a_body_that_is_cut_short_is_refused() {
    for target in TARGETS.iter().filter(|target| CUT.contains(&target.name)) {
        for seed in (target.seeds)() {
            for end in 1..seed.len() {
                assert!(!(target.run)(&seed[..end]), "{}: {end} bytes of {seed:02x?}", target.name);
            }
        }
    }
}
