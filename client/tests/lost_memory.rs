// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Memory that was lost with its agent, and the next guest in the same memory.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use pageferry_client::{
    BlockSpec, Client, Counters, Error, HookError, Hooks, IncomingOptions, JobKind, JobStatus,
    OutgoingOptions, Ownership, Phase, RestoreOptions, RunState, SnapshotMode, SnapshotOptions,
    StatePiece, Target,
};
use pageferry_protocol::control::hook::{GuestOrigin, Hook};
use pageferry_protocol::control::hook_reply::{decode_hook_reply, decode_state_reply};
use pageferry_protocol::control::reply::{ErrorCode, RemoteError};
use pageferry_protocol::control::request::{MAX_RANGES, Request};
use pageferry_protocol::userfault::Userfaultfd;
use rustix::fs::{FallocateFlags, fallocate};
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::thread::spawn;
use support::*;
use vm_memory::{FileOffset, MmapRegion, VolatileMemory, WriteVolatile};

const PAGES: u64 = 8;
const RESUME: Hook = Hook::Resume { force: false, paused: false };

/// Mapped guest memory. All of it is a hole.
#[derive(Clone)]
struct Ram {
    memory: Arc<OwnedFd>,
    mapping: Arc<MmapRegion>,
}

impl Ram {
    fn new() -> Self {
        let memory = written(PAGES);
        let file = FileOffset::new(memory.try_clone().unwrap().into(), 0);
        let mapping = MmapRegion::from_file(file, (PAGES * PAGE) as usize).unwrap();
        let ram = Self { memory: Arc::new(memory), mapping: Arc::new(mapping) };
        ram.empty();
        ram
    }

    fn empty(&self) {
        fallocate(
            &*self.memory,
            FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
            0,
            PAGES * PAGE,
        )
        .unwrap();
    }

    fn address(&self) -> u64 {
        self.mapping.as_ptr() as u64
    }

    /// Reads a page through the kernel, as a device does: a lost page is an error instead of a
    /// signal.
    fn touch(&self, page: u64) -> Touch {
        let mapping = Arc::clone(&self.mapping);
        let (says, outcome) = channel();
        spawn(move || {
            let (mut from, to) = std::io::pipe().unwrap();
            let bytes = mapping.get_slice((page * PAGE) as usize, 8).unwrap();
            if let Err(error) = OwnedFd::from(to).write_all_volatile(&bytes) {
                assert!(error.to_string().contains("Bad address"), "{error}");
                return says.send(None).unwrap();
            }
            let mut found = [0; 8];
            from.read_exact(&mut found).unwrap();
            says.send(Some(u64::from_le_bytes(found))).unwrap();
        });
        Touch { page, outcome }
    }

    /// The first word of a page. `None` if the page is lost.
    #[track_caller]
    fn found(&self, page: u64) -> Option<u64> {
        self.touch(page).found()
    }
}

/// A read on its own thread, which may wait for a page.
struct Touch {
    page: u64,
    outcome: Receiver<Option<u64>>,
}

impl Touch {
    #[track_caller]
    fn found(self) -> Option<u64> {
        let found = self.outcome.recv_timeout(LONG);
        found.unwrap_or_else(|error| panic!("the read of page {} does not end: {error}", self.page))
    }
}

fn register(agent: &mut FakeAgent) -> Userfaultfd {
    userfaultfd(agent, &Hook::RegisterFaults)
}

fn watch_writes(agent: &mut FakeAgent) -> Userfaultfd {
    userfaultfd(agent, &Hook::WatchWrites)
}

fn userfaultfd(agent: &mut FakeAgent, hook: &Hook) -> Userfaultfd {
    let mut answer = agent.hook_frame(hook, Vec::new());
    assert_eq!(decode_hook_reply(&answer.body).unwrap(), Ok(()));
    answer.fds.remove(0).into()
}

