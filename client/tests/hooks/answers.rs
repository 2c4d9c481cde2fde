// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Every hook reaches the VMM and is answered.

use crate::support::*;
use crate::*;
use pageferry_client::{Dispatch, Ownership, Phase, StatePiece};
use pageferry_protocol::control::Frame;
use pageferry_protocol::control::hook::{Hook, code};
use pageferry_protocol::control::hook_reply::{
    SavedState, decode_hook_reply, decode_state_reply, reply_sequence,
};
use pageferry_protocol::control::job::{JobKind, RunState};
use pageferry_protocol::control::reply::ErrorCode;
use pageferry_protocol::control::state_pieces::PieceSize;

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
    assert_eq!(vmm.calls(), ["throttle 0", "lost Ours"], "without an agent the throttle is off");
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
fn unknown_and_malformed_hooks_are_refused_on_a_live_channel() {
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
    // These two get no reply.
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
    // The agent waited too long for the first hook. The sequence number tells it which reply
    // belongs to which hook.
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
fn declared_tracker_that_is_none_fails_before_a_lost_write() {
    let (_client, mut channel, mut agent) = connected();
    for hook in [START, Hook::SyncTracker] {
        queue(&mut agent, std::slice::from_ref(&hook));
        channel.dispatch(&mut Least).unwrap();
        let error =
            decode_hook_reply(&agent.hooks.recv(soon()).unwrap().body).unwrap().unwrap_err();
        assert!(
            error.sentence.contains("Trackers::HOOKS") && error.sentence.contains("Hooks::tracker"),
            "{error}"
        );
    }
    // A stop without a start succeeds, and so does a tracker that needs no hook.
    queue(&mut agent, &[STOP]);
    channel.dispatch(&mut Least).unwrap();
    assert_eq!(decode_hook_reply(&agent.hooks.recv(soon()).unwrap().body), Ok(Ok(())));
}
