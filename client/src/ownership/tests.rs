// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

use super::*;

use RunState::{Paused, Running};

const LINK: u64 = 7;
/// The agent that is attached next.
const OTHER: u64 = 8;
const RUN: ResumeAction = ResumeAction::SetRunState(Running);
const STAY: ResumeAction = ResumeAction::SetRunState(Paused);

const OWNERSHIPS: [Ownership; 4] =
    [Ownership::Ours, Ownership::Relinquished, Ownership::Gone, Ownership::Awaiting];
const PAUSES: [Pause; 5] = [
    Pause::Running,
    Pause::Uncertain { link: LINK },
    Pause::Uncertain { link: OTHER },
    Pause::Paused { link: LINK },
    Pause::Paused { link: OTHER },
];
/// A migration that can be recovered.
const MIGRATION: Migration = Migration { session: [1; 16], release: true };

/// Every state there is, also those that no run comes to.
fn all() -> impl Iterator<Item = StateMachine> {
    OWNERSHIPS.into_iter().flat_map(|ownership| {
        PAUSES.into_iter().flat_map(move |pause| {
            [None, Some(LINK), Some(OTHER)].into_iter().flat_map(move |requested_by| {
                [false, true].into_iter().flat_map(move |start_unanswered| {
                    [Running, Paused].map(|run_state| StateMachine {
                        given_up: None,
                        ownership,
                        pause,
                        run_state,
                        requested_by,
                        start_unanswered,
                        awaited_count: 0,
                        agent: 0,
                        migration: Migration::default(),
                    })
                })
            })
        })
    })
}

/// Ours, or asked to be given up for another, without an answer.
fn is_guest_here(machine: StateMachine) -> bool {
    machine.ownership == Ownership::Ours
        || machine.ownership == Ownership::Awaiting && machine.start_unanswered
}

fn status(kind: JobKind, phase: Phase) -> JobStatus {
    JobStatus { job: 1, kind, phase, ..JobStatus::default() }
}

/// A source up to the answer of relinquish.
fn relinquished() -> StateMachine {
    let mut machine = StateMachine::new();
    machine.pause(LINK).unwrap();
    machine.paused(LINK, true, Running);
    machine.relinquish(LINK, MIGRATION).unwrap();
    machine
}

#[test]
fn relinquish_needs_a_guest_that_is_ours_and_was_paused_by_that_agent() {
    for before in all() {
        let mut machine = before;
        let allowed = match before.ownership {
            Ownership::Ours => before.pause == Pause::Paused { link: LINK },
            Ownership::Relinquished => before.requested_by == Some(LINK),
            Ownership::Gone | Ownership::Awaiting => false,
        };
        assert_eq!(machine.relinquish(LINK, MIGRATION).is_ok(), allowed, "{before:?}");
        let after = if allowed { Ownership::Relinquished } else { before.ownership };
        assert_eq!((machine.ownership, machine.pause), (after, before.pause), "{before:?}");
        if !allowed {
            assert_eq!(
                machine, before,
                "a refusal changes nothing, the migration under way among it"
            );
        }
    }
}

#[test]
fn a_guest_whose_memory_has_arrived_is_gone() {
    for before in all() {
        let mut machine = before;
        // The one that was attached before the one that gave the guest up knows nothing of it.
        let given_up = before.ownership == Ownership::Relinquished
            && before.requested_by.is_none_or(|requested_by| requested_by <= LINK);
        let allowed = given_up || before.ownership == Ownership::Gone;
        assert_eq!(machine.memory_arrived(LINK).is_ok(), allowed, "{before:?}");
        let ownership = if allowed { Ownership::Gone } else { before.ownership };
        assert_eq!(machine, StateMachine { ownership, ..before });
        assert!(!allowed || machine.migration().is_none(), "nothing is left to recover");
    }
}

