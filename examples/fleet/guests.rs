// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Who starts where and when, and which extents each guest reads.

use crate::options::Options;
use pageferry_tests::random::Random;

/// Microseconds since the start of the simulation.
pub(crate) type Time = u64;

/// A guest that starts.
#[derive(Debug, Clone)]
pub(crate) struct Guest {
    pub(crate) at: Time,
    pub(crate) image: u32,
    /// True if it reads the rest of its memory after its working set.
    pub(crate) reads_all: bool,
    seed: u64,
}

/// A random number from 0 to 1, without 1.
fn fraction(random: &mut Random) -> f64 {
    (random.next() >> 11) as f64 / (1_u64 << 53) as f64
}

/// The guests of each host, in the order in which they start.
pub(crate) fn arrivals(options: &Options) -> Vec<Vec<Guest>> {
    let weights: Vec<f64> =
        (1..=options.images).map(|rank| (rank as f64).powf(-options.zipf)).collect();
    let total: f64 = weights.iter().sum();
    let mean = options.seconds as f64 * 1e6 / options.guests as f64;
    let mut random = Random::new(options.seed);
    let mut hosts = vec![Vec::new(); options.hosts as usize];
    let mut at = 0.0;
    for _ in 0..options.guests {
        at -= mean * (1.0 - fraction(&mut random)).ln();
        let mut left = fraction(&mut random) * total;
        let image = weights.iter().position(|weight| {
            left -= weight;
            left < 0.0
        });
        let image = image.unwrap_or(0) as u64;
        let most = options.hosts_per_image.unwrap_or(options.hosts).min(options.hosts);
        // The hosts of an image begin at a place of its own, so that the load is spread.
        let first = Random::derive(options.seed, image).below(options.hosts);
        let host = (first + random.below(most)) % options.hosts;
        hosts[host as usize].push(Guest {
            at: at as Time,
            image: image as u32,
            reads_all: random.percent(options.readers_of_all),
            seed: random.next(),
        });
    }
    hosts
}

/// The extents of the images.
#[derive(Debug)]
pub(crate) struct Images {
    /// Size of an extent in bytes.
    pub(crate) extent: u64,
    /// Number of extents in an image.
    pub(crate) extents: u32,
    piece: u64,
    pieces: u64,
    /// First bytes of the pieces that every guest of an image reads.
    common: Vec<Vec<u64>>,
    /// Number of pieces that each guest chooses for itself.
    own: u64,
}

impl Images {
    /// Images with extents of this size in bytes. Pieces do not depend on that size.
    pub(crate) fn new(options: &Options, extent: u64) -> Self {
        let (memory, piece) = (options.memory << 20, options.piece << 10);
        let pieces = (memory / piece).max(1);
        let wanted = ((options.working_set << 20) / piece).min(pieces);
        // Two sets of w pieces that share c have the Jaccard index c / (2w - c).
        let common = wanted as f64 * 2.0 * options.jaccard / (1.0 + options.jaccard);
        let common = (common.round() as u64).min(wanted);
        let image = |image| {
            let mut random = Random::derive(options.seed ^ 0x1a9e, image);
            let mut starts: Vec<u64> = (0..pieces).collect();
            // The first places of a random order.
            for place in 0..common {
                let other = place + random.below(pieces - place);
                starts.swap(place as usize, other as usize);
            }
            starts.truncate(common as usize);
            starts.iter().map(|start| start * piece).collect()
        };
        Self {
            extent,
            extents: memory.div_ceil(extent) as u32,
            piece,
            pieces,
            common: (0..options.images).map(image).collect(),
            own: wanted - common,
        }
    }

    /// The extents of a guest's working set in the order in which it reads them, each once, and
    /// then the rest of its extents from the first to the last.
    pub(crate) fn reads(&self, guest: &Guest) -> (Vec<u32>, Vec<u32>) {
        let mut random = Random::new(guest.seed);
        let own = (0..self.own).map(|_| random.below(self.pieces) * self.piece);
        let mut first = Vec::new();
        let mut seen = vec![false; self.extents as usize];
        for start in self.common[guest.image as usize].iter().copied().chain(own) {
            for extent in start / self.extent..(start + self.piece).div_ceil(self.extent) {
                if let Some(seen) = seen.get_mut(extent as usize)
                    && !std::mem::replace(seen, true)
                {
                    first.push(extent as u32);
                }
            }
        }
        let rest = (0..self.extents).filter(|extent| !seen[*extent as usize]).collect();
        (first, rest)
    }
}
