// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Who may run the guest: `one-owner` on the side of the VMM, in one state machine.
//!
//! The destination never runs the guest before it has received the commit. The source never runs it
//! after the commit may have been sent. The agent asks for that point with the relinquish hook.
//!
//! After the answer, only an operator may resume the guest, even if the agent dies, unless the
//! agent says by a resume hook that no commit was sent. That counts only from the agent that asked,
//! and only until its job has ended or another has begun: a new agent, or a new attempt, knows
//! nothing of the old commit.
//!
//! ```text
//!            relinquish                outgoing completed, memory arrived
//!   Ours ------------------> Relinquished -------------> Gone
//!    ^  ^------ resume ---------'                          |
//!    |                                                     |
//!    +-- resume ---- Awaiting <---- start incoming --------+--- (from any)
//!                       ^---------- start restore ---------+--- (if an operator starts
//!                                                          either: not from Relinquished)
//!    take by force, resume by force: Ours from any
//! ```
//!
//! # The answer to a start
//!
//! The client awaits a guest as soon as it sends the request, since the guest may come before the
//! answer. Until the answer comes, the agent may also be in the middle of a snapshot and about to
//! refuse. So everything that a snapshot needs is still allowed, unless a guest comes. The resume
//! that ends the snapshot cannot be taken for the resume of the awaited guest, since the state of
//! that guest is always loaded first.
//!
//! # A guest that is given up for an operator
//!
//! An operator may have another guest brought here. The VMM agrees and stops its own. If the agent
//! then brings none, and has not changed memory, it sends a resume without a state before it: the
//! guest that was there goes on.
//!
//! # The run state
//!
//! A guest that its operator has paused is paused once more by a job, and returns to its run state
//! when the job is done with it: a failure does not run it. For a guest that a job has brought, the
//! agent says the run state.
//!
//! # Two agents
//!
//! After a reattach the hook channel of the old agent may still have requests to handle, and its
//! end, on its own thread. Two rules keep it from harming the next agent:
//!
//! - A decision and the hook that follows from it happen under one lock
//!   ([`SharedOwnership::lock_guest_hooks`]), and the machine hears the result before that lock is
//!   released. So no guest is resumed for the old agent after the next one has paused it.
//! - The machine knows the current agent. A request of an earlier agent that begins something is
//!   refused ([`Forbidden::Replaced`]). What it says about a guest that it had still counts.
//!
//! The state machine does no I/O and calls no hook. It says what to do. The lock around it is held
//! for a few instructions only.

use crate::sync::lock;
use pageferry_protocol::control::job::{JobKind, JobStatus, Phase, RunState};
use std::sync::{Mutex, MutexGuard};

/// Whether this VMM may run the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ownership {
    /// This VMM may run the guest.
    Ours,
    /// The guest was given up, or may have been: it is paused here and must stay so.
    /// [`Client::take_by_force`](crate::Client::take_by_force) is for an operator who knows that
    /// the guest does not run at the destination.
    Relinquished,
    /// The destination has confirmed that it runs the guest.
    Gone,
    /// An incoming migration or a restore was started, and its guest has not arrived yet.
    Awaiting,
}

/// What the pause and resume hooks did to the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Pause {
    /// No hook has paused it: it runs, or its operator has paused it.
    Running,
    /// A pause or resume hook failed halfway for this connection, and a part of the guest may be
    /// paused. The guest counts as not paused, but is resumed like a paused one, also when the
    /// agent is lost.
    Uncertain {
        /// The connection.
        link: u64,
    },
    /// A hook has paused it for the agent of this connection.
    Paused {
        /// The connection.
        link: u64,
    },
}

impl Pause {
    /// The connection for which a hook has paused the guest, or may have.
    fn link(self) -> Option<u64> {
        match self {
            Self::Running => None,
            Self::Uncertain { link } | Self::Paused { link } => Some(link),
        }
    }
}

/// What was before a guest was given up for another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct GivenUp {
    ownership: Ownership,
    /// `None` if there was no whole guest.
    run_state: Option<RunState>,
}

