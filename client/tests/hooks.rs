//! Hooks: dispatched, answered, and survived.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use pageferry_client::{
    Dispatch, Error, HookError, Hooks, JobStatus, OutgoingOptions, Ownership, Phase,
    RestoreOptions, StatePiece, Trackers,
};
use pageferry_protocol::control::hook::{Hook, PieceSize, SavedState, code};
use pageferry_protocol::control::hook::{decode_hook_reply, decode_state_reply, reply_sequence};
use pageferry_protocol::control::job::{JobKind, RunState};
use pageferry_protocol::control::request::{ErrorCode, MAX_RANGES, Request};
use pageferry_protocol::control::{Frame, SocketError};
use std::sync::mpsc::channel;
use support::*;

const RESUME: Hook = Hook::Resume { force: false, paused: false };
const START: Hook = Hook::StartTracking { sources: Trackers::HOOKS };
const STOP: Hook = Hook::StopTracking { sources: Trackers::HOOKS };

fn event(kind: JobKind, phase: Phase) -> Hook {
    Hook::Event { status: Box::new(JobStatus { job: 1, kind, phase, ..JobStatus::default() }) }
}

#[test]
fn every_hook_reaches_the_vmm_and_is_answered() {
    let mut attached = Attached::new(Vmm::default());
    attached.add_block(0x100000, 100);
    for hook in [START, Hook::SyncTracker, Hook::Throttle { percent: 30 }, STOP] {
        assert_eq!(attached.hook(&hook), Ok(()), "{}", hook.name());
    }
    assert_eq!(logged(&attached.client), [5]);
    let clear = Hook::ClearTracker { block: 2, first: 64, bitmap: vec![u64::MAX] };
    assert_eq!(attached.hook(&clear), Ok(()));
    attached.agent.send_hook(&event(JobKind::Outgoing, Phase::Passes), Vec::new());
    assert_eq!(attached.hook(&Hook::Pause), Ok(()));
    assert_eq!(attached.hook(&RESUME), Ok(()));
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
    assert_eq!(attached.calls(), expected);

    assert_eq!(attached.hook(&RESUME), Ok(()));
    assert_eq!(attached.calls(), [""; 0], "it runs");
    let (_client, vmm) = attached.lose_agent();
    assert_eq!(vmm.calls(), ["throttle 0", "lost Ours"], "nobody else would let it go");
}

#[test]
fn failing_hook_is_answered_with_its_sentence() {
    let mut attached = Attached::new(Vmm { fails: "pause", ..Vmm::default() });
    let error = attached.hook(&Hook::Pause).unwrap_err();
    assert_eq!((error.code, error.sentence.as_str()), (ErrorCode::Other, "vCPU 3 does not stop"));
    assert_eq!(
        attached.refused(&Hook::Relinquish { session: [0; 16], release: false }),
        ErrorCode::State
    );
    assert_eq!(attached.hook(&RESUME), Ok(()));
    assert_eq!(
        attached.calls(),
        ["pause", "resume"],
        "a resume is passed on, though the guest counts as running"
    );
    attached.lose_agent();
}

#[test]
fn unknown_and_malformed_hooks_get_an_error_and_the_channel_lives() {
    let mut attached = Attached::new(Vmm::default());
    let agent = &mut attached.agent;
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
    let (sequence, malformed, _) =
        ask(Frame::request(code::THROTTLE, [9u64.to_le_bytes(), [0xff; 8]].concat()));
    assert_eq!((sequence, malformed), (9, ErrorCode::Invalid));
    let (_, short, _) = ask(Frame::request(code::PAUSE, vec![1, 2, 3]));
    assert_eq!(short, ErrorCode::Invalid);
    let clear = |block, first, words| Hook::ClearTracker { block, first, bitmap: vec![1; words] };
    assert_eq!(attached.refused(&clear(1, 0, 1)), ErrorCode::NotFound);
    // Neither of these is answered.
    attached.agent.hooks.send(&Frame::request(code::EVENT, vec![1, 2, 3]), soon()).unwrap();
    attached.agent.hooks.send(&Frame::reply(code::PAUSE, vec![1, 2, 3]), soon()).unwrap();
    assert_eq!(attached.hook(&START), Ok(()));
    assert_eq!(attached.calls(), ["start"]);
    attached.lose_agent();
}

