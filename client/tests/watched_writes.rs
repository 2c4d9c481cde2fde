//! Writes into pages that are not saved yet: they wait for the agent, and for nobody when it is
//! gone.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use pageferry_client::{
    BlockSpec, Client, Config, Dispatch, ErrorCode, HookError, Hooks, JobStatus, MappedBitmap,
    Ownership, RunState, StatePiece, Trackers,
};
use pageferry_protocol::control::hook::{Hook, decode_hook_reply};
use pageferry_protocol::control::request::{MAX_RANGES, Request};
use pageferry_protocol::userfault::{Addresses, MAX_FAULTS, Register, UserfaultError, Userfaultfd};
use rustix::event::PollFlags;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::thread::{JoinHandle, spawn};
use std::time::Duration;
use support::*;

const PAGES: u64 = 8;
const SOON: Duration = Duration::from_secs(20);

/// Guest memory that is mapped.
#[derive(Clone)]
struct Ram {
    memory: Arc<OwnedFd>,
    /// The mapping, whatever its bits stand for.
    words: Arc<MappedBitmap>,
}

impl Ram {
    fn new() -> Self {
        let memory = written(PAGES);
        let words = MappedBitmap::shared(memory.as_fd(), PAGES * PAGE * 8).unwrap();
        Self { memory: Arc::new(memory), words: Arc::new(words) }
    }

    fn spec(&self, id: u32) -> BlockSpec<'_> {
        let gpa = u64::from(id) << 20;
        BlockSpec { vmm_address: self.page(0).start, ..spec(id, gpa, &self.memory) }
    }

    fn all(&self) -> Addresses {
        Addresses { length: PAGES * PAGE, ..self.page(0) }
    }

    fn page(&self, page: u64) -> Addresses {
        let start = self.words.storage().address_range().start as u64 + page * PAGE;
        Addresses { start, length: PAGE }
    }

    fn write(&self, page: u64) {
        self.words.or_word(page * PAGE / 8, u64::MAX);
    }

    fn read(&self, page: u64) -> u64 {
        self.words.word(page * PAGE / 8)
    }

    /// Writes on a thread of its own, and says so when it is done.
    fn writer(&self, page: u64) -> Receiver<()> {
        let (ram, (say, done)) = (self.clone(), channel());
        spawn(move || {
            ram.write(page);
            let _ = say.send(());
        });
        done
    }
}

/// Hands a block over while the test is the agent.
fn add_block(client: &Client, agent: &mut FakeAgent, ram: &Ram, id: u32) {
    let (client, ram) = (client.clone(), ram.clone());
    let added = spawn(move || client.add_block(ram.spec(id)).unwrap());
    agent.accept_block();
    added.join().unwrap();
}

fn watch(agent: &mut FakeAgent) -> Userfaultfd {
    let mut answer = agent.hook_frame(&Hook::WatchWrites, Vec::new());
    assert_eq!(decode_hook_reply(&answer.body).unwrap(), Ok(()));
    assert_eq!(answer.fds.len(), 1);
    answer.fds.remove(0).into()
}

/// Waits until somebody waits at this page, and nowhere else.
fn assert_waits_at(uffd: &Userfaultfd, page: Addresses) {
    assert_eq!(
        pageferry_protocol::control::socket::wait(uffd.as_fd(), PollFlags::IN, soon()),
        Ok(true),
        "a fault"
    );
    let mut faults = [0; MAX_FAULTS];
    assert_eq!(uffd.read_faults(&mut faults), Ok(1));
    assert_eq!(faults[0] / PAGE * PAGE, page.start);
}

/// One block, watched and all of it protected.
struct Watched {
    attached: Attached,
    ram: Ram,
    uffd: Userfaultfd,
}

impl Watched {
    /// `None` where there is no userfaultfd.
    fn new() -> Option<Self> {
        Self::over(Attached::new(Vmm::default()))
    }

    fn over(mut attached: Attached) -> Option<Self> {
        uffd()?;
        let ram = Ram::new();
        add_block(&attached.client, &mut attached.agent, &ram, 2);
        let uffd = watch(&mut attached.agent);
        uffd.protect(ram.all()).unwrap();
        Some(Self { attached, ram, uffd })
    }

    /// Somebody who waits to write the page.
    fn writer(&self, page: u64) -> Receiver<()> {
        let done = self.ram.writer(page);
        assert_waits_at(&self.uffd, self.ram.page(page));
        assert!(done.try_recv().is_err(), "it waits");
        done
    }

