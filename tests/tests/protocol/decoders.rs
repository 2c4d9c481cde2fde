// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Every decoder on thousands of repeatable inputs. `pageferry_tests::decoders` says what must
//! hold, for this test and for the fuzz targets.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use pageferry_tests::decoders::heap::{CountingHeap, counts};
use pageferry_tests::decoders::{TARGETS, hammer, kept};
use std::path::Path;

#[global_allocator]
static HEAP: CountingHeap = CountingHeap;

const ROUNDS: u64 = 20_000;
/// Targets that make a handshake for each input run on a part of the inputs.
const HANDSHAKES: [&str; 2] = ["tls_certificate", "tls_disturbed"];
/// What is read before a peer has proved who it is. Inputs of a fuzzer are kept for each.
const BEFORE_PROOF: [&str; 7] = [
    "hello",
    "record",
    "record_stream",
    "scrape",
    "tls_stranger",
    "tls_certificate",
    "tls_disturbed",
];
/// Decoders of a single value, which is complete only with its last byte.
const SINGLE_VALUE: [&str; 5] = ["request", "hook", "vhost_user", "image_contents", "working_set"];

#[test]
fn no_bytes_make_a_decoder_panic_or_allocate_too_much() {
    assert!(counts(), "the memory of decoders is measured");
    for target in &TARGETS {
        let rounds = if HANDSHAKES.contains(&target.name) { ROUNDS / 10 } else { ROUNDS };
        let hammered = hammer(target, rounds);
        assert!(
            hammered.accepted > rounds / 50,
            "{} refuses nearly all: {hammered:?}",
            target.name
        );
        assert!(hammered.refused > rounds / 50, "{} accepts nearly all: {hammered:?}", target.name);
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
    assert!(files.iter().map(|path| path.file_stem().unwrap()).eq(names.iter().copied()));
    let kept = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/kept");
    for entry in std::fs::read_dir(kept).unwrap() {
        let name = entry.unwrap().file_name();
        assert!(names.iter().any(|known| name == *known), "{name:?} is no target");
    }
    for name in BEFORE_PROOF {
        assert!(kept::kept(name).len() > 40, "{name} has no inputs of a fuzzer");
    }
    // This workspace does not compile the targets, so a new name of a function must not be missed.
    for (file, name) in files.iter().zip(names) {
        let source = std::fs::read_to_string(file).unwrap();
        assert!(source.contains(&format!("::{name});")), "{}: {source}", file.display());
    }
}

#[test]
fn a_body_that_is_cut_short_is_refused() {
    for target in TARGETS.iter().filter(|target| SINGLE_VALUE.contains(&target.name)) {
        for seed in (target.seeds)() {
            for end in 1..seed.len() {
                assert!(!(target.run)(&seed[..end]), "{}: {end} bytes of {seed:02x?}", target.name);
            }
        }
    }
}