#[test]
fn resume_without_force_is_for_who_was_asked() {
    for before in all() {
        let mut machine = before;
        let allowed = match before.ownership {
            Ownership::Ours => true,
            Ownership::Relinquished | Ownership::Awaiting => before.requested_by == Some(LINK),
            Ownership::Gone => false,
        };
        match machine.resume(LINK, false, false) {
            Ok(what) => {
                assert!(allowed, "{before:?}");
                // Or the agent that is attached next has paused it.
                let runs = is_guest_here(before) && before.pause.link() != Some(LINK);
                // The one that is awaited runs; one that was paused here goes back to what it was.
                let comes = before.ownership == Ownership::Awaiting && !before.start_unanswered;
                let goal =
                    ResumeAction::SetRunState(if comes { Running } else { before.run_state });
                assert_eq!(what, if runs { ResumeAction::Nothing } else { goal }, "{before:?}");
                if before.ownership == Ownership::Awaiting && before.start_unanswered {
                    assert_eq!(machine, before, "it is the guest before the one that is awaited");
                } else if what == ResumeAction::Nothing {
                    assert_eq!(machine.pause, before.pause, "{before:?}");
                } else {
                    assert_eq!(machine.ownership, Ownership::Ours, "{before:?}");
                }
            }
            Err(_) => {
                assert!(!allowed, "{before:?}");
                assert_eq!(machine, before);
            }
        }
    }
}

#[test]
fn resume_by_force_always_calls_the_vmm() {
    for before in all() {
        let mut machine = before;
        assert_eq!(machine.resume(OTHER, true, false), Ok(RUN), "{before:?}");
        assert_eq!(machine.ownership, Ownership::Ours, "{before:?}");
        machine.resumed(LINK, true);
        assert_eq!(machine.pause, Pause::Running);
        assert_eq!(machine.resume(LINK, false, false), Ok(ResumeAction::Nothing));
    }
}

#[test]
fn only_a_guest_that_is_here_is_paused_and_an_attempt_ends_the_say_of_the_one_before() {
    for before in all() {
        let mut machine = before;
        assert_eq!(machine.pause(LINK).is_ok(), is_guest_here(before), "{before:?}");
        if is_guest_here(before) {
            assert_eq!(machine, before);
        } else {
            assert!(machine.resume(LINK, false, false).is_err(), "{before:?}");
            assert_eq!(machine.ownership, before.ownership);
        }
    }
}

#[test]
fn the_end_of_the_agent_resumes_only_what_it_paused_and_is_ours() {
    for before in all() {
        let machine = before;
        let resumes = before.ownership == Ownership::Ours && before.pause.link() == Some(LINK);
        assert_eq!(
            machine.run_state_after_loss(LINK),
            resumes.then_some(before.run_state),
            "{before:?}"
        );
        assert_eq!(machine, before);
    }
}

#[test]
fn only_an_event_of_an_outgoing_job_moves_a_guest_that_was_given_up() {
    let phases = [
        Phase::Idle,
        Phase::Passes,
        Phase::Committing,
        Phase::Completed,
        Phase::Failed,
        Phase::Cancelled,
        Phase::Unconfirmed,
    ];
    for before in all() {
        for kind in [
            JobKind::None,
            JobKind::Outgoing,
            JobKind::Incoming,
            JobKind::Snapshot,
            JobKind::Restore,
        ] {
            for phase in phases {
                let mut machine = before;
                machine.event(LINK, &status(kind, phase));
                // An agent from before the one that asked for the line speaks of something else.
                let is_of_before = before.requested_by == Some(OTHER);
                let given = kind == JobKind::Outgoing
                    && before.ownership == Ownership::Relinquished
                    && !is_of_before;
                let expected = match phase {
                    Phase::Completed if given => {
                        StateMachine { ownership: Ownership::Gone, ..before }
                    }
                    Phase::Unconfirmed if given => StateMachine { requested_by: None, ..before },
                    _ => before,
                };
                assert_eq!(machine, expected, "{before:?} {kind:?} {phase:?}");
            }
        }
    }
}