#[test]
fn clear_outside_its_block_is_refused() {
    let mut attached = Attached::new(Vmm::default());
    attached.add_block(0, 65);
    for (first, words) in [(0, 3), (64, 2), (128, 1), (!63, 1)] {
        let clear = Hook::ClearTracker { block: 2, first, bitmap: vec![1; words] };
        assert_eq!(attached.refused(&clear), ErrorCode::Invalid, "{first} {words}");
    }
    assert_eq!(attached.hook(&Hook::ClearTracker { block: 2, first: 64, bitmap: vec![] }), Ok(()));
    attached.lose_agent();
}

#[test]
fn hooks_sent_at_once_are_answered_in_order_by_one_dispatch() {
    let (_client, mut channel, mut agent) = connected();
    let mut vmm = Vmm::default();
    let sequences = [Hook::Pause, Hook::SyncTracker, RESUME].map(|hook| {
        let sequence = agent.send_hook(&hook, Vec::new());
        (hook.code(), sequence)
    });
    assert_eq!(channel.dispatch(&mut vmm).unwrap(), Dispatch::Open);
    // The agent waited too long for the first; it can tell its answer from the others by the
    // number.
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
    let mut attached = Attached::new(Vmm::default());
    assert_eq!(attached.hook(&Hook::Pause), Ok(()));
    let (client, vmm) = attached.lose_agent();
    assert_eq!(vmm.calls(), ["pause", "resume", "lost Ours"]);
    assert_eq!(client.ownership(), Ownership::Ours);
}

#[test]
fn hanging_agent_that_is_given_up_does_not_keep_the_guest_paused() {
    let (client, channel, agent) = client_with(impatient(), MAX_RANGES, |agent| agent);
    let mut attached = Attached::over(client, channel, agent.join().unwrap(), Vmm::default());
    assert_eq!(attached.hook(&Hook::Pause), Ok(()));
    assert_lost(attached.client.status());
    // The agent still holds both of its sockets.
    let vmm = attached.thread.join();
    assert_eq!(vmm.calls(), ["pause", "resume", "lost Ours"]);
    drop(attached.agent);
}

/// A VMM with an agent that is silent from now on, after these hooks; both sockets stay open.
fn silent_after(hooks: &[Hook]) -> Attached {
    let (client, channel, agent) = client_with(impatient(), MAX_RANGES, |agent| agent);
    let mut attached = Attached::over(client, channel, agent.join().unwrap(), Vmm::default());
    for hook in hooks {
        assert_eq!(attached.hook(hook), Ok(()), "{}", hook.name());
    }
    attached
}

/// Returns what was called when a silent agent has been given up, though nobody asks it anything.
#[track_caller]
fn given_up(silent: Attached) -> Vec<String> {
    let Attached { client, thread, agent, .. } = silent;
    let (says, calls) = channel();
    std::thread::spawn(move || says.send(thread.join().calls()).unwrap());
    let calls = calls.recv_timeout(LONG).expect("the guest is paused for ever");
    assert_eq!(client.ownership(), Ownership::Ours);
    drop(agent);
    calls
}

#[test]
fn hanging_agent_does_not_keep_the_guest_paused_though_nobody_asks_it_anything() {
    assert_eq!(given_up(silent_after(&[Hook::Pause])), ["pause", "resume", "lost Ours"]);
}

#[test]
fn silent_agent_is_not_given_up_where_the_guest_runs_or_may_run_elsewhere() {
    let relinquish = Hook::Relinquish { session: [0; 16], release: false };
    let silent = [vec![Hook::Pause, RESUME], vec![Hook::Pause, relinquish.clone()]]
        .map(|hooks| silent_after(&hooks));
    // These two were silent before the first one that hangs, and the second hangs only when the
    // first was found: that is how long it takes, and as long again.
    for _ in 0..2 {
        given_up(silent_after(&[Hook::Pause]));
    }
    for mut attached in silent {
        assert!(!attached.thread.is_finished());
        assert_eq!(attached.hook(&RESUME), Ok(()), "it has its say");
        assert_eq!(attached.calls(), ["pause", "resume"]);
        attached.lose_agent();
    }
}