fn add_block(client: &Client, agent: &mut FakeAgent, ram: &Ram) {
    let (adding, block) = (client.clone(), ram.clone());
    let added = spawn(move || {
        adding
            .add_block(BlockSpec { vmm_address: block.address(), ..spec(2, 0, &block.memory) })
            .unwrap();
    });
    agent.accept_block();
    added.join().unwrap();
}

/// A guest whose agent died before all memory was here, and the next agent. `None` if there is no
/// userfaultfd.
fn lost() -> Option<(Attached, Ram)> {
    uffd()?;
    let mut attached = Attached::new(Vmm::default());
    let ram = Ram::new();
    add_block(&attached.client, &mut attached.agent, &ram);
    attached.start_incoming();
    drop(register(&mut attached.agent));
    assert_eq!(attached.hook(&RESUME), Ok(()));
    let (client, vmm) = attached.lose_agent();
    assert_eq!(client.ownership(), Ownership::Ours);
    assert_eq!([ram.found(3), ram.found(7)], [None; 2]);

    let (ours, agents) = UnixStream::pair().unwrap();
    let second = spawn(move || {
        let mut agent = FakeAgent::shake_hands(agents.into(), MAX_RANGES);
        agent.accept_block();
        agent
    });
    let channel = client.reattach_socket(ours.into()).unwrap();
    vmm.calls();
    Some((Attached::over(client, channel, second.join().unwrap(), vmm), ram))
}

/// Checks that no page is lost any more, and that the memory can be registered for another guest.
fn assert_forgotten(attached: &mut Attached, ram: &Ram) {
    // Page 5 was never touched.
    assert_eq!([3, 5, 7].map(|page| ram.found(page)), [Some(0); 3]);
    ram.empty();
    let uffd = register(&mut attached.agent);
    let touch = ram.touch(3);
    uffd.copy(ram.address() + 3 * PAGE, &[1; PAGE as usize]).unwrap();
    assert_eq!(touch.found(), Some(0x0101_0101_0101_0101));
}

/// The last page came, and the agent died before it could say so.
#[test]
fn memory_of_which_nothing_is_owed_is_complete_without_its_agent() {
    if uffd().is_none() {
        return;
    }
    for is_kept in [true, false] {
        let mut attached = Attached::new(Vmm::default());
        let ram = Ram::new();
        add_block(&attached.client, &mut attached.agent, &ram);
        attached.start_incoming();
        drop(register(&mut attached.agent));
        if is_kept {
            // Nobody here replaces the agent, but from now on the bitmaps count.
            let refused = attached.hook(&Hook::KeepJournal { journal: vec![1] }).unwrap_err();
            assert!(refused.sentence.contains("no supervisor"), "{refused}");
        }
        assert_eq!(attached.hook(&RESUME), Ok(()));
        let (client, _vmm) = attached.lose_agent();
        assert_eq!(ram.found(3), is_kept.then_some(0));
        assert_eq!(client.ownership(), Ownership::Ours);
    }
}

#[test]
fn awaited_guest_finds_no_lost_page_of_the_one_before() {
    let Some((mut attached, ram)) = lost() else { return };
    ram.empty();
    assert_eq!(ram.found(3), None, "a hole in the file alone changes nothing");
    attached.start_incoming();
    assert_forgotten(&mut attached, &ram);
    attached.lose_agent();
}

#[test]
fn restored_guest_finds_no_lost_page_of_the_one_before() {
    let Some((mut attached, ram)) = lost() else { return };
    assert_eq!(
        attached.hook(&Hook::AcceptGuest {
            origin: GuestOrigin::Image { path: "/images/golden".into() }
        }),
        Ok(())
    );
    assert_forgotten(&mut attached, &ram);
    attached.lose_agent();
}

/// Starts an incoming migration. The agent does `meanwhile`, and then accepts or refuses it.
fn asked(
    attached: &mut Attached, accepted: bool, meanwhile: impl FnOnce(&mut FakeAgent),
) -> Result<(), Error> {
    let starting: Client = attached.client.clone();
    let started = spawn(move || {
        starting
            .start_incoming(Target::Address("tcp:[::]:0".into()), &IncomingOptions::default())
            .map(drop)
    });
    let (request, _) = attached.agent.request().unwrap();
    meanwhile(&mut attached.agent);
    if accepted {
        attached.agent.started(&request);
    } else {
        attached.agent.refuse(&request, ErrorCode::Busy, "a job runs");
    }
    started.join().unwrap()
}