    fn assert_unwatched(&self) {
        self.ram.write(0);
        assert_eq!(
            self.uffd.protect(self.ram.all()),
            Err(rustix::io::Errno::NOENT),
            "how an agent finds it out"
        );
    }
}

#[test]
fn write_waits_until_the_agent_lifts_the_protection() {
    let Some(mut watched) = Watched::new() else { return };
    let before = watched.ram.read(3);
    let done = watched.writer(3);
    assert_eq!(watched.ram.read(3), before, "who only reads does not wait");
    watched.uffd.lift(watched.ram.page(3)).unwrap();
    done.recv_timeout(SOON).unwrap();
    assert_eq!(watched.ram.read(3), u64::MAX);

    let other = watched.writer(4);
    assert_eq!(watched.attached.hook(&Hook::UnwatchWrites), Ok(()));
    other.recv_timeout(SOON).unwrap();
    watched.assert_unwatched();
    assert_eq!(watched.attached.hook(&Hook::UnwatchWrites), Ok(()), "a redundant one is fine");
    // And once more from the start.
    let uffd = watch(&mut watched.attached.agent);
    uffd.protect(watched.ram.all()).unwrap();
    let done = watched.ram.writer(3);
    assert_waits_at(&uffd, watched.ram.page(3));
    watched.attached.lose_agent();
    done.recv_timeout(SOON).unwrap();
}

#[test]
fn hole_is_protected_too() {
    let Some(watched) = Watched::new() else { return };
    let ram = Ram::new();
    let flags = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
    rustix::fs::fallocate(&*ram.memory, flags, 0, PAGES * PAGE).unwrap();
    let Watched { mut attached, uffd: first, .. } = watched;
    add_block(&attached.client, &mut attached.agent, &ram, 3);
    attached.hook(&Hook::UnwatchWrites).unwrap();
    drop(first);
    let uffd = watch(&mut attached.agent);
    uffd.protect(ram.all()).unwrap();
    assert_eq!(allocated_pages(&ram.memory), 0, "protecting allocates nothing");
    let done = ram.writer(5);
    assert_waits_at(&uffd, ram.page(5));
    uffd.lift(ram.page(5)).unwrap();
    done.recv_timeout(SOON).unwrap();
    assert_eq!(allocated_pages(&ram.memory), 1);
    attached.lose_agent();
}

#[test]
fn dead_agent_lets_go_who_waits_to_write() {
    let Some(watched) = Watched::new() else { return };
    let done = [watched.writer(1), watched.writer(6)];
    let Watched { attached, ram, uffd } = watched;
    let (client, vmm) = attached.lose_agent();
    for done in done {
        done.recv_timeout(SOON).unwrap();
    }
    assert_eq!((ram.read(1), ram.read(6)), (u64::MAX, u64::MAX));
    assert_eq!(uffd.protect(ram.all()), Err(rustix::io::Errno::NOENT));
    assert_eq!(
        (client.ownership(), vmm.calls()),
        (
            Ownership::Ours,
            vec!["watched".to_owned(), "unwatched".to_owned(), "lost Ours".to_owned()]
        ),
        "it runs on"
    );
}

/// A VMM that writes guest memory when it resumes its guest.
struct Writes(Ram);

impl Hooks for Writes {
    fn run_state(&mut self) -> Result<RunState, HookError> {
        Ok(RunState::Running)
    }
    fn pause(&mut self) -> Result<(), HookError> {
        Ok(())
    }
    fn resume(&mut self) -> Result<(), HookError> {
        self.0.write(2);
        Ok(())
    }
    fn save_state(&mut self) -> Result<Vec<StatePiece>, HookError> {
        Ok(Vec::new())
    }
    fn load_state(&mut self, _: Vec<StatePiece>) -> Result<(), HookError> {
        Ok(())
    }
}

/// Has the hook channel's own thread wait for a page, on an agent that is `lost` then.
fn hook_that_waits(impatience: Config, lose: impl FnOnce(FakeAgent) -> Option<FakeAgent>) {
    if uffd().is_none() {
        return;
    }
    let (client, channel, agent) = client_with(impatience, MAX_RANGES, |agent| agent);
    let mut agent = agent.join().unwrap();
    let ram = Ram::new();
    let thread = channel.spawn(Writes(ram.clone())).unwrap();
    add_block(&client, &mut agent, &ram, 2);
    assert_eq!(agent.hook(&Hook::Pause), Ok(()));
    let uffd = watch(&mut agent);
    uffd.protect(ram.all()).unwrap();
    agent.send_hook(&Hook::Resume { force: false, paused: false }, Vec::new());
    assert_waits_at(&uffd, ram.page(2));
    let _agent = lose(agent);
    let (say, ended) = channel_of_end(thread);
    ended.recv_timeout(SOON).expect("the hook to return and the channel to end");
    say.join().unwrap();
    assert_eq!(ram.read(2), u64::MAX);
    assert_lost(client.status());
    assert_eq!(client.ownership(), Ownership::Ours);
}

