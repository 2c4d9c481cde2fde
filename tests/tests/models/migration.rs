// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `never-read`, `never-populate`, `same-memory` and `discard-cannot-fail` under any interleaving:
//! random writes, discards, populates and punches between the records of a migration over several
//! streams, which is cancelled and tried again. The model is a few maps.
//!
//! A relay between the two agents passes one record at a time. Between two records the guest does
//! something, which the seed decides. A failure prints the seed.

use crate::seeds;
use crate::source::{
    LOG_COVERS, Memory, Model, SourceHooks, World, all_pages, fill_huge_page, keep_busy, step,
};
use pageferry_client::{
    Client, Compression, Config, HookError, Hooks, IncomingOptions, JobStatus, NonConvergence,
    OutgoingOptions, Phase, RunState, StatePiece, Target,
};
use pageferry_protocol::stream::{Kind, RECORD_SIZE, RecordHeader};
use pageferry_tests::in_process::InProcessAgent;
use pageferry_tests::random::Random;
use proptest::prelude::*;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

const SOON: Duration = Duration::from_secs(30);

#[derive(Default)]
struct Arrived {
    state: Vec<StatePiece>,
    runs: bool,
}

struct Destination(Arc<Mutex<Arrived>>);

impl Hooks for Destination {
    fn run_state(&mut self) -> Result<RunState, HookError> {
        Ok(RunState::Running)
    }

    fn pause(&mut self) -> Result<(), HookError> {
        Err(HookError::new("this is the destination"))
    }

    fn resume(&mut self) -> Result<(), HookError> {
        self.0.lock().unwrap().runs = true;
        Ok(())
    }

    fn save_state(&mut self) -> Result<Vec<StatePiece>, HookError> {
        Err(HookError::new("this is the destination"))
    }

    fn load_state(&mut self, state: Vec<StatePiece>) -> Result<(), HookError> {
        self.0.lock().unwrap().state = state;
        Ok(())
    }
}

/// One direction of one connection of the relay.
struct Pipe {
    from: UnixStream,
    to: UnixStream,
}

impl Pipe {
    /// If there is a record, runs `before` and passes it on. False if the connection ended.
    fn pump(&mut self, before: impl FnOnce(Kind)) -> bool {
        let mut polled = [rustix::event::PollFd::new(&self.from, rustix::event::PollFlags::IN)];
        let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
        if rustix::event::poll(&mut polled, Some(&now)).unwrap() == 0 {
            return true;
        }
        self.pass_on(before).unwrap_or_else(|_| {
            let _ = self.from.shutdown(std::net::Shutdown::Both);
            let _ = self.to.shutdown(std::net::Shutdown::Both);
            false
        })
    }

    fn pass_on(&mut self, before: impl FnOnce(Kind)) -> std::io::Result<bool> {
        let mut header = [0; RECORD_SIZE];
        self.from.read_exact(&mut header)?;
        let parsed = RecordHeader::from_wire(header);
        let kind = parsed.check().unwrap();
        let mut payload = vec![0; parsed.payload_length()];
        self.from.read_exact(&mut payload)?;
        before(kind);
        self.to.write_all(&header)?;
        self.to.write_all(&payload)?;
        Ok(true)
    }
}

/// The relay between the agents.
struct Relay {
    listener: UnixListener,
    pipes: Vec<Pipe>,
    destination: std::path::PathBuf,
}

impl Relay {
    fn accept(&mut self) {
        while let Ok((from, _)) = self.listener.accept() {
            let to = UnixStream::connect(&self.destination).unwrap();
            from.set_nonblocking(false).unwrap();
            self.pipes.push(Pipe { from: to.try_clone().unwrap(), to: from.try_clone().unwrap() });
            self.pipes.push(Pipe { from, to });
        }
    }
}

/// A VMM with its agent. Fields drop in order, so the connection is closed before the drop waits
/// for the agent.
struct Side {
    client: Client,
    _agent: InProcessAgent,
}

fn side(hooks: impl Hooks + 'static, memory: &Memory) -> Side {
    let (agent, socket) = InProcessAgent::start().unwrap();
    let config = Config { log_covers: LOG_COVERS, ..Config::default() };
    let (client, channel) = Client::from_socket(socket, config).unwrap();
    channel.spawn(hooks).unwrap();
    memory.add_to(&client);
    client.set_trackers(pageferry_client::Trackers::LOG_IS_COMPLETE).unwrap();
    Side { client, _agent: agent }
}