#[test]
fn a_guest_that_is_refused_leaves_everything_as_it_was() {
    for before in all() {
        let mut machine = before;
        let kept = machine.begin_start(LINK);
        assert_eq!(machine.ownership, Ownership::Awaiting);
        machine.start_refused(kept);
        assert_eq!(machine, StateMachine { awaited_count: 1, ..before });
    }
}

#[test]
fn a_guest_that_is_refused_does_not_give_back_what_an_operator_s_restore_took() {
    for before in all() {
        let mut machine = before;
        let kept = machine.begin_start(LINK);
        machine.give_up(LINK, Some(Running)).unwrap();
        let allowed = machine;
        machine.start_refused(kept);
        assert_eq!(machine, allowed, "{before:?}");
        // Nor the other way around.
        let kept = machine.begin_start(LINK);
        machine.start_refused(kept);
        assert_eq!(machine, StateMachine { awaited_count: 3, ..allowed }, "{before:?}");
    }
}

#[test]
fn the_resume_that_ends_a_snapshot_is_not_the_one_of_the_guest_that_is_awaited() {
    for accepted in [true, false] {
        let mut machine = StateMachine::new();
        machine.pause(LINK).unwrap();
        machine.paused(LINK, true, Running);
        let kept = machine.begin_start(LINK);
        assert_eq!(machine.resume(LINK, false, false), Ok(RUN));
        machine.resumed(LINK, true);
        assert_eq!(machine.ownership(), Ownership::Awaiting);
        if accepted {
            machine.start_answered();
            machine.load_state(LINK).unwrap();
            assert_eq!(machine.resume(LINK, false, false), Ok(RUN), "the guest that came");
        } else {
            machine.start_refused(kept);
            assert_eq!(machine.resume(LINK, false, false), Ok(ResumeAction::Nothing));
        }
        assert_eq!(machine.ownership(), Ownership::Ours);
    }
}

#[test]
fn a_snapshot_goes_on_until_the_agent_accepts_to_bring_a_guest_or_brings_it() {
    for before in all() {
        let mut asked = before;
        asked.begin_start(LINK);
        assert_eq!(asked.watch_writes(LINK).is_ok(), is_guest_here(before), "{before:?}");
        assert_eq!(asked.pause(LINK).is_ok(), is_guest_here(before), "{before:?}");
        if !is_guest_here(before) {
            continue;
        }
        assert!(
            asked.relinquish(LINK, MIGRATION).is_err()
                && asked.run_state_after_loss(LINK).is_none(),
            "{before:?}"
        );
        asked.paused(LINK, true, Running);
        assert!(
            asked.relinquish(LINK, MIGRATION).is_err()
                && asked.run_state_after_loss(LINK).is_none(),
            "half of another guest may be here"
        );

        let mut answered = asked;
        answered.start_answered();
        let mut brought = asked;
        brought.load_state(LINK).unwrap();
        for mut machine in [answered, brought] {
            assert_eq!(machine.ownership, Ownership::Awaiting);
            assert_eq!(
                machine.watch_writes(LINK),
                Err(Forbidden::NotOursToSave(Ownership::Awaiting))
            );
            assert_eq!(machine.pause(LINK), Err(Forbidden::NotOurs(Ownership::Awaiting)));
        }
        // The one who has no say changes nothing.
        let mut other = asked;
        assert!(other.load_state(OTHER).is_err() && other.resume(OTHER, false, false).is_err());
        assert_eq!(other, asked);
    }
}

#[test]
fn state_is_loaded_only_from_the_agent_that_was_asked() {
    for before in all() {
        let mut machine = before;
        let asked = before.ownership == Ownership::Awaiting && before.requested_by == Some(LINK);
        assert_eq!(machine.load_state(LINK).is_ok(), asked, "{before:?}");
        assert_eq!(
            machine,
            if asked { StateMachine { start_unanswered: false, ..before } } else { before }
        );
    }
}

