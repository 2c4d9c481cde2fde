// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Thousands of repeatable inputs for a decoder: noise, and accepted inputs with mutations.

use super::Target;
use super::kept::kept;
use crate::random::Random;

/// Longest input of pure noise, in bytes.
const NOISE: u64 = 300;
/// How many bytes of a failed input are shown. The next run repeats the whole input.
const SHOWN: usize = 400;
/// Numbers at which decoders often fail.
const EDGES: [u64; 10] =
    [0, 1, 0xff, 0x7fff_ffff, 0xffff_ffff, 1 << 32, 1 << 50, 1 << 63, u64::MAX - 4095, u64::MAX];

/// How many inputs were accepted, and how many were refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Hammered {
    /// Inputs that the decoder accepted.
    pub accepted: u64,
    /// Inputs that it refused.
    pub refused: u64,
}

/// Runs `target` over its seeds, over what a fuzzer has found for it, and then over `rounds` inputs
/// that its name determines.
///
/// # Panics
/// If the target panics, or refuses a seed.
pub fn hammer(target: &Target, rounds: u64) -> Hammered {
    let seeds = (target.seeds)();
    for seed in &seeds {
        assert!(shown(target, seed), "{} refuses its own seed {seed:02x?}", target.name);
    }
    for input in kept(target.name) {
        shown(target, &input);
    }
    let name = target
        .name
        .bytes()
        .fold(0, |hash: u64, byte| hash.wrapping_mul(31).wrapping_add(byte.into()));
    let mut random = Random::new(name);
    let mut hammered = Hammered::default();
    for _ in 0..rounds {
        let input =
            if random.percent(20) { noise(&mut random) } else { mutated(&mut random, &seeds) };
        match shown(target, &input) {
            true => hammered.accepted += 1,
            false => hammered.refused += 1,
        }
    }
    hammered
}

/// Runs the target. If it panics, prints the input.
fn shown(target: &Target, input: &[u8]) -> bool {
    struct Shown<'a>(&'a str, &'a [u8]);
    impl Drop for Shown<'_> {
        fn drop(&mut self) {
            if std::thread::panicking() {
                let shown = &self.1[..self.1.len().min(SHOWN)];
                eprintln!("input of {}, {} bytes: {shown:02x?}", self.0, self.1.len());
            }
        }
    }
    let _shown = Shown(target.name, input);
    (target.run)(input)
}

fn noise(random: &mut Random) -> Vec<u8> {
    let mut bytes = vec![0; random.below(NOISE) as usize];
    random.fill(&mut bytes);
    bytes
}

fn mutated(random: &mut Random, seeds: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = pick(random, seeds).cloned().unwrap_or_default();
    for _ in 0..=random.below(3) {
        mutate(random, &mut bytes, seeds);
    }
    bytes
}

fn pick<'a, T>(random: &mut Random, of: &'a [T]) -> Option<&'a T> {
    of.get(random.below(of.len() as u64) as usize)
}

fn mutate(random: &mut Random, bytes: &mut Vec<u8>, seeds: &[Vec<u8>]) {
    let at = random.below(bytes.len() as u64) as usize;
    match random.below(8) {
        0 => bytes.truncate(at),
        1 => bytes.insert(at, random.next() as u8),
        2 if !bytes.is_empty() => drop(bytes.remove(at)),
        // Replace the rest by a part of another input.
        3 => {
            bytes.truncate(at);
            let other = pick(random, seeds).map_or(&[][..], Vec::as_slice);
            bytes.extend_from_slice(&other[random.below(other.len() as u64) as usize..]);
        }
        // Append the whole input once more.
        4 if bytes.len() < 4096 => bytes.extend_from_within(..),
        // Write a number at a limit, in any width.
        5 | 6 if !bytes.is_empty() => {
            let number = pick(random, &EDGES)
                .map_or(0, |edge| edge.wrapping_add(random.below(3)).wrapping_sub(1));
            let width = (1usize << random.below(4)).min(bytes.len() - at);
            bytes[at..at + width].copy_from_slice(&number.to_le_bytes()[..width]);
        }
        _ if !bytes.is_empty() => bytes[at] ^= 1 << random.below(8),
        _ => bytes.push(random.next() as u8),
    }
}