fn channel_of_end<H: Send + 'static>(
    thread: pageferry_client::HookThread<H>,
) -> (JoinHandle<()>, Receiver<()>) {
    let (say, ended) = channel();
    let joining = spawn(move || {
        thread.join();
        let _ = say.send(());
    });
    (joining, ended)
}

#[test]
fn hook_that_waits_to_write_is_let_go_when_the_agent_dies() {
    hook_that_waits(quiet(), |agent| {
        drop(agent);
        None
    });
}

#[test]
fn hook_that_waits_to_write_is_let_go_when_the_agent_hangs() {
    // It holds its sockets, and answers no sign of life.
    hook_that_waits(impatient(), Some);
}

#[test]
fn hook_that_waits_to_write_is_let_go_when_the_agent_gives_up_its_hooks() {
    hook_that_waits(quiet(), |agent| {
        agent.hooks.shutdown();
        Some(agent)
    });
}

#[test]
fn request_that_hangs_does_not_hide_the_death_of_the_agent() {
    let Some(watched) = Watched::new() else { return };
    let done = watched.writer(1);
    let Watched { attached, .. } = watched;
    // Holds the session's lock, and waits for an answer that does not come.
    let asking = attached.client.clone();
    let asked = spawn(move || asking.status());
    let mut agent = attached.agent;
    agent.request().unwrap();
    drop(agent);
    done.recv_timeout(SOON).unwrap();
    assert_lost(asked.join().unwrap());
    attached.thread.join();
}

#[test]
fn new_agent_watches_what_the_last_one_did() {
    let Some(watched) = Watched::new() else { return };
    let done = watched.writer(1);
    let Watched { attached, ram, uffd: old } = watched;
    let (ours, agents) = UnixStream::pair().unwrap();
    let second = spawn(move || {
        let mut agent = FakeAgent::shake_hands(agents.into(), MAX_RANGES);
        agent.accept_block();
        agent
    });
    let channel = attached.client.reattach_socket(ours.into()).unwrap();
    done.recv_timeout(SOON).unwrap();
    assert_eq!(old.protect(ram.all()), Err(rustix::io::Errno::NOENT));
    drop(old);
    let mut attached =
        Attached::over(attached.client, channel, second.join().unwrap(), Vmm::default());
    let uffd = watch(&mut attached.agent);
    uffd.protect(ram.all()).unwrap();
    let done = ram.writer(1);
    assert_waits_at(&uffd, ram.page(1));
    attached.lose_agent();
    done.recv_timeout(SOON).unwrap();
}

#[test]
fn the_end_of_an_agent_lets_nothing_go_that_stands_still_for_the_next_one() {
    if uffd().is_none() {
        return;
    }
    let (client, mut old, mut first) = connected();
    let ram = Ram::new();
    add_block(&client, &mut first, &ram, 2);
    let mut vmm = Vmm::default();
    first.send_hook(&Hook::WatchWrites, Vec::new());
    assert_eq!(old.dispatch(&mut vmm).unwrap(), Dispatch::Open);
    let (ours, agents) = UnixStream::pair().unwrap();
    let second = spawn(move || {
        let mut agent = FakeAgent::shake_hands(agents.into(), MAX_RANGES);
        agent.accept_block();
        agent
    });
    let mut new = client.reattach_socket(ours.into()).unwrap();
    let mut second = second.join().unwrap();
    second.send_hook(&Hook::WatchWrites, Vec::new());
    assert_eq!(new.dispatch(&mut vmm).unwrap(), Dispatch::Open);
    // It comes late.
    assert_eq!(old.dispatch(&mut vmm).unwrap(), Dispatch::Closed);
    assert_eq!(vmm.calls(), ["watched", "watched", "lost Ours"]);
    drop(second);
    assert_eq!(new.dispatch(&mut vmm).unwrap(), Dispatch::Closed);
    assert_eq!(vmm.calls(), ["unwatched", "lost Ours"]);
}

