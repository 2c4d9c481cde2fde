//! Hooks: dispatched, answered, and survived.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use pageferry_client::{
    ClearPages, Client, DirtyLog, Dispatch, Error, HookChannel, HookError, Hooks, IncomingOptions, JobStatus,
    Ownership, PageRange, Phase, StatePiece, Target,
};
use pageferry_protocol::control::hook::{Hook, PieceSize, code, decode_hook_reply, decode_state_reply, reply_sequence};
use pageferry_protocol::control::job::JobKind;
use pageferry_protocol::control::request::{ErrorCode, MAX_RANGES};
use pageferry_protocol::control::{Frame, SocketError};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use support::*;

/// Writes down what is called, and fails when told to.
#[derive(Default, Clone)]
struct Vmm {
    calls: Arc<Mutex<Vec<String>>>,
    fails: &'static str,
    state: Vec<StatePiece>,
}

impl Vmm {
    fn called(&self, what: impl Into<String>) -> Result<(), HookError> {
        let what = what.into();
        let fails = !self.fails.is_empty() && what.starts_with(self.fails);
        self.calls.lock().unwrap().push(what);
        if fails { Err(HookError::new("vCPU 3 does not stop")) } else { Ok(()) }
    }

    fn calls(&self) -> Vec<String> {
        std::mem::take(&mut self.calls.lock().unwrap())
    }
}

impl Hooks for Vmm {
    fn pause(&mut self) -> Result<(), HookError> {
        self.called("pause")
    }
    fn resume(&mut self) -> Result<(), HookError> {
        self.called("resume")
    }
    fn start_tracking(&mut self) -> Result<(), HookError> {
        self.called("start")
    }
    fn stop_tracking(&mut self) -> Result<(), HookError> {
        self.called("stop")
    }
    fn sync_tracker(&mut self, log: &DirtyLog) -> Result<(), HookError> {
        log.mark(PageRange::new(5, 1));
        self.called("sync")
    }
    fn clear_tracker(&mut self, pages: ClearPages<'_>) -> Result<(), HookError> {
        self.called(format!("clear {} {} {:x?} {:#x}", pages.block, pages.first, pages.bitmap, pages.log_first_page))
    }
    fn throttle(&mut self, percent: u32) -> Result<(), HookError> {
        self.called(format!("throttle {percent}"))
    }
    fn save_state(&mut self) -> Result<Vec<StatePiece>, HookError> {
        self.called("save")?;
        Ok(self.state.clone())
    }
    fn load_state(&mut self, state: Vec<StatePiece>) -> Result<(), HookError> {
        self.state = state;
        self.called("load")
    }
    fn event(&mut self, status: &JobStatus) {
        self.called(format!("event {}", status.phase.name())).unwrap();
    }
    fn agent_lost(&mut self, ownership: Ownership) {
        self.called(format!("lost {ownership:?}")).unwrap();
    }
}

/// A client, its hooks on a thread, and the agent's side in the test's own hands.
fn connected() -> (Client, HookChannel, FakeAgent) {
    let (client, channel, agent) = client(|agent| agent);
    (client, channel, agent.join().unwrap())
}

fn event(kind: JobKind, phase: Phase) -> Hook {
    Hook::Event { status: JobStatus { job: 1, kind, phase, ..JobStatus::default() } }
}

#[test]
fn every_hook_reaches_the_vmm_and_is_answered() {
    let (client, channel, mut agent) = connected();
    let adding = client.clone();
    let added = std::thread::spawn(move || adding.add_block(spec(2, 0x100000, &written(100))).unwrap());
    agent.accept_block();
    added.join().unwrap();
    let vmm = Vmm::default();
    let thread = channel.spawn(vmm.clone()).unwrap();

    for hook in [Hook::StartTracking, Hook::SyncTracker, Hook::Throttle { percent: 30 }, Hook::StopTracking] {
        assert_eq!(agent.hook(&hook), Ok(()), "{}", hook.name());
    }
    assert_eq!(logged(&client), [5]);
    let clear = Hook::ClearTracker { block: 2, first: 64, bitmap: vec![u64::MAX] };
    assert_eq!(agent.hook(&clear), Ok(()));
    agent.send_hook(&event(JobKind::Outgoing, Phase::Passes), Vec::new());
    assert_eq!(agent.hook(&Hook::Pause), Ok(()));
    assert_eq!(agent.hook(&Hook::Resume { force: false }), Ok(()));
    let expected = [
        "start",
        "sync",
        "throttle 30",
        "stop",
        // The block has 100 pages; the bits after its end are gone.
        "clear 2 64 [fffffffff] 0x140",
        "event passes",
        "pause",
        "resume",
    ];
    assert_eq!(vmm.calls(), expected);

    assert_eq!(agent.hook(&Hook::Resume { force: false }), Ok(()));
    assert_eq!(vmm.calls(), [""; 0], "it runs");
    drop(agent);
    thread.join();
    assert_eq!(vmm.calls(), ["lost Ours"]);
}