#[test]
fn lost_memory_stays_lost_when_no_other_guest_comes() {
    let Some((mut attached, ram)) = lost() else { return };
    assert!(matches!(asked(&mut attached, false, |_| {}), Err(Error::Refused { .. })));
    assert_eq!([3, 5].map(|page| ram.found(page)), [None; 2]);
    attached.lose_agent();
}

#[test]
fn guest_that_arrives_before_the_reply_stays_registered() {
    let Some((mut attached, ram)) = lost() else { return };
    let mut new = None;
    asked(&mut attached, true, |agent| new = Some(register(agent))).unwrap();
    let touch = ram.touch(3);
    new.unwrap().copy(ram.address() + 3 * PAGE, &[2; PAGE as usize]).unwrap();
    assert_eq!(touch.found(), Some(0x0202_0202_0202_0202));
    attached.lose_agent();
}

const MISSING: &str = "memory of this guest is missing, since its agent was lost or its image was damaged before all was here: \
                       restore it again";

#[test]
fn guest_with_lost_memory_is_neither_sent_nor_saved() {
    let Some((mut attached, ram)) = lost() else { return };
    let client = attached.client.clone();
    let snapshot = |mode| {
        let options = SnapshotOptions { mode, ..SnapshotOptions::default() };
        client.start_snapshot("/images/one".as_ref(), &options)
    };
    let send = || {
        client.start_outgoing(Target::Address("tcp:[::1]:1".into()), &OutgoingOptions::default())
    };
    // The agent gets no request for these: its next request is another one.
    for error in [
        snapshot(SnapshotMode::Background).unwrap_err(),
        snapshot(SnapshotMode::Paused).unwrap_err(),
        snapshot(SnapshotMode::Stopped).unwrap_err(),
        send().unwrap_err(),
    ] {
        assert!(matches!(error, Error::MemoryLost), "{error:?}");
        assert_eq!(error.to_string(), MISSING);
    }
    // For an operator's job the agent calls these hooks.
    let refused = RemoteError::new(ErrorCode::State, MISSING);
    for hook in [Hook::Pause, Hook::WatchWrites] {
        assert_eq!(attached.hook(&hook), Err(refused.clone()), "{}", hook.name());
    }
    let saved = attached.agent.hook_frame(&Hook::SaveState, Vec::new());
    assert_eq!(decode_state_reply(&saved.body).unwrap(), Err(refused));
    assert!(saved.fds.is_empty());
    assert_eq!(attached.calls(), [""; 0], "the VMM's hooks are not called");

    // Another guest in the same memory can be sent and saved.
    attached.start_incoming();
    assert_forgotten(&mut attached, &ram);
    assert_eq!(attached.hook(&Hook::UnregisterFaults { complete: true }), Ok(()));
    assert_eq!(attached.hook(&RESUME), Ok(()));
    let starting = client.clone();
    let started =
        spawn(move || starting.start_snapshot("/images/one".as_ref(), &SnapshotOptions::default()));
    let (request, _) = attached.agent.request().unwrap();
    assert!(matches!(request, Request::StartSnapshot { .. }), "{request:?}");
    attached.agent.started(&request);
    started.join().unwrap().unwrap();
    drop(watch_writes(&mut attached.agent));
    assert_eq!(attached.hook(&Hook::Pause), Ok(()));
    attached.agent.hook_frame(&Hook::SaveState, Vec::new());
    assert_eq!(attached.calls(), ["resume", "watched", "pause", "save"]);
    attached.lose_agent();
}

/// A VMM that reads page 3 when it resumes its guest. It reports what it found, and when its memory
/// is lost.
struct Touches(Ram, std::sync::mpsc::Sender<Heard>);

