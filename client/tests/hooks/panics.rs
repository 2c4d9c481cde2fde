// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Hooks that panic.

use crate::support::*;
use crate::*;
use pageferry_client::{Ownership, Phase};
use pageferry_protocol::control::hook::Hook;
use pageferry_protocol::control::hook_reply::decode_state_reply;
use pageferry_protocol::control::job::{JobKind, RunState};
use pageferry_protocol::control::reply::ErrorCode;

/// The pause that follows shows that the channel still works.
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
    // An event gets no reply. The VMM panics once more when it is told of the panic.
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
fn a_panic_at_the_agents_end_does_not_skip_other_hooks() {
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
fn a_panic_in_run_state_prevents_pause_and_save() {
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
    assert_eq!(vmm.calls(), [told, told, "lost Ours"], "the operator's pause stays");
}
