// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! How long it takes: `cargo test --release -p pageferry-tests --test stores figures -- --ignored
//! --nocapture`, with nothing else running.
//!
//! The store answers after 20 ms, and has 1 Gbit/s. The guest has 2 GiB with content, and touches
//! 64 MiB of it first, in pieces of 256 KiB.
#![allow(clippy::print_stdout)]

use super::scene::Scene;
use pageferry_client::{JobStatus, Phase, RestoreOptions};
use pageferry_tests::random::Random;
use pageferry_tests::require;
use pageferry_tests::scenario::image_guest::{Guest, assert_completed, background, eager, lazy};
use pageferry_tests::stores::StoreKind;
use pageferry_tests::stores::faults::Faults;
use std::path::Path;
use std::time::{Duration, Instant};

/// Pages of the guest.
const PAGES: u64 = 512 << 10;
/// Pages in a piece of the working set.
const PIECE: u64 = 64;
/// Number of these pieces: 64 MiB.
const PIECES: u64 = 256;
/// Bytes per second of the store.
const BANDWIDTH: u64 = 125_000_000;

/// Pages of which about half of the bytes are random.
fn fill(guest: &Guest) {
    let mut random = Random::new(5);
    let bytes = guest.block();
    for page in 0..PAGES {
        for word in 0..256 {
            bytes.store(page * 4096 + word * 16, random.next()).unwrap();
        }
    }
    bytes.mark(pageferry_protocol::memory::PageRange::new(0, PAGES));
}

/// What one restore took.
struct Took {
    to_run: Duration,
    working_set: Duration,
    all: Duration,
    status: JobStatus,
}

fn restore(scene: &Scene, name: &Path, options: &RestoreOptions) -> Took {
    let host = scene.host_with(&["--store", scene.name("").to_str().unwrap(), "--folder", "/"]);
    let guest = Guest::new(&host, PAGES);
    let began = Instant::now();
    let job = guest.restore(name, options);
    let is_lazy = options.mode == lazy().mode;
    if is_lazy {
        guest.reaches(Phase::Prefetching);
        let mut random = Random::new(9);
        for _ in 0..PIECES {
            let first = random.below(PAGES / PIECE) * PIECE;
            for page in first..first + PIECE {
                guest.block().load(page * 4096).unwrap();
            }
        }
    }
    let working_set = began.elapsed();
    let status = guest.client.wait(job, Duration::from_secs(600)).unwrap();
    assert_completed(&status);
    let to_run = Duration::from_micros(status.counters.time_to_run_us);
    Took { to_run, working_set, all: began.elapsed(), status }
}

fn print(what: &str, took: &Took) {
    let ms = |time: Duration| time.as_millis();
    let counters = &took.status.counters;
    println!(
        "{what:44} ran after {:6} ms, 64 MiB after {:6} ms, all after {:6} ms; faults {:5}, p50 {:6} us, p99 {:7} us",
        ms(took.to_run),
        ms(took.working_set),
        ms(took.all),
        counters.faults,
        counters.fault_p50_us,
        counters.fault_p99_us,
    );
}

#[test]
#[ignore = "prints figures, and takes minutes"]
fn figures() {
    let Some(tools) = require::stores() else { return };
    let mut scene = Scene::served(&tools, StoreKind::S3);
    let network = Faults {
        latency: Duration::from_millis(20),
        bandwidth: Some(BANDWIDTH),
        ..Faults::default()
    };
    scene.proxy.as_ref().unwrap().set(network);
    let name = scene.name("guest");
    let host = scene.host();
    let guest = Guest::new(&host, PAGES);
    fill(&guest);
    let began = Instant::now();
    let job = guest.snapshot(&name, &background());
    assert_completed(&guest.client.wait(job, Duration::from_secs(600)).unwrap());
    let took = began.elapsed();
    let stored = scene.stored_bytes();
    let floor = Duration::from_secs_f64(stored as f64 / BANDWIDTH as f64);
    println!(
        "saved {} MiB in {} ms, {:.2} of what the store takes ({} ms)",
        stored >> 20,
        took.as_millis(),
        floor.as_secs_f64() / took.as_secs_f64(),
        floor.as_millis()
    );
    drop((guest, host));
    scene.other_machine();
    print("lazy, cold", &restore(&scene, &name, &lazy()));
    print("lazy, warm", &restore(&scene, &name, &lazy()));
    let set = scene.name("guest.ws").to_str().unwrap().to_owned();
    let with_set = RestoreOptions { working_set: set, ..lazy() };
    scene.other_machine();
    print("lazy, cold, records its working set", &restore(&scene, &name, &with_set));
    scene.other_machine();
    print("lazy, cold, with its working set", &restore(&scene, &name, &with_set));
    print("lazy, warm, with its working set", &restore(&scene, &name, &with_set));
    scene.other_machine();
    print("eager, cold", &restore(&scene, &name, &eager()));
    print("eager, warm", &restore(&scene, &name, &eager()));
    scene.other_machine();
    let file = scene.cache.path().join("copy.img");
    let began = Instant::now();
    let copied = scene.image(&["copy", name.to_str().unwrap()], &file);
    assert!(copied.status.success(), "{copied:?}");
    println!("downloaded in {} ms", began.elapsed().as_millis());
    let began = Instant::now();
    let copied = scene.image(&["copy", file.to_str().unwrap()], &scene.name("again"));
    assert!(copied.status.success(), "{copied:?}");
    println!("uploaded from that file in {} ms", began.elapsed().as_millis());
    print("lazy, from that file", &restore(&scene, &file, &lazy()));
    print("eager, from that file", &restore(&scene, &file, &eager()));
    print("lazy, from that file", &restore(&scene, &file, &lazy()));
    print("eager, from that file", &restore(&scene, &file, &eager()));
}