#[test]
fn failing_hook_is_answered_with_its_sentence() {
    let (_client, channel, mut agent) = connected();
    let vmm = Vmm { fails: "pause", ..Vmm::default() };
    let thread = channel.spawn(vmm.clone()).unwrap();
    let error = agent.hook(&Hook::Pause).unwrap_err();
    assert_eq!((error.code, error.sentence.as_str()), (ErrorCode::Other, "vCPU 3 does not stop"));
    assert_eq!(agent.hook(&Hook::Relinquish).unwrap_err().code, ErrorCode::State);
    assert_eq!(agent.hook(&Hook::Resume { force: false }), Ok(()));
    assert_eq!(vmm.calls(), ["pause", "resume"], "a resume is passed on, though the guest counts as running");
    drop(agent);
    thread.join();
}

#[test]
fn unknown_and_malformed_hooks_get_an_error_and_the_channel_lives() {
    let (_client, channel, mut agent) = connected();
    let vmm = Vmm::default();
    let thread = channel.spawn(vmm.clone()).unwrap();
    let mut ask = |frame: Frame| {
        agent.hooks.send(&frame, soon()).unwrap();
        let answer = agent.hooks.recv(soon()).unwrap();
        assert!(answer.is_reply() && answer.request == frame.request);
        let error = decode_hook_reply(&answer.body).unwrap().unwrap_err();
        (reply_sequence(&answer.body).unwrap(), error.code, error.sentence)
    };
    let (sequence, unknown, sentence) = ask(Frame::request(0x2fff, 9u64.to_le_bytes().to_vec()));
    assert_eq!((sequence, unknown), (9, ErrorCode::Unsupported));
    assert!(sentence.contains("0x2fff"), "{sentence}");
    let (sequence, malformed, _) = ask(Frame::request(code::THROTTLE, [9u64.to_le_bytes(), [0xff; 8]].concat()));
    assert_eq!((sequence, malformed), (9, ErrorCode::Invalid));
    let (_, short, _) = ask(Frame::request(code::PAUSE, vec![1, 2, 3]));
    assert_eq!(short, ErrorCode::Invalid);
    let clear = |block, first, words| Hook::ClearTracker { block, first, bitmap: vec![1; words] };
    assert_eq!(agent.hook(&clear(1, 0, 1)).unwrap_err().code, ErrorCode::NotFound);
    // Neither of these is answered.
    agent.hooks.send(&Frame::request(code::EVENT, vec![1, 2, 3]), soon()).unwrap();
    agent.hooks.send(&Frame::reply(code::PAUSE, vec![1, 2, 3]), soon()).unwrap();
    assert_eq!(agent.hook(&Hook::StartTracking), Ok(()));
    assert_eq!(vmm.calls(), ["start"]);
    drop(agent);
    thread.join();
}

#[test]
fn clear_outside_its_block_is_refused() {
    let (client, channel, mut agent) = connected();
    let adding = client.clone();
    let added = std::thread::spawn(move || adding.add_block(spec(2, 0, &written(65))).unwrap());
    agent.accept_block();
    added.join().unwrap();
    let vmm = Vmm::default();
    let thread = channel.spawn(vmm.clone()).unwrap();
    for (first, words) in [(0, 3), (64, 2), (128, 1), (!63, 1)] {
        let error = agent.hook(&Hook::ClearTracker { block: 2, first, bitmap: vec![1; words] }).unwrap_err();
        assert_eq!(error.code, ErrorCode::Invalid, "{first} {words}");
    }
    assert_eq!(agent.hook(&Hook::ClearTracker { block: 2, first: 64, bitmap: vec![] }), Ok(()));
    drop(agent);
    thread.join();
}

#[test]
fn hooks_sent_at_once_are_answered_in_order_by_one_dispatch() {
    let (_client, mut channel, mut agent) = connected();
    let mut vmm = Vmm::default();
    let sequences = [Hook::Pause, Hook::SyncTracker, Hook::Resume { force: false }].map(|hook| {
        let sequence = agent.send_hook(&hook, Vec::new());
        (hook.code(), sequence)
    });
    assert_eq!(channel.dispatch(&mut vmm).unwrap(), Dispatch::Open);
    // The agent waited too long for the first; it can tell its answer from the others by the number.
    for (request, sequence) in sequences {
        let answer = agent.hooks.recv(soon()).unwrap();
        assert_eq!((answer.request, reply_sequence(&answer.body)), (request, Ok(sequence)));
    }
    assert_eq!(channel.dispatch(&mut vmm).unwrap(), Dispatch::Open, "nothing pending");
    drop(agent);
    assert_eq!(channel.dispatch(&mut vmm).unwrap(), Dispatch::Closed);
    assert_eq!(channel.dispatch(&mut vmm).unwrap(), Dispatch::Closed);
    assert_eq!(vmm.calls(), ["pause", "sync", "resume", "lost Ours"]);
}

