//! Who may run the guest: `one-owner`, seen from the VMM, in one place.
//!
//! The destination never runs before it received the commit; the source never runs after it may
//! have been sent. The agent asks for the turn of that line with the relinquish hook; between its
//! answer and the agent's word that no commit left (a resume hook), nobody but an operator may
//! resume the guest, not even when the agent dies. That word counts only from the agent that asked,
//! and only until its job ended or another began: a new agent, or a new attempt, knows nothing of
//! that commit.
//!
//! ```text
//!            relinquish                outgoing completed
//!   Ours ------------------> Relinquished -------------> Gone
//!    ^  ^------ resume ---------'                          |
//!    |                                                     |
//!    +-- resume ---- Awaiting <---- start incoming --------+--- (from any)
//!                       ^---------- start restore ---------+--- (from any; if an operator
//!                                                          starts it, not from Relinquished)
//!    take by force, resume by force: Ours from any
//! ```
//!
//! A guest is awaited as soon as it is asked for, since it may come sooner than the agent's answer.
//! Until that comes, the agent may also be in the middle of a snapshot, and about to refuse: so
//! what a snapshot needs is still allowed then, unless a guest comes. The resume that ends the
//! snapshot is not the one of the guest that is awaited, whose state is always loaded before.
//!
//! The run state is kept beside it. A guest that its operator has paused is paused once more by a
//! job, and goes back to what it was when the job lets go of it: it is not run by a failure. A
//! guest that a job has brought is what the agent says.
//!
//! The state machine does no I/O and calls no hook: it says what to do. The lock around it is held
//! for a few instructions only.
//!
//! # Two agents at once
//!
//! After a reattach the hook channel of the old agent may still have requests to handle, and its
//! end to deal with, on a thread of its own. Two rules keep it from harming the next agent:
//!
//! - The hook that a decision leads to is called under the
//!   [turn](SharedOwnership::lock_guest_hooks), and the machine hears the result before the turn
//!   ends. So no guest is resumed for the old agent after the next one has paused it.
//! - The machine knows the current agent. What an earlier one asks to begin is refused
//!   ([`Forbidden::Replaced`]); its word about a guest that it had is still heard.

use crate::sync::lock;
use pageferry_protocol::control::job::{JobKind, JobStatus, Phase, RunState};
use std::sync::{Mutex, MutexGuard};

/// Whether the guest is this VMM's to run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ownership {
    /// This VMM may run the guest.
    Ours,
    /// Given up, or perhaps given up: the guest stands still here, and must.
    /// [`Client::take_by_force`](crate::Client::take_by_force) is for an operator who knows that
    /// the destination does not run.
    Relinquished,
    /// The destination confirmed that it runs the guest.
    Gone,
    /// An incoming migration or a restore was started, and its guest is not ours yet.
    Awaiting,
}

/// What the pause and resume hooks did to the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Pause {
    /// No hook has paused it: it runs, or its operator has paused it.
    Running,
    /// A hook of this connection failed halfway: part of the guest may be paused. It counts as not
    /// paused, but it is resumed like one that is, also when the agent is lost.
    Uncertain {
        /// The connection.
        link: u64,
    },
    /// Paused by the agent on this connection.
    Paused {
        /// The connection.
        link: u64,
    },
}

impl Pause {
    /// The connection that a hook paused the guest for, or perhaps did.
    fn link(self) -> Option<u64> {
        match self {
            Self::Running => None,
            Self::Uncertain { link } | Self::Paused { link } => Some(link),
        }
    }
}