#[test]
fn an_operator_restores_over_any_guest_but_one_that_may_return() {
    for before in all() {
        let mut machine = before;
        let allowed = before.ownership != Ownership::Relinquished;
        assert_eq!(machine.check_may_give_up(LINK).is_ok(), allowed, "{before:?}");
        assert_eq!(machine, before, "the VMM is still to be asked");
        if allowed {
            machine.give_up(LINK, Some(Running)).unwrap();
            assert!(
                machine.load_state(LINK).is_ok() && machine.load_state(OTHER).is_err(),
                "{before:?}"
            );
            assert_eq!(
                machine.run_state_after_loss(LINK),
                None,
                "nobody runs what is half restored"
            );
            for phase in [Phase::Failed, Phase::Cancelled, Phase::Completed] {
                machine.event(LINK, &status(JobKind::Restore, phase));
                assert_eq!(machine.ownership(), Ownership::Awaiting, "{before:?}");
            }
            assert_eq!(
                machine.resume(OTHER, false, false),
                Err(Forbidden::ForceOnly(Ownership::Awaiting))
            );
            assert_eq!(machine.resume(LINK, false, false), Ok(RUN), "{before:?}");
        }
    }
}

#[test]
fn writes_are_watched_only_of_a_guest_that_is_here() {
    for before in all() {
        assert_eq!(before.watch_writes(LINK).is_ok(), is_guest_here(before), "{before:?}");
    }
}

#[test]
fn take_by_force_is_like_new() {
    for mut machine in all() {
        machine.take_by_force();
        assert_eq!(machine, StateMachine::new());
    }
}

#[test]
fn an_agent_that_dies_before_the_line_leaves_the_guest_here() {
    let mut machine = StateMachine::new();
    machine.pause(LINK).unwrap();
    machine.paused(LINK, true, Running);
    assert_eq!(machine.run_state_after_loss(LINK), Some(Running));

    let mut machine = relinquished();
    machine.relinquish_unanswered(LINK);
    assert_eq!(machine.run_state_after_loss(LINK), Some(Running), "the agent never had the answer");
}

#[test]
fn an_agent_that_dies_after_the_line_leaves_it_standing_still() {
    let mut machine = relinquished();
    assert_eq!(machine.run_state_after_loss(LINK), None);
    assert_eq!(machine.ownership(), Ownership::Relinquished);
    assert!(
        machine.resume(OTHER, false, false).is_err(),
        "a new agent knows nothing of that commit"
    );
    assert_eq!(machine.resume(OTHER, true, false), Ok(RUN));
}

/// A pause that failed may have stopped a part of the guest: two of four vCPUs, its devices. So it
/// is no ground to give the guest up, and still something to undo, by the agent or by its end.
#[test]
fn a_pause_that_failed_counts_as_not_paused_and_is_undone_like_one_that_did_not() {
    let mut machine = StateMachine::new();
    machine.paused(LINK, false, Running);
    assert!(machine.relinquish(LINK, MIGRATION).is_err());
    assert!(
        machine.is_paused_for_agent(),
        "an agent that hangs is found as soon as for a guest that is paused"
    );
    assert_eq!(machine.run_state_after_loss(LINK), Some(Running), "the agent died");
    assert_eq!(machine.resume(LINK, false, false), Ok(RUN));
    machine.resumed(LINK, true);
    assert_eq!((machine.run_state_after_loss(LINK), machine.is_paused_for_agent()), (None, false));
}

#[test]
fn a_resume_that_failed_is_tried_again() {
    let mut machine = StateMachine::new();
    machine.give_up(LINK, Some(Running)).unwrap();
    machine.load_state(LINK).unwrap();
    assert_eq!(machine.resume(LINK, false, false), Ok(RUN));
    machine.resumed(LINK, false);
    assert_eq!(machine.resume(LINK, false, false), Ok(RUN));

    let mut machine = StateMachine::new();
    machine.paused(LINK, true, Running);
    assert_eq!(machine.resume(LINK, false, false), Ok(RUN));
    machine.resumed(LINK, false);
    assert_eq!(
        machine.run_state_after_loss(LINK),
        Some(Running),
        "the end of the agent tries again"
    );
}