#[test]
fn frame_that_cannot_be_followed_ends_the_agent_and_resumes_the_guest() {
    let (client, mut channel, mut agent) = connected();
    let mut vmm = Vmm::default();
    agent.send_hook(&Hook::Pause, Vec::new());
    rustix::io::write(&agent.hooks, &[0xff; 12]).unwrap();
    assert!(matches!(channel.dispatch(&mut vmm), Err(Error::HookChannel { .. })));
    assert_eq!(channel.dispatch(&mut vmm).unwrap(), Dispatch::Closed);
    assert_eq!(vmm.calls(), ["pause", "resume", "lost Ours"]);
    assert_lost(client.status());
}

#[test]
fn agent_that_dies_while_the_guest_is_paused_leaves_it_running() {
    let (client, channel, mut agent) = connected();
    let vmm = Vmm::default();
    let thread = channel.spawn(vmm.clone()).unwrap();
    assert_eq!(agent.hook(&Hook::Pause), Ok(()));
    drop(agent);
    thread.join();
    assert_eq!(vmm.calls(), ["pause", "resume", "lost Ours"]);
    assert_eq!(client.ownership(), Ownership::Ours);
}

#[test]
fn hanging_agent_that_is_given_up_does_not_keep_the_guest_paused() {
    let (client, channel, agent) = client_with(impatient(), MAX_RANGES, |agent| agent);
    let mut agent = agent.join().unwrap();
    let vmm = Vmm::default();
    let thread = channel.spawn(vmm.clone()).unwrap();
    assert_eq!(agent.hook(&Hook::Pause), Ok(()));
    assert_lost(client.status());
    // The agent still holds both of its sockets.
    thread.join();
    assert_eq!(vmm.calls(), ["pause", "resume", "lost Ours"]);
    drop(agent);
}

#[test]
fn agent_that_dies_after_the_line_leaves_the_guest_standing_still() {
    let (client, channel, mut agent) = connected();
    let vmm = Vmm::default();
    let thread = channel.spawn(vmm.clone()).unwrap();
    assert_eq!(agent.hook(&Hook::Relinquish).unwrap_err().code, ErrorCode::State, "it runs");
    assert_eq!(agent.hook(&Hook::Pause), Ok(()));
    assert_eq!(agent.hook(&Hook::Relinquish), Ok(()));
    assert_eq!(client.ownership(), Ownership::Relinquished);
    drop(agent);
    thread.join();
    assert_eq!(vmm.calls(), ["pause", "lost Relinquished"]);

    // A new agent may watch it stand still, but not resume it, unless an operator says so.
    let (ours, agents) = UnixStream::pair().unwrap();
    let second = std::thread::spawn(move || FakeAgent::shake_hands(agents.into(), MAX_RANGES));
    let channel = client.reattach_socket(ours.into()).unwrap();
    let mut agent = second.join().unwrap();
    let thread = channel.spawn(vmm.clone()).unwrap();
    assert_eq!(agent.hook(&Hook::Pause).unwrap_err().code, ErrorCode::State);
    assert_eq!(agent.hook(&Hook::Resume { force: false }).unwrap_err().code, ErrorCode::State);
    assert_eq!(vmm.calls(), [""; 0]);
    assert_eq!(agent.hook(&Hook::Resume { force: true }), Ok(()));
    assert_eq!((vmm.calls(), client.ownership()), (vec!["resume".to_owned()], Ownership::Ours));
    drop(agent);
    thread.join();
}

#[test]
fn agent_that_knows_that_no_commit_left_gives_the_guest_back() {
    let (client, channel, mut agent) = connected();
    let vmm = Vmm::default();
    let thread = channel.spawn(vmm.clone()).unwrap();
    for hook in [Hook::Pause, Hook::Relinquish, Hook::Resume { force: false }] {
        assert_eq!(agent.hook(&hook), Ok(()), "{}", hook.name());
    }
    assert_eq!((vmm.calls().len(), client.ownership()), (2, Ownership::Ours));
    for hook in [Hook::Pause, Hook::Relinquish] {
        assert_eq!(agent.hook(&hook), Ok(()), "{}", hook.name());
    }
    agent.send_hook(&event(JobKind::Outgoing, Phase::Completed), Vec::new());
    assert_eq!(agent.hook(&Hook::Resume { force: false }).unwrap_err().code, ErrorCode::State);
    assert_eq!(client.ownership(), Ownership::Gone);
    drop(agent);
    thread.join();
    assert_eq!(vmm.calls(), ["pause", "event completed", "lost Gone"]);
}