#[test]
fn agent_that_dies_after_the_line_leaves_the_guest_standing_still() {
    let mut attached = Attached::new(Vmm::default());
    assert_eq!(
        attached.refused(&Hook::Relinquish { session: [0; 16], release: false }),
        ErrorCode::State,
        "it runs"
    );
    assert_eq!(attached.hook(&Hook::Pause), Ok(()));
    assert_eq!(attached.hook(&Hook::Relinquish { session: [0; 16], release: false }), Ok(()));
    assert_eq!(attached.client.ownership(), Ownership::Relinquished);
    let (client, vmm) = attached.lose_agent();
    assert_eq!(vmm.calls(), ["pause", "lost Relinquished"]);

    // A new agent may watch it stand still, but not resume it, unless an operator says so.
    let (channel, second) = attach_next(&client);
    let mut attached = Attached::over(client, channel, second, vmm);
    assert_eq!(attached.refused(&Hook::Pause), ErrorCode::State);
    assert_eq!(attached.refused(&RESUME), ErrorCode::State);
    assert_eq!(attached.calls(), [""; 0]);
    assert_eq!(attached.hook(&Hook::Resume { force: true, paused: false }), Ok(()));
    assert_eq!(
        (attached.calls(), attached.client.ownership()),
        (vec!["resume".to_owned()], Ownership::Ours)
    );
    attached.lose_agent();
}

#[test]
fn agent_that_knows_that_no_commit_left_gives_the_guest_back() {
    let mut attached = Attached::new(Vmm::default());
    for hook in [Hook::Pause, Hook::Relinquish { session: [0; 16], release: false }, RESUME] {
        assert_eq!(attached.hook(&hook), Ok(()), "{}", hook.name());
    }
    assert_eq!((attached.calls().len(), attached.client.ownership()), (2, Ownership::Ours));
    for hook in [Hook::Pause, Hook::Relinquish { session: [0; 16], release: false }] {
        assert_eq!(attached.hook(&hook), Ok(()), "{}", hook.name());
    }
    attached.agent.send_hook(&event(JobKind::Outgoing, Phase::Completed), Vec::new());
    assert_eq!(attached.refused(&RESUME), ErrorCode::State);
    assert_eq!(attached.client.ownership(), Ownership::Gone);
    let (_client, vmm) = attached.lose_agent();
    assert_eq!(vmm.calls(), ["pause", "event completed", "lost Gone"]);
}

#[test]
fn state_makes_the_round_trip() {
    let state = vec![
        StatePiece { name: "vcpu0".into(), bytes: vec![7; 9000] },
        StatePiece { name: "nothing".into(), bytes: vec![] },
        StatePiece { name: "net".into(), bytes: b"abc".to_vec() },
    ];
    let mut source = Attached::new(Vmm { state: state.clone(), ..Vmm::default() });
    let mut saved = source.agent.hook_frame(&Hook::SaveState, Vec::new());
    let SavedState { guest, pieces } = decode_state_reply(&saved.body).unwrap().unwrap();
    assert_eq!(guest, RunState::Running);
    source.lose_agent();

    let mut attached = Attached::new(Vmm::default());
    let file = saved.fds.remove(0);
    let load = Hook::LoadState { pieces };
    let unasked = attached.agent.hook_frame(&load, vec![file.try_clone().unwrap()]);
    assert_eq!(decode_hook_reply(&unasked.body).unwrap().unwrap_err().code, ErrorCode::State);

    attached.start_incoming();
    assert_eq!(attached.refused(&load), ErrorCode::Invalid, "without its file");
    let huge = Hook::LoadState { pieces: vec![PieceSize { name: "x".into(), length: 1 << 30 }] };
    let short = attached.agent.hook_frame(&huge, vec![file.try_clone().unwrap()]);
    assert!(decode_hook_reply(&short.body).unwrap().unwrap_err().sentence.contains("0x40000000"));
    assert_eq!(attached.calls(), [""; 0]);
    assert_eq!(decode_hook_reply(&attached.agent.hook_frame(&load, vec![file]).body), Ok(Ok(())));
    assert_eq!(attached.client.ownership(), Ownership::Awaiting);
    assert_eq!(attached.hook(&RESUME), Ok(()));
    assert_eq!(attached.calls(), ["load", "resume"]);
    assert_eq!(attached.client.ownership(), Ownership::Ours);
    let (_client, vmm) = attached.lose_agent();
    assert_eq!(vmm.state, state);
}

#[test]
fn state_over_a_limit_is_an_error_reply() {
    let state = vec![StatePiece { name: "x".repeat(300), bytes: vec![] }];
    let mut attached = Attached::new(Vmm { state, ..Vmm::default() });
    let saved = attached.agent.hook_frame(&Hook::SaveState, Vec::new());
    let error = decode_state_reply(&saved.body).unwrap().unwrap_err();
    assert!(error.sentence.contains("300") && saved.fds.is_empty(), "{error}");
    attached.lose_agent();
}

