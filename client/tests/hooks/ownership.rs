// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Ownership: the guest is given up and comes back.

use crate::support::*;
use crate::*;
use pageferry_client::{Error, OutgoingOptions, Ownership, Phase, RestoreOptions};
use pageferry_protocol::control::hook::Hook;
use pageferry_protocol::control::job::JobKind;
use pageferry_protocol::control::reply::ErrorCode;
use pageferry_protocol::control::request::Request;

#[test]
fn agent_lost_after_relinquish_leaves_the_guest_paused() {
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

    // A new agent may connect while the guest is paused. It may resume the guest only by an
    // operator's force.
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

#[test]
fn refused_relinquish_keeps_the_recoverable_migration() {
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
