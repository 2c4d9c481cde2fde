// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What is assumed. Every figure can be changed on the command line.

use clap::Parser;

/// Simulate guests that are restored lazily from images in an object store.
///
/// Prints what the store serves, with a cache of extents on each host and without one. The same
/// options give the same figures on every machine.
#[derive(Debug, Parser)]
pub(crate) struct Options {
    /// Seed of all random choices.
    #[arg(long, default_value_t = 1)]
    pub(crate) seed: u64,
    /// Guests that start.
    #[arg(long, default_value_t = 10_000)]
    pub(crate) guests: u64,
    /// Hosts on which they start.
    #[arg(long, default_value_t = 500, value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) hosts: u64,
    /// Images from which they start.
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) images: u64,
    /// Seconds within which they start, by a Poisson process.
    #[arg(long, default_value_t = 600)]
    pub(crate) seconds: u64,
    /// Exponent of Zipf's law for the popularity of images; 0 makes all equal.
    #[arg(long, default_value_t = 1.0)]
    pub(crate) zipf: f64,
    /// Hosts to which the guests of one image are limited. Default: all.
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) hosts_per_image: Option<u64>,
    /// Memory of a guest in MiB.
    #[arg(long, default_value_t = 1024, value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) memory: u64,
    /// Memory in MiB that a guest reads first.
    #[arg(long, default_value_t = 64)]
    pub(crate) working_set: u64,
    /// Jaccard index of the working sets of two guests of one image.
    #[arg(long, default_value_t = 0.93)]
    pub(crate) jaccard: f64,
    /// Length in KiB of the contiguous pieces of a working set.
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u64).range(4..))]
    pub(crate) piece: u64,
    /// Percentage of guests that read the rest of their memory later. Others never do.
    #[arg(long, default_value_t = 25)]
    pub(crate) readers_of_all: u64,
    /// Seconds over which they spread these reads.
    #[arg(long, default_value_t = 300)]
    pub(crate) rest_seconds: u64,
    /// Size in GiB of a host's cache. The extent that was not used for longest is dropped.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) cache: u64,
    /// Sizes of extents in KiB.
    #[arg(long, value_delimiter = ',', default_values_t = [512, 2048, 8192],
        value_parser = clap::value_parser!(u64).range(4..))]
    pub(crate) extents: Vec<u64>,
    /// Reads of a guest at a time, before its working set is there.
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) streams: u64,
    /// Milliseconds until the store answers a request.
    #[arg(long, default_value_t = 20)]
    pub(crate) latency: u64,
    /// MiB per second of one request to the store, after its latency.
    #[arg(long, default_value_t = 80, value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) rate: u64,
}

impl Options {
    /// The most important of them in two lines.
    pub(crate) fn summary(&self) -> String {
        format!(
            "{} guests of {} MiB from {} images, on {} hosts, within {} s; seed {}\n\
             working set {} MiB in pieces of {} KiB, Jaccard {}; {}% read all within {} s",
            self.guests,
            self.memory,
            self.images,
            self.hosts,
            self.seconds,
            self.seed,
            self.working_set,
            self.piece,
            self.jaccard,
            self.readers_of_all,
            self.rest_seconds
        )
    }
}
