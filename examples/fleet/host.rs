// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The reads of the guests of one host over time.
//!
//! A guest has some streams, which read one extent after another until the working set is there.
//! Then one stream reads the rest, if the guest reads it at all, at a steady pace. Only the store
//! takes time: a read from the cache, and from a host's memory to its guest, takes none.

use crate::cache::Cache;
use crate::guests::{Guest, Images, Time};
use crate::load::Load;
use crate::options::Options;
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::vec::IntoIter;

/// A guest while it reads.
struct Reader {
    image: u32,
    started: Time,
    first: IntoIter<u32>,
    rest: IntoIter<u32>,
    /// Time between two reads of the rest.
    pace: Time,
    /// Streams that still read the working set.
    streams: u64,
}

/// The host, and what it counts.
struct Host<'a> {
    images: &'a Images,
    cache: Option<Cache>,
    /// How long the store takes for an extent.
    fetch: Time,
    load: &'a mut Load,
}

impl Host<'_> {
    /// When a read that begins now has its extent.
    fn read(&mut self, image: u32, extent: u32, now: Time) -> Time {
        self.load.reads += 1.0;
        let key = image * self.images.extents + extent;
        if let Some(ready) = self.cache.as_mut().and_then(|cache| cache.find(key)) {
            if ready <= now {
                self.load.hits += 1.0;
                return now;
            }
            // Single flight: one request serves all who wait for the extent.
            self.load.shared += 1.0;
            return ready;
        }
        self.load.request(now);
        if let Some(cache) = &mut self.cache {
            cache.add(key, now + self.fetch);
        }
        now + self.fetch
    }
}

/// Adds what the guests of one host read to `load`. `cache` is the size of its cache in GiB.
pub(crate) fn run(
    options: &Options, images: &Images, guests: &[Guest], cache: Option<u64>, load: &mut Load,
) {
    let keys = options.images as usize * images.extents as usize;
    let cache = cache.map(|size| Cache::new(keys, ((size << 30) / images.extent) as usize));
    let fetch = options.latency * 1000 + images.extent * 1_000_000 / (options.rate << 20);
    let mut host = Host { images, cache, fetch, load };
    let mut readers: Vec<Option<Reader>> = Vec::new();
    readers.resize_with(guests.len(), || None);
    // Earliest first. A stream of a guest can read again at this time.
    let mut events: BinaryHeap<Reverse<(Time, usize)>> =
        guests.iter().enumerate().map(|(index, guest)| Reverse((guest.at, index))).collect();
    while let Some(Reverse((now, index))) = events.pop() {
        let reader = match &mut readers[index] {
            Some(reader) => reader,
            empty => {
                // The guest starts. One event is on its way to each other stream.
                for _ in 1..options.streams {
                    events.push(Reverse((now, index)));
                }
                empty.insert(start(options, images, &guests[index]))
            }
        };
        let mut now = now;
        // Reads that the cache answers take no time.
        let done = loop {
            let Some(extent) = reader.first.next() else { break true };
            let ready = host.read(reader.image, extent, now);
            if ready > now {
                events.push(Reverse((ready, index)));
                break false;
            }
        };
        if !done {
            continue;
        }
        if reader.streams > 0 {
            reader.streams -= 1;
            if reader.streams > 0 {
                continue;
            }
            // The last stream has its last extent.
            host.load.starts.push(now - reader.started);
        }
        // A read of the rest that takes longer than its pace delays the next one.
        if let Some(extent) = reader.rest.next() {
            let ready = host.read(reader.image, extent, now);
            now = ready.max(now + reader.pace);
            events.push(Reverse((now, index)));
        } else {
            (reader.first, reader.rest) = Default::default();
        }
    }
}

fn start(options: &Options, images: &Images, guest: &Guest) -> Reader {
    let (first, mut rest) = images.reads(guest);
    if !guest.reads_all {
        rest.clear();
    }
    Reader {
        image: guest.image,
        started: guest.at,
        pace: options.rest_seconds * 1_000_000 / rest.len().max(1) as u64,
        first: first.into_iter(),
        rest: rest.into_iter(),
        streams: options.streams,
    }
}