/// Why a hook is not allowed now, in words for the agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Forbidden {
    #[error("ownership is {0:?}: there is nothing to give up")]
    NothingToRelinquish(Ownership),
    #[error("the guest is not paused: it may not be given up while it runs")]
    NotPaused,
    #[error("ownership is {0:?}: the guest is not this VMM's to pause")]
    NotOurs(Ownership),
    #[error("ownership is {0:?}: the guest is not this VMM's to save")]
    NotOursToSave(Ownership),
    #[error(
        "ownership is Relinquished: the guest that was given up may have to run here again; resume it by force before another comes here"
    )]
    GuestMayReturn,
    #[error("ownership is {0:?}: this agent was not asked for an incoming migration or a restore")]
    NotAwaited(Ownership),
    #[error("ownership is {0:?}: only force resumes the guest here")]
    ForceOnly(Ownership),
    #[error("ownership is {0:?}: this agent has no guest at a destination")]
    NotGivenUp(Ownership),
    #[error("another agent was attached in place of this one: nothing more begins for it")]
    Replaced,
}

/// What to do for a resume hook.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ResumeAction {
    /// Bring the guest into this run state.
    SetRunState(RunState),
    /// No hook has paused the guest: just answer.
    Nothing,
}

/// The state machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct StateMachine {
    ownership: Ownership,
    pause: Pause,
    /// The run state that the next resume restores, while `pause` is not [`Pause::Running`].
    run_state: RunState,
    /// The connection whose agent may still say that the guest is to run here. While relinquished:
    /// that no commit was sent. While awaiting: that one has arrived.
    requested_by: Option<u64>,
    /// While awaiting: the agent has not answered the start and has brought nothing, and the guest
    /// was ours before.
    start_unanswered: bool,
    /// While awaiting: what was before the guest was given up for one that an operator brings,
    /// until that one has brought anything. The agent returns to it if it brings none.
    given_up: Option<GivenUp>,
    /// How often a guest was awaited. Tells which start the awaited guest belongs to.
    awaited_count: u64,
    /// The connection of the current agent. Later ones have larger numbers.
    agent: u64,
    /// The last migration that the guest was given up to.
    migration: Migration,
}

impl StateMachine {
    pub(crate) const fn new() -> Self {
        Self {
            ownership: Ownership::Ours,
            pause: Pause::Running,
            run_state: RunState::Running,
            requested_by: None,
            start_unanswered: false,
            given_up: None,
            awaited_count: 0,
            agent: 0,
            migration: Migration { session: [0; 16], release: false },
        }
    }

    /// Makes the agent of this connection the current one. Call it before the agent can send a
    /// request.
    pub(crate) fn admit(&mut self, link: u64) {
        self.agent = link;
    }

    /// Refuses a request of an agent that was replaced.
    fn check_current(&self, link: u64) -> Result<(), Forbidden> {
        if link < self.agent { Err(Forbidden::Replaced) } else { Ok(()) }
    }

    pub(crate) fn ownership(&self) -> Ownership {
        self.ownership
    }

    /// True if the guest was given up, or may have been. The guest may then get its memory from the
    /// agent, wherever it runs, even if that agent is lost here.
    pub(crate) fn may_run_elsewhere(&self) -> bool {
        matches!(self.ownership, Ownership::Relinquished | Ownership::Gone)
    }

    /// The VMM gives its guest up for another. `run_state` is that of the guest before the VMM
    /// stopped it; `None` if there was no whole guest. Refused if the agent was replaced meanwhile:
    /// the next agent may already bring another guest.
    pub(crate) fn give_up(
        &mut self, link: u64, run_state: Option<RunState>,
    ) -> Result<(), Forbidden> {
        self.check_current(link)?;
        let before = GivenUp { ownership: self.ownership, run_state };
        self.set_awaiting(link);
        self.given_up = Some(before);
        Ok(())
    }

    /// Awaits a guest of the agent of this connection.
    fn set_awaiting(&mut self, link: u64) {
        self.ownership = Ownership::Awaiting;
        self.requested_by = Some(link);
        self.start_unanswered = false;
        self.given_up = None;
        self.awaited_count += 1;
    }

    /// The client is about to send the start of an incoming migration or a restore. Returns the
    /// state to hand to [`StateMachine::start_refused`]; otherwise [`StateMachine::start_answered`]
    /// follows.
    pub(crate) fn begin_start(&mut self, link: u64) -> StateMachine {
        let before = *self;
        self.set_awaiting(link);
        self.start_unanswered = before.is_guest_here();
        before
    }