/// Migrates once, while the guest works. Returns the final status of the source's job.
fn attempt(
    chance: &mut Random, world: &World, source: &Client, destination: &Client,
    folder: &std::path::Path,
) -> JobStatus {
    let path = folder.join("destination");
    let relay_path = folder.join("relay");
    let _ = std::fs::remove_file(&relay_path);
    let listener = UnixListener::bind(&relay_path).unwrap();
    listener.set_nonblocking(true).unwrap();
    let mut relay = Relay { listener, pipes: Vec::new(), destination: path.clone() };
    let listen = Target::Address(format!("unix:{}", path.display()));
    let incoming = destination.start_incoming(listen, &IncomingOptions::default()).unwrap();
    let options = OutgoingOptions {
        streams: 1 + chance.below(3) as u16,
        // This limit is met only when nothing is dirty, so that most cases make the passes that
        // they want.
        downtime_limit: Duration::ZERO,
        max_passes: 1 + chance.below(4) as u32,
        policy: NonConvergence::StopAnyway,
        compression: match chance.below(4) {
            0 => Compression::Lz4,
            1 => Compression::Zstd(1 + chance.below(Compression::MAX_LEVEL.into()) as u8),
            _ => Compression::None,
        },
        ..OutgoingOptions::default()
    };
    let target = Target::Address(format!("unix:{}", relay_path.display()));
    let outgoing = source.start_outgoing(target, &options).unwrap();
    let cancel_at = if chance.one_in(3) { chance.below(300) } else { u64::MAX };
    let deadline = Instant::now() + SOON;
    for round in 0.. {
        relay.accept();
        if !relay.pipes.is_empty() {
            let at = chance.below(relay.pipes.len() as u64) as usize;
            let busy = |kind| {
                // One pass in four may find nothing dirty, and pause the guest.
                if kind == Kind::PassDone && !chance.one_in(4) {
                    keep_busy(chance, world);
                }
            };
            if !relay.pipes[at].pump(busy) {
                relay.pipes.swap_remove(at);
            }
        }
        if chance.one_in(4) {
            step(chance, world, source);
        }
        if round == cancel_at {
            // It may be too late for a cancel. The source decides that.
            let _ = source.cancel();
        }
        if source.status().unwrap().phase.is_final() {
            break;
        }
        assert!(
            Instant::now() < deadline,
            "stuck: {:?} {:?}",
            source.status(),
            destination.status()
        );
    }
    let status = source.wait(outgoing.job, SOON).unwrap();
    drop(relay);
    if status.phase != Phase::Completed {
        // The destination's job has failed, unless the source never connected.
        let _ = destination.cancel();
    }
    destination.wait(incoming.job, SOON).unwrap();
    status
}

fn check_arrived(model: &Model, source: &Client, from: &Memory, destination: &Client, to: &Memory) {
    for page in all_pages() {
        let discarded = model.discarded.contains(&page);
        assert_eq!(
            source.discarded(page.0).unwrap().contains(page.1),
            discarded,
            "source's bitmap, page {page:?}"
        );
        if let Some(before) = model.late.get(&page) {
            // Either its content from before the discard arrived, or nothing.
            let stamp = to.stamp(page);
            assert!(
                to.is_hole(page) || before.contains(&stamp),
                "page {page:?}: {stamp}, allowed: {before:?}"
            );
            continue;
        }
        assert_eq!(
            destination.discarded(page.0).unwrap().contains(page.1),
            discarded,
            "destination's, page {page:?}"
        );
        match (discarded, model.stray.get(&page)) {
            // `same-memory`.
            (false, _) => assert_eq!(
                to.stamp(page),
                model.content.get(&page).copied().unwrap_or(0),
                "page {page:?}"
            ),
            (true, None) => assert!(to.is_hole(page), "discarded page {page:?} is no hole"),
            (true, Some(stamps)) => {
                assert!(to.is_hole(page) || stamps.contains(&to.stamp(page)), "stray page {page:?}")
            }
        }
    }
    // `never-populate`.
    let allocated = from.allocated();
    assert_eq!(allocated, model.allocated, "pages allocated at the source");
    let there = to.allocated();
    let extra: Vec<_> = there
        .difference(&allocated)
        .filter(|page| !model.late.contains_key(page) && !model.stray.contains_key(page))
        .collect();
    assert!(extra.is_empty(), "allocated only at the destination: {extra:?}");
}

fn run_case(seed: u64) {
    let mut chance = Random::new(seed);
    // Chunks of several sizes, for passes, syncs and fix-ups: one to three in the largest block.
    let chunk = [64, 128, u64::MAX][chance.below(3) as usize];
    pageferry_agent::memory::chunks::limit_for_tests(chunk);
    let folder = tempfile::tempdir().unwrap();
    let world = World::new();
    let source = side(SourceHooks(world.clone()), &world.memory);
    let there = Memory::new();
    let arrived = Arc::new(Mutex::new(Arrived::default()));
    let destination = side(Destination(arrived.clone()), &there);
    // Memory that an earlier attempt, or another guest, left.
    for page in all_pages().into_iter().filter(|_| chance.one_in(3)) {
        there.write(page, u64::MAX);
    }
    for _ in 0..20 + chance.below(60) {
        step(&mut chance, &world, &source.client);
    }
    if chance.one_in(2) {
        fill_huge_page(&world, &source.client);
    }
    for attempts in 1.. {
        let status =
            attempt(&mut chance, &world, &source.client, &destination.client, folder.path());
        let model = world.model.lock().unwrap();
        if status.phase == Phase::Completed {
            assert!(model.paused, "the source runs on after the commit");
            check_arrived(&model, &source.client, &world.memory, &destination.client, &there);
            let arrived = arrived.lock().unwrap();
            assert!(arrived.runs);
            assert_eq!(arrived.state, [StatePiece { name: "vcpu".into(), bytes: vec![5; 3000] }]);
            return;
        }
        assert_eq!(status.phase, Phase::Cancelled, "{}", status.error_text());
        assert!(!model.paused, "a cancelled migration leaves the guest running");
        assert!(!arrived.lock().unwrap().runs);
        assert!(attempts < 50);
    }
}

proptest! {
    #![proptest_config(seeds::cases(1000))]

    #[test]
    fn the_laws_hold_under_any_interleaving(seed in any::<u64>()) {
        run_case(seeds::repeated(seed));
    }
}
