// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Inputs that a fuzzer has found, each of which takes a way through a decoder that no other takes.
//! `tests/fuzz/kept/TARGET` has them, one on each line, in hexadecimal digits.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

/// Longest input that is kept, in bytes.
const LONGEST: usize = 1024;
/// Most inputs that are kept of a target.
const MOST: usize = 200;

fn path(target: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/kept").join(target)
}

/// The inputs of a target; none if nobody has kept one.
pub fn kept(target: &str) -> Vec<Vec<u8>> {
    let text = match std::fs::read_to_string(path(target)) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Vec::new(),
        text => text.unwrap(),
    };
    let byte = |digits: &[u8]| u8::from_str_radix(str::from_utf8(digits).unwrap(), 16).unwrap();
    text.lines().map(|line| line.as_bytes().chunks(2).map(byte).collect()).collect()
}

/// Keeps these inputs of a target, instead of those before. Long ones are left out, and of too many
/// every second or third is kept.
///
/// # Errors
/// If the file cannot be written.
pub fn keep(target: &str, mut inputs: Vec<Vec<u8>>) -> std::io::Result<()> {
    inputs.retain(|input| (1..=LONGEST).contains(&input.len()));
    inputs.sort();
    let step = inputs.len().div_ceil(MOST).max(1);
    let inputs: Vec<_> = inputs.iter().step_by(step).collect();
    let line = |input: &[u8]| input.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let lines: String = inputs.into_iter().map(|input| line(input) + "\n").collect();
    std::fs::write(path(target), lines)
}