#[test]
fn failed_incoming_stays_awaiting() {
    let mut attached = Attached::new(Vmm::default());
    attached.start_incoming();
    attached.agent.send_hook(&event(JobKind::Incoming, Phase::Failed), Vec::new());
    let (client, vmm) = attached.lose_agent();
    assert_eq!(vmm.calls(), ["event failed", "lost Awaiting"]);
    assert_eq!(client.ownership(), Ownership::Awaiting);
}

#[test]
fn refused_guest_is_not_in_the_way_of_the_snapshot_that_runs() {
    for refused in [true, false] {
        let mut attached = Attached::new(Vmm::default());
        let starting = attached.client.clone();
        let started = std::thread::spawn(move || {
            starting
                .start_restore(std::path::Path::new("/images/golden"), &RestoreOptions::default())
                .map(drop)
        });
        let (request, _) = attached.agent.request().unwrap();
        assert_eq!(
            attached.client.ownership(),
            Ownership::Awaiting,
            "the guest may come sooner than the answer"
        );
        assert_eq!(attached.hook(&Hook::Pause), Ok(()));
        if refused {
            attached.agent.refuse(&request, ErrorCode::Busy, "a snapshot runs");
            assert!(matches!(started.join().unwrap(), Err(Error::Refused { .. })));
            assert_eq!(attached.client.ownership(), Ownership::Ours);
            assert_eq!(attached.hook(&RESUME), Ok(()));
            assert_eq!(attached.calls(), ["pause", "resume"]);
        } else {
            attached.agent.started(&request);
            started.join().unwrap().unwrap();
            assert_eq!(attached.refused(&Hook::Pause), ErrorCode::State);
        }
        attached.lose_agent();
    }
}

/// An operator's wish for a restore.
fn prepare_restore() -> Hook {
    Hook::PrepareRestore { path: "/images/golden".into() }
}

#[test]
fn restore_that_the_vmm_allows_makes_it_await_a_guest_of_that_agent() {
    let mut attached = Attached::new(Vmm::default());
    assert_eq!(attached.hook(&Hook::Pause), Ok(()));
    assert_eq!(attached.hook(&prepare_restore()), Ok(()));
    assert_eq!(attached.client.ownership(), Ownership::Awaiting);
    assert_eq!(attached.refused(&Hook::WatchWrites), ErrorCode::State, "there is nothing to save");
    attached.agent.send_hook(&event(JobKind::Restore, Phase::Cancelled), Vec::new());
    assert_eq!(attached.hook(&prepare_restore()), Ok(()), "another attempt");
    assert_eq!(attached.hook(&RESUME), Ok(()));
    assert_eq!(attached.client.ownership(), Ownership::Ours);
    let expected = [
        "pause",
        "prepare restore /images/golden",
        "event cancelled",
        "prepare restore /images/golden",
        "resume",
    ];
    assert_eq!(attached.calls(), expected);

    assert_eq!(attached.hook(&prepare_restore()), Ok(()));
    let (client, vmm) = attached.lose_agent();
    assert_eq!(client.ownership(), Ownership::Awaiting);
    assert_eq!(
        vmm.calls(),
        ["prepare restore /images/golden", "lost Awaiting"],
        "nobody runs what is half restored"
    );
}

#[test]
fn restore_that_the_vmm_refuses_changes_nothing() {
    let mut attached = Attached::new(Vmm { fails: "prepare", ..Vmm::default() });
    assert_eq!(attached.hook(&Hook::Pause), Ok(()));
    let error = attached.hook(&prepare_restore()).unwrap_err();
    assert_eq!((error.code, error.sentence.as_str()), (ErrorCode::Other, "vCPU 3 does not stop"));
    assert_eq!(attached.client.ownership(), Ownership::Ours);
    let (_client, vmm) = attached.lose_agent();
    assert_eq!(vmm.calls(), ["pause", "prepare restore /images/golden", "resume", "lost Ours"]);
}

#[test]
fn restore_over_a_guest_that_may_return_is_refused_before_the_vmm_is_asked() {
    let mut attached = Attached::new(Vmm::default());
    for hook in [Hook::Pause, Hook::Relinquish { session: [0; 16], release: false }] {
        assert_eq!(attached.hook(&hook), Ok(()), "{}", hook.name());
    }
    assert_eq!(attached.refused(&prepare_restore()), ErrorCode::State);
    assert_eq!(
        (attached.calls(), attached.client.ownership()),
        (vec!["pause".to_owned()], Ownership::Relinquished)
    );
    assert_eq!(attached.hook(&RESUME), Ok(()), "and the agent that asked for the line has its say");
    attached.lose_agent();
}

