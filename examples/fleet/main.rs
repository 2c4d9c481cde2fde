// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A simulation: thousands of guests are restored lazily from images in an object store. How much
//! does the store have to serve, with a cache on each host and without one?
//!
//! `cargo run --release --example fleet -- --help`
//!
//! - `options`: what is assumed; `guests`: who starts where, and what each reads;
//! - `cache`: a host's cache of extents; `host`: the reads of the guests of one host over time;
//! - `load`: what the store serves.
//!
//! Hosts do not influence each other, because the store is assumed to be fast enough for all. So
//! they are simulated one after another. `docs/store-fleet.md` has results.
#![allow(clippy::print_stdout)]

mod cache;
mod guests;
mod host;
mod load;
mod options;

use clap::Parser;
use guests::{Guest, Images};
use load::Load;
use options::Options;

fn main() {
    let options = Options::parse();
    let hosts = guests::arrivals(&options);
    println!("{}", options.summary());
    println!(
        "{:>8} {:>6} {:>10} {:>7} {:>7} {:>7} {:>7} {:>6} {:>6} {:>8} {:>8}",
        "extent",
        "cache",
        "GETs",
        "mean/s",
        "peak/s",
        "TiB",
        "peak",
        "hits",
        "shared",
        "started",
        "started"
    );
    println!(
        "{:>8} {:>6} {:>10} {:>7} {:>7} {:>7} {:>7} {:>6} {:>6} {:>8} {:>8}",
        "KiB", "GiB", "", "", "", "", "GiB/s", "", "", "p50 s", "p99 s"
    );
    for extent in &options.extents {
        let images = Images::new(&options, extent << 10);
        for cache in [Some(options.cache), None] {
            let load = simulate(&options, &images, &hosts, cache);
            println!(
                "{:>8} {:>6} {:>10} {:>7.0} {:>7} {:>7.2} {:>7.1} {:>5.1}% {:>5.1}% {:>8.2} {:>8.2}",
                extent,
                cache.map_or_else(|| "none".to_owned(), |cache| cache.to_string()),
                load.requests(),
                load.mean(),
                load.peak(),
                load.bytes() as f64 / (1_u64 << 40) as f64,
                load.peak() as f64 * images.extent as f64 / f64::from(1 << 30),
                load.hits * 100.0 / load.reads,
                load.shared * 100.0 / load.reads,
                load.started(50),
                load.started(99),
            );
        }
    }
}

/// What the store serves to all hosts. `cache` is the size of a host's cache in GiB.
fn simulate(options: &Options, images: &Images, hosts: &[Vec<Guest>], cache: Option<u64>) -> Load {
    let mut load = Load::new(images.extent);
    for guests in hosts {
        host::run(options, images, guests, cache, &mut load);
    }
    load
}