#[test]
fn mapping_that_another_userfaultfd_has_is_refused_with_what_to_do() {
    let Some(other) = uffd() else { return };
    let mut attached = Attached::new(Vmm::default());
    let (first, second) = (Ram::new(), Ram::new());
    add_block(&attached.client, &mut attached.agent, &first, 1);
    add_block(&attached.client, &mut attached.agent, &second, 2);
    other.register(second.all(), Register::WriteProtect).unwrap();
    let error = attached.hook(&Hook::WatchWrites).unwrap_err();
    let expected = "block 2 is registered with another userfaultfd already, and a mapping can have only one: background \
                    snapshots, write-protect tracking, postcopy and lazy restore need it (a snapshot of mode paused \
                    does not)";
    assert_eq!((error.code, error.sentence.as_str()), (ErrorCode::System, expected));
    other.register(first.all(), Register::WriteProtect).expect("that nothing is left registered");

    for ram in [&first, &second] {
        other.unregister(ram.all()).unwrap();
    }
    watch(&mut attached.agent);
    attached.lose_agent();
}

#[test]
fn watching_needs_mappings_and_a_guest_that_is_ours_and_is_not_watched() {
    let Some(mut watched) = Watched::new() else { return };
    assert_eq!(watched.attached.refused(&Hook::WatchWrites), ErrorCode::State, "watched already");
    let done = watched.writer(1);
    assert_eq!(watched.attached.hook(&Hook::UnwatchWrites), Ok(()));
    done.recv_timeout(SOON).unwrap();

    watched.attached.start_incoming();
    let error = watched.attached.hook(&Hook::WatchWrites).unwrap_err();
    assert_eq!(error.code, ErrorCode::State);
    assert!(error.sentence.contains("Awaiting"), "{error}");
    // The agent says that its job is over, so it stays.
    let taking = watched.attached.client.clone();
    let taken = spawn(move || taking.take_by_force());
    let (request, _) = watched.attached.agent.request().unwrap();
    assert_eq!(request, Request::QueryStatus);
    watched.attached.agent.reply(&request, &Ok(JobStatus::default()), JobStatus::encode);
    taken.join().unwrap().unwrap();

    let Watched { mut attached, .. } = watched;
    let adding = attached.client.clone();
    let added = spawn(move || adding.add_block(spec(3, 3 << 20, &written(1))).unwrap());
    attached.agent.accept_block();
    added.join().unwrap();
    let error = attached.hook(&Hook::WatchWrites).unwrap_err();
    assert!(error.sentence.contains("block 3 has no vmm_address"), "{error}");
    attached.lose_agent();
}

#[test]
fn vmm_is_asked_before_writes_are_watched_and_told_when_they_are_not() {
    let Some(mut watched) = Watched::new() else { return };
    assert_eq!(watched.attached.calls(), ["watched"]);
    assert_eq!(watched.attached.refused(&Hook::WatchWrites), ErrorCode::State);
    assert_eq!(watched.attached.calls(), [""; 0], "of the one that is refused it hears nothing");
    for hook in [
        Hook::Pause,
        Hook::Resume { force: false, paused: false },
        Hook::UnwatchWrites,
        Hook::UnwatchWrites,
    ] {
        assert_eq!(watched.attached.hook(&hook), Ok(()), "{}", hook.name());
    }
    assert_eq!(watched.attached.calls(), ["pause", "resume", "unwatched"]);
    // The agent is lost while the guest is paused: the VMM may resume all of it.
    drop(watch(&mut watched.attached.agent));
    assert_eq!(watched.attached.hook(&Hook::Pause), Ok(()));
    let (_client, vmm) = watched.attached.lose_agent();
    assert_eq!(vmm.calls(), ["watched", "pause", "unwatched", "resume", "lost Ours"]);
}

#[test]
fn vmm_that_refuses_has_no_write_watched() {
    let Some(other) = uffd() else { return };
    let mut attached = Attached::new(Vmm { fails: "watched", ..Vmm::default() });
    let ram = Ram::new();
    add_block(&attached.client, &mut attached.agent, &ram, 2);
    let error = attached.hook(&Hook::WatchWrites).unwrap_err();
    assert_eq!((error.code, error.sentence.as_str()), (ErrorCode::Other, "vCPU 3 does not stop"));
    other.register(ram.all(), Register::WriteProtect).expect("that nothing is registered");
    let (_client, vmm) = attached.lose_agent();
    assert_eq!(vmm.calls(), ["watched", "lost Ours"], "nothing was watched");
}

#[test]
fn vmm_hears_that_writes_are_not_watched_after_all() {
    let Some(other) = uffd() else { return };
    let mut attached = Attached::new(Vmm::default());
    let ram = Ram::new();
    add_block(&attached.client, &mut attached.agent, &ram, 2);
    other.register(ram.all(), Register::WriteProtect).unwrap();
    assert_eq!(attached.refused(&Hook::WatchWrites), ErrorCode::System);
    assert_eq!(attached.calls(), ["watched", "unwatched"]);
    attached.lose_agent();
}