/// A VMM that implements only what it must.
struct Least;

impl Hooks for Least {
    fn run_state(&mut self) -> Result<RunState, HookError> {
        Ok(RunState::Running)
    }
    fn pause(&mut self) -> Result<(), HookError> {
        Ok(())
    }
    fn resume(&mut self) -> Result<(), HookError> {
        Ok(())
    }
    fn save_state(&mut self) -> Result<Vec<StatePiece>, HookError> {
        Ok(Vec::new())
    }
    fn load_state(&mut self, _: Vec<StatePiece>) -> Result<(), HookError> {
        Ok(())
    }
}

#[test]
fn vmm_that_says_nothing_about_restores_takes_none_from_an_operator() {
    let (client, mut channel, mut agent) = connected();
    agent.send_hook(&prepare_restore(), Vec::new());
    channel.dispatch(&mut Least).unwrap();
    let answer = agent.hooks.recv(soon()).unwrap();
    let error = decode_hook_reply(&answer.body).unwrap().unwrap_err();
    assert_eq!(error.sentence, "this VMM takes no restore from an operator");
    assert_eq!(client.ownership(), Ownership::Ours);
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
    let mut attached = Attached::new(Vmm::default());
    assert_eq!(attached.hook(&Hook::Pause), Ok(()));
    drop(attached.client);
    let vmm = attached.thread.join();
    assert_eq!(vmm.calls(), ["pause", "resume", "lost Ours"]);
}

/// A pause that comes after it shows that the channel lives.
#[test]
fn a_hook_that_panics_fails_by_name_and_the_channel_lives() {
    let panics = "save,start,watched,event,unwatched,throttle,panicked: event";
    let mut attached = Attached::new(Vmm { panics, ..Vmm::default() });
    attached.add_block(0, 8);
    assert_eq!(attached.hook(&Hook::Pause), Ok(()));
    let saved = attached.agent.hook_frame(&Hook::SaveState, Vec::new());
    let error = decode_state_reply(&saved.body).unwrap().unwrap_err();
    assert_eq!((error.code, error.sentence.as_str()), (ErrorCode::Panicked, "vCPU 3 is gone"));
    for hook in [START, Hook::WatchWrites, Hook::Throttle { percent: 30 }] {
        assert_eq!(attached.refused(&hook), ErrorCode::Panicked, "{}", hook.name());
    }
    // One that is not answered; the VMM panics once more as it is told.
    attached.agent.send_hook(&event(JobKind::Outgoing, Phase::Failed), Vec::new());
    assert_eq!(attached.hook(&RESUME), Ok(()));
    let told = "panicked: save state: vCPU 3 is gone";
    let calls = attached.calls();
    assert_eq!(calls[..3], ["pause", "save", told]);
    assert_eq!(calls.last().unwrap(), "resume");
    assert_eq!(attached.hook(&Hook::Pause), Ok(()));
    let (client, vmm) = attached.lose_agent();
    assert_eq!(client.ownership(), Ownership::Ours);
    let calls = vmm.calls();
    assert!(calls.starts_with(&["pause".into(), "resume".into()]), "{calls:?}");
    assert!(
        calls.contains(&"throttle 0".into()),
        "a start that panicked may have started: {calls:?}"
    );
    assert!(calls.contains(&"stop".into()), "{calls:?}");
    assert_eq!(calls.last().unwrap(), "lost Ours");
}

#[test]
fn a_hook_that_panics_at_the_end_of_the_agent_keeps_nothing_else_from_happening() {
    let mut attached = Attached::new(Vmm { panics: "resume,stop,lost", ..Vmm::default() });
    assert_eq!(attached.hook(&START), Ok(()));
    assert_eq!(attached.hook(&Hook::Pause), Ok(()));
    let (_client, vmm) = attached.lose_agent();
    let expected = [
        "start",
        "pause",
        "resume",
        "panicked: resume: vCPU 3 is gone",
        "stop",
        "panicked: stop tracking: vCPU 3 is gone",
        "lost Ours",
        "panicked: agent lost: vCPU 3 is gone",
    ];
    assert_eq!(vmm.calls(), expected);
}

#[test]
fn an_agent_that_dies_while_it_tracks_and_throttles_leaves_neither_on() {
    let mut attached = Attached::new(Vmm::default());
    for hook in [START, Hook::Throttle { percent: 30 }] {
        assert_eq!(attached.hook(&hook), Ok(()), "{}", hook.name());
    }
    let (_client, vmm) = attached.lose_agent();
    assert_eq!(vmm.calls(), ["start", "throttle 30", "stop", "throttle 0", "lost Ours"]);
}