#[derive(Debug, PartialEq, Eq)]
enum Heard {
    Found(Option<u64>),
    Lost,
}

impl Hooks for Touches {
    fn run_state(&mut self) -> Result<RunState, HookError> {
        Ok(RunState::Running)
    }
    fn pause(&mut self) -> Result<(), HookError> {
        Ok(())
    }
    fn resume(&mut self) -> Result<(), HookError> {
        // Waits as long as it takes.
        self.1.send(Heard::Found(self.0.touch(3).outcome.recv()?))?;
        Ok(())
    }
    fn save_state(&mut self) -> Result<Vec<StatePiece>, HookError> {
        Ok(Vec::new())
    }
    fn load_state(&mut self, _: Vec<StatePiece>) -> Result<(), HookError> {
        Ok(())
    }
    fn memory_lost(&mut self) {
        self.1.send(Heard::Lost).unwrap();
    }
}

/// Makes the thread of the hook channel wait for a page of a restore. The job ends with `phase`,
/// and the agent lives on. Returns what the VMM was told.
fn hook_that_waits(
    phase: Phase, remaining_pages: u64, end: impl FnOnce(&mut FakeAgent, Userfaultfd, &Ram),
) -> Vec<Heard> {
    let (client, hooks, agent) = client(|agent| agent);
    let mut agent = agent.join().unwrap();
    let (ram, (says, heard)) = (Ram::new(), channel());
    let thread = hooks.spawn(Touches(ram.clone(), says)).unwrap();
    add_block(&client, &mut agent, &ram);
    let starting = client.clone();
    let started = spawn(move || {
        starting.start_restore("/images/one".as_ref(), &RestoreOptions::default()).unwrap()
    });
    let (request, _) = agent.request().unwrap();
    agent.started(&request);
    started.join().unwrap();
    let uffd = register(&mut agent);
    agent.send_hook(&RESUME, Vec::new());
    // The client must not wait for a hook here, because the only hook thread waits itself.
    let status = JobStatus { job: 1, kind: JobKind::Restore, phase, ..JobStatus::default() };
    let counters = Counters { remaining_pages, ..status.counters };
    let status = JobStatus { counters, ..status };
    let (request, _) = agent.request().expect("a query of the job's status");
    assert_eq!(request, Request::QueryStatus);
    agent.reply(&request, &Ok(status), JobStatus::encode);
    end(&mut agent, uffd, &ram);
    let first = heard.recv_timeout(LONG).expect("the hook does not end");
    // Both hooks are answered before the agent is dropped. Otherwise its end could come before the
    // second hook.
    for hook in [RESUME, Hook::UnregisterFaults { complete: true }] {
        assert_eq!(agent.hooks.recv(soon()).unwrap().request, hook.code());
    }
    drop(agent);
    thread.join();
    std::iter::once(first).chain(heard).collect()
}

#[test]
fn hook_that_waits_in_a_failed_job_gets_an_error() {
    if uffd().is_none() {
        return;
    }
    let heard = hook_that_waits(Phase::Failed, 3, |agent, uffd, _| {
        agent.send_hook(&Hook::UnregisterFaults { complete: false }, Vec::new());
        drop(uffd);
    });
    assert_eq!(heard, [Heard::Found(None), Heard::Lost]);
}

#[test]
fn late_hook_of_a_failed_job_with_all_memory_loses_nothing() {
    if uffd().is_none() {
        return;
    }
    let heard = hook_that_waits(Phase::Failed, 0, |agent, uffd, ram| {
        agent.send_hook(&Hook::UnregisterFaults { complete: true }, Vec::new());
        // The client queries again, so the earlier reply changed nothing.
        let (request, _) = agent.request().expect("the next heartbeat");
        assert_eq!(request, Request::QueryStatus);
        agent.reply(&request, &Ok(JobStatus::default()), JobStatus::encode);
        uffd.copy(ram.address() + 3 * PAGE, &[1; PAGE as usize]).unwrap();
    });
    assert_eq!(heard, [Heard::Found(Some(0x0101_0101_0101_0101))]);
}