const SCAN: Hook = Hook::StartTracking { sources: Trackers::WRITE_PROTECT };
const NO_SCAN: Hook = Hook::StopTracking { sources: Trackers::WRITE_PROTECT };

/// True if nobody has the mapping, which stays so.
fn is_free(ram: &Ram) -> bool {
    let other = uffd().unwrap();
    match other.register(ram.all(), Register::WriteProtect) {
        Ok(()) => true,
        Err(UserfaultError::Register { source: rustix::io::Errno::BUSY, .. }) => false,
        Err(error) => panic!("{error}"),
    }
}

/// A VMM with a mapped block; `None` where there is no userfaultfd.
fn tracked() -> Option<(Attached, Ram)> {
    uffd()?;
    let mut attached = Attached::new(Vmm::default());
    let ram = Ram::new();
    add_block(&attached.client, &mut attached.agent, &ram, 2);
    Some((attached, ram))
}

#[test]
fn watching_takes_the_mappings_from_write_protect_tracking_and_gives_them_back() {
    let Some((mut attached, ram)) = tracked() else { return };
    assert!(is_free(&ram), "nothing is registered before the agent tracks");
    assert_eq!(attached.hook(&SCAN), Ok(()));
    assert!(!is_free(&ram));
    let watched = watch(&mut attached.agent);
    watched.protect(ram.all()).unwrap();
    let done = ram.writer(3);
    assert_waits_at(&watched, ram.page(3));
    assert_eq!(attached.hook(&Hook::UnwatchWrites), Ok(()));
    done.recv_timeout(SOON).unwrap();
    assert!(!is_free(&ram), "it is tracked again");
    // And once more, as it is stopped meanwhile.
    drop(watch(&mut attached.agent));
    assert_eq!(attached.hook(&NO_SCAN), Ok(()));
    assert_eq!(attached.hook(&Hook::UnwatchWrites), Ok(()));
    assert!(is_free(&ram));
    assert_eq!(
        attached.calls(),
        ["watched", "unwatched", "watched", "unwatched"],
        "the VMM's own tracker is none"
    );
    attached.lose_agent();
}

#[test]
fn agent_that_dies_while_it_scans_leaves_nothing_registered() {
    for watches in [false, true] {
        let Some((mut attached, ram)) = tracked() else { return };
        assert_eq!(attached.hook(&SCAN), Ok(()));
        if watches {
            drop(watch(&mut attached.agent));
        }
        let (_client, _vmm) = attached.lose_agent();
        assert!(is_free(&ram), "watches: {watches}");
    }
}

#[test]
fn refused_watch_leaves_write_protect_tracking_as_it_was() {
    let Some((mut attached, ram)) = tracked() else { return };
    assert_eq!(attached.hook(&SCAN), Ok(()));
    let client = attached.client.clone();
    let added = spawn(move || client.add_block(spec(3, 3 << 20, &written(1))).unwrap());
    attached.agent.accept_block();
    added.join().unwrap();
    assert_eq!(
        attached.refused(&Hook::WatchWrites),
        ErrorCode::System,
        "block 3 is mapped nowhere"
    );
    // Nor can it be tracked any more, and that is for the agent to find out.
    assert_eq!(attached.hook(&NO_SCAN), Ok(()));
    assert!(is_free(&ram));
    assert!(attached.hook(&SCAN).unwrap_err().sentence.contains("block 3 has no vmm_address"));
    assert!(is_free(&ram), "all or none");
    attached.lose_agent();
}

#[test]
fn agent_that_hangs_while_writes_wait_is_given_far_less_time_than_any_other() {
    // A writer would wait for two minutes.
    let config = Config {
        request_timeout: Duration::from_secs(120),
        stall_timeout: Duration::from_millis(500),
        ..quiet()
    };
    let (client, channel, agent) = client_with(config, MAX_RANGES, |agent| agent);
    let attached = Attached::over(client, channel, agent.join().unwrap(), Vmm::default());
    let Some(watched) = Watched::over(attached) else { return };
    let done = watched.writer(1);
    done.recv_timeout(SOON).expect("the writer to go on");
    watched.assert_unwatched();
    let Watched { attached, .. } = watched;
    let Attached { client, agent, thread, .. } = attached;
    assert_lost(client.status());
    assert_eq!(thread.join().calls().last().unwrap(), "lost Ours");
    drop(agent);
}
