// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A hundred clones of an image of 1 GiB: `cargo test --release -p pageferry-tests --test clones
//! figures -- --ignored --nocapture`, with nothing else running.
#![allow(clippy::print_stdout)]

use pageferry_client::{Client, Config, Phase, SnapshotMode, SnapshotOptions};
use pageferry_protocol::memory::PAGE_SIZE;
use pageferry_tests::files::{Still, memfd};
use pageferry_tests::memory::{BlockLayout, TestMemory, of_clone};
use pageferry_tests::scenario::SOON;
use pageferry_tests::scenario::image_guest::cloning;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Child;
use std::time::Instant;

fn agent() -> (Client, pageferry_client::HookChannel, Child) {
    let mut command = std::process::Command::new(pageferry_tests::process::program());
    command.args(["agent", "--stdin"]);
    Client::spawn(&mut command, Config::default()).unwrap()
}

/// A clone, whose guest is the test.
struct Clone {
    client: Client,
    memory: TestMemory,
    agent: Child,
}

impl Clone {
    fn of(image: &Path, length: u64) -> Self {
        let (client, channel, agent) = agent();
        channel.spawn(Still).unwrap();
        let layouts = of_clone(&client, image, vec![BlockLayout::ram(length)]).unwrap();
        let memory = TestMemory::new(layouts).unwrap();
        memory.add_to(&client).unwrap();
        client.set_trackers(pageferry_client::Trackers::LOG_IS_COMPLETE).unwrap();
        let job = client.start_restore(image, &cloning()).unwrap().job;
        let status = client.wait(job, SOON).unwrap();
        assert_eq!(status.phase, Phase::Completed, "{}", status.error_text());
        Self { client, memory, agent }
    }

    fn end(mut self) {
        drop((self.client, self.memory));
        assert!(self.agent.wait().unwrap().success());
    }
}

/// The memory of this machine that is available, in MiB.
fn available() -> u64 {
    let figures = std::fs::read_to_string("/proc/meminfo").unwrap();
    let line = figures.lines().find_map(|line| line.strip_prefix("MemAvailable:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() / 1024
}

/// Prints figures, and asserts no time.
#[test]
#[ignore = "for docs/clones.md: --ignored --nocapture"]
fn figures() {
    const GIB: u64 = 1 << 30;
    const CONTENT: u64 = 256 << 20;
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("image");
    let memory = memfd(GIB).unwrap();
    let file = File::from(memory.try_clone().unwrap());
    for page in 0..CONTENT / PAGE_SIZE {
        let content = pageferry_tests::random::page_content(1, page);
        file.write_all_at(&content, page * 4 * PAGE_SIZE).unwrap();
    }
    let (client, channel, mut source) = agent();
    Still::hand_over(&client, channel, &memory, GIB).unwrap();
    let paused = SnapshotOptions { mode: SnapshotMode::Paused, ..SnapshotOptions::default() };
    let job = client.start_snapshot(&image, &paused).unwrap().job;
    assert_eq!(client.wait(job, SOON).unwrap().phase, Phase::Completed);
    drop((client, file, memory));
    source.wait().unwrap();
    let before = available();
    let (mut clones, mut times) = (Vec::new(), Vec::new());
    for number in 0..100 {
        let begun = Instant::now();
        let clone = Clone::of(&image, GIB);
        times.push(begun.elapsed());
        if number == 0 || number == 9 || number == 99 {
            println!("{} clones: {} MiB", number + 1, before.saturating_sub(available()));
        }
        clones.push(clone);
    }
    println!("first {:?}", times[0]);
    times.remove(0);
    times.sort_unstable();
    println!("others p50 {:?}, p99 {:?}", times[49], times[97]);
    for clone in &clones {
        (0..16384).for_each(|page| {
            assert_ne!(clone.memory.blocks()[0].load(page * 4 * PAGE_SIZE).unwrap(), 1)
        });
    }
    println!("each has read 64 MiB: {} MiB", before.saturating_sub(available()));
    for clone in &clones {
        (0..2048).for_each(|page| clone.memory.blocks()[0].store(page * PAGE_SIZE, 1).unwrap());
    }
    println!("each has written 8 MiB: {} MiB", before.saturating_sub(available()));
    clones.into_iter().for_each(Clone::end);
}