/// A hook that is not allowed now, in words for the agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Forbidden {
    #[error("ownership is {0:?}: there is nothing to give up")]
    NothingToGive(Ownership),
    #[error("the guest is not paused: it may not be given up while it runs")]
    NotPaused,
    #[error("ownership is {0:?}: the guest is not this VMM's to pause")]
    NotOurs(Ownership),
    #[error("ownership is {0:?}: the guest is not this VMM's to save")]
    NotOursToSave(Ownership),
    #[error(
        "ownership is Relinquished: the guest that was given up may have to run here again; resume it by force before another is restored"
    )]
    MayReturn,
    #[error("ownership is {0:?}: this agent was not asked for an incoming migration or a restore")]
    NotAwaited(Ownership),
    #[error("ownership is {0:?}: only force resumes the guest here")]
    ForceOnly(Ownership),
    #[error("another agent was attached in place of this one: nothing more begins for it")]
    Replaced,
}

/// What to do about a resume hook.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ResumeAction {
    /// Tell the VMM that the guest is to be so.
    SetRunState(RunState),
    /// No hook has paused it: just say so.
    Nothing,
}

/// The state machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct StateMachine {
    ownership: Ownership,
    pause: Pause,
    /// What the guest goes back to with the next resume, while `pause` is not [`Pause::Running`].
    run_state: RunState,
    /// The connection whose agent may still say that the guest is to run here: while relinquished,
    /// that no commit left; while awaiting, that one arrived.
    requested_by: Option<u64>,
    /// While awaiting: the agent has neither answered nor brought anything, and the guest was ours
    /// before.
    start_unanswered: bool,
    /// How often a guest was awaited. Tells who asked for the one that is.
    awaited_count: u64,
    /// The connection of the current agent. Later ones have larger numbers.
    agent: u64,
    /// The migration that the guest was given up to last.
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
            awaited_count: 0,
            agent: 0,
            migration: Migration { session: [0; 16], release: false },
        }
    }

    /// The agent of this connection is the current one from now on. To be called before it can ask
    /// anything.
    pub(crate) fn admit(&mut self, link: u64) {
        self.agent = link;
    }

    /// Refuses to begin anything for an agent that was replaced.
    fn check_current(&self, link: u64) -> Result<(), Forbidden> {
        if link < self.agent { Err(Forbidden::Replaced) } else { Ok(()) }
    }

    pub(crate) fn ownership(&self) -> Ownership {
        self.ownership
    }

    /// True if the guest was given up, or perhaps: then the agent, even one that is lost, may be
    /// what the guest still gets its memory from, wherever it runs.
    pub(crate) fn may_run_elsewhere(&self) -> bool {
        matches!(self.ownership, Ownership::Relinquished | Ownership::Gone)
    }

    /// The VMM allowed that a guest is restored. Refused if the agent was replaced while the VMM
    /// thought about it: the next one may already bring another guest.
    pub(crate) fn allow_restore(&mut self, link: u64) -> Result<(), Forbidden> {
        self.check_current(link)?;
        self.set_awaiting(link);
        Ok(())
    }

    fn set_awaiting(&mut self, link: u64) {
        self.ownership = Ownership::Awaiting;
        self.requested_by = Some(link);
        self.start_unanswered = false;
        self.awaited_count += 1;
    }

    /// A guest is about to be asked for, by an incoming migration or a restore. Returns what to
    /// hand to [`StateMachine::start_refused`]; otherwise [`StateMachine::start_answered`] follows.
    pub(crate) fn begin_start(&mut self, link: u64) -> StateMachine {
        let before = *self;
        self.set_awaiting(link);
        self.start_unanswered = before.is_guest_here();
        before
    }

    /// The agent refused it: what was before holds, unless something else happened meanwhile, such
    /// as that the VMM allowed an operator's restore.
    pub(crate) fn start_refused(&mut self, before: StateMachine) {
        if self.ownership == Ownership::Awaiting && self.awaited_count == before.awaited_count + 1 {
            self.ownership = before.ownership;
            self.requested_by = before.requested_by;
            self.start_unanswered = before.start_unanswered;
        }
    }

    /// The agent did not refuse it.
    pub(crate) fn start_answered(&mut self) {
        self.start_unanswered = false;
    }

    /// True if the guest is ours, or is as long as the agent has not said that it brings another.
    fn is_guest_here(&self) -> bool {
        match self.ownership {
            Ownership::Ours => true,
            Ownership::Awaiting => self.start_unanswered,
            Ownership::Relinquished | Ownership::Gone => false,
        }
    }

    /// The agent asks, for an operator, whether a guest may be restored here. To be called before
    /// the VMM is asked, which then decides. Not while the guest may have to run here again: it
    /// would be gone, and nowhere else.
    pub(crate) fn prepare_restore(&self, link: u64) -> Result<(), Forbidden> {
        self.check_current(link)?;
        match self.ownership {
            Ownership::Ours | Ownership::Gone | Ownership::Awaiting => Ok(()),
            Ownership::Relinquished => Err(Forbidden::MayReturn),
        }
    }

    /// The agent brings the state of a guest. Only the one that was asked may: nobody else's guest
    /// is to overwrite ours.
    pub(crate) fn load_state(&mut self, link: u64) -> Result<(), Forbidden> {
        self.check_current(link)?;
        match self.ownership {
            Ownership::Awaiting if self.requested_by == Some(link) => {
                self.start_unanswered = false;
                Ok(())
            }
            other => Err(Forbidden::NotAwaited(other)),
        }
    }

    /// The agent of this connection is lost, which was to bring a guest: from now on it cannot have
    /// it run any more. False if it has already.
    pub(crate) fn stop_awaiting(&mut self, link: u64) -> bool {
        let awaiting = self.ownership == Ownership::Awaiting;
        // The next agent may bring another.
        if awaiting && self.requested_by == Some(link) {
            self.requested_by = None;
            self.start_unanswered = false;
        }
        awaiting
    }

    /// The agent asks for a pause. Only a guest that is ours can be paused; that it is asked for is
    /// the beginning of another attempt, which will end with a resume if it fails.
    pub(crate) fn pause(&mut self, link: u64) -> Result<(), Forbidden> {
        self.check_current(link)?;
        if self.is_guest_here() {
            return Ok(());
        }
        self.requested_by = None;
        Err(Forbidden::NotOurs(self.ownership))
    }

    /// The agent asks to watch the guest's writes. Elsewhere it writes, or nowhere.
    pub(crate) fn watch_writes(&self, link: u64) -> Result<(), Forbidden> {
        self.check_current(link)?;
        if self.is_guest_here() { Ok(()) } else { Err(Forbidden::NotOursToSave(self.ownership)) }
    }

    /// The run state of a guest that a hook has paused, or may have: what it was before. `None` if
    /// no hook has: then the VMM knows.
    pub(crate) fn run_state_before_pause(&self) -> Option<RunState> {
        (self.pause != Pause::Running).then_some(self.run_state)
    }

    /// The VMM's pause returned. The guest's run state was `before`.
    pub(crate) fn paused(&mut self, link: u64, success: bool, before: RunState) {
        self.run_state = before;
        self.pause = if success { Pause::Paused { link } } else { Pause::Uncertain { link } };
    }

    /// The agent asks for the line of `one-owner`, for this migration. To be called before it is
    /// answered. A refusal changes nothing: another migration may be under way.
    pub(crate) fn relinquish(&mut self, link: u64, migration: Migration) -> Result<(), Forbidden> {
        self.check_current(link)?;
        match (self.ownership, self.pause) {
            (Ownership::Relinquished, _) if self.requested_by == Some(link) => {}
            (Ownership::Ours, Pause::Paused { link: paused_by }) if paused_by == link => {
                self.ownership = Ownership::Relinquished;
                self.requested_by = Some(link);
            }
            (Ownership::Ours, _) => return Err(Forbidden::NotPaused),
            (other, _) => return Err(Forbidden::NothingToGive(other)),
        }
        self.migration = migration;
        Ok(())
    }

    /// The migration that the guest was given up to; `None` if it was not, or not to one that could
    /// be recovered.
    fn migration(&self) -> Option<Migration> {
        let recoverable =
            self.ownership == Ownership::Relinquished && self.migration.session != [0; 16];
        recoverable.then_some(self.migration)
    }

    /// The answer to relinquish could not be sent whole. So the agent does not have it, and no
    /// commit can leave.
    pub(crate) fn relinquish_unanswered(&mut self, link: u64) {
        if self.ownership == Ownership::Relinquished && self.requested_by == Some(link) {
            self.ownership = Ownership::Ours;
            self.requested_by = None;
        }
    }

    /// The agent says that the guest is ours. It knows that no commit left, or that one arrived; or
    /// an operator takes it by force. Ownership turns before the VMM resumes the guest: if that
    /// fails, nobody else has it either. A guest that the agent has brought stays paused if
    /// `paused` says so; any other is as it was before it was paused. An operator who forces it
    /// wants it to run.
    ///
    /// A guest that a later agent has paused is not for an earlier one to resume, nor may an
    /// earlier one force anything: its operator got no answer, and has to ask again.
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
            // Of the guest that is still here: whether another comes is not known yet.
            return Ok(self
                .run_state_before_pause()
                .map_or(ResumeAction::Nothing, ResumeAction::SetRunState));
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

    /// The VMM's resume for this connection returned.
    pub(crate) fn resumed(&mut self, link: u64, success: bool) {
        match (success, self.pause) {
            (true, _) => self.pause = Pause::Running,
            (false, Pause::Running) => self.pause = Pause::Uncertain { link },
            // Still paused: a resume, or the end of the agent, tries again.
            (false, _) => {}
        }
    }

    /// The agent of this connection reports how a job stands. One before the agent that the guest
    /// was given up to knows nothing of that migration.
    pub(crate) fn event(&mut self, link: u64, status: &JobStatus) {
        let is_of_before = self.requested_by.is_some_and(|requested_by| requested_by > link);
        if status.kind != JobKind::Outgoing
            || self.ownership != Ownership::Relinquished
            || is_of_before
        {
            return;
        }
        match status.phase {
            Phase::Completed => self.ownership = Ownership::Gone,
            Phase::Unconfirmed => self.requested_by = None,
            _ => {}
        }
    }

    /// True if the guest is paused for the agent, or may be, and can still be resumed here without
    /// it: it must not stay paused for an agent that hangs.
    pub(crate) fn is_paused_for_agent(&self) -> bool {
        self.is_guest_here() && self.pause != Pause::Running
    }

    /// True if the guest has left, or was given up by an agent that is not the one of this
    /// connection: it comes back by force only.
    pub(crate) fn has_left(&self, link: u64) -> bool {
        match self.ownership {
            Ownership::Gone => true,
            Ownership::Relinquished => self.requested_by != Some(link),
            Ownership::Ours | Ownership::Awaiting => false,
        }
    }

    /// The hook channel of this connection ended. Returns what the guest is to go back to, if it
    /// was paused through that channel, or may have been, and is ours. Through an earlier one, too:
    /// its end may have come while another guest was awaited, which the agent refused later.
    pub(crate) fn run_state_after_loss(&self, link: u64) -> Option<RunState> {
        let paused = self.pause.link().is_some_and(|paused_by| paused_by <= link);
        (self.ownership == Ownership::Ours && paused).then_some(self.run_state)
    }

    /// The operator's decision. The VMM resumes the guest by itself.
    pub(crate) fn take_by_force(&mut self) {
        *self = Self { awaited_count: self.awaited_count, agent: self.agent, ..Self::new() };
    }
}

/// What an agent has to know that goes on with a migration which another one began.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Migration {
    /// What tells it from others; zeroes if it cannot be recovered.
    pub(crate) session: [u8; 16],
    /// Pages are freed here as they arrive there.
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
    /// the end of the VMM's hook that it leads to. Hold it from the decision until the machine has
    /// the hook's result.
    ///
    /// Only hook channels take it, and before any other lock. A hook may use the client while it is
    /// held, so nobody may wait for it who holds the session.
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