#[test]
fn a_guest_that_its_operator_paused_goes_back_to_that_whoever_lets_go_of_it() {
    let mut machine = StateMachine::new();
    assert_eq!(machine.run_state_before_pause(), None, "its VMM knows");
    machine.pause(LINK).unwrap();
    machine.paused(LINK, true, Paused);
    assert_eq!(machine.run_state_before_pause(), Some(Paused));
    assert_eq!(machine.run_state_after_loss(LINK), Some(Paused), "the agent died");
    let mut given_up = machine;
    given_up.relinquish(LINK, MIGRATION).unwrap();
    // A failure, before the line and after it, and whatever the agent says of it.
    for mut machine in [machine, given_up] {
        assert_eq!(machine.resume(LINK, false, false), Ok(STAY));
        assert_eq!(machine.ownership(), Ownership::Ours);
        machine.resumed(LINK, true);
        assert_eq!(machine.run_state_before_pause(), None);
        assert_eq!(machine.resume(LINK, false, false), Ok(ResumeAction::Nothing));
    }
    assert_eq!(
        given_up.resume(OTHER, true, false),
        Ok(RUN),
        "an operator who forces it wants it to run"
    );
}

#[test]
fn a_pause_that_failed_does_not_run_a_guest_that_was_paused() {
    let mut machine = StateMachine::new();
    machine.paused(LINK, false, Paused);
    assert_eq!(
        machine.run_state_before_pause(),
        Some(Paused),
        "a second attempt does not ask again"
    );
    assert_eq!(machine.resume(LINK, false, false), Ok(STAY));
}

#[test]
fn a_guest_that_was_given_up_for_none_goes_on() {
    for before in all().filter(|before| before.ownership != Ownership::Relinquished) {
        for run_state in [Some(Running), Some(Paused), None] {
            let mut machine = before;
            machine.give_up(LINK, run_state).unwrap();
            assert_eq!(
                machine.resume(OTHER, false, false),
                Err(Forbidden::ForceOnly(Ownership::Awaiting)),
                "another agent was not asked"
            );
            // What the agent says of the guest that it would have brought does not count.
            let returned = machine.resume(LINK, false, true);
            match (before.ownership, run_state) {
                (Ownership::Ours, Some(run_state)) => {
                    assert_eq!(returned, Ok(ResumeAction::SetRunState(run_state)), "{before:?}");
                    assert_eq!(machine.ownership(), Ownership::Ours);
                }
                (Ownership::Ours, None) => {
                    assert_eq!(returned, Ok(ResumeAction::Nothing), "its memory is lost");
                    assert_eq!(machine.ownership(), Ownership::Awaiting);
                }
                (ownership, _) => {
                    assert_eq!(returned, Ok(ResumeAction::Nothing), "there was none");
                    assert_eq!(machine.ownership(), ownership);
                }
            }
        }
    }
}

#[test]
fn a_guest_that_comes_is_what_the_agent_says_and_not_what_the_one_before_was() {
    // The next agent pauses nothing while this one brings a guest.
    for before in all().filter(|before| before.pause.link() != Some(OTHER)) {
        for paused in [false, true] {
            let mut machine = before;
            machine.give_up(LINK, Some(Running)).unwrap();
            machine.load_state(LINK).unwrap();
            let goal = if paused { STAY } else { RUN };
            assert_eq!(machine.resume(LINK, false, paused), Ok(goal), "{before:?}");
            assert_eq!(machine.ownership(), Ownership::Ours);
            machine.resumed(LINK, false);
            assert_eq!(
                machine.resume(LINK, false, false),
                Ok(goal),
                "it is tried again: {before:?}"
            );
            machine.resumed(LINK, true);
            assert_eq!(machine.resume(LINK, false, paused), Ok(ResumeAction::Nothing));
        }
    }
}