#[test]
fn a_relinquish_that_is_refused_does_not_change_the_migration_that_can_be_recovered() {
    let mut attached = Attached::new(Vmm::default());
    assert_eq!(attached.hook(&Hook::Pause), Ok(()));
    assert_eq!(attached.hook(&Hook::Relinquish { session: [1; 16], release: true }), Ok(()));
    let (client, vmm) = attached.lose_agent();
    let (channel, second) = attach_next(&client);
    let mut attached = Attached::over(client, channel, second, vmm);
    assert_eq!(
        attached.refused(&Hook::Relinquish { session: [2; 16], release: false }),
        ErrorCode::State
    );
    let recovering = attached.client.clone();
    let recovered =
        std::thread::spawn(move || recovering.recover(None, &OutgoingOptions::default()).map(drop));
    let (request, _) = attached.agent.request().unwrap();
    let Request::Recover { session, options, .. } = &request else { panic!("{request:?}") };
    assert_eq!((*session, options.release), ([1; 16], true));
    attached.agent.started(&request);
    recovered.join().unwrap().unwrap();
    attached.lose_agent();
}

#[test]
fn a_pause_that_failed_or_panicked_is_undone_when_the_agent_dies() {
    let vmms =
        [Vmm { fails: "pause", ..Vmm::default() }, Vmm { panics: "pause", ..Vmm::default() }];
    for vmm in vmms {
        let mut attached = Attached::new(vmm);
        assert!(attached.hook(&Hook::Pause).is_err());
        let (client, vmm) = attached.lose_agent();
        let calls = vmm.calls();
        assert_eq!(
            (&calls[0], &calls[calls.len() - 2..]),
            (&"pause".into(), &["resume".into(), "lost Ours".into()][..])
        );
        assert_eq!(client.ownership(), Ownership::Ours);
    }
}

#[test]
fn an_agent_that_hangs_after_a_pause_that_failed_is_found_as_after_one_that_did_not() {
    let (client, channel, agent) = client_with(impatient(), MAX_RANGES, |agent| agent);
    let vmm = Vmm { fails: "pause", ..Vmm::default() };
    let mut attached = Attached::over(client, channel, agent.join().unwrap(), vmm);
    assert!(attached.hook(&Hook::Pause).is_err());
    assert_eq!(given_up(attached), ["pause", "resume", "lost Ours"]);
}

#[test]
fn a_vmm_that_panics_when_it_is_asked_for_the_run_state_is_not_paused_and_not_saved() {
    let mut attached =
        Attached::new(Vmm { panics: "run state", run_state: RunState::Paused, ..Vmm::default() });
    let error = attached.hook(&Hook::Pause).unwrap_err();
    assert_eq!(
        (error.code, error.sentence.as_str()),
        (ErrorCode::Panicked, "run state: vCPU 3 is gone")
    );
    let saved = attached.agent.hook_frame(&Hook::SaveState, Vec::new());
    let error = decode_state_reply(&saved.body).unwrap().unwrap_err();
    assert_eq!(
        (error.code, error.sentence.as_str()),
        (ErrorCode::Panicked, "run state: vCPU 3 is gone")
    );
    let told = "panicked: run state: vCPU 3 is gone";
    let (_client, vmm) = attached.lose_agent();
    assert_eq!(vmm.calls(), [told, told, "lost Ours"], "the operator's pause stands");
}

#[test]
fn a_vmm_that_declares_a_tracker_and_has_none_fails_before_a_write_is_lost() {
    let (_client, mut channel, mut agent) = connected();
    for (hook, name) in [(START, "start_tracking"), (Hook::SyncTracker, "sync_tracker")] {
        queue(&mut agent, std::slice::from_ref(&hook));
        channel.dispatch(&mut Least).unwrap();
        let error =
            decode_hook_reply(&agent.hooks.recv(soon()).unwrap().body).unwrap().unwrap_err();
        assert!(
            error.sentence.contains("Trackers::HOOKS") && error.sentence.contains(name),
            "{error}"
        );
    }
    // To stop what never was is fine, as is the tracker that needs no hook.
    queue(&mut agent, &[STOP]);
    channel.dispatch(&mut Least).unwrap();
    assert_eq!(decode_hook_reply(&agent.hooks.recv(soon()).unwrap().body), Ok(Ok(())));
}