    /// The agent has refused the start. Returns to the state before, unless something else happened
    /// meanwhile, for example a restore that the VMM allowed to an operator.
    pub(crate) fn start_refused(&mut self, before: StateMachine) {
        if self.ownership == Ownership::Awaiting && self.awaited_count == before.awaited_count + 1 {
            self.ownership = before.ownership;
            self.requested_by = before.requested_by;
            self.start_unanswered = before.start_unanswered;
            self.given_up = before.given_up;
        }
    }

    /// The agent has not refused the start.
    pub(crate) fn start_answered(&mut self) {
        self.start_unanswered = false;
    }

    /// True if the guest is ours, or still is until the agent says that it brings another.
    fn is_guest_here(&self) -> bool {
        match self.ownership {
            Ownership::Ours => true,
            Ownership::Awaiting => self.start_unanswered,
            Ownership::Relinquished | Ownership::Gone => false,
        }
    }

    /// The agent asks, for an operator, whether another guest may come here. Call it before the
    /// VMM is asked, which then decides. Refused while our guest may have to run here again: it
    /// would be lost everywhere.
    pub(crate) fn check_may_give_up(&self, link: u64) -> Result<(), Forbidden> {
        self.check_current(link)?;
        match self.ownership {
            Ownership::Ours | Ownership::Gone | Ownership::Awaiting => Ok(()),
            Ownership::Relinquished => Err(Forbidden::GuestMayReturn),
        }
    }

    /// The agent brings the state of a guest. Only the agent that was asked for one may: no other
    /// guest is to overwrite ours.
    pub(crate) fn load_state(&mut self, link: u64) -> Result<(), Forbidden> {
        self.check_current(link)?;
        match self.ownership {
            Ownership::Awaiting if self.requested_by == Some(link) => {
                self.start_unanswered = false;
                self.given_up = None;
                Ok(())
            }
            other => Err(Forbidden::NotAwaited(other)),
        }
    }

    /// The agent of this connection is lost and can no longer have its guest resumed here. False if
    /// it has done so already.
    pub(crate) fn stop_awaiting(&mut self, link: u64) -> bool {
        let awaiting = self.ownership == Ownership::Awaiting;
        // Another agent may bring another guest.
        if awaiting && self.requested_by == Some(link) {
            self.requested_by = None;
            self.start_unanswered = false;
        }
        awaiting
    }

    /// The agent asks for a pause. Only a guest that is ours can be paused. The request also begins
    /// another attempt, which will end with a resume if it fails.
    pub(crate) fn pause(&mut self, link: u64) -> Result<(), Forbidden> {
        self.check_current(link)?;
        if self.is_guest_here() {
            return Ok(());
        }
        self.requested_by = None;
        Err(Forbidden::NotOurs(self.ownership))
    }

    /// The agent asks to watch the writes of the guest. A guest that is not here writes elsewhere,
    /// or nowhere.
    pub(crate) fn watch_writes(&self, link: u64) -> Result<(), Forbidden> {
        self.check_current(link)?;
        if self.is_guest_here() { Ok(()) } else { Err(Forbidden::NotOursToSave(self.ownership)) }
    }

    /// The run state before a hook paused the guest, or may have. `None` if no hook has: then the
    /// VMM knows it.
    pub(crate) fn run_state_before_pause(&self) -> Option<RunState> {
        (self.pause != Pause::Running).then_some(self.run_state)
    }

    /// The pause hook of the VMM has returned. The run state before was `before`.
    pub(crate) fn paused(&mut self, link: u64, success: bool, before: RunState) {
        self.run_state = before;
        self.pause = if success { Pause::Paused { link } } else { Pause::Uncertain { link } };
    }

