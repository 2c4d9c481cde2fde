// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `never-populate` at scale: a guest of 64 GiB or 1 TiB that uses 1 GiB costs 1 GiB on the wire
//! and on both sides, and the agents stay small.

use pageferry_client::{
    BlockRange, Client, Config, IncomingOptions, JobStatus, OutgoingOptions, Phase, Punch, Target,
};
use pageferry_protocol::shm::bitmap_bytes;
use pageferry_tests::files::{Still, memfd};
use pageferry_tests::process::{AgentProcess, program};
use std::os::fd::OwnedFd;
use std::time::Duration;

const SOON: Duration = Duration::from_secs(120);
const GIB: u64 = 1 << 30;
const EXTENT: u64 = 1 << 20;
/// Bitmaps of an agent over all pages: dirty log, discarded, unsettled, stray, and four of a job.
const BITMAPS: u64 = 8;

/// Offsets of the extents that hold `used` bytes of `size`, spread evenly.
fn extents(size: u64, used: u64) -> impl Iterator<Item = u64> {
    let count = used / EXTENT;
    (0..count).map(move |index| size / count / EXTENT * EXTENT * index)
}

fn content(offset: u64) -> Vec<u8> {
    let mut bytes = vec![0xa5; EXTENT as usize];
    for (page, chunk) in bytes.chunks_mut(4096).enumerate() {
        chunk[..8].copy_from_slice(&(offset + page as u64 + 1).to_le_bytes());
    }
    bytes
}

fn allocated(fd: &OwnedFd) -> u64 {
    rustix::fs::fstat(fd).unwrap().st_blocks as u64 * 512
}

fn resident(agent: &mut AgentProcess) -> u64 {
    agent.process().resident_bytes().unwrap()
}

/// Migrates a guest of `size` bytes that uses `used` bytes. Of those, `discarded` bytes are
/// discarded but still allocated.
fn migrate(size: u64, used: u64, discarded: u64) {
    let folder = tempfile::tempdir().unwrap();
    let mut agents = ["source", "destination"]
        .map(|name| AgentProcess::spawn(program(), folder.path(), name).unwrap());
    let memories = [memfd(size).unwrap(), memfd(size).unwrap()];
    for offset in extents(size, used) {
        assert_eq!(
            rustix::io::pwrite(&memories[0], &content(offset), offset).unwrap(),
            EXTENT as usize
        );
    }
    let clients = [0, 1].map(|side| {
        let config = Config { log_covers: size, ..Config::default() };
        let (client, channel) = Client::connect(agents[side].socket(), config).unwrap();
        Still::hand_over(&client, channel, &memories[side], size).unwrap();
        client
    });
    let stale: Vec<BlockRange> = extents(size, used)
        .take((discarded / EXTENT) as usize)
        .map(|offset| BlockRange { block: 0, offset, length: EXTENT })
        .collect();
    clients[0].discard(&stale, Punch::No).unwrap();
    let before = allocated(&memories[0]);
    assert_eq!(before, used);

    let incoming = clients[1]
        .start_incoming(Target::Address("tcp:127.0.0.1:0".into()), &IncomingOptions::default())
        .unwrap();
    let options = OutgoingOptions { streams: 2, ..OutgoingOptions::default() };
    let outgoing = clients[0].start_outgoing(Target::Address(incoming.address), &options).unwrap();
    let status: JobStatus = clients[0].wait(outgoing.job, SOON).unwrap();
    assert_eq!(status.phase, Phase::Completed, "{}", status.error_text());

    let sent = used - discarded;
    let wire = status.counters.wire_bytes;
    assert!(
        wire >= sent && wire < sent + sent / 100 + (64 << 10),
        "{wire} bytes on the wire for {sent}"
    );
    assert_eq!(allocated(&memories[0]), before, "allocated at the source");
    assert_eq!(allocated(&memories[1]), sent, "allocated at the destination");
    for (index, offset) in extents(size, used).enumerate().step_by(37) {
        let mut bytes = vec![0; EXTENT as usize];
        assert_eq!(rustix::io::pread(&memories[1], &mut bytes, offset).unwrap(), bytes.len());
        let expected = if (index as u64) < discarded / EXTENT {
            vec![0; bytes.len()]
        } else {
            content(offset)
        };
        assert!(bytes == expected, "the extent at {offset:#x}");
    }
    let limit = (64 << 20) + BITMAPS * bitmap_bytes(size / 4096);
    for agent in &mut agents {
        let resident = resident(agent);
        assert!(resident < limit, "an agent has {resident} resident bytes, the limit is {limit}");
    }
}

#[test]
fn of_64_gib_with_1_gib_in_use_only_that_is_sent_and_allocated() {
    migrate(64 * GIB, GIB, 0);
}

#[test]
fn of_1_tib_with_1_gib_in_use_only_that_is_sent_and_allocated() {
    migrate(1024 * GIB, GIB, 0);
}

#[test]
fn discarded_memory_costs_nothing_at_the_destination() {
    migrate(8 * GIB, GIB, GIB - 64 * EXTENT);
}