#[test]
fn an_agent_that_was_replaced_begins_nothing_and_changes_nothing() {
    for before in all() {
        let mut machine = StateMachine { agent: OTHER, ..before };
        let kept = machine;
        assert_eq!(machine.pause(LINK), Err(Forbidden::Replaced));
        assert_eq!(machine.check_may_give_up(LINK), Err(Forbidden::Replaced));
        assert_eq!(
            machine.give_up(LINK, Some(Running)),
            Err(Forbidden::Replaced),
            "the VMM was asked before it was replaced"
        );
        assert_eq!(machine.load_state(LINK), Err(Forbidden::Replaced));
        assert_eq!(machine.watch_writes(LINK), Err(Forbidden::Replaced));
        assert_eq!(machine.relinquish(LINK, MIGRATION), Err(Forbidden::Replaced));
        assert_eq!(machine.resume(LINK, true, false), Err(Forbidden::Replaced));
        assert_eq!(machine, kept);
        // Its word about a guest that it had is heard.
        let mut unreplaced = before;
        assert_eq!(
            machine.resume(LINK, false, false),
            unreplaced.resume(LINK, false, false),
            "{before:?}"
        );
        assert_eq!(machine, StateMachine { agent: OTHER, ..unreplaced });
    }
}

#[test]
fn the_agent_before_does_not_resume_what_the_next_one_has_paused() {
    for success in [true, false] {
        let mut machine = StateMachine::new();
        machine.admit(LINK);
        machine.pause(LINK).unwrap();
        machine.paused(LINK, true, Paused);
        machine.admit(OTHER);
        machine.pause(OTHER).unwrap();
        machine.paused(OTHER, success, machine.run_state_before_pause().unwrap());
        assert_eq!(machine.run_state_after_loss(LINK), None);
        assert_eq!(machine.resume(LINK, false, false), Ok(ResumeAction::Nothing));
        assert_eq!(
            machine.run_state_after_loss(OTHER),
            Some(Paused),
            "as its operator had it before either"
        );
        assert_eq!(machine.relinquish(OTHER, MIGRATION).is_ok(), success);
    }
}

#[test]
fn the_end_of_the_agent_before_takes_nothing_from_the_guest_that_the_next_one_brings() {
    let mut machine = StateMachine::new();
    machine.admit(LINK);
    machine.begin_start(LINK);
    machine.start_answered();
    machine.admit(OTHER);
    machine.begin_start(OTHER);
    machine.start_answered();
    assert!(machine.stop_awaiting(LINK), "who waits for its memory is let go all the same");
    assert_eq!(machine.load_state(OTHER), Ok(()));
    assert_eq!(machine.resume(OTHER, false, false), Ok(RUN));
}

#[test]
fn a_guest_that_is_paused_while_another_is_refused_does_not_stay_paused_for_good() {
    let mut machine = StateMachine::new();
    machine.admit(LINK);
    machine.paused(LINK, true, Running);
    machine.admit(OTHER);
    let before = machine.begin_start(OTHER);
    assert_eq!(machine.run_state_after_loss(LINK), None, "half of another guest may be here");
    machine.start_refused(before);
    assert_eq!(machine.run_state_after_loss(OTHER), Some(Running));
    assert_eq!(machine.resume(OTHER, false, false), Ok(RUN));
}

#[test]
fn a_refused_relinquish_leaves_the_migration_under_way_as_it_was() {
    let mut machine = relinquished();
    assert_eq!(machine.migration(), Some(MIGRATION));
    let another = Migration { session: [2; 16], release: false };
    assert!(machine.relinquish(OTHER, another).is_err());
    assert_eq!(machine.migration(), Some(MIGRATION));
    machine.take_by_force();
    assert_eq!(machine.migration(), None);
}