    /// The agent asks to give the guest up to this migration (`one-owner`). Call it before the
    /// answer is sent. A refusal changes nothing: another migration may be under way.
    pub(crate) fn relinquish(&mut self, link: u64, migration: Migration) -> Result<(), Forbidden> {
        self.check_current(link)?;
        match (self.ownership, self.pause) {
            (Ownership::Relinquished, _) if self.requested_by == Some(link) => {}
            (Ownership::Ours, Pause::Paused { link: paused_by }) if paused_by == link => {
                self.ownership = Ownership::Relinquished;
                self.requested_by = Some(link);
            }
            (Ownership::Ours, _) => return Err(Forbidden::NotPaused),
            (other, _) => return Err(Forbidden::NothingToRelinquish(other)),
        }
        self.migration = migration;
        Ok(())
    }

    /// The migration that the guest was given up to; `None` if it was not given up, or that
    /// migration cannot be recovered.
    fn migration(&self) -> Option<Migration> {
        let recoverable =
            self.ownership == Ownership::Relinquished && self.migration.session != [0; 16];
        recoverable.then_some(self.migration)
    }

    /// The answer to relinquish could not be sent completely. So the agent does not have it, and no
    /// commit can be sent.
    pub(crate) fn relinquish_unanswered(&mut self, link: u64) {
        if self.ownership == Ownership::Relinquished && self.requested_by == Some(link) {
            self.ownership = Ownership::Ours;
            self.requested_by = None;
        }
    }

    /// The agent says that the guest is ours. It knows that no commit was sent, or that one has
    /// arrived; or an operator forces it. Ownership changes before the VMM resumes the guest: if
    /// that fails, nobody else has the guest either.
    ///
    /// A guest that the agent has brought stays paused if `paused` says so. Any other guest returns
    /// to its run state before the pause. An operator who forces it wants it to run.
    ///
    /// An earlier agent can neither resume a guest that a later agent has paused nor force
    /// anything. Its operator got no answer and has to ask again.
    pub(crate) fn resume(
        &mut self, link: u64, force: bool, paused: bool,
    ) -> Result<ResumeAction, Forbidden> {
        if force {
            self.check_current(link)?;
        }
        let allowed = match self.ownership {
            Ownership::Ours => true,
            Ownership::Relinquished | Ownership::Awaiting => self.requested_by == Some(link),
            Ownership::Gone => false,
        };
        if !allowed && !force {
            return Err(Forbidden::ForceOnly(self.ownership));
        }
        if self.is_guest_here()
            && !force
            && self.pause.link().is_some_and(|paused_by| paused_by > link)
        {
            return Ok(ResumeAction::Nothing);
        }
        if self.ownership == Ownership::Awaiting && self.start_unanswered && !force {
            // This is about the guest that is still here. Whether another comes is not known yet.
            return Ok(self
                .run_state_before_pause()
                .map_or(ResumeAction::Nothing, ResumeAction::SetRunState));
        }
        if let Some(before) = self.given_up.take().filter(|_| !force) {
            // The agent brings no other guest, and has not changed memory.
            self.requested_by = None;
            return Ok(match (before.ownership, before.run_state) {
                (Ownership::Ours, Some(run_state)) => {
                    self.ownership = Ownership::Ours;
                    ResumeAction::SetRunState(run_state)
                }
                // There is no guest that could run.
                (Ownership::Ours, None) => ResumeAction::Nothing,
                (before, _) => {
                    self.ownership = before;
                    ResumeAction::Nothing
                }
            });
        }
        let untouched = self.ownership == Ownership::Ours && self.pause == Pause::Running;
        self.run_state = match self.ownership {
            _ if force => RunState::Running,
            Ownership::Awaiting if paused => RunState::Paused,
            Ownership::Awaiting => RunState::Running,
            _ => self.run_state,
        };
        self.ownership = Ownership::Ours;
        self.requested_by = None;
        self.start_unanswered = false;
        Ok(if untouched && !force {
            ResumeAction::Nothing
        } else {
            ResumeAction::SetRunState(self.run_state)
        })
    }

    /// The resume hook of the VMM for this connection has returned.
    pub(crate) fn resumed(&mut self, link: u64, success: bool) {
        match (success, self.pause) {
            (true, _) => self.pause = Pause::Running,
            (false, Pause::Running) => self.pause = Pause::Uncertain { link },
            // Still paused: a resume, or the end of the agent, tries again.
            (false, _) => {}
        }
    }