#[test]
fn state_makes_the_round_trip() {
    let state = vec![
        StatePiece { name: "vcpu0".into(), bytes: vec![7; 9000] },
        StatePiece { name: "nothing".into(), bytes: vec![] },
        StatePiece { name: "net".into(), bytes: b"abc".to_vec() },
    ];
    let (_source, channel, mut agent) = connected();
    let thread = channel.spawn(Vmm { state: state.clone(), ..Vmm::default() }).unwrap();
    let mut saved = agent.hook_frame(&Hook::SaveState, Vec::new());
    let pieces = decode_state_reply(&saved.body).unwrap().unwrap();
    drop(agent);
    thread.join();

    let (client, channel, mut agent) = connected();
    let vmm = Vmm::default();
    let thread = channel.spawn(vmm.clone()).unwrap();
    let file = saved.fds.remove(0);
    let load = Hook::LoadState { pieces };
    let unasked = agent.hook_frame(&load, vec![file.try_clone().unwrap()]);
    assert_eq!(decode_hook_reply(&unasked.body).unwrap().unwrap_err().code, ErrorCode::State);

    let starting = client.clone();
    let started = std::thread::spawn(move || {
        starting.start_incoming(Target::Address("tcp:[::]:0".into()), &IncomingOptions::default()).unwrap()
    });
    let (request, _) = agent.request().unwrap();
    agent.started(&request);
    started.join().unwrap();

    assert_eq!(agent.hook(&load).unwrap_err().code, ErrorCode::Invalid, "without its file");
    let huge = Hook::LoadState { pieces: vec![PieceSize { name: "x".into(), length: 1 << 30 }] };
    let short = agent.hook_frame(&huge, vec![file.try_clone().unwrap()]);
    assert!(decode_hook_reply(&short.body).unwrap().unwrap_err().sentence.contains("0x40000000"));
    assert_eq!(vmm.calls(), [""; 0]);
    assert_eq!(decode_hook_reply(&agent.hook_frame(&load, vec![file]).body), Ok(Ok(())));
    assert_eq!(client.ownership(), Ownership::Awaiting);
    assert_eq!(agent.hook(&Hook::Resume { force: false }), Ok(()));
    assert_eq!((vmm.calls(), client.ownership()), (vec!["load".to_owned(), "resume".to_owned()], Ownership::Ours));
    drop(agent);
    assert_eq!(thread.join().state, state);
}

#[test]
fn state_over_a_limit_is_an_error_reply() {
    let (_client, channel, mut agent) = connected();
    let state = vec![StatePiece { name: "x".repeat(300), bytes: vec![] }];
    let thread = channel.spawn(Vmm { state, ..Vmm::default() }).unwrap();
    let saved = agent.hook_frame(&Hook::SaveState, Vec::new());
    let error = decode_state_reply(&saved.body).unwrap().unwrap_err();
    assert!(error.sentence.contains("300") && saved.fds.is_empty(), "{error}");
    drop(agent);
    thread.join();
}

#[test]
fn failed_incoming_stays_awaiting() {
    let (client, channel, mut agent) = connected();
    let vmm = Vmm::default();
    let thread = channel.spawn(vmm.clone()).unwrap();
    let starting = client.clone();
    let started = std::thread::spawn(move || {
        starting.start_incoming(Target::Address("tcp:[::]:0".into()), &IncomingOptions::default()).unwrap()
    });
    let (request, _) = agent.request().unwrap();
    agent.started(&request);
    started.join().unwrap();
    agent.send_hook(&event(JobKind::Incoming, Phase::Failed), Vec::new());
    drop(agent);
    thread.join();
    assert_eq!(vmm.calls(), ["event failed", "lost Awaiting"]);
    assert_eq!(client.ownership(), Ownership::Awaiting);
}

#[test]
fn dropped_channel_is_closed_at_the_agents_end() {
    let (client, channel, mut agent) = connected();
    drop(channel);
    assert!(matches!(agent.hooks.recv(soon()), Err(SocketError::Closed)));
    drop(client);
}

#[test]
fn client_dropped_while_the_guest_is_paused_resumes_it() {
    let (client, channel, mut agent) = connected();
    let vmm = Vmm::default();
    let thread = channel.spawn(vmm.clone()).unwrap();
    assert_eq!(agent.hook(&Hook::Pause), Ok(()));
    drop(client);
    thread.join();
    assert_eq!(vmm.calls(), ["pause", "resume", "lost Ours"]);
}