    /// The agent of this connection reports the status of a job. An agent before the one that the
    /// guest was given up to knows nothing of that migration.
    pub(crate) fn event(&mut self, link: u64, status: &JobStatus) {
        if status.kind != JobKind::Outgoing || !self.is_given_up_by(link) {
            return;
        }
        match status.phase {
            Phase::Completed => self.ownership = Ownership::Gone,
            Phase::Unconfirmed => self.requested_by = None,
            _ => {}
        }
    }

    /// The agent of this connection says that the destination has all memory of the guest.
    pub(crate) fn memory_arrived(&mut self, link: u64) -> Result<(), Forbidden> {
        if self.ownership != Ownership::Gone && !self.is_given_up_by(link) {
            return Err(Forbidden::NotGivenUp(self.ownership));
        }
        self.ownership = Ownership::Gone;
        Ok(())
    }

    /// True if the guest was given up, and not by an agent after the one of this connection.
    fn is_given_up_by(&self, link: u64) -> bool {
        let is_of_before = self.requested_by.is_some_and(|requested_by| requested_by > link);
        self.ownership == Ownership::Relinquished && !is_of_before
    }

    /// True if the guest is paused for the agent, or may be, and can be resumed here without it. It
    /// must not stay paused for an agent that hangs.
    pub(crate) fn is_paused_for_agent(&self) -> bool {
        self.is_guest_here() && self.pause != Pause::Running
    }

    /// True if the guest has left, or was given up by another agent than that of this connection.
    /// It returns by force only.
    pub(crate) fn has_left(&self, link: u64) -> bool {
        match self.ownership {
            Ownership::Gone => true,
            Ownership::Relinquished => self.requested_by != Some(link),
            Ownership::Ours | Ownership::Awaiting => false,
        }
    }

    /// The hook channel of this connection has ended. Returns the run state to restore, if the
    /// guest is ours and was paused through this channel, or may have been. Also through an earlier
    /// channel: that one may have ended while another guest was awaited, which the agent refused
    /// later.
    pub(crate) fn run_state_after_loss(&self, link: u64) -> Option<RunState> {
        let paused = self.pause.link().is_some_and(|paused_by| paused_by <= link);
        (self.ownership == Ownership::Ours && paused).then_some(self.run_state)
    }

    /// The operator's decision. The VMM resumes the guest by itself.
    pub(crate) fn take_by_force(&mut self) {
        *self = Self { awaited_count: self.awaited_count, agent: self.agent, ..Self::new() };
    }
}

/// What a new agent needs to continue a migration of an earlier one.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Migration {
    /// Identifies the migration; zeroes if it cannot be recovered.
    pub(crate) session: [u8; 16],
    /// Pages are freed here as they arrive at the destination.
    pub(crate) release: bool,
}

/// The state machine that a client and its hook channels share.
#[derive(Debug)]
pub(crate) struct SharedOwnership {
    machine: Mutex<StateMachine>,
    guest_hooks: Mutex<()>,
}

/// The right to call the VMM's hooks that pause, resume or replace the guest.
#[derive(Debug)]
pub(crate) struct GuestHooksLock<'a>(
    #[expect(dead_code, reason = "held, not looked at")] MutexGuard<'a, ()>,
);

impl SharedOwnership {
    pub(crate) fn new() -> Self {
        Self { machine: Mutex::new(StateMachine::new()), guest_hooks: Mutex::new(()) }
    }

    /// The machine. Never hold it while calling a hook or the agent.
    pub(crate) fn lock(&self) -> MutexGuard<'_, StateMachine> {
        lock(&self.machine)
    }

    /// Waits until no other hook channel of this client is between a decision about the guest and
    /// the end of the hook that follows from it. Hold it from the decision until the machine has
    /// the result of the hook.
    ///
    /// Only hook channels take it, before any other lock. A hook may use the client while it is
    /// held, so no thread may wait for it while it holds the session.
    pub(crate) fn lock_guest_hooks(&self) -> GuestHooksLock<'_> {
        GuestHooksLock(lock(&self.guest_hooks))
    }

    /// The migration that the guest was given up to; `None` if it was not, or not to one that could
    /// be recovered.
    pub(crate) fn migration(&self) -> Option<Migration> {
        self.lock().migration()
    }
}

#[cfg(test)]
mod tests;
